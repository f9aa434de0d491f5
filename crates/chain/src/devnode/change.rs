//! What only the owner of a subnet, the root account, or the passing of time changes on a genuine chain, and tests change by hand.

use super::DevNeuron;
use super::runtime::{Entry, SUBTENSOR};
use super::state::State;

/// A change of the chain's state. It takes effect in the next block, and again after a fork that lost that block.
#[derive(Clone, Debug)]
pub enum Change {
    ValidatorPermit {
        uid: u16,
        has_permit: bool,
    },
    /// In rao.
    Stake {
        uid: u16,
        stake: u64,
    },
    /// A hotkey takes the next uid, or replaces the one that has `uid`.
    Register {
        uid: Option<u16>,
        neuron: DevNeuron,
    },
    CommitReveal(bool),
    CommitRevealVersion(u16),
    RevealPeriod(u64),
    WeightsVersion(u64),
    WeightsRateLimit(u64),
    MinAllowedWeights(u16),
    MaxWeightLimit(u16),
    StakeThreshold(u64),
    Tempo(u16),
    /// The owner asks for an epoch at this block.
    EpochAt(u64),
    Mechanisms(u8),
    /// The runtime is replaced by one with a later version and other error numbers.
    UpgradeRuntime,
    /// The runtime is replaced by one that describes itself in a version of metadata that no client of today knows.
    OutgrowMetadata,
    /// The runtime is replaced by one that has no longer these storage entries, as far as a client can see.
    DropEntries(&'static [Entry]),
}

/// Applies a change in `block`.
pub(super) fn apply(state: &mut State, netuid: u16, change: &Change, block: u64) {
    match change {
        Change::ValidatorPermit { uid, has_permit } => {
            let mut permits: Vec<bool> = state.value(SUBTENSOR, "ValidatorPermit", (netuid,));
            if let Some(permit) = permits.get_mut(usize::from(*uid)) {
                *permit = *has_permit;
            }
            state.put(SUBTENSOR, "ValidatorPermit", (netuid,), permits);
        }
        Change::Stake { uid, stake } => {
            let hotkey: [u8; 32] = state.value(SUBTENSOR, "Keys", (netuid, *uid));
            state.put(SUBTENSOR, "TotalHotkeyAlpha", (hotkey, netuid), *stake);
        }
        Change::Register { uid, neuron } => register(state, netuid, *uid, neuron, block),
        Change::CommitReveal(enabled) => state.put(SUBTENSOR, "CommitRevealWeightsEnabled", (netuid,), *enabled),
        Change::CommitRevealVersion(version) => state.put(SUBTENSOR, "CommitRevealWeightsVersion", (), *version),
        Change::RevealPeriod(epochs) => state.put(SUBTENSOR, "RevealPeriodEpochs", (netuid,), *epochs),
        Change::WeightsVersion(version) => state.put(SUBTENSOR, "WeightsVersionKey", (netuid,), *version),
        Change::WeightsRateLimit(blocks) => state.put(SUBTENSOR, "WeightsSetRateLimit", (netuid,), *blocks),
        Change::MinAllowedWeights(entries) => state.put(SUBTENSOR, "MinAllowedWeights", (netuid,), *entries),
        Change::MaxWeightLimit(limit) => state.put(SUBTENSOR, "MaxWeightsLimit", (netuid,), *limit),
        Change::StakeThreshold(stake) => state.put(SUBTENSOR, "StakeThreshold", (), *stake),
        Change::Tempo(tempo) => state.put(SUBTENSOR, "Tempo", (netuid,), *tempo),
        Change::EpochAt(block) => state.put(SUBTENSOR, "PendingEpochAt", (netuid,), *block),
        Change::Mechanisms(count) => state.put(SUBTENSOR, "MechanismCountCurrent", (netuid,), *count),
        Change::UpgradeRuntime => state.upgrade(),
        Change::OutgrowMetadata => state.outgrow(),
        Change::DropEntries(entries) => state.leave_out(entries),
    }
}

fn register(state: &mut State, netuid: u16, uid: Option<u16>, neuron: &DevNeuron, block: u64) {
    let count: u16 = state.value(SUBTENSOR, "SubnetworkN", (netuid,));
    let uid = uid.unwrap_or(count);
    if uid > count {
        return;
    }
    if uid < count {
        let former: [u8; 32] = state.value(SUBTENSOR, "Keys", (netuid, uid));
        state.remove(SUBTENSOR, "Uids", (netuid, former));
    }
    put_neuron(state, netuid, uid, neuron, block);
    state.put(SUBTENSOR, "SubnetworkN", (netuid,), count.max(uid + 1));
    let mut permits: Vec<bool> = state.value(SUBTENSOR, "ValidatorPermit", (netuid,));
    permits.resize(usize::from(count.max(uid + 1)), false);
    permits[usize::from(uid)] = neuron.validator_permit;
    state.put(SUBTENSOR, "ValidatorPermit", (netuid,), permits);
    let mut updates: Vec<u64> = state.value(SUBTENSOR, "LastUpdate", (netuid,));
    updates.resize(usize::from(count.max(uid + 1)), 0);
    // The genuine chain sets the block of the registration here, so that the rate limit holds from then on.
    updates[usize::from(uid)] = block;
    state.put(SUBTENSOR, "LastUpdate", (netuid,), updates);
}

/// What the chain stores of a neuron by itself.
pub(super) fn put_neuron(state: &mut State, netuid: u16, uid: u16, neuron: &DevNeuron, block: u64) {
    state.put(SUBTENSOR, "Keys", (netuid, uid), neuron.hotkey.0);
    state.put(SUBTENSOR, "Uids", (netuid, neuron.hotkey.0), uid);
    state.put(SUBTENSOR, "Owner", (neuron.hotkey.0,), neuron.coldkey.0);
    state.put(SUBTENSOR, "TotalHotkeyAlpha", (neuron.hotkey.0, netuid), neuron.stake);
    state.put(SUBTENSOR, "BlockAtRegistration", (netuid, uid), block);
}
