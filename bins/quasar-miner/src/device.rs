//! Devices: one learner for each, and how it is opened.

use std::path::Path;

use daemon::settings::{Devices, MinerSettings};
use model::{QuasarTrainer, TORCH_VERSION, TrainError, Trainer, TrainerOptions};
use protocol::FragmentPlan;
use protocol::documents::RunParameters;

use crate::trainer::OpenTrainer;

/// GPUs whose device files are counted.
const GPUS_MAX: u32 = 64;
/// The part of the host's free memory that may be pinned if the settings do not say.
const PINNED_PER_CENT: u64 = 75;

/// Names of the devices to train on, as the trainer knows them: `cpu` or `cuda:N`. Loads the CUDA part of libtorch if the
/// settings name a folder with it.
///
/// # Errors
/// GPUs are asked for, or are there, and cannot be used: the CPU takes over only if the settings say so.
pub fn names(settings: &MinerSettings) -> Result<Vec<String>, TrainError> {
    if let (Some(folder), false) = (&settings.torch_cuda_dir, settings.devices == Devices::Cpu) {
        model::load_cuda(folder)?;
    }
    let present = (0..GPUS_MAX).take_while(|number| Path::new(&format!("/dev/nvidia{number}")).exists()).count() as u32;
    chosen(&settings.devices, present, model::cuda_is_available())
}

/// The devices for what is asked for, with so many GPUs in the machine, of which libtorch can use all or none.
fn chosen(devices: &Devices, present: u32, usable: bool) -> Result<Vec<String>, TrainError> {
    let cuda = |numbers: &mut dyn Iterator<Item = u32>| numbers.map(|number| format!("cuda:{number}")).collect();
    Ok(match devices {
        Devices::Cpu => vec!["cpu".to_owned()],
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
        ..TrainerOptions::default()
    }
}

/// Bytes of the host's memory that may be pinned if the settings do not say.
pub fn pinnable() -> u64 {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let free = available(&text("/proc/meminfo")).unwrap_or_default();
    // In a container the machine's memory is more than what this process gets.
    let limit = limit(Path::new("/sys/fs/cgroup"), &text("/proc/self/cgroup")).unwrap_or(u64::MAX);
    free.min(limit) / 100 * PINNED_PER_CENT
}

/// The tightest memory limit of the control groups in a text of `/proc/self/cgroup`, of version 2 or 1, and of those above them; `None`
/// without a limit. Inside a container the group's own path may not be there, but the root is the container's.
fn limit(root: &Path, groups: &str) -> Option<u64> {
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => (root.join("memory"), "memory.limit_in_bytes"),
            _ => continue,
        };
        let files = Path::new(group.trim_start_matches('/')).ancestors().map(|group| root.join(group).join(file));
        // A group without a limit says `max`, or a number above any memory.
        limits.extend(files.filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok()));
    }
    limits.into_iter().min()
}

/// Bytes of memory that can be taken, from the text of `/proc/meminfo`.
fn available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
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
    use super::*;

    #[test]
    fn a_gpu_that_cannot_be_used_is_an_error_and_no_silent_fall_to_the_cpu() {
        let error = chosen(&Devices::Auto, 2, false).unwrap_err().to_string();
        assert!(error.contains("2 GPUs") && error.contains(TORCH_VERSION) && error.contains("QUASAR_MINER_DEVICES=cpu"), "{error}");
        assert_eq!(chosen(&Devices::Cpu, 2, false).unwrap(), ["cpu"]);
        assert_eq!(chosen(&Devices::Auto, 0, false).unwrap(), ["cpu"]);
        assert_eq!(chosen(&Devices::Auto, 2, true).unwrap(), ["cuda:0", "cuda:1"]);
        assert_eq!(chosen(&Devices::Cuda(vec![3]), 0, false).unwrap(), ["cuda:3"], "the trainer says what is wrong with it");
    }

    #[test]
    fn the_tightest_limit_of_the_control_groups_counts() {
        let folder = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let of = |groups: &str| limit(folder.path(), groups);
        assert_eq!(of("0::/\n"), None);
        put("memory.max", "max\n");
        assert_eq!(of("0::/\n"), None, "no limit");
        put("a/b/memory.max", "max\n");
        put("a/memory.max", "4096\n");
        assert_eq!(of("0::/a/b\n"), Some(4096), "the group above");
        put("a/b/memory.max", "1024\n");
        assert_eq!(of("0::/a/b\n"), Some(1024));
        assert_eq!(of("0::/elsewhere\n"), None);
        put("memory/memory.limit_in_bytes", "2048\n");
        assert_eq!(of("9:name=systemd:/\n4:memory:/docker/c\n0::/\n"), Some(2048), "version 1, with the host's path in a container");
        assert_eq!(of("4:cpu,memory:/\n0::/a/b\n"), Some(1024), "both");
        assert_eq!(of(""), None);
    }

    #[test]
    fn free_memory_is_read_in_bytes() {
        assert_eq!(available("MemTotal: 10 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal: 10 kB\n"), None);
    }
}
