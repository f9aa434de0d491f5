//! A subtensor node for development networks and tests: a JSON-RPC server on the loopback interface over the genuine metadata of spec
//! 461.
//!
//! It verifies real signatures, nonces and eras, applies the chain's weight rules in their order, stores SCALE keys and values as
//! a node does, emits genuine events and answers with genuine errors, so that a client takes the same path here as on a public
//! network. Timelocked rows are opened in their epoch with the signature of their beacon's round. It has one subnet, no consensus
//! among authors, no rewards, and takes no registrations: who is a neuron, with which stake and permit, is fixed when it starts
//! or changed by hand ([`Change`]). Nothing survives its end.
//!
//! For tests it fails on demand as nodes and networks do: closed, silent and slow sockets, an endpoint that suddenly serves another
//! chain, blocks that do not come, finality that lags, forks, and upgrades of the runtime.
//!
//! Block hashes cannot be foretold (each block carries a randomised signature), so they serve as a beacon.

mod api;
mod change;
mod dispatch;
mod extrinsic;
mod gate;
#[cfg(test)]
mod golden;
mod ledger;
mod pulses;
mod rpc;
mod runtime;
mod state;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonrpsee::server::{Server, ServerConfig, ServerHandle};
use protocol::AccountId;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::types::BlockRef;
pub use change::Change;
use gate::Gate;
use ledger::Ledger;
pub use pulses::DevBeacon;
use runtime::Runtime;

/// Subnets above this number would collide with the storage indices of mechanisms.
const NETUID_MAX: u16 = 4095;
/// Most neurons; genuine subnets have at most 256.
const NEURONS_MAX: usize = 4096;
const CONNECTIONS_MAX: u32 = 256;

/// The chain to run: one subnet and who is on it.
#[derive(Clone, Debug)]
pub struct DevChain {
    pub netuid: u16,
    /// Milliseconds between blocks; 0 = only when [`DevNode::produce`] is called.
    pub block_ms: u64,
    /// Blocks of one epoch.
    pub tempo: u16,
    /// Blocks between two rows of the same neuron.
    pub weights_rate_limit: u64,
    pub min_allowed_weights: u16,
    /// The neurons, by uid.
    pub neurons: Vec<DevNeuron>,
    /// A loopback address; port 0 takes a free one.
    pub listen: SocketAddr,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevNeuron {
    pub hotkey: AccountId,
    pub coldkey: AccountId,
    /// In rao.
    pub stake: u64,
    pub validator_permit: bool,
}

/// Less common settings; the default is what a development network wants.
#[derive(Clone, Debug, Default)]
pub struct DevOptions {
    /// Blocks by which finality trails the newest block.
    pub finality_lag: u64,
    /// The subnet owner's hotkey, exempt from stake threshold and permit.
    pub owner_hotkey: Option<AccountId>,
    pub weights_version: u64,
    pub commit_reveal: bool,
    /// In rao.
    pub stake_threshold: u64,
    /// How many mechanisms the subnet has; 0 and 1 are the same.
    pub mechanisms: u8,
    /// Blocks carry this time instead of the system's.
    pub clock: Option<VirtualClock>,
    /// What opens timelocked rows.
    pub beacon: DevBeacon,
}

/// The time of block n is `start_ms` + n · `block_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtualClock {
    pub start_ms: u64,
    pub block_ms: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum DevNodeError {
    #[error(
        "the development chain's settings are wrong: {0}\nhint: netuid 1 to {NETUID_MAX}, at most {NEURONS_MAX} neurons, each hotkey once"
    )]
    Settings(String),
    #[error("the development chain cannot listen on {address}: {source}\nhint: choose another port, or port 0 for a free one")]
    Listen { address: SocketAddr, source: io::Error },
}

/// The running node; dropping it stops it.
pub struct DevNode {
    node: Arc<Node>,
    gate: Gate,
    server: ServerHandle,
    producer: Option<JoinHandle<()>>,
}

/// What the server's methods share.
struct Node {
    ledger: Mutex<Ledger>,
    /// Counts changes of ledger or pool.
    changed: watch::Sender<u64>,
    stalled: AtomicBool,
    /// Runtime APIs that were asked.
    runtime_calls: AtomicU64,
}

impl Node {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // A panic while the lock was held leaves the ledger as of the last complete block.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn produce(&self) -> BlockRef {
        let block = self.ledger().produce(now_ms());
        self.changed.send_modify(|count| *count += 1);
        block
    }
}

impl DevNode {
    pub async fn start(chain: DevChain) -> Result<Self, DevNodeError> {
        Self::start_with(chain, DevOptions::default()).await
    }

    pub async fn start_with(chain: DevChain, options: DevOptions) -> Result<Self, DevNodeError> {
        check(&chain)?;
        let block_ms = options.clock.map(|clock| clock.block_ms).or((chain.block_ms > 0).then_some(chain.block_ms));
        let runtime = Arc::new(Runtime::load(block_ms));
        let ledger = Ledger::new(runtime, &chain, &options, now_ms());
        let node = Arc::new(Node {
            ledger: Mutex::new(ledger),
            changed: watch::Sender::new(0),
            stalled: AtomicBool::new(false),
            runtime_calls: AtomicU64::new(0),
        });
        let (address, server) = serve(&node).await?;
        let listen = chain.listen;
        let gate = Gate::open(listen, address).await.map_err(|source| DevNodeError::Listen { address: listen, source })?;
        let producer = (chain.block_ms > 0).then(|| tokio::spawn(produce_blocks(node.clone(), chain.block_ms)));
        Ok(Self { node, gate, server, producer })
    }

    /// `ws://127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        format!("ws://{}", self.gate.address)
    }

    pub fn genesis(&self) -> [u8; 32] {
        self.node.ledger().genesis()
    }

    /// The newest block, finalized or not.
    pub fn best(&self) -> BlockRef {
        let ledger = self.node.ledger();
        BlockRef { number: ledger.best().header.number, hash: ledger.best().hash }
    }

    /// Makes one block now.
    pub fn produce(&self) -> BlockRef {
        self.node.produce()
    }

    /// Stops or resumes the production of blocks by time, as a stalled chain does. Calls are answered all the while.
    pub fn stall(&self, stalled: bool) {
        self.node.stalled.store(stalled, Ordering::Relaxed);
    }

    /// Closes all connections; new ones are taken at once, as by a node that restarts.
    pub fn drop_connections(&self) {
        self.gate.sever();
    }

    /// Lets no byte pass in either direction, and closes nothing: what half-dead connections look like.
    pub fn silence(&self, is_silent: bool) {
        self.gate.silence(is_silent);
    }

    /// Holds every piece of data back for so long.
    pub fn slow_down(&self, delay_ms: u64) {
        self.gate.delay(delay_ms);
    }

    /// This endpoint serves `other`'s chain from now on.
    pub fn impersonate(&self, other: &DevNode) {
        self.gate.redirect(other.gate.target());
    }

    /// Changes the chain's state in the next block.
    pub fn change(&self, change: Change) {
        self.node.ledger().change(change);
    }

    /// Leaves the newest `depth` blocks for a longer fork. Extrinsics of the left blocks go back into the pool, or are lost with all that
    /// waits there. Gives false, and does nothing, where a finalized block would be left.
    pub fn reorganise(&self, depth: u64, loses_pool: bool) -> bool {
        let done = self.node.ledger().reorganise(depth, loses_pool, now_ms());
        self.node.changed.send_modify(|count| *count += 1);
        done
    }

    /// The row that the newest block's state holds for `uid`, final or not.
    pub fn weights(&self, mechanism: u8, uid: u16) -> Vec<(u16, u16)> {
        let ledger = self.node.ledger();
        ledger.weights(mechanism, uid)
    }

    /// The block of the last weights or commit of `uid`, by the newest block's state; 0 = never.
    pub fn last_update(&self, mechanism: u8, uid: u16) -> u64 {
        self.node.ledger().last_update(mechanism, uid)
    }

    /// How many questions to runtime APIs were answered since the start.
    pub fn runtime_calls(&self) -> u64 {
        self.node.runtime_calls.load(Ordering::Relaxed)
    }

    /// The version of the newest block's runtime.
    pub fn spec_version(&self) -> u32 {
        self.node.ledger().runtime().spec_version
    }
}

impl Drop for DevNode {
    fn drop(&mut self) {
        if let Some(producer) = &self.producer {
            producer.abort();
        }
        let _ = self.server.stop();
    }
}

fn check(chain: &DevChain) -> Result<(), DevNodeError> {
    let wrong = |reason: String| Err(DevNodeError::Settings(reason));
    if chain.netuid == 0 || chain.netuid > NETUID_MAX {
        return wrong(format!("netuid {}", chain.netuid));
    }
    if chain.neurons.len() > NEURONS_MAX {
        return wrong(format!("{} neurons", chain.neurons.len()));
    }
    if !chain.listen.ip().is_loopback() {
        return wrong(format!("{} is no loopback address", chain.listen.ip()));
    }
    let mut hotkeys: Vec<AccountId> = chain.neurons.iter().map(|neuron| neuron.hotkey).collect();
    hotkeys.sort_unstable();
    match hotkeys.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => wrong(format!("hotkey {} appears twice", pair[0])),
        None => Ok(()),
    }
}

/// The server itself listens on a port of its own, behind the gate.
async fn serve(node: &Arc<Node>) -> Result<(SocketAddr, ServerHandle), DevNodeError> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let fail = |source| DevNodeError::Listen { address, source };
    let config = ServerConfig::builder().max_connections(CONNECTIONS_MAX).build();
    let server = Server::builder().set_config(config).build(address).await.map_err(fail)?;
    let bound = server.local_addr().map_err(fail)?;
    Ok((bound, server.start(rpc::module(node.clone()))))
}

async fn produce_blocks(node: Arc<Node>, block_ms: u64) {
    let mut ticks = tokio::time::interval(Duration::from_millis(block_ms));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        if !node.stalled.load(Ordering::Relaxed) {
            node.produce();
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the node is an edge of its own: its blocks carry the time, nothing else uses it")]
fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as u64)
}
