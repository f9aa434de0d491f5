//! Writing folders safely: every file under a temporary name first, synced, then renamed; the folder synced at the end.
//!
//! A folder that is being written holds [`UNFINISHED`]. It tells an interrupted attempt, which is gone on with, from
//! somebody's files, which are not touched. Its first line names the work by a digest of all that goes into it; each further line is
//! the record of a file that is complete, so that the next attempt at the same work need not write it again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use protocol::{Digest, FileRecord};

use super::CheckpointError;
use super::recorded::RecordedFile;

const PART_SUFFIX: &str = ".part";

/// Marks a folder whose writing has begun and not ended; nobody reads a checkpoint from it.
pub const UNFINISHED: &str = "unfinished.part";

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

    /// Where it stands until it is complete.
    pub fn unfinished(&self) -> &Path {
        &self.part
    }

    /// A second handle on the content.
    pub fn content(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Syncs the content and gives the file its name.
    pub fn finish(self) -> Result<(), CheckpointError> {
        self.file.sync_all().map_err(CheckpointError::write(&self.part))?;
        fs::rename(&self.part, &self.path).map_err(CheckpointError::write(&self.path))
    }
}

/// Writes `dir/name` whole.
pub(super) fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<FileRecord, CheckpointError> {
    let mut file = RecordedFile::create(dir, name)?;
    file.append(bytes)?;
    file.finish(name)
}

/// A folder that is being written.
pub(super) struct Claim<'a> {
    dir: &'a Path,
    /// Complete files, and the marker that lists them.
    state: Mutex<(Vec<FileRecord>, File)>,
}

impl<'a> Claim<'a> {
    /// Creates `dir` and marks it as unfinished. It must be empty, or hold an interrupted attempt to write the files for which
    /// `ours` is true. What an attempt at the same `work` has completed stays; `None` is work that cannot be gone on with.
    pub fn new(dir: &'a Path, work: Option<Digest>, ours: impl Fn(&str) -> bool) -> Result<Self, CheckpointError> {
        fs::create_dir_all(dir).map_err(CheckpointError::write(dir))?;
        let marker = dir.join(UNFINISHED);
        let interrupted = marker.exists();
        for entry in fs::read_dir(dir).map_err(CheckpointError::read(dir))? {
            let name = entry.map_err(CheckpointError::read(dir))?.file_name();
            let name = name.to_string_lossy();
            if !interrupted || !(name == UNFINISHED || ours(name.strip_suffix(PART_SUFFIX).unwrap_or(&name))) {
                return Err(CheckpointError::Occupied { dir: dir.to_owned(), entry: name.into_owned() });
            }
        }
        let complete = match (work, fs::read_to_string(&marker)) {
            (Some(work), Ok(text)) if interrupted => completed(dir, &work, &text),
            _ => Vec::new(),
        };
        let mut lines = vec![work.unwrap_or_default().to_string()];
        lines.extend(complete.iter().filter_map(|record| serde_json::to_string(record).ok()));
        let rewritten = PartFile::create(dir, "unfinished").and_then(|mut file| {
            file.append((lines.join("\n") + "\n").as_bytes())?;
            file.file.sync_all().map_err(CheckpointError::write(&marker))
        });
        rewritten?;
        let file = OpenOptions::new().append(true).open(&marker).map_err(CheckpointError::write(&marker))?;
        sync_dir(dir)?;
        Ok(Self { dir, state: Mutex::new((complete, file)) })
    }

    /// The record of a file that an earlier attempt completed.
    pub fn complete(&self, path: &str) -> Option<FileRecord> {
        let state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.0.iter().find(|record| record.path == path).cloned()
    }

    /// Remembers a complete file for the next attempt.
    pub fn note(&self, record: &FileRecord) -> Result<(), CheckpointError> {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let marker = self.dir.join(UNFINISHED);
        let line = serde_json::to_string(record).map_err(io::Error::other).map_err(CheckpointError::write(&marker))? + "\n";
        state.1.write_all(line.as_bytes()).and_then(|()| state.1.sync_data()).map_err(CheckpointError::write(&marker))
    }

    /// Makes the renames durable, then takes the mark away.
    pub fn finish(self) -> Result<(), CheckpointError> {
        sync_dir(self.dir)?;
        let marker = self.dir.join(UNFINISHED);
        fs::remove_file(&marker).map_err(CheckpointError::write(&marker))?;
        sync_dir(self.dir)
    }
}

/// The files that the marker's `text` lists, if it is of the same work; only those that are still there in their length.
fn completed(dir: &Path, work: &Digest, text: &str) -> Vec<FileRecord> {
    let mut lines = text.lines();
    if lines.next() != Some(work.to_string().as_str()) {
        return Vec::new();
    }
    // A torn last line is a file that is written again.
    let records = lines.filter_map(|line| serde_json::from_str::<FileRecord>(line).ok());
    let is_there =
        |record: &FileRecord| fs::metadata(dir.join(&record.path)).is_ok_and(|file| file.is_file() && file.len() == record.length);
    records.filter(is_there).collect()
}

fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(CheckpointError::write(dir))
}
