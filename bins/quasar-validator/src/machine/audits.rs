//! The audits that the beacon gave to this validator: order, judgement, verdict in two phases.
//!
//! One audit is judged at a time; the others wait in the order in which they were drawn. A verdict is decided once: what was
//! written to the journal before its commitment went out is what gets revealed, whatever happens in between.

use std::collections::BTreeMap;

use protocol::audits::Selection;
use protocol::documents::{AuditOrder, Measurements};
use protocol::{AccountId, Digest, Reason};
use serde::{Deserialize, Serialize};

use super::Effect;
use super::poller::Poller;
use super::verdicts::{LATE_EVERY_MS, LATE_MS, verdict_ms};
use crate::audit::{Judgement, Subject, learner};

/// Attempts that fail for good before the verdict says that the audit was not evaluated.
const ATTEMPTS_MAX: u32 = 3;
/// Longest pause before an audit is tried again that something is missing for.
const PAUSE_MS_MAX: u64 = 5 * 60_000;

/// What was found at the key of an audit order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OrderRead {
    Absent,
    /// It is there and is the one that the selection asks for.
    Fits,
    /// It is signed by the orchestrator and contradicts the beacon's selection.
    Differs(String),
}

/// How an attempt to judge ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Judged {
    Done(Box<Judgement>),
    /// The store, a grant, the network or the disk: that passes, and nobody can say when. Tried again as long as the audit has time.
    Unavailable(String),
    /// Models that cannot be set up, damaged inputs: that hardly passes. A few attempts show whether it was bad luck.
    Failed(String),
}

/// How an attempt to write a verdict ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Written {
    /// Stored now, or stored before.
    Done,
    /// No valid grant: a new order may bring one.
    NoGrant,
    /// Try again.
    Unavailable(String),
    /// It will never be stored: the store refuses it, or a verdict of an earlier life lies there that nobody can reveal.
    Lost(String),
}

/// Whether an order is the one that the beacon selected. The opening and the leases in it are evidence to judge, not claims to
/// compare.
pub fn compare(selection: &Selection, order: &AuditOrder) -> OrderRead {
    let AuditOrder { audit, validator, cycle, hotkey, slot, t, beacon_block, .. } = order;
    let differences: Vec<&str> = [
        (*audit != selection.audit, "audit"),
        (*validator != selection.validator, "validator"),
        (*cycle != selection.cycle, "cycle"),
        (*hotkey != selection.hotkey || *slot != selection.slot, "learner"),
        (*t != selection.t, "outer step"),
        (*beacon_block != selection.beacon_block, "beacon block"),
    ]
    .into_iter()
    .filter_map(|(differs, name)| differs.then_some(name))
    .collect();
    if differences.is_empty() { OrderRead::Fits } else { OrderRead::Differs(differences.join(", ")) }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Stage {
    AwaitingOrder { is_late: bool },
    Ready,
    Judging,
    Committing(Box<Judgement>),
    Revealing(Box<Judgement>),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Audit {
    subject: Subject,
    stage: Stage,
    /// Paces order polls, attempts to judge and repeated writes.
    poller: Poller,
    /// Attempts to judge that failed for good.
    attempts: u32,
    /// Attempts to judge for which something was missing: each doubles the pause before the next.
    delays: u32,
    /// When the time for what it waits for is over.
    until_ms: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Audits {
    own: AccountId,
    every_ms: u64,
    /// Longest wait for an order, then for the evidence, and at last for the store to take a verdict.
    patience_ms: u64,
    /// By cycle, then audit: older ones first.
    open: BTreeMap<(u64, Digest), Audit>,
    is_judging: bool,
}

impl Audits {
    pub fn new(own: AccountId, every_ms: u64, opening_ms: u64) -> Self {
        Self { own, every_ms, patience_ms: verdict_ms(opening_ms), open: BTreeMap::new(), is_judging: false }
    }

    /// Takes an audit on if it is ours.
    pub fn take_on(&mut self, subject: Subject, now_ms: u64) {
        let selection = &subject.selection;
        if selection.validator != self.own {
            return;
        }
        tracing::info!(
            audit = selection.audit.short(),
            cycle = selection.cycle,
            learner = learner(&selection.hotkey, selection.slot),
            t = selection.t,
            "audit drawn"
        );
        let key = (selection.cycle, selection.audit);
        let until_ms = now_ms + self.patience_ms + LATE_MS;
        self.open.entry(key).or_insert(Audit {
            subject,
            stage: Stage::AwaitingOrder { is_late: false },
            poller: Poller::new(self.every_ms),
            attempts: 0,
            delays: 0,
            until_ms,
        });
    }

    fn find(&mut self, audit: &Digest) -> Option<&mut Audit> {
        self.open.iter_mut().find(|((_, digest), _)| digest == audit).map(|(_, one)| one)
    }

    fn drop_audit(&mut self, audit: &Digest) {
        self.open.retain(|(_, digest), _| digest != audit);
    }

    /// What to do now. `versions` are those of every fragment; without them nothing is judged.
    pub fn effects(&mut self, now_ms: u64, versions: Option<&[u64]>, effects: &mut impl Extend<Effect>) {
        self.open.retain(|(_, audit), one| {
            let is_alive = one.until_ms > now_ms || matches!(one.stage, Stage::Ready | Stage::Judging);
            if !is_alive && !matches!(one.stage, Stage::AwaitingOrder { .. }) {
                tracing::error!(audit = audit.short(), "the verdict could not be written in time and is lost");
            }
            is_alive
        });
        for one in self.open.values_mut() {
            let audit = one.subject.selection.audit;
            match &one.stage {
                Stage::AwaitingOrder { .. } if one.poller.begin(now_ms) => {
                    effects.extend([Effect::ReadOrder(one.subject.selection.clone())])
                }
                Stage::Ready if versions.is_some() && !self.is_judging && one.poller.begin(now_ms) => {
                    one.stage = Stage::Judging;
                    self.is_judging = true;
                    effects.extend([Effect::Judge {
                        subject: Box::new(one.subject.clone()),
                        versions: versions.unwrap_or_default().to_vec(),
                    }]);
                }
                Stage::Committing(judgement) if one.poller.begin(now_ms) => {
                    effects.extend([Effect::Commit(Box::new(one.subject.verdict(judgement)))]);
                }
                Stage::Revealing(_) if one.poller.begin(now_ms) => effects.extend([Effect::Reveal(audit)]),
                _ => {}
            }
        }
    }

    pub fn order(&mut self, audit: Digest, read: OrderRead, now_ms: u64) {
        let (every_ms, patience_ms) = (self.every_ms, self.patience_ms);
        let Some(one) = self.find(&audit) else { return };
        one.poller.end(now_ms);
        match read {
            OrderRead::Absent => {
                if let Stage::AwaitingOrder { is_late } = &mut one.stage
                    && now_ms + LATE_MS >= one.until_ms
                {
                    one.poller.rest(now_ms, LATE_EVERY_MS.max(every_ms));
                    if !std::mem::replace(is_late, true) {
                        tracing::warn!(
                            audit = audit.short(),
                            "no audit order came in time: the orchestrator has not delivered what the beacon selected, or this came when learners had let go of it"
                        );
                    }
                }
            }
            OrderRead::Fits => {
                one.until_ms = now_ms + patience_ms;
                one.enter(Stage::Ready, now_ms);
            }
            OrderRead::Differs(what) => {
                tracing::error!(audit = audit.short(), what, "the audit order differs from the beacon's selection: refused");
                one.enter(Stage::Committing(Box::new(Judgement::not_evaluated(format!("the order differs: {what}")))), now_ms);
            }
        }
    }

    pub fn judged(&mut self, audit: Digest, judged: Judged, now_ms: u64) {
        self.is_judging = false;
        let (every_ms, patience_ms) = (self.every_ms, self.patience_ms);
        let Some(one) = self.find(&audit) else { return };
        one.poller.end(now_ms);
        let judgement = match judged {
            Judged::Done(judgement) => judgement,
            Judged::Unavailable(why) if now_ms < one.until_ms => {
                let pause_ms = every_ms.saturating_mul(1 << one.delays.min(20)).min(PAUSE_MS_MAX);
                tracing::warn!(
                    audit = audit.short(),
                    why,
                    pause_s = pause_ms / 1_000,
                    "something is missing for the audit; it is tried again"
                );
                one.delays += 1;
                one.stage = Stage::Ready;
                one.poller.rest(now_ms, pause_ms);
                return;
            }
            // Where the audit's time is over, what passes counts like what does not: an audit that waited long for its turn is still
            // tried more than once.
            Judged::Unavailable(why) | Judged::Failed(why) => {
                one.attempts += 1;
                if one.attempts < ATTEMPTS_MAX {
                    tracing::warn!(
                        audit = audit.short(),
                        attempt = one.attempts,
                        why,
                        "the audit could not be finished; it is tried again"
                    );
                    one.stage = Stage::Ready;
                    return;
                }
                Box::new(Judgement::not_evaluated(why))
            }
        };
        // From here on the store has to take the verdict, for which the time begins anew.
        one.until_ms = now_ms + patience_ms;
        one.enter(Stage::Committing(judgement), now_ms);
    }

    /// The oldest cycle of which evidence is still to be judged.
    pub fn oldest_cycle(&self) -> Option<u64> {
        let is_waiting = |one: &Audit| matches!(one.stage, Stage::AwaitingOrder { .. } | Stage::Ready | Stage::Judging);
        self.open.iter().find(|(_, one)| is_waiting(one)).map(|((cycle, _), _)| *cycle)
    }

    /// The commitment was written, or not.
    pub fn committed(&mut self, audit: Digest, written: Written, now_ms: u64) {
        let Some(one) = self.find(&audit) else { return };
        one.poller.end(now_ms);
        if let (Written::Done, Stage::Committing(judgement)) = (&written, &one.stage) {
            let stage = Stage::Revealing(judgement.clone());
            one.enter(stage, now_ms);
        } else {
            self.not_written(audit, written, "commitment");
        }
    }

    /// The reveal was written, or not; true once the verdict is public.
    pub fn revealed(&mut self, audit: Digest, written: Written, now_ms: u64) -> bool {
        let Some(one) = self.find(&audit) else { return false };
        one.poller.end(now_ms);
        if written != Written::Done {
            self.not_written(audit, written, "reveal");
            return false;
        }
        if let Stage::Revealing(judgement) = &one.stage {
            let selection = &one.subject.selection;
            let (result, reason) = (judgement.result, judgement.reason);
            let remedy = (reason != Reason::None).then(|| reason.remedy());
            tracing::info!(
                audit = audit.short(),
                cycle = selection.cycle,
                learner = learner(&selection.hotkey, selection.slot),
                t = selection.t,
                ?result,
                %reason,
                remedy,
                replay_error_ppm = measured(judgement.measured.replay_error_ppm),
                assigned_change = assigned_change(&judgement.measured),
                note = judgement.note,
                "verdict"
            );
        }
        self.drop_audit(&audit);
        true
    }

    fn not_written(&mut self, audit: Digest, written: Written, what: &'static str) {
        match written {
            Written::Done => {}
            Written::NoGrant => tracing::debug!(audit = audit.short(), what, "no valid grant for the verdict yet"),
            Written::Unavailable(why) => {
                tracing::warn!(audit = audit.short(), what, why, "the verdict could not be written; it is tried again")
            }
            Written::Lost(why) => {
                tracing::error!(audit = audit.short(), what, why, "the verdict is lost");
                self.drop_audit(&audit);
            }
        }
    }

    /// Whether no verdict of ours is still to be written.
    pub fn is_settled(&self) -> bool {
        self.open.is_empty()
    }

    /// `may_judge`: versions are known, see [`Audits::effects`].
    pub fn deadline(&self, may_judge: bool) -> Option<u64> {
        let due = |one: &Audit| match one.stage {
            Stage::Judging => None,
            Stage::Ready if self.is_judging || !may_judge => None,
            _ => one.poller.deadline(),
        };
        self.open.values().filter_map(due).min()
    }
}

impl Audit {
    fn enter(&mut self, stage: Stage, now_ms: u64) {
        self.stage = stage;
        self.poller.hurry(now_ms);
    }
}

/// A measurement for the log; nothing where the test was not run.
fn measured(value: i64) -> Option<i64> {
    (value != i64::MAX).then_some(value)
}

/// How much a contribution changed the loss on its learner's rows, in micro-nats.
fn assigned_change(measurements: &Measurements) -> Option<i64> {
    Some(measured(measurements.assigned_after)?.saturating_sub(measured(measurements.assigned_before)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fixture::{account, subject};
    use protocol::SealedBytes;
    use protocol::documents::{Verdict, VerdictResult};

    fn order(selection: &Selection) -> AuditOrder {
        AuditOrder {
            audit: selection.audit,
            validator: selection.validator,
            cycle: selection.cycle,
            hotkey: selection.hotkey,
            slot: selection.slot,
            t: selection.t,
            beacon_block: selection.beacon_block,
            opening: Vec::new(),
            leases: Vec::new(),
            sealed: SealedBytes { encapsulated: [0; 32], ciphertext: Vec::new() },
            opening_key: SealedBytes { encapsulated: [0; 32], ciphertext: Vec::new() },
        }
    }

    fn effects(audits: &mut Audits, now_ms: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        audits.effects(now_ms, Some(&[0]), &mut effects);
        effects
    }

    fn pass() -> Judgement {
        Judgement { result: VerdictResult::Pass, ..Judgement::not_evaluated("") }
    }

    #[test]
    fn an_order_that_differs_from_the_selection_says_in_what() {
        let selection = subject(1, 0).selection;
        assert_eq!(compare(&selection, &order(&selection)), OrderRead::Fits);
        let mut other = order(&selection);
        other.t += 1;
        other.slot += 1;
        assert_eq!(compare(&selection, &other), OrderRead::Differs("learner, outer step".into()));
    }

    #[test]
    fn an_audit_goes_from_order_to_reveal_and_is_judged_one_at_a_time() {
        let mut audits = Audits::new(account(9), 100, 1_000);
        let (one, two) = (subject(1, 0), subject(2, 0));
        for subject in [&one, &two] {
            audits.take_on(subject.clone(), 0);
        }
        assert_eq!(effects(&mut audits, 0).len(), 2);
        assert!(effects(&mut audits, 0).is_empty());
        for subject in [&one, &two] {
            audits.order(subject.selection.audit, OrderRead::Fits, 10);
        }
        let [Effect::Judge { subject: first, .. }] = &effects(&mut audits, 10)[..] else { panic!("one at a time") };
        let audit = first.selection.audit;
        audits.judged(audit, Judged::Done(Box::new(pass())), 20);
        let now = effects(&mut audits, 20);
        assert!(now.iter().any(|effect| matches!(effect, Effect::Commit(verdict) if verdict.audit == audit)));
        assert!(now.iter().any(|effect| matches!(effect, Effect::Judge { .. })));
        audits.committed(audit, Written::Unavailable("slow".into()), 30);
        assert!(effects(&mut audits, 30).is_empty());
        assert!(matches!(&effects(&mut audits, 130)[..], [Effect::Commit(_)]));
        audits.committed(audit, Written::Done, 140);
        assert_eq!(effects(&mut audits, 140), [Effect::Reveal(audit)]);
        assert!(audits.revealed(audit, Written::Done, 150));
        assert!(!audits.is_settled());
    }

    #[test]
    fn an_order_that_differs_is_refused_with_a_verdict_that_judges_nobody() {
        let mut audits = Audits::new(account(9), 100, 1_000);
        let one = subject(1, 0);
        audits.take_on(one.clone(), 0);
        effects(&mut audits, 0);
        audits.order(one.selection.audit, OrderRead::Differs("cycle".into()), 10);
        let [Effect::Commit(verdict)] = &effects(&mut audits, 10)[..] else { panic!("a verdict") };
        assert_eq!((verdict.result, verdict.reason), (VerdictResult::NotEvaluated, Reason::NotEvaluated));
    }

    #[test]
    fn a_bench_that_always_fails_ends_as_not_evaluated_after_three_attempts() {
        let mut audits = Audits::new(account(9), 100, 1_000);
        let one = subject(1, 0);
        audits.take_on(one.clone(), 0);
        effects(&mut audits, 0);
        audits.order(one.selection.audit, OrderRead::Fits, 0);
        let mut now_ms = 0;
        for _ in 0..ATTEMPTS_MAX {
            assert!(matches!(&effects(&mut audits, now_ms)[..], [Effect::Judge { .. }]));
            audits.judged(one.selection.audit, Judged::Failed("no models".into()), now_ms);
            now_ms += 100;
        }
        let [Effect::Commit(verdict)] = &effects(&mut audits, now_ms)[..] else { panic!("a verdict") };
        assert_eq!(verdict.result, VerdictResult::NotEvaluated);
    }

    /// Lets the machine do what it wants until nothing is left to do but to write: `judge` is asked when it judges. Gives the times of the
    /// attempts and the verdicts.
    fn play(audits: &mut Audits, mut judge: impl FnMut(u64) -> Judged) -> (Vec<u64>, Vec<Verdict>) {
        let (mut now_ms, mut attempts, mut verdicts) = (0, Vec::new(), Vec::new());
        while let Some(due_ms) = audits.deadline(true) {
            now_ms = due_ms.max(now_ms);
            for effect in effects(audits, now_ms) {
                match effect {
                    Effect::Judge { subject, .. } => {
                        attempts.push(now_ms);
                        audits.judged(subject.selection.audit, judge(now_ms), now_ms);
                    }
                    Effect::Commit(verdict) => verdicts.push(*verdict),
                    other => panic!("{other:?}"),
                }
            }
        }
        (attempts, verdicts)
    }

    /// Two audits that are ordered at the beginning.
    fn ordered(every_ms: u64, opening_ms: u64) -> Audits {
        let mut audits = Audits::new(account(9), every_ms, opening_ms);
        let subjects = [subject(1, 0), subject(2, 0)];
        subjects.iter().for_each(|one| audits.take_on(one.clone(), 0));
        effects(&mut audits, 0);
        subjects.iter().for_each(|one| audits.order(one.selection.audit, OrderRead::Fits, 0));
        audits
    }

    #[test]
    fn a_store_that_is_away_for_ten_minutes_loses_no_audit() {
        let mut audits = ordered(20_000, 3_600_000);
        let (attempts, verdicts) = play(&mut audits, |now_ms| {
            if now_ms < 600_000 { Judged::Unavailable("the store is away".into()) } else { Judged::Done(Box::new(pass())) }
        });
        // The pauses grow up to five minutes, and no audit waits for the pause of another.
        let times = [0, 20_000, 60_000, 140_000, 300_000, 600_000];
        assert_eq!(attempts, times.iter().flat_map(|time| [*time; 2]).collect::<Vec<u64>>());
        assert!(verdicts.len() == 2 && verdicts.iter().all(|verdict| verdict.result == VerdictResult::Pass), "{verdicts:?}");
    }

    #[test]
    fn evidence_that_is_away_until_the_time_of_the_audit_is_over_is_tried_three_times_more() {
        let mut audits = ordered(100, 1_000);
        let (attempts, verdicts) = play(&mut audits, |_| Judged::Unavailable("the store is away".into()));
        let late = attempts.iter().filter(|at_ms| **at_ms >= verdict_ms(1_000)).count();
        assert_eq!(late, 2 * ATTEMPTS_MAX as usize, "{attempts:?}");
        assert!(verdicts.len() == 2 && verdicts.iter().all(|verdict| verdict.result == VerdictResult::NotEvaluated), "{verdicts:?}");
    }

    #[test]
    fn what_is_missing_does_not_count_towards_the_attempts_that_failed() {
        let mut audits = ordered(100, 3_600_000);
        let mut number = 0;
        let (attempts, verdicts) = play(&mut audits, |_| {
            number += 1;
            if number % 4 == 0 { Judged::Failed("no models".into()) } else { Judged::Unavailable("the store is away".into()) }
        });
        assert!(attempts.len() > 4 * ATTEMPTS_MAX as usize, "{attempts:?}");
        assert!(verdicts.iter().all(|verdict| verdict.result == VerdictResult::NotEvaluated));
    }

    #[test]
    fn a_cycle_is_waited_for_until_its_last_audit_is_judged() {
        let mut audits = ordered(100, 1_000);
        assert_eq!(audits.oldest_cycle(), Some(0));
        play(&mut audits, |_| Judged::Done(Box::new(pass())));
        assert!(!audits.is_settled(), "verdicts are still to be written");
        assert_eq!(audits.oldest_cycle(), None);
    }

    #[test]
    fn audits_of_others_are_left_alone_and_an_order_that_never_comes_is_given_up() {
        let mut audits = Audits::new(account(8), 100, 1_000);
        audits.take_on(subject(1, 0), 0);
        assert!(audits.is_settled());
        let mut audits = Audits::new(account(9), 100, 1_000);
        audits.take_on(subject(1, 0), 0);
        let mut looks = 0;
        while let Some(due_ms) = audits.deadline(true) {
            let asked = effects(&mut audits, due_ms);
            assert!(asked.iter().all(|effect| matches!(effect, Effect::ReadOrder(_))), "{asked:?}");
            looks += asked.len() as u64;
            audits.order(subject(1, 0).selection.audit, OrderRead::Absent, due_ms);
        }
        // Each poll until it is late, and then now and then for a day: whoever was away may bring it.
        assert!((LATE_MS / LATE_EVERY_MS..verdict_ms(1_000) / 100 + LATE_MS / LATE_EVERY_MS + 2).contains(&looks), "{looks}");
        assert!(audits.is_settled());
    }
}
