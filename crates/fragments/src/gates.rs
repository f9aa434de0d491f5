//! Filters that compare contributions with each other before they are merged.
//!
//! 1. **Norm gate**, from [`NORM_GATE_MIN`] contributions on. A contribution whose norm over the fragment is more than
//!    [`NORM_REJECT`] times the median is refused. Per unit, a contribution is scaled by
//!    min(1, [`NORM_CLIP`] · median/norm). Refusal looks at the fragment and not at each unit because a single gain or a
//!    seldom routed expert of an honest learner may well move ten times the median; clipping bounds such a unit anyway.
//! 2. **Leave-one-out filter**, from [`LEAVE_ONE_OUT_MIN`] contributions on. A contribution whose cosine to the mean
//!    direction of all others lies more than [`LEAVE_ONE_OUT_MADS`] median absolute deviations below the median cosine is left out.
//!
//! Medians run over contributions that are not zero there. The mutual-cosine filter against colluders, which needs
//! sketches of all contributions, is not part of this module.

use protocol::{Reason, Slice};
use rayon::prelude::*;

use crate::merge::{BLOCK_ELEMENTS, Input, MergeError, Unit, accumulate, unit_norms, units, weighted_median};
use crate::number::{dot, sum_of_squares};

/// Fewest contributions for which a median norm means something.
pub const NORM_GATE_MIN: usize = 3;
/// Contributions longer than this many medians are refused.
pub const NORM_REJECT: f64 = 10.0;
/// Units longer than this many medians are shortened to it.
pub const NORM_CLIP: f64 = 1.5;
/// Fewest contributions for which the spread of cosines means something.
pub const LEAVE_ONE_OUT_MIN: usize = 6;
/// Median absolute deviations below the median that are still accepted.
pub const LEAVE_ONE_OUT_MADS: f64 = 5.0;

/// From a median absolute deviation to the standard deviation of a normal distribution.
const MAD_TO_SIGMA: f64 = 1.4826;
/// Keeps rounding from telling apart contributions that are equal.
const MAD_FLOOR: f64 = 1e-9;
/// A sum of directions shorter than this has no direction of its own.
const REST_MIN: f64 = 1e-9;

/// The gate's answer for one contribution.
#[derive(Clone, Debug, PartialEq)]
pub struct NormVerdict {
    /// [`Reason::None`] if it may be merged.
    pub outcome: Reason,
    /// Clip factor of each unit, at most 1.
    pub scales: Vec<f64>,
}

/// Judges contributions by their norms `[contribution][unit]` (see [`unit_norms`]). Where `votes` is false, the
/// contribution is judged but has no influence on the medians.
pub fn norm_gate(norms: &[Vec<f64>], votes: &[bool]) -> Vec<NormVerdict> {
    let units = norms.first().map_or(0, Vec::len);
    let totals: Vec<f64> = norms.iter().map(|norms| norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt()).collect();
    let voters =
        |accepted: &dyn Fn(usize) -> bool| -> Vec<usize> { (0..norms.len()).filter(|index| votes[*index] && accepted(*index)).collect() };
    let total_limit = limit(voters(&|_| true).into_iter().map(|index| totals[index]), NORM_REJECT);
    let accepted: Vec<bool> = totals.iter().map(|total| *total <= total_limit).collect();
    let voters = voters(&|index| accepted[index]);
    let limits: Vec<f64> = (0..units).map(|unit| limit(voters.iter().map(|index| norms[*index][unit]), NORM_CLIP)).collect();
    let verdict = |(norms, accepted): (&Vec<f64>, &bool)| NormVerdict {
        outcome: if *accepted { Reason::None } else { Reason::NormTooLarge },
        scales: norms.iter().zip(&limits).map(|(norm, limit)| if norm > limit { limit / norm } else { 1.0 }).collect(),
    };
    norms.iter().zip(&accepted).map(verdict).collect()
}

/// `factor` times the median of the norms that are not zero; no limit where they are too few.
fn limit(norms: impl Iterator<Item = f64>, factor: f64) -> f64 {
    let nonzero: Vec<(f64, u64)> = norms.filter(|norm| *norm > 0.0).map(|norm| (norm, 1)).collect();
    if nonzero.len() < NORM_GATE_MIN { f64::INFINITY } else { factor * weighted_median(nonzero) }
}

/// The leave-one-out filter on its own, over contributions that all take part: whether each is kept.
pub fn leave_one_out_keeps(slices: &[Slice], inputs: &[&[f32]]) -> Result<Vec<bool>, MergeError> {
    let units = units(slices)?;
    let norms = inputs.iter().map(|values| unit_norms(slices, values)).collect::<Result<Vec<_>, _>>()?;
    let inputs: Vec<Input> = inputs.iter().map(|values| Input { values, weight: 1 }).collect();
    let mut verdicts = vec![NormVerdict { outcome: Reason::None, scales: vec![1.0; units.len()] }; inputs.len()];
    leave_one_out(&units, &inputs, &norms, &mut verdicts);
    Ok(verdicts.iter().map(|verdict| verdict.outcome == Reason::None).collect())
}

/// Marks accepted contributions of weight > 0 that stand alone as [`Reason::DirectionOutlier`]. Directions are those of the clipped
/// contributions.
pub(crate) fn leave_one_out(units: &[Unit], inputs: &[Input], norms: &[Vec<f64>], verdicts: &mut [NormVerdict]) {
    let clipped_norm =
        |index: usize| norms[index].iter().zip(&verdicts[index].scales).map(|(norm, scale)| (norm * scale).powi(2)).sum::<f64>().sqrt();
    let members: Vec<(usize, f64)> = (0..inputs.len())
        .filter(|index| inputs[*index].weight > 0 && verdicts[*index].outcome == Reason::None)
        .map(|index| (index, clipped_norm(index)))
        .filter(|(_, norm)| *norm > 0.0)
        .collect();
    if members.len() < LEAVE_ONE_OUT_MIN {
        return;
    }
    // With directions u_m and their sum S: u_m·(S − u_m) = u_m·S − 1 and ‖S − u_m‖² = ‖S‖² − 2 u_m·S + 1.
    let of_units: Vec<(f64, Vec<f64>)> = units
        .par_iter()
        .enumerate()
        .map(|(unit_index, unit)| {
            let terms: Vec<(&[f32], f64)> =
                members.iter().map(|(index, norm)| (unit.of(inputs[*index].values), verdicts[*index].scales[unit_index] / norm)).collect();
            products_with_sum(&terms)
        })
        .collect();
    let sum_squares: f64 = of_units.iter().map(|(squares, _)| squares).sum();
    let cosines: Vec<f64> = (0..members.len())
        .map(|member| {
            let product: f64 = of_units.iter().map(|(_, products)| products[member]).sum();
            let rest = (sum_squares - 2.0 * product + 1.0).max(0.0).sqrt();
            if rest > REST_MIN { (product - 1.0) / rest } else { 0.0 }
        })
        .collect();
    let median = |values: Vec<f64>| weighted_median(values.into_iter().map(|value| (value, 1)).collect());
    let centre = median(cosines.clone());
    let spread = median(cosines.iter().map(|cosine| (cosine - centre).abs()).collect()) + MAD_FLOOR;
    for ((index, _), cosine) in members.iter().zip(&cosines) {
        if *cosine < centre - LEAVE_ONE_OUT_MADS * MAD_TO_SIGMA * spread {
            verdicts[*index].outcome = Reason::DirectionOutlier;
        }
    }
}

/// With directions `factor · values` and their sum S: (‖S‖², product of each direction with S), over one unit.
fn products_with_sum(terms: &[(&[f32], f64)]) -> (f64, Vec<f64>) {
    let elements = terms.first().map_or(0, |(values, _)| values.len());
    let (mut squares, mut products) = (0.0, vec![0.0; terms.len()]);
    let mut sums = [0.0; BLOCK_ELEMENTS];
    for start in (0..elements).step_by(BLOCK_ELEMENTS) {
        let end = (start + BLOCK_ELEMENTS).min(elements);
        let sums = &mut sums[..end - start];
        accumulate(terms, start, sums);
        squares += sum_of_squares(sums);
        for (product, (values, factor)) in products.iter_mut().zip(terms) {
            *product += factor * dot(&values[start..end], sums);
        }
    }
    (squares, products)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::values;
    use protocol::{DType, MergeRule};

    fn slices(elements: u64) -> Vec<Slice> {
        let slice = Slice {
            tensor: "w".to_owned(),
            row_start: 0,
            row_end: 2,
            row_elements: elements / 2,
            unit_rows: 1,
            dtype: DType::Bf16,
            rule: MergeRule::Rda,
        };
        vec![slice]
    }

    fn outcomes(norms: &[[f64; 2]]) -> Vec<(Reason, Vec<f64>)> {
        let norms: Vec<Vec<f64>> = norms.iter().map(|norms| norms.to_vec()).collect();
        norm_gate(&norms, &vec![true; norms.len()]).into_iter().map(|verdict| (verdict.outcome, verdict.scales)).collect()
    }

    #[test]
    fn a_norm_over_ten_medians_is_refused_and_one_over_one_and_a_half_is_clipped_to_it() {
        let found = outcomes(&[[1.0, 1.0], [1.0, 1.0], [1.0, 4.0], [100.0, 1.0]]);
        assert_eq!(found[0], (Reason::None, vec![1.0, 1.0]));
        assert_eq!(found[2], (Reason::None, vec![1.0, 1.5 / 4.0]));
        assert_eq!(found[3].0, Reason::NormTooLarge);
    }

    #[test]
    fn one_wild_unit_is_clipped_without_refusing_the_contribution() {
        let found = outcomes(&[[10.0, 0.001], [10.0, 0.001], [10.0, 0.1]]);
        assert_eq!(found[2].0, Reason::None);
        assert!((found[2].1[1] - 0.015).abs() < 1e-12);
    }

    #[test]
    fn two_contributions_are_not_enough_to_judge_norms() {
        assert!(outcomes(&[[1.0, 1.0], [1000.0, 1.0]]).iter().all(|found| *found == (Reason::None, vec![1.0, 1.0])));
    }

    #[test]
    fn zero_units_and_contributions_without_weight_have_no_vote_on_the_median() {
        let found = outcomes(&[[1.0, 0.0], [1.0, 0.0], [1.0, 5.0], [1.0, 6.0]]);
        assert_eq!(found[3].1, [1.0, 1.0], "only two contributions changed the second unit");
        let norms = vec![vec![1.0], vec![1.0], vec![1.0], vec![100.0], vec![100.0], vec![100.0], vec![100.0]];
        let votes = [true, true, true, false, false, false, false];
        let found = norm_gate(&norms, &votes);
        assert_eq!(found[0].outcome, Reason::None);
        assert_eq!(found[3].outcome, Reason::NormTooLarge);
    }

    #[test]
    fn a_reversed_direction_among_six_stands_out_and_among_five_is_not_judged() {
        let common = values(1, 4000);
        let mix = |seed: u64, sign: f32| -> Vec<f32> {
            common.iter().zip(values(seed, 4000)).map(|(common, own)| sign * 0.3 * common + own).collect()
        };
        let mut contributions: Vec<Vec<f32>> = (10..17).map(|seed| mix(seed, 1.0)).collect();
        contributions.push(mix(20, -1.0));
        let inputs: Vec<&[f32]> = contributions.iter().map(Vec::as_slice).collect();
        let kept = leave_one_out_keeps(&slices(4000), &inputs).unwrap();
        assert_eq!(kept, [true, true, true, true, true, true, true, false]);
        assert!(leave_one_out_keeps(&slices(4000), &inputs[3..]).unwrap().into_iter().all(|kept| kept));
    }

    #[test]
    fn equal_contributions_are_all_kept() {
        let same = values(3, 1000);
        let kept = leave_one_out_keeps(&slices(1000), &[same.as_slice(); 8]).unwrap();
        assert!(kept.into_iter().all(|kept| kept));
    }
}
