//! A chain that is connected when it is first asked, because a daemon's other work goes on without it.

use std::sync::Arc;

use protocol::AccountId;
use tokio::sync::OnceCell;

use crate::{Chain, ChainError, ChainHealth, ConnectSettings, SubtensorClient};

/// A chain that may not be connected yet.
pub struct ChainLink {
    settings: ConnectSettings,
    client: OnceCell<Arc<dyn Chain>>,
}

impl ChainLink {
    pub fn new(settings: ConnectSettings) -> Self {
        Self { settings, client: OnceCell::new() }
    }

    /// A link that is connected already.
    pub fn connected(client: Arc<dyn Chain>) -> Self {
        let settings = ConnectSettings { endpoints: Vec::new(), genesis: Some(client.genesis()) };
        Self { settings, client: OnceCell::new_with(Some(client)) }
    }

    /// The chain, connected now if it was not yet.
    pub async fn client(&self) -> Result<Arc<dyn Chain>, ChainError> {
        let connect = || async {
            let client = SubtensorClient::connect(self.settings.clone()).await?;
            Ok::<Arc<dyn Chain>, ChainError>(Arc::new(client))
        };
        self.client.get_or_try_init(connect).await.cloned()
    }

    /// How the connection is doing; `None` while it was never made.
    pub fn health(&self) -> Option<ChainHealth> {
        self.client.get().map(|client| client.health())
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
