//! Audit orders, openings, verdicts and scores.

use std::ops::Range;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::job::Lease;
use super::run::RunParameters;
use crate::envelope::Purpose;
use crate::steps::Exchange;
use crate::{AccountId, Digest, Reason, SealedBytes};

/// What the audits of a cycle are drawn with. All of it is the chain's at `beacon_block`, where a validator reads it for itself; but nodes
/// forget who had a permit, and whoever comes later draws the same.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct AuditDraw {
    pub cycle: u64,
    pub beacon_block: u64,
    /// Hash of the block.
    pub beacon: Digest,
    /// Hotkeys with a validator permit at the block, ascending.
    pub validators: Vec<AccountId>,
}

/// Delivers the grants of one audit to its validator. It selects nothing: the validator derives the selection itself from
/// merge manifests and beacon, and refuses an order that differs.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct AuditOrder {
    pub audit: Digest,
    pub validator: AccountId,
    pub cycle: u64,
    pub hotkey: AccountId,
    pub slot: u8,
    /// The audited contribution.
    pub t: u64,
    pub beacon_block: u64,
    /// Parts of the opening that were uploaded, by number; none if the miner did not open in time.
    pub opening: Vec<OpenedPart>,
    /// The leases that the learner held in that cycle.
    pub leases: Vec<Lease>,
    pub sealed: SealedBytes,
    /// The X25519 secret that the opening's parts are sealed to, sealed to the validator.
    pub opening_key: SealedBytes,
}

/// An uploaded part: the store has enforced both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct OpenedPart {
    pub length: u64,
    pub sha256: Digest,
}

/// Parts of an opening: manifest, state, routes.
pub const OPENING_PARTS: u8 = 3;
/// Largest part of an opening, in bytes for each element of the model: weights and two moments in f32, and room for the rest.
const OPENING_BYTES_PER_ELEMENT: u64 = 16;
const OPENING_BYTES_MIN: u64 = 16 << 20;
/// Volumes that the largest part travels in, before it is sealed.
const OPENING_VOLUMES: u64 = 128;

/// Most expert choices of a token: mixture layers, times experts of each.
const CHOICES_PER_TOKEN_MAX: u64 = 512;

/// Most bytes of an opening's largest part, the state, before it is sealed, for a model of so many elements.
pub fn opening_bytes_max(elements: u64) -> u64 {
    elements.saturating_mul(OPENING_BYTES_PER_ELEMENT).max(OPENING_BYTES_MIN)
}

/// Most bytes of part `part` of an opening for a model of so many elements, as it is uploaded: sealing adds a key, and a tag to each MiB.
pub fn opening_part_bytes_max(part: u8, elements: u64, parameters: &RunParameters) -> u64 {
    let plain = match part {
        0 => Purpose::OpeningManifest.file_limit(),
        1 => opening_bytes_max(elements),
        _ => {
            let tokens = u64::from(parameters.batch_rows) * u64::from(parameters.sequence_length);
            let step = tokens.saturating_mul(2 * CHOICES_PER_TOKEN_MAX).saturating_add(4);
            step.saturating_mul(u64::from(parameters.audit.replay_steps)).min(opening_bytes_max(elements))
        }
    };
    plain.saturating_add((plain >> 15) + 1_024)
}

/// Bytes of the volumes that the parts of an opening travel in, for a model of so many elements. A part is an object each so many bytes: no
/// store takes a large model's state in one request, and a volume that arrived is not sent again.
pub fn opening_volume_bytes(elements: u64) -> u64 {
    opening_bytes_max(elements).div_ceil(OPENING_VOLUMES).max(OPENING_BYTES_MIN)
}

/// The volumes of a part of `length` bytes, in order: number, and which bytes of the part it holds. There is always one.
pub fn opening_volumes(length: u64, volume_bytes: u64) -> impl DoubleEndedIterator<Item = (u16, Range<u64>)> {
    let count = length.div_ceil(volume_bytes).clamp(1, u64::from(u16::MAX));
    (0..count).map(move |number| {
        let start = number * volume_bytes;
        (number as u16, start..length.min(start.saturating_add(volume_bytes)))
    })
}

/// Part 0 of an opening; part 1 is the learner's state at `start_step`, part 2 the expert choices of each step.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct OpeningManifest {
    pub audit: Digest,
    pub t: u64,
    pub start_step: u64,
    /// Fragment versions that the state at `start_step` had applied.
    pub versions: Vec<u64>,
    pub steps: Vec<OpenedStep>,
}

/// One inner step of an opened segment.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct OpenedStep {
    pub local_step: u64,
    pub lease: u64,
    pub lease_step: u32,
    /// In this order, since the step before.
    pub exchanged: Vec<Exchange>,
    pub loss: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerdictResult {
    Pass = 0,
    Mismatch = 1,
    Inconclusive = 2,
    NoOpening = 3,
    NotEvaluated = 4,
}

/// What the validator measured, in fixed point. `i64::MAX` where a test was not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Measurements {
    /// Mean loss on assigned rows without and with the payload, micro-nats.
    pub assigned_before: i64,
    pub assigned_after: i64,
    pub held_out_before: i64,
    pub held_out_after: i64,
    /// ‖claimed − replayed‖ / ‖replayed − start‖ of the audited fragment, parts per million.
    pub replay_error_ppm: i64,
    /// Largest difference between a replayed and a reported loss of a step, micro-nats.
    pub loss_error: i64,
    pub replayed_steps: u32,
}

impl Measurements {
    pub const NONE: Self = Self {
        assigned_before: i64::MAX,
        assigned_after: i64::MAX,
        held_out_before: i64::MAX,
        held_out_after: i64::MAX,
        replay_error_ppm: i64::MAX,
        loss_error: i64::MAX,
        replayed_steps: 0,
    };
}

/// A judgement of one learner-cycle. Of fixed encoded length, because the grants are bound to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Verdict {
    pub audit: Digest,
    pub validator: AccountId,
    pub cycle: u64,
    pub hotkey: AccountId,
    pub slot: u8,
    pub t: u64,
    pub payload: Digest,
    pub result: VerdictResult,
    pub reason: Reason,
    pub measured: Measurements,
}

impl Verdict {
    /// What phase one publishes: BLAKE3 over the verdict and 32 secret random bytes.
    pub fn commitment(&self, salt: &[u8; 32]) -> Digest {
        Digest::derive("quasar/v1/verdict", &[&crate::codec::encode(self), salt])
    }
}

/// Phase one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct VerdictCommit {
    pub audit: Digest,
    pub commitment: Digest,
}

/// Phase two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct VerdictReveal {
    pub verdict: Verdict,
    #[serde(with = "hex::serde")]
    pub salt: [u8; 32],
}

/// Header, payload length and signature of an envelope.
const ENVELOPE_BYTES: usize = 111 + 8 + 64;

/// Length of a commit file: what its grant is bound to.
pub const VERDICT_COMMIT_BYTES: u64 = (ENVELOPE_BYTES + 64) as u64;
/// Length of a reveal file: what its grant is bound to.
pub const VERDICT_REVEAL_BYTES: u64 = (ENVELOPE_BYTES + 235) as u64;

/// Weights that a validator set, and the block at which it read them back from the chain. Of fixed encoded length, because the
/// grant is bound to it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Scores {
    pub validator: AccountId,
    /// Cycles whose merges are in the scores.
    pub epoch: u64,
    pub block: u64,
    /// Largest weights first.
    pub scores: Vec<Score>,
    /// Zeros up to the fixed length.
    #[serde(skip)]
    pub padding: Vec<u8>,
}

/// One hotkey's score and weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Score {
    pub hotkey: AccountId,
    /// Tokens merged without a failing verdict.
    pub tokens: u64,
    pub weight: u16,
}

/// Length of a scores file: what its grant is bound to. A subnet has at most 256 hotkeys.
pub const SCORES_BYTES: u64 = 16 << 10;
const SCORES_MAX: usize = 380;

impl Scores {
    /// Scores by falling weight, padded to the fixed length; what does not fit has the smallest weights.
    pub fn new(validator: AccountId, epoch: u64, block: u64, mut scores: Vec<Score>) -> Self {
        scores.sort_by_key(|score| (std::cmp::Reverse((score.weight, score.tokens)), score.hotkey));
        scores.truncate(SCORES_MAX);
        let mut document = Self { validator, epoch, block, scores, padding: Vec::new() };
        let envelope = ENVELOPE_BYTES + crate::codec::encode(&document).len();
        document.padding = vec![0; (SCORES_BYTES as usize).saturating_sub(envelope)];
        document
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::{Context, RunId, sign};
    use crate::{Ed25519Signer, Signer as _};

    #[test]
    fn a_validators_files_always_have_the_length_that_grants_are_bound_to() {
        let signer = Ed25519Signer::from_seed([1; 32]);
        let context = Context { genesis: [2; 32], netuid: 24, run: RunId([3; 16]) };
        let account = signer.key().account();
        let verdict = Verdict {
            audit: Digest::ZERO,
            validator: account,
            cycle: 1,
            hotkey: account,
            slot: 0,
            t: 1,
            payload: Digest::ZERO,
            result: VerdictResult::Pass,
            reason: Reason::None,
            measured: Measurements::NONE,
        };
        let commit = VerdictCommit { audit: Digest::ZERO, commitment: verdict.commitment(&[4; 32]) };
        assert_eq!(sign(&commit, &context, &signer, 1, 1).len() as u64, VERDICT_COMMIT_BYTES);
        let reveal = VerdictReveal { verdict, salt: [4; 32] };
        assert_eq!(sign(&reveal, &context, &signer, 1, 1).len() as u64, VERDICT_REVEAL_BYTES);
        let score = |weight: u16| Score { hotkey: AccountId([weight as u8; 32]), tokens: u64::from(weight) * 10, weight };
        for count in [0, 1, 256, 2_000] {
            let scores = Scores::new(account, 3, 100, (0..count).map(score).collect());
            assert_eq!(sign(&scores, &context, &signer, 1, 1).len() as u64, SCORES_BYTES);
            assert_eq!(scores.scores.first().map(|score| score.weight), count.checked_sub(1));
        }
    }

    #[test]
    fn the_volumes_of_a_part_hold_each_of_its_bytes_once_and_fit_into_one_request() {
        let all = |length, volume| opening_volumes(length, volume).collect::<Vec<_>>();
        assert_eq!(all(0, 10), [(0, 0..0)]);
        assert_eq!(all(10, 10), [(0, 0..10)]);
        assert_eq!(all(21, 10), [(0, 0..10), (1, 10..20), (2, 20..21)]);
        // The model of the main network, and one whose state is a single volume.
        for (elements, bytes) in [(16_550_000_000, 100_000_000_000), (100_000, 1_200_000)] {
            let volume = opening_volume_bytes(elements);
            let volumes = all(bytes, volume);
            assert!(volume < 5 << 30 && opening_bytes_max(elements).div_ceil(volume) <= OPENING_VOLUMES, "{volume}");
            assert_eq!(volumes.iter().map(|(_, range)| range.end - range.start).sum::<u64>(), bytes);
        }
        assert_eq!(all(1_200_000, opening_volume_bytes(100_000)).len(), 1);
    }
}
