//! The seam between the rest of the system and a Bittensor chain.

use async_trait::async_trait;
use protocol::AccountId;

use crate::drand::Pulse;
use crate::error::{ChainError, SetWeightsError};
use crate::health::ChainHealth;
use crate::hotkey::Hotkey;
use crate::types::{BlockRef, Hyperparameter, Hyperparameters, Metagraph, Registration};
use crate::view::{Landed, Progress, WeightsRequest, WeightsView};

/// What the daemons need of a chain. One implementation talks to nodes ([`crate::SubtensorClient`]), one lives in memory for the
/// simulation ([`crate::MemoryChain`]); both pass the same conformance tests.
///
/// Reads are at the latest finalized block. Every call ends within a deadline; errors say whether to try again.
#[async_trait]
pub trait Chain: Send + Sync + 'static {
    /// Hash of block 0: names the network, and is part of everything that is signed.
    fn genesis(&self) -> [u8; 32];

    /// The latest finalized block.
    async fn head(&self) -> Result<BlockRef, ChainError>;

    /// Hash of a finalized block by number; `None` while the block is not finalized or when the node has forgotten it.
    async fn block_hash(&self, number: u64) -> Result<Option<[u8; 32]>, ChainError>;

    /// All neurons of a subnet at the latest finalized block.
    async fn metagraph(&self, netuid: u16) -> Result<Metagraph, ChainError>;

    /// All neurons of a subnet at a finalized block. Nodes forget the states of old blocks, after some 256 of them unless they
    /// are archives.
    async fn metagraph_at(&self, netuid: u16, block: u64) -> Result<Metagraph, ChainError>;

    async fn hyperparameters(&self, netuid: u16) -> Result<Hyperparameters, ChainError>;

    /// Every hyperparameter that the runtime lists by name, those unknown to this build among them; empty on a runtime without
    /// such a list.
    async fn hyperparameter_list(&self, netuid: u16) -> Result<Vec<Hyperparameter>, ChainError>;

    /// First block of the subnet's next epoch; `None` where it runs none.
    async fn next_epoch(&self, netuid: u16) -> Result<Option<u64>, ChainError>;

    /// Whether `hotkey` is on the subnet, and what joining costs.
    async fn registration(&self, netuid: u16, hotkey: &AccountId) -> Result<Registration, ChainError>;

    /// A round of the randomness beacon, if the chain has stored it.
    async fn pulse(&self, round: u64) -> Result<Option<Pulse>, ChainError>;

    /// Everything that setting weights of `hotkey` depends on, at the latest finalized block.
    async fn weights_view(&self, netuid: u16, mechanism: u8, hotkey: &AccountId) -> Result<WeightsView, ChainError>;

    /// Sends a row, in the open or timelocked, follows it to a finalized block and reads it back from there: the row itself, or its
    /// commit. `progress` hears of each step.
    async fn send_weights(
        &self,
        hotkey: &Hotkey,
        request: &WeightsRequest,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Landed, SetWeightsError>;

    /// How the connection is doing.
    fn health(&self) -> ChainHealth;

    /// The row that the chain holds for `uid`; empty if it never set weights.
    async fn weights(&self, netuid: u16, uid: u16) -> Result<Vec<(u16, u16)>, ChainError>;

    /// The bytes that `account` last committed on the subnet; `None` if there are none or they are not plain bytes.
    async fn commitment(&self, netuid: u16, account: &AccountId) -> Result<Option<Vec<u8>>, ChainError>;

    /// All plain bytes that hotkeys have committed on the subnet, at one block.
    async fn commitments(&self, netuid: u16) -> Result<Vec<(AccountId, Vec<u8>)>, ChainError>;

    /// Commits up to 512 bytes, replacing what the hotkey committed before, and returns the finalized block that contains it.
    async fn set_commitment(&self, hotkey: &Hotkey, netuid: u16, data: &[u8]) -> Result<BlockRef, ChainError>;
}
