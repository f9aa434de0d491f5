//! The progress record: what it says, and when it is written again.

use protocol::documents::{LearnerState, Progress, RENEWALS_PER_TTL, RunState};
use protocol::envelope::PROTOCOL_VERSION;
use protocol::{Digest, Method, Reason};

use super::io::{Effect, Fault, Put};
use super::{End, Ending, Learner, TrainerPhase};

/// Pause before a failed write is tried again.
const RETRY_MS: u64 = 500;

#[derive(Clone, Debug)]
pub(super) struct Record {
    poll_ms: u64,
    renew_ms: u64,
    in_flight: Option<Progress>,
    stored: Option<Progress>,
    /// When the newest write began.
    begun_ms: Option<u64>,
    not_before_ms: u64,
    /// The record on its way, or the stored one, is the last of this session.
    is_last: bool,
    last_done: bool,
    is_stale: bool,
    /// The record that was put together last and not written.
    scratch: Option<Progress>,
}

impl Record {
    pub(super) fn new(poll_ms: u64, learner_ttl_ms: u64) -> Self {
        Self {
            poll_ms: poll_ms.max(1),
            renew_ms: (learner_ttl_ms / RENEWALS_PER_TTL).max(1),
            in_flight: None,
            stored: None,
            begun_ms: None,
            not_before_ms: 0,
            is_last: false,
            last_done: false,
            is_stale: true,
            scratch: None,
        }
    }

    /// A record to write over.
    fn take_scratch(&mut self) -> Progress {
        self.scratch.take().unwrap_or_else(|| Progress {
            worker: String::new(),
            session_epoch: 0,
            slot: 0,
            protocol: PROTOCOL_VERSION,
            state: LearnerState::Ready,
            reason: Reason::None,
            lease: 0,
            lease_step: 0,
            local_step: 0,
            step_ms: 0,
            loss: 0,
            step_chain: Digest::ZERO,
            fragments: Vec::new(),
            commitments: Vec::new(),
            uploaded: Vec::new(),
            openings: Vec::new(),
            receipt: None,
            padding: Vec::new(),
        })
    }

    /// The record to write now, if one is due. With `is_last`, exactly one more record is written, at once.
    pub(super) fn take_due(&mut self, progress: Progress, is_last: bool, now_ms: u64) -> Option<Progress> {
        if !self.is_free() {
            self.scratch = Some(progress);
            return None;
        }
        self.is_stale = self.stored.as_ref() != Some(&progress);
        let due_ms = self.due_ms();
        if due_ms > now_ms && !is_last {
            self.scratch = Some(progress);
            return None;
        }
        (self.begun_ms, self.is_last) = (Some(now_ms), is_last);
        self.in_flight = Some(progress.clone());
        Some(progress)
    }

    /// No record is on its way, and more may follow.
    fn is_free(&self) -> bool {
        self.in_flight.is_none() && !self.is_last
    }

    fn due_ms(&self) -> u64 {
        let Some(begun_ms) = self.begun_ms else { return 0 };
        (begun_ms + if self.is_stale { self.poll_ms } else { self.renew_ms }).max(self.not_before_ms)
    }

    pub(super) fn put(&mut self, put: Put, now_ms: u64) {
        let written = self.in_flight.take();
        if put.is_done() {
            self.stored = written;
        } else {
            self.not_before_ms = now_ms + RETRY_MS;
        }
        self.last_done = self.is_last;
    }

    /// Whether the last record of the session was written, or failed to be.
    pub(super) fn is_last_done(&self) -> bool {
        self.last_done
    }

    /// Whether a record with this reason was written.
    pub(super) fn has_told(&self, reason: Reason) -> bool {
        self.stored.as_ref().is_some_and(|record| record.reason == reason)
    }

    /// Whether the orchestrator can know of this session.
    pub(super) fn was_put(&self) -> bool {
        self.stored.is_some()
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        // Before the first record there is no grant to write it with, or it is on its way.
        (self.in_flight.is_none() && self.begun_ms.is_some() && !self.is_last).then(|| self.due_ms())
    }
}

impl Learner {
    fn state(&self) -> (LearnerState, Reason) {
        match &self.ending {
            Some(Ending { end: End::DiskFull | End::OutOfMemory(_) | End::Broken(_), .. }) => return (LearnerState::Faulted, self.fault),
            Some(_) => return (LearnerState::Draining, Reason::None),
            None => {}
        }
        if self.fault != Reason::None {
            (LearnerState::Faulted, self.fault)
        } else if self.grants.is_renewing() {
            (LearnerState::Renew, Reason::None)
        } else if self.trainer != TrainerPhase::Open || !self.fragments.are_applied() {
            (LearnerState::Fetching, Reason::None)
        } else if self.head.as_ref().is_some_and(|head| head.state == RunState::Complete) {
            (LearnerState::Ready, Reason::None)
        } else if self.boundary.as_ref().is_some_and(|boundary| boundary.step.is_some()) || self.leases.next_step().is_some() {
            (LearnerState::Training, Reason::None)
        } else {
            (LearnerState::Ready, Reason::None)
        }
    }

    pub(super) fn progress_put(&mut self, put: Put, now_ms: u64) {
        if put == Put::Grant {
            self.grants.refused(Method::Put, &self.progress_key);
        }
        self.record.put(put, now_ms);
        if put == Put::DiskFull {
            self.give_up(Fault::DiskFull, now_ms);
        }
        if let Some(ending) = &mut self.ending
            && self.record.is_last_done()
        {
            ending.is_over = true;
        }
    }

    pub(super) fn put_record(&mut self, now_ms: u64) {
        // To put a record together costs more than most inputs do.
        if self.end().is_some() || !self.record.is_free() || !self.grants.can_put(&self.progress_key, now_ms) {
            return;
        }
        let mut progress = self.record.take_scratch();
        self.fill(&mut progress);
        if let Some(progress) = self.record.take_due(progress, self.ending.is_some(), now_ms) {
            self.effects.push_back(Effect::PutProgress(Box::new(progress)));
        }
    }

    /// Makes `progress` the record as of now. It is looked at after every input and rarely differs: nothing is allocated anew.
    fn fill(&self, progress: &mut Progress) {
        let (state, reason) = self.state();
        let (lease, lease_step) = self.leases.cursor();
        progress.worker.clone_from(&self.settings.worker);
        (progress.session_epoch, progress.slot, progress.protocol) = (self.settings.session_epoch, self.settings.slot, PROTOCOL_VERSION);
        (progress.state, progress.reason, progress.lease, progress.lease_step) = (state, reason, lease, lease_step);
        (progress.local_step, progress.step_chain) = (self.segments.local_step(), self.segments.chain());
        (progress.step_ms, progress.loss) = (self.step_ms, self.loss);
        progress.fragments.clear();
        progress.fragments.extend(self.fragments.progress());
        progress.commitments.clear();
        progress.commitments.extend(self.pulls.commitments().cloned());
        progress.uploaded.clear();
        progress.uploaded.extend(self.pulls.uploads_done());
        progress.openings = self.openings.record();
        progress.receipt = self.receipts.record();
    }
}
