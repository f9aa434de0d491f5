//! Small helpers for files that must be there whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::machine::Trouble;

/// Whether a write failed for want of space.
pub fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What a failed write means to the machine.
pub fn trouble(error: &io::Error) -> Trouble {
    if is_disk_full(error) { Trouble::DiskFull } else { Trouble::Unavailable }
}

/// Of files that are not whole yet.
const TEMPORARY: &str = ".tmp";

/// Writes `bytes` to `path` by way of a temporary file beside it. Not flushed to the medium: everything written this way
/// carries a digest and can be had again.
pub fn write_whole(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    write_with(path, |file| parts.iter().try_for_each(|part| file.write_all(part)))
}

/// The same, with the bytes that `write` writes.
pub fn write_with<T, E: From<io::Error>>(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<T, E>) -> Result<T, E> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(TEMPORARY);
    let temporary = path.with_file_name(name);
    let written = (|| {
        let mut file = BufWriter::new(File::create(&temporary)?);
        let done = write(&mut file)?;
        file.flush()?;
        fs::rename(&temporary, path)?;
        Ok(done)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Names that were given in `folder` so far survive a power loss.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Removes what writes left in `folder` that a kill broke off. To be called before anything is written there.
pub fn remove_temporary(folder: &Path) -> io::Result<()> {
    stems(folder, TEMPORARY)?.iter().try_for_each(|stem| remove(&folder.join(format!("{stem}{TEMPORARY}"))))
}

/// Removes a file that may be gone already.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Names of the files in `folder` with this ending, without it.
pub fn stems(folder: &Path, ending: &str) -> io::Result<Vec<String>> {
    let mut stems = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        if let Some(stem) = name.to_str().and_then(|name| name.strip_suffix(ending)) {
            stems.push(stem.to_owned());
        }
    }
    Ok(stems)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_whole_or_not_at_all_and_what_a_kill_broke_off_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, names) = (folder.path().join("a"), |ending| stems(folder.path(), ending).unwrap());
        write_whole(&path, &[b"one", b"two"]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"onetwo");
        let broken = |file: &mut dyn Write| file.write_all(b"thr").and(Err::<(), _>(io::Error::other("the end")));
        assert!(write_with(&path, broken).is_err());
        assert_eq!((fs::read(&path).unwrap(), names("")), (b"onetwo".to_vec(), vec!["a".to_owned()]));
        fs::write(folder.path().join("b.tmp"), b"half").unwrap();
        remove_temporary(folder.path()).unwrap();
        assert_eq!(names(""), ["a"]);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(names("").is_empty());
    }
}
