//! A chain in memory for the simulation: deterministic, without time of its own. Blocks come when the simulated world asks for
//! them; every write closes the block that contains it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use protocol::{AccountId, Digest};

use crate::COMMITMENT_MAX;
use crate::chain::Chain;
use crate::error::{ChainError, SetWeightsError, WeightsRefusal};
use crate::hotkey::Hotkey;
use crate::rules::Subnet;
use crate::types::{BlockRef, Hyperparameters, Metagraph, Neuron};
use crate::weights::as_stored;

/// The one subnet of a chain in memory.
#[derive(Clone, Debug)]
pub struct MemorySettings {
    pub netuid: u16,
    /// Makes block hashes: the same seed gives the same chain.
    pub seed: u64,
    pub hyperparameters: Hyperparameters,
    pub neurons: Vec<Neuron>,
    /// The subnet owner's hotkey, exempt from stake threshold and permit.
    pub owner_hotkey: Option<AccountId>,
}

/// The chain; clones share it.
#[derive(Clone)]
pub struct MemoryChain {
    genesis: [u8; 32],
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    settings: MemorySettings,
    head: u64,
    rows: BTreeMap<u16, Vec<(u16, u16)>>,
    commitments: BTreeMap<AccountId, Vec<u8>>,
    reachable: bool,
}

impl MemoryChain {
    pub fn new(settings: MemorySettings) -> Self {
        let genesis = hash(settings.seed, 0);
        let inner = Inner { settings, head: 0, rows: BTreeMap::new(), commitments: BTreeMap::new(), reachable: true };
        Self { genesis, inner: Arc::new(Mutex::new(inner)) }
    }

    /// Makes `blocks` blocks, final at once.
    pub fn advance(&self, blocks: u64) -> BlockRef {
        let mut inner = self.lock();
        inner.head += blocks;
        inner.block()
    }

    /// Adds a neuron at the next uid, or replaces the one that has its uid.
    pub fn register(&self, neuron: Neuron) {
        let mut inner = self.lock();
        let neurons = &mut inner.settings.neurons;
        match neurons.iter_mut().find(|existing| existing.uid == neuron.uid) {
            Some(existing) => *existing = neuron,
            None => neurons.push(neuron),
        }
        neurons.sort_by_key(|neuron| neuron.uid);
    }

    /// Changes the subnet's parameters, as its owner may at any time.
    pub fn set_hyperparameters(&self, hyperparameters: Hyperparameters) {
        self.lock().settings.hyperparameters = hyperparameters;
    }

    /// Whether calls are answered; a chain that is not reachable fails each with a retryable error.
    pub fn set_reachable(&self, reachable: bool) {
        self.lock().reachable = reachable;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reach(&self) -> Result<MutexGuard<'_, Inner>, ChainError> {
        let inner = self.lock();
        if inner.reachable {
            Ok(inner)
        } else {
            Err(ChainError::Unavailable { endpoint: "memory".to_owned(), reason: "not reachable".to_owned() })
        }
    }

    fn subnet(&self, netuid: u16) -> Result<MutexGuard<'_, Inner>, ChainError> {
        let inner = self.reach()?;
        if inner.settings.netuid == netuid { Ok(inner) } else { Err(ChainError::SubnetMissing { netuid }) }
    }
}

impl Inner {
    fn block(&self) -> BlockRef {
        BlockRef { number: self.head, hash: hash(self.settings.seed, self.head) }
    }
}

fn hash(seed: u64, number: u64) -> [u8; 32] {
    Digest::derive("quasar memory chain 2026 block hash", &[&seed.to_le_bytes(), &number.to_le_bytes()]).0
}

#[async_trait]
impl Chain for MemoryChain {
    fn genesis(&self) -> [u8; 32] {
        self.genesis
    }

    async fn head(&self) -> Result<BlockRef, ChainError> {
        Ok(self.reach()?.block())
    }

    async fn block_hash(&self, number: u64) -> Result<Option<[u8; 32]>, ChainError> {
        let inner = self.reach()?;
        Ok((number <= inner.head).then(|| hash(inner.settings.seed, number)))
    }

    async fn metagraph(&self, netuid: u16) -> Result<Metagraph, ChainError> {
        let inner = self.subnet(netuid)?;
        Ok(Metagraph { block: inner.block(), neurons: inner.settings.neurons.clone() })
    }

    async fn hyperparameters(&self, netuid: u16) -> Result<Hyperparameters, ChainError> {
        Ok(self.subnet(netuid)?.settings.hyperparameters.clone())
    }

    async fn set_weights(&self, hotkey: &Hotkey, netuid: u16, row: &[(u16, u16)], version_key: u64) -> Result<BlockRef, SetWeightsError> {
        let refuse = |reason| Err(SetWeightsError::Refused(reason));
        if row.iter().all(|(_, value)| *value == 0) {
            return refuse(WeightsRefusal::EmptyRow);
        }
        let mut inner = self.subnet(netuid)?;
        let account = hotkey.account();
        let parameters = inner.settings.hyperparameters.clone();
        if inner.settings.neurons.iter().all(|neuron| neuron.hotkey != account) {
            return refuse(WeightsRefusal::NotRegistered);
        }
        if parameters.weights_version > version_key && !parameters.commit_reveal {
            return refuse(WeightsRefusal::VersionTooOld { required: parameters.weights_version, ours: version_key });
        }
        let (uids, values): (Vec<u16>, Vec<u16>) = row.iter().copied().unzip();
        let subnet = |block| Subnet {
            hyperparameters: Some(&parameters),
            neurons: &inner.settings.neurons,
            owner: inner.settings.owner_hotkey,
            block,
        };
        let checked = subnet(inner.head)
            .check_pool(&account)
            .and_then(|()| subnet(inner.head + 1).check_dispatch(&account, netuid, &uids, &values, version_key));
        let uid = match checked {
            Ok(uid) => uid,
            Err(reason) => return refuse(reason),
        };
        inner.head += 1;
        let block = inner.block();
        inner.rows.insert(uid, as_stored(row));
        for neuron in inner.settings.neurons.iter_mut().filter(|neuron| neuron.uid == uid) {
            neuron.last_update = block.number;
        }
        Ok(block)
    }

    async fn weights(&self, netuid: u16, uid: u16) -> Result<Vec<(u16, u16)>, ChainError> {
        let inner = self.reach()?;
        let row = inner.rows.get(&uid).filter(|_| inner.settings.netuid == netuid);
        Ok(row.cloned().unwrap_or_default())
    }

    async fn commitment(&self, netuid: u16, account: &AccountId) -> Result<Option<Vec<u8>>, ChainError> {
        let inner = self.reach()?;
        Ok(if inner.settings.netuid == netuid { inner.commitments.get(account).cloned() } else { None })
    }

    async fn set_commitment(&self, hotkey: &Hotkey, netuid: u16, data: &[u8]) -> Result<BlockRef, ChainError> {
        if data.len() > COMMITMENT_MAX {
            return Err(ChainError::CommitmentTooLong { length: data.len(), limit: COMMITMENT_MAX });
        }
        let mut inner = self.reach()?;
        let account = hotkey.account();
        let registered = inner.settings.neurons.iter().any(|neuron| neuron.hotkey == account);
        if inner.settings.netuid != netuid || !registered {
            return Err(ChainError::NotRegistered { hotkey: account, netuid });
        }
        inner.commitments.insert(account, data.to_vec());
        inner.head += 1;
        Ok(inner.block())
    }
}
