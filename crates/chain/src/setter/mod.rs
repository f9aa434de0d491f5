//! Setting weights, as a pure machine: when a row is due, how the subnet wants it, what stands in the way, what became of it.
//!
//! ```text
//!            look                    not due / too soon / blocked ──► look again
//!   scores ───────► view ──► decide ─┤
//!                    ▲               └► send: validated → submitted → included ⇄ retracted → finalized
//!                    │                     │ refused, unsure                          │ read back
//!                    └─────────────────────┴──────────────◄───────────────────────────┤
//!                                                       on chain ◄── revealed ◄── committed
//! ```
//!
//! A row is due once in each epoch, as soon as the rate limit allows; which epoch that is the chain says. Where commit-reveal is on the
//! row is committed timelocked, and counts only when the chain has opened it and shows it. Everything is judged by views of the
//! chain, each taken at one finalized block; nothing is believed because it was sent. Sending twice is safe: both extrinsics
//! would carry the same nonce, or the rate limit refuses the second.
//!
//! The machine does no input or output and has no clock. It is handed facts ([`Input`]), says what to do next ([`Effect`]) and when it
//! wants to be asked again. It can be stored whole at any moment ([`Setter::resume`]); of a machine that begins afresh after a
//! restart no more is needed than its [`Memory`].

mod drive;
mod judge;
mod memory;
mod reveal;
mod stage;
#[cfg(test)]
mod tests;

use protocol::AccountId;
use serde::{Deserialize, Serialize};

pub use drive::execute;
pub use memory::Memory;
use memory::{LastRow, Sending, Unsure};
pub use reveal::{AwaitedReveal, RevealOutcome};
pub use stage::{Obstacle, Stage};

use crate::error::WeightsRefusal;
use crate::view::{Landed, PendingCommit, Progress, WeightsRequest, WeightsView};

/// Doublings of the pause after refusals stop here.
const PAUSE_DOUBLINGS_MAX: u32 = 20;
/// Reports that wait for a reader; the oldest make room.
const REPORTS_MAX: usize = 64;

/// What is set for whom, and how patiently.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetterSettings {
    pub netuid: u16,
    pub mechanism: u8,
    pub hotkey: AccountId,
    /// The newest weights version that this build knows.
    pub version_key: u64,
    /// Between two looks at the chain while something is awaited.
    pub look_ms: u64,
    /// Longest time without a look.
    pub look_max_ms: u64,
    /// First and longest pause after a refusal or a lost row.
    pub retry_base_ms: u64,
    pub retry_max_ms: u64,
    /// A row is set again within its epoch when it is older than this; `None` = never.
    pub refresh_ms: Option<u64>,
    /// Largest difference between our clock and the chain's at which rows are still committed.
    pub clock_skew_max_ms: u64,
    /// Nothing is sent; the stage says what would be.
    pub is_dry_run: bool,
}

impl SetterSettings {
    /// The settings for a public network.
    pub fn new(netuid: u16, hotkey: AccountId, version_key: u64) -> Self {
        Self {
            netuid,
            mechanism: 0,
            hotkey,
            version_key,
            look_ms: 12_000,
            look_max_ms: 600_000,
            retry_base_ms: 12_000,
            retry_max_ms: 600_000,
            refresh_ms: None,
            clock_skew_max_ms: 600_000,
            is_dry_run: false,
        }
    }
}

/// A fact that the machine is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// The scores from which rows are made from now on. A final one is set once more even if this epoch has a row.
    Scores { scores: Vec<(AccountId, u64)>, is_final: bool },
    /// The chain at a finalized block.
    View(Box<WeightsView>),
    /// The chain could not be read.
    Unreachable { why: String },
    /// How far the row of `attempt` has come.
    Progress { attempt: u64, progress: Progress },
    /// What became of it.
    Ended { attempt: u64, outcome: Outcome },
    /// Time has passed.
    Tick,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// A finalized block contains it and was read back.
    Landed(Landed),
    Refused(WeightsRefusal),
    /// It was sent, and what became of it is not known.
    Unknown {
        why: String,
    },
    /// It was never sent.
    NotSent {
        why: String,
    },
}

/// What the machine wants done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// Read the chain and answer with [`Input::View`] or [`Input::Unreachable`].
    Look,
    /// Send a row and answer with [`Input::Progress`] and one [`Input::Ended`].
    Send { attempt: u64, request: WeightsRequest },
}

impl Effect {
    /// The answer where the chain cannot even be asked.
    pub fn unreachable(&self, why: String) -> Input {
        match self {
            Self::Look => Input::Unreachable { why },
            Self::Send { attempt, .. } => Input::Ended { attempt: *attempt, outcome: Outcome::NotSent { why } },
        }
    }
}

/// Something that happened once and is worth a line in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The chain's own record shows the row.
    OnChain { row: Vec<(u16, u16)>, block: u64, epoch: u64 },
    /// The row is committed and waits for its reveal.
    Committed(AwaitedReveal),
    /// What became of a committed row.
    Reveal { awaited: AwaitedReveal, outcome: RevealOutcome },
    /// The stage is another one.
    Stage(Stage),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Scores {
    list: Vec<(AccountId, u64)>,
    is_final: bool,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setter {
    settings: SetterSettings,
    scores: Option<Scores>,
    view: Option<Box<WeightsView>>,
    /// Our time when the view came.
    view_ms: u64,
    stage: Stage,
    sending: Option<Sending>,
    /// Committed rows that the chain has not opened yet.
    awaited: Vec<AwaitedReveal>,
    attempt: u64,
    is_looking: bool,
    look_at_ms: u64,
    failures: u32,
    not_before_ms: u64,
    /// The row that landed last, in the open or committed.
    last_row: Option<LastRow>,
    is_final_set: bool,
    effects: Vec<Effect>,
    reports: Vec<Report>,
}

impl Setter {
    pub fn new(settings: SetterSettings) -> Self {
        Self {
            settings,
            scores: None,
            view: None,
            view_ms: 0,
            stage: Stage::Starting,
            sending: None,
            awaited: Vec::new(),
            attempt: 0,
            is_looking: false,
            look_at_ms: 0,
            failures: 0,
            not_before_ms: 0,
            last_row: None,
            is_final_set: false,
            effects: Vec::new(),
            reports: Vec::new(),
        }
    }

    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Whose weights are set.
    pub fn hotkey(&self) -> &AccountId {
        &self.settings.hotkey
    }

    /// The chain as it was seen last.
    pub fn view(&self) -> Option<&WeightsView> {
        self.view.as_deref()
    }

    /// The subnet and the mechanism that weights are set on.
    pub fn place(&self) -> (u16, u8) {
        (self.settings.netuid, self.settings.mechanism)
    }

    /// Committed rows whose reveal is awaited.
    pub fn awaited(&self) -> &[AwaitedReveal] {
        &self.awaited
    }

    /// Whether the chain shows the row of the final scores.
    pub fn is_final_set(&self) -> bool {
        self.is_final_set
    }

    /// What to do next.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        (!self.effects.is_empty()).then(|| self.effects.remove(0))
    }

    /// What happened since the last call.
    pub fn poll_report(&mut self) -> Option<Report> {
        (!self.reports.is_empty()).then(|| self.reports.remove(0))
    }

    /// When to send [`Input::Tick`]; `None` while an answer is awaited.
    pub fn deadline(&self) -> Option<u64> {
        (!self.is_looking && !self.is_in_flight()).then_some(self.look_at_ms)
    }

    pub fn handle(&mut self, now_ms: u64, input: Input) {
        match input {
            Input::Scores { scores, is_final } => {
                let scores = Scores { list: scores, is_final };
                if self.scores.as_ref() != Some(&scores) {
                    self.is_final_set &= is_final;
                    self.scores = Some(scores);
                    self.decide(now_ms);
                }
            }
            Input::View(view) => self.on_view(now_ms, view),
            Input::Unreachable { why } => {
                self.is_looking = false;
                self.look_at_ms = now_ms + self.settings.look_ms;
                if !self.is_in_flight() {
                    self.enter(Stage::Unreachable { why });
                }
            }
            Input::Progress { attempt, progress } => {
                if self.sending.as_ref().is_some_and(|sending| sending.attempt == attempt && sending.unsure.is_none()) {
                    self.enter(Stage::Sending { progress: Some(progress) });
                }
            }
            Input::Ended { attempt, outcome } => self.on_ended(now_ms, attempt, outcome),
            Input::Tick => {}
        }
        if !self.is_looking && !self.is_in_flight() && now_ms >= self.look_at_ms {
            self.is_looking = true;
            self.effects.push(Effect::Look);
        }
    }

    fn is_in_flight(&self) -> bool {
        self.sending.as_ref().is_some_and(|sending| sending.unsure.is_none())
    }

    fn on_view(&mut self, now_ms: u64, view: Box<WeightsView>) {
        self.is_looking = false;
        self.look_at_ms = now_ms + self.settings.look_ms;
        // Another endpoint may lag behind the one that was asked before.
        if self.view.as_ref().is_some_and(|known| known.block().number > view.block().number) {
            return;
        }
        let own = view.metagraph.by_hotkey(&self.settings.hotkey);
        let last_update = own.map_or(0, |own| view.last_update(own));
        self.view = Some(view);
        self.view_ms = now_ms;
        self.settle_lost(now_ms, last_update);
        self.settle_reveals();
        self.decide(now_ms);
    }

    fn settle_reveals(&mut self) {
        let Some(view) = &self.view else { return };
        let block = view.block().number;
        let (mut open, mut settled) = (Vec::new(), Vec::new());
        for mut awaited in std::mem::take(&mut self.awaited) {
            match awaited.judge(view) {
                None => open.push(awaited),
                Some(outcome) => settled.push((awaited, outcome)),
            }
        }
        self.awaited = open;
        for (awaited, outcome) in settled {
            let last = self.last_row.as_ref().filter(|last| last.row == awaited.row);
            let (is_last, is_final, is_stage) = (last.is_some(), last.is_some_and(|last| last.is_final), self.stage == awaited.stage());
            if outcome == RevealOutcome::Revealed {
                self.is_final_set |= is_final;
                if is_stage {
                    self.enter(Stage::OnChain { row: awaited.row.clone(), block });
                }
                self.report(Report::OnChain { row: awaited.row.clone(), block, epoch: awaited.target_epoch });
            } else {
                // It is not on the chain: the same row may be set again.
                self.last_row.take_if(|_| is_last);
                if is_stage {
                    self.stage = Stage::Starting;
                }
            }
            self.report(Report::Reveal { awaited, outcome });
        }
    }

    fn on_ended(&mut self, now_ms: u64, attempt: u64, outcome: Outcome) {
        let Some(sending) = self.sending.take_if(|sending| sending.attempt == attempt) else { return };
        match outcome {
            Outcome::Landed(landed) => {
                self.landed(now_ms, sending, landed.block.number, landed.commit);
            }
            Outcome::Refused(reason) => {
                // The view that the row was made from is out of date: a fresh one says what to do about it.
                self.pause(now_ms);
                let retry_at_ms = self.not_before_ms;
                self.enter(match (reason, self.own_stake()) {
                    (WeightsRefusal::StakeTooLow, Some((stake, threshold))) => Stage::Blocked(Obstacle::StakeTooLow { stake, threshold }),
                    (reason, _) => Stage::Refused { reason, retry_at_ms },
                });
            }
            Outcome::NotSent { why } => {
                self.pause(now_ms);
                self.enter(Stage::Unreachable { why });
            }
            Outcome::Unknown { why } => {
                self.pause(now_ms);
                self.enter(Stage::Unsure { why });
                self.sending = Some(Sending { unsure: Some(Unsure::GaveUp), ..sending });
            }
        }
        self.look_at_ms = now_ms;
    }

    /// Our stake on the subnet and the chain's threshold, by the newest view.
    fn own_stake(&self) -> Option<(u64, u64)> {
        let view = self.view.as_ref()?;
        let own = view.metagraph.by_hotkey(&self.settings.hotkey)?;
        Some((own.stake, view.hyperparameters.stake_threshold))
    }

    /// A pause that grows with each failure in a row.
    fn pause(&mut self, now_ms: u64) {
        let factor = 1u64 << self.failures.min(PAUSE_DOUBLINGS_MAX);
        let pause = self.settings.retry_base_ms.saturating_mul(factor).min(self.settings.retry_max_ms);
        // The first failure is often cured by looking again: a rule changed since the last look.
        self.not_before_ms = if self.failures == 0 { now_ms } else { now_ms + pause };
        self.failures = self.failures.saturating_add(1);
    }

    fn landed(&mut self, now_ms: u64, sending: Sending, block: u64, commit: Option<PendingCommit>) {
        let Sending { request, is_final, .. } = sending;
        self.failures = 0;
        self.not_before_ms = 0;
        self.look_at_ms = now_ms;
        self.last_row = Some(LastRow { row: request.row.clone(), block, set_ms: now_ms, is_final });
        match commit {
            None => {
                let epoch = self.view.as_ref().map_or(0, |view| view.epoch.index);
                self.report(Report::OnChain { row: request.row.clone(), block, epoch });
                self.is_final_set |= is_final;
                self.enter(Stage::OnChain { row: request.row, block });
            }
            Some(commit) => {
                let awaited = AwaitedReveal::new(request.row, commit, self.view.as_deref());
                self.enter(awaited.stage());
                self.report(Report::Committed(awaited.clone()));
                self.awaited.push(awaited);
            }
        }
    }

    /// What to do by the newest view.
    fn decide(&mut self, now_ms: u64) {
        if self.sending.is_some() {
            return;
        }
        let Some(view) = &self.view else { return };
        let stage = match self.judge(now_ms, view) {
            Ok(request) if self.settings.is_dry_run => Stage::DryRun { request },
            Ok(_) if now_ms < self.not_before_ms => {
                self.look_at_ms = self.look_at_ms.max(self.not_before_ms);
                return;
            }
            Ok(request) => {
                let last_update = view.metagraph.by_hotkey(&self.settings.hotkey).map_or(0, |own| view.last_update(own));
                self.attempt += 1;
                self.effects.push(Effect::Send { attempt: self.attempt, request: request.clone() });
                let is_final = self.scores.as_ref().is_some_and(|scores| scores.is_final);
                let head = view.block().number;
                self.sending = Some(Sending { attempt: self.attempt, request, is_final, last_update, head, unsure: None });
                self.enter(Stage::Sending { progress: None });
                return;
            }
            Err(stage) => stage,
        };
        if matches!(stage, Stage::NotDue { .. }) && self.is_final_shown() {
            self.is_final_set = true;
        }
        self.plan_look(&stage);
        // What was achieved stays in sight until the next row is due.
        let is_achieved = matches!(self.stage, Stage::OnChain { .. } | Stage::Committed { .. });
        if !(is_achieved && matches!(stage, Stage::NotDue { .. })) {
            self.enter(stage);
        }
    }

    fn enter(&mut self, stage: Stage) {
        if self.stage != stage {
            self.stage = stage.clone();
            self.report(Report::Stage(stage));
        }
    }

    fn report(&mut self, report: Report) {
        if self.reports.len() >= REPORTS_MAX {
            self.reports.remove(0);
        }
        self.reports.push(report);
    }
}
