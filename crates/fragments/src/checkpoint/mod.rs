//! Checkpoint trees: folders in the Hugging Face layout with the weights in safetensors files.
//!
//! [`CheckpointTree`] reads them memory-mapped; [`split`] cuts one into a folder of fragment files; [`assemble`] and
//! [`assemble_from`] stream a tree with every contract tensor replaced, in the shard layout and element types of a base
//! tree. Splitting and assembling gives back every tensor bit for bit.

mod assemble;
mod error;
mod file;
mod split;
mod tree;
mod write;

pub use assemble::{Assembled, assemble, assemble_from};
pub use error::CheckpointError;
pub use split::split;
pub use tree::{CheckpointTree, INDEX_BYTES_MAX, INDEX_FILE};

#[cfg(test)]
mod tests;
