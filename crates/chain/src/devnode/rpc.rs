//! The JSON-RPC methods of the development node: what a client with the legacy backend asks a genuine node for.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use jsonrpsee::core::{RpcResult, SubscriptionResult, to_json_raw_value};
use jsonrpsee::types::{ErrorObjectOwned, Params};
use jsonrpsee::{PendingSubscriptionSink, RpcModule, SubscriptionSink};
use serde::Serialize;
use serde_json::{Value, json};

use super::Node;
use super::api;
use super::ledger::{Block, Content, Fate, Ledger, Refused};

/// Most keys in one page of `state_getKeysPaged`, as on genuine nodes.
const KEYS_PAGE_MAX: usize = 1000;

/// Error codes of Substrate nodes.
const CLIENT_ERROR: i32 = -32000;
const STATE_DISCARDED: i32 = 4003;
const POOL_INVALID: i32 = 1010;
const POOL_ALREADY_IMPORTED: i32 = 1013;
const POOL_PRIORITY_TOO_LOW: i32 = 1014;
const POOL_FULL: i32 = 1016;

pub(super) fn module(node: Arc<Node>) -> RpcModule<Node> {
    let mut module = RpcModule::from_arc(node);
    register(&mut module).expect("method names are registered once");
    module
}

fn register(module: &mut RpcModule<Node>) -> Result<(), jsonrpsee::core::RegisterMethodError> {
    module.register_method("chain_getBlockHash", |params, node, _| block_hash(&params, &node.ledger()))?;
    module.register_alias("chain_getHead", "chain_getBlockHash")?;
    module.register_method("chain_getFinalizedHead", |_, node, _| hex(node.ledger().finalized().hash))?;
    module.register_method("chain_getHeader", |params, node, _| {
        RpcResult::Ok(at(&params, 0, &node.ledger())?.map(|block| block.header.clone()))
    })?;
    module.register_method("chain_getBlock", |params, node, _| {
        let ledger = node.ledger();
        let Some(block) = at(&params, 0, &ledger)? else { return Ok(Value::Null) };
        let extrinsics: Vec<String> = content(block)?.extrinsics.iter().map(hex).collect();
        RpcResult::Ok(json!({ "block": { "header": block.header, "extrinsics": extrinsics }, "justifications": null }))
    })?;

    module.register_method("state_getStorage", |params, node, _| {
        let ledger = node.ledger();
        let key = bytes(&params, 0)?;
        let content = content(known(at(&params, 1, &ledger)?)?)?;
        RpcResult::Ok(content.state.raw(&key).map(hex))
    })?;
    module.register_alias("state_getStorageAt", "state_getStorage")?;
    module.register_method("state_getKeysPaged", |params, node, _| {
        let ledger = node.ledger();
        let prefix = bytes(&params, 0)?;
        let count = argument(&params, 1)?.and_then(|count| count.as_u64()).ok_or_else(|| invalid("a number of keys"))? as usize;
        let after = match argument(&params, 2)? {
            None | Some(Value::Null) => None,
            Some(_) => Some(bytes(&params, 2)?),
        };
        let content = content(known(at(&params, 3, &ledger)?)?)?;
        let keys = content.state.keys(&prefix, after.as_deref(), count.min(KEYS_PAGE_MAX));
        RpcResult::Ok(keys.iter().map(hex).collect::<Vec<_>>())
    })?;
    module.register_method("state_queryStorageAt", |params, node, _| {
        let ledger = node.ledger();
        let Some(Value::Array(keys)) = argument(&params, 0)? else { return Err(invalid("a list of keys")) };
        if keys.len() > KEYS_PAGE_MAX {
            return Err(invalid("fewer keys"));
        }
        let block = known(at(&params, 1, &ledger)?)?;
        let state = &content(block)?.state;
        let changes = keys
            .iter()
            .map(|key| {
                let bytes = key.as_str().and_then(unhex).ok_or_else(|| invalid("hexadecimal bytes"))?;
                Ok((key, state.raw(&bytes).map(hex)))
            })
            .collect::<RpcResult<Vec<_>>>()?;
        RpcResult::Ok(json!([{ "block": hex(block.hash), "changes": changes }]))
    })?;
    module.register_method("state_getRuntimeVersion", |params, node, _| {
        let ledger = node.ledger();
        let runtime = content(known(at(&params, 0, &ledger)?)?)?.state.runtime();
        let apis: Vec<Value> = runtime.apis.iter().map(|(id, version)| json!([hex(id), version])).collect();
        RpcResult::Ok(json!({
            "specName": "node-subtensor",
            "implName": "node-subtensor",
            "authoringVersion": 1,
            "specVersion": runtime.spec_version,
            "implVersion": 1,
            "apis": apis,
            "transactionVersion": runtime.transaction_version,
            "stateVersion": 1,
        }))
    })?;
    module.register_alias("chain_getRuntimeVersion", "state_getRuntimeVersion")?;
    module.register_method("state_getMetadata", |params, node, _| {
        let ledger = node.ledger();
        RpcResult::Ok(hex(content(known(at(&params, 0, &ledger)?)?)?.state.runtime().bytes()))
    })?;
    module.register_method("system_accountNextIndex", |params, node, _| {
        let account: protocol::AccountId = text(&params, 0)?.parse().map_err(|_| invalid("an address"))?;
        RpcResult::Ok(node.ledger().next_nonce(&account))
    })?;
    module.register_method("state_call", |params, node, _| {
        node.runtime_calls.fetch_add(1, Ordering::Relaxed);
        let ledger = node.ledger();
        let method = text(&params, 0)?;
        let input = bytes(&params, 1)?;
        let content = content(known(at(&params, 2, &ledger)?)?)?;
        match api::call(&ledger, &method, &input, content) {
            Ok(answer) => RpcResult::Ok(hex(answer)),
            Err(reason) => Err(client_error(&format!("Execution failed: {reason}"))),
        }
    })?;

    module.register_alias("account_nextIndex", "system_accountNextIndex")?;

    module.register_method("author_submitExtrinsic", |params, node, _| {
        let extrinsic = bytes(&params, 0)?;
        node.ledger().submit(extrinsic).map(hex).map_err(refusal)
    })?;
    module.register_subscription(
        "author_submitAndWatchExtrinsic",
        "author_extrinsicUpdate",
        "author_unwatchExtrinsic",
        |params, pending, node, _| submit_and_watch(params, pending, node),
    )?;
    for (subscribe, notification, unsubscribe) in [
        ("chain_subscribeNewHeads", "chain_newHead", "chain_unsubscribeNewHeads"),
        ("chain_subscribeAllHeads", "chain_allHead", "chain_unsubscribeAllHeads"),
    ] {
        module.register_subscription(subscribe, notification, unsubscribe, |_, pending, node, _| {
            heads(pending, node, |ledger| ledger.best())
        })?;
    }
    module.register_subscription(
        "chain_subscribeFinalizedHeads",
        "chain_finalizedHead",
        "chain_unsubscribeFinalizedHeads",
        |_, pending, node, _| heads(pending, node, |ledger| ledger.finalized()),
    )?;

    // What a genuine node of a local chain says of itself: clients choose their way by it.
    module.register_method("system_chain", |_, _, _| "Development")?;
    module.register_method("system_name", |_, _, _| "node-subtensor")?;
    module.register_method("system_version", |_, _, _| "4.0.0-dev")?;
    module.register_method("system_health", |_, _, _| json!({ "peers": 0, "isSyncing": false, "shouldHavePeers": false }))?;
    module.register_method("system_properties", |_, _, _| json!({ "ss58Format": 42, "tokenDecimals": 9, "tokenSymbol": "TAO" }))?;
    Ok(())
}

fn block_hash(params: &Params<'_>, ledger: &Ledger) -> RpcResult<Option<String>> {
    let number = match argument(params, 0)? {
        None | Some(Value::Null) => return Ok(Some(hex(ledger.best().hash))),
        Some(Value::Number(number)) => number.as_u64(),
        Some(Value::String(text)) => u64::from_str_radix(text.strip_prefix("0x").unwrap_or(&text), 16).ok(),
        Some(_) => None,
    };
    let number = number.ok_or_else(|| invalid("a block number"))?;
    Ok(ledger.by_number(number).map(|block| hex(block.hash)))
}

/// Puts an extrinsic into the pool and reports its way: ready, in a block, finalized.
async fn submit_and_watch(params: Params<'static>, pending: PendingSubscriptionSink, node: Arc<Node>) -> SubscriptionResult {
    let submitted = bytes(&params, 0).and_then(|extrinsic| node.ledger().submit(extrinsic).map_err(refusal));
    let extrinsic = match submitted {
        Ok(extrinsic) => extrinsic,
        Err(error) => {
            pending.reject(error).await;
            return Ok(());
        }
    };
    let mut changes = node.changes();
    let sink = pending.accept().await?;
    send(&sink, &"ready").await?;
    let mut told: Option<[u8; 32]> = None;
    loop {
        let fate = node.ledger().fate(&extrinsic);
        let included = match fate {
            Fate::InBlock { hash, .. } => Some(hash),
            Fate::Waiting | Fate::Dropped => None,
        };
        if let Some(left) = told.take_if(|told| included != Some(*told)) {
            send(&sink, &json!({ "retracted": hex(left) })).await?;
        }
        match fate {
            Fate::Waiting => {}
            Fate::InBlock { hash, finalized } => {
                if told.is_none() {
                    send(&sink, &json!({ "inBlock": hex(hash) })).await?;
                    told = Some(hash);
                }
                if finalized {
                    return send(&sink, &json!({ "finalized": hex(hash) })).await;
                }
            }
            Fate::Dropped => return send(&sink, &"invalid").await,
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return Ok(()) },
            () = sink.closed() => return Ok(()),
        }
    }
}

/// Sends the header that `pick` chooses, now and whenever it is another block.
async fn heads(pending: PendingSubscriptionSink, node: Arc<Node>, pick: fn(&Ledger) -> &Block) -> SubscriptionResult {
    let mut changes = node.changes();
    let sink = pending.accept().await?;
    let mut last = None;
    loop {
        let header = pick(&node.ledger()).header.clone();
        if last != Some(header.number) {
            last = Some(header.number);
            send(&sink, &header).await?;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return Ok(()) },
            () = sink.closed() => return Ok(()),
        }
    }
}

async fn send(sink: &SubscriptionSink, message: &impl Serialize) -> SubscriptionResult {
    Ok(sink.send(to_json_raw_value(message)?).await?)
}

/// The block that the parameter names by hash; the newest where it is missing; `None` for an unknown hash.
fn at<'a>(params: &Params<'_>, index: usize, ledger: &'a Ledger) -> RpcResult<Option<&'a Block>> {
    match argument(params, index)? {
        None | Some(Value::Null) => Ok(Some(ledger.best())),
        Some(_) => {
            let hash = <[u8; 32]>::try_from(bytes(params, index)?).map_err(|_| invalid("a block hash"))?;
            Ok(ledger.by_hash(&hash))
        }
    }
}

fn known(block: Option<&Block>) -> RpcResult<&Block> {
    block.ok_or_else(|| client_error("Unknown block"))
}

fn content(block: &Block) -> RpcResult<&Content> {
    block.content.as_ref().ok_or_else(|| ErrorObjectOwned::owned(STATE_DISCARDED, "State already discarded", None::<()>))
}

/// The parameter at `index`, if there is one.
fn argument(params: &Params<'_>, index: usize) -> RpcResult<Option<Value>> {
    let all: Vec<Value> = if params.len_bytes() == 0 { Vec::new() } else { params.parse()? };
    Ok(all.into_iter().nth(index))
}

fn text(params: &Params<'_>, index: usize) -> RpcResult<String> {
    match argument(params, index)? {
        Some(Value::String(text)) => Ok(text),
        _ => Err(invalid("a string")),
    }
}

fn bytes(params: &Params<'_>, index: usize) -> RpcResult<Vec<u8>> {
    unhex(&text(params, index)?).ok_or_else(|| invalid("hexadecimal bytes"))
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    hex::decode(text.strip_prefix("0x").unwrap_or(text)).ok()
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    format!("0x{}", hex::encode(bytes))
}

fn invalid(expected: &str) -> ErrorObjectOwned {
    ErrorObjectOwned::owned(jsonrpsee::types::error::INVALID_PARAMS_CODE, format!("expected {expected}"), None::<()>)
}

fn client_error(message: &str) -> ErrorObjectOwned {
    ErrorObjectOwned::owned(CLIENT_ERROR, format!("Client error: {message}"), None::<()>)
}

fn refusal(refused: Refused) -> ErrorObjectOwned {
    match refused {
        Refused::Invalid(invalid) => ErrorObjectOwned::owned(POOL_INVALID, "Invalid Transaction", Some(invalid.text())),
        Refused::AlreadyImported => ErrorObjectOwned::owned(POOL_ALREADY_IMPORTED, "Transaction Already Imported", None::<()>),
        Refused::NonceTaken => ErrorObjectOwned::owned(POOL_PRIORITY_TOO_LOW, "Priority is too low", None::<()>),
        Refused::PoolFull => ErrorObjectOwned::owned(POOL_FULL, "Immediately dropped", None::<()>),
    }
}
