//! Count sketches of directions: 4096 numbers whose dot products estimate those of the vectors, to about 1/64.
//!
//! Each 4096 elements of a unit are given random signs, rotated by a random number of places, and added to the sketch: a count
//! sketch (Charikar, Chen, Farach-Colton 2002) whose bucket function works on whole registers and never lets two elements of
//! one chunk collide. Signs and places follow from the norms of all contributions, so nobody can choose a payload that
//! looks different in the sketch alone without knowing everybody else's.
//!
//! Elements are rounded to multiples of 2^-40. All partial sums are then exact in f64, and the sketch is the same in whatever
//! order threads add it up.

use protocol::Digest;
use rayon::prelude::*;

use super::engine::{Voice, dense_block};
use crate::codec::{CodecError, Encoding, Layout, decode_tile, top_k};
use crate::simd::vectorised;

/// Numbers in a sketch.
pub(super) const BUCKETS: usize = 4096;

/// Adding and subtracting this rounds a number between -2^11 and 2^11 to a multiple of 2^-40.
const GRID: f64 = 6144.0;

/// What chooses signs and places.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seed([u64; 2]);

impl Seed {
    pub(super) fn from_norms(norms: &[Vec<f64>]) -> Self {
        let bytes: Vec<u8> = norms.iter().flatten().flat_map(|norm| norm.to_le_bytes()).collect();
        let Digest(digest) = Digest::derive("quasar/v1/merge-sketch", &[&bytes]);
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| digest[at + byte]));
        Self([word(0), word(8)])
    }

    /// 64 random bits for a place.
    fn bits(self, unit: usize, chunk: usize, number: usize) -> u64 {
        let place = (unit as u64) << 40 ^ (chunk as u64) << 8 ^ number as u64;
        mix(mix(place ^ self.0[0]).wrapping_add(self.0[1]))
    }

    /// By how many places a chunk is rotated.
    fn rotation(self, unit: usize, chunk: usize) -> usize {
        (self.bits(unit, chunk, 255) % BUCKETS as u64) as usize
    }
}

/// The finaliser of SplitMix64.
fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// The sketch of a contribution whose units are multiplied by `factors` (which bring it to length 1).
pub(super) fn sketch(layout: &Layout, voice: &Voice, factors: &[f64], seed: Seed) -> Result<Vec<f64>, CodecError> {
    struct Part {
        buckets: Vec<f64>,
        bytes: Vec<u8>,
        values: Vec<f32>,
    }
    let start = || Ok(Part { buckets: vec![0.0; BUCKETS], bytes: Vec::new(), values: vec![0.0; top_k::CHUNK_ELEMENTS] });
    let part = layout
        .spans()
        .into_par_iter()
        .fold(start, |part: Result<Part, CodecError>, span| {
            let mut part = part?;
            let factor = factors[span.unit];
            for tile in layout.tiles(span) {
                let bytes = voice.tile(layout, tile, &mut part.bytes)?;
                let size = layout.encoding.block_elements();
                for block in 0..tile.elements().div_ceil(size) {
                    let element = tile.start + block * size;
                    let (chunk, first) = (element / BUCKETS, element % BUCKETS);
                    let rotation = seed.rotation(span.unit, chunk);
                    if layout.encoding == Encoding::TopK {
                        top_k::Group::new(bytes, tile.elements()).entries(block, |index, value| {
                            let negative = seed.bits(span.unit, chunk, index / 64) >> (index % 64) & 1;
                            let value = if negative == 1 { -value } else { value };
                            part.buckets[(index + rotation) % BUCKETS] += on_grid(f64::from(value) * factor);
                        });
                    } else {
                        let (block_bytes, count) = dense_block(layout.encoding, bytes, tile.elements(), block);
                        let values = &mut part.values[..count];
                        decode_tile(layout.encoding, block_bytes, values);
                        let words: [u64; 16] = std::array::from_fn(|word| seed.bits(span.unit, chunk, first / 64 + word));
                        flip(values, &words);
                        let bucket = (first + rotation) % BUCKETS;
                        let (before, behind) = values.split_at(count.min(BUCKETS - bucket));
                        add_on_grid(&mut part.buckets[bucket..], before, factor);
                        add_on_grid(&mut part.buckets, behind, factor);
                    }
                }
            }
            Ok(part)
        })
        .reduce(start, |left, right| {
            let (mut left, right) = (left?, right?);
            left.buckets.iter_mut().zip(&right.buckets).for_each(|(sum, bucket)| *sum += bucket);
            Ok(left)
        });
    part.map(|part| part.buckets)
}

fn on_grid(value: f64) -> f64 {
    (value + GRID) - GRID
}

vectorised! {
    /// Changes the sign of every value whose bit is set.
    fn flip(values: &mut [f32], words: &[u64]) {
        for (values, word) in values.chunks_mut(64).zip(words) {
            for (values, word) in values.chunks_mut(32).zip([*word as u32, (*word >> 32) as u32]) {
                for (lane, value) in values.iter_mut().enumerate() {
                    *value = f32::from_bits(value.to_bits() ^ (word >> lane & 1) << 31);
                }
            }
        }
    }
}

vectorised! {
    fn add_on_grid(buckets: &mut [f64], values: &[f32], factor: f64) {
        for (bucket, value) in buckets.iter_mut().zip(values) {
            *bucket += (f64::from(*value) * factor + GRID) - GRID;
        }
    }
}
