//! Sending an extrinsic and following it to a finalized block.

use std::time::Duration;

use protocol::{KeyKind, Signer as _};
use subxt::config::DefaultExtrinsicParamsBuilder;
use subxt::config::substrate::{AccountId32, MultiSignature, SubstrateConfig};
use subxt::error::{BackendError, DispatchError, ExtrinsicError, RpcError, TransactionEventsError};
use subxt::tx::{Payload, TransactionInvalid, TransactionStatus, ValidationResult};
use tokio::time::{Instant, timeout, timeout_at};

use super::connection::Link;
use super::fault::chain_error;
use super::read::{AtBlock, block_ref};
use crate::error::ChainError;
use crate::hotkey::Hotkey;
use crate::types::BlockRef;
use crate::view::Progress;

/// Blocks for which a signed extrinsic stays valid; the official SDK signs weights with the same era.
const ERA_BLOCKS: u64 = 128;
/// JSON-RPC error of a node whose pool refuses an extrinsic as invalid.
const POOL_INVALID: i32 = 1010;
const POOL_CUSTOM_PREFIX: &str = "Custom error: ";

/// How an extrinsic ended that did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The pool's guard refused it with a code of subtensor's own.
    PoolCode(u8),
    /// Another extrinsic of the same account has its nonce.
    Nonce,
    /// Signature or era were not accepted.
    BadProof,
    /// The pool refused it for another reason.
    Pool(String),
    /// It is in a finalized block, and its call failed with this error, named by metadata (`Pallet::Error`).
    Dispatch(String),
    /// It was sent, but what became of it is not known: the connection broke or the time ran out.
    Unknown,
    /// It was never sent.
    NotSent(ChainError),
}

/// A hotkey as subxt's signer.
struct ExtrinsicSigner<'a>(&'a Hotkey);

impl subxt::tx::Signer<SubstrateConfig> for ExtrinsicSigner<'_> {
    fn account_id(&self) -> AccountId32 {
        AccountId32(self.0.key().public)
    }

    fn sign(&self, payload: &[u8]) -> MultiSignature {
        let signature = self.0.sign(payload);
        match self.0.key().kind {
            KeyKind::Ed25519 => MultiSignature::Ed25519(signature),
            KeyKind::Sr25519 => MultiSignature::Sr25519(signature),
        }
    }
}

/// Signs `call`, asks the pool, sends it, and waits until a finalized block contains it and it succeeded there.
pub(super) async fn submit<C: Payload>(
    link: &Link,
    at: &AtBlock,
    hotkey: &Hotkey,
    call: &C,
    call_limit: Duration,
    finality_limit: Duration,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<BlockRef, Failure> {
    let not_sent = |error: ExtrinsicError| Failure::NotSent(chain_error("submit", &link.endpoint, error.into()));
    let late =
        || Failure::NotSent(ChainError::Timeout { endpoint: link.endpoint.clone(), call: "submit", millis: call_limit.as_millis() as u64 });
    let signer = ExtrinsicSigner(hotkey);
    let preparing = async {
        let params = DefaultExtrinsicParamsBuilder::<SubstrateConfig>::new().mortal(ERA_BLOCKS).build();
        let signed = at.transactions().create_signed(call, &signer, params).await?;
        let verdict = signed.validate().await?;
        Ok::<_, ExtrinsicError>((signed, verdict))
    };
    let (signed, verdict) = timeout(call_limit, preparing).await.map_err(|_| late())?.map_err(not_sent)?;
    match verdict {
        ValidationResult::Valid(_) => {}
        ValidationResult::Invalid(reason) => return Err(pool_refusal(reason)),
        ValidationResult::Unknown(reason) => return Err(Failure::Pool(format!("{reason:?}"))),
    }

    progress(Progress::Validated);
    let deadline = Instant::now() + finality_limit;
    let mut statuses = match timeout(call_limit, signed.submit_and_watch()).await {
        Ok(Ok(statuses)) => statuses,
        Ok(Err(ExtrinsicError::ErrorSubmittingTransaction(error))) => return Err(submission_refusal(error)),
        Ok(Err(_)) | Err(_) => return Err(Failure::Unknown),
    };
    progress(Progress::Submitted);
    let included = loop {
        // Statuses that end the stream without finality say what is likely, not what is certain.
        let Ok(Some(Ok(status))) = timeout_at(deadline, statuses.next()).await else { return Err(Failure::Unknown) };
        match status {
            TransactionStatus::InFinalizedBlock(included) => break included,
            TransactionStatus::InBestBlock(included) => {
                if let Ok(Ok(at)) = timeout(call_limit, included.at()).await {
                    progress(Progress::Included(block_ref(&at)));
                }
            }
            TransactionStatus::NoLongerInBestBlock => progress(Progress::Retracted),
            TransactionStatus::Error { .. } | TransactionStatus::Invalid { .. } | TransactionStatus::Dropped { .. } => {
                return Err(Failure::Unknown);
            }
            TransactionStatus::Validated | TransactionStatus::Broadcasted => {}
        }
    };
    match timeout(call_limit, included.wait_for_success()).await {
        Ok(Ok(_)) => {}
        Ok(Err(TransactionEventsError::ExtrinsicFailed(error))) => return Err(Failure::Dispatch(dispatch_name(&error))),
        Ok(Err(_)) | Err(_) => return Err(Failure::Unknown),
    }
    match timeout(call_limit, included.at()).await {
        Ok(Ok(at)) => {
            let block = block_ref(&at);
            progress(Progress::Finalized(block));
            Ok(block)
        }
        _ => Err(Failure::Unknown),
    }
}

fn pool_refusal(reason: TransactionInvalid) -> Failure {
    match reason {
        TransactionInvalid::Custom(code) => Failure::PoolCode(code),
        TransactionInvalid::Future | TransactionInvalid::Stale => Failure::Nonce,
        TransactionInvalid::BadProof | TransactionInvalid::AncientBirthBlock => Failure::BadProof,
        other => Failure::Pool(format!("{other:?}")),
    }
}

/// The node's answer to a submission that its pool refused: validation passed a moment ago, so this is rare.
fn submission_refusal(error: BackendError) -> Failure {
    let BackendError::Rpc(RpcError::ClientError(subxt::rpcs::Error::User(refusal))) = &error else {
        // The connection broke: the node may or may not have the extrinsic.
        return Failure::Unknown;
    };
    let detail: Option<String> = refusal.data.as_ref().and_then(|data| serde_json::from_str(data.get()).ok());
    let custom = detail.as_deref().and_then(|text| text.strip_prefix(POOL_CUSTOM_PREFIX)).and_then(|code| code.parse().ok());
    match (refusal.code, custom) {
        (POOL_INVALID, Some(code)) => Failure::PoolCode(code),
        // 1012 to 1014: temporarily banned, already imported, priority too low against another one with the same nonce.
        (1012..=1014, _) => Failure::Nonce,
        _ => Failure::Pool(format!("{} ({})", refusal.message, detail.unwrap_or_default())),
    }
}

/// `Pallet::Error` of a module error by the live metadata, else the error's own sentence.
fn dispatch_name(error: &DispatchError) -> String {
    match error {
        DispatchError::Module(module) => module.details_string(),
        other => other.to_string(),
    }
}
