//! Executing a verified call on a state: the weight rules, the commitments pallet, genuine events and errors.

use parity_scale_codec::{Compact, Decode, Encode};
use protocol::AccountId;

use super::extrinsic::{Call, Invalid, Signed};
use super::runtime::{COMMITMENTS, SUBTENSOR, SYSTEM};
use super::state::State;
use crate::error::WeightsRefusal;
use crate::rules::Subnet;
use crate::weights::as_stored;

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

/// The pool's guards for a call at `block`.
pub(super) fn check_pool(state: &State, signed: &Signed, block: u64) -> Result<(), Invalid> {
    let Call::SetWeights { netuid, mechanism, .. } = &signed.call else { return Ok(()) };
    let parameters = state.hyperparameters(*netuid).filter(|_| *mechanism == 0);
    let neurons = state.neurons(*netuid);
    let subnet = Subnet { hyperparameters: parameters.as_ref(), neurons: &neurons, owner: state.owner_hotkey(*netuid), block };
    subnet.check_pool(&signed.signer).map_err(|refusal| match refusal {
        WeightsRefusal::StakeTooLow => Invalid::Custom(1),
        WeightsRefusal::TooFast => Invalid::Custom(6),
        _ => Invalid::Custom(255),
    })
}

/// Executes the call in `block`. Gives its events, the last of which says whether it succeeded; a failed call changes nothing.
pub(super) fn execute(state: &mut State, signed: &Signed, block: u64) -> Vec<Vec<u8>> {
    let outcome = match &signed.call {
        Call::SetWeights { netuid, mechanism, uids, values, version_key } => {
            set_weights(state, &signed.signer, block, *netuid, *mechanism, uids, values, *version_key)
                .map_err(|refusal| (SUBTENSOR, error_name(&refusal)))
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

#[allow(clippy::too_many_arguments, reason = "the arguments of the chain's own call")]
fn set_weights(
    state: &mut State,
    hotkey: &AccountId,
    block: u64,
    netuid: u16,
    mechanism: u8,
    uids: &[u16],
    values: &[u16],
    version_key: u64,
) -> Result<Vec<u8>, WeightsRefusal> {
    // The node has mechanism 0 only, whose storage index is the netuid.
    let parameters = state.hyperparameters(netuid).filter(|_| mechanism == 0);
    let neurons = state.neurons(netuid);
    let subnet = Subnet { hyperparameters: parameters.as_ref(), neurons: &neurons, owner: state.owner_hotkey(netuid), block };
    let uid = subnet.check_dispatch(hotkey, netuid, uids, values, version_key)?;
    let row: Vec<(u16, u16)> = uids.iter().copied().zip(values.iter().copied()).collect();
    state.put(SUBTENSOR, "Weights", (netuid, uid), as_stored(&row));
    let mut updates: Vec<u64> = state.value(SUBTENSOR, "LastUpdate", (netuid,));
    updates.resize(neurons.len(), 0);
    updates[usize::from(uid)] = block;
    state.put(SUBTENSOR, "LastUpdate", (netuid,), updates);
    Ok(state.runtime().event(SUBTENSOR, "WeightsSet", (netuid, uid)))
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
        WeightsRefusal::Nonce | WeightsRefusal::BadProof | WeightsRefusal::Other(_) => "CallDisabled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devnode::runtime::Runtime;

    #[test]
    fn every_refusal_at_dispatch_is_an_error_of_the_metadata_and_maps_back() {
        use WeightsRefusal::*;
        let runtime = Runtime::load();
        for refusal in [
            CommitRevealEnabled,
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
