//! What the operator orders: taken in the order of their numbers, each once.

use std::collections::BTreeSet;

use protocol::AccountId;
use protocol::Reason;
use protocol::documents::{Action, RunState, Tape};
use serde::{Deserialize, Serialize};

use super::{Effect, OpenPull, Orchestrator, PullStage, Slot, StoredOrder};

/// Outcomes that the status shows.
const OUTCOMES_SHOWN: usize = 16;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Orders {
    pub taken: u64,
    /// Each with the newest revision when it came: snapshots of later ones know of it.
    outcomes: Vec<(u64, OrderOutcome)>,
    /// Revision of the newest snapshot that the bucket is known to hold.
    stored: u64,
}

impl Orders {
    /// Whether the bucket holds a snapshot of a later revision: what came at this one, a successor knows too.
    fn is_stored(&self, revision: u64) -> bool {
        revision < self.stored
    }

    /// Outcomes that a successor would know of too: what was told stands.
    pub fn told(&self) -> impl Iterator<Item = &OrderOutcome> {
        self.outcomes.iter().filter(|(revision, _)| self.is_stored(*revision)).map(|(_, outcome)| outcome)
    }
}

/// What came of an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderOutcome {
    pub number: u64,
    pub done: bool,
    pub text: String,
}

/// A round in which each fragment goes back to an earlier state, as a new version.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Restoring {
    pub version: u64,
    /// Outer step after the round.
    pub until: u64,
    /// Snapshots of later revisions know of it. The round waits for one: whoever finds steps of it must know what they are part of.
    pub revision: u64,
}

impl Orchestrator {
    pub(super) fn on_order(&mut self, stored: StoredOrder) {
        if stored.number != self.orders.taken + 1 {
            return;
        }
        self.orders.taken = stored.number;
        self.head_dirty = true;
        self.pace.snapshot = true;
        let order = match stored.order {
            Ok(order) => order,
            // Whoever wrote it has to write another one; those behind it are taken all the same.
            Err(why) => return self.settle_order(stored.number, Err(format!("not an order of this run: {why}"))),
        };
        tracing::info!(number = order.number, reason = order.reason, "order taken");
        let outcome = match order.action {
            Action::Drain => self.order_drain(),
            Action::Rollback { version } => self.order_rollback(version),
            Action::Ban { hotkey } => Ok(self.ban(hotkey, &order.reason)),
            Action::Unban { hotkey } => self.unban(&hotkey),
            Action::Release => self.order_release(),
            Action::AddShards { shards } => return self.order_shards(order.number, shards),
        };
        self.settle_order(order.number, outcome);
    }

    pub(super) fn settle_order(&mut self, number: u64, outcome: Result<String, String>) {
        let (done, text) = match outcome {
            Ok(text) => (true, text),
            Err(text) => (false, text),
        };
        tracing::info!(number, done, "order: {text}");
        self.pace.snapshot = true;
        self.orders.outcomes.push((self.revision, OrderOutcome { number, done, text }));
        let superfluous = self.orders.outcomes.len().saturating_sub(OUTCOMES_SHOWN);
        self.orders.outcomes.drain(..superfluous);
    }

    fn order_drain(&mut self) -> Result<String, String> {
        match self.state {
            RunState::Open => {
                self.drain();
                Ok("draining: no more leases, each fragment is merged once more, then the release".to_owned())
            }
            RunState::Draining => Ok("the run is draining already".to_owned()),
            RunState::Complete => Err("the run is complete".to_owned()),
        }
    }

    fn order_release(&mut self) -> Result<String, String> {
        if self.state != RunState::Open {
            return Err("the run is ending: its last release comes by itself".to_owned());
        }
        if self.releasing.is_some() {
            return Err("a release is being made".to_owned());
        }
        if self.restored_version().is_some() {
            return Err("fragments are going back: a release of what that gives follows by itself".to_owned());
        }
        self.release_now(false);
        Ok("releasing what is merged now".to_owned())
    }

    fn order_rollback(&mut self, version: u64) -> Result<String, String> {
        if self.state != RunState::Open || self.restoring.is_some() {
            return Err("a run goes back only while it is open, and one step at a time".to_owned());
        }
        if version < self.rollback_from() {
            return Err(format!("version {version} is deleted; the earliest one that is kept is {}", self.rollback_from()));
        }
        if self.fragments.iter().all(|fragment| fragment.version <= version) {
            return Err(format!("no fragment is beyond version {version}"));
        }
        self.restore(version);
        Ok(format!("each fragment beyond version {version} goes back to it, as a new version; then a release of that"))
    }

    fn restore(&mut self, version: u64) {
        let until = self.next_t + u64::from(self.parameters().fragments);
        // A closing round comes behind this one.
        self.closing_from = self.closing_from.map(|from| from.max(until));
        self.restoring = Some(Restoring { version, until, revision: self.revision });
        self.pace.snapshot = true;
        // What is open was trained on what is taken back.
        let open: Vec<u64> = self.pulls.iter().filter(|(_, pull)| pull.stage == PullStage::Open).map(|(t, _)| *t).collect();
        for t in open {
            if let Some(pull) = self.pulls.get_mut(&t) {
                pull.refuse_all(Reason::StaleBase);
            }
            self.close_pull(t);
        }
    }

    /// The version to which a step should take its fragment back, where the tape that was decided does not: it restores another one, or
    /// merges. As far as this process knows, before it takes the tape up.
    pub(super) fn passed_by(&self, decided: &Tape) -> Option<u64> {
        let round = self.round_at(decided.t);
        let expected = match self.pulls.get(&decided.t).and_then(OpenPull::tape) {
            Some(tape) => tape.restores,
            None => round.and_then(|version| self.restoring_tape(version, decided.t).restores),
        };
        expected.filter(|_| expected != decided.restores).or_else(|| round.filter(|_| !decided.inputs.is_empty()))
    }

    /// The version to which fragments go back in the round that holds outer step `t`.
    pub(super) fn round_at(&self, t: u64) -> Option<u64> {
        let fragments = u64::from(self.parameters().fragments);
        let Restoring { version, until, .. } = self.restoring.as_ref()?;
        (t < *until && t + fragments >= *until).then_some(*version)
    }

    /// A writer that was succeeded decided step `t` before it knew of the rollback, and its tape stands: another round takes its fragment back.
    pub(super) fn restore_again(&mut self, version: u64, t: u64) {
        // A rollback that was ordered since goes as far as it says.
        let version = self.restoring.as_ref().map_or(version, |restoring| restoring.version);
        tracing::warn!(t, version, "an earlier writer has decided a step of the rollback otherwise: every fragment goes back once more");
        self.restore(version);
    }

    /// The bucket holds the snapshot of `revision`: of what that knows, a successor does too.
    pub(super) fn on_snapshot_stored(&mut self, revision: u64) {
        self.orders.stored = self.orders.stored.max(revision);
    }

    /// The next step of a rollback. What is being merged comes first: the round begins from what that gives.
    pub(super) fn restore_next(&mut self) {
        let Some(restoring) = self.restoring.clone().filter(|restoring| self.orders.is_stored(restoring.revision)) else { return };
        let tape = self.restoring_tape(restoring.version, self.next_t);
        self.tape_at_once(tape);
        if self.next_t >= restoring.until {
            self.end_rollback();
        }
    }

    /// Step `t` of the rollback to `version`.
    pub(super) fn restoring_tape(&self, version: u64, t: u64) -> Tape {
        let fragment = protocol::schedule::fragment_of(t, self.parameters().fragments);
        let from = &self.fragments[usize::from(fragment)];
        Tape {
            t,
            fragment,
            epoch: self.epoch,
            base_version: from.version,
            base_state: from.state,
            block: self.block,
            closing: false,
            restores: (from.version > version).then_some(version),
            step_mean: 0,
            inputs: Vec::new(),
        }
    }

    /// Every fragment is on its way back.
    pub(super) fn end_rollback(&mut self) {
        self.restoring = None;
        // The newest release, and one that is being made, may hold what is taken back.
        self.release_due = true;
    }

    /// An outer step that nobody is asked for.
    pub(super) fn tape_at_once(&mut self, tape: Tape) {
        let now_ms = self.volatile.now_ms;
        let mut pull = OpenPull::new(tape.fragment, tape.base_version, now_ms, 0);
        (pull.closed_ms, pull.stage) = (now_ms, PullStage::Taping(tape.clone()));
        self.next_t = self.next_t.max(tape.t + 1);
        self.pulls.insert(tape.t, pull);
        self.emit(Effect::WriteTape { tape: Box::new(tape) });
    }

    fn ban(&mut self, hotkey: AccountId, reason: &str) -> String {
        self.banned.insert(hotkey, reason.to_owned());
        // Also of learners that are forgotten, because their hotkey left the subnet.
        let offerers = self.pulls.values().flat_map(|pull| pull.offers.keys());
        let slots: BTreeSet<Slot> = self.learners.keys().chain(offerers).filter(|slot| slot.0 == hotkey).copied().collect();
        for slot in &slots {
            self.end_leases(*slot);
            self.remove_offers(*slot, |_| true);
            let Some(learner) = self.learners.get_mut(slot) else { continue };
            (learner.live, learner.last_reason) = (false, Reason::Banned);
            learner.job_dirty = true;
            self.pace.dirty.insert(*slot);
        }
        self.pace.survey = true;
        format!("{hotkey} is banned: {} slots lost their leases; grants that are out end by themselves within the hour", slots.len())
    }

    fn unban(&mut self, hotkey: &AccountId) -> Result<String, String> {
        match self.banned.remove(hotkey) {
            Some(_) => {
                self.standing.retain(|slot, _| slot.0 != *hotkey);
                Ok(format!("{hotkey} may take part again"))
            }
            None => Err(format!("{hotkey} is not banned")),
        }
    }
}
