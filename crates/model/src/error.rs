//! What a trainer or evaluator can fail with.

use crate::{ConfigError, StateError};

/// Whose memory ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Gpu,
    Host,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gpu => "the GPU",
            Self::Host => "the host",
        })
    }
}

/// Errors of [`crate::Trainer`] and [`crate::Evaluator`]. After any of them the trainer's state is what it was before the
/// call.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("checkpoint: {0}\nhint: fetch the checkpoint again, or check that folder and run belong together")]
    Checkpoint(String),
    #[error("the fragment plan does not fit the model: {0}\nhint: plan and checkpoint must come from the same run")]
    Plan(String),
    #[error("there is no fragment {fragment}: the plan has {fragments}")]
    NoFragment { fragment: usize, fragments: usize },
    #[error("fragment {fragment} has {expected} elements, got {found}")]
    FragmentLength { fragment: usize, expected: u64, found: usize },
    #[error("fragment {fragment} holds a value that is not finite")]
    FragmentNotFinite { fragment: usize },
    #[error("batch: {0}")]
    Batch(String),
    #[error("token {token} is outside the vocabulary of {vocabulary}\nhint: the shard was made with another tokenizer")]
    Token { token: u32, vocabulary: usize },
    #[error("forced routes: {0}")]
    Routes(String),
    /// The step was not taken: weights, moments and step count are unchanged.
    #[error(
        "{what} is not finite at step {step}\nhint: the learning rate may be too high, or the weights are damaged; the state before this step is kept"
    )]
    NotFinite { what: &'static str, step: u64 },
    #[error(transparent)]
    State(#[from] StateError),
    #[error("device {device:?}: {reason}\nhint: use \"cpu\", or \"cuda:0\" with QUASAR_TORCH_CUDA_DIR naming a full torch installation")]
    Device { device: String, reason: String },
    /// The CUDA part of libtorch is loaded. After a start of the machine it takes a while until its GPUs are there.
    #[error(
        "no CUDA device is usable: {0}\nhint: the driver may not be ready yet: see nvidia-smi, and the service nvidia-fabricmanager where GPUs \
         have an NVSwitch; or use the device \"cpu\""
    )]
    GpuNotReady(String),
    /// Own kernels cannot be compiled or loaded.
    #[error("own kernels: {0}\nhint: libtorch's operations compute the same, more slowly")]
    Kernels(String),
    /// Nothing has changed; the same call fails again unless less is asked for or more is there.
    #[error("{place} has too little memory: {missing} bytes are missing\nhint: {advice}")]
    OutOfMemory { place: Place, missing: u64, advice: String },
    /// An error inside libtorch: a shape that should not occur, or a broken device.
    #[error("libtorch: {0}\nhint: this is a bug or a broken installation; `nvidia-smi` says whether the GPU is well")]
    Torch(String),
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
}
