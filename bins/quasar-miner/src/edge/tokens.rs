//! Token rows of leases: fetched in verified chunks, cached on disk by digest, held in memory while their lease lasts.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use daemon::files;
use protocol::documents::{Lease, RowRange};
use protocol::lease::LeaseRows;
use protocol::{Digest, GrantRequest, ShardManifest};
use storage::client::GrantAccess;

use super::keyframes::{file_trouble, grant_trouble};
use crate::machine::Trouble;

/// The cache keeps at most so many bytes; the longest unused chunks go first.
const CACHE_BYTES_MAX: u64 = 8 << 30;
const TOKEN_BYTES: u64 = 4;

/// Verified chunks of shards, by digest. Learners of one process share it.
pub struct ChunkCache {
    folder: PathBuf,
}

impl ChunkCache {
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.folder.join(digest.to_string())
    }

    fn get(&self, digest: &Digest) -> Option<Bytes> {
        let bytes = fs::read(self.path(digest)).ok()?;
        (Digest::blake3(&bytes) == *digest).then(|| Bytes::from(bytes))
    }

    fn put(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        files::write_whole(&self.path(digest), &[bytes])?;
        self.trim()
    }

    fn trim(&self) -> io::Result<()> {
        let mut entries: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let (entry, meta) = (entry.as_ref().map(fs::DirEntry::path), entry.as_ref().ok().and_then(|entry| entry.metadata().ok()));
            if let (Ok(path), Some(meta)) = (entry, meta) {
                entries.push((meta.accessed().or_else(|_| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH), meta.len(), path));
            }
        }
        let mut total: u64 = entries.iter().map(|(_, length, _)| length).sum();
        entries.sort();
        for (_, length, path) in entries {
            if total <= CACHE_BYTES_MAX {
                break;
            }
            let _ = fs::remove_file(path);
            total -= length;
        }
        Ok(())
    }

    /// Bytes of rows `[range.start, range.end)` of a shard. `grant` gives the request for the shard's token file.
    async fn rows(
        &self,
        access: &dyn GrantAccess,
        grant: &GrantRequest,
        shard: &ShardManifest,
        range: &RowRange,
    ) -> Result<Vec<u8>, Trouble> {
        let row_bytes = u64::from(shard.row_tokens) * TOKEN_BYTES;
        let (start, end) = (range.start * row_bytes, range.end * row_bytes);
        if range.end > shard.rows || end > shard.file.length {
            tracing::error!(shard = shard.id, rows = shard.rows, range.start, range.end, "a lease names rows that the shard does not have");
            return Err(Trouble::Corrupt);
        }
        let mut out = Vec::with_capacity((end - start) as usize);
        let chunks = (start / shard.file.chunk_bytes) as usize..end.div_ceil(shard.file.chunk_bytes) as usize;
        for index in chunks {
            let digest = &shard.file.chunks[index];
            let (from, to) = shard.file.chunk_range(index);
            let bytes = match self.get(digest) {
                Some(bytes) => bytes,
                None => {
                    let bytes = access.get(grant, Some((from, to)), to - from).await.map_err(|error| grant_trouble(&error))?;
                    if Digest::blake3(&bytes) != *digest {
                        tracing::error!(shard = shard.id, chunk = index, "a chunk does not have the digest that the catalog states");
                        return Err(Trouble::Corrupt);
                    }
                    self.put(digest, &bytes).map_err(|error| file_trouble(&error))?;
                    bytes
                }
            };
            let (low, high) = (start.max(from) - from, end.min(to) - from);
            out.extend_from_slice(&bytes[low as usize..high as usize]);
        }
        Ok(out)
    }
}

/// All rows of one lease.
pub struct LeaseTokens {
    rows: LeaseRows,
    row_tokens: usize,
    ranges: Vec<(RowRange, Vec<u32>)>,
}

/// Rows of one step, one after the other.
pub struct StepTokens {
    pub tokens: Vec<u32>,
    pub rows: usize,
    pub row_tokens: usize,
}

impl LeaseTokens {
    /// Fetches what is not cached. `grant` gives the request for a shard's token file.
    pub async fn fetch(
        cache: &ChunkCache,
        access: &dyn GrantAccess,
        grant: impl Fn(&str) -> Option<GrantRequest>,
        shards: &[ShardManifest],
        row_tokens: u32,
        lease: &Lease,
    ) -> Result<Self, Trouble> {
        let mut ranges = Vec::with_capacity(lease.rows.len());
        for range in &lease.rows {
            let Some(shard) = shards.iter().find(|shard| shard.id == range.shard) else {
                // It may have joined the run a moment ago: the next look at the head tells.
                tracing::info!(lease = lease.id, shard = range.shard, "a lease names a shard that the run's catalog does not have yet");
                return Err(Trouble::Absent);
            };
            if shard.row_tokens != row_tokens {
                return Err(Trouble::Corrupt);
            }
            let grant = grant(&range.shard).ok_or(Trouble::Grant)?;
            let bytes = cache.rows(access, &grant, shard, range).await?;
            let tokens =
                bytes.chunks_exact(TOKEN_BYTES as usize).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect();
            ranges.push((range.clone(), tokens));
        }
        Ok(Self { rows: LeaseRows::of(lease), row_tokens: row_tokens as usize, ranges })
    }

    /// Rows made up by `token(row, column)`.
    #[cfg(test)]
    pub fn made_up(lease: &Lease, row_tokens: usize, token: impl Fn(u64, usize) -> u32) -> Self {
        let held = |range: &RowRange| {
            (range.start..range.end)
                .flat_map(|row| (0..row_tokens).map(move |column| (row, column)))
                .map(|(row, column)| token(row, column))
                .collect()
        };
        let ranges = lease.rows.iter().map(|range| (range.clone(), held(range))).collect();
        Self { rows: LeaseRows::of(lease), row_tokens, ranges }
    }

    /// Rows of step `step`; `None` behind the end of the lease.
    pub fn step(&self, step: u32) -> Option<StepTokens> {
        let rows = self.rows.step(step);
        let mut tokens = Vec::with_capacity(rows.len() * self.row_tokens);
        for row in &rows {
            let covers = |(range, _): &&(RowRange, Vec<u32>)| range.shard == row.shard && (range.start..range.end).contains(&row.row);
            let (range, held) = self.ranges.iter().find(covers)?;
            let at = (row.row - range.start) as usize * self.row_tokens;
            tokens.extend_from_slice(held.get(at..at + self.row_tokens)?);
        }
        (!rows.is_empty()).then_some(StepTokens { tokens, rows: rows.len(), row_tokens: self.row_tokens })
    }
}

/// Tokens of the leases that are here.
#[derive(Default)]
pub struct TokenStore(Mutex<HashMap<u64, Arc<LeaseTokens>>>);

impl TokenStore {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<LeaseTokens>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn insert(&self, lease: u64, tokens: LeaseTokens) {
        self.lock().insert(lease, Arc::new(tokens));
    }

    pub fn get(&self, lease: u64) -> Option<Arc<LeaseTokens>> {
        self.lock().get(&lease).cloned()
    }

    pub fn remove(&self, lease: u64) {
        self.lock().remove(&lease);
    }
}

#[cfg(test)]
mod tests {
    use protocol::{CHUNK_BYTES, FileRecord};
    use storage::{MemoryGrants, MemoryStore, ObjectStore, Presign, PutCondition};

    use super::*;

    /// A shard whose rows straddle chunk borders; row r holds r, r+1, ….
    fn shard(rows: u64, row_tokens: u32) -> (ShardManifest, Bytes) {
        let words = (0..rows).flat_map(|row| (0..row_tokens).map(move |column| row as u32 + column));
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        let manifest = ShardManifest {
            id: "s".into(),
            rows,
            row_tokens,
            tokens: rows * u64::from(row_tokens),
            file: FileRecord::of_bytes("tokens.bin", &bytes),
            tokenizer: Digest::ZERO,
            vocab_size: 1 << 20,
            licence: String::new(),
            source: String::new(),
            held_out: false,
        };
        (manifest, Bytes::from(bytes))
    }

    fn lease(rows: Vec<RowRange>) -> Lease {
        Lease { id: 1, rows, seed: Digest::blake3(b"seed"), batch_rows: 2, steps: 9, schedule_start: 0, deadline_ms: 0 }
    }

    #[tokio::test]
    async fn rows_across_chunks_come_in_the_leases_order_and_from_the_cache_the_second_time() {
        let row_tokens = 300;
        let (manifest, bytes) = shard(CHUNK_BYTES / 1200 + 10, row_tokens);
        assert_eq!(manifest.file.chunks.len(), 2);
        let border = CHUNK_BYTES / 1200;
        let bucket = MemoryStore::new();
        bucket.put("k", bytes, PutCondition::Always).await.unwrap();
        let grant = bucket.presign(&Presign::Get { key: "k".into(), now_ms: 0, expires_in_ms: 60_000 }).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let cache = ChunkCache::open(folder.path().join("chunks")).unwrap();
        let lease = lease(vec![
            RowRange { shard: "s".into(), start: border - 2, end: border + 2 },
            RowRange { shard: "s".into(), start: 0, end: 1 },
        ]);
        let shards = [manifest];
        let access = MemoryGrants::new(bucket, || 1_000);
        let fetched = LeaseTokens::fetch(&cache, &access, |_| Some(grant.clone()), &shards, row_tokens, &lease).await.unwrap();
        let order = LeaseRows::of(&lease);
        for step in 0..3 {
            let (rows, step) = (order.step(step), fetched.step(step).unwrap());
            assert_eq!(step.rows, rows.len());
            for (row, tokens) in rows.iter().zip(step.tokens.chunks(row_tokens as usize)) {
                assert!(tokens.iter().enumerate().all(|(column, token)| *token == row.row as u32 + column as u32));
            }
        }
        assert!(fetched.step(3).is_none());
        let empty = MemoryGrants::new(MemoryStore::new(), || 1_000);
        assert!(LeaseTokens::fetch(&cache, &empty, |_| Some(grant.clone()), &shards, row_tokens, &lease).await.is_ok());
    }

    #[tokio::test]
    async fn rows_outside_of_a_shard_are_refused_and_a_shard_that_is_not_known_yet_is_waited_for() {
        let (manifest, _) = shard(10, 4);
        let folder = tempfile::tempdir().unwrap();
        let cache = ChunkCache::open(folder.path().join("chunks")).unwrap();
        let access = MemoryGrants::new(MemoryStore::new(), || 1_000);
        let grant = MemoryStore::new().presign(&Presign::Get { key: "k".into(), now_ms: 0, expires_in_ms: 60_000 }).unwrap();
        let shards = [manifest];
        for (shard, start, end, trouble) in [("s", 5, 11, Trouble::Corrupt), ("t", 0, 1, Trouble::Absent)] {
            let lease = lease(vec![RowRange { shard: shard.into(), start, end }]);
            let result = LeaseTokens::fetch(&cache, &access, |_| Some(grant.clone()), &shards, 4, &lease).await;
            assert_eq!(result.err(), Some(trouble));
        }
    }
}
