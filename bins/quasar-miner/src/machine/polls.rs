//! When to look at which object again. One look at an object is under way at a time; how often follows from the run's
//! `poll_ms` and from whether something is awaited there.

use super::io::Look;

/// Looks at objects where nothing is awaited are this much rarer.
const CALM: u64 = 10;
/// The pointer to the current run changes once in weeks.
const MOVED: u64 = 50;
/// After a failed look, the next one comes no sooner than this.
const FAILED_PAUSE_MS: u64 = 1_000;

#[derive(Clone, Copy, Debug, Default)]
struct Poll {
    last_ms: u64,
    not_before_ms: u64,
    in_flight: bool,
    /// Something is awaited there.
    eager: bool,
    was_looked_at: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Polls {
    poll_ms: u64,
    polls: [Poll; Look::ALL.len()],
}

impl Polls {
    pub(super) fn new(poll_ms: u64) -> Self {
        Self { poll_ms: poll_ms.max(1), polls: [Poll::default(); Look::ALL.len()] }
    }

    pub(super) fn set_eager(&mut self, look: Look, eager: bool) {
        self.polls[look as usize].eager = eager;
    }

    fn due_ms(&self, look: Look) -> u64 {
        let poll = &self.polls[look as usize];
        let times = match (look, poll.eager) {
            (Look::Head, _) | (_, true) => 1,
            (Look::Moved, false) => MOVED,
            (_, false) => CALM,
        };
        if poll.was_looked_at { (poll.last_ms + times * self.poll_ms).max(poll.not_before_ms) } else { 0 }
    }

    /// The objects to look at now; they count as being looked at from here on.
    pub(super) fn take_due(&mut self, now_ms: u64) -> Vec<Look> {
        let due: Vec<Look> =
            Look::ALL.into_iter().filter(|look| !self.polls[*look as usize].in_flight && self.due_ms(*look) <= now_ms).collect();
        for look in &due {
            let poll = &mut self.polls[*look as usize];
            poll.in_flight = true;
            poll.was_looked_at = true;
            poll.last_ms = now_ms;
        }
        due
    }

    pub(super) fn looked(&mut self, look: Look, failed: bool, now_ms: u64) {
        let poll = &mut self.polls[look as usize];
        poll.in_flight = false;
        if failed {
            poll.not_before_ms = now_ms + FAILED_PAUSE_MS.max(self.poll_ms);
        }
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        Look::ALL.into_iter().filter(|look| !self.polls[*look as usize].in_flight).map(|look| self.due_ms(look)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_is_looked_at_each_interval_and_calm_objects_ten_times_more_rarely() {
        let mut polls = Polls::new(100);
        assert_eq!(polls.take_due(0).len(), Look::ALL.len());
        assert!(polls.take_due(500).is_empty(), "a look is under way");
        for look in Look::ALL {
            polls.looked(look, false, 1);
        }
        assert_eq!(polls.deadline(), Some(100));
        assert_eq!(polls.take_due(100), [Look::Head]);
        polls.set_eager(Look::Pull, true);
        assert_eq!(polls.take_due(101), [Look::Pull]);
        assert_eq!(polls.take_due(1_000), [Look::Job, Look::Standing]);
        polls.looked(Look::Head, true, 1_000);
        assert!(!polls.take_due(1_500).contains(&Look::Head), "a failed look pauses");
        assert!(polls.take_due(2_000).contains(&Look::Head));
    }
}
