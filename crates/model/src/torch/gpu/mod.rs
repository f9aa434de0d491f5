//! Training on a GPU with own kernels: bf16 weights and products, f32 masters in two halves, 8-bit or f32 moments.
//!
//! The kernels are CUDA C++ in `kernels/`, compiled for the GPU at hand when a learner is opened. Models of other shapes than the
//! kernels are built for, and machines without a compiler, train through libtorch's operations ([`super::flat`]), which computes the same
//! function.

mod attention;
mod branch;
mod driver;
mod engine;
mod kernels;
mod learner;
mod mixture;
mod pinned;
mod store;

pub(crate) use driver::{gpus, remember_torch};
pub(crate) use kernels::unsupported;
pub(crate) use learner::GpuLearner;

/// Bytes of memory that a GPU has, whoever holds them.
pub(crate) fn total_bytes(index: usize) -> Result<u64, String> {
    Ok(driver::Gpu::open(index)?.memory()?.1 as u64)
}
