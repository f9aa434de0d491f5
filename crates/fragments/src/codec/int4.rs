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

use super::Flaw;
use crate::simd::vectorised;

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

vectorised! {
    /// Σ v² over blocks that [`check`] accepted, of the exact products scale · (code − 8): integers within a block.
    pub(crate) fn squares(bytes: &[u8]) -> f64 {
        const LANES: usize = 32;
        let mut sum = 0.0;
        for block in bytes.chunks(BLOCK_BYTES) {
            let (scale, codes) = block.split_at(SCALE_BYTES);
            let scale = f64::from(f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]));
            // At most 128 for each of four bytes. The half byte that an odd number of elements leaves free is a zero.
            let square = |byte: u8| {
                let (low, high) = (i16::from(byte & 15) - 8, i16::from(byte >> 4) - 8);
                low * low + high * high
            };
            let mut lanes = [0i16; LANES];
            let (pieces, rest) = codes.as_chunks::<LANES>();
            for piece in pieces {
                for lane in 0..LANES {
                    lanes[lane] += square(piece[lane]);
                }
            }
            let total = lanes.iter().map(|lane| i32::from(*lane)).sum::<i32>() + rest.iter().map(|byte| i32::from(square(*byte))).sum::<i32>();
            sum += f64::from(total) * (scale * scale);
        }
        sum
    }
}

vectorised! {
    /// Decodes blocks that [`check`] accepted; of others it makes some values.
    pub(crate) fn decode(bytes: &[u8], out: &mut [f32]) {
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

vectorised! {
    /// Whether `elements` elements are encoded as this module says; `Err` names the block and its flaw.
    pub(crate) fn check(bytes: &[u8], elements: usize) -> Result<(), (usize, Flaw)> {
        for (block, bytes) in bytes.chunks(BLOCK_BYTES).enumerate() {
            let count = (elements - block * BLOCK_ELEMENTS).min(BLOCK_ELEMENTS);
            let (scale, codes) = bytes.split_at(SCALE_BYTES);
            let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
            if scale.to_bits() == 0 {
                let zeros = codes.iter().fold(true, |zeros, byte| zeros & (*byte == ZERO_BYTE));
                if !zeros {
                    return Err((block, Flaw::Code));
                }
                continue;
            }
            if !(scale.is_normal() && scale > 0.0 && (scale * CODE_MAX).is_finite()) {
                return Err((block, Flaw::Scale));
            }
            let padded = count.is_multiple_of(2) || codes[codes.len() - 1] >> 4 == ZERO_CODE;
            // Bit 0: a code 0 is there. Bit 1: a code 1 or 15 is there.
            let seen = codes.iter().fold(0u8, |seen, byte| {
                let (low, high) = (byte & 15, byte >> 4);
                let none = u8::from(low == 0) | u8::from(high == 0);
                let full = u8::from(low == 1) | u8::from(low == 15) | u8::from(high == 1) | u8::from(high == 15);
                seen | none | full << 1
            });
            if seen != 2 || !padded {
                return Err((block, Flaw::Code));
            }
        }
        Ok(())
    }
}
