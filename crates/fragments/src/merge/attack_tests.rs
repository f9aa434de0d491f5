//! The robust merge against the attacks of a published simulation (`tests/reference/robust_merge_sim.py`): a hundred learners in
//! 32,768 dimensions, honest ones at a mutual cosine of 0.02. The table of that simulation gives, for the filters with the
//! median radius, the cosine of the merged vector to the true direction, and its norm.

use protocol::{Digest, Reason};

use super::*;
use crate::fixture;

const DIMENSIONS: usize = 32_768;
const LEARNERS: usize = 100;
const COSINE: f64 = 0.02;

/// Normal deviates from a counter: Box–Muller over SplitMix64.
struct Normal(u64);

impl Normal {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ word >> 31) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn next(&mut self) -> f64 {
        let (radius, angle) = ((-2.0 * (1.0 - self.uniform()).ln()).sqrt(), self.uniform() * std::f64::consts::TAU);
        radius * angle.cos()
    }

    fn direction(&mut self) -> Vec<f64> {
        unit((0..DIMENSIONS).map(|_| self.next()).collect())
    }
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(left, right)| left * right).sum()
}

fn unit(mut vector: Vec<f64>) -> Vec<f64> {
    let length = dot(&vector, &vector).sqrt();
    vector.iter_mut().for_each(|value| *value /= length);
    vector
}

fn combine(left: f64, first: &[f64], right: f64, second: &[f64]) -> Vec<f64> {
    first.iter().zip(second).map(|(first, second)| left * first + right * second).collect()
}

/// The true direction and `count` honest contributions.
fn honest(random: &mut Normal, count: usize, cosine: f64) -> (Vec<f64>, Vec<Vec<f64>>) {
    let truth = random.direction();
    let learner = |_| {
        let noise = random.direction();
        let noise = unit(combine(1.0, &noise, -dot(&noise, &truth), &truth));
        let radius = (0.2 * random.next()).exp();
        combine(radius * cosine.sqrt(), &truth, radius * (1.0 - cosine).sqrt(), &noise)
    };
    let learners = (0..count).map(learner).collect();
    (truth, learners)
}

fn mean_and_deviation(vectors: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
    let count = vectors.len() as f64;
    let mean: Vec<f64> = (0..DIMENSIONS).map(|at| vectors.iter().map(|vector| vector[at]).sum::<f64>() / count).collect();
    let variance = |at: usize| vectors.iter().map(|vector| (vector[at] - mean[at]).powi(2)).sum::<f64>() / count;
    let deviation = (0..DIMENSIONS).map(|at| variance(at).sqrt()).collect();
    (mean, deviation)
}

fn median_norm(vectors: &[Vec<f64>]) -> f64 {
    weighted_median(vectors.iter().map(|vector| (dot(vector, vector).sqrt(), 1)).collect())
}

/// Merges and measures: cosine to the truth, norm, reports.
fn merged(truth: &[f64], vectors: &[Vec<f64>], robust: bool) -> Result<(f64, f64, Vec<InputReport>), MergeError> {
    let narrow: Vec<Vec<f32>> = vectors.iter().map(|vector| vector.iter().map(|value| *value as f32).collect()).collect();
    let inputs: Vec<Input> = narrow.iter().map(|values| Input { values, weight: 1 }).collect();
    let slices = [fixture::slice(1, DIMENSIONS as u64, 1)];
    let result = if robust { robust_merge(&slices, &inputs) } else { merge(&slices, &inputs) }?;
    let delta: Vec<f64> = result.delta.iter().map(|value| f64::from(*value)).collect();
    let norm = dot(&delta, &delta).sqrt();
    Ok((dot(&delta, truth) / norm, norm, result.inputs))
}

/// Attackers replace the last of the hundred.
fn attacked(seed: u64, attackers: usize, attack: impl Fn(&mut Normal, &[Vec<f64>]) -> Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let mut random = Normal(seed);
    let (truth, mut vectors) = honest(&mut random, LEARNERS - attackers, COSINE);
    let bad = attack(&mut random, &vectors);
    assert_eq!(bad.len(), attackers);
    vectors.extend(bad);
    (truth, vectors)
}

#[track_caller]
fn check((truth, vectors): (Vec<f64>, Vec<Vec<f64>>), cosine: f64, norm: f64) -> Vec<InputReport> {
    let (found_cosine, found_norm, reports) = merged(&truth, &vectors, true).unwrap();
    assert!((found_cosine - cosine).abs() < 0.03 && (found_norm - norm).abs() < 0.08, "{found_cosine:.3} / {found_norm:.3}");
    reports
}

#[test]
fn without_attackers_nobody_is_left_out_and_nothing_is_lost() {
    let reports = check(attacked(1, 0, |_, _| Vec::new()), 0.82, 1.00);
    assert!(reports.iter().all(|report| report.outcome == Reason::None));
}

#[test]
fn ten_learners_who_flip_signs_at_ten_times_the_norm_change_nothing() {
    check(attacked(2, 10, |_, honest| honest[..10].iter().map(|vector| combine(-10.0, vector, 0.0, vector)).collect()), 0.79, 1.01);
}

#[test]
fn a_hundredfold_norm_is_refused() {
    let scenario = attacked(3, 1, |_, honest| vec![combine(100.0, &honest[0], 0.0, &honest[0])]);
    let reports = check(scenario, 0.82, 1.00);
    assert_eq!(reports[99].outcome, Reason::NormTooLarge);
}

#[test]
fn a_quarter_that_colludes_reverses_the_plain_merge_and_not_the_robust_one() {
    let against_mean = |honest: &[Vec<f64>]| unit(mean_and_deviation(honest).0);
    let identical = attacked(4, 25, |_, honest| {
        let (direction, radius) = (against_mean(honest), median_norm(honest));
        vec![combine(-radius, &direction, 0.0, &direction); 25]
    });
    let (plain, _, _) = merged(&identical.0, &identical.1, false).unwrap();
    assert!(plain < -0.7, "{plain}");
    let reports = check(identical, 0.78, 1.02);
    assert!(reports[75..].iter().all(|report| report.outcome == Reason::TooSimilar && report.neighbour_ppm > 990_000));
    assert!(reports[..75].iter().all(|report| report.outcome == Reason::None));
    let jittered = attacked(5, 25, |random, honest| {
        let (direction, radius, half) = (against_mean(honest), median_norm(honest), 0.5f64.sqrt());
        (0..25).map(|_| combine(-radius * half, &direction, radius * half, &random.direction())).collect()
    });
    let reports = check(jittered, 0.78, 0.96);
    assert!(reports[75..].iter().all(|report| report.outcome == Reason::TooSimilar));
    let a_little = attacked(6, 25, |_, honest| {
        let (mean, deviation) = mean_and_deviation(honest);
        vec![combine(1.0, &mean, -1.0, &deviation); 25]
    });
    let reports = check(a_little, 0.78, 0.98);
    assert!(reports[75..].iter().all(|report| report.outcome == Reason::TooSimilar));
}

#[test]
fn copies_of_one_learner_are_left_out_with_their_original() {
    let (truth, mut vectors) = honest(&mut Normal(7), 10, COSINE);
    let copy = vectors[0].clone();
    vectors.extend(std::iter::repeat_n(copy, 3));
    let (_, _, reports) = merged(&truth, &vectors, true).unwrap();
    let similar: Vec<usize> = (0..13).filter(|number| reports[*number].outcome == Reason::TooSimilar).collect();
    assert_eq!(similar, [0, 10, 11, 12]);
}

#[test]
fn honest_learners_of_any_number_and_likeness_are_kept() {
    for cosine in [0.02, 0.3, 0.8] {
        for count in [6, 7, 9, 16] {
            for seed in 0..4 {
                let (truth, vectors) = honest(&mut Normal(1000 * seed + count as u64), count, cosine);
                let (_, _, reports) = merged(&truth, &vectors, true).unwrap();
                let similar = reports.iter().filter(|report| report.outcome == Reason::TooSimilar).count();
                assert_eq!(similar, 0, "{count} learners at {cosine}");
            }
        }
    }
}

#[test]
fn the_sketch_estimates_cosines() {
    let mut random = Normal(9);
    let (_, vectors) = honest(&mut random, 12, 0.3);
    let narrow: Vec<Vec<f32>> = vectors.iter().map(|vector| vector.iter().map(|value| *value as f32).collect()).collect();
    let slices = [fixture::slice(3, 7000, 1), fixture::slice(1, DIMENSIONS as u64 - 21_000, 1)];
    let header = PayloadHeader::of_slices(protocol::documents::Codec::Bf16, &slices, Digest::ZERO, 0, 0);
    let layout = checked_layout(Encoding::F32, &slices).unwrap();
    assert_eq!(header.elements() as usize, layout.elements);
    let seed = sketch::Seed::from_norms(&[vec![1.0]]);
    let sketches: Vec<Vec<f64>> = narrow
        .iter()
        .map(|values| {
            let body: &[u8] = bytemuck::cast_slice(values);
            let voice = Voice { source: &body, body: 0, weight: 1, unit_weights: None };
            sketch::sketch(&layout, &voice, &[1.0; 4], seed).unwrap()
        })
        .collect();
    let cosine = |left: &[f64], right: &[f64]| dot(left, right) / (dot(left, left) * dot(right, right)).sqrt();
    let mut worst = 0.0f64;
    for left in 0..12 {
        for right in 0..left {
            let difference = cosine(&sketches[left], &sketches[right]) - cosine(&vectors[left], &vectors[right]);
            worst = worst.max(difference.abs());
        }
    }
    assert!(worst < 4.0 / 64.0, "{worst}");
    assert!(worst > 1e-4, "an estimate this good is no sketch");
}

/// `tests/reference/robust_merge_golden.py` applies the functions of the simulation to the same vectors.
#[test]
fn the_reference_implementation_keeps_the_same_learners_and_merges_them_to_the_same_vector() {
    const COUNT: usize = 2000;
    let cases: serde_json::Value = serde_json::from_str(include_str!("../../tests/data/robust_merge.json")).unwrap();
    for case in cases.as_array().unwrap() {
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let flags = |key: &str| -> Vec<bool> { case[key].as_array().unwrap().iter().map(|flag| flag.as_bool().unwrap()).collect() };
        let (learners, common) = (number("learners"), case["common"].as_f64().unwrap() as f32);
        let shared = fixture::values(99, COUNT);
        let row = |learner: usize| -> Vec<f32> {
            let own = fixture::values(learner as u64 + 1, COUNT);
            let scale = 2.0f32.powi(learner as i32 % 3 - 1);
            shared.iter().zip(own).map(|(shared, own)| (common * shared + own) * scale).collect()
        };
        let mut rows: Vec<Vec<f32>> = (0..learners).map(row).collect();
        (0..number("copies")).for_each(|copy| rows[learners - 1 - copy] = rows[0].clone());
        (0..number("flipped")).for_each(|flip| rows[learners - 1 - flip].iter_mut().for_each(|value| *value = -*value));
        let inputs: Vec<Input> = rows.iter().enumerate().map(|(number, values)| Input { values, weight: 1 + number as u64 % 4 }).collect();
        let slices = [fixture::slice(1, COUNT as u64, 1)];
        let merged = robust_merge(&slices, &inputs).unwrap();
        let outcomes: Vec<Reason> = merged.inputs.iter().map(|report| report.outcome).collect();
        let distinct: Vec<bool> = outcomes.iter().map(|outcome| *outcome != Reason::TooSimilar).collect();
        let kept: Vec<bool> = outcomes.iter().map(|outcome| *outcome == Reason::None).collect();
        assert_eq!((distinct, &kept), (flags("distinct"), &flags("kept")), "{}", case["name"]);
        // Norms differ by factors of two and four, so some are clipped, which moves only the median radius, and not here.
        let close = |found: f64, expected: f64| (found - expected).abs() < 1e-5 * case["norm"].as_f64().unwrap();
        assert!(close(merged.norm_micro as f64 / 1e6, case["norm"].as_f64().unwrap()), "{}", case["name"]);
        let head = case["head"].as_array().unwrap();
        assert!(merged.delta.iter().zip(head).all(|(found, expected)| close(f64::from(*found), expected.as_f64().unwrap())));
    }
}
