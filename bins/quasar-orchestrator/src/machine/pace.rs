//! How much is looked at after an input: a thousand learners report each step, and nothing of that may cost a walk over all of
//! them.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Input, Learner, Orchestrator, PULL_GRANTS_REFRESH_MS, Slot};

/// Part of the state, not of the process: a replay decides everything at the very input at which it was decided.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Pace {
    /// When everything was last looked through.
    pub scanned_ms: u64,
    /// The next look is due whatever the time is.
    pub scan: bool,
    /// An offer moved: quorum and grace may have been reached.
    pub pulls_changed: bool,
    /// Learners whose job or grants have changed.
    pub dirty: BTreeSet<Slot>,
    /// A snapshot for the bucket is due.
    pub snapshot: bool,
    pub snapshot_ms: u64,
    /// When this process began.
    pub resumed_ms: u64,
    /// Learners that train, and those of them whose answer a pull waits for.
    pub training: usize,
    pub eligible: usize,
    /// The two counts are out of date.
    pub survey: bool,
}

/// In a run with a target for its steps, they are believed to take at most so many times as long.
const STEP_TARGETS_MAX: u64 = 8;

fn median(values: &mut [u64]) -> Option<u64> {
    let middle = values.len() / 2;
    (!values.is_empty()).then(|| *values.select_nth_unstable(middle).1)
}

impl Orchestrator {
    pub(super) fn next_scan_ms(&self) -> u64 {
        self.pace.scanned_ms + self.parameters().poll_ms.clamp(20, 1_000)
    }

    /// Notes how much an input may have changed.
    pub(super) fn note_input(&mut self, input: &Input) {
        match input {
            Input::Progress { .. }
            | Input::Block { .. }
            | Input::LeaseEnded { .. }
            | Input::RetiredAll { .. }
            | Input::Verdict { verdict: None, .. } => {}
            Input::CommitmentStored { .. }
            | Input::CommitmentRefused { .. }
            | Input::PayloadChecked { .. }
            | Input::ReceiptChecked { .. } => self.pace.pulls_changed = true,
            _ => self.pace.scan = true,
        }
    }

    pub(super) fn is_scan_due(&mut self) -> bool {
        let now_ms = self.volatile.now_ms;
        let due = std::mem::take(&mut self.pace.scan) || now_ms >= self.next_scan_ms();
        if due {
            self.pace.scanned_ms = now_ms;
            self.pace.pulls_changed = false;
        }
        due
    }

    /// Counts the learners, takes the median of their step times, and finds grants that grow old.
    pub(super) fn survey(&mut self) {
        let now_ms = self.volatile.now_ms;
        for (slot, learner) in self.learners.iter().filter(|(_, learner)| learner.live) {
            if now_ms >= learner.pull_grants_ms + PULL_GRANTS_REFRESH_MS {
                self.pace.dirty.insert(*slot);
            }
        }
        if let Some(step_ms) = self.vote(|learner| learner.step.get()) {
            let most = self.parameters().step_target_ms.saturating_mul(STEP_TARGETS_MAX);
            self.timing.set_step(if most > 0 { step_ms.min(most) } else { step_ms });
        }
        let whole = self.parameters().batch_rows;
        if let Some(step_ms) = self.vote(|learner| learner.batches.whole_ms(whole)) {
            self.timing.set_whole_step(step_ms);
        }
        self.count_learners();
    }

    /// The median of what those say that train. Each hotkey has one vote, however many learners it runs.
    fn vote(&self, of: impl Fn(&Learner) -> Option<u64>) -> Option<u64> {
        let (mut votes, mut own, mut voter) = (Vec::new(), Vec::new(), None);
        for (slot, learner) in self.learners.iter().filter(|(_, learner)| learner.is_training()) {
            if voter != Some(slot.0) {
                votes.extend(median(&mut own));
                own.clear();
                voter = Some(slot.0);
            }
            own.extend(of(learner));
        }
        votes.extend(median(&mut own));
        median(&mut votes)
    }

    /// Learners that train, and those of them whose answer a pull waits for.
    pub(super) fn counts(&mut self) -> (usize, usize) {
        if self.pace.survey {
            self.count_learners();
        }
        (self.pace.training, self.pace.eligible)
    }

    fn count_learners(&mut self) {
        self.pace.survey = false;
        let training = || self.learners.values().filter(|learner| learner.is_training());
        let (all, eligible) = (training().count(), training().filter(|learner| learner.is_eligible()).count());
        (self.pace.training, self.pace.eligible) = (all, eligible);
    }
}
