//! Runtime APIs (`state_call`) that the development node answers, in the encoding of its metadata.

use parity_scale_codec::{Compact, Decode, Encode};
use protocol::AccountId;

use super::ledger::{Content, Ledger};
use super::runtime::SUBTENSOR;
use super::state::State;
use crate::types::{Hyperparameters, Neuron};

/// Answers a runtime API call at a block; the error is a sentence for the caller.
pub(super) fn call(ledger: &Ledger, method: &str, mut input: &[u8], content: &Content) -> Result<Vec<u8>, String> {
    let state = &content.state;
    let runtime = state.runtime();
    let bad_input = |error| format!("{method}: {error}");
    match method {
        "Core_version" => Ok(runtime.version.clone()),
        "Metadata_metadata_versions" => Ok(vec![runtime.offered_version()].encode()),
        "Metadata_metadata_at_version" => {
            let version = u32::decode(&mut input).map_err(bad_input)?;
            Ok((version == runtime.offered_version()).then_some(runtime.offered()).encode())
        }
        "AccountNonceApi_account_nonce" => {
            let account = <[u8; 32]>::decode(&mut input).map_err(bad_input)?;
            Ok(state.nonce(&AccountId(account)).encode())
        }
        "TaggedTransactionQueue_validate_transaction" => {
            // Source, extrinsic (which carries its own length), hash of the block to validate at.
            let extrinsic = input.get(1..input.len().saturating_sub(32)).unwrap_or_default();
            Ok(match ledger.validate(extrinsic) {
                Ok(signed) => valid_transaction(&signed.signer, signed.nonce),
                Err(invalid) => invalid.encode(),
            })
        }
        "NeuronInfoRuntimeApi_get_neurons_lite" => {
            let netuid = u16::decode(&mut input).map_err(bad_input)?;
            Ok(state.neurons(netuid).iter().map(|neuron| NeuronLite::of(netuid, neuron)).collect::<Vec<_>>().encode())
        }
        "SubnetInfoRuntimeApi_get_subnet_hyperparams" => {
            let netuid = u16::decode(&mut input).map_err(bad_input)?;
            Ok(state.hyperparameters(netuid).map(|parameters| SubnetHyperparams::of(state, netuid, &parameters)).encode())
        }
        "SubnetInfoRuntimeApi_get_next_epoch_start_block" => {
            let netuid = u16::decode(&mut input).map_err(bad_input)?;
            Ok(next_epoch(state, netuid).encode())
        }
        "SubnetInfoRuntimeApi_get_subnet_hyperparams_v3" => {
            let netuid = u16::decode(&mut input).map_err(bad_input)?;
            Ok(state.hyperparameters(netuid).map(|parameters| hyperparameter_list(state, netuid, &parameters)).encode())
        }
        other => Err(format!("the development node does not answer the runtime API {other}")),
    }
}

/// SCALE of `Ok(ValidTransaction)`: priority, requires, provides, longevity, propagate.
fn valid_transaction(signer: &AccountId, nonce: u64) -> Vec<u8> {
    const LONGEVITY: u64 = 64;
    let requires: Vec<Vec<u8>> = Vec::new();
    let provides = vec![(signer.0, nonce).encode()];
    let mut bytes = vec![0];
    (0u64, requires, provides, LONGEVITY, true).encode_to(&mut bytes);
    bytes
}

/// First block of the next epoch; `None` where the subnet does not exist or has no epochs.
fn next_epoch(state: &State, netuid: u16) -> Option<u64> {
    let head: u32 = state.value(super::runtime::SYSTEM, "Number", ());
    state.subnet_exists(netuid).then(|| state.epoch(netuid).next_epoch_block(u64::from(head))).flatten()
}

/// A value of the list of hyperparameters, tagged with its type.
#[derive(Encode)]
enum Tagged {
    #[codec(index = 0)]
    Bool(bool),
    #[codec(index = 1)]
    U16(Compact<u16>),
    #[codec(index = 3)]
    U64(Compact<u64>),
}

/// The third version of the answer: a list of names and tagged values. It holds what the node keeps.
fn hyperparameter_list(state: &State, netuid: u16, parameters: &Hyperparameters) -> Vec<(Vec<u8>, Tagged)> {
    let period: u64 = state.value(SUBTENSOR, "RevealPeriodEpochs", (netuid,));
    let short = |name: &str, value: u16| (name.as_bytes().to_vec(), Tagged::U16(Compact(value)));
    let long = |name: &str, value: u64| (name.as_bytes().to_vec(), Tagged::U64(Compact(value)));
    vec![
        short("min_allowed_weights", parameters.min_allowed_weights),
        short("max_weights_limit", parameters.max_weight_limit),
        short("tempo", parameters.tempo),
        long("weights_version", parameters.weights_version),
        long("weights_rate_limit", parameters.weights_rate_limit),
        long("commit_reveal_period", period),
        (b"commit_reveal_weights_enabled".to_vec(), Tagged::Bool(parameters.commit_reveal)),
    ]
}

/// `NeuronInfoLite`. The node computes no rewards: ranks, trust and emission are zero.
#[derive(Encode)]
pub(super) struct NeuronLite {
    hotkey: [u8; 32],
    coldkey: [u8; 32],
    uid: Compact<u16>,
    netuid: Compact<u16>,
    active: bool,
    axon: Axon,
    prometheus: Prometheus,
    stake: Vec<([u8; 32], Compact<u64>)>,
    rank: Compact<u16>,
    emission: Compact<u64>,
    incentive: Compact<u16>,
    consensus: Compact<u16>,
    trust: Compact<u16>,
    validator_trust: Compact<u16>,
    dividends: Compact<u16>,
    last_update: Compact<u64>,
    validator_permit: bool,
    pruning_score: Compact<u16>,
}

#[derive(Encode, Default)]
struct Axon {
    block: u64,
    version: u32,
    ip: u128,
    port: u16,
    ip_type: u8,
    protocol: u8,
    placeholder1: u8,
    placeholder2: u8,
}

#[derive(Encode, Default)]
struct Prometheus {
    block: u64,
    version: u32,
    ip: u128,
    port: u16,
    ip_type: u8,
}

impl NeuronLite {
    pub(super) fn of(netuid: u16, neuron: &Neuron) -> Self {
        Self {
            hotkey: neuron.hotkey.0,
            coldkey: neuron.coldkey.0,
            uid: Compact(neuron.uid),
            netuid: Compact(netuid),
            active: true,
            axon: Axon::default(),
            prometheus: Prometheus::default(),
            stake: vec![(neuron.coldkey.0, Compact(neuron.stake))],
            rank: Compact(0),
            emission: Compact(0),
            incentive: Compact(0),
            consensus: Compact(0),
            trust: Compact(0),
            validator_trust: Compact(0),
            dividends: Compact(0),
            last_update: Compact(neuron.last_update),
            validator_permit: neuron.validator_permit,
            pruning_score: Compact(u16::MAX),
        }
    }
}

/// `SubnetHyperparams` (the first version of the answer). What the node does not use has the runtime's default.
#[derive(Encode)]
pub(super) struct SubnetHyperparams {
    rho: Compact<u16>,
    kappa: Compact<u16>,
    immunity_period: Compact<u16>,
    min_allowed_weights: Compact<u16>,
    max_weights_limit: Compact<u16>,
    tempo: Compact<u16>,
    min_difficulty: Compact<u64>,
    max_difficulty: Compact<u64>,
    weights_version: Compact<u64>,
    weights_rate_limit: Compact<u64>,
    adjustment_interval: Compact<u16>,
    activity_cutoff: Compact<u64>,
    registration_allowed: bool,
    target_regs_per_interval: Compact<u16>,
    min_burn: Compact<u64>,
    max_burn: Compact<u64>,
    bonds_moving_avg: Compact<u64>,
    max_regs_per_block: Compact<u16>,
    serving_rate_limit: Compact<u64>,
    max_validators: Compact<u16>,
    adjustment_alpha: Compact<u64>,
    difficulty: Compact<u64>,
    commit_reveal_period: Compact<u64>,
    commit_reveal_weights_enabled: bool,
    alpha_high: Compact<u16>,
    alpha_low: Compact<u16>,
    liquid_alpha_enabled: bool,
}

impl SubnetHyperparams {
    pub(super) fn of(state: &State, netuid: u16, parameters: &Hyperparameters) -> Self {
        Self {
            rho: Compact(10),
            kappa: Compact(32_767),
            immunity_period: Compact(4096),
            min_allowed_weights: Compact(parameters.min_allowed_weights),
            max_weights_limit: Compact(parameters.max_weight_limit),
            tempo: Compact(parameters.tempo),
            min_difficulty: Compact(10_000_000),
            max_difficulty: Compact(u64::MAX / 4),
            weights_version: Compact(parameters.weights_version),
            weights_rate_limit: Compact(parameters.weights_rate_limit),
            adjustment_interval: Compact(100),
            activity_cutoff: Compact(1388),
            registration_allowed: true,
            target_regs_per_interval: Compact(2),
            min_burn: Compact(500_000),
            max_burn: Compact(100_000_000_000),
            bonds_moving_avg: Compact(900_000),
            max_regs_per_block: Compact(1),
            serving_rate_limit: Compact(50),
            max_validators: Compact(64),
            adjustment_alpha: Compact(0),
            difficulty: Compact(10_000_000),
            commit_reveal_period: Compact(state.value(SUBTENSOR, "RevealPeriodEpochs", (netuid,))),
            commit_reveal_weights_enabled: parameters.commit_reveal,
            alpha_high: Compact(58_982),
            alpha_low: Compact(45_875),
            liquid_alpha_enabled: false,
        }
    }
}
