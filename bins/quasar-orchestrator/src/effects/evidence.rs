//! Evidence that must outlive its writer: write-once copies of commitments, receipts of leases, revealed verdicts.

use bytes::Bytes;
use protocol::documents::{Lease, Progress, Receipt, VerdictResult, VerdictReveal};
use protocol::envelope::{Document, Expect, Purpose, open_stored};
use protocol::{AccountId, Digest, Reason};
use storage::StoreError;

use super::{Service, persist};
use crate::machine::Slot;

impl Service {
    /// Copies the signed progress envelope that makes this commitment, and gives the id of the copy; a reason if there is a copy already, of
    /// another commitment, or none and the learner has exchanged its commitment. `None` if it has overwritten the record
    /// meanwhile without any.
    pub(super) async fn store_commitment(&self, slot: Slot, t: u64, id: Digest, commitment: Digest) -> Option<Result<Digest, Reason>> {
        let key = self.run.commitment(&slot.0, slot.1, t);
        let limit = Purpose::Progress.file_limit();
        let known = self.records.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get(&slot).cloned();
        let bytes = match known {
            Some((newest, bytes)) if newest == id => bytes,
            _ => self.get_present(&self.run.progress(&slot.0, slot.1), limit).await?,
        };
        let open = |bytes: &Bytes| open_stored::<Progress>(bytes, &self.context, Expect::Account(&slot.0)).ok();
        let record = open(&bytes)?;
        let committed = record.document.commitments.iter().find(|commitment| commitment.t == t)?.digest();
        // A record that was read again after a restart may commit to something else by now. It is evidence of nothing that was taken in; only
        // what was kept before can be.
        let stored = if committed == commitment {
            Some(persist(&key, || self.put_bytes_once(&key, bytes.clone())).await)
        } else {
            self.get_present(&key, limit).await
        };
        let holds = |record: &Progress| record.commitments.iter().any(|one| one.t == t && one.digest() == commitment);
        Some(match stored.as_ref().and_then(open) {
            Some(evidence) if holds(&evidence.document) => Ok(evidence.id),
            _ => Err(Reason::RepeatedCommitment),
        })
    }

    /// Reads the uploaded receipt of a lease and checks it against the lease and the commitments made during it. Gives its id and
    /// the steps that it shows.
    pub(super) async fn check_receipt(&self, slot: Slot, lease: &Lease, committed: &[(u64, Digest)]) -> Result<(Digest, Vec<u32>), Reason> {
        let key = self.run.receipt(&slot.0, slot.1, lease.id);
        let limit = Receipt::PURPOSE.file_limit();
        let bytes = self.get_present(&key, limit).await.ok_or(Reason::NotUploaded)?;
        let refuse = |why: &dyn std::fmt::Display| {
            tracing::warn!(hotkey = %slot.0.short(), slot = slot.1, lease = lease.id, "receipt refused: {why}");
            Reason::ReceiptMismatch
        };
        let receipt = open_stored::<Receipt>(&bytes, &self.context, Expect::Account(&slot.0)).map_err(|error| refuse(&error))?;
        receipt.document.check(&slot.0, slot.1, lease, committed).map_err(|fault| refuse(&fault))?;
        Ok((receipt.id, receipt.document.steps.iter().map(|step| step.lease_step).collect()))
    }

    /// The revealed verdict of an audit with the id of its envelope, if it is there.
    pub(super) async fn read_verdict(&self, audit: &Digest, validator: &AccountId) -> Option<(Digest, VerdictResult)> {
        let key = self.run.verdict_reveal(validator, audit);
        let bytes = match self.store.get(&key, VerdictReveal::PURPOSE.file_limit()).await {
            Ok(object) => object.bytes,
            Err(StoreError::NotFound { .. }) => return None,
            Err(error) => {
                tracing::debug!("{error}");
                return None;
            }
        };
        match open_stored::<VerdictReveal>(&bytes, &self.context, Expect::Account(validator)) {
            Ok(reveal) if reveal.document.verdict.audit == *audit => Some((reveal.id, reveal.document.verdict.result)),
            Ok(_) => {
                tracing::warn!(%validator, %audit, "the verdict at this key judges another audit");
                None
            }
            Err(error) => {
                tracing::warn!(%validator, %audit, "a verdict is refused: {error}");
                None
            }
        }
    }
}
