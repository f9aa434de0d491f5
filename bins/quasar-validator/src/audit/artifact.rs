//! T0 on the artifact: the payload is the one that the miner committed to, and it is well formed.

use fragments::codec::PayloadHeader;
use fragments::t0::{self, Committed};
use protocol::Reason;
use protocol::documents::{Commitment, Progress, VerdictResult};
use protocol::envelope::{Expect, open_stored};

use super::{Finding, Inquiry};

/// A payload that is what was committed.
#[derive(Clone, Debug, PartialEq)]
pub struct Artifact {
    pub commitment: Commitment,
    /// Decoded pseudo-gradient Θ̂_base − θ, in slice order.
    pub values: Vec<f32>,
}

/// The header that the audited payload must have.
pub(crate) fn header(inquiry: &Inquiry<'_>, base_version: u64) -> PayloadHeader {
    let rules = inquiry.rules;
    PayloadHeader::new(rules.parameters.codec_up, rules.plan, rules.plan_digest, usize::from(inquiry.subject.fragment), base_version)
}

/// Checks commitment and payload. A fault that the miner's signature proves is a mismatch; where the records of store and
/// orchestrator contradict each other, nobody is failed for it.
pub fn check(inquiry: &Inquiry<'_>) -> Result<Artifact, Finding> {
    let Inquiry { subject, evidence, rules, .. } = inquiry;
    let (selection, contribution) = (&subject.selection, &subject.contribution);
    let record = open_stored::<Progress>(&evidence.commitment, rules.context, Expect::Account(&selection.hotkey))
        .map_err(|error| Finding::not_evaluated(format!("the stored commitment does not open: {error}")))?;
    if record.id != contribution.commitment {
        return Err(Finding::not_evaluated("the stored commitment is not the one that the merge manifest lists"));
    }
    let progress = record.document;
    let commitment = progress
        .commitments
        .iter()
        .find(|commitment| commitment.t == selection.t && commitment.fragment == subject.fragment)
        .filter(|commitment| {
            progress.slot == selection.slot
                && commitment.base_version == contribution.base_version
                && commitment.blake3 == contribution.payload
        })
        .cloned()
        .ok_or_else(|| Finding::not_evaluated("the signed record holds no commitment to this contribution"))?;
    let committed = Committed { length: commitment.length, sha256: commitment.sha256, blake3: commitment.blake3 };
    let values = t0::check_payload(&evidence.payload, &committed, &header(inquiry, commitment.base_version))
        .map_err(|reason| Finding::new(result_of(reason), reason, format!("the payload was refused: {reason}")))?;
    Ok(Artifact { commitment, values })
}

/// The store enforces length and digest, so other bytes are the store's doing; what the committed bytes say is the miner's.
fn result_of(reason: Reason) -> VerdictResult {
    match reason {
        Reason::LengthMismatch | Reason::DigestMismatch => VerdictResult::Inconclusive,
        _ => VerdictResult::Mismatch,
    }
}
