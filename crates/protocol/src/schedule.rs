//! The schedule of outer steps: which fragment, which quorum, how much grace, which weights (`docs/protocol.md`, outer step).

use crate::documents::{Codec, PPM, RunParameters};

/// Where fragments travel as frames, so many versions lie between two keyframes.
pub const KEYFRAME_VERSIONS: u64 = 16;

/// The newest version up to `version` whose keyframe is published: with a bf16 downlink every one, else each
/// [`KEYFRAME_VERSIONS`]th. The versions after it are reached by their frames.
pub fn keyframe_version(down: Codec, version: u64) -> u64 {
    match down {
        Codec::Bf16 => version,
        Codec::Int4 | Codec::TopK => version - version % KEYFRAME_VERSIONS,
    }
}

/// Fragment of outer step `t`: round robin.
pub fn fragment_of(t: u64, fragments: u16) -> u16 {
    (t % u64::from(fragments)) as u16
}

/// Cycle of outer step `t`.
pub fn cycle_of(t: u64, fragments: u16) -> u64 {
    t / u64::from(fragments)
}

/// K = min(max(k_min, ⌈eligible/2⌉), eligible).
pub fn quorum(quorum_min: u16, eligible: usize) -> usize {
    usize::from(quorum_min).max(eligible.div_ceil(2)).min(eligible)
}

/// Grace after the quorum: clamp(γ (τ ξ_step − ξ_quorum − ξ_sync), 0, ξ_step) (Decoupled DiLoCo, equation 3).
pub fn grace_ms(parameters: &RunParameters, step_ms: u64, quorum_ms: u64, sync_ms: u64) -> u64 {
    let window = u64::from(parameters.overlap) * step_ms;
    let left = window.saturating_sub(quorum_ms).saturating_sub(sync_ms);
    (left * u64::from(parameters.grace_ppm) / PPM).min(step_ms)
}

/// Shortest time between two pulls, H ξ / P: shorter would make H smaller than the run says.
pub fn pull_interval_ms(parameters: &RunParameters, step_ms: u64) -> u64 {
    let step_ms = step_ms.max(parameters.step_target_ms);
    u64::from(parameters.inner_steps) * step_ms / u64::from(parameters.fragments)
}

/// The run's learning-rate index at outer step `t`.
pub fn run_step(parameters: &RunParameters, t: u64) -> u64 {
    t * u64::from(parameters.inner_steps) / u64::from(parameters.fragments)
}

/// A contribution as the weights see it.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Tokens that the orchestrator counts.
    pub tokens: u64,
    /// Versions between base and current: 0 or 1.
    pub versions_behind: u64,
}

/// Weights in parts per million of the sum: linear in counted tokens, divided by 1 + versions behind, at most 8 times the
/// median, and at most max(1/8, 1/n) of the sum before this last cap. They add up to at most a million.
pub fn merge_weights(work: &[Work]) -> Vec<u64> {
    let raw: Vec<u128> = work.iter().map(|work| u128::from(work.tokens) * 1024 / u128::from(1 + work.versions_behind)).collect();
    let mut sorted = raw.clone();
    sorted.sort_unstable();
    let Some(median) = sorted.get(sorted.len() / 2) else { return Vec::new() };
    let capped: Vec<u128> = raw.iter().map(|weight| (*weight).min(8 * median)).collect();
    let share = (raw.len() as u128).min(8);
    let ceiling = capped.iter().sum::<u128>().div_ceil(share);
    let limited: Vec<u128> = capped.iter().map(|weight| (*weight).min(ceiling)).collect();
    let sum = limited.iter().sum::<u128>().max(1);
    limited.iter().map(|weight| (weight * u128::from(PPM) / sum) as u64).collect()
}

/// Steps that count: no more than claimed, than the learner's leases allow up to where it stands in them, or than the elapsed time allows at the fastest step the
/// run believes in.
pub fn counted_steps(claimed: u32, lease_steps: u32, elapsed_ms: u64, step_ms_min: u64) -> u32 {
    let by_time = elapsed_ms.checked_div(step_ms_min).map_or(u64::MAX, |steps| steps + 1);
    claimed.min(lease_steps).min(u32::try_from(by_time).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::documents::{AuditParameters, InnerOptimizer, LrSchedule};
    use proptest::prelude::*;

    fn parameters() -> RunParameters {
        RunParameters {
            fragments: 24,
            inner_steps: 24,
            overlap: 2,
            grace_ppm: 800_000,
            cycles: 0,
            outer_lr_ppm: 1_000_000,
            outer_momentum_ppm: 0,
            step_target_ms: 0,
            poll_ms: 100,
            slots: 2,
            quorum_min: 2,
            pull_deadline_ms: 10_000,
            learner_ttl_ms: 5_000,
            sequence_length: 128,
            batch_rows: 4,
            lease_steps: 24,
            codec_up: Codec::Bf16,
            codec_down: Codec::Bf16,
            release_every_cycles: 0,
            inner: InnerOptimizer {
                lr_nano: 1,
                beta1_ppm: 1,
                beta2_ppm: 1,
                eps_pico: 1,
                weight_decay_ppm: 0,
                clip_norm_ppm: 1,
                schedule: LrSchedule { warmup_steps: 0, total_steps: 0, final_ppm: 0 },
            },
            audit: AuditParameters {
                rate_ppm: 1_000_000,
                loss_rows: 16,
                replay_steps: 4,
                replay_tolerance_ppm: 1,
                beacon_blocks: 3,
                opening_ms: 1,
            },
            training: Default::default(),
        }
    }

    fn work(tokens: &[u64]) -> Vec<Work> {
        tokens.iter().map(|tokens| Work { tokens: *tokens, versions_behind: 0 }).collect()
    }

    #[test]
    fn the_quorum_is_half_of_the_eligible_but_never_more_than_there_are() {
        assert_eq!(quorum(2, 3), 2);
        assert_eq!(quorum(2, 1), 1);
        assert_eq!(quorum(1, 3), 2);
        assert_eq!(quorum(8, 100), 50);
        assert_eq!(quorum(8, 101), 51);
        assert_eq!(quorum(8, 17), 9);
        assert_eq!(quorum(8, 16), 8);
        assert_eq!(quorum(8, 9), 8);
        assert_eq!(quorum(8, 4), 4);
        assert_eq!(quorum(8, 0), 0);
    }

    #[test]
    fn the_grace_is_a_part_of_what_quorum_and_merge_leave_of_the_window_and_at_most_a_step() {
        // γ in ppm, τ, ξ, ξ_quorum, ξ_sync; and clamp(γ (τ ξ − ξ_quorum − ξ_sync), 0, ξ) by hand.
        for (grace_ppm, overlap, step_ms, quorum_ms, sync_ms, expected) in [
            (800_000, 2, 1_000, 1_500, 300, 160),
            // Each term moves it.
            (500_000, 2, 1_000, 1_500, 300, 100),
            (800_000, 3, 1_000, 1_500, 300, 960),
            (800_000, 2, 1_100, 1_500, 300, 320),
            (800_000, 2, 1_000, 1_400, 300, 240),
            (800_000, 2, 1_000, 1_500, 400, 80),
            (800_000, 2, 1_000, 1_500, 0, 400),
            (0, 2, 1_000, 0, 0, 0),
            // Never above a step.
            (800_000, 2, 1_000, 751, 0, 999),
            (800_000, 2, 1_000, 750, 0, 1_000),
            (800_000, 2, 1_000, 0, 0, 1_000),
            (800_000, 2, 20_000, 10_000, 4_000, 20_000),
            // Nor below nothing.
            (800_000, 2, 1_000, 1_690, 300, 8),
            (800_000, 2, 1_000, 1_700, 300, 0),
            (800_000, 2, 1_000, 5_000, 0, 0),
            (800_000, 2, 1_000, 0, 5_000, 0),
            (800_000, 1, 1_000, 1_500, 300, 0),
        ] {
            let grace = grace_ms(&RunParameters { grace_ppm, overlap, ..parameters() }, step_ms, quorum_ms, sync_ms);
            assert_eq!(grace, expected, "γ {grace_ppm}, τ {overlap}, ξ {step_ms}, ξ_quorum {quorum_ms}, ξ_sync {sync_ms}");
        }
    }

    #[test]
    fn pulls_are_h_xi_by_p_apart_where_xi_is_the_measured_step_or_a_slower_target() {
        // H, P, target and measured duration of a step; and H ξ / P by hand.
        for (inner_steps, fragments, step_target_ms, step_ms, expected) in [
            (24, 24, 20_000, 13_000, 20_000),
            (24, 24, 20_000, 31_000, 31_000),
            (24, 24, 0, 13_000, 13_000),
            (30, 4, 0, 100, 750),
            (2, 4, 1_000, 10, 500),
        ] {
            let parameters = RunParameters { inner_steps, fragments, step_target_ms, ..parameters() };
            let interval = pull_interval_ms(&parameters, step_ms);
            assert_eq!(interval, expected, "H {inner_steps}, P {fragments}, target {step_target_ms}, measured {step_ms}");
        }
    }

    #[test]
    fn claiming_ten_times_the_tokens_earns_no_majority() {
        let mut tokens = vec![100; 99];
        tokens.push(1_000);
        let weights = merge_weights(&work(&tokens));
        assert!(weights[99] < 80_000, "{}", weights[99]);
        assert_eq!(merge_weights(&work(&[5])), [1_000_000]);
        assert!(merge_weights(&[]).is_empty());
    }

    #[test]
    fn a_stale_base_halves_the_weight() {
        let weights = merge_weights(&[
            Work { tokens: 10, versions_behind: 0 },
            Work { tokens: 10, versions_behind: 1 },
            Work { tokens: 10, versions_behind: 0 },
        ]);
        assert!(weights[1] < weights[0] && weights[0] == weights[2]);
    }

    #[test]
    fn keyframes_are_published_for_every_version_or_for_each_sixteenth() {
        assert_eq!([0, 1, 17].map(|version| keyframe_version(Codec::Bf16, version)), [0, 1, 17]);
        assert_eq!([0, 1, 15, 16, 17, 40].map(|version| keyframe_version(Codec::Int4, version)), [0, 0, 0, 16, 16, 32]);
    }

    proptest! {
        #[test]
        fn weights_never_exceed_the_whole_and_keep_the_order_of_tokens(tokens in proptest::collection::vec(0u64..1_000_000, 1..40)) {
            let weights = merge_weights(&work(&tokens));
            prop_assert!(weights.iter().sum::<u64>() <= 1_000_000);
            for (i, a) in tokens.iter().enumerate() {
                for (j, b) in tokens.iter().enumerate() {
                    prop_assert!(a > b || weights[i] <= weights[j]);
                }
            }
        }
    }
}
