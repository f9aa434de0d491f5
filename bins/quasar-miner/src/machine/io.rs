//! What goes into a learner's machine and what comes out of it. Tensors, tokens and URLs stay outside: the machine sees
//! keys, versions, digests and lengths.

use protocol::documents::{Head, Job, Lease, Progress, Receipt};
use protocol::steps::Exchange;
use protocol::{Digest, Method};
use serde::{Deserialize, Serialize};

/// A mutable object that the learner looks at again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Look {
    Head,
    Job,
    Standing,
    Pull,
    /// Whether another run is current by now.
    Moved,
}

impl Look {
    pub const ALL: [Self; 5] = [Self::Head, Self::Job, Self::Standing, Self::Pull, Self::Moved];
}

/// A grant without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantInfo {
    pub method: Method,
    pub key: String,
    pub sha256: Option<Digest>,
    pub expires_ms: u64,
}

/// What a look found. Everything is verified already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Found {
    /// Absent, or as at the last look.
    Nothing,
    /// The store did not answer, or what it gave did not verify.
    Failed,
    Head(Box<Head>),
    Job(Box<Job>),
    /// Standing or pull grants, as asked for.
    Grants {
        session_epoch: u64,
        grants: Vec<GrantInfo>,
    },
    Moved(bool),
}

/// Why something was not fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trouble {
    /// The grant is not valid any more, or there is none.
    Grant,
    /// The object is not there (yet).
    Absent,
    /// Network or store; worth trying again.
    Unavailable,
    /// The bytes are not what was promised.
    Corrupt,
    DiskFull,
}

/// How a PUT ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Put {
    Stored,
    /// Write-once and written before: done as well.
    AlreadyThere,
    /// The grant is not valid any more, or there is none.
    Grant,
    /// Refused for good.
    Refused,
    Unavailable,
    /// What was to be sent could not be prepared.
    DiskFull,
}

impl Put {
    pub fn is_done(self) -> bool {
        matches!(self, Self::Stored | Self::AlreadyThere)
    }
}

/// An encoded fragment change, kept outside under its outer step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    pub t: u64,
    pub length: u64,
    pub sha256: Digest,
    pub blake3: Digest,
    /// BLAKE3 of the residual that went into it, where its codec withholds something.
    pub residual: Option<Digest>,
}

/// A prepared part of an opening.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedPart {
    pub part: u8,
    pub length: u64,
    pub sha256: Digest,
}

/// Why an opening was not prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NotPrepared {
    /// The segment is not on this disk any more, or not whole.
    Gone,
    /// Nobody says which payload of it was merged: the store may do so soon.
    Unknown,
    /// The disk or the memory: it may do later.
    Failed,
}

/// Why the trainer could not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// Loss, gradient or payload are not finite; the trainer's state is unchanged.
    NotFinite,
    /// How much is missing and what would fit.
    OutOfMemory(String),
    DiskFull,
    /// Anything else, as text: the learner cannot go on.
    Broken(String),
}

/// A fact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    Tick,
    /// The process is asked to stop.
    Stop,
    Looked {
        at: Look,
        found: Found,
    },
    /// `None`: the chain did not answer.
    Registration {
        registered: Option<bool>,
    },
    ProgressPut(Put),
    /// The base tree is complete on disk.
    BaseFetched(Result<(), Trouble>),
    /// The trainer is open, and whether it went on from a local snapshot; or why it is not.
    TrainerOpened(Result<bool, Fault>),
    KeyframeFetched {
        fragment: u16,
        version: u64,
        result: Result<(), Trouble>,
    },
    TokensFetched {
        lease: u64,
        result: Result<(), Trouble>,
    },
    /// Everything of a boundary that comes before its step is done.
    Prepared {
        number: u64,
        snapshot: Option<Digest>,
        exported: Vec<Exported>,
    },
    /// The boundary's step is done (or it had none).
    Finished {
        number: u64,
        step: Option<StepDone>,
    },
    /// A boundary broke off; nothing after the fault was done.
    Faulted {
        number: u64,
        fault: Fault,
    },
    PayloadPut {
        t: u64,
        put: Put,
    },
    /// The receipt is signed: its length and SHA-256, or `None` where it could not be.
    ReceiptPrepared {
        lease: u64,
        signed: Option<(u64, Digest)>,
    },
    ReceiptPut {
        lease: u64,
        put: Put,
    },
    OpeningPrepared {
        audit: Digest,
        parts: Result<Vec<PreparedPart>, NotPrepared>,
    },
    OpeningPut {
        audit: Digest,
        part: u8,
        put: Put,
    },
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepDone {
    /// Mean loss in micro-nats.
    pub loss: i64,
    pub tokens: u64,
    pub step_ms: u32,
}

/// Something to do. Doing it twice is harmless.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    Look(Look),
    CheckRegistration,
    PutProgress(Box<Progress>),
    /// Bring the base tree to this disk.
    FetchBase,
    /// Open the trainer on the base tree and restore the newest local snapshot.
    OpenTrainer,
    FetchKeyframe {
        fragment: u16,
        version: u64,
        length: u64,
        digest: Digest,
    },
    FetchTokens(Box<Lease>),
    DropTokens {
        lease: u64,
    },
    Boundary(Box<Boundary>),
    PutPayload {
        t: u64,
    },
    DropPayload {
        t: u64,
    },
    PrepareReceipt(Box<Receipt>),
    PutReceipt {
        lease: u64,
    },
    DropReceipt {
        lease: u64,
    },
    /// Seal the parts to the audit's X25519 key.
    PrepareOpening {
        audit: Digest,
        t: u64,
        key: [u8; 32],
    },
    PutOpening {
        audit: Digest,
        part: u8,
    },
    /// All openings that are asked for, with their outer steps: their segments stay, and what was prepared for others goes.
    KeepOpenings {
        /// Counts up: a newer one stands.
        revision: u64,
        asked: Vec<(Digest, u64)>,
    },
}

/// What the trainer does between two steps, and the step after it, in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Boundary {
    pub number: u64,
    /// Go back to the snapshot taken before this local step.
    pub restore: Option<u64>,
    /// Overwrite fragments with received versions.
    pub apply: Vec<(u16, u64)>,
    /// Keep the state: a segment starts here.
    pub snapshot: Option<Snapshot>,
    /// Answer pulls.
    pub export: Vec<Export>,
    pub step: Option<Step>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub local_step: u64,
    pub versions: Vec<u64>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Export {
    pub t: u64,
    pub fragment: u16,
    pub base_version: u64,
    /// The segment that a replay of this payload opens: steps `[start_step, local_step)`.
    pub start_step: u64,
    pub local_step: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub local_step: u64,
    pub lease: u64,
    pub lease_step: u32,
    /// Learning rate of this step.
    pub lr: f64,
    /// Since the step before, this boundary's own included.
    pub exchanged: Vec<Exchange>,
}
