//! A chain in memory for the simulation: deterministic, without time of its own. Blocks come when the simulated world asks for
//! them; every write closes the block that contains it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use protocol::{AccountId, Digest};

use crate::COMMITMENT_MAX;
use crate::chain::Chain;
use crate::drand::{Beacon, PUBLIC_KEY_BYTES, Pulse};
use crate::epoch::EpochState;
use crate::error::{ChainError, SetWeightsError, WeightsRefusal};
use crate::health::ChainHealth;
use crate::hotkey::Hotkey;
use crate::rules::{Subnet, TimelockedCommit};
use crate::timelock::COMMIT_REVEAL_VERSION;
use crate::types::{BlockRef, Hyperparameter, Hyperparameters, Metagraph, Neuron, Registration};
use crate::view::{How, Landed, PendingCommit, Progress, WeightsRequest, WeightsView};
use crate::weights::as_stored;

/// Time between blocks of this chain, whose block 0 is at time 0 unless the simulation says otherwise.
const BLOCK_MS: u64 = 12_000;
/// Changes of the neurons that are remembered for reads of old blocks.
const HISTORY_MAX: usize = 4096;
/// Epochs between a timelocked commit and its reveal.
const REVEAL_PERIOD_EPOCHS: u64 = 1;

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
    /// Time of the newest block minus its number's share.
    time_offset_ms: u64,
    epoch: EpochState,
    rows: BTreeMap<u16, Vec<(u16, u16)>>,
    /// Rows that wait to be opened. The chain in memory keeps them in the open: nobody looks.
    commits: Vec<Committed>,
    /// The neurons as of each block at which they changed, ascending.
    history: Vec<(u64, Vec<Neuron>)>,
    /// The first block whose state is known.
    known_from: u64,
    commitments: BTreeMap<AccountId, Vec<u8>>,
    reachable: bool,
}

struct Committed {
    account: AccountId,
    commit: PendingCommit,
    row: Vec<(u16, u16)>,
    version_key: u64,
}

impl MemoryChain {
    pub fn new(settings: MemorySettings) -> Self {
        let genesis = hash(settings.seed, 0);
        let tempo = settings.hyperparameters.tempo;
        let mut inner = Inner {
            history: vec![(0, settings.neurons.clone())],
            known_from: 0,
            settings,
            head: 0,
            time_offset_ms: 0,
            epoch: EpochState { tempo, last_epoch_block: 0, pending_epoch_at: 0, index: 0, blocks_since_last_step: 0 },
            rows: BTreeMap::new(),
            commits: Vec::new(),
            commitments: BTreeMap::new(),
            reachable: true,
        };
        inner.settings.neurons.sort_by_key(|neuron| neuron.uid);
        Self { genesis, inner: Arc::new(Mutex::new(inner)) }
    }

    /// Makes `blocks` blocks, final at once.
    pub fn advance(&self, blocks: u64) -> BlockRef {
        let mut inner = self.lock();
        for _ in 0..blocks {
            inner.produce();
        }
        inner.block()
    }

    /// Sets the time of the newest block; later ones follow at their usual pace.
    pub fn set_time(&self, now_ms: u64) {
        let mut inner = self.lock();
        inner.time_offset_ms = now_ms.saturating_sub(inner.head * BLOCK_MS);
    }

    /// A neuron as it is now.
    pub fn neuron(&self, uid: u16) -> Option<Neuron> {
        self.lock().settings.neurons.iter().find(|neuron| neuron.uid == uid).cloned()
    }

    /// Adds a neuron at the next uid, or replaces the one that has its uid, in a block of its own: that of an earlier block stays as it was.
    pub fn register(&self, neuron: Neuron) -> BlockRef {
        let mut inner = self.lock();
        let block = inner.produce();
        let neurons = &mut inner.settings.neurons;
        match neurons.iter_mut().find(|existing| existing.uid == neuron.uid) {
            Some(existing) => *existing = neuron,
            None => neurons.push(neuron),
        }
        neurons.sort_by_key(|neuron| neuron.uid);
        inner.remember();
        block
    }

    /// Changes the subnet's parameters, as its owner may at any time.
    pub fn set_hyperparameters(&self, hyperparameters: Hyperparameters) {
        let mut inner = self.lock();
        inner.epoch.tempo = hyperparameters.tempo;
        inner.settings.hyperparameters = hyperparameters;
    }

    /// Forgets the states of the blocks below `known_from`, as nodes do that are no archives.
    pub fn forget(&self, known_from: u64) {
        self.lock().known_from = known_from;
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

    fn timestamp_ms(&self) -> u64 {
        self.time_offset_ms + self.head * BLOCK_MS
    }

    fn remember(&mut self) {
        let (head, neurons) = (self.head, self.settings.neurons.clone());
        match self.history.last_mut().filter(|(block, _)| *block == head) {
            Some((_, last)) => *last = neurons,
            None => self.history.push((head, neurons)),
        }
        if self.history.len() > HISTORY_MAX {
            self.history.remove(0);
        }
    }

    fn subnet(&self, block: u64) -> Subnet<'_> {
        Subnet {
            hyperparameters: Some(&self.settings.hyperparameters),
            neurons: &self.settings.neurons,
            last_updates: None,
            owner: self.settings.owner_hotkey,
            block,
            is_null_consensus: false,
        }
    }

    /// The next block: the epoch's turn, then the rows whose time has come.
    fn produce(&mut self) -> BlockRef {
        self.head += 1;
        self.epoch.step(self.head);
        let (index, round) = (self.epoch.index, beacon().round_at(self.timestamp_ms()));
        let mut waiting = Vec::new();
        for committed in std::mem::take(&mut self.commits) {
            let target = committed.commit.epoch + REVEAL_PERIOD_EPOCHS;
            if index < target || (index == target && round < committed.commit.round) {
                waiting.push(committed);
            } else if index == target {
                let (uids, values): (Vec<u16>, Vec<u16>) = committed.row.iter().copied().unzip();
                let netuid = self.settings.netuid;
                let checked = self.subnet(self.head).check_reveal(&committed.account, netuid, &uids, &values, committed.version_key);
                if let Ok(uid) = checked {
                    self.rows.insert(uid, as_stored(&committed.row));
                }
            }
        }
        self.commits = waiting;
        self.block()
    }

    fn unrevealed(&self, account: &AccountId) -> usize {
        self.commits.iter().filter(|committed| committed.account == *account && committed.commit.epoch == self.epoch.index).count()
    }

    /// Weights of `uid` were set or committed in the newest block.
    fn touch(&mut self, account: &AccountId) {
        let head = self.head;
        for neuron in self.settings.neurons.iter_mut().filter(|neuron| neuron.hotkey == *account) {
            neuron.last_update = head;
        }
        self.remember();
    }

    fn send(&mut self, account: &AccountId, request: &WeightsRequest) -> Result<Landed, WeightsRefusal> {
        if request.row.iter().all(|(_, value)| *value == 0) {
            return Err(WeightsRefusal::EmptyRow);
        }
        if request.mechanism != 0 {
            return Err(WeightsRefusal::MechanismMissing);
        }
        if self.settings.neurons.iter().all(|neuron| neuron.hotkey != *account) {
            return Err(WeightsRefusal::NotRegistered);
        }
        let (uids, values): (Vec<u16>, Vec<u16>) = request.row.iter().copied().unzip();
        match &request.how {
            How::Plain => {
                self.subnet(self.head).check_pool(account)?;
                let dispatching = self.subnet(self.head + 1);
                let uid = dispatching.check_dispatch(account, request.netuid, &uids, &values, request.version_key)?;
                let block = self.produce();
                self.rows.insert(uid, as_stored(&request.row));
                self.touch(account);
                Ok(Landed { block, commit: None })
            }
            How::Timelocked { round, .. } => {
                let last = beacon().round_at(self.timestamp_ms());
                let commit = TimelockedCommit::ours(*round, COMMIT_REVEAL_VERSION, last, self.unrevealed(account));
                self.subnet(self.head).check_commit_pool(account, &commit)?;
                self.subnet(self.head + 1).check_commit(account, &commit)?;
                let block = self.produce();
                let commit = PendingCommit { epoch: self.epoch.index, block: block.number, round: *round };
                let (row, version_key) = (request.row.clone(), request.version_key);
                self.commits.push(Committed { account: *account, commit, row, version_key });
                self.touch(account);
                Ok(Landed { block, commit: Some(commit) })
            }
        }
    }
}

/// The beacon of the chain in memory: nobody encrypts to it.
fn beacon() -> Beacon {
    Beacon { public_key: vec![0; PUBLIC_KEY_BYTES], genesis_s: 0, period_s: 3 }
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

    async fn metagraph_at(&self, netuid: u16, block: u64) -> Result<Metagraph, ChainError> {
        let inner = self.subnet(netuid)?;
        if block > inner.head {
            return Err(ChainError::NotYetFinal { number: block });
        }
        let known = inner.history.iter().rev().find(|(since, _)| *since <= block && block >= inner.known_from);
        let (_, neurons) = known.ok_or(ChainError::StateForgotten { number: block })?;
        let block = BlockRef { number: block, hash: hash(inner.settings.seed, block) };
        Ok(Metagraph { block, neurons: neurons.clone() })
    }

    async fn hyperparameter_list(&self, netuid: u16) -> Result<Vec<Hyperparameter>, ChainError> {
        let parameters = self.subnet(netuid)?.settings.hyperparameters.clone();
        let entry = |name: &str, value: u64| Hyperparameter { name: name.to_owned(), value: value.to_string() };
        Ok(vec![
            entry("tempo", parameters.tempo.into()),
            entry("weights_rate_limit", parameters.weights_rate_limit),
            entry("min_allowed_weights", parameters.min_allowed_weights.into()),
            entry("max_weights_limit", parameters.max_weight_limit.into()),
            entry("weights_version", parameters.weights_version),
            entry("commit_reveal_weights_enabled", parameters.commit_reveal.into()),
        ])
    }

    async fn next_epoch(&self, netuid: u16) -> Result<Option<u64>, ChainError> {
        let inner = self.reach()?;
        Ok(if inner.settings.netuid == netuid { inner.epoch.next_epoch_block(inner.head) } else { None })
    }

    async fn registration(&self, netuid: u16, hotkey: &AccountId) -> Result<Registration, ChainError> {
        let inner = self.subnet(netuid)?;
        let uid = inner.settings.neurons.iter().find(|neuron| neuron.hotkey == *hotkey).map(|neuron| neuron.uid);
        Ok(Registration { uid, is_open: false, burn_rao: None })
    }

    async fn pulse(&self, _round: u64) -> Result<Option<Pulse>, ChainError> {
        self.reach().map(drop)?;
        Ok(None)
    }

    async fn weights_view(&self, netuid: u16, mechanism: u8, hotkey: &AccountId) -> Result<WeightsView, ChainError> {
        let inner = self.subnet(netuid)?;
        let neurons = inner.settings.neurons.clone();
        let own = neurons.iter().find(|neuron| neuron.hotkey == *hotkey);
        let row = own.filter(|_| mechanism == 0).and_then(|own| inner.rows.get(&own.uid)).cloned().unwrap_or_default();
        let last = neurons.iter().map(|neuron| usize::from(neuron.uid) + 1).max().unwrap_or(0);
        let mut last_updates = vec![0; last];
        for neuron in &neurons {
            last_updates[usize::from(neuron.uid)] = neuron.last_update;
        }
        Ok(WeightsView {
            hyperparameters: inner.settings.hyperparameters.clone(),
            timestamp_ms: inner.timestamp_ms(),
            block_ms: BLOCK_MS,
            mechanisms: 1,
            last_updates,
            owner_hotkey: inner.settings.owner_hotkey,
            is_null_consensus: false,
            row,
            epoch: inner.epoch,
            reveal_period_epochs: REVEAL_PERIOD_EPOCHS,
            commit_version: COMMIT_REVEAL_VERSION,
            beacon: beacon(),
            last_stored_round: beacon().round_at(inner.timestamp_ms()),
            commits: inner.commits.iter().filter(|committed| committed.account == *hotkey).map(|committed| committed.commit).collect(),
            metagraph: Metagraph { block: inner.block(), neurons },
        })
    }

    async fn send_weights(
        &self,
        hotkey: &Hotkey,
        request: &WeightsRequest,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Landed, SetWeightsError> {
        let landed = self.subnet(request.netuid)?.send(&hotkey.account(), request).map_err(SetWeightsError::Refused)?;
        for step in [Progress::Validated, Progress::Submitted, Progress::Included(landed.block), Progress::Finalized(landed.block)] {
            progress(step);
        }
        Ok(landed)
    }

    fn health(&self) -> ChainHealth {
        let inner = self.lock();
        ChainHealth { is_answering: inner.reachable, ..ChainHealth::local(inner.block()) }
    }

    async fn hyperparameters(&self, netuid: u16) -> Result<Hyperparameters, ChainError> {
        Ok(self.subnet(netuid)?.settings.hyperparameters.clone())
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

    async fn commitments(&self, netuid: u16) -> Result<Vec<(AccountId, Vec<u8>)>, ChainError> {
        let inner = self.reach()?;
        let all = inner.commitments.iter().filter(|_| inner.settings.netuid == netuid);
        Ok(all.map(|(account, data)| (*account, data.clone())).collect())
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
        Ok(inner.produce())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_block_says_of_the_neurons_never_changes() {
        let neuron = |validator_permit| Neuron {
            uid: 0,
            hotkey: AccountId([1; 32]),
            coldkey: AccountId([2; 32]),
            stake: 0,
            validator_permit,
            last_update: 0,
        };
        let hyperparameters = Hyperparameters {
            tempo: 30,
            weights_rate_limit: 10,
            min_allowed_weights: 1,
            max_weight_limit: u16::MAX,
            weights_version: 0,
            commit_reveal: false,
            stake_threshold: 0,
        };
        let settings = MemorySettings { netuid: 24, seed: 1, hyperparameters, neurons: vec![neuron(false)], owner_hotkey: None };
        let chain = MemoryChain::new(settings);
        let before = chain.advance(5).number;
        let after = chain.register(neuron(true)).number;
        let has_permit = async |block| chain.metagraph_at(24, block).await.unwrap().neurons[0].validator_permit;
        assert_eq!((has_permit(before).await, has_permit(after).await), (false, true));
        assert_eq!(chain.head().await.unwrap().number, after);
    }
}
