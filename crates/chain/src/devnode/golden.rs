//! The development node against what a genuine node of spec 461 took and answered.

use parity_scale_codec::Encode;
use protocol::AccountId;
use serde_json::Value as Json;

use super::api::{NeuronLite, SubnetHyperparams};
use super::extrinsic::{Call, Context, Invalid, open};
use super::ledger::Header;
use super::runtime::{Runtime, SUBTENSOR};
use super::state::State;
use crate::types::{Hyperparameters, Neuron};

const GOLDEN: &str = include_str!("../../tests/data/golden-461.json");

fn golden() -> Json {
    serde_json::from_str(GOLDEN).unwrap()
}

fn bytes(value: &Json) -> Vec<u8> {
    let text = value.as_str().expect("hexadecimal text");
    hex::decode(text.strip_prefix("0x").unwrap_or(text)).unwrap()
}

/// The recording chain as seen when block 67 was built.
struct Recorded {
    runtime: Runtime,
    genesis: [u8; 32],
    block_66: [u8; 32],
}

impl Recorded {
    fn new(golden: &Json) -> Self {
        let hash = |value: &Json| bytes(value).try_into().unwrap();
        Self {
            runtime: Runtime::load(None),
            genesis: hash(&golden["recorded"]["network"]["genesis_hash"]),
            block_66: hash(&golden["reference"]["signature_payloads"][0]["era_birth_block_hash"]),
        }
    }
}

impl Context for Recorded {
    fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    fn genesis(&self) -> [u8; 32] {
        self.genesis
    }

    fn next_number(&self) -> u64 {
        67
    }

    fn block_hash(&self, number: u64) -> Option<[u8; 32]> {
        (number == 66).then_some(self.block_66)
    }
}

#[test]
fn versions_come_from_the_metadata() {
    let runtime = Runtime::load(None);
    assert_eq!((runtime.spec_version, runtime.transaction_version), (461, 1));
}

#[test]
fn the_signature_that_a_genuine_node_accepted_verifies_and_a_changed_one_does_not() {
    let golden = golden();
    let chain = Recorded::new(&golden);
    let extrinsic = bytes(&golden["recorded"]["accepted_extrinsic"]["extrinsic_hex"]);
    // The call is a transfer, which this node does not execute: that is found after the signature was verified.
    assert_eq!(open(&extrinsic, &chain).unwrap_err(), Invalid::Call);
    let mut changed = extrinsic.clone();
    *changed.last_mut().unwrap() ^= 4;
    assert_eq!(open(&changed, &chain).unwrap_err(), Invalid::BadProof);
    let mut elsewhere = Recorded::new(&golden);
    elsewhere.genesis = [0; 32];
    assert_eq!(open(&extrinsic, &elsewhere).unwrap_err(), Invalid::BadProof);
}

#[test]
fn weights_signed_by_the_official_package_are_understood() {
    let golden = golden();
    let chain = Recorded::new(&golden);
    let entry = &golden["reference"]["extrinsics"][0];
    let signed = open(&bytes(&entry["extrinsic_hex"]), &chain).unwrap();
    assert_eq!(signed.signer.to_string(), entry["address"].as_str().unwrap());
    assert_eq!(signed.nonce, 5);
    let expected = Call::SetWeights { netuid: 24, mechanism: 0, uids: vec![0, 1, 7], values: vec![16384, 32768, 65535], version_key: 7 };
    assert_eq!(signed.call, expected);
    // A payload above 256 bytes is hashed before signing.
    let commit = bytes(&golden["reference"]["extrinsics"][1]["extrinsic_hex"]);
    let call = open(&commit, &chain).unwrap().call;
    assert!(matches!(call, Call::CommitWeights { netuid: 24, mechanism: 0, version: 4, .. }), "{call:?}");
    let mut changed = commit.clone();
    *changed.last_mut().unwrap() ^= 1;
    assert_eq!(open(&changed, &chain).unwrap_err(), Invalid::BadProof);
}

#[test]
fn a_block_hash_is_that_of_its_encoded_header() {
    let golden = golden();
    let entry = &golden["recorded"]["header"];
    let header: Header = serde_json::from_value(entry["raw"].clone()).unwrap();
    assert_eq!(sp_crypto_hashing::blake2_256(&header.encode()).to_vec(), bytes(&entry["hash"]));
    assert_eq!(serde_json::to_value(&header).unwrap()["digest"], entry["raw"]["digest"]);
}

#[test]
fn a_neuron_is_encoded_as_a_genuine_node_does() {
    let golden = golden();
    let entry = &golden["recorded"]["runtime_calls"][0];
    assert_eq!(entry["method"], "get_neurons_lite");
    let recorded = &entry["decoded"][0];
    let account = |name: &str| recorded[name].as_str().unwrap().parse::<AccountId>().unwrap();
    let neuron = Neuron {
        uid: 0,
        hotkey: account("hotkey"),
        coldkey: account("coldkey"),
        stake: recorded["stake"][0][1].as_u64().unwrap(),
        validator_permit: false,
        last_update: 0,
    };
    assert_eq!(hex::encode(vec![NeuronLite::of(1, &neuron)].encode()), hex::encode(bytes(&entry["raw_hex"])));
}

#[test]
fn hyperparameters_are_encoded_as_a_genuine_node_does() {
    let golden = golden();
    let entry = &golden["recorded"]["runtime_calls"][1];
    assert_eq!(entry["method"], "get_subnet_hyperparams");
    let recorded = &entry["decoded"];
    let number = |name: &str| recorded[name].as_u64().unwrap();
    let parameters = Hyperparameters {
        tempo: number("tempo") as u16,
        weights_rate_limit: number("weights_rate_limit"),
        min_allowed_weights: number("min_allowed_weights") as u16,
        max_weight_limit: number("max_weights_limit") as u16,
        weights_version: number("weights_version"),
        commit_reveal: recorded["commit_reveal_weights_enabled"].as_bool().unwrap(),
        stake_threshold: 0,
    };
    let state = State::new(Runtime::load(None).into());
    let encoded = Some(SubnetHyperparams::of(&state, 1, &parameters)).encode();
    assert_eq!(hex::encode(encoded), hex::encode(bytes(&entry["raw_hex"])));
}

#[test]
fn unset_storage_has_the_defaults_of_the_genuine_runtime() {
    let state = State::new(Runtime::load(None).into());
    assert_eq!(state.value::<u64>(SUBTENSOR, "WeightsSetRateLimit", (1u16,)), 100);
    assert_eq!(state.value::<u16>(SUBTENSOR, "MinAllowedWeights", (1u16,)), 1024);
    assert_eq!(state.value::<u16>(SUBTENSOR, "MaxWeightsLimit", (1u16,)), u16::MAX);
    assert!(state.value::<bool>(SUBTENSOR, "CommitRevealWeightsEnabled", (1u16,)));
    assert!(!state.subnet_exists(1));
}

#[test]
fn events_carry_the_indices_of_the_metadata() {
    let runtime = Runtime::load(None);
    assert_eq!(runtime.event(SUBTENSOR, "WeightsSet", (24u16, 3u16)), [7, 5, 24, 0, 3, 0]);
    assert_eq!(runtime.event("Commitments", "Commitment", (24u16, [1u8; 32]))[..4], [18, 0, 24, 0]);
    // System.ExtrinsicSuccess of the recorded block's timestamp: no weight there either, but its class is mandatory.
    let recorded = bytes(&golden()["recorded"]["events"]["raw_hex"]);
    assert_eq!(recorded[0] >> 2, 8, "eight events");
    assert_eq!(runtime.module_error(SUBTENSOR, "NeuronNoValidatorPermit"), Some(vec![3, 7, 15, 0, 0, 0]));
    assert_eq!(runtime.module_error(SUBTENSOR, "NoSuchError"), None);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]

    #[test]
    fn bytes_from_outside_never_hurt_the_node(
        rubbish in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        changes in proptest::collection::vec((0usize..400, proptest::num::u8::ANY), 1..6),
    ) {
        let golden = golden();
        let chain = Recorded::new(&golden);
        proptest::prop_assert!(open(&rubbish, &chain).is_err());
        let original = bytes(&golden["reference"]["extrinsics"][0]["extrinsic_hex"]);
        let mut changed = original.clone();
        for (place, byte) in changes {
            let place = place % changed.len();
            changed[place] = byte;
        }
        proptest::prop_assert!(changed == original || open(&changed, &chain).is_err());
    }
}
