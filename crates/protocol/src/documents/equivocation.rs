//! Proof that a signer said two things at once.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::{Job, Progress, PullGrants, StandingGrants};
use crate::envelope::{Document, Envelope, EnvelopeError, Purpose, verify_as_stated};
use crate::{AccountId, Digest, codec};

/// Two signed documents of one signer with the same purpose, run, stream and sequence that differ. The finder signs the whole, but
/// needs no trust: both signatures are inside, and the documents themselves say which stream they belong to.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Equivocation {
    /// Where they were read, as the finder says: it proves nothing.
    pub key: String,
    #[serde(with = "hex::serde")]
    pub first: Vec<u8>,
    #[serde(with = "hex::serde")]
    pub second: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoEquivocation {
    #[error("one of the two documents is not validly signed: {0}")]
    Envelope(#[from] EnvelopeError),
    #[error("the two documents are one and the same")]
    Same,
    #[error("the two documents differ in {0}: both may be right")]
    Apart(&'static str),
    #[error("documents of this purpose are written once: their sequences are in no order that two of them could break")]
    WrittenOnce,
    #[error("the payload of one of the two documents is damaged: {0}")]
    Payload(#[from] codec::CodecError),
}

/// What one sequence numbers: documents that replace each other at one key. It is read from what was signed.
///
/// Only such documents have an order that a signer can break. Of those that are written once, many are signed at the same time, and
/// each numbers itself by the clock; so do the contenders for a writer lease, of which the store lets one win.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    /// The only one of its purpose in a run, or outside any.
    Run,
    /// What the orchestrator writes for one slot of a hotkey.
    Slot(AccountId, u8),
    /// The progress record of one session of a slot. Machines with the same hotkey number their records each by itself, and a learner that
    /// was fenced may have signed beside the newer one.
    Session(u8, u64),
}

impl Stream {
    fn of(envelope: &Envelope) -> Result<Self, NoEquivocation> {
        fn payload<D: Document>(envelope: &Envelope) -> Result<D, NoEquivocation> {
            Ok(codec::decode(&envelope.payload, D::PURPOSE.limit())?)
        }
        match Purpose::from_number(envelope.header.purpose) {
            Some(Purpose::CurrentRun | Purpose::Head) => Ok(Self::Run),
            Some(Purpose::Job) => payload::<Job>(envelope).map(|job| Self::Slot(job.hotkey, job.slot)),
            Some(Purpose::StandingGrants) => payload::<StandingGrants>(envelope).map(|grants| Self::Slot(grants.hotkey, grants.slot)),
            Some(Purpose::PullGrants) => payload::<PullGrants>(envelope).map(|grants| Self::Slot(grants.hotkey, grants.slot)),
            Some(Purpose::Progress) => payload::<Progress>(envelope).map(|record| Self::Session(record.slot, record.session_epoch)),
            _ => Err(NoEquivocation::WrittenOnce),
        }
    }
}

impl Equivocation {
    /// Who is convicted, at which sequence, and the ids of both documents.
    ///
    /// # Errors
    /// The two documents do not contradict each other.
    pub fn verify(&self) -> Result<(AccountId, u64, [Digest; 2]), NoEquivocation> {
        let (first, first_id) = verify_as_stated(&self.first)?;
        let (second, second_id) = verify_as_stated(&self.second)?;
        if first_id == second_id {
            return Err(NoEquivocation::Same);
        }
        let streams = [Stream::of(&first)?, Stream::of(&second)?];
        let (first, second) = (first.header, second.header);
        let differs = [
            (first.signer != second.signer, "their signer"),
            (first.purpose != second.purpose, "their purpose"),
            (first.genesis != second.genesis, "their network"),
            (first.netuid != second.netuid, "their subnet"),
            (first.run != second.run, "their run"),
            (streams[0] != streams[1], "the slot or session that they are about"),
            (first.sequence != second.sequence, "their sequence"),
        ];
        match differs.iter().find(|(differs, _)| *differs) {
            Some((_, what)) => Err(NoEquivocation::Apart(what)),
            None => Ok((first.signer.account(), first.sequence, [first_id, second_id])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::documents::{LearnerState, encode_progress};
    use crate::envelope::{Context, RunId, sign};
    use crate::{Ed25519Signer, Reason, SealedBytes, Signer};

    const CONTEXT: Context = Context { genesis: [1; 32], netuid: 24, run: RunId([2; 16]) };

    fn signer() -> Ed25519Signer {
        Ed25519Signer::from_seed([5; 32])
    }

    fn record(slot: u8, session_epoch: u64, loss: i64) -> Vec<u8> {
        let record = Progress {
            worker: "learner".into(),
            session_epoch,
            slot,
            protocol: 1,
            state: LearnerState::Training,
            reason: Reason::None,
            lease: 1,
            lease_step: 1,
            local_step: 1,
            step_ms: 1,
            loss,
            step_chain: Digest::ZERO,
            fragments: Vec::new(),
            commitments: Vec::new(),
            uploaded: Vec::new(),
            openings: Vec::new(),
            receipt: None,
            padding: Vec::new(),
        };
        encode_progress(record, &CONTEXT, &signer(), 7, 1_000)
    }

    fn verify(first: Vec<u8>, second: Vec<u8>) -> Result<(AccountId, u64, [Digest; 2]), NoEquivocation> {
        Equivocation { key: "anything".into(), first, second }.verify()
    }

    #[test]
    fn two_records_of_one_session_with_one_sequence_convict_and_those_of_two_machines_do_not() {
        let (account, sequence, _) = verify(record(0, 9, 1), record(0, 9, 2)).unwrap();
        assert_eq!((account, sequence), (signer().key().account(), 7));
        let apart = NoEquivocation::Apart("the slot or session that they are about");
        // Two machines with one hotkey, each with its own slots and its own counter.
        assert_eq!(verify(record(0, 9, 1), record(2, 9, 2)), Err(apart.clone()));
        // One machine that took over from another.
        assert_eq!(verify(record(0, 9, 1), record(0, 10, 2)), Err(apart));
    }

    #[test]
    fn jobs_and_grants_are_numbered_for_each_slot() {
        let job = |hotkey: u8, slot: u8, session_epoch: u64| {
            let job = Job { hotkey: AccountId([hotkey; 32]), slot, session_epoch, leases: Vec::new() };
            sign(&job, &CONTEXT, &signer(), 7, 1_000)
        };
        assert!(verify(job(1, 0, 1), job(1, 0, 2)).is_ok());
        for other in [job(2, 0, 2), job(1, 1, 2)] {
            assert!(matches!(verify(job(1, 0, 1), other), Err(NoEquivocation::Apart(_))));
        }
        let sealed = |byte: u8| SealedBytes { encapsulated: [byte; 32], ciphertext: Vec::new() };
        let pull = |slot: u8, byte: u8| {
            let grants = PullGrants { hotkey: AccountId([1; 32]), slot, session_epoch: 1, sealed: sealed(byte) };
            sign(&grants, &CONTEXT, &signer(), 7, 1_000)
        };
        assert!(verify(pull(0, 1), pull(0, 2)).is_ok());
        assert!(verify(pull(0, 1), pull(1, 1)).is_err());
    }

    #[test]
    fn documents_that_are_written_once_convict_nobody() {
        // Two manifests that were signed in the same millisecond, as when a run is created.
        let release = |name: &str| {
            let release = crate::documents::Release { release: name.into(), versions: Vec::new(), files: Vec::new(), tokens: 0 };
            sign(&release, &CONTEXT, &signer(), 7, 1_000)
        };
        assert_eq!(verify(release("a"), release("b")), Err(NoEquivocation::WrittenOnce));
    }

    #[test]
    fn the_largest_documents_that_are_numbered_fit_their_proof() {
        let grants = |byte: u8| {
            let mut grants = StandingGrants {
                hotkey: AccountId([1; 32]),
                slot: 0,
                session_epoch: 1,
                sealed: SealedBytes { encapsulated: [byte; 32], ciphertext: Vec::new() },
            };
            grants.sealed.ciphertext = vec![byte; Purpose::StandingGrants.limit() - codec::length(&grants)];
            sign(&grants, &CONTEXT, &signer(), 7, 1_000)
        };
        let key = "k".repeat(crate::paths::KEY_BYTES_MAX);
        let proof = Equivocation { key, first: grants(1), second: grants(2) };
        let file = sign(&proof, &CONTEXT, &signer(), 1, 1_000);
        let opened = crate::envelope::open_stored::<Equivocation>(&file, &CONTEXT, crate::envelope::Expect::Key(&signer().key()));
        assert!(opened.unwrap().document.verify().is_ok());
    }
}
