//! The randomness beacon as the chain keeps it: its configuration, the newest round, and the pulses that timelocked rows wait for.
//!
//! A genuine chain stores every pulse of a week. This one stores those that a commit waits for: they are all that can be told
//! apart from outside by what becomes of weights.

use parity_scale_codec::Encode;
use sha2::{Digest as _, Sha256};

use super::runtime::DRAND;
use super::state::State;
use crate::drand::{Beacon, Pulse};
use crate::timelock::BeaconSecret;

/// Which beacon opens timelocked rows.
#[derive(Clone, Debug, Default)]
pub enum DevBeacon {
    /// A beacon of the node's own, whose every round is published on time.
    #[default]
    Own,
    /// A genuine one, of which these rounds are known. Each appears when its time has come.
    Recorded { beacon: Beacon, pulses: Vec<Pulse> },
}

/// Seconds between the rounds of the node's own beacon, as with quicknet.
const PERIOD_S: u64 = 3;
/// How long the node's own beacon has been running when the chain starts: rounds have numbers above 1 then.
const EARLIER_S: u64 = 3_000;

pub(super) struct Pulses {
    source: Source,
    beacon: Beacon,
}

enum Source {
    Own(BeaconSecret),
    Recorded(Vec<Pulse>),
}

/// `BeaconConfiguration` of the drand pallet.
#[derive(Encode)]
struct BeaconConfiguration {
    public_key: Vec<u8>,
    period: u32,
    genesis_time: u32,
    hash: Vec<u8>,
    group_hash: Vec<u8>,
    scheme_id: Vec<u8>,
    beacon_id: Vec<u8>,
}

impl Pulses {
    pub(super) fn new(beacon: DevBeacon, now_ms: u64) -> Self {
        match beacon {
            DevBeacon::Own => {
                let secret = BeaconSecret::generate((now_ms / 1000).saturating_sub(EARLIER_S), PERIOD_S);
                Self { beacon: secret.beacon.clone(), source: Source::Own(secret) }
            }
            DevBeacon::Recorded { beacon, pulses } => Self { beacon, source: Source::Recorded(pulses) },
        }
    }

    /// Writes the beacon's configuration into the first state.
    pub(super) fn configure(&self, state: &mut State, now_ms: u64) {
        let configuration = BeaconConfiguration {
            public_key: self.beacon.public_key.clone(),
            period: self.beacon.period_s as u32,
            genesis_time: self.beacon.genesis_s as u32,
            hash: Sha256::digest(&self.beacon.public_key).to_vec(),
            group_hash: Sha256::digest(self.beacon.genesis_s.to_be_bytes()).to_vec(),
            scheme_id: b"bls-unchained-g1-rfc9380".to_vec(),
            beacon_id: b"quicknet".to_vec(),
        };
        state.put(DRAND, "BeaconConfig", (), configuration);
        self.publish(state, now_ms);
    }

    /// The newest round that is published at `now_ms` becomes the chain's newest.
    pub(super) fn publish(&self, state: &mut State, now_ms: u64) {
        state.put(DRAND, "LastStoredRound", (), self.beacon.round_at(now_ms));
    }

    /// The signature of `round`, if it is published at `now_ms` and known; the chain stores it.
    pub(super) fn take(&self, state: &mut State, round: u64, now_ms: u64) -> Option<Vec<u8>> {
        if round > self.beacon.round_at(now_ms) {
            return None;
        }
        let pulse = match &self.source {
            Source::Own(secret) => {
                let signature = secret.sign(round);
                Pulse { round, randomness: Sha256::digest(&signature).to_vec(), signature }
            }
            Source::Recorded(pulses) => pulses.iter().find(|pulse| pulse.round == round)?.clone(),
        };
        state.put(DRAND, "Pulses", (round,), (round, pulse.randomness, pulse.signature.clone()));
        Some(pulse.signature)
    }
}
