"""Unpacks the parts of the wheels that the link folder needs.

Arguments: the folder to fill, then one `wheel`, `member or folder/ in the wheel`, `destination` triple per part.
A wheel member that is not named is never written; names that would leave the folder are refused.
"""

import os
import shutil
import sys
import zipfile


def unpack(target, wheel, wanted, destination):
    written = 0
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if wanted.endswith("/") and member.filename.startswith(wanted):
                path = os.path.join(target, destination, member.filename[len(wanted):])
            elif member.filename == wanted:
                path = os.path.join(target, destination)
            else:
                continue
            if not os.path.realpath(path).startswith(os.path.realpath(target) + os.sep):
                sys.exit(f"{member.filename} in {wheel} points outside the folder")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with archive.open(member) as source, open(path, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            written += 1
    if written == 0:
        sys.exit(f"{wheel} holds no {wanted}")


def main():
    target, *parts = sys.argv[1:]
    for index in range(0, len(parts), 3):
        unpack(target, *parts[index:index + 3])


main()
