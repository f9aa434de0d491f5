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

/// Writes `bytes` to `path` by way of a temporary file beside it. Not flushed to the medium: everything written this way
/// carries a digest and can be had again.
pub fn write_whole(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    write_with(path, |file| parts.iter().try_for_each(|part| file.write_all(part)))
}

/// The same, with the bytes that `write` writes.
pub fn write_with<T, E: From<io::Error>>(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<T, E>) -> Result<T, E> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
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
