//! The step chain: a hash over everything that a learner did, one link for each inner step.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::{Digest, codec};

/// What happened to a fragment of a learner's weights between two inner steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exchange {
    /// A newer version was applied: the weights become that version, plus what the learner has trained since it last exported the
    /// fragment, if it did so since the version before.
    Applied { fragment: u16, version: u64 },
    /// The weights were exported into a contribution.
    Exported { fragment: u16 },
}

impl Exchange {
    /// The most that [`Exchange::record`] keeps for each fragment.
    pub const PER_FRAGMENT_MAX: usize = 3;

    pub fn fragment(&self) -> u16 {
        match *self {
            Self::Applied { fragment, .. } | Self::Exported { fragment } => fragment,
        }
    }

    /// Adds to what was exchanged since the last step, and drops what makes no difference any more, so that a learner that goes on
    /// exchanging without training does not collect without bound.
    ///
    /// With no step in between, a version that is applied after another exchange of the same fragment overwrites it: nothing was trained
    /// that could be carried over. An export right before it says just that.
    pub fn record(all: &mut Vec<Self>, new: Self) {
        let fragment = new.fragment();
        match new {
            Self::Applied { .. } => {
                let before = all.len();
                all.retain(|earlier| earlier.fragment() != fragment);
                if all.len() < before {
                    all.push(Self::Exported { fragment });
                }
                all.push(new);
            }
            Self::Exported { .. } => {
                if all.iter().rfind(|earlier| earlier.fragment() == fragment) != Some(&new) {
                    all.push(new);
                }
            }
        }
    }

    /// Of the exchanges before the first step of a segment, those that its state does not show: exports after the last version of their
    /// fragment. The state is taken after versions were applied and before anything is exported; doing an export twice is harmless.
    pub fn after_state(all: &[Self]) -> impl Iterator<Item = &Self> {
        let is_last = |(at, exchange): &(usize, &Self)| {
            let mut later = all[at + 1..].iter();
            matches!(exchange, Self::Exported { .. }) && !later.any(|other| other.fragment() == exchange.fragment())
        };
        all.iter().enumerate().filter(is_last).map(|(_, exchange)| exchange)
    }
}

/// What a learner binds itself to with one inner step.
#[derive(Clone, Debug, Encode)]
pub struct StepLeaf {
    pub local_step: u64,
    pub lease: u64,
    pub lease_step: u32,
    /// In this order, since the step before.
    pub exchanged: Vec<Exchange>,
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

/// The committed digest of a start from which a payload also takes what its codec had withheld: BLAKE3 of that residual, little-endian
/// f32 in slice order.
pub fn with_residual(segment: &Digest, residual: &Digest) -> Digest {
    Digest::derive("quasar/v1/residual", &[&segment.0, &residual.0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exchanges_without_steps_in_between_stay_few_and_keep_their_meaning() {
        let (export, apply) = (|fragment| Exchange::Exported { fragment }, |fragment, version| Exchange::Applied { fragment, version });
        let recorded = |exchanges: &[Exchange]| {
            let mut all = Vec::new();
            exchanges.iter().for_each(|exchange| Exchange::record(&mut all, *exchange));
            all
        };
        assert_eq!(recorded(&[apply(1, 4), export(2), apply(3, 4)]), [apply(1, 4), export(2), apply(3, 4)]);
        assert_eq!(recorded(&[apply(1, 4), apply(1, 5)]), [export(1), apply(1, 5)], "the second overwrites");
        assert_eq!(recorded(&[export(1), export(1), apply(1, 5), export(1)]), [export(1), apply(1, 5), export(1)]);
        let endless: Vec<Exchange> = (0..100).flat_map(|n| [export(1), apply(1, n), export(2), export(1)]).collect();
        assert!(recorded(&endless).len() <= 2 * Exchange::PER_FRAGMENT_MAX);
        let all = [export(1), apply(1, 4), export(2), apply(3, 4), export(3)];
        assert_eq!(Exchange::after_state(&all).copied().collect::<Vec<_>>(), [export(2), export(3)]);
    }

    #[test]
    fn every_field_of_a_step_moves_the_chain() {
        let leaf = StepLeaf {
            local_step: 1,
            lease: 2,
            lease_step: 3,
            exchanged: vec![Exchange::Applied { fragment: 4, version: 5 }],
            loss: 6,
            state: Digest::ZERO,
        };
        let head = link(&Digest::ZERO, &leaf);
        for changed in [
            StepLeaf { local_step: 9, ..leaf.clone() },
            StepLeaf { lease: 9, ..leaf.clone() },
            StepLeaf { lease_step: 9, ..leaf.clone() },
            StepLeaf { exchanged: vec![], ..leaf.clone() },
            StepLeaf { exchanged: vec![Exchange::Exported { fragment: 4 }], ..leaf.clone() },
            StepLeaf { loss: 9, ..leaf.clone() },
            StepLeaf { state: Digest::blake3(b"s"), ..leaf.clone() },
        ] {
            assert_ne!(link(&Digest::ZERO, &changed), head);
        }
        assert_ne!(link(&head, &leaf), head);
    }
}
