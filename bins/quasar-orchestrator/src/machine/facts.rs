//! What the machine is told: its run, and the inputs.

use protocol::documents::{
    AuditDraw, CatalogPage, CatalogRef, Commitment, Head, Job, LeaseEnd, MergeManifest, Order, Progress, ReleaseRef, RunParameters, Tape,
    VerdictResult,
};
use protocol::envelope::{EnvelopeError, RunId, Verified};
use protocol::log::LogHead;
use protocol::{AccountId, Digest, Reason, ShardManifest};
use serde::{Deserialize, Serialize};

/// A slot of a hotkey.
pub type Slot = (AccountId, u8);

/// A registered hotkey.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    pub hotkey: AccountId,
    pub validator: bool,
    /// The X25519 key that its grants are sealed to; `None` where it needs a key certificate first.
    pub recipient: Option<[u8; 32]>,
}

/// What the machine has to know about its run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunSetup {
    pub run: RunId,
    pub parameters: RunParameters,
    pub release: ReleaseRef,
    pub fragments: Vec<FragmentSetup>,
    /// The newest page of the catalog that the run begins with, and the shards to train on of all its pages.
    pub catalog: CatalogRef,
    pub shards: Vec<ShardRows>,
}

/// A shard to train on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRows {
    pub id: String,
    pub source: String,
    pub rows: u64,
    pub row_tokens: u32,
}

impl ShardRows {
    /// The shards of `all` that are trained on.
    pub fn of(all: &[ShardManifest]) -> Vec<Self> {
        let trained = all.iter().filter(|shard| !shard.held_out);
        let rows_of = |shard: &ShardManifest| Self {
            id: shard.id.clone(),
            source: shard.source.clone(),
            rows: shard.rows,
            row_tokens: shard.row_tokens,
        };
        trained.map(rows_of).collect()
    }
}

/// A page of the catalog that lies in the bucket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredPage {
    pub reference: CatalogRef,
    pub shards: Vec<ShardRows>,
}

impl StoredPage {
    /// `file`: the digest of the page's file.
    pub fn new(file: Digest, page: &CatalogPage) -> Self {
        Self { reference: CatalogRef { page: page.page, digest: file }, shards: ShardRows::of(&page.shards) }
    }
}

/// What lies at the key of an order: the order, or why it is none.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredOrder {
    pub number: u64,
    pub order: Result<Order, String>,
}

impl StoredOrder {
    pub fn new(number: u64, opened: Result<Verified<Order>, EnvelopeError>) -> Self {
        let order = opened.map_err(|error| error.to_string()).and_then(|verified| match verified.document {
            order if order.number == number => Ok(order),
            order => Err(format!("it is order {}", order.number)),
        });
        Self { number, order }
    }
}

/// A fragment at the start of the run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FragmentSetup {
    pub keyframe: Digest,
    pub keyframe_length: u64,
    pub state: Digest,
    pub elements: u64,
    /// Bytes of an encoded payload.
    pub payload_length: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fragment {
    pub version: u64,
    pub keyframe: Digest,
    pub keyframe_length: u64,
    pub state: Digest,
    pub payload_length: u64,
    /// When this version came into being.
    pub published_ms: u64,
    /// Mean norm of its outer steps, in units of 1e-6.
    pub step_mean: u64,
    /// Payloads against older versions do not count: a rollback took those back.
    pub base_min: u64,
    /// Objects of older versions are deleted.
    pub kept_from: u64,
    /// A predecessor may have deleted older ones.
    pub sure_from: u64,
}

/// A fact.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Input {
    /// A process begins to run this machine; it holds the writer lease with this epoch.
    Claimed {
        epoch: u64,
    },
    /// As [`Input::Claimed`], by a process without the journal of its predecessor: what the bucket holds beyond the snapshot
    /// that this machine was read from.
    Recovered {
        facts: Box<BucketFacts>,
    },
    Tick,
    Block {
        number: u64,
    },
    Metagraph {
        guests: Vec<Guest>,
    },
    /// A verified progress record; `id` is that of its envelope.
    Progress {
        slot: Slot,
        id: Digest,
        /// Whether it was signed just now, by the clock of this machine.
        is_current: bool,
        record: Box<Progress>,
    },
    /// The commitment of `slot` for outer step `t` lies write-once in the bucket, in the envelope `id`.
    CommitmentStored {
        slot: Slot,
        t: u64,
        id: Digest,
        /// Digest of the commitment that is kept.
        commitment: Digest,
    },
    /// In the bucket lies the commitment that an earlier session of the learner made for the same outer step: no other one can
    /// be evidence.
    CommitmentRefused {
        slot: Slot,
        t: u64,
        /// Digest of the commitment that is refused.
        commitment: Digest,
    },
    /// Static checks of an upload ended; [`Reason::None`] = passed.
    PayloadChecked {
        slot: Slot,
        t: u64,
        outcome: Reason,
    },
    /// The tape as it lies in the bucket, which may be one that an earlier process wrote.
    TapeWritten {
        tape: Box<Tape>,
    },
    /// `id` is that of the manifest's envelope.
    Merged {
        manifest: Box<MergeManifest>,
        id: Digest,
        keyframe_length: u64,
    },
    /// The receipt of a lease was read and checked: its envelope's id and the steps that were trained.
    ReceiptChecked {
        slot: Slot,
        lease: u64,
        outcome: Result<(Digest, Vec<u32>), Reason>,
    },
    /// How a lease is booked lies in the bucket, as this process or an earlier one decided.
    LeaseEnded {
        end: Box<LeaseEnd>,
    },
    HeadPublished,
    /// The bucket holds the snapshot of this revision.
    SnapshotStored {
        revision: u64,
    },
    /// As it lies in the bucket, which may be what an earlier process wrote.
    Beacon {
        draw: Box<AuditDraw>,
    },
    /// Public keys that openings are sealed to.
    OpeningKeys {
        keys: Vec<(Digest, [u8; 32])>,
    },
    AuditOrdered {
        audit: Digest,
    },
    /// The revealed verdict of an ordered audit with the id of its envelope; `None` = not there yet.
    Verdict {
        audit: Digest,
        verdict: Option<(Digest, VerdictResult)>,
    },
    /// The log head that was asked for lies in the bucket.
    LogPublished,
    /// An earlier process wrote another log head there, which stands.
    LogTaken {
        head: Box<LogHead>,
    },
    Released {
        release: ReleaseRef,
    },
    /// The operator's next order.
    Order {
        order: StoredOrder,
    },
    /// The objects that nobody needs any more are gone.
    RetiredAll {
        number: u64,
    },
    /// The page that was asked for, as it lies in the bucket; or why there is none.
    PageWritten {
        page: u32,
        outcome: Result<StoredPage, String>,
    },
}

/// What a successor reads in the bucket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BucketFacts {
    /// Of the writer that goes on.
    pub epoch: u64,
    pub head: Head,
    /// Commitments to outer steps that are not merged.
    pub commitments: Vec<StoredCommitment>,
    /// Outer steps with a tape, from the first that the snapshot has not closed, by t.
    pub steps: Vec<StepFact>,
    /// Catalog pages written since the snapshot, in their order.
    pub pages: Vec<StoredPage>,
    /// Leases given out since the snapshot, each as a job of one lease.
    pub leases: Vec<Job>,
    /// How leases ended that the snapshot holds open, or that were given out since.
    pub lease_ends: Vec<LeaseEnd>,
    /// Orders that the snapshot has not taken, in their order.
    pub orders: Vec<StoredOrder>,
    /// Log heads published since the snapshot, oldest first.
    pub log: Vec<LogHead>,
}

/// A commitment that lies write-once in the bucket: its learner was granted the upload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredCommitment {
    pub slot: Slot,
    /// Id of the record's envelope.
    pub id: Digest,
    pub commitment: Commitment,
}

/// How far an outer step got.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum StepFact {
    Taped(Tape),
    Merged { tape: Tape, manifest: Box<MergeManifest>, id: Digest, keyframe_length: u64 },
}

impl StepFact {
    pub fn tape(&self) -> &Tape {
        match self {
            Self::Taped(tape) | Self::Merged { tape, .. } => tape,
        }
    }
}
