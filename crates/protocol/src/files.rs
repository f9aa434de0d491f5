//! A file described well enough for a resumable, verified, ranged download.

use std::io::Read;
use std::path::Path;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::Digest;

/// Bytes in a chunk of a [`FileRecord`]; the last chunk may be shorter.
pub const CHUNK_BYTES: u64 = 4 << 20;

/// Path, length and digests of a file; `chunks` holds the BLAKE3 of each chunk of `chunk_bytes`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct FileRecord {
    pub path: String,
    pub length: u64,
    pub sha256: Digest,
    pub blake3: Digest,
    pub chunk_bytes: u64,
    pub chunks: Vec<Digest>,
}

impl FileRecord {
    pub fn of_bytes(path: impl Into<String>, bytes: &[u8]) -> Self {
        Self::of_reader(path, bytes).expect("reading from memory does not fail")
    }

    pub fn of_file(path: impl Into<String>, file: &Path) -> std::io::Result<Self> {
        Self::of_reader(path, std::fs::File::open(file)?)
    }

    fn of_reader(path: impl Into<String>, mut reader: impl Read) -> std::io::Result<Self> {
        let (mut sha256, mut whole) = (sha2::Sha256::new(), blake3::Hasher::new());
        let (mut length, mut chunks) = (0, Vec::new());
        let mut chunk = Vec::new();
        loop {
            chunk.clear();
            reader.by_ref().take(CHUNK_BYTES).read_to_end(&mut chunk)?;
            if chunk.is_empty() {
                break;
            }
            sha256.update(&chunk);
            whole.update(&chunk);
            chunks.push(Digest::blake3(&chunk));
            length += chunk.len() as u64;
            if (chunk.len() as u64) < CHUNK_BYTES {
                break;
            }
        }
        Ok(Self {
            path: path.into(),
            length,
            sha256: Digest(sha256.finalize().into()),
            blake3: Digest(*whole.finalize().as_bytes()),
            chunk_bytes: CHUNK_BYTES,
            chunks,
        })
    }

    /// Whether chunk size, chunk count and length agree: to be asked of every record that comes from outside.
    pub fn is_consistent(&self) -> bool {
        self.chunk_bytes > 0 && self.chunks.len() as u64 == self.length.div_ceil(self.chunk_bytes)
    }

    /// Byte range `[start, end)` of chunk `index`.
    pub fn chunk_range(&self, index: usize) -> (u64, u64) {
        let start = index as u64 * self.chunk_bytes;
        (start, (start + self.chunk_bytes).min(self.length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_covers_every_byte_in_chunks_and_an_empty_file_has_none() {
        let bytes = vec![7; CHUNK_BYTES as usize + 3];
        let record = FileRecord::of_bytes("a", &bytes);
        assert_eq!((record.length, record.chunks.len()), (CHUNK_BYTES + 3, 2));
        assert_eq!(record.chunk_range(1), (CHUNK_BYTES, CHUNK_BYTES + 3));
        assert_eq!(record.sha256, Digest::sha256(&bytes));
        assert_eq!(record.blake3, Digest::blake3(&bytes));
        assert!(record.is_consistent());
        let empty = FileRecord::of_bytes("b", &[]);
        assert!(empty.is_consistent() && empty.chunks.is_empty());
        assert!(!FileRecord { length: 1, ..empty }.is_consistent());
    }
}
