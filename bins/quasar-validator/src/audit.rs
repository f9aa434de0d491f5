//! The arithmetic of one audit: what a validator recomputes of a contribution, and what it concludes.
//!
//! Three parts, from cheap to dear: the artifact is what was committed ([`artifact`]); the loss before and after it is added
//! ([`loss`], statistics that fail nobody); the opened segment, trained once more, gives the payload that was uploaded
//! ([`replay`]). Only evidence that the miner signed can fail a miner: whatever goes wrong on our side, in the store or in the
//! orchestrator's records ends as *not evaluated* or *inconclusive*.
//!
//! Nothing here fetches or waits by itself: rows and keyframes come through [`Sources`].

pub mod artifact;
pub mod loss;
pub mod replay;
#[cfg(test)]
pub(crate) mod tests;

use bytes::Bytes;
use model::{Evaluator, TrainError, Trainer};
use protocol::audits::Selection;
use protocol::documents::{Contribution, Lease, Measurements, RunParameters, Verdict, VerdictResult};
use protocol::envelope::Context;
use protocol::{AccountId, Digest, FragmentPlan, Reason, ShardManifest};
use serde::{Deserialize, Serialize};

use loss::Replica;

/// What an audit of one contribution is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    pub selection: Selection,
    pub fragment: u16,
    /// As the merge manifest lists it.
    pub contribution: Contribution,
}

impl Subject {
    /// The verdict that follows from a judgement.
    pub fn verdict(&self, judgement: &Judgement) -> Verdict {
        let Selection { audit, validator, cycle, hotkey, slot, t, .. } = self.selection;
        let payload = self.contribution.payload;
        Verdict {
            audit,
            validator,
            cycle,
            hotkey,
            slot,
            t,
            payload,
            result: judgement.result,
            reason: judgement.reason,
            measured: judgement.measured,
        }
    }
}

/// The files of one audit, fetched and not believed yet.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// The miner's signed progress record that holds the commitment.
    pub commitment: Bytes,
    pub payload: Bytes,
    /// `None` if the miner opened nothing in time.
    pub opening: Option<Opening>,
    /// Leases that the learner held, as the signed audit order lists them.
    pub leases: Vec<Lease>,
    /// Fragment versions of the run as of now, at which the loss test measures.
    pub versions: Vec<u64>,
}

/// The uploaded parts of an opening.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Signed [`protocol::documents::OpeningManifest`].
    pub manifest: Bytes,
    /// [`model::TrainerState`] at the start of the segment; behind it, where the run's codec withholds something, what it had withheld
    /// of the audited fragment, as little-endian f32 and their BLAKE3.
    pub state: Bytes,
    /// Expert choices of each step: a little-endian u32 count, then so many little-endian u16.
    pub routes: Bytes,
}

/// What an audit knows of the run beforehand.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    pub context: &'a Context,
    pub parameters: &'a RunParameters,
    pub plan: &'a FragmentPlan,
    pub plan_digest: Digest,
    pub shards: &'a [ShardManifest],
}

/// A row of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowRef {
    pub shard: String,
    pub row: u64,
}

/// Rows of tokens and absolute fragment values, verified by whoever provides them.
pub trait Sources {
    /// Tokens of `rows`, one after the other, `row_tokens` each.
    fn rows(&self, rows: &[RowRef]) -> Result<Vec<u32>, SourceError>;

    /// The published values of a fragment version, in slice order.
    fn keyframe(&self, fragment: u16, version: u64) -> Result<Vec<f32>, SourceError>;
}

/// Something could not be fetched: never the audited miner's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

/// The outcome of an audit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    pub result: VerdictResult,
    pub reason: Reason,
    pub measured: Measurements,
    /// For the log: what exactly was found.
    pub note: String,
}

impl Judgement {
    /// The audit could not be finished for a reason of our own.
    pub fn not_evaluated(note: impl Into<String>) -> Self {
        Finding::not_evaluated(note).judgement(Measurements::NONE)
    }
}

/// Why an audit ends before its last part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub result: VerdictResult,
    pub reason: Reason,
    pub note: String,
}

impl Finding {
    pub(crate) fn new(result: VerdictResult, reason: Reason, note: impl Into<String>) -> Self {
        Self { result, reason, note: note.into() }
    }

    pub(crate) fn mismatch(reason: Reason, note: impl Into<String>) -> Self {
        Self::new(VerdictResult::Mismatch, reason, note)
    }

    pub(crate) fn not_evaluated(note: impl Into<String>) -> Self {
        Self::new(VerdictResult::NotEvaluated, Reason::NotEvaluated, note)
    }

    fn judgement(self, measured: Measurements) -> Judgement {
        Judgement { result: self.result, reason: self.reason, measured, note: self.note }
    }
}

impl From<SourceError> for Finding {
    fn from(error: SourceError) -> Self {
        Self::not_evaluated(error.0)
    }
}

/// An error of our own trainer or evaluator. What a miner's data can cause is told apart where it is used.
impl From<TrainError> for Finding {
    fn from(error: TrainError) -> Self {
        Self::not_evaluated(error.to_string())
    }
}

/// The models of one validator: weights at head versions for losses, and a trainer for replays. They keep their state from
/// one audit to the next.
pub struct Engine {
    pub replica: Replica,
    pub trainer: Box<dyn Trainer>,
}

impl Engine {
    pub fn new(evaluator: Box<dyn Evaluator>, trainer: Box<dyn Trainer>) -> Self {
        Self { replica: Replica::new(evaluator), trainer }
    }
}

/// What all parts of one audit look at.
#[derive(Clone, Copy)]
pub struct Inquiry<'a> {
    pub subject: &'a Subject,
    pub evidence: &'a Evidence,
    pub rules: &'a Rules<'a>,
    pub sources: &'a dyn Sources,
}

/// Judges one contribution. Never panics on what others wrote.
pub fn judge(inquiry: &Inquiry<'_>, engine: &mut Engine) -> Judgement {
    let mut measured = Measurements::NONE;
    match examine(inquiry, engine, &mut measured) {
        Ok(()) if loss::got_worse(&measured) => Judgement {
            result: VerdictResult::Pass,
            reason: Reason::LossWorse,
            measured,
            note: "the replay agrees; the loss on assigned rows did not fall".into(),
        },
        Ok(()) => Judgement { result: VerdictResult::Pass, reason: Reason::None, measured, note: "the replay agrees".into() },
        Err(finding) => finding.judgement(measured),
    }
}

fn examine(inquiry: &Inquiry<'_>, engine: &mut Engine, measured: &mut Measurements) -> Result<(), Finding> {
    let artifact = artifact::check(inquiry)?;
    let base = inquiry.sources.keyframe(inquiry.subject.fragment, artifact.commitment.base_version)?;
    loss::test(inquiry, &artifact, &base, &mut engine.replica, measured)?;
    let Some(opening) = &inquiry.evidence.opening else {
        return Err(Finding::new(VerdictResult::NoOpening, Reason::NoOpening, "no opening was uploaded in time"));
    };
    replay::test(inquiry, opening, &artifact, &base, engine.trainer.as_mut(), measured)
}

/// The hotkey whose work is audited, for messages.
pub(crate) fn learner(hotkey: &AccountId, slot: u8) -> String {
    format!("{}…/{slot}", hotkey.short())
}
