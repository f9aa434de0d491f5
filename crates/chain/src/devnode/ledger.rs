//! The chain of the development node: blocks, the transaction pool, block production, finality.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parity_scale_codec::{Compact, Encode};
use sp_core::Pair as _;
use subxt::config::substrate::{Digest, DigestItem, H256, SubstrateHeader};

use super::dispatch::{self, Class};
use super::extrinsic::{self, Context, Invalid, Signed};
use super::runtime::{Runtime, SUBTENSOR, SYSTEM};
use super::state::State;
use super::{DevChain, DevOptions};
use crate::types::BlockRef;

/// Blocks whose state and extrinsics are kept; nodes prune at the same depth by default.
const STATES_KEPT: u64 = 256;
/// Most extrinsics that wait for a block.
const POOL_MAX: usize = 4096;
/// How far ahead of the account's nonce an extrinsic may be.
const NONCE_AHEAD_MAX: u64 = 64;
/// Consensus engine in digests: Aura, as on the genuine chain.
const AURA: [u8; 4] = *b"aura";
/// Epochs of longer than this many blocks end anyway.
const EPOCH_MAX: u64 = 50_400;

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
    runtime: Arc<Runtime>,
    netuid: u16,
    finality_lag: u64,
    blocks: Vec<Block>,
    numbers: HashMap<[u8; 32], u64>,
    pool: Vec<Pending>,
    /// Fates of extrinsics that left the pool: in block number, or dropped at it.
    left_pool: BTreeMap<[u8; 32], (u64, bool)>,
    /// Seals blocks. Its randomised signature makes block hashes unpredictable, as a beacon must be.
    author: sp_core::sr25519::Pair,
}

impl Ledger {
    pub(super) fn new(runtime: Arc<Runtime>, chain: &DevChain, options: &DevOptions, now_ms: u64) -> Self {
        let state = genesis_state(&runtime, chain, options, now_ms);
        let header = Header {
            parent_hash: H256::zero(),
            number: 0,
            state_root: state.root().into(),
            extrinsics_root: sp_crypto_hashing::blake2_256(&Vec::<Vec<u8>>::new().encode()).into(),
            digest: Digest { logs: Vec::new() },
        };
        let hash = sp_crypto_hashing::blake2_256(&header.encode());
        Self {
            runtime,
            netuid: chain.netuid,
            finality_lag: options.finality_lag,
            blocks: vec![Block { header, hash, content: Some(Content { extrinsics: Vec::new(), state }) }],
            numbers: HashMap::from([(hash, 0)]),
            pool: Vec::new(),
            left_pool: BTreeMap::new(),
            author: sp_core::sr25519::Pair::generate().0,
        }
    }

    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
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
        self.by_number(*self.numbers.get(hash)?)
    }

    /// The state of the newest block.
    fn state(&self) -> &State {
        &self.best().content.as_ref().expect("the newest block is not pruned").state
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
        let runtime = self.runtime.clone();

        let block_number = u32::try_from(number).expect("block numbers are u32 on chain");
        state.put(SYSTEM, "Number", (), block_number);
        state.put(SYSTEM, "ParentHash", (), parent_hash);
        state.put("Timestamp", "Now", (), now_ms);
        step_epoch(&mut state, self.netuid, number);

        let mut extrinsics = vec![timestamp_inherent(&runtime, now_ms)];
        let mut events = vec![record(0, &runtime.event(SYSTEM, "ExtrinsicSuccess", dispatch::dispatch_info(Class::Mandatory)))];
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
        self.blocks.push(Block { header, hash, content: Some(Content { extrinsics, state }) });
        self.prune(number);
        BlockRef { number, hash }
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
        &self.runtime
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

/// Ends the subnet's epoch when it is due: one was asked for, the last is too long ago, or a tempo has passed.
fn step_epoch(state: &mut State, netuid: u16, number: u64) {
    let tempo = u64::from(state.value::<u16>(SUBTENSOR, "Tempo", (netuid,)));
    let last: u64 = state.value(SUBTENSOR, "LastEpochBlock", (netuid,));
    let pending: u64 = state.value(SUBTENSOR, "PendingEpochAt", (netuid,));
    let since = state.value::<u64>(SUBTENSOR, "BlocksSinceLastStep", (netuid,)) + 1;
    let due = tempo != 0 && ((pending > 0 && number >= pending) || since > EPOCH_MAX || number - last.min(number) >= tempo);
    if due {
        let index: u64 = state.value(SUBTENSOR, "SubnetEpochIndex", (netuid,));
        state.put(SUBTENSOR, "LastEpochBlock", (netuid,), number);
        state.put(SUBTENSOR, "PendingEpochAt", (netuid,), 0u64);
        state.put(SUBTENSOR, "SubnetEpochIndex", (netuid,), index + 1);
        state.put(SUBTENSOR, "BlocksSinceLastStep", (netuid,), 0u64);
    } else {
        state.put(SUBTENSOR, "BlocksSinceLastStep", (netuid,), since);
    }
}

/// `EventRecord`: phase `ApplyExtrinsic(index)`, event, no topics.
fn record(extrinsic: u32, event: &[u8]) -> Vec<u8> {
    let mut bytes = (0u8, extrinsic).encode();
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
        state.put(SUBTENSOR, "Keys", (netuid, uid), neuron.hotkey.0);
        state.put(SUBTENSOR, "Uids", (netuid, neuron.hotkey.0), uid);
        state.put(SUBTENSOR, "Owner", (neuron.hotkey.0,), neuron.coldkey.0);
        state.put(SUBTENSOR, "TotalHotkeyAlpha", (neuron.hotkey.0, netuid), neuron.stake);
        state.put(SUBTENSOR, "BlockAtRegistration", (netuid, uid), 0u64);
    }
    let permits: Vec<bool> = chain.neurons.iter().map(|neuron| neuron.validator_permit).collect();
    state.put(SUBTENSOR, "ValidatorPermit", (netuid,), permits);
    state.put(SUBTENSOR, "LastUpdate", (netuid,), vec![0u64; chain.neurons.len()]);
    state
}
