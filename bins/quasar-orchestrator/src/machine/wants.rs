//! What the machine wants done.

use protocol::AccountId;
use protocol::Digest;
use protocol::audits::Selection;
use protocol::documents::{Commitment, Contribution, Head, Job, Lease, LeaseEnd, Tape};
use protocol::log::LogHead;

use super::{Retired, Slot, StandingMark, Status};

/// What a sealed bundle is to contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    Read { key: Key },
    WriteOnce { key: Key, length: u64, sha256: Digest },
}

/// Keys that the machine names without spelling them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    Shard(String),
    Payload { slot: Slot, t: u64 },
    Opening { slot: Slot, audit: Digest, part: u8 },
    Receipt { slot: Slot, lease: u64 },
}

/// Something to do.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Poll these slots; `live` ones at the poll interval, the others rarely.
    Watch {
        revision: u64,
        live: Vec<Slot>,
        silent: Vec<Slot>,
    },
    PublishHead {
        head: Box<Head>,
    },
    PublishCurrent,
    PublishJob {
        revision: u64,
        job: Box<Job>,
    },
    PublishStanding {
        revision: u64,
        slot: Slot,
        mark: StandingMark,
        /// Cycles that are merged: a validator publishes scores for this one and those that follow.
        cycle: u64,
    },
    PublishPullGrants {
        revision: u64,
        slot: Slot,
        session_epoch: u64,
        /// The X25519 key to seal to, if there is one.
        recipient: Option<[u8; 32]>,
        wants: Vec<Want>,
    },
    /// Keeps the record that makes this commitment, by its [digest](Commitment::digest).
    StoreCommitment {
        slot: Slot,
        t: u64,
        id: Digest,
        commitment: Digest,
    },
    CheckPayload {
        slot: Slot,
        t: u64,
        commitment: Commitment,
    },
    CheckReceipt {
        slot: Slot,
        lease: Box<Lease>,
        /// Local steps done and head of the step chain, as commitments named them during the lease.
        committed: Vec<(u64, Digest)>,
    },
    WriteTape {
        tape: Box<Tape>,
    },
    Merge {
        tape: Box<Tape>,
        rejected: Vec<Contribution>,
        previous_keyframe: (Digest, u64),
    },
    /// What a cycle's audits are drawn with, written down before anybody is asked.
    ReadBeacon {
        cycle: u64,
        block: u64,
    },
    MakeOpeningKeys {
        audits: Vec<Digest>,
    },
    OrderAudit {
        selection: Box<Selection>,
        /// The X25519 key of its validator, if there is one.
        recipient: Option<[u8; 32]>,
        parts: Vec<(u64, Digest)>,
        leases: Vec<Lease>,
    },
    ReadVerdict {
        audit: Digest,
        validator: AccountId,
    },
    PublishLog {
        head: Box<LogHead>,
    },
    Release {
        versions: Vec<u64>,
        tokens: u64,
    },
    /// Keeps this machine in the bucket, for a successor without its disk.
    StoreSnapshot {
        revision: u64,
        bytes: Vec<u8>,
    },
    /// The next page of the catalog, with these shards; `previous` is the digest of the page before it.
    WritePage {
        page: u32,
        previous: Digest,
        shards: Vec<String>,
    },
    /// Writes down how a lease is booked.
    RecordLeaseEnd {
        end: Box<LeaseEnd>,
    },
    /// Nobody needs these objects any more.
    Retire {
        number: u64,
        retired: Box<Retired>,
    },
    PublishStatus {
        status: Box<Status>,
    },
}
