//! The chain as a miner needs it: who is registered. Connected when first asked, because training goes on without it.

use std::sync::Arc;

use chain::{Chain, ChainError, ConnectSettings, SubtensorClient};
use protocol::AccountId;
use tokio::sync::OnceCell;

/// A chain that may not be connected yet.
pub struct ChainLink {
    settings: ConnectSettings,
    client: OnceCell<Arc<dyn Chain>>,
}

impl ChainLink {
    pub fn new(settings: ConnectSettings) -> Self {
        Self { settings, client: OnceCell::new() }
    }

    /// The chain, connected now if it was not yet.
    pub async fn client(&self) -> Result<Arc<dyn Chain>, ChainError> {
        let connect = || async {
            let client = SubtensorClient::connect(self.settings.clone()).await?;
            Ok::<Arc<dyn Chain>, ChainError>(Arc::new(client))
        };
        self.client.get_or_try_init(connect).await.cloned()
    }

    /// Genesis of the network: as configured, or as the chain says.
    pub async fn genesis(&self) -> Result<[u8; 32], ChainError> {
        match self.settings.genesis {
            Some(genesis) => Ok(genesis),
            None => Ok(self.client().await?.genesis()),
        }
    }

    /// Whether `hotkey` is registered on the subnet.
    pub async fn is_registered(&self, netuid: u16, hotkey: &AccountId) -> Result<bool, ChainError> {
        Ok(self.client().await?.metagraph(netuid).await?.by_hotkey(hotkey).is_some())
    }
}
