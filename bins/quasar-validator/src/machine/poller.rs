//! Something that is looked at again and again, never twice at the same time.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poller {
    every_ms: u64,
    due_ms: u64,
    is_waiting: bool,
}

impl Poller {
    /// Due at once, then `every_ms` after each answer.
    pub fn new(every_ms: u64) -> Self {
        Self { every_ms: every_ms.max(1), due_ms: 0, is_waiting: false }
    }

    /// Whether to ask now; the answer is awaited from here on.
    pub fn begin(&mut self, now_ms: u64) -> bool {
        let is_due = !self.is_waiting && self.due_ms <= now_ms;
        self.is_waiting |= is_due;
        is_due
    }

    /// The answer came.
    pub fn end(&mut self, now_ms: u64) {
        self.is_waiting = false;
        self.due_ms = now_ms + self.every_ms;
    }

    /// The answer came, and the next question comes after this pause instead of the usual one.
    pub fn rest(&mut self, now_ms: u64, pause_ms: u64) {
        self.is_waiting = false;
        self.due_ms = now_ms + pause_ms;
    }

    /// Asks again as soon as possible.
    pub fn hurry(&mut self, now_ms: u64) {
        self.due_ms = self.due_ms.min(now_ms);
    }

    pub fn deadline(&self) -> Option<u64> {
        (!self.is_waiting).then_some(self.due_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_asked_once_until_its_answer_and_then_again_after_the_pause() {
        let mut poller = Poller::new(100);
        assert_eq!([poller.begin(5), poller.begin(6), poller.begin(900)], [true, false, false]);
        assert_eq!(poller.deadline(), None);
        poller.end(1_000);
        assert_eq!((poller.deadline(), poller.begin(1_099), poller.begin(1_100)), (Some(1_100), false, true));
        poller.end(1_200);
        poller.hurry(1_210);
        assert!(poller.begin(1_210));
        poller.rest(1_220, 700);
        assert_eq!((poller.begin(1_919), poller.begin(1_920)), (false, true));
    }
}
