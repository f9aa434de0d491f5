//! The chain that the settings name: how every program reaches it, waits for it, and reports its failures.

use std::future::{Future, pending};

use chain::{ChainError, ChainLink, ConnectSettings, Deadlines, Hotkey, certificate};
use protocol::KeyKind;

use crate::{Exit, Failure, Settings};

/// A failed question with the exit code that it stands for.
impl From<ChainError> for Failure {
    fn from(error: ChainError) -> Self {
        let exit = match &error {
            error if error.needs_a_person() => Exit::Configuration,
            ChainError::NotRegistered { .. } => Exit::TryLater,
            _ => Exit::Unavailable,
        };
        Self::new(exit, error)
    }
}

/// Where the chain is, not connected yet.
///
/// # Errors
/// No network is named, or the file of network `local` is wrong.
pub fn link(settings: &Settings) -> Result<ChainLink, Failure> {
    let network = settings.network()?;
    Ok(ChainLink::new(ConnectSettings { endpoints: network.endpoints, genesis: Some(network.genesis) }, deadlines(settings)))
}

/// How long the chain may take. An answer that takes longer than blocks may is no answer.
pub fn deadlines(settings: &Settings) -> Deadlines {
    Deadlines::default().stalled_after(settings.chain_stall_ms())
}

/// Connects to the chain; ends only where a person must change something.
pub async fn connect(link: &ChainLink) -> Failure {
    match link.connect().await {
        Err(error) => error.into(),
        Ok(()) => pending().await,
    }
}

/// Connects to the chain and publishes the key certificate that an sr25519 hotkey needs, unless nothing may be written. Ends only
/// where a person must change something.
pub async fn attend(link: &ChainLink, hotkey: &Hotkey, netuid: u16, is_dry_run: bool) -> Failure {
    if let Err(error) = link.connect().await {
        return error.into();
    }
    if hotkey.key().kind == KeyKind::Sr25519 && !is_dry_run {
        certificate::publish_when_possible(link, hotkey, netuid).await;
    }
    pending().await
}

/// Runs what a small command has to wait for.
///
/// # Errors
/// Those of `work`.
pub fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::unavailable)?.block_on(work)
}

#[cfg(test)]
mod tests {
    use protocol::AccountId;

    use super::*;

    #[test]
    fn exit_codes_tell_what_a_person_must_change_from_what_passes() {
        let unavailable = ChainError::Unavailable { endpoint: "wss://x".to_owned(), reason: "closed".to_owned() };
        let unregistered = ChainError::NotRegistered { hotkey: AccountId([1; 32]), netuid: 24 };
        for (error, exit) in [
            (ChainError::SubnetMissing { netuid: 24 }, Exit::Configuration),
            (unregistered, Exit::TryLater),
            (unavailable, Exit::Unavailable),
        ] {
            assert_eq!(Failure::from(error).exit, exit);
        }
    }
}
