//! Pinned memory of the host.

use std::ffi::{c_uint, c_void};
use std::ops::Range;
use std::ptr;

use super::{Gpu, check, cuda};

/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`
const HOST_FLAGS: c_uint = 1 | 2;

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
