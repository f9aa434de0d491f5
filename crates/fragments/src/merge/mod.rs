//! The merge: contributions to one fragment become one pseudo-gradient, bit for bit the same for everybody who
//! recomputes it.
//!
//! Matrices and fused experts use *weighted radial-directional averaging* per unit (a slice, or one expert): the
//! direction is φ(Σ w φ(v)) with φ(v) = v/‖v‖, so no contribution counts for more than its weight however long it is;
//! the radius is the weighted **median** of the norms instead of the mean of Decoupled DiLoCo (arXiv 2604.21428), which one
//! long vector could move at will. Where directions cancel, the unit falls back to the weighted mean. Embeddings,
//! routers, norms and scalars use the weighted mean of the clipped vectors.
//!
//! The robust merge filters first ([`crate::gates`]): norms and clipping, mutual cosine, leave-one-out. Weights are capped by
//! the caller (`protocol::schedule::merge_weights`).
//!
//! [`merge`] and [`robust_merge`] take values in memory; [`merge_payloads`] takes payloads as they were uploaded, reads each a
//! few times from front to back in small pieces, and holds none of them: memory is the result, and per thread a tile of each
//! payload and a sketch of each. Sparse payloads stay sparse.
//!
//! Sums go over places that the plan and the codec fix ([`crate::codec`]), in the order of the inputs; threads share out whole tasks
//! whose results are added in order, so their number has no influence on the result. A contribution shorter than 2^-100 in a unit
//! counts as zero there.

mod engine;
mod sketch;

use std::io;

use protocol::{MergeRule, Reason, Slice};

use crate::codec::{CodecError, Encoding, HEADER_BYTES, Layout, PayloadHeader, Source};
use crate::gates::{self, NormVerdict};
use crate::memory::zeros;
use engine::{Combined, Engine, UnitSums, Voice};

/// Most contributions in one merge.
pub const INPUTS_MAX: usize = 4096;

/// Largest weight: sums of weights stay exact in f64.
pub const WEIGHT_MAX: u64 = 1 << 40;

const PPM: f64 = 1e6;
const MICRO: f64 = 1e6;

/// One contribution.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Pseudo-gradient (base minus learner) of the fragment in slice order.
    pub values: &'a [f32],
    /// Weight; only ratios matter. A contribution of weight 0 is judged and measured but moves nothing.
    pub weight: u64,
}

/// One contribution as it was uploaded.
#[derive(Clone, Copy)]
pub struct Offer<'a> {
    /// The header that the payload must have.
    pub header: &'a PayloadHeader,
    pub payload: &'a dyn Source,
    /// As in [`Input`].
    pub weight: u64,
    /// Weights for each merge unit in place of `weight`, where they are known (tokens routed to each expert); in the order of
    /// [`unit_norms`].
    pub unit_weights: Option<&'a [u64]>,
}

/// What the merge did with one contribution, in integers for the signed merge manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputReport {
    /// [`Reason::None`] if it is in the merge.
    pub outcome: Reason,
    /// ‖contribution‖₂ over the fragment in units of 1e-6, before clipping.
    pub norm_micro: u64,
    /// Norm after clipping over norm before, in parts per million; 0 for what is not in the merge.
    pub clip_ppm: u32,
    /// Cosine of the clipped contribution to the merged pseudo-gradient in parts per million; 0 for what is not in the merge.
    pub cosine_ppm: i32,
    /// Mean cosine to the nearest others in parts per million, estimated from sketches; 0 where it was not measured.
    pub neighbour_ppm: i32,
    /// Cosine to the mean direction of all others in parts per million; 0 where it was not measured.
    pub rest_ppm: i32,
}

/// A merged pseudo-gradient.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    /// In slice order.
    pub delta: Vec<f32>,
    /// ‖delta‖₂ in units of 1e-6.
    pub norm_micro: u64,
    /// One report per input, in the order of the inputs.
    pub inputs: Vec<InputReport>,
}

/// Why nothing was merged.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum MergeError {
    #[error("there is no contribution to merge")]
    NoInput,
    #[error("{inputs} contributions, the limit is {INPUTS_MAX}")]
    TooManyInputs { inputs: usize },
    #[error("input {input} has {got} values, the fragment has {expected} elements")]
    Length { input: usize, got: u64, expected: u64 },
    #[error("input {input} has weight {weight}, the limit is {WEIGHT_MAX}")]
    Weight { input: usize, weight: u64 },
    #[error("input {input} has {got} unit weights, the fragment has {expected} units")]
    UnitWeights { input: usize, got: usize, expected: usize },
    #[error("input {input} holds a value that is not finite")]
    NotFinite { input: usize },
    #[error("input {input} is of another codec or another fragment than the first")]
    Mixed { input: usize },
    #[error("input {input}: {source}")]
    Payload { input: usize, source: CodecError },
    #[error("slice {slice} has {rows} rows in units of {unit_rows}")]
    Unit { slice: usize, rows: u64, unit_rows: u64 },
    #[error("the merged pseudo-gradient is not finite")]
    Overflow,
}

impl MergeError {
    fn of_input(input: usize) -> impl Fn(CodecError) -> Self {
        move |source| match source {
            CodecError::NotFinite { .. } => Self::NotFinite { input },
            source => Self::Payload { input, source },
        }
    }

    fn unreadable(input: usize) -> impl Fn(io::Error) -> Self {
        move |error| Self::Payload { input, source: CodecError::Read(error) }
    }
}

/// Merges all `inputs` without any filter and without clipping. A single input (of weight > 0) comes back unchanged,
/// but for units that are vanishing; a unit that is zero in every input is zero.
pub fn merge(slices: &[Slice], inputs: &[Input]) -> Result<Merged, MergeError> {
    of_values(slices, inputs, |merge| {
        let plain = NormVerdict { outcome: Reason::None, scales: vec![1.0; merge.engine.layout.units.len()] };
        let verdicts = vec![plain; inputs.len()];
        merge.combine(&verdicts)
    })
}

/// The whole robust merge: norm gate and per-unit clipping (from three contributions on), mutual-cosine and leave-one-out
/// filters (from six on), then [`merge`] of what is left. All statistics are in [`Merged::inputs`].
pub fn robust_merge(slices: &[Slice], inputs: &[Input]) -> Result<Merged, MergeError> {
    of_values(slices, inputs, |merge| merge.robust())
}

/// [`robust_merge`] of payloads as they were uploaded, all in the same codec. Headers and bodies are checked on the way.
pub fn merge_payloads(slices: &[Slice], offers: &[Offer]) -> Result<Merged, MergeError> {
    let codec = offers.first().ok_or(MergeError::NoInput)?.header.codec();
    let layout = checked_layout(codec.into(), slices)?;
    let mut voices = Vec::with_capacity(offers.len());
    for (input, offer) in offers.iter().enumerate() {
        if offer.header.codec() != codec || !offer.header.layout().has_places_of(&layout) {
            return Err(MergeError::Mixed { input });
        }
        let mut scratch = Vec::new();
        let refuse = MergeError::of_input(input);
        crate::codec::check_length(offer.payload.length(), offer.header).map_err(&refuse)?;
        let header = offer.payload.read(0, HEADER_BYTES, &mut scratch).map_err(MergeError::unreadable(input))?;
        crate::codec::check_header(header, offer.header).map_err(&refuse)?;
        let (weight, unit_weights) = (offer.weight, offer.unit_weights);
        voices.push(Voice { source: offer.payload, body: HEADER_BYTES as u64, weight, unit_weights });
    }
    Prepared::new(Engine { layout, voices })?.robust()
}

/// The same slices with every unit merged by weighted mean: the closing merges of a run, whose result is the average of the
/// learners' weights.
pub fn averaged(slices: &[Slice]) -> Vec<Slice> {
    slices.iter().map(|slice| Slice { rule: MergeRule::Mean, ..slice.clone() }).collect()
}

/// The merge that would have been without the contributions `revoked` (numbers in `offers`), from the payloads that were kept:
/// [`merge_payloads`] of the others, as if these had never come. Reports are those of the others, in order.
pub fn merge_without(slices: &[Slice], offers: &[Offer], revoked: &[usize]) -> Result<Merged, MergeError> {
    let kept: Vec<Offer> = offers.iter().enumerate().filter(|(number, _)| !revoked.contains(number)).map(|(_, offer)| *offer).collect();
    merge_payloads(slices, &kept)
}

fn of_values<T>(slices: &[Slice], inputs: &[Input], work: impl FnOnce(&Prepared) -> Result<T, MergeError>) -> Result<T, MergeError> {
    let layout = checked_layout(Encoding::F32, slices)?;
    for (input, values) in inputs.iter().enumerate() {
        check_length(input, values.values, layout.elements)?;
    }
    let bodies: Vec<&[u8]> = inputs.iter().map(|input| bytemuck::cast_slice(input.values)).collect();
    let voice = |(input, body): (&Input, _)| Voice { source: body, body: 0, weight: input.weight, unit_weights: None };
    let voices = inputs.iter().zip(bodies.iter().map(|body| body as &dyn Source)).map(voice).collect();
    work(&Prepared::new(Engine { layout, voices })?)
}

/// The layout of slices whose rows are whole units. Slices come from a plan that [`crate::plan::check`] accepted.
fn checked_layout(encoding: Encoding, slices: &[Slice]) -> Result<Layout, MergeError> {
    for (index, slice) in slices.iter().enumerate() {
        let (rows, unit_rows) = (slice.row_end.saturating_sub(slice.row_start), slice.unit_rows);
        let whole = unit_rows > 0 && rows > 0 && rows % unit_rows == 0;
        if !whole || unit_rows.checked_mul(slice.row_elements).is_none_or(|elements| elements == 0) {
            return Err(MergeError::Unit { slice: index, rows, unit_rows });
        }
    }
    Ok(Layout::new(encoding, slices))
}

/// ‖values‖₂ of each merge unit, in buffer order: what [`gates::norm_gate`] judges.
pub fn unit_norms(slices: &[Slice], values: &[f32]) -> Result<Vec<f64>, MergeError> {
    of_values(slices, &[Input { values, weight: 1 }], |merge| Ok(merge.norms[0].clone()))
}

/// ‖payload‖₂ of each merge unit, in buffer order; checks header and body on the way.
pub fn payload_norms(header: &PayloadHeader, payload: &dyn Source) -> Result<Vec<f64>, CodecError> {
    crate::codec::check_length(payload.length(), header)?;
    let mut scratch = Vec::new();
    crate::codec::check_header(payload.read(0, HEADER_BYTES, &mut scratch)?, header)?;
    engine::norms(header.layout(), &Voice { source: payload, body: HEADER_BYTES as u64, weight: 1, unit_weights: None })
}

/// The leave-one-out filter on its own, over contributions that all take part: whether each is kept.
pub fn leave_one_out_keeps(slices: &[Slice], inputs: &[&[f32]]) -> Result<Vec<bool>, MergeError> {
    let inputs: Vec<Input> = inputs.iter().map(|values| Input { values, weight: 1 }).collect();
    of_values(slices, &inputs, |merge| {
        let mut verdicts = vec![NormVerdict { outcome: Reason::None, scales: vec![1.0; merge.engine.layout.units.len()] }; inputs.len()];
        merge.merge_rest(&mut verdicts)?;
        Ok(verdicts.iter().map(|verdict| verdict.outcome == Reason::None).collect())
    })
}

fn check_length(input: usize, values: &[f32], expected: usize) -> Result<(), MergeError> {
    if values.len() == expected {
        return Ok(());
    }
    Err(MergeError::Length { input, got: values.len() as u64, expected: expected as u64 })
}

/// Checked contributions and their norms `[input][unit]`.
struct Prepared<'a> {
    engine: Engine<'a>,
    norms: Vec<Vec<f64>>,
}

/// A contribution that a filter judges: its number, and its norm after clipping.
#[derive(Clone, Copy)]
struct Member {
    input: usize,
    norm: f64,
}

impl<'a> Prepared<'a> {
    fn new(engine: Engine<'a>) -> Result<Self, MergeError> {
        let voices = &engine.voices;
        if voices.len() > INPUTS_MAX {
            return Err(MergeError::TooManyInputs { inputs: voices.len() });
        }
        let units = engine.layout.units.len();
        for (input, voice) in voices.iter().enumerate() {
            if let Some(weight) = voice.weights().find(|weight| *weight > WEIGHT_MAX) {
                return Err(MergeError::Weight { input, weight });
            }
            if let Some(weights) = voice.unit_weights.filter(|weights| weights.len() != units) {
                return Err(MergeError::UnitWeights { input, got: weights.len(), expected: units });
            }
        }
        if !voices.iter().any(Voice::votes) {
            return Err(MergeError::NoInput);
        }
        let of_voice = |(input, voice)| engine::norms(&engine.layout, voice).map_err(MergeError::of_input(input));
        let norms = voices.iter().enumerate().map(of_voice).collect::<Result<_, _>>()?;
        Ok(Self { engine, norms })
    }

    fn robust(&self) -> Result<Merged, MergeError> {
        let votes: Vec<bool> = self.engine.voices.iter().map(Voice::votes).collect();
        let mut verdicts = gates::norm_gate(&self.norms, &votes);
        let neighbours = self.mutual_cosine(&mut verdicts)?;
        let (mut merged, rests) = self.merge_rest(&mut verdicts)?;
        for (input, cosine) in neighbours {
            merged.inputs[input].neighbour_ppm = ppm(cosine);
        }
        for (input, cosine) in rests {
            merged.inputs[input].rest_ppm = ppm(cosine);
        }
        Ok(merged)
    }

    /// Accepted contributions that vote and are not zero.
    fn members(&self, verdicts: &[NormVerdict]) -> Vec<Member> {
        (0..self.norms.len())
            .filter(|input| self.engine.voices[*input].votes() && verdicts[*input].outcome == Reason::None)
            .map(|input| Member { input, norm: clipped_norm(&self.norms[input], &verdicts[input].scales) })
            .filter(|member| member.norm > 0.0)
            .collect()
    }

    /// Marks contributions that are too close to others as [`Reason::TooSimilar`]. Returns each judged contribution's mean
    /// cosine to its nearest.
    fn mutual_cosine(&self, verdicts: &mut [NormVerdict]) -> Result<Vec<(usize, f64)>, MergeError> {
        let members = self.members(verdicts);
        if members.len() < gates::CROWD_MIN {
            return Ok(Vec::new());
        }
        let seed = sketch::Seed::from_norms(&self.norms);
        let mut sketches = Vec::with_capacity(members.len());
        for member in &members {
            let scales = &verdicts[member.input].scales;
            let factors: Vec<f64> = scales.iter().map(|scale| scale / member.norm).collect();
            let made = sketch::sketch(&self.engine.layout, &self.engine.voices[member.input], &factors, seed);
            sketches.push(made.map_err(MergeError::of_input(member.input))?);
        }
        let nearest = gates::nearest_cosines(&sketches);
        let similar = gates::too_similar(&nearest);
        for (member, _) in members.iter().zip(&similar).filter(|(_, similar)| **similar) {
            verdicts[member.input].outcome = Reason::TooSimilar;
        }
        Ok(members.iter().map(|member| member.input).zip(nearest).collect())
    }

    /// Marks contributions whose direction stands alone as [`Reason::DirectionOutlier`], and merges what is accepted then. Returns
    /// each judged contribution's cosine to the mean direction of the others, too.
    ///
    /// Both need sums over all payloads. They are taken in one pass, as if nobody stood alone; only if somebody does, the second one is
    /// taken again.
    fn merge_rest(&self, verdicts: &mut [NormVerdict]) -> Result<(Merged, Vec<(usize, f64)>), MergeError> {
        let judged = self.members(verdicts);
        if judged.len() < gates::CROWD_MIN {
            return Ok((self.combine(verdicts)?, Vec::new()));
        }
        let accepted = accepted(verdicts);
        let directions = self.directions(&accepted, &judged, verdicts);
        let rules = self.engine.rules(&accepted, &self.norms, verdicts);
        let mut delta = zeros(self.engine.layout.elements);
        let factors: [&(dyn Fn(usize) -> Vec<f64> + Sync); 2] = [&directions, &|unit| rules[unit].factors.clone()];
        let [of_directions, sums] = self.engine.sum(&accepted, factors, Some(&mut delta))?;
        let cosines = self.rest_cosines(&accepted, &judged, verdicts, &of_directions);
        let alone = gates::stand_alone(&cosines);
        let rests = judged.iter().map(|member| member.input).zip(cosines).collect();
        if !alone.contains(&true) {
            let combined = self.engine.combine(&accepted, &self.norms, verdicts, rules, sums, delta)?;
            return Ok((self.report(verdicts, &accepted, combined), rests));
        }
        for (member, _) in judged.iter().zip(alone).filter(|(_, alone)| *alone) {
            verdicts[member.input].outcome = Reason::DirectionOutlier;
        }
        drop(delta);
        Ok((self.combine(verdicts)?, rests))
    }

    /// The factors, by unit, that bring each accepted contribution that is judged to length 1.
    fn directions(&self, accepted: &[usize], judged: &[Member], verdicts: &[NormVerdict]) -> impl Fn(usize) -> Vec<f64> + Sync + use<> {
        let length = |input: &usize| judged.iter().find(|member| member.input == *input).map(|member| member.norm);
        let scales = |input: &usize| (verdicts[*input].scales.clone(), length(input));
        let of_members: Vec<(Vec<f64>, Option<f64>)> = accepted.iter().map(scales).collect();
        move |unit| of_members.iter().map(|(scales, length)| length.map_or(0.0, |length| scales[unit] / length)).collect()
    }

    /// Each judged contribution's cosine to the mean direction of the others, from the sums of all directions.
    fn rest_cosines(&self, accepted: &[usize], judged: &[Member], verdicts: &[NormVerdict], sums: &[UnitSums]) -> Vec<f64> {
        // With directions u_m and their sum S: u_m·S.
        let squares = sums.iter().map(|unit| unit.squares).sum();
        let product = |member: &Member| -> f64 {
            let place = accepted.partition_point(|input| *input < member.input);
            let scales = &verdicts[member.input].scales;
            sums.iter().zip(scales).map(|(unit, scale)| unit.products[place] * scale / member.norm).sum()
        };
        gates::rest_cosines(squares, &judged.iter().map(product).collect::<Vec<f64>>())
    }

    fn combine(&self, verdicts: &[NormVerdict]) -> Result<Merged, MergeError> {
        let accepted = accepted(verdicts);
        let rules = self.engine.rules(&accepted, &self.norms, verdicts);
        let mut delta = zeros(self.engine.layout.elements);
        let [sums] = self.engine.sum(&accepted, [&|unit| rules[unit].factors.clone()], Some(&mut delta))?;
        let combined = self.engine.combine(&accepted, &self.norms, verdicts, rules, sums, delta)?;
        Ok(self.report(verdicts, &accepted, combined))
    }

    fn report(&self, verdicts: &[NormVerdict], accepted: &[usize], combined: Combined) -> Merged {
        let merged_norm = combined.squares.sqrt();
        let reports = (0..verdicts.len()).map(|input| {
            let (norms, verdict) = (&self.norms[input], &verdicts[input]);
            let norm = norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt();
            let norm_micro = (norm * MICRO).round() as u64;
            let mut report =
                InputReport { outcome: verdict.outcome, norm_micro, clip_ppm: 0, cosine_ppm: 0, neighbour_ppm: 0, rest_ppm: 0 };
            if let Ok(member) = accepted.binary_search(&input) {
                let clipped = clipped_norm(norms, &verdict.scales);
                report.clip_ppm = if norm > 0.0 { (clipped / norm * PPM).round() as u32 } else { PPM as u32 };
                if clipped * merged_norm > 0.0 {
                    report.cosine_ppm = ppm(combined.products[member] / (clipped * merged_norm));
                }
            }
            report
        });
        let inputs = reports.collect();
        Merged { delta: combined.delta, norm_micro: (merged_norm * MICRO).round() as u64, inputs }
    }
}

/// Numbers of what no filter has marked.
fn accepted(verdicts: &[NormVerdict]) -> Vec<usize> {
    (0..verdicts.len()).filter(|input| verdicts[*input].outcome == Reason::None).collect()
}

fn clipped_norm(norms: &[f64], scales: &[f64]) -> f64 {
    norms.iter().zip(scales).map(|(norm, scale)| (norm * scale).powi(2)).sum::<f64>().sqrt()
}

fn ppm(ratio: f64) -> i32 {
    (ratio * PPM).round() as i32
}

/// The value at half the total weight; where the halves tie exactly, the mean of the two middle values. 0 for none.
pub(crate) fn weighted_median(mut values: Vec<(f64, u64)>) -> f64 {
    values.sort_by(|left, right| left.0.total_cmp(&right.0));
    let total: u128 = values.iter().map(|(_, weight)| u128::from(*weight)).sum();
    let mut below = 0u128;
    for (index, (value, weight)) in values.iter().enumerate() {
        below += u128::from(*weight);
        if 2 * below > total {
            return *value;
        }
        if 2 * below == total && below > 0 {
            let next = values[index + 1..].iter().find(|(_, weight)| *weight > 0);
            return next.map_or(*value, |(next, _)| (value + next) / 2.0);
        }
    }
    0.0
}

#[cfg(test)]
mod attack_tests;
#[cfg(test)]
mod payload_tests;
#[cfg(test)]
mod tests;
