//! The largest elements only: 64 of each 4096, with a 12-bit index and a 2-bit value each (SparseLoCo, arXiv 2508.15706).
//! Lossy without error feedback ([`crate::feedback`]).
//!
//! A *group* is up to 64 chunks of one unit: two levels as little-endian bf16, low ≤ high, then the chunks. A *chunk* is up
//! to 4096 elements, of which k = ⌈n/64⌉ have entries: first k indices of 12 bits, then k codes of 2 bits, both packed from
//! the low bit of the first byte on and padded with zeros to whole bytes (k = 64: 96 + 16 bytes). Code bit 0 is the sign,
//! bit 1 chooses the high level. Indices ascend strictly. A chunk with fewer than k elements that are not zero is filled up
//! with entries of index 0, code 0, which cannot follow another entry; a chunk of zeros is all ones, which no list of
//! ascending indices is. A group of zeros has levels 0 and only such chunks.
//!
//! Levels are the two centres of the magnitudes that a group sends, one pair for 262,144 elements: 14 bits an entry, and less
//! than a thousandth more for the levels.

use half::bf16;

use super::{Flaw, TileCodec};

/// Elements of a chunk.
pub const CHUNK_ELEMENTS: usize = 4096;
/// Elements of which one is sent.
pub const ELEMENTS_PER_ENTRY: usize = 64;
/// Elements of a group.
pub const GROUP_ELEMENTS: usize = 64 * CHUNK_ELEMENTS;

const LEVEL_BYTES: usize = 4;
const INDEX_LAST: usize = CHUNK_ELEMENTS - 1;
const EMPTY_BYTE: u8 = 0xff;

/// Magnitudes under this count as zero: their levels would be denormal.
pub const FLUSH: f32 = 1e-37;

/// Rounds of moving the border between low and high to the middle of the two levels.
const LEVEL_ROUNDS: usize = 4;

const fn entries(elements: usize) -> usize {
    elements.div_ceil(ELEMENTS_PER_ENTRY)
}

const fn chunk_bytes(elements: usize) -> usize {
    let entries = entries(elements);
    (12 * entries).div_ceil(8) + (2 * entries).div_ceil(8)
}

const FULL_CHUNK_BYTES: usize = chunk_bytes(CHUNK_ELEMENTS);
const FULL_GROUP_BYTES: usize = LEVEL_BYTES + GROUP_ELEMENTS / CHUNK_ELEMENTS * FULL_CHUNK_BYTES;

pub(crate) struct TopK;

impl TileCodec for TopK {
    fn tile_elements(&self) -> usize {
        GROUP_ELEMENTS
    }

    fn block_elements(&self) -> usize {
        CHUNK_ELEMENTS
    }

    fn bytes(&self, elements: usize) -> usize {
        encoded_bytes(elements)
    }

    fn encode(&self, values: &[f32], bytes: &mut [u8]) -> Result<(), usize> {
        encode(values, bytes)
    }

    fn check(&self, bytes: &[u8], elements: usize) -> Result<(), (usize, Flaw)> {
        check(bytes, elements)
    }

    fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        decode(bytes, out);
    }
}

/// Bytes of `elements` elements that begin at a group.
pub(crate) const fn encoded_bytes(elements: usize) -> usize {
    let rest = elements % GROUP_ELEMENTS;
    let last = if rest > 0 { LEVEL_BYTES + rest / CHUNK_ELEMENTS * FULL_CHUNK_BYTES + chunk_bytes(rest % CHUNK_ELEMENTS) } else { 0 };
    elements / GROUP_ELEMENTS * FULL_GROUP_BYTES + last
}

/// Encodes up to one group. `Err` is the first element that is not finite, or that the levels cannot hold.
pub(crate) fn encode(values: &[f32], out: &mut [u8]) -> Result<(), usize> {
    if let Some(element) = values.iter().position(|value| !value.is_finite()) {
        return Err(element);
    }
    let chosen: Vec<Vec<u16>> = values.chunks(CHUNK_ELEMENTS).map(largest).collect();
    let magnitudes = || {
        chosen
            .iter()
            .zip(values.chunks(CHUNK_ELEMENTS))
            .flat_map(|(chosen, values)| chosen.iter().map(|index| values[usize::from(*index)].abs()))
    };
    let (levels, border) = levels(magnitudes);
    if !levels.iter().all(|level| level.is_finite()) {
        let largest = magnitudes().fold(0.0, f32::max);
        return Err(values.iter().position(|value| value.abs() == largest).unwrap_or_default());
    }
    let (level_bytes, mut chunks) = out.split_at_mut(LEVEL_BYTES);
    for (bytes, level) in level_bytes.chunks_exact_mut(2).zip(levels) {
        bytes.copy_from_slice(&level.to_le_bytes());
    }
    for (chosen, values) in chosen.iter().zip(values.chunks(CHUNK_ELEMENTS)) {
        let (chunk, rest) = chunks.split_at_mut(chunk_bytes(values.len()));
        chunks = rest;
        if chosen.is_empty() {
            chunk.fill(EMPTY_BYTE);
            continue;
        }
        chunk.fill(0);
        let (indices, codes) = chunk.split_at_mut((12 * entries(values.len())).div_ceil(8));
        for (entry, index) in chosen.iter().enumerate() {
            let value = values[usize::from(*index)];
            let code = u8::from(value.is_sign_negative()) | u8::from(value.abs() > border) << 1;
            let [low, high] = (index << (4 * (entry % 2) as u16)).to_le_bytes();
            indices[entry * 3 / 2] |= low;
            indices[entry * 3 / 2 + 1] |= high;
            codes[entry / 4] |= code << (2 * (entry % 4));
        }
    }
    Ok(())
}

/// The indices of the largest magnitudes that are not zero, ascending; of equal magnitudes the earlier ones.
fn largest(values: &[f32]) -> Vec<u16> {
    let magnitude = |index: u16| values[usize::from(index)].to_bits() & 0x7fff_ffff;
    let flush = FLUSH.to_bits();
    let mut candidates: Vec<u16> = (0..values.len() as u16).filter(|index| magnitude(*index) >= flush).collect();
    let wanted = entries(values.len());
    if candidates.len() > wanted {
        candidates.select_nth_unstable_by_key(wanted, |index| (u32::MAX - magnitude(*index), *index));
        candidates.truncate(wanted);
        candidates.sort_unstable();
    }
    candidates
}

/// The two levels for these magnitudes, and the border above which the high one is meant.
fn levels<I: Iterator<Item = f32>>(magnitudes: impl Fn() -> I) -> ([bf16; 2], f32) {
    let mean = |chosen: &dyn Fn(f32) -> bool| {
        let (sum, count) =
            magnitudes().filter(|value| chosen(*value)).fold((0.0, 0u32), |(sum, count), value| (sum + f64::from(value), count + 1));
        (count > 0).then(|| sum / f64::from(count))
    };
    let Some(mut border) = mean(&|_| true) else { return ([bf16::ZERO; 2], 0.0) };
    let (mut low, mut high) = (border, border);
    for _ in 0..LEVEL_ROUNDS {
        low = mean(&|value| f64::from(value) <= border).unwrap_or(border);
        high = mean(&|value| f64::from(value) > border).unwrap_or(low);
        border = f64::midpoint(low, high);
    }
    ([bf16::from_f64(low), bf16::from_f64(high)], border as f32)
}

/// The values of the four codes.
fn code_values(level_bytes: &[u8]) -> [f32; 4] {
    let level = |at: usize| bf16::from_le_bytes([level_bytes[at], level_bytes[at + 1]]).to_f32();
    let (low, high) = (level(0), level(2));
    [low, -low, high, -high]
}

fn index(indices: &[u8], entry: usize) -> usize {
    let at = entry * 3 / 2;
    let two = u16::from_le_bytes([indices[at], indices[at + 1]]);
    usize::from(if entry.is_multiple_of(2) { two & 0xfff } else { two >> 4 })
}

/// Whether a chunk stands for zeros: its first two indices (or its only one) are all ones.
fn is_empty(chunk: &[u8], entries: usize) -> bool {
    index(chunk, 0) == INDEX_LAST && (entries == 1 || index(chunk, 1) == INDEX_LAST)
}

/// A tile of this encoding: one group of one unit, cut into chunks.
#[derive(Clone, Copy)]
pub(crate) struct Group<'a> {
    values: [f32; 4],
    chunks: &'a [u8],
    elements: usize,
}

impl<'a> Group<'a> {
    pub(crate) fn new(bytes: &'a [u8], elements: usize) -> Self {
        let (levels, chunks) = bytes.split_at(LEVEL_BYTES);
        Self { values: code_values(levels), chunks, elements }
    }

    /// Calls `entry` with the index in the chunk (under [`CHUNK_ELEMENTS`]) and the value of each entry of chunk `number`.
    #[inline]
    pub(crate) fn entries(&self, number: usize, mut entry: impl FnMut(usize, f32)) {
        let start = number * CHUNK_ELEMENTS;
        let count = entries((self.elements - start).min(CHUNK_ELEMENTS));
        let chunk = &self.chunks[number * FULL_CHUNK_BYTES..];
        let index_bytes = (12 * count).div_ceil(8);
        if is_empty(chunk, count) {
            return;
        }
        let (indices, codes) = chunk.split_at(index_bytes);
        let mut give = |number: usize, index: usize, codes: u8| {
            let code = usize::from(codes >> (2 * (number % 4)) & 3);
            if index == 0 && code == 0 && number > 0 {
                return false;
            }
            entry(index, self.values[code]);
            true
        };
        for (pair, three) in indices.chunks(3).enumerate() {
            let first = usize::from(three[0]) | usize::from(three[1] & 15) << 8;
            if !give(2 * pair, first, codes[pair / 2]) {
                return;
            }
            let Some(last) = three.get(2).filter(|_| 2 * pair + 1 < count) else { return };
            if !give(2 * pair + 1, usize::from(three[1] >> 4) | usize::from(*last) << 4, codes[pair / 2]) {
                return;
            }
        }
    }

    fn chunk_count(&self) -> usize {
        self.elements.div_ceil(CHUNK_ELEMENTS)
    }
}

/// Decodes a group that [`check`] accepted.
pub(crate) fn decode(bytes: &[u8], out: &mut [f32]) {
    out.fill(0.0);
    let group = Group::new(bytes, out.len());
    for number in 0..group.chunk_count() {
        let start = number * CHUNK_ELEMENTS;
        group.entries(number, |index, value| {
            if let Some(element) = out.get_mut(start + index) {
                *element = value;
            }
        });
    }
}

/// Whether a group of `elements` elements is encoded as this module says; `Err` names the element where it is not.
pub(crate) fn check(bytes: &[u8], elements: usize) -> Result<(), (usize, Flaw)> {
    let group = Group::new(bytes, elements);
    let [low, _, high, _] = group.values;
    let zero = low.to_bits() == 0 && high.to_bits() == 0;
    let sane = |level: f32| level.is_normal() && level > 0.0;
    let ordered = sane(low) && sane(high) && low <= high;
    if !zero && !ordered {
        return Err((0, Flaw::Scale));
    }
    for number in 0..group.chunk_count() {
        let start = number * CHUNK_ELEMENTS;
        let length = (elements - start).min(CHUNK_ELEMENTS);
        let chunk = &group.chunks[number * FULL_CHUNK_BYTES..][..chunk_bytes(length)];
        check_chunk(chunk, length, zero).map_err(|flaw| (start, flaw))?;
    }
    Ok(())
}

fn check_chunk(chunk: &[u8], length: usize, zero: bool) -> Result<(), Flaw> {
    let count = entries(length);
    if is_empty(chunk, count) {
        return if chunk.iter().all(|byte| *byte == EMPTY_BYTE) { Ok(()) } else { Err(Flaw::Code) };
    }
    if zero {
        return Err(Flaw::Code);
    }
    let (indices, codes) = chunk.split_at((12 * count).div_ceil(8));
    let (mut before, mut filling) = (None, false);
    for entry in 0..count {
        let (index, code) = (index(indices, entry), codes[entry / 4] >> (2 * (entry % 4)) & 3);
        filling |= entry > 0 && index == 0 && code == 0;
        if filling {
            if index != 0 || code != 0 {
                return Err(Flaw::Code);
            }
            continue;
        }
        if index >= length || before.is_some_and(|before| index <= before) {
            return Err(Flaw::Index);
        }
        before = Some(index);
    }
    let index_padding = if count.is_multiple_of(2) { 0 } else { indices[indices.len() - 1] >> 4 };
    let code_padding = if count.is_multiple_of(4) { 0 } else { codes[codes.len() - 1] >> (2 * (count % 4)) };
    if index_padding != 0 || code_padding != 0 { Err(Flaw::Code) } else { Ok(()) }
}
