//! Reading a subnet by names and plain Rust types: the node's own metadata says how the bytes lie, so that a runtime upgrade which
//! wraps a number in a new type, or adds a field, changes nothing here.

use protocol::AccountId;
use subxt::client::OnlineClientAtBlock;
use subxt::config::substrate::SubstrateConfig;
use subxt::dynamic;
use subxt::error::StorageError;
use subxt::ext::scale_decode::DecodeAsType;
use subxt::storage::{Address, DynamicAddress};

use crate::types::{BlockRef, Hyperparameters, Metagraph, Neuron};

pub(super) type AtBlock = OnlineClientAtBlock<SubstrateConfig>;

/// The pallet that holds subnets, neurons and weights.
pub(super) const SUBTENSOR: &str = "SubtensorModule";

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

/// The row of `uid` in mechanism 0, whose storage index is the netuid itself.
pub(super) async fn weights(at: &AtBlock, netuid: u16, uid: u16) -> Result<Vec<(u16, u16)>, subxt::Error> {
    Ok(fetch::<_, Vec<(u16, u16)>>(at, "Weights", (netuid, uid)).await?.unwrap_or_default())
}

pub(super) async fn uid_of(at: &AtBlock, netuid: u16, hotkey: &AccountId) -> Result<Option<u16>, subxt::Error> {
    fetch::<_, u16>(at, "Uids", (netuid, hotkey.0)).await
}

/// Block of the last weights of `uid`; 0 = never.
pub(super) async fn last_update(at: &AtBlock, netuid: u16, uid: u16) -> Result<u64, subxt::Error> {
    let updates = fetch::<_, Vec<u64>>(at, "LastUpdate", (netuid,)).await?.unwrap_or_default();
    Ok(updates.get(usize::from(uid)).copied().unwrap_or(0))
}

/// A value of the subtensor pallet: what is stored, else the entry's default, else `None` (also where this runtime has no such
/// entry).
async fn fetch<K, V>(at: &AtBlock, entry: &str, key: K) -> Result<Option<V>, subxt::Error>
where
    DynamicAddress<K, V>: Address<KeyParts = K, Value = V>,
    V: DecodeAsType,
    K: subxt::ext::frame_decode::storage::IntoEncodableValues,
{
    let address = dynamic::storage::<K, V>(SUBTENSOR, entry);
    let entry = match at.storage().entry(address) {
        Ok(entry) => entry,
        Err(StorageError::StorageInfoError(_) | StorageError::StorageEntryNotFound { .. }) => return Ok(None),
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
