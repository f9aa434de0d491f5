//! The rules by which a subtensor chain takes or refuses a row of weights, in their order: first in the transaction pool, then at
//! dispatch. Read from the runtime's source (spec 425, unchanged in 475) and partly seen on a genuine runtime.
//!
//! The development node and the in-memory chain apply them; a real node has its own.

use protocol::AccountId;

use crate::error::WeightsRefusal;
use crate::types::{Hyperparameters, Neuron};

/// What the rules look at.
pub struct Subnet<'a> {
    /// `None` where the subnet does not exist.
    pub hyperparameters: Option<&'a Hyperparameters>,
    pub neurons: &'a [Neuron],
    /// The hotkey of the subnet's owner: exempt from stake threshold and permit.
    pub owner: Option<AccountId>,
    /// The block whose rules apply: the head in the pool, the block being built at dispatch.
    pub block: u64,
}

impl Subnet<'_> {
    fn neuron(&self, hotkey: &AccountId) -> Option<&Neuron> {
        self.neurons.iter().find(|neuron| neuron.hotkey == *hotkey)
    }

    fn has_stake(&self, hotkey: &AccountId, parameters: &Hyperparameters) -> bool {
        self.owner == Some(*hotkey) || self.neuron(hotkey).map_or(0, |neuron| neuron.stake) >= parameters.stake_threshold
    }

    /// The rate limit has passed, or weights were never set. A hotkey without a uid is left to dispatch.
    fn may_set_now(&self, hotkey: &AccountId, parameters: &Hyperparameters) -> bool {
        self.neuron(hotkey)
            .is_none_or(|neuron| neuron.last_update == 0 || self.block.saturating_sub(neuron.last_update) >= parameters.weights_rate_limit)
    }

    /// The guards of the transaction pool. They run again at dispatch.
    pub fn check_pool(&self, hotkey: &AccountId) -> Result<(), WeightsRefusal> {
        let Some(parameters) = self.hyperparameters else { return Ok(()) };
        if !self.has_stake(hotkey, parameters) {
            return Err(WeightsRefusal::StakeTooLow);
        }
        if !self.may_set_now(hotkey, parameters) {
            return Err(WeightsRefusal::TooFast);
        }
        Ok(())
    }

    /// The checks at dispatch of a plain row; gives the uid whose row it becomes.
    pub fn check_dispatch(
        &self,
        hotkey: &AccountId,
        netuid: u16,
        uids: &[u16],
        values: &[u16],
        version_key: u64,
    ) -> Result<u16, WeightsRefusal> {
        if self.hyperparameters.is_some_and(|parameters| parameters.commit_reveal) {
            return Err(WeightsRefusal::CommitRevealEnabled);
        }
        if netuid == 0 {
            return Err(WeightsRefusal::RootNetwork);
        }
        if uids.len() != values.len() {
            return Err(WeightsRefusal::LengthsDiffer);
        }
        let Some(parameters) = self.hyperparameters else { return Err(WeightsRefusal::MechanismMissing) };
        if uids.len() > self.neurons.len() {
            return Err(WeightsRefusal::TooManyUids);
        }
        let Some(own) = self.neuron(hotkey) else { return Err(WeightsRefusal::NotRegistered) };
        if !self.has_stake(hotkey, parameters) {
            return Err(WeightsRefusal::StakeTooLow);
        }
        if parameters.weights_version != 0 && version_key < parameters.weights_version {
            return Err(WeightsRefusal::VersionKey);
        }
        if !self.may_set_now(hotkey, parameters) {
            return Err(WeightsRefusal::TooFast);
        }
        let on_itself = uids == [own.uid];
        if !own.validator_permit && self.owner != Some(*hotkey) && !on_itself {
            return Err(WeightsRefusal::NoValidatorPermit);
        }
        let mut sorted = uids.to_vec();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(WeightsRefusal::DuplicateUids);
        }
        if sorted.iter().any(|uid| self.neurons.iter().all(|neuron| neuron.uid != *uid)) {
            return Err(WeightsRefusal::UnknownUid);
        }
        if !on_itself && uids.len() < usize::from(parameters.min_allowed_weights).min(self.neurons.len()) {
            return Err(WeightsRefusal::TooFewWeights);
        }
        Ok(own.uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(n: u8) -> AccountId {
        AccountId([n; 32])
    }

    fn neurons() -> Vec<Neuron> {
        (0..4)
            .map(|n| Neuron {
                uid: u16::from(n),
                hotkey: account(n),
                coldkey: account(n),
                stake: 1000,
                validator_permit: n < 2,
                last_update: 0,
            })
            .collect()
    }

    fn parameters() -> Hyperparameters {
        Hyperparameters {
            tempo: 30,
            weights_rate_limit: 10,
            min_allowed_weights: 2,
            max_weight_limit: u16::MAX,
            weights_version: 7,
            commit_reveal: false,
            stake_threshold: 100,
        }
    }

    fn dispatch(subnet: &Subnet<'_>, who: u8, uids: &[u16], values: &[u16], version: u64) -> Result<u16, WeightsRefusal> {
        subnet.check_dispatch(&account(who), 24, uids, values, version)
    }

    #[test]
    fn a_permitted_row_is_accepted_for_the_uid_of_its_signer() {
        let (neurons, parameters) = (neurons(), parameters());
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, owner: None, block: 50 };
        assert_eq!(dispatch(&subnet, 1, &[0, 3], &[1, 2], 7), Ok(1));
    }

    #[test]
    fn refusals_come_in_the_order_of_the_runtime() {
        use WeightsRefusal::*;
        let (mut neurons, mut parameters) = (neurons(), parameters());
        // Each refusal is shown on a row that also breaks every rule after it.
        parameters.commit_reveal = true;
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, owner: None, block: 50 };
        assert_eq!(subnet.check_dispatch(&account(9), 0, &[9, 9], &[1], 0), Err(CommitRevealEnabled));
        parameters.commit_reveal = false;
        neurons[2].stake = 1;
        neurons[3].last_update = 45;
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, owner: None, block: 50 };
        assert_eq!(subnet.check_dispatch(&account(9), 0, &[9, 9], &[1], 0), Err(RootNetwork));
        assert_eq!(dispatch(&subnet, 9, &[9, 9], &[1], 0), Err(LengthsDiffer));
        assert_eq!(dispatch(&subnet, 9, &[9; 5], &[1; 5], 0), Err(TooManyUids));
        assert_eq!(dispatch(&subnet, 9, &[9, 9], &[1, 1], 0), Err(NotRegistered));
        assert_eq!(dispatch(&subnet, 2, &[9, 9], &[1, 1], 0), Err(StakeTooLow));
        assert_eq!(dispatch(&subnet, 3, &[9, 9], &[1, 1], 6), Err(VersionKey));
        assert_eq!(dispatch(&subnet, 3, &[9, 9], &[1, 1], 7), Err(TooFast));
        neurons[3].last_update = 40;
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, owner: None, block: 50 };
        assert_eq!(dispatch(&subnet, 3, &[9, 9], &[1, 1], 7), Err(NoValidatorPermit));
        assert_eq!(dispatch(&subnet, 0, &[9, 9], &[1, 1], 7), Err(DuplicateUids));
        assert_eq!(dispatch(&subnet, 0, &[9], &[1], 7), Err(UnknownUid));
        assert_eq!(dispatch(&subnet, 0, &[2], &[1], 7), Err(TooFewWeights));
        let nowhere = Subnet { hyperparameters: None, neurons: &[], owner: None, block: 50 };
        assert_eq!(dispatch(&nowhere, 0, &[2], &[1], 7), Err(MechanismMissing));
    }

    #[test]
    fn a_row_on_oneself_needs_neither_permit_nor_minimum_length() {
        let (neurons, parameters) = (neurons(), parameters());
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, owner: None, block: 50 };
        assert_eq!(dispatch(&subnet, 3, &[3], &[65535], 7), Ok(3));
        assert_eq!(dispatch(&subnet, 3, &[3, 0], &[65535, 0], 7), Err(WeightsRefusal::NoValidatorPermit));
    }

    #[test]
    fn the_owners_hotkey_needs_neither_stake_nor_permit() {
        let (mut neurons, parameters) = (neurons(), parameters());
        neurons[3].stake = 0;
        let mut subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, owner: None, block: 50 };
        assert_eq!(subnet.check_pool(&account(3)), Err(WeightsRefusal::StakeTooLow));
        subnet.owner = Some(account(3));
        assert_eq!(subnet.check_pool(&account(3)), Ok(()));
        assert_eq!(dispatch(&subnet, 3, &[0, 1], &[1, 1], 7), Ok(3));
    }

    #[test]
    fn the_rate_limit_ends_exactly_after_its_blocks_and_never_applies_to_the_first_row() {
        let (mut neurons, parameters) = (neurons(), parameters());
        neurons[0].last_update = 40;
        let mut subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, owner: None, block: 49 };
        assert_eq!(subnet.check_pool(&account(0)), Err(WeightsRefusal::TooFast));
        subnet.block = 50;
        assert_eq!(subnet.check_pool(&account(0)), Ok(()));
        subnet.block = 1;
        assert_eq!(subnet.check_pool(&account(1)), Ok(()));
    }
}
