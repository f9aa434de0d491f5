//! Misbehaviour on demand, for tests of everything that has to live with bad stores.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

/// How the server misbehaves. The default is not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Only requests whose path contains this text are affected by the fields below; `None` affects all.
    pub only_paths_with: Option<String>,
    /// Share of requests answered 503 and not looked at, in parts per million; which ones is a fixed function of `seed` and the request's
    /// number.
    pub errors_ppm: u32,
    /// Share of requests that are carried out, but answered 503 all the same.
    pub lost_answers_ppm: u32,
    pub seed: u64,
    /// Pause before a request is looked at.
    pub latency: Duration,
    /// Answers 403 to everything.
    pub refuse: bool,
    /// Writes although `If-None-Match` or `If-Match` fails, and says 200.
    pub ignore_conditions: bool,
    /// Stores bytes whose checksum is wrong.
    pub ignore_checksums: bool,
    /// Ends each object body after this many bytes.
    pub cut_bodies_after: Option<u64>,
}

/// What one request has to suffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Serve,
    /// Carry it out and say that it failed.
    LoseAnswer,
    Unavailable,
    Refuse,
}

#[derive(Default)]
pub(super) struct FaultState {
    faults: RwLock<Faults>,
    requests: AtomicU64,
}

impl FaultState {
    pub(super) fn set(&self, faults: Faults) {
        *self.faults.write().unwrap_or_else(PoisonError::into_inner) = faults;
    }

    /// The faults that apply to `path`.
    pub(super) fn for_path(&self, path: &str) -> Faults {
        let faults = self.faults.read().unwrap_or_else(PoisonError::into_inner).clone();
        match &faults.only_paths_with {
            Some(text) if !path.contains(text.as_str()) => Faults::default(),
            _ => faults,
        }
    }

    pub(super) fn judge(&self, faults: &Faults) -> Verdict {
        if faults.refuse {
            return Verdict::Refuse;
        }
        let (errors, losses) = (u64::from(faults.errors_ppm), u64::from(faults.lost_answers_ppm));
        if errors + losses == 0 {
            return Verdict::Serve;
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        match mix(faults.seed ^ mix(number)) % 1_000_000 {
            draw if draw < errors => Verdict::Unavailable,
            draw if draw < errors + losses => Verdict::LoseAnswer,
            _ => Verdict::Serve,
        }
    }
}

/// The finaliser of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_rate_is_met_and_the_same_seed_fails_the_same_requests() {
        let faults = Faults { errors_ppm: 250_000, seed: 3, ..Faults::default() };
        let draws = |state: FaultState| (0..4000).map(|_| state.judge(&faults)).collect::<Vec<_>>();
        let (first, second) = (draws(FaultState::default()), draws(FaultState::default()));
        assert_eq!(first, second);
        let failed = first.iter().filter(|verdict| **verdict == Verdict::Unavailable).count();
        assert!((900..1100).contains(&failed), "{failed} of 4000");
    }

    #[test]
    fn faults_can_be_kept_to_some_paths() {
        let state = FaultState::default();
        state.set(Faults { only_paths_with: Some("payload".into()), refuse: true, ..Faults::default() });
        assert!(state.for_path("/b/payload.qfd").refuse && !state.for_path("/b/head.qsr").refuse);
    }
}
