//! Smaller batches for slow learners: they step, and answer pulls, at the pace of all (DyLU of Liu et al. 2024, Asynchronous Local-SGD,
//! with batches in the place of step counts).

use serde::{Deserialize, Serialize};

use super::timing::Average;

/// A learner gets smaller batches once a step of a whole one takes more than this share of what it takes the median hotkey, in percent...
const SLOW_PERCENT: u64 = 125;
/// ...and whole ones again once it takes no more than this.
const FAST_PERCENT: u64 = 110;
/// The smallest batch, as a part of a whole one.
const SHARE_MIN: u32 = 8;

/// The batches of one learner, in one session.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Batches {
    /// Rows of a step of the lease that it is in; 0 before its first one.
    rows: u32,
    /// What a step of these takes, by the learner's own word: it brings nobody more rows or weight to be slower or faster than one is, and
    /// what lies between two steps, such as waiting for rows, is not in it.
    step: Average,
    /// What a step of a whole batch took when it last had one.
    whole_ms: Option<u64>,
    /// Smaller ones did not help: most of what its step takes is the same for any.
    is_vain: bool,
}

impl Batches {
    /// A step of `rows` has taken so long.
    pub fn note(&mut self, rows: u32, step_ms: u64) {
        if std::mem::replace(&mut self.rows, rows) != rows {
            self.step = Average::default();
        }
        self.step.add(step_ms);
    }

    /// What a step of `whole` rows would take, if that takes a time that is as long as it has rows.
    pub fn whole_ms(&self, whole: u32) -> Option<u64> {
        Some(self.step.get()? * u64::from(whole) / u64::from(self.held(whole)).max(1))
    }

    fn held(&self, whole: u32) -> u32 {
        if self.rows == 0 { whole } else { self.rows }
    }

    /// Rows of a step of its next lease, where a step of `whole` rows should take `all_ms`.
    pub fn next(&mut self, all_ms: u64, whole: u32) -> u32 {
        let held = self.held(whole);
        let (Some(step_ms), Some(whole_ms)) = (self.step.get(), self.whole_ms(whole)) else { return held };
        if held == whole {
            self.whole_ms = Some(step_ms);
        } else if let Some(before_ms) = self.whole_ms {
            // Less than half of the time that it was to save.
            self.is_vain |= 2 * u64::from(whole) * step_ms > u64::from(whole + held) * before_ms;
        }
        let limit = if held == whole { SLOW_PERCENT } else { FAST_PERCENT };
        if self.is_vain || 100 * whole_ms <= limit * all_ms {
            return whole;
        }
        let rows = u64::from(held) * all_ms / step_ms.max(1);
        u32::try_from(rows).unwrap_or(whole).clamp((whole / SHARE_MIN).max(1), whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Batches of so many leases in a row of a learner whose step takes `fixed_ms` and `row_ms` for each row.
    fn leases(batches: &mut Batches, (fixed_ms, row_ms): (u64, u64), count: usize) -> Vec<u32> {
        let mut rows = batches.held(32);
        let mut given = Vec::new();
        for _ in 0..count {
            (0..30).for_each(|_| batches.note(rows, fixed_ms + row_ms * u64::from(rows)));
            rows = batches.next(3_200, 32);
            given.push(rows);
        }
        given
    }

    #[test]
    fn a_slow_learner_gets_what_it_can_do_in_the_time_of_all_and_a_whole_batch_once_it_is_fast_again() {
        let mut batches = Batches::default();
        assert_eq!(leases(&mut batches, (0, 110), 3), [32; 3], "a tenth slower is not slow");
        assert_eq!(leases(&mut batches, (0, 400), 4), [8; 4]);
        assert_eq!(leases(&mut batches, (0, 100), 2), [32; 2]);
        assert_eq!(leases(&mut Batches::default(), (0, 10_000), 2), [4; 2], "no less than an eighth");
        assert_eq!(Batches::default().next(3_200, 32), 32, "of steps that were not measured nothing follows");
    }

    #[test]
    fn where_smaller_batches_save_little_whole_ones_stay() {
        let mut batches = Batches::default();
        assert_eq!(leases(&mut batches, (9_000, 10), 4), [10, 32, 32, 32]);
        let mut batches = Batches::default();
        assert_eq!(leases(&mut batches, (400, 400), 3), [7; 3], "what is the same for any is small");
    }
}
