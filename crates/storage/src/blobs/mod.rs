//! What keeps the bytes under the embedded server and under [`MemoryStore`](crate::MemoryStore): staged uploads that become visible in
//! one step, under one lock per key, if their condition holds.
//!
//! A [`Blobs`] implementation promises: [`Upload::commit`] checks the condition and publishes as one step that no other commit or delete of
//! the same key can come between; before it, and after a dropped or failed upload, nothing of the upload is visible; a version
//! number is never used twice for the same key.

mod disk;
mod memory;

use async_trait::async_trait;
use bytes::Bytes;

pub use disk::DiskBlobs;
pub use memory::MemoryBlobs;

use crate::PutCondition;

/// A stored object without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    pub length: u64,
    /// Different for every write; Unix nanoseconds of the write on disk, a counter in memory.
    pub version: u64,
    /// Unix milliseconds, where time is known.
    pub modified_ms: Option<u64>,
}

impl Stat {
    /// The ETag, without quotes. Not derived from the content: writing the same bytes again gives another tag.
    pub fn etag(&self) -> String {
        format!("{:x}-{:x}", self.version, self.length)
    }

    /// Whether `tag`, as a client sends it, names this version.
    pub fn matches(&self, tag: &str) -> bool {
        let tag = tag.strip_prefix("W/").unwrap_or(tag);
        tag.trim_matches('"') == "*" || self.is_named_by(tag)
    }

    /// Whether `tag`, quoted or not, is [`Stat::etag`]; polls ask this all the time, so it writes nothing.
    pub(crate) fn is_named_by(&self, tag: &str) -> bool {
        let number = |text: &str| u64::from_str_radix(text, 16).ok().filter(|_| !text.starts_with(['0', '+']) || text == "0");
        let numbers = tag.trim_matches('"').split_once('-').map(|(version, length)| (number(version), number(length)));
        numbers == Some((Some(self.version), Some(self.length)))
    }
}

/// Bytes of an object, opened: stays readable while the object is replaced or deleted.
#[derive(Debug)]
pub enum Opened {
    Memory(Bytes),
    File(std::fs::File),
}

#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error("the condition does not hold")]
    ConditionFailed,
    #[error("the disk is full\nhint: free space in the server's folder")]
    Full,
    /// On disk a key cannot be an object and the folder of other objects at once.
    #[error("the key is a folder of other keys, or lies under an object")]
    Conflict,
    #[error("the server's folder cannot be used: {0}")]
    Io(std::io::Error),
}

impl From<std::io::Error> for BlobError {
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind;
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::Full,
            ErrorKind::IsADirectory | ErrorKind::NotADirectory | ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists => Self::Conflict,
            _ => Self::Io(error),
        }
    }
}

/// One bucket's worth of objects. Keys were validated by the caller.
#[async_trait]
pub trait Blobs: Send + Sync + 'static {
    fn stat(&self, key: &str) -> Option<Stat>;

    async fn open(&self, key: &str) -> Result<Option<(Stat, Opened)>, BlobError>;

    /// Begins an upload of unknown length.
    async fn stage(&self) -> Result<Box<dyn Upload>, BlobError>;

    /// At most `limit` objects whose key starts with `prefix` and sorts after `after`, in order of key bytes.
    fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Vec<(String, Stat)>;

    /// Whether there was something to remove.
    async fn remove(&self, key: &str) -> Result<bool, BlobError>;
}

/// Bytes on their way in. Dropping it discards them.
#[async_trait]
pub trait Upload: Send {
    async fn write(&mut self, bytes: Bytes) -> Result<(), BlobError>;

    /// Publishes the bytes as `key` if `condition` holds.
    async fn commit(self: Box<Self>, key: &str, condition: &PutCondition) -> Result<Stat, BlobError>;
}

/// Whether a write under `condition` may replace `current`.
fn permits(condition: &PutCondition, current: Option<&Stat>) -> bool {
    match condition {
        PutCondition::Always => true,
        PutCondition::IfAbsent => current.is_none(),
        PutCondition::IfMatch(tag) => current.is_some_and(|stat| stat.matches(tag)),
    }
}

/// The part of a sorted map's keys that a listing asks for.
fn listed<'a, V: 'a>(
    map: &'a std::collections::BTreeMap<String, V>,
    prefix: &'a str,
    after: Option<&str>,
    limit: usize,
) -> impl Iterator<Item = (&'a String, &'a V)> {
    use std::ops::Bound;
    let start = match after {
        Some(after) if after >= prefix => Bound::Excluded(after.to_owned()),
        _ => Bound::Included(prefix.to_owned()),
    };
    map.range((start, Bound::Unbounded)).take_while(move |(key, _)| key.starts_with(prefix)).take(limit)
}
