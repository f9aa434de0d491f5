//! Learners: sessions, leases of rows, jobs and grants.

use std::collections::{BTreeMap, BTreeSet};

use protocol::documents::{Job, LearnerState, Lease, Progress, RunState};
use protocol::lease::LeaseRows;
use protocol::ledger::TokenLedger;
use protocol::{Digest, Reason};
use serde::{Deserialize, Serialize};

use super::timing::Average;
use super::{Effect, Guest, Key, Orchestrator, PULL_GRANTS_REFRESH_MS, ReceiptStage, STANDING_REFRESH_MS, Slot, VERSIONS_AHEAD, Want};

/// Steps before the end of a learner's last lease at which it gets the next one.
const LEASE_AHEAD_STEPS: u32 = 16;
/// So many of the newest ended leases of each learner are always kept, and a commitment counts the steps of no more leases before its own.
const LEASES_KEPT: usize = 6;
/// Further ended leases are kept for audits of so many cycles, up to so many of each learner: some learners use up several in a cycle.
const LEASES_KEPT_CYCLES: u64 = 3;
const LEASES_KEPT_MAX: usize = 128;
/// Finished leases that wait for their receipts, for each learner.
const RECEIPTS_AWAITED: usize = 2;
/// A lease that nobody finishes ends after so many times the time it should take.
const LEASE_DEADLINE_FACTOR: u64 = 20;
/// A learner that left so many pulls in a row without an answer is not waited for; it is pulled and merged all the same.
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
    pub lease_step: u32,
    /// Leases held now, oldest first.
    pub leases: Vec<u64>,
    /// Fragment versions applied, and steps since.
    pub fragments: Vec<(u64, u32)>,
    pub contributions: u64,
    pub last_reason: Reason,
    /// What its steps take.
    pub step: Average,
    /// Pulls in a row that it did not answer.
    pub misses: u8,
    pub job_dirty: bool,
    pub grants_dirty: bool,
    pub pull_grants_ms: u64,
}

/// A lease and how far it got.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeaseRecord {
    pub lease: Lease,
    pub slot: Slot,
    /// Steps covered by commitments that are stored write-once.
    pub evidence: u32,
    /// Local steps done and head of the step chain at each of these commitments.
    pub committed: Vec<(u64, Digest)>,
    /// Steps that the learner reported.
    pub reported: u32,
    pub receipt: ReceiptStage,
    pub ended: bool,
    /// Outer step that came next when it ended.
    pub ended_t: u64,
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
            lease_step: 0,
            leases: Vec::new(),
            fragments: Vec::new(),
            contributions: 0,
            last_reason: Reason::None,
            step: Average::default(),
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

    /// Whether it has not left pull after pull without an answer.
    pub fn answers_mostly(&self) -> bool {
        self.misses < MISSES_MAX
    }

    /// Whether a pull waits for its answer.
    pub fn is_eligible(&self) -> bool {
        self.can_answer() && self.answers_mostly()
    }
}

impl Orchestrator {
    pub(super) fn on_progress(&mut self, slot: Slot, id: Digest, record: Progress) {
        let (now_ms, ttl_ms) = (self.volatile.now_ms, self.parameters().learner_ttl_ms);
        if slot.1 != record.slot || !self.miners.contains(&slot.0) || self.banned.contains_key(&slot.0) {
            return;
        }
        match self.learners.get(&slot) {
            Some(learner) if record.session_epoch < learner.session_epoch => return,
            Some(learner) if record.session_epoch == learner.session_epoch => {}
            known => {
                let contributions = known.map_or(0, |learner| learner.contributions);
                self.end_leases(slot);
                self.withdraw_offers(slot);
                let learner = Learner { contributions, ..Learner::of_session(record.session_epoch, now_ms) };
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
        learner.fragments.clear();
        learner.fragments.extend(record.fragments.iter().map(|fragment| (fragment.version, fragment.steps)));
        if learner.leases.contains(&record.lease) {
            learner.lease = record.lease;
            learner.lease_step = record.lease_step;
        }
        if before != (learner.live, learner.state, learner.local_step > 0) {
            self.pace.survey = true;
            self.pace.pulls_changed = true;
            self.pace.dirty.insert(slot);
        }
        let live = learner.live;
        if let Some(lease) = self.leases.get_mut(&record.lease)
            && lease.slot == slot
        {
            lease.reported = lease.reported.max(record.lease_step.min(lease.lease.steps));
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

    /// A lease whose deadline has passed is over on both sides: the learner has dropped what it had not trained. Receipts have a little
    /// longer, also after a time in which nobody was here to take them.
    pub(super) fn expire_leases(&mut self) {
        let grace_ms = self.parameters().learner_ttl_ms;
        let (now_ms, resumed_ms) = (self.volatile.now_ms, self.pace.resumed_ms);
        let is_over = |record: &LeaseRecord| !record.ended && now_ms > record.lease.deadline_ms.max(resumed_ms).saturating_add(grace_ms);
        let over: Vec<(u64, Slot)> =
            self.leases.iter().filter(|(_, record)| is_over(record)).map(|(id, record)| (*id, record.slot)).collect();
        for (lease, slot) in over {
            tracing::info!(hotkey = %slot.0.short(), slot = slot.1, lease, "a lease was not finished in time, its rows return");
            self.end_lease(lease);
        }
    }

    /// Ends leases that are used up, and gives out the next one when the last runs low.
    fn extend_leases(&mut self, slot: Slot) {
        // Asked at every record: nothing is cloned.
        let Some(learner) = self.learners.get(&slot) else { return };
        let current = learner.lease;
        let is_behind = |lease: &u64| *lease < current;
        let behind = learner.leases.iter().copied().filter(is_behind).count();
        let (unfinished, last) = (learner.leases.len() - behind, learner.leases.last().copied());
        // What lies behind the learner waits for its receipt, but not for ever.
        let over: Vec<u64> = learner.leases.iter().copied().filter(is_behind).take(behind.saturating_sub(RECEIPTS_AWAITED)).collect();
        for lease in over {
            self.end_lease(lease);
        }
        let last =
            last.and_then(|id| self.leases.get(&id)).map(|record| (record.lease.schedule_start, record.lease.steps, record.reported));
        let runs_low = last.is_none_or(|(_, steps, reported)| reported + LEASE_AHEAD_STEPS >= steps);
        if !runs_low || unfinished >= 2 || self.state != RunState::Open {
            return;
        }
        let schedule_start = match last {
            Some((start, steps, _)) => start + u64::from(steps),
            None => protocol::schedule::run_step(self.parameters(), self.next_t),
        };
        self.grant_lease(slot, schedule_start);
    }

    fn grant_lease(&mut self, slot: Slot, schedule_start: u64) {
        let (steps, batch_rows) = (self.parameters().lease_steps, self.parameters().batch_rows);
        let id = self.next_lease;
        let rows = self.ledger.lease(id, u64::from(steps) * u64::from(batch_rows));
        let count: u64 = rows.iter().map(protocol::documents::RowRange::rows).sum();
        // The last rows of an epoch may not fill a step: it is a shorter one then, or they would wait for ever.
        let steps = count.div_ceil(u64::from(batch_rows)) as u32;
        let Some(learner) = self.learners.get_mut(&slot) else { return };
        if steps == 0 {
            learner.last_reason = Reason::NoWork;
            return;
        }
        self.next_lease += 1;
        let epoch = learner.session_epoch;
        let step_ms = self.timing.step_ms().max(1_000);
        let lease = Lease {
            id,
            rows,
            seed: Digest::derive("quasar/v1/data", &[&self.setup.run.0, &slot.0.0, &[slot.1], &epoch.to_le_bytes(), &id.to_le_bytes()]),
            batch_rows,
            steps,
            schedule_start,
            deadline_ms: self.volatile.now_ms + u64::from(steps) * step_ms * LEASE_DEADLINE_FACTOR,
        };
        learner.leases.push(id);
        learner.job_dirty = true;
        learner.grants_dirty = true;
        self.pace.dirty.insert(slot);
        self.leases.insert(id, LeaseRecord::new(lease, slot));
    }

    pub(super) fn end_leases(&mut self, slot: Slot) {
        let held = self.learners.get(&slot).map(|learner| learner.leases.clone()).unwrap_or_default();
        for lease in held {
            self.end_lease(lease);
        }
    }

    /// Books the rows of a lease: what the receipt shows is done, or without one what stored commitments prove; what was reported
    /// beyond is lost, the rest returns.
    pub(super) fn end_lease(&mut self, id: u64) {
        let Some(record) = self.leases.get_mut(&id) else { return };
        let slot = record.slot;
        if !std::mem::replace(&mut record.ended, true) {
            record.ended_t = self.next_t;
            book(&mut self.ledger, record);
        }
        if let Some(learner) = self.learners.get_mut(&slot) {
            learner.leases.retain(|lease| *lease != id);
            learner.job_dirty = true;
            self.pace.dirty.insert(slot);
        }
        let kept_from = self.next_t.saturating_sub(LEASES_KEPT_CYCLES * u64::from(self.parameters().fragments));
        let is_ended = |(_, record): &(&u64, &LeaseRecord)| record.slot == slot && record.ended;
        let ended: Vec<(u64, u64)> = self.leases.iter().filter(is_ended).map(|(id, record)| (*id, record.ended_t)).collect();
        let (older, most) = (ended.len().saturating_sub(LEASES_KEPT), ended.len().saturating_sub(LEASES_KEPT_MAX));
        for (number, (id, ended_t)) in ended.into_iter().take(older).enumerate() {
            if ended_t < kept_from || number < most {
                self.leases.remove(&id);
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
            let slots = if guest.validator { 1 } else { self.setup.parameters.slots };
            for slot in 0..slots {
                self.refresh_standing((guest.hotkey, slot), &guest, &versions, now_ms);
            }
        }
    }

    /// Publishes jobs and grants that changed or grow old.
    pub(super) fn refresh_jobs_and_grants(&mut self) {
        let now_ms = self.volatile.now_ms;
        for slot in std::mem::take(&mut self.pace.dirty) {
            if self.learners.get(&slot).is_some_and(|learner| learner.live) {
                self.refresh_job(slot);
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
            || mark.session_epoch != session_epoch
            || mark.recipient != recipient
            || outrun;
        if !due {
            return;
        }
        *mark = StandingMark { published_ms: now_ms.max(1), live, session_epoch, recipient, versions: versions.to_vec() };
        let mark = mark.clone();
        let revision = self.next_revision();
        let cycle = protocol::schedule::cycle_of(self.closed_below, self.parameters().fragments);
        self.emit(Effect::PublishStanding { revision, slot, validator, mark, cycle });
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
        let revision = self.next_revision();
        self.emit(Effect::PublishPullGrants { revision, slot, session_epoch, wants });
    }

    /// Leases of `slot` that an audit of its work in a cycle may need: its segment may have begun in the cycle before.
    pub(super) fn leases_of(&self, slot: Slot, cycle: u64) -> Vec<Lease> {
        let from = cycle.saturating_sub(1) * u64::from(self.parameters().fragments);
        let may_be = |record: &&LeaseRecord| record.slot == slot && (!record.ended || record.ended_t >= from);
        self.leases.values().filter(may_be).map(|record| record.lease.clone()).collect()
    }
}

/// Enters the rows of a lease that ended.
fn book(ledger: &mut TokenLedger, record: &LeaseRecord) {
    let lease = &record.lease;
    let total: u64 = lease.rows.iter().map(protocol::documents::RowRange::rows).sum();
    let rows_until = |step: u32| total.min(u64::from(step) * u64::from(lease.batch_rows));
    let rows_in = |step: &u32| rows_until(step.saturating_add(1)) - rows_until(*step);
    let done: BTreeSet<u32> = match &record.receipt {
        ReceiptStage::Settled { trained } => trained.iter().copied().collect(),
        _ => (0..record.evidence).collect(),
    };
    let done_rows: u64 = done.iter().map(rows_in).sum();
    let (is_all, is_none) = (done_rows == total, done.is_empty() && record.reported == 0);
    if is_all || is_none {
        return ledger.end_lease_whole(lease.id, &lease.rows, is_all);
    }
    let is_left = |step: &u32| !done.contains(step);
    let lost: Vec<u32> = (0..record.reported).filter(is_left).collect();
    let rest = (record.reported..lease.steps).filter(is_left);
    let rows = LeaseRows::of(lease);
    let steps = done.iter().chain(&lost).copied().chain(rest);
    let taken: Vec<(String, u64)> = steps.flat_map(|step| rows.step(step)).map(|row| (row.shard.to_owned(), row.row)).collect();
    let leftover = leftover_rows(lease, &taken);
    let order = taken.iter().chain(&leftover).map(|(shard, row)| (shard.as_str(), *row));
    ledger.end_lease(lease.id, order, done_rows, lost.iter().map(rows_in).sum());
}

/// The leases of each slot, oldest first, as far as they are known: what its commitments can have trained on.
pub(super) struct LeasedSteps(BTreeMap<Slot, Vec<(u64, u32)>>);

impl LeasedSteps {
    pub fn of(leases: &BTreeMap<u64, LeaseRecord>) -> Self {
        let mut steps: BTreeMap<Slot, Vec<(u64, u32)>> = BTreeMap::new();
        for (id, record) in leases {
            steps.entry(record.slot).or_default().push((*id, record.lease.steps));
        }
        Self(steps)
    }

    /// Most steps that a learner can have done when it committed to `lease_step` of `lease`: those of its earlier leases, and these.
    pub fn until(&self, slot: &Slot, lease: u64, lease_step: u32) -> u32 {
        let known = self.0.get(slot).map(Vec::as_slice).unwrap_or_default();
        let earlier = known[..known.partition_point(|(id, _)| *id < lease)].iter().rev().take(LEASES_KEPT);
        earlier.fold(lease_step, |sum, (_, steps)| sum.saturating_add(*steps))
    }
}

/// Rows of a lease beyond its last full batch.
fn leftover_rows(lease: &Lease, taken: &[(String, u64)]) -> Vec<(String, u64)> {
    let total: u64 = lease.rows.iter().map(protocol::documents::RowRange::rows).sum();
    if taken.len() as u64 == total {
        return Vec::new();
    }
    let taken: BTreeSet<&(String, u64)> = taken.iter().collect();
    lease
        .rows
        .iter()
        .flat_map(|range| (range.start..range.end).map(|row| (range.shard.clone(), row)))
        .filter(|row| !taken.contains(row))
        .collect()
}

/// The standing grants that a slot has.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StandingMark {
    pub published_ms: u64,
    pub live: bool,
    pub session_epoch: u64,
    /// The X25519 key that they are sealed to; with another one they are sealed anew.
    pub recipient: Option<[u8; 32]>,
    pub versions: Vec<u64>,
}
