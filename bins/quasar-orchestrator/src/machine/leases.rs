//! Leases of rows: given out, used up or taken back, and booked.

use std::collections::{BTreeMap, BTreeSet};

use protocol::Digest;
use protocol::Reason;
use protocol::documents::{Lease, LeaseEnd, RowRange, RunState};
use protocol::lease::LeaseRows;
use protocol::ledger::{RANGES_MAX, TokenLedger};
use protocol::log::LogKind;
use serde::{Deserialize, Serialize};

use super::{Effect, Orchestrator, ReceiptStage, Slot};

/// Steps before the end of a learner's last lease at which it gets the next one.
const LEASE_AHEAD_STEPS: u32 = 16;
/// So many of the newest ended leases of each learner are always kept, and a commitment counts the steps of no more leases before its own.
const LEASES_KEPT: usize = 6;
/// Further ended leases are kept for audits of so many cycles, up to so many of each learner: some learners use up several in a cycle.
const LEASES_KEPT_CYCLES: u64 = 3;
const LEASES_KEPT_MAX: usize = 128;
/// Finished leases that wait for their receipts, for each learner.
const RECEIPTS_AWAITED: usize = 2;
/// So many leases more than can be used up by now are given to a learner, over all its sessions; a short one counts as half of a whole one.
const LEASES_AT_ONCE: u64 = 4;
/// Ranges of rows in all the leases of an audit order: what a learner holds at once and the leases before it, where rows lie scattered.
const ORDER_RANGES_MAX: usize = 8 * RANGES_MAX;
/// A lease that nobody finishes ends after so many times the time it should take.
const LEASE_DEADLINE_FACTOR: u64 = 20;
/// A lease is believed to be used up at most at so many times the pace of all: a claim costs nothing, and takes no rows from the others.
const PACE_MAX: u64 = 16;

/// A lease and how far it got.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeaseRecord {
    pub lease: Lease,
    pub slot: Slot,
    /// Before this time none of it can be done: it was not given out, or the one before it was not used up. 0 if a writer before this
    /// one gave it out.
    pub from_ms: u64,
    /// Steps covered by commitments that are stored write-once.
    pub evidence: u32,
    /// Local steps done and head of the step chain at each of these commitments.
    pub committed: Vec<(u64, Digest)>,
    /// Steps that the learner reported, as far as the time since allows.
    pub reported: u32,
    pub receipt: ReceiptStage,
    pub ended: bool,
    /// How its rows are to be booked: until the record of it lies in the bucket they stay leased.
    pub booking: Option<LeaseEnd>,
    /// Outer step that came next when it ended.
    pub ended_t: u64,
}

/// Least time that a step is believed to take where a step of all takes `step_ms`.
fn step_ms_min(step_ms: u64) -> u64 {
    (step_ms / PACE_MAX).max(1)
}

impl LeaseRecord {
    pub(super) fn new(lease: Lease, slot: Slot, from_ms: u64) -> Self {
        Self {
            lease,
            slot,
            from_ms,
            evidence: 0,
            committed: Vec::new(),
            reported: 0,
            receipt: ReceiptStage::Awaited,
            ended: false,
            booking: None,
            ended_t: 0,
        }
    }

    /// Most steps of it that can be done by now where a step of all takes `step_ms`.
    pub(super) fn possible(&self, now_ms: u64, step_ms: u64) -> u32 {
        let steps = now_ms.saturating_sub(self.from_ms) / step_ms_min(step_ms);
        self.lease.steps.min(u32::try_from(steps).unwrap_or(u32::MAX))
    }

    fn end(&self) -> LeaseEnd {
        match &self.receipt {
            ReceiptStage::Settled { id, trained } => LeaseEnd::new(self.lease.id, trained.iter().copied(), self.reported, Some(*id)),
            _ => LeaseEnd::new(self.lease.id, 0..self.evidence, self.reported, None),
        }
    }
}

impl Orchestrator {
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
    pub(super) fn extend_leases(&mut self, slot: Slot) {
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

    /// Rows of a step of a learner's next lease.
    fn batch_rows(&mut self, slot: Slot) -> u32 {
        let (whole, target_ms) = (self.parameters().batch_rows, self.parameters().step_target_ms);
        // Who steps as often as the run wants need not step more often.
        let all_ms = self.timing.whole_step_ms().max(target_ms);
        self.learners.get_mut(&slot).map_or(whole, |learner| learner.batches.next(all_ms, whole))
    }

    fn grant_lease(&mut self, slot: Slot, schedule_start: u64) {
        let (steps, batch_rows) = (self.parameters().lease_steps, self.batch_rows(slot));
        let (now_ms, fastest_ms) = (self.volatile.now_ms, step_ms_min(self.timing.step_ms()));
        let ahead_ms = (LEASES_AT_ONCE - 1) * u64::from(steps) * fastest_ms;
        if self.learners.get(&slot).is_none_or(|learner| learner.leases_ms > now_ms + ahead_ms) {
            return;
        }
        let id = self.next_lease;
        let rows = self.ledger.lease(id, u64::from(steps) * u64::from(batch_rows), u64::from(batch_rows));
        let count: u64 = rows.iter().map(RowRange::rows).sum();
        // The last rows of an epoch may not fill a step: it is a shorter one then, or they would wait for ever.
        let steps = count.div_ceil(u64::from(batch_rows)) as u32;
        let Some(learner) = self.learners.get_mut(&slot) else { return };
        if steps == 0 {
            learner.last_reason = Reason::NoWork;
            return;
        }
        let counted = u64::from(steps.max(self.setup.parameters.lease_steps / 2));
        learner.leases_ms = learner.leases_ms.max(now_ms) + counted * fastest_ms;
        self.next_lease += 1;
        let epoch = learner.session_epoch;
        let used_up_ms = |record: &LeaseRecord| record.from_ms + u64::from(record.lease.steps) * fastest_ms;
        let before = learner.leases.last().and_then(|last| self.leases.get(last)).map_or(0, used_up_ms);
        let step_ms = self.timing.step_ms().max(1_000);
        let lease = Lease {
            id,
            rows,
            seed: Digest::derive("quasar/v1/data", &[&self.setup.run.0, &slot.0.0, &[slot.1], &epoch.to_le_bytes(), &id.to_le_bytes()]),
            batch_rows,
            steps,
            schedule_start,
            deadline_ms: now_ms + u64::from(steps) * step_ms * LEASE_DEADLINE_FACTOR,
        };
        learner.leases.push(id);
        learner.job_dirty = true;
        learner.grants_dirty = true;
        self.pace.dirty.insert(slot);
        self.leases.insert(id, LeaseRecord::new(lease, slot, now_ms.max(before)));
    }

    pub(super) fn end_leases(&mut self, slot: Slot) {
        let held = self.learners.get(&slot).map(|learner| learner.leases.clone()).unwrap_or_default();
        for lease in held {
            self.end_lease(lease);
        }
    }

    /// Ends a lease. How its rows are booked is written down first ([`Input::LeaseEnded`](super::Input::LeaseEnded)): what the receipt
    /// shows is done, or without one what stored commitments prove; what was reported beyond is lost, the rest returns.
    pub(super) fn end_lease(&mut self, id: u64) {
        let Some(record) = self.leases.get_mut(&id) else { return };
        let slot = record.slot;
        if !std::mem::replace(&mut record.ended, true) {
            record.ended_t = self.next_t;
            record.booking = Some(record.end());
            self.record_end(id);
        }
        self.take_lease(slot, id);
    }

    fn record_end(&mut self, id: u64) {
        if let Some(end) = self.leases.get(&id).and_then(|record| record.booking.clone()) {
            self.emit(Effect::RecordLeaseEnd { end: Box::new(end) });
        }
    }

    /// The learner holds this lease no more.
    pub(super) fn take_lease(&mut self, slot: Slot, id: u64) {
        if let Some(learner) = self.learners.get_mut(&slot) {
            learner.leases.retain(|lease| *lease != id);
            learner.job_dirty = true;
            self.pace.dirty.insert(slot);
        }
    }

    /// How a lease is booked lies in the bucket, as this writer or one before it decided.
    pub(super) fn on_lease_ended(&mut self, end: &LeaseEnd) {
        let Some(record) = self.leases.get_mut(&end.lease) else { return };
        if record.booking.take().is_none() {
            return;
        }
        let slot = record.slot;
        book(&mut self.ledger, &record.lease, end);
        if let Some(receipt) = end.receipt {
            self.log.add(LogKind::Receipt, receipt);
        }
        self.forget_leases(slot);
    }

    /// Of the leases that are booked, only those stay that audits need or may need.
    fn forget_leases(&mut self, slot: Slot) {
        let kept_from = self.next_t.saturating_sub(LEASES_KEPT_CYCLES * u64::from(self.parameters().fragments));
        let audited: BTreeSet<u64> =
            self.audits.values().filter(|case| case.slot() == slot).flat_map(|case| case.leases.iter().copied()).collect();
        let is_booked =
            |(id, record): &(&u64, &LeaseRecord)| record.slot == slot && record.ended && record.booking.is_none() && !audited.contains(id);
        let booked: Vec<(u64, u64, usize)> =
            self.leases.iter().rev().filter(is_booked).map(|(id, record)| (*id, record.ended_t, record.lease.rows.len())).collect();
        let mut ranges = 0;
        for (number, (id, ended_t, of)) in booked.into_iter().enumerate() {
            ranges += of;
            if number >= LEASES_KEPT && (ended_t < kept_from || number >= LEASES_KEPT_MAX || ranges > ORDER_RANGES_MAX) {
                self.leases.remove(&id);
            }
        }
    }

    pub(super) fn resume_leases(&mut self) {
        let open: Vec<u64> = self.leases.iter().filter(|(_, record)| record.booking.is_some()).map(|(id, _)| *id).collect();
        for lease in open {
            self.record_end(lease);
        }
    }

    /// Leases whose end this machine does not know to be written down.
    pub fn leases_to_book(&self) -> impl Iterator<Item = u64> {
        self.leases.iter().filter(|(_, record)| !record.ended || record.booking.is_some()).map(|(id, _)| *id)
    }

    /// Leases of `slot` that an audit of its work in a cycle may need, oldest first: its segment may have begun in the cycle before, and
    /// where leases are short, some before.
    pub(super) fn leases_of(&self, slot: Slot, cycle: u64) -> Vec<u64> {
        let from = cycle.saturating_sub(1) * u64::from(self.parameters().fragments);
        let (mut earlier, mut ranges, mut leases) = (0, 0, Vec::new());
        for (id, record) in self.leases.iter().rev().filter(|(_, record)| record.slot == slot) {
            earlier += usize::from(record.ended && record.ended_t < from);
            ranges += record.lease.rows.len();
            if earlier > LEASES_KEPT || ranges > ORDER_RANGES_MAX {
                break;
            }
            leases.push(*id);
        }
        leases.reverse();
        leases
    }
}

/// Enters the rows of a lease that ended.
fn book(ledger: &mut TokenLedger, lease: &Lease, end: &LeaseEnd) {
    let total: u64 = lease.rows.iter().map(RowRange::rows).sum();
    let rows_until = |step: u32| total.min(u64::from(step) * u64::from(lease.batch_rows));
    let rows_in = |step: &u32| rows_until(step.saturating_add(1)) - rows_until(*step);
    let done: BTreeSet<u32> = end.done_steps(lease.steps).collect();
    let reported = end.reported.min(lease.steps);
    let done_rows: u64 = done.iter().map(rows_in).sum();
    let (is_all, is_none) = (done_rows == total, done.is_empty() && reported == 0);
    if is_all || is_none {
        return ledger.end_lease_whole(lease.id, &lease.rows, is_all);
    }
    let is_left = |step: &u32| !done.contains(step);
    let lost: Vec<u32> = (0..reported).filter(is_left).collect();
    let rest = (reported..lease.steps).filter(is_left);
    let rows = LeaseRows::of(lease);
    let steps = done.iter().chain(&lost).copied().chain(rest);
    let taken: Vec<(String, u64)> = steps.flat_map(|step| rows.step(step)).map(|row| (row.shard.to_owned(), row.row)).collect();
    let leftover = leftover_rows(lease, &taken);
    let order = taken.iter().chain(&leftover).map(|(shard, row)| (shard.as_str(), *row));
    ledger.end_lease(lease.id, order, done_rows, lost.iter().map(rows_in).sum());
}

/// The leases of each slot, oldest first, as far as they are known: what its commitments can have trained on.
pub(super) struct LeasedSteps(BTreeMap<Slot, Vec<Leased>>);

#[derive(Clone, Copy)]
struct Leased {
    id: u64,
    steps: u32,
    batch_rows: u32,
}

impl LeasedSteps {
    pub fn of(leases: &BTreeMap<u64, LeaseRecord>) -> Self {
        let mut steps: BTreeMap<Slot, Vec<Leased>> = BTreeMap::new();
        for (id, LeaseRecord { lease, slot, .. }) in leases {
            steps.entry(*slot).or_default().push(Leased { id: *id, steps: lease.steps, batch_rows: lease.batch_rows });
        }
        Self(steps)
    }

    /// What a learner can have used up when it committed to `lease_step` of `lease`, newest first: these steps of it, and all of its earlier
    /// ones.
    fn before(&self, slot: &Slot, lease: u64, lease_step: u32) -> impl Iterator<Item = Leased> {
        let known = self.0.get(slot).map(Vec::as_slice).unwrap_or_default();
        let (earlier, rest) = known.split_at(known.partition_point(|leased| leased.id < lease));
        let own = rest.first().filter(|leased| leased.id == lease).map(|leased| Leased { steps: lease_step, ..*leased });
        own.into_iter().chain(earlier.iter().rev().take(LEASES_KEPT).copied())
    }

    /// Most steps that it can have done by then.
    pub fn until(&self, slot: &Slot, lease: u64, lease_step: u32) -> u32 {
        self.before(slot, lease, lease_step).fold(0, |sum, leased| sum.saturating_add(leased.steps))
    }

    /// Rows of the last `steps` of these.
    pub fn rows(&self, slot: &Slot, lease: u64, lease_step: u32, steps: u32) -> u64 {
        let mut left = steps;
        let mut rows = 0;
        for leased in self.before(slot, lease, lease_step) {
            let taken = left.min(leased.steps);
            left -= taken;
            rows += u64::from(taken) * u64::from(leased.batch_rows);
        }
        rows
    }
}

/// Rows of a lease beyond its last full batch.
fn leftover_rows(lease: &Lease, taken: &[(String, u64)]) -> Vec<(String, u64)> {
    let total: u64 = lease.rows.iter().map(RowRange::rows).sum();
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
