//! The signed documents. Each holds fixed-point integers instead of floats (losses in micro-nats, rates in parts per million)
//! and sorted lists instead of maps.

use crate::envelope::{Document, Purpose};
use crate::log::LogHead;
use crate::plan::FragmentPlan;
use crate::shards::ShardManifest;

mod audit;
mod equivocation;
mod head;
mod job;
mod merge;
mod progress;
mod receipt;
mod run;
mod writer;

pub use audit::{
    AuditDraw, AuditOrder, Measurements, OPENING_PARTS, OpenedPart, OpenedStep, OpeningManifest, SCORES_BYTES, Score, Scores,
    VERDICT_COMMIT_BYTES, VERDICT_REVEAL_BYTES, Verdict, VerdictCommit, VerdictResult, VerdictReveal, opening_bytes_max,
    opening_part_bytes_max, opening_volume_bytes, opening_volumes,
};
pub use equivocation::{Equivocation, NoEquivocation};
pub use head::{FragmentHead, Head, Notice, Pull, ReleaseRef, RunState};
pub use job::{Job, Lease, LeaseEnd, PullGrants, RowRange, StandingGrants};
pub use merge::{Contribution, FragmentManifest, MergeManifest, Release, Tape, TapeInput};
pub use progress::{
    Commitment, FRAGMENTS_MAX, FragmentProgress, LearnerState, OpeningPart, PROGRESS_BYTES, Progress, ReceiptOffer, encode_progress,
};
pub use receipt::{LEASE_STEPS_MAX, Receipt, ReceiptFault, ReceiptStep};
pub use run::{
    AuditParameters, Bounds, CATALOG_PAGE_SHARDS, CatalogPage, CatalogRef, Codec, CurrentRun, InnerOptimizer, LrSchedule, RENEWALS_PER_TTL,
    RunManifest, RunParameters, RunRoot, TrainingOptions,
};
pub use writer::{Action, ORDER_REASON_MAX, Order, WRITER_LEASE_MS, WriterLease};

macro_rules! document {
    ($($type:ty => $purpose:ident),* $(,)?) => {
        $(impl Document for $type { const PURPOSE: Purpose = Purpose::$purpose; })*
    };
}

document! {
    RunRoot => RunRoot,
    CurrentRun => CurrentRun,
    RunManifest => RunManifest,
    Head => Head,
    FragmentPlan => Plan,
    CatalogPage => CatalogPage,
    Job => Job,
    StandingGrants => StandingGrants,
    PullGrants => PullGrants,
    Progress => Progress,
    Receipt => Receipt,
    OpeningManifest => OpeningManifest,
    FragmentManifest => FragmentManifest,
    MergeManifest => MergeManifest,
    Release => Release,
    LogHead => LogHead,
    AuditOrder => AuditOrder,
    VerdictCommit => VerdictCommit,
    VerdictReveal => VerdictReveal,
    Scores => Scores,
    ShardManifest => ShardManifest,
    Tape => Tape,
    WriterLease => WriterLease,
    Order => Order,
    Equivocation => Equivocation,
    LeaseEnd => LeaseEnd,
    AuditDraw => AuditDraw,
}

/// JSON of a payload of any purpose, for `inspect`.
pub fn payload_json(purpose: Purpose, payload: &[u8]) -> Result<serde_json::Value, crate::codec::CodecError> {
    fn json<D: Document>(payload: &[u8]) -> Result<serde_json::Value, crate::codec::CodecError> {
        let document: D = crate::codec::decode(payload, D::PURPOSE.limit())?;
        serde_json::to_value(&document).map_err(|error| crate::codec::CodecError::Malformed(error.to_string()))
    }
    match purpose {
        Purpose::RunRoot => json::<RunRoot>(payload),
        Purpose::CurrentRun => json::<CurrentRun>(payload),
        Purpose::RunManifest => json::<RunManifest>(payload),
        Purpose::Head => json::<Head>(payload),
        Purpose::Plan => json::<FragmentPlan>(payload),
        Purpose::CatalogPage => json::<CatalogPage>(payload),
        Purpose::Job => json::<Job>(payload),
        Purpose::StandingGrants => json::<StandingGrants>(payload),
        Purpose::PullGrants => json::<PullGrants>(payload),
        Purpose::Progress => json::<Progress>(payload),
        Purpose::Receipt => json::<Receipt>(payload),
        Purpose::OpeningManifest => json::<OpeningManifest>(payload),
        Purpose::FragmentManifest => json::<FragmentManifest>(payload),
        Purpose::MergeManifest => json::<MergeManifest>(payload),
        Purpose::Release => json::<Release>(payload),
        Purpose::LogHead => json::<LogHead>(payload),
        Purpose::AuditOrder => json::<AuditOrder>(payload),
        Purpose::VerdictCommit => json::<VerdictCommit>(payload),
        Purpose::VerdictReveal => json::<VerdictReveal>(payload),
        Purpose::Scores => json::<Scores>(payload),
        Purpose::ShardManifest => json::<ShardManifest>(payload),
        Purpose::Tape => json::<Tape>(payload),
        Purpose::WriterLease => json::<WriterLease>(payload),
        Purpose::Order => json::<Order>(payload),
        Purpose::Equivocation => json::<Equivocation>(payload),
        Purpose::LeaseEnd => json::<LeaseEnd>(payload),
        Purpose::AuditDraw => json::<AuditDraw>(payload),
    }
}

/// One part per million.
pub const PPM: u64 = 1_000_000;

/// Natural logarithm units to micro-nats, saturating; not-a-number becomes the largest value.
pub fn micro_nats(loss: f64) -> i64 {
    if loss.is_nan() { i64::MAX } else { (loss * 1e6).round() as i64 }
}
