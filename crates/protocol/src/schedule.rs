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
    use proptest::prelude::*;

    fn work(tokens: &[u64]) -> Vec<Work> {
        tokens.iter().map(|tokens| Work { tokens: *tokens, versions_behind: 0 }).collect()
    }

    #[test]
    fn the_quorum_is_half_of_the_eligible_but_never_more_than_there_are() {
        assert_eq!(quorum(2, 3), 2);
        assert_eq!(quorum(2, 1), 1);
        assert_eq!(quorum(8, 100), 50);
        assert_eq!(quorum(8, 4), 4);
        assert_eq!(quorum(8, 0), 0);
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
