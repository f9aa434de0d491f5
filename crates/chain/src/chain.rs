//! The seam between the rest of the system and a Bittensor chain.

use async_trait::async_trait;
use protocol::AccountId;

use crate::error::{ChainError, SetWeightsError};
use crate::hotkey::Hotkey;
use crate::types::{BlockRef, Hyperparameters, Metagraph};

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

    async fn hyperparameters(&self, netuid: u16) -> Result<Hyperparameters, ChainError>;

    /// Sets the row of `hotkey` (pairs of uid and value) and returns the finalized block that contains it, after reading the
    /// row back from it. `version_key` is the newest weights version that the caller's build knows.
    async fn set_weights(
        &self,
        hotkey: &Hotkey,
        netuid: u16,
        weights: &[(u16, u16)],
        version_key: u64,
    ) -> Result<BlockRef, SetWeightsError>;

    /// The row that the chain holds for `uid`; empty if it never set weights.
    async fn weights(&self, netuid: u16, uid: u16) -> Result<Vec<(u16, u16)>, ChainError>;

    /// The bytes that `account` last committed on the subnet; `None` if there are none or they are not plain bytes.
    async fn commitment(&self, netuid: u16, account: &AccountId) -> Result<Option<Vec<u8>>, ChainError>;

    /// Commits up to 512 bytes, replacing what the hotkey committed before, and returns the finalized block that contains it.
    async fn set_commitment(&self, hotkey: &Hotkey, netuid: u16, data: &[u8]) -> Result<BlockRef, ChainError>;
}
