//! Maps by bucket key, for those who look things up at every turn.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map by keys that this side of the wire has made or that its orchestrator has signed: nobody chooses them to collide.
pub type KeyMap<V> = HashMap<String, V, BuildHasherDefault<KeyHasher>>;

/// Multiplies and rotates word by word. Keys are long, and to hash them safely against strangers costs several times as much.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeyHasher(u64);

impl KeyHasher {
    const PRIME: u64 = 0x9e37_79b1_85eb_ca87;

    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(Self::PRIME);
    }
}

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.add(u64::from_le_bytes(*word)));
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.add(u64::from_le_bytes(last) ^ ((bytes.len() as u64) << 56));
    }

    fn write_u8(&mut self, byte: u8) {
        self.add(u64::from(byte));
    }

    fn finish(&self) -> u64 {
        // The table takes its place from the low bits and its tag from the high ones.
        (self.0 ^ (self.0 >> 32)).wrapping_mul(Self::PRIME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::hash::BuildHasher;

    #[test]
    fn keys_that_differ_in_one_digit_spread_over_both_ends_of_the_hash() {
        let hash =
            |number: u32| BuildHasherDefault::<KeyHasher>::default().hash_one(format!("quasar/netuid=24/fragments/{number:03}/7.qkf"));
        let (low, high): (HashSet<u64>, HashSet<u64>) = (0..1_000).map(hash).map(|hash| (hash & 0xffff, hash >> 48)).unzip();
        assert!(low.len() > 950 && high.len() > 950, "{} and {}", low.len(), high.len());
    }
}
