//! Quasar on libtorch: forward pass, loss, trainer and evaluator, on CPU or CUDA in one binary.
//!
//! Functions of `tch` without the prefix `f_` panic on C++ errors, so only fallible ones are used here; an error inside
//! libtorch (out of memory above all) comes back as [`crate::TrainError::Torch`].

mod attention;
pub mod bench;
mod checkpoint;
pub mod chunked;
mod context;
mod device;
mod evaluator;
mod flat;
mod gla;
mod gpu;
mod layout;
mod learner;
mod loss;
mod moe;
mod network;
mod ops;
mod quasar;
mod raven;
mod trainer;

pub use device::{ComputeType, cuda_is_available, load_cuda, tune_allocator};
pub use evaluator::{EvaluatorOptions, QuasarEvaluator};
pub use loss::{Loss, checkpoint_loss};
pub use network::{Network, Trace};
pub use quasar::step_size;
pub use trainer::{MomentType, QuasarTrainer, TrainerOptions};

impl From<tch::TchError> for crate::TrainError {
    fn from(error: tch::TchError) -> Self {
        // The C++ message carries a stack trace; its first line says what happened.
        let text = error.to_string();
        Self::Torch(text.lines().next().unwrap_or_default().to_owned())
    }
}
