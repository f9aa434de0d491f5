//! Receipts: a learner's signed account of a lease that it has finished.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::job::Lease;
use crate::steps::{Exchange, StepLeaf, link};
use crate::{AccountId, Digest};

/// Most steps of a lease, so that a receipt with one fragment applied and one exported at each step fits into its file.
pub const LEASE_STEPS_MAX: u32 = 1_024;

/// Everything that the step chain was hashed over while a lease was trained: whoever has it can recompute the chain and compare it
/// with the heads that the learner's commitments bound it to before.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Receipt {
    pub hotkey: AccountId,
    pub slot: u8,
    pub session_epoch: u64,
    pub lease: u64,
    /// Head of the step chain before the first step of the lease.
    pub chain: Digest,
    pub steps: Vec<ReceiptStep>,
}

/// One step that was trained.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct ReceiptStep {
    pub local_step: u64,
    pub lease_step: u32,
    /// In this order, since the step before.
    pub exchanged: Vec<Exchange>,
    /// Mean loss in micro-nats.
    pub loss: i64,
    /// Digest of the learner's state before the step where a segment starts here.
    pub state: Option<Digest>,
}

/// Why a receipt proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptFault {
    #[error("it is for another lease or learner")]
    Lease,
    #[error("its steps are not in order, or beyond the lease")]
    Steps,
    #[error("its step chain is not the one that the commitment after local step {0} named")]
    Chain(u64),
}

impl Receipt {
    /// Checks the receipt against its lease, and its step chain against `committed`: (local steps done, head of the chain), as the
    /// learner's commitments named them during this lease.
    pub fn check(&self, hotkey: &AccountId, slot: u8, lease: &Lease, committed: &[(u64, Digest)]) -> Result<(), ReceiptFault> {
        if (self.hotkey, self.slot, self.lease) != (*hotkey, slot, lease.id) {
            return Err(ReceiptFault::Lease);
        }
        let is_ordered = self.steps.is_sorted_by(|a, b| a.local_step < b.local_step && a.lease_step < b.lease_step);
        if !is_ordered || self.steps.iter().any(|step| step.lease_step >= lease.steps || step.local_step == u64::MAX) {
            return Err(ReceiptFault::Steps);
        }
        let mut chain = self.chain;
        for step in &self.steps {
            chain = link(&chain, &step.leaf(self.lease));
            let after = step.local_step + 1;
            if committed.iter().any(|(local_step, head)| *local_step == after && *head != chain) {
                return Err(ReceiptFault::Chain(step.local_step));
            }
        }
        Ok(())
    }
}

impl ReceiptStep {
    /// The link of the step chain that this step makes.
    pub fn leaf(&self, lease: u64) -> StepLeaf {
        StepLeaf {
            local_step: self.local_step,
            lease,
            lease_step: self.lease_step,
            exchanged: self.exchanged.clone(),
            loss: self.loss,
            state: self.state.unwrap_or(Digest::ZERO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::documents::RowRange;
    use crate::envelope::Purpose;

    const WHO: AccountId = AccountId([7; 32]);

    fn lease(steps: u32) -> Lease {
        let rows = vec![RowRange { shard: "s".into(), start: 0, end: 100 }];
        Lease { id: 5, rows, seed: Digest::ZERO, batch_rows: 4, steps, schedule_start: 0, deadline_ms: 0 }
    }

    fn receipt(steps: u32) -> Receipt {
        let step = |n: u32| ReceiptStep {
            local_step: 40 + u64::from(n),
            lease_step: n,
            exchanged: vec![
                Exchange::Applied { fragment: n as u16 % 24, version: u64::from(n) },
                Exchange::Exported { fragment: n as u16 % 24 },
            ],
            loss: 6_000_000 - i64::from(n),
            state: n.is_multiple_of(4).then(|| Digest::blake3(&n.to_le_bytes())),
        };
        Receipt { hotkey: WHO, slot: 1, session_epoch: 3, lease: 5, chain: Digest::ZERO, steps: (0..steps).map(step).collect() }
    }

    /// The chain as a learner builds it.
    fn heads(receipt: &Receipt) -> Vec<(u64, Digest)> {
        let mut chain = receipt.chain;
        let mut next = |step: &ReceiptStep| {
            chain = link(&chain, &step.leaf(receipt.lease));
            (step.local_step + 1, chain)
        };
        receipt.steps.iter().map(&mut next).collect()
    }

    #[test]
    fn a_receipt_agrees_with_what_was_committed_and_a_changed_one_does_not() {
        let (lease, honest) = (lease(8), receipt(8));
        let committed = heads(&honest);
        assert_eq!(honest.check(&WHO, 1, &lease, &committed), Ok(()));
        assert_eq!(honest.check(&WHO, 1, &lease, &committed[3..4]), Ok(()), "not every step has a commitment");
        let mut better = honest.clone();
        better.steps[2].loss -= 1;
        assert_eq!(better.check(&WHO, 1, &lease, &committed), Err(ReceiptFault::Chain(42)));
        assert_eq!(better.check(&WHO, 1, &lease, &committed[7..]), Err(ReceiptFault::Chain(47)), "any later commitment tells");
        assert_eq!(honest.check(&WHO, 0, &lease, &committed), Err(ReceiptFault::Lease));
        let mut swapped = honest.clone();
        swapped.steps.swap(0, 1);
        assert_eq!(swapped.check(&WHO, 1, &lease, &[]), Err(ReceiptFault::Steps));
        assert_eq!(receipt(9).check(&WHO, 1, &lease, &[]), Err(ReceiptFault::Steps), "one step more than leased");
    }

    #[test]
    fn the_longest_receipt_fits_its_file() {
        assert!(crate::codec::encode(&receipt(LEASE_STEPS_MAX)).len() + 300 <= Purpose::Receipt.limit());
    }
}
