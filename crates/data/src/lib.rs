//! Text to token shards, and token shards back to rows.
//!
//! [`prepare`] turns text files, JSONL and their compressed forms into shards of fixed-length rows with a manifest each and a
//! catalog; [`tokenizer`] loads or trains the byte-level BPE in between; [`shards`] writes shards while hashing them and reads
//! rows of a memory-mapped one. No network, no libtorch, no clock, no randomness: the same inputs give the same bytes.

#[cfg(target_endian = "big")]
compile_error!("token shards are little-endian and are read in place: big-endian machines are not supported");

pub mod catalog;
pub mod documents;
mod error;
pub mod prepare;
pub mod shards;
pub mod tokenizer;

pub use catalog::{Catalog, Split};
pub use documents::{Document, Documents};
pub use error::DataError;
pub use prepare::{HeldOut, PrepareSettings, prepare};
pub use shards::{ShardReader, ShardWriter, decode_rows};
pub use tokenizer::Tokenizer;
