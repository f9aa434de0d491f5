//! The validator of one run as a pure machine: facts in, decisions out; no clock, network, randomness or tensors.
//!
//! It follows the head, reads every merge manifest and checks it again ([`cycles`]), derives from the chain's beacon who audits
//! what, takes its own audits from order to revealed verdict ([`audits`]), watches the verdicts of all others ([`verdicts`]), folds
//! manifests and verdicts into scores ([`scores`]) and has weights set from them ([`weights`]).
//!
//! Almost nothing of it is kept over a restart: all facts are public objects and are read again. What must not be lost (sequence
//! numbers, verdicts that were decided, their salts, rows of weights under way) lies in the journal and belongs to the effects.

pub mod audits;
pub mod cycles;
#[cfg(test)]
pub(crate) mod fixture;
pub mod log;
mod poller;
pub mod scores;
#[cfg(test)]
mod tests;
pub mod verdicts;
pub mod weights;

use std::collections::VecDeque;

use chain::setter;
use daemon::Exit;
use protocol::audits::Selection;
use protocol::documents::{FragmentHead, Head, MergeManifest, RunParameters, RunState, Score, Verdict};
use protocol::envelope::RunId;
use protocol::log::{LogHead, LogRef};
use protocol::schedule::cycle_of;
use protocol::{AccountId, Digest};
use serde::{Deserialize, Serialize};

use crate::audit::Subject;
use audits::{Audits, Judged, OrderRead, Written};
use cycles::{Cycles, DrawRead, KeyframeRef, VERSIONS_KEPT, VERSIONS_KEPT_MAX};
use log::LogMonitor;
use poller::Poller;
use scores::ScoreLedger;
use verdicts::{Looked, Verdicts};
use weights::{ScoreList, Standing, WeightSettings, Weights, WeightsMemory};

/// Polls of the head between two looks at orders and verdicts.
const SLOW_POLLS: u64 = 10;
/// Polls of the head between two looks at whether another run is current.
const MOVED_POLLS: u64 = 30;
/// Bounds of the pause between two looks at the chain's head block.
const BLOCK_MS: (u64, u64) = (500, 12_000);
/// Bounds of the pause between two reads of metagraph and hyperparameters.
const CHAIN_MS: (u64, u64) = (5_000, 60_000);
/// An unregistered hotkey is waited for this long, with a hint each minute.
const REGISTRATION_MS: u64 = 10 * 60_000;
const REGISTRATION_HINT_MS: u64 = 60_000;
/// Draws and verdicts that are due are waited for so long before weights are made. One that can never be read must not keep them away for
/// ever.
const CATCH_UP_MS: u64 = 30 * 60_000;
/// When the chain has not answered for so long, it is not known what is due.
const CHAIN_SILENT_MS: u64 = 60_000;

/// What a machine needs to know beforehand.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineSettings {
    pub run: RunId,
    /// Our hotkey.
    pub own: AccountId,
    pub parameters: RunParameters,
    /// Longest pause between two looks at the head.
    pub poll_ms_max: u64,
    pub weights: WeightSettings,
}

/// The parts of the head that matter here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadFacts {
    pub state: RunState,
    /// The first outer step that is not open yet.
    pub outer_step: u64,
    pub closed_below: u64,
    pub fragments: Vec<FragmentHead>,
    pub log: LogRef,
}

impl From<Head> for HeadFacts {
    fn from(head: Head) -> Self {
        Self { state: head.state, outer_step: head.outer_step, closed_below: head.closed_below, fragments: head.fragments, log: head.log }
    }
}

/// Our neuron.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnNeuron {
    pub uid: u16,
    pub validator_permit: bool,
}

/// What the chain says, read now and then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainView {
    pub block: u64,
    /// `None` while our hotkey is not registered.
    pub own: Option<OwnNeuron>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Input {
    Tick,
    /// `None` = unchanged or unreadable.
    Head(Option<Box<HeadFacts>>),
    /// `None` = absent or unreadable.
    Merge {
        t: u64,
        manifest: Option<Box<MergeManifest>>,
    },
    /// Number of the finalized head block; `None` = the chain did not answer.
    Block(Option<u64>),
    Chain(Option<Box<ChainView>>),
    Beacon {
        cycle: u64,
        read: DrawRead,
    },
    Order {
        audit: Digest,
        read: OrderRead,
    },
    Judged {
        audit: Digest,
        judged: Judged,
    },
    Committed {
        audit: Digest,
        written: Written,
    },
    Revealed {
        audit: Digest,
        written: Written,
    },
    /// `None` = not revealed yet.
    Verdict {
        audit: Digest,
        verdict: Option<Box<Verdict>>,
    },
    /// The store did not say whether a verdict is revealed.
    NoVerdict {
        audit: Digest,
    },
    Weights(setter::Input),
    /// `None` = absent or unreadable.
    LogHead {
        size: u64,
        head: Option<Box<LogHead>>,
    },
    /// Whether another run is current in the bucket.
    Moved(bool),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    ReadHead,
    ReadMerge {
        t: u64,
    },
    /// Remember a keyframe, and fetch it while its grant lives if it `is_wanted`. No audit needs versions of its fragment below `from` any
    /// more.
    Keep {
        keyframe: KeyframeRef,
        from: u64,
        is_wanted: bool,
    },
    ReadBlock,
    ReadChain,
    ReadBeacon {
        cycle: u64,
        block: u64,
    },
    ReadOrder(Selection),
    Judge {
        subject: Box<Subject>,
        versions: Vec<u64>,
    },
    /// Journal the verdict with its salt, then publish the commitment.
    Commit(Box<Verdict>),
    /// Publish the journaled verdict.
    Reveal(Digest),
    ReadVerdict(Box<Subject>),
    /// A look at the chain.
    Weights(setter::Effect),
    /// A row to send, once the memory is durable.
    SendWeights {
        send: setter::Effect,
        memory: Box<WeightsMemory>,
    },
    /// What the next life has to know of the rows under way.
    KeepWeights(Box<WeightsMemory>),
    /// What weights on the chain were made from; `epoch` is the number of cycles whose merges are in the scores.
    PublishScores {
        epoch: u64,
        block: u64,
        scores: Vec<Score>,
    },
    ShowWeights(Box<Standing>),
    ReadLog {
        size: u64,
    },
    CheckMoved,
}

/// Why a machine's life is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// Another run is current in the bucket.
    Moved,
    /// The hotkey was not registered for too long.
    Unregistered,
}

/// In what all validators of a complete run agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Over all audits and their auditors ([`verdicts::with`]).
    pub drawn: Digest,
    /// `None` where a verdict did not come in time: then they may differ for a while.
    pub scores: Option<Vec<(AccountId, u64)>>,
}

/// See the module's text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    settings: MachineSettings,
    head: Option<HeadFacts>,
    chain: Option<ChainView>,
    head_poll: Poller,
    block_poll: Poller,
    chain_poll: Poller,
    moved_poll: Poller,
    cycles: Cycles,
    audits: Audits,
    verdicts: Verdicts,
    scores: ScoreLedger,
    /// Whether all that is known of the run so far was read in this life.
    is_caught_up: bool,
    /// Since when all manifests are, and draws or verdicts that are due are not.
    behind_since_ms: Option<u64>,
    /// When the chain answered last.
    chain_seen_ms: u64,
    /// Something was credited or judged since scores were last handed over.
    has_new_scores: bool,
    /// Cycles and finality of the scores that were handed over.
    weighed: Option<(u64, bool)>,
    log: LogMonitor,
    weights: Weights,
    unregistered_since_ms: Option<u64>,
    registration_hint_ms: u64,
    is_complete_logged: bool,
    ended: Option<Ended>,
    #[serde(skip)]
    effects: VecDeque<Effect>,
}

impl Machine {
    pub fn new(settings: MachineSettings) -> Self {
        let parameters = &settings.parameters;
        let poll_ms = parameters.poll_ms.min(settings.poll_ms_max).max(1);
        let (slow_ms, opening_ms) = (poll_ms * SLOW_POLLS, parameters.audit.opening_ms);
        Self {
            head: None,
            chain: None,
            head_poll: Poller::new(poll_ms),
            block_poll: Poller::new(slow_ms.clamp(BLOCK_MS.0, BLOCK_MS.1)),
            chain_poll: Poller::new((poll_ms * 100).clamp(CHAIN_MS.0, CHAIN_MS.1)),
            moved_poll: Poller::new(poll_ms * MOVED_POLLS),
            cycles: Cycles::new(settings.run, parameters.fragments, &parameters.audit, slow_ms),
            audits: Audits::new(settings.own, slow_ms, opening_ms),
            verdicts: Verdicts::new(slow_ms, opening_ms),
            scores: ScoreLedger::default(),
            is_caught_up: false,
            behind_since_ms: None,
            chain_seen_ms: 0,
            has_new_scores: false,
            weighed: None,
            log: LogMonitor::new(slow_ms),
            weights: Weights::new(settings.own, settings.run, settings.weights, slow_ms.clamp(BLOCK_MS.0, BLOCK_MS.1)),
            unregistered_since_ms: None,
            registration_hint_ms: 0,
            is_complete_logged: false,
            ended: None,
            effects: VecDeque::new(),
            settings,
        }
    }

    /// Goes on with the rows that an earlier life had under way; to be called before anything else.
    pub fn recall_weights(&mut self, now_ms: u64, memory: WeightsMemory) {
        self.weights.recall(now_ms, memory);
    }

    /// Set once this machine's life is over.
    pub fn ended(&self) -> Option<Ended> {
        self.ended
    }

    /// `None` before the run is complete and all its audits are drawn.
    pub fn agreed(&mut self) -> Option<Agreed> {
        let is_drawn = self.head.as_ref().is_some_and(|head| head.state == RunState::Complete) && self.cycles.is_settled();
        let is_judged = self.verdicts.is_settled() && self.verdicts.tally().missing == 0;
        is_drawn.then(|| Agreed { drawn: self.verdicts.drawn(), scores: is_judged.then(|| self.scores.scores()) })
    }

    fn on_head(&mut self, head: HeadFacts, now_ms: u64) {
        self.cycles.follow(head.closed_below, head.state == RunState::Complete);
        let contradictions = self.cycles.contradictions(&head.fragments);
        if !contradictions.is_empty() {
            tracing::error!(
                ?contradictions,
                "the head names other keyframes than the merge manifests: the orchestrator contradicts itself"
            );
        }
        if let Err(fault) = self.log.follow(head.log, head.outer_step, now_ms) {
            tracing::error!(%fault, "the append-only log was rewritten: the signed heads are kept in the state folder, and prove it");
        }
        self.head = Some(head);
    }

    fn on_merge(&mut self, t: u64, manifest: Option<Box<MergeManifest>>, now_ms: u64) {
        let Some(manifest) = manifest else { return self.cycles.not_read(t, now_ms) };
        for folded in self.cycles.arrive(t, *manifest) {
            let merge = &folded.manifest;
            match folded.fault {
                None => {
                    self.scores.credit(merge, self.settings.parameters.fragments);
                    self.has_new_scores = true;
                }
                Some(fault) => tracing::error!(t = merge.t, %fault, "the merge manifest is faulty: nobody is credited for it"),
            }
            self.log.expect(merge);
            let newest = self.head.as_ref().and_then(|head| head.fragments.get(usize::from(merge.fragment))).map_or(0, |head| head.version);
            let kept = self.versions_needed(cycle_of(merge.t, self.settings.parameters.fragments));
            // Before it is known which audits are ours, nothing that one of them may need is let go of.
            let known = if self.is_caught_up { kept } else { VERSIONS_KEPT_MAX };
            if merge.version > merge.base_version && merge.version.saturating_add(known) > newest {
                let keyframe = KeyframeRef { fragment: merge.fragment, version: merge.version, digest: merge.keyframe };
                let from = merge.version.saturating_add(1).saturating_sub(known);
                let is_wanted = merge.version.saturating_add(kept) > newest;
                self.effects.push_back(Effect::Keep { keyframe, from, is_wanted });
            }
        }
    }

    /// How many versions of a fragment that is merged in `cycle` audits may need.
    fn versions_needed(&self, cycle: u64) -> u64 {
        let waiting = self.cycles.oldest_closed().into_iter().chain(self.audits.oldest_cycle()).min();
        // A fragment has one version a cycle at most. The segment of a contribution begins up to two cycles before its own, perhaps in
        // versions of yet another cycle before.
        let needed = waiting.map_or(0, |oldest| cycle.saturating_sub(oldest).saturating_add(4));
        needed.clamp(VERSIONS_KEPT, VERSIONS_KEPT_MAX)
    }

    fn on_chain(&mut self, view: ChainView, now_ms: u64) {
        if view.own.is_none() {
            let since_ms = *self.unregistered_since_ms.get_or_insert(now_ms);
            if now_ms >= since_ms + REGISTRATION_MS {
                tracing::error!("the hotkey is still not registered: giving up for now");
                self.ended = Some(Ended::Unregistered);
            } else if now_ms >= self.registration_hint_ms {
                self.registration_hint_ms = now_ms + REGISTRATION_HINT_MS;
                let reason = protocol::Reason::NotRegistered;
                tracing::warn!(hotkey = %self.settings.own, hint = reason.remedy(), "{}", reason.sentence());
            }
        } else {
            self.unregistered_since_ms = None;
        }
        let had_permit = self.chain.as_ref().and_then(|view| view.own).map(|own| own.validator_permit);
        if let Some(own) = view.own
            && had_permit != Some(own.validator_permit)
        {
            if own.validator_permit {
                tracing::info!(uid = own.uid, "the hotkey has a validator permit");
            } else {
                tracing::warn!(
                    uid = own.uid,
                    hint = "more stake brings a permit at the next epoch",
                    "the hotkey has no validator permit: no audits, and no weights on others"
                );
            }
        }
        self.chain = Some(view);
    }

    fn on_verdict(&mut self, audit: Digest, verdict: Option<Box<Verdict>>, now_ms: u64) {
        match self.verdicts.looked(audit, verdict.map(|verdict| *verdict), now_ms) {
            Looked::Nothing => {}
            Looked::FirstTime(subject) => self.audits.take_on(*subject, now_ms),
            Looked::Revealed(verdict) => {
                if verdict.validator != self.settings.own {
                    tracing::info!(audit = audit.short(), validator = verdict.validator.short(), cycle = verdict.cycle, learner = crate::audit::learner(&verdict.hotkey, verdict.slot), result = ?verdict.result, "verdict of another validator");
                }
                self.scores.judge(&verdict);
                self.has_new_scores = true;
            }
        }
    }

    /// Asks for everything that is due.
    fn plan(&mut self, now_ms: u64) {
        let polls = [
            (&mut self.head_poll, Effect::ReadHead),
            (&mut self.block_poll, Effect::ReadBlock),
            (&mut self.chain_poll, Effect::ReadChain),
            (&mut self.moved_poll, Effect::CheckMoved),
        ];
        for (poller, effect) in polls {
            if poller.begin(now_ms) {
                self.effects.push_back(effect);
            }
        }
        self.effects.extend(self.cycles.wanted(now_ms).into_iter().map(|t| Effect::ReadMerge { t }));
        if let Some(chain) = &self.chain {
            let beacons = self.cycles.beacons_wanted(chain.block, now_ms);
            self.effects.extend(beacons.into_iter().map(|(cycle, block)| Effect::ReadBeacon { cycle, block }));
        }
        self.effects.extend(self.verdicts.wanted(now_ms).into_iter().map(|subject| Effect::ReadVerdict(Box::new(subject))));
        self.effects.extend(self.log.wanted(now_ms).map(|size| Effect::ReadLog { size }));
        for commitment in self.log.overdue() {
            tracing::error!(%commitment, "a merged commitment is missing in the append-only log");
        }
        // A version that a miner applied, and that is not read here yet, is none that never was.
        let versions = self.cycles.is_folded().then(|| self.cycles.versions());
        self.audits.effects(now_ms, versions.as_deref(), &mut self.effects);
        self.catch_up(now_ms);
        self.plan_weights(now_ms);
    }

    /// While manifests, draws or verdicts are behind, after a start or when the chain was away, scores would pay what was voided.
    fn catch_up(&mut self, now_ms: u64) {
        let head_block = match &self.chain {
            Some(chain) if now_ms < self.chain_seen_ms.saturating_add(CHAIN_SILENT_MS) => chain.block,
            _ => {
                (self.is_caught_up, self.behind_since_ms) = (false, None);
                return;
            }
        };
        if self.head.is_none() || !self.cycles.is_folded() {
            return;
        }
        if self.cycles.is_caught_up(head_block) && self.verdicts.is_caught_up() {
            (self.is_caught_up, self.behind_since_ms) = (true, None);
            return;
        }
        let since_ms = *self.behind_since_ms.get_or_insert(now_ms);
        let was_caught_up = std::mem::replace(&mut self.is_caught_up, now_ms >= since_ms.saturating_add(CATCH_UP_MS));
        if self.is_caught_up && !was_caught_up {
            tracing::warn!("draws or verdicts of the run cannot be read: scores are made without them");
        }
    }

    fn plan_weights(&mut self, now_ms: u64) {
        if let Some(head) = self.head.as_ref().filter(|_| self.is_caught_up && self.cycles.is_folded()) {
            let is_final = head.state == RunState::Complete && self.cycles.is_settled() && self.verdicts.is_settled();
            let cycles = cycle_of(self.cycles.folded_below(), self.settings.parameters.fragments);
            // To add them up is too much for each input.
            if std::mem::take(&mut self.has_new_scores) || self.weighed != Some((cycles, is_final)) {
                self.weighed = Some((cycles, is_final));
                self.weights.score(now_ms, ScoreList { scores: self.scores.scores(), cycles, is_final }, &mut self.effects);
            }
        }
        self.weights.handle(now_ms, setter::Input::Tick, &mut self.effects);
        if self.weights.is_final_set() && !self.is_complete_logged {
            self.is_complete_logged = true;
            let tally = self.verdicts.tally();
            tracing::info!(
                merges = self.cycles.folded_below(),
                passed = tally.pass,
                failed = tally.fail,
                other = tally.other,
                missing = tally.missing,
                "the run is complete and the final weights are set; waiting for the next run"
            );
        }
    }
}

impl daemon::Machine for Machine {
    type Input = Input;
    type Effect = Effect;

    const LAYOUT: u32 = 7;

    fn handle(&mut self, now_ms: u64, input: Input) {
        match input {
            Input::Tick => {}
            Input::Head(head) => {
                self.head_poll.end(now_ms);
                if let Some(head) = head {
                    self.on_head(*head, now_ms);
                }
            }
            Input::Merge { t, manifest } => self.on_merge(t, manifest, now_ms),
            Input::Block(block) => {
                self.block_poll.end(now_ms);
                if let Some(block) = block {
                    self.chain_seen_ms = now_ms;
                    if let Some(view) = &mut self.chain {
                        view.block = view.block.max(block);
                    }
                }
            }
            Input::Chain(view) => {
                self.chain_poll.end(now_ms);
                if let Some(view) = view {
                    self.chain_seen_ms = now_ms;
                    self.on_chain(*view, now_ms);
                }
            }
            Input::Beacon { cycle, read } => {
                let head_block = self.chain.as_ref().map_or(0, |chain| chain.block);
                for subject in self.cycles.drawn(cycle, read, head_block, now_ms) {
                    self.verdicts.watch(subject, now_ms);
                }
            }
            Input::Order { audit, read } => self.audits.order(audit, read, now_ms),
            Input::Judged { audit, judged } => self.audits.judged(audit, judged, now_ms),
            Input::Committed { audit, written } => self.audits.committed(audit, written, now_ms),
            Input::Revealed { audit, written } => {
                if self.audits.revealed(audit, written, now_ms) {
                    self.verdicts.hurry(&audit, now_ms);
                }
            }
            Input::Verdict { audit, verdict } => self.on_verdict(audit, verdict, now_ms),
            Input::NoVerdict { audit } => self.verdicts.not_read(&audit, now_ms),
            Input::Weights(input) => self.weights.handle(now_ms, input, &mut self.effects),
            Input::LogHead { size, head } => {
                if let Err(fault) = self.log.read(size, head.map(|head| *head), now_ms) {
                    tracing::error!(%fault, "the append-only log contradicts itself: its signed heads are kept in the state folder");
                }
            }
            Input::Moved(has_moved) => {
                self.moved_poll.end(now_ms);
                if has_moved {
                    tracing::info!("another run is current now");
                    self.ended = Some(Ended::Moved);
                }
            }
        }
        self.plan(now_ms);
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    fn deadline(&self) -> Option<u64> {
        let polls = [&self.head_poll, &self.block_poll, &self.chain_poll, &self.moved_poll];
        let audits = self.audits.deadline(self.cycles.is_folded());
        let parts = [self.cycles.deadline(), audits, self.verdicts.deadline(), self.log.deadline(), self.weights.deadline()];
        polls.iter().filter_map(|poller| poller.deadline()).chain(parts.into_iter().flatten()).min()
    }

    fn tick() -> Input {
        Input::Tick
    }

    fn exit(&self) -> Option<Exit> {
        self.ended.map(|ended| match ended {
            Ended::Moved => Exit::Done,
            Ended::Unregistered => Exit::TryLater,
        })
    }
}
