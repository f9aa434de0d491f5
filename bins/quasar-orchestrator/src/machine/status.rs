//! What the machine shows: the head for the learners, the status for people.

use protocol::documents::{FragmentHead, Head, Notice, Pull, RunState};
use protocol::ledger::LedgerTotals;
use protocol::{AccountId, Digest, Reason, codec, schedule};
use serde::{Deserialize, Serialize};

use super::{Orchestrator, OrderOutcome, PullStage};

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
    /// Rows that are done, in tokens of a day at the pace of the last while.
    pub tokens_per_day: u64,
    pub step_ms: u64,
    pub rows: LedgerTotals,
    /// The same books for each source of data.
    pub sources: Vec<(String, LedgerTotals)>,
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
    pub is_releasing: bool,
    /// Fencing epoch of the writer.
    pub epoch: u64,
    /// The lowest version that a rollback can still go to.
    pub rollback_from: u64,
    /// Orders taken up to this number, and what came of the last ones.
    pub orders: u64,
    pub outcomes: Vec<OrderOutcome>,
    pub banned: Vec<AccountId>,
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

impl Orchestrator {
    pub(super) fn head(&self) -> Head {
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
            .noticed()
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
            .chain(self.inherited.iter().cloned())
            .collect();
        let totals = self.ledger.totals();
        let books = [totals.waiting_rows, totals.leased_rows, totals.done_rows, totals.lost_rows, totals.done_tokens];
        Head {
            epoch: self.epoch,
            state: self.state,
            outer_step: self.next_t,
            closed_below: self.closed_below,
            block: self.block,
            run_step: schedule::run_step(self.parameters(), self.next_t),
            pulls,
            fragments,
            release: self.release.clone(),
            catalog: self.catalog.newest,
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
            tokens_per_day: self.rate.tokens_per_day(self.volatile.now_ms, self.ledger.totals().done_tokens),
            step_ms: self.timing.step_ms(),
            rows: self.ledger.totals(),
            sources: self.ledger.sources().to_vec(),
            learners,
            needs_certificate: self.guests.iter().filter(|guest| guest.recipient.is_none()).map(|guest| guest.hotkey).collect(),
            audit_cycle: self.audit_cycle,
            audits_open: self.audits.len() as u64,
            audits_ordered: self.audits_ordered,
            verdicts: self.verdicts,
            log: self.log.published().size,
            release: self.release.release.clone(),
            is_releasing: self.releasing.is_some(),
            epoch: self.epoch,
            rollback_from: self.rollback_from(),
            orders: self.orders.taken,
            outcomes: self.orders.told().cloned().collect(),
            banned: self.banned.keys().copied().collect(),
        }
    }
}
