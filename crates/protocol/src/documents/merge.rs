//! Merge tape, merge manifest, fragment manifest and release.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::PPM;
use crate::{AccountId, Digest, FileRecord, Reason};

/// What fixes a merge for ever, written once before anything else of it: whoever holds the lease can complete the step from
/// this, bit for bit.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Tape {
    pub t: u64,
    pub fragment: u16,
    /// Fencing epoch of the writer that decided.
    pub epoch: u64,
    /// Version that the merge starts from; the result is the next one (the same one if nothing was merged).
    pub base_version: u64,
    /// BLAKE3 of the f32 state of the base version.
    pub base_state: Digest,
    /// Chain block known when the merge was decided.
    pub block: u64,
    /// The run ends with this merge of the fragment: what it gives is the average of the learners' weights, by weighted mean and
    /// without outer optimizer.
    pub closing: bool,
    /// Mean norm of the fragment's outer steps so far in units of 1e-6, which limits this one.
    pub step_mean: u64,
    /// The result is the state of this earlier version again: a rollback. Nothing is merged then.
    pub restores: Option<u64>,
    pub inputs: Vec<TapeInput>,
}

/// A contribution that takes part, in the order in which it is summed: by hotkey, then slot.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct TapeInput {
    pub hotkey: AccountId,
    pub slot: u8,
    /// Id of the signed progress envelope that holds the commitment.
    pub commitment: Digest,
    pub payload: Digest,
    pub length: u64,
    pub base_version: u64,
    pub steps: u32,
    /// Tokens that the orchestrator counts, before caps.
    pub tokens: u64,
    /// Final merge weight, in parts per million of the sum.
    pub weight_ppm: u64,
}

impl TapeInput {
    /// As it stands in the merge manifest, before the arithmetic has measured it.
    pub fn contribution(&self, outcome: Reason) -> Contribution {
        Contribution {
            hotkey: self.hotkey,
            slot: self.slot,
            commitment: self.commitment,
            payload: self.payload,
            base_version: self.base_version,
            steps: self.steps,
            tokens: self.tokens,
            weight_ppm: self.weight_ppm,
            norm: 0,
            clip_ppm: PPM as u32,
            cosine_ppm: 0,
            neighbour_ppm: 0,
            rest_ppm: 0,
            outcome,
        }
    }
}

/// The public record of one outer step.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct MergeManifest {
    pub t: u64,
    pub fragment: u16,
    pub base_version: u64,
    /// Equal to `base_version` where nothing was merged or restored.
    pub version: u64,
    pub block: u64,
    /// As in the tape.
    pub closing: bool,
    /// The result is the state of this earlier version again: a rollback.
    pub restores: Option<u64>,
    pub contributions: Vec<Contribution>,
    /// BLAKE3 of the resulting keyframe and of the resulting f32 state.
    pub keyframe: Digest,
    pub state: Digest,
    /// ‖merged pseudo-gradient‖₂ in units of 1e-6, before the limit on outer steps, and the factor of that limit.
    pub step_norm: u64,
    pub step_limit_ppm: u32,
}

impl MergeManifest {
    /// The record of the tape's outer step as long as nothing moves: the version before stands, whose keyframe has this digest.
    pub fn unmoved(tape: &Tape, keyframe: Digest, contributions: Vec<Contribution>) -> Self {
        Self {
            t: tape.t,
            fragment: tape.fragment,
            base_version: tape.base_version,
            version: tape.base_version,
            block: tape.block,
            closing: tape.closing,
            restores: tape.restores,
            contributions,
            keyframe,
            state: tape.base_state,
            step_norm: 0,
            step_limit_ppm: PPM as u32,
        }
    }

    pub fn accepted(&self) -> impl Iterator<Item = &Contribution> {
        self.contributions.iter().filter(|contribution| contribution.outcome == Reason::None)
    }

    /// What is audited: what was merged, and what a filter left out for its looks alone.
    pub fn worked(&self) -> impl Iterator<Item = &Contribution> {
        self.contributions.iter().filter(|contribution| contribution.outcome == Reason::None || contribution.is_suspect())
    }
}

impl Contribution {
    /// Left out because it looks unlike learners' work, not because anything is wrong with it.
    pub fn is_suspect(&self) -> bool {
        matches!(self.outcome, Reason::DirectionOutlier | Reason::TooSimilar)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Contribution {
    pub hotkey: AccountId,
    pub slot: u8,
    pub commitment: Digest,
    pub payload: Digest,
    pub base_version: u64,
    pub steps: u32,
    pub tokens: u64,
    pub weight_ppm: u64,
    /// ‖payload‖₂ in units of 1e-6, and its factor after clipping.
    pub norm: u64,
    pub clip_ppm: u32,
    /// Cosine to the merged direction.
    pub cosine_ppm: i32,
    /// Mean cosine to the nearest other contributions, and cosine to the mean direction of all others; 0 where too few came.
    pub neighbour_ppm: i32,
    pub rest_ppm: i32,
    /// [`Reason::None`] = merged.
    pub outcome: Reason,
}

/// One version of one fragment.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct FragmentManifest {
    pub fragment: u16,
    pub version: u64,
    /// Outer step that made it; `u64::MAX` for version 0.
    pub t: u64,
    /// The keyframe, which is published for some versions only where the run's downlink is int4
    /// ([`crate::schedule::keyframe_version`]).
    pub keyframe: FileRecord,
    /// The frame from the version before, where the downlink has them.
    pub delta: Option<FileRecord>,
    pub state: Digest,
}

/// A checkpoint: every file of the tree.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Release {
    pub release: String,
    /// Fragment versions that it was made from; empty for a tree that was published as it is.
    pub versions: Vec<u64>,
    pub files: Vec<FileRecord>,
    /// Tokens merged into it.
    pub tokens: u64,
}
