//! Files that are there whole or not at all, and the versions of fragments that lie in a folder.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Of files that are not whole yet.
const TEMPORARY: &str = ".tmp";

/// Whether a write failed for want of space.
pub fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Writes `parts` one behind the other to `path`, whose folder is made, by way of a temporary file beside it. A path has one writer at a
/// time. Nothing is flushed to the medium: what is written this way is verified when it is read, and can be had again.
///
/// # Errors
/// The file system's; what lay at `path` is as it was then.
pub fn write_whole(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    write_with(path, |file| parts.iter().try_for_each(|part| file.write_all(part)))
}

/// [`write_whole`] with the bytes that `write` writes.
///
/// # Errors
/// Those of `write` and of the file system; what lay at `path` is as it was then.
pub fn write_with<T, E: From<io::Error>>(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<T, E>) -> Result<T, E> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(TEMPORARY);
    let temporary = folder.join(name);
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
///
/// # Errors
/// The file system's.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Removes what writes left in `folder` that a kill broke off. To be called before anything is written there.
///
/// # Errors
/// The file system's; a folder that is not there is none.
pub fn remove_leftovers(folder: &Path) -> io::Result<()> {
    stems(folder, TEMPORARY)?.iter().try_for_each(|stem| remove(&folder.join(format!("{stem}{TEMPORARY}"))))
}

/// Removes a file that may be gone already.
///
/// # Errors
/// The file system's.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Names of the files in `folder` with this ending, without it. In a folder that is not there, there are none.
///
/// # Errors
/// The file system's.
pub fn stems(folder: &Path, ending: &str) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut stems = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        if let Some(stem) = name.to_str().and_then(|name| name.strip_suffix(ending)) {
            stems.push(stem.to_owned());
        }
    }
    Ok(stems)
}

/// Removes the files `{fragment}-{version}{ending}` in `folder` of all versions below `from`, also those that an earlier process left.
/// What cannot be removed now is tried again at the next call.
pub fn remove_versions(folder: &Path, endings: &[&str], fragment: u16, from: u64) {
    let version = |stem: &str| {
        let (of, version) = stem.split_once('-')?;
        version.parse::<u64>().ok().filter(|_| of.parse() == Ok(fragment))
    };
    for ending in endings {
        for stem in stems(folder, ending).unwrap_or_default() {
            if version(&stem).is_some_and(|version| version < from) {
                let _ = fs::remove_file(folder.join(format!("{stem}{ending}")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names = stems(folder, "").unwrap();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_there_whole_or_not_at_all_and_what_a_kill_broke_off_is_removed() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("new");
        let path = folder.join("a");
        remove_leftovers(&folder).unwrap();
        write_whole(&path, &[b"one", b"two"]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"onetwo");
        let broken = |file: &mut dyn Write| file.write_all(b"thr").and(Err::<(), _>(io::Error::other("the end")));
        assert!(write_with(&path, broken).is_err());
        assert_eq!((fs::read(&path).unwrap(), names(&folder)), (b"onetwo".to_vec(), vec!["a".to_owned()]));
        fs::write(folder.join("b.tmp"), b"half").unwrap();
        remove_leftovers(&folder).unwrap();
        assert_eq!(names(&folder), ["a"]);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(names(&folder).is_empty());
    }

    #[test]
    fn all_old_versions_of_the_fragment_go_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let others = ["1-4.txt", "1-41.qfs", "1-x.qfs", "11-3.qfs"];
        for name in ["1-3.qfs", "1-40.part", "1-40.qfs"].iter().chain(&others) {
            fs::write(folder.path().join(name), b"").unwrap();
        }
        remove_versions(folder.path(), &[".qfs", ".part"], 1, 41);
        assert_eq!(names(folder.path()), others);
    }
}
