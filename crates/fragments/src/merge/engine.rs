//! The passes of a merge over payloads: norms, sums of directions, the merged pseudo-gradient.
//!
//! A pass cuts the fragment into spans that threads share out. Within a span each tile is read from every payload, then each
//! block is summed over the payloads while it is in the cache, and multiplied with each of them once more for the statistics.

use protocol::MergeRule;
use rayon::prelude::*;

use super::{MergeError, weighted_median};
use crate::codec::{CodecError, Encoding, Layout, Source, Span, check_tile, cut_mut, decode_tile, int4, top_k};
use crate::gates::NormVerdict;
use crate::kernels::{Element, narrow, narrow_scaled, scale, squares_of_sums};
use crate::memory::zeros;

/// Mean directions shorter than this have cancelled: what is left of them is rounding.
const CANCELLED: f64 = 1e-6;

/// A contribution as the passes read it.
#[derive(Clone, Copy)]
pub(super) struct Voice<'a> {
    pub source: &'a dyn Source,
    /// Where the body begins.
    pub body: u64,
    pub weight: u64,
    pub unit_weights: Option<&'a [u64]>,
}

impl Voice<'_> {
    pub(super) fn weights(&self) -> impl Iterator<Item = u64> {
        self.unit_weights.into_iter().flatten().copied().chain([self.weight])
    }

    /// Whether it can move anything.
    pub(super) fn votes(&self) -> bool {
        match self.unit_weights {
            Some(weights) => weights.iter().any(|weight| *weight > 0),
            None => self.weight > 0,
        }
    }

    fn weight_of(&self, unit: usize) -> u64 {
        self.unit_weights.map_or(self.weight, |weights| weights[unit])
    }

    /// The bytes of a tile.
    pub(super) fn tile<'b>(&'b self, layout: &Layout, tile: Span, scratch: &'b mut Vec<u8>) -> Result<&'b [u8], CodecError> {
        let range = layout.body_range(tile);
        Ok(self.source.read(self.body + range.start as u64, range.len(), scratch)?)
    }
}

/// The bytes of block `block` of a tile of `elements` elements in a dense encoding, and its elements.
pub(super) fn dense_block(encoding: Encoding, tile: &[u8], elements: usize, block: usize) -> (&[u8], usize) {
    let size = encoding.block_elements();
    let start = block * size;
    let count = (elements - start).min(size);
    let from = encoding.bytes(start);
    (&tile[from..from + encoding.bytes(count)], count)
}

/// ‖voice‖₂ of each unit; checks the body.
pub(super) fn norms(layout: &Layout, voice: &Voice) -> Result<Vec<f64>, CodecError> {
    let spans = layout.spans();
    let of_spans: Vec<Result<f64, CodecError>> = spans
        .par_iter()
        .map_init(Vec::new, |bytes: &mut Vec<u8>, span| {
            let mut sum = 0.0;
            for tile in layout.tiles(*span) {
                let bytes = voice.tile(layout, tile, bytes)?;
                let squares = tile_squares(layout, tile, bytes)?;
                if !squares.is_finite() {
                    // Says where.
                    check_tile(layout, tile, bytes)?;
                }
                sum += squares;
            }
            Ok(sum)
        })
        .collect();
    let mut norms = vec![0.0; layout.units.len()];
    for (span, squares) in spans.iter().zip(of_spans) {
        norms[span.unit] += squares?;
    }
    norms.iter_mut().for_each(|norm| *norm = norm.sqrt());
    Ok(norms)
}

/// Σ v² of a tile. What a sum cannot tell (of int4 and top-k) is checked before.
fn tile_squares(layout: &Layout, tile: Span, bytes: &[u8]) -> Result<f64, CodecError> {
    let block_elements = layout.encoding.block_elements();
    match layout.encoding {
        Encoding::F32 => Ok(Element::squares(bytes.as_chunks::<4>().0, block_elements)),
        Encoding::Bf16 => Ok(Element::squares(bytes.as_chunks::<2>().0, block_elements)),
        Encoding::Int4 => {
            let squares = int4::squares(bytes, tile.elements());
            squares.or_else(|_| check_tile(layout, tile, bytes).map(|()| f64::NAN))
        }
        Encoding::TopK => {
            check_tile(layout, tile, bytes)?;
            let group = top_k::Group::new(bytes, tile.elements());
            let mut sum = 0.0;
            for block in 0..tile.elements().div_ceil(block_elements) {
                group.entries(block, |_, value| sum += f64::from(value) * f64::from(value));
            }
            Ok(sum)
        }
    }
}

/// All contributions to one fragment.
pub(super) struct Engine<'a> {
    pub layout: Layout,
    pub voices: Vec<Voice<'a>>,
}

/// Over one unit.
#[derive(Clone, Debug, Default)]
pub(super) struct UnitSums {
    /// Squared norm of the sum.
    pub squares: f64,
    /// Dot product of each member, as it is, with the sum.
    pub products: Vec<f64>,
}

/// Merged units.
pub(super) struct Combined {
    pub delta: Vec<f32>,
    /// ‖delta‖².
    pub squares: f64,
    /// Dot product of each clipped member with the delta.
    pub products: Vec<f64>,
}

/// How one unit is merged.
struct UnitRule {
    /// Factor of each member in the sum.
    factors: Vec<f64>,
    /// The length that the sum is brought to; `None` leaves it.
    radius: Option<f64>,
}

/// Buffers of one thread.
struct Scratch {
    tiles: Vec<Vec<u8>>,
    /// A block of each member, where blocks are decoded before they are summed.
    values: Vec<f32>,
    block: BlockSums,
}

impl Engine<'_> {
    /// Sums factor · member over every unit, with the members in order; writes the sums to `out` where it is given.
    pub(super) fn sum(
        &self,
        members: &[usize],
        factors_of: &(dyn Fn(usize) -> Vec<f64> + Sync),
        out: Option<&mut [f32]>,
    ) -> Result<Vec<UnitSums>, MergeError> {
        let spans = self.layout.spans();
        let outputs: Vec<Option<&mut [f32]>> = match out {
            Some(out) => cut_mut(out, spans.iter().map(Span::elements)).into_iter().map(Some).collect(),
            None => spans.iter().map(|_| None).collect(),
        };
        let factors: Vec<Vec<f64>> = (0..self.layout.units.len()).map(factors_of).collect();
        let tasks: Vec<(Span, Option<&mut [f32]>)> = spans.iter().copied().zip(outputs).collect();
        let of_spans: Vec<Result<UnitSums, MergeError>> = tasks
            .into_par_iter()
            .map_init(
                || self.scratch(members.len()),
                |scratch, (span, out)| self.sum_span(span, members, &factors[span.unit], out, scratch),
            )
            .collect();
        let mut units = vec![UnitSums { squares: 0.0, products: vec![0.0; members.len()] }; self.layout.units.len()];
        for (span, sums) in spans.iter().zip(of_spans) {
            let (unit, sums) = (&mut units[span.unit], sums?);
            unit.squares += sums.squares;
            unit.products.iter_mut().zip(sums.products).for_each(|(total, product)| *total += product);
        }
        Ok(units)
    }

    fn scratch(&self, members: usize) -> Scratch {
        let block = self.layout.encoding.block_elements();
        let values = if self.layout.encoding == Encoding::Int4 { members * block } else { 0 };
        let block = BlockSums { sums: vec![0.0; block], narrow: vec![0.0; block] };
        Scratch { tiles: vec![Vec::new(); members], values: vec![0.0; values], block }
    }

    fn sum_span(
        &self,
        span: Span,
        members: &[usize],
        factors: &[f64],
        mut out: Option<&mut [f32]>,
        scratch: &mut Scratch,
    ) -> Result<UnitSums, MergeError> {
        let layout = &self.layout;
        let block_elements = layout.encoding.block_elements();
        let mut result = UnitSums { squares: 0.0, products: vec![0.0; members.len()] };
        let Scratch { tiles, values, block: buffers } = scratch;
        for tile in layout.tiles(span) {
            let mut bytes = Vec::with_capacity(members.len());
            for (input, buffer) in members.iter().zip(tiles.iter_mut()) {
                bytes.push(self.voices[*input].tile(layout, tile, buffer).map_err(MergeError::of_input(*input))?);
            }
            for block in 0..tile.elements().div_ceil(block_elements) {
                let start = block * block_elements;
                let count = (tile.elements() - start).min(block_elements);
                let products = &mut result.products;
                let elements = start..start + count;
                result.squares += match layout.encoding {
                    Encoding::F32 => {
                        let members: Vec<_> = bytes.iter().map(|bytes| &bytes.as_chunks::<4>().0[elements.clone()]).collect();
                        dense_sums(&members, factors, buffers, count, products)
                    }
                    Encoding::Bf16 => {
                        let members: Vec<_> = bytes.iter().map(|bytes| &bytes.as_chunks::<2>().0[elements.clone()]).collect();
                        dense_sums(&members, factors, buffers, count, products)
                    }
                    Encoding::Int4 => {
                        for (bytes, values) in bytes.iter().zip(values.chunks_mut(block_elements)) {
                            let (bytes, count) = dense_block(layout.encoding, bytes, tile.elements(), block);
                            decode_tile(layout.encoding, bytes, &mut values[..count]);
                        }
                        let members: Vec<_> = values.chunks(block_elements).map(|values| &values[..count]).collect();
                        dense_sums(&members, factors, buffers, count, products)
                    }
                    Encoding::TopK => sparse_sums(&bytes, tile.elements(), block, factors, &mut buffers.sums[..count], products),
                };
                if let Some(out) = &mut out {
                    let start = tile.start - span.start + start;
                    narrow(&buffers.sums[..count], &mut out[start..start + count]);
                }
            }
        }
        Ok(result)
    }

    /// Merges `members` (accepted contributions, ascending), whose norms `[input][unit]` and clip factors are given.
    pub(super) fn combine(&self, members: &[usize], norms: &[Vec<f64>], verdicts: &[NormVerdict]) -> Result<Combined, MergeError> {
        let units = self.layout.units.len();
        let mut rules: Vec<UnitRule> = (0..units).map(|unit| self.unit_rule(unit, members, norms, verdicts)).collect();
        let mut delta = zeros(self.layout.elements);
        let mut sums = self.sum(members, &|unit| rules[unit].factors.clone(), Some(&mut delta))?;
        let cancelled: Vec<bool> =
            rules.iter().zip(&sums).map(|(rule, sums)| rule.radius.is_some() && sums.squares.sqrt() < CANCELLED).collect();
        if cancelled.contains(&true) {
            for unit in (0..units).filter(|unit| cancelled[*unit]) {
                rules[unit] = self.mean_rule(unit, members, norms, verdicts);
            }
            // Rare: where all moved a unit and the directions cancel. Everything is summed again, to the same values elsewhere.
            sums = self.sum(members, &|unit| rules[unit].factors.clone(), Some(&mut delta))?;
        }
        let scales: Vec<f64> =
            rules.iter().zip(&sums).map(|(rule, sums)| rule.radius.map_or(1.0, |radius| radius / sums.squares.sqrt())).collect();
        let spans = self.layout.spans();
        let tasks: Vec<(&Span, &mut [f32])> = spans.iter().zip(cut_mut(&mut delta, spans.iter().map(Span::elements))).collect();
        let squares: Vec<f64> = tasks.into_par_iter().map(|(span, values)| scale(values, scales[span.unit])).collect();
        let squares: f64 = squares.iter().sum();
        if !squares.is_finite() {
            return Err(MergeError::Overflow);
        }
        let product = |(number, input): (usize, &usize)| -> f64 {
            let of_unit = |unit: usize| sums[unit].products[number] * scales[unit] * verdicts[*input].scales[unit];
            (0..units).map(of_unit).sum()
        };
        let products = members.iter().enumerate().map(product).collect();
        Ok(Combined { delta, squares, products })
    }

    fn unit_rule(&self, unit: usize, members: &[usize], norms: &[Vec<f64>], verdicts: &[NormVerdict]) -> UnitRule {
        let weight = |input: usize| self.voices[input].weight_of(unit);
        let mut voting = members.iter().filter(|input| weight(**input) > 0);
        let alone = voting.next().is_some() && voting.next().is_none();
        let changed: Vec<usize> = members.iter().copied().filter(|input| weight(*input) > 0 && norms[*input][unit] > 0.0).collect();
        if alone || changed.is_empty() || self.layout.units[unit].rule == MergeRule::Mean {
            return self.mean_rule(unit, members, norms, verdicts);
        }
        // Direction φ(Σ w φ(v)) over those that changed the unit, at their weighted median norm.
        let total: f64 = changed.iter().map(|input| weight(*input) as f64).sum();
        let factor = |input: &usize| {
            let norm = norms[*input][unit];
            if norm > 0.0 { weight(*input) as f64 / (total * norm) } else { 0.0 }
        };
        let radius =
            weighted_median(changed.iter().map(|input| (norms[*input][unit] * verdicts[*input].scales[unit], weight(*input))).collect());
        UnitRule { factors: members.iter().map(factor).collect(), radius: Some(radius) }
    }

    /// Σ w s v / Σ w over all that vote.
    fn mean_rule(&self, unit: usize, members: &[usize], norms: &[Vec<f64>], verdicts: &[NormVerdict]) -> UnitRule {
        let weight = |input: usize| self.voices[input].weight_of(unit) as f64;
        let total: f64 = members.iter().map(|input| weight(*input)).sum();
        let factor = |input: &usize| {
            if total > 0.0 && norms[*input][unit] > 0.0 { weight(*input) / total * verdicts[*input].scales[unit] } else { 0.0 }
        };
        UnitRule { factors: members.iter().map(factor).collect(), radius: None }
    }
}

/// Buffers for one block of sums.
struct BlockSums {
    sums: Vec<f64>,
    /// The sums in a unit of their own, for the products.
    narrow: Vec<f32>,
}

/// Adds the members' blocks up, in order, then multiplies each with the sums. Returns the squared norm of the sums.
fn dense_sums<T: Element>(members: &[&[T]], factors: &[f64], block: &mut BlockSums, count: usize, products: &mut [f64]) -> f64 {
    let (sums, narrow) = (&mut block.sums[..count], &mut block.narrow[..count]);
    if factors.contains(&0.0) {
        let adding = || members.iter().zip(factors).filter(|(_, factor)| **factor != 0.0);
        let (members, factors): (Vec<&[T]>, Vec<f64>) = adding().map(|(member, factor)| (*member, *factor)).unzip();
        T::add_all(sums, &members, &factors);
    } else {
        T::add_all(sums, members, factors);
    }
    let squares = squares_of_sums(sums);
    // A power of two near their length, so that no product leaves the range of f32 however large or small the values are.
    let unit = power_of_two_near(squares.sqrt());
    narrow_scaled(sums, 1.0 / unit, narrow);
    T::dots(members, narrow, unit, products);
    squares
}

/// The power of two at or below a positive number of moderate size; 1 for others.
fn power_of_two_near(number: f64) -> f64 {
    const EXPONENT: u64 = 0x7ff << 52;
    if (1e-150..1e150).contains(&number) { f64::from_bits(number.to_bits() & EXPONENT) } else { 1.0 }
}

/// The same for one chunk of sparse payloads: only their entries are touched.
fn sparse_sums(tiles: &[&[u8]], elements: usize, block: usize, factors: &[f64], sums: &mut [f64], products: &mut [f64]) -> f64 {
    sums.fill(0.0);
    for (bytes, factor) in tiles.iter().zip(factors).filter(|(_, factor)| **factor != 0.0) {
        top_k::Group::new(bytes, elements).entries(block, |index, value| {
            if let Some(sum) = sums.get_mut(index) {
                *sum += factor * f64::from(value);
            }
        });
    }
    for (bytes, product) in tiles.iter().zip(products) {
        let mut total = 0.0;
        top_k::Group::new(bytes, elements).entries(block, |index, value| {
            if let Some(sum) = sums.get(index) {
                total += f64::from(value) * sum;
            }
        });
        *product += total;
    }
    squares_of_sums(sums)
}
