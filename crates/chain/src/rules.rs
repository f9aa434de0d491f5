//! The rules by which a subtensor chain takes or refuses a row of weights, in their order: first in the transaction pool, then at
//! dispatch, and for a timelocked row once more when it is revealed. Read from the runtime's source (spec 425, unchanged in 475) and
//! partly seen on a genuine runtime.
//!
//! The development node and the in-memory chain apply them; the setter asks them before it sends anything; a real node has its own.

use protocol::AccountId;

use crate::error::WeightsRefusal;
use crate::timelock::COMMIT_REVEAL_VERSION;
use crate::types::{Hyperparameters, Neuron};

/// Most timelocked rows of one hotkey that wait in one epoch.
pub const UNREVEALED_COMMITS_MAX: usize = 10;

/// What the rules look at.
pub struct Subnet<'a> {
    /// `None` where the subnet or its mechanism does not exist.
    pub hyperparameters: Option<&'a Hyperparameters>,
    pub neurons: &'a [Neuron],
    /// Blocks of the last weights by uid, for a mechanism other than 0, whose blocks the neurons carry.
    pub last_updates: Option<&'a [u64]>,
    /// The hotkey of the subnet's owner: exempt from stake threshold and permit.
    pub owner: Option<AccountId>,
    /// The block whose rules apply: the head in the pool, the block being built at dispatch.
    pub block: u64,
    /// Under Null consensus only the holder of a permit may set weights, whoever he is and whatever he sets.
    pub is_null_consensus: bool,
}

/// A timelocked row as its rules see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelockedCommit {
    pub round: u64,
    pub commit_reveal_version: u16,
    /// What the chain asks for (`CommitRevealWeightsVersion`).
    pub chain_version: u16,
    /// Newest round that the chain has stored.
    pub last_stored_round: u64,
    /// Rows of the same hotkey that wait since the same epoch.
    pub unrevealed: usize,
}

impl Subnet<'_> {
    fn neuron(&self, hotkey: &AccountId) -> Option<&Neuron> {
        self.neurons.iter().find(|neuron| neuron.hotkey == *hotkey)
    }

    fn has_stake(&self, hotkey: &AccountId, parameters: &Hyperparameters) -> bool {
        self.owner == Some(*hotkey) || self.neuron(hotkey).map_or(0, |neuron| neuron.stake) >= parameters.stake_threshold
    }

    fn last_update(&self, neuron: &Neuron) -> u64 {
        match self.last_updates {
            Some(updates) => updates.get(usize::from(neuron.uid)).copied().unwrap_or(0),
            None => neuron.last_update,
        }
    }

    /// The rate limit has passed, or weights were never set. A hotkey without a uid is left to dispatch.
    fn may_set_now(&self, hotkey: &AccountId, parameters: &Hyperparameters) -> bool {
        self.neuron(hotkey).is_none_or(|neuron| {
            let last_update = self.last_update(neuron);
            last_update == 0 || self.block.saturating_sub(last_update) >= parameters.weights_rate_limit
        })
    }

    /// The guards of the transaction pool for a plain row. They run again at dispatch.
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

    /// The guards of the transaction pool for a timelocked row, whose rate limit is judged at dispatch alone.
    pub fn check_commit_pool(&self, hotkey: &AccountId, commit: &TimelockedCommit) -> Result<(), WeightsRefusal> {
        if self.hyperparameters.is_some_and(|parameters| !self.has_stake(hotkey, parameters)) {
            return Err(WeightsRefusal::StakeTooLow);
        }
        if commit.round < commit.last_stored_round {
            return Err(WeightsRefusal::RoundPassed);
        }
        Ok(())
    }

    /// The checks at dispatch of a timelocked row.
    pub fn check_commit(&self, hotkey: &AccountId, commit: &TimelockedCommit) -> Result<(), WeightsRefusal> {
        let Some(parameters) = self.hyperparameters else { return Err(WeightsRefusal::MechanismMissing) };
        if !parameters.commit_reveal {
            return Err(WeightsRefusal::CommitRevealDisabled);
        }
        if commit.commit_reveal_version != commit.chain_version {
            return Err(WeightsRefusal::CommitVersion { required: commit.chain_version, ours: commit.commit_reveal_version });
        }
        if self.neuron(hotkey).is_none() {
            return Err(WeightsRefusal::NotRegistered);
        }
        if !self.may_set_now(hotkey, parameters) {
            return Err(WeightsRefusal::TooFast);
        }
        if commit.unrevealed >= UNREVEALED_COMMITS_MAX {
            return Err(WeightsRefusal::TooManyCommits);
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
        self.check_row(hotkey, netuid, uids, values, version_key, true)
    }

    /// The checks of a timelocked row when it is opened: those of a plain one, without the rate limit.
    pub fn check_reveal(
        &self,
        hotkey: &AccountId,
        netuid: u16,
        uids: &[u16],
        values: &[u16],
        version_key: u64,
    ) -> Result<u16, WeightsRefusal> {
        self.check_row(hotkey, netuid, uids, values, version_key, false)
    }

    fn check_row(
        &self,
        hotkey: &AccountId,
        netuid: u16,
        uids: &[u16],
        values: &[u16],
        version_key: u64,
        is_rate_limited: bool,
    ) -> Result<u16, WeightsRefusal> {
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
        if is_rate_limited && !self.may_set_now(hotkey, parameters) {
            return Err(WeightsRefusal::TooFast);
        }
        let on_itself = uids == [own.uid];
        let is_exempt = !self.is_null_consensus && (self.owner == Some(*hotkey) || on_itself);
        if !own.validator_permit && !is_exempt {
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

impl TimelockedCommit {
    /// A commit as this build makes it, for a chain in a given state.
    pub fn ours(round: u64, chain_version: u16, last_stored_round: u64, unrevealed: usize) -> Self {
        Self { round, commit_reveal_version: COMMIT_REVEAL_VERSION, chain_version, last_stored_round, unrevealed }
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

    /// A subnet without anything.
    fn at(block: u64) -> Subnet<'static> {
        Subnet { hyperparameters: None, neurons: &[], last_updates: None, owner: None, block, is_null_consensus: false }
    }

    fn dispatch(subnet: &Subnet<'_>, who: u8, uids: &[u16], values: &[u16], version: u64) -> Result<u16, WeightsRefusal> {
        subnet.check_dispatch(&account(who), 24, uids, values, version)
    }

    #[test]
    fn a_permitted_row_is_accepted_for_the_uid_of_its_signer() {
        let (neurons, parameters) = (neurons(), parameters());
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(50) };
        assert_eq!(dispatch(&subnet, 1, &[0, 3], &[1, 2], 7), Ok(1));
    }

    #[test]
    fn refusals_come_in_the_order_of_the_runtime() {
        use WeightsRefusal::*;
        let (mut neurons, mut parameters) = (neurons(), parameters());
        // Each refusal is shown on a row that also breaks every rule after it.
        parameters.commit_reveal = true;
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(50) };
        assert_eq!(subnet.check_dispatch(&account(9), 0, &[9, 9], &[1], 0), Err(CommitRevealEnabled));
        parameters.commit_reveal = false;
        neurons[2].stake = 1;
        neurons[3].last_update = 45;
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(50) };
        assert_eq!(subnet.check_dispatch(&account(9), 0, &[9, 9], &[1], 0), Err(RootNetwork));
        assert_eq!(dispatch(&subnet, 9, &[9, 9], &[1], 0), Err(LengthsDiffer));
        assert_eq!(dispatch(&subnet, 9, &[9; 5], &[1; 5], 0), Err(TooManyUids));
        assert_eq!(dispatch(&subnet, 9, &[9, 9], &[1, 1], 0), Err(NotRegistered));
        assert_eq!(dispatch(&subnet, 2, &[9, 9], &[1, 1], 0), Err(StakeTooLow));
        assert_eq!(dispatch(&subnet, 3, &[9, 9], &[1, 1], 6), Err(VersionKey));
        assert_eq!(dispatch(&subnet, 3, &[9, 9], &[1, 1], 7), Err(TooFast));
        neurons[3].last_update = 40;
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(50) };
        assert_eq!(dispatch(&subnet, 3, &[9, 9], &[1, 1], 7), Err(NoValidatorPermit));
        assert_eq!(dispatch(&subnet, 0, &[9, 9], &[1, 1], 7), Err(DuplicateUids));
        assert_eq!(dispatch(&subnet, 0, &[9], &[1], 7), Err(UnknownUid));
        assert_eq!(dispatch(&subnet, 0, &[2], &[1], 7), Err(TooFewWeights));
        let nowhere = Subnet { ..at(50) };
        assert_eq!(dispatch(&nowhere, 0, &[2], &[1], 7), Err(MechanismMissing));
    }

    #[test]
    fn a_row_on_oneself_needs_neither_permit_nor_minimum_length() {
        let (neurons, parameters) = (neurons(), parameters());
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(50) };
        assert_eq!(dispatch(&subnet, 3, &[3], &[65535], 7), Ok(3));
        assert_eq!(dispatch(&subnet, 3, &[3, 0], &[65535, 0], 7), Err(WeightsRefusal::NoValidatorPermit));
    }

    #[test]
    fn the_owners_hotkey_needs_neither_stake_nor_permit() {
        let (mut neurons, parameters) = (neurons(), parameters());
        neurons[3].stake = 0;
        let mut subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(50) };
        assert_eq!(subnet.check_pool(&account(3)), Err(WeightsRefusal::StakeTooLow));
        subnet.owner = Some(account(3));
        assert_eq!(subnet.check_pool(&account(3)), Ok(()));
        assert_eq!(dispatch(&subnet, 3, &[0, 1], &[1, 1], 7), Ok(3));
    }

    #[test]
    fn the_rate_limit_ends_exactly_after_its_blocks_and_never_applies_to_the_first_row() {
        let (mut neurons, parameters) = (neurons(), parameters());
        neurons[0].last_update = 40;
        let mut subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(49) };
        assert_eq!(subnet.check_pool(&account(0)), Err(WeightsRefusal::TooFast));
        subnet.block = 50;
        assert_eq!(subnet.check_pool(&account(0)), Ok(()));
        subnet.block = 1;
        assert_eq!(subnet.check_pool(&account(1)), Ok(()));
    }

    #[test]
    fn each_mechanism_has_a_rate_limit_of_its_own() {
        let (mut neurons, parameters) = (neurons(), parameters());
        neurons[0].last_update = 45;
        let mut subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(50) };
        assert_eq!(subnet.check_pool(&account(0)), Err(WeightsRefusal::TooFast));
        let updates = [40, 0, 0, 0];
        subnet.last_updates = Some(&updates);
        assert_eq!(subnet.check_pool(&account(0)), Ok(()));
    }

    #[test]
    fn under_null_consensus_nobody_is_exempt_from_the_permit() {
        let (neurons, parameters) = (neurons(), parameters());
        let owner = Some(account(3));
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, owner, is_null_consensus: true, ..at(50) };
        assert_eq!(dispatch(&subnet, 3, &[3], &[65535], 7), Err(WeightsRefusal::NoValidatorPermit));
        assert_eq!(dispatch(&subnet, 1, &[0, 3], &[1, 2], 7), Ok(1));
    }

    #[test]
    fn timelocked_rows_are_refused_in_the_order_of_the_runtime() {
        use WeightsRefusal::*;
        let (mut neurons, mut parameters) = (neurons(), parameters());
        neurons[0].last_update = 45;
        neurons[2].stake = 1;
        let bad = TimelockedCommit { round: 9, commit_reveal_version: 3, chain_version: 4, last_stored_round: 10, unrevealed: 10 };
        let good = TimelockedCommit::ours(10, 4, 10, 9);
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(50) };
        assert_eq!(subnet.check_commit_pool(&account(2), &bad), Err(StakeTooLow));
        assert_eq!(subnet.check_commit_pool(&account(0), &bad), Err(RoundPassed));
        assert_eq!(subnet.check_commit_pool(&account(0), &good), Ok(()), "the rate limit is judged at dispatch");
        assert_eq!(at(50).check_commit(&account(9), &bad), Err(MechanismMissing));
        assert_eq!(subnet.check_commit(&account(9), &bad), Err(CommitRevealDisabled));
        parameters.commit_reveal = true;
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(50) };
        assert_eq!(subnet.check_commit(&account(9), &bad), Err(CommitVersion { required: 4, ours: 3 }));
        let versioned = TimelockedCommit { commit_reveal_version: 4, ..bad };
        assert_eq!(subnet.check_commit(&account(9), &versioned), Err(NotRegistered));
        assert_eq!(subnet.check_commit(&account(0), &versioned), Err(TooFast));
        assert_eq!(subnet.check_commit(&account(1), &versioned), Err(TooManyCommits));
        assert_eq!(subnet.check_commit(&account(1), &good), Ok(()));
    }

    #[test]
    fn a_reveal_passes_the_checks_of_a_row_but_not_the_rate_limit() {
        let (mut neurons, mut parameters) = (neurons(), parameters());
        parameters.commit_reveal = true;
        neurons[0].last_update = 49;
        let subnet = Subnet { hyperparameters: Some(&parameters), neurons: &neurons, ..at(50) };
        assert_eq!(subnet.check_reveal(&account(0), 24, &[1, 2], &[1, 2], 7), Ok(0));
        assert_eq!(subnet.check_reveal(&account(0), 24, &[1, 2], &[1, 2], 6), Err(WeightsRefusal::VersionKey));
        assert_eq!(subnet.check_reveal(&account(2), 24, &[1, 2], &[1, 2], 7), Err(WeightsRefusal::NoValidatorPermit));
    }
}
