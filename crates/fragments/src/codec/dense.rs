//! Every element on its own, little-endian: bf16, rounded to nearest, ties to even; and f32, for values that are already in memory.

use protocol::DType;

use super::{Flaw, TileCodec};
use crate::number::{first_non_finite_here, round_to_bf16, widen_bf16};

fn check(dtype: DType, bytes: &[u8]) -> Result<(), (usize, Flaw)> {
    first_non_finite_here(dtype, bytes).map_or(Ok(()), |element| Err((element, Flaw::NotFinite)))
}

pub(crate) struct F32;

impl TileCodec for F32 {
    fn bytes(&self, elements: usize) -> usize {
        4 * elements
    }

    fn encode(&self, values: &[f32], bytes: &mut [u8]) -> Result<(), usize> {
        bytes.copy_from_slice(bytemuck::cast_slice(values));
        Ok(())
    }

    fn check(&self, bytes: &[u8], _: usize) -> Result<(), (usize, Flaw)> {
        check(DType::F32, bytes)
    }

    fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        for (value, element) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*element);
        }
    }
}

pub(crate) struct Bf16;

impl TileCodec for Bf16 {
    fn bytes(&self, elements: usize) -> usize {
        2 * elements
    }

    fn encode(&self, values: &[f32], bytes: &mut [u8]) -> Result<(), usize> {
        round_to_bf16(values, bytes);
        // Rounding can only lose finiteness, so looking at the result is enough.
        first_non_finite_here(DType::Bf16, bytes).map_or(Ok(()), Err)
    }

    fn check(&self, bytes: &[u8], _: usize) -> Result<(), (usize, Flaw)> {
        check(DType::Bf16, bytes)
    }

    fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        widen_bf16(bytes, out);
    }
}
