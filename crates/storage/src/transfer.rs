//! Files from and to a bucket, never held in memory.
//!
//! Downloads go on where they stopped: chunks in parallel, each checked by its BLAKE3 before it counts.
//!
//! Beside the destination `f` a download keeps `f.part` (the bytes) and `f.part.map` (which chunks are there). The map is only a hint: after a
//! restart every chunk that it names is hashed again, so a crash between the two writes, a torn chunk or a stale map cost time, never
//! correctness. The file appears under its name in one rename, complete and flushed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use protocol::{Digest, FileRecord, GrantRequest};
use tokio::sync::watch;

use crate::client::{GrantAccess, GrantError};
use crate::{ObjectStore, StoreError};

/// Chunks in flight at a time.
pub const PARALLEL_CHUNKS: usize = 4;
/// Largest chunk that a record may ask for; bounds memory together with [`PARALLEL_CHUNKS`].
pub const MAX_CHUNK_BYTES: u64 = 64 << 20;
/// How long a download waits for an earlier one of the same file to let go: chunks of an abandoned download may still be being written.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_POLL: Duration = Duration::from_millis(10);
/// How often a chunk with a wrong digest is asked for.
const CHUNK_ATTEMPTS: u32 = 2;

/// Where the bytes of one object come from.
#[async_trait]
pub trait RangeSource: Send + Sync {
    /// The bytes `[start, end)`, with `start < end`.
    async fn read(&self, start: u64, end: u64) -> Result<Bytes, SourceError>;
}

/// Why a source gave no bytes. Sources retry what is worth retrying themselves.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    #[error("the grant has expired")]
    Expired,
    #[error("there is no such object")]
    Absent,
    #[error("the store cannot be reached: {0}")]
    Unavailable(String),
    #[error("the store refused: {0}")]
    Refused(String),
}

impl From<GrantError> for SourceError {
    fn from(error: GrantError) -> Self {
        match error {
            GrantError::Expired { .. } => Self::Expired,
            GrantError::Absent { .. } => Self::Absent,
            GrantError::Unavailable { reason, .. } => Self::Unavailable(reason.to_owned()),
            error => Self::Refused(error.to_string()),
        }
    }
}

impl From<StoreError> for SourceError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { .. } => Self::Absent,
            StoreError::Unavailable { reason, .. } => Self::Unavailable(reason),
            error => Self::Refused(error.to_string()),
        }
    }
}

/// An object read through one grant.
#[async_trait]
impl<G: GrantAccess + ?Sized> RangeSource for (&G, &GrantRequest) {
    async fn read(&self, start: u64, end: u64) -> Result<Bytes, SourceError> {
        Ok(self.0.get(self.1, Some((start, end)), end - start).await?)
    }
}

/// An object read through one grant.
#[async_trait]
impl<G: GrantAccess> RangeSource for (G, GrantRequest) {
    async fn read(&self, start: u64, end: u64) -> Result<Bytes, SourceError> {
        (&self.0, &self.1).read(start, end).await
    }
}

/// An object read with the store's credentials.
#[async_trait]
impl<S: ObjectStore + ?Sized> RangeSource for (&S, &str) {
    async fn read(&self, start: u64, end: u64) -> Result<Bytes, SourceError> {
        Ok(self.0.get_range(self.1, start, end).await?)
    }
}

/// An object read with the store's credentials.
#[async_trait]
impl RangeSource for (Arc<dyn ObjectStore>, String) {
    async fn read(&self, start: u64, end: u64) -> Result<Bytes, SourceError> {
        (&*self.0, self.1.as_str()).read(start, end).await
    }
}

/// An object read through whichever grant for it is the newest. Where the current one has expired, reading waits for the next.
pub struct RenewedSource<G> {
    access: G,
    grants: watch::Receiver<GrantRequest>,
    patience: Duration,
}

impl<G: GrantAccess> RenewedSource<G> {
    /// `grants` is fed by whoever receives grant bundles; after `patience` without a new one reading fails with [`SourceError::Expired`].
    pub fn new(access: G, grants: watch::Receiver<GrantRequest>, patience: Duration) -> Self {
        Self { access, grants, patience }
    }
}

#[async_trait]
impl<G: GrantAccess> RangeSource for RenewedSource<G> {
    async fn read(&self, start: u64, end: u64) -> Result<Bytes, SourceError> {
        let mut grants = self.grants.clone();
        loop {
            let grant = grants.borrow_and_update().clone();
            match (&self.access, &grant).read(start, end).await {
                Err(SourceError::Expired) => {
                    let renewed = tokio::time::timeout(self.patience, grants.changed()).await;
                    if !matches!(renewed, Ok(Ok(()))) {
                        return Err(SourceError::Expired);
                    }
                }
                result => return result,
            }
        }
    }
}

/// A download that did not finish. What was fetched stays beside the destination; the same call goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error(
        "the disk is full: `{path}` cannot be written\nhint: free space or move the data folder; the download goes on where it stopped"
    )]
    DiskFull { path: PathBuf },
    #[error("`{path}` cannot be used: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("another download is writing `{path}`")]
    Busy { path: PathBuf },
    #[error("the description of `{path}` contradicts itself")]
    BadRecord { path: String },
    #[error("chunk {chunk} of `{path}` does not have the digest that its manifest states")]
    Corrupt { path: String, chunk: usize },
    #[error("the grant for `{path}` expired before the download was done\nhint: it goes on with the next grant")]
    Expired { path: String },
    #[error("there is no object for `{path}`")]
    Absent { path: String },
    #[error("`{path}` could not be fetched: {reason}")]
    Unavailable { path: String, reason: String },
    #[error("`{path}` was refused: {reason}")]
    Refused { path: String, reason: String },
}

impl TransferError {
    /// Whether the same call may succeed later, without a new grant or a person's help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Absent { .. })
    }

    fn io(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull { path: path.to_owned() },
            _ => Self::Io { path: path.to_owned(), source },
        }
    }

    fn source(path: &str, error: SourceError) -> Self {
        let path = path.to_owned();
        match error {
            SourceError::Expired => Self::Expired { path },
            SourceError::Absent => Self::Absent { path },
            SourceError::Unavailable(reason) => Self::Unavailable { path, reason },
            SourceError::Refused(reason) => Self::Refused { path, reason },
        }
    }
}

/// Where the bytes of a finished download came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Downloaded {
    pub fetched_bytes: u64,
    /// Bytes that were on disk already.
    pub kept_bytes: u64,
}

/// Fetches `file` from `source` to `dest`, whose folder exists or is made.
pub async fn download(source: &dyn RangeSource, file: &FileRecord, dest: &Path) -> Result<Downloaded, TransferError> {
    if !file.is_consistent() || file.chunk_bytes > MAX_CHUNK_BYTES {
        return Err(TransferError::BadRecord { path: file.path.clone() });
    }
    let Some((partial, missing)) = prepare(file.clone(), dest.to_owned()).await? else {
        return Ok(Downloaded { fetched_bytes: 0, kept_bytes: file.length });
    };
    let fetched_bytes = missing.iter().map(|&chunk| length_of(file, chunk)).sum();
    // Sources retry; what comes out of them ends the download, and drops the other chunks in flight.
    stream::iter(missing.into_iter().map(|chunk| fetch(source, partial.clone(), chunk)))
        .buffer_unordered(PARALLEL_CHUNKS)
        .try_collect::<()>()
        .await?;
    blocking(dest, move || partial.finish()).await?;
    Ok(Downloaded { fetched_bytes, kept_bytes: file.length - fetched_bytes })
}

/// Uploads the file at `path` under a key that is written once. What lies there already has to be the same, chunk by chunk.
///
/// # Errors
/// The store does not take it, the file is not what `file` says, or another one lies there ([`StoreError::PreconditionFailed`]).
pub async fn upload(store: &dyn ObjectStore, key: &str, file: &FileRecord, path: &Path) -> Result<(), StoreError> {
    let refused = StoreError::PreconditionFailed { key: key.to_owned() };
    let length = match store.head(key).await {
        Ok(meta) => meta.length,
        Err(StoreError::NotFound { .. }) => match store.put_file(key, path, file).await {
            // Written meanwhile, or by an attempt whose answer was lost.
            Err(StoreError::PreconditionFailed { .. }) => store.head(key).await?.length,
            result => return result,
        },
        Err(error) => return Err(error),
    };
    if length != file.length {
        return Err(refused);
    }
    let is_same = |(chunk, digest): (usize, Digest)| async move {
        let (start, end) = file.chunk_range(chunk);
        Ok::<_, StoreError>(Digest::blake3(&store.get_range(key, start, end).await?) == digest)
    };
    let same = stream::iter(file.chunks.iter().copied().enumerate()).map(is_same).buffered(PARALLEL_CHUNKS);
    let all = same.try_fold(true, |all, one| async move { Ok(all && one) }).await?;
    if all { Ok(()) } else { Err(refused) }
}

/// Whether the file at `path` has exactly the length and the BLAKE3 of `file`.
pub fn is_complete(file: &FileRecord, path: &Path) -> io::Result<bool> {
    let mut reader = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    Ok(reader.metadata()?.len() == file.length && digest_of(&mut reader)? == file.blake3)
}

fn digest_of(reader: &mut impl Read) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(Digest(*hasher.finalize().as_bytes())),
            read => hasher.update_rayon(&buffer[..read]),
        };
    }
}

fn length_of(file: &FileRecord, chunk: usize) -> u64 {
    let (start, end) = file.chunk_range(chunk);
    end - start
}

async fn blocking<T: Send + 'static>(
    dest: &Path,
    work: impl FnOnce() -> Result<T, TransferError> + Send + 'static,
) -> Result<T, TransferError> {
    let failed = |error| Err(TransferError::io(dest)(io::Error::other(error)));
    tokio::task::spawn_blocking(work).await.unwrap_or_else(failed)
}

/// `None` if the file is complete already, else the opened partial file and the chunks that it lacks.
async fn prepare(file: FileRecord, dest: PathBuf) -> Result<Option<(Arc<Partial>, Vec<usize>)>, TransferError> {
    let deadline = tokio::time::Instant::now() + LOCK_PATIENCE;
    loop {
        let (file, path) = (file.clone(), dest.clone());
        let prepared = blocking(&dest, move || {
            if is_complete(&file, &path).map_err(TransferError::io(&path))? {
                return Ok(None);
            }
            let partial = Partial::open(file, path)?;
            let missing = partial.missing()?;
            Ok(Some((Arc::new(partial), missing)))
        })
        .await;
        match prepared {
            Err(TransferError::Busy { .. }) if tokio::time::Instant::now() < deadline => tokio::time::sleep(LOCK_POLL).await,
            prepared => return prepared,
        }
    }
}

async fn fetch(source: &dyn RangeSource, partial: Arc<Partial>, chunk: usize) -> Result<(), TransferError> {
    let (start, end) = partial.file.chunk_range(chunk);
    let mut attempt = 1;
    loop {
        let bytes = source.read(start, end).await.map_err(|error| TransferError::source(&partial.file.path, error))?;
        let (writer, dest) = (partial.clone(), partial.dest.clone());
        match blocking(&dest, move || writer.accept(chunk, &bytes)).await {
            // Bytes may be damaged on the way: once is bad luck.
            Err(TransferError::Corrupt { .. }) if attempt < CHUNK_ATTEMPTS => attempt += 1,
            result => return result,
        }
    }
}

/// A file on its way: `dest.part` and `dest.part.map`.
struct Partial {
    file: FileRecord,
    dest: PathBuf,
    part: PathBuf,
    bytes: File,
    map: PathBuf,
    /// The map's file and the bits that it holds after its header.
    bits: Mutex<(File, Vec<u8>)>,
}

/// The map begins with the digest of what it describes, so that it is not taken for the map of another version of the file.
fn map_header(file: &FileRecord) -> Digest {
    let chunks: Vec<u8> = file.chunks.iter().flat_map(|digest| digest.0).collect();
    Digest::derive("quasar partial download v1", &[&file.length.to_le_bytes(), &file.chunk_bytes.to_le_bytes(), &chunks])
}

fn beside(dest: &Path, suffix: &str) -> PathBuf {
    let mut name = dest.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

impl Partial {
    fn open(file: FileRecord, dest: PathBuf) -> Result<Self, TransferError> {
        let (part, map) = (beside(&dest, ".part"), beside(&dest, ".part.map"));
        if let Some(folder) = dest.parent() {
            fs::create_dir_all(folder).map_err(TransferError::io(folder))?;
        }
        let open = |path: &Path| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let bytes = open(&part).map_err(TransferError::io(&part))?;
        bytes.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => TransferError::Busy { path: part.clone() },
            fs::TryLockError::Error(error) => TransferError::io(&part)(error),
        })?;
        let mut map_file = open(&map).map_err(TransferError::io(&map))?;
        let header = map_header(&file).0;
        let size = header.len() + file.chunks.len().div_ceil(8);
        let mut found = Vec::new();
        map_file.by_ref().take(size as u64 + 1).read_to_end(&mut found).map_err(TransferError::io(&map))?;
        if found.len() != size || found[..header.len()] != header {
            found = header.to_vec();
            found.resize(size, 0);
            map_file.set_len(0).and_then(|()| map_file.write_all_at(&found, 0)).map_err(TransferError::io(&map))?;
        }
        let bits = Mutex::new((map_file, found.split_off(header.len())));
        Ok(Self { file, dest, part, bytes, map, bits })
    }

    /// The chunks that are not there; those that the map claims are hashed again.
    fn missing(&self) -> Result<Vec<usize>, TransferError> {
        let claimed = self.bits.lock().unwrap_or_else(PoisonError::into_inner).1.clone();
        let mut buffer = Vec::new();
        let mut missing = Vec::new();
        for (chunk, digest) in self.file.chunks.iter().enumerate() {
            let (start, end) = self.file.chunk_range(chunk);
            buffer.resize((end - start) as usize, 0);
            let is_there = claimed[chunk / 8] & (1 << (chunk % 8)) != 0
                && self.bytes.read_exact_at(&mut buffer, start).is_ok()
                && Digest::blake3(&buffer) == *digest;
            if !is_there {
                missing.push(chunk);
            }
        }
        Ok(missing)
    }

    /// Checks and writes one chunk, then notes it in the map.
    fn accept(&self, chunk: usize, bytes: &[u8]) -> Result<(), TransferError> {
        let (start, end) = self.file.chunk_range(chunk);
        if bytes.len() as u64 != end - start || Digest::blake3(bytes) != self.file.chunks[chunk] {
            return Err(TransferError::Corrupt { path: self.file.path.clone(), chunk });
        }
        self.bytes.write_all_at(bytes, start).map_err(TransferError::io(&self.part))?;
        let mut bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        let (map_file, bits) = &mut *bits;
        let index = chunk / 8;
        bits[index] |= 1 << (chunk % 8);
        let header = size_of::<Digest>();
        map_file.write_all_at(&bits[index..=index], (header + index) as u64).map_err(TransferError::io(&self.map))
    }

    /// Checks the whole, flushes it and gives it its name.
    fn finish(&self) -> Result<(), TransferError> {
        let failed = TransferError::io(&self.part);
        self.bytes.set_len(self.file.length).map_err(&failed)?;
        self.bytes.sync_all().map_err(&failed)?;
        if !is_complete(&self.file, &self.part).map_err(&failed)? {
            // Every chunk was checked, so the record's digest of the whole is not that of its chunks.
            return Err(TransferError::BadRecord { path: self.file.path.clone() });
        }
        fs::rename(&self.part, &self.dest).map_err(&failed)?;
        if let Some(folder) = self.dest.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(TransferError::io(folder))?;
        }
        // A map that stays behind is harmless.
        let _ = fs::remove_file(&self.map);
        Ok(())
    }
}

#[cfg(test)]
#[path = "transfer_tests.rs"]
mod tests;
