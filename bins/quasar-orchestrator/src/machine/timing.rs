//! Moving averages of what the learners and the merges take (Decoupled DiLoCo, equation 3: ξ_step, ξ_sync).

use serde::{Deserialize, Serialize};

/// Share of the newest value in an average, in percent.
const NEWEST_PERCENT: u64 = 20;
/// Steps are believed to take at least this long.
const STEP_MS_MIN: u64 = 10;

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Timing {
    step: Average,
    sync: Average,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Average(Option<u64>);

impl Average {
    fn add(&mut self, value: u64) {
        self.0 = Some(match self.0 {
            None => value,
            Some(old) => (old * (100 - NEWEST_PERCENT) + value * NEWEST_PERCENT) / 100,
        });
    }

    fn get(self) -> u64 {
        self.0.unwrap_or(0)
    }
}

impl Timing {
    pub fn add_step(&mut self, ms: u64) {
        self.step.add(ms.max(STEP_MS_MIN));
    }

    /// From the close of a pull to its merge.
    pub fn add_sync(&mut self, ms: u64) {
        self.sync.add(ms);
    }

    pub fn step_ms(&self) -> u64 {
        self.step.get().max(STEP_MS_MIN)
    }

    pub fn sync_ms(&self) -> u64 {
        self.sync.get()
    }
}
