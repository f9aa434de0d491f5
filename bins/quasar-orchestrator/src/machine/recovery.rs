//! Going on without the journal of the process before: from a snapshot in the bucket, and from what lies write-once beside it.
//!
//! Tapes fix merges, lease records fix who got which rows and how they were booked, log heads fix the log. A snapshot that is older than these is brought
//! up to them; what had not come so far (an open pull, an upload on its way) is asked for again, and the learners answer again.

use std::collections::BTreeMap;

use bincode::config;
use daemon::Machine;
use protocol::Digest;
use protocol::documents::{Head, Job, LearnerState, Lease, LeaseEnd, RowRange, RunState, Tape};
use protocol::log::LogKind;

use super::{BucketFacts, Effect, Learner, LeaseRecord, OfferStage, OpenPull, Orchestrator, PullStage, StepFact};

/// A snapshot follows the last one by at least so many polls.
const SNAPSHOT_POLLS: u64 = 30;
const MAGIC: &[u8; 16] = b"quasar-machine-1";
/// Largest snapshot that is read.
pub const SNAPSHOT_BYTES_MAX: u64 = 1 << 30;
/// Lease ids of a writer that began without its predecessor's journal start at its epoch, shifted by this: none comes twice.
pub const LEASE_EPOCH_SHIFT: u32 = 32;

/// A snapshot that cannot be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("the snapshot was written by a version with layout {found}, this one has {expected}\nhint: run the version that wrote it")]
    Layout { found: u32, expected: u32 },
    #[error("the snapshot is damaged: {0}\nhint: restore it from a version of the bucket's object, or run the process with the journal")]
    Damaged(String),
}

impl Orchestrator {
    pub(super) fn store_snapshot(&mut self) {
        let now_ms = self.volatile.now_ms;
        if !std::mem::take(&mut self.pace.snapshot) {
            return;
        }
        self.pace.snapshot_ms = now_ms;
        let revision = self.next_revision();
        match self.to_snapshot(now_ms) {
            Ok(bytes) => self.emit(Effect::StoreSnapshot { revision, bytes }),
            Err(error) => tracing::error!("no snapshot for the bucket: {error}"),
        }
    }

    /// A merge changed much: time for a snapshot, unless the last one is young.
    pub(super) fn note_merge(&mut self) {
        if self.volatile.now_ms >= self.pace.snapshot_ms + SNAPSHOT_POLLS * self.parameters().poll_ms {
            self.pace.snapshot = true;
        }
    }

    /// The whole state, for [`Orchestrator::from_snapshot`].
    ///
    /// # Errors
    /// None that is known: a state always encodes.
    pub fn to_snapshot(&self, now_ms: u64) -> Result<Vec<u8>, String> {
        let body = bincode::serde::encode_to_vec((now_ms, self), config::standard()).map_err(|error| error.to_string())?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&Self::LAYOUT.to_le_bytes());
        bytes.extend_from_slice(&Digest::blake3(&body).0);
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// The state of a snapshot, and the time at which it was taken.
    ///
    /// # Errors
    /// The snapshot is damaged or of another version.
    pub fn from_snapshot(bytes: &[u8]) -> Result<(u64, Self), SnapshotError> {
        let damaged = |what: &str| SnapshotError::Damaged(what.to_owned());
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| damaged("it does not begin as one"))?;
        let (layout, rest) = rest.split_first_chunk::<4>().ok_or_else(|| damaged("it is cut off"))?;
        let (digest, body) = rest.split_first_chunk::<32>().ok_or_else(|| damaged("it is cut off"))?;
        let found = u32::from_le_bytes(*layout);
        if found != Self::LAYOUT {
            return Err(SnapshotError::Layout { found, expected: Self::LAYOUT });
        }
        if Digest::blake3(body).0 != *digest {
            return Err(damaged("its digest is another one"));
        }
        let limit = config::standard().with_limit::<{ SNAPSHOT_BYTES_MAX as usize }>();
        let ((now_ms, machine), _) = bincode::serde::decode_from_slice(body, limit).map_err(|error| damaged(&error.to_string()))?;
        Ok((now_ms, machine))
    }

    /// Whether the head says what this machine has never seen, although every head follows the machine that its journal remembers.
    pub fn is_behind(&self, head: &Head) -> bool {
        let versions = self.fragments.iter().zip(&head.fragments).any(|(ours, theirs)| ours.version < theirs.version);
        versions
            || self.next_t < head.outer_step
            || self.closed_below < head.closed_below
            || self.log.published().size < head.log.size
            || self.catalog.newest.page < head.catalog.page
    }

    /// Epochs and lease ids from which lease records are looked for: those that this machine does not know yet.
    pub fn unknown_leases_from(&self, epoch: u64) -> Vec<u64> {
        let later = (self.epoch + 1..=epoch).map(|epoch| epoch << LEASE_EPOCH_SHIFT).filter(|first| *first > self.next_lease);
        std::iter::once(self.next_lease).chain(later).collect()
    }

    pub(super) fn on_recovered(&mut self, facts: BucketFacts) {
        let now_ms = self.volatile.now_ms;
        // It is that of a snapshot.
        self.on_snapshot_stored(self.revision);
        for head in facts.log {
            self.log.adopt(head);
        }
        for page in facts.pages {
            self.adopt_page(page);
        }
        self.adopt_leases(facts.leases, facts.lease_ends);
        self.next_lease = self.next_lease.max(facts.epoch << LEASE_EPOCH_SHIFT);
        self.epoch = facts.epoch;
        let mut passed_by = None;
        for step in facts.steps {
            let Tape { t, fragment, closing, block, .. } = *step.tape();
            passed_by = self.passed_by(step.tape()).map(|version| (version, t)).or(passed_by);
            // What is decided from here on names no earlier one: a step that names a later one than all of a cycle was decided behind it.
            self.block = self.block.max(block);
            if closing && self.state == RunState::Open {
                (self.state, self.closing_from) = (RunState::Draining, Some(t));
            }
            let version = self.fragments[usize::from(fragment)].version;
            let pull = self.pulls.entry(t).or_insert_with(|| OpenPull::new(fragment, version, now_ms, 0));
            pull.closed_ms = now_ms;
            match step {
                StepFact::Taped(tape) => pull.stage = PullStage::Merging(tape),
                StepFact::Merged { manifest, id, keyframe_length, .. } => self.on_merged(*manifest, id, keyframe_length),
            }
            self.next_t = self.next_t.max(t + 1);
        }
        self.take_over(&facts.head);
        self.inherit_notices(&facts.head.notices);
        self.doubt_versions();
        facts.commitments.iter().for_each(|stored| self.adopt_commitment(stored));
        if let Some((version, t)) = passed_by {
            self.restore_again(version, t);
        }
        // A predecessor went through the round after the snapshot.
        if self.restoring.as_ref().is_some_and(|restoring| self.next_t >= restoring.until) {
            self.end_rollback();
        }
        for order in facts.orders {
            self.on_order(order);
        }
        if facts.head.state != RunState::Open {
            // No tape of the closing round lies there: it begins anew, with what is opened next. A rollback that was ordered before has its
            // own round first.
            self.drain();
        }
        // Who was banned, and is pardoned by one of them, may have been accepted since.
        facts.commitments.iter().for_each(|stored| self.adopt_commitment(stored));
    }

    fn take_over(&mut self, head: &Head) {
        let now_ms = self.volatile.now_ms;
        self.next_t = self.next_t.max(head.outer_step);
        let fragments = self.parameters().fragments;
        // Opened, and not decided: asked for again.
        for t in self.closed_below..self.next_t {
            if self.closed.contains(&t) || self.pulls.contains_key(&t) {
                continue;
            }
            if let Some(version) = self.round_at(t) {
                // A step of the round whose tape did not come through.
                let tape = self.restoring_tape(version, t);
                self.tape_at_once(tape);
                continue;
            }
            let fragment = protocol::schedule::fragment_of(t, fragments);
            let version = self.fragments[usize::from(fragment)].version;
            let deadline_ms = self.parameters().pull_deadline_ms;
            self.pulls.insert(t, OpenPull::new(fragment, version, now_ms, deadline_ms));
        }
        if head.state == RunState::Complete {
            self.drain();
            self.state = RunState::Complete;
        }
        let known = std::iter::once(&self.setup.release.release).chain(&self.releases).any(|name| *name == head.release.release);
        if !known {
            // Made by a predecessor after the snapshot, and with it what the snapshot says is being made.
            self.releasing = None;
            self.released_version = self.fragments.iter().map(|fragment| fragment.version).min().unwrap_or(0);
            self.log.add(LogKind::Release, head.release.manifest);
            self.releases.push(head.release.release.clone());
            self.release = head.release.clone();
        }
        self.block = self.block.max(head.block);
    }

    /// Lease by lease as they were given out, each with its end: a row that came back was not given to the next one before.
    pub(super) fn adopt_leases(&mut self, leases: Vec<Job>, ends: Vec<LeaseEnd>) {
        let mut ends: BTreeMap<u64, LeaseEnd> = ends.into_iter().map(|end| (end.lease, end)).collect();
        for lease in self.leases_to_book().collect::<Vec<_>>() {
            if let Some(end) = ends.remove(&lease) {
                self.adopt_end(&end);
            }
        }
        for mut job in leases {
            for lease in std::mem::take(&mut job.leases) {
                let id = lease.id;
                self.adopt_lease(&job, lease);
                if let Some(end) = ends.remove(&id) {
                    self.adopt_end(&end);
                }
            }
        }
    }

    /// A lease that the machine does not know: its learner trains on these rows.
    fn adopt_lease(&mut self, job: &Job, lease: Lease) {
        let now_ms = self.volatile.now_ms;
        let (slot, id) = ((job.hotkey, job.slot), lease.id);
        self.next_lease = self.next_lease.max(id + 1);
        if self.leases.contains_key(&id) {
            return;
        }
        self.void_leases(&lease);
        if !self.ledger.adopt_lease(id, &lease.rows) {
            tracing::error!(lease = id, "rows of this lease are booked otherwise; the books stand");
        }
        self.leases.insert(id, LeaseRecord::new(lease, slot, 0));
        match self.learners.get(&slot).map(|learner| learner.session_epoch) {
            Some(session) if session > job.session_epoch => return self.end_lease(id),
            Some(session) if session == job.session_epoch => {}
            _ => {
                self.end_leases(slot);
                // What the session before had offered, with no evidence of it in the bucket, stands in nobody's way.
                self.remove_offers(slot, |offer| offer.stage == OfferStage::Committed);
                self.learners.insert(slot, Learner::of_session(job.session_epoch, now_ms));
            }
        }
        if let Some(learner) = self.learners.get_mut(&slot) {
            learner.leases.push(id);
            learner.state = LearnerState::Training;
            learner.live = true;
        }
    }

    /// A writer gives rows that are leased to nobody else, as far as it knows: so an open lease of an earlier writer that holds some of these
    /// was written down when that one had been succeeded. It told no learner of it.
    fn void_leases(&mut self, given: &Lease) {
        let is_void = |(id, record): &(&u64, &LeaseRecord)| {
            let holds_rows = !record.ended || record.booking.is_some();
            holds_rows && *id >> LEASE_EPOCH_SHIFT < given.id >> LEASE_EPOCH_SHIFT && overlap(&record.lease.rows, &given.rows)
        };
        for id in self.leases.iter().filter(is_void).map(|(id, _)| *id).collect::<Vec<_>>() {
            let Some(LeaseRecord { lease, slot, .. }) = self.leases.remove(&id) else { continue };
            tracing::warn!(lease = id, by = given.id, "a writer that was succeeded gave out these rows; they are another one's");
            self.ledger.end_lease_whole(id, &lease.rows, false);
            self.take_lease(slot, id);
        }
    }

    /// How a writer before this one booked a lease.
    fn adopt_end(&mut self, end: &LeaseEnd) {
        let Some(record) = self.leases.get_mut(&end.lease) else { return };
        if !std::mem::replace(&mut record.ended, true) {
            record.ended_t = self.next_t;
        }
        record.booking = Some(end.clone());
        let slot = record.slot;
        self.take_lease(slot, end.lease);
        self.on_lease_ended(end);
    }
}

fn overlap(one: &[RowRange], other: &[RowRange]) -> bool {
    let meets = |a: &RowRange, b: &RowRange| a.shard == b.shard && a.start < b.end && b.start < a.end;
    one.iter().any(|a| other.iter().any(|b| meets(a, b)))
}
