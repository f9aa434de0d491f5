//! The chain of the development node: blocks, the transaction pool, block production, finality.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use parity_scale_codec::{Compact, Encode};
use sp_core::Pair as _;
use subxt::config::substrate::{Digest, DigestItem, H256, SubstrateHeader};

use super::change::{self, Change};
use super::dispatch::{self, Class, Timelocked};
use super::extrinsic::{self, Context, Invalid, Signed};
use super::pulses::Pulses;
use super::runtime::{Runtime, SUBTENSOR, SYSTEM};
use super::state::State;
use super::{DevChain, DevOptions, VirtualClock};
use crate::timelock;
use crate::types::BlockRef;

/// Blocks whose state and extrinsics are kept; nodes prune at the same depth by default.
const STATES_KEPT: u64 = 256;
/// Most extrinsics that wait for a block.
const POOL_MAX: usize = 4096;
/// How far ahead of the account's nonce an extrinsic may be.
const NONCE_AHEAD_MAX: u64 = 64;
/// Consensus engine in digests: Aura, as on the genuine chain.
const AURA: [u8; 4] = *b"aura";
/// Blocks of left forks that are still known by their hash.
const STALE_MAX: usize = 64;

pub(super) type Header = SubstrateHeader<H256>;

pub(super) struct Block {
    pub(super) header: Header,
    pub(super) hash: [u8; 32],
    /// Extrinsics and state; `None` once pruned.
    pub(super) content: Option<Content>,
}

pub(super) struct Content {
    pub(super) extrinsics: Vec<Vec<u8>>,
    pub(super) state: State,
    /// What was changed by hand in this block.
    changes: Vec<Change>,
}

/// What became of a submitted extrinsic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Waiting,
    InBlock {
        hash: [u8; 32],
        finalized: bool,
    },
    /// It stopped being valid before a block took it.
    Dropped,
}

struct Pending {
    hash: [u8; 32],
    bytes: Vec<u8>,
    signed: Signed,
}

pub(super) struct Ledger {
    netuid: u16,
    finality_lag: u64,
    clock: Option<VirtualClock>,
    pulses: Pulses,
    blocks: Vec<Block>,
    numbers: HashMap<[u8; 32], u64>,
    /// Blocks of forks that were left, oldest first.
    stale: VecDeque<Block>,
    /// Changes that the next block makes.
    changes: Vec<Change>,
    pool: Vec<Pending>,
    /// Fates of extrinsics that left the pool: in block number, or dropped at it.
    left_pool: BTreeMap<[u8; 32], (u64, bool)>,
    /// Seals blocks. Its randomised signature makes block hashes unpredictable, as a beacon must be.
    author: sp_core::sr25519::Pair,
}

impl Ledger {
    pub(super) fn new(runtime: Arc<Runtime>, chain: &DevChain, options: &DevOptions, now_ms: u64) -> Self {
        let now_ms = options.clock.map_or(now_ms, |clock| clock.start_ms);
        let pulses = Pulses::new(options.beacon.clone(), now_ms);
        let mut state = genesis_state(&runtime, chain, options, now_ms);
        pulses.configure(&mut state, now_ms);
        let header = Header {
            parent_hash: H256::zero(),
            number: 0,
            state_root: state.root().into(),
            extrinsics_root: sp_crypto_hashing::blake2_256(&Vec::<Vec<u8>>::new().encode()).into(),
            digest: Digest { logs: Vec::new() },
        };
        let hash = sp_crypto_hashing::blake2_256(&header.encode());
        Self {
            netuid: chain.netuid,
            finality_lag: options.finality_lag,
            clock: options.clock,
            pulses,
            blocks: vec![Block { header, hash, content: Some(Content { extrinsics: Vec::new(), state, changes: Vec::new() }) }],
            numbers: HashMap::from([(hash, 0)]),
            stale: VecDeque::new(),
            changes: Vec::new(),
            pool: Vec::new(),
            left_pool: BTreeMap::new(),
            author: sp_core::sr25519::Pair::generate().0,
        }
    }

    /// The runtime of the newest block.
    pub(super) fn runtime(&self) -> &Runtime {
        self.state().runtime()
    }

    pub(super) fn genesis(&self) -> [u8; 32] {
        self.blocks[0].hash
    }

    pub(super) fn best(&self) -> &Block {
        self.blocks.last().expect("there always is a genesis block")
    }

    pub(super) fn finalized(&self) -> &Block {
        let best = self.best().header.number;
        &self.blocks[best.saturating_sub(self.finality_lag) as usize]
    }

    pub(super) fn by_number(&self, number: u64) -> Option<&Block> {
        self.blocks.get(usize::try_from(number).ok()?)
    }

    pub(super) fn by_hash(&self, hash: &[u8; 32]) -> Option<&Block> {
        let current = self.numbers.get(hash).and_then(|number| self.by_number(*number)).filter(|block| block.hash == *hash);
        current.or_else(|| self.stale.iter().find(|block| block.hash == *hash))
    }

    /// Queues a change for the next block.
    pub(super) fn change(&mut self, change: Change) {
        self.changes.push(change);
    }

    /// The state of the newest block.
    fn state(&self) -> &State {
        &self.best().content.as_ref().expect("the newest block is not pruned").state
    }

    /// The row of `uid` in the newest state.
    pub(super) fn weights(&self, mechanism: u8, uid: u16) -> Vec<(u16, u16)> {
        let index = self.state().mechanism_index(self.netuid, mechanism);
        index.and_then(|index| self.state().stored(SUBTENSOR, "Weights", (index, uid))).unwrap_or_default()
    }

    /// Block of the last weights or commit of `uid` in the newest state.
    pub(super) fn last_update(&self, mechanism: u8, uid: u16) -> u64 {
        let index = self.state().mechanism_index(self.netuid, mechanism);
        index.and_then(|index| self.state().last_updates(index).get(usize::from(uid)).copied()).unwrap_or(0)
    }

    /// The nonce of the account's next extrinsic, after those that wait in the pool.
    pub(super) fn next_nonce(&self, account: &protocol::AccountId) -> u64 {
        let waiting = self.pool.iter().filter(|pending| pending.signed.signer == *account).map(|pending| pending.signed.nonce + 1);
        waiting.max().unwrap_or(0).max(u64::from(self.state().nonce(account)))
    }

    /// Judges an extrinsic against the newest state and the pool.
    pub(super) fn validate(&self, bytes: &[u8]) -> Result<Signed, Invalid> {
        let signed = extrinsic::open(bytes, self)?;
        let next = u64::from(self.state().nonce(&signed.signer));
        if signed.nonce < next {
            return Err(Invalid::Stale);
        }
        if signed.nonce > next + NONCE_AHEAD_MAX {
            return Err(Invalid::Future);
        }
        dispatch::check_pool(self.state(), &signed, self.best().header.number)?;
        Ok(signed)
    }

    /// Takes an extrinsic into the pool and gives its hash.
    pub(super) fn submit(&mut self, bytes: Vec<u8>) -> Result<[u8; 32], Refused> {
        let hash = sp_crypto_hashing::blake2_256(&bytes);
        let signed = self.validate(&bytes).map_err(Refused::Invalid)?;
        if self.pool.len() >= POOL_MAX {
            return Err(Refused::PoolFull);
        }
        if self.pool.iter().any(|pending| pending.hash == hash) {
            return Err(Refused::AlreadyImported);
        }
        if self.pool.iter().any(|pending| pending.signed.signer == signed.signer && pending.signed.nonce == signed.nonce) {
            return Err(Refused::NonceTaken);
        }
        self.left_pool.remove(&hash);
        self.pool.push(Pending { hash, bytes, signed });
        Ok(hash)
    }

    pub(super) fn fate(&self, hash: &[u8; 32]) -> Fate {
        match self.left_pool.get(hash) {
            None if self.pool.iter().any(|pending| pending.hash == *hash) => Fate::Waiting,
            Some((number, true)) => match self.by_number(*number) {
                Some(block) => Fate::InBlock { hash: block.hash, finalized: *number <= self.finalized().header.number },
                None => Fate::Dropped,
            },
            None | Some((_, false)) => Fate::Dropped,
        }
    }

    /// Builds, seals and appends the next block.
    pub(super) fn produce(&mut self, now_ms: u64) -> BlockRef {
        let parent = self.best();
        let number = parent.header.number + 1;
        let parent_hash = parent.hash;
        let mut state = self.state().clone();
        let now_ms = self.clock.map_or(now_ms, |clock| clock.start_ms + number * clock.block_ms);
        let changes = std::mem::take(&mut self.changes);
        changes.iter().for_each(|change| change::apply(&mut state, self.netuid, change, number));

        let block_number = u32::try_from(number).expect("block numbers are u32 on chain");
        state.put(SYSTEM, "Number", (), block_number);
        state.put(SYSTEM, "ParentHash", (), parent_hash);
        state.put("Timestamp", "Now", (), now_ms);
        self.pulses.publish(&mut state, now_ms);
        let before = state.epoch(self.netuid);
        let mut epoch = before;
        epoch.step(number);
        state.put_epoch(self.netuid, &before, &epoch);

        let mut extrinsics = vec![timestamp_inherent(state.runtime(), now_ms)];
        let mut events: Vec<Vec<u8>> =
            self.reveal(&mut state, number, now_ms, epoch.index).iter().map(|event| record_of_block(event)).collect();
        events.push(record(0, &state.runtime().event(SYSTEM, "ExtrinsicSuccess", dispatch::dispatch_info(Class::Mandatory))));
        for pending in std::mem::take(&mut self.pool) {
            let next = u64::from(state.nonce(&pending.signed.signer));
            if pending.signed.nonce > next {
                self.pool.push(pending);
                continue;
            }
            if pending.signed.nonce < next || dispatch::check_pool(&state, &pending.signed, number).is_err() {
                self.left_pool.insert(pending.hash, (number, false));
                continue;
            }
            let index = extrinsics.len() as u32;
            state.increment_nonce(&pending.signed.signer);
            for event in dispatch::execute(&mut state, &pending.signed, number) {
                events.push(record(index, &event));
            }
            extrinsics.push(pending.bytes);
            self.left_pool.insert(pending.hash, (number, true));
        }
        state.put(SYSTEM, "EventCount", (), events.len() as u32);
        let mut event_bytes = Compact(events.len() as u32).encode();
        events.iter().for_each(|event| event_bytes.extend_from_slice(event));
        state.put_encoded(SYSTEM, "Events", (), event_bytes);

        let mut header = Header {
            parent_hash: parent_hash.into(),
            number,
            state_root: state.root().into(),
            extrinsics_root: sp_crypto_hashing::blake2_256(&extrinsics.encode()).into(),
            digest: Digest { logs: vec![DigestItem::PreRuntime(AURA, number.encode())] },
        };
        let unsealed = sp_crypto_hashing::blake2_256(&header.encode());
        header.digest.logs.push(DigestItem::Seal(AURA, self.author.sign(&unsealed).0.to_vec()));
        let hash = sp_crypto_hashing::blake2_256(&header.encode());
        self.numbers.insert(hash, number);
        self.blocks.push(Block { header, hash, content: Some(Content { extrinsics, state, changes }) });
        self.prune(number);
        BlockRef { number, hash }
    }

    /// Opens the timelocked rows whose epoch it is: those of `period` epochs ago whose pulse is there. Older ones expire.
    fn reveal(&self, state: &mut State, number: u64, now_ms: u64, epoch: u64) -> Vec<Vec<u8>> {
        let netuid = self.netuid;
        let mechanisms: u8 = state.value(SUBTENSOR, "MechanismCountCurrent", (netuid,));
        let period: u64 = state.value(SUBTENSOR, "RevealPeriodEpochs", (netuid,));
        let mut events = Vec::new();
        for mechanism in 0..mechanisms {
            let Some(index) = state.mechanism_index(netuid, mechanism) else { continue };
            if let Some(expired) = epoch.checked_sub(period + 1) {
                state.remove(SUBTENSOR, "TimelockedWeightCommits", (index, expired));
            }
            let Some(committed) = epoch.checked_sub(period) else { continue };
            let Some(waiting) = state.stored::<Vec<Timelocked>>(SUBTENSOR, "TimelockedWeightCommits", (index, committed)) else {
                continue;
            };
            let mut left = Vec::new();
            for (account, block, ciphertext, round) in waiting {
                let Some(signature) = self.pulses.take(state, round, now_ms) else {
                    left.push((account, block, ciphertext, round));
                    continue;
                };
                let Ok(plaintext) = timelock::open(&ciphertext, &signature) else { continue };
                let hotkey = protocol::AccountId(account);
                events.extend(dispatch::reveal(state, number, (netuid, mechanism), &hotkey, &plaintext));
            }
            if left.is_empty() {
                state.remove(SUBTENSOR, "TimelockedWeightCommits", (index, committed));
            } else {
                state.put(SUBTENSOR, "TimelockedWeightCommits", (index, committed), left);
            }
        }
        events
    }

    /// Leaves the newest `depth` blocks for a fork that is one block longer. What they contained goes back into the pool, or is lost
    /// with it. Finalized blocks stay: gives false where the fork would have to leave one.
    pub(super) fn reorganise(&mut self, depth: u64, loses_pool: bool, now_ms: u64) -> bool {
        let best = self.best().header.number;
        if depth == 0 || depth > best - self.finalized().header.number {
            return false;
        }
        let left = self.blocks.split_off((best - depth + 1) as usize);
        let mut changes = Vec::new();
        let mut back = Vec::new();
        for block in left {
            if let Some(content) = &block.content {
                changes.extend(content.changes.iter().cloned());
                // The first one is the block's own timestamp.
                back.extend(content.extrinsics.iter().skip(1).cloned());
            }
            self.stale.push_back(block);
        }
        while self.stale.len() > STALE_MAX {
            self.stale.pop_front();
        }
        changes.append(&mut self.changes);
        self.changes = changes;
        let fork = best - depth;
        self.left_pool.retain(|_, (number, _)| *number <= fork);
        let waiting = std::mem::take(&mut self.pool);
        if !loses_pool {
            back.extend(waiting.into_iter().map(|pending| pending.bytes));
            for bytes in back {
                let hash = sp_crypto_hashing::blake2_256(&bytes);
                if self.submit(bytes).is_err() {
                    self.left_pool.insert(hash, (fork, false));
                }
            }
        }
        for _ in 0..=depth {
            self.produce(now_ms);
        }
        true
    }

    fn prune(&mut self, best: u64) {
        // Finalized blocks keep their state whatever the lag.
        let Some(old) = best.checked_sub(STATES_KEPT + self.finality_lag) else { return };
        self.blocks[old as usize].content = None;
        self.left_pool.retain(|_, (number, _)| *number > old);
    }
}

/// Why the pool did not take an extrinsic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Invalid(Invalid),
    AlreadyImported,
    NonceTaken,
    PoolFull,
}

impl Context for Ledger {
    fn runtime(&self) -> &Runtime {
        Ledger::runtime(self)
    }

    fn genesis(&self) -> [u8; 32] {
        Ledger::genesis(self)
    }

    fn next_number(&self) -> u64 {
        self.best().header.number + 1
    }

    fn block_hash(&self, number: u64) -> Option<[u8; 32]> {
        self.by_number(number).map(|block| block.hash)
    }
}

/// `EventRecord`: phase `ApplyExtrinsic(index)`, event, no topics.
fn record(extrinsic: u32, event: &[u8]) -> Vec<u8> {
    let mut bytes = (0u8, extrinsic).encode();
    bytes.extend_from_slice(event);
    bytes.push(0);
    bytes
}

/// `EventRecord` of something that no extrinsic did: phase `Initialization`.
fn record_of_block(event: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2];
    bytes.extend_from_slice(event);
    bytes.push(0);
    bytes
}

/// The unsigned `Timestamp.set` that opens every block.
fn timestamp_inherent(runtime: &Runtime, now_ms: u64) -> Vec<u8> {
    const BARE_V4: u8 = 4;
    let pallet = runtime.metadata().pallet_by_name("Timestamp").expect("the metadata has the pallet");
    let call = pallet.call_variant_by_name("set").expect("the pallet has the call");
    (BARE_V4, pallet.call_index(), call.index, Compact(now_ms)).encode().encode()
}

fn genesis_state(runtime: &Arc<Runtime>, chain: &DevChain, options: &DevOptions, now_ms: u64) -> State {
    let netuid = chain.netuid;
    let count = chain.neurons.len() as u16;
    let mut state = State::new(runtime.clone());
    state.put(SYSTEM, "Number", (), 0u32);
    state.put("Timestamp", "Now", (), now_ms);
    state.put(SUBTENSOR, "NetworksAdded", (netuid,), true);
    state.put(SUBTENSOR, "SubnetworkN", (netuid,), count);
    state.put(SUBTENSOR, "Tempo", (netuid,), chain.tempo);
    state.put(SUBTENSOR, "WeightsSetRateLimit", (netuid,), chain.weights_rate_limit);
    state.put(SUBTENSOR, "MinAllowedWeights", (netuid,), chain.min_allowed_weights);
    state.put(SUBTENSOR, "WeightsVersionKey", (netuid,), options.weights_version);
    state.put(SUBTENSOR, "CommitRevealWeightsEnabled", (netuid,), options.commit_reveal);
    state.put(SUBTENSOR, "StakeThreshold", (), options.stake_threshold);
    if let Some(owner) = options.owner_hotkey {
        state.put(SUBTENSOR, "SubnetOwnerHotkey", (netuid,), owner.0);
    }
    for (uid, neuron) in (0u16..).zip(&chain.neurons) {
        change::put_neuron(&mut state, netuid, uid, neuron, 0);
    }
    state.put(SUBTENSOR, "MechanismCountCurrent", (netuid,), options.mechanisms.max(1));
    state.put(SUBTENSOR, "NetworkRegistrationAllowed", (netuid,), false);
    let permits: Vec<bool> = chain.neurons.iter().map(|neuron| neuron.validator_permit).collect();
    state.put(SUBTENSOR, "ValidatorPermit", (netuid,), permits);
    state.put(SUBTENSOR, "LastUpdate", (netuid,), vec![0u64; chain.neurons.len()]);
    state
}
