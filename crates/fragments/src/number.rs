//! Conversion between f32 values and the little-endian element types of checkpoint files.

use half::f16;
use protocol::DType;
use rayon::prelude::*;

use crate::simd::vectorised;

/// Elements that one task converts; large enough to hide the scheduling, small enough to spread a fragment.
const TASK_ELEMENTS: usize = 1 << 16;

/// Index of the first infinite or not-a-number element.
pub fn first_non_finite(values: &[f32]) -> Option<usize> {
    // The search for "any" compiles to vector code, the search for "which" does not: look only where there is one.
    values
        .par_chunks(TASK_ELEMENTS)
        .enumerate()
        .find_first(|(_, chunk)| !chunk_is_finite(chunk))
        .map(|(index, chunk)| index * TASK_ELEMENTS + chunk.iter().position(|value| !value.is_finite()).unwrap_or_default())
}

/// Whether every element is a finite number.
pub fn all_finite(values: &[f32]) -> bool {
    first_non_finite(values).is_none()
}

fn chunk_is_finite(chunk: &[f32]) -> bool {
    chunk.iter().fold(true, |finite, value| finite & value.is_finite())
}

vectorised! {
    /// Whether every little-endian bf16 or f16 element of `bytes` is finite; `exponent` is the mask of the element type.
    fn halves_are_finite(bytes: &[u8], exponent: u16) -> bool {
        !bytes.chunks_exact(2).fold(false, |any, two| any | (u16::from_le_bytes([two[0], two[1]]) & exponent == exponent))
    }
}

vectorised! {
    fn singles_are_finite(bytes: &[u8]) -> bool {
        let exponent = 0x7f80_0000;
        let bits = |four: &[u8]| u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        !bytes.chunks_exact(4).fold(false, |any, four| any | (bits(four) & exponent == exponent))
    }
}

const BF16_EXPONENT: u16 = 0x7f80;
const F16_EXPONENT: u16 = 0x7c00;

/// Index of the first element of `bytes` that is infinite or not a number, on this thread. `bytes` holds whole elements.
pub fn first_non_finite_here(dtype: DType, bytes: &[u8]) -> Option<usize> {
    let half = |element: &[u8], exponent: u16| u16::from_le_bytes([element[0], element[1]]) & exponent == exponent;
    match dtype {
        DType::F32 if singles_are_finite(bytes) => None,
        DType::Bf16 if halves_are_finite(bytes, BF16_EXPONENT) => None,
        DType::F16 if halves_are_finite(bytes, F16_EXPONENT) => None,
        DType::F32 => bytes.chunks_exact(4).position(|four| half(&four[2..], BF16_EXPONENT)),
        DType::Bf16 => bytes.chunks_exact(2).position(|two| half(two, BF16_EXPONENT)),
        DType::F16 => bytes.chunks_exact(2).position(|two| half(two, F16_EXPONENT)),
    }
}

/// Index of the first element of `bytes` that is infinite or not a number. `bytes` holds whole elements.
pub(crate) fn first_non_finite_bytes(dtype: DType, bytes: &[u8]) -> Option<usize> {
    let width = dtype.bytes() as usize;
    let of_chunk = |(index, chunk)| first_non_finite_here(dtype, chunk).map(|element| index * TASK_ELEMENTS + element);
    bytes.par_chunks(width * TASK_ELEMENTS).enumerate().filter_map(of_chunk).find_first(|_| true)
}

vectorised! {
    /// Widens the little-endian bf16 elements of `bytes`.
    pub(crate) fn widen_bf16(bytes: &[u8], out: &mut [f32]) {
        for (value, two) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *value = f32::from_bits(u32::from(u16::from_le_bytes([two[0], two[1]])) << 16);
        }
    }
}

vectorised! {
    /// Rounds to bf16, to nearest with ties to even, little-endian. Not-a-number stays not-a-number.
    pub(crate) fn round_to_bf16(values: &[f32], out: &mut [u8]) {
        for (two, value) in out.chunks_exact_mut(2).zip(values) {
            two.copy_from_slice(&bf16_bits(*value).to_le_bytes());
        }
    }
}

vectorised! {
    /// Replaces each value by its nearest bf16.
    pub(crate) fn round_in_place(values: &mut [f32]) {
        for value in values {
            *value = f32::from_bits(u32::from(bf16_bits(*value)) << 16);
        }
    }
}

#[inline(always)]
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }) as u16
}

/// Widens the little-endian elements of `bytes` and appends them to `out`.
pub(crate) fn append_f32(dtype: DType, bytes: &[u8], out: &mut Vec<f32>) {
    let width = dtype.bytes() as usize;
    let start = out.len();
    out.resize(start + bytes.len() / width, 0.0);
    let tasks = out[start..].par_chunks_mut(TASK_ELEMENTS).zip(bytes.par_chunks(width * TASK_ELEMENTS));
    tasks.for_each(|(out, bytes)| widen(dtype, bytes, out));
}

/// Rounds `values` to nearest, ties to even, and appends the little-endian elements to `out`. A finite value that is
/// too large for the element type becomes infinite: callers check the result or the values.
pub(crate) fn append_rounded(dtype: DType, values: &[f32], out: &mut Vec<u8>) {
    let width = dtype.bytes() as usize;
    let start = out.len();
    out.resize(start + values.len() * width, 0);
    let tasks = out[start..].par_chunks_mut(width * TASK_ELEMENTS).zip(values.par_chunks(TASK_ELEMENTS));
    tasks.for_each(|(out, values)| round(dtype, values, out));
}

/// Elements of one type to as many of another, on this thread: widened, then rounded as [`append_rounded`] does.
pub(crate) fn convert(from: DType, bytes: &[u8], to: DType, out: &mut [u8]) {
    const AT_ONCE: usize = 1024;
    let mut values = [0.0; AT_ONCE];
    let (from_width, to_width) = (from.bytes() as usize, to.bytes() as usize);
    for (bytes, out) in bytes.chunks(from_width * AT_ONCE).zip(out.chunks_mut(to_width * AT_ONCE)) {
        let values = &mut values[..bytes.len() / from_width];
        widen(from, bytes, values);
        round(to, values, out);
    }
}

fn widen(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => {
            for (value, element) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *value = f32::from_le_bytes([element[0], element[1], element[2], element[3]]);
            }
        }
        DType::Bf16 => widen_bf16(bytes, out),
        DType::F16 => {
            for (value, element) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = f16::from_bits(u16::from_le_bytes([element[0], element[1]])).to_f32();
            }
        }
    }
}

/// Rounds `values` to nearest, ties to even, to as many little-endian elements of `out`, on this thread. A finite value that is too large
/// for the element type becomes infinite.
pub fn round(dtype: DType, values: &[f32], out: &mut [u8]) {
    match dtype {
        DType::F32 => {
            for (element, value) in out.chunks_exact_mut(4).zip(values) {
                element.copy_from_slice(&value.to_le_bytes());
            }
        }
        DType::Bf16 => round_to_bf16(values, out),
        DType::F16 => {
            for (element, value) in out.chunks_exact_mut(2).zip(values) {
                element.copy_from_slice(&f16::from_f32(*value).to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_bf16_and_f16_survives_widening_and_rounding() {
        for dtype in [DType::Bf16, DType::F16] {
            let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let (mut values, mut back) = (Vec::new(), Vec::new());
            append_f32(dtype, &bytes, &mut values);
            append_rounded(dtype, &values, &mut back);
            for (index, value) in values.iter().enumerate().filter(|(_, value)| value.is_finite()) {
                assert_eq!(bytes[2 * index..2 * index + 2], back[2 * index..2 * index + 2], "{dtype:?} {value}");
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_with_ties_to_even() {
        let mut bytes = Vec::new();
        let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff].map(f32::from_bits);
        append_rounded(DType::Bf16, &ties, &mut bytes);
        let rounded: Vec<u16> = bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]])).collect();
        assert_eq!(rounded, [0x3f80, 0x3f82, 0x3f81, 0x3f80]);
    }

    #[test]
    fn the_first_element_that_is_not_a_number_is_found_in_every_element_type() {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let mut values = vec![1.0; 3 * TASK_ELEMENTS];
            let mut bytes = Vec::new();
            append_rounded(dtype, &values, &mut bytes);
            assert_eq!(first_non_finite_bytes(dtype, &bytes), None);
            values[TASK_ELEMENTS + 5] = f32::NAN;
            values[TASK_ELEMENTS + 9] = f32::NEG_INFINITY;
            bytes.clear();
            append_rounded(dtype, &values, &mut bytes);
            assert_eq!(first_non_finite_bytes(dtype, &bytes), Some(TASK_ELEMENTS + 5));
            assert_eq!(first_non_finite(&values), Some(TASK_ELEMENTS + 5));
        }
    }
}
