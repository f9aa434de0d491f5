//! The orchestrator as a pure state machine: facts in, effects out.
//!
//! It knows digests, sizes, versions and reasons, never tensors; it takes time from its inputs. Every effect is idempotent by key
//! and ends in an input, and [`Input::Started`] asks again for all that were open when the last process ended: that is the
//! whole recovery.

mod audits;
mod learners;
mod log;
mod pulls;
mod receipts;
mod timing;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use daemon::{Exit, Machine};
use protocol::audits::Selection;
use protocol::documents::{
    FragmentHead, Head, Job, Lease, MergeManifest, Notice, Progress, Pull, ReleaseRef, RunParameters, RunState, Tape, VerdictResult,
};
use protocol::envelope::RunId;
use protocol::ledger::TokenLedger;
use protocol::log::{LogHead, LogKind};
use protocol::{AccountId, Digest, Reason, codec, schedule};
use serde::{Deserialize, Serialize};

pub use audits::{AuditCase, VERDICT_MS};
pub use learners::{Learner, LeaseRecord, StandingMark};
use log::Log;
pub use pulls::{Offer, OfferStage, OpenPull, PullStage};
pub use receipts::ReceiptStage;
use timing::Timing;

/// The head is written again at least this often: it expires after five minutes.
const HEAD_REFRESH_MS: u64 = 60_000;
/// `current.qsr` expires after ten minutes.
const CURRENT_REFRESH_MS: u64 = 240_000;
/// Standing grants are renewed at two thirds of their hour.
const STANDING_REFRESH_MS: u64 = 40 * 60_000;
/// Grants on demand live a quarter of an hour.
const PULL_GRANTS_REFRESH_MS: u64 = 10 * 60_000;
/// Versions ahead for which fragment reads are presigned.
pub const VERSIONS_AHEAD: u64 = 8;
/// The status object is for people: this often is enough.
const STATUS_INTERVAL_MS: u64 = 1_000;

/// A slot of a hotkey.
pub type Slot = (AccountId, u8);

/// A registered hotkey.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    pub hotkey: AccountId,
    pub validator: bool,
    /// The X25519 key that its grants are sealed to; `None` where it needs a key certificate first.
    pub recipient: Option<[u8; 32]>,
}

/// What the machine has to know about its run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunSetup {
    pub run: RunId,
    pub parameters: RunParameters,
    pub release: ReleaseRef,
    pub fragments: Vec<FragmentSetup>,
    /// Shards to train on: id, rows, row tokens.
    pub shards: Vec<(String, u64, u32)>,
}

/// A fragment at the start of the run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FragmentSetup {
    pub keyframe: Digest,
    pub keyframe_length: u64,
    pub state: Digest,
    /// Bytes of an encoded payload.
    pub payload_length: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fragment {
    pub version: u64,
    pub keyframe: Digest,
    pub keyframe_length: u64,
    pub state: Digest,
    pub payload_length: u64,
    /// When this version came into being.
    pub published_ms: u64,
}

/// A fact.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Input {
    /// A process begins to run this machine.
    Started,
    Tick,
    Block {
        number: u64,
    },
    Metagraph {
        guests: Vec<Guest>,
    },
    /// A verified progress record; `id` is that of its envelope.
    Progress {
        slot: Slot,
        id: Digest,
        record: Box<Progress>,
    },
    /// The commitment of `slot` for outer step `t` lies write-once in the bucket, in the envelope `id`.
    CommitmentStored {
        slot: Slot,
        t: u64,
        id: Digest,
    },
    /// Static checks of an upload ended; [`Reason::None`] = passed.
    PayloadChecked {
        slot: Slot,
        t: u64,
        outcome: Reason,
    },
    /// The tape as it lies in the bucket, which may be one that an earlier process wrote.
    TapeWritten {
        tape: Box<Tape>,
    },
    /// `id` is that of the manifest's envelope.
    Merged {
        manifest: Box<MergeManifest>,
        id: Digest,
        keyframe_length: u64,
    },
    /// The receipt of a lease was read and checked: its envelope's id and the steps that were trained.
    ReceiptChecked {
        slot: Slot,
        lease: u64,
        outcome: Result<(Digest, Vec<u32>), Reason>,
    },
    HeadPublished,
    Beacon {
        cycle: u64,
        block: u64,
        hash: [u8; 32],
    },
    /// Public keys that openings are sealed to.
    OpeningKeys {
        keys: Vec<(Digest, [u8; 32])>,
    },
    AuditOrdered {
        audit: Digest,
    },
    /// The revealed verdict of an ordered audit with the id of its envelope; `None` = not there yet.
    Verdict {
        audit: Digest,
        verdict: Option<(Digest, VerdictResult)>,
    },
    /// The log head that was asked for lies in the bucket.
    LogPublished,
    Released {
        release: ReleaseRef,
    },
    /// The operator asks for the end of the run.
    Drain,
}

/// What a sealed bundle is to contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    Read { key: Key },
    WriteOnce { key: Key, length: u64, sha256: Digest },
}

/// Keys that the machine names without spelling them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    Shard(String),
    Payload { slot: Slot, t: u64 },
    Opening { slot: Slot, audit: Digest, part: u8 },
    Receipt { slot: Slot, lease: u64 },
}

/// Something to do.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Poll these slots; `live` ones at the poll interval, the others rarely.
    Watch {
        live: Vec<Slot>,
        silent: Vec<Slot>,
    },
    PublishHead {
        head: Box<Head>,
    },
    PublishCurrent,
    PublishJob {
        revision: u64,
        job: Box<Job>,
    },
    PublishStanding {
        revision: u64,
        slot: Slot,
        validator: bool,
        mark: StandingMark,
        /// Cycles that are merged: a validator publishes scores for this one and those that follow.
        cycle: u64,
    },
    PublishPullGrants {
        revision: u64,
        slot: Slot,
        session_epoch: u64,
        wants: Vec<Want>,
    },
    StoreCommitment {
        slot: Slot,
        t: u64,
        id: Digest,
    },
    CheckPayload {
        slot: Slot,
        t: u64,
        commitment: protocol::documents::Commitment,
    },
    CheckReceipt {
        slot: Slot,
        lease: Box<Lease>,
        /// Local steps done and head of the step chain, as commitments named them during the lease.
        committed: Vec<(u64, Digest)>,
    },
    WriteTape {
        tape: Box<Tape>,
    },
    Merge {
        tape: Box<Tape>,
        rejected: Vec<protocol::documents::Contribution>,
        previous_keyframe: (Digest, u64),
    },
    ReadBeacon {
        cycle: u64,
        block: u64,
    },
    MakeOpeningKeys {
        audits: Vec<Digest>,
    },
    OrderAudit {
        selection: Box<Selection>,
        parts: Vec<(u64, Digest)>,
        leases: Vec<Lease>,
    },
    ReadVerdict {
        audit: Digest,
        validator: AccountId,
    },
    PublishLog {
        head: Box<LogHead>,
    },
    Release {
        versions: Vec<u64>,
        tokens: u64,
    },
    PublishStatus {
        status: Box<Status>,
    },
}

/// For dashboards and people.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub state: RunState,
    pub outer_step: u64,
    pub closed_below: u64,
    pub cycle: u64,
    pub merges: u64,
    pub empty_merges: u64,
    pub contributions: u64,
    pub tokens: u64,
    pub step_ms: u64,
    pub rows: protocol::ledger::LedgerTotals,
    pub learners: Vec<LearnerStatus>,
    /// Registered hotkeys that nothing can be sealed to before they publish a key certificate.
    pub needs_certificate: Vec<AccountId>,
    /// Cycle whose audits are selected next.
    pub audit_cycle: u64,
    pub audits_open: u64,
    pub audits_ordered: u64,
    pub verdicts: VerdictCounts,
    /// Entries of the published log.
    pub log: u64,
    pub release: String,
}

/// Verdicts that validators have revealed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictCounts {
    pub pass: u64,
    pub fail: u64,
    pub other: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LearnerStatus {
    pub hotkey: AccountId,
    pub slot: u8,
    pub worker: String,
    pub state: protocol::documents::LearnerState,
    pub live: bool,
    pub local_step: u64,
    pub loss: i64,
    pub contributions: u64,
    pub last_reason: Reason,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Orchestrator {
    setup: RunSetup,
    state: RunState,
    block: u64,
    guests: Vec<Guest>,
    learners: BTreeMap<Slot, Learner>,
    standing: BTreeMap<Slot, StandingMark>,
    fragments: Vec<Fragment>,
    ledger: TokenLedger,
    leases: BTreeMap<u64, LeaseRecord>,
    next_lease: u64,
    next_t: u64,
    closed: BTreeSet<u64>,
    closed_below: u64,
    /// The first outer step of the closing round.
    closing_from: Option<u64>,
    pulls: BTreeMap<u64, OpenPull>,
    last_pull_ms: u64,
    /// Merge manifests of cycles whose audits are not selected yet.
    manifests: BTreeMap<u64, MergeManifest>,
    /// Cycle to audit next.
    audit_cycle: u64,
    audits: BTreeMap<Digest, AuditCase>,
    audits_ordered: u64,
    /// Ordered audits whose verdict is awaited: the validator, and until when.
    verdicts_awaited: BTreeMap<Digest, (AccountId, u64)>,
    verdicts: VerdictCounts,
    log: Log,
    timing: Timing,
    release: ReleaseRef,
    merges: u64,
    empty_merges: u64,
    contributions: u64,
    tokens: u64,
    revision: u64,
    head_dirty: bool,
    #[serde(skip)]
    volatile: Volatile,
}

/// What a new process starts without: effects that wait, and when things were last done.
#[derive(Debug, Default)]
struct Volatile {
    effects: VecDeque<Effect>,
    head_in_flight: bool,
    head_ms: u64,
    current_ms: u64,
    status_ms: u64,
    watched: Option<(Vec<Slot>, Vec<Slot>)>,
    beacon_asked: Option<u64>,
    verdicts_ms: u64,
    log_ms: u64,
    release_asked: bool,
    now_ms: u64,
}

impl Orchestrator {
    pub fn new(setup: RunSetup) -> Self {
        let mut ledger = TokenLedger::default();
        for (id, rows, row_tokens) in &setup.shards {
            ledger.add_shard(id, *rows, *row_tokens);
        }
        let fragments = setup
            .fragments
            .iter()
            .map(|fragment| Fragment {
                version: 0,
                keyframe: fragment.keyframe,
                keyframe_length: fragment.keyframe_length,
                state: fragment.state,
                payload_length: fragment.payload_length,
                published_ms: 0,
            })
            .collect();
        Self {
            state: RunState::Open,
            block: 0,
            guests: Vec::new(),
            learners: BTreeMap::new(),
            standing: BTreeMap::new(),
            fragments,
            ledger,
            leases: BTreeMap::new(),
            next_lease: 1,
            next_t: 0,
            closed: BTreeSet::new(),
            closed_below: 0,
            closing_from: None,
            pulls: BTreeMap::new(),
            last_pull_ms: 0,
            manifests: BTreeMap::new(),
            audit_cycle: 0,
            audits: BTreeMap::new(),
            audits_ordered: 0,
            verdicts_awaited: BTreeMap::new(),
            verdicts: VerdictCounts::default(),
            log: Log::default(),
            timing: Timing::default(),
            release: setup.release.clone(),
            merges: 0,
            empty_merges: 0,
            contributions: 0,
            tokens: 0,
            revision: 0,
            head_dirty: true,
            volatile: Volatile::default(),
            setup,
        }
    }

    fn parameters(&self) -> &RunParameters {
        &self.setup.parameters
    }

    fn emit(&mut self, effect: Effect) {
        self.volatile.effects.push_back(effect);
    }

    fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    pub fn state(&self) -> RunState {
        self.state
    }

    pub fn fragment_versions(&self) -> Vec<u64> {
        self.fragments.iter().map(|fragment| fragment.version).collect()
    }

    fn head(&self) -> Head {
        let pulls = self
            .pulls
            .iter()
            .filter(|(_, pull)| matches!(pull.stage, PullStage::Open))
            .map(|(t, pull)| Pull { t: *t, fragment: pull.fragment, version: pull.version, deadline_ms: pull.deadline_ms })
            .collect();
        let fragments = self
            .fragments
            .iter()
            .map(|fragment| FragmentHead { version: fragment.version, length: fragment.keyframe_length, digest: fragment.keyframe })
            .collect();
        let notices = self
            .audits
            .values()
            .filter(|case| case.is_opening())
            .filter_map(|case| {
                Some(Notice::OpenAudit {
                    audit: case.selection.audit,
                    hotkey: case.selection.hotkey,
                    slot: case.selection.slot,
                    t: case.selection.t,
                    deadline_ms: case.deadline_ms,
                    key: case.key?,
                })
            })
            .collect();
        let totals = self.ledger.totals();
        let books = [totals.waiting_rows, totals.leased_rows, totals.done_rows, totals.lost_rows, totals.done_tokens];
        Head {
            state: self.state,
            outer_step: self.next_t,
            closed_below: self.closed_below,
            block: self.block,
            run_step: schedule::run_step(self.parameters(), self.next_t),
            pulls,
            fragments,
            release: self.release.clone(),
            ledger: Digest::blake3(&codec::encode(&books.to_vec())),
            log: self.log.published(),
            notices,
        }
    }

    pub fn status(&self) -> Status {
        let learners = self
            .learners
            .iter()
            .map(|((hotkey, slot), learner)| LearnerStatus {
                hotkey: *hotkey,
                slot: *slot,
                worker: learner.worker.clone(),
                state: learner.state,
                live: learner.live,
                local_step: learner.local_step,
                loss: learner.loss,
                contributions: learner.contributions,
                last_reason: learner.last_reason,
            })
            .collect();
        Status {
            state: self.state,
            outer_step: self.next_t,
            closed_below: self.closed_below,
            cycle: schedule::cycle_of(self.closed_below, self.parameters().fragments),
            merges: self.merges,
            empty_merges: self.empty_merges,
            contributions: self.contributions,
            tokens: self.tokens,
            step_ms: self.timing.step_ms(),
            rows: self.ledger.totals(),
            learners,
            needs_certificate: self.guests.iter().filter(|guest| guest.recipient.is_none()).map(|guest| guest.hotkey).collect(),
            audit_cycle: self.audit_cycle,
            audits_open: self.audits.len() as u64,
            audits_ordered: self.audits_ordered,
            verdicts: self.verdicts,
            log: self.log.published().size,
            release: self.release.release.clone(),
        }
    }

    /// Asks again for everything that was open when the last process ended.
    fn resume(&mut self) {
        self.head_dirty = true;
        self.standing.clear();
        let now_ms = self.volatile.now_ms;
        for learner in self.learners.values_mut() {
            // The store was not read while no process ran: nobody is stale because of that.
            learner.seen_ms = learner.seen_ms.max(now_ms);
            learner.job_dirty = true;
            learner.grants_dirty = true;
        }
        self.resume_pulls();
        self.resume_audits();
        self.resume_receipts();
        self.resume_log();
    }

    /// Everything that time or any change may have made due.
    fn advance(&mut self) {
        self.expire_learners();
        self.open_pulls();
        self.close_pulls();
        self.finish();
        self.advance_audits();
        self.advance_log();
        self.refresh_learners();
        self.watch();
        let now_ms = self.volatile.now_ms;
        if now_ms >= self.volatile.current_ms + CURRENT_REFRESH_MS {
            self.volatile.current_ms = now_ms;
            self.emit(Effect::PublishCurrent);
        }
        if (self.head_dirty || now_ms >= self.volatile.head_ms + HEAD_REFRESH_MS) && !self.volatile.head_in_flight {
            self.head_dirty = false;
            self.volatile.head_in_flight = true;
            self.volatile.head_ms = now_ms;
            let head = Box::new(self.head());
            self.emit(Effect::PublishHead { head });
        }
        if now_ms >= self.volatile.status_ms + STATUS_INTERVAL_MS {
            self.volatile.status_ms = now_ms;
            let status = Box::new(self.status());
            self.emit(Effect::PublishStatus { status });
        }
    }

    /// The end of the run: every fragment merged `cycles` times, then the closing round, released, complete.
    fn finish(&mut self) {
        let cycles = self.parameters().cycles;
        if self.state == RunState::Open && cycles > 0 && self.fragments.iter().all(|fragment| fragment.version >= cycles) {
            self.drain();
        }
        let is_closed = self.pulls.is_empty() && self.closing_until().is_some_and(|until| self.next_t >= until);
        if self.state == RunState::Draining && is_closed && !self.volatile.release_asked {
            self.volatile.release_asked = true;
            let versions = self.fragment_versions();
            self.emit(Effect::Release { versions, tokens: self.tokens });
        }
    }

    /// No new leases from here on; each fragment is pulled once more, so that the last release holds all that was trained.
    fn drain(&mut self) {
        self.state = RunState::Draining;
        self.closing_from.get_or_insert(self.next_t);
        self.head_dirty = true;
    }

    fn closing_until(&self) -> Option<u64> {
        self.closing_from.map(|from| from + u64::from(self.setup.parameters.fragments))
    }

    fn watch(&mut self) {
        let mut live = Vec::new();
        let mut silent = Vec::new();
        for guest in self.guests.iter().filter(|guest| !guest.validator) {
            for slot in 0..self.parameters().slots {
                let slot = (guest.hotkey, slot);
                let list = if self.learners.get(&slot).is_some_and(|learner| learner.live) { &mut live } else { &mut silent };
                list.push(slot);
            }
        }
        if self.volatile.watched.as_ref() != Some(&(live.clone(), silent.clone())) {
            self.volatile.watched = Some((live.clone(), silent.clone()));
            self.emit(Effect::Watch { live, silent });
        }
    }
}

impl Machine for Orchestrator {
    type Input = Input;
    type Effect = Effect;

    fn handle(&mut self, now_ms: u64, input: Input) {
        self.volatile.now_ms = now_ms;
        match input {
            Input::Started => self.resume(),
            Input::Tick => {}
            Input::Block { number } => self.block = self.block.max(number),
            Input::Metagraph { guests } => self.guests = guests,
            Input::Progress { slot, id, record } => self.on_progress(slot, id, *record),
            Input::CommitmentStored { slot, t, id } => self.on_commitment_stored(slot, t, id),
            Input::PayloadChecked { slot, t, outcome } => self.on_payload_checked(slot, t, outcome),
            Input::TapeWritten { tape } => self.on_tape_written(*tape),
            Input::Merged { manifest, id, keyframe_length } => self.on_merged(*manifest, id, keyframe_length),
            Input::ReceiptChecked { slot, lease, outcome } => self.on_receipt_checked(slot, lease, outcome),
            Input::HeadPublished => self.volatile.head_in_flight = false,
            Input::Beacon { cycle, block, hash } => self.on_beacon(cycle, block, &hash),
            Input::OpeningKeys { keys } => self.on_opening_keys(&keys),
            Input::AuditOrdered { audit } => self.on_audit_ordered(audit),
            Input::Verdict { audit, verdict } => self.on_verdict(audit, verdict),
            Input::LogPublished => self.on_log_published(),
            Input::Released { release } => {
                self.log.add(LogKind::Release, release.manifest);
                self.release = release;
                self.volatile.release_asked = true;
                if self.state == RunState::Draining {
                    self.state = RunState::Complete;
                }
                self.head_dirty = true;
            }
            Input::Drain => {
                if self.state == RunState::Open {
                    self.drain();
                }
            }
        }
        self.advance();
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.volatile.effects.pop_front()
    }

    fn deadline(&self) -> Option<u64> {
        Some(self.volatile.now_ms + self.parameters().poll_ms.clamp(20, 1_000))
    }

    fn tick() -> Input {
        Input::Tick
    }

    fn exit(&self) -> Option<Exit> {
        None
    }
}

#[cfg(test)]
mod tests;
