//! Devices: one learner for each.

use std::path::Path;

use daemon::settings::{Devices, MinerSettings};
use model::{QuasarTrainer, TrainError, Trainer};
use protocol::FragmentPlan;

use crate::trainer::OpenTrainer;

/// GPUs whose device files are counted.
const GPUS_MAX: u32 = 64;

/// Names of the devices to train on, as the trainer knows them: `cpu` or `cuda:N`. Loads the CUDA part of libtorch if the
/// settings name a folder with it.
///
/// # Errors
/// GPUs are asked for that cannot be used.
pub fn names(settings: &MinerSettings) -> Result<Vec<String>, TrainError> {
    if let (Some(folder), false) = (&settings.torch_cuda_dir, settings.devices == Devices::Cpu) {
        model::load_cuda(folder)?;
    }
    let cuda = |numbers: &mut dyn Iterator<Item = u32>| numbers.map(|number| format!("cuda:{number}")).collect();
    Ok(match &settings.devices {
        Devices::Cpu => vec!["cpu".to_owned()],
        Devices::Cuda(numbers) => cuda(&mut numbers.iter().copied()),
        Devices::Auto if model::cuda_is_available() => {
            cuda(&mut (0..GPUS_MAX).take_while(|number| Path::new(&format!("/dev/nvidia{number}")).exists()))
        }
        Devices::Auto => vec!["cpu".to_owned()],
    })
}

/// How the trainer of a device is opened, once the base tree is on disk.
pub fn opener(device: String, plan: FragmentPlan, threads: usize) -> OpenTrainer {
    Box::new(move |tree| {
        let trainer: Box<dyn Trainer> = Box::new(QuasarTrainer::open(tree, plan, &device, threads)?);
        Ok(trainer)
    })
}
