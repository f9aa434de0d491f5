//! The loss test: mean loss on rows that the learner trained on and on held-out rows, without and with its contribution.
//!
//! The differences are small against their noise, so they are statistics: measured, published, and no reason to fail anybody.

use model::{Batch, Evaluator};
use protocol::documents::{Lease, Measurements, micro_nats};
use protocol::lease::{LeaseRows, row_order};

use super::artifact::Artifact;
use super::{Finding, Inquiry, RowRef, Sources};

/// Rows evaluated at a time: bounds the memory of one forward pass.
const BATCH_ROWS: usize = 4;
/// A lease or held-out set is drawn from among so many rows at most: the draw holds one number for each.
const ROWS_MAX: u64 = 1 << 24;

/// Rows of a lease; `None` if it contradicts itself or has more than anybody leases.
pub(crate) fn lease_rows(lease: &Lease) -> Option<u64> {
    let total = lease.rows.iter().try_fold(0u64, |sum, range| sum.checked_add(range.end.checked_sub(range.start)?))?;
    (total <= ROWS_MAX && lease.batch_rows > 0).then_some(total)
}

/// Weights of the run at known fragment versions.
pub struct Replica {
    evaluator: Box<dyn Evaluator>,
    /// Version that each fragment has now; `None` = something else.
    versions: Vec<Option<u64>>,
}

impl Replica {
    pub fn new(evaluator: Box<dyn Evaluator>) -> Self {
        Self { evaluator, versions: Vec::new() }
    }

    /// Brings every fragment but `except` to its version.
    fn follow(&mut self, versions: &[u64], except: u16, sources: &dyn Sources) -> Result<(), Finding> {
        self.versions.resize(versions.len(), None);
        for (fragment, version) in versions.iter().enumerate() {
            if fragment == usize::from(except) || self.versions[fragment] == Some(*version) {
                continue;
            }
            let values = sources.keyframe(fragment as u16, *version)?;
            self.versions[fragment] = None;
            self.evaluator.apply(fragment, &values)?;
            self.versions[fragment] = Some(*version);
        }
        Ok(())
    }

    /// Overwrites one fragment with values that are no published version.
    fn set(&mut self, fragment: u16, values: &[f32]) -> Result<(), Finding> {
        if let Some(version) = self.versions.get_mut(usize::from(fragment)) {
            *version = None;
        }
        Ok(self.evaluator.apply(usize::from(fragment), values)?)
    }

    /// Mean loss over rows, in nats.
    fn mean_loss(&mut self, tokens: &[u32], row_tokens: usize) -> Result<f64, Finding> {
        let mut sum = 0.0;
        for part in tokens.chunks(BATCH_ROWS * row_tokens) {
            let batch = Batch { tokens: part, rows: part.len() / row_tokens, row_tokens };
            sum += self.evaluator.losses(&batch)?.iter().sum::<f64>();
        }
        Ok(sum / (tokens.len() / row_tokens) as f64)
    }
}

/// Measures losses; rows that do not exist leave their measurements at "not run".
pub fn test(
    inquiry: &Inquiry<'_>,
    artifact: &Artifact,
    base: &[f32],
    replica: &mut Replica,
    measured: &mut Measurements,
) -> Result<(), Finding> {
    let Inquiry { subject, evidence, rules, sources } = *inquiry;
    let row_tokens = rules.parameters.sequence_length as usize;
    let assigned = sources.rows(&assigned_rows(inquiry, artifact))?;
    let held_out = sources.rows(&held_out_rows(inquiry))?;
    replica.follow(&evidence.versions, subject.fragment, sources)?;
    let moved: Vec<f32> = base.iter().zip(&artifact.values).map(|(base, change)| base - change).collect();
    for (values, after) in [(base, false), (moved.as_slice(), true)] {
        replica.set(subject.fragment, values)?;
        for (tokens, is_assigned) in [(&assigned, true), (&held_out, false)] {
            if tokens.is_empty() {
                continue;
            }
            let loss = micro_nats(replica.mean_loss(tokens, row_tokens)?);
            match (is_assigned, after) {
                (true, false) => measured.assigned_before = loss,
                (true, true) => measured.assigned_after = loss,
                (false, false) => measured.held_out_before = loss,
                (false, true) => measured.held_out_after = loss,
            }
        }
    }
    Ok(())
}

/// Whether the contribution did not lower the loss on the learner's own rows.
pub fn got_worse(measured: &Measurements) -> bool {
    measured.assigned_before != i64::MAX && measured.assigned_after > measured.assigned_before
}

/// Rows drawn by the audit's digest from those that the lease had consumed when the learner committed.
fn assigned_rows(inquiry: &Inquiry<'_>, artifact: &Artifact) -> Vec<RowRef> {
    let Inquiry { subject, evidence, rules, .. } = inquiry;
    let commitment = &artifact.commitment;
    let Some(lease) = evidence.leases.iter().find(|lease| lease.id == commitment.lease) else { return Vec::new() };
    let Some(total) = lease_rows(lease) else { return Vec::new() };
    let consumed = (u64::from(commitment.lease_step.min(lease.steps)) * u64::from(lease.batch_rows)).min(total);
    let rows = LeaseRows::of(lease);
    let draw = row_order(&subject.selection.audit, consumed as u32);
    let row = |index: &u32| {
        let step = rows.step(index / lease.batch_rows);
        step.get((index % lease.batch_rows) as usize).map(|row| RowRef { shard: row.shard.to_owned(), row: row.row })
    };
    draw.iter().take(usize::from(rules.parameters.audit.loss_rows)).filter_map(row).collect()
}

/// Rows drawn by the audit's digest from all held-out shards.
fn held_out_rows(inquiry: &Inquiry<'_>) -> Vec<RowRef> {
    let Inquiry { subject, rules, .. } = inquiry;
    let shards: Vec<_> = rules.shards.iter().filter(|shard| shard.held_out).collect();
    let total = shards.iter().fold(0u64, |sum, shard| sum.saturating_add(shard.rows));
    let draw = row_order(&subject.selection.audit, total.min(ROWS_MAX) as u32);
    let locate = |index: &u32| {
        let mut index = u64::from(*index);
        for shard in &shards {
            if index < shard.rows {
                return Some(RowRef { shard: shard.id.clone(), row: index });
            }
            index -= shard.rows;
        }
        None
    };
    draw.iter().take(usize::from(rules.parameters.audit.loss_rows)).filter_map(locate).collect()
}
