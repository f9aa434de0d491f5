//! The progress record: exactly 4,096 bytes, overwritten in place by its learner.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::envelope::{self, Context};
use crate::{Digest, Reason, Signer, codec};

/// Length of the file, which the presigned PUT is bound to.
pub const PROGRESS_BYTES: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LearnerState {
    Ready = 0,
    Fetching = 1,
    Training = 2,
    /// Grants have expired and new ones are awaited.
    Renew = 3,
    Draining = 4,
    Faulted = 5,
}

/// A learner's account of itself.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Progress {
    /// For display only.
    pub worker: String,
    /// Start time of the learner in ms: a newer session fences an older one.
    pub session_epoch: u64,
    pub slot: u8,
    pub protocol: u16,
    pub state: LearnerState,
    pub reason: Reason,
    /// Lease being trained and steps done in it.
    pub lease: u64,
    pub lease_step: u32,
    /// Steps since the session started.
    pub local_step: u64,
    /// Time that the last step took.
    pub step_ms: u32,
    /// Mean loss of the last step in micro-nats.
    pub loss: i64,
    pub step_chain: Digest,
    /// By fragment.
    pub fragments: Vec<FragmentProgress>,
    /// At most four, newest last; each stays until its merge manifest is there.
    pub commitments: Vec<Commitment>,
    /// Outer steps whose payload upload is done, at most four.
    pub uploaded: Vec<u64>,
    /// At most four.
    pub openings: Vec<OpeningPart>,
    /// The oldest receipt that is not settled.
    pub receipt: Option<ReceiptOffer>,
    /// Zeros up to the fixed length.
    #[serde(skip)]
    pub padding: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Encode, Decode, Serialize, Deserialize)]
pub struct FragmentProgress {
    pub version: u64,
    /// Steps since that version was applied.
    pub steps: u32,
}

/// A promise about a payload, made before anything is uploaded.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Commitment {
    pub t: u64,
    pub fragment: u16,
    pub base_version: u64,
    pub length: u64,
    pub sha256: Digest,
    pub blake3: Digest,
    /// Steps since `base_version` was applied.
    pub steps: u32,
    pub tokens: u64,
    /// Lease and step in it at the export.
    pub lease: u64,
    pub lease_step: u32,
    /// The learner's local step at the export.
    pub local_step: u64,
    /// Local step and BLAKE3 of the committed state that the last segment before the export starts from: what a replay opens.
    pub start_step: u64,
    pub start_digest: Digest,
    pub step_chain: Digest,
}

impl Commitment {
    /// BLAKE3 of its encoding: two commitments to one payload may still promise different work.
    pub fn digest(&self) -> Digest {
        Digest::blake3(&codec::encode(self))
    }
}

/// A part of an opening that waits for its upload grant.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct OpeningPart {
    pub audit: Digest,
    pub part: u8,
    pub length: u64,
    pub sha256: Digest,
    pub uploaded: bool,
}

/// A receipt that waits for its upload grant, or for its lease to be settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct ReceiptOffer {
    pub lease: u64,
    pub length: u64,
    pub sha256: Digest,
    pub uploaded: bool,
}

/// Most entries in each list of a record.
pub const LIST_MAX: usize = 4;
/// Longest worker name.
pub const WORKER_MAX: usize = 64;
/// Most fragments that fit into a record.
pub const FRAGMENTS_MAX: usize = 64;

impl Progress {
    /// Whether every list is within its bounds and the padding is zero: to be asked of every record from outside.
    pub fn is_well_formed(&self, fragments: usize) -> bool {
        self.worker.len() <= WORKER_MAX
            && self.fragments.len() == fragments
            && self.commitments.len() <= LIST_MAX
            && self.uploaded.len() <= LIST_MAX
            && self.openings.len() <= LIST_MAX
            // Most of a record: in one go, not byte by byte.
            && self.padding.iter().fold(0, |all, byte| all | byte) == 0
    }
}

/// Signs `progress` and pads it to exactly [`PROGRESS_BYTES`]. Lists beyond their bounds are cut to their newest entries.
pub fn encode_progress(mut progress: Progress, context: &Context, signer: &dyn Signer, sequence: u64, now_ms: u64) -> Vec<u8> {
    progress.worker.truncate(progress.worker.floor_char_boundary(WORKER_MAX));
    progress.fragments.truncate(FRAGMENTS_MAX);
    keep_newest(&mut progress.commitments);
    keep_newest(&mut progress.uploaded);
    keep_newest(&mut progress.openings);
    progress.padding.clear();
    let header = envelope::header_for::<Progress>(context, signer.key(), sequence, now_ms);
    let length = envelope::file_length(&header, codec::length(&progress));
    progress.padding = vec![0; PROGRESS_BYTES.saturating_sub(length)];
    envelope::sign_with_header(header, &progress, signer)
}

fn keep_newest<T>(list: &mut Vec<T>) {
    list.drain(..list.len().saturating_sub(LIST_MAX));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ed25519Signer;
    use crate::envelope::{Expect, RunId, open};

    fn full(fragments: usize) -> Progress {
        let commitment = Commitment {
            t: 9,
            fragment: 1,
            base_version: 3,
            length: 5,
            sha256: Digest::ZERO,
            blake3: Digest::ZERO,
            steps: 4,
            tokens: 5,
            lease: 1,
            lease_step: 2,
            local_step: 4,
            start_step: 4,
            start_digest: Digest::ZERO,
            step_chain: Digest::ZERO,
        };
        Progress {
            worker: "w".repeat(200),
            session_epoch: 1,
            slot: 0,
            protocol: 1,
            state: LearnerState::Training,
            reason: Reason::None,
            lease: 1,
            lease_step: 2,
            local_step: 3,
            step_ms: 400,
            loss: 8_000_000,
            step_chain: Digest::ZERO,
            fragments: vec![FragmentProgress::default(); fragments],
            commitments: vec![commitment; 7],
            uploaded: (0..9).collect(),
            openings: vec![OpeningPart { audit: Digest::ZERO, part: 0, length: 1, sha256: Digest::ZERO, uploaded: false }; 6],
            receipt: Some(ReceiptOffer { lease: 1, length: 2, sha256: Digest::ZERO, uploaded: true }),
            padding: vec![1; 3],
        }
    }

    #[test]
    fn the_fullest_record_is_exactly_as_long_as_the_emptiest() {
        let signer = Ed25519Signer::from_seed([1; 32]);
        let context = Context { genesis: [2; 32], netuid: 24, run: RunId([3; 16]) };
        for fragments in [0, 24, FRAGMENTS_MAX] {
            let bytes = encode_progress(full(fragments), &context, &signer, 5, 1_000);
            assert_eq!(bytes.len(), PROGRESS_BYTES);
            let record = open::<Progress>(&bytes, &context, Expect::Key(&signer.key()), 1_000).unwrap().document;
            assert!(record.is_well_formed(fragments));
            assert_eq!(record.uploaded, [5, 6, 7, 8]);
        }
    }
}
