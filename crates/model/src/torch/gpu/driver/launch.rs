//! Kernels: loaded from machine code, given arguments, put in a stream.

use std::ffi::{CString, c_int, c_uint, c_void};
use std::ptr;

use super::{Gpu, Stream, check, cuda};

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`
const MAX_DYNAMIC_SHARED: c_int = 8;
/// Dynamic shared memory that a kernel gets without asking.
const SHARED_UNASKED: usize = 48 << 10;

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
plain!(i32, i64, u32, f32, f64, crate::torch::gpu::kernels::StepSettings);

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
