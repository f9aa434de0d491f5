//! Objects as plain files: the object `a/b` is the file `objects/a/b`.
//!
//! A write goes to a file in `staging/`, is flushed to the disk, and is then renamed into place under the key's lock, after which the folder
//! is flushed: a crash leaves the old object or the new one, never a mixture. What a crash leaves in `staging/` is thrown away at the
//! next start. Each file's modification time is set to the version number (nanoseconds, unique in this process), so that tags
//! survive a restart without a second file that could disagree with the first.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;

use super::{BlobError, Blobs, Opened, Stat, Upload, listed, permits};
use crate::{PutCondition, key};

/// Keys share this many locks.
const LOCKS: usize = 64;
/// Uploads are written to their file in pieces of at least this size.
const WRITE_BYTES: usize = 1 << 20;

/// Cheap to clone; clones share the folder.
#[derive(Clone)]
pub struct DiskBlobs(Arc<Folder>);

struct Folder {
    objects: PathBuf,
    staging: PathBuf,
    index: RwLock<BTreeMap<String, Stat>>,
    /// Held for writing by commit and delete, for reading while a file is opened, so that file and index agree.
    locks: Vec<RwLock<()>>,
    hasher: std::hash::RandomState,
    last_version: AtomicU64,
    staged: AtomicU64,
    /// Keeps a second server out of the folder.
    _exclusive: File,
}

impl DiskBlobs {
    /// Opens the folder, makes it if it is missing, discards unfinished uploads and reads which objects there are.
    pub fn open(root: &Path) -> Result<Self, BlobError> {
        let (objects, staging) = (root.join("objects"), root.join("staging"));
        fs::create_dir_all(&objects)?;
        let exclusive = File::create(root.join("lock"))?;
        exclusive.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => BlobError::Io(std::io::Error::other("another server is using it")),
            fs::TryLockError::Error(error) => BlobError::Io(error),
        })?;
        match fs::remove_dir_all(&staging) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => fs::create_dir_all(&staging)?,
        }
        let mut index = BTreeMap::new();
        collect(&objects, "", &mut index)?;
        let last = index.values().map(|stat| stat.version).max().unwrap_or(0);
        Ok(Self(Arc::new(Folder {
            objects,
            staging,
            index: RwLock::new(index),
            locks: (0..LOCKS).map(|_| RwLock::new(())).collect(),
            hasher: std::hash::RandomState::new(),
            last_version: AtomicU64::new(last),
            staged: AtomicU64::new(0),
            _exclusive: exclusive,
        })))
    }
}

/// Adds the files below `folder` to `index`. Anything that is not a regular file with a valid key is not ours and is left alone.
fn collect(folder: &Path, prefix: &str, index: &mut BTreeMap<String, Stat>) -> Result<(), BlobError> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
        let key = format!("{prefix}{name}");
        let kind = entry.file_type()?;
        if !key::is_valid(&key) {
            continue;
        }
        if kind.is_dir() {
            collect(&entry.path(), &format!("{key}/"), index)?;
        } else if kind.is_file() {
            let metadata = entry.metadata()?;
            let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            index.insert(key, Stat::at(metadata.len(), modified.as_nanos() as u64));
        }
    }
    Ok(())
}

impl Stat {
    fn at(length: u64, version: u64) -> Self {
        Self { length, version, modified_ms: Some(version / 1_000_000) }
    }
}

impl Folder {
    fn lock(&self, key: &str) -> &RwLock<()> {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(key.as_bytes());
        &self.locks[hasher.finish() as usize % LOCKS]
    }

    fn indexed(&self, key: &str) -> Option<Stat> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).get(key).copied()
    }

    /// A version that no other write gets: the time, or one more than the last where the clock stands still or goes back.
    #[expect(clippy::disallowed_methods, reason = "the server is a device of its own: its objects carry the time of its writes")]
    fn next_version(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let next = |last: u64| Some(now.max(last + 1));
        let last = self.last_version.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).unwrap_or_else(|last| last);
        now.max(last + 1)
    }

    /// Publishes the flushed file at `staged`.
    fn publish(&self, staged: &Path, stat: Stat, key: &str, condition: &PutCondition) -> Result<(), BlobError> {
        let target = self.objects.join(key);
        let parent = target.parent().unwrap_or(&self.objects);
        let _guard = self.lock(key).write().unwrap_or_else(PoisonError::into_inner);
        if !permits(condition, self.indexed(key).as_ref()) {
            return Err(BlobError::ConditionFailed);
        }
        if !parent.is_dir() {
            fs::create_dir_all(parent)?;
            let mut folder = parent;
            while folder.starts_with(&self.objects) {
                flush_folder(folder)?;
                let Some(above) = folder.parent() else { break };
                folder = above;
            }
        }
        if target.is_dir() {
            // Left behind by deleted objects, unless it holds some.
            fs::remove_dir(&target)?;
        }
        fs::rename(staged, &target)?;
        flush_folder(parent)?;
        self.index.write().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned(), stat);
        Ok(())
    }

    fn open_file(&self, key: &str) -> Result<Option<(Stat, Opened)>, BlobError> {
        let _guard = self.lock(key).read().unwrap_or_else(PoisonError::into_inner);
        let Some(stat) = self.indexed(key) else { return Ok(None) };
        Ok(Some((stat, Opened::File(File::open(self.objects.join(key))?))))
    }

    fn remove(&self, key: &str) -> Result<bool, BlobError> {
        let target = self.objects.join(key);
        let _guard = self.lock(key).write().unwrap_or_else(PoisonError::into_inner);
        if self.indexed(key).is_none() {
            return Ok(false);
        }
        match fs::remove_file(&target) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        flush_folder(target.parent().unwrap_or(&self.objects))?;
        self.index.write().unwrap_or_else(PoisonError::into_inner).remove(key);
        Ok(true)
    }
}

fn flush_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Runs blocking file work off the async threads. It runs to its end even if the caller is gone, so an aborted request cannot leave a
/// renamed file out of the index.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, BlobError> + Send + 'static) -> Result<T, BlobError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(BlobError::Io(std::io::Error::other(error))))
}

#[async_trait]
impl Blobs for DiskBlobs {
    fn stat(&self, key: &str) -> Option<Stat> {
        self.0.indexed(key)
    }

    async fn open(&self, key: &str) -> Result<Option<(Stat, Opened)>, BlobError> {
        let (folder, key) = (self.0.clone(), key.to_owned());
        blocking(move || folder.open_file(&key)).await
    }

    async fn stage(&self) -> Result<Box<dyn Upload>, BlobError> {
        Ok(Box::new(Staged { folder: self.0.clone(), file: None, buffer: Vec::new(), length: 0 }))
    }

    fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Vec<(String, Stat)> {
        let index = self.0.index.read().unwrap_or_else(PoisonError::into_inner);
        listed(&index, prefix, after, limit).map(|(key, stat)| (key.clone(), *stat)).collect()
    }

    async fn remove(&self, key: &str) -> Result<bool, BlobError> {
        let (folder, key) = (self.0.clone(), key.to_owned());
        blocking(move || folder.remove(&key)).await
    }
}

/// A file in the staging folder that is removed unless it was renamed away.
struct StagedFile {
    file: File,
    path: PathBuf,
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        // Fails after a successful rename, which is what is wanted then.
        let _ = fs::remove_file(&self.path);
    }
}

struct Staged {
    folder: Arc<Folder>,
    file: Option<StagedFile>,
    buffer: Vec<u8>,
    length: u64,
}

/// Appends `bytes` to the staged file, which is made on first use.
fn append(folder: &Folder, file: Option<StagedFile>, bytes: &[u8]) -> Result<StagedFile, BlobError> {
    let mut staged = match file {
        Some(staged) => staged,
        None => {
            let path = folder.staging.join(folder.staged.fetch_add(1, Ordering::Relaxed).to_string());
            StagedFile { file: OpenOptions::new().write(true).create_new(true).open(&path)?, path }
        }
    };
    staged.file.write_all(bytes)?;
    Ok(staged)
}

#[async_trait]
impl Upload for Staged {
    async fn write(&mut self, bytes: Bytes) -> Result<(), BlobError> {
        self.length += bytes.len() as u64;
        self.buffer.extend_from_slice(&bytes);
        if self.buffer.len() < WRITE_BYTES {
            return Ok(());
        }
        let (folder, file, mut buffer) = (self.folder.clone(), self.file.take(), std::mem::take(&mut self.buffer));
        let (file, buffer) = blocking(move || {
            let file = append(&folder, file, &buffer)?;
            buffer.clear();
            Ok((file, buffer))
        })
        .await?;
        (self.file, self.buffer) = (Some(file), buffer);
        Ok(())
    }

    async fn commit(self: Box<Self>, key: &str, condition: &PutCondition) -> Result<Stat, BlobError> {
        let (key, condition) = (key.to_owned(), condition.clone());
        blocking(move || {
            let this = *self;
            let staged = append(&this.folder, this.file, &this.buffer)?;
            let version = this.folder.next_version();
            staged.file.set_modified(UNIX_EPOCH + Duration::from_nanos(version))?;
            staged.file.sync_all()?;
            let stat = Stat::at(this.length, version);
            this.folder.publish(&staged.path, stat, &key, &condition)?;
            Ok(stat)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn put(blobs: &DiskBlobs, key: &str, bytes: &'static [u8]) -> Result<Stat, BlobError> {
        let mut upload = blobs.stage().await?;
        upload.write(Bytes::from_static(bytes)).await?;
        upload.commit(key, &PutCondition::Always).await
    }

    #[tokio::test]
    async fn a_restart_finds_committed_objects_with_their_tags_and_forgets_unfinished_uploads() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = DiskBlobs::open(folder.path()).unwrap();
        let stat = put(&blobs, "a/b", b"kept").await.unwrap();
        drop(blobs);
        // A crash in the middle of an upload, and a file that is not ours.
        fs::write(folder.path().join("staging/7"), b"half").unwrap();
        fs::write(folder.path().join("objects/not a key"), b"?").unwrap();
        let blobs = DiskBlobs::open(folder.path()).unwrap();
        assert_eq!(blobs.list("", None, 10), [("a/b".to_owned(), stat)]);
        assert_eq!(fs::read_dir(folder.path().join("staging")).unwrap().count(), 0);
        assert_eq!(fs::read(folder.path().join("objects/a/b")).unwrap(), b"kept");
        let newer = put(&blobs, "a/b", b"kept").await.unwrap();
        assert_ne!(newer.etag(), stat.etag());
    }

    #[tokio::test]
    async fn a_dropped_or_refused_upload_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = DiskBlobs::open(folder.path()).unwrap();
        let mut upload = blobs.stage().await.unwrap();
        upload.write(Bytes::from(vec![1; 2 * WRITE_BYTES])).await.unwrap();
        assert_eq!(fs::read_dir(folder.path().join("staging")).unwrap().count(), 1);
        drop(upload);
        let mut upload = blobs.stage().await.unwrap();
        upload.write(Bytes::from_static(b"x")).await.unwrap();
        let refused = upload.commit("k", &PutCondition::IfMatch("\"0-0\"".into())).await;
        assert!(matches!(refused, Err(BlobError::ConditionFailed)));
        assert_eq!(fs::read_dir(folder.path().join("staging")).unwrap().count(), 0);
        assert!(blobs.list("", None, 10).is_empty());
    }

    #[tokio::test]
    async fn a_key_that_is_a_folder_of_others_is_refused_and_freed_by_deleting_them() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = DiskBlobs::open(folder.path()).unwrap();
        put(&blobs, "a/b", b"1").await.unwrap();
        assert!(matches!(put(&blobs, "a", b"2").await, Err(BlobError::Conflict)));
        assert!(matches!(put(&blobs, "a/b/c", b"3").await, Err(BlobError::Conflict)));
        assert!(blobs.remove("a/b").await.unwrap());
        assert!(!blobs.remove("a/b").await.unwrap());
        put(&blobs, "a", b"2").await.unwrap();
    }

    #[tokio::test]
    async fn two_servers_cannot_share_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let _first = DiskBlobs::open(folder.path()).unwrap();
        assert!(matches!(DiskBlobs::open(folder.path()), Err(BlobError::Io(_))));
    }
}
