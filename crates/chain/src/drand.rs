//! The drand beacon that opens timelocked weights: rounds of a BLS signature at fixed times, stored on chain by the runtime's
//! off-chain workers.

use serde::{Deserialize, Serialize};

/// Bytes of a compressed public key (group G2) and of a compressed signature (group G1).
pub const PUBLIC_KEY_BYTES: usize = 96;
pub const SIGNATURE_BYTES: usize = 48;

/// A beacon: who signs, since when, how often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beacon {
    /// Compressed point of G2, [`PUBLIC_KEY_BYTES`] long.
    pub public_key: Vec<u8>,
    /// Unix time of round 1, in seconds.
    pub genesis_s: u64,
    /// Seconds between rounds.
    pub period_s: u64,
}

/// A published round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulse {
    pub round: u64,
    /// SHA-256 of the signature.
    pub randomness: Vec<u8>,
    /// Compressed point of G1, [`SIGNATURE_BYTES`] long.
    pub signature: Vec<u8>,
}

impl Beacon {
    /// Quicknet, the beacon of the public networks (chain hash 52db9ba7…).
    pub fn quicknet() -> Self {
        Self { public_key: QUICKNET_KEY.to_vec(), genesis_s: 1_692_803_367, period_s: 3 }
    }

    /// The newest round that is published at `now_ms`; 0 before the first.
    pub fn round_at(&self, now_ms: u64) -> u64 {
        match now_ms.checked_sub(self.genesis_s * 1000) {
            Some(passed) => passed / (self.period_s.max(1) * 1000) + 1,
            None => 0,
        }
    }

    /// Unix time at which a round is published, in milliseconds.
    pub fn time_of(&self, round: u64) -> u64 {
        (self.genesis_s + round.saturating_sub(1).saturating_mul(self.period_s)).saturating_mul(1000)
    }
}

const QUICKNET_KEY: [u8; PUBLIC_KEY_BYTES] = [
    0x83, 0xcf, 0x0f, 0x28, 0x96, 0xad, 0xee, 0x7e, 0xb8, 0xb5, 0xf0, 0x1f, 0xca, 0xd3, 0x91, 0x22, 0x12, 0xc4, 0x37, 0xe0, 0x07, 0x3e,
    0x91, 0x1f, 0xb9, 0x00, 0x22, 0xd3, 0xe7, 0x60, 0x18, 0x3c, 0x8c, 0x4b, 0x45, 0x0b, 0x6a, 0x0a, 0x6c, 0x3a, 0xc6, 0xa5, 0x77, 0x6a,
    0x2d, 0x10, 0x64, 0x51, 0x0d, 0x1f, 0xec, 0x75, 0x8c, 0x92, 0x1c, 0xc2, 0x2b, 0x0e, 0x17, 0xe6, 0x3a, 0xaf, 0x4b, 0xcb, 0x5e, 0xd6,
    0x63, 0x04, 0xde, 0x9c, 0xf8, 0x09, 0xbd, 0x27, 0x4c, 0xa7, 0x3b, 0xab, 0x4a, 0xf5, 0xa6, 0xe9, 0xc7, 0x6a, 0x4b, 0xc0, 0x9e, 0x76,
    0xea, 0xe8, 0x99, 0x1e, 0xf5, 0xec, 0xe4, 0x5a,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quicknet_is_the_beacon_of_the_golden_file() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../tests/data/golden-461.json")).unwrap();
        let recorded = &golden["reference"]["timelock"];
        let beacon = Beacon::quicknet();
        assert_eq!(hex::encode(&beacon.public_key), recorded["public_key_hex"].as_str().unwrap());
        assert_eq!(beacon.genesis_s, recorded["genesis"].as_u64().unwrap());
        assert_eq!(beacon.period_s, recorded["period_s"].as_u64().unwrap());
    }

    #[test]
    fn rounds_begin_at_their_time() {
        let beacon = Beacon::quicknet();
        assert_eq!(beacon.round_at(0), 0);
        for round in [1, 2, 1000, 34_000_000] {
            assert_eq!(beacon.round_at(beacon.time_of(round)), round);
            assert_eq!(beacon.round_at(beacon.time_of(round) - 1), round - 1);
        }
    }
}
