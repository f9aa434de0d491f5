//! Receipts of finished leases: announced in the progress record, uploaded under a grant, checked, and booked.

use protocol::documents::Progress;
use protocol::envelope::Purpose;
use protocol::{Digest, Reason};
use serde::{Deserialize, Serialize};

use super::{Effect, Key, LeaseRecord, Orchestrator, Slot, Want};

/// How far the receipt of a lease got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReceiptStage {
    Awaited,
    /// An upload grant for these bytes is out.
    Granted {
        length: u64,
        sha256: Digest,
    },
    Checking,
    /// Its envelope's id, and the steps that it shows, ascending.
    Settled {
        id: Digest,
        trained: Vec<u32>,
    },
    Refused,
}

impl Orchestrator {
    /// Takes up an announced or uploaded receipt.
    pub(super) fn on_receipt(&mut self, slot: Slot, record: &Progress) {
        let Some(offer) = record.receipt else { return };
        let (now_ms, step_ms) = (self.volatile.now_ms, self.timing.step_ms());
        // It stays in the learner's records: one that comes before it can be true is taken up later.
        let is_due = |lease: &&mut LeaseRecord| lease.slot == slot && !lease.ended && lease.possible(now_ms, step_ms) == lease.lease.steps;
        let Some(lease) = self.leases.get_mut(&offer.lease).filter(is_due) else { return };
        match lease.receipt {
            ReceiptStage::Awaited if offer.length <= Purpose::Receipt.limit() as u64 => {
                lease.receipt = ReceiptStage::Granted { length: offer.length, sha256: offer.sha256 };
                self.grants_changed(slot);
            }
            // Once announced, length and digest stand; only the upload can be added.
            ReceiptStage::Granted { length, sha256 } if offer.uploaded && (length, sha256) == (offer.length, offer.sha256) => {
                self.check_receipt(offer.lease);
            }
            _ => {}
        }
    }

    fn check_receipt(&mut self, lease: u64) {
        let Some(record) = self.leases.get_mut(&lease) else { return };
        record.receipt = ReceiptStage::Checking;
        let (slot, lease, committed) = (record.slot, Box::new(record.lease.clone()), record.committed.clone());
        self.emit(Effect::CheckReceipt { slot, lease, committed });
    }

    pub(super) fn on_receipt_checked(&mut self, slot: Slot, lease: u64, outcome: Result<(Digest, Vec<u32>), Reason>) {
        let Some(record) = self.leases.get_mut(&lease).filter(|record| record.receipt == ReceiptStage::Checking) else { return };
        match outcome {
            Ok((id, trained)) => record.receipt = ReceiptStage::Settled { id, trained },
            Err(reason) => {
                record.receipt = ReceiptStage::Refused;
                if let Some(learner) = self.learners.get_mut(&slot) {
                    learner.last_reason = reason;
                }
            }
        }
        self.end_lease(lease);
    }

    pub(super) fn receipt_wants(&self, slot: Slot) -> Vec<Want> {
        let held = self.learners.get(&slot).into_iter().flat_map(|learner| &learner.leases);
        held.filter_map(|lease| Some((lease, self.leases.get(lease).filter(|record| !record.ended)?)))
            .filter_map(|(lease, record)| match record.receipt {
                ReceiptStage::Granted { length, sha256 } => {
                    Some(Want::WriteOnce { key: Key::Receipt { slot, lease: *lease }, length, sha256 })
                }
                _ => None,
            })
            .collect()
    }

    pub(super) fn resume_receipts(&mut self) {
        let checking: Vec<u64> =
            self.leases.iter().filter(|(_, record)| record.receipt == ReceiptStage::Checking).map(|(lease, _)| *lease).collect();
        for lease in checking {
            self.check_receipt(lease);
        }
    }
}
