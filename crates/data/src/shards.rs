//! Shard files: rows of little-endian u32 tokens without a header.
//!
//! Written once as a stream, hashed on the way (SHA-256 for the store, BLAKE3 for us, BLAKE3 of each chunk for resumable
//! downloads); read through a memory map, where each row is checked before it is handed out.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use protocol::{CHUNK_BYTES, Digest, FileRecord, ShardManifest};
use sha2::Digest as _;

use crate::DataError;

const TOKEN_BYTES: usize = size_of::<u32>();

/// Writes one shard file and computes its record on the way.
pub struct ShardWriter {
    path: PathBuf,
    file: File,
    row_tokens: u32,
    rows: u64,
    sha256: sha2::Sha256,
    blake3: blake3::Hasher,
    chunks: Vec<Digest>,
    /// The chunk that is being filled.
    chunk: Vec<u8>,
    length: u64,
}

impl ShardWriter {
    /// # Errors
    /// The file cannot be created; an existing one is not overwritten.
    pub fn create(path: &Path, row_tokens: u32) -> Result<Self, DataError> {
        Ok(Self {
            path: path.to_owned(),
            file: File::create_new(path).map_err(DataError::writing(path))?,
            row_tokens,
            rows: 0,
            sha256: sha2::Sha256::new(),
            blake3: blake3::Hasher::new(),
            chunks: Vec::new(),
            chunk: Vec::with_capacity(CHUNK_BYTES as usize),
            length: 0,
        })
    }

    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Appends one row.
    ///
    /// # Errors
    /// The row has another length, or the disk fails.
    pub fn push(&mut self, row: &[u32]) -> Result<(), DataError> {
        if row.len() != self.row_tokens as usize {
            let reason = format!("a row has {} tokens in place of {}", row.len(), self.row_tokens);
            return Err(DataError::Shard { path: self.path.clone(), reason });
        }
        let mut bytes: &[u8] = bytemuck::cast_slice(row);
        while !bytes.is_empty() {
            let room = CHUNK_BYTES as usize - self.chunk.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.chunk.extend_from_slice(now);
            if self.chunk.len() as u64 == CHUNK_BYTES {
                self.flush()?;
            }
            bytes = later;
        }
        self.rows += 1;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), DataError> {
        self.file.write_all(&self.chunk).map_err(DataError::writing(&self.path))?;
        self.sha256.update(&self.chunk);
        self.blake3.update(&self.chunk);
        self.chunks.push(Digest::blake3(&self.chunk));
        self.length += self.chunk.len() as u64;
        self.chunk.clear();
        Ok(())
    }

    /// Ends the file, makes it durable, and gives its record under the name `path`.
    ///
    /// # Errors
    /// The disk fails.
    pub fn finish(mut self, path: &str) -> Result<FileRecord, DataError> {
        if !self.chunk.is_empty() {
            self.flush()?;
        }
        self.file.sync_all().map_err(DataError::writing(&self.path))?;
        Ok(FileRecord {
            path: path.to_owned(),
            length: self.length,
            sha256: Digest(self.sha256.finalize().into()),
            blake3: Digest(*self.blake3.finalize().as_bytes()),
            chunk_bytes: CHUNK_BYTES,
            chunks: self.chunks,
        })
    }
}

/// Rows of a memory-mapped shard file.
#[derive(Debug)]
pub struct ShardReader {
    map: Mmap,
    path: PathBuf,
    row_tokens: usize,
    rows: u64,
    vocab_size: u32,
}

impl ShardReader {
    /// Maps a file of rows. The file must not change while it is mapped: caches and prepared data are written once.
    ///
    /// # Errors
    /// The file is unreadable, empty, or does not consist of whole rows.
    pub fn open(path: &Path, row_tokens: u32, vocab_size: u32) -> Result<Self, DataError> {
        let file = File::open(path).map_err(DataError::reading(path))?;
        let length = file.metadata().map_err(DataError::reading(path))?.len();
        let row_bytes = u64::from(row_tokens) * TOKEN_BYTES as u64;
        if row_bytes == 0 || length == 0 || !length.is_multiple_of(row_bytes) {
            let reason = format!("{length} bytes are not whole rows of {row_tokens} tokens");
            return Err(DataError::Shard { path: path.to_owned(), reason });
        }
        // SAFETY: the map is read-only and private to this value; that nobody changes the file is the documented condition,
        // and every token is compared with the vocabulary when its row is read.
        let map = unsafe { Mmap::map(&file) }.map_err(DataError::reading(path))?;
        Ok(Self { map, path: path.to_owned(), row_tokens: row_tokens as usize, rows: length / row_bytes, vocab_size })
    }

    /// Maps the file of a manifest and checks its length and BLAKE3.
    ///
    /// # Errors
    /// As [`ShardReader::open`], or the file is not the one that the manifest describes.
    pub fn open_verified(path: &Path, manifest: &ShardManifest) -> Result<Self, DataError> {
        let reader = Self::open(path, manifest.row_tokens, manifest.vocab_size)?;
        let wrong = |reason: String| DataError::Shard { path: path.to_owned(), reason };
        if reader.rows != manifest.rows || reader.map.len() as u64 != manifest.file.length {
            return Err(wrong(format!("it has {} rows in place of {}", reader.rows, manifest.rows)));
        }
        let digest = Digest(*blake3::Hasher::new().update_rayon(&reader.map).finalize().as_bytes());
        if digest != manifest.file.blake3 {
            return Err(wrong(format!("its BLAKE3 is {digest} in place of {}", manifest.file.blake3)));
        }
        Ok(reader)
    }

    pub fn rows(&self) -> u64 {
        self.rows
    }

    pub fn row_tokens(&self) -> usize {
        self.row_tokens
    }

    /// One row, every token checked against the vocabulary.
    ///
    /// # Errors
    /// There is no such row, or a token in it is outside the vocabulary.
    pub fn row(&self, row: u64) -> Result<&[u32], DataError> {
        if row >= self.rows {
            return Err(DataError::NoRow { row, rows: self.rows });
        }
        let row_bytes = self.row_tokens * TOKEN_BYTES;
        let start = row as usize * row_bytes;
        let misaligned = |_| DataError::Shard { path: self.path.clone(), reason: "the map is not aligned".to_owned() };
        let tokens = bytemuck::try_cast_slice(&self.map[start..start + row_bytes]).map_err(misaligned)?;
        check_row(tokens, row, self.vocab_size)?;
        Ok(tokens)
    }
}

/// Rows of a byte range of a shard, as a ranged download gives it: whole rows, every token checked. `first_row` is the number
/// of the first of them, for the error.
///
/// # Errors
/// The bytes are not whole rows, or a token is outside the vocabulary.
pub fn decode_rows(bytes: &[u8], first_row: u64, row_tokens: u32, vocab_size: u32) -> Result<Vec<u32>, DataError> {
    let row_bytes = row_tokens as usize * TOKEN_BYTES;
    if row_bytes == 0 || !bytes.len().is_multiple_of(row_bytes) {
        let reason = format!("{} bytes are not whole rows of {row_tokens} tokens", bytes.len());
        return Err(DataError::Shard { path: "(range)".into(), reason });
    }
    let (words, _) = bytes.as_chunks::<TOKEN_BYTES>();
    let tokens: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    for (index, row) in tokens.chunks_exact(row_tokens as usize).enumerate() {
        check_row(row, first_row + index as u64, vocab_size)?;
    }
    Ok(tokens)
}

fn check_row(tokens: &[u32], row: u64, vocab_size: u32) -> Result<(), DataError> {
    match tokens.iter().position(|token| *token >= vocab_size) {
        Some(position) => Err(DataError::TokenOutside { token: tokens[position], row, position, vocab_size }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(rows: u32, row_tokens: u32) -> (tempfile::TempDir, PathBuf, FileRecord) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.bin");
        let mut writer = ShardWriter::create(&path, row_tokens).unwrap();
        for row in 0..rows {
            writer.push(&(0..row_tokens).map(|i| (row * 31 + i) % 1000).collect::<Vec<_>>()).unwrap();
        }
        let record = writer.finish("tokens.bin").unwrap();
        (folder, path, record)
    }

    fn manifest(rows: u64, row_tokens: u32, file: FileRecord) -> ShardManifest {
        ShardManifest {
            id: "s".to_owned(),
            rows,
            row_tokens,
            tokens: rows * u64::from(row_tokens),
            file,
            tokenizer: Digest::ZERO,
            vocab_size: 1000,
            licence: String::new(),
            source: String::new(),
            held_out: false,
        }
    }

    #[test]
    fn the_record_computed_while_writing_is_that_of_the_file() {
        for rows in [1, 3, 1024, 1025, 2500] {
            let (_folder, path, record) = shard(rows, 1024);
            assert_eq!(record, FileRecord::of_file("tokens.bin", &path).unwrap());
            assert!(record.is_consistent());
        }
    }

    #[test]
    fn rows_come_back_as_they_were_written_from_the_map_and_from_a_range() {
        let (_folder, path, record) = shard(10, 7);
        let reader = ShardReader::open_verified(&path, &manifest(10, 7, record)).unwrap();
        assert_eq!((reader.rows(), reader.row_tokens()), (10, 7));
        assert_eq!(reader.row(3).unwrap(), [93, 94, 95, 96, 97, 98, 99]);
        assert!(matches!(reader.row(10), Err(DataError::NoRow { .. })));
        let bytes = std::fs::read(&path).unwrap();
        // An odd offset into the buffer: the bytes need not be aligned.
        let range = decode_rows(&bytes[3 * 28..5 * 28], 3, 7, 1000).unwrap();
        assert_eq!(range[..7], *reader.row(3).unwrap());
        assert_eq!(range[7..], *reader.row(4).unwrap());
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_found_with_its_place() {
        let (_folder, path, _) = shard(10, 7);
        let reader = ShardReader::open(&path, 7, 95).unwrap();
        assert!(reader.row(2).is_ok());
        assert!(matches!(reader.row(3), Err(DataError::TokenOutside { token: 95, row: 3, position: 2, vocab_size: 95 })));
        let bytes = std::fs::read(&path).unwrap();
        assert!(matches!(decode_rows(&bytes, 0, 7, 95), Err(DataError::TokenOutside { row: 3, .. })));
    }

    #[test]
    fn files_that_are_cut_altered_or_of_another_shape_are_refused() {
        let (_folder, path, record) = shard(10, 7);
        let manifest = manifest(10, 7, record);
        assert!(matches!(ShardReader::open(&path, 8, 1000), Err(DataError::Shard { .. })));
        assert!(matches!(ShardReader::open(&path, 0, 1000), Err(DataError::Shard { .. })));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[5] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = ShardReader::open_verified(&path, &manifest).unwrap_err();
        assert!(error.to_string().contains("BLAKE3") && error.to_string().contains("hint: fetch or prepare"), "{error}");
        std::fs::write(&path, &bytes[..28 * 9]).unwrap();
        assert!(ShardReader::open_verified(&path, &manifest).unwrap_err().to_string().contains("9 rows in place of 10"));
        std::fs::write(&path, b"").unwrap();
        assert!(ShardReader::open(&path, 7, 1000).is_err());
        assert!(decode_rows(&bytes[..27], 0, 7, 1000).is_err());
    }

    #[test]
    fn an_existing_shard_is_never_overwritten_and_rows_have_one_length() {
        let (_folder, path, _) = shard(1, 7);
        assert!(ShardWriter::create(&path, 7).is_err());
        let mut writer = ShardWriter::create(&path.with_extension("other"), 7).unwrap();
        assert!(writer.push(&[1, 2, 3]).is_err());
    }
}
