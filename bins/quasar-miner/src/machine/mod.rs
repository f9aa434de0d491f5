//! The rules of one learner: a pure machine without clock, network, tensors or secrets.
//!
//! Facts come in ([`Input`]), decisions come out ([`Effect`]). The learner discovers what it may read and write through its
//! standing grants, fetches the base tree and the newest fragments, trains the rows of its leases, and between two steps, in
//! this order: applies newer fragment versions, keeps a snapshot where a segment begins, answers open pulls, trains
//! (`docs/protocol.md`, one outer step).
//!
//! What a learner remembers over a restart is its spool of segments, not its inputs: a new session begins at local step 0,
//! so there is nothing that replaying the old one would give.

mod boundary;
mod follow;
mod fragments;
mod grants;
mod io;
mod leases;
mod openings;
mod polls;
mod pulls;
mod receipts;
mod record;
mod segments;
mod transfers;

use std::collections::VecDeque;

use daemon::{Exit, Machine};
use protocol::documents::{Codec, Head, RunParameters};
use protocol::paths::{Keys, RunKeys, SlotKeys};
use protocol::steps::Exchange;
use protocol::{AccountId, Method, Reason};

use fragments::Fragments;
use grants::Grants;
pub use io::{
    Boundary, Effect, Export, Exported, Fault, Found, GrantInfo, Input, Look, NotPrepared, PreparedPart, Put, Snapshot, Step, StepDone,
    Trouble,
};
use leases::Leases;
use openings::Openings;
use polls::Polls;
use pulls::Pulls;
use receipts::Receipts;
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
    /// Stop after so many leases.
    pub leases_max: Option<u64>,
}

impl LearnerSettings {
    /// The object that a version of a fragment is fetched by: its keyframe, or the last frame on the way to it.
    fn fragment_key(&self, fragment: u16, version: u64) -> String {
        match self.parameters.codec_down {
            Codec::Int4 if version > 0 => self.run.delta(fragment, version),
            _ => self.run.keyframe(fragment, version),
        }
    }
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
    /// How much was missing and what would fit.
    OutOfMemory(String),
    /// The trainer failed for good.
    Broken(String),
    /// By the edge: the wall clock was set back so far that this session's times are of no use.
    ClockSetBack,
}

impl End {
    pub fn exit(&self) -> Exit {
        match self {
            Self::Stopped | Self::LeasesDone | Self::NextRun => Exit::Done,
            Self::Fenced { .. } => Exit::Configuration,
            Self::Unregistered | Self::ClockSetBack => Exit::TryLater,
            Self::DiskFull | Self::OutOfMemory(_) | Self::Broken(_) => Exit::Unavailable,
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
    /// Own keys, looked for among the grants at every input.
    keys: SlotKeys,
    progress_key: String,
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
    receipts: Receipts,
    openings: Openings,
    record: Record,
    /// Under way in the trainer.
    boundary: Option<Boundary>,
    boundaries: u64,
    /// Since the last step.
    exchanged: Vec<Exchange>,
    /// The snapshot to go back to at the next boundary.
    restore: Option<u64>,
    faults_in_row: u32,
    fault: Reason,
    loss: i64,
    step_ms: u32,
    /// Leases that are over, but whose rows the trainer may be reading.
    tokens_to_drop: Vec<u64>,
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
        let keys = settings.run.slot(&settings.hotkey, settings.slot);
        Self {
            progress_key: keys.progress(),
            keys,
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
            receipts: Receipts::default(),
            openings: Openings::default(),
            record: Record::new(parameters.poll_ms, parameters.learner_ttl_ms),
            boundary: None,
            boundaries: 0,
            exchanged: Vec::new(),
            restore: None,
            faults_in_row: 0,
            fault: Reason::None,
            loss: 0,
            step_ms: 0,
            tokens_to_drop: Vec::new(),
            ending: None,
            settings,
        }
    }

    /// Why the learner is over, once it is.
    pub fn end(&self) -> Option<&End> {
        self.ending.as_ref().filter(|ending| ending.is_over).map(|ending| &ending.end)
    }

    /// What the learner waits for before it can do anything, for people.
    pub fn unready(&self) -> Option<&'static str> {
        match self.registration.unregistered_since_ms {
            _ if self.grants.has_standing() => None,
            Some(_) => Some(Reason::NotRegistered.sentence()),
            None => Some("the orchestrator has not granted anything yet"),
        }
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
            Input::TrainerOpened(Ok(restored)) => {
                tracing::info!(slot = self.settings.slot, restored, "trainer ready");
                self.trainer = TrainerPhase::Open;
            }
            Input::TrainerOpened(Err(fault)) => self.give_up(fault, now_ms),
            Input::KeyframeFetched { fragment, version, result } => {
                if result == Err(Trouble::Grant) {
                    self.grants.refused(Method::Get, &self.settings.fragment_key(fragment, version));
                }
                self.disk(&result, now_ms);
                self.fragments.fetched(fragment, version, result, now_ms);
            }
            Input::TokensFetched { lease, result } => self.tokens_fetched(lease, result, now_ms),
            Input::Prepared { number, snapshot, exported } => self.prepared(number, snapshot, exported),
            Input::Finished { number, step } => self.finished(number, step, now_ms),
            Input::Faulted { number, fault } => self.faulted(number, fault, now_ms),
            Input::PayloadPut { t, put } => self.payload_put(t, put, now_ms),
            Input::ReceiptPrepared { lease, signed } => self.receipts.prepared(lease, signed),
            Input::ReceiptPut { lease, put } => self.receipt_put(lease, put, now_ms),
            Input::OpeningPrepared { audit, parts } => {
                if parts == Err(NotPrepared::Gone) {
                    tracing::warn!(slot = self.settings.slot, audit = %audit.short(), "opening: the segment is not on this disk any more; {}", Reason::NoOpening.remedy());
                }
                self.openings.prepared(&audit, parts, now_ms);
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
            self.give_up(Fault::DiskFull, now_ms);
        }
    }

    /// The trainer cannot go on.
    fn give_up(&mut self, fault: Fault, now_ms: u64) {
        let (reason, end) = match fault {
            Fault::OutOfMemory(what) => (Reason::OutOfMemory, End::OutOfMemory(what)),
            Fault::DiskFull => (Reason::DiskFull, End::DiskFull),
            Fault::NotFinite => (Reason::TrainingFault, End::Broken(Reason::TrainingFault.sentence().to_owned())),
            Fault::Broken(what) => (Reason::TrainerFailed, End::Broken(what)),
        };
        tracing::error!(slot = self.settings.slot, cause = ?end, "the learner cannot go on");
        self.fault = reason;
        self.finish(end, now_ms);
    }

    fn opening_key(&self, audit: &protocol::Digest, part: u8) -> String {
        self.keys.opening(audit, part)
    }

    fn decide(&mut self, now_ms: u64) {
        if self.ending.is_some() {
            return self.decide_ending(now_ms);
        }
        for lease in self.leases.expire(now_ms) {
            tracing::warn!(slot = self.settings.slot, lease, "lease expired; its rows have returned");
            self.drop_tokens(lease);
        }
        self.ask_registration(now_ms);
        self.fetch_base(now_ms);
        self.fetch_fragments(now_ms);
        self.drop_unused_tokens();
        self.fetch_tokens(now_ms);
        self.upload(now_ms);
        self.hand_in_receipt(now_ms);
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
        let retries = retries.into_iter().chain([self.receipts.deadline(now_ms)]);
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
