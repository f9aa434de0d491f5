//! The step chain: a hash over everything that a learner did, one link for each inner step.

use crate::{Digest, codec};

/// What a learner binds itself to with one inner step.
#[derive(Clone, Debug, bincode::Encode)]
pub struct StepLeaf {
    pub local_step: u64,
    pub lease: u64,
    pub lease_step: u32,
    /// Fragments overwritten with a newer version just before the step.
    pub applied: Vec<(u16, u64)>,
    /// Mean loss in micro-nats.
    pub loss: i64,
    /// Digest of the learner's state before this step where a segment starts here, else zero.
    pub state: Digest,
}

/// The next head of the chain.
pub fn link(head: &Digest, leaf: &StepLeaf) -> Digest {
    Digest::derive("quasar/v1/step", &[&head.0, &codec::encode(leaf)])
}

/// The committed digest of a learner's state where a segment starts: the trainer's state, and the fragment versions in it.
pub fn segment_digest(local_step: u64, trainer_state: &Digest, versions: &[u64]) -> Digest {
    Digest::derive("quasar/v1/segment", &[&local_step.to_le_bytes(), &trainer_state.0, &codec::encode(&versions.to_vec())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_step_moves_the_chain() {
        let leaf = StepLeaf { local_step: 1, lease: 2, lease_step: 3, applied: vec![(4, 5)], loss: 6, state: Digest::ZERO };
        let head = link(&Digest::ZERO, &leaf);
        for changed in [
            StepLeaf { local_step: 9, ..leaf.clone() },
            StepLeaf { lease: 9, ..leaf.clone() },
            StepLeaf { lease_step: 9, ..leaf.clone() },
            StepLeaf { applied: vec![], ..leaf.clone() },
            StepLeaf { loss: 9, ..leaf.clone() },
            StepLeaf { state: Digest::blake3(b"s"), ..leaf.clone() },
        ] {
            assert_ne!(link(&Digest::ZERO, &changed), head);
        }
        assert_ne!(link(&head, &leaf), head);
    }
}
