//! Runs the setter over a chain in the chain's own time: a test says when blocks come.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chain::devnode::DevNode;
use chain::setter::{Input, Report, Setter, SetterSettings, Stage, execute};
use chain::{Chain, Hotkey, SubtensorClient};
use protocol::AccountId;
use tokio::sync::mpsc;

use crate::world::{NETUID, hotkey};

pub const BLOCK_MS: u64 = 12_000;
/// Time of block 0.
pub const START_MS: u64 = 1_800_000_000_000;

/// What happens to the node with each block that comes while a row is on its way.
pub type Mischief = Box<dyn FnMut(&DevNode, u64) + Send>;

pub struct Runner {
    pub setter: Setter,
    pub node: Arc<DevNode>,
    pub client: Arc<SubtensorClient>,
    pub hotkey: Arc<Hotkey>,
    place: (u16, u8),
    start_ms: u64,
    /// Blocks in which uid 0 set or committed weights, forks included.
    pub updates: Vec<u64>,
    /// The rows of uid 0 that the chain showed, in order, each with the block that first did.
    pub shown: Vec<(u64, Vec<(u16, u16)>)>,
    pub reports: Vec<Report>,
    /// The stages in words, each with the block at which it began.
    pub log: Vec<(u64, String)>,
}

impl Runner {
    pub fn new(node: DevNode, client: SubtensorClient, mechanism: u8, start_ms: u64) -> Self {
        let hotkey = Arc::new(hotkey(0));
        let settings = SetterSettings {
            mechanism,
            // A little less than a block, and a little more than an epoch.
            look_ms: BLOCK_MS - 1,
            look_max_ms: 400 * BLOCK_MS,
            retry_base_ms: BLOCK_MS,
            retry_max_ms: 8 * BLOCK_MS,
            ..SetterSettings::new(NETUID, hotkey.account(), 0)
        };
        Self {
            setter: Setter::new(settings),
            node: Arc::new(node),
            client: Arc::new(client),
            hotkey,
            place: (NETUID, mechanism),
            start_ms,
            updates: Vec::new(),
            shown: Vec::new(),
            reports: Vec::new(),
            log: Vec::new(),
        }
    }

    pub fn now_ms(&self) -> u64 {
        self.start_ms + self.node.best().number * BLOCK_MS
    }

    pub fn scores(&mut self, scores: &[(AccountId, u64)]) {
        self.setter.handle(self.now_ms(), Input::Scores { scores: scores.to_vec(), is_final: false });
    }

    fn note(&mut self) {
        let update = self.node.last_update(self.place.1, 0);
        if update > 0 && self.updates.last() != Some(&update) {
            self.updates.push(update);
        }
        let row = self.node.weights(self.place.1, 0);
        if !row.is_empty() && self.shown.last().is_none_or(|(_, last)| *last != row) {
            self.shown.push((self.node.best().number, row));
        }
        while let Some(report) = self.setter.poll_report() {
            if let Report::Stage(stage) = &report {
                self.log.push((self.node.best().number, stage.to_string()));
            }
            self.reports.push(report);
        }
    }

    pub fn produce(&mut self) {
        self.node.produce();
        self.note();
    }

    /// Does what the machine asks for until it asks for nothing; while a row is on its way blocks come, and `mischief` with each.
    pub async fn settle(&mut self, mischief: &mut Mischief) {
        self.setter.handle(self.now_ms(), Input::Tick);
        while let Some(effect) = self.setter.poll_effect() {
            let (told, mut heard) = mpsc::channel(64);
            let (client, hotkey, place) = (self.client.clone(), self.hotkey.clone(), self.place);
            let is_done = Arc::new(AtomicBool::new(false));
            let doing = tokio::spawn({
                let is_done = is_done.clone();
                async move {
                    let answer = execute(client.as_ref(), &hotkey, &effect, place, &told).await;
                    is_done.store(true, Ordering::Relaxed);
                    answer
                }
            });
            let mut blocks = 0;
            while !is_done.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(10)).await;
                // Looks are quick: blocks come for rows only.
                if matches!(self.setter.stage(), Stage::Sending { .. }) {
                    mischief(&self.node, blocks);
                    blocks += 1;
                    self.produce();
                }
                while let Ok(progress) = heard.try_recv() {
                    self.setter.handle(self.now_ms(), progress);
                }
            }
            let answer = doing.await.expect("effects do not panic");
            self.setter.handle(self.now_ms(), answer);
            self.note();
        }
    }

    /// Lets the chain run until the machine wants to act again.
    pub fn wait(&mut self) {
        self.produce();
        while self.setter.deadline().is_some_and(|deadline| self.now_ms() < deadline) {
            self.produce();
        }
    }

    /// Runs on until `done`, at most so many blocks.
    pub async fn run_until(&mut self, blocks: u64, mut done: impl FnMut(&Self) -> bool) {
        let last = self.node.best().number + blocks;
        let mut quiet: Mischief = Box::new(|_, _| {});
        loop {
            self.settle(&mut quiet).await;
            if done(self) {
                return;
            }
            assert!(self.node.best().number < last, "stage {}, health {}", self.setter.stage(), self.client.health());
            self.wait();
        }
    }

    pub fn is_on_chain(&self, row: &[(u16, u16)]) -> bool {
        self.reports.iter().any(|report| matches!(report, Report::OnChain { row: shown, .. } if shown == row))
    }
}
