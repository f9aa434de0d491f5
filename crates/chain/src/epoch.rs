//! When a subnet's epochs begin, and when timelocked weights that are committed now will be revealed.
//!
//! The chain's schedule is not a plain multiple of the tempo: an owner may ask for an epoch ahead of time, tempos change, and a subnet
//! that missed its turn catches up. So the blocks to come are walked one by one, by the chain's own rule, from a state read at one
//! block. Source: subtensor `run_coinbase` and `get_encrypted_commit_v2` of the official package, whose answers are among the
//! golden vectors.

use serde::{Deserialize, Serialize};

use crate::drand::Beacon;

/// An epoch that did not begin for this many blocks begins whatever the tempo says.
pub const EPOCH_BLOCKS_MAX: u64 = 50_400;
/// Blocks after the first one of the target epoch at which the beacon's round is expected: the first attempt of the chain always
/// comes too early, and one of the next succeeds.
const REVEAL_MARGIN_BLOCKS: u64 = 3;

/// A subnet's schedule as of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochState {
    /// Blocks of one epoch; 0 = the subnet has none.
    pub tempo: u16,
    /// Block at which the running epoch began.
    pub last_epoch_block: u64,
    /// Block at which the owner asked for the next epoch; 0 = not asked.
    pub pending_epoch_at: u64,
    /// Number of the running epoch.
    pub index: u64,
    /// Blocks since the last epoch began, counted by the chain.
    pub blocks_since_last_step: u64,
}

/// Why no reveal can be foretold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EpochError {
    #[error("the subnet runs no epochs (its tempo is 0)")]
    NoEpochs,
    #[error("the target epoch does not begin within {0} blocks")]
    TooFar(u64),
}

/// Where a timelocked commit of the next block will be revealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reveal {
    /// The epoch that the commit of the next block counts for.
    pub commit_epoch: u64,
    /// The epoch in which the chain reveals it.
    pub target_epoch: u64,
    /// First block of that epoch.
    pub block: u64,
}

impl EpochState {
    /// Whether an epoch begins at `block`, the next one after this state's.
    pub fn is_due(&self, block: u64) -> bool {
        self.tempo != 0
            && ((self.pending_epoch_at > 0 && block >= self.pending_epoch_at)
                || self.blocks_since_last_step > EPOCH_BLOCKS_MAX
                || block.saturating_sub(self.last_epoch_block) >= u64::from(self.tempo))
    }

    /// The state after `block`, the next one.
    pub fn step(&mut self, block: u64) {
        self.blocks_since_last_step += 1;
        if self.is_due(block) {
            self.last_epoch_block = block;
            self.pending_epoch_at = 0;
            self.index += 1;
            self.blocks_since_last_step = 0;
        }
    }

    /// The epoch that `block`, the next one, belongs to.
    fn epoch_of(&self, block: u64) -> u64 {
        self.index + u64::from(self.is_due(block))
    }

    /// First block of the next epoch, seen from `head`; `None` where the subnet has no epochs.
    pub fn next_epoch_block(&self, head: u64) -> Option<u64> {
        if self.tempo == 0 {
            return None;
        }
        let mut at = self.last_epoch_block.saturating_add(u64::from(self.tempo));
        if self.pending_epoch_at > 0 {
            at = at.min(self.pending_epoch_at);
        }
        at = at.min(head.saturating_add((EPOCH_BLOCKS_MAX + 1).saturating_sub(self.blocks_since_last_step)));
        Some(at.max(head + 1))
    }

    /// When a commit that lands in the block after `head` is revealed.
    pub fn reveal(&self, head: u64, period_epochs: u64) -> Result<Reveal, EpochError> {
        if self.tempo == 0 {
            return Err(EpochError::NoEpochs);
        }
        let mut state = *self;
        let first = head + 1;
        let commit_epoch = state.epoch_of(first);
        let target_epoch = commit_epoch.saturating_add(period_epochs);
        let limit = period_epochs.saturating_add(1).saturating_mul(EPOCH_BLOCKS_MAX);
        let mut block = first;
        while state.epoch_of(block) != target_epoch {
            if block - first >= limit {
                return Err(EpochError::TooFar(limit));
            }
            state.step(block);
            block += 1;
        }
        Ok(Reveal { commit_epoch, target_epoch, block })
    }
}

/// The beacon's round whose signature opens a commit at its reveal: `now_ms` is the time of block `head`.
pub fn reveal_round(reveal: &Reveal, head: u64, now_ms: u64, block_ms: u64, beacon: &Beacon) -> u64 {
    let blocks = (reveal.block + REVEAL_MARGIN_BLOCKS).saturating_sub(head);
    let at_ms = now_ms.saturating_add(blocks.saturating_mul(block_ms));
    (at_ms.saturating_sub(beacon.genesis_s * 1000) / (beacon.period_s.max(1) * 1000)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value as Json;

    const GOLDEN: &str = include_str!("../tests/data/golden-461.json");

    fn state(case: &Json) -> EpochState {
        let number = |name: &str| case[name].as_u64().unwrap();
        EpochState {
            tempo: number("tempo") as u16,
            last_epoch_block: number("last_epoch_block"),
            pending_epoch_at: number("pending_epoch_at"),
            index: number("subnet_epoch_index"),
            blocks_since_last_step: number("blocks_since_last_step"),
        }
    }

    #[test]
    fn reveals_are_foretold_as_by_the_official_package() {
        let golden: Json = serde_json::from_str(GOLDEN).unwrap();
        let mut rounds = 0;
        for case in golden["reference"]["reveal_rounds"].as_array().unwrap() {
            let name = case["name"].as_str().unwrap();
            let (head, period) = (case["head_block"].as_u64().unwrap(), case["reveal_period_epochs"].as_u64().unwrap());
            let reveal = state(case).reveal(head, period);
            if case.get("error").is_some() {
                assert_eq!(reveal, Err(EpochError::NoEpochs), "{name}");
                continue;
            }
            let reveal = reveal.unwrap();
            assert_eq!(reveal.block, case["reveal_block"].as_u64().unwrap(), "{name}");
            let block_ms = (case["block_time_s"].as_f64().unwrap() * 1000.0) as u64;
            let round = reveal_round(&reveal, head, case["now_ms"].as_u64().unwrap(), block_ms, &Beacon::quicknet());
            assert_eq!(round, case["reveal_round"].as_u64().unwrap(), "{name}");
            rounds += 1;
        }
        assert_eq!(rounds, 23);
    }

    proptest! {
        #[test]
        fn the_next_epoch_is_the_first_due_block(
            tempo in 1u16..500,
            ago in 0u64..600,
            pending in 0u64..700,
            since in 0u64..600,
        ) {
            let head = 10_000;
            let mut state = EpochState {
                tempo,
                last_epoch_block: head - ago,
                pending_epoch_at: if pending == 0 { 0 } else { head - 100 + pending },
                index: 7,
                blocks_since_last_step: since,
            };
            let foretold = state.next_epoch_block(head).unwrap();
            let mut block = head + 1;
            while !state.is_due(block) {
                state.step(block);
                block += 1;
            }
            prop_assert_eq!(foretold, block);
        }

        #[test]
        fn a_commit_is_revealed_in_the_epoch_it_was_meant_for(tempo in 1u16..400, ago in 0u64..400, period in 1u64..5) {
            let head = 5_000;
            let mut state = EpochState { tempo, last_epoch_block: head - ago, pending_epoch_at: 0, index: 40, blocks_since_last_step: ago };
            let reveal = state.reveal(head, period).unwrap();
            for block in head + 1..=reveal.block {
                prop_assert!(block == reveal.block || state.index < reveal.target_epoch);
                state.step(block);
                if block == head + 1 {
                    prop_assert_eq!(state.index, reveal.commit_epoch);
                }
            }
            prop_assert_eq!(state.index, reveal.target_epoch);
        }
    }
}
