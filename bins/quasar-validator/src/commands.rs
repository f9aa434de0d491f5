//! The small commands beside `run`.

pub mod chain;
pub mod config;
pub mod eval;
pub mod identity;
pub mod inspect;

use std::future::Future;

use ::chain::{ChainError, ChainLink, ConnectSettings};
use daemon::{Failure, Settings};

/// Where the chain is.
pub fn chain_of(settings: &Settings) -> Result<ChainLink, Failure> {
    let network = settings.network()?;
    Ok(ChainLink::new(ConnectSettings { endpoints: network.endpoints, genesis: network.genesis }))
}

/// A failed call of the chain with the exit code that it stands for.
pub fn chain_failure(error: ChainError) -> Failure {
    match error {
        error if error.needs_a_person() => Failure::configuration(error),
        error @ ChainError::NotRegistered { .. } => Failure::try_later(error),
        error => Failure::unavailable(error),
    }
}

/// Runs what a small command has to wait for.
pub fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::unavailable)?.block_on(work)
}
