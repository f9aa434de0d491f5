//! What the chain tells us about a subnet, in plain types: blocks, neurons, the metagraph, hyperparameters.

use std::fmt;

use protocol::AccountId;
use serde::{Deserialize, Serialize};

/// A block by number and hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockRef {
    pub number: u64,
    pub hash: [u8; 32],
}

impl fmt::Display for BlockRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{} (0x{}…)", self.number, hex::encode(&self.hash[..4]))
    }
}

impl fmt::Debug for BlockRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One registered hotkey of a subnet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neuron {
    /// Position in the subnet, from 0; what weights are set on. A uid changes its owner when a neuron is replaced.
    pub uid: u16,
    pub hotkey: AccountId,
    pub coldkey: AccountId,
    /// Stake on this subnet in rao (10⁻⁹ of a token), summed over all who stake to the hotkey.
    pub stake: u64,
    /// Whether the chain lets this neuron set weights on others.
    pub validator_permit: bool,
    /// Block of the last weights (or weight commit) of this neuron; 0 = never.
    pub last_update: u64,
}

/// The neurons of a subnet at one block, by ascending uid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metagraph {
    pub block: BlockRef,
    pub neurons: Vec<Neuron>,
}

impl Metagraph {
    pub fn by_hotkey(&self, hotkey: &AccountId) -> Option<&Neuron> {
        self.neurons.iter().find(|neuron| neuron.hotkey == *hotkey)
    }

    pub fn by_uid(&self, uid: u16) -> Option<&Neuron> {
        self.neurons.iter().find(|neuron| neuron.uid == uid)
    }

    /// Hotkeys with a validator permit, ascending.
    pub fn validators(&self) -> Vec<AccountId> {
        let mut validators: Vec<AccountId> =
            self.neurons.iter().filter(|neuron| neuron.validator_permit).map(|neuron| neuron.hotkey).collect();
        validators.sort();
        validators
    }
}

/// The parameters of a subnet that weights and epochs depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hyperparameters {
    /// Blocks of one epoch.
    pub tempo: u16,
    /// Blocks that must lie between two settings of weights by the same neuron.
    pub weights_rate_limit: u64,
    /// Least number of entries of a row, zeros counted (a row on oneself alone is exempt).
    pub min_allowed_weights: u16,
    /// Stored upper bound of one weight; the runtimes of 2026 check against 65535 whatever it says.
    pub max_weight_limit: u16,
    /// Least version that the subnet's owner accepts with weights; 0 = any.
    pub weights_version: u64,
    /// Whether weights must be committed encrypted and are revealed by the chain later.
    pub commit_reveal: bool,
    /// Least stake in rao of a hotkey that sets weights.
    pub stake_threshold: u64,
}

/// One hyperparameter of a subnet as the runtime lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hyperparameter {
    pub name: String,
    /// A number where it is one (a flag is 0 or 1, a fixed-point number its raw bits), else text.
    pub value: String,
}

/// Whether a hotkey is on a subnet, and what joining it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// The hotkey's uid; `None` while it is not registered.
    pub uid: Option<u16>,
    /// Whether the subnet takes registrations.
    pub is_open: bool,
    /// What a registration costs now, in rao (10⁻⁹ of a token); `None` where the runtime does not say.
    pub burn_rao: Option<u64>,
}
