use super::*;
use crate::fixture::values;
use crate::kernels::Element;
use proptest::prelude::*;
use protocol::{DType, MergeRule};

fn slice(rows: u64, row_elements: u64, unit_rows: u64, rule: MergeRule) -> Slice {
    Slice { tensor: "w".to_owned(), row_start: 0, row_end: rows, row_elements, unit_rows, dtype: DType::Bf16, rule }
}

/// A matrix, three experts and a vector: 40·32 + 3·50 + 70 elements in five units.
fn slices() -> Vec<Slice> {
    vec![slice(40, 32, 40, MergeRule::Rda), slice(3, 50, 1, MergeRule::Rda), slice(70, 1, 70, MergeRule::Mean)]
}

const ELEMENTS: usize = 40 * 32 + 3 * 50 + 70;

fn inputs<'a>(contributions: &'a [Vec<f32>], weights: &[u64]) -> Vec<Input<'a>> {
    contributions.iter().zip(weights).map(|(values, weight)| Input { values, weight: *weight }).collect()
}

fn norm(values: &[f32]) -> f64 {
    f32::squares(values, 1024).sqrt()
}

fn in_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

#[test]
fn a_single_contribution_comes_back_unchanged() {
    let contributions = [values(1, ELEMENTS), values(2, ELEMENTS)];
    for merge in [merge, robust_merge] {
        let merged = merge(&slices(), &inputs(&contributions[..1], &[7])).unwrap();
        assert_eq!(merged.delta, contributions[0]);
        let report = InputReport {
            outcome: Reason::None,
            norm_micro: (norm(&contributions[0]) * 1e6).round() as u64,
            clip_ppm: 1_000_000,
            cosine_ppm: 1_000_000,
            neighbour_ppm: 0,
            rest_ppm: 0,
        };
        assert_eq!(merged.inputs, [report]);
        assert_eq!(merged.norm_micro, report.norm_micro);
        let with_weightless = merge(&slices(), &inputs(&contributions, &[7, 0])).unwrap();
        assert_eq!(with_weightless.delta, contributions[0]);
        assert_eq!(with_weightless.inputs[0], report);
    }
}

#[test]
fn a_matrix_gets_the_mean_direction_at_the_median_radius() {
    let slices = [slice(1, 2, 1, MergeRule::Rda)];
    let contributions = [vec![2.0, 0.0], vec![0.0, 4.0], vec![0.0, 100.0]];
    let merged = merge(&slices, &inputs(&contributions, &[1, 1, 1])).unwrap();
    // Directions (1,0), (0,1), (0,1) sum to (1,2); the median norm is 4.
    let expected = [4.0 / 5f64.sqrt(), 8.0 / 5f64.sqrt()];
    assert!(merged.delta.iter().zip(expected).all(|(got, expected)| (f64::from(*got) - expected).abs() < 1e-6));
    assert_eq!(merged.norm_micro, 4_000_000);
    assert_eq!(merged.inputs[0].cosine_ppm, 447_214);
}

#[test]
fn weights_move_direction_and_radius() {
    let slices = [slice(1, 2, 1, MergeRule::Rda)];
    let contributions = [vec![2.0, 0.0], vec![0.0, 4.0]];
    let tied = merge(&slices, &inputs(&contributions, &[5, 5])).unwrap();
    assert_eq!(tied.norm_micro, 3_000_000, "an exact tie takes the mean of the two middle norms");
    let heavy = merge(&slices, &inputs(&contributions, &[3, 1])).unwrap();
    assert!((f64::from(heavy.delta[0] / heavy.delta[1]) - 3.0).abs() < 1e-6);
    assert!((norm(&heavy.delta) - 2.0).abs() < 1e-6);
}

#[test]
fn a_vector_gets_the_weighted_mean() {
    let slices = [slice(2, 1, 2, MergeRule::Mean)];
    let merged = merge(&slices, &inputs(&[vec![1.0, 0.0], vec![3.0, 8.0]], &[3, 1])).unwrap();
    assert_eq!(merged.delta, [1.5, 2.0]);
}

#[test]
fn experts_are_merged_one_by_one() {
    let slices = [slice(2, 2, 1, MergeRule::Rda)];
    let contributions = [vec![1.0, 0.0, 0.0, 10.0], vec![1.0, 0.0, 0.0, 30.0], vec![1.0, 0.0, 0.0, 20.0]];
    let merged = merge(&slices, &inputs(&contributions, &[1, 1, 1])).unwrap();
    assert!((norm(&merged.delta[..2]) - 1.0).abs() < 1e-6);
    assert!((norm(&merged.delta[2..]) - 20.0).abs() < 1e-5);
}

#[test]
fn a_unit_that_nobody_changed_stays_and_one_that_a_learner_skipped_keeps_the_others_radius() {
    let slices = [slice(2, 2, 1, MergeRule::Rda)];
    let contributions = [vec![0.0, 0.0, 3.0, 4.0], vec![0.0; 4], vec![0.0; 4]];
    let merged = merge(&slices, &inputs(&contributions, &[1, 1, 1])).unwrap();
    assert_eq!(merged.delta[..2], [0.0, 0.0]);
    assert!((norm(&merged.delta[2..]) - 5.0).abs() < 1e-6);
}

#[test]
fn directions_that_cancel_fall_back_to_the_mean() {
    let slices = [slice(1, 2, 1, MergeRule::Rda)];
    let merged = merge(&slices, &inputs(&[vec![3.0, 0.0], vec![-1.0, 0.0]], &[1, 1])).unwrap();
    assert_eq!(merged.delta, [1.0, 0.0]);
    let opposite = merge(&slices, &inputs(&[vec![3.0, 1.0], vec![-3.0, -1.0]], &[1, 1])).unwrap();
    assert_eq!(opposite.delta, [0.0, 0.0]);
}

#[test]
fn the_robust_merge_refuses_and_clips_and_reports_it() {
    let mut contributions: Vec<Vec<f32>> = (0..5).map(|seed| values(seed + 1, ELEMENTS)).collect();
    contributions[3].iter_mut().for_each(|value| *value *= 50.0);
    contributions[4][40 * 32..40 * 32 + 50].iter_mut().for_each(|value| *value *= 6.0);
    let merged = robust_merge(&slices(), &inputs(&contributions, &[1; 5])).unwrap();
    let outcomes: Vec<Reason> = merged.inputs.iter().map(|report| report.outcome).collect();
    assert_eq!(outcomes, [Reason::None, Reason::None, Reason::None, Reason::NormTooLarge, Reason::None]);
    assert_eq!((merged.inputs[3].clip_ppm, merged.inputs[3].cosine_ppm), (0, 0));
    assert!(merged.inputs[4].clip_ppm < 1_000_000);
    let without: Vec<Vec<f32>> = [0, 1, 2, 4].iter().map(|index| contributions[*index].clone()).collect();
    assert_eq!(robust_merge(&slices(), &inputs(&without, &[1; 4])).unwrap().delta, merged.delta);
}

#[test]
fn a_sign_flipped_contribution_among_many_is_left_out() {
    let common = values(99, ELEMENTS);
    let mut contributions: Vec<Vec<f32>> =
        (1..8).map(|seed| values(seed, ELEMENTS).iter().zip(&common).map(|(own, common)| own + common).collect()).collect();
    contributions[6].iter_mut().for_each(|value| *value = -*value);
    let merged = robust_merge(&slices(), &inputs(&contributions, &[1; 7])).unwrap();
    assert_eq!(merged.inputs[6].outcome, Reason::DirectionOutlier);
    assert!(merged.inputs[..6].iter().all(|report| report.outcome == Reason::None && report.cosine_ppm > 500_000));
}

#[test]
fn bad_inputs_are_refused_with_their_reason() {
    let good = values(1, ELEMENTS);
    let merge_of = |values: &[f32], weight| merge(&slices(), &[Input { values: &good, weight: 1 }, Input { values, weight }]);
    assert_eq!(merge(&slices(), &[]), Err(MergeError::NoInput));
    assert_eq!(merge(&slices(), &[Input { values: &good, weight: 0 }]), Err(MergeError::NoInput));
    assert!(matches!(merge_of(&good[1..], 1), Err(MergeError::Length { input: 1, .. })));
    assert!(matches!(merge_of(&good, WEIGHT_MAX + 1), Err(MergeError::Weight { input: 1, .. })));
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = good.clone();
        values[1300] = bad;
        assert_eq!(merge_of(&values, 1), Err(MergeError::NotFinite { input: 1 }));
    }
    assert!(matches!(merge(&[slice(3, 2, 2, MergeRule::Rda)], &[Input { values: &good, weight: 1 }]), Err(MergeError::Unit { .. })));
    let huge = vec![f32::MAX; 4];
    let wide = [slice(1, 4, 1, MergeRule::Rda)];
    let spike = vec![f32::MAX, 0.0, 0.0, 0.0];
    let result = merge(&wide, &[Input { values: &huge, weight: 3 }, Input { values: &spike, weight: 2 }]);
    assert_eq!(result, Err(MergeError::Overflow));
}

#[test]
fn one_thread_and_four_give_the_same_bits() {
    let contributions: Vec<Vec<f32>> = (0..7).map(|seed| values(seed + 1, ELEMENTS)).collect();
    let inputs = inputs(&contributions, &[3, 1, 4, 1, 5, 9, 2]);
    for merge in [merge, robust_merge] {
        let one = in_threads(1, || merge(&slices(), &inputs).unwrap());
        let four = in_threads(4, || merge(&slices(), &inputs).unwrap());
        assert_eq!(one, four);
    }
}

#[test]
fn the_bits_of_a_known_merge_never_change() {
    let contributions: Vec<Vec<f32>> = (0..7).map(|seed| values(seed + 1, ELEMENTS)).collect();
    let merged = robust_merge(&slices(), &inputs(&contributions, &[3, 1, 4, 1, 5, 9, 2])).unwrap();
    let bytes: Vec<u8> = merged.delta.iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(protocol::Digest::blake3(&bytes).to_string(), "23a5f597182df71d0758a34e491d1f01dd4dd755c68501b4f494dcfe9051933e");
}

#[test]
fn the_weighted_median_ignores_zero_weights_and_splits_exact_ties() {
    assert_eq!(weighted_median(vec![]), 0.0);
    assert_eq!(weighted_median(vec![(5.0, 1)]), 5.0);
    assert_eq!(weighted_median(vec![(9.0, 1), (1.0, 1)]), 5.0);
    assert_eq!(weighted_median(vec![(1.0, 1), (2.0, 0), (9.0, 1)]), 5.0);
    assert_eq!(weighted_median(vec![(1.0, 1), (2.0, 1), (9.0, 1)]), 2.0);
    assert_eq!(weighted_median(vec![(1.0, 1), (2.0, 1), (9.0, 5)]), 9.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_merge_is_bounded_by_the_longest_contribution_and_scales_with_the_inputs(
        weights in proptest::collection::vec(1u64..1000, 1..6),
        seed in 1u64..1000,
    ) {
        let contributions: Vec<Vec<f32>> = (0..weights.len() as u64).map(|index| values(seed + index, ELEMENTS)).collect();
        let merged = merge(&slices(), &inputs(&contributions, &weights)).unwrap();
        for unit in Layout::new(Encoding::F32, &slices()).units {
            let longest = contributions.iter().map(|values| norm(&values[unit.start..unit.end])).fold(0.0, f64::max);
            prop_assert!(norm(&merged.delta[unit.start..unit.end]) <= longest * 1.000_001);
        }
        // A power of two scales without rounding.
        let doubled: Vec<Vec<f32>> = contributions.iter().map(|values| values.iter().map(|value| 2.0 * value).collect()).collect();
        let weights: Vec<u64> = weights.iter().map(|weight| 4 * weight).collect();
        let scaled = merge(&slices(), &inputs(&doubled, &weights)).unwrap();
        prop_assert!(merged.delta.iter().zip(&scaled.delta).all(|(single, double)| (2.0 * single - double).abs() <= double.abs() * 1e-6));
    }
}
