//! What keeps an effect from being done, in words for the log. None of it is the audited miner's fault.

use std::io;
use std::path::PathBuf;

use daemon::{Exit, JournalError};
use model::TrainError;
use storage::bundle::BundleError;
use storage::client::GrantError;
use storage::discovery::DiscoveryError;
use storage::transfer::TransferError;

#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error("there is no valid grant for `{key}`")]
    NoGrant { key: String },
    #[error("the audit order's grant for `{key}` has expired, and there is one order only")]
    OrderExpired { key: String },
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

    /// Whether what was read is not what it should be, and stays so: an object that is written once.
    pub fn is_in_the_object(&self) -> bool {
        matches!(self, Self::Malformed { .. } | Self::Discovery(DiscoveryError::Envelope { .. }))
    }

    /// Whether it passes without anybody's help: the store, a grant, the network, the disk. What cannot be told passes.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::NoGrant { .. } | Self::Io { .. } => true,
            Self::Grant(error) => {
                matches!(error, GrantError::Expired { .. } | GrantError::Absent { .. } | GrantError::Unavailable { .. })
            }
            Self::Transfer(error) => {
                !matches!(error, TransferError::BadRecord { .. } | TransferError::Corrupt { .. } | TransferError::Refused { .. })
            }
            Self::Discovery(error) => !error.is_final(),
            Self::Journal(error) => error.exit() == Exit::Unavailable,
            Self::Chain(error) => !error.needs_a_person(),
            Self::OrderExpired { .. }
            | Self::Digest { .. }
            | Self::NoOrder
            | Self::UnknownKeyframe { .. }
            | Self::Malformed { .. }
            | Self::BenchGone
            | Self::Bundle(_)
            | Self::Train(_) => false,
        }
    }

    /// Whether the disk is at fault: full, or worse.
    pub fn is_of_disk(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Transfer(TransferError::DiskFull { .. } | TransferError::Io { .. }))
    }

    /// One line: error texts carry their hint on a line of its own.
    pub fn line(&self) -> String {
        self.to_string().replace('\n', "; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_or_time_mend_passes_and_what_is_ours_for_good_does_not() {
        let (key, path) = (|| "k".to_owned(), || "p".to_owned());
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        for trouble in [
            Trouble::NoGrant { key: key() },
            GrantError::Unavailable { key: key(), reason: "timed out" }.into(),
            GrantError::Expired { key: key() }.into(),
            GrantError::Absent { key: key() }.into(),
            TransferError::Unavailable { path: path(), reason: "timed out".into() }.into(),
            TransferError::Expired { path: path() }.into(),
            DiscoveryError::Store(storage::StoreError::Unavailable { key: key(), reason: "timed out".into() }).into(),
            JournalError::DiskFull { path: path().into() }.into(),
            Trouble::io("p")(full()),
            TransferError::DiskFull { path: path().into() }.into(),
        ] {
            assert!(trouble.is_passing(), "{trouble:?}");
        }
        for trouble in [
            Trouble::OrderExpired { key: key() },
            Trouble::Digest { key: key() },
            Trouble::UnknownKeyframe { fragment: 1, version: 2 },
            Trouble::malformed("k", "damaged"),
            Trouble::BenchGone,
            GrantError::Refused { key: key(), status: 400 }.into(),
            TransferError::Corrupt { path: path(), chunk: 0 }.into(),
            TrainError::Checkpoint("not here".into()).into(),
        ] {
            assert!(!trouble.is_passing(), "{trouble:?}");
        }
    }

    #[test]
    fn a_full_disk_is_told_from_a_store_that_is_away() {
        assert!(Trouble::io("p")(io::Error::from(io::ErrorKind::StorageFull)).is_of_disk());
        assert!(Trouble::from(TransferError::DiskFull { path: "p".into() }).is_of_disk());
        assert!(!Trouble::from(GrantError::Unavailable { key: "k".into(), reason: "timed out" }).is_of_disk());
    }
}
