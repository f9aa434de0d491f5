//! A subtensor chain over JSON-RPC: the node's own metadata, calls and storage by name, several endpoints, a deadline on every
//! call, and writes that count only when they were read back from a finalized block.

mod commitment;
mod connection;
#[cfg(test)]
mod golden;
mod read;
mod submit;

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use protocol::AccountId;
use subxt::dynamic;
use subxt::dynamic::Value;
use subxt::rpcs::client::rpc_params;
use subxt::utils::H256;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use crate::COMMITMENT_MAX;
use crate::chain::Chain;
use crate::error::{ChainError, SetWeightsError, WeightsRefusal};
use crate::hotkey::Hotkey;
use crate::types::{BlockRef, Hyperparameters, Metagraph};
use crate::weights;
pub use connection::Deadlines;
use connection::{Connections, chain_error};
use read::{AtBlock, SUBTENSOR};
use submit::Failure;

/// Genesis of the public main network.
pub const FINNEY_GENESIS: [u8; 32] = [
    0x2f, 0x05, 0x55, 0xcc, 0x76, 0xfc, 0x28, 0x40, 0xa2, 0x5a, 0x6e, 0xa3, 0xb9, 0x63, 0x71, 0x46, 0x80, 0x6f, 0x1f, 0x44, 0xb0, 0x90,
    0xc1, 0x75, 0xff, 0xde, 0x2a, 0x7e, 0x5a, 0xb3, 0x6c, 0x03,
];

/// Public endpoints of the main network, in the order to try.
pub const FINNEY_ENDPOINTS: [&str; 2] = ["wss://entrypoint-finney.opentensor.ai:443", "wss://lite.chain.opentensor.ai:443"];

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
    connections: Connections,
    genesis: [u8; 32],
    /// Number of the highest finalized block seen: below it, hashes by number are final.
    finalized: AtomicU64,
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
        Ok(Self { connections, genesis, finalized: AtomicU64::new(0), writing: Mutex::new(()) })
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
                let at = link.api.at_current_block().await?;
                self.finalized.fetch_max(at.block_number(), Ordering::Relaxed);
                question(at).await
            })
            .await
    }

    /// Sends a call and follows it to a finalized block; `landed` recognises its effect at a block where watching it failed.
    async fn write<C, F, Fut>(&self, hotkey: &Hotkey, call: &C, landed: F) -> Result<BlockRef, Failure>
    where
        C: subxt::tx::Payload + Sync,
        F: Fn(AtBlock) -> Fut + Send + Sync,
        Fut: Future<Output = Result<bool, subxt::Error>> + Send,
    {
        let finality = Duration::from_millis(self.connections.deadlines.finality_ms);
        let deadline = Instant::now() + finality;
        let link = self.connections.link().await.map_err(Failure::NotSent)?;
        let at = match tokio::time::timeout(self.call_limit(), link.api.at_current_block()).await {
            Ok(Ok(at)) => at,
            Ok(Err(error)) => {
                self.connections.abandon(&link).await;
                return Err(Failure::NotSent(chain_error("submit", &link.endpoint, error.into())));
            }
            Err(_) => {
                self.connections.abandon(&link).await;
                let millis = self.connections.deadlines.call_ms;
                return Err(Failure::NotSent(ChainError::Timeout { endpoint: link.endpoint.clone(), call: "submit", millis }));
            }
        };
        match submit::submit(&link, &at, hotkey, call, self.call_limit(), finality).await {
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
        if number > self.finalized.load(Ordering::Relaxed) && number > self.head().await?.number {
            return Ok(None);
        }
        self.connections
            .ask("block_hash", |link| async move {
                let hash: Option<H256> = link.rpc.request("chain_getBlockHash", rpc_params![number]).await?;
                Ok(hash.map(|hash| hash.0))
            })
            .await
    }

    async fn metagraph(&self, netuid: u16) -> Result<Metagraph, ChainError> {
        self.at_head("metagraph", |at| async move { read::metagraph(&at, netuid).await }).await?.ok_or(ChainError::SubnetMissing { netuid })
    }

    async fn hyperparameters(&self, netuid: u16) -> Result<Hyperparameters, ChainError> {
        self.at_head("hyperparameters", |at| async move { read::hyperparameters(&at, netuid).await })
            .await?
            .ok_or(ChainError::SubnetMissing { netuid })
    }

    async fn set_weights(&self, hotkey: &Hotkey, netuid: u16, row: &[(u16, u16)], version_key: u64) -> Result<BlockRef, SetWeightsError> {
        let refuse = |reason| Err(SetWeightsError::Refused(reason));
        // The chain would take a row of zeros, and nobody would earn anything by it.
        if row.iter().all(|(_, value)| *value == 0) {
            return refuse(WeightsRefusal::EmptyRow);
        }
        let _turn = self.writing.lock().await;
        let account = hotkey.account();
        let (parameters, uid, before) = self
            .at_head("set_weights", |at| async move {
                let parameters = read::hyperparameters(&at, netuid).await?;
                let uid = read::uid_of(&at, netuid, &account).await?;
                let before = match uid {
                    Some(uid) => read::last_update(&at, netuid, uid).await?,
                    None => 0,
                };
                Ok((parameters, uid, before))
            })
            .await?;
        let Some(parameters) = parameters else { return Err(ChainError::SubnetMissing { netuid }.into()) };
        let Some(uid) = uid else { return refuse(WeightsRefusal::NotRegistered) };
        if parameters.commit_reveal {
            return refuse(WeightsRefusal::CommitRevealEnabled);
        }
        if parameters.weights_version > version_key {
            return refuse(WeightsRefusal::VersionTooOld { required: parameters.weights_version, ours: version_key });
        }

        let (uids, values): (Vec<u16>, Vec<u16>) = row.iter().copied().unzip();
        let call = dynamic::transaction(SUBTENSOR, "set_weights", (netuid, uids, values, version_key));
        let expected = &weights::as_stored(row);
        let landed = self
            .write(hotkey, &call, |at| async move {
                Ok(read::last_update(&at, netuid, uid).await? > before && read::weights(&at, netuid, uid).await? == *expected)
            })
            .await;
        let block = match landed {
            Ok(block) => block,
            Err(Failure::PoolCode(code)) => return refuse(WeightsRefusal::from_pool_code(code)),
            Err(Failure::Nonce) => return refuse(WeightsRefusal::Nonce),
            Err(Failure::BadProof) => return refuse(WeightsRefusal::BadProof),
            Err(Failure::Pool(reason)) => return refuse(WeightsRefusal::Other(reason)),
            Err(Failure::Dispatch(name)) => {
                let name = name.strip_prefix("SubtensorModule::").unwrap_or(&name);
                return refuse(WeightsRefusal::from_dispatch_error(name));
            }
            Err(Failure::Unknown) => {
                return Err(SetWeightsError::NotFinalized { millis: self.connections.deadlines.finality_ms });
            }
            Err(Failure::NotSent(error)) => return Err(error.into()),
        };
        let stored = self
            .connections
            .ask("read back", |link| async move {
                let at = link.api.at_block(H256(block.hash)).await?;
                read::weights(&at, netuid, uid).await
            })
            .await?;
        if stored == *expected { Ok(block) } else { Err(SetWeightsError::ReadBackDiffers { block }) }
    }

    async fn weights(&self, netuid: u16, uid: u16) -> Result<Vec<(u16, u16)>, ChainError> {
        self.at_head("weights", |at| async move { read::weights(&at, netuid, uid).await }).await
    }

    async fn commitment(&self, netuid: u16, account: &AccountId) -> Result<Option<Vec<u8>>, ChainError> {
        self.at_head("commitment", |at| async move { committed(&at, netuid, account).await }).await
    }

    async fn set_commitment(&self, hotkey: &Hotkey, netuid: u16, data: &[u8]) -> Result<BlockRef, ChainError> {
        if data.len() > COMMITMENT_MAX {
            return Err(ChainError::CommitmentTooLong { length: data.len(), limit: COMMITMENT_MAX });
        }
        let _turn = self.writing.lock().await;
        let account = hotkey.account();
        let registered = self.at_head("set_commitment", |at| async move { read::uid_of(&at, netuid, &account).await }).await?;
        if registered.is_none() {
            return Err(ChainError::NotRegistered { hotkey: account, netuid });
        }
        let call = dynamic::transaction("Commitments", "set_commitment", vec![Value::from(netuid), commitment::info(data)]);
        let refused = |reason: String| Err(ChainError::CommitmentRefused { hotkey: account, reason });
        let landed =
            self.write(hotkey, &call, |at| async move { Ok(committed(&at, netuid, &account).await?.as_deref() == Some(data)) }).await;
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

/// The plain bytes that `account` committed on the subnet.
async fn committed(at: &AtBlock, netuid: u16, account: &AccountId) -> Result<Option<Vec<u8>>, subxt::Error> {
    let address = dynamic::storage::<(u16, [u8; 32]), Value>("Commitments", "CommitmentOf");
    let Some(value) = at.storage().try_fetch(address, (netuid, account.0)).await? else { return Ok(None) };
    Ok(commitment::plain_bytes(&value.decode()?))
}
