//! Flat buffers on the GPU or in the host's memory, and the ways of their bytes to the host.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::host::Held;
use crate::torch::gpu::driver::{Argument, HostMemory, Stream};
use crate::torch::gpu::kernels::Kernels;
use crate::torch::ops::Result;

/// Elements that a block of the copying kernels takes at a time.
const COPY_ELEMENTS: i64 = 1024;

/// A flat buffer: on the GPU, or in the host's memory, where kernels reach it over the bus.
pub(super) enum Buffer {
    Device(Tensor),
    Host { memory: HostMemory, element_bytes: i64, elements: i64 },
}

impl Buffer {
    pub fn zeros(kernels: &Kernels, elements: i64, kind: Kind, on_host: bool) -> Result<Self> {
        if !on_host {
            return Ok(Self::Device(Tensor::f_zeros([elements], (kind, kernels.device))?));
        }
        let element_bytes = kind.elt_size_in_bytes() as i64;
        let memory = HostMemory::new(&kernels.gpu, (elements * element_bytes) as usize).map_err(tch::TchError::Torch)?;
        Ok(Self::Host { memory, element_bytes, elements })
    }

    pub fn elements(&self) -> i64 {
        match self {
            Self::Device(tensor) => tensor.numel() as i64,
            Self::Host { elements, .. } => *elements,
        }
    }

    /// The bytes of pieces, one after the other.
    pub fn read(&self, kernels: &Kernels, pieces: &[Range<i64>]) -> Result<Vec<u8>> {
        match self {
            Self::Device(tensor) => gather(kernels, tensor, pieces),
            Self::Host { memory, element_bytes, .. } => {
                kernels.gpu.synchronize().map_err(tch::TchError::Torch)?;
                let part = |piece: &Range<i64>| memory.slice((piece.start * element_bytes) as usize..(piece.end * element_bytes) as usize);
                Ok(pieces.iter().flat_map(part).copied().collect())
            }
        }
    }

    /// Overwrites bytes from element `start` on.
    pub fn write(&mut self, kernels: &Kernels, start: i64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Device(tensor) => tensor.f_narrow(0, start, bytes.len() as i64)?.f_copy_(&Tensor::f_from_slice(bytes)?),
            Self::Host { memory, element_bytes, .. } => {
                kernels.gpu.synchronize().map_err(tch::TchError::Torch)?;
                let start = (start * *element_bytes) as usize;
                memory.slice_mut(start..start + bytes.len()).copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// The element `offset` as a kernel's argument.
    pub fn at(&self, offset: i64) -> Argument {
        match self {
            Self::Device(tensor) => Argument::at(tensor, offset),
            Self::Host { memory, element_bytes, .. } => Argument::address(memory.address(offset * element_bytes)),
        }
    }
}

/// Bytes of pieces of a buffer, one after the other: one wait for all of them.
pub(super) fn gather(kernels: &Kernels, from: &Tensor, pieces: &[Range<i64>]) -> Result<Vec<u8>> {
    let width = from.kind().elt_size_in_bytes() as i64;
    let count = pieces.iter().map(|piece| (piece.end - piece.start) * width).sum::<i64>() as usize;
    let pinned = kernels.pool.take(&kernels.gpu, count.div_ceil(4)).map_err(tch::TchError::Torch)?;
    let mut to = pinned.address(0);
    for piece in pieces {
        let bytes = (piece.end - piece.start) * width;
        let arguments = [Argument::at(from, piece.start), Argument::address(to), bytes.into()];
        kernels.launch("copy_bytes", copy_blocks(bytes), 256u32, &arguments)?;
        to += bytes;
    }
    pinned.used_by(&kernels.gpu, Stream::NULL).map_err(tch::TchError::Torch)?;
    let values = pinned.values().map_err(|error| tch::TchError::Torch(error.to_string()))?;
    Ok(bytemuck::cast_slice::<f32, u8>(values)[..count].to_vec())
}

/// Blocks of a copying kernel.
pub(super) fn copy_blocks(elements: i64) -> i64 {
    (elements + COPY_ELEMENTS - 1) / COPY_ELEMENTS
}

/// The next multiple of `to`.
pub(super) fn aligned(at: i64, to: i64) -> i64 {
    (at + to - 1) / to * to
}

/// Copies a flat f32 tensor to the host.
pub(crate) fn to_slice(x: &Tensor, values: &mut [f32]) -> Result<()> {
    let count = values.len();
    x.f_to_device(tch::Device::Cpu)?.f_contiguous()?.f_copy_data(values, count)
}
