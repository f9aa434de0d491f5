//! Count sketches of directions: 4096 numbers whose dot products estimate those of the vectors, to about 1/64.
//!
//! Each 4096 elements of a unit are given random signs, rotated by a random number of places, and added to the sketch: a count
//! sketch (Charikar, Chen, Farach-Colton 2002) whose bucket function works on whole registers (sixteens are rotated among each other,
//! and elements within their sixteen) and never lets two elements of one chunk collide. Two of different chunks collide with
//! probability 1/4096. Signs and places follow from the norms of all contributions, so nobody can choose a payload that
//! looks different in the sketch alone without knowing everybody else's.
//!
//! Each span is added up in f32, in order, and then rounded to multiples of 2^-40. The sums over spans are then exact in f64, and
//! the sketch is the same in whatever order threads add it up.

use protocol::Digest;
use rayon::prelude::*;

use super::engine::{Voice, dense_block};
use crate::codec::{CodecError, Encoding, Layout, top_k};
use crate::kernels::{Element, PLACES, Places, rotated};
use crate::simd::vectorised;

/// Numbers in a sketch.
pub(super) const BUCKETS: usize = PLACES;

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

    /// The random numbers of a chunk: its signs, and by how many places it is rotated.
    fn chunk(self, unit: usize, chunk: usize) -> ChunkSeed {
        let place = (unit as u64) << 40 ^ chunk as u64;
        ChunkSeed(mix(mix(place ^ self.0[0]).wrapping_add(self.0[1])))
    }
}

#[derive(Clone, Copy)]
struct ChunkSeed(u64);

impl ChunkSeed {
    /// The signs of 64 elements.
    #[inline(always)]
    fn signs(self, number: usize) -> u64 {
        mix(self.0.wrapping_add((number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    fn rotation(self) -> usize {
        (self.0 % BUCKETS as u64) as usize
    }
}

/// The finaliser of SplitMix64.
#[inline(always)]
fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// The sketch of a contribution whose units are multiplied by `factors` (which bring it to length 1).
pub(super) fn sketch(layout: &Layout, voice: &Voice, factors: &[f64], seed: Seed) -> Result<Vec<f64>, CodecError> {
    let start = || Ok(Part::new());
    let part = layout
        .spans()
        .into_par_iter()
        .fold(start, |part: Result<Part, CodecError>, span| {
            let mut part = part?;
            part.span.0.as_flattened_mut().fill(0.0);
            for tile in layout.tiles(span) {
                let Part { span: sums, bytes, values, .. } = &mut part;
                let bytes = voice.tile(layout, tile, bytes)?;
                for start in (0..tile.elements()).step_by(BUCKETS) {
                    let count = (tile.elements() - start).min(BUCKETS);
                    let chunk = seed.chunk(span.unit, (tile.start + start) / BUCKETS);
                    match layout.encoding {
                        Encoding::F32 => add_chunk(sums, &bytes.as_chunks::<4>().0[start..start + count], chunk),
                        Encoding::Bf16 => add_chunk(sums, &bytes.as_chunks::<2>().0[start..start + count], chunk),
                        Encoding::Int4 => {
                            let codec = layout.encoding.codec();
                            let blocks = BUCKETS / codec.block_elements();
                            for (number, values) in values[..count].chunks_mut(codec.block_elements()).enumerate() {
                                let block = start / BUCKETS * blocks + number;
                                let (bytes, _) = dense_block(layout.encoding, bytes, tile.elements(), block);
                                codec.decode(bytes, values);
                            }
                            add_chunk(sums, &values[..count], chunk);
                        }
                        Encoding::TopK => {
                            top_k::Group::new(bytes, tile.elements()).entries(start / BUCKETS, |index, value| {
                                let negative = chunk.signs(index / 64) >> (index % 64) & 1 == 1;
                                let place = rotated(index, chunk.rotation());
                                sums.0[place / 16][place % 16] += if negative { -value } else { value };
                            });
                        }
                    }
                }
            }
            add_on_grid(&mut part.buckets, part.span.0.as_flattened(), factors[span.unit]);
            Ok(part)
        })
        .reduce(start, |left, right| {
            let (mut left, right) = (left?, right?);
            left.buckets.iter_mut().zip(&right.buckets).for_each(|(sum, bucket)| *sum += bucket);
            Ok(left)
        });
    part.map(|part| part.buckets)
}

/// What one thread has added up.
struct Part {
    buckets: Vec<f64>,
    /// Of the span at hand, before its factor.
    span: Box<Places>,
    bytes: Vec<u8>,
    values: Vec<f32>,
}

impl Part {
    fn new() -> Self {
        Self {
            buckets: vec![0.0; BUCKETS],
            span: Box::new(Places([[0.0; 16]; BUCKETS / 16])),
            bytes: Vec::new(),
            values: vec![0.0; BUCKETS],
        }
    }
}

vectorised! {
    fn fill_signs(words: &mut [u64; BUCKETS / 64], chunk: ChunkSeed) {
        for (number, word) in words.iter_mut().enumerate() {
            *word = chunk.signs(number);
        }
    }
}

/// Adds a chunk with its signs, rotated.
fn add_chunk<T: Element>(sums: &mut Places, values: &[T], chunk: ChunkSeed) {
    let mut words = [0; BUCKETS / 64];
    fill_signs(&mut words, chunk);
    T::add_signed(sums, values, &words, chunk.rotation());
}

vectorised! {
    fn add_on_grid(buckets: &mut [f64], sums: &[f32], factor: f64) {
        for (bucket, sum) in buckets.iter_mut().zip(sums) {
            *bucket += (f64::from(*sum) * factor + GRID) - GRID;
        }
    }
}
