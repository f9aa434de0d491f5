//! Filters that compare contributions with each other before they are merged.
//!
//! 1. **Norm gate**, from [`NORM_GATE_MIN`] contributions on. A contribution whose norm over the fragment is more than
//!    [`NORM_REJECT`] times the median is refused. Per unit, a contribution is scaled by
//!    min(1, [`NORM_CLIP`] · median/norm). Refusal looks at the fragment and not at each unit because a single gain or a
//!    seldom routed expert of an honest learner may well move ten times the median; clipping bounds such a unit anyway.
//! 2. **Mutual-cosine filter**, from [`CROWD_MIN`] contributions on. Honest pseudo-gradients are nearly orthogonal to each other,
//!    those of colluders and copiers are not. A contribution whose mean cosine to its [`NEIGHBOURS`] nearest lies more than
//!    [`NEIGHBOUR_MADS`] median absolute deviations above the median is left out. Cosines are estimated from sketches.
//! 3. **Leave-one-out filter**, from [`CROWD_MIN`] contributions on. A contribution whose cosine to the mean direction of all
//!    others lies more than [`LEAVE_ONE_OUT_MADS`] median absolute deviations below the median cosine is left out.
//!
//! Filters 2 and 3 leave out fewer than half of what they judge, because their limits lie beyond the median; a majority that acts
//! together is the measure of all others and passes. That case is for audits.
//!
//! Medians run over contributions that are not zero there. The rules and their constants are those of a simulation with
//! attackers, which the tests repeat.

use protocol::Reason;
use rayon::prelude::*;

use crate::kernels::squares_of_sums;
use crate::merge::weighted_median;

pub use crate::merge::leave_one_out_keeps;

/// Fewest contributions for which a median norm means something.
pub const NORM_GATE_MIN: usize = 3;
/// Contributions longer than this many medians are refused.
pub const NORM_REJECT: f64 = 10.0;
/// Units longer than this many medians are shortened to it.
pub const NORM_CLIP: f64 = 1.5;
/// Fewest contributions for which the spread of cosines means something.
pub const CROWD_MIN: usize = 6;
/// How many nearest others count.
pub const NEIGHBOURS: usize = 5;
/// Median absolute deviations above the median closeness that are still accepted.
pub const NEIGHBOUR_MADS: f64 = 6.0;
/// Closeness is not known better than this: the spread is taken to be at least so large. Without it, few contributions that
/// happen to be equally close to each other would make the next one an outlier.
pub const NEIGHBOUR_SPREAD_MIN: f64 = 0.005;
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

/// Mean cosine of each sketch to its [`NEIGHBOURS`] nearest.
pub(crate) fn nearest_cosines(sketches: &[Vec<f64>]) -> Vec<f64> {
    let lengths: Vec<f64> = sketches.iter().map(|sketch| squares_of_sums(sketch).sqrt()).collect();
    let of_sketch = |(number, sketch): (usize, &Vec<f64>)| {
        let cosine = |other: usize| {
            let product: f64 = sketch.iter().zip(&sketches[other]).map(|(left, right)| left * right).sum();
            let length = lengths[number] * lengths[other];
            if length > 0.0 { product / length } else { 0.0 }
        };
        let mut cosines: Vec<f64> = (0..sketches.len()).filter(|other| *other != number).map(cosine).collect();
        cosines.sort_by(|left, right| right.total_cmp(left));
        let near = &cosines[..cosines.len().min(NEIGHBOURS)];
        near.iter().sum::<f64>() / near.len().max(1) as f64
    };
    sketches.par_iter().enumerate().map(of_sketch).collect()
}

/// Which are far closer to their nearest than the others are.
pub(crate) fn too_similar(nearest: &[f64]) -> Vec<bool> {
    let (centre, spread) = centre_and_spread(nearest);
    let limit = centre + NEIGHBOUR_MADS * MAD_TO_SIGMA * spread.max(NEIGHBOUR_SPREAD_MIN);
    nearest.iter().map(|nearest| *nearest > limit).collect()
}

/// Cosines of unit vectors u_m to the sum of the others, from their products with the sum S of all and ‖S‖².
///
/// u_m·(S − u_m) = u_m·S − 1 and ‖S − u_m‖² = ‖S‖² − 2 u_m·S + 1.
pub(crate) fn rest_cosines(sum_squares: f64, products: &[f64]) -> Vec<f64> {
    let cosine = |product: &f64| {
        let rest = (sum_squares - 2.0 * product + 1.0).max(0.0).sqrt();
        if rest > REST_MIN { (product - 1.0) / rest } else { 0.0 }
    };
    products.iter().map(cosine).collect()
}

/// Which cosines lie far below the others.
pub(crate) fn stand_alone(cosines: &[f64]) -> Vec<bool> {
    let (centre, spread) = centre_and_spread(cosines);
    let limit = centre - LEAVE_ONE_OUT_MADS * MAD_TO_SIGMA * (spread + MAD_FLOOR);
    cosines.iter().map(|cosine| *cosine < limit).collect()
}

/// Median and median absolute deviation.
fn centre_and_spread(values: &[f64]) -> (f64, f64) {
    let median = |values: &mut dyn Iterator<Item = f64>| weighted_median(values.map(|value| (value, 1)).collect());
    let centre = median(&mut values.iter().copied());
    (centre, median(&mut values.iter().map(|value| (value - centre).abs())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::values;
    use protocol::{DType, MergeRule, Slice};

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
