//! Connections to one of several endpoints: connect, check the genesis, give up on an endpoint that does not answer.
//!
//! Each connection reconnects by itself when its socket closes. A socket that stays open but says nothing is caught by the
//! deadline on every call: the connection is dropped and the next endpoint is tried.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use subxt::OnlineClient;
use subxt::backend::LegacyBackend;
use subxt::config::substrate::SubstrateConfig;
use subxt::error::{ExtrinsicError, OnlineClientAtBlockError, RuntimeApiError, StorageError};
use subxt::rpcs::client::reconnecting_rpc_client::{ExponentialBackoff, RpcClient};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::error::ChainError;

/// First and longest pause between attempts to reopen a closed socket.
const RECONNECT_FIRST_MS: u64 = 50;
const RECONNECT_LONGEST: Duration = Duration::from_secs(5);
/// Largest answer of a node; metadata in hexadecimal is about 0.8 MB, the metagraph of a full subnet less.
const ANSWER_MAX_BYTES: u32 = 32 * 1024 * 1024;

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
}

impl Default for Deadlines {
    fn default() -> Self {
        Self { connect_ms: 10_000, call_ms: 20_000, finality_ms: 180_000 }
    }
}

/// A live connection.
pub(super) struct Link {
    pub(super) endpoint: String,
    pub(super) api: Api,
    /// For the few questions that subxt would answer by way of a block's state, which nodes forget.
    pub(super) rpc: subxt::rpcs::RpcClient,
}

pub(super) struct Connections {
    endpoints: Vec<String>,
    expected_genesis: Option<[u8; 32]>,
    pub(super) deadlines: Deadlines,
    state: Mutex<State>,
}

struct State {
    link: Option<Arc<Link>>,
    /// Index of the endpoint to try first when there is no link.
    next: usize,
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
        let mut connections = Self { endpoints, expected_genesis, deadlines, state: Mutex::new(State { link: None, next: 0 }) };
        let link = connections.link().await?;
        let genesis = link.api.genesis_hash().0;
        // From here on every endpoint must serve the network that the first one serves.
        connections.expected_genesis = Some(genesis);
        Ok((connections, genesis))
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
        Err(failure.unwrap_or_else(|| ChainError::Unavailable { endpoint: String::new(), reason: "no endpoint".to_owned() }))
    }

    async fn connect(&self, endpoint: &str) -> Result<Link, ChainError> {
        let unavailable = |reason: String| ChainError::Unavailable { endpoint: endpoint.to_owned(), reason };
        let limit = Duration::from_millis(self.deadlines.connect_ms);
        let opening = async {
            let rpc = RpcClient::builder()
                .retry_policy(ExponentialBackoff::from_millis(RECONNECT_FIRST_MS).max_delay(RECONNECT_LONGEST))
                .request_timeout(Duration::from_millis(self.deadlines.call_ms))
                .connection_timeout(limit)
                .max_response_size(ANSWER_MAX_BYTES)
                .build(endpoint)
                .await
                .map_err(|error| unavailable(error.to_string()))?;
            // The legacy methods: the combined backend hides why the pool refused an extrinsic.
            let rpc = subxt::rpcs::RpcClient::new(rpc);
            let backend = LegacyBackend::<SubstrateConfig>::builder().build(rpc.clone());
            let api = Api::from_backend(Arc::new(backend)).await.map_err(|error| unavailable(error.to_string()))?;
            Ok::<_, ChainError>((api, rpc))
        };
        let (api, rpc) = timeout(limit, opening).await.map_err(|_| ChainError::Timeout {
            endpoint: endpoint.to_owned(),
            call: "connect",
            millis: self.deadlines.connect_ms,
        })??;
        let found = api.genesis_hash().0;
        match self.expected_genesis {
            Some(expected) if expected != found => Err(ChainError::WrongGenesis { endpoint: endpoint.to_owned(), expected, found }),
            _ => Ok(Link { endpoint: endpoint.to_owned(), api, rpc }),
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

    /// Asks one question within its deadline. A dead connection is replaced and the question asked again, once for each
    /// endpoint (and twice where there is only one).
    pub(super) async fn ask<T, F, Fut>(&self, call: &'static str, question: F) -> Result<T, ChainError>
    where
        F: Fn(Arc<Link>) -> Fut,
        Fut: Future<Output = Result<T, subxt::Error>>,
    {
        let mut attempts = self.endpoints.len().max(2);
        loop {
            attempts -= 1;
            let link = self.link().await?;
            let error = match timeout(Duration::from_millis(self.deadlines.call_ms), question(link.clone())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => chain_error(call, &link.endpoint, error),
                Err(_) => ChainError::Timeout { endpoint: link.endpoint.clone(), call, millis: self.deadlines.call_ms },
            };
            if !error.is_retryable() {
                return Err(error);
            }
            self.abandon(&link).await;
            if attempts == 0 {
                return Err(error);
            }
            tracing::debug!(endpoint = %link.endpoint, %error, "asking again over a new connection");
        }
    }
}

/// Whether an error came from the transport (try again) or from an answer that this build does not understand.
pub(super) fn chain_error(call: &'static str, endpoint: &str, error: subxt::Error) -> ChainError {
    use subxt::Error as E;
    let transport = match &error {
        E::BackendError(_) | E::OtherRpcClientError(_) | E::OnlineClientError(_) => true,
        E::TransactionProgressError(_) | E::TransactionStatusError(_) => true,
        E::OnlineClientAtBlockError(error) => matches!(
            error,
            OnlineClientAtBlockError::CannotGetCurrentBlock { .. }
                | OnlineClientAtBlockError::CannotGetBlockHeader { .. }
                | OnlineClientAtBlockError::BlockHeaderNotFound { .. }
                | OnlineClientAtBlockError::CannotGetBlockHash { .. }
                | OnlineClientAtBlockError::BlockNotFound { .. }
                | OnlineClientAtBlockError::CannotGetSpecVersion { .. }
                | OnlineClientAtBlockError::CannotGetMetadata { .. }
        ),
        E::StorageError(error) => matches!(error, StorageError::CannotFetchValue(_)),
        E::RuntimeApiError(error) => matches!(error, RuntimeApiError::CannotCallApi(_)),
        E::ExtrinsicError(error) => matches!(
            error,
            ExtrinsicError::AccountNonceError { .. }
                | ExtrinsicError::CannotGetValidationInfo(_)
                | ExtrinsicError::ErrorSubmittingTransaction(_)
                | ExtrinsicError::TransactionStatusError(_)
                | ExtrinsicError::TransactionStatusStreamError(_)
                | ExtrinsicError::UnexpectedEndOfTransactionStatusStream
        ),
        _ => false,
    };
    let reason = error.to_string();
    if transport { ChainError::Unavailable { endpoint: endpoint.to_owned(), reason } } else { ChainError::Answer { call, reason } }
}
