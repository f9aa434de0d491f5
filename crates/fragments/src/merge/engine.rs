//! The passes of a merge over payloads: norms, sums of directions, the merged pseudo-gradient.
//!
//! A pass cuts the fragment into spans that threads share out. Within a span each tile is read from every payload, then each
//! block is summed over the payloads while it is in the cache, and multiplied with each of them once more for the statistics.

use protocol::MergeRule;
use rayon::prelude::*;

use super::{MergeError, weighted_median};
use crate::codec::{CodecError, Encoding, Layout, Source, Span, check_tile, cut_mut, int4, top_k};
use crate::gates::NormVerdict;
use crate::kernels::{Element, multiply, scale};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Level, level};

/// Mean directions shorter than this have cancelled: what is left of them is rounding.
const CANCELLED: f64 = 1e-6;

/// Shorter contributions count as zero: the factor that would bring them to length 1 leaves the range of f32.
const VANISHING: f64 = 1.0 / (1u128 << 100) as f64;

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
    let codec = encoding.codec();
    let size = codec.block_elements();
    let start = block * size;
    let count = (elements - start).min(size);
    let from = codec.bytes(start);
    (&tile[from..from + codec.bytes(count)], count)
}

/// ‖voice‖₂ of each unit, 0 where it is vanishing; checks the body.
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
    norms.iter_mut().for_each(|norm| *norm = if norm.sqrt() < VANISHING { 0.0 } else { norm.sqrt() });
    Ok(norms)
}

/// Σ v² of a tile. What a sum cannot tell (of int4 and top-k) is checked before.
fn tile_squares(layout: &Layout, tile: Span, bytes: &[u8]) -> Result<f64, CodecError> {
    let block_elements = layout.encoding.codec().block_elements();
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

impl UnitSums {
    fn of(members: usize) -> Self {
        Self { squares: 0.0, products: vec![0.0; members] }
    }
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
pub(super) struct UnitRule {
    /// Factor of each member in the sum.
    pub factors: Vec<f64>,
    /// The length that the sum is brought to; `None` leaves it.
    radius: Option<f64>,
}

/// Buffers of one thread.
struct Scratch<const N: usize> {
    tiles: Vec<Vec<u8>>,
    /// A block of each member, where blocks are decoded before they are summed.
    values: Vec<f32>,
    block: BlockSums<N>,
}

/// Buffers for one block of sums.
struct BlockSums<const N: usize> {
    sums: [Vec<f32>; N],
    /// The same in a unit of their own, for the products.
    scaled: [Vec<f32>; N],
}

impl Engine<'_> {
    /// Sums factor · member over every unit, with the members in order, for each of several sets of factors (of each member by unit);
    /// writes the last of the sums to `out` where it is given.
    pub(super) fn sum<const N: usize>(
        &self,
        members: &[usize],
        factors_of: [&(dyn Fn(usize) -> Vec<f64> + Sync); N],
        out: Option<&mut [f32]>,
    ) -> Result<[Vec<UnitSums>; N], MergeError> {
        let spans = self.layout.spans();
        let outputs: Vec<Option<&mut [f32]>> = match out {
            Some(out) => cut_mut(out, spans.iter().map(Span::elements)).into_iter().map(Some).collect(),
            None => spans.iter().map(|_| None).collect(),
        };
        let in_unit = |unit| factors_of.map(|of| of(unit).into_iter().map(|factor| factor as f32).collect());
        let factors: Vec<[Vec<f32>; N]> = (0..self.layout.units.len()).map(in_unit).collect();
        let tasks: Vec<(Span, Option<&mut [f32]>)> = spans.iter().copied().zip(outputs).collect();
        let of_spans: Vec<Result<[UnitSums; N], MergeError>> = tasks
            .into_par_iter()
            .map_init(
                || self.scratch(members.len()),
                |scratch, (span, out)| self.sum_span(span, members, &factors[span.unit], out, scratch),
            )
            .collect();
        let mut units = [(); N].map(|()| vec![UnitSums::of(members.len()); self.layout.units.len()]);
        for (span, sums) in spans.iter().zip(of_spans) {
            for (units, sums) in units.iter_mut().zip(sums?) {
                let unit = &mut units[span.unit];
                unit.squares += sums.squares;
                unit.products.iter_mut().zip(sums.products).for_each(|(total, product)| *total += product);
            }
        }
        Ok(units)
    }

    fn scratch<const N: usize>(&self, members: usize) -> Scratch<N> {
        let block = self.layout.encoding.codec().block_elements();
        let values = if self.layout.encoding == Encoding::Int4 { members * block } else { 0 };
        let block = BlockSums { sums: [(); N].map(|()| vec![0.0; block]), scaled: [(); N].map(|()| vec![0.0; block]) };
        Scratch { tiles: vec![Vec::new(); members], values: vec![0.0; values], block }
    }

    fn sum_span<const N: usize>(
        &self,
        span: Span,
        members: &[usize],
        factors: &[Vec<f32>; N],
        mut out: Option<&mut [f32]>,
        scratch: &mut Scratch<N>,
    ) -> Result<[UnitSums; N], MergeError> {
        let layout = &self.layout;
        let block_elements = layout.encoding.codec().block_elements();
        let mut result = [(); N].map(|()| UnitSums::of(members.len()));
        let Scratch { tiles, values, block: BlockSums { sums, scaled } } = scratch;
        for tile in layout.tiles(span) {
            let mut bytes = Vec::with_capacity(members.len());
            for (input, buffer) in members.iter().zip(tiles.iter_mut()) {
                bytes.push(self.voices[*input].tile(layout, tile, buffer).map_err(MergeError::of_input(*input))?);
            }
            for block in 0..tile.elements().div_ceil(block_elements) {
                let start = block * block_elements;
                let elements = start..(start + block_elements).min(tile.elements());
                let mut sums = sums.each_mut().map(|sums| &mut sums[..elements.len()]);
                if let (Some(out), Some(last)) = (&mut out, sums.last_mut()) {
                    *last = &mut out[tile.start - span.start..][elements.clone()];
                }
                let block_sums =
                    OfBlock { factors, sums, scaled: scaled.each_mut().map(|scaled| &mut scaled[..elements.len()]), result: &mut result };
                match layout.encoding {
                    Encoding::F32 => {
                        let members: Vec<_> = bytes.iter().map(|bytes| &bytes.as_chunks::<4>().0[elements.clone()]).collect();
                        block_sums.dense(&members);
                    }
                    Encoding::Bf16 => {
                        let members: Vec<_> = bytes.iter().map(|bytes| &bytes.as_chunks::<2>().0[elements.clone()]).collect();
                        block_sums.dense(&members);
                    }
                    Encoding::Int4 => {
                        let place = int4::encoded_bytes(start)..int4::encoded_bytes(elements.end);
                        let members: Vec<_> = bytes.iter().map(|bytes| &bytes[place.clone()]).collect();
                        block_sums.int4(&members, values);
                    }
                    Encoding::TopK => {
                        let members: Vec<_> = bytes.iter().map(|bytes| top_k::Group::new(bytes, tile.elements())).collect();
                        block_sums.sparse(&members, block);
                    }
                }
            }
        }
        Ok(result)
    }

    /// How `members` (accepted contributions, ascending), whose norms `[input][unit]` and clip factors are given, are merged.
    pub(super) fn rules(&self, members: &[usize], norms: &[Vec<f64>], verdicts: &[NormVerdict]) -> Vec<UnitRule> {
        (0..self.layout.units.len()).map(|unit| self.unit_rule(unit, members, norms, verdicts)).collect()
    }

    /// Makes the merge of sums that were taken and written to `delta` by `rules`.
    pub(super) fn combine(
        &self,
        members: &[usize],
        norms: &[Vec<f64>],
        verdicts: &[NormVerdict],
        mut rules: Vec<UnitRule>,
        mut sums: Vec<UnitSums>,
        mut delta: Vec<f32>,
    ) -> Result<Combined, MergeError> {
        let units = self.layout.units.len();
        let cancelled: Vec<bool> =
            rules.iter().zip(&sums).map(|(rule, sums)| rule.radius.is_some() && sums.squares.sqrt() < CANCELLED).collect();
        if cancelled.contains(&true) {
            for unit in (0..units).filter(|unit| cancelled[*unit]) {
                rules[unit] = self.mean_rule(unit, members, norms, verdicts);
            }
            // Rare: where all moved a unit and the directions cancel. Everything is summed again, to the same values elsewhere.
            [sums] = self.sum(members, [&|unit| rules[unit].factors.clone()], Some(&mut delta))?;
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

/// What is done with one block of all members: it is summed up, then multiplied with the sums.
struct OfBlock<'a, const N: usize> {
    factors: &'a [Vec<f32>; N],
    sums: [&'a mut [f32]; N],
    scaled: [&'a mut [f32]; N],
    result: &'a mut [UnitSums; N],
}

impl<const N: usize> OfBlock<'_, N> {
    fn dense<T: Element>(mut self, members: &[&[T]]) {
        T::add_all(self.sums.each_mut().map(|sums| &mut **sums), members, self.factors);
        self.multiply(|sums, units, products| T::dots(members, sums, units, products));
    }

    /// Encoded blocks of four bits an element. `values` has room for what they decode to, where that is needed.
    fn int4(mut self, members: &[&[u8]], values: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if level() == Level::Avx512
            && let Some(members) = members.iter().map(|bytes| bytes.as_array()).collect::<Option<Vec<_>>>()
            && let Some(sums) = arrays(self.sums.each_mut().map(|sums| sums.as_mut_array()))
        {
            // SAFETY: the processor has what the level says.
            unsafe { crate::wide::of_int4::add_all(sums, &members, self.factors) };
            self.multiply(|sums, units, products| {
                if let Some(sums) = arrays(sums.map(|sums| sums.as_array())) {
                    // SAFETY: as above.
                    unsafe { crate::wide::of_int4::dots(&members, sums, units, products) };
                }
            });
            return;
        }
        let elements = self.sums.first().map_or(0, |sums| sums.len());
        for (bytes, values) in members.iter().zip(values.chunks_mut(elements)) {
            int4::decode(bytes, values);
        }
        let members: Vec<&[f32]> = values.chunks(elements).take(members.len()).collect();
        self.dense(&members);
    }

    fn multiply(mut self, dots: impl FnOnce([&[f32]; N], [f64; N], [&mut [f64]; N])) {
        let mut units = [1.0; N];
        for (((sums, scaled), result), unit) in self.sums.iter().zip(self.scaled.iter_mut()).zip(self.result.iter_mut()).zip(&mut units) {
            let squares = f32::squares(sums, sums.len());
            result.squares += squares;
            // So that no product leaves the range of f32, however large or small the sums are.
            *unit = power_of_two_near(squares.sqrt());
            multiply(sums, (1.0 / *unit) as f32, scaled);
        }
        dots(self.scaled.map(|scaled| &*scaled), units, self.result.each_mut().map(|result| result.products.as_mut_slice()));
    }

    /// One chunk of sparse payloads: only their entries are touched.
    fn sparse(self, members: &[top_k::Group], block: usize) {
        for ((sums, factors), result) in self.sums.into_iter().zip(self.factors).zip(self.result) {
            sums.fill(0.0);
            for (group, factor) in members.iter().zip(factors).filter(|(_, factor)| **factor != 0.0) {
                group.entries(block, |index, value| {
                    if let Some(sum) = sums.get_mut(index) {
                        *sum += factor * value;
                    }
                });
            }
            for (group, product) in members.iter().zip(&mut result.products) {
                let mut total = 0.0;
                group.entries(block, |index, value| {
                    if let Some(sum) = sums.get(index) {
                        total += f64::from(value) * f64::from(*sum);
                    }
                });
                *product += total;
            }
            result.squares += f32::squares(sums, sums.len());
        }
    }
}

/// All, or none where one is missing.
#[cfg(target_arch = "x86_64")]
fn arrays<T, const N: usize>(all: [Option<T>; N]) -> Option<[T; N]> {
    all.into_iter().collect::<Option<Vec<T>>>()?.try_into().ok()
}

/// The power of two at or below a positive number, if its inverse is one that f32 has, too; 1 for others.
fn power_of_two_near(number: f64) -> f64 {
    const EXPONENT: u64 = 0x7ff << 52;
    let range = f64::from(f32::MIN_POSITIVE)..0.5 / f64::from(f32::MIN_POSITIVE);
    if range.contains(&number) { f64::from_bits(number.to_bits() & EXPONENT) } else { 1.0 }
}
