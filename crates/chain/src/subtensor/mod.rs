//! A subtensor chain over JSON-RPC: the node's own metadata, calls and storage by name, several endpoints, a deadline on every
//! call, and writes that count only when they were read back from a finalized block.

mod cache;
mod commitment;
mod connection;
mod fault;
#[cfg(test)]
mod golden;
mod read;
mod send;
mod submit;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use protocol::AccountId;
use subxt::dynamic;
use subxt::dynamic::Value;
use subxt::rpcs::client::rpc_params;
use subxt::utils::H256;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::COMMITMENT_MAX;
use crate::chain::Chain;
use crate::drand::Pulse;
use crate::error::{ChainError, SetWeightsError};
use crate::health::ChainHealth;
use crate::hotkey::Hotkey;
use crate::types::{BlockRef, Hyperparameter, Hyperparameters, Metagraph, Registration};
use crate::view::{Landed, Progress, WeightsRequest, WeightsView};
use cache::Cache;
use connection::Connections;
pub use connection::Deadlines;
use fault::chain_error;
use read::AtBlock;
use submit::Failure;

/// Genesis of the public main network.
pub const FINNEY_GENESIS: [u8; 32] = [
    0x2f, 0x05, 0x55, 0xcc, 0x76, 0xfc, 0x28, 0x40, 0xa2, 0x5a, 0x6e, 0xa3, 0xb9, 0x63, 0x71, 0x46, 0x80, 0x6f, 0x1f, 0x44, 0xb0, 0x90,
    0xc1, 0x75, 0xff, 0xde, 0x2a, 0x7e, 0x5a, 0xb3, 0x6c, 0x03,
];

/// Public endpoints of the main network, in the order to try.
pub const FINNEY_ENDPOINTS: [&str; 2] = ["wss://entrypoint-finney.opentensor.ai:443", "wss://lite.chain.opentensor.ai:443"];

/// Genesis of the public test network.
pub const TEST_GENESIS: [u8; 32] = [
    0x8f, 0x9c, 0xf8, 0x56, 0xbf, 0x55, 0x8a, 0x14, 0x44, 0x0e, 0x75, 0x56, 0x9c, 0x9e, 0x58, 0x59, 0x47, 0x57, 0x04, 0x8d, 0x7b, 0x3a,
    0x84, 0xb5, 0xd2, 0x5f, 0x6b, 0xd9, 0x78, 0x26, 0x31, 0x05,
];

/// Public endpoint of the test network.
pub const TEST_ENDPOINTS: [&str; 1] = ["wss://test.finney.opentensor.ai:443"];

/// Pause between two looks for an extrinsic whose watching connection broke.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Which chain to talk to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectSettings {
    /// Websocket addresses, in the order to try.
    pub endpoints: Vec<String>,
    /// The network that must be found there; `None` takes the first endpoint's.
    pub genesis: Option<[u8; 32]>,
}

/// The chain behind one or more subtensor nodes.
pub struct SubtensorClient {
    connections: Arc<Connections>,
    genesis: [u8; 32],
    cache: Cache,
    watchdog: JoinHandle<()>,
    /// One extrinsic at a time: two at once would take the same nonce.
    writing: Mutex<()>,
}

impl SubtensorClient {
    /// Connects to the first endpoint that answers and checks its genesis.
    pub async fn connect(settings: ConnectSettings) -> Result<Self, ChainError> {
        Self::connect_within(settings, Deadlines::default()).await
    }

    pub async fn connect_within(settings: ConnectSettings, deadlines: Deadlines) -> Result<Self, ChainError> {
        let (connections, genesis) = Connections::open(settings.endpoints, settings.genesis, deadlines).await?;
        let connections = Arc::new(connections);
        let watchdog = tokio::spawn(connection::watch(Arc::downgrade(&connections)));
        Ok(Self { connections, genesis, cache: Cache::default(), watchdog, writing: Mutex::new(()) })
    }

    fn call_limit(&self) -> Duration {
        Duration::from_millis(self.connections.deadlines.call_ms)
    }

    /// Asks one question at the latest finalized block.
    async fn at_head<T, F, Fut>(&self, call: &'static str, question: F) -> Result<T, ChainError>
    where
        F: Fn(AtBlock) -> Fut + Send + Sync,
        Fut: Future<Output = Result<T, subxt::Error>> + Send,
    {
        let question = &question;
        self.connections
            .ask(call, |link| async move {
                let at = link.at_head().await?;
                self.connections.note_block(&at);
                question(at).await
            })
            .await
    }

    /// Sends a call and follows it to a finalized block; `landed` recognises its effect at a block where watching it failed.
    async fn write<C, F, Fut>(
        &self,
        hotkey: &Hotkey,
        call: &C,
        landed: F,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<BlockRef, Failure>
    where
        C: subxt::tx::Payload + Sync,
        F: Fn(AtBlock) -> Fut + Send + Sync,
        Fut: Future<Output = Result<bool, subxt::Error>> + Send,
    {
        let finality = Duration::from_millis(self.connections.deadlines.finality_ms);
        let deadline = Instant::now() + finality;
        let link = self.connections.link().await.map_err(Failure::NotSent)?;
        let at = match tokio::time::timeout(self.call_limit(), link.at_head()).await {
            Ok(Ok(at)) => at,
            Ok(Err(error)) => {
                self.connections.abandon(&link).await;
                return Err(Failure::NotSent(chain_error("submit", &link.endpoint, error)));
            }
            Err(_) => {
                self.connections.abandon(&link).await;
                let millis = self.connections.deadlines.call_ms;
                return Err(Failure::NotSent(ChainError::Timeout { endpoint: link.endpoint.clone(), call: "submit", millis }));
            }
        };
        match submit::submit(&link, &at, hotkey, call, self.call_limit(), finality, progress).await {
            Err(Failure::NotSent(error)) if error.is_retryable() => {
                self.connections.abandon(&link).await;
                return Err(Failure::NotSent(error));
            }
            Err(Failure::Unknown) => {}
            decided => return decided,
        }
        // The watch broke, not necessarily the extrinsic: look for its effect until the time is up.
        let landed = &landed;
        while Instant::now() < deadline {
            let seen = self
                .at_head("read back", |at| async move {
                    let block = read::block_ref(&at);
                    Ok((landed(at).await?, block))
                })
                .await;
            if let Ok((true, block)) = seen {
                progress(Progress::Finalized(block));
                return Ok(block);
            }
            sleep(LOOK_AGAIN).await;
        }
        Err(Failure::Unknown)
    }
}

#[async_trait]
impl Chain for SubtensorClient {
    fn genesis(&self) -> [u8; 32] {
        self.genesis
    }

    async fn head(&self) -> Result<BlockRef, ChainError> {
        self.at_head("head", |at| async move { Ok(read::block_ref(&at)) }).await
    }

    async fn block_hash(&self, number: u64) -> Result<Option<[u8; 32]>, ChainError> {
        self.connections
            .ask("block_hash", |link| async move {
                // Of the endpoint that is asked for the hash: what another one has finalized may still be a fork there.
                if number > read::block_ref(&link.at_head().await?).number {
                    return Ok(None);
                }
                let hash: Option<H256> = link.rpc.request("chain_getBlockHash", rpc_params![number]).await?;
                Ok(hash.map(|hash| hash.0))
            })
            .await
    }

    async fn metagraph(&self, netuid: u16) -> Result<Metagraph, ChainError> {
        let question = |at: AtBlock| async move {
            let hash = at.block_hash().0;
            if let Some(known) = self.cache.metagraph(netuid, &hash) {
                return Ok(Some(known));
            }
            let metagraph = read::metagraph(&at, netuid).await?;
            metagraph.iter().for_each(|metagraph| self.cache.keep_metagraph(netuid, metagraph));
            Ok(metagraph)
        };
        self.at_head("metagraph", question).await?.ok_or(ChainError::SubnetMissing { netuid })
    }

    async fn metagraph_at(&self, netuid: u16, block: u64) -> Result<Metagraph, ChainError> {
        if let Some(known) = self.cache.past_metagraph(netuid, block) {
            return Ok(known);
        }
        // One endpoint may have forgotten what another one, an archive, still knows.
        let mut tries = self.connections.endpoint_count();
        loop {
            tries -= 1;
            let hash = self.block_hash(block).await?.ok_or(ChainError::NotYetFinal { number: block })?;
            let read = self
                .connections
                .ask("metagraph", |link| async move {
                    let at = link.api.at_block_hash_and_number(H256(hash), block).await?;
                    read::metagraph(&at, netuid).await
                })
                .await;
            match read {
                Ok(metagraph) => {
                    let metagraph = metagraph.ok_or(ChainError::SubnetMissing { netuid })?;
                    self.cache.keep_metagraph(netuid, &metagraph);
                    return Ok(metagraph);
                }
                Err(ChainError::StateForgotten { .. }) if tries > 0 => {
                    let link = self.connections.link().await?;
                    self.connections.abandon(&link).await;
                }
                Err(ChainError::StateForgotten { .. }) => return Err(ChainError::StateForgotten { number: block }),
                Err(error) => return Err(error),
            }
        }
    }

    async fn hyperparameters(&self, netuid: u16) -> Result<Hyperparameters, ChainError> {
        let question = |at: AtBlock| async move {
            let hash = at.block_hash().0;
            if let Some(known) = self.cache.hyperparameters(netuid, &hash) {
                return Ok(Some(known));
            }
            let parameters = read::hyperparameters(&at, netuid).await?;
            parameters.iter().for_each(|parameters| self.cache.keep_hyperparameters(netuid, hash, parameters));
            Ok(parameters)
        };
        self.at_head("hyperparameters", question).await?.ok_or(ChainError::SubnetMissing { netuid })
    }

    async fn hyperparameter_list(&self, netuid: u16) -> Result<Vec<Hyperparameter>, ChainError> {
        let question = |at: AtBlock| async move {
            if !read::subnet_exists(&at, netuid).await? {
                return Ok(None);
            }
            Ok(Some(read::hyperparameter_list(&at, netuid).await?.unwrap_or_default()))
        };
        self.at_head("hyperparameter_list", question).await?.ok_or(ChainError::SubnetMissing { netuid })
    }

    async fn next_epoch(&self, netuid: u16) -> Result<Option<u64>, ChainError> {
        self.at_head("next_epoch", |at| async move { read::next_epoch(&at, netuid).await }).await
    }

    async fn registration(&self, netuid: u16, hotkey: &AccountId) -> Result<Registration, ChainError> {
        self.at_head("registration", |at| async move { read::registration(&at, netuid, hotkey).await })
            .await?
            .ok_or(ChainError::SubnetMissing { netuid })
    }

    async fn pulse(&self, round: u64) -> Result<Option<Pulse>, ChainError> {
        self.at_head("pulse", |at| async move { read::pulse(&at, round).await }).await
    }

    async fn weights_view(&self, netuid: u16, mechanism: u8, hotkey: &AccountId) -> Result<WeightsView, ChainError> {
        self.at_head("weights_view", |at| async move { read::weights_view(&at, netuid, mechanism, hotkey).await })
            .await?
            .ok_or(ChainError::SubnetMissing { netuid })
    }

    async fn send_weights(
        &self,
        hotkey: &Hotkey,
        request: &WeightsRequest,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Landed, SetWeightsError> {
        self.send(hotkey, request, progress).await
    }

    fn health(&self) -> ChainHealth {
        self.connections.health()
    }

    async fn weights(&self, netuid: u16, uid: u16) -> Result<Vec<(u16, u16)>, ChainError> {
        self.at_head("weights", |at| async move { read::weights(&at, netuid, uid).await }).await
    }

    async fn commitment(&self, netuid: u16, account: &AccountId) -> Result<Option<Vec<u8>>, ChainError> {
        self.at_head("commitment", |at| async move { committed(&at, netuid, account).await }).await
    }

    async fn commitments(&self, netuid: u16) -> Result<Vec<(AccountId, Vec<u8>)>, ChainError> {
        self.at_head("commitments", |at| async move { commitment::all(&at, netuid).await }).await
    }

    async fn set_commitment(&self, hotkey: &Hotkey, netuid: u16, data: &[u8]) -> Result<BlockRef, ChainError> {
        if data.len() > COMMITMENT_MAX {
            return Err(ChainError::CommitmentTooLong { length: data.len(), limit: COMMITMENT_MAX });
        }
        let _turn = self.writing.lock().await;
        let account = hotkey.account();
        let registration = self.at_head("set_commitment", |at| async move { read::registration(&at, netuid, &account).await }).await?;
        if registration.ok_or(ChainError::SubnetMissing { netuid })?.uid.is_none() {
            return Err(ChainError::NotRegistered { hotkey: account, netuid });
        }
        let call = dynamic::transaction("Commitments", "set_commitment", vec![Value::from(netuid), commitment::info(data)]);
        let refused = |reason: String| Err(ChainError::CommitmentRefused { hotkey: account, reason });
        let landed = self
            .write(hotkey, &call, |at| async move { Ok(committed(&at, netuid, &account).await?.as_deref() == Some(data)) }, &|_| {})
            .await;
        let block = match landed {
            Ok(block) => block,
            Err(Failure::PoolCode(code)) => return refused(format!("custom error {code}")),
            Err(Failure::Nonce) => return refused("another extrinsic of this hotkey is on its way".to_owned()),
            Err(Failure::BadProof) => return refused("signature or era not accepted".to_owned()),
            Err(Failure::Pool(reason) | Failure::Dispatch(reason)) => return refused(reason),
            Err(Failure::Unknown) => {
                return Err(ChainError::NotFinalized { hotkey: account, millis: self.connections.deadlines.finality_ms });
            }
            Err(Failure::NotSent(error)) => return Err(error),
        };
        let stored = self
            .connections
            .ask("read back", |link| async move {
                let at = link.api.at_block(H256(block.hash)).await?;
                committed(&at, netuid, &account).await
            })
            .await?;
        if stored.as_deref() == Some(data) {
            Ok(block)
        } else {
            Err(ChainError::ReadBackDiffers { what: format!("the commitment in block {block}") })
        }
    }
}

impl Drop for SubtensorClient {
    fn drop(&mut self) {
        self.watchdog.abort();
    }
}

/// The plain bytes that `account` committed on the subnet.
async fn committed(at: &AtBlock, netuid: u16, account: &AccountId) -> Result<Option<Vec<u8>>, subxt::Error> {
    let stored = read::fetch_of::<(u16, [u8; 32]), Value>(at, "Commitments", "CommitmentOf", (netuid, account.0)).await?;
    Ok(stored.as_ref().and_then(commitment::plain_bytes))
}
