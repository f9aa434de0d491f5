//! Every decoder against damaged input: payloads of each codec, int4 frames, keyframes, states, checkpoint headers and indices,
//! fragment files, contracts, plans. Good files are made, then damaged in ways that a seeded generator chooses: bits, bytes, runs,
//! numbers at their limits, cuts, additions, pieces of another file. No damage may cause a panic, more memory than the plan bounds,
//! or a value that is not finite; what is accepted must be what the encoder writes.
//!
//! The same checks run under libFuzzer, guided by coverage: `crates/fragments/fuzz`.

use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
mod targets;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

fn damage(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len());
        let length = random.below(9).min(bytes.len() - at);
        match random.below(8) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = random.next() as u8,
            2 => bytes[at..at + length].fill([0, 0xff, 0x7f, 0x80][random.below(4)]),
            3 => bytes.truncate(at),
            4 => bytes.extend((0..random.below(9)).map(|_| 0xa5)),
            5 => {
                let number = [0, 1, u64::MAX, i64::MAX as u64, 1 << 32, 0x7f80_0000, 0x0000_0001][random.below(7)].to_le_bytes();
                bytes[at..at + length.min(8)].copy_from_slice(&number[..length.min(8)]);
            }
            6 if !other.is_empty() => {
                let from = random.below(other.len());
                let count = random.below(64).min(other.len() - from).min(bytes.len() - at);
                bytes[at..at + count].copy_from_slice(&other[from..from + count]);
            }
            _ => {
                bytes.drain(at..at + length);
            }
        }
    }
}

#[test]
fn damaged_input_is_refused_or_harmless_in_every_decoder() {
    for (name, target, seeds) in targets::all() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut inputs = seeds();
        let mut kept: Vec<_> = std::fs::read_dir(&corpus).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
        kept.sort();
        inputs.extend(kept.iter().map(|path| std::fs::read(path).unwrap()));
        for input in &inputs {
            target(input);
        }
        let mut random = Random(name.len() as u64);
        for round in 0..3000 {
            let mut input = inputs[round % inputs.len()].clone();
            let other = &inputs[random.below(inputs.len())];
            damage(&mut random, &mut input, other);
            target(&input);
        }
    }
}

#[test]
fn the_good_files_are_accepted() {
    for (name, accepts) in targets::accepting() {
        assert!(accepts(), "{name}");
    }
}
