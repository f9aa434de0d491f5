//! Quasar (`model_type: quasar_long`): configuration, tensors, initialisation, and the two things that a run needs a
//! model for, behind the traits [`Trainer`] and [`Evaluator`].
//!
//! Without the feature `libtorch` the crate holds everything that needs no tensor library: configuration, the list of
//! tensors, fresh initial weights, conversion of checkpoints, trainer state, and a toy trainer for simulations. With it (the
//! default) come the real forward pass and loss ([`torch::Network`]), [`QuasarTrainer`], [`QuasarEvaluator`] and [`checkpoint_loss`].
//!
//! This crate knows neither network nor protocol; it sees token rows and fragments of parameters as flat `f32` buffers.

mod adamw;
mod checkpoint;
mod config;
mod error;
mod exported;
mod host;
pub mod init;
mod json;
pub mod memory;
mod ranges;
mod state;
mod tensors;
mod toy;
mod train;
mod tree;

#[cfg(feature = "libtorch")]
pub mod torch;

pub use checkpoint::convert;
pub use config::{Branch, ConfigError, QuasarConfig};
pub use error::{Place, TrainError};
pub use host::{HostMemory, HostValues};
pub use ranges::PlanRanges;
pub use state::{StateError, TrainerState, check_state};
pub use tensors::TensorEntry;
pub use toy::{ToyTrainer, toy_contract, toy_plan};
pub use train::{Batch, Evaluator, Hyper, Routes, StepReport, Trainer};
pub use tree::TreeError;

#[cfg(feature = "libtorch")]
pub use torch::{
    ComputeType, EvaluatorOptions, GpuInfo, Loss, MomentType, QuasarEvaluator, QuasarTrainer, TORCH_VERSION, TrainerOptions,
    checkpoint_loss, cuda_is_available, gpus, load_cuda, tune_allocator,
};
