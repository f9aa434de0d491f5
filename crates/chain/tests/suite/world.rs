//! A subnet for tests: who is on it, and both chains that hold it.

use std::net::{Ipv4Addr, SocketAddr};

use chain::devnode::{DevChain, DevNeuron, DevNode, DevOptions};
use chain::{
    BlockRef, Chain, ConnectSettings, Deadlines, Hotkey, How, Hyperparameters, MemoryChain, MemorySettings, Neuron, SetWeightsError,
    SubtensorClient, WeightsRequest,
};
use protocol::{AccountId, KeyKind};

pub const NETUID: u16 = 24;
pub const RATE_LIMIT: u64 = 100;

/// Short, so that a test that waits for a deadline is quick; long enough for a busy machine.
pub fn deadlines() -> Deadlines {
    Deadlines { connect_ms: 5_000, call_ms: 5_000, finality_ms: 20_000, ..Deadlines::default() }
}

/// Two validators with permits (Ed25519, Sr25519), two miners, and a stranger who is not registered.
pub fn hotkey(uid: u8) -> Hotkey {
    let kind = if uid.is_multiple_of(2) { KeyKind::Ed25519 } else { KeyKind::Sr25519 };
    Hotkey::from_seed(kind, &[uid + 1; 32])
}

pub const STRANGER: u8 = 77;

pub fn neurons() -> Vec<DevNeuron> {
    (0..4)
        .map(|uid| DevNeuron {
            hotkey: hotkey(uid).account(),
            coldkey: AccountId([100 + uid; 32]),
            stake: 1_000_000_000 * u64::from(uid + 1),
            validator_permit: uid < 2,
        })
        .collect()
}

pub fn hyperparameters(options: &DevOptions) -> Hyperparameters {
    Hyperparameters {
        tempo: 30,
        weights_rate_limit: RATE_LIMIT,
        min_allowed_weights: 2,
        max_weight_limit: u16::MAX,
        weights_version: options.weights_version,
        commit_reveal: options.commit_reveal,
        stake_threshold: options.stake_threshold,
    }
}

pub fn dev_chain(block_ms: u64) -> DevChain {
    let parameters = hyperparameters(&DevOptions::default());
    DevChain {
        netuid: NETUID,
        block_ms,
        tempo: parameters.tempo,
        weights_rate_limit: parameters.weights_rate_limit,
        min_allowed_weights: parameters.min_allowed_weights,
        neurons: neurons(),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
    }
}

pub fn memory_chain(options: &DevOptions) -> MemoryChain {
    let neurons = (0u16..)
        .zip(neurons())
        .map(|(uid, neuron)| Neuron {
            uid,
            hotkey: neuron.hotkey,
            coldkey: neuron.coldkey,
            stake: neuron.stake,
            validator_permit: neuron.validator_permit,
            last_update: 0,
        })
        .collect();
    MemoryChain::new(MemorySettings {
        netuid: NETUID,
        seed: 7,
        hyperparameters: hyperparameters(options),
        neurons,
        owner_hotkey: options.owner_hotkey,
    })
}

pub async fn connect(node: &DevNode) -> SubtensorClient {
    let settings = ConnectSettings { endpoints: vec![node.endpoint()], genesis: Some(node.genesis()) };
    SubtensorClient::connect_within(settings, deadlines()).await.expect("the node answers")
}

/// Sends a row of the hotkey in the open, without asking first whether the chain would take it.
pub async fn set_row(chain: &impl Chain, who: u8, row: &[(u16, u16)], version_key: u64) -> Result<BlockRef, SetWeightsError> {
    let request = WeightsRequest { netuid: NETUID, mechanism: 0, row: row.to_vec(), version_key, how: How::Plain };
    Ok(chain.send_weights(&hotkey(who), &request, &|_| {}).await?.block)
}

/// Numbers for the book: `--success-output final` shows them.
#[expect(clippy::disallowed_macros, reason = "what was measured is read from the test's output")]
pub fn measured(what: &str) {
    eprintln!("MEASURED: {what}");
}
