//! Moving averages of what the learners and the merges take (Decoupled DiLoCo, equation 3: ξ_step, ξ_sync), and the pace of the
//! whole run.

use serde::{Deserialize, Serialize};

/// Share of the newest value in an average, in percent.
const NEWEST_PERCENT: u64 = 20;
/// Steps are believed to take at least this long.
const STEP_MS_MIN: u64 = 10;
/// The run's pace is that of the last one to two of these.
const RATE_WINDOW_MS: u64 = 30 * 60_000;
const DAY_MS: u128 = 86_400_000;

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Timing {
    /// Median of the learners' own averages: no single one, however it counts its steps, moves the schedule.
    step_ms: u64,
    /// The same for steps of whole batches.
    whole_step_ms: u64,
    sync: Average,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Average(Option<u64>);

impl Average {
    pub fn add(&mut self, value: u64) {
        self.0 = Some(match self.0 {
            None => value,
            Some(old) => (old * (100 - NEWEST_PERCENT) + value * NEWEST_PERCENT) / 100,
        });
    }

    pub fn get(self) -> Option<u64> {
        self.0
    }
}

impl Timing {
    pub fn set_step(&mut self, median_ms: u64) {
        self.step_ms = median_ms;
    }

    pub fn set_whole_step(&mut self, median_ms: u64) {
        self.whole_step_ms = median_ms;
    }

    /// From the close of a pull to its merge.
    pub fn add_sync(&mut self, ms: u64) {
        self.sync.add(ms);
    }

    pub fn step_ms(&self) -> u64 {
        self.step_ms.max(STEP_MS_MIN)
    }

    pub fn whole_step_ms(&self) -> u64 {
        self.whole_step_ms.max(STEP_MS_MIN)
    }

    pub fn sync_ms(&self) -> u64 {
        self.sync.get().unwrap_or(0)
    }
}

/// Tokens over time, from two marks that follow the present.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Rate {
    older: Option<(u64, u64)>,
    newer: Option<(u64, u64)>,
}

impl Rate {
    pub fn look(&mut self, now_ms: u64, tokens: u64) {
        match self.newer {
            Some((then_ms, _)) if now_ms < then_ms + RATE_WINDOW_MS => {}
            _ => {
                self.older = self.newer.or(Some((now_ms, tokens)));
                self.newer = Some((now_ms, tokens));
            }
        }
    }

    pub fn tokens_per_day(&self, now_ms: u64, tokens: u64) -> u64 {
        let Some((then_ms, before)) = self.older else { return 0 };
        let elapsed_ms = u128::from(now_ms.saturating_sub(then_ms));
        (u128::from(tokens.saturating_sub(before)) * DAY_MS).checked_div(elapsed_ms).unwrap_or(0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_the_last_hour_and_forgets_what_was_before() {
        let mut rate = Rate::default();
        let hour = 3_600_000;
        // A fast day, then a slow one: 60,000 tokens an hour, then 600.
        let mut tokens = 0;
        for minute in 0..2 * 24 * 60u64 {
            tokens += if minute < 24 * 60 { 1_000 } else { 10 };
            rate.look(minute * 60_000, tokens);
            if minute == 23 * 60 {
                assert_eq!(rate.tokens_per_day(minute * 60_000, tokens), 24 * 60_000);
            }
        }
        assert_eq!(rate.tokens_per_day(48 * hour - 60_000, tokens), 24 * 600);
    }
}
