//! The development node as a node: what it refuses below the client's own checks, and that bytes from outside cannot hurt it.

use std::time::Duration;

use chain::devnode::{DevNode, DevNodeError, DevOptions};
use chain::{Chain, ChainError, Hotkey};
use protocol::{KeyKind, Signer as _};
use serde_json::{Value, json};
use subxt::config::DefaultExtrinsicParamsBuilder;
use subxt::config::substrate::{AccountId32, MultiSignature, SubstrateConfig};
use subxt::error::TransactionEventsError;
use subxt::rpcs::RpcClient;
use subxt::rpcs::client::{RpcParams, rpc_params};
use subxt::tx::{TransactionInvalid, ValidationResult};
use subxt::{OnlineClient, dynamic};

use crate::world::{NETUID, STRANGER, connect, dev_chain, hotkey};

type Api = OnlineClient<SubstrateConfig>;

struct Signer(Hotkey);

impl subxt::tx::Signer<SubstrateConfig> for Signer {
    fn account_id(&self) -> AccountId32 {
        AccountId32(self.0.key().public)
    }

    fn sign(&self, payload: &[u8]) -> MultiSignature {
        match self.0.key().kind {
            KeyKind::Ed25519 => MultiSignature::Ed25519(self.0.sign(payload)),
            KeyKind::Sr25519 => MultiSignature::Sr25519(self.0.sign(payload)),
        }
    }
}

async fn api(node: &DevNode) -> (Api, RpcClient) {
    let rpc = RpcClient::from_insecure_url(node.endpoint()).await.unwrap();
    let backend = subxt::backend::LegacyBackend::builder().build(rpc.clone());
    (Api::from_backend(std::sync::Arc::new(backend)).await.unwrap(), rpc)
}

fn set_weights(netuid: u16, uids: Vec<u16>, values: Vec<u16>, version: u64) -> subxt::tx::DynamicPayload<(u16, Vec<u16>, Vec<u16>, u64)> {
    dynamic::transaction("SubtensorModule", "set_weights", (netuid, uids, values, version))
}

/// Sends a call without any check before; gives the dispatch error's name, or `None` if it succeeded.
async fn dispatch(api: &Api, who: u8, call: &impl subxt::tx::Payload) -> Option<String> {
    let mut transactions = api.tx().await.unwrap();
    let params = DefaultExtrinsicParamsBuilder::new().mortal(64).build();
    let progress = transactions.sign_and_submit_then_watch(call, &Signer(hotkey(who)), params).await.unwrap();
    match progress.wait_for_finalized().await.unwrap().wait_for_success().await {
        Ok(events) => {
            assert!(events.iter().any(|event| event.unwrap().event_name() == "WeightsSet"));
            None
        }
        Err(TransactionEventsError::ExtrinsicFailed(error)) => Some(error.to_string()),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dispatch_errors_are_the_genuine_ones_in_their_order() {
    let node = DevNode::start_with(dev_chain(20), DevOptions { weights_version: 7, ..Default::default() }).await.unwrap();
    let (api, _) = api(&node).await;
    for (who, call, error) in [
        (0, set_weights(0, vec![1], vec![1], 7), "CanNotSetRootNetworkWeights"),
        (0, set_weights(NETUID, vec![1, 2], vec![1], 7), "WeightVecNotEqualSize"),
        (0, set_weights(99, vec![1, 2], vec![1, 1], 7), "MechanismDoesNotExist"),
        (STRANGER, set_weights(NETUID, vec![1, 2], vec![1, 1], 7), "HotKeyNotRegisteredInSubNet"),
        (0, set_weights(NETUID, vec![1, 2], vec![1, 1], 6), "IncorrectWeightVersionKey"),
        (3, set_weights(NETUID, vec![1, 2], vec![1, 1], 7), "NeuronNoValidatorPermit"),
    ] {
        let found = dispatch(&api, who, &call).await.expect("the call fails");
        assert_eq!(found, format!("Pallet error: SubtensorModule::{error}"));
    }
    // The chain itself takes a row of zeros and the mechanism call.
    assert_eq!(dispatch(&api, 0, &set_weights(NETUID, vec![1, 2], vec![0, 0], 7)).await, None);
    let mechanism = dynamic::transaction("SubtensorModule", "set_mechanism_weights", (NETUID, 0u8, vec![1u16, 2], vec![9u16, 3], 7u64));
    assert_eq!(dispatch(&api, 1, &mechanism).await, None);
    assert_eq!(connect(&node).await.weights(NETUID, 1).await.unwrap(), [(1, 65535), (2, 21845)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_refuses_with_the_codes_of_the_genuine_one() {
    let options = DevOptions { stake_threshold: 1_500_000_000, ..Default::default() };
    let node = DevNode::start_with(dev_chain(20), options).await.unwrap();
    let (api, rpc) = api(&node).await;
    let call = set_weights(NETUID, vec![1, 2], vec![1, 1], 0);
    let sign = async |who: u8, nonce: Option<u64>| {
        let builder = DefaultExtrinsicParamsBuilder::new().mortal(64);
        let params = match nonce {
            // A nonce given by hand needs the block given by hand as well.
            Some(nonce) => builder.nonce(nonce).build(),
            None => builder.build(),
        };
        api.tx().await.unwrap().create_signed(&call, &Signer(hotkey(who)), params).await.unwrap()
    };
    let verdict = |validation| match validation {
        ValidationResult::Invalid(reason) => reason,
        other => panic!("{other:?}"),
    };
    let poor = sign(0, None).await;
    assert_eq!(verdict(poor.validate().await.unwrap()), TransactionInvalid::Custom(1));
    let error = rpc.request::<Value>("author_submitExtrinsic", rpc_params![hex(poor.encoded())]).await.unwrap_err();
    let subxt::rpcs::Error::User(error) = error else { panic!("{error}") };
    assert_eq!((error.code, error.data.unwrap().get()), (1010, "\"Custom error: 1\""));

    let good = sign(1, None).await;
    assert!(good.validate().await.unwrap().is_valid());
    good.submit_and_watch().await.unwrap().wait_for_finalized_success().await.unwrap();
    assert_eq!(verdict(good.validate().await.unwrap()), TransactionInvalid::Stale);
    assert_eq!(verdict(sign(1, None).await.validate().await.unwrap()), TransactionInvalid::Custom(6));
    assert_eq!(verdict(sign(1, Some(1000)).await.validate().await.unwrap()), TransactionInvalid::Future);
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    format!("0x{}", hex::encode(bytes))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_byte_anywhere_in_an_extrinsic_is_refused() {
    let node = DevNode::start(dev_chain(0)).await.unwrap();
    let (api, rpc) = api(&node).await;
    let call = set_weights(NETUID, vec![1, 2], vec![1, 1], 0);
    let params = DefaultExtrinsicParamsBuilder::new().mortal(64).build();
    let signed = api.tx().await.unwrap().create_signed(&call, &Signer(hotkey(0)), params).await.unwrap();
    let bytes = signed.encoded();
    for index in 0..bytes.len() {
        let mut changed = bytes.to_vec();
        changed[index] ^= 1;
        let answer = rpc.request::<Value>("author_submitExtrinsic", rpc_params![hex(&changed)]).await;
        assert!(answer.is_err(), "byte {index}");
        assert!(rpc.request::<Value>("author_submitExtrinsic", rpc_params![hex(&bytes[..index])]).await.is_err(), "cut at {index}");
    }
    rpc.request::<Value>("author_submitExtrinsic", rpc_params![hex(bytes)]).await.unwrap();
    let twice = rpc.request::<Value>("author_submitExtrinsic", rpc_params![hex(bytes)]).await.unwrap_err();
    assert!(twice.to_string().contains("Already Imported"), "{twice}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_in_calls_is_answered_with_errors_and_the_node_lives_on() {
    let node = DevNode::start(dev_chain(0)).await.unwrap();
    let (_, rpc) = api(&node).await;
    let ask = async |method: &str, params: RpcParams| rpc.request::<Value>(method, params).await;
    for method in ["state_getStorage", "state_call", "chain_getHeader", "chain_getBlock", "state_getKeysPaged", "author_submitExtrinsic"] {
        for params in [rpc_params!["zz"], rpc_params![json!({})], rpc_params!["0x01", "0x0102"], rpc_params![-1, -1, -1, -1]] {
            assert!(ask(method, params).await.is_err(), "{method}");
        }
    }
    for api in ["AccountNonceApi_account_nonce", "NeuronInfoRuntimeApi_get_neurons_lite", "Metadata_metadata_at_version", "Nothing_like_it"]
    {
        assert!(ask("state_call", rpc_params![api, "0x"]).await.is_err(), "{api}");
    }
    let refused = ask("state_call", rpc_params!["TaggedTransactionQueue_validate_transaction", "0x"]).await.unwrap();
    assert_eq!(refused, json!("0x010000"), "no extrinsic is an invalid call");
    assert_eq!(ask("chain_getHeader", rpc_params![hex([7; 32])]).await.unwrap(), Value::Null);
    assert_eq!(ask("chain_getBlockHash", rpc_params![0]).await.unwrap(), json!(hex(node.genesis())));
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_are_announced_and_keys_are_listed() {
    let node = DevNode::start_with(dev_chain(0), DevOptions { finality_lag: 2, ..Default::default() }).await.unwrap();
    let (api, rpc) = api(&node).await;
    let mut blocks = api.stream_blocks().await.unwrap();
    let mut best = rpc.subscribe::<Value>("chain_subscribeNewHeads", rpc_params![], "chain_unsubscribeNewHeads").await.unwrap();
    for _ in 0..5 {
        node.produce();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut numbers = Vec::new();
    while numbers.last() != Some(&3) {
        let block = tokio::time::timeout(Duration::from_secs(5), blocks.next()).await.unwrap().unwrap().unwrap();
        numbers.push(block.number());
    }
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
    let first = tokio::time::timeout(Duration::from_secs(5), best.next()).await.unwrap().unwrap().unwrap();
    assert!(first["number"].is_string() && first["parentHash"].is_string());

    let at = api.at_current_block().await.unwrap();
    let address = dynamic::storage::<(u16, u16), [u8; 32]>("SubtensorModule", "Keys");
    let mut keys = at.storage().iter(address, (NETUID,)).await.unwrap();
    let mut found = Vec::new();
    while let Some(entry) = keys.next().await {
        found.push(entry.unwrap().value().decode().unwrap());
    }
    assert_eq!(found, (0..4).map(|uid| hotkey(uid).account().0).collect::<Vec<_>>());
}

fn produce(node: &DevNode, blocks: u64) {
    (0..blocks).for_each(|_| {
        node.produce();
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn epochs_end_every_tempo() {
    let node = DevNode::start(dev_chain(0)).await.unwrap();
    let (api, _) = api(&node).await;
    let read = async |entry: &str| {
        let at = api.at_current_block().await.unwrap();
        at.storage().fetch(dynamic::storage::<(u16,), u64>("SubtensorModule", entry), (NETUID,)).await.unwrap().decode().unwrap()
    };
    produce(&node, 29);
    assert_eq!((read("SubnetEpochIndex").await, read("BlocksSinceLastStep").await), (0, 29));
    node.produce();
    assert_eq!((read("SubnetEpochIndex").await, read("LastEpochBlock").await, read("BlocksSinceLastStep").await), (1, 30, 0));
    produce(&node, 30);
    assert_eq!((read("SubnetEpochIndex").await, read("LastEpochBlock").await), (2, 60));
}

#[tokio::test(flavor = "multi_thread")]
async fn commitments_are_limited_in_each_epoch() {
    let mut chain = dev_chain(20);
    // No epoch ends during the test.
    chain.tempo = 10_000;
    let node = DevNode::start(chain).await.unwrap();
    let client = connect(&node).await;
    for number in 0..6u8 {
        client.set_commitment(&hotkey(0), NETUID, &[number; 512]).await.unwrap();
    }
    let seventh = client.set_commitment(&hotkey(0), NETUID, b"one more").await.unwrap_err();
    assert!(matches!(&seventh, ChainError::CommitmentRefused { reason, .. } if reason == "Commitments::SpaceLimitExceeded"), "{seventh}");
    client.set_commitment(&hotkey(1), NETUID, b"another hotkey").await.unwrap();
}

#[tokio::test]
async fn settings_that_make_no_chain_are_refused() {
    let mut chain = dev_chain(0);
    chain.netuid = 0;
    assert!(matches!(DevNode::start(chain).await, Err(DevNodeError::Settings(_))));
    let mut chain = dev_chain(0);
    chain.neurons.push(chain.neurons[0].clone());
    assert!(matches!(DevNode::start(chain).await, Err(DevNodeError::Settings(_))));
    let mut chain = dev_chain(0);
    chain.listen = "0.0.0.0:0".parse().unwrap();
    assert!(matches!(DevNode::start(chain).await, Err(DevNodeError::Settings(_))));
    let busy = DevNode::start(dev_chain(0)).await.unwrap();
    let mut chain = dev_chain(0);
    chain.listen = busy.endpoint().strip_prefix("ws://").unwrap().parse().unwrap();
    assert!(matches!(DevNode::start(chain).await, Err(DevNodeError::Listen { .. })));
}
