//! Audits: selected by the beacon behind a cycle, announced, opened by their miners, ordered from their validators.

use protocol::audits::{NOTICES_OF_SLOT, SEGMENT_CYCLES, Selection, beacon_from, select};
use protocol::documents::{
    AuditDraw, MergeManifest, Notice, OPENING_PARTS, OpeningPart, Progress, RENEWALS_PER_TTL, RunState, VerdictResult,
    opening_part_bytes_max,
};
use protocol::log::LogKind;
use protocol::schedule::cycle_of;
use protocol::{AccountId, Digest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Bound;

use super::{Effect, Key, Orchestrator, Retired, Slot, Volatile, Want};

/// Notices that the head has room for.
const NOTICES_MAX: usize = 1_900;
/// Of a slot that has so many audits unopened, the oldest one is ordered unopened when another one comes.
const UNOPENED_MAX: usize = 8;
/// A head that takes so long has found no store.
pub(super) const HEAD_SLOW_MS: u64 = 10_000;
/// Until a record is read, so many polls may pass.
const HEARD_POLLS: u64 = 2;
/// A verdict is awaited as long as the grants of its audit live, and looked for after so many polls.
pub const VERDICT_MS: u64 = 6 * 3_600_000;
/// An opening is there for longer than its grants live, whatever the clocks say: to a validator, one that is not there was never uploaded.
const OPENING_KEPT_MS: u64 = VERDICT_MS + 15 * 60_000;
const VERDICT_POLLS: u64 = 10;
/// Most reads of verdicts under way.
const VERDICTS_AT_ONCE: usize = 256;

/// An audit until its order is published.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AuditCase {
    pub selection: Selection,
    /// Leases that it may need.
    pub leases: Vec<u64>,
    /// Public key that the parts are sealed to; none while its notice waits for room in the head.
    pub key: Option<[u8; 32]>,
    /// When the time to open it is over, once it has a key.
    pub deadline_ms: u64,
    pub parts: BTreeMap<u8, OpeningPart>,
    pub ordering: bool,
}

impl AuditCase {
    pub(super) fn slot(&self) -> Slot {
        (self.selection.hotkey, self.selection.slot)
    }

    /// Whether the miner may still upload.
    pub fn is_opening(&self) -> bool {
        !self.ordering
    }

    fn is_opened(&self) -> bool {
        (0..OPENING_PARTS).all(|part| self.parts.get(&part).is_some_and(|part| part.uploaded))
    }
}

/// An ordered audit whose verdict is not revealed yet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct AwaitedVerdict {
    pub validator: AccountId,
    pub until_ms: u64,
    /// Nothing more can be uploaded to its opening.
    pub is_opened: bool,
    /// Outer step of the audited payload.
    pub t: u64,
}

impl Orchestrator {
    /// Asks for the beacon of the next finished cycle; orders audits whose opening is complete or overdue.
    pub(super) fn advance_audits(&mut self) {
        let fragments = u64::from(self.parameters().fragments);
        let (first, end) = (self.audit_cycle * fragments, (self.audit_cycle + 1) * fragments);
        // Without a metagraph nobody could be selected.
        if self.closed_below >= end && self.volatile.beacon_asked != Some(self.audit_cycle) && !self.guests.is_empty() {
            let last_block = self.manifests.range(first..end).map(|(_, manifest)| manifest.block).max();
            let Some(last_block) = last_block else { return self.end_audit_cycle() };
            if let Some(block) = self.beacon_block(last_block, end) {
                self.volatile.beacon_asked = Some(self.audit_cycle);
                let cycle = self.audit_cycle;
                self.emit(Effect::ReadBeacon { cycle, block });
            }
        }
        let now_ms = self.volatile.now_ms;
        let is_in_touch = self.out_of_touch_ms() == 0;
        let is_overdue = |case: &AuditCase| is_in_touch && case.key.is_some() && now_ms >= case.deadline_ms;
        let due: Vec<Digest> = self
            .audits
            .iter()
            .filter(|(_, case)| case.is_opening() && (case.is_opened() || is_overdue(case)))
            .map(|(audit, _)| *audit)
            .collect();
        for audit in due {
            self.order(audit);
        }
        self.read_verdicts();
    }

    /// Block of the beacon of the cycle that ends before step `end` and names `last_block` at last, once the chain has it.
    fn beacon_block(&self, last_block: u64, end: u64) -> Option<u64> {
        let blocks = u64::from(self.parameters().audit.beacon_blocks);
        // While the chain is away, there is no need to look at all that was merged meanwhile.
        if self.block < last_block + blocks {
            return None;
        }
        let behind = self.manifests.range(end..self.closed_below).map(|(_, manifest)| manifest.block);
        let is_over = self.state == RunState::Complete && self.closed_below >= self.next_t;
        let block = beacon_from(last_block, behind, is_over)? + blocks;
        (self.block >= block).then_some(block)
    }

    pub(super) fn on_beacon(&mut self, draw: &AuditDraw) {
        let cycle = draw.cycle;
        if cycle != self.audit_cycle {
            return;
        }
        let fragments = u64::from(self.parameters().fragments);
        // They are most of a snapshot, and only this selection needs them: what is known of them afterwards is what to delete.
        let later = self.manifests.split_off(&((cycle + 1) * fragments));
        let merges: Vec<MergeManifest> = std::mem::replace(&mut self.manifests, later).into_values().collect();
        for merge in &merges {
            self.payloads.entry(merge.t).or_default().extend(merge.contributions.iter().map(|one| (one.hotkey, one.slot)));
        }
        // Until the notice is read, so many more pulls may be answered.
        let answered = self.next_t + u64::from(self.parameters().overlap) + 1;
        let kept_from = answered.saturating_sub(SEGMENT_CYCLES * fragments);
        // Of what is inherited, nobody took up what its learner may have uploaded meanwhile.
        let later_ms = self.volatile.now_ms + self.parameters().audit.opening_ms;
        for selection in select(self.setup.run, self.parameters().audit.rate_ppm, draw, &merges) {
            tracing::debug!(cycle, hotkey = %selection.hotkey.short(), validator = %selection.validator.short(), t = selection.t, "audit selected");
            let inherited = self.inherited_notice(&selection.audit);
            if selection.t < kept_from && inherited.is_none() {
                tracing::warn!(cycle, t = selection.t, "not audited: the beacon came so late that learners have let go of the segment");
                continue;
            }
            let slot = (selection.hotkey, selection.slot);
            self.order_oldest_unopened(slot);
            let leases = self.leases_of(slot, cycle);
            let (key, deadline_ms) = inherited.map_or((None, 0), |(key, until_ms)| (Some(key), until_ms.max(later_ms)));
            let case = AuditCase { selection, leases, key, deadline_ms, parts: BTreeMap::new(), ordering: false };
            self.audits.insert(case.selection.audit, case);
        }
        self.end_audit_cycle();
        self.make_opening_keys();
    }

    fn end_audit_cycle(&mut self) {
        self.audit_cycle += 1;
        let (audit_cycle, fragments) = (self.audit_cycle, self.parameters().fragments);
        self.inherited.retain(|Notice::OpenAudit { t, .. }| cycle_of(*t, fragments) >= audit_cycle);
    }

    /// Goes on with the notices that a predecessor published after the snapshot: learners drop what they prepared for one that is gone. For
    /// what is noticed there is the whole time anew: who knows what of it was heard.
    pub(super) fn inherit_notices(&mut self, notices: &[Notice]) {
        let fragments = self.parameters().fragments;
        for notice in notices {
            let Notice::OpenAudit { audit, t, deadline_ms, key, .. } = notice;
            let is_known = self.inherited_notice(audit).is_some();
            match self.audits.get_mut(audit) {
                Some(case) if case.key.is_none() => (case.key, case.deadline_ms) = (Some(*key), *deadline_ms),
                None if cycle_of(*t, fragments) >= self.audit_cycle && !is_known => self.inherited.push(notice.clone()),
                _ => {}
            }
        }
        self.inherited.truncate(NOTICES_MAX.saturating_sub(self.noticed().count()));
        self.in_touch_ms = self.volatile.now_ms;
        let later_ms = self.volatile.now_ms + self.parameters().audit.opening_ms;
        for case in self.audits.values_mut().filter(|case| case.key.is_some()) {
            case.deadline_ms = case.deadline_ms.max(later_ms);
        }
    }

    /// Key and deadline that a predecessor gave this audit.
    fn inherited_notice(&self, audit: &Digest) -> Option<([u8; 32], u64)> {
        self.inherited
            .iter()
            .find_map(|Notice::OpenAudit { audit: of, key, deadline_ms, .. }| (of == audit).then_some((*key, *deadline_ms)))
    }

    /// Audits whose notices are in the head: until the order is in the bucket, for a successor from there may need the opening.
    pub(super) fn noticed(&self) -> impl Iterator<Item = &AuditCase> {
        self.audits.values().filter(|case| case.key.is_some())
    }

    /// Who opens nothing does not hold up the audits of others for ever. What is being uploaded is ordered last.
    fn order_oldest_unopened(&mut self, slot: Slot) {
        let unopened = || self.audits.values().filter(|case| case.is_opening() && case.slot() == slot);
        if unopened().count() >= UNOPENED_MAX
            && let Some(oldest) = unopened().min_by_key(|case| (!case.parts.is_empty(), case.selection.cycle))
        {
            let audit = oldest.selection.audit;
            self.order(audit);
        }
    }

    /// Asks for the keys of the audits whose notices the head has room for, oldest first.
    fn make_opening_keys(&mut self) {
        let mut noticed: BTreeMap<Slot, u64> = BTreeMap::new();
        let mut room = NOTICES_MAX.saturating_sub(self.inherited.len());
        for case in self.noticed() {
            *noticed.entry(case.slot()).or_default() += 1;
            room = room.saturating_sub(1);
        }
        let mut waiting: Vec<&AuditCase> = self.audits.values().filter(|case| case.is_opening() && case.key.is_none()).collect();
        waiting.sort_by_key(|case| case.selection.cycle);
        waiting.retain(|case| {
            let of_slot = noticed.entry(case.slot()).or_default();
            *of_slot += 1;
            *of_slot <= NOTICES_OF_SLOT
        });
        let audits: Vec<Digest> = waiting.into_iter().take(room).map(|case| case.selection.audit).collect();
        if !audits.is_empty() {
            self.emit(Effect::MakeOpeningKeys { audits });
        }
    }

    /// From here on the notices of these audits are in the head, and the time to open them runs: of a slot one after the other, as it
    /// opens them.
    pub(super) fn on_opening_keys(&mut self, keys: &[(Digest, [u8; 32])]) {
        let (now_ms, opening_ms) = (self.volatile.now_ms, self.parameters().audit.opening_ms);
        let mut busy_until: BTreeMap<Slot, u64> = BTreeMap::new();
        for case in self.noticed().filter(|case| case.is_opening()) {
            let until_ms = busy_until.entry(case.slot()).or_insert(now_ms);
            *until_ms = case.deadline_ms.max(*until_ms);
        }
        for (audit, key) in keys {
            if let Some(case) = self.audits.get_mut(audit).filter(|case| case.is_opening() && case.key.is_none()) {
                let until_ms = busy_until.entry(case.slot()).or_insert(now_ms);
                *until_ms += opening_ms;
                (case.key, case.deadline_ms) = (Some(*key), *until_ms);
                self.head_dirty = true;
            }
        }
    }

    /// For how long nobody may have reached the store, or this process: it or the store was away, its machine slept, its clock was set, or
    /// is so wrong that one side refuses what the other writes. Whatever it was, no new records were read, or no heads published.
    fn out_of_touch_ms(&self) -> u64 {
        let heard_ms = self.parameters().learner_ttl_ms / RENEWALS_PER_TTL + HEARD_POLLS * self.parameters().poll_ms;
        self.volatile.now_ms.saturating_sub(self.in_touch_ms).saturating_sub(heard_ms)
    }

    /// A current record was read. While the heads get out, too, the time to open something runs.
    pub(super) fn note_heard(&mut self) {
        let Volatile { now_ms, head_ms, head_in_flight, .. } = self.volatile;
        if head_in_flight && now_ms > head_ms + HEAD_SLOW_MS {
            return;
        }
        let away_ms = self.out_of_touch_ms();
        self.in_touch_ms = now_ms;
        self.give_longer(away_ms);
    }

    /// Nobody could open anything for so long: what is noticed has so much longer. The head need not say so at once: a learner opens what is
    /// noticed for as long as it is.
    fn give_longer(&mut self, away_ms: u64) {
        if away_ms == 0 {
            return;
        }
        for case in self.audits.values_mut().filter(|case| case.key.is_some()) {
            case.deadline_ms = case.deadline_ms.saturating_add(away_ms);
        }
        for Notice::OpenAudit { deadline_ms, .. } in &mut self.inherited {
            *deadline_ms = deadline_ms.saturating_add(away_ms);
        }
    }

    /// Takes up announced and uploaded parts of openings.
    pub(super) fn on_openings(&mut self, slot: Slot, record: &Progress) {
        let elements: u64 = self.setup.fragments.iter().map(|fragment| fragment.elements).sum();
        let limits: Vec<u64> = (0..OPENING_PARTS).map(|part| opening_part_bytes_max(part, elements, self.parameters())).collect();
        let mut changed = false;
        for part in &record.openings {
            let Some(case) = self.audits.get_mut(&part.audit) else { continue };
            let fits = limits.get(usize::from(part.part)).is_some_and(|limit| part.length <= *limit);
            if case.slot() != slot || !fits || !case.is_opening() {
                continue;
            }
            let known = case.parts.entry(part.part).or_insert_with(|| {
                changed = true;
                OpeningPart { uploaded: false, ..part.clone() }
            });
            // Once announced, length and digest stand; only the upload can be added.
            if part.uploaded && known.length == part.length && known.sha256 == part.sha256 {
                known.uploaded = true;
            }
        }
        if changed {
            self.grants_changed(slot);
        }
    }

    pub(super) fn opening_wants(&self, slot: Slot) -> Vec<Want> {
        self.audits
            .values()
            .filter(|case| case.is_opening() && case.slot() == slot)
            .flat_map(|case| case.parts.values())
            .filter(|part| !part.uploaded)
            .map(|part| Want::WriteOnce {
                key: Key::Opening { slot, audit: part.audit, part: part.part },
                length: part.length,
                sha256: part.sha256,
            })
            .collect()
    }

    fn order(&mut self, audit: Digest) {
        let Some(case) = self.audits.get_mut(&audit) else { return };
        case.ordering = true;
        let parts = if case.is_opened() { case.parts.values().map(|part| (part.length, part.sha256)).collect() } else { Vec::new() };
        let selection = Box::new(case.selection.clone());
        let leases = case.leases.iter().filter_map(|id| self.leases.get(id)).map(|record| record.lease.clone()).collect();
        let recipient = self.recipient(&selection.validator);
        self.emit(Effect::OrderAudit { selection, recipient, parts, leases });
    }

    pub(super) fn on_audit_ordered(&mut self, audit: Digest) {
        let Some(case) = self.audits.remove(&audit) else { return };
        self.audits_ordered += 1;
        self.head_dirty = true;
        let until_ms = self.volatile.now_ms + VERDICT_MS;
        // Also where none is known of: a predecessor may have known.
        self.openings.insert(audit, (case.slot(), self.volatile.now_ms + OPENING_KEPT_MS));
        let awaited = AwaitedVerdict { validator: case.selection.validator, until_ms, t: case.selection.t, is_opened: case.is_opened() };
        self.verdicts_awaited.insert(audit, awaited);
        self.make_opening_keys();
    }

    /// Looks for the verdicts of ordered audits, which go into the log.
    fn read_verdicts(&mut self) {
        let now_ms = self.volatile.now_ms;
        if now_ms < self.volatile.verdicts_ms + VERDICT_POLLS * self.parameters().poll_ms {
            return;
        }
        self.volatile.verdicts_ms = now_ms;
        self.verdicts_awaited.retain(|_, awaited| awaited.until_ms > now_ms);
        // All in turn, and none a second time before the first has answered: a store that is away for a night must not find a night's reads
        // waiting.
        let room = VERDICTS_AT_ONCE.saturating_sub(self.volatile.verdicts_asked.len());
        let last = self.volatile.verdict_asked_last;
        let behind = self.verdicts_awaited.range((last.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded));
        let before = last.map(|last| self.verdicts_awaited.range(..=last)).into_iter().flatten();
        let is_due = |(audit, _): &(&Digest, &AwaitedVerdict)| !self.volatile.verdicts_asked.contains(*audit);
        let due: Vec<(Digest, AccountId)> =
            behind.chain(before).filter(is_due).take(room).map(|(audit, awaited)| (*audit, awaited.validator)).collect();
        for (audit, validator) in due {
            self.volatile.verdicts_asked.insert(audit);
            self.volatile.verdict_asked_last = Some(audit);
            self.emit(Effect::ReadVerdict { audit, validator });
        }
        self.retire_openings();
    }

    /// Openings are as large as the learner's whole state: they go when their verdict is there, or nobody can read them any more.
    fn retire_openings(&mut self) {
        let now_ms = self.volatile.now_ms;
        let over: Vec<(Slot, Digest)> =
            self.openings.extract_if(.., |_, (_, until_ms)| *until_ms <= now_ms).map(|(audit, (slot, _))| (slot, audit)).collect();
        self.delete(Retired { openings: over, ..Retired::default() });
    }

    pub(super) fn on_verdict(&mut self, audit: Digest, verdict: Option<(Digest, VerdictResult)>) {
        self.volatile.verdicts_asked.remove(&audit);
        let Some((id, result)) = verdict else { return };
        let Some(awaited) = self.verdicts_awaited.remove(&audit) else { return };
        if awaited.is_opened
            && let Some((_, until_ms)) = self.openings.get_mut(&audit)
        {
            *until_ms = self.volatile.now_ms;
        }
        match result {
            VerdictResult::Pass => self.verdicts.pass += 1,
            VerdictResult::Mismatch => self.verdicts.fail += 1,
            VerdictResult::Inconclusive | VerdictResult::NoOpening | VerdictResult::NotEvaluated => self.verdicts.other += 1,
        }
        self.log.add(LogKind::Verdict, id);
    }

    pub(super) fn resume_audits(&mut self) {
        self.make_opening_keys();
        let ordering: Vec<Digest> = self.audits.iter().filter(|(_, case)| case.ordering).map(|(audit, _)| *audit).collect();
        for audit in ordering {
            self.order(audit);
        }
    }
}
