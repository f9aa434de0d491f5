//! Four bits an element: symmetric linear quantisation in blocks of 256 with one f32 scale.
//!
//! A block is the scale s (little-endian f32), then the codes. An element is s · (code − 8) with codes 1 to 15, so that
//! negative and positive values have the same reach; code 0 does not occur. Codes of a block's first half stand in the low
//! halves of its bytes, those of the second half in the high halves; of an odd number of elements the first half is the
//! longer one, and the free half byte holds 8. A last block of n < 256 elements has 4 + ⌈n/2⌉ bytes.
//!
//! The scale is the largest magnitude of the block divided by 7, so a block that is not zero holds a code 1 or 15: with that,
//! one set of decoded values has one encoding. A block of zeros has scale 0 and codes 8. Blocks whose largest magnitude is
//! under [`FLUSH`] are written as zeros: their scale would be denormal.

use super::{Flaw, TileCodec};
use crate::simd::vectorised;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Level, level};

/// Elements of a block.
pub const BLOCK_ELEMENTS: usize = 256;
/// Bytes of a whole block.
pub const BLOCK_BYTES: usize = SCALE_BYTES + BLOCK_ELEMENTS / 2;

const SCALE_BYTES: usize = 4;
const CODE_MAX: f32 = 7.0;
const ZERO_CODE: u8 = 8;
const ZERO_BYTE: u8 = ZERO_CODE << 4 | ZERO_CODE;

/// Largest magnitudes under this are written as zeros.
pub const FLUSH: f32 = 1e-37;

/// Adding this to a number of small magnitude rounds it to the nearest integer, ties to even, and leaves that integer in the
/// low bits: the same on every processor, in vector registers or not.
const ROUND: f32 = 12_582_912.0;

pub(crate) struct Int4;

impl TileCodec for Int4 {
    fn bytes(&self, elements: usize) -> usize {
        encoded_bytes(elements)
    }

    fn encode(&self, values: &[f32], bytes: &mut [u8]) -> Result<(), usize> {
        encode(values, bytes).map_err(|block| {
            let start = block * BLOCK_ELEMENTS;
            let block = &values[start..(start + BLOCK_ELEMENTS).min(values.len())];
            let largest = || block.iter().position(|value| block.iter().all(|other| other.abs() <= value.abs()));
            start + block.iter().position(|value| !value.is_finite()).or_else(largest).unwrap_or_default()
        })
    }

    fn check(&self, bytes: &[u8], elements: usize) -> Result<(), (usize, Flaw)> {
        check(bytes, elements).map_err(|(block, flaw)| (block * BLOCK_ELEMENTS, flaw))
    }

    fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        decode(bytes, out);
    }
}

/// Bytes of `elements` elements that begin at a block.
pub(crate) const fn encoded_bytes(elements: usize) -> usize {
    let rest = elements % BLOCK_ELEMENTS;
    let last = if rest > 0 { SCALE_BYTES + rest.div_ceil(2) } else { 0 };
    elements / BLOCK_ELEMENTS * BLOCK_BYTES + last
}

vectorised! {
    /// Encodes whole blocks and a last part of one. `Err` names the block with a value that is not finite (or whose decoded
    /// values would not be).
    pub(crate) fn encode(values: &[f32], out: &mut [u8]) -> Result<(), usize> {
        for (block, (values, out)) in values.chunks(BLOCK_ELEMENTS).zip(out.chunks_mut(BLOCK_BYTES)).enumerate() {
            // As integers: vector code, and infinite and not-a-number are larger than every number.
            let largest = values.iter().fold(0, |largest: u32, value| largest.max(value.to_bits() & 0x7fff_ffff));
            if largest >= f32::INFINITY.to_bits() {
                return Err(block);
            }
            let largest = f32::from_bits(largest);
            let (scale_bytes, codes) = out.split_at_mut(SCALE_BYTES);
            if largest < FLUSH {
                scale_bytes.fill(0);
                codes.fill(ZERO_BYTE);
                continue;
            }
            let scale = largest / CODE_MAX;
            if !(scale * CODE_MAX).is_finite() {
                return Err(block);
            }
            let inverse = CODE_MAX / largest;
            scale_bytes.copy_from_slice(&scale.to_le_bytes());
            let code = |value: f32| ((value * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(8)) as u8;
            let (first, second) = values.split_at(values.len().div_ceil(2));
            for ((byte, low), high) in codes.iter_mut().zip(first).zip(second) {
                *byte = code(*low) | code(*high) << 4;
            }
            if first.len() > second.len() {
                codes[second.len()] = code(first[second.len()]) | ZERO_CODE << 4;
            }
        }
        Ok(())
    }
}

/// Σ v² over `elements` elements, of the exact products scale · (code − 8): integers within a block. `Err` names the first block that
/// is not encoded as this module says, and its flaw.
pub(crate) fn squares(bytes: &[u8], elements: usize) -> Result<f64, (usize, Flaw)> {
    #[cfg(target_arch = "x86_64")]
    if level() != Level::Baseline {
        // SAFETY: the processor has AVX2 on both levels.
        return unsafe { avx2::squares(bytes, elements) };
    }
    squares_with(bytes, elements, code_squares)
}

/// Whether `elements` elements are encoded as this module says; `Err` names the block and its flaw.
pub(crate) fn check(bytes: &[u8], elements: usize) -> Result<(), (usize, Flaw)> {
    squares(bytes, elements).map(|_| ())
}

#[inline(always)]
fn squares_with(bytes: &[u8], elements: usize, code_squares: impl Fn(&[u8]) -> CodeSquares) -> Result<f64, (usize, Flaw)> {
    let mut sum = 0.0;
    for (block, bytes) in bytes.chunks(BLOCK_BYTES).enumerate() {
        let (scale, codes) = bytes.split_at(SCALE_BYTES);
        let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
        // The half byte that an odd number of elements leaves free must be a zero, too, and adds nothing.
        let CodeSquares { total, full, none } = code_squares(codes);
        if scale.to_bits() == 0 {
            if total != 0 {
                return Err((block, Flaw::Code));
            }
            continue;
        }
        if !(scale.is_normal() && scale > 0.0 && (scale * CODE_MAX).is_finite()) {
            return Err((block, Flaw::Scale));
        }
        let count = (elements - block * BLOCK_ELEMENTS).min(BLOCK_ELEMENTS);
        let padded = count.is_multiple_of(2) || codes[codes.len() - 1] >> 4 == ZERO_CODE;
        if !full || none || !padded {
            return Err((block, Flaw::Code));
        }
        sum += f64::from(total) * (f64::from(scale) * f64::from(scale));
    }
    Ok(sum)
}

/// (code − 8)² over the codes of a block.
struct CodeSquares {
    total: u32,
    /// There is a code 1 or 15: a square of [`FULL_SQUARE`].
    full: bool,
    /// There is a code 0: a square that is larger.
    none: bool,
}

const FULL_SQUARE: u8 = 49;

fn code_squares(codes: &[u8]) -> CodeSquares {
    let square = |code: u8| (code as i8 - 8).pow(2) as u8;
    codes.iter().fold(CodeSquares { total: 0, full: false, none: false }, |CodeSquares { total, full, none }, byte| {
        let (low, high) = (square(byte & 15), square(byte >> 4));
        let (full, none) = (full | (low == FULL_SQUARE) | (high == FULL_SQUARE), none | (low.max(high) > FULL_SQUARE));
        CodeSquares { total: total + u32::from(low) + u32::from(high), full, none }
    })
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{CodeSquares, FULL_SQUARE, Flaw, code_squares, squares_with};

    #[target_feature(enable = "avx2")]
    pub(super) fn squares(bytes: &[u8], elements: usize) -> Result<f64, (usize, Flaw)> {
        squares_with(bytes, elements, |codes| block(codes))
    }

    /// [`super::code_squares`], 64 codes at a time: squares are looked up in a register.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn block(codes: &[u8]) -> CodeSquares {
        let table = _mm256_broadcastsi128_si256(_mm_setr_epi8(64, 49, 36, 25, 16, 9, 4, 1, 0, 1, 4, 9, 16, 25, 36, 49));
        let (low_bits, zero) = (_mm256_set1_epi8(15), _mm256_setzero_si256());
        let (mut totals, mut largest) = (zero, zero);
        let (pieces, rest) = codes.as_chunks::<32>();
        for piece in pieces {
            // SAFETY: a piece is exactly one register of integers, which may lie at any address.
            let codes = unsafe { piece.as_ptr().cast::<__m256i>().read_unaligned() };
            let low = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, low_bits));
            let high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low_bits));
            largest = _mm256_max_epu8(largest, _mm256_max_epu8(low, high));
            // At most 128 a byte; eight bytes at a time are added up to 64 bits.
            totals = _mm256_add_epi64(totals, _mm256_sad_epu8(_mm256_add_epi8(low, high), zero));
        }
        let of_rest = code_squares(rest);
        let limit = _mm256_set1_epi8(FULL_SQUARE as i8);
        let full = _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, limit)) != 0;
        let none = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(largest, limit), limit)) != -1;
        let two = _mm_add_epi64(_mm256_castsi256_si128(totals), _mm256_extracti128_si256::<1>(totals));
        // A block has at most 256 codes, so nothing is lost.
        let total = _mm_cvtsi128_si32(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two))).cast_unsigned();
        // Where something is larger, the largest of a place may hide a full one. It is refused for both.
        CodeSquares { total: total + of_rest.total, full: full | of_rest.full, none: none | of_rest.none }
    }
}

/// Decodes blocks that [`check`] accepted; of others it makes some values.
pub(crate) fn decode(bytes: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        let (values, rest_of_values) = out.as_chunks_mut::<BLOCK_ELEMENTS>();
        // A last block without one element has as many bytes as a whole one.
        let (blocks, rest) = bytes.split_at(values.len() * BLOCK_BYTES);
        for (block, values) in blocks.as_chunks::<BLOCK_BYTES>().0.iter().zip(values) {
            // SAFETY: the processor has what the level says.
            unsafe { crate::wide::of_int4::decode(block, values) };
        }
        return decode_any(rest, rest_of_values);
    }
    decode_any(bytes, out);
}

vectorised! {
    fn decode_any(bytes: &[u8], out: &mut [f32]) {
        for (bytes, out) in bytes.chunks(BLOCK_BYTES).zip(out.chunks_mut(BLOCK_ELEMENTS)) {
            let (scale, codes) = bytes.split_at(SCALE_BYTES);
            let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
            let (first, second) = out.split_at_mut(out.len().div_ceil(2));
            for (value, byte) in first.iter_mut().zip(codes) {
                *value = (f32::from(byte & 15) - 8.0) * scale;
            }
            for (value, byte) in second.iter_mut().zip(codes) {
                *value = (f32::from(byte >> 4) - 8.0) * scale;
            }
        }
    }
}
