//! The merge: contributions to one fragment become one pseudo-gradient, bit for bit the same for everybody who
//! recomputes it.
//!
//! Matrices and fused experts use *weighted radial-directional averaging* per unit (a slice, or one expert): the
//! direction is φ(Σ w φ(v)) with φ(v) = v/‖v‖, so no contribution counts for more than its weight however long it is;
//! the radius is the weighted **median** of the norms instead of the mean of Decoupled DiLoCo (arXiv 2604.21428), which one
//! long vector could move at will. Where directions cancel, the unit falls back to the weighted mean. Embeddings,
//! routers, norms and scalars use the weighted mean of the clipped vectors.
//!
//! Sums are in f64, in the order of the inputs and of the elements; threads only share out whole units, so their number
//! has no influence on the result.

use protocol::{MergeRule, Reason, Slice};
use rayon::prelude::*;

use crate::gates::{self, NormVerdict};
use crate::number::{all_finite, dot, sum_of_squares};

/// Most contributions in one merge.
pub const INPUTS_MAX: usize = 4096;

/// Largest weight: sums of weights stay exact in f64.
pub const WEIGHT_MAX: u64 = 1 << 40;

/// Mean directions shorter than this have cancelled: what is left of them is rounding.
const CANCELLED: f64 = 1e-6;

/// Elements that are accumulated at a time: the f64 sums stay in the innermost cache.
pub(crate) const BLOCK_ELEMENTS: usize = 1024;

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
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MergeError {
    #[error("there is no contribution to merge")]
    NoInput,
    #[error("{inputs} contributions, the limit is {INPUTS_MAX}")]
    TooManyInputs { inputs: usize },
    #[error("input {input} has {got} values, the fragment has {expected} elements")]
    Length { input: usize, got: u64, expected: u64 },
    #[error("input {input} has weight {weight}, the limit is {WEIGHT_MAX}")]
    Weight { input: usize, weight: u64 },
    #[error("input {input} holds a value that is not finite")]
    NotFinite { input: usize },
    #[error("slice {slice} has {rows} rows in units of {unit_rows}")]
    Unit { slice: usize, rows: u64, unit_rows: u64 },
    #[error("the merged pseudo-gradient is not finite")]
    Overflow,
}

/// Merges all `inputs` without any filter and without clipping. A single input (of weight > 0) comes back unchanged,
/// a unit that is zero in every input is zero.
pub fn merge(slices: &[Slice], inputs: &[Input]) -> Result<Merged, MergeError> {
    let merge = Prepared::new(slices, inputs)?;
    let plain = NormVerdict { outcome: Reason::None, scales: vec![1.0; merge.units.len()] };
    merge.combine(inputs, &vec![plain; inputs.len()])
}

/// The whole robust merge: norm gate and per-unit clipping (from three contributions on), leave-one-out direction
/// filter (from six on), then [`merge`] of what is left. All statistics are in [`Merged::inputs`].
pub fn robust_merge(slices: &[Slice], inputs: &[Input]) -> Result<Merged, MergeError> {
    let merge = Prepared::new(slices, inputs)?;
    let votes: Vec<bool> = inputs.iter().map(|input| input.weight > 0).collect();
    let mut verdicts = gates::norm_gate(&merge.norms, &votes);
    gates::leave_one_out(&merge.units, inputs, &merge.norms, &mut verdicts);
    merge.combine(inputs, &verdicts)
}

/// A merge unit: a range of the flat fragment buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    pub start: usize,
    pub end: usize,
    pub rule: MergeRule,
}

impl Unit {
    pub(crate) fn of<'a>(&self, values: &'a [f32]) -> &'a [f32] {
        &values[self.start..self.end]
    }
}

/// The merge units of a fragment in buffer order. Slices come from a plan that [`crate::plan::check`] accepted.
pub(crate) fn units(slices: &[Slice]) -> Result<Vec<Unit>, MergeError> {
    let mut units = Vec::new();
    let mut start = 0;
    for (index, slice) in slices.iter().enumerate() {
        let (rows, unit_rows) = (slice.row_end.saturating_sub(slice.row_start), slice.unit_rows);
        let whole = unit_rows > 0 && rows > 0 && rows % unit_rows == 0;
        let Some(elements) = unit_rows.checked_mul(slice.row_elements).filter(|elements| whole && *elements > 0) else {
            return Err(MergeError::Unit { slice: index, rows, unit_rows });
        };
        let elements = elements as usize;
        for _ in 0..rows / unit_rows {
            units.push(Unit { start, end: start + elements, rule: slice.rule });
            start += elements;
        }
    }
    Ok(units)
}

/// ‖values‖₂ of each merge unit, in buffer order: what [`gates::norm_gate`] judges.
pub fn unit_norms(slices: &[Slice], values: &[f32]) -> Result<Vec<f64>, MergeError> {
    let units = units(slices)?;
    check_length(0, values, units.last().map_or(0, |unit| unit.end))?;
    Ok(units.par_iter().map(|unit| sum_of_squares(unit.of(values)).sqrt()).collect())
}

fn check_length(input: usize, values: &[f32], expected: usize) -> Result<(), MergeError> {
    if values.len() == expected {
        return Ok(());
    }
    Err(MergeError::Length { input, got: values.len() as u64, expected: expected as u64 })
}

/// Checked inputs with their units and norms `[input][unit]`.
struct Prepared {
    units: Vec<Unit>,
    norms: Vec<Vec<f64>>,
}

impl Prepared {
    fn new(slices: &[Slice], inputs: &[Input]) -> Result<Self, MergeError> {
        if inputs.iter().all(|input| input.weight == 0) {
            return Err(MergeError::NoInput);
        }
        if inputs.len() > INPUTS_MAX {
            return Err(MergeError::TooManyInputs { inputs: inputs.len() });
        }
        let units = units(slices)?;
        let elements = units.last().map_or(0, |unit| unit.end);
        let mut norms = Vec::with_capacity(inputs.len());
        for (index, input) in inputs.iter().enumerate() {
            check_length(index, input.values, elements)?;
            if input.weight > WEIGHT_MAX {
                return Err(MergeError::Weight { input: index, weight: input.weight });
            }
            let of_units: Vec<f64> = units.par_iter().map(|unit| sum_of_squares(unit.of(input.values)).sqrt()).collect();
            if of_units.iter().any(|norm| !norm.is_finite()) {
                return Err(MergeError::NotFinite { input: index });
            }
            norms.push(of_units);
        }
        Ok(Self { units, norms })
    }

    fn combine(&self, inputs: &[Input], verdicts: &[NormVerdict]) -> Result<Merged, MergeError> {
        let members: Vec<usize> = (0..inputs.len()).filter(|index| verdicts[*index].outcome == Reason::None).collect();
        let elements = self.units.last().map_or(0, |unit| unit.end);
        let mut delta = vec![0.0; elements];
        let mut outputs = Vec::with_capacity(self.units.len());
        let mut rest = delta.as_mut_slice();
        for unit in &self.units {
            let (output, behind) = rest.split_at_mut(unit.end - unit.start);
            outputs.push(output);
            rest = behind;
        }
        let of_units: Vec<UnitReport> = outputs
            .into_par_iter()
            .enumerate()
            .map(|(index, output)| {
                let parts: Vec<Part> = members
                    .iter()
                    .map(|member| Part {
                        values: self.units[index].of(inputs[*member].values),
                        weight: inputs[*member].weight,
                        scale: verdicts[*member].scales[index],
                        norm: self.norms[*member][index],
                    })
                    .collect();
                merge_unit(self.units[index].rule, &parts, output)
            })
            .collect();
        if !all_finite(&delta) {
            return Err(MergeError::Overflow);
        }
        let merged_norm = of_units.iter().map(|unit| unit.squares).sum::<f64>().sqrt();
        let reports = (0..inputs.len()).map(|index| {
            let (norms, verdict) = (&self.norms[index], &verdicts[index]);
            let norm = norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt();
            let mut report =
                InputReport { outcome: verdict.outcome, norm_micro: (norm * MICRO).round() as u64, clip_ppm: 0, cosine_ppm: 0 };
            if let Ok(member) = members.binary_search(&index) {
                let clipped = norms.iter().zip(&verdict.scales).map(|(norm, scale)| (norm * scale).powi(2)).sum::<f64>().sqrt();
                let product: f64 = of_units.iter().map(|unit| unit.products[member]).sum();
                report.clip_ppm = if norm > 0.0 { (clipped / norm * PPM).round() as u32 } else { PPM as u32 };
                if clipped * merged_norm > 0.0 {
                    report.cosine_ppm = (product / (clipped * merged_norm) * PPM).round() as i32;
                }
            }
            report
        });
        let inputs = reports.collect();
        Ok(Merged { delta, norm_micro: (merged_norm * MICRO).round() as u64, inputs })
    }
}

/// One contribution to one unit.
struct Part<'a> {
    values: &'a [f32],
    weight: u64,
    /// Clip factor, at most 1.
    scale: f64,
    /// ‖values‖₂ before clipping.
    norm: f64,
}

struct UnitReport {
    /// Squared norm of the merged unit.
    squares: f64,
    /// Dot product of each clipped part with the merged unit.
    products: Vec<f64>,
}

fn merge_unit(rule: MergeRule, parts: &[Part], output: &mut [f32]) -> UnitReport {
    let voting: Vec<&Part> = parts.iter().filter(|part| part.weight > 0).collect();
    match (rule, voting.as_slice()) {
        (_, [only]) if only.scale == 1.0 => output.copy_from_slice(only.values),
        (MergeRule::Mean, voting) => weighted_mean(voting, output),
        (MergeRule::Rda, voting) => radial_directional_average(voting, output),
    }
    UnitReport { squares: sum_of_squares(output), products: parts.iter().map(|part| part.scale * dot(part.values, output)).collect() }
}

/// Σ w s v / Σ w over all parts.
fn weighted_mean(parts: &[&Part], output: &mut [f32]) {
    let total: f64 = parts.iter().map(|part| part.weight as f64).sum();
    let terms: Vec<(&[f32], f64)> =
        parts.iter().filter(|part| part.norm > 0.0).map(|part| (part.values, part.weight as f64 * part.scale / total)).collect();
    let mut sums = [0.0; BLOCK_ELEMENTS];
    for (block, output) in output.chunks_mut(BLOCK_ELEMENTS).enumerate() {
        accumulate(&terms, block * BLOCK_ELEMENTS, &mut sums[..output.len()]);
        for (value, sum) in output.iter_mut().zip(&sums) {
            *value = *sum as f32;
        }
    }
}

/// r · φ(Σ w φ(v)) over the parts that changed the unit, r their weighted median norm.
fn radial_directional_average(parts: &[&Part], output: &mut [f32]) {
    let changed: Vec<&Part> = parts.iter().copied().filter(|part| part.norm > 0.0).collect();
    let total: f64 = changed.iter().map(|part| part.weight as f64).sum();
    let terms: Vec<(&[f32], f64)> = changed.iter().map(|part| (part.values, part.weight as f64 / (total * part.norm))).collect();
    let mut direction = vec![0.0; output.len()];
    let mut squares = 0.0;
    for (block, sums) in direction.chunks_mut(BLOCK_ELEMENTS).enumerate() {
        accumulate(&terms, block * BLOCK_ELEMENTS, sums);
        squares += sum_of_squares(sums);
    }
    let length = squares.sqrt();
    if length < CANCELLED {
        // Also the way of a unit that nobody changed: its mean is zero.
        return weighted_mean(parts, output);
    }
    let radius = weighted_median(changed.iter().map(|part| (part.norm * part.scale, part.weight)).collect());
    let factor = radius / length;
    for (value, component) in output.iter_mut().zip(&direction) {
        *value = (component * factor) as f32;
    }
}

/// `sums[j] = Σ factor · values[start + j]`, terms added in order.
pub(crate) fn accumulate(terms: &[(&[f32], f64)], start: usize, sums: &mut [f64]) {
    sums.fill(0.0);
    for (values, factor) in terms {
        for (sum, value) in sums.iter_mut().zip(&values[start..]) {
            *sum += factor * f64::from(*value);
        }
    }
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
mod tests;
