//! The setter over a real client and a development node: rows in the open and timelocked, and what can come in between.

use chain::devnode::{Change, DevBeacon, DevNode, DevOptions, VirtualClock};
use chain::drand::{Beacon, Pulse};
use chain::setter::{Obstacle, Report, RevealOutcome, Stage};
use chain::{Chain, WeightsRefusal};

use crate::runner::{BLOCK_MS, Runner, START_MS};
use crate::world::{NETUID, connect, dev_chain, hotkey};

const ROW: [(u16, u16); 2] = [(1, 32768), (2, 65535)];

async fn runner_with(options: DevOptions, mechanism: u8, start_ms: u64) -> Runner {
    let options = DevOptions { clock: Some(VirtualClock { start_ms, block_ms: BLOCK_MS }), ..options };
    let node = DevNode::start_with(dev_chain(0), options).await.unwrap();
    node.change(Change::WeightsRateLimit(10));
    let client = connect(&node).await;
    let mut runner = Runner::new(node, client, mechanism, start_ms);
    runner.produce();
    runner.scores(&[(hotkey(1).account(), 10), (hotkey(2).account(), 20)]);
    runner
}

async fn runner(options: DevOptions) -> Runner {
    runner_with(DevOptions { finality_lag: 2, ..options }, 0, START_MS).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_is_set_in_every_epoch() {
    let mut runner = runner(DevOptions::default()).await;
    runner.run_until(30, |runner| runner.is_on_chain(&ROW)).await;
    assert_eq!(runner.node.weights(0, 0), ROW);
    for round in 1..4u16 {
        runner.scores(&[(hotkey(1).account(), 10), (hotkey(3).account(), u64::from(round))]);
        let epochs = runner.node.best().number;
        runner.run_until(80, |runner| runner.node.weights(0, 0).iter().any(|(uid, _)| *uid == 3)).await;
        assert!(runner.node.best().number - epochs <= 60);
        runner.scores(&[(hotkey(1).account(), 10)]);
        runner.run_until(80, |runner| runner.node.weights(0, 0).iter().all(|(uid, value)| *uid != 3 || *value == 0)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timelocked_row_is_opened_by_the_chain_in_the_next_epoch() {
    let mut runner = runner(DevOptions { commit_reveal: true, ..Default::default() }).await;
    runner.run_until(30, |runner| matches!(runner.setter.stage(), Stage::Committed { .. })).await;
    assert_eq!(runner.node.weights(0, 0), [], "nobody sees it yet");
    let Stage::Committed { reveal_block, round, .. } = *runner.setter.stage() else { panic!("committed") };
    runner.run_until(60, |runner| runner.is_on_chain(&ROW)).await;
    assert_eq!(runner.node.weights(0, 0), ROW);
    let (shown_at, _) = runner.shown[0];
    assert!((reveal_block..=reveal_block + 5).contains(&shown_at), "foretold {reveal_block}, opened at {shown_at}");
    // The chain keeps the pulse that opened it.
    let pulse = runner.client.pulse(round).await.unwrap().unwrap();
    assert_eq!((pulse.round, pulse.signature.len(), pulse.randomness.len()), (round, 48, 32));
    assert_eq!(runner.client.pulse(round + 1_000_000).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_locked_to_a_genuine_round_of_quicknet_is_opened_with_its_genuine_signature() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../data/golden-461.json")).unwrap();
    let signature = hex::decode(golden["reference"]["timelock"]["signature_hex"].as_str().unwrap()).unwrap();
    let beacon = Beacon::quicknet();
    let pulses = vec![Pulse { round: 1000, randomness: vec![0; 32], signature }];
    // The chain's epoch of 30 blocks is foretold to be opened in round 1000: the commit is made at block 1 of the final head.
    let (head, reveal_block) = (1, 30);
    let start_ms = beacon.time_of(1001) - (reveal_block + 3 - head) * BLOCK_MS - head * BLOCK_MS;
    let options = DevOptions { commit_reveal: true, beacon: DevBeacon::Recorded { beacon, pulses }, ..Default::default() };
    let mut runner = runner_with(options, 0, start_ms).await;
    runner.run_until(30, |runner| matches!(runner.setter.stage(), Stage::Committed { .. })).await;
    assert!(matches!(runner.setter.stage(), Stage::Committed { round: 1000, .. }), "{}", runner.setter.stage());
    runner.run_until(60, |runner| runner.is_on_chain(&ROW)).await;
    assert_eq!(runner.node.weights(0, 0), ROW);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mechanism_has_rows_of_its_own() {
    for commit_reveal in [false, true] {
        let options = DevOptions { mechanisms: 2, commit_reveal, finality_lag: 1, ..Default::default() };
        let mut runner = runner_with(options, 1, START_MS).await;
        runner.run_until(80, |runner| runner.is_on_chain(&ROW)).await;
        assert_eq!(runner.node.weights(1, 0), ROW);
        assert_eq!(runner.node.weights(0, 0), []);
        let view = runner.client.weights_view(NETUID, 0, &hotkey(0).account()).await.unwrap();
        assert_eq!((view.mechanisms, view.last_updates[0], view.row.len()), (2, 0, 0));
    }
    let mut alone = runner_with(DevOptions::default(), 1, START_MS).await;
    alone.run_until(10, |runner| matches!(runner.setter.stage(), Stage::Blocked(_))).await;
    assert_eq!(alone.setter.stage(), &Stage::Blocked(Obstacle::NoMechanism { mechanism: 1, count: 1 }));
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_reveal_switched_while_a_row_is_on_its_way_changes_how_it_is_sent() {
    let mut runner = runner(DevOptions::default()).await;
    let mut is_switched = false;
    let mut switch: crate::runner::Mischief = Box::new(move |node, _| {
        if !std::mem::replace(&mut is_switched, true) {
            node.change(Change::CommitReveal(true));
        }
    });
    runner.settle(&mut switch).await;
    runner.run_until(90, |runner| runner.is_on_chain(&ROW)).await;
    let refused = |report: &Report| matches!(report, Report::Stage(Stage::Refused { reason: WeightsRefusal::CommitRevealEnabled, .. }));
    let committed = |report: &Report| matches!(report, Report::Committed(_));
    assert!(runner.reports.iter().any(committed), "{:?}", runner.reports);
    // Whether the pool or the block saw the switch first is a race; by then the row was plain.
    assert!(runner.reports.iter().any(refused), "{:?}", runner.reports);
    // Off again: the next epoch's row is in the open.
    runner.node.change(Change::CommitReveal(false));
    runner.scores(&[(hotkey(3).account(), 1)]);
    runner.run_until(90, |runner| runner.is_on_chain(&[(1, 0), (3, 65535)]) || runner.is_on_chain(&[(0, 0), (3, 65535)])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_the_chain_drops_at_its_reveal_is_reported() {
    let mut runner = runner(DevOptions { commit_reveal: true, ..Default::default() }).await;
    runner.run_until(30, |runner| matches!(runner.setter.stage(), Stage::Committed { .. })).await;
    // The permit is lost between commit and reveal.
    runner.node.change(Change::ValidatorPermit { uid: 0, has_permit: false });
    let missed = |report: &Report| matches!(report, Report::Reveal { outcome: RevealOutcome::Missed, .. });
    runner.run_until(60, |runner| runner.reports.iter().any(missed)).await;
    assert_eq!(runner.node.weights(0, 0), []);
    assert_eq!(runner.setter.stage(), &Stage::Blocked(Obstacle::NoPermit));
    // It is given back, and the next row counts.
    runner.node.change(Change::ValidatorPermit { uid: 0, has_permit: true });
    runner.run_until(90, |runner| runner.is_on_chain(&ROW)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn obstacles_come_and_go_with_the_chains_state() {
    let mut runner = runner(DevOptions { stake_threshold: 500, ..Default::default() }).await;
    let steps = [
        (Change::ValidatorPermit { uid: 0, has_permit: false }, Change::ValidatorPermit { uid: 0, has_permit: true }),
        (Change::Stake { uid: 0, stake: 499 }, Change::Stake { uid: 0, stake: 500 }),
        (Change::WeightsVersion(1), Change::WeightsVersion(0)),
        (Change::Tempo(0), Change::Tempo(30)),
    ];
    let expected = [
        Obstacle::NoPermit,
        Obstacle::StakeTooLow { stake: 499, threshold: 500 },
        Obstacle::VersionTooOld { required: 1, ours: 0 },
        Obstacle::NoEpochs,
    ];
    for ((raise, lift), obstacle) in steps.into_iter().zip(expected) {
        runner.node.change(raise);
        (0..40).for_each(|_| runner.produce());
        runner.run_until(80, |runner| runner.setter.stage() == &Stage::Blocked(obstacle.clone())).await;
        runner.node.change(lift);
        runner.run_until(80, |runner| matches!(runner.setter.stage(), Stage::OnChain { .. })).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_survives_the_fork_that_left_its_block() {
    for loses_pool in [false, true] {
        let mut runner = runner(DevOptions { finality_lag: 4, ..Default::default() }).await;
        // Forks while the row's block is not final yet.
        let mut fork: crate::runner::Mischief = Box::new(move |node, blocks| {
            if blocks == 6 {
                assert!(node.reorganise(3, loses_pool));
            }
        });
        runner.settle(&mut fork).await;
        runner.run_until(200, |runner| runner.is_on_chain(&ROW)).await;
        assert_eq!(runner.node.weights(0, 0), ROW);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_upgrade_changes_error_numbers_and_nothing_else() {
    let mut runner = runner(DevOptions::default()).await;
    runner.run_until(30, |runner| runner.is_on_chain(&ROW)).await;
    let before = runner.client.health().spec_version;
    for upgrades in 1..4 {
        runner.node.change(Change::UpgradeRuntime);
        (0..4).for_each(|_| runner.produce());
        // Errors are named by the live metadata: the same name under another number.
        let hotkey = hotkey(0);
        let client = runner.client.clone();
        let sending = tokio::spawn(async move {
            let request = chain::WeightsRequest {
                netuid: NETUID,
                mechanism: 0,
                row: vec![(1, 1), (9, 65535)],
                version_key: 0,
                how: chain::How::Plain,
            };
            client.send_weights(&hotkey, &request, &|_| {}).await
        });
        (0..40).for_each(|_| runner.produce());
        while !sending.is_finished() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            runner.produce();
        }
        let error = sending.await.unwrap().unwrap_err();
        let chain::SetWeightsError::Refused(reason) = error else { panic!("{error}") };
        assert!(matches!(reason, WeightsRefusal::UnknownUid | WeightsRefusal::TooFast), "{reason}");
        assert_eq!(runner.client.health().spec_version, before + upgrades);
        runner.scores(&[(hotkey_account(upgrades), 1)]);
        runner.run_until(120, |runner| matches!(runner.setter.stage(), Stage::OnChain { .. } | Stage::NotDue { .. })).await;
    }
}

fn hotkey_account(upgrades: u32) -> protocol::AccountId {
    hotkey(upgrades as u8).account()
}
