//! Our encodings against values recorded from a genuine node of spec 461, and against the official package's.
//!
//! A client and a node by the same author can agree on the same mistake; these vectors cannot.

use std::sync::Arc;

use protocol::AccountId;
use serde_json::Value as Json;
use subxt::config::DefaultExtrinsicParamsBuilder;
use subxt::config::substrate::{AccountId32, H256, MultiSignature, SpecVersionForRange, SubstrateConfig};
use subxt::dynamic::{self, Value};
use subxt::tx::Payload;
use subxt::{Metadata, OfflineClient};

use super::{commitment, send};
use crate::view::{How, WeightsRequest};

const METADATA: &[u8] = include_bytes!("../../data/subtensor-461-v15.scale");
const GOLDEN: &str = include_str!("../../tests/data/golden-461.json");

type AtBlock = subxt::client::OfflineClientAtBlock<SubstrateConfig>;

fn golden() -> Json {
    serde_json::from_str(GOLDEN).unwrap()
}

fn bytes(value: &Json) -> Vec<u8> {
    let text = value.as_str().expect("hexadecimal text");
    hex::decode(text.strip_prefix("0x").unwrap_or(text)).unwrap()
}

fn hash(value: &Json) -> H256 {
    H256(bytes(value).try_into().unwrap())
}

/// A client without a node, with the genesis and versions of the recording chain.
fn offline(golden: &Json) -> AtBlock {
    let network = &golden["recorded"]["network"];
    let metadata = Metadata::decode_from(METADATA).unwrap();
    let config = SubstrateConfig::builder()
        .set_genesis_hash(hash(&network["genesis_hash"]))
        .set_metadata_for_spec_versions([(461, Arc::new(metadata))])
        .set_spec_version_for_block_ranges([SpecVersionForRange {
            block_range: 0..u64::MAX,
            spec_version: network["spec_version"].as_u64().unwrap() as u32,
            transaction_version: network["transaction_version"].as_u64().unwrap() as u32,
        }])
        .build();
    OfflineClient::new_with_config(config).at_block(66u64).unwrap()
}

/// Both halves of a list of the file.
fn both<'a>(golden: &'a Json, list: &str) -> impl Iterator<Item = &'a Json> {
    let entries = |half: &str| golden[half][list].as_array().unwrap().iter();
    entries("recorded").chain(entries("reference"))
}

/// A JSON parameter as a dynamic value: numbers, bytes, addresses, lists.
fn value(parameter: &Json) -> Value {
    match parameter {
        Json::Number(number) => Value::u128(u128::from(number.as_u64().unwrap())),
        Json::String(text) if text.starts_with("0x") => Value::from_bytes(bytes(parameter)),
        Json::String(text) => Value::from_bytes(text.parse::<AccountId>().unwrap().0),
        Json::Array(items) => Value::unnamed_composite(items.iter().map(value)),
        other => panic!("unexpected parameter {other}"),
    }
}

#[test]
fn storage_keys_are_the_recorded_ones() {
    let golden = golden();
    let at = offline(&golden);
    let mut checked = 0;
    for entry in both(&golden, "storage_keys") {
        let (pallet, name) = (entry["pallet"].as_str().unwrap(), entry["storage_function"].as_str().unwrap());
        let keys: Vec<Value> = entry["params"].as_array().unwrap().iter().map(value).collect();
        let key = at.storage().entry(dynamic::storage::<Vec<Value>, Value>(pallet, name)).unwrap().fetch_key(keys).unwrap();
        assert_eq!(hex::encode(key), hex::encode(bytes(&entry["key_hex"])), "{pallet}.{name} {}", entry["params"]);
        checked += 1;
    }
    assert_eq!(checked, 42);
}

#[test]
fn call_data_is_the_recorded_one() {
    let golden = golden();
    let at = offline(&golden);
    let mut checked = 0;
    for entry in both(&golden, "calls") {
        let (module, function, params) = (entry["module"].as_str().unwrap(), entry["function"].as_str().unwrap(), &entry["params"]);
        let number = |name: &str| params[name].as_u64().unwrap();
        let list = |name: &str| params[name].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u16).collect::<Vec<u16>>();
        let data = match function {
            // The calls that the client sends, by its own functions.
            "set_weights" | "set_mechanism_weights" if params["mecid"] != 0 => {
                let row = list("dests").into_iter().zip(list("weights")).collect();
                let mechanism = params["mecid"].as_u64().unwrap_or(0) as u8;
                let (netuid, version_key) = (number("netuid") as u16, number("version_key"));
                let request = WeightsRequest { netuid, mechanism, row, version_key, how: How::Plain };
                at.tx().call_data(&send::plain_call(&request)).unwrap()
            }
            "commit_timelocked_weights" => {
                let netuid = number("netuid") as u16;
                let request = WeightsRequest { netuid, mechanism: 0, row: Vec::new(), version_key: 0, how: How::Plain };
                at.tx().call_data(&send::timelocked_call(&request, &bytes(&params["commit"]), number("reveal_round"))).unwrap()
            }
            "set_commitment" => {
                let arguments = vec![Value::from(number("netuid") as u16), commitment::info(b"abc")];
                at.tx().call_data(&dynamic::transaction(module, function, arguments)).unwrap()
            }
            "transfer_keep_alive" => {
                let dest = Value::unnamed_variant("Id", [value(&params["dest"])]);
                at.tx().call_data(&dynamic::transaction(module, function, vec![dest, value(&params["value"])])).unwrap()
            }
            _ => {
                let fields = params.as_object().unwrap().iter().map(|(name, parameter)| (name.clone(), value(parameter)));
                let arguments = subxt::ext::scale_value::Composite::named(fields);
                at.tx().call_data(&dynamic::transaction(module, function, arguments)).unwrap()
            }
        };
        assert_eq!(hex::encode(data), hex::encode(bytes(&entry["data_hex"])), "{module}.{function}");
        checked += 1;
    }
    assert_eq!(checked, 12);
}

/// The parameters of a recorded payload or extrinsic. The birth hash is that of the block the era begins with.
fn params(entry: &Json, birth: Option<H256>) -> subxt::config::DefaultExtrinsicParams<SubstrateConfig> {
    let builder = DefaultExtrinsicParamsBuilder::new().nonce(entry["nonce"].as_u64().unwrap()).tip(entry["tip"].as_u64().unwrap().into());
    match &entry["era"] {
        Json::String(immortal) => {
            assert_eq!(immortal, "00");
            builder.immortal().build()
        }
        era => {
            let (period, current) = (era["period"].as_u64().unwrap(), era["current"].as_u64().unwrap());
            builder.mortal_from_unchecked(period, current, birth.unwrap_or_default()).build()
        }
    }
}

fn call(at: &AtBlock, entry: &Json) -> impl Payload {
    at.tx().from_call_data_bytes(&bytes(&entry["call_data_hex"])).unwrap()
}

#[test]
fn the_bytes_that_are_signed_are_the_recorded_ones() {
    let golden = golden();
    let at = offline(&golden);
    for entry in both(&golden, "signature_payloads") {
        let birth = entry.get("era_birth_block_hash").map(hash);
        let call = call(&at, entry);
        let signable = at.tx().create_signable_offline(&call, params(entry, birth)).unwrap();
        assert_eq!(hex::encode(signable.signer_payload().unwrap()), hex::encode(bytes(&entry["payload_hex"])));
    }
}

#[test]
fn extrinsics_of_both_key_kinds_are_assembled_as_recorded() {
    let golden = golden();
    let at = offline(&golden);
    for entry in both(&golden, "extrinsics") {
        let account: AccountId = entry["address"].as_str().unwrap().parse().unwrap();
        let signature: [u8; 64] = bytes(&entry["signature_hex"]).try_into().unwrap();
        let signature = match entry["crypto_type"].as_u64() {
            Some(0) => MultiSignature::Ed25519(signature),
            _ => MultiSignature::Sr25519(signature),
        };
        let call = call(&at, entry);
        let mut signable = at.tx().create_signable_offline(&call, params(entry, None)).unwrap();
        let signed = signable.sign_with_account_and_signature(&AccountId32(account.0), &signature).unwrap();
        assert_eq!(hex::encode(signed.encoded()), hex::encode(bytes(&entry["extrinsic_hex"])));
        assert_eq!(signed.hash(), hash(&entry["extrinsic_hash"]));
    }
}

#[test]
fn addresses_are_the_recorded_ones() {
    for entry in golden()["recorded"]["ss58"].as_array().unwrap() {
        let account: AccountId = entry["address"].as_str().unwrap().parse().unwrap();
        assert_eq!(account.0.to_vec(), bytes(&entry["public_key_hex"]));
        assert_eq!(account.to_string(), entry["address"].as_str().unwrap());
    }
}
