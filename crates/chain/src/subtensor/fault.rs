//! What an error of subxt means: try again elsewhere, a state that was forgotten, or an answer that this build does not understand.

use subxt::error::{BackendError, ExtrinsicError, OnlineClientAtBlockError, OnlineClientError, RpcError, RuntimeApiError, StorageError};
use subxt::rpcs;

use crate::error::ChainError;

/// Whether an error came from the transport (try again) or from an answer that this build does not understand.
pub(super) fn chain_error(call: &'static str, endpoint: &str, error: subxt::Error) -> ChainError {
    let reason = error.to_string();
    let unavailable = |reason| ChainError::Unavailable { endpoint: endpoint.to_owned(), reason };
    if is_forgotten(&error) {
        // The asker knows the number.
        return ChainError::StateForgotten { number: 0 };
    }
    match refusal(&error) {
        // The node is alive and says no: asking another one the same may still help, asking it again does not.
        Some(_) => unavailable(reason),
        None if is_transport(&error) => unavailable(reason),
        None => ChainError::Answer { call, reason },
    }
}

/// The JSON-RPC error with which a node answered.
pub(super) fn refusal(error: &subxt::Error) -> Option<&rpcs::UserError> {
    fn of_backend(error: &BackendError) -> Option<&rpcs::UserError> {
        match error {
            BackendError::Rpc(RpcError::ClientError(error)) => of_client(error),
            _ => None,
        }
    }
    fn of_client(error: &rpcs::Error) -> Option<&rpcs::UserError> {
        match error {
            rpcs::Error::User(user) => Some(user),
            _ => None,
        }
    }
    use subxt::Error as E;
    match error {
        E::OtherRpcClientError(error) => of_client(error),
        E::BackendError(error) => of_backend(error),
        E::OnlineClientError(OnlineClientError::CannotGetGenesisHash(error)) => of_backend(error),
        E::StorageError(StorageError::CannotFetchValue(error)) => of_backend(error),
        E::RuntimeApiError(RuntimeApiError::CannotCallApi(error)) => of_backend(error),
        E::OnlineClientAtBlockError(
            OnlineClientAtBlockError::CannotGetCurrentBlock { reason }
            | OnlineClientAtBlockError::CannotGetBlockHeader { reason, .. }
            | OnlineClientAtBlockError::CannotGetBlockHash { reason, .. }
            | OnlineClientAtBlockError::CannotGetSpecVersion { reason, .. },
        ) => of_backend(reason),
        _ => None,
    }
}

/// The node pruned the state of the block that was asked about.
fn is_forgotten(error: &subxt::Error) -> bool {
    refusal(error).is_some_and(|refusal| refusal.message.contains("discarded") || refusal.message.contains("UnknownBlock"))
}

fn is_transport(error: &subxt::Error) -> bool {
    use subxt::Error as E;
    match error {
        E::BackendError(_) | E::OtherRpcClientError(_) | E::OnlineClientError(_) => true,
        E::TransactionProgressError(_) | E::TransactionStatusError(_) => true,
        // Metadata that came and cannot be read is not the connection's fault: only the reason tells the two apart.
        E::OnlineClientAtBlockError(OnlineClientAtBlockError::CannotGetMetadata { reason, .. }) => reason.starts_with("Error calling"),
        E::OnlineClientAtBlockError(error) => matches!(
            error,
            OnlineClientAtBlockError::CannotGetCurrentBlock { .. }
                | OnlineClientAtBlockError::CannotGetBlockHeader { .. }
                | OnlineClientAtBlockError::BlockHeaderNotFound { .. }
                | OnlineClientAtBlockError::CannotGetBlockHash { .. }
                | OnlineClientAtBlockError::BlockNotFound { .. }
                | OnlineClientAtBlockError::CannotGetSpecVersion { .. }
        ),
        E::StorageError(error) => {
            matches!(error, StorageError::CannotFetchValue(_) | StorageError::CannotIterateValues(_) | StorageError::StreamFailure(_))
        }
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
    }
}
