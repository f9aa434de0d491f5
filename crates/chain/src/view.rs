//! What setting weights depends on, read at one block, and what is sent.

use serde::{Deserialize, Serialize};

use protocol::AccountId;

use crate::drand::Beacon;
use crate::epoch::EpochState;
use crate::error::WeightsRefusal;
use crate::rules::{Subnet, TimelockedCommit};
use crate::types::{BlockRef, Hyperparameters, Metagraph, Neuron};

/// Netuids below this number share a u16 with the mechanism.
const MECHANISM_STRIDE: u16 = 4096;
/// Most mechanisms of one subnet.
pub const MECHANISMS_MAX: u8 = 16;

/// The storage index of a mechanism's weights; mechanism 0 has the netuid itself. `None` where either number is too large.
pub fn mechanism_index(netuid: u16, mechanism: u8) -> Option<u16> {
    (netuid < MECHANISM_STRIDE && mechanism < MECHANISMS_MAX).then(|| u16::from(mechanism) * MECHANISM_STRIDE + netuid)
}

/// A subnet as its setter of weights sees it: everything at one block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsView {
    pub metagraph: Metagraph,
    pub hyperparameters: Hyperparameters,
    /// Time of the block, in Unix milliseconds.
    pub timestamp_ms: u64,
    /// Milliseconds between blocks, as the runtime says.
    pub block_ms: u64,
    /// How many mechanisms the subnet has.
    pub mechanisms: u8,
    /// Blocks of the last weights of this mechanism, by uid; 0 = never.
    pub last_updates: Vec<u64>,
    /// The hotkey of the subnet's owner, where there is one.
    pub owner_hotkey: Option<AccountId>,
    pub is_null_consensus: bool,
    /// The row that the chain holds for our uid in this mechanism; empty without one.
    pub row: Vec<(u16, u16)>,
    pub epoch: EpochState,
    pub reveal_period_epochs: u64,
    /// `CommitRevealWeightsVersion`.
    pub commit_version: u16,
    pub beacon: Beacon,
    /// Newest round that the chain has stored.
    pub last_stored_round: u64,
    /// Our rows that wait to be revealed.
    pub commits: Vec<PendingCommit>,
}

/// A timelocked row that the chain holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingCommit {
    /// The epoch that it was committed in.
    pub epoch: u64,
    pub block: u64,
    pub round: u64,
}

/// A row to be sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsRequest {
    pub netuid: u16,
    pub mechanism: u8,
    /// Pairs of uid and value.
    pub row: Vec<(u16, u16)>,
    /// The weights version that it is sent with.
    pub version_key: u64,
    pub how: How,
}

/// In the open, or locked until the chain reveals it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    Plain,
    Timelocked { round: u64, commit_version: u16, beacon: Beacon },
}

/// How far a sent row has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Progress {
    /// The node's pool would take it.
    Validated,
    /// It was handed to the node.
    Submitted,
    /// A block contains it, which is not final yet.
    Included(BlockRef),
    /// That block was left for another fork; the row waits again.
    Retracted,
    /// A finalized block contains it.
    Finalized(BlockRef),
}

/// A row that landed, in a finalized block that was read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Landed {
    pub block: BlockRef,
    /// Where it waits to be revealed; `None` for a row in the open.
    pub commit: Option<PendingCommit>,
}

impl WeightsView {
    pub fn block(&self) -> BlockRef {
        self.metagraph.block
    }

    /// Block of the last weights of `neuron` in this mechanism; 0 = never.
    pub fn last_update(&self, neuron: &Neuron) -> u64 {
        self.last_updates.get(usize::from(neuron.uid)).copied().unwrap_or(0)
    }

    /// Which of the chain's rules would refuse `request` of `hotkey` in the next block; `Ok` where none would. The stake is left to
    /// the chain, which counts what is inherited from parents and staked on the root network too.
    pub fn check(&self, hotkey: &AccountId, request: &WeightsRequest) -> Result<(), WeightsRefusal> {
        let has_mechanism = request.mechanism < self.mechanisms.max(1);
        let parameters = Hyperparameters { stake_threshold: 0, ..self.hyperparameters.clone() };
        let subnet = Subnet {
            hyperparameters: Some(&parameters).filter(|_| has_mechanism),
            neurons: &self.metagraph.neurons,
            last_updates: Some(&self.last_updates),
            owner: self.owner_hotkey,
            block: self.block().number,
            is_null_consensus: self.is_null_consensus,
        };
        let (uids, values): (Vec<u16>, Vec<u16>) = request.row.iter().copied().unzip();
        match &request.how {
            How::Plain => {
                subnet.check_dispatch(hotkey, request.netuid, &uids, &values, request.version_key)?;
                subnet.check_pool(hotkey)
            }
            How::Timelocked { round, .. } => {
                let in_epoch = |commit: &&PendingCommit| commit.epoch == self.epoch.index;
                let unrevealed = self.commits.iter().filter(in_epoch).count();
                let commit = TimelockedCommit::ours(*round, self.commit_version, self.last_stored_round, unrevealed);
                subnet.check_commit(hotkey, &commit)?;
                subnet.check_commit_pool(hotkey, &commit)?;
                // What the chain would check, and silently drop the row for, when it opens it.
                subnet.check_reveal(hotkey, request.netuid, &uids, &values, request.version_key).map(|_| ())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_indices_are_those_of_the_golden_keys() {
        assert_eq!(mechanism_index(24, 0), Some(24));
        assert_eq!(mechanism_index(24, 1), Some(4120));
        assert_eq!(mechanism_index(4095, 15), Some(u16::MAX));
        assert_eq!(mechanism_index(4096, 0), None);
        assert_eq!(mechanism_index(1, 16), None);
    }
}
