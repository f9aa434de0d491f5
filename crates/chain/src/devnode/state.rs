//! The state of one block: SCALE keys and values exactly as a node stores them, and typed access to those that we use.

use std::collections::BTreeMap;
use std::sync::Arc;

use parity_scale_codec::{Decode, Encode};
use protocol::AccountId;
use subxt::ext::frame_decode::storage::IntoEncodableValues;

use super::runtime::{Entry, Runtime, SUBTENSOR, SYSTEM};
use crate::epoch::EpochState;
use crate::types::{Hyperparameters, Neuron};
use crate::view::mechanism_index;

/// A full key/value map. Cloning it for the next block shares the values.
#[derive(Clone)]
pub(super) struct State {
    runtime: Arc<Runtime>,
    entries: BTreeMap<Vec<u8>, Arc<[u8]>>,
    /// A digest of everything that was ever written.
    root: [u8; 32],
}

/// `frame_system::AccountInfo` with subtensor's balances.
#[derive(Encode, Decode, Default)]
struct AccountInfo {
    nonce: u32,
    consumers: u32,
    providers: u32,
    sufficients: u32,
    free: u64,
    reserved: u64,
    frozen: u64,
    flags: u128,
}

impl State {
    pub(super) fn new(runtime: Arc<Runtime>) -> Self {
        Self { runtime, entries: BTreeMap::new(), root: [0; 32] }
    }

    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// The runtime is another one from here on; what is stored stays.
    pub(super) fn outgrow(&mut self) {
        self.runtime = Arc::new(self.runtime.outgrown());
    }

    pub(super) fn leave_out(&mut self, entries: &[Entry]) {
        self.runtime = Arc::new(self.runtime.without(entries));
    }

    pub(super) fn upgrade(&mut self) {
        self.runtime = Arc::new(self.runtime.upgraded());
    }

    pub(super) fn remove(&mut self, pallet: &str, entry: &str, keys: impl IntoEncodableValues) {
        let key = self.runtime.key(pallet, entry, keys);
        if self.entries.contains_key(&key) {
            self.write(key, None);
        }
    }

    /// The raw value of a raw key.
    pub(super) fn raw(&self, key: &[u8]) -> Option<&[u8]> {
        self.entries.get(key).map(|value| &**value)
    }

    /// Up to `count` keys that start with `prefix` and come after `after`.
    pub(super) fn keys(&self, prefix: &[u8], after: Option<&[u8]>, count: usize) -> Vec<Vec<u8>> {
        let start = after.unwrap_or(prefix).to_vec();
        self.entries
            .range(start..)
            .map(|(key, _)| key)
            .skip_while(|key| Some(key.as_slice()) == after)
            .take_while(|key| key.starts_with(prefix))
            .take(count)
            .cloned()
            .collect()
    }

    /// A digest of all that was written. Nodes keep a Merkle trie root here; nobody checks proofs against a development node.
    pub(super) fn root(&self) -> [u8; 32] {
        self.root
    }

    fn write(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) {
        self.root = sp_crypto_hashing::blake2_256(&(self.root, &key, &value).encode());
        match value {
            Some(value) => self.entries.insert(key, value.into()),
            None => self.entries.remove(&key),
        };
    }

    pub(super) fn put(&mut self, pallet: &str, entry: &str, keys: impl IntoEncodableValues, value: impl Encode) {
        let key = self.runtime.key(pallet, entry, keys);
        self.write(key, Some(value.encode()));
    }

    /// Stores bytes that are SCALE already.
    pub(super) fn put_encoded(&mut self, pallet: &str, entry: &str, keys: impl IntoEncodableValues, value: Vec<u8>) {
        let key = self.runtime.key(pallet, entry, keys);
        self.write(key, Some(value));
    }

    /// The stored value; `None` where nothing is stored.
    pub(super) fn stored<V: Decode>(&self, pallet: &str, entry: &str, keys: impl IntoEncodableValues) -> Option<V> {
        let key = self.runtime.key(pallet, entry, keys);
        self.raw(&key).map(|mut bytes| V::decode(&mut bytes).expect("the node wrote this value itself"))
    }

    /// The stored value or the entry's default.
    pub(super) fn value<V: Decode>(&self, pallet: &str, entry: &str, keys: impl IntoEncodableValues) -> V {
        self.stored(pallet, entry, keys).unwrap_or_else(|| {
            let mut bytes = self.runtime.default_value(pallet, entry).expect("the entry has a default");
            V::decode(&mut bytes).expect("the default has the entry's type")
        })
    }

    pub(super) fn nonce(&self, account: &AccountId) -> u32 {
        self.stored::<AccountInfo>(SYSTEM, "Account", (account.0,)).unwrap_or_default().nonce
    }

    pub(super) fn increment_nonce(&mut self, account: &AccountId) {
        let mut info = self.stored::<AccountInfo>(SYSTEM, "Account", (account.0,)).unwrap_or_default();
        info.nonce += 1;
        self.put(SYSTEM, "Account", (account.0,), info);
    }

    pub(super) fn subnet_exists(&self, netuid: u16) -> bool {
        self.value(SUBTENSOR, "NetworksAdded", (netuid,))
    }

    pub(super) fn uid_of(&self, netuid: u16, hotkey: &AccountId) -> Option<u16> {
        self.stored(SUBTENSOR, "Uids", (netuid, hotkey.0))
    }

    pub(super) fn neurons(&self, netuid: u16) -> Vec<Neuron> {
        let count: u16 = self.value(SUBTENSOR, "SubnetworkN", (netuid,));
        let permits: Vec<bool> = self.value(SUBTENSOR, "ValidatorPermit", (netuid,));
        let updates: Vec<u64> = self.value(SUBTENSOR, "LastUpdate", (netuid,));
        (0..count)
            .map(|uid| {
                let hotkey: [u8; 32] = self.value(SUBTENSOR, "Keys", (netuid, uid));
                Neuron {
                    uid,
                    hotkey: AccountId(hotkey),
                    coldkey: AccountId(self.value(SUBTENSOR, "Owner", (hotkey,))),
                    stake: self.value(SUBTENSOR, "TotalHotkeyAlpha", (hotkey, netuid)),
                    validator_permit: permits.get(usize::from(uid)).copied().unwrap_or(false),
                    last_update: updates.get(usize::from(uid)).copied().unwrap_or(0),
                }
            })
            .collect()
    }

    /// `None` where the subnet does not exist.
    pub(super) fn hyperparameters(&self, netuid: u16) -> Option<Hyperparameters> {
        self.subnet_exists(netuid).then(|| Hyperparameters {
            tempo: self.value(SUBTENSOR, "Tempo", (netuid,)),
            weights_rate_limit: self.value(SUBTENSOR, "WeightsSetRateLimit", (netuid,)),
            min_allowed_weights: self.value(SUBTENSOR, "MinAllowedWeights", (netuid,)),
            max_weight_limit: self.value(SUBTENSOR, "MaxWeightsLimit", (netuid,)),
            weights_version: self.value(SUBTENSOR, "WeightsVersionKey", (netuid,)),
            commit_reveal: self.value(SUBTENSOR, "CommitRevealWeightsEnabled", (netuid,)),
            stake_threshold: self.value(SUBTENSOR, "StakeThreshold", ()),
        })
    }

    /// The storage index of a mechanism that exists.
    pub(super) fn mechanism_index(&self, netuid: u16, mechanism: u8) -> Option<u16> {
        let count: u8 = self.value(SUBTENSOR, "MechanismCountCurrent", (netuid,));
        mechanism_index(netuid, mechanism).filter(|_| mechanism < count && self.subnet_exists(netuid))
    }

    /// Blocks of the last weights by uid, under a storage index.
    pub(super) fn last_updates(&self, index: u16) -> Vec<u64> {
        self.value(SUBTENSOR, "LastUpdate", (index,))
    }

    pub(super) fn epoch(&self, netuid: u16) -> EpochState {
        EpochState {
            tempo: self.value(SUBTENSOR, "Tempo", (netuid,)),
            last_epoch_block: self.value(SUBTENSOR, "LastEpochBlock", (netuid,)),
            pending_epoch_at: self.value(SUBTENSOR, "PendingEpochAt", (netuid,)),
            index: self.value(SUBTENSOR, "SubnetEpochIndex", (netuid,)),
            blocks_since_last_step: self.value(SUBTENSOR, "BlocksSinceLastStep", (netuid,)),
        }
    }

    pub(super) fn put_epoch(&mut self, netuid: u16, old: &EpochState, new: &EpochState) {
        if old.index != new.index {
            self.put(SUBTENSOR, "LastEpochBlock", (netuid,), new.last_epoch_block);
            self.put(SUBTENSOR, "PendingEpochAt", (netuid,), new.pending_epoch_at);
            self.put(SUBTENSOR, "SubnetEpochIndex", (netuid,), new.index);
        }
        self.put(SUBTENSOR, "BlocksSinceLastStep", (netuid,), new.blocks_since_last_step);
    }

    /// The owner's hotkey; `None` where it was never set.
    pub(super) fn owner_hotkey(&self, netuid: u16) -> Option<AccountId> {
        self.stored(SUBTENSOR, "SubnetOwnerHotkey", (netuid,)).map(AccountId)
    }
}
