//! The little of the CUDA driver and of NVRTC that own kernels need, loaded at run time: a program built without CUDA
//! runs on machines without it.
//!
//! Kernels are launched on the null stream of the device's primary context, which is where libtorch works unless told
//! otherwise, so that both see each other's results in order.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::torch::device::GpuInfo;

/// Names under which NVRTC is installed, newest first, beside the CUDA part of libtorch or in the loader's path.
const NVRTC_NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
/// Folders of NVIDIA's wheels that hold it, relative to the folder that holds `torch`.
const NVRTC_FOLDERS: [&str; 3] = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "torch/lib"];

/// `cudaDevAttr`s.
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const MULTIPROCESSORS: c_int = 16;
const SHARED_OPT_IN: c_int = 97;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`
const MAX_DYNAMIC_SHARED: c_int = 8;
/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`
const HOST_FLAGS: c_uint = 1 | 2;
/// `CU_STREAM_NON_BLOCKING`: runs beside the null stream instead of in turn with it.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`
const NO_TIMING: c_uint = 2;
/// Longest name of a GPU.
const NAME_BYTES: usize = 256;
/// Dynamic shared memory that a kernel gets without asking.
const SHARED_UNASKED: usize = 48 << 10;

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

functions!(Nvrtc {
    version = "nvrtcVersion"(*mut c_int, *mut c_int);
    create = "nvrtcCreateProgram"(*mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char);
    destroy = "nvrtcDestroyProgram"(*mut *mut c_void);
    compile = "nvrtcCompileProgram"(*mut c_void, c_int, *const *const c_char);
    log_size = "nvrtcGetProgramLogSize"(*mut c_void, *mut usize);
    log = "nvrtcGetProgramLog"(*mut c_void, *mut c_char);
    code_size = "nvrtcGetCUBINSize"(*mut c_void, *mut usize);
    code = "nvrtcGetCUBIN"(*mut c_void, *mut c_char);
});

static CUDA: OnceLock<Result<Cuda, String>> = OnceLock::new();
static NVRTC: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
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

fn nvrtc() -> Result<&'static Nvrtc, String> {
    let load = || {
        let site = TORCH.get().and_then(|torch| torch.parent()).map(Path::to_owned);
        let folders = site.iter().flat_map(|site| NVRTC_FOLDERS.iter().map(move |folder| site.join(folder)));
        let installed = folders.flat_map(|folder| NVRTC_NAMES.iter().map(move |name| folder.join(name))).filter(|path| path.exists());
        let mut reason = String::new();
        for path in installed.chain(NVRTC_NAMES.iter().map(PathBuf::from)) {
            // SAFETY: as for the driver. Its helper library is found beside it.
            match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
                // SAFETY: the signatures are those of NVRTC's documentation.
                Ok(library) => return unsafe { Nvrtc::new(library) },
                Err(error) => reason = error.to_string(),
            }
        }
        Err(reason)
    };
    NVRTC.get_or_init(load).as_ref().map_err(Clone::clone)
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

/// Pinned memory of the host that kernels read and write over the bus, all zero at first. Its address is the same on both sides.
pub(crate) struct HostMemory {
    pointer: *mut c_void,
    bytes: usize,
    context: Gpu,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for HostMemory {}
// SAFETY: shared, it can only be read; kernels that write it are known to the owner, who waits for them first.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self, String> {
        gpu.activate()?;
        let mut pointer = ptr::null_mut();
        // SAFETY: plain call with a valid place for the answer.
        let status = unsafe { (cuda()?.host_alloc)(&raw mut pointer, bytes.max(1), HOST_FLAGS) };
        check(status, &format!("out of memory: pinned memory: {bytes} bytes"))?;
        let memory = Self { pointer, bytes, context: *gpu };
        // SAFETY: just allocated, used by nobody else; the parts do not overlap.
        let all = unsafe { std::slice::from_raw_parts_mut(pointer.cast::<std::mem::MaybeUninit<u8>>(), bytes) };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for part in all.chunks_mut(bytes.div_ceil(threads).max(1)) {
                scope.spawn(move || part.fill(std::mem::MaybeUninit::new(0)));
            }
        });
        Ok(memory)
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Some of its bytes. No kernel may be writing them.
    pub fn slice(&self, range: Range<usize>) -> &[u8] {
        // SAFETY: allocated and initialised, of that length.
        let all = unsafe { std::slice::from_raw_parts(self.pointer.cast::<u8>(), self.bytes) };
        &all[range]
    }

    /// The same for writing. No kernel may be using them.
    pub fn slice_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        let all = unsafe { std::slice::from_raw_parts_mut(self.pointer.cast::<u8>(), self.bytes) };
        &mut all[range]
    }

    /// The first `count` f32 values; a page begins with them.
    pub fn floats(&self, count: usize) -> &[f32] {
        bytemuck::cast_slice(self.slice(0..4 * count))
    }

    pub fn floats_mut(&mut self, count: usize) -> &mut [f32] {
        bytemuck::cast_slice_mut(self.slice_mut(0..4 * count))
    }

    /// The address `bytes` behind the beginning.
    pub fn address(&self, bytes: i64) -> i64 {
        self.pointer as i64 + bytes
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // Kernels may still be at work on it.
        if self.context.synchronize().is_ok()
            && let Ok(cuda) = cuda()
        {
            // SAFETY: allocated by the same driver, used by nobody any more.
            unsafe { (cuda.host_free)(self.pointer) };
        }
    }
}

/// NVRTC's version.
pub(crate) fn compiler_version() -> Result<(i32, i32), String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: plain call with valid places for the answers.
    let status = unsafe { (nvrtc()?.version)(&raw mut major, &raw mut minor) };
    if status == 0 { Ok((major, minor)) } else { Err(format!("nvrtcVersion: {status}")) }
}

/// Compiles CUDA C++ to machine code for `capability`.
pub(crate) fn compile(name: &str, source: &str, capability: u32, options: &[String]) -> Result<Vec<u8>, String> {
    let nvrtc = nvrtc()?;
    let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
    let (source, file) = (text(source)?, text(name)?);
    let mut strings = vec![text(&format!("--gpu-architecture=sm_{capability}"))?];
    for option in options {
        strings.push(text(option)?);
    }
    let pointers: Vec<*const c_char> = strings.iter().map(|string| string.as_ptr()).collect();
    let mut program = ptr::null_mut();
    // SAFETY: all pointers are valid for the calls; buffers have the sizes that NVRTC asked for.
    unsafe {
        let status = (nvrtc.create)(&raw mut program, source.as_ptr(), file.as_ptr(), 0, ptr::null(), ptr::null());
        if status != 0 {
            return Err(format!("nvrtcCreateProgram: {status}"));
        }
        let count = c_int::try_from(pointers.len()).unwrap_or(c_int::MAX);
        let status = (nvrtc.compile)(program, count, pointers.as_ptr());
        let result = if status == 0 {
            let mut size = 0;
            let mut code = Vec::new();
            let mut status = (nvrtc.code_size)(program, &raw mut size);
            if status == 0 {
                code = vec![0u8; size];
                status = (nvrtc.code)(program, code.as_mut_ptr().cast());
            }
            if status == 0 { Ok(code) } else { Err(format!("nvrtcGetCUBIN: {status}")) }
        } else {
            let mut size = 0;
            (nvrtc.log_size)(program, &raw mut size);
            let mut log = vec![0u8; size];
            (nvrtc.log)(program, log.as_mut_ptr().cast());
            Err(format!("{name}: {}", String::from_utf8_lossy(&log).trim_end_matches('\0')))
        };
        (nvrtc.destroy)(&raw mut program);
        result
    }
}

/// A kernel that is ready to be launched.
#[derive(Clone, Copy)]
pub(crate) struct Function {
    handle: *mut c_void,
    /// Dynamic shared memory of a block, bytes.
    shared: c_uint,
}

// SAFETY: function handles may be used from any thread whose current context is theirs.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// Loads machine code and looks up its kernels, each with the dynamic shared memory that it needs.
pub(crate) fn load(gpu: &Gpu, code: &[u8], kernels: &[(&'static str, usize)]) -> Result<Vec<Function>, String> {
    let cuda = cuda()?;
    gpu.activate()?;
    let mut module = ptr::null_mut();
    // SAFETY: the code is a whole cubin; modules are kept until the process ends.
    check(unsafe { (cuda.module_load)(&raw mut module, code.as_ptr().cast()) }, "cuModuleLoadData")?;
    let find = |(name, shared): &(&'static str, usize)| {
        let symbol = CString::new(*name).map_err(|error| error.to_string())?;
        let mut handle = ptr::null_mut();
        // SAFETY: module and symbol are valid.
        check(unsafe { (cuda.function)(&raw mut handle, module, symbol.as_ptr()) }, name)?;
        if *shared > SHARED_UNASKED {
            let bytes = c_int::try_from(*shared).unwrap_or(c_int::MAX);
            // SAFETY: the handle was just returned.
            check(unsafe { (cuda.set_attribute)(handle, MAX_DYNAMIC_SHARED, bytes) }, name)?;
        }
        Ok(Function { handle, shared: *shared as c_uint })
    };
    kernels.iter().map(find).collect()
}

/// One argument of a kernel, by value.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(crate) struct Argument([u8; 32]);

impl Argument {
    /// The bytes of a plain value.
    fn of<T: Copy>(value: T) -> Self {
        const { assert!(size_of::<T>() <= 32) };
        let mut bytes = [0; 32];
        // SAFETY: the value fits, and is copied as bytes.
        unsafe { ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), bytes.as_mut_ptr(), size_of::<T>()) };
        Self(bytes)
    }

    /// No tensor.
    pub const NULL: Self = Self([0; 32]);

    /// An address.
    pub fn address(address: i64) -> Self {
        Self::of(address)
    }

    /// The element `offset` of a tensor.
    pub fn at(tensor: &tch::Tensor, offset: i64) -> Self {
        let bytes = offset * tensor.kind().elt_size_in_bytes() as i64;
        Self::of(tensor.data_ptr() as i64 + bytes)
    }
}

impl From<&tch::Tensor> for Argument {
    fn from(tensor: &tch::Tensor) -> Self {
        Self::of(tensor.data_ptr())
    }
}

/// Values that kernels take as they are.
macro_rules! plain {
    ($($kind:ty),*) => { $(impl From<$kind> for Argument { fn from(value: $kind) -> Self { Self::of(value) } })* };
}
plain!(i32, i64, u32, f32, f64, super::kernels::StepSettings);

/// Puts a launch in the stream. `blocks` and `threads` in up to two dimensions.
///
/// # Safety
/// The arguments must be those of the kernel, in number, order and type, and name memory of this GPU that is as large as the kernel
/// takes it to be.
pub(crate) unsafe fn launch(
    gpu: &Gpu,
    stream: Stream,
    function: Function,
    blocks: (u32, u32),
    threads: (u32, u32),
    arguments: &[Argument],
) -> Result<(), String> {
    if blocks.0 == 0 || blocks.1 == 0 {
        return Ok(());
    }
    let cuda = cuda()?;
    gpu.activate()?;
    let mut pointers: Vec<*mut c_void> = arguments.iter().map(|argument| ptr::from_ref(argument).cast_mut().cast()).collect();
    // SAFETY: the pointers outlive the call, which copies the arguments; the rest is upheld by the caller.
    let status = unsafe {
        (cuda.launch)(
            function.handle,
            blocks.0,
            blocks.1,
            1,
            threads.0,
            threads.1,
            1,
            function.shared,
            stream.0,
            pointers.as_mut_ptr(),
            ptr::null_mut(),
        )
    };
    check(status, "cuLaunchKernel")
}
