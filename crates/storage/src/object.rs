//! The store as the holder of its credentials sees it.

use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;
use protocol::{Digest, FileRecord, GrantRequest};

use crate::StoreError;

/// An object's bytes and the tag that identifies this version of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub bytes: Bytes,
    /// Opaque, with its quotes as the store sent them; never a content hash.
    pub etag: Option<String>,
}

/// An object without its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectMeta {
    pub key: String,
    /// In bytes.
    pub length: u64,
    pub etag: Option<String>,
}

/// When a write may take effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PutCondition {
    Always,
    /// Only if no object has this key (`If-None-Match: *`).
    IfAbsent,
    /// Only if the object is still the version with this tag (`If-Match`).
    IfMatch(String),
}

/// A request to be signed for somebody who has no credentials. Times are Unix milliseconds; validity is cut to whole seconds, at least one
/// and at most seven days.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presign {
    Get {
        key: String,
        now_ms: u64,
        expires_in_ms: u64,
    },
    /// A write bound to its exact length and, where given, to its SHA-256.
    Put {
        key: String,
        length: u64,
        sha256: Option<Digest>,
        /// Write once: refused if the key exists.
        if_absent: bool,
        now_ms: u64,
        expires_in_ms: u64,
    },
}

impl Presign {
    pub fn key(&self) -> &str {
        match self {
            Self::Get { key, .. } | Self::Put { key, .. } => key,
        }
    }
}

/// One bucket. Every implementation passes the same tests.
#[async_trait]
pub trait ObjectStore: Send + Sync + 'static {
    /// Reads an object of at most `limit` bytes; refuses larger ones with [`StoreError::TooLarge`].
    async fn get(&self, key: &str, limit: u64) -> Result<Object, StoreError> {
        match self.get_if_changed(key, None, limit).await? {
            Some(object) => Ok(object),
            None => Err(StoreError::unavailable(key, "the store answered \"not modified\" to an unconditional read")),
        }
    }

    /// As [`ObjectStore::get`], but `None` if the object still has the tag `etag`.
    async fn get_if_changed(&self, key: &str, etag: Option<&str>, limit: u64) -> Result<Option<Object>, StoreError>;

    /// Reads the bytes `[start, end)`, exactly `end - start` of them; a range past the end of the object is an error.
    async fn get_range(&self, key: &str, start: u64, end: u64) -> Result<Bytes, StoreError>;

    async fn head(&self, key: &str) -> Result<ObjectMeta, StoreError>;

    /// Writes an object whole, protected by its SHA-256 on the way, and returns its tag. A retried conditional write that finds its own
    /// bytes in place counts as done.
    async fn put(&self, key: &str, bytes: Bytes, condition: PutCondition) -> Result<String, StoreError>;

    /// Writes a file as an object that nobody has written yet, read from the disk as it is sent. `file` states its length and its SHA-256, by
    /// which the store refuses other bytes.
    async fn put_file(&self, key: &str, path: &Path, file: &FileRecord) -> Result<(), StoreError>;

    /// All objects whose key starts with `prefix`, sorted by key bytes (stores disagree on order).
    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, StoreError>;

    /// Removes an object; removing what is not there is no error.
    async fn delete(&self, key: &str) -> Result<(), StoreError>;

    /// Signs a request; does no input or output.
    fn presign(&self, request: &Presign) -> Result<GrantRequest, StoreError>;
}
