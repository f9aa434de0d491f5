//! What a prepared data set consists of: `catalog.json` beside the shards.
//!
//! The catalog is the operator's file and is not signed; publishing signs the shard manifests in it.

use std::path::{Path, PathBuf};

use protocol::{Digest, ShardManifest};
use serde::{Deserialize, Serialize};

use crate::DataError;

pub const CATALOG_FILE: &str = "catalog.json";
pub const TOKENIZER_FILE: &str = "tokenizer.json";
pub const SHARDS_FOLDER: &str = "shards";
pub const TOKENS_FILE: &str = "tokens.bin";
pub const MANIFEST_FILE: &str = "manifest.json";
const VERSION: u32 = 1;
/// Largest catalog that is read.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Totals of the training or the held-out side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    pub documents: u64,
    pub rows: u64,
    /// Tokens in rows.
    pub tokens: u64,
    /// Tokens at the very end that did not fill a row.
    pub dropped_tokens: u64,
}

/// A prepared data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalog {
    pub version: u32,
    /// BLAKE3 of `tokenizer.json`.
    pub tokenizer: Digest,
    pub vocab_size: u32,
    /// The token that follows each document.
    pub end_of_text: u32,
    pub sequence_length: u32,
    /// How held-out documents were chosen, in words.
    pub held_out_rule: String,
    pub training: Split,
    pub held_out: Split,
    /// All shards: training in order, then held-out.
    pub shards: Vec<ShardManifest>,
}

impl Catalog {
    pub(crate) const VERSION: u32 = VERSION;

    /// Reads the catalog of a prepared data set and checks that it agrees with itself.
    ///
    /// # Errors
    /// The file is unreadable or contradicts itself.
    pub fn load(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(CATALOG_FILE);
        let wrong = |reason: String| DataError::Catalog { path: path.clone(), reason };
        let length = std::fs::metadata(&path).map_err(DataError::reading(&path))?.len();
        if length > FILE_BYTES_MAX {
            return Err(wrong(format!("it has {length} bytes, more than {FILE_BYTES_MAX}")));
        }
        let bytes = std::fs::read(&path).map_err(DataError::reading(&path))?;
        let catalog: Self = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        catalog.check().map_err(wrong)?;
        Ok(catalog)
    }

    fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("it has version {} in place of {VERSION}", self.version));
        }
        for shard in &self.shards {
            let tokens = shard.rows.checked_mul(u64::from(shard.row_tokens));
            let bytes = tokens.and_then(|tokens| tokens.checked_mul(4));
            let is_sound = shard.row_tokens == self.sequence_length
                && shard.tokenizer == self.tokenizer
                && shard.vocab_size == self.vocab_size
                && tokens == Some(shard.tokens)
                && bytes == Some(shard.file.length)
                && shard.file.is_consistent()
                && is_key_segment(&shard.id);
            if !is_sound {
                return Err(format!("the entry of shard `{}` contradicts itself or the catalog", shard.id.escape_default()));
            }
        }
        Ok(())
    }

    /// Where a shard's tokens lie.
    pub fn tokens_path(folder: &Path, shard: &ShardManifest) -> PathBuf {
        folder.join(SHARDS_FOLDER).join(&shard.id).join(TOKENS_FILE)
    }

    /// The shards of one side, in order.
    pub fn side(&self, held_out: bool) -> impl Iterator<Item = &ShardManifest> {
        self.shards.iter().filter(move |shard| shard.held_out == held_out)
    }
}

/// Whether a name may be a segment of a bucket key, and so of a path.
pub(crate) fn is_key_segment(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._=-".contains(&byte);
    !name.is_empty() && name.len() <= 128 && name != "." && name != ".." && name.bytes().all(allowed)
}
