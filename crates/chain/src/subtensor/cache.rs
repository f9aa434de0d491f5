//! What was read at one block need not be read again: several parts of a daemon ask for the same metagraph.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::types::{Hyperparameters, Metagraph};

/// Metagraphs that are kept; a full one has some 30 kB.
const METAGRAPHS_MAX: usize = 16;
const HYPERPARAMETERS_MAX: usize = 4;

#[derive(Default)]
pub(super) struct Cache {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    metagraphs: VecDeque<(u16, Metagraph)>,
    hyperparameters: VecDeque<(u16, [u8; 32], Hyperparameters)>,
}

impl Cache {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The metagraph of a subnet at the block of that hash.
    pub(super) fn metagraph(&self, netuid: u16, hash: &[u8; 32]) -> Option<Metagraph> {
        let kept = self.kept();
        kept.metagraphs.iter().find(|(of, metagraph)| *of == netuid && metagraph.block.hash == *hash).map(|(_, known)| known.clone())
    }

    /// The metagraph of a subnet at a finalized block by number. Only finalized blocks are kept, so the number is enough.
    pub(super) fn past_metagraph(&self, netuid: u16, number: u64) -> Option<Metagraph> {
        let kept = self.kept();
        kept.metagraphs.iter().find(|(of, metagraph)| *of == netuid && metagraph.block.number == number).map(|(_, known)| known.clone())
    }

    pub(super) fn keep_metagraph(&self, netuid: u16, metagraph: &Metagraph) {
        let mut kept = self.kept();
        if kept.metagraphs.len() >= METAGRAPHS_MAX {
            kept.metagraphs.pop_front();
        }
        kept.metagraphs.push_back((netuid, metagraph.clone()));
    }

    pub(super) fn hyperparameters(&self, netuid: u16, hash: &[u8; 32]) -> Option<Hyperparameters> {
        self.kept().hyperparameters.iter().find(|(of, at, _)| *of == netuid && at == hash).map(|(.., known)| known.clone())
    }

    pub(super) fn keep_hyperparameters(&self, netuid: u16, hash: [u8; 32], parameters: &Hyperparameters) {
        let mut kept = self.kept();
        if kept.hyperparameters.len() >= HYPERPARAMETERS_MAX {
            kept.hyperparameters.pop_front();
        }
        kept.hyperparameters.push_back((netuid, hash, parameters.clone()));
    }
}
