//! Writing folders safely: every file under a temporary name first, synced, then renamed; the folder synced at the end.
//!
//! A folder that is being written holds [`UNFINISHED`]. It tells an interrupted attempt, which is written over, from
//! somebody's files, which are not.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::CheckpointError;

const PART_SUFFIX: &str = ".part";

/// Marks a folder whose writing has begun and not ended.
pub(super) const UNFINISHED: &str = "unfinished.part";

/// A file that gets its name when it is complete.
pub(super) struct PartFile {
    part: PathBuf,
    path: PathBuf,
    file: File,
}

impl PartFile {
    /// Starts `dir/name`; a left-over of an interrupted attempt is replaced.
    pub fn create(dir: &Path, name: &str) -> Result<Self, CheckpointError> {
        let part = dir.join(format!("{name}{PART_SUFFIX}"));
        let file = File::create(&part).map_err(CheckpointError::write(&part))?;
        Ok(Self { path: dir.join(name), part, file })
    }

    pub fn set_length(&self, length: u64) -> Result<(), CheckpointError> {
        self.file.set_len(length).map_err(CheckpointError::write(&self.part))
    }

    pub fn append(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.file.write_all(bytes).map_err(CheckpointError::write(&self.part))
    }

    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), CheckpointError> {
        self.file.write_all_at(bytes, offset).map_err(CheckpointError::write(&self.part))
    }

    pub fn copy_from(&mut self, reader: &mut File) -> Result<(), CheckpointError> {
        io::copy(reader, &mut self.file).map_err(CheckpointError::write(&self.part)).map(drop)
    }

    /// Syncs the content and gives the file its name.
    pub fn finish(self) -> Result<(), CheckpointError> {
        self.file.sync_all().map_err(CheckpointError::write(&self.part))?;
        fs::rename(&self.part, &self.path).map_err(CheckpointError::write(&self.path))
    }
}

/// Writes `dir/name` whole.
pub(super) fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
    let mut file = PartFile::create(dir, name)?;
    file.append(bytes)?;
    file.finish()
}

/// Creates `dir` and marks it as unfinished. It must be empty, or hold an interrupted attempt to write the files for which
/// `ours` is true.
pub(super) fn claim_dir(dir: &Path, ours: impl Fn(&str) -> bool) -> Result<(), CheckpointError> {
    fs::create_dir_all(dir).map_err(CheckpointError::write(dir))?;
    let interrupted = dir.join(UNFINISHED).exists();
    for entry in fs::read_dir(dir).map_err(CheckpointError::read(dir))? {
        let name = entry.map_err(CheckpointError::read(dir))?.file_name();
        let name = name.to_string_lossy();
        if !interrupted || !(name == UNFINISHED || ours(name.strip_suffix(PART_SUFFIX).unwrap_or(&name))) {
            return Err(CheckpointError::Occupied { dir: dir.to_owned(), entry: name.into_owned() });
        }
    }
    let marker = dir.join(UNFINISHED);
    File::create(&marker).and_then(|marker| marker.sync_all()).map_err(CheckpointError::write(&marker))?;
    sync_dir(dir)
}

/// Makes the renames in `dir` durable, then takes the mark of [`claim_dir`] away.
pub(super) fn finish_dir(dir: &Path) -> Result<(), CheckpointError> {
    sync_dir(dir)?;
    let marker = dir.join(UNFINISHED);
    fs::remove_file(&marker).map_err(CheckpointError::write(&marker))?;
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(CheckpointError::write(dir))
}
