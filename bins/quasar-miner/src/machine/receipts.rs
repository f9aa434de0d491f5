//! Receipts: while a lease is trained, what its steps were; when it is used up, the signed account of them is handed in.
//!
//! One receipt at a time, oldest first: a progress record has room for one. It stays in the record until the job does not name its
//! lease any more, so that the orchestrator cannot miss it.

use std::collections::VecDeque;

use protocol::Digest;
use protocol::documents::{Job, ReceiptOffer, ReceiptStep};

use super::io::Put;

/// Receipts that wait at most; an older one is given up, and commitments stand for its rows.
const WAITING_MAX: usize = 8;
/// Pause before an upload is tried again.
const RETRY_MS: u64 = 1_000;

/// The lease that is being trained.
#[derive(Clone, Debug)]
struct Open {
    lease: u64,
    chain: Digest,
    steps: Vec<ReceiptStep>,
}

#[derive(Clone, Debug, PartialEq)]
struct Waiting {
    lease: u64,
    /// Length and SHA-256, once it is signed.
    signed: Option<(u64, Digest)>,
    upload: Upload,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Upload {
    Due { not_before_ms: u64 },
    UnderWay,
    Done,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Receipts {
    open: Option<Open>,
    waiting: VecDeque<Waiting>,
}

impl Receipts {
    /// A step of `lease` is done; `chain` is the head of the step chain before it.
    pub(super) fn stepped(&mut self, lease: u64, chain: Digest, step: ReceiptStep) {
        match &mut self.open {
            Some(open) if open.lease == lease => open.steps.push(step),
            open => *open = Some(Open { lease, chain, steps: vec![step] }),
        }
    }

    /// The lease is used up: gives the head of the chain before it and its steps, from which its receipt is made.
    pub(super) fn finish(&mut self, lease: u64) -> Option<(Digest, Vec<ReceiptStep>)> {
        let open = self.open.take_if(|open| open.lease == lease)?;
        self.waiting.push_back(Waiting { lease, signed: None, upload: Upload::Due { not_before_ms: 0 } });
        Some((open.chain, open.steps))
    }

    pub(super) fn prepared(&mut self, lease: u64, signed: Option<(u64, Digest)>) {
        match signed {
            Some(_) => {
                if let Some(receipt) = self.waiting.iter_mut().find(|receipt| receipt.lease == lease) {
                    receipt.signed = signed;
                }
            }
            None => self.waiting.retain(|receipt| receipt.lease != lease),
        }
    }

    /// Forgets what the job does not ask for any more; gives the leases.
    pub(super) fn settle(&mut self, job: &Job) -> Vec<u64> {
        let excess = self.waiting.len().saturating_sub(WAITING_MAX);
        let mut gone = Vec::new();
        let mut index = 0;
        self.waiting.retain(|receipt| {
            let stays = index >= excess && job.leases.iter().any(|lease| lease.id == receipt.lease);
            index += 1;
            if !stays {
                gone.push(receipt.lease);
            }
            stays
        });
        gone
    }

    fn current(&self) -> Option<(&Waiting, u64, Digest)> {
        let receipt = self.waiting.front()?;
        receipt.signed.map(|(length, sha256)| (receipt, length, sha256))
    }

    /// The receipt to upload now: lease and SHA-256.
    pub(super) fn waiting(&self, now_ms: u64) -> Option<(u64, Digest)> {
        let (receipt, _, sha256) = self.current()?;
        matches!(receipt.upload, Upload::Due { not_before_ms } if not_before_ms <= now_ms).then_some((receipt.lease, sha256))
    }

    pub(super) fn awaits_upload(&self) -> bool {
        self.current().is_some_and(|(receipt, _, _)| receipt.upload != Upload::Done)
    }

    fn set_upload(&mut self, lease: u64, upload: Upload) {
        if let Some(receipt) = self.waiting.iter_mut().find(|receipt| receipt.lease == lease) {
            receipt.upload = upload;
        }
    }

    pub(super) fn uploading(&mut self, lease: u64) {
        self.set_upload(lease, Upload::UnderWay);
    }

    pub(super) fn uploaded(&mut self, lease: u64, put: Put, now_ms: u64) {
        self.set_upload(lease, if put.is_done() { Upload::Done } else { Upload::Due { not_before_ms: now_ms + RETRY_MS } });
    }

    pub(super) fn record(&self) -> Option<ReceiptOffer> {
        let (receipt, length, sha256) = self.current()?;
        Some(ReceiptOffer { lease: receipt.lease, length, sha256, uploaded: receipt.upload == Upload::Done })
    }

    pub(super) fn deadline(&self, now_ms: u64) -> Option<u64> {
        match self.current()?.0.upload {
            Upload::Due { not_before_ms } if not_before_ms > now_ms => Some(not_before_ms),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use protocol::AccountId;
    use protocol::documents::Lease;

    use super::*;

    fn step(n: u32) -> ReceiptStep {
        ReceiptStep { local_step: u64::from(n), lease_step: n, exchanged: vec![], loss: 5, state: None }
    }

    fn job(leases: &[u64]) -> Job {
        let lease =
            |id: &u64| Lease { id: *id, rows: vec![], seed: Digest::ZERO, batch_rows: 1, steps: 2, schedule_start: 0, deadline_ms: 9 };
        Job { hotkey: AccountId([1; 32]), slot: 0, session_epoch: 1, leases: leases.iter().map(lease).collect() }
    }

    #[test]
    fn receipts_are_handed_in_one_after_the_other_until_the_job_lets_go_of_them() {
        let mut receipts = Receipts::default();
        let sha256 = |lease: u64| Digest::blake3(&lease.to_le_bytes());
        for lease in [1, 2] {
            receipts.stepped(lease, Digest::ZERO, step(0));
            receipts.stepped(lease, Digest::blake3(b"later"), step(1));
            assert_eq!(receipts.finish(lease), Some((Digest::ZERO, vec![step(0), step(1)])));
            assert_eq!(receipts.finish(lease), None);
        }
        assert_eq!((receipts.record(), receipts.waiting(0)), (None, None), "nothing is signed yet");
        receipts.prepared(1, Some((100, sha256(1))));
        receipts.prepared(2, Some((200, sha256(2))));
        assert_eq!(receipts.waiting(0), Some((1, sha256(1))));
        receipts.uploading(1);
        assert!(receipts.waiting(0).is_none() && receipts.awaits_upload());
        receipts.uploaded(1, Put::Unavailable, 0);
        assert_eq!((receipts.waiting(0), receipts.deadline(0)), (None, Some(RETRY_MS)));
        receipts.uploaded(1, Put::AlreadyThere, 0);
        assert!(receipts.record().is_some_and(|offer| offer.uploaded && offer.lease == 1));
        assert!(receipts.settle(&job(&[1, 2, 3])).is_empty());
        assert_eq!(receipts.settle(&job(&[2, 3])), [1]);
        assert_eq!(receipts.waiting(0), Some((2, sha256(2))));
    }

    #[test]
    fn a_receipt_that_cannot_be_signed_or_is_too_old_gives_way() {
        let mut receipts = Receipts::default();
        let leases: Vec<u64> = (1..=WAITING_MAX as u64 + 2).collect();
        for lease in &leases {
            receipts.stepped(*lease, Digest::ZERO, step(0));
            receipts.finish(*lease);
        }
        receipts.prepared(1, None);
        assert_eq!(receipts.settle(&job(&leases)), [2]);
    }
}
