//! Token rows of shards: fetched in the chunks that the catalog gives digests for, cached on disk by digest.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use daemon::files;
use protocol::{Digest, ShardManifest};
use storage::discovery::RunFacts;

use super::grants::Grants;
use super::trouble::Trouble;
use crate::audit::RowRef;

/// The cache keeps at most so many bytes; the longest unused chunks go first.
const CACHE_BYTES_MAX: u64 = 4 << 30;
const TOKEN_BYTES: u64 = 4;

pub struct TokenCache {
    facts: Arc<RunFacts>,
    grants: Arc<Grants>,
    folder: PathBuf,
}

impl TokenCache {
    pub fn new(facts: Arc<RunFacts>, grants: Arc<Grants>, folder: PathBuf) -> Self {
        Self { facts, grants, folder }
    }

    /// Tokens of `rows`, one row after the other.
    pub async fn rows(&self, audit: &Digest, rows: &[RowRef]) -> Result<Vec<u32>, Trouble> {
        let shards = self.facts.shards.list();
        let mut tokens = Vec::new();
        for row in rows {
            let shard = shards.iter().find(|shard| shard.id == row.shard);
            let shard = shard.ok_or_else(|| Trouble::malformed(&row.shard, "no such shard in the catalog"))?;
            if row.row >= shard.rows || shard.row_tokens != self.facts.manifest.parameters.sequence_length {
                return Err(Trouble::malformed(&row.shard, format!("no row {} of the run's length", row.row)));
            }
            let row_bytes = u64::from(shard.row_tokens) * TOKEN_BYTES;
            let bytes = self.range(audit, shard, row.row * row_bytes, (row.row + 1) * row_bytes).await?;
            tokens.extend(
                data::decode_rows(&bytes, row.row, shard.row_tokens, shard.vocab_size)
                    .map_err(|error| Trouble::malformed(&row.shard, error))?,
            );
        }
        Ok(tokens)
    }

    /// Bytes `[start, end)` of a shard's token file.
    async fn range(&self, audit: &Digest, shard: &ShardManifest, start: u64, end: u64) -> Result<Vec<u8>, Trouble> {
        if end > shard.file.length || !shard.file.is_consistent() {
            return Err(Trouble::malformed(&shard.id, "its manifest contradicts itself"));
        }
        let mut bytes = Vec::with_capacity((end - start) as usize);
        for index in (start / shard.file.chunk_bytes) as usize..end.div_ceil(shard.file.chunk_bytes) as usize {
            let chunk = self.chunk(audit, shard, index).await?;
            let (from, to) = shard.file.chunk_range(index);
            bytes.extend_from_slice(&chunk[(start.max(from) - from) as usize..(end.min(to) - from) as usize]);
        }
        Ok(bytes)
    }

    async fn chunk(&self, audit: &Digest, shard: &ShardManifest, index: usize) -> Result<Bytes, Trouble> {
        let digest = shard.file.chunks[index];
        let path = self.folder.join(digest.to_string());
        if let Ok(bytes) = fs::read(&path)
            && Digest::blake3(&bytes) == digest
        {
            return Ok(bytes.into());
        }
        let key = self.facts.keys.shard_tokens(&shard.id);
        let (start, end) = shard.file.chunk_range(index);
        let bytes = self.grants.get_range(Some(audit), &key, start, end).await?;
        if Digest::blake3(&bytes) != digest {
            return Err(Trouble::Digest { key });
        }
        files::write_whole(&path, &[&bytes]).map_err(Trouble::io(&path))?;
        self.trim();
        Ok(bytes)
    }

    fn trim(&self) {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut chunks: Vec<(SystemTime, u64, PathBuf)> = entries
            .filter_map(|entry| {
                let meta = entry.metadata().ok()?;
                let used = meta.accessed().or_else(|_| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
                Some((used, meta.len(), entry.path()))
            })
            .collect();
        let mut total: u64 = chunks.iter().map(|(_, length, _)| length).sum();
        chunks.sort();
        for (_, length, path) in chunks {
            if total <= CACHE_BYTES_MAX {
                break;
            }
            let _ = fs::remove_file(path);
            total -= length;
        }
    }
}
