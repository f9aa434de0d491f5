//! The orchestrator's node: its real machine behind a journal, and hands that do to the simulated bucket what
//! `quasar-orchestrator`'s effects do to a real one: the same objects, conditions, order, retries and limits.

mod effects;
mod grants;
mod merge;
mod polls;
mod takeover;
mod writes;

use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;

use bytes::Bytes;
use daemon::Machine;
use protocol::Digest;
use protocol::documents::{Action, Order, WRITER_LEASE_MS};
use quasar_orchestrator::machine::{Effect, Input, Orchestrator, Slot};

use super::executor::{Life, WORLD};
use super::world::World;

const NODE: usize = 0;
/// As the driver's default.
const EFFECTS_AT_ONCE: usize = 64;
/// Longest time that a journal's commit takes.
const COMMIT_MS: u64 = 4;

/// What the disk holds.
#[derive(Default)]
struct Disk {
    snapshot: Option<(u64, Vec<u8>)>,
    entries: Vec<(u64, Input)>,
    sequence: u64,
}

/// The process of the orchestrator, and its disk.
#[derive(Default)]
pub struct Node {
    disk: Disk,
    machine: Option<Orchestrator>,
    life: Life,
    hands: Rc<Hands>,
    last_ms: u64,
    since_snapshot: usize,
    /// Inputs that the journal does not hold yet.
    pending: Vec<Input>,
    is_committing: bool,
    waiting: VecDeque<Effect>,
    in_flight: usize,
    tick_ms: Option<u64>,
    /// The next process finds nothing on the disk.
    has_lost_disk: bool,
    pub crashes: u64,
    pub lost_disks: u64,
    pub effects: u64,
    /// The boundary at which to crash: after so many effects have ended, counted over all lives.
    pub crash_after: Option<u64>,
}

/// What lives and dies with the process.
#[derive(Default)]
struct Hands {
    watched: std::cell::RefCell<(Vec<Slot>, Vec<Slot>)>,
    records: std::cell::RefCell<HashMap<Slot, (Digest, Bytes)>>,
    head_etag: std::cell::RefCell<Option<String>>,
    outbox: std::cell::RefCell<HashMap<String, Turnstile>>,
    /// Leases whose record lies in the bucket.
    recorded: std::cell::RefCell<HashSet<u64>>,
}

#[derive(Clone, Default)]
struct Turnstile {
    newest: u64,
    /// Held by the writer whose turn it is; the tag of what was written last.
    lock: Rc<tokio::sync::Mutex<Option<String>>>,
}

fn encode(machine: &Orchestrator) -> Vec<u8> {
    bincode::serde::encode_to_vec(machine, bincode::config::standard()).expect("a machine encodes")
}

fn decode(bytes: &[u8]) -> Orchestrator {
    bincode::serde::decode_from_slice(bytes, bincode::config::standard()).expect("a snapshot decodes").0
}

impl Node {
    pub fn is_running(&self) -> bool {
        self.machine.is_some()
    }

    pub fn machine(&self) -> Option<&Orchestrator> {
        self.machine.as_ref()
    }

    /// The machine's durable state.
    pub fn fingerprint(&self) -> Option<Digest> {
        self.machine.as_ref().map(|machine| Digest::blake3(&encode(machine)))
    }
}

impl World {
    /// Starts the orchestrator's process: snapshot, journal again with effects muted, then ask for what is open.
    pub fn start_orchestrator(&self) {
        let life = self.executor.new_life();
        let orders_taken;
        {
            let mut node = self.orchestrator.borrow_mut();
            if std::mem::take(&mut node.has_lost_disk) {
                let now_ms = node.last_ms.max(self.clock_ms(NODE));
                let (sequence, machine) = self.recover_from_bucket(life, now_ms);
                node.disk = Disk { snapshot: Some((now_ms, encode(&machine))), entries: Vec::new(), sequence };
                self.watch.borrow_mut().disk_lost();
            }
            let mut machine = match &node.disk.snapshot {
                Some((_, bytes)) => decode(bytes),
                None => Orchestrator::new(self.setup.clone()),
            };
            let mut last_ms = node.disk.snapshot.as_ref().map_or(0, |(last_ms, _)| *last_ms);
            for (now_ms, input) in &node.disk.entries {
                machine.handle(*now_ms, input.clone());
                while machine.poll_effect().is_some() {}
                last_ms = last_ms.max(*now_ms);
            }
            self.watch.borrow_mut().recovered(self, &encode(&machine));
            orders_taken = machine.orders_taken();
            node.machine = Some(machine);
            node.life = life;
            node.last_ms = last_ms;
            node.since_snapshot = node.disk.entries.len();
            node.hands = Rc::default();
        }
        self.tell_orchestrator(life, Input::Claimed { epoch: life });
        let world = self.me();
        self.executor.spawn(life, async move { world.poll_progress(life).await });
        let world = self.me();
        self.executor.spawn(life, async move { world.poll_chain(life).await });
        let world = self.me();
        self.executor.spawn(life, async move { world.poll_orders(life, orders_taken).await });
    }

    /// Kills the process where it stands. Of the inputs whose commit is under way, the journal holds some first part.
    pub fn crash_orchestrator(&self, kept: usize) {
        let mut node = self.orchestrator.borrow_mut();
        if node.machine.is_none() {
            return;
        }
        let now_ms = node.last_ms.max(self.clock_ms(NODE));
        let mut machine = node.machine.take();
        let torn: Vec<Input> = std::mem::take(&mut node.pending).into_iter().take(kept).collect();
        for input in torn {
            // The next life has to come to the same state from the journal as this one would have from memory.
            if let Some(machine) = &mut machine {
                machine.handle(now_ms, input.clone());
                while machine.poll_effect().is_some() {}
            }
            node.disk.entries.push((now_ms, input));
        }
        if let Some(machine) = &machine {
            self.watch.borrow_mut().crashed(encode(machine));
        }
        let life = node.life;
        node.crashes += 1;
        node.is_committing = false;
        node.waiting.clear();
        node.in_flight = 0;
        node.tick_ms = None;
        drop(node);
        self.trace(&[self.executor.now_ms(), 0, u64::MAX]);
        self.say(NODE, || "CRASH".into());
        self.executor.end(life);
    }

    fn tell_orchestrator(&self, life: Life, input: Input) {
        let mut node = self.orchestrator.borrow_mut();
        if node.life != life || node.machine.is_none() {
            return;
        }
        node.pending.push(input);
        if !node.is_committing {
            node.is_committing = true;
            let world = self.me();
            let commit_ms = 1 + self.random.borrow_mut().below(COMMIT_MS);
            self.executor.after(commit_ms, life, move || world.commit_orchestrator(life));
        }
    }

    fn commit_orchestrator(&self, life: Life) {
        let mut node = self.orchestrator.borrow_mut();
        let node = &mut *node;
        node.is_committing = false;
        let now_ms = node.last_ms.max(self.clock_ms(NODE));
        node.last_ms = now_ms;
        let batch = std::mem::take(&mut node.pending);
        let Some(machine) = &mut node.machine else { return };
        node.since_snapshot += batch.len();
        for input in batch {
            node.disk.entries.push((now_ms, input.clone()));
            self.trace(&[self.executor.now_ms(), 0, kind_of(&input)]);
            self.say(NODE, || format!("{input:?}"));
            if let Input::Order { order: Order { action: Action::Rollback { .. }, .. } } = &input {
                self.watch.borrow_mut().takes_back();
            }
            machine.handle(now_ms, input);
            while let Some(effect) = machine.poll_effect() {
                node.waiting.push_back(effect);
            }
        }
        if node.since_snapshot >= self.plan.snapshot_every {
            node.disk.snapshot = Some((now_ms, encode(machine)));
            node.disk.entries.clear();
            node.since_snapshot = 0;
        }
        self.watch.borrow_mut().orchestrator_is(self, machine);
        let deadline = machine.deadline();
        self.begin_effects(node, life);
        self.set_orchestrator_tick(node, life, deadline);
    }

    fn set_orchestrator_tick(&self, node: &mut Node, life: Life, deadline: Option<u64>) {
        let Some(deadline) = deadline else { return };
        let delay_ms = deadline.saturating_sub(self.clock_ms(NODE)).clamp(1, 2_000);
        let at_ms = self.executor.now_ms() + delay_ms;
        node.tick_ms = Some(at_ms);
        let world = self.me();
        self.executor.after(delay_ms, life, move || {
            let is_due = world.orchestrator.borrow().tick_ms == Some(at_ms);
            if is_due {
                world.tell_orchestrator(life, Input::Tick);
            }
        });
    }

    fn begin_effects(&self, node: &mut Node, life: Life) {
        while node.in_flight < EFFECTS_AT_ONCE {
            let Some(effect) = node.waiting.pop_front() else { break };
            node.in_flight += 1;
            self.say(NODE, || format!("begins {effect:?}"));
            let (world, hands) = (self.me(), node.hands.clone());
            self.executor.spawn(life, async move {
                let answer = world.execute(&hands, effect).await;
                world.effect_ended(life, answer);
            });
        }
    }

    fn effect_ended(&self, life: Life, answer: Option<Input>) {
        let crash = {
            let mut node = self.orchestrator.borrow_mut();
            if node.life != life || node.machine.is_none() {
                return;
            }
            node.in_flight -= 1;
            node.effects += 1;
            node.crash_after == Some(node.effects)
        };
        if crash {
            // The effect is done, and its process never hears of it.
            let world = self.me();
            self.executor.after(0, WORLD, move || world.crash_and_restart(0, 500));
            return;
        }
        if let Some(input) = answer {
            self.tell_orchestrator(life, input);
        }
        let mut node = self.orchestrator.borrow_mut();
        self.begin_effects(&mut node, life);
    }

    /// Kills the orchestrator and takes its disk away. The next one waits until nobody can have the writer lease.
    pub fn crash_and_lose_disk(&self, down_ms: u64) {
        {
            let mut node = self.orchestrator.borrow_mut();
            node.has_lost_disk = true;
            node.lost_disks += 1;
        }
        self.crash_and_restart(0, WRITER_LEASE_MS + down_ms);
    }

    /// Kills the orchestrator and starts it again later.
    pub fn crash_and_restart(&self, kept: usize, down_ms: u64) {
        self.crash_orchestrator(kept);
        let world = self.me();
        self.executor.after(down_ms, WORLD, move || {
            if world.orchestrator.borrow().machine.is_none() {
                world.start_orchestrator();
            }
        });
    }
}

/// A number for the trace.
fn kind_of(input: &Input) -> u64 {
    match input {
        Input::Started => 1,
        Input::Tick => 2,
        Input::Block { number } => 3 + (number << 8),
        Input::Metagraph { guests } => 4 + ((guests.len() as u64) << 8),
        Input::Progress { id, .. } => 5 + (u64::from(id.0[0]) << 8) + (u64::from(id.0[1]) << 16),
        Input::CommitmentStored { t, .. } => 6 + (t << 8),
        Input::CommitmentRefused { t, .. } => 18 + (t << 8),
        Input::PayloadChecked { t, .. } => 7 + (t << 8),
        Input::TapeWritten { tape } => 8 + (tape.t << 8),
        Input::Merged { id, .. } => 9 + (u64::from(id.0[0]) << 8) + (u64::from(id.0[1]) << 16),
        Input::ReceiptChecked { lease, .. } => 10 + (lease << 8),
        Input::HeadPublished => 11,
        Input::Beacon { cycle, .. } => 12 + (cycle << 8),
        Input::OpeningKeys { keys } => 13 + ((keys.len() as u64) << 8),
        Input::AuditOrdered { audit } | Input::Verdict { audit, .. } => 14 + (u64::from(audit.0[0]) << 8),
        Input::LogPublished => 15,
        Input::Released { .. } => 16,
        Input::Drain => 17,
        Input::Claimed { epoch } => 19 + (epoch << 8),
        Input::Recovered { .. } => 20,
        Input::LogTaken { .. } => 21,
        Input::Order { .. } => 22,
        Input::PageWritten { page, .. } => 23 + (u64::from(*page) << 8),
    }
}
