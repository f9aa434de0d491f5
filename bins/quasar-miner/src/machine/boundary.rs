//! The boundary between two steps: what the trainer is to do there, and what came of it.

use protocol::documents::{Commitment, Receipt, RunState};
use protocol::steps::{Exchange, with_residual};
use protocol::{Digest, Reason};

use super::io::{Boundary, Effect, Export, Exported, Fault, Snapshot, Step, StepDone};
use super::{End, FAULTS_BEFORE_RESYNC, Learner, TrainerPhase};

/// Records what a boundary exchanges: versions first, then exports.
fn exchange(all: &mut Vec<Exchange>, apply: &[(u16, u64)], exported: impl Iterator<Item = u16>) {
    let applied = apply.iter().map(|(fragment, version)| Exchange::Applied { fragment: *fragment, version: *version });
    let exported = exported.map(|fragment| Exchange::Exported { fragment });
    applied.chain(exported).for_each(|exchange| Exchange::record(all, exchange));
}

impl Learner {
    pub(super) fn begin_boundary(&mut self, now_ms: u64) {
        let Some(head) = &self.head else { return };
        if self.trainer != TrainerPhase::Open || self.boundary.is_some() || !self.fragments.are_here() || head.state == RunState::Complete {
            return;
        }
        let apply = self.fragments.to_apply();
        let local_step = self.segments.local_step();
        let mut step = self.leases.next_step().map(|(lease, lease_step, index)| Step {
            local_step,
            lease,
            lease_step,
            lr: self.settings.parameters.inner.lr(index),
            exchanged: Vec::new(),
        });
        let mut versions = self.fragments.versions();
        for (fragment, version) in &apply {
            versions[usize::from(*fragment)] = *version;
        }
        let snapshot = (step.is_some() && self.segments.needs_snapshot()).then_some(Snapshot { local_step, versions });
        let export = self.exports(&apply, now_ms);
        if self.restore.is_none() && apply.is_empty() && export.is_empty() && step.is_none() {
            return;
        }
        for order in &export {
            self.pulls.exporting(order.t);
        }
        if let Some(step) = &mut step {
            step.exchanged = self.exchanged.clone();
            exchange(&mut step.exchanged, &apply, export.iter().map(|order| order.fragment));
        }
        self.boundaries += 1;
        let boundary = Boundary { number: self.boundaries, restore: self.restore, apply, snapshot, export, step };
        self.boundary = Some(boundary.clone());
        self.effects.push_back(Effect::Boundary(Box::new(boundary)));
    }

    /// Open pulls that can be answered before the next step: the learner trained on the fragment since it applied the
    /// pull's version or the one before, and the segment that ends here can be replayed.
    fn exports(&self, apply: &[(u16, u64)], now_ms: u64) -> Vec<Export> {
        let (Some(head), Some((start_step, _))) = (&self.head, self.segments.ending_here()) else { return Vec::new() };
        let mut export = Vec::new();
        for pull in &head.pulls {
            let is_fresh = apply.iter().any(|(fragment, _)| *fragment == pull.fragment);
            let Some(fragment) = self.fragments.get(pull.fragment).filter(|fragment| !is_fresh && fragment.steps > 0) else { continue };
            let Some(base_version) = fragment.applied.filter(|base| *base == pull.version || *base + 1 == pull.version) else { continue };
            if pull.deadline_ms > now_ms && !self.pulls.is_answered(pull.t) {
                let local_step = self.segments.local_step();
                export.push(Export { t: pull.t, fragment: pull.fragment, base_version, start_step, local_step });
            }
        }
        export.sort_by_key(|order| order.t);
        export
    }

    pub(super) fn prepared(&mut self, number: u64, snapshot: Option<Digest>, exported: Vec<Exported>) {
        let Some(boundary) = self.boundary.as_ref().filter(|boundary| boundary.number == number) else { return };
        let slot = self.settings.slot;
        if !boundary.apply.is_empty() {
            self.fragments.applied(&boundary.apply);
            let (fragments, local_step) = (boundary.apply.len(), self.segments.local_step());
            if let [(fragment, version)] = boundary.apply[..] {
                tracing::info!(slot, fragment, version, local_step, "applied");
            } else {
                tracing::info!(slot, fragments, local_step, "applied");
            }
        }
        let orders = boundary.export.clone();
        let fragments = exported.iter().filter_map(|done| orders.iter().find(|order| order.t == done.t)).map(|order| order.fragment);
        exchange(&mut self.exchanged, &boundary.apply, fragments);
        if let (Some(order), Some(digest)) = (&boundary.snapshot, snapshot) {
            self.segments.snapshot_taken(&digest, &order.versions, self.fragments.save());
        }
        for done in exported {
            if let Some(order) = orders.iter().find(|order| order.t == done.t) {
                self.commit(order, done);
            }
        }
    }

    fn commit(&mut self, order: &Export, done: Exported) {
        let (Some((start_step, start_digest)), Some(fragment)) = (self.segments.ending_here(), self.fragments.get(order.fragment)) else {
            return;
        };
        let (lease, lease_step) = self.leases.cursor();
        let commitment = Commitment {
            t: order.t,
            fragment: order.fragment,
            base_version: order.base_version,
            length: done.length,
            sha256: done.sha256,
            blake3: done.blake3,
            steps: fragment.steps,
            tokens: fragment.tokens,
            lease,
            lease_step,
            local_step: order.local_step,
            start_step,
            start_digest: done.residual.map_or(start_digest, |residual| with_residual(&start_digest, &residual)),
            step_chain: self.segments.chain(),
        };
        let steps = commitment.steps;
        if self.pulls.committed(commitment, self.keys.payload(order.t)) {
            tracing::info!(
                slot = self.settings.slot,
                t = order.t,
                fragment = order.fragment,
                base_version = order.base_version,
                steps,
                bytes = done.length,
                "committed"
            );
        } else {
            self.effects.push_back(Effect::DropPayload { t: order.t });
        }
    }

    pub(super) fn finished(&mut self, number: u64, done: Option<StepDone>, now_ms: u64) {
        let Some(boundary) = self.boundary.take_if(|boundary| boundary.number == number) else { return };
        if boundary.restore.is_some() {
            self.restore = None;
        }
        let (Some(step), Some(done)) = (boundary.step, done) else { return };
        let (chain, receipted) = self.segments.stepped(step.lease, step.lease_step, step.exchanged, done.loss);
        self.receipts.stepped(step.lease, chain, receipted);
        self.exchanged.clear();
        self.fragments.stepped(done.tokens);
        (self.loss, self.step_ms, self.faults_in_row) = (done.loss, done.step_ms, 0);
        // A fault that is over is still told once.
        if self.record.has_told(self.fault) {
            self.fault = Reason::None;
        }
        tracing::debug!(
            slot = self.settings.slot,
            local_step = step.local_step,
            lease = step.lease,
            lease_step = step.lease_step,
            loss = done.loss as f64 * 1e-6,
            step_ms = done.step_ms,
            "step"
        );
        self.row_taken(step.lease, now_ms);
    }

    fn row_taken(&mut self, lease: u64, now_ms: u64) {
        if let Some(lease) = self.leases.step_taken(lease) {
            tracing::info!(
                slot = self.settings.slot,
                lease,
                local_step = self.segments.local_step(),
                loss = self.loss as f64 * 1e-6,
                "lease done"
            );
            self.drop_tokens(lease);
            let (hotkey, slot, session_epoch) = (self.settings.hotkey, self.settings.slot, self.settings.session_epoch);
            if let Some((chain, steps)) = self.receipts.finish(lease) {
                let receipt = Receipt { hotkey, slot, session_epoch, lease, chain, steps };
                self.effects.push_back(Effect::PrepareReceipt(Box::new(receipt)));
            }
            if self.settings.leases_max.is_some_and(|most| self.leases.used_up() >= most) {
                self.finish(End::LeasesDone, now_ms);
            }
        }
    }

    pub(super) fn faulted(&mut self, number: u64, fault: Fault, now_ms: u64) {
        let Some(boundary) = self.boundary.take_if(|boundary| boundary.number == number) else { return };
        self.pulls.exports_failed();
        let slot = self.settings.slot;
        match fault {
            Fault::NotFinite => {
                self.faults_in_row += 1;
                self.fault = Reason::TrainingFault;
                let back = self.segments.fault();
                tracing::error!(
                    slot,
                    local_step = self.segments.local_step(),
                    faults = self.faults_in_row,
                    "{}; hint: {}",
                    Reason::TrainingFault.sentence(),
                    Reason::TrainingFault.remedy()
                );
                if let Some((local_step, saved)) = back {
                    self.fragments.restore(&saved);
                    self.restore = Some(local_step);
                }
                if self.faults_in_row.is_multiple_of(FAULTS_BEFORE_RESYNC) {
                    self.fragments.forget_applied();
                }
                self.exchanged.clear();
                // The same rows would give the same fault.
                if let Some(step) = boundary.step {
                    self.row_taken(step.lease, now_ms);
                }
            }
            fault => self.give_up(fault, now_ms),
        }
    }
}
