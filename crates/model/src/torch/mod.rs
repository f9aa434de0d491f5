//! Quasar on libtorch: forward pass, loss, trainer and evaluator, on CPU or CUDA in one binary.
//!
//! Functions of `tch` without the prefix `f_` panic on C++ errors, so only fallible ones are used here; an error inside
//! libtorch comes back as [`crate::TrainError::Torch`], or [`crate::TrainError::OutOfMemory`] if that is what it says.

mod attention;
pub mod bench;
pub mod chunked;
mod context;
pub mod determinism;
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
mod pieces;
mod quasar;
mod raven;
mod shortage;
mod trainer;

pub use device::{ComputeType, GpuInfo, TORCH_VERSION, cuda_is_available, gpus, load_cuda, tune_allocator};
pub use evaluator::{EvaluatorOptions, QuasarEvaluator};
pub use loss::{Loss, checkpoint_loss};
pub use network::{Network, Trace};
pub use quasar::step_size;
pub use trainer::{MomentType, QuasarTrainer, TrainerOptions};

impl From<tch::TchError> for crate::TrainError {
    fn from(error: tch::TchError) -> Self {
        let text = error.to_string();
        // The C++ message carries a stack trace; its first line says what happened.
        let text = text.lines().next().unwrap_or_default();
        match shortage::shortage(text) {
            Some(shortage) => Self::OutOfMemory {
                place: if shortage.on_gpu { crate::Place::Gpu } else { crate::Place::Host },
                missing: shortage.missing,
                advice: "fewer rows in a step, or a machine with more memory".to_owned(),
            },
            None => Self::Torch(text.to_owned()),
        }
    }
}
