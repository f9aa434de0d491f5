//! Audits: selected by the beacon when a cycle is over, announced, opened by their miners, ordered from their validators.

use protocol::audits::{Selection, select};
use protocol::documents::{MergeManifest, OPENING_PARTS, OpeningPart, Progress};
use protocol::{AccountId, Digest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::{Effect, Key, Orchestrator, Slot, Want};

/// Largest part of an opening, in bytes for each element of the model: weights and two moments in f32, and room for the rest.
const OPENING_BYTES_PER_ELEMENT: u64 = 16;
const OPENING_BYTES_MIN: u64 = 16 << 20;

/// An audit until its order is published.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AuditCase {
    pub selection: Selection,
    pub deadline_ms: u64,
    pub parts: BTreeMap<u8, OpeningPart>,
    pub ordering: bool,
}

impl AuditCase {
    /// Whether the miner may still upload.
    pub fn is_opening(&self) -> bool {
        !self.ordering
    }

    fn is_opened(&self) -> bool {
        (0..OPENING_PARTS).all(|part| self.parts.get(&part).is_some_and(|part| part.uploaded))
    }
}

impl Orchestrator {
    /// Asks for the beacon of the next finished cycle; orders audits whose opening is complete or overdue.
    pub(super) fn advance_audits(&mut self) {
        let fragments = u64::from(self.parameters().fragments);
        let (first, end) = (self.audit_cycle * fragments, (self.audit_cycle + 1) * fragments);
        if self.closed_below >= end && self.volatile.beacon_asked != Some(self.audit_cycle) {
            let last_block = self.manifests.range(first..end).map(|(_, manifest)| manifest.block).max();
            let Some(last_block) = last_block else {
                self.audit_cycle += 1;
                return;
            };
            let block = last_block + u64::from(self.parameters().audit.beacon_blocks);
            if self.block >= block {
                self.volatile.beacon_asked = Some(self.audit_cycle);
                let cycle = self.audit_cycle;
                self.emit(Effect::ReadBeacon { cycle, block });
            }
        }
        let now_ms = self.volatile.now_ms;
        let due: Vec<Digest> = self
            .audits
            .iter()
            .filter(|(_, case)| case.is_opening() && (case.is_opened() || now_ms >= case.deadline_ms))
            .map(|(audit, _)| *audit)
            .collect();
        for audit in due {
            self.order(audit);
        }
    }

    pub(super) fn on_beacon(&mut self, cycle: u64, block: u64, hash: &[u8; 32]) {
        if cycle != self.audit_cycle {
            return;
        }
        let fragments = u64::from(self.parameters().fragments);
        let merges: Vec<MergeManifest> =
            self.manifests.range(cycle * fragments..(cycle + 1) * fragments).map(|(_, manifest)| manifest.clone()).collect();
        let validators: Vec<AccountId> = self.guests.iter().filter(|guest| guest.validator).map(|guest| guest.hotkey).collect();
        let deadline_ms = self.volatile.now_ms + self.parameters().audit.opening_ms;
        for selection in select(self.setup.run, cycle, block, hash, &merges, &validators) {
            tracing::debug!(cycle, hotkey = %selection.hotkey.short(), validator = %selection.validator.short(), t = selection.t, "audit selected");
            self.audits.insert(selection.audit, AuditCase { selection, deadline_ms, parts: BTreeMap::new(), ordering: false });
        }
        self.audit_cycle += 1;
        self.head_dirty = true;
    }

    /// Takes up announced and uploaded parts of openings.
    pub(super) fn on_openings(&mut self, slot: Slot, record: &Progress) {
        let elements: u64 = self.fragments.iter().map(|fragment| fragment.payload_length / 2).sum();
        let limit = (elements * OPENING_BYTES_PER_ELEMENT).max(OPENING_BYTES_MIN);
        let mut changed = false;
        for part in &record.openings {
            let Some(case) = self.audits.get_mut(&part.audit) else { continue };
            if (case.selection.hotkey, case.selection.slot) != slot
                || part.part >= OPENING_PARTS
                || part.length > limit
                || !case.is_opening()
            {
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
        if changed && let Some(learner) = self.learners.get_mut(&slot) {
            learner.grants_dirty = true;
        }
    }

    pub(super) fn opening_wants(&self, slot: Slot) -> Vec<Want> {
        self.audits
            .values()
            .filter(|case| case.is_opening() && (case.selection.hotkey, case.selection.slot) == slot)
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
        let leases = self.leases_of((selection.hotkey, selection.slot));
        self.head_dirty = true;
        self.emit(Effect::OrderAudit { selection, parts, leases });
    }

    pub(super) fn resume_audits(&mut self) {
        let ordering: Vec<Digest> = self.audits.iter().filter(|(_, case)| case.ordering).map(|(audit, _)| *audit).collect();
        for audit in ordering {
            self.order(audit);
        }
    }
}
