//! The hosts of the orchestrator: on each a journal and a process, of which one holds the writer lease. The machine is the real one;
//! the hands do to the simulated bucket what `quasar-orchestrator`'s effects do to a real one: the same objects, conditions, order,
//! retries and limits.

mod effects;
mod grants;
mod lease;
mod merge;
mod polls;
mod takeover;
mod writes;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use bytes::Bytes;
use daemon::Machine;
use daemon::clock::Steady;
use daemon::driver::Lanes;
use daemon::machine::Lane;
use protocol::Digest;
use quasar_orchestrator::machine::{Input, Orchestrator, Slot};

use super::executor::{Life, WORLD};
use super::net::Node as NodeId;
use super::world::World;
use lease::Holding;

/// As the driver's default.
const EFFECTS_AT_ONCE: usize = 64;
/// Longest time that a journal's commit takes.
const COMMIT_MS: u64 = 4;
/// A process that was fenced is started again, as the standby, after so long.
const RESTART_MS: u64 = 5_000;

/// What the disk holds.
#[derive(Default)]
struct Disk {
    /// Names the journal.
    instance: Option<[u8; 16]>,
    snapshot: Option<(u64, Vec<u8>)>,
    entries: Vec<(u64, Input)>,
    sequence: u64,
}

/// A host: its disk, and the process that runs there.
pub struct Node {
    host: usize,
    pub id: NodeId,
    disk: Disk,
    /// Journals that this host has had.
    journals: u64,
    /// Of the process that runs, or ran last.
    pub life: Life,
    is_up: bool,
    /// Of a process that holds the lease, or did.
    machine: Option<Orchestrator>,
    hands: Option<Rc<Hands>>,
    time: Steady,
    since_snapshot: usize,
    /// Inputs that the journal does not hold yet.
    pending: Vec<Input>,
    is_committing: bool,
    waiting: Lanes<Orchestrator>,
    tick_ms: Option<u64>,
    pub crashes: u64,
    pub lost_disks: u64,
    pub effects: u64,
    /// Objects that were written or deleted.
    pub writes: u64,
    /// Processes that found their lease in other hands.
    pub fenced: u64,
    pub crash_point: Option<CrashPoint>,
}

/// Where the orchestrator dies: what is done there is done, and its process never hears of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrashPoint {
    pub boundary: Boundary,
    /// After so many of these, counted over all lives.
    pub count: u64,
    /// With the disk: the next process has the bucket alone.
    pub loses_disk: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary {
    /// An effect ended.
    Effect,
    /// An object was written or deleted; an effect may do so several times.
    Write,
}

/// What lives and dies with the process.
struct Hands {
    world: Rc<World>,
    host: usize,
    id: NodeId,
    life: Life,
    holding: RefCell<Option<Holding>>,
    /// Renewals come one after the other.
    renewing: tokio::sync::Mutex<()>,
    /// Renewals so far, and the newest of them that succeeded.
    asked: Cell<u64>,
    answered: Cell<u64>,
    watched: RefCell<(Vec<Slot>, Vec<Slot>)>,
    records: RefCell<HashMap<Slot, (Digest, Bytes)>>,
    head_etag: RefCell<Option<String>>,
    outbox: RefCell<HashMap<String, Turnstile>>,
    /// Leases whose record lies in the bucket.
    recorded: RefCell<HashSet<u64>>,
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
    pub fn new(host: usize, id: NodeId) -> Self {
        Self {
            host,
            id,
            disk: Disk::default(),
            journals: 0,
            life: WORLD,
            is_up: false,
            machine: None,
            hands: None,
            time: Steady::new(0),
            since_snapshot: 0,
            pending: Vec::new(),
            is_committing: false,
            waiting: Lanes::new(EFFECTS_AT_ONCE),
            tick_ms: None,
            crashes: 0,
            lost_disks: 0,
            effects: 0,
            writes: 0,
            fenced: 0,
            crash_point: None,
        }
    }

    pub fn is_up(&self) -> bool {
        self.is_up
    }

    pub fn machine(&self) -> Option<&Orchestrator> {
        self.machine.as_ref()
    }

    /// The machine's durable state.
    pub fn fingerprint(&self) -> Option<Digest> {
        self.machine.as_ref().map(|machine| Digest::blake3(&encode(machine)))
    }

    /// The journal is history, or gone with its disk.
    fn put_journal_aside(&mut self) {
        self.disk = Disk::default();
    }

    /// The number of the journal at hand.
    fn instance(&mut self) -> [u8; 16] {
        let fresh = self.fresh_instance();
        *self.disk.instance.get_or_insert(fresh)
    }

    fn fresh_instance(&mut self) -> [u8; 16] {
        self.journals += 1;
        let mut number = [0; 16];
        number[0] = self.host as u8;
        number[8..].copy_from_slice(&self.journals.to_le_bytes());
        number
    }

    /// The process is gone; gives the machine that it had.
    fn drop_process(&mut self) -> Option<Orchestrator> {
        self.is_up = false;
        self.is_committing = false;
        self.waiting = Lanes::new(EFFECTS_AT_ONCE);
        self.tick_ms = None;
        self.hands = None;
        self.machine.take()
    }
}

impl World {
    /// Starts a process on a host, which stands by until the lease is its own.
    pub fn start_orchestrator(&self, host: usize) {
        let life = self.executor.new_life();
        let hands = {
            let mut node = self.orchestrators[host].borrow_mut();
            if node.is_up {
                return;
            }
            (node.is_up, node.life) = (true, life);
            let hands = Rc::new(Hands {
                world: self.me(),
                host,
                id: node.id,
                life,
                holding: RefCell::default(),
                renewing: tokio::sync::Mutex::default(),
                asked: Cell::default(),
                answered: Cell::default(),
                watched: RefCell::default(),
                records: RefCell::default(),
                head_etag: RefCell::default(),
                outbox: RefCell::default(),
                recorded: RefCell::default(),
            });
            node.hands = Some(hands.clone());
            hands
        };
        self.executor.spawn(life, self.me().lead(hands, life));
    }

    /// From here on the process writes.
    fn begin_orchestrating(&self, hands: &Rc<Hands>, machine: Orchestrator, epoch: u64) {
        let (host, life) = (hands.host, hands.life);
        let orders_taken = machine.orders_taken();
        {
            let mut node = self.orchestrators[host].borrow_mut();
            let snapshot_ms = node.disk.snapshot.as_ref().map_or(0, |(last_ms, _)| *last_ms);
            let last_ms = node.disk.entries.iter().map(|(now_ms, _)| *now_ms).fold(snapshot_ms, u64::max);
            node.time = Steady::new(last_ms);
            node.since_snapshot = node.disk.entries.len();
            node.machine = Some(machine);
        }
        self.tell_orchestrator(host, life, Input::Claimed { epoch });
        self.executor.spawn(life, hands.clone().poll_progress());
        self.executor.spawn(life, hands.clone().poll_chain());
        self.executor.spawn(life, hands.clone().poll_orders(orders_taken));
    }

    /// Kills the process where it stands. Of the inputs whose commit is under way, the journal holds some first part.
    pub fn crash_orchestrator(&self, host: usize, kept: usize) {
        let mut node = self.orchestrators[host].borrow_mut();
        if !node.is_up {
            return;
        }
        let now_ms = self.machine_ms(&mut node);
        let torn: Vec<Input> = std::mem::take(&mut node.pending).into_iter().take(kept).collect();
        if let Some(mut machine) = node.drop_process() {
            for input in torn {
                // The next life has to come to the same state from the journal as this one would have from memory.
                machine.handle(now_ms, input.clone());
                while machine.poll_effect().is_some() {}
                node.disk.entries.push((now_ms, input));
            }
            self.watch.borrow_mut().crashed(host, encode(&machine));
        }
        let life = node.life;
        node.crashes += 1;
        drop(node);
        self.trace(&[self.executor.now_ms(), host as u64, u64::MAX]);
        self.say(self.orchestrators[host].borrow().id, || "CRASH".into());
        self.executor.end(life);
    }

    /// The lease is somebody else's: the process ends with exit code 78, and its operator starts it again as the standby.
    fn fenced(&self, host: usize, life: Life) {
        {
            let mut node = self.orchestrators[host].borrow_mut();
            if node.life != life || !node.is_up {
                return;
            }
            node.drop_process();
            node.pending.clear();
            node.fenced += 1;
            self.say(node.id, || "FENCED".into());
        }
        self.trace(&[self.executor.now_ms(), host as u64, u64::MAX - 1]);
        self.watch.borrow_mut().fenced(self);
        let world = self.me();
        self.executor.after(0, WORLD, move || world.executor.end(life));
        let world = self.me();
        self.executor.after(RESTART_MS, WORLD, move || world.start_orchestrator(host));
    }

    /// Time of a host's machine.
    fn machine_ms(&self, node: &mut Node) -> u64 {
        node.time.read(self.clock_ms(node.id), self.steady(node.id))
    }

    fn tell_orchestrator(&self, host: usize, life: Life, input: Input) {
        let mut node = self.orchestrators[host].borrow_mut();
        if node.life != life || node.machine.is_none() {
            return;
        }
        node.pending.push(input);
        if !node.is_committing {
            node.is_committing = true;
            let world = self.me();
            let commit_ms = 1 + self.random.borrow_mut().below(COMMIT_MS);
            self.executor.after(commit_ms, life, move || world.commit_orchestrator(host, life));
        }
    }

    fn commit_orchestrator(&self, host: usize, life: Life) {
        let mut node = self.orchestrators[host].borrow_mut();
        let node = &mut *node;
        if node.life != life {
            return;
        }
        node.is_committing = false;
        let now_ms = self.machine_ms(node);
        let batch = std::mem::take(&mut node.pending);
        let Some(machine) = &mut node.machine else { return };
        node.since_snapshot += batch.len();
        for input in batch {
            node.disk.entries.push((now_ms, input.clone()));
            self.trace(&[self.executor.now_ms(), host as u64, kind_of(&input)]);
            self.say(node.id, || format!("{input:?}"));
            if let Input::Order { order } = &input {
                self.watch.borrow_mut().ordered(machine, order);
            }
            machine.handle(now_ms, input);
            while let Some(effect) = machine.poll_effect() {
                node.waiting.push(effect);
            }
        }
        if node.since_snapshot >= self.plan.snapshot_every {
            node.disk.snapshot = Some((now_ms, encode(machine)));
            node.disk.entries.clear();
            node.since_snapshot = 0;
        }
        self.watch.borrow_mut().orchestrator_is(self, machine);
        if self.plan.faults.snapshot_ppm > 0
            && let Some(hands) = node.hands.clone()
            && self.random.borrow_mut().chance(self.plan.faults.snapshot_ppm)
        {
            let snapshot = Bytes::from(machine.to_snapshot(now_ms).expect("a machine encodes"));
            self.executor.spawn(life, async move { hands.put_newest_snapshot(snapshot).await });
        }
        let deadline = machine.deadline();
        self.begin_effects(node, life);
        self.set_orchestrator_tick(node, life, now_ms, deadline);
    }

    fn set_orchestrator_tick(&self, node: &mut Node, life: Life, now_ms: u64, deadline: Option<u64>) {
        let Some(deadline) = deadline else { return };
        let delay_ms = deadline.saturating_sub(now_ms).clamp(1, 2_000);
        let (host, at_ms) = (node.host, self.executor.now_ms() + delay_ms);
        node.tick_ms = Some(at_ms);
        let world = self.me();
        self.executor.after(delay_ms, life, move || {
            let is_due = world.orchestrators[host].borrow().tick_ms == Some(at_ms);
            if is_due {
                world.tell_orchestrator(host, life, Input::Tick);
            }
        });
    }

    fn begin_effects(&self, node: &mut Node, life: Life) {
        let Some(hands) = node.hands.clone() else { return };
        while let Some((lane, effect)) = node.waiting.begin() {
            self.say(node.id, || format!("begins {effect:?}"));
            let (world, hands) = (self.me(), hands.clone());
            self.executor.spawn(life, async move {
                let answer = hands.execute(effect).await;
                world.effect_ended(hands.host, life, lane, answer);
            });
        }
    }

    fn effect_ended(&self, host: usize, life: Life, lane: Lane, answer: Option<Input>) {
        {
            let mut node = self.orchestrators[host].borrow_mut();
            if node.life != life || node.machine.is_none() {
                return;
            }
            node.waiting.ended(lane);
            node.effects += 1;
        }
        if self.crashes_at(host, Boundary::Effect) {
            return;
        }
        if let Some(input) = answer {
            self.tell_orchestrator(host, life, input);
        }
        let mut node = self.orchestrators[host].borrow_mut();
        self.begin_effects(&mut node, life);
    }

    /// An object of the bucket was written or deleted by a node.
    pub(super) fn bucket_changed(&self, node: NodeId) {
        if let Some(host) = self.orchestrators.iter().position(|host| host.borrow().id == node) {
            self.orchestrators[host].borrow_mut().writes += 1;
            self.crashes_at(host, Boundary::Write);
        }
    }

    /// Whether this was the boundary to die at.
    fn crashes_at(&self, host: usize, boundary: Boundary) -> bool {
        let node = self.orchestrators[host].borrow();
        let count = match boundary {
            Boundary::Effect => node.effects,
            Boundary::Write => node.writes,
        };
        let Some(point) = node.crash_point.filter(|point| (point.boundary, point.count) == (boundary, count)) else { return false };
        let world = self.me();
        self.executor.after(0, WORLD, move || {
            if point.loses_disk {
                world.crash_and_lose_disk(host, 500);
            } else {
                world.crash_and_restart(host, 0, 500);
            }
        });
        true
    }

    /// Kills a process and takes its disk away.
    pub fn crash_and_lose_disk(&self, host: usize, down_ms: u64) {
        self.crash_and_restart(host, 0, down_ms);
        let mut node = self.orchestrators[host].borrow_mut();
        node.disk = Disk::default();
        node.lost_disks += 1;
    }

    /// Kills a process and starts it again later.
    pub fn crash_and_restart(&self, host: usize, kept: usize, down_ms: u64) {
        self.crash_orchestrator(host, kept);
        let world = self.me();
        self.executor.after(down_ms, WORLD, move || world.start_orchestrator(host));
    }

    /// Nothing holds the world any more through this host.
    pub fn forget_orchestrators(&self) {
        self.orchestrators.iter().for_each(|node| node.borrow_mut().hands = None);
    }
}

/// A number for the trace.
fn kind_of(input: &Input) -> u64 {
    match input {
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
        Input::Beacon { draw } => 12 + (draw.cycle << 8),
        Input::OpeningKeys { keys } => 13 + ((keys.len() as u64) << 8),
        Input::AuditOrdered { audit } | Input::Verdict { audit, .. } => 14 + (u64::from(audit.0[0]) << 8),
        Input::LogPublished => 15,
        Input::Released { .. } => 16,
        Input::Claimed { epoch } => 19 + (epoch << 8),
        Input::Recovered { .. } => 20,
        Input::LogTaken { .. } => 21,
        Input::Order { .. } => 22,
        Input::PageWritten { page, .. } => 23 + (u64::from(*page) << 8),
        Input::LeaseEnded { end } => 24 + (end.lease << 8),
        Input::RetiredAll { number } => 25 + (number << 8),
        Input::SnapshotStored { revision } => 26 + (revision << 8),
    }
}
