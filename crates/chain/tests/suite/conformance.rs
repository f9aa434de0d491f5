//! What every implementation of `Chain` must do, written once and run on the client over a development node and on the chain in
//! memory.

use chain::devnode::{DevNode, DevOptions};
use chain::{Chain, ChainError, KeyCertificate, MemoryChain, SetWeightsError, SubtensorClient, WeightsRefusal, certificate};
use protocol::AccountId;

use crate::world::{NETUID, RATE_LIMIT, STRANGER, connect, dev_chain, hotkey, hyperparameters, memory_chain, neurons, set_row};

/// A chain whose blocks a test can hurry along.
trait Hurry {
    type Chain: Chain;
    fn chain(&self) -> &Self::Chain;
    /// Makes `blocks` more blocks.
    fn advance(&self, blocks: u64);
}

struct Loopback {
    node: DevNode,
    client: SubtensorClient,
}

impl Loopback {
    async fn start(options: DevOptions) -> Self {
        let node = DevNode::start_with(dev_chain(30), options).await.unwrap();
        let client = connect(&node).await;
        Self { node, client }
    }
}

impl Hurry for Loopback {
    type Chain = SubtensorClient;

    fn chain(&self) -> &SubtensorClient {
        &self.client
    }

    fn advance(&self, blocks: u64) {
        (0..blocks).for_each(|_| {
            self.node.produce();
        });
    }
}

impl Hurry for MemoryChain {
    type Chain = Self;

    fn chain(&self) -> &Self {
        self
    }

    fn advance(&self, blocks: u64) {
        MemoryChain::advance(self, blocks);
    }
}

fn refusal(result: Result<chain::BlockRef, SetWeightsError>) -> WeightsRefusal {
    match result {
        Err(SetWeightsError::Refused(reason)) => reason,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// The subnet of `world`, default options with weights version 7.
async fn conformance(world: &impl Hurry) {
    blocks_are_found_by_number(world).await;
    the_subnet_is_read_as_it_was_made(world).await;
    epochs_registration_and_the_past_are_read(world).await;
    commitments_are_read_back(world).await;
    key_certificates_are_published_once(world).await;
    rows_are_set_read_back_and_scaled(world).await;
    rows_are_refused_with_their_reason(world).await;
}

async fn blocks_are_found_by_number(world: &impl Hurry) {
    let chain = world.chain();
    world.advance(10);
    let head = chain.head().await.unwrap();
    assert!(head.number >= 5);
    assert_eq!(chain.block_hash(0).await.unwrap(), Some(chain.genesis()));
    assert_eq!(chain.block_hash(head.number).await.unwrap(), Some(head.hash));
    assert_eq!(chain.block_hash(head.number + 100_000).await.unwrap(), None);
    let (first, second) = (chain.block_hash(1).await.unwrap(), chain.block_hash(2).await.unwrap());
    assert_ne!(first, second);
}

async fn the_subnet_is_read_as_it_was_made(world: &impl Hurry) {
    let chain = world.chain();
    let metagraph = chain.metagraph(NETUID).await.unwrap();
    assert_eq!(metagraph.neurons.len(), neurons().len());
    for (uid, (neuron, made)) in (0u16..).zip(metagraph.neurons.iter().zip(neurons())) {
        assert_eq!(neuron.uid, uid);
        assert_eq!((neuron.hotkey, neuron.coldkey), (made.hotkey, made.coldkey));
        assert_eq!((neuron.stake, neuron.validator_permit, neuron.last_update), (made.stake, made.validator_permit, 0));
    }
    assert_eq!(chain.block_hash(metagraph.block.number).await.unwrap(), Some(metagraph.block.hash));
    let options = DevOptions { weights_version: 7, ..DevOptions::default() };
    assert_eq!(chain.hyperparameters(NETUID).await.unwrap(), hyperparameters(&options));
    assert!(matches!(chain.metagraph(99).await, Err(ChainError::SubnetMissing { netuid: 99 })));
    assert!(matches!(chain.hyperparameters(99).await, Err(ChainError::SubnetMissing { netuid: 99 })));
}

async fn commitments_are_read_back(world: &impl Hurry) {
    let chain = world.chain();
    let account = hotkey(2).account();
    assert_eq!(chain.commitment(NETUID, &account).await.unwrap(), None);
    // No bytes, a short field, the longest short field, the shortest and the longest big one.
    for length in [0, 3, 128, 129, 512] {
        let data: Vec<u8> = (0..length).map(|n| n as u8).collect();
        let block = chain.set_commitment(&hotkey(2), NETUID, &data).await.unwrap();
        assert!(chain.head().await.unwrap().number >= block.number);
        assert_eq!(chain.commitment(NETUID, &account).await.unwrap(), Some(data));
    }
    assert_eq!(chain.commitment(NETUID, &hotkey(3).account()).await.unwrap(), None);
    let too_long = chain.set_commitment(&hotkey(2), NETUID, &[0; 513]).await;
    assert!(matches!(too_long, Err(ChainError::CommitmentTooLong { length: 513, limit: 512 })));
    let stranger = chain.set_commitment(&hotkey(STRANGER), NETUID, b"x").await;
    assert!(matches!(stranger, Err(ChainError::NotRegistered { netuid: NETUID, .. })));
}

async fn key_certificates_are_published_once(world: &impl Hurry) {
    let chain = world.chain();
    let (miner, other) = (hotkey(1), hotkey(3));
    assert_eq!(certificate::read(chain, NETUID, &miner.account()).await.unwrap(), None);
    // Commitments of one epoch are limited: those before are over.
    world.advance(60);
    let block = certificate::publish(chain, &miner, NETUID, false).await.unwrap().expect("it was not there yet");
    assert!(chain.head().await.unwrap().number >= block.number);
    assert_eq!(certificate::publish(chain, &miner, NETUID, false).await.unwrap(), None, "it is there");
    let published = certificate::read(chain, NETUID, &miner.account()).await.unwrap();
    assert_eq!(published, Some(KeyCertificate::of(&miner)));
    chain.set_commitment(&other, NETUID, b"something else").await.unwrap();
    assert_eq!(certificate::read(chain, NETUID, &other.account()).await.unwrap(), None);
    assert_eq!(certificate::read_all(chain, NETUID).await.unwrap(), [(miner.account(), KeyCertificate::of(&miner))]);
    let mut all: Vec<AccountId> = chain.commitments(NETUID).await.unwrap().into_iter().map(|(account, _)| account).collect();
    all.sort_unstable();
    let mut expected = [miner.account(), hotkey(2).account(), other.account()];
    expected.sort_unstable();
    assert_eq!(all, expected);
    let stranger = certificate::publish(chain, &hotkey(STRANGER), NETUID, false).await;
    assert!(matches!(stranger, Err(ChainError::NotRegistered { netuid: NETUID, .. })));
    // What a hotkey has committed for another purpose is kept unless its owner says otherwise.
    let taken = certificate::publish(chain, &other, NETUID, false).await;
    assert!(matches!(taken, Err(ChainError::CommitmentTaken { length: 14, .. })), "{taken:?}");
    certificate::publish(chain, &other, NETUID, true).await.unwrap().expect("it was not there yet");
    assert_eq!(certificate::read(chain, NETUID, &other.account()).await.unwrap(), Some(KeyCertificate::of(&other)));
}

async fn epochs_registration_and_the_past_are_read(world: &impl Hurry) {
    let chain = world.chain();
    let head = chain.head().await.unwrap().number;
    let next = chain.next_epoch(NETUID).await.unwrap().unwrap();
    assert!(next > head && next <= head + 31, "head {head}, next epoch {next}");
    assert_eq!(chain.next_epoch(99).await.unwrap(), None);
    assert_eq!(chain.registration(NETUID, &hotkey(2).account()).await.unwrap().uid, Some(2));
    assert_eq!(chain.registration(NETUID, &hotkey(STRANGER).account()).await.unwrap().uid, None);
    assert!(matches!(chain.registration(99, &hotkey(2).account()).await, Err(ChainError::SubnetMissing { netuid: 99 })));
    let list = chain.hyperparameter_list(NETUID).await.unwrap();
    let value = |name: &str| list.iter().find(|entry| entry.name == name).unwrap().value.clone();
    assert_eq!((value("tempo"), value("weights_version"), value("commit_reveal_weights_enabled")), ("30".into(), "7".into(), "0".into()));
    let past = chain.metagraph_at(NETUID, head).await.unwrap();
    assert_eq!(past.block.number, head);
    assert_eq!(chain.block_hash(head).await.unwrap(), Some(past.block.hash));
    assert!(matches!(chain.metagraph_at(NETUID, head + 100_000).await, Err(ChainError::NotYetFinal { .. })));
    let view = chain.weights_view(NETUID, 0, &hotkey(1).account()).await.unwrap();
    assert_eq!(view.hyperparameters, chain.hyperparameters(NETUID).await.unwrap());
    assert_eq!((view.mechanisms, view.commit_version, view.reveal_period_epochs), (1, 4, 1));
    assert!(view.epoch.index >= head / 31 && chain.health().is_healthy());
}

async fn rows_are_set_read_back_and_scaled(world: &impl Hurry) {
    let chain = world.chain();
    assert_eq!(chain.weights(NETUID, 0).await.unwrap(), []);
    for (uid, row, stored) in [
        (0, vec![(1, 1), (2, 65535)], vec![(1, 1), (2, 65535)]),
        (1, vec![(0, 10), (2, 20), (3, 40)], vec![(0, 16384), (2, 32768), (3, 65535)]),
        // No permit, but the row is on itself.
        (3, vec![(3, 65535)], vec![(3, 65535)]),
    ] {
        let block = set_row(chain, uid, &row, 7).await.unwrap();
        assert_eq!(chain.block_hash(block.number).await.unwrap(), Some(block.hash));
        assert!(chain.head().await.unwrap().number >= block.number);
        assert_eq!(chain.weights(NETUID, u16::from(uid)).await.unwrap(), stored);
        let metagraph = chain.metagraph(NETUID).await.unwrap();
        assert_eq!(metagraph.by_hotkey(&hotkey(uid).account()).unwrap().last_update, block.number);
    }
    // The rate limit, and its end.
    let again = set_row(chain, 0, &[(2, 65535), (3, 1)], 7).await;
    assert_eq!(refusal(again), WeightsRefusal::TooFast);
    assert_eq!(chain.weights(NETUID, 0).await.unwrap(), [(1, 1), (2, 65535)]);
    world.advance(RATE_LIMIT);
    set_row(chain, 0, &[(2, 65535), (3, 1)], 8).await.unwrap();
    assert_eq!(chain.weights(NETUID, 0).await.unwrap(), [(2, 65535), (3, 1)]);
}

async fn rows_are_refused_with_their_reason(world: &impl Hurry) {
    let chain = world.chain();
    world.advance(RATE_LIMIT);
    let before = chain.weights(NETUID, 0).await.unwrap();
    for (uid, row, version, reason) in [
        (0, vec![], 7, WeightsRefusal::EmptyRow),
        (0, vec![(1, 0), (2, 0)], 7, WeightsRefusal::EmptyRow),
        (STRANGER, vec![(0, 1), (1, 1)], 7, WeightsRefusal::NotRegistered),
        (0, vec![(1, 1), (2, 1)], 6, WeightsRefusal::VersionKey),
        (2, vec![(0, 1), (1, 1)], 7, WeightsRefusal::NoValidatorPermit),
        (0, vec![(1, 1), (1, 1)], 7, WeightsRefusal::DuplicateUids),
        (0, vec![(1, 1), (9, 1)], 7, WeightsRefusal::UnknownUid),
        (0, vec![(1, 1)], 7, WeightsRefusal::TooFewWeights),
        (0, vec![(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)], 7, WeightsRefusal::TooManyUids),
    ] {
        let error = set_row(chain, uid, &row, version).await;
        assert_eq!(refusal(error), reason, "uid {uid}, row {row:?}");
    }
    assert_eq!(chain.weights(NETUID, 0).await.unwrap(), before, "a refused row changes nothing");
}

/// One refusal that needs a subnet of its own.
async fn first_row(world: &impl Hurry) -> WeightsRefusal {
    refusal(set_row(world.chain(), 0, &[(1, 1), (2, 1)], 7).await)
}

fn options() -> DevOptions {
    DevOptions { weights_version: 7, ..DevOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_over_a_development_node_conforms() {
    conformance(&Loopback::start(options()).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_conforms_where_finality_lags_behind() {
    conformance(&Loopback::start(DevOptions { finality_lag: 3, ..options() }).await).await;
}

#[tokio::test]
async fn the_chain_in_memory_conforms() {
    conformance(&memory_chain(&options())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_reveal_is_refused_with_an_explanation() {
    let options = DevOptions { commit_reveal: true, ..options() };
    assert_eq!(first_row(&memory_chain(&options)).await, WeightsRefusal::CommitRevealEnabled);
    let error = set_row(&Loopback::start(options).await.client, 0, &[(1, 1), (2, 1)], 7).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("commit-reveal") && text.contains("\nhint: "), "{text}");
    assert!(!error.is_retryable());
}

#[tokio::test(flavor = "multi_thread")]
async fn too_little_stake_is_refused_except_for_the_owner() {
    let options = DevOptions { stake_threshold: 10_000_000_000, ..options() };
    assert_eq!(first_row(&memory_chain(&options)).await, WeightsRefusal::StakeTooLow);
    assert_eq!(first_row(&Loopback::start(options.clone()).await).await, WeightsRefusal::StakeTooLow);
    let options = DevOptions { owner_hotkey: Some(hotkey(3).account()), ..options };
    let row = [(0, 1), (1, 65535)];
    set_row(&memory_chain(&options), 3, &row, 7).await.unwrap();
    set_row(&Loopback::start(options).await.client, 3, &row, 7).await.unwrap();
}
