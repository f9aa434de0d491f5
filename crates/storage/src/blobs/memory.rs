//! Objects in memory. Deterministic: versions are a counter, there is no clock.

use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use protocol::KeyMap;

use super::{BlobError, Blobs, Opened, Stat, Upload, permits};
use crate::PutCondition;

/// Cheap to clone; clones share the objects.
#[derive(Clone, Default)]
pub struct MemoryBlobs(Arc<RwLock<Shelf>>);

#[derive(Default)]
struct Shelf {
    /// Keys share long beginnings: to hash them is faster than to compare them. Only a list puts them into order.
    objects: KeyMap<(Stat, Bytes)>,
    versions: u64,
}

impl MemoryBlobs {
    /// Publishes `bytes` in one step.
    pub fn put(&self, key: &str, bytes: Bytes, condition: &PutCondition) -> Result<Stat, BlobError> {
        // A poisoned lock guards a map that no panic can leave half-changed.
        let mut shelf = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if !permits(condition, shelf.objects.get(key).map(|(stat, _)| stat)) {
            return Err(BlobError::ConditionFailed);
        }
        shelf.versions += 1;
        let stat = Stat { length: bytes.len() as u64, version: shelf.versions, modified_ms: None };
        shelf.objects.insert(key.to_owned(), (stat, bytes));
        Ok(stat)
    }

    pub fn get(&self, key: &str) -> Option<(Stat, Bytes)> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).objects.get(key).cloned()
    }

    pub fn delete(&self, key: &str) -> bool {
        self.0.write().unwrap_or_else(PoisonError::into_inner).objects.remove(key).is_some()
    }
}

#[async_trait]
impl Blobs for MemoryBlobs {
    fn stat(&self, key: &str) -> Option<Stat> {
        self.get(key).map(|(stat, _)| stat)
    }

    async fn open(&self, key: &str) -> Result<Option<(Stat, Opened)>, BlobError> {
        Ok(self.get(key).map(|(stat, bytes)| (stat, Opened::Memory(bytes))))
    }

    async fn stage(&self) -> Result<Box<dyn Upload>, BlobError> {
        Ok(Box::new(Staged { blobs: self.clone(), first: None, rest: BytesMut::new() }))
    }

    fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Vec<(String, Stat)> {
        let shelf = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let is_listed = |key: &str| key.starts_with(prefix) && after.is_none_or(|after| key > after);
        let found = shelf.objects.iter().filter(|(key, _)| is_listed(key));
        let mut found: Vec<(String, Stat)> = found.map(|(key, (stat, _))| (key.clone(), *stat)).collect();
        found.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        found.truncate(limit);
        found
    }

    async fn remove(&self, key: &str) -> Result<bool, BlobError> {
        Ok(self.delete(key))
    }
}

/// The first piece is kept as it came, so that small objects are never copied.
struct Staged {
    blobs: MemoryBlobs,
    first: Option<Bytes>,
    rest: BytesMut,
}

#[async_trait]
impl Upload for Staged {
    async fn write(&mut self, bytes: Bytes) -> Result<(), BlobError> {
        if self.first.is_none() && self.rest.is_empty() {
            self.first = Some(bytes);
            return Ok(());
        }
        if let Some(first) = self.first.take() {
            self.rest.extend_from_slice(&first);
        }
        self.rest.extend_from_slice(&bytes);
        Ok(())
    }

    async fn commit(mut self: Box<Self>, key: &str, condition: &PutCondition) -> Result<Stat, BlobError> {
        let bytes = self.first.take().unwrap_or_else(|| self.rest.split().freeze());
        self.blobs.put(key, bytes, condition)
    }
}
