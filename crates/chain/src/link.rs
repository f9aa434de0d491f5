//! A chain that is connected when it is first asked, because a daemon's other work goes on without it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::AccountId;
use tokio::sync::OnceCell;

use crate::{Chain, ChainError, ChainHealth, ConnectSettings, Deadlines, SubtensorClient};

/// First and longest pause between two tries to connect.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LONGEST: Duration = Duration::from_secs(30);

/// A chain that may not be connected yet.
pub struct ChainLink {
    settings: ConnectSettings,
    deadlines: Deadlines,
    client: OnceCell<Arc<dyn Chain>>,
    /// Why it is not connected.
    failure: Mutex<String>,
}

impl ChainLink {
    pub fn new(settings: ConnectSettings, deadlines: Deadlines) -> Self {
        Self { settings, deadlines, client: OnceCell::new(), failure: Mutex::new("not connected yet".to_owned()) }
    }

    /// A link that is connected already.
    pub fn connected(client: Arc<dyn Chain>) -> Self {
        let settings = ConnectSettings { endpoints: Vec::new(), genesis: Some(client.genesis()) };
        Self { settings, deadlines: Deadlines::default(), client: OnceCell::new_with(Some(client)), failure: Mutex::default() }
    }

    /// The chain, connected now if it was not yet.
    pub async fn client(&self) -> Result<Arc<dyn Chain>, ChainError> {
        let connect = || async {
            let client = SubtensorClient::connect_within(self.settings.clone(), self.deadlines).await?;
            Ok::<Arc<dyn Chain>, ChainError>(Arc::new(client))
        };
        let client = self.client.get_or_try_init(connect).await.cloned();
        if let Err(error) = &client {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = error.to_string().replace('\n', "; ");
        }
        client
    }

    /// Connects, and tries until that works; fails only where a person must change something. Whoever can do without the chain for a
    /// while still wants to hear early that it is the wrong one.
    pub async fn connect(&self) -> Result<(), ChainError> {
        let mut pause = RETRY_FIRST;
        loop {
            match self.client().await {
                Ok(_) => return Ok(()),
                Err(error) if error.needs_a_person() => return Err(error),
                Err(error) => tracing::debug!(%error, "the chain cannot be reached"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LONGEST);
        }
    }

    /// How the connection is doing; `None` while it was never made.
    pub fn health(&self) -> Option<ChainHealth> {
        self.client.get().map(|client| client.health())
    }

    /// Why the chain cannot be worked with now; `None` while all is well.
    pub fn trouble(&self) -> Option<String> {
        match self.health() {
            None => Some(self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()),
            Some(health) => (!health.is_healthy()).then(|| health.to_string()),
        }
    }

    /// That blocks came once and come no more although sockets can be opened ([`ChainHealth::has_fallen_silent`]); `None` while that
    /// is not so.
    pub fn silence(&self) -> Option<String> {
        self.health().filter(ChainHealth::has_fallen_silent).map(|health| health.to_string())
    }

    /// Whether `hotkey` is registered on the subnet.
    pub async fn is_registered(&self, netuid: u16, hotkey: &AccountId) -> Result<bool, ChainError> {
        Ok(self.client().await?.metagraph(netuid).await?.by_hotkey(hotkey).is_some())
    }
}
