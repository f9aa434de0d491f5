//! The rules of one learner: a pure machine without clock, network, tensors or secrets.
//!
//! Facts come in ([`Input`]), decisions come out ([`Effect`]). The learner discovers what it may read and write through its
//! standing grants, fetches the base tree and the newest fragments, trains the rows of its leases, and between two steps, in
//! this order: applies newer fragment versions, keeps a snapshot where a segment begins, answers open pulls, trains
//! (`docs/protocol.md`, one outer step).
//!
//! What a learner remembers over a restart is its spool of segments, not its inputs: a new session begins at local step 0,
//! so there is nothing that replaying the old one would give.

mod fragments;
mod grants;
mod io;
mod leases;
mod openings;
mod polls;
mod pulls;
mod record;
mod segments;

use std::collections::VecDeque;

use daemon::{Exit, Machine};
use protocol::documents::{Commitment, Head, Job, LearnerState, RunParameters, RunState};
use protocol::paths::{Keys, RunKeys};
use protocol::{AccountId, Method, Reason};

use fragments::Fragments;
use grants::Grants;
pub use io::{
    Boundary, Effect, Export, Exported, Fault, Found, GrantInfo, Input, Look, PreparedPart, Put, Snapshot, Step, StepDone, Trouble,
};
use leases::Leases;
use openings::Openings;
use polls::Polls;
use pulls::Pulls;
use record::Record;
use segments::Segments;

/// The chain is asked about the registration so often while no grants come.
const REGISTRATION_EVERY_MS: u64 = 60_000;
/// A hotkey that is not registered for so long ends the process; its supervisor tries again later.
const UNREGISTERED_MAX_MS: u64 = 600_000;
/// After a stop, the last record may take so long.
const LAST_RECORD_MS: u64 = 3_000;
/// Faults in a row after which the learner takes all fragments anew.
const FAULTS_BEFORE_RESYNC: u32 = 3;
/// Pause before the base tree is tried again.
const BASE_RETRY_MS: u64 = 2_000;

/// What a learner is told at its start.
#[derive(Clone, Debug)]
pub struct LearnerSettings {
    /// Name for display.
    pub worker: String,
    pub hotkey: AccountId,
    pub slot: u8,
    /// Start of the session in Unix milliseconds; larger than that of every earlier session.
    pub session_epoch: u64,
    pub keys: Keys,
    pub run: RunKeys,
    pub parameters: RunParameters,
    pub base_release: String,
    /// Shards that leases may name.
    pub shards: Vec<String>,
    /// Stop after so many leases.
    pub leases_max: Option<u64>,
}

/// Why a learner is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It was asked to stop.
    Stopped,
    /// It did as many leases as it was told to.
    LeasesDone,
    /// Another run is current.
    NextRun,
    /// The same hotkey and slot was started elsewhere.
    Fenced {
        newer: u64,
    },
    Unregistered,
    DiskFull,
    OutOfMemory,
    /// The trainer failed for good.
    Broken(String),
}

impl End {
    pub fn exit(&self) -> Exit {
        match self {
            Self::Stopped | Self::LeasesDone | Self::NextRun => Exit::Done,
            Self::Fenced { .. } => Exit::Configuration,
            Self::Unregistered => Exit::TryLater,
            Self::DiskFull | Self::OutOfMemory | Self::Broken(_) => Exit::Unavailable,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TrainerPhase {
    /// The base tree is not complete; not tried again before this time.
    NoBase {
        not_before_ms: u64,
    },
    FetchingBase,
    Opening,
    Open,
}

#[derive(Clone, Copy, Debug, Default)]
struct Registration {
    asked_ms: Option<u64>,
    in_flight: bool,
    unregistered_since_ms: Option<u64>,
    was_seen: bool,
}

/// The machine of one learner.
pub struct Learner {
    settings: LearnerSettings,
    /// Time of the newest input.
    now_ms: u64,
    effects: VecDeque<Effect>,
    polls: Polls,
    grants: Grants,
    registration: Registration,
    head: Option<Head>,
    trainer: TrainerPhase,
    fragments: Fragments,
    leases: Leases,
    pulls: Pulls,
    segments: Segments,
    openings: Openings,
    record: Record,
    /// Under way in the trainer.
    boundary: Option<Boundary>,
    boundaries: u64,
    /// Fragments overwritten since the last step.
    applied: Vec<(u16, u64)>,
    /// The snapshot to go back to at the next boundary.
    restore: Option<u64>,
    faults_in_row: u32,
    fault: Reason,
    loss: i64,
    step_ms: u32,
    ending: Option<Ending>,
}

#[derive(Clone, Debug)]
struct Ending {
    end: End,
    /// The process ends at this time at the latest.
    deadline_ms: u64,
    is_over: bool,
}

impl Learner {
    pub fn new(settings: LearnerSettings) -> Self {
        let parameters = &settings.parameters;
        Self {
            now_ms: 0,
            effects: VecDeque::new(),
            polls: Polls::new(parameters.poll_ms),
            grants: Grants::default(),
            registration: Registration::default(),
            head: None,
            trainer: TrainerPhase::NoBase { not_before_ms: 0 },
            fragments: Fragments::new(usize::from(parameters.fragments)),
            leases: Leases::default(),
            pulls: Pulls::default(),
            segments: Segments::new(parameters.audit.replay_steps),
            openings: Openings::default(),
            record: Record::new(parameters.poll_ms, parameters.learner_ttl_ms),
            boundary: None,
            boundaries: 0,
            applied: Vec::new(),
            restore: None,
            faults_in_row: 0,
            fault: Reason::None,
            loss: 0,
            step_ms: 0,
            ending: None,
            settings,
        }
    }

    /// Why the learner is over, once it is.
    pub fn end(&self) -> Option<&End> {
        self.ending.as_ref().filter(|ending| ending.is_over).map(|ending| &ending.end)
    }

    fn finish(&mut self, end: End, now_ms: u64) {
        if self.ending.is_some() {
            return;
        }
        // A fenced learner's record belongs to the newer session; a moved run needs none.
        let is_over = matches!(end, End::Fenced { .. } | End::NextRun) || !self.record.was_put();
        self.ending = Some(Ending { end, deadline_ms: now_ms + LAST_RECORD_MS, is_over });
    }

    fn fence(&mut self, session_epoch: u64, now_ms: u64) -> bool {
        let is_newer = session_epoch > self.settings.session_epoch;
        if is_newer {
            tracing::error!(
                slot = self.settings.slot,
                ours = self.settings.session_epoch,
                newer = session_epoch,
                "fenced: {}",
                Reason::SessionReplaced.sentence()
            );
            self.finish(End::Fenced { newer: session_epoch }, now_ms);
        }
        is_newer
    }

    fn take(&mut self, now_ms: u64, input: Input) {
        match input {
            Input::Tick => {}
            Input::Stop => self.finish(End::Stopped, now_ms),
            Input::Looked { at, found } => self.looked(at, found, now_ms),
            Input::Registration { registered } => self.registration_known(registered, now_ms),
            Input::ProgressPut(put) => self.progress_put(put, now_ms),
            Input::BaseFetched(result) => self.base_fetched(result, now_ms),
            Input::TrainerOpened { restored } => {
                tracing::info!(slot = self.settings.slot, restored, "trainer ready");
                self.trainer = TrainerPhase::Open;
            }
            Input::KeyframeFetched { fragment, version, result } => {
                if result == Err(Trouble::Grant) {
                    self.grants.refused(Method::Get, &self.settings.run.keyframe(fragment, version));
                }
                self.disk(&result, now_ms);
                self.fragments.fetched(fragment, version, result, now_ms);
            }
            Input::TokensFetched { lease, result } => self.tokens_fetched(lease, result, now_ms),
            Input::Prepared { number, snapshot, exported } => self.prepared(number, snapshot, exported),
            Input::Finished { number, step } => self.finished(number, step, now_ms),
            Input::Faulted { number, fault } => self.faulted(number, fault, now_ms),
            Input::PayloadPut { t, put } => self.payload_put(t, put, now_ms),
            Input::OpeningPrepared { audit, parts } => {
                if parts.is_none() {
                    tracing::warn!(slot = self.settings.slot, audit = %audit.short(), "opening: the segment is not on this disk any more; {}", Reason::NoOpening.remedy());
                }
                self.openings.prepared(&audit, parts);
            }
            Input::OpeningPut { audit, part, put } => {
                if put == Put::Grant {
                    self.grants.refused(Method::Put, &self.opening_key(&audit, part));
                }
                if self.openings.uploaded(&audit, part, put, now_ms) {
                    tracing::info!(slot = self.settings.slot, audit = %audit.short(), "opening uploaded");
                }
            }
        }
    }

    fn disk(&mut self, result: &Result<(), Trouble>, now_ms: u64) {
        if *result == Err(Trouble::DiskFull) {
            self.fault = Reason::DiskFull;
            self.finish(End::DiskFull, now_ms);
        }
    }

    fn opening_key(&self, audit: &protocol::Digest, part: u8) -> String {
        self.settings.run.opening(&self.settings.hotkey, self.settings.slot, audit, part)
    }

    fn progress_key(&self) -> String {
        self.settings.run.progress(&self.settings.hotkey, self.settings.slot)
    }

    // Looks.

    fn looked(&mut self, at: Look, found: Found, now_ms: u64) {
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
        for audit in changes.gone {
            self.effects.push_back(Effect::DropOpening { audit });
        }
        let state = self.head.as_ref().map(|head| head.state);
        if state != Some(head.state) {
            match head.state {
                RunState::Open => {}
                RunState::Draining => tracing::info!(slot, "the run is draining: {}", Reason::Draining.sentence()),
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
        let unknown = |lease: &protocol::documents::Lease| lease.rows.iter().any(|range| !self.settings.shards.contains(&range.shard));
        if let Some(lease) = job.leases.iter().find(|lease| unknown(lease)) {
            tracing::error!(slot, lease = lease.id, "the job names a shard that the run's catalog does not have");
            return;
        }
        let changes = self.leases.set_job(job, now_ms);
        for lease in changes.begun {
            tracing::info!(slot, lease, "lease received");
        }
        for lease in changes.ended {
            tracing::info!(slot, lease, "lease ended by the orchestrator");
            self.effects.push_back(Effect::DropTokens { lease });
        }
    }

    fn registration_known(&mut self, registered: Option<bool>, now_ms: u64) {
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

    fn progress_put(&mut self, put: Put, now_ms: u64) {
        if put == Put::Grant {
            let key = self.progress_key();
            self.grants.refused(Method::Put, &key);
        }
        self.record.put(put, now_ms);
        if let Some(ending) = &mut self.ending
            && self.record.is_last_done()
        {
            ending.is_over = true;
        }
    }

    // Base, fragments, tokens.

    fn base_fetched(&mut self, result: Result<(), Trouble>, now_ms: u64) {
        self.disk(&result, now_ms);
        self.trainer = match result {
            Ok(()) => {
                tracing::info!(slot = self.settings.slot, release = self.settings.base_release, "base checkpoint ready");
                self.effects.push_back(Effect::OpenTrainer);
                TrainerPhase::Opening
            }
            Err(_) => TrainerPhase::NoBase { not_before_ms: now_ms + BASE_RETRY_MS },
        };
    }

    fn tokens_fetched(&mut self, lease: u64, result: Result<(), Trouble>, now_ms: u64) {
        self.disk(&result, now_ms);
        if self.leases.fetched(lease, result, now_ms) {
            tracing::debug!(slot = self.settings.slot, lease, ?result, "tokens fetched");
        } else {
            self.effects.push_back(Effect::DropTokens { lease });
        }
    }

    fn token_keys(&self, lease: &protocol::documents::Lease) -> Vec<String> {
        let mut keys: Vec<String> = lease.rows.iter().map(|range| self.settings.keys.shard_tokens(&range.shard)).collect();
        keys.dedup();
        keys
    }

    // Boundaries.

    fn prepared(&mut self, number: u64, snapshot: Option<protocol::Digest>, exported: Vec<Exported>) {
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
            for (fragment, version) in &boundary.apply {
                self.applied.retain(|(earlier, _)| earlier != fragment);
                self.applied.push((*fragment, *version));
            }
        }
        if let (Some(order), Some(digest)) = (&boundary.snapshot, snapshot) {
            self.segments.snapshot_taken(&digest, &order.versions, self.fragments.save());
        }
        let orders = boundary.export.clone();
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
            start_digest,
            step_chain: self.segments.chain(),
        };
        let steps = commitment.steps;
        if self.pulls.committed(commitment) {
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

    fn finished(&mut self, number: u64, done: Option<StepDone>, now_ms: u64) {
        let Some(boundary) = self.boundary.take_if(|boundary| boundary.number == number) else { return };
        if boundary.restore.is_some() {
            self.restore = None;
        }
        let (Some(step), Some(done)) = (boundary.step, done) else { return };
        self.segments.stepped(step.lease, step.lease_step, step.applied, done.loss);
        self.applied.clear();
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
            self.effects.push_back(Effect::DropTokens { lease });
            if self.settings.leases_max.is_some_and(|most| self.leases.used_up() >= most) {
                self.finish(End::LeasesDone, now_ms);
            }
        }
    }

    fn faulted(&mut self, number: u64, fault: Fault, now_ms: u64) {
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
                self.applied.clear();
                // The same rows would give the same fault.
                if let Some(step) = boundary.step {
                    self.row_taken(step.lease, now_ms);
                }
            }
            Fault::OutOfMemory => {
                self.fault = Reason::OutOfMemory;
                self.finish(End::OutOfMemory, now_ms);
            }
            Fault::DiskFull => self.disk(&Err(Trouble::DiskFull), now_ms),
            Fault::Broken(what) => {
                self.fault = Reason::TrainingFault;
                self.finish(End::Broken(what), now_ms);
            }
        }
    }

    fn payload_put(&mut self, t: u64, put: Put, now_ms: u64) {
        let slot = self.settings.slot;
        match put {
            Put::Grant => {
                let key = self.settings.run.payload(&self.settings.hotkey, slot, t);
                self.grants.refused(Method::Put, &key);
            }
            Put::Refused => tracing::warn!(slot, t, "the store refused the payload"),
            _ => {}
        }
        if self.pulls.uploaded(t, put, now_ms) && put.is_done() {
            tracing::info!(slot, t, "uploaded");
        }
    }

    // Decisions.

    fn decide(&mut self, now_ms: u64) {
        if self.ending.is_some() {
            return self.decide_ending(now_ms);
        }
        for lease in self.leases.expire(now_ms) {
            tracing::warn!(slot = self.settings.slot, lease, "lease expired; its rows have returned");
            self.effects.push_back(Effect::DropTokens { lease });
        }
        self.ask_registration(now_ms);
        self.fetch_base(now_ms);
        self.fetch_fragments(now_ms);
        self.fetch_tokens(now_ms);
        self.upload(now_ms);
        self.open_audits(now_ms);
        self.begin_boundary(now_ms);
        self.set_eager(now_ms);
        for look in self.polls.take_due(now_ms) {
            self.effects.push_back(Effect::Look(look));
        }
        self.put_record(now_ms);
    }

    fn decide_ending(&mut self, now_ms: u64) {
        self.put_record(now_ms);
        if let Some(ending) = &mut self.ending
            && ending.deadline_ms <= now_ms
        {
            ending.is_over = true;
        }
    }

    fn ask_registration(&mut self, now_ms: u64) {
        let registration = &mut self.registration;
        let is_due = registration.asked_ms.is_none_or(|asked| now_ms >= asked + REGISTRATION_EVERY_MS);
        if !self.grants.has_standing() && is_due && !registration.in_flight {
            (registration.asked_ms, registration.in_flight) = (Some(now_ms), true);
            self.effects.push_back(Effect::CheckRegistration);
        }
    }

    fn fetch_base(&mut self, now_ms: u64) {
        if let TrainerPhase::NoBase { not_before_ms } = self.trainer
            && not_before_ms <= now_ms
            && self.grants.can_get(&self.settings.keys.release_manifest(&self.settings.base_release), now_ms)
        {
            self.trainer = TrainerPhase::FetchingBase;
            self.effects.push_back(Effect::FetchBase);
        }
    }

    fn fetch_fragments(&mut self, now_ms: u64) {
        let Some(head) = &self.head else { return };
        for (fragment, version) in self.fragments.wanted(head, now_ms) {
            if self.grants.can_get(&self.settings.run.keyframe(fragment, version), now_ms) {
                let known = &head.fragments[usize::from(fragment)];
                self.fragments.fetching(fragment, version);
                self.effects.push_back(Effect::FetchKeyframe { fragment, version, length: known.length, digest: known.digest });
            }
        }
    }

    fn fetch_tokens(&mut self, now_ms: u64) {
        for lease in self.leases.missing_tokens(now_ms) {
            if self.token_keys(&lease).iter().all(|key| self.grants.can_get(key, now_ms)) {
                self.leases.fetching(lease.id);
                self.effects.push_back(Effect::FetchTokens(Box::new(lease)));
            }
        }
    }

    fn upload(&mut self, now_ms: u64) {
        let (hotkey, slot, grants, run) = (&self.settings.hotkey, self.settings.slot, &self.grants, &self.settings.run);
        let is_granted =
            |commitment: &&Commitment| grants.can_put_body(&run.payload(hotkey, slot, commitment.t), &commitment.sha256, now_ms);
        let granted: Vec<u64> = self.pulls.waiting(now_ms).filter(is_granted).map(|commitment| commitment.t).collect();
        for t in granted {
            self.pulls.uploading(t);
            self.effects.push_back(Effect::PutPayload { t });
        }
    }

    fn open_audits(&mut self, now_ms: u64) {
        if let Some((audit, t)) = self.openings.to_prepare(now_ms) {
            self.openings.preparing(&audit);
            self.effects.push_back(Effect::PrepareOpening { audit, t });
        }
        for (audit, part, sha256) in self.openings.waiting(now_ms) {
            if self.grants.can_put_body(&self.opening_key(&audit, part), &sha256, now_ms) {
                self.openings.uploading(&audit, part);
                self.effects.push_back(Effect::PutOpening { audit, part });
            }
        }
    }

    fn begin_boundary(&mut self, now_ms: u64) {
        let Some(head) = &self.head else { return };
        if self.trainer != TrainerPhase::Open || self.boundary.is_some() || !self.fragments.are_here() || head.state == RunState::Complete {
            return;
        }
        let apply = self.fragments.to_apply();
        let local_step = self.segments.local_step();
        let step = self.leases.next_step().map(|(lease, lease_step, index)| {
            let mut applied: Vec<(u16, u64)> =
                self.applied.iter().filter(|(fragment, _)| !apply.iter().any(|(newer, _)| newer == fragment)).copied().collect();
            applied.extend(&apply);
            Step { local_step, lease, lease_step, lr: self.settings.parameters.inner.lr(index), applied }
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

    fn set_eager(&mut self, now_ms: u64) {
        let head_wants = self.head.as_ref().map(|head| self.fragments.wanted(head, now_ms)).unwrap_or_default();
        let misses_keyframe =
            head_wants.iter().any(|(fragment, version)| !self.grants.can_get(&self.settings.run.keyframe(*fragment, *version), now_ms));
        let is_complete = self.head.as_ref().is_some_and(|head| head.state == RunState::Complete);
        let standing = !self.grants.is_live(self.settings.session_epoch)
            || self.grants.is_renewing()
            || misses_keyframe
            || !self.grants.can_put(&self.progress_key(), now_ms);
        let pull =
            self.pulls.awaits_upload() || self.openings.awaits_upload(now_ms) || self.leases.wants_tokens() || self.grants.is_renewing();
        self.polls.set_eager(Look::Standing, standing);
        self.polls.set_eager(Look::Pull, pull);
        self.polls.set_eager(Look::Job, self.leases.runs_low() && self.record.was_put() && !is_complete);
        self.polls.set_eager(Look::Moved, is_complete);
    }

    fn state(&self) -> (LearnerState, Reason) {
        match &self.ending {
            Some(Ending { end: End::DiskFull | End::OutOfMemory | End::Broken(_), .. }) => return (LearnerState::Faulted, self.fault),
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

    fn put_record(&mut self, now_ms: u64) {
        if self.end().is_some() || !self.grants.can_put(&self.progress_key(), now_ms) {
            return;
        }
        let progress = self.progress(now_ms);
        if let Some(progress) = self.record.take_due(progress, self.ending.is_some(), now_ms) {
            self.effects.push_back(Effect::PutProgress(Box::new(progress)));
        }
    }
}

impl Machine for Learner {
    type Input = Input;
    type Effect = Effect;

    fn handle(&mut self, now_ms: u64, input: Input) {
        self.now_ms = now_ms;
        self.take(now_ms, input);
        self.decide(now_ms);
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    fn deadline(&self) -> Option<u64> {
        let now_ms = self.now_ms;
        let ending = self.ending.as_ref().map(|ending| ending.deadline_ms);
        let registration = self.registration.asked_ms.filter(|_| !self.grants.has_standing()).map(|asked| asked + REGISTRATION_EVERY_MS);
        let base = match self.trainer {
            TrainerPhase::NoBase { not_before_ms } => Some(not_before_ms),
            _ => None,
        };
        let retries =
            [self.fragments.deadline(now_ms), self.leases.deadline(now_ms), self.pulls.deadline(now_ms), self.openings.deadline(now_ms)];
        let all = [self.polls.deadline(), self.record.deadline(), registration, base, ending].into_iter().chain(retries).flatten();
        // Whatever was due by now was decided on; what did not happen waits for a fact and not for the time.
        all.filter(|at| *at > now_ms).min()
    }

    fn tick() -> Input {
        Input::Tick
    }

    fn exit(&self) -> Option<Exit> {
        self.end().map(End::exit)
    }
}
