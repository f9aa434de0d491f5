//! Local steps, the step chain over them, and the segments into which they are cut.
//!
//! A segment begins at every local step that is a multiple of the run's `replay_steps`, with a snapshot of the learner's
//! state. A payload is bound to the segment that its export ends, and an audit replays exactly that one.

use std::collections::BTreeMap;

use protocol::Digest;
use protocol::documents::ReceiptStep;
use protocol::steps::{Exchange, link, segment_digest};

use super::fragments::Saved;

/// Digests of so many segments are kept: exports look one segment back.
const SEGMENTS_KEPT: u64 = 4;

#[derive(Clone, Debug)]
struct Newest {
    local_step: u64,
    saved: Saved,
}

#[derive(Clone, Debug)]
pub(super) struct Segments {
    replay_steps: u64,
    local_step: u64,
    chain: Digest,
    digests: BTreeMap<u64, Digest>,
    newest: Option<Newest>,
    /// Segments that begin before this local step contain a fault: no replay of them gives what was trained.
    floor: u64,
}

impl Segments {
    pub(super) fn new(replay_steps: u16) -> Self {
        Self {
            replay_steps: u64::from(replay_steps.max(1)),
            local_step: 0,
            chain: Digest::ZERO,
            digests: BTreeMap::new(),
            newest: None,
            floor: 0,
        }
    }

    pub(super) fn local_step(&self) -> u64 {
        self.local_step
    }

    pub(super) fn chain(&self) -> Digest {
        self.chain
    }

    /// Whether a segment begins with the next step and has no snapshot yet.
    pub(super) fn needs_snapshot(&self) -> bool {
        self.local_step.is_multiple_of(self.replay_steps) && !self.digests.contains_key(&self.local_step)
    }

    /// The snapshot before the next step is taken; `saved` is what goes with it.
    pub(super) fn snapshot_taken(&mut self, trainer_state: &Digest, versions: &[u64], saved: Saved) {
        self.digests.insert(self.local_step, segment_digest(self.local_step, trainer_state, versions));
        self.newest = Some(Newest { local_step: self.local_step, saved });
        let oldest = self.local_step.saturating_sub(SEGMENTS_KEPT * self.replay_steps);
        self.digests.retain(|start, _| *start >= oldest);
    }

    /// Start and digest of the segment that an export before the next step ends, if it can be replayed.
    pub(super) fn ending_here(&self) -> Option<(u64, Digest)> {
        let last = self.local_step.checked_sub(1)?;
        let start = last - last % self.replay_steps;
        let digest = self.digests.get(&start)?;
        (start >= self.floor).then_some((start, *digest))
    }

    /// A step is done. Gives the head of the chain before it, and what the receipt of its lease says of it.
    pub(super) fn stepped(&mut self, lease: u64, lease_step: u32, exchanged: Vec<Exchange>, loss: i64) -> (Digest, ReceiptStep) {
        let local_step = self.local_step;
        let at_start = local_step.is_multiple_of(self.replay_steps);
        let state = at_start.then(|| self.digests.get(&local_step).copied()).flatten();
        let (before, step) = (self.chain, ReceiptStep { local_step, lease_step, exchanged, loss, state });
        self.chain = link(&before, &step.leaf(lease));
        self.local_step += 1;
        (before, step)
    }

    /// The next step could not be taken: the learner goes back to the newest snapshot, and a new segment begins. Gives the
    /// snapshot's local step with what was saved, if there is one.
    pub(super) fn fault(&mut self) -> Option<(u64, Saved)> {
        self.local_step = (self.local_step / self.replay_steps + 1) * self.replay_steps;
        self.floor = self.local_step;
        self.newest.as_ref().map(|newest| (newest.local_step, newest.saved.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(segments: &mut Segments, steps: u64) {
        for _ in 0..steps {
            if segments.needs_snapshot() {
                segments.snapshot_taken(&Digest::blake3(&segments.local_step().to_le_bytes()), &[0], vec![]);
            }
            segments.stepped(1, segments.local_step() as u32, vec![], 5);
        }
    }

    #[test]
    fn an_export_ends_the_segment_that_began_strictly_before_it() {
        let mut segments = Segments::new(4);
        assert_eq!(segments.ending_here(), None, "nothing was trained yet");
        walk(&mut segments, 4);
        assert_eq!(segments.ending_here().unwrap().0, 0);
        assert!(segments.needs_snapshot());
        walk(&mut segments, 1);
        let (start, digest) = segments.ending_here().unwrap();
        assert_eq!(start, 4);
        assert_eq!(digest, segment_digest(4, &Digest::blake3(&4u64.to_le_bytes()), &[0]));
    }

    #[test]
    fn after_a_fault_a_new_segment_begins_and_none_before_it_is_offered() {
        let mut segments = Segments::new(4);
        walk(&mut segments, 6);
        let chain = segments.chain();
        assert_eq!(segments.fault().unwrap().0, 4);
        assert_eq!((segments.local_step(), segments.chain()), (8, chain));
        assert!(segments.needs_snapshot());
        assert_eq!(segments.ending_here(), None);
        walk(&mut segments, 1);
        assert_eq!(segments.ending_here().unwrap().0, 8);
    }
}
