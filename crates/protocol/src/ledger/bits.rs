//! A set of shards, one bit each.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bits {
    words: Vec<u64>,
    /// Bits that are set.
    count: u32,
    /// No word below this one has a bit.
    first: u32,
}

impl Bits {
    pub fn set(&mut self, index: u32) {
        let word = (index / 64) as usize;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        if !self.has(index) {
            self.words[word] |= 1 << (index % 64);
            self.first = if self.is_empty() { word as u32 } else { self.first.min(word as u32) };
            self.count += 1;
        }
    }

    pub fn clear(&mut self, index: u32) {
        if self.has(index) {
            self.words[(index / 64) as usize] &= !(1 << (index % 64));
            self.count -= 1;
            while self.words.get(self.first as usize) == Some(&0) {
                self.first += 1;
            }
        }
    }

    pub fn has(&self, index: u32) -> bool {
        self.words.get((index / 64) as usize).is_some_and(|word| word & (1 << (index % 64)) != 0)
    }

    pub fn first(&self) -> Option<u32> {
        let word = self.words.get(self.first as usize)?;
        (*word != 0).then(|| self.first * 64 + word.trailing_zeros())
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn bytes(&self) -> usize {
        self.words.len() * 8
    }
}
