//! When weights are set: every tempo within the chain's rate limit, once more when the run is complete, and with growing pauses
//! after refusals. A row counts as set only after it was read back from the chain; the chain's record of the last update, not
//! our memory, says when that was.

use protocol::documents::Score;
use serde::{Deserialize, Serialize};

/// Upper bounds that the operator may choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightTimes {
    /// Weights are set again after this long, where the rate limit allows it.
    pub refresh_ms: u64,
    /// First and longest pause after a failed attempt.
    pub retry_base_ms: u64,
    pub retry_max_ms: u64,
}

/// What the chain says about our neuron.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnNeuron {
    pub uid: u16,
    pub validator_permit: bool,
    /// Block of the last weights, 0 = never.
    pub last_update: u64,
    /// Blocks of an epoch, and least blocks between two rows.
    pub tempo: u64,
    pub rate_limit: u64,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightsOutcome {
    /// The chain's record shows these weights since this block.
    Set { block: u64, weights: Vec<Score> },
    /// Nothing was sent because chain writes are switched off.
    DryRun,
    /// The text names the reason and what to do about it.
    Refused { why: String },
}

/// Which row is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Due {
    Regular,
    /// The last row of a complete run.
    Final,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WeightSetter {
    times: WeightTimes,
    in_flight: Option<Due>,
    failures: u32,
    not_before_ms: u64,
    last_set_ms: Option<u64>,
    last_set_block: u64,
    is_final_set: bool,
}

impl WeightSetter {
    pub fn new(times: WeightTimes) -> Self {
        Self { times, in_flight: None, failures: 0, not_before_ms: 0, last_set_ms: None, last_set_block: 0, is_final_set: false }
    }

    /// Whether to set weights now; the outcome is awaited from here on.
    pub fn begin(&mut self, now_ms: u64, block: u64, own: &OwnNeuron, is_complete: bool) -> Option<Due> {
        if self.in_flight.is_some() || now_ms < self.not_before_ms || self.is_final_set {
            return None;
        }
        let last_update = own.last_update.max(self.last_set_block);
        let passed = block.saturating_sub(last_update);
        if last_update > 0 && passed < own.rate_limit {
            return None;
        }
        let is_old = self.last_set_ms.is_some_and(|set_ms| set_ms + self.times.refresh_ms <= now_ms);
        let due = if is_complete {
            Some(Due::Final)
        } else if last_update == 0 || passed >= own.tempo || is_old {
            Some(Due::Regular)
        } else {
            None
        };
        self.in_flight = due;
        due
    }

    /// The attempt ended.
    pub fn end(&mut self, outcome: &WeightsOutcome, now_ms: u64) {
        let Some(due) = self.in_flight.take() else { return };
        match outcome {
            WeightsOutcome::Set { .. } | WeightsOutcome::DryRun => {
                self.failures = 0;
                self.last_set_ms = Some(now_ms);
                if let WeightsOutcome::Set { block, .. } = outcome {
                    self.last_set_block = self.last_set_block.max(*block);
                } else {
                    // Without a record on the chain the pause is kept by the clock.
                    self.not_before_ms = now_ms + self.times.retry_max_ms;
                }
                self.is_final_set = due == Due::Final;
            }
            WeightsOutcome::Refused { why } => {
                let pause = self.times.retry_base_ms.saturating_mul(1 << self.failures.min(20)).min(self.times.retry_max_ms);
                self.failures = self.failures.saturating_add(1);
                self.not_before_ms = now_ms + pause;
                tracing::warn!(why, failures = self.failures, pause_ms = pause, "weights were not set");
            }
        }
    }

    /// Whether the last row of the complete run is on the chain.
    pub fn is_final_set(&self) -> bool {
        self.is_final_set
    }

    /// No attempt begins before this.
    pub fn not_before_ms(&self) -> u64 {
        self.not_before_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: OwnNeuron = OwnNeuron { uid: 3, validator_permit: true, last_update: 0, tempo: 30, rate_limit: 10 };

    fn setter() -> WeightSetter {
        WeightSetter::new(WeightTimes { refresh_ms: 1_000_000, retry_base_ms: 100, retry_max_ms: 1_000 })
    }

    fn set_at(block: u64) -> WeightsOutcome {
        WeightsOutcome::Set { block, weights: Vec::new() }
    }

    fn refused() -> WeightsOutcome {
        WeightsOutcome::Refused { why: "stake".into() }
    }

    #[test]
    fn weights_are_set_at_once_and_then_every_tempo() {
        let mut setter = setter();
        assert_eq!(setter.begin(0, 5, &OWN, false), Some(Due::Regular));
        assert_eq!(setter.begin(0, 5, &OWN, false), None, "one at a time");
        setter.end(&set_at(7), 1);
        // The chain view may still be older than our own read-back.
        assert_eq!(setter.begin(2, 36, &OWN, false), None);
        assert_eq!(setter.begin(2, 37, &OWN, false), Some(Due::Regular));
    }

    #[test]
    fn after_a_restart_the_chains_record_paces_and_the_rate_limit_always_holds() {
        let set = OwnNeuron { last_update: 100, ..OWN };
        assert_eq!(setter().begin(0, 109, &set, true), None);
        assert_eq!(setter().begin(0, 110, &set, false), None);
        assert_eq!(setter().begin(0, 110, &set, true), Some(Due::Final));
        let slow = OwnNeuron { rate_limit: 100, ..set };
        assert_eq!(setter().begin(0, 199, &slow, true), None);
        assert_eq!(setter().begin(0, 200, &slow, false), Some(Due::Regular));
    }

    #[test]
    fn refusals_are_tried_again_with_growing_pauses() {
        let mut setter = setter();
        for (pause, now_ms) in [(100, 0), (200, 1_000), (400, 2_000), (800, 3_000), (1_000, 4_000), (1_000, 6_000)] {
            assert!(setter.begin(now_ms, 50, &OWN, false).is_some());
            setter.end(&refused(), now_ms);
            assert_eq!(setter.not_before_ms(), now_ms + pause);
            assert_eq!(setter.begin(now_ms + pause - 1, 50, &OWN, false), None);
        }
    }

    #[test]
    fn the_final_row_is_set_once_and_then_nothing_more() {
        let mut setter = setter();
        setter.begin(0, 50, &OWN, true);
        setter.end(&refused(), 0);
        assert!(!setter.is_final_set());
        assert_eq!(setter.begin(200, 50, &OWN, true), Some(Due::Final));
        setter.end(&set_at(51), 300);
        assert!(setter.is_final_set());
        assert_eq!(setter.begin(1_000_000, 900, &OWN, true), None);
    }

    #[test]
    fn an_old_row_is_refreshed_before_its_tempo_if_the_operator_says_so() {
        let mut setter = WeightSetter::new(WeightTimes { refresh_ms: 500, retry_base_ms: 100, retry_max_ms: 1_000 });
        setter.begin(0, 50, &OWN, false);
        setter.end(&set_at(50), 0);
        assert_eq!(setter.begin(600, 59, &OWN, false), None);
        assert_eq!(setter.begin(600, 60, &OWN, false), Some(Due::Regular));
    }

    #[test]
    fn a_dry_run_keeps_a_pause_of_its_own() {
        let mut setter = setter();
        setter.begin(0, 50, &OWN, false);
        setter.end(&WeightsOutcome::DryRun, 0);
        assert_eq!(setter.begin(999, 50, &OWN, false), None);
        assert!(setter.begin(1_000, 50, &OWN, false).is_some());
    }
}
