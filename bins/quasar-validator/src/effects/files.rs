//! Files that are there whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// How the name of a file ends while it is being written.
const TEMPORARY: &str = "tmp";

/// Writes `bytes` by way of a temporary file beside `path`, whose folder is made. Not flushed to the medium: what is written
/// this way is verified when it is read, and can be had again.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.{TEMPORARY}", std::process::id()));
    let temporary = folder.join(name);
    let written = File::create(&temporary).and_then(|mut file| file.write_all(bytes)).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Removes what writes that were cut short left in `folder`. To be called while nobody writes there.
pub fn remove_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|extension| extension == TEMPORARY) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_write_that_was_cut_short_left_is_removed_and_whole_files_stay() {
        let folder = tempfile::tempdir().unwrap();
        let whole = folder.path().join("1-2.safetensors");
        write_whole(&whole, b"whole").unwrap();
        fs::write(folder.path().join("1-3.safetensors.77.tmp"), b"ha").unwrap();
        remove_leftovers(folder.path());
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, [whole]);
        remove_leftovers(&folder.path().join("absent"));
    }
}
