//! Endpoints that are dead, silent, restarting, stalled, or of another network.

use std::time::{Duration, Instant};

use chain::devnode::{Change, DevNeuron, DevNode, DevOptions};
use chain::{Chain, ChainError, ConnectSettings, Deadlines, SetWeightsError, SubtensorClient};
use tokio::net::TcpListener;

use crate::world::{NETUID, connect, deadlines, dev_chain, hotkey, set_row};

/// A listener that accepts connections and never says a word.
async fn silent_endpoint() -> (String, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("ws://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            open.push(socket);
        }
    });
    (endpoint, task)
}

/// An address that nobody listens on.
async fn dead_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("ws://{}", listener.local_addr().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_network_is_refused_by_its_genesis() {
    let node = DevNode::start(dev_chain(0)).await.unwrap();
    let settings = ConnectSettings { endpoints: vec![node.endpoint()], genesis: Some(chain::FINNEY_GENESIS) };
    let error = SubtensorClient::connect_within(settings, deadlines()).await.err().unwrap();
    assert!(matches!(&error, ChainError::WrongGenesis { found, .. } if *found == node.genesis()), "{error}");
    assert!(error.to_string().contains("\nhint: "));
    assert!(!error.is_retryable());
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_without_a_usable_endpoint_are_told_at_once() {
    for endpoints in [vec![], vec!["http://127.0.0.1:1".to_owned()]] {
        let settings = ConnectSettings { endpoints, genesis: None };
        let error = SubtensorClient::connect(settings).await.err().unwrap();
        assert!(matches!(error, ChainError::Settings { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_and_silent_endpoints_are_passed_over() {
    let node = DevNode::start(dev_chain(0)).await.unwrap();
    let (silent, _task) = silent_endpoint().await;
    let quick = Deadlines { connect_ms: 500, ..deadlines() };
    let settings = ConnectSettings { endpoints: vec![dead_endpoint().await, silent.clone(), node.endpoint()], genesis: None };
    let client = SubtensorClient::connect_within(settings, quick).await.unwrap();
    assert_eq!(client.genesis(), node.genesis());
    let started = Instant::now();
    let nobody = ConnectSettings { endpoints: vec![dead_endpoint().await, silent], genesis: None };
    let error = SubtensorClient::connect_within(nobody, quick).await.err().unwrap();
    assert!(error.is_retryable(), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_go_on_after_the_node_dropped_its_connections() {
    let node = DevNode::start(dev_chain(20)).await.unwrap();
    let client = connect(&node).await;
    client.head().await.unwrap();
    node.drop_connections();
    client.head().await.unwrap();
    set_row(&client, 0, &[(1, 1), (2, 65535)], 0).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_moves_to_the_next_endpoint_of_the_same_network_only() {
    let first = DevNode::start(dev_chain(20)).await.unwrap();
    let other_network = DevNode::start(dev_chain(20)).await.unwrap();
    let settings = ConnectSettings { endpoints: vec![first.endpoint(), other_network.endpoint()], genesis: None };
    let quick = Deadlines { connect_ms: 500, call_ms: 500, finality_ms: 2_000, ..deadlines() };
    let client = SubtensorClient::connect_within(settings, quick).await.unwrap();
    assert_eq!(client.genesis(), first.genesis());
    drop(first);
    let error = client.head().await.unwrap_err();
    assert!(matches!(error, ChainError::WrongGenesis { .. } | ChainError::Timeout { .. } | ChainError::Unavailable { .. }), "{error}");
}

/// Forwards connections to `node` until it is told to freeze: then they stay open and carry nothing.
struct Relay {
    endpoint: String,
    frozen: tokio::sync::watch::Sender<bool>,
}

impl Relay {
    async fn start(node: &DevNode) -> Self {
        let target = node.endpoint().strip_prefix("ws://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("ws://{}", listener.local_addr().unwrap());
        let frozen = tokio::sync::watch::Sender::new(false);
        let signal = frozen.subscribe();
        tokio::spawn(async move {
            while let Ok((mut inbound, _)) = listener.accept().await {
                let target = target.clone();
                let mut signal = signal.clone();
                tokio::spawn(async move {
                    let mut outbound = tokio::net::TcpStream::connect(target).await.unwrap();
                    let freeze = async move { signal.wait_for(|frozen| *frozen).await.is_ok() };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut inbound, &mut outbound) => {}
                        // Both sockets stay open, as on a half-dead connection.
                        true = freeze => std::future::pending().await,
                        else => {}
                    }
                });
            }
        });
        Self { endpoint, frozen }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_dead_connection_is_left_for_the_next_endpoint() {
    let node = DevNode::start(dev_chain(20)).await.unwrap();
    let relay = Relay::start(&node).await;
    let settings = ConnectSettings { endpoints: vec![relay.endpoint.clone(), node.endpoint()], genesis: Some(node.genesis()) };
    let quick = Deadlines { connect_ms: 2_000, call_ms: 1_000, finality_ms: 10_000, ..deadlines() };
    let client = SubtensorClient::connect_within(settings, quick).await.unwrap();
    let before = client.head().await.unwrap();
    relay.frozen.send_replace(true);
    let started = Instant::now();
    assert!(client.head().await.unwrap().number >= before.number);
    assert!(started.elapsed() < Duration::from_secs(5));
    set_row(&client, 0, &[(1, 1), (2, 65535)], 0).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_whose_watch_broke_is_found_by_reading_back() {
    let node = DevNode::start_with(dev_chain(20), DevOptions { finality_lag: 2, ..Default::default() }).await.unwrap();
    let client = std::sync::Arc::new(connect(&node).await);
    client.head().await.unwrap();
    node.stall(true);
    let setting = tokio::spawn({
        let client = client.clone();
        async move { set_row(client.as_ref(), 0, &[(1, 1), (2, 65535)], 0).await }
    });
    // The extrinsic waits in the pool of the stalled node; then the node restarts its server, then blocks come again.
    tokio::time::sleep(Duration::from_millis(500)).await;
    node.drop_connections();
    node.stall(false);
    let block = setting.await.unwrap().unwrap();
    assert!(client.head().await.unwrap().number >= block.number);
    assert_eq!(client.weights(NETUID, 0).await.unwrap(), [(1, 1), (2, 65535)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_stalled_chain_the_setter_gives_up_at_its_deadline() {
    let node = DevNode::start(dev_chain(20)).await.unwrap();
    let settings = ConnectSettings { endpoints: vec![node.endpoint()], genesis: None };
    let quick = Deadlines { finality_ms: 1_000, ..deadlines() };
    let client = SubtensorClient::connect_within(settings, quick).await.unwrap();
    node.stall(true);
    let head = client.head().await.unwrap();
    let error = set_row(&client, 0, &[(1, 1), (2, 65535)], 0).await.unwrap_err();
    assert!(matches!(error, SetWeightsError::NotFinalized { millis: 1_000 }), "{error}");
    assert!(error.is_retryable());
    assert_eq!(client.head().await.unwrap(), head, "reads are answered all the while");
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_that_answer_while_no_block_arrives_are_replaced_and_then_reported() {
    let stalled = DevNode::start(dev_chain(20)).await.unwrap();
    // Two names of one chain, which then stands still.
    let relay = Relay::start(&stalled).await;
    let settings = ConnectSettings { endpoints: vec![relay.endpoint.clone(), stalled.endpoint()], genesis: None };
    let quick = Deadlines { stall_ms: 400, ..deadlines() };
    let client = SubtensorClient::connect_within(settings, quick).await.unwrap();
    client.head().await.unwrap();
    assert!(client.health().is_healthy(), "{}", client.health());
    assert_eq!(client.health().endpoint, relay.endpoint);
    stalled.stall(true);
    // It is replaced, tried elsewhere, and then reported, while questions are answered all the while.
    let started = Instant::now();
    while !client.health().is_stalled {
        assert!(started.elapsed() < Duration::from_secs(15), "{}", client.health());
        client.head().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let health = client.health();
    assert!(!health.is_healthy() && health.is_answering && health.reconnections > 0, "{health:?}");
    assert!(health.to_string().contains("stand still"), "{health}");
    stalled.stall(false);
    while client.health().is_stalled {
        assert!(started.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(client.health().is_healthy());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_comes_back_with_another_network_is_never_used() {
    let node = DevNode::start(dev_chain(20)).await.unwrap();
    let other = DevNode::start(dev_chain(20)).await.unwrap();
    let settings = ConnectSettings { endpoints: vec![node.endpoint()], genesis: None };
    let quick = Deadlines { connect_ms: 1_000, call_ms: 1_000, ..deadlines() };
    let client = SubtensorClient::connect_within(settings, quick).await.unwrap();
    client.head().await.unwrap();
    node.impersonate(&other);
    let error = client.head().await.unwrap_err();
    assert!(matches!(&error, ChainError::WrongGenesis { found, .. } if *found == other.genesis()), "{error}");
    let error = set_row(&client, 0, &[(1, 1), (2, 65535)], 0).await.unwrap_err();
    assert!(matches!(error, SetWeightsError::Chain(ChainError::WrongGenesis { .. })), "{error}");
    assert_eq!(other.weights(0, 0), [], "nothing was sent to the wrong place");
    assert!(!client.health().is_healthy());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_node_is_waited_for_and_a_silent_one_is_not() {
    let node = DevNode::start(dev_chain(20)).await.unwrap();
    let settings = ConnectSettings { endpoints: vec![node.endpoint()], genesis: None };
    let quick = Deadlines { connect_ms: 600, call_ms: 600, ..deadlines() };
    let client = SubtensorClient::connect_within(settings, quick).await.unwrap();
    node.slow_down(20);
    client.head().await.unwrap();
    node.slow_down(0);
    node.silence(true);
    let started = Instant::now();
    let error = client.head().await.unwrap_err();
    assert!(matches!(error, ChainError::Timeout { .. } | ChainError::Unavailable { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(!client.health().is_answering);
    node.silence(false);
    client.head().await.unwrap();
    assert!(client.health().is_answering);
}

#[tokio::test(flavor = "multi_thread")]
async fn past_metagraphs_are_read_while_the_node_remembers_them() {
    let node = DevNode::start(dev_chain(0)).await.unwrap();
    let client = connect(&node).await;
    (0..10).for_each(|_| {
        node.produce();
    });
    let newcomer = DevNeuron { hotkey: hotkey(9).account(), coldkey: hotkey(9).account(), stake: 5, validator_permit: true };
    node.change(Change::Register { uid: Some(3), neuron: newcomer });
    let changed = node.produce().number;
    let before = client.metagraph_at(NETUID, changed - 1).await.unwrap();
    let after = client.metagraph_at(NETUID, changed).await.unwrap();
    assert_eq!((before.block.number, after.block.number), (changed - 1, changed));
    assert_eq!(before.by_uid(3).unwrap().hotkey, hotkey(3).account());
    assert_eq!(after.by_uid(3).unwrap().hotkey, hotkey(9).account());
    assert_eq!(client.block_hash(changed).await.unwrap(), Some(after.block.hash));
    assert!(matches!(client.metagraph_at(NETUID, changed + 50).await, Err(ChainError::NotYetFinal { number }) if number == changed + 50));
    (0..400).for_each(|_| {
        node.produce();
    });
    assert_eq!(client.metagraph_at(NETUID, changed).await.unwrap(), after, "what was read once is kept");
    let error = client.metagraph_at(NETUID, 2).await.unwrap_err();
    assert!(matches!(error, ChainError::StateForgotten { number: 2 }), "{error}");
    assert!(error.to_string().contains("archive"));
}

#[tokio::test(flavor = "multi_thread")]
async fn hashes_of_blocks_whose_state_was_forgotten_are_still_known() {
    let node = DevNode::start(dev_chain(0)).await.unwrap();
    let client = connect(&node).await;
    let early = node.produce();
    (0..400).for_each(|_| {
        node.produce();
    });
    assert_eq!(client.block_hash(early.number).await.unwrap(), Some(early.hash));
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_of_an_unknown_version_is_reported_with_the_remedy_and_nothing_is_sent() {
    let node = DevNode::start(dev_chain(0)).await.unwrap();
    let client = connect(&node).await;
    client.head().await.unwrap();
    node.change(Change::OutgrowMetadata);
    node.produce();
    let error = client.head().await.unwrap_err();
    assert!(matches!(error, ChainError::Answer { .. }), "{error}");
    assert!(error.needs_a_person() && !error.is_retryable() && error.to_string().contains("newer release"), "{error}");
    assert!(set_row(&client, 0, &[(1, 1), (2, 65535)], 0).await.is_err());
    node.produce();
    assert_eq!(node.weights(0, 0), []);
    // A fresh client meets it at its first question.
    let fresh = connect(&node).await;
    assert!(fresh.head().await.unwrap_err().needs_a_person());
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_entries_that_a_later_runtime_dropped_are_done_without() {
    const DROPPED: [(&str, &str); 9] = [
        ("SubtensorModule", "StakeThreshold"),
        ("SubtensorModule", "MaxWeightsLimit"),
        ("SubtensorModule", "RevealPeriodEpochs"),
        ("SubtensorModule", "PendingEpochAt"),
        ("SubtensorModule", "MechanismCountCurrent"),
        ("SubtensorModule", "SubnetOwnerHotkey"),
        ("SubtensorModule", "Burn"),
        ("Drand", "BeaconConfig"),
        ("Commitments", "CommitmentOf"),
    ];
    let node = DevNode::start(dev_chain(20)).await.unwrap();
    let client = connect(&node).await;
    let before = client.hyperparameters(NETUID).await.unwrap();
    node.change(Change::StakeThreshold(7));
    node.change(Change::DropEntries(&DROPPED));
    let changed = node.produce().number;
    while client.head().await.unwrap().number < changed {}
    assert_eq!(client.metagraph(NETUID).await.unwrap().neurons.len(), 4);
    // The chain judges what is no longer to be read.
    assert_eq!(client.hyperparameters(NETUID).await.unwrap(), before);
    let view = client.weights_view(NETUID, 0, &hotkey(0).account()).await.unwrap();
    assert_eq!((view.reveal_period_epochs, view.mechanisms, view.owner_hotkey), (1, 1, None));
    assert_eq!(view.beacon, chain::drand::Beacon::quicknet());
    assert_eq!(client.registration(NETUID, &hotkey(0).account()).await.unwrap().burn_rao, None);
    assert_eq!(client.commitment(NETUID, &hotkey(0).account()).await.unwrap(), None);
    assert_eq!(client.commitments(NETUID).await.unwrap(), []);
    set_row(&client, 0, &[(1, 1), (2, 65535)], 0).await.unwrap();
    assert_eq!(client.weights(NETUID, 0).await.unwrap(), [(1, 1), (2, 65535)]);
}
