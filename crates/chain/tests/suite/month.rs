//! A simulated month of a validator: 216,000 blocks of 12 seconds, 600 epochs, in which sockets die, runtimes are upgraded, blocks are
//! left for forks, and commit-reveal is switched on and off. Every epoch's row must reach the chain.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use chain::devnode::{Change, DevChain, DevNode, DevOptions, VirtualClock};
use chain::{Chain, ConnectSettings, Deadlines, SubtensorClient};

use crate::runner::{BLOCK_MS, Mischief, Runner, START_MS};
use crate::world::{deadlines, dev_chain, hotkey, measured};

const TEMPO: u64 = 360;
const EPOCHS: u64 = 600;
const DEATHS: u64 = 1_000;
const UPGRADES: u64 = 20;
const FORKS: u64 = 10;
const FINALITY_LAG: u64 = 3;
/// Epochs between two switches of commit-reveal.
const SWITCH_EPOCHS: u64 = 100;

/// A small generator for when things go wrong: the same each time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        // Xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// The row of an epoch: no two are the same.
fn row(epoch: u64) -> Vec<(u16, u16)> {
    vec![(1, epoch as u16 + 1), (2, u16::MAX)]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_epochs_row_is_on_chain_through_a_month_of_trouble() {
    let chain = DevChain { tempo: TEMPO as u16, weights_rate_limit: 100, ..dev_chain(0) };
    let clock = VirtualClock { start_ms: START_MS, block_ms: BLOCK_MS };
    let options = DevOptions { finality_lag: FINALITY_LAG, clock: Some(clock), ..Default::default() };
    let node = DevNode::start_with(chain, options).await.unwrap();
    // Blocks come each 10 ms while a row is on its way: a second of ours is a hundred of them.
    let quick = Deadlines { finality_ms: 1_000, ..deadlines() };
    let settings = ConnectSettings { endpoints: vec![node.endpoint()], genesis: Some(node.genesis()) };
    let client = SubtensorClient::connect_within(settings, quick).await.unwrap();
    let mut runner = Runner::new(node, client, 0, START_MS);
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    let forks = Arc::new(AtomicU64::new(0));
    (0..FINALITY_LAG + 1).for_each(|_| runner.produce());

    let mut epoch = u64::MAX;
    let mut mischief: Mischief = Box::new(|_, _| {});
    while runner.node.best().number < EPOCHS * TEMPO {
        let current = runner.node.best().number / TEMPO;
        if current != epoch {
            epoch = current;
            runner.scores(&[(hotkey(1).account(), epoch + 1), (hotkey(2).account(), 65535)]);
            if epoch > 0 && epoch.is_multiple_of(SWITCH_EPOCHS) {
                runner.node.change(Change::CommitReveal((epoch / SWITCH_EPOCHS) % 2 == 1));
            }
            // The socket dies before a question, and once more while the row is on its way.
            runner.node.drop_connections();
            // Each once, with the first row that is on its way.
            let mut dies_at = Some(chance.below(5));
            let mut upgrades_at = (epoch % (EPOCHS / UPGRADES) == 7).then(|| chance.below(4));
            let mut forks_at = (epoch % (EPOCHS / FORKS) == 11).then(|| (3 + chance.below(2), chance.below(2) == 0));
            let forks = forks.clone();
            mischief = Box::new(move |node, blocks| {
                if dies_at.take_if(|at| *at == blocks).is_some() {
                    node.drop_connections();
                }
                if upgrades_at.take_if(|at| *at == blocks).is_some() {
                    node.change(Change::UpgradeRuntime);
                }
                if let Some((_, loses_pool)) = forks_at.take_if(|(at, _)| *at == blocks) {
                    assert!(node.reorganise(FINALITY_LAG, loses_pool));
                    forks.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        runner.settle(&mut mischief).await;
        runner.wait();
    }

    let updated: HashSet<u64> = runner.updates.iter().map(|block| block / TEMPO).collect();
    let shown: HashSet<(u64, Vec<(u16, u16)>)> = runner.shown.iter().map(|(block, row)| (block / TEMPO, row.clone())).collect();
    let mut late = Vec::new();
    let mut exact = 0;
    // The last epoch's row may still wait for its reveal.
    for epoch in 0..EPOCHS - 1 {
        let is_hidden = (epoch / SWITCH_EPOCHS) % 2 == 1;
        let is_shown = shown.contains(&(epoch + u64::from(is_hidden), row(epoch)));
        exact += u64::from(is_shown);
        // A row that was on its way when the epoch began, held up by a fork, is that epoch's row.
        if !updated.contains(&epoch) {
            late.push((epoch, is_hidden, is_shown));
        }
    }
    let first = late.first().map_or(EPOCHS, |(epoch, ..)| epoch - 1);
    let around = first * TEMPO..(first + 4) * TEMPO;
    let log: Vec<_> = runner.log.iter().filter(|(block, _)| around.contains(block)).collect();
    assert!(late.is_empty(), "rows that were not on chain in their epoch: {late:?}; {log:#?}");
    assert!(exact >= EPOCHS - 1 - 2 * FORKS, "{exact} epochs have the row of their own scores");
    // A death that hit no connection would not count: each of these was noticed and replaced.
    let replaced = runner.client.health().reconnections;
    assert!(replaced >= DEATHS, "{replaced} connections were replaced");
    assert_eq!(runner.node.spec_version(), 461 + UPGRADES as u32);
    assert_eq!(forks.load(Ordering::Relaxed), FORKS);
    measured(&format!(
        "{EPOCHS} epochs, {replaced} connections replaced, {UPGRADES} upgrades, {FORKS} forks, {exact} rows of their own epoch"
    ));
}
