//! Conversion between f32 values and the little-endian element types of checkpoint files, and sums whose result does
//! not depend on how the work is cut.

use half::{bf16, f16};
use protocol::DType;
use rayon::prelude::*;

/// Elements that one task converts; large enough to hide the scheduling, small enough to spread a fragment.
const TASK_ELEMENTS: usize = 1 << 16;

/// Independent partial sums. A fixed number, so that compilers can use vector instructions without changing the order.
const LANES: usize = 8;

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

/// Index of the first element of `bytes` that is infinite or not a number. `bytes` holds whole elements.
pub(crate) fn first_non_finite_bytes(dtype: DType, bytes: &[u8]) -> Option<usize> {
    let two = |exponent: u16| move |element: &[u8]| u16::from_le_bytes([element[0], element[1]]) & exponent == exponent;
    match dtype {
        DType::F32 => {
            first_bad_element(bytes, 4, |element| !f32::from_le_bytes([element[0], element[1], element[2], element[3]]).is_finite())
        }
        DType::Bf16 => first_bad_element(bytes, 2, two(0x7f80)),
        DType::F16 => first_bad_element(bytes, 2, two(0x7c00)),
    }
}

fn first_bad_element(bytes: &[u8], width: usize, bad: impl Fn(&[u8]) -> bool + Sync) -> Option<usize> {
    let any = |chunk: &[u8]| chunk.chunks_exact(width).fold(false, |any, element| any | bad(element));
    bytes
        .par_chunks(width * TASK_ELEMENTS)
        .enumerate()
        .find_first(|(_, chunk)| any(chunk))
        .map(|(index, chunk)| index * TASK_ELEMENTS + chunk.chunks_exact(width).position(&bad).unwrap_or_default())
}

/// Widens the little-endian elements of `bytes` and appends them to `out`.
pub(crate) fn append_f32(dtype: DType, bytes: &[u8], out: &mut Vec<f32>) {
    let width = dtype.bytes() as usize;
    let start = out.len();
    out.resize(start + bytes.len() / width, 0.0);
    out[start..].par_chunks_mut(TASK_ELEMENTS).zip(bytes.par_chunks(width * TASK_ELEMENTS)).for_each(|(out, bytes)| {
        let two = |element: &[u8]| u16::from_le_bytes([element[0], element[1]]);
        match dtype {
            DType::F32 => {
                for (value, element) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([element[0], element[1], element[2], element[3]]);
                }
            }
            DType::Bf16 => {
                for (value, element) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = f32::from_bits(u32::from(two(element)) << 16);
                }
            }
            DType::F16 => {
                for (value, element) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = f16::from_bits(two(element)).to_f32();
                }
            }
        }
    });
}

/// Rounds `values` to nearest, ties to even, and appends the little-endian elements to `out`. A finite value that is
/// too large for the element type becomes infinite: callers check the result or the values.
pub(crate) fn append_rounded(dtype: DType, values: &[f32], out: &mut Vec<u8>) {
    let width = dtype.bytes() as usize;
    let start = out.len();
    out.resize(start + values.len() * width, 0);
    out[start..].par_chunks_mut(width * TASK_ELEMENTS).zip(values.par_chunks(TASK_ELEMENTS)).for_each(|(out, values)| match dtype {
        DType::F32 => {
            for (element, value) in out.chunks_exact_mut(4).zip(values) {
                element.copy_from_slice(&value.to_le_bytes());
            }
        }
        DType::Bf16 => {
            for (element, value) in out.chunks_exact_mut(2).zip(values) {
                element.copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
            }
        }
        DType::F16 => {
            for (element, value) in out.chunks_exact_mut(2).zip(values) {
                element.copy_from_slice(&f16::from_f32(*value).to_le_bytes());
            }
        }
    });
}

/// Sum of squares in f64: eight interleaved partial sums, added in order. Not finite if an element is not.
pub(crate) fn sum_of_squares<T: Copy + Into<f64>>(values: &[T]) -> f64 {
    dot(values, values)
}

/// Dot product in f64, in the order of [`sum_of_squares`].
pub(crate) fn dot<L: Copy + Into<f64>, R: Copy + Into<f64>>(left: &[L], right: &[R]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (left_blocks, right_blocks) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
    let rest = left_blocks.remainder().iter().zip(right_blocks.remainder());
    for (left, right) in left_blocks.zip(right_blocks) {
        for lane in 0..LANES {
            lanes[lane] += left[lane].into() * right[lane].into();
        }
    }
    let tail: f64 = rest.map(|(left, right)| (*left).into() * (*right).into()).sum();
    lanes.iter().sum::<f64>() + tail
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
