//! Devices: parsing their names, loading CUDA at run time, threads, and the allocator.

use std::cell::Cell;
use std::path::Path;

use tch::{Device, Kind};

use crate::TrainError;

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

/// Loads `lib/libtorch_cuda.so` below `torch` (the `torch` folder of a full installation of the version that this program
/// is linked with), after which `cuda:N` devices work. Call it before anything else of this crate that uses libtorch. The
/// library stays loaded until the process ends.
pub fn load_cuda(torch: &Path) -> Result<(), TrainError> {
    let file = torch.join("lib").join("libtorch_cuda.so");
    let fail = |reason: String| TrainError::Device { device: "cuda".into(), reason };
    #[cfg(unix)]
    {
        use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
        // SAFETY: loading runs the library's initialisers, which register CUDA kernels with the linked libtorch.
        let library = unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_GLOBAL) };
        let library = library.map_err(|error| fail(format!("cannot load {}: {error}", file.display())))?;
        // Kernels registered from it must stay valid: never close it.
        std::mem::forget(library);
    }
    super::gpu::remember_torch(torch);
    if !tch::Cuda::is_available() {
        return Err(fail(format!("{} is loaded, but no CUDA device is usable", file.display())));
    }
    Ok(())
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
    Ok(Device::Cuda(index))
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
