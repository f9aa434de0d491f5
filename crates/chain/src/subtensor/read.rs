//! Reading a subnet by names and plain Rust types: the node's own metadata says how the bytes lie, so that a runtime upgrade which
//! wraps a number in a new type, or adds a field, changes nothing here.

use protocol::AccountId;
use subxt::client::OnlineClientAtBlock;
use subxt::config::substrate::SubstrateConfig;
use subxt::dynamic::{self, Value};
use subxt::error::{RuntimeApiError, StorageError};
use subxt::ext::scale_decode::DecodeAsType;
use subxt::ext::scale_value::{Composite, Primitive, ValueDef};
use subxt::storage::{Address, DynamicAddress};

use crate::drand::{Beacon, Pulse};
use crate::epoch::EpochState;
use crate::types::{BlockRef, Hyperparameter, Hyperparameters, Metagraph, Neuron, Registration};
use crate::view::{PendingCommit, WeightsView, mechanism_index};

pub(super) type AtBlock = OnlineClientAtBlock<SubstrateConfig>;

/// The pallet that holds subnets, neurons and weights.
pub(super) const SUBTENSOR: &str = "SubtensorModule";

/// Milliseconds between blocks where the runtime does not say.
const BLOCK_MS: u64 = 12_000;
/// Most names in a list of hyperparameters that are taken from an answer.
const HYPERPARAMETERS_MAX: usize = 1024;
/// Most epochs that a commit may wait and is still looked for.
const REVEAL_EPOCHS_MAX: u64 = 64;

/// Most neurons of one subnet that are taken from an answer; the chain's own bound is far below.
const NEURONS_MAX: usize = 4096;

/// One neuron of `NeuronInfoRuntimeApi.get_neurons_lite`: the fields that are used, by their names.
#[derive(DecodeAsType)]
#[decode_as_type(crate_path = "subxt::ext::scale_decode")]
struct NeuronLite {
    hotkey: [u8; 32],
    coldkey: [u8; 32],
    uid: u16,
    stake: Vec<([u8; 32], u64)>,
    last_update: u64,
    validator_permit: bool,
}

pub(super) fn block_ref(at: &AtBlock) -> BlockRef {
    BlockRef { number: at.block_number(), hash: at.block_hash().0 }
}

/// The neurons of the subnet; `None` where it does not exist.
pub(super) async fn metagraph(at: &AtBlock, netuid: u16) -> Result<Option<Metagraph>, subxt::Error> {
    if !subnet_exists(at, netuid).await? {
        return Ok(None);
    }
    let call = dynamic::runtime_api_call::<_, Vec<NeuronLite>>("NeuronInfoRuntimeApi", "get_neurons_lite", (netuid,));
    let answer = at.runtime_apis().call(call).await?;
    if answer.len() > NEURONS_MAX {
        return Err(subxt::Error::other_str(format!("{} neurons are more than a subnet can have", answer.len())));
    }
    let mut neurons: Vec<Neuron> = answer
        .into_iter()
        .map(|neuron| Neuron {
            uid: neuron.uid,
            hotkey: AccountId(neuron.hotkey),
            coldkey: AccountId(neuron.coldkey),
            stake: neuron.stake.iter().fold(0u64, |sum, (_, stake)| sum.saturating_add(*stake)),
            validator_permit: neuron.validator_permit,
            last_update: neuron.last_update,
        })
        .collect();
    neurons.sort_by_key(|neuron| neuron.uid);
    Ok(Some(Metagraph { block: block_ref(at), neurons }))
}

pub(super) async fn subnet_exists(at: &AtBlock, netuid: u16) -> Result<bool, subxt::Error> {
    Ok(fetch::<_, bool>(at, "NetworksAdded", (netuid,)).await?.unwrap_or(false))
}

/// The hyperparameters; `None` where the subnet does not exist. Entries that a later runtime dropped take the value that
/// lets weights pass, and the chain judges.
pub(super) async fn hyperparameters(at: &AtBlock, netuid: u16) -> Result<Option<Hyperparameters>, subxt::Error> {
    if !subnet_exists(at, netuid).await? {
        return Ok(None);
    }
    let (tempo, limit, minimum, maximum, version, commit_reveal, threshold) = tokio::try_join!(
        fetch::<_, u16>(at, "Tempo", (netuid,)),
        fetch::<_, u64>(at, "WeightsSetRateLimit", (netuid,)),
        fetch::<_, u16>(at, "MinAllowedWeights", (netuid,)),
        fetch::<_, u16>(at, "MaxWeightsLimit", (netuid,)),
        fetch::<_, u64>(at, "WeightsVersionKey", (netuid,)),
        fetch::<_, bool>(at, "CommitRevealWeightsEnabled", (netuid,)),
        fetch::<_, u64>(at, "StakeThreshold", ()),
    )?;
    Ok(Some(Hyperparameters {
        tempo: tempo.unwrap_or(0),
        weights_rate_limit: limit.unwrap_or(0),
        min_allowed_weights: minimum.unwrap_or(0),
        max_weight_limit: maximum.unwrap_or(u16::MAX),
        weights_version: version.unwrap_or(0),
        commit_reveal: commit_reveal.unwrap_or(false),
        stake_threshold: threshold.unwrap_or(0),
    }))
}

/// The row of `uid` under a storage index: the netuid itself for mechanism 0.
pub(super) async fn weights(at: &AtBlock, index: u16, uid: u16) -> Result<Vec<(u16, u16)>, subxt::Error> {
    Ok(fetch::<_, Vec<(u16, u16)>>(at, "Weights", (index, uid)).await?.unwrap_or_default())
}

pub(super) async fn uid_of(at: &AtBlock, netuid: u16, hotkey: &AccountId) -> Result<Option<u16>, subxt::Error> {
    fetch::<_, u16>(at, "Uids", (netuid, hotkey.0)).await
}

/// Blocks of the last weights by uid, under a storage index.
pub(super) async fn last_updates(at: &AtBlock, index: u16) -> Result<Vec<u64>, subxt::Error> {
    Ok(fetch::<_, Vec<u64>>(at, "LastUpdate", (index,)).await?.unwrap_or_default())
}

/// Block of the last weights of `uid`; 0 = never.
pub(super) async fn last_update(at: &AtBlock, index: u16, uid: u16) -> Result<u64, subxt::Error> {
    Ok(last_updates(at, index).await?.get(usize::from(uid)).copied().unwrap_or(0))
}

/// One timelocked row of `TimelockedWeightCommits`: account, block, ciphertext, round.
type Timelocked = ([u8; 32], u64, Vec<u8>, u64);

/// The timelocked rows of `hotkey` that wait, with their ciphertexts. They are stored by the epoch of their commit.
pub(super) async fn commits(
    at: &AtBlock,
    netuid: u16,
    index: u16,
    hotkey: &AccountId,
) -> Result<Vec<(PendingCommit, Vec<u8>)>, subxt::Error> {
    let (current, period) =
        tokio::try_join!(fetch::<_, u64>(at, "SubnetEpochIndex", (netuid,)), fetch::<_, u64>(at, "RevealPeriodEpochs", (netuid,)),)?;
    let (current, period) = (current.unwrap_or(0), period.unwrap_or(1).min(REVEAL_EPOCHS_MAX));
    let mut found = Vec::new();
    for epoch in current.saturating_sub(period)..=current + 1 {
        let rows = fetch::<_, Vec<Timelocked>>(at, "TimelockedWeightCommits", (index, epoch)).await?.unwrap_or_default();
        let own = rows.into_iter().filter(|(account, ..)| *account == hotkey.0);
        found.extend(own.map(|(_, block, ciphertext, round)| (PendingCommit { epoch, block, round }, ciphertext)));
    }
    Ok(found)
}

/// `Drand.BeaconConfig`: the fields that are used, by their names.
#[derive(DecodeAsType)]
#[decode_as_type(crate_path = "subxt::ext::scale_decode")]
struct BeaconConfig {
    public_key: Vec<u8>,
    period: u32,
    genesis_time: u32,
}

/// `Drand.Pulses`.
#[derive(DecodeAsType)]
#[decode_as_type(crate_path = "subxt::ext::scale_decode")]
struct StoredPulse {
    round: u64,
    randomness: Vec<u8>,
    signature: Vec<u8>,
}

/// The beacon that the chain opens timelocked rows with; quicknet where the runtime does not say.
async fn beacon(at: &AtBlock) -> Result<Beacon, subxt::Error> {
    Ok(match fetch_of::<_, BeaconConfig>(at, "Drand", "BeaconConfig", ()).await? {
        Some(config) => {
            Beacon { public_key: config.public_key, genesis_s: u64::from(config.genesis_time), period_s: u64::from(config.period) }
        }
        None => Beacon::quicknet(),
    })
}

/// A round that the chain has stored.
pub(super) async fn pulse(at: &AtBlock, round: u64) -> Result<Option<Pulse>, subxt::Error> {
    let stored = fetch_of::<_, StoredPulse>(at, "Drand", "Pulses", (round,)).await?;
    Ok(stored.map(|pulse| Pulse { round: pulse.round, randomness: pulse.randomness, signature: pulse.signature }))
}

async fn epoch_state(at: &AtBlock, netuid: u16) -> Result<EpochState, subxt::Error> {
    let (tempo, last, pending, index, since) = tokio::try_join!(
        fetch::<_, u16>(at, "Tempo", (netuid,)),
        fetch::<_, u64>(at, "LastEpochBlock", (netuid,)),
        fetch::<_, u64>(at, "PendingEpochAt", (netuid,)),
        fetch::<_, u64>(at, "SubnetEpochIndex", (netuid,)),
        fetch::<_, u64>(at, "BlocksSinceLastStep", (netuid,)),
    )?;
    Ok(EpochState {
        tempo: tempo.unwrap_or(0),
        last_epoch_block: last.unwrap_or(0),
        pending_epoch_at: pending.unwrap_or(0),
        index: index.unwrap_or(0),
        blocks_since_last_step: since.unwrap_or(0),
    })
}

/// First block of the subnet's next epoch; `None` where it has no epochs or does not exist.
pub(super) async fn next_epoch(at: &AtBlock, netuid: u16) -> Result<Option<u64>, subxt::Error> {
    if !subnet_exists(at, netuid).await? {
        return Ok(None);
    }
    Ok(epoch_state(at, netuid).await?.next_epoch_block(at.block_number()))
}

/// Milliseconds between blocks, by the runtime's constants.
fn block_ms(at: &AtBlock) -> u64 {
    let slot = at.constants().entry(dynamic::constant::<u64>("Aura", "SlotDuration"));
    slot.ok().filter(|ms| *ms > 0).unwrap_or(BLOCK_MS)
}

/// Everything that setting weights depends on; `None` where the subnet does not exist.
pub(super) async fn weights_view(
    at: &AtBlock,
    netuid: u16,
    mechanism: u8,
    hotkey: &AccountId,
) -> Result<Option<WeightsView>, subxt::Error> {
    let Some(index) = mechanism_index(netuid, mechanism) else { return Ok(None) };
    let (metagraph, hyperparameters) = tokio::try_join!(metagraph(at, netuid), hyperparameters(at, netuid))?;
    let (Some(metagraph), Some(hyperparameters)) = (metagraph, hyperparameters) else { return Ok(None) };
    let (timestamp_ms, mechanisms, last_updates, owner, consensus, epoch, period) = tokio::try_join!(
        fetch_of::<_, u64>(at, "Timestamp", "Now", ()),
        fetch::<_, u8>(at, "MechanismCountCurrent", (netuid,)),
        last_updates(at, index),
        fetch::<_, [u8; 32]>(at, "SubnetOwnerHotkey", (netuid,)),
        fetch::<_, Value>(at, "SubnetEpochConsensus", (netuid,)),
        epoch_state(at, netuid),
        fetch::<_, u64>(at, "RevealPeriodEpochs", (netuid,)),
    )?;
    let (commit_version, beacon, last_stored_round) = tokio::try_join!(
        fetch::<_, u16>(at, "CommitRevealWeightsVersion", ()),
        beacon(at),
        fetch_of::<_, u64>(at, "Drand", "LastStoredRound", ()),
    )?;
    let row = match metagraph.by_hotkey(hotkey) {
        Some(own) => weights(at, index, own.uid).await?,
        None => Vec::new(),
    };
    let commits = commits(at, netuid, index, hotkey).await?.into_iter().map(|(commit, _)| commit).collect();
    Ok(Some(WeightsView {
        metagraph,
        hyperparameters,
        timestamp_ms: timestamp_ms.unwrap_or(0),
        block_ms: block_ms(at),
        mechanisms: mechanisms.unwrap_or(1),
        last_updates,
        owner_hotkey: owner.filter(|owner| *owner != [0; 32]).map(AccountId),
        is_null_consensus: consensus.is_some_and(|mode| variant_name(&mode) == Some("Null")),
        row,
        epoch,
        reveal_period_epochs: period.unwrap_or(1),
        commit_version: commit_version.unwrap_or(0),
        beacon,
        last_stored_round: last_stored_round.unwrap_or(0),
        commits,
    }))
}

fn variant_name<T>(value: &Value<T>) -> Option<&str> {
    match &value.value {
        ValueDef::Variant(variant) => Some(&variant.name),
        _ => None,
    }
}

/// One entry of `SubnetInfoRuntimeApi.get_subnet_hyperparams_v3`.
#[derive(DecodeAsType)]
#[decode_as_type(crate_path = "subxt::ext::scale_decode")]
struct HyperparamEntry {
    name: Vec<u8>,
    value: Value,
}

/// All hyperparameters that the runtime names, whatever they are; `None` where the subnet does not exist or the runtime has no
/// such list.
pub(super) async fn hyperparameter_list(at: &AtBlock, netuid: u16) -> Result<Option<Vec<Hyperparameter>>, subxt::Error> {
    let call = dynamic::runtime_api_call::<_, Option<Vec<HyperparamEntry>>>("SubnetInfoRuntimeApi", "get_subnet_hyperparams_v3", (netuid,));
    let entries = match at.runtime_apis().call(call).await {
        Ok(entries) => entries,
        Err(RuntimeApiError::TraitNotFound(_) | RuntimeApiError::MethodNotFound { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    Ok(entries.map(|entries| {
        let named = |entry: HyperparamEntry| Hyperparameter {
            name: String::from_utf8_lossy(&entry.name).into_owned(),
            value: number(&entry.value).map_or_else(|| entry.value.to_string(), |number| number.to_string()),
        };
        entries.into_iter().take(HYPERPARAMETERS_MAX).map(named).collect()
    }))
}

/// The only number or flag inside a value, through variants and wrappers.
fn number<T>(value: &Value<T>) -> Option<i128> {
    match &value.value {
        ValueDef::Primitive(Primitive::U128(number)) => i128::try_from(*number).ok(),
        ValueDef::Primitive(Primitive::I128(number)) => Some(*number),
        ValueDef::Primitive(Primitive::Bool(flag)) => Some(i128::from(*flag)),
        ValueDef::Composite(fields) => sole(fields),
        ValueDef::Variant(variant) => sole(&variant.values),
        _ => None,
    }
}

fn sole<T>(fields: &Composite<T>) -> Option<i128> {
    let mut values = fields.values();
    let first = values.next()?;
    values.next().is_none().then(|| number(first)).flatten()
}

/// Whether and at which price `hotkey` can join the subnet; `None` where the subnet does not exist.
pub(super) async fn registration(at: &AtBlock, netuid: u16, hotkey: &AccountId) -> Result<Option<Registration>, subxt::Error> {
    if !subnet_exists(at, netuid).await? {
        return Ok(None);
    }
    let (uid, is_open, burn_rao) = tokio::try_join!(
        uid_of(at, netuid, hotkey),
        fetch::<_, bool>(at, "NetworkRegistrationAllowed", (netuid,)),
        fetch::<_, u64>(at, "Burn", (netuid,)),
    )?;
    Ok(Some(Registration { uid, is_open: is_open.unwrap_or(true), burn_rao }))
}

/// A value of the subtensor pallet: what is stored, else the entry's default, else `None` (also where this runtime has no such
/// entry).
async fn fetch<K, V>(at: &AtBlock, entry: &str, key: K) -> Result<Option<V>, subxt::Error>
where
    DynamicAddress<K, V>: Address<KeyParts = K, Value = V>,
    V: DecodeAsType,
    K: subxt::ext::frame_decode::storage::IntoEncodableValues,
{
    fetch_of(at, SUBTENSOR, entry, key).await
}

/// Whether the runtime has no such entry.
pub(super) fn is_absent(error: &StorageError) -> bool {
    matches!(error, StorageError::StorageInfoError(_) | StorageError::StorageEntryNotFound { .. } | StorageError::PalletNameNotFound(_))
}

/// The same for an entry of any pallet.
pub(super) async fn fetch_of<K, V>(at: &AtBlock, pallet: &str, entry: &str, key: K) -> Result<Option<V>, subxt::Error>
where
    DynamicAddress<K, V>: Address<KeyParts = K, Value = V>,
    V: DecodeAsType,
    K: subxt::ext::frame_decode::storage::IntoEncodableValues,
{
    let address = dynamic::storage::<K, V>(pallet, entry);
    let entry = match at.storage().entry(address) {
        Ok(entry) => entry,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let value = match entry.try_fetch(key).await? {
        Some(value) => Some(value),
        None => entry.default_value(),
    };
    match value {
        Some(value) => Ok(Some(value.decode()?)),
        None => Ok(None),
    }
}
