//! The little of the CUDA driver and of NVRTC that own kernels need, loaded at run time: a program built without CUDA
//! runs on machines without it.
//!
//! Kernels are launched on the null stream of the device's primary context, which is where libtorch works unless told
//! otherwise, so that both see each other's results in order.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_NOW};

pub(crate) use self::compiler::{compile, compiler_version};
pub(crate) use self::host::HostMemory;
pub(crate) use self::launch::{Argument, Function, launch, load};

use crate::torch::device::GpuInfo;

/// `cudaDevAttr`s.
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const MULTIPROCESSORS: c_int = 16;
const SHARED_OPT_IN: c_int = 97;
/// `CU_STREAM_NON_BLOCKING`: runs beside the null stream instead of in turn with it.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`
const NO_TIMING: c_uint = 2;
/// Longest name of a GPU.
const NAME_BYTES: usize = 256;

type Status = c_int;

/// Defines a table of functions, looked up by name.
macro_rules! functions {
    ($table:ident { $($field:ident = $symbol:literal ( $($argument:ty),* );)* }) => {
        struct $table { $($field: unsafe extern "C" fn($($argument),*) -> Status,)* _library: Library }
        impl $table {
            /// # Safety
            /// The library must define the functions with these signatures.
            unsafe fn new(library: Library) -> Result<Self, String> {
                // SAFETY: upheld by the caller.
                unsafe {
                    Ok(Self {
                        $($field: *library.get(concat!($symbol, "\0").as_bytes()).map_err(|error| error.to_string())?,)*
                        _library: library,
                    })
                }
            }
        }
    };
}

mod compiler;
mod host;
mod launch;

functions!(Cuda {
    init = "cuInit"(c_uint);
    driver_version = "cuDriverGetVersion"(*mut c_int);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device_get = "cuDeviceGet"(*mut c_int, c_int);
    device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
    attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    retain = "cuDevicePrimaryCtxRetain"(*mut *mut c_void, c_int);
    set_current = "cuCtxSetCurrent"(*mut c_void);
    memory = "cuMemGetInfo_v2"(*mut usize, *mut usize);
    host_alloc = "cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
    host_free = "cuMemFreeHost"(*mut c_void);
    module_load = "cuModuleLoadData"(*mut *mut c_void, *const c_void);
    function = "cuModuleGetFunction"(*mut *mut c_void, *mut c_void, *const c_char);
    set_attribute = "cuFuncSetAttribute"(*mut c_void, c_int, c_int);
    launch = "cuLaunchKernel"(*mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void, *mut *mut c_void, *mut *mut c_void);
    synchronize = "cuCtxSynchronize"();
    profiler_start = "cuProfilerStart"();
    profiler_stop = "cuProfilerStop"();
    stream_create = "cuStreamCreate"(*mut *mut c_void, c_uint);
    stream_wait = "cuStreamWaitEvent"(*mut c_void, *mut c_void, c_uint);
    event_create = "cuEventCreate"(*mut *mut c_void, c_uint);
    event_record = "cuEventRecord"(*mut c_void, *mut c_void);
    event_synchronize = "cuEventSynchronize"(*mut c_void);
    event_destroy = "cuEventDestroy_v2"(*mut c_void);
    error_name = "cuGetErrorName"(Status, *mut *const c_char);
});

static CUDA: OnceLock<Result<Cuda, String>> = OnceLock::new();
static TORCH: OnceLock<PathBuf> = OnceLock::new();

/// Remembers the `torch` folder whose CUDA part was loaded: NVRTC lies beside it.
pub(crate) fn remember_torch(folder: &Path) {
    let _ = TORCH.set(folder.to_owned());
}

fn cuda() -> Result<&'static Cuda, String> {
    let load = || {
        // SAFETY: the driver's library has no initialisers that could harm; the signatures are those of its documentation.
        unsafe {
            let library = Library::open(Some("libcuda.so.1"), RTLD_NOW).map_err(|error| error.to_string())?;
            Cuda::new(library)
        }
    };
    CUDA.get_or_init(load).as_ref().map_err(Clone::clone)
}

fn check(status: Status, what: &str) -> Result<(), String> {
    if status == 0 {
        return Ok(());
    }
    let mut name: *const c_char = ptr::null();
    if let Ok(cuda) = cuda() {
        // SAFETY: the driver writes a pointer to a string that lives for ever, or leaves null.
        unsafe { (cuda.error_name)(status, &raw mut name) };
    }
    // SAFETY: see above.
    let name = if name.is_null() { status.to_string() } else { unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned() };
    Err(format!("{what}: {name}"))
}

/// The GPUs that the driver shows.
pub(crate) fn gpus() -> Result<Vec<GpuInfo>, String> {
    let cuda = cuda()?;
    let (mut version, mut count) = (0, 0);
    // SAFETY: plain calls with valid places for the answers.
    unsafe {
        check((cuda.init)(0), "cuInit")?;
        check((cuda.driver_version)(&raw mut version), "cuDriverGetVersion")?;
        check((cuda.device_count)(&raw mut count), "cuDeviceGetCount")?;
    }
    let describe = |index: usize| {
        let gpu = Gpu::open(index)?;
        let (free, total) = gpu.memory()?;
        let driver = format!("{}.{}", version / 1000, version % 1000 / 10);
        Ok(GpuInfo { name: gpu.name()?, capability: gpu.capability, free_bytes: free as u64, total_bytes: total as u64, driver })
    };
    (0..usize::try_from(count).unwrap_or_default()).map(describe).collect()
}

/// One GPU: its primary context, which it shares with libtorch.
#[derive(Clone, Copy)]
pub(crate) struct Gpu {
    context: *mut c_void,
    device: c_int,
    /// For example 90 for an H100.
    pub capability: u32,
    pub multiprocessors: u32,
    /// Most shared memory that a block can have, bytes.
    pub shared_bytes: u32,
}

// SAFETY: a context may be made current on any thread, and is, before each use.
unsafe impl Send for Gpu {}
// SAFETY: as above; the handle itself never changes.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// GPU number `index`.
    pub fn open(index: usize) -> Result<Self, String> {
        let cuda = cuda()?;
        let (mut device, mut context) = (0, ptr::null_mut());
        let index = c_int::try_from(index).map_err(|error| error.to_string())?;
        let attribute = |device, attribute| {
            let mut value = 0;
            // SAFETY: plain call with a valid place for the answer.
            check(unsafe { (cuda.attribute)(&raw mut value, attribute, device) }, "cuDeviceGetAttribute")?;
            u32::try_from(value).map_err(|error| error.to_string())
        };
        // SAFETY: plain calls with valid places for the answers; the context is kept until the process ends.
        unsafe {
            check((cuda.init)(0), "cuInit")?;
            check((cuda.device_get)(&raw mut device, index), "cuDeviceGet")?;
            check((cuda.retain)(&raw mut context, device), "cuDevicePrimaryCtxRetain")?;
        }
        let capability = 10 * attribute(device, CAPABILITY_MAJOR)? + attribute(device, CAPABILITY_MINOR)?;
        let (multiprocessors, shared_bytes) = (attribute(device, MULTIPROCESSORS)?, attribute(device, SHARED_OPT_IN)?);
        Ok(Self { context, device, capability, multiprocessors, shared_bytes })
    }

    /// Its name, for people.
    pub fn name(&self) -> Result<String, String> {
        let mut name = [0u8; NAME_BYTES];
        // SAFETY: the buffer has the size that is named.
        check(unsafe { (cuda()?.device_name)(name.as_mut_ptr().cast(), NAME_BYTES as c_int, self.device) }, "cuDeviceGetName")?;
        Ok(CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default())
    }

    /// Makes the GPU current on this thread.
    pub fn activate(&self) -> Result<(), String> {
        // SAFETY: the context is retained.
        check(unsafe { (cuda()?.set_current)(self.context) }, "cuCtxSetCurrent")
    }

    /// Free and total bytes of the device's memory.
    pub fn memory(&self) -> Result<(usize, usize), String> {
        self.activate()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: plain call with valid places for the answers.
        check(unsafe { (cuda()?.memory)(&raw mut free, &raw mut total) }, "cuMemGetInfo")?;
        Ok((free, total))
    }

    /// Begins or ends what a profiler looks at; nothing happens without one.
    pub fn profile(&self, is_on: bool) -> Result<(), String> {
        self.synchronize()?;
        let cuda = cuda()?;
        // SAFETY: plain calls.
        check(unsafe { if is_on { (cuda.profiler_start)() } else { (cuda.profiler_stop)() } }, "cuProfilerStart or cuProfilerStop")
    }

    /// Waits for everything under way.
    pub fn synchronize(&self) -> Result<(), String> {
        self.activate()?;
        // SAFETY: plain call.
        check(unsafe { (cuda()?.synchronize)() }, "cuCtxSynchronize")
    }
}

/// A queue of work. Streams are kept until the process ends.
#[derive(Clone, Copy)]
pub(crate) struct Stream(*mut c_void);

// SAFETY: a stream may be used from any thread whose current context is its own.
unsafe impl Send for Stream {}
// SAFETY: as above; the handle itself never changes.
unsafe impl Sync for Stream {}

impl Stream {
    /// The stream of the computation, libtorch's and ours.
    pub const NULL: Self = Self(ptr::null_mut());

    /// One that runs beside the null stream.
    pub fn beside(gpu: &Gpu) -> Result<Self, String> {
        gpu.activate()?;
        let mut handle = ptr::null_mut();
        // SAFETY: plain call with a valid place for the answer.
        check(unsafe { (cuda()?.stream_create)(&raw mut handle, NON_BLOCKING) }, "cuStreamCreate")?;
        Ok(Self(handle))
    }
}

/// The moment when a stream has done all that was in it.
pub(crate) struct Event {
    handle: *mut c_void,
    gpu: Gpu,
}

// SAFETY: events may be waited for from any thread whose current context is theirs.
unsafe impl Send for Event {}
// SAFETY: as above; the handle itself never changes.
unsafe impl Sync for Event {}

impl Event {
    pub fn record(gpu: &Gpu, stream: Stream) -> Result<Self, String> {
        gpu.activate()?;
        let cuda = cuda()?;
        let mut handle = ptr::null_mut();
        // SAFETY: plain calls with valid handles.
        unsafe {
            check((cuda.event_create)(&raw mut handle, NO_TIMING), "cuEventCreate")?;
            let event = Self { handle, gpu: *gpu };
            check((cuda.event_record)(handle, stream.0), "cuEventRecord")?;
            Ok(event)
        }
    }

    /// Holds back what is put into `stream` from now on until the event.
    pub fn hold(&self, stream: Stream) -> Result<(), String> {
        self.gpu.activate()?;
        // SAFETY: plain call with valid handles.
        check(unsafe { (cuda()?.stream_wait)(stream.0, self.handle, 0) }, "cuStreamWaitEvent")
    }

    /// Waits for the event.
    pub fn wait(&self) -> Result<(), String> {
        self.gpu.activate()?;
        // SAFETY: plain call with a valid handle.
        check(unsafe { (cuda()?.event_synchronize)(self.handle) }, "cuEventSynchronize")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.gpu.activate().is_ok()
            && let Ok(cuda) = cuda()
        {
            // SAFETY: used by nobody any more; the driver keeps what streams still wait for.
            unsafe { (cuda.event_destroy)(self.handle) };
        }
    }
}
