//! Devices: parsing their names, loading CUDA at run time, threads, and the allocator.

use std::cell::Cell;
use std::path::Path;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::TrainError;

/// The version of libtorch that this crate links, and whose CUDA part it can load.
pub const TORCH_VERSION: &str = "2.11.0";

/// Workspaces of a fixed size for cuBLAS, without which libtorch refuses to compute reproducibly; their usual size on an H100.
const CUBLAS_WORKSPACE: (&str, &str) = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8");

/// Element type of the computation. Master weights and optimizer state are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ComputeType {
    #[default]
    F32,
    Bf16,
}

impl ComputeType {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
        }
    }
}

/// A GPU as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuInfo {
    pub name: String,
    /// Compute capability, for example 90 for 9.0.
    pub capability: u32,
    pub free_bytes: u64,
    pub total_bytes: u64,
    /// Newest CUDA version that the driver runs, for example `13.0`.
    pub driver: String,
}

/// The GPUs of this machine, in the order of their numbers; needs no libtorch.
///
/// # Errors
/// There is no driver, or it does not work.
pub fn gpus() -> Result<Vec<GpuInfo>, TrainError> {
    super::gpu::gpus().map_err(|reason| TrainError::Device { device: "cuda".into(), reason })
}

/// The version that a `torch` folder says it has (`2.11.0+cu130`).
fn version_of(torch: &Path) -> Option<String> {
    let text = std::fs::read_to_string(torch.join("version.py")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
    Some(line.trim().trim_matches(['\'', '"']).to_owned())
}

/// Loads `lib/libtorch_cuda.so` below `torch` (the `torch` folder of a full installation of the version that this program
/// is linked with), after which `cuda:N` devices work. Call it before anything else of this crate that uses libtorch, and before other
/// threads look at the environment, in which it sets what libtorch wants there. The library stays loaded until the process ends.
pub fn load_cuda(torch: &Path) -> Result<(), TrainError> {
    let file = torch.join("lib").join("libtorch_cuda.so");
    let fail = |reason: String| TrainError::Device { device: "cuda".into(), reason };
    let found = version_of(torch);
    if let Some(found) = found.as_deref().filter(|found| found.split('+').next() != Some(TORCH_VERSION)) {
        return Err(fail(format!("{} holds torch {found}, but this program needs {TORCH_VERSION}", torch.display())));
    }
    let found = found.unwrap_or_else(|| "of an unknown version".to_owned());
    if !file.exists() {
        let what = if found.contains("+cpu") { "which is built without CUDA" } else { "which is not a full installation" };
        return Err(fail(format!("{} is missing: torch there is {found}, {what}; needed is {TORCH_VERSION}", file.display())));
    }
    #[cfg(unix)]
    {
        use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
        give_cublas_its_workspace();
        // SAFETY: loading runs the library's initialisers, which register CUDA kernels with the linked libtorch.
        let library = unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_GLOBAL) };
        let library =
            library.map_err(|error| fail(format!("cannot load {} (torch {found}, needed is {TORCH_VERSION}): {error}", file.display())))?;
        // Kernels registered from it must stay valid: never close it.
        std::mem::forget(library);
    }
    super::gpu::remember_torch(torch);
    if !tch::Cuda::is_available() {
        let driver = super::gpu::gpus().map_or_else(|error| error, |gpus| format!("the driver shows {} GPUs", gpus.len()));
        return Err(TrainError::GpuNotReady(format!("torch {found} is loaded, and {driver}")));
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "libtorch looks for it nowhere else; load_cuda is called before there are other threads")]
fn give_cublas_its_workspace() {
    let (name, size) = CUBLAS_WORKSPACE;
    if std::env::var_os(name).is_some_and(|other| other != size) {
        tracing::warn!(name, size, "the environment says something else: replaced, since other workspaces give other bits");
    }
    // SAFETY: no other thread looks at the environment, as the documentation of `load_cuda` asks.
    unsafe { std::env::set_var(name, size) };
}

/// Whether `cuda:N` devices can be used.
pub fn cuda_is_available() -> bool {
    tch::Cuda::is_available()
}

/// `cpu`, `cuda` or `cuda:N`.
pub(crate) fn parse_device(name: &str) -> Result<Device, TrainError> {
    let fail = |reason: &str| TrainError::Device { device: name.to_owned(), reason: reason.to_owned() };
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => 0,
        _ => name.strip_prefix("cuda:").and_then(|n| n.parse::<usize>().ok()).ok_or_else(|| fail("there is no such kind of device"))?,
    };
    if !tch::Cuda::is_available() {
        return Err(fail("CUDA is not loaded or finds no GPU"));
    }
    if index >= tch::Cuda::device_count().max(0) as usize {
        return Err(fail("there are not that many GPUs"));
    }
    let device = Device::Cuda(index);
    super::context::compute_reproducibly();
    // A GPU that this libtorch has no kernels for fails here, and not in the middle of a run.
    let probe = || Tensor::f_ones([1], (Kind::Float, device))?.f_double_value(&[0]);
    if let Err(error) = probe() {
        let gpu = super::gpu::gpus().ok().and_then(|gpus| gpus.into_iter().nth(index));
        let gpu = gpu.map_or_else(String::new, |gpu| {
            let (major, minor) = (gpu.capability / 10, gpu.capability % 10);
            format!("{} (compute capability {major}.{minor}, driver for CUDA {}) ", gpu.name, gpu.driver)
        });
        return Err(fail(&format!("{gpu}does not work with libtorch {TORCH_VERSION}: {}", TrainError::from(error))));
    }
    Ok(device)
}

/// Sets the number of threads for libtorch's operations on the calling thread. OpenMP keeps the number per thread, so
/// every entry into the trainer calls this; it does nothing where the number is set already.
pub(crate) fn use_threads(threads: usize) {
    thread_local!(static CURRENT: Cell<usize> = const { Cell::new(0) });
    let threads = threads.max(1);
    if CURRENT.get() != threads {
        tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
        CURRENT.set(threads);
    }
}

/// Tells glibc to keep freed memory instead of returning it to the kernel after every step: training frees and
/// takes the same large blocks over and over. For binaries that train on the CPU; call it once, early.
pub fn tune_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn mallopt(parameter: i32, value: i32) -> i32;
        }
        const M_TRIM_THRESHOLD: i32 = -1;
        const M_MMAP_THRESHOLD: i32 = -3;
        /// glibc refuses a larger value on 64-bit machines (half of its HEAP_MAX_SIZE).
        const MMAP_BYTES: i32 = 32 << 20;
        const TRIM_BYTES: i32 = 1 << 30;
        // SAFETY: mallopt only sets parameters of the allocator.
        unsafe {
            mallopt(M_MMAP_THRESHOLD, MMAP_BYTES);
            mallopt(M_TRIM_THRESHOLD, TRIM_BYTES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `torch` folder that says it is of `version`, without libraries.
    fn folder(version: Option<&str>) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        if let Some(version) = version {
            std::fs::write(folder.path().join("version.py"), format!("from typing import Optional\n__version__ = '{version}'\n")).unwrap();
        }
        folder
    }

    #[test]
    fn a_folder_without_a_fitting_cuda_part_is_refused_with_the_versions() {
        let refused = |version| load_cuda(folder(version).path()).unwrap_err().to_string();
        let old = refused(Some("2.4.1+cu121"));
        assert!(old.contains("2.4.1+cu121") && old.contains(TORCH_VERSION), "{old}");
        let cpu = refused(Some("2.11.0+cpu"));
        assert!(cpu.contains("built without CUDA") && cpu.contains("2.11.0+cpu"), "{cpu}");
        assert!(refused(Some("2.11.0+cu130")).contains("not a full installation"));
        assert!(refused(None).contains("unknown version"));
    }

    #[test]
    fn a_cuda_part_that_does_not_load_is_refused_with_the_versions() {
        let folder = folder(Some("2.11.0+cu130"));
        std::fs::create_dir(folder.path().join("lib")).unwrap();
        std::fs::write(folder.path().join("lib/libtorch_cuda.so"), b"no library").unwrap();
        let error = load_cuda(folder.path()).unwrap_err().to_string();
        assert!(error.contains("cannot load") && error.contains("2.11.0+cu130") && error.contains("QUASAR_TORCH_CUDA_DIR"), "{error}");
    }

    #[test]
    fn devices_that_are_not_there_are_refused() {
        for name in ["gpu", "cuda:x", "cuda:4096", ""] {
            assert!(matches!(parse_device(name), Err(TrainError::Device { .. })), "{name}");
        }
        assert_eq!(parse_device("cpu").unwrap(), Device::Cpu);
    }
}
