//! Checkpoint trees: folders in the Hugging Face layout with the weights in safetensors files.
//!
//! [`CheckpointTree`] reads them memory-mapped; [`split`] and [`split_states`] cut one into a folder of fragment files or states;
//! [`assemble`], [`assemble_states`] and [`assemble_from`] stream a tree with every contract tensor replaced, in the shard
//! layout and element types of a base tree. Splitting and assembling gives back every tensor bit for bit.
//!
//! Files are read and written in pieces of a few MiB, so memory does not grow with the model; as many files at once as there are
//! threads. Everything is written under
//! temporary names, hashed on the way, and what was completed before an interruption is not written again.

mod assemble;
mod error;
mod file;
mod recorded;
mod split;
mod states;
mod tree;
mod write;

pub use assemble::{Assembled, assemble, assemble_from, copy_side_files};
pub use error::CheckpointError;
pub use split::{split, split_recorded};
pub use states::{StateFile, assemble_states, split_states, state_file};
pub use tree::{CheckpointTree, INDEX_BYTES_MAX, INDEX_FILE};
pub use write::UNFINISHED;

#[cfg(test)]
mod tests;
