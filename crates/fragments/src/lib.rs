//! Arithmetic on parameter fragments: how a model is cut into fragments, how contributions to a fragment are encoded,
//! checked, merged and applied, and how checkpoints are split into fragments and put together again.
//!
//! A *fragment* is a list of slices; a *slice* is a range of rows of one tensor ([`protocol::Slice`]). The values of a
//! fragment travel as one flat buffer in slice order. Everything that several parties must agree on, byte for byte, is
//! here, and is a pure function of its arguments: no clock, no randomness, no network. Files are read memory-mapped
//! and written under the paths that the caller names, nothing else.
//!
//! | module | what |
//! |---|---|
//! | [`contract`] | the parameter contract: names, shapes and element types that are trained and synchronised |
//! | [`mod@plan`] | balanced fragments over (tensor, row range) slices |
//! | [`codec`] | `payload.qfd`, the encoded pseudo-gradient that a learner uploads: bf16, int4, top-k |
//! | [`feedback`] | a learner's memory of what a lossy codec left out |
//! | [`t0`] | the static checks on an upload |
//! | [`gates`], [`merge`] | norm and direction filters, robust weighted radial-directional averaging |
//! | [`outer`] | the outer optimizer and the limit on its steps |
//! | [`state`], [`keyframe`] | a fragment at rest: f32 with momentum (private), bf16 (what learners fetch) |
//! | [`delta`] | `delta.qfd`, the int4 difference between two public versions |
//! | [`checkpoint`] | Hugging Face trees of safetensors: read, split, assemble |

pub mod checkpoint;
pub mod codec;
pub mod contract;
pub mod delta;
pub mod feedback;
pub mod gates;
mod kernels;
pub mod keyframe;
mod memory;
pub mod merge;
mod number;
pub mod outer;
pub mod plan;
mod safetensors_header;
mod simd;
pub mod state;
pub mod t0;
#[cfg(target_arch = "x86_64")]
mod wide;

#[cfg(test)]
mod fixture;

pub use checkpoint::CheckpointTree;
pub use codec::CodecError;
pub use contract::{Contract, ContractError, TensorSpec};
pub use number::{all_finite, first_non_finite, first_non_finite_here, round};
pub use plan::{PlanError, plan};
pub use safetensors_header::{HEADER_BYTES_MAX, HeaderError};
