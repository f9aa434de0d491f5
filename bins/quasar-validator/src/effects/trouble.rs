//! What keeps an effect from being done, in words for the log. None of it is the audited miner's fault.

use std::io;
use std::path::PathBuf;

use daemon::JournalError;
use model::TrainError;
use storage::bundle::BundleError;
use storage::client::GrantError;
use storage::discovery::DiscoveryError;
use storage::transfer::TransferError;

#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error("there is no valid grant for `{key}`")]
    NoGrant { key: String },
    #[error("`{key}` does not have the digest that was signed for it")]
    Digest { key: String },
    #[error("no audit order was read for this audit")]
    NoOrder,
    #[error("fragment {fragment} version {version} is not known from any merge manifest")]
    UnknownKeyframe { fragment: u16, version: u64 },
    #[error("{key}: {what}")]
    Malformed { key: String, what: String },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the audit's thread has ended")]
    BenchGone,
    #[error(transparent)]
    Grant(#[from] GrantError),
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Transfer(#[from] TransferError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Chain(#[from] chain::ChainError),
}

impl Trouble {
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub fn malformed(key: impl Into<String>, what: impl ToString) -> Self {
        Self::Malformed { key: key.into(), what: what.to_string() }
    }

    /// One line: error texts carry their hint on a line of its own.
    pub fn line(&self) -> String {
        self.to_string().replace('\n', "; ")
    }
}
