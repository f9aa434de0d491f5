//! Devices: one learner for each, and how it is opened.

use std::path::Path;

use daemon::Failure;
use daemon::settings::{Devices, MinerSettings};
use model::{QuasarTrainer, TORCH_VERSION, TrainError, Trainer, TrainerOptions};
use protocol::FragmentPlan;
use protocol::documents::RunParameters;

use crate::host;
use crate::trainer::OpenTrainer;

/// GPUs whose device files are counted.
const GPUS_MAX: u32 = 64;
/// The part of the host's free memory that may be pinned if the settings do not say.
const PINNED_PER_CENT: u64 = 75;

/// The exit of a device that cannot be used.
pub fn failure(error: TrainError) -> Failure {
    match error {
        TrainError::GpuNotReady(_) => Failure::try_later(error),
        _ => Failure::configuration(error),
    }
}

/// Names of the devices to train on, as the trainer knows them: `cpu` or `cuda:N`. Loads the CUDA part of libtorch if the
/// settings name a folder with it.
///
/// # Errors
/// GPUs are asked for, or are there, and cannot be used: the CPU takes over only if the settings say so. Who names a folder with the CUDA
/// part means a machine with GPUs, so that they may yet come.
pub fn names(settings: &MinerSettings) -> Result<Vec<String>, TrainError> {
    if let (Some(folder), false) = (&settings.torch_cuda_dir, settings.devices == Devices::Cpu) {
        model::load_cuda(folder)?;
    }
    // A container may see some of them only; libtorch numbers these from zero.
    let present = (0..GPUS_MAX).filter(|number| Path::new(&format!("/dev/nvidia{number}")).exists()).count() as u32;
    chosen(&settings.devices, present, model::cuda_is_available(), settings.torch_cuda_dir.is_some())
}

/// The devices for what is asked for, with so many GPUs in the machine, of which libtorch can use all or none. GPUs are `expected` where the
/// settings name a folder with the CUDA part.
fn chosen(devices: &Devices, present: u32, usable: bool, expected: bool) -> Result<Vec<String>, TrainError> {
    let not_ready = |what: String| Err(TrainError::GpuNotReady(what));
    let cuda = |numbers: &mut dyn Iterator<Item = u32>| numbers.map(|number| format!("cuda:{number}")).collect();
    Ok(match devices {
        Devices::Cpu => vec!["cpu".to_owned()],
        Devices::Auto if expected && !usable => return not_ready(format!("of {present} GPUs here none can be used")),
        // Without device files (WSL) nobody says how many there are.
        Devices::Auto if expected && present == 0 => vec!["cuda:0".to_owned()],
        // Without device files (WSL) the trainer says which GPU is missing.
        Devices::Cuda(numbers) if expected && present > 0 && numbers.iter().any(|number| *number >= present) => {
            return not_ready(format!("only {present} of the GPUs that the settings name are here"));
        }
        Devices::Cuda(numbers) => cuda(&mut numbers.iter().copied()),
        Devices::Auto if usable => cuda(&mut (0..present)),
        Devices::Auto if present > 0 => {
            let reason = format!(
                "{present} GPUs are here, but this program is linked with libtorch {TORCH_VERSION} without its CUDA part, and no folder with that is named; it trains on the CPU only if QUASAR_MINER_DEVICES=cpu says so"
            );
            return Err(TrainError::Device { device: "cuda".into(), reason });
        }
        Devices::Auto => vec!["cpu".to_owned()],
    })
}

/// How a device computes in a run, as one of so many learners of this process.
pub fn options(device: &str, learners: usize, settings: &MinerSettings, parameters: &RunParameters, state_dir: &Path) -> TrainerOptions {
    TrainerOptions {
        device: device.to_owned(),
        threads: settings.threads,
        kernel_cache: Some(state_dir.join("cache").join("kernels")),
        host_bytes: settings.host_memory_gib.map_or_else(|| pinnable() / learners.max(1) as u64, |gib| gib << 30),
        device_bytes: settings.device_memory_gib.map(|gib| gib << 30),
        batch: (parameters.batch_rows as usize, parameters.sequence_length as usize),
        document_end: parameters.training.document_end,
        train_step_sizes: parameters.training.train_step_sizes,
        ..TrainerOptions::default()
    }
}

/// Bytes of the host's memory that may be pinned if the settings do not say.
pub fn pinnable() -> u64 {
    host::free_memory() / 100 * PINNED_PER_CENT
}

/// How the trainer of a device is opened, once the base tree is on disk.
pub fn opener(options: TrainerOptions, plan: FragmentPlan) -> OpenTrainer {
    Box::new(move |tree| {
        let trainer = QuasarTrainer::open_with(tree, plan, &options)?;
        let fell_back = if trainer.fallback().is_some() { 1.0 } else { 0.0 };
        metrics::gauge!("quasar_miner_kernel_fallback", "device" => options.device.clone()).set(fell_back);
        let trainer: Box<dyn Trainer> = Box::new(trainer);
        Ok(trainer)
    })
}

#[cfg(test)]
mod tests {
    use daemon::Exit;

    use super::*;

    #[test]
    fn a_gpu_that_cannot_be_used_is_an_error_and_no_silent_fall_to_the_cpu() {
        let error = chosen(&Devices::Auto, 2, false, false).unwrap_err().to_string();
        assert!(error.contains("2 GPUs") && error.contains(TORCH_VERSION) && error.contains("QUASAR_MINER_DEVICES=cpu"), "{error}");
        assert_eq!(chosen(&Devices::Cpu, 2, false, false).unwrap(), ["cpu"]);
        assert_eq!(chosen(&Devices::Auto, 0, false, false).unwrap(), ["cpu"]);
        assert_eq!(chosen(&Devices::Auto, 2, true, false).unwrap(), ["cuda:0", "cuda:1"]);
        assert_eq!(chosen(&Devices::Cuda(vec![3]), 0, false, false).unwrap(), ["cuda:3"], "the trainer says what is wrong with it");
    }

    #[test]
    fn gpus_that_are_expected_and_not_ready_are_waited_for_and_a_wrong_folder_is_not() {
        let exit = |result: Result<Vec<String>, TrainError>| failure(result.unwrap_err()).exit;
        for (devices, present, usable) in [(Devices::Auto, 0, false), (Devices::Auto, 2, false), (Devices::Cuda(vec![0, 2]), 2, true)] {
            assert_eq!(exit(chosen(&devices, present, usable, true)), Exit::TryLater, "{devices:?}");
        }
        assert_eq!(chosen(&Devices::Auto, 2, true, true).unwrap(), ["cuda:0", "cuda:1"]);
        assert_eq!(chosen(&Devices::Cuda(vec![1]), 2, true, true).unwrap(), ["cuda:1"]);
        assert_eq!(chosen(&Devices::Cpu, 0, false, true).unwrap(), ["cpu"]);
    }
}
