//! Learners: sessions, jobs and grants.

use protocol::documents::{Job, LearnerState, Progress};
use protocol::{Digest, Reason};
use serde::{Deserialize, Serialize};

use super::batches::Batches;
use super::timing::Average;
use super::{Effect, Guest, Key, Orchestrator, PULL_GRANTS_REFRESH_MS, STANDING_REFRESH_MS, Slot, VERSIONS_AHEAD, Want, guest_of};

/// A learner that left so many more pulls without an answer than it answered is not waited for; it is pulled and merged all the same.
const MISSES_MAX: u8 = 3;

/// What the orchestrator knows about a slot that has spoken.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Learner {
    pub worker: String,
    pub session_epoch: u64,
    pub state: LearnerState,
    pub live: bool,
    pub seen_ms: u64,
    pub local_step: u64,
    /// When `local_step` last moved.
    pub stepped_ms: u64,
    pub loss: i64,
    pub lease: u64,
    /// Leases held now, oldest first.
    pub leases: Vec<u64>,
    /// When all leases that it got so far could be used up at the fastest.
    pub leases_ms: u64,
    /// Steps since it applied the version that it has, for each fragment.
    pub fragment_steps: Vec<u32>,
    pub contributions: u64,
    pub last_reason: Reason,
    /// What its steps take.
    pub step: Average,
    pub batches: Batches,
    /// Pulls that it did not answer, less those that it answered since; at most [`MISSES_MAX`].
    pub misses: u8,
    pub job_dirty: bool,
    pub grants_dirty: bool,
    pub pull_grants_ms: u64,
}

impl Learner {
    pub(super) fn of_session(session_epoch: u64, now_ms: u64) -> Self {
        Self {
            worker: String::new(),
            session_epoch,
            state: LearnerState::Ready,
            live: true,
            seen_ms: now_ms,
            local_step: 0,
            stepped_ms: now_ms,
            loss: 0,
            lease: 0,
            leases: Vec::new(),
            leases_ms: 0,
            fragment_steps: Vec::new(),
            contributions: 0,
            last_reason: Reason::None,
            step: Average::default(),
            batches: Batches::default(),
            misses: 0,
            job_dirty: true,
            grants_dirty: true,
            pull_grants_ms: 0,
        }
    }

    pub fn is_training(&self) -> bool {
        self.live && self.state == LearnerState::Training
    }

    /// Whether it has something to answer a pull with.
    pub fn can_answer(&self) -> bool {
        self.is_training() && self.local_step > 0
    }

    /// As [`Learner::can_answer`] for a pull of `fragment`: in the closing round one whose rows are used up has something, too, if it has
    /// trained since it applied the fragment's version.
    pub fn is_asked(&self, fragment: u16, is_closing: bool) -> bool {
        let has_trained = || self.fragment_steps.get(usize::from(fragment)).is_some_and(|steps| *steps > 0);
        let is_used_up = || self.live && self.state == LearnerState::Ready && self.local_step > 0;
        self.can_answer() || (is_closing && is_used_up() && has_trained())
    }

    /// Whether it has not left pull after pull without an answer.
    pub fn answers_mostly(&self) -> bool {
        self.misses < MISSES_MAX
    }

    pub(super) fn note_answer(&mut self, answered: bool) {
        self.misses = if answered { self.misses.saturating_sub(1) } else { (self.misses + 1).min(MISSES_MAX) };
    }

    /// Whether a pull waits for its answer.
    pub fn is_eligible(&self) -> bool {
        self.can_answer() && self.answers_mostly()
    }
}

impl Orchestrator {
    pub(super) fn on_progress(&mut self, slot: Slot, id: Digest, record: Progress) {
        let (now_ms, ttl_ms) = (self.volatile.now_ms, self.parameters().learner_ttl_ms);
        if slot.1 != record.slot || guest_of(&self.guests, &slot.0).is_none() || self.banned.contains_key(&slot.0) {
            return;
        }
        match self.learners.get(&slot) {
            Some(learner) if record.session_epoch < learner.session_epoch => return,
            Some(learner) if record.session_epoch == learner.session_epoch => {}
            known => {
                // Whoever begins anew is not another one for it.
                let (contributions, misses, leases_ms) =
                    known.map_or((0, 0, 0), |learner| (learner.contributions, learner.misses, learner.leases_ms));
                self.end_leases(slot);
                self.withdraw_offers(slot);
                let learner = Learner { contributions, misses, leases_ms, ..Learner::of_session(record.session_epoch, now_ms) };
                self.learners.insert(slot, learner);
                self.pace.dirty.insert(slot);
            }
        }
        let Some(learner) = self.learners.get_mut(&slot) else { return };
        let before = (learner.live, learner.state, learner.local_step > 0);
        if record.local_step > learner.local_step {
            // The whole cadence counts, with what lies between two steps. The first step of a session has no interval, and after a
            // silence (no store, a clock that jumped) it would be that of the silence.
            let steps = record.local_step - learner.local_step;
            if learner.local_step > 0 && now_ms <= learner.seen_ms + ttl_ms {
                learner.step.add(now_ms.saturating_sub(learner.stepped_ms) / steps);
            }
            learner.stepped_ms = now_ms;
            if let Some(held) = self.leases.get(&record.lease).filter(|held| held.slot == slot) {
                learner.batches.note(held.lease.batch_rows, record.step_ms.into());
            }
        }
        learner.seen_ms = now_ms;
        // A record with one of these reasons is the last of its session, as a draining one is: its leases end now and not when it is stale.
        let has_failed = matches!(record.reason, Reason::OutOfMemory | Reason::DiskFull | Reason::TrainerFailed);
        learner.live = record.state != LearnerState::Draining && !has_failed;
        learner.state = record.state;
        if learner.worker != record.worker {
            learner.worker.clone_from(&record.worker);
        }
        learner.local_step = record.local_step;
        learner.loss = record.loss;
        learner.fragment_steps.clear();
        learner.fragment_steps.extend(record.fragments.iter().map(|fragment| fragment.steps));
        if learner.leases.contains(&record.lease) {
            learner.lease = record.lease;
        }
        if before != (learner.live, learner.state, learner.local_step > 0) {
            self.pace.survey = true;
            self.pace.pulls_changed = true;
            self.pace.dirty.insert(slot);
        }
        let live = learner.live;
        let step_ms = self.timing.step_ms();
        if let Some(lease) = self.leases.get_mut(&record.lease)
            && lease.slot == slot
        {
            lease.reported = lease.reported.max(record.lease_step.min(lease.possible(now_ms, step_ms)));
        }
        if live {
            self.extend_leases(slot);
        } else {
            self.end_leases(slot);
        }
        self.on_commitments(slot, id, &record);
        self.on_openings(slot, &record);
        self.on_receipt(slot, &record);
    }

    /// A learner whose record is older than the run allows is gone: its leases end, its rows return.
    pub(super) fn expire_learners(&mut self) {
        let (now_ms, ttl_ms) = (self.volatile.now_ms, self.parameters().learner_ttl_ms);
        let gone: Vec<Slot> =
            self.learners.iter().filter(|(_, learner)| learner.live && now_ms > learner.seen_ms + ttl_ms).map(|(slot, _)| *slot).collect();
        self.pace.survey |= !gone.is_empty();
        for slot in gone {
            self.end_leases(slot);
            if let Some(learner) = self.learners.get_mut(&slot) {
                learner.live = false;
                learner.last_reason = Reason::Stale;
                tracing::info!(hotkey = %slot.0.short(), slot = slot.1, "learner is gone, its rows return");
            }
        }
    }

    /// What a slot may read or upload has changed.
    pub(super) fn grants_changed(&mut self, slot: Slot) {
        if let Some(learner) = self.learners.get_mut(&slot) {
            learner.grants_dirty = true;
            self.pace.dirty.insert(slot);
        }
    }

    /// Renews the standing grants of every slot that are not as they should be.
    pub(super) fn refresh_standing_grants(&mut self) {
        let now_ms = self.volatile.now_ms;
        let versions = self.fragment_versions();
        let welcome: Vec<Guest> = self.guests.iter().filter(|guest| !self.banned.contains_key(&guest.hotkey)).cloned().collect();
        for guest in welcome {
            for slot in 0..self.setup.parameters.slots {
                // What an auditor needs lies at its first slot.
                let guest = Guest { validator: guest.validator && slot == 0, ..guest.clone() };
                self.refresh_standing((guest.hotkey, slot), &guest, &versions, now_ms);
            }
        }
    }

    /// Publishes jobs and grants that changed or grow old.
    pub(super) fn refresh_jobs_and_grants(&mut self) {
        let now_ms = self.volatile.now_ms;
        for slot in std::mem::take(&mut self.pace.dirty) {
            let live = self.learners.get(&slot).is_some_and(|learner| learner.live);
            // A banned learner is told that it has nothing to do.
            if live || self.banned.contains_key(&slot.0) {
                self.refresh_job(slot);
            }
            if live {
                self.refresh_pull_grants(slot, now_ms);
            }
        }
    }

    fn refresh_standing(&mut self, slot: Slot, guest: &Guest, versions: &[u64], now_ms: u64) {
        let Guest { validator, recipient, .. } = *guest;
        let learner = self.learners.get(&slot);
        let live = validator || learner.is_some_and(|learner| learner.live);
        let session_epoch = learner.map_or(0, |learner| learner.session_epoch);
        let mark = self.standing.entry(slot).or_default();
        let outrun = live && versions.iter().zip(&mark.versions).any(|(now, then)| *now >= then + VERSIONS_AHEAD / 2);
        let due = mark.published_ms == 0
            || now_ms >= mark.published_ms + STANDING_REFRESH_MS
            || mark.live != live
            || mark.validator != validator
            || mark.session_epoch != session_epoch
            || mark.recipient != recipient
            || outrun;
        if !due {
            return;
        }
        *mark = StandingMark { published_ms: now_ms.max(1), live, validator, session_epoch, recipient, versions: versions.to_vec() };
        let mark = mark.clone();
        let revision = self.next_revision();
        let cycle = protocol::schedule::cycle_of(self.closed_below, self.parameters().fragments);
        self.emit(Effect::PublishStanding { revision, slot, mark, cycle });
    }

    fn refresh_job(&mut self, slot: Slot) {
        let Some(learner) = self.learners.get_mut(&slot) else { return };
        if !std::mem::take(&mut learner.job_dirty) {
            return;
        }
        let (session_epoch, held) = (learner.session_epoch, learner.leases.clone());
        let leases = held.iter().filter_map(|id| self.leases.get(id)).map(|record| record.lease.clone()).collect();
        let revision = self.next_revision();
        self.emit(Effect::PublishJob { revision, job: Box::new(Job { hotkey: slot.0, slot: slot.1, session_epoch, leases }) });
    }

    fn refresh_pull_grants(&mut self, slot: Slot, now_ms: u64) {
        // Nobody knows yet what to seal to; the metagraph brings it.
        if self.guests.is_empty() {
            return;
        }
        let Some(learner) = self.learners.get_mut(&slot) else { return };
        if !std::mem::take(&mut learner.grants_dirty) && now_ms < learner.pull_grants_ms + PULL_GRANTS_REFRESH_MS {
            return;
        }
        learner.pull_grants_ms = now_ms;
        let session_epoch = learner.session_epoch;
        let mut shards: Vec<String> = learner
            .leases
            .iter()
            .filter_map(|id| self.leases.get(id))
            .flat_map(|record| record.lease.rows.iter().map(|range| range.shard.clone()))
            .collect();
        shards.sort();
        shards.dedup();
        let mut wants: Vec<Want> = shards.into_iter().map(|shard| Want::Read { key: Key::Shard(shard) }).collect();
        wants.extend(self.payload_wants(slot));
        wants.extend(self.opening_wants(slot));
        wants.extend(self.receipt_wants(slot));
        let (revision, recipient) = (self.next_revision(), self.recipient(&slot.0));
        self.emit(Effect::PublishPullGrants { revision, slot, session_epoch, recipient, wants });
    }
}

/// The standing grants that a slot has.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StandingMark {
    pub published_ms: u64,
    pub live: bool,
    /// With what an auditor needs.
    pub validator: bool,
    pub session_epoch: u64,
    /// The X25519 key that they are sealed to; with another one they are sealed anew.
    pub recipient: Option<[u8; 32]>,
    pub versions: Vec<u64>,
}
