//! The orchestrator as a pure state machine: facts in, effects out.
//!
//! It knows digests, sizes, versions and reasons, never tensors; it takes time from its inputs. Every effect is idempotent by key
//! and ends in an input, and [`Input::Claimed`] asks again for all that were open when the last process ended: that is the
//! whole recovery. A process without the journal of the last one begins with [`Input::Recovered`] instead.
//!
//! Progress records are almost all inputs, and most of them change nothing but a step count. What time alone makes due is
//! therefore looked through once in a poll and not at each input ([`Pace`]).

mod audits;
mod batches;
mod catalog;
mod ending;
mod facts;
mod invariants;
mod learners;
mod leases;
mod log;
mod orders;
mod pace;
mod pulls;
mod receipts;
mod recovery;
mod status;
mod timing;
mod wants;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use daemon::machine::Lane;
use daemon::{Exit, Machine};
use protocol::documents::{Lease, MergeManifest, Notice, ReleaseRef, RunParameters, RunState};
use protocol::ledger::TokenLedger;
use protocol::{AccountId, Digest};
use serde::{Deserialize, Serialize};

pub use audits::{AuditCase, VERDICT_MS};
pub use ending::Retired;
pub use facts::{
    BucketFacts, Fragment, FragmentSetup, Guest, Input, RunSetup, ShardRows, Slot, StepFact, StoredCommitment, StoredOrder, StoredPage,
};
pub use learners::{Learner, StandingMark};
pub use leases::LeaseRecord;
pub use orders::OrderOutcome;
pub use pulls::{Offer, OfferStage, OpenPull, PullStage};
pub use receipts::ReceiptStage;
pub use recovery::{LEASE_EPOCH_SHIFT, SNAPSHOT_BYTES_MAX, SnapshotError};
pub use status::{LearnerStatus, Status, VerdictCounts};
pub use wants::{Effect, Key, Want};

use audits::AwaitedVerdict;
use catalog::Catalog;
use ending::Releasing;
use log::Log;
use orders::{Orders, Restoring};
use pace::Pace;
use timing::{Rate, Timing};

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

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Orchestrator {
    setup: RunSetup,
    /// Fencing epoch of the process that runs this machine.
    epoch: u64,
    state: RunState,
    block: u64,
    /// Sorted by hotkey.
    guests: Vec<Guest>,
    /// Hotkeys that the operator excluded, with the reason.
    banned: BTreeMap<AccountId, String>,
    learners: BTreeMap<Slot, Learner>,
    standing: BTreeMap<Slot, StandingMark>,
    fragments: Vec<Fragment>,
    catalog: Catalog,
    ledger: TokenLedger,
    leases: BTreeMap<u64, LeaseRecord>,
    next_lease: u64,
    next_t: u64,
    closed: BTreeSet<u64>,
    closed_below: u64,
    /// The first outer step of the closing round.
    closing_from: Option<u64>,
    restoring: Option<Restoring>,
    pulls: BTreeMap<u64, OpenPull>,
    last_pull_ms: u64,
    /// Merge manifests of the cycles that are still to be audited.
    manifests: BTreeMap<u64, MergeManifest>,
    /// Whose payloads of an audited outer step are kept yet.
    payloads: BTreeMap<u64, Vec<Slot>>,
    /// Objects that are being deleted, by number.
    retiring: BTreeMap<u64, Retired>,
    /// Cycle to audit next.
    audit_cycle: u64,
    audits: BTreeMap<Digest, AuditCase>,
    /// Notices of a predecessor's head whose audits this machine has not selected yet: no learner is to see them gone meanwhile.
    inherited: Vec<Notice>,
    /// When a learner was last heard while heads got out.
    in_touch_ms: u64,
    audits_ordered: u64,
    /// Ordered audits whose verdict is awaited.
    verdicts_awaited: BTreeMap<Digest, AwaitedVerdict>,
    /// Openings in the bucket, and until when they stay.
    openings: BTreeMap<Digest, (Slot, u64)>,
    verdicts: VerdictCounts,
    log: Log,
    timing: Timing,
    rate: Rate,
    release: ReleaseRef,
    /// A release that is being made.
    releasing: Option<Releasing>,
    /// A release is to follow the rollback.
    release_due: bool,
    /// Lowest fragment version of the last release.
    released_version: u64,
    /// Releases of this run, oldest first.
    releases: Vec<String>,
    orders: Orders,
    merges: u64,
    empty_merges: u64,
    contributions: u64,
    tokens: u64,
    revision: u64,
    head_dirty: bool,
    pace: Pace,
    volatile: Volatile,
}

/// What a new process starts without: effects that wait, and when things were last done. It is part of a snapshot all the same,
/// so that the inputs after it are replayed by the very machine that saw them first; a process that begins starts it anew.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Volatile {
    #[serde(skip)]
    effects: VecDeque<Effect>,
    head_in_flight: bool,
    head_ms: u64,
    current_ms: u64,
    status_ms: u64,
    watched: Option<(Vec<Slot>, Vec<Slot>)>,
    beacon_asked: Option<u64>,
    verdicts_ms: u64,
    /// Audits whose verdicts are being read, and the one that was asked for last.
    verdicts_asked: BTreeSet<Digest>,
    verdict_asked_last: Option<Digest>,
    now_ms: u64,
}

impl Orchestrator {
    pub fn new(mut setup: RunSetup) -> Self {
        let mut ledger = TokenLedger::default();
        // The ledger knows them from here on; a snapshot need not hold them twice.
        for shard in std::mem::take(&mut setup.shards) {
            ledger.add_shard_of(&shard.source, &shard.id, shard.rows, shard.row_tokens);
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
                step_mean: 0,
                base_min: 0,
                kept_from: 0,
                sure_from: 0,
            })
            .collect();
        Self {
            epoch: 0,
            state: RunState::Open,
            block: 0,
            guests: Vec::new(),
            banned: BTreeMap::new(),
            learners: BTreeMap::new(),
            standing: BTreeMap::new(),
            fragments,
            catalog: Catalog::new(setup.catalog),
            ledger,
            leases: BTreeMap::new(),
            next_lease: 1,
            next_t: 0,
            closed: BTreeSet::new(),
            closed_below: 0,
            closing_from: None,
            restoring: None,
            pulls: BTreeMap::new(),
            last_pull_ms: 0,
            manifests: BTreeMap::new(),
            payloads: BTreeMap::new(),
            retiring: BTreeMap::new(),
            audit_cycle: 0,
            audits: BTreeMap::new(),
            inherited: Vec::new(),
            in_touch_ms: 0,
            audits_ordered: 0,
            verdicts_awaited: BTreeMap::new(),
            openings: BTreeMap::new(),
            verdicts: VerdictCounts::default(),
            log: Log::default(),
            timing: Timing::default(),
            rate: Rate::default(),
            release: setup.release.clone(),
            releasing: None,
            release_due: false,
            released_version: 0,
            releases: Vec::new(),
            orders: Orders::default(),
            merges: 0,
            empty_merges: 0,
            contributions: 0,
            tokens: 0,
            revision: 0,
            head_dirty: true,
            pace: Pace::default(),
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

    /// Fencing epoch of the process that runs this machine.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Orders of the operator that were taken.
    pub fn orders_taken(&self) -> u64 {
        self.orders.taken
    }

    pub fn fragment_versions(&self) -> Vec<u64> {
        self.fragments.iter().map(|fragment| fragment.version).collect()
    }

    /// Pulls that are not merged yet, by outer step.
    pub fn pulls(&self) -> &BTreeMap<u64, OpenPull> {
        &self.pulls
    }

    /// Outer steps below this are closed.
    pub fn closed_below(&self) -> u64 {
        self.closed_below
    }

    pub fn is_closed(&self, t: u64) -> bool {
        t < self.closed_below || self.closed.contains(&t)
    }

    /// Entries of the published log.
    pub fn log_size(&self) -> u64 {
        self.log.published().size
    }

    /// Leases that are not over, with who has them.
    pub fn open_leases(&self) -> impl Iterator<Item = (u64, Slot)> {
        self.leases.iter().filter(|(_, record)| !record.ended).map(|(id, record)| (*id, record.slot))
    }

    /// Slots that may have answered a pull.
    pub fn slots(&self) -> BTreeSet<Slot> {
        self.learners.keys().copied().chain(self.leases.values().map(|record| record.slot)).collect()
    }

    /// All leases that are remembered, those that ended last too.
    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.leases.values().map(|record| &record.lease)
    }

    /// The books of all rows.
    pub fn ledger(&self) -> &TokenLedger {
        &self.ledger
    }

    /// Asks again for everything that was open when the last process ended.
    fn resume(&mut self) {
        let now_ms = self.volatile.now_ms;
        // A replay has left what the last process was told, asked for and waited for: nothing of that reached this one.
        let effects = std::mem::take(&mut self.volatile.effects);
        self.volatile = Volatile { effects, now_ms, ..Volatile::default() };
        self.head_dirty = true;
        self.standing.clear();
        for (slot, learner) in &mut self.learners {
            // The store was not read while no process ran: nobody is stale because of that.
            learner.seen_ms = learner.seen_ms.max(now_ms);
            learner.job_dirty = true;
            learner.grants_dirty = true;
            self.pace.dirty.insert(*slot);
        }
        self.resume_pulls();
        self.resume_audits();
        self.resume_receipts();
        self.resume_leases();
        self.resume_retiring();
        self.resume_log();
        self.resume_release();
        self.write_next_page();
        self.pace.snapshot = true;
        self.pace.resumed_ms = now_ms;
    }

    /// What time or a change has made due.
    fn advance(&mut self) {
        if self.is_scan_due() {
            self.expire_learners();
            self.expire_leases();
            self.survey();
            self.open_pulls();
            self.close_pulls();
            self.finish();
            self.advance_audits();
            self.advance_log();
            self.refresh_standing_grants();
            self.watch();
            debug_assert_eq!(self.check_invariants(), Ok(()));
        } else if std::mem::take(&mut self.pace.pulls_changed) {
            self.close_pulls();
            self.open_pulls();
        }
        self.refresh_jobs_and_grants();
        self.publish();
    }

    /// Head, current run, status and snapshot, when they are due.
    fn publish(&mut self) {
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
            self.rate.look(now_ms, self.ledger.totals().done_tokens);
            let status = Box::new(self.status());
            self.emit(Effect::PublishStatus { status });
        }
        self.store_snapshot();
    }

    fn watch(&mut self) {
        let mut live = Vec::new();
        let mut silent = Vec::new();
        // Also hotkeys with a validator permit: who earns much has one, whether it wants to or not.
        for Guest { hotkey, .. } in self.guests.iter().filter(|guest| !self.banned.contains_key(&guest.hotkey)) {
            for slot in 0..self.parameters().slots {
                let slot = (*hotkey, slot);
                let list = if self.learners.get(&slot).is_some_and(|learner| learner.live) { &mut live } else { &mut silent };
                list.push(slot);
            }
        }
        let watched = (live, silent);
        if self.volatile.watched.as_ref() != Some(&watched) {
            self.volatile.watched = Some(watched.clone());
            let revision = self.next_revision();
            self.emit(Effect::Watch { revision, live: watched.0, silent: watched.1 });
        }
    }

    /// The X25519 key that documents for `hotkey` are sealed to; `None` where nothing can be.
    fn recipient(&self, hotkey: &AccountId) -> Option<[u8; 32]> {
        guest_of(&self.guests, hotkey)?.recipient
    }

    fn on_metagraph(&mut self, mut guests: Vec<Guest>) {
        guests.sort_by_key(|guest| guest.hotkey);
        let is_new = |guest: &&Guest| guest.recipient != self.recipient(&guest.hotkey);
        let resealed: BTreeSet<AccountId> = guests.iter().filter(is_new).map(|guest| guest.hotkey).collect();
        for (slot, learner) in self.learners.iter_mut().filter(|(slot, _)| resealed.contains(&slot.0)) {
            learner.grants_dirty = true;
            self.pace.dirty.insert(*slot);
        }
        self.guests = guests;
        // Whoever left the subnet is forgotten when its records have grown old.
        self.learners.retain(|slot, learner| learner.live || guest_of(&self.guests, &slot.0).is_some());
        self.standing.retain(|slot, _| guest_of(&self.guests, &slot.0).is_some());
    }
}

/// Of guests that are sorted by hotkey.
fn guest_of<'a>(guests: &'a [Guest], hotkey: &AccountId) -> Option<&'a Guest> {
    guests.binary_search_by(|guest| guest.hotkey.cmp(hotkey)).ok().map(|place| &guests[place])
}

impl Machine for Orchestrator {
    type Input = Input;
    type Effect = Effect;

    const LAYOUT: u32 = 14;

    fn handle(&mut self, now_ms: u64, input: Input) {
        self.volatile.now_ms = now_ms;
        self.note_input(&input);
        match input {
            Input::Claimed { epoch } => {
                self.epoch = epoch;
                self.resume();
            }
            Input::Recovered { facts } => {
                self.on_recovered(*facts);
                self.resume();
            }
            Input::Tick => {}
            Input::Block { number } => self.block = self.block.max(number),
            Input::Metagraph { guests } => self.on_metagraph(guests),
            Input::Progress { slot, id, is_current, record } => {
                if is_current {
                    self.note_heard();
                }
                self.on_progress(slot, id, *record);
            }
            Input::CommitmentStored { slot, t, id, commitment } => self.on_commitment_stored(slot, t, id, &commitment),
            Input::CommitmentRefused { slot, t, commitment } => self.on_commitment_refused(slot, t, &commitment),
            Input::PayloadChecked { slot, t, outcome } => self.on_payload_checked(slot, t, outcome),
            Input::TapeWritten { tape } => self.on_tape_written(*tape),
            Input::Merged { manifest, id, keyframe_length } => self.on_merged(*manifest, id, keyframe_length),
            Input::ReceiptChecked { slot, lease, outcome } => self.on_receipt_checked(slot, lease, outcome),
            Input::LeaseEnded { end } => self.on_lease_ended(&end),
            Input::HeadPublished => self.volatile.head_in_flight = false,
            Input::SnapshotStored { revision } => self.on_snapshot_stored(revision),
            Input::Beacon { draw } => self.on_beacon(&draw),
            Input::OpeningKeys { keys } => self.on_opening_keys(&keys),
            Input::AuditOrdered { audit } => self.on_audit_ordered(audit),
            Input::Verdict { audit, verdict } => self.on_verdict(audit, verdict),
            Input::LogPublished => self.on_log_published(),
            Input::LogTaken { head } => self.on_log_taken(*head),
            Input::Released { release } => self.on_released(release),
            Input::Order { order } => self.on_order(order),
            Input::RetiredAll { number } => {
                self.retiring.remove(&number);
            }
            Input::PageWritten { page, outcome } => self.on_page_written(page, outcome),
        }
        self.advance();
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.volatile.effects.pop_front()
    }

    fn lane(effect: &Effect) -> Lane {
        match effect {
            Effect::CheckPayload { .. } | Effect::Release { .. } | Effect::Retire { .. } => Lane::Bulk,
            Effect::PublishStanding { .. } | Effect::ReadVerdict { .. } => Lane::Many,
            _ => Lane::Prompt,
        }
    }

    /// Of what is overwritten, only the newest counts.
    fn replaces(new: &Effect, waiting: &Effect) -> bool {
        match (new, waiting) {
            (Effect::PublishStatus { .. }, Effect::PublishStatus { .. })
            | (Effect::StoreSnapshot { .. }, Effect::StoreSnapshot { .. })
            | (Effect::PublishCurrent, Effect::PublishCurrent) => true,
            (Effect::PublishJob { job: new, .. }, Effect::PublishJob { job, .. }) => (new.hotkey, new.slot) == (job.hotkey, job.slot),
            (Effect::PublishStanding { slot: new, .. }, Effect::PublishStanding { slot, .. })
            | (Effect::PublishPullGrants { slot: new, .. }, Effect::PublishPullGrants { slot, .. }) => new == slot,
            _ => false,
        }
    }

    fn deadline(&self) -> Option<u64> {
        Some(self.next_scan_ms())
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
