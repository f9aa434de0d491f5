//! Following a committed row until the chain has opened it.

use serde::{Deserialize, Serialize};

use super::Stage;
use crate::view::{PendingCommit, WeightsView};
use crate::weights;

/// Blocks after the first of the target epoch at which a reveal is looked for first.
const LOOK_AFTER_BLOCKS: u64 = 4;

/// Blocks after that for which a row in the open waits for the reveal.
const PATIENCE_BLOCKS: u64 = 20;

/// A committed row that the chain will open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwaitedReveal {
    /// The row as it will be stored.
    pub row: Vec<(u16, u16)>,
    pub commit: PendingCommit,
    /// The epoch in which the chain opens it, and that epoch's first block as foretold when it was committed.
    pub target_epoch: u64,
    pub reveal_block: u64,
    /// Whether the chain was seen within the target epoch.
    was_watched: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RevealOutcome {
    /// The chain shows the row.
    Revealed,
    /// The target epoch passed, or the commit is gone, and the chain shows another row.
    Missed,
    /// The chain was not seen while it should have been opened, and shows a later row by now.
    Unseen,
}

impl AwaitedReveal {
    /// A commit that landed; `view` is the newest one.
    pub(super) fn new(row: Vec<(u16, u16)>, commit: PendingCommit, view: Option<&WeightsView>) -> Self {
        let period = view.map_or(1, |view| view.reveal_period_epochs);
        let target_epoch = commit.epoch + period;
        let reveal_block = view.map_or(commit.block, |view| {
            let head = view.block().number;
            let reveal = view.epoch.reveal(head, target_epoch.saturating_sub(view.epoch.index));
            reveal.map_or(head, |reveal| {
                // If the next block is due already, the foretold epoch is one too far.
                let early = reveal.target_epoch.saturating_sub(target_epoch) * u64::from(view.epoch.tempo);
                reveal.block.saturating_sub(early)
            })
        });
        Self { row: weights::as_stored(&row), commit, target_epoch, reveal_block, was_watched: false }
    }

    /// Where the setter stands while nothing else is due.
    pub(super) fn stage(&self) -> Stage {
        Stage::Committed { block: self.commit.block, round: self.commit.round, reveal_block: self.reveal_block }
    }

    /// The block at which the row should be open.
    pub(super) fn look_block(&self) -> u64 {
        self.reveal_block + LOOK_AFTER_BLOCKS
    }

    /// The block up to which a row in the open waits for this one.
    pub(super) fn patience_block(&self) -> u64 {
        self.look_block() + PATIENCE_BLOCKS
    }

    /// What became of it by `view`; `None` while it is awaited.
    pub(super) fn judge(&mut self, view: &WeightsView) -> Option<RevealOutcome> {
        if view.block().number < self.commit.block || view.epoch.index < self.target_epoch {
            return None;
        }
        let waits = view.commits.contains(&self.commit);
        if !waits && view.row == self.row {
            return Some(RevealOutcome::Revealed);
        }
        if view.epoch.index == self.target_epoch {
            self.was_watched = true;
            // The chain tries in every block of the epoch; once the commit is gone nothing more comes.
            return (!waits).then_some(RevealOutcome::Missed);
        }
        Some(if self.was_watched { RevealOutcome::Missed } else { RevealOutcome::Unseen })
    }
}
