//! Jobs and sealed grant bundles.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::{AccountId, Digest, SealedBytes};

/// Rows `[start, end)` of a shard.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode, Serialize, Deserialize)]
pub struct RowRange {
    pub shard: String,
    pub start: u64,
    pub end: u64,
}

impl RowRange {
    pub fn rows(&self) -> u64 {
        self.end - self.start
    }
}

/// A lease of rows: `steps` steps of `batch_rows` rows each, in the order that [`crate::lease::row_order`] gives for `seed`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Lease {
    pub id: u64,
    pub rows: Vec<RowRange>,
    pub seed: Digest,
    pub batch_rows: u32,
    pub steps: u32,
    /// The run's learning-rate index of the lease's first step.
    pub schedule_start: u64,
    pub deadline_ms: u64,
}

/// How the rows of a lease are booked. Written once when it ends and before the books change, so that every writer books alike.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct LeaseEnd {
    pub lease: u64,
    /// Steps of the lease with evidence, as ascending ranges `[start, end)`.
    pub done: Vec<(u32, u32)>,
    /// Steps that the learner reported. Those of them that are not done are lost; the rows of all others return.
    pub reported: u32,
    /// Id of the envelope of the receipt that shows the done steps, if there is one.
    pub receipt: Option<Digest>,
}

impl LeaseEnd {
    /// `done` ascending.
    pub fn new(lease: u64, done: impl IntoIterator<Item = u32>, reported: u32, receipt: Option<Digest>) -> Self {
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for step in done {
            match ranges.last_mut() {
                Some((_, end)) if *end == step => *end += 1,
                _ => ranges.push((step, step.saturating_add(1))),
            }
        }
        Self { lease, done: ranges, reported, receipt }
    }

    /// The done steps below `steps`, ascending.
    pub fn done_steps(&self, steps: u32) -> impl Iterator<Item = u32> {
        self.done.iter().flat_map(move |(start, end)| *start..(*end).min(steps))
    }
}

/// What one learner is to do: its current lease and, once that runs low, the next one.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Job {
    pub hotkey: AccountId,
    pub slot: u8,
    /// The newest session that the orchestrator has seen for this slot; an older session is fenced.
    pub session_epoch: u64,
    pub leases: Vec<Lease>,
}

/// Grants that are there whether or not the hotkey ever spoke, renewed at two thirds of their life.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct StandingGrants {
    pub hotkey: AccountId,
    pub slot: u8,
    pub session_epoch: u64,
    pub sealed: SealedBytes,
}

/// Grants on demand: leased shards, committed payloads, openings.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct PullGrants {
    pub hotkey: AccountId,
    pub slot: u8,
    pub session_epoch: u64,
    pub sealed: SealedBytes,
}
