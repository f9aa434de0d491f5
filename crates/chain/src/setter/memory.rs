//! What outlives the process. A row that was on its way, and a committed one that the chain has not opened yet, belong to the next life
//! too: it follows them to where the chain shows them, and does not send them again.

use serde::{Deserialize, Serialize};

use super::{AwaitedReveal, Setter, Stage};
use crate::view::{How, PendingCommit, WeightsRequest};
use crate::weights;

/// A row that was on its way when the process ended is looked for in so many blocks before it may be sent again. It is final by then,
/// or lost; in between a second one would have its nonce.
const RECALL_BLOCKS: u64 = 8;

/// A row that landed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LastRow {
    pub(super) row: Vec<(u16, u16)>,
    pub(super) block: u64,
    /// Our time when we heard of it.
    pub(super) set_ms: u64,
    /// Whether it was made from final scores.
    pub(super) is_final: bool,
}

/// A row on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sending {
    pub(super) attempt: u64,
    pub(super) request: WeightsRequest,
    /// Whether it was made from final scores.
    pub(super) is_final: bool,
    /// Block of the last weights when it was sent.
    pub(super) last_update: u64,
    /// The newest finalized block when it was sent.
    pub(super) head: u64,
    /// The outcome is not known: views decide.
    pub(super) unsure: Option<Unsure>,
}

/// Why the outcome of a row is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Unsure {
    /// It was waited for until its deadline.
    GaveUp,
    /// The process ended, perhaps just before or after it was sent.
    Restarted,
}

/// What a setter must not forget. It is to be durable before a row is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    sending: Option<Sending>,
    awaited: Vec<AwaitedReveal>,
    last_row: Option<LastRow>,
}

impl Setter {
    /// What the next life needs to know.
    pub fn memory(&self) -> Memory {
        Memory { sending: self.sending.clone(), awaited: self.awaited.clone(), last_row: self.last_row.clone() }
    }

    /// Takes over what an earlier life of the same hotkey, subnet and mechanism was about; to be called before anything else.
    pub fn recall(&mut self, now_ms: u64, memory: Memory) {
        let Memory { sending, awaited, last_row } = memory;
        self.attempt = sending.as_ref().map_or(0, |sending| sending.attempt);
        (self.sending, self.awaited, self.last_row) = (sending, awaited, last_row);
        if let Some(awaited) = self.awaited.last() {
            self.enter(awaited.stage());
        }
        self.resume(now_ms);
    }

    /// After a restart nobody will answer what was asked before: looks are forgotten, and a row that was on its way is looked for.
    pub fn resume(&mut self, now_ms: u64) {
        self.effects.clear();
        self.is_looking = false;
        self.look_at_ms = now_ms;
        if let Some(sending) = &mut self.sending {
            sending.unsure = Some(Unsure::Restarted);
            self.enter(Stage::Unsure { why: "the process was restarted while they were on their way".to_owned() });
        }
    }

    /// Whether a row whose fate was unknown is on the chain after all. If not, it may be sent again, at once or after a while.
    pub(super) fn settle_lost(&mut self, now_ms: u64, last_update: u64) {
        let (Some(view), Some(unsure)) = (&self.view, self.sending.as_ref().and_then(|sending| sending.unsure)) else { return };
        let head = view.block().number;
        let Some(sending) = self.sending.take() else { return };
        if last_update > sending.last_update
            && let Some(commit) = found(&sending, view)
        {
            return self.landed(now_ms, sending, last_update, commit);
        }
        // Somebody else's row, or none: ours is lost, unless it still lies in the pool or in a block that is not final.
        let may_come = unsure == Unsure::Restarted && last_update <= sending.last_update && head < sending.head + RECALL_BLOCKS;
        if may_come {
            self.sending = Some(sending);
        }
    }
}

/// Where the chain shows the row: `Some(None)` in the open, `Some(Some(_))` committed.
fn found(sending: &Sending, view: &crate::view::WeightsView) -> Option<Option<PendingCommit>> {
    let is_shown = view.row == weights::as_stored(&sending.request.row);
    match &sending.request.how {
        How::Plain => is_shown.then_some(None),
        How::Timelocked { round, .. } => {
            let ours = view.commits.iter().find(|commit| commit.round == *round && commit.block > sending.last_update);
            // Without its commit it is opened already, or was never there.
            ours.map(|commit| Some(*commit)).or_else(|| is_shown.then_some(None))
        }
    }
}
