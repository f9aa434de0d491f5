//! Connections to one of several endpoints: connect, check the genesis before anything else, give up on an endpoint that does not
//! answer or whose blocks do not arrive.
//!
//! A connection is never reopened behind our back: when its socket dies it is replaced by a new one, whose genesis is checked again. A
//! socket that stays open but says nothing is caught by the deadline on every call, one that answers while no block arrives
//! by the watchdog.

use std::future::Future;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use subxt::OnlineClient;
use subxt::backend::LegacyBackend;
use subxt::config::substrate::{H256, SubstrateConfig};
use subxt::ext::jsonrpsee::ws_client::{PingConfig, WsClientBuilder};
use subxt::rpcs::client::rpc_params;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::fault::chain_error;
use super::read::{AtBlock, block_ref};
use crate::error::ChainError;
use crate::health::ChainHealth;

/// First and longest pause before a dead endpoint is tried again.
const RECONNECT_FIRST_MS: u64 = 50;
const RECONNECT_LONGEST_MS: u64 = 5_000;
/// Largest answer of a node; metadata in hexadecimal is about 0.8 MB, the metagraph of a full subnet less.
const ANSWER_MAX_BYTES: u32 = 32 * 1024 * 1024;
/// A socket on which pings go unanswered for this long is closed.
const PING_INTERVAL: Duration = Duration::from_secs(15);
const PING_LIMIT: Duration = Duration::from_secs(40);
/// What rustls says of a certificate that it does not accept, and of a system that names no authorities at all.
const UNTRUSTED: [&str; 2] = ["invalid peer certificate", "No CA certificates were loaded"];
/// The watchdog looks this often within the time that a stall may last, and at least and at most so often.
const WATCH_LOOKS: u64 = 5;
const WATCH_BOUNDS_MS: (u64, u64) = (50, 6_000);

pub(super) type Api = OnlineClient<SubstrateConfig>;

/// How long things may take, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// To open a connection to one endpoint and check its genesis.
    pub connect_ms: u64,
    /// For one question, which may take several messages.
    pub call_ms: u64,
    /// From sending an extrinsic to its finalized block. Finality on finney takes some 20 to 60 s.
    pub finality_ms: u64,
    /// Without a new finalized block for so long, the connection is replaced and the stall reported.
    pub stall_ms: u64,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self { connect_ms: 10_000, call_ms: 20_000, finality_ms: 180_000, stall_ms: 120_000 }
    }
}

impl Deadlines {
    /// With another patience for blocks; an answer that takes longer than a block may is not waited for either.
    pub fn stalled_after(self, stall_ms: u64) -> Self {
        Self { stall_ms, connect_ms: self.connect_ms.min(stall_ms), call_ms: self.call_ms.min(stall_ms), ..self }
    }
}

/// A live connection.
pub(super) struct Link {
    pub(super) endpoint: String,
    pub(super) api: Api,
    /// For the few questions that subxt would answer by way of a block's state, which nodes forget.
    pub(super) rpc: subxt::rpcs::RpcClient,
    /// The newest finalized block, ready to be read: several questions about one block need its header and versions once.
    head: StdMutex<Option<AtBlock>>,
}

impl Link {
    /// The newest finalized block. A runtime upgrade is noticed here: each block is read by the metadata of its own runtime.
    pub(super) async fn at_head(&self) -> Result<AtBlock, subxt::Error> {
        let hash: H256 = self.rpc.request("chain_getFinalizedHead", rpc_params![]).await?;
        let known = lock(&self.head).clone().filter(|at| at.block_hash() == hash);
        if let Some(at) = known {
            return Ok(at);
        }
        let at = self.api.at_block(hash).await?;
        *lock(&self.head) = Some(at.clone());
        Ok(at)
    }
}

/// Why no connection came about. The websocket client hands failures of TLS on as text only.
fn connect_error(endpoint: &str, reason: String) -> ChainError {
    let endpoint = endpoint.to_owned();
    match UNTRUSTED.iter().find_map(|sign| reason.find(sign)) {
        Some(at) => ChainError::Untrusted { endpoint, reason: reason[at..].to_owned() },
        None => ChainError::Unavailable { endpoint, reason },
    }
}

fn lock<T>(mutex: &StdMutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct Connections {
    endpoints: Vec<String>,
    expected_genesis: Option<[u8; 32]>,
    pub(super) deadlines: Deadlines,
    /// Keeps the metadata of each runtime version across connections.
    config: SubstrateConfig,
    state: Mutex<State>,
    watch: StdMutex<Watch>,
}

struct State {
    link: Option<Arc<Link>>,
    /// Index of the endpoint to try first when there is no link.
    next: usize,
}

/// What the watchdog knows.
struct Watch {
    health: ChainHealth,
    /// When the newest block was first seen, and since when the connection in use has had its chance to bring another.
    block_at: Instant,
    patience_from: Instant,
}

impl Connections {
    /// Connects to the first endpoint that answers; gives the connections and the genesis of the network.
    pub(super) async fn open(
        endpoints: Vec<String>,
        expected_genesis: Option<[u8; 32]>,
        deadlines: Deadlines,
    ) -> Result<(Self, [u8; 32]), ChainError> {
        if endpoints.is_empty() {
            return Err(ChainError::Settings {
                reason: "no chain endpoint is named".to_owned(),
                hint: "set QUASAR_CHAIN_ENDPOINTS, or choose a network that has endpoints",
            });
        }
        for endpoint in &endpoints {
            if !endpoint.starts_with("wss://") && !endpoint.starts_with("ws://") {
                return Err(ChainError::Settings {
                    reason: format!("`{endpoint}` is not a websocket address"),
                    hint: "endpoints look like wss://host:443, or ws://127.0.0.1:9944 for a local node",
                });
            }
        }
        let now = Instant::now();
        let health = ChainHealth {
            endpoint: endpoints[0].clone(),
            is_answering: false,
            block: None,
            block_age_ms: 0,
            is_stalled: false,
            has_moved: false,
            is_silent: false,
            spec_version: 0,
            reconnections: 0,
            trouble: String::new(),
        };
        let mut connections = Self {
            endpoints,
            expected_genesis,
            deadlines,
            config: SubstrateConfig::new(),
            state: Mutex::new(State { link: None, next: 0 }),
            watch: StdMutex::new(Watch { health, block_at: now, patience_from: now }),
        };
        let link = connections.link().await?;
        let genesis = link.api.genesis_hash().0;
        // From here on every endpoint must serve the network that the first one serves.
        connections.expected_genesis = Some(genesis);
        lock(&connections.watch).health.reconnections = 0;
        Ok((connections, genesis))
    }

    pub(super) fn endpoint_count(&self) -> usize {
        self.endpoints.len()
    }

    /// The current connection, or a new one to the next endpoint that answers and serves the right network.
    pub(super) async fn link(&self) -> Result<Arc<Link>, ChainError> {
        let mut state = self.state.lock().await;
        if let Some(link) = &state.link {
            return Ok(link.clone());
        }
        let mut failure: Option<ChainError> = None;
        for offset in 0..self.endpoints.len() {
            let index = (state.next + offset) % self.endpoints.len();
            match self.connect(&self.endpoints[index]).await {
                Ok(link) => {
                    let link = Arc::new(link);
                    state.link = Some(link.clone());
                    state.next = index;
                    let mut watch = lock(&self.watch);
                    watch.health.endpoint = link.endpoint.clone();
                    watch.health.reconnections += 1;
                    watch.patience_from = Instant::now();
                    return Ok(link);
                }
                Err(error) => {
                    tracing::debug!(endpoint = %self.endpoints[index], %error, "chain endpoint not usable");
                    // A wrong network is a mistake in the settings and worth more to the reader than a dead endpoint.
                    if !matches!(failure, Some(ChainError::WrongGenesis { .. })) {
                        failure = Some(error);
                    }
                }
            }
        }
        let failure = failure.unwrap_or_else(|| ChainError::Unavailable { endpoint: String::new(), reason: "no endpoint".to_owned() });
        self.note_failure(&failure);
        Err(failure)
    }

    async fn connect(&self, endpoint: &str) -> Result<Link, ChainError> {
        let limit = Duration::from_millis(self.deadlines.connect_ms);
        let opening = async {
            let socket = WsClientBuilder::new()
                // Its own limits come after ours, which know what was asked.
                .request_timeout(Duration::from_millis(self.deadlines.call_ms) * 2)
                .connection_timeout(limit * 2)
                .max_response_size(ANSWER_MAX_BYTES)
                .enable_ws_ping(PingConfig::new().ping_interval(PING_INTERVAL).inactive_limit(PING_LIMIT))
                .build(endpoint)
                .await
                .map_err(|error| connect_error(endpoint, error.to_string()))?;
            let rpc = subxt::rpcs::RpcClient::new(socket);
            // The legacy methods: the combined backend hides why the pool refused an extrinsic.
            let backend = LegacyBackend::<SubstrateConfig>::builder().build(rpc.clone());
            // Asks for the genesis, and for nothing else.
            let api = Api::from_backend_with_config(self.config.clone(), Arc::new(backend)).await;
            Ok::<_, ChainError>((api.map_err(|error| connect_error(endpoint, error.to_string()))?, rpc))
        };
        let (api, rpc) = timeout(limit, opening).await.map_err(|_| ChainError::Timeout {
            endpoint: endpoint.to_owned(),
            call: "connect",
            millis: self.deadlines.connect_ms,
        })??;
        let found = api.genesis_hash().0;
        match self.expected_genesis {
            Some(expected) if expected != found => Err(ChainError::WrongGenesis { endpoint: endpoint.to_owned(), expected, found }),
            _ => Ok(Link { endpoint: endpoint.to_owned(), api, rpc, head: StdMutex::new(None) }),
        }
    }

    /// Drops a connection that did not answer, so that the next call tries the next endpoint.
    pub(super) async fn abandon(&self, link: &Arc<Link>) {
        let mut state = self.state.lock().await;
        if state.link.as_ref().is_some_and(|current| Arc::ptr_eq(current, link)) {
            state.link = None;
            state.next = (state.next + 1) % self.endpoints.len();
        }
    }

    /// Asks one question within its deadline. A dead connection is replaced and the question asked again, over each endpoint in
    /// turn, the first one twice.
    pub(super) async fn ask<T, F, Fut>(&self, call: &'static str, question: F) -> Result<T, ChainError>
    where
        F: Fn(Arc<Link>) -> Fut,
        Fut: Future<Output = Result<T, subxt::Error>>,
    {
        let mut pause_ms = RECONNECT_FIRST_MS;
        let mut attempts = self.endpoints.len() + 1;
        loop {
            attempts -= 1;
            let error = match self.link().await {
                Err(error) => error,
                Ok(link) => {
                    let error = match timeout(Duration::from_millis(self.deadlines.call_ms), question(link.clone())).await {
                        Ok(Ok(answer)) => {
                            self.note_answer();
                            return Ok(answer);
                        }
                        Ok(Err(error)) => chain_error(call, &link.endpoint, error),
                        Err(_) => ChainError::Timeout { endpoint: link.endpoint.clone(), call, millis: self.deadlines.call_ms },
                    };
                    if error.is_retryable() {
                        self.note_failure(&error);
                        self.abandon(&link).await;
                    }
                    error
                }
            };
            if !error.is_retryable() || attempts == 0 {
                return Err(error);
            }
            tracing::debug!(call, %error, "asking the chain again over a new connection");
            sleep(Duration::from_millis(pause_ms)).await;
            pause_ms = (pause_ms * 2).min(RECONNECT_LONGEST_MS);
        }
    }

    fn note_answer(&self) {
        let mut watch = lock(&self.watch);
        watch.health.is_answering = true;
        if !watch.health.is_stalled {
            watch.health.trouble.clear();
        }
    }

    fn note_failure(&self, error: &ChainError) {
        let mut watch = lock(&self.watch);
        watch.health.is_answering = false;
        watch.health.is_silent = matches!(error, ChainError::Timeout { .. });
        watch.health.trouble = error.to_string().lines().next().unwrap_or_default().to_owned();
    }

    /// A finalized block was seen.
    pub(super) fn note_block(&self, at: &AtBlock) {
        let (block, spec_version) = (block_ref(at), at.spec_version());
        let mut watch = lock(&self.watch);
        if watch.health.spec_version != spec_version {
            if watch.health.spec_version != 0 {
                tracing::info!(from = watch.health.spec_version, to = spec_version, %block, "the chain's runtime was upgraded");
            }
            watch.health.spec_version = spec_version;
        }
        // A lagging endpoint's blocks are no progress.
        if watch.health.block.is_none_or(|known| known.number < block.number) {
            if watch.health.is_stalled {
                tracing::info!(%block, "blocks arrive again");
                watch.health.is_stalled = false;
                watch.health.trouble.clear();
            }
            watch.health.has_moved |= watch.health.block.is_some();
            watch.health.block = Some(block);
            watch.block_at = Instant::now();
            watch.patience_from = watch.block_at;
        }
    }

    pub(super) fn health(&self) -> ChainHealth {
        let watch = lock(&self.watch);
        ChainHealth { block_age_ms: watch.block_at.elapsed().as_millis() as u64, ..watch.health.clone() }
    }

    /// One look of the watchdog: asks for the newest block, and replaces the connection if none has come for too long.
    async fn look_for_block(&self) {
        let seen = self.ask("head", |link| async move { link.at_head().await }).await;
        if let Ok(at) = seen {
            self.note_block(&at);
        }
        let is_late = lock(&self.watch).patience_from.elapsed() >= Duration::from_millis(self.deadlines.stall_ms);
        if !is_late {
            return;
        }
        let link = self.state.lock().await.link.clone();
        if let Some(link) = link {
            self.abandon(&link).await;
        }
        let mut watch = lock(&self.watch);
        watch.patience_from = Instant::now();
        // Reported once every endpoint has had its chance.
        let age = watch.block_at.elapsed();
        if age >= Duration::from_millis(self.deadlines.stall_ms) * self.endpoints.len() as u32 && !watch.health.is_stalled {
            watch.health.is_stalled = true;
            let seconds = age.as_secs();
            if watch.health.is_answering {
                watch.health.trouble = format!("no new block for {seconds} s");
                tracing::warn!(endpoint = %watch.health.endpoint, seconds, "the chain answers, but no new block arrives");
            } else {
                tracing::warn!(endpoint = %watch.health.endpoint, seconds, trouble = watch.health.trouble, "no new block arrives");
            }
        }
    }
}

/// Watches for blocks as long as the connections are in use.
pub(super) async fn watch(connections: Weak<Connections>) {
    loop {
        let Some(interval_ms) = connections
            .upgrade()
            .map(|connections| (connections.deadlines.stall_ms / WATCH_LOOKS).clamp(WATCH_BOUNDS_MS.0, WATCH_BOUNDS_MS.1))
        else {
            return;
        };
        sleep(Duration::from_millis(interval_ms)).await;
        let Some(connections) = connections.upgrade() else { return };
        connections.look_for_block().await;
    }
}
