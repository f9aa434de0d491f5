//! Following the run: what a look at head, job or grants changes, who is registered, and where to look more often.

use protocol::Reason;
use protocol::documents::{Head, Job, RunState};

use super::io::{Effect, Found, Look};
use super::{End, Learner, REGISTRATION_EVERY_MS, Registration, UNREGISTERED_MAX_MS};

impl Learner {
    pub(super) fn looked(&mut self, at: Look, found: Found, now_ms: u64) {
        self.polls.looked(at, found == Found::Failed, now_ms);
        match (at, found) {
            (Look::Head, Found::Head(head)) => self.set_head(*head),
            (Look::Job, Found::Job(job)) => self.set_job(&job, now_ms),
            (Look::Standing, Found::Grants { session_epoch, grants }) => {
                if self.fence(session_epoch, now_ms) {
                    return;
                }
                if !self.grants.has_standing() {
                    tracing::info!(
                        slot = self.settings.slot,
                        worker = self.settings.worker,
                        session = self.settings.session_epoch,
                        "joined: standing grants received"
                    );
                }
                self.registration = Registration { was_seen: true, ..Registration::default() };
                self.grants.set_standing(session_epoch, grants);
            }
            // Grants of an earlier session are bound to its bytes.
            (Look::Pull, Found::Grants { session_epoch, grants })
                if !self.fence(session_epoch, now_ms) && session_epoch == self.settings.session_epoch =>
            {
                self.grants.set_pull(grants);
            }
            (Look::Moved, Found::Moved(true)) => {
                tracing::info!(slot = self.settings.slot, "another run is current now");
                self.finish(End::NextRun, now_ms);
            }
            _ => {}
        }
    }

    fn set_head(&mut self, head: Head) {
        let slot = self.settings.slot;
        for t in self.pulls.keep_open(&head.pulls) {
            tracing::debug!(slot, t, "pull closed");
            self.effects.push_back(Effect::DropPayload { t });
        }
        let changes = self.openings.set_notices(&head.notices, &self.settings.hotkey, slot);
        for (audit, t) in changes.noticed {
            tracing::info!(slot, audit = %audit.short(), t, "opening asked for");
        }
        if let Some((revision, asked)) = changes.asked {
            self.effects.push_back(Effect::KeepOpenings { revision, asked });
        }
        let state = self.head.as_ref().map(|head| head.state);
        if state != Some(head.state) {
            match head.state {
                RunState::Open => {}
                RunState::Draining => tracing::info!(slot, "{}", Reason::Draining.sentence()),
                RunState::Complete => tracing::info!(slot, outer_steps = head.outer_step, "the run is complete; waiting for the next one"),
            }
        }
        self.head = Some(head);
    }

    fn set_job(&mut self, job: &Job, now_ms: u64) {
        if self.fence(job.session_epoch, now_ms) || job.session_epoch != self.settings.session_epoch {
            return;
        }
        let slot = self.settings.slot;
        let changes = self.leases.set_job(job, now_ms);
        for lease in changes.begun {
            let batch_rows = job.leases.iter().find(|one| one.id == lease).map(|one| one.batch_rows);
            tracing::info!(slot, lease, batch_rows, "lease received");
        }
        for lease in changes.ended {
            tracing::info!(slot, lease, "lease ended by the orchestrator");
            self.drop_tokens(lease);
        }
        for lease in self.receipts.settle(job) {
            self.effects.push_back(Effect::DropReceipt { lease });
        }
    }

    pub(super) fn registration_known(&mut self, registered: Option<bool>, now_ms: u64) {
        self.registration.in_flight = false;
        if self.grants.has_standing() {
            return;
        }
        let slot = self.settings.slot;
        match registered {
            Some(true) => {
                self.registration.unregistered_since_ms = None;
                if !std::mem::replace(&mut self.registration.was_seen, true) {
                    tracing::info!(slot, "the hotkey is registered; waiting for the orchestrator's grants");
                }
            }
            Some(false) => {
                let since = *self.registration.unregistered_since_ms.get_or_insert(now_ms);
                tracing::warn!(slot, hotkey = %self.settings.hotkey, "{}; hint: {}", Reason::NotRegistered.sentence(), Reason::NotRegistered.remedy());
                if now_ms - since >= UNREGISTERED_MAX_MS {
                    self.finish(End::Unregistered, now_ms);
                }
            }
            None => tracing::warn!(slot, "no grants yet, and the chain did not answer whether the hotkey is registered"),
        }
    }

    pub(super) fn ask_registration(&mut self, now_ms: u64) {
        let registration = &mut self.registration;
        let is_due = registration.asked_ms.is_none_or(|asked| now_ms >= asked + REGISTRATION_EVERY_MS);
        if !self.grants.has_standing() && is_due && !registration.in_flight {
            (registration.asked_ms, registration.in_flight) = (Some(now_ms), true);
            self.effects.push_back(Effect::CheckRegistration);
        }
    }

    pub(super) fn set_eager(&mut self, now_ms: u64) {
        let head_wants = self.head.as_ref().map(|head| self.fragments.wanted(head, now_ms)).unwrap_or_default();
        let misses_keyframe =
            head_wants.iter().any(|(fragment, version)| !self.grants.can_get(&self.settings.fragment_key(*fragment, *version), now_ms));
        let is_complete = self.head.as_ref().is_some_and(|head| head.state == RunState::Complete);
        let standing = !self.grants.is_live(self.settings.session_epoch)
            || self.grants.is_renewing()
            || misses_keyframe
            || !self.grants.can_put(&self.progress_key, now_ms);
        let pull = self.pulls.awaits_upload()
            || self.receipts.awaits_upload()
            || self.openings.awaits_upload()
            || self.leases.wants_tokens()
            || self.grants.is_renewing();
        self.polls.set_eager(Look::Standing, standing);
        self.polls.set_eager(Look::Pull, pull);
        self.polls.set_eager(Look::Job, self.leases.runs_low() && self.record.was_put() && !is_complete);
        self.polls.set_eager(Look::Moved, is_complete);
    }
}
