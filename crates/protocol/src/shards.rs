//! Token shards: what a shard holds and where it came from.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::{Digest, FileRecord};

/// A headerless file of little-endian u32 tokens, `rows` rows of `row_tokens` each.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct ShardManifest {
    pub id: String,
    pub rows: u64,
    pub row_tokens: u32,
    pub tokens: u64,
    pub file: FileRecord,
    /// BLAKE3 of the tokenizer file.
    pub tokenizer: Digest,
    pub vocab_size: u32,
    pub licence: String,
    pub source: String,
    /// Held-out rows are never leased; validators evaluate on them.
    pub held_out: bool,
}
