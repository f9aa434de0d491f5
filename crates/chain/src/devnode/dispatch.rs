//! Executing a verified call on a state: the weight rules, the commitments pallet, genuine events and errors.

use parity_scale_codec::{Compact, Decode, Encode};
use protocol::AccountId;

use super::extrinsic::{Call, Invalid, Signed};
use super::runtime::{COMMITMENTS, DRAND, SUBTENSOR, SYSTEM};
use super::state::State;
use crate::error::WeightsRefusal;
use crate::rules::{Subnet, TimelockedCommit};
use crate::timelock::CIPHERTEXT_MAX;
use crate::types::{Hyperparameters, Neuron};
use crate::weights::as_stored;

/// One row of `TimelockedWeightCommits`: account, block, ciphertext, round.
pub(super) type Timelocked = ([u8; 32], u64, Vec<u8>, u64);

/// Bytes of commitments of one hotkey in one epoch, and the least that one commitment counts.
const COMMITMENT_SPACE: u64 = 3100;
const COMMITMENT_LEAST: u64 = 100;

/// `DispatchClass` in an event's dispatch info.
#[derive(Clone, Copy)]
pub(super) enum Class {
    Normal = 0,
    Mandatory = 2,
}

/// SCALE of `DispatchEventInfo` without weight; weight and commitment calls pay no fee.
pub(super) fn dispatch_info(class: Class) -> impl Encode {
    const PAYS_NO: u8 = 1;
    (Compact(0u64), Compact(0u64), class as u8, PAYS_NO)
}

/// `UsageTracker` of the commitments pallet.
#[derive(Encode, Decode, Default)]
struct Usage {
    last_epoch: u64,
    used_space: u64,
}

/// A subnet's mechanism as the weight rules see it.
pub(super) struct Place {
    netuid: u16,
    /// The storage index; `None` where the mechanism does not exist.
    pub(super) index: Option<u16>,
    parameters: Option<Hyperparameters>,
    neurons: Vec<Neuron>,
    updates: Vec<u64>,
    owner: Option<AccountId>,
}

impl Place {
    pub(super) fn of(state: &State, netuid: u16, mechanism: u8) -> Self {
        let index = state.mechanism_index(netuid, mechanism);
        Self {
            netuid,
            index,
            parameters: state.hyperparameters(netuid).filter(|_| index.is_some()),
            neurons: state.neurons(netuid),
            updates: index.map(|index| state.last_updates(index)).unwrap_or_default(),
            owner: state.owner_hotkey(netuid),
        }
    }

    pub(super) fn subnet(&self, block: u64) -> Subnet<'_> {
        Subnet {
            hyperparameters: self.parameters.as_ref(),
            neurons: &self.neurons,
            last_updates: Some(&self.updates),
            owner: self.owner,
            block,
            is_null_consensus: false,
        }
    }

    /// Notes `block` as the one of the last weights of `uid`.
    fn touch(&self, state: &mut State, uid: u16, block: u64) {
        let Some(index) = self.index else { return };
        let mut updates = self.updates.clone();
        updates.resize(self.neurons.len().max(usize::from(uid) + 1), 0);
        updates[usize::from(uid)] = block;
        state.put(SUBTENSOR, "LastUpdate", (index,), updates);
    }
}

/// The commit of a call as its rules see it, with its index and the epoch that it is stored under.
fn timelocked(state: &State, place: &Place, signer: &AccountId, round: u64, version: u16) -> (TimelockedCommit, u64) {
    let epoch: u64 = state.value(SUBTENSOR, "SubnetEpochIndex", (place.netuid,));
    let waiting: Vec<Timelocked> = match place.index {
        Some(index) => state.value(SUBTENSOR, "TimelockedWeightCommits", (index, epoch)),
        None => Vec::new(),
    };
    let commit = TimelockedCommit {
        round,
        commit_reveal_version: version,
        chain_version: state.value(SUBTENSOR, "CommitRevealWeightsVersion", ()),
        last_stored_round: state.value(DRAND, "LastStoredRound", ()),
        unrevealed: waiting.iter().filter(|(account, ..)| *account == signer.0).count(),
    };
    (commit, epoch)
}

/// The pool's guards for a call at `block`.
pub(super) fn check_pool(state: &State, signed: &Signed, block: u64) -> Result<(), Invalid> {
    let checked = match &signed.call {
        Call::SetWeights { netuid, mechanism, .. } => Place::of(state, *netuid, *mechanism).subnet(block).check_pool(&signed.signer),
        Call::CommitWeights { netuid, mechanism, round, version, .. } => {
            let place = Place::of(state, *netuid, *mechanism);
            let (commit, _) = timelocked(state, &place, &signed.signer, *round, *version);
            place.subnet(block).check_commit_pool(&signed.signer, &commit)
        }
        Call::SetCommitment { .. } => Ok(()),
    };
    checked.map_err(|refusal| match refusal {
        WeightsRefusal::StakeTooLow => Invalid::Custom(1),
        WeightsRefusal::TooFast => Invalid::Custom(6),
        WeightsRefusal::RoundPassed => Invalid::Custom(15),
        _ => Invalid::Custom(255),
    })
}

/// Executes the call in `block`. Gives its events, the last of which says whether it succeeded; a failed call changes nothing.
pub(super) fn execute(state: &mut State, signed: &Signed, block: u64) -> Vec<Vec<u8>> {
    let outcome = match &signed.call {
        Call::SetWeights { netuid, mechanism, uids, values, version_key } => {
            let row = (uids.as_slice(), values.as_slice());
            set_weights(state, &signed.signer, block, (*netuid, *mechanism), row, *version_key)
                .map_err(|refusal| (SUBTENSOR, error_name(&refusal)))
        }
        Call::CommitWeights { netuid, mechanism, commit, round, version } => {
            commit_weights(state, &signed.signer, block, (*netuid, *mechanism), commit, *round, *version).map_err(|refusal| {
                // The two kinds of rows have errors of their own for the rate limit.
                let name = if refusal == WeightsRefusal::TooFast { "CommittingWeightsTooFast" } else { error_name(&refusal) };
                (SUBTENSOR, name)
            })
        }
        Call::SetCommitment { netuid, info, space } => {
            set_commitment(state, &signed.signer, block, *netuid, info, *space).map_err(|name| (COMMITMENTS, name))
        }
    };
    match outcome {
        Ok(event) => vec![event, state.runtime().event(SYSTEM, "ExtrinsicSuccess", dispatch_info(Class::Normal))],
        Err((pallet, name)) => {
            let mut fields = state.runtime().module_error(pallet, name).expect("refusals are errors of the metadata");
            dispatch_info(Class::Normal).encode_to(&mut fields);
            // The fields are SCALE already: an array of bytes encodes as itself, a vector would get a length.
            let mut event = state.runtime().event(SYSTEM, "ExtrinsicFailed", ());
            event.extend(fields);
            vec![event]
        }
    }
}

fn set_weights(
    state: &mut State,
    hotkey: &AccountId,
    block: u64,
    (netuid, mechanism): (u16, u8),
    (uids, values): (&[u16], &[u16]),
    version_key: u64,
) -> Result<Vec<u8>, WeightsRefusal> {
    let place = Place::of(state, netuid, mechanism);
    let uid = place.subnet(block).check_dispatch(hotkey, netuid, uids, values, version_key)?;
    let index = place.index.ok_or(WeightsRefusal::MechanismMissing)?;
    store(state, index, uid, uids, values);
    place.touch(state, uid, block);
    Ok(state.runtime().event(SUBTENSOR, "WeightsSet", (index, uid)))
}

fn store(state: &mut State, index: u16, uid: u16, uids: &[u16], values: &[u16]) {
    let row: Vec<(u16, u16)> = uids.iter().copied().zip(values.iter().copied()).collect();
    state.put(SUBTENSOR, "Weights", (index, uid), as_stored(&row));
}

fn commit_weights(
    state: &mut State,
    hotkey: &AccountId,
    block: u64,
    (netuid, mechanism): (u16, u8),
    ciphertext: &[u8],
    round: u64,
    version: u16,
) -> Result<Vec<u8>, WeightsRefusal> {
    let place = Place::of(state, netuid, mechanism);
    let (commit, epoch) = timelocked(state, &place, hotkey, round, version);
    let subnet = place.subnet(block);
    subnet.check_commit_pool(hotkey, &commit)?;
    subnet.check_commit(hotkey, &commit)?;
    let index = place.index.ok_or(WeightsRefusal::MechanismMissing)?;
    if ciphertext.len() > CIPHERTEXT_MAX {
        return Err(WeightsRefusal::Other("the commit is too long".to_owned()));
    }
    let mut waiting: Vec<Timelocked> = state.value(SUBTENSOR, "TimelockedWeightCommits", (index, epoch));
    waiting.push((hotkey.0, block, ciphertext.to_vec(), round));
    state.put(SUBTENSOR, "TimelockedWeightCommits", (index, epoch), waiting);
    let uid = state.uid_of(netuid, hotkey).ok_or(WeightsRefusal::NotRegistered)?;
    place.touch(state, uid, block);
    let hash = sp_crypto_hashing::blake2_256(ciphertext);
    Ok(state.runtime().event(SUBTENSOR, "TimelockedWeightsCommitted", (hotkey.0, index, hash, round)))
}

/// Opens the row of a timelocked commit with its round's signature and stores it, if it passes the rules again. A row that cannot be
/// opened, or that names another hotkey, or that a rule refuses, is dropped without a word, as on the genuine chain.
pub(super) fn reveal(
    state: &mut State,
    block: u64,
    (netuid, mechanism): (u16, u8),
    hotkey: &AccountId,
    plaintext: &[u8],
) -> Option<Vec<u8>> {
    let payload = crate::timelock::WeightsPayload::read(plaintext)?;
    if payload.hotkey()? != *hotkey {
        return None;
    }
    let place = Place::of(state, netuid, mechanism);
    let uid = place.subnet(block).check_reveal(hotkey, netuid, &payload.uids, &payload.values, payload.version_key).ok()?;
    let index = place.index?;
    store(state, index, uid, &payload.uids, &payload.values);
    Some(state.runtime().event(SUBTENSOR, "TimelockedWeightsRevealed", (index, hotkey.0)))
}

fn set_commitment(
    state: &mut State,
    hotkey: &AccountId,
    block: u64,
    netuid: u16,
    info: &[u8],
    space: u64,
) -> Result<Vec<u8>, &'static str> {
    if state.uid_of(netuid, hotkey).is_none() {
        return Err("AccountNotAllowedCommit");
    }
    let epoch: u64 = state.value(SUBTENSOR, "SubnetEpochIndex", (netuid,));
    let mut usage: Usage = state.stored(COMMITMENTS, "UsedSpaceOf", (netuid, hotkey.0)).unwrap_or_default();
    if usage.last_epoch != epoch {
        usage = Usage { last_epoch: epoch, used_space: 0 };
    }
    usage.used_space += space.max(COMMITMENT_LEAST);
    if usage.used_space > COMMITMENT_SPACE {
        return Err("SpaceLimitExceeded");
    }
    state.put(COMMITMENTS, "UsedSpaceOf", (netuid, hotkey.0), usage);
    let number = u32::try_from(block).expect("block numbers are u32 on chain");
    // Registration { deposit, block, info }
    let mut registration = (0u64, number).encode();
    registration.extend_from_slice(info);
    state.put_encoded(COMMITMENTS, "CommitmentOf", (netuid, hotkey.0), registration);
    state.put(COMMITMENTS, "LastCommitment", (netuid, hotkey.0), number);
    Ok(state.runtime().event(COMMITMENTS, "Commitment", (netuid, hotkey.0)))
}

/// The error of `SubtensorModule` that a refusal at dispatch is.
fn error_name(refusal: &WeightsRefusal) -> &'static str {
    match refusal {
        WeightsRefusal::CommitRevealEnabled => "CommitRevealEnabled",
        WeightsRefusal::CommitRevealDisabled => "CommitRevealDisabled",
        WeightsRefusal::CommitVersion { .. } => "IncorrectCommitRevealVersion",
        WeightsRefusal::TooManyCommits => "TooManyUnrevealedCommits",
        WeightsRefusal::RootNetwork => "CanNotSetRootNetworkWeights",
        WeightsRefusal::LengthsDiffer => "WeightVecNotEqualSize",
        WeightsRefusal::MechanismMissing => "MechanismDoesNotExist",
        WeightsRefusal::TooManyUids => "UidsLengthExceedUidsInSubNet",
        WeightsRefusal::NotRegistered => "HotKeyNotRegisteredInSubNet",
        WeightsRefusal::StakeTooLow => "NotEnoughStakeToSetWeights",
        WeightsRefusal::VersionKey | WeightsRefusal::VersionTooOld { .. } => "IncorrectWeightVersionKey",
        WeightsRefusal::TooFast => "SettingWeightsTooFast",
        WeightsRefusal::NoValidatorPermit => "NeuronNoValidatorPermit",
        WeightsRefusal::DuplicateUids => "DuplicateUids",
        WeightsRefusal::UnknownUid => "UidVecContainInvalidOne",
        WeightsRefusal::TooFewWeights | WeightsRefusal::EmptyRow => "WeightVecLengthIsLow",
        WeightsRefusal::WeightTooLarge => "MaxWeightExceeded",
        WeightsRefusal::ColdkeySwap => "ColdkeySwapAnnounced",
        WeightsRefusal::Nonce | WeightsRefusal::BadProof | WeightsRefusal::RoundPassed | WeightsRefusal::Other(_) => "CallDisabled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devnode::runtime::Runtime;

    #[test]
    fn every_refusal_at_dispatch_is_an_error_of_the_metadata_and_maps_back() {
        use WeightsRefusal::*;
        let runtime = Runtime::load(None);
        for refusal in [
            CommitRevealEnabled,
            CommitRevealDisabled,
            CommitVersion { required: 0, ours: 4 },
            TooManyCommits,
            RootNetwork,
            LengthsDiffer,
            MechanismMissing,
            TooManyUids,
            NotRegistered,
            StakeTooLow,
            VersionKey,
            TooFast,
            NoValidatorPermit,
            DuplicateUids,
            UnknownUid,
            TooFewWeights,
            WeightTooLarge,
            ColdkeySwap,
        ] {
            let name = error_name(&refusal);
            assert!(runtime.module_error(SUBTENSOR, name).is_some(), "{name}");
            assert_eq!(WeightsRefusal::from_dispatch_error(name), refusal);
        }
        for name in ["AccountNotAllowedCommit", "SpaceLimitExceeded"] {
            assert!(runtime.module_error(COMMITMENTS, name).is_some(), "{name}");
        }
    }
}
