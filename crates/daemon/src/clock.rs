//! The wall clock, at the one place where it may be read.

use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// Of each second that passes while the wall clock is behind, this share counts, in percent: slower, so that both meet again; not
/// much slower, so that nothing that waits for time notices.
const BEHIND_PERCENT: u64 = 90;

/// Unix time in milliseconds; zero for a clock set before 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as u64)
}

/// Time for a machine: the wall clock's, but it never goes back, and it does not stand still where the wall clock was set back. Then
/// it goes on a little slower until the wall clock has caught up. A clock that jumps ahead is followed at once: the machine may have
/// slept.
#[derive(Clone, Copy, Debug)]
pub struct Steady {
    last_ms: u64,
    /// When the wall clock was last not behind, and what time it was then.
    right: Option<(Instant, u64)>,
}

impl Steady {
    /// Goes on from `last_ms`, which may lie ahead of the wall clock.
    pub fn new(last_ms: u64) -> Self {
        Self { last_ms, right: None }
    }

    /// The time last given.
    pub fn last_ms(&self) -> u64 {
        self.last_ms
    }

    /// The time at `now`, when the wall clock shows `wall_ms`.
    pub fn read(&mut self, wall_ms: u64, now: Instant) -> u64 {
        if wall_ms >= self.last_ms {
            (self.last_ms, self.right) = (wall_ms, Some((now, wall_ms)));
            return self.last_ms;
        }
        let (since, then_ms) = *self.right.get_or_insert((now, self.last_ms));
        let passed_ms = now.saturating_duration_since(since).as_millis() as u64;
        self.last_ms = self.last_ms.max(then_ms + passed_ms * BEHIND_PERCENT / 100);
        self.last_ms
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_clock_that_is_set_back_by_hours_neither_turns_time_back_nor_stops_it() {
        let (begin, hour) = (Instant::now(), 3_600_000);
        let mut time = Steady::new(0);
        let mut last = time.read(10 * hour, begin);
        for second in 1..=20 * 3_600 {
            // Six hours ahead for a while, then right again.
            let wall_ms = 10 * hour + second * 1_000 + if second < 60 { 6 * hour } else { 0 };
            let now = time.read(wall_ms, begin + Duration::from_secs(second));
            let passed = now - last;
            assert!(second == 1 || (899..=1_000).contains(&passed), "{passed} ms in second {second}");
            last = now;
        }
        assert_eq!(last, 16 * hour + 59_000 + (20 * 3_600 - 59) * 900, "two of the six hours are made up for in twenty");
        assert_eq!(time.read(40 * hour, begin + Duration::from_secs(20 * 3_600 + 1)), 40 * hour);
    }
}
