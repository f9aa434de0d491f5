//! What keeps writers apart and carries the operator's will: writer lease, orders.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::AccountId;

/// A writer that renews its lease this rarely has lost it.
pub const WRITER_LEASE_MS: u64 = 30_000;

/// Who may write to a run. Moved by compare-and-swap only: the epoch grows with each holder, and whoever waits for the lease to
/// end measures with its own clock that nobody renewed it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct WriterLease {
    /// Fencing epoch: it is in the tape and in the head.
    pub epoch: u64,
    /// The journal that the holder works with.
    #[serde(with = "hex::serde")]
    pub instance: [u8; 16],
    /// Where the holder runs, for people.
    pub host: String,
    /// Counts the renewals.
    pub renewal: u64,
    /// Given back by its holder: nobody has to wait.
    pub released: bool,
}

/// What an operator wants of the running orchestrator. Orders are numbered from 1 and lie in the bucket write-once: whoever holds
/// the writer lease takes them in their order, each once.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Order {
    pub number: u64,
    pub action: Action,
    /// Why, as everybody may read it.
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// No more leases; each fragment is merged once more; release; end.
    Drain,
    /// Every fragment that is beyond `version` gets a new version with the state of that one.
    Rollback {
        version: u64,
    },
    /// A hotkey gets no grants and no rows, and its contributions do not count.
    Ban {
        hotkey: AccountId,
    },
    Unban {
        hotkey: AccountId,
    },
    /// A release of what is merged now.
    Release,
    /// These published training shards join the run, at most [`CATALOG_PAGE_SHARDS`](super::CATALOG_PAGE_SHARDS) of them: the next
    /// page of its catalog.
    AddShards {
        shards: Vec<String>,
    },
}

/// Longest reason of an order, in bytes.
pub const ORDER_REASON_MAX: usize = 1_024;
