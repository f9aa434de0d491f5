//! The world: all nodes, the bucket, the chain and the weather, in one thread on one virtual clock.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use chain::memory::{MemoryChain, MemorySettings};
use chain::{Chain, Hotkey, Hyperparameters, Neuron};
use futures::FutureExt;
use protocol::documents::{Action, AuditDraw, CatalogRef, CurrentRun, FragmentHead, FragmentManifest, Head, Order, ReleaseRef};
use protocol::envelope::{self, Context, Document, EnvelopeError, Expect, RunId, SKEW_MS, Verified};
use protocol::paths::{self, Keys, RunKeys};
use protocol::{AccountId, Digest, FileRecord, KeyKind};
use quasar_orchestrator::machine::{FragmentSetup, RunSetup, ShardRows, Slot, Status};
use storage::Object;
use storage::memory::{MemoryGrants, MemoryStore};
use tokio::time::Instant;

use super::executor::{Executor, WORLD};
use super::net::{Net, Traffic};
use super::paper::Identity;
use super::plan::{Behaviour, Permit, Plan};
use super::random::Random;
use super::watch::{Violation, Watch};
use super::{learner, orchestrator, tensors, validator};

/// Unix time at the beginning of every world.
pub const EPOCH_MS: u64 = 1_760_000_000_000;
pub const BASE_RELEASE: &str = "base";
pub const BASE_FILE: &str = "config.json";
const NETUID: u16 = 24;
/// Longest text of an event.
const SAID_MAX: usize = 200;
/// What is still to happen after the run is complete: verdicts, the last heads of the log, final weights.
const SETTLE_MS: u64 = 150_000;

/// Keys of one slot, spelt once: addresses are expensive to write.
pub struct SlotKeys {
    pub progress: String,
    pub job: String,
    pub standing: String,
    pub pull: String,
    /// What lies in the slot's own folder.
    pub own: paths::SlotKeys,
}

impl SlotKeys {
    fn of(run: &RunKeys, (hotkey, slot): Slot) -> Self {
        let own = run.slot(&hotkey, slot);
        Self {
            progress: own.progress(),
            job: run.job(&hotkey, slot),
            standing: run.standing(&hotkey, slot),
            pull: run.pull_grants(&hotkey, slot),
            own,
        }
    }
}

pub struct World {
    me: Weak<Self>,
    pub plan: Plan,
    pub executor: Executor,
    pub random: RefCell<Random>,
    pub context: Context,
    pub keys: Keys,
    pub run: RunKeys,
    head_key: String,
    lease_key: String,
    /// The orchestrator's identity.
    pub office: Identity,
    pub current: CurrentRun,
    pub setup: RunSetup,
    pub store: MemoryStore,
    pub grants: MemoryGrants,
    store_ms: Arc<AtomicU64>,
    pub chain: MemoryChain,
    pub net: RefCell<Net>,
    /// The hosts of the orchestrator: the first one, and the standby where there is one.
    pub orchestrators: Vec<RefCell<orchestrator::Node>>,
    pub learners: Vec<RefCell<learner::Node>>,
    pub validators: Vec<RefCell<validator::Node>>,
    pub watch: RefCell<Watch>,
    slot_keys: RefCell<HashMap<Slot, Rc<SlotKeys>>>,
    /// By node.
    clocks: Vec<Cell<Clock>>,
    /// The zero of all steady clocks.
    begun: Instant,
    newest_head: RefCell<Option<(Option<String>, Verified<Head>)>>,
    trace: Cell<u64>,
    events: Cell<u64>,
    pub stepping: Cell<Stepping>,
}

/// What a node's clocks show beside the time of the world.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// Of the wall clock.
    pub off_ms: i64,
    /// Time that the machine slept through: its steady clock stood still.
    pub slept_ms: u64,
}

/// Who trains just now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stepping {
    learners: u64,
    first_ms: Option<u64>,
    idle_since_ms: u64,
    idle_ms: u64,
    longest_idle_ms: u64,
}

impl Stepping {
    pub fn begin(mut self, now_ms: u64) -> Self {
        if self.first_ms.is_some() && self.learners == 0 {
            let idle_ms = now_ms - self.idle_since_ms;
            self.idle_ms += idle_ms;
            // Between two steps of a lone learner lies its boundary.
            self.longest_idle_ms = self.longest_idle_ms.max(idle_ms);
        }
        self.first_ms.get_or_insert(now_ms);
        self.learners += 1;
        self
    }

    pub fn end(mut self, now_ms: u64) -> Self {
        self.learners -= 1;
        self.idle_since_ms = now_ms;
        self
    }

    fn total_ms(&self, now_ms: u64) -> u64 {
        now_ms - self.first_ms.unwrap_or(now_ms)
    }
}

/// How a run went.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub violations: Vec<Violation>,
    /// Every input of every machine by its kind, what it is about, and its time.
    pub trace: u64,
    pub events: u64,
    pub virtual_ms: u64,
    pub completed_ms: Option<u64>,
    pub merges: u64,
    pub contributions: u64,
    pub crashes: u64,
    /// Crashes of miners.
    pub miner_crashes: u64,
    /// Crashes of the orchestrator that took the disk along.
    pub lost_disks: u64,
    /// Objects that the orchestrator wrote or deleted.
    pub writes: u64,
    /// Requests of the first orchestrator: reads, and writes with deletions.
    pub requests: [u64; 2],
    /// Times that a process went on from the bucket after another host had written, and processes that found their lease gone.
    pub takeovers: u64,
    pub fenced: u64,
    pub effects: u64,
    pub longest_stall_ms: u64,
    pub longest_stall_before_ms: u64,
    /// Longest time in which nobody trained, after the first step.
    pub longest_idle_ms: u64,
    /// Share of all miners' time in steps that were not lost, and share of time in which some learner steps.
    pub goodput: f64,
    pub uptime: f64,
    pub traffic: [Traffic; 3],
    pub verdicts: Vec<(&'static str, u64)>,
    /// BLAKE3 of all keyframes of the last versions.
    pub model: Digest,
    pub steps: u64,
    /// What the orchestrator's `status` would say in the end.
    pub status: Option<Status>,
    /// Miners by what they are doing in the end.
    pub miners: Vec<String>,
}

impl World {
    /// What the chain says of a block with which a cycle's audits are drawn; `None` while it is not there.
    pub(super) fn draw_at(&self, cycle: u64, block: u64) -> Option<AuditDraw> {
        let beacon = self.chain.block_hash(block).now_or_never()?.ok()??;
        let metagraph = self.chain.metagraph_at(self.context.netuid, block).now_or_never()?.ok()?;
        Some(AuditDraw { cycle, beacon_block: block, beacon: Digest(beacon), validators: metagraph.validators() })
    }

    pub fn new(plan: Plan) -> Rc<Self> {
        let mut random = Random::new(plan.seed);
        let office = Identity::new(plan.scheme, "orchestrator", 0);
        let miners: Vec<Identity> = (0..plan.miners as u64).map(|number| Identity::new(plan.scheme, "miner", number)).collect();
        let validators: Vec<Identity> = (0..plan.validators as u64).map(|number| Identity::new(plan.scheme, "validator", number)).collect();
        let neuron = |(uid, identity): (usize, &Identity)| {
            let is_validator = uid >= miners.len();
            Neuron {
                uid: uid as u16,
                hotkey: identity.account,
                coldkey: AccountId([1; 32]),
                stake: if is_validator { 1_000_000_000_000 } else { 0 },
                validator_permit: is_validator,
                last_update: 0,
            }
        };
        let neurons = miners.iter().chain(&validators).enumerate().map(neuron).collect();
        let hyperparameters = Hyperparameters {
            tempo: 30,
            weights_rate_limit: 10,
            min_allowed_weights: 1,
            max_weight_limit: u16::MAX,
            weights_version: 0,
            commit_reveal: false,
            stake_threshold: 0,
        };
        let chain = MemoryChain::new(MemorySettings { netuid: NETUID, seed: plan.seed, hyperparameters, neurons, owner_hotkey: None });
        chain.advance(1);
        let run_id = RunId([7; 16]);
        let context = Context { genesis: chain.genesis(), netuid: NETUID, run: run_id };
        let keys = Keys::new(NETUID);
        let run = keys.run(run_id);
        let fragments = (0..plan.parameters.fragments).map(|fragment| {
            let state = tensors::first_state(fragment);
            let keyframe = tensors::keyframe_bytes(fragment, 0, &state);
            FragmentSetup {
                keyframe: Digest::blake3(&keyframe),
                keyframe_length: keyframe.len() as u64,
                state: Digest::blake3(&state.0),
                elements: tensors::PAYLOAD_BYTES as u64 / 2,
                payload_length: tensors::PAYLOAD_BYTES as u64,
            }
        });
        let setup = RunSetup {
            run: run_id,
            parameters: plan.parameters.clone(),
            release: ReleaseRef { release: BASE_RELEASE.into(), manifest: Digest::ZERO },
            fragments: fragments.collect(),
            catalog: CatalogRef { page: 0, digest: Digest::ZERO },
            shards: ShardRows::of(&[0, 1, 2, 3].map(|shard| tensors::shard(&format!("s{shard}"), plan.shard_rows))),
        };
        let store = MemoryStore::new();
        let store_ms = Arc::new(AtomicU64::new(EPOCH_MS));
        let clock = store_ms.clone();
        let grants = MemoryGrants::new(store.clone(), move || clock.load(Ordering::Relaxed));
        let mut net = Net::new(random.fork(), plan.faults.clone(), plan.latency_ms);
        let skew = |_| random.below(2 * plan.faults.skew_ms + 1) as i64 - plan.faults.skew_ms as i64;
        let mut clocks: Vec<Cell<Clock>> = Vec::new();
        clocks.extend((0..1 + plan.miners + plan.validators).map(skew).map(|off_ms| Cell::new(Clock { off_ms, slept_ms: 0 })));
        let mut learners = Vec::new();
        for (index, identity) in miners.into_iter().enumerate() {
            let keys = Rc::new(SlotKeys::of(&run, (identity.account, 0)));
            let mut node = learner::Node::new(keys, identity, index + 1, plan.behaviours[index]);
            node.step_ms = random.between(plan.step_ms * 7 / 10, plan.step_ms * 13 / 10);
            if random.chance(plan.faults.slow_ppm) {
                node.step_ms *= 5;
                net.slow.push(index + 1);
            }
            learners.push(RefCell::new(node));
        }
        let mut judges = Vec::new();
        for (index, identity) in validators.into_iter().enumerate() {
            let hotkey = Rc::new(Hotkey::from_seed(KeyKind::Ed25519, &identity.seed));
            judges.push(RefCell::new(validator::Node::new(identity, hotkey, plan.miners + 1 + index)));
        }
        let mut orchestrators = vec![RefCell::new(orchestrator::Node::new(0, 0))];
        if plan.has_standby {
            orchestrators.push(RefCell::new(orchestrator::Node::new(1, clocks.len())));
            let off_ms = random.below(2 * plan.faults.skew_ms + 1) as i64 - plan.faults.skew_ms as i64;
            clocks.push(Cell::new(Clock { off_ms, slept_ms: 0 }));
        }
        let current = CurrentRun { root_version: 1, root_digest: Digest::ZERO, run: run_id, manifest_digest: Digest::ZERO };
        let world = Rc::new_cyclic(|me| Self {
            me: me.clone(),
            executor: Executor::default(),
            random: RefCell::new(random),
            context,
            head_key: run.head(),
            lease_key: run.writer_lease(),
            keys,
            run,
            office,
            current,
            setup,
            store,
            grants,
            store_ms,
            chain,
            net: RefCell::new(net),
            orchestrators,
            learners,
            validators: judges,
            watch: RefCell::default(),
            slot_keys: RefCell::default(),
            clocks,
            begun: Instant::now(),
            newest_head: RefCell::default(),
            trace: Cell::new(0xcbf2_9ce4_8422_2325),
            events: Cell::new(0),
            stepping: Cell::default(),
            plan,
        });
        world.plant_run();
        world
    }

    fn plant_run(&self) {
        self.plant(&self.keys.release_manifest(BASE_RELEASE), Bytes::from_static(b"manifest"));
        self.plant(&self.keys.release_file(BASE_RELEASE, BASE_FILE), Bytes::from_static(b"{}"));
        let added = self.plan.orders.iter().filter_map(|(_, action)| match action {
            Action::AddShards { shards } => Some(shards.iter()),
            _ => None,
        });
        for shard in self.setup.shards.iter().map(|shard| &shard.id).chain(added.flatten()) {
            self.plant(&self.keys.shard_tokens(shard), Bytes::from_static(b"tokens"));
        }
        for fragment in 0..self.plan.parameters.fragments {
            let (state, key) = (tensors::first_state(fragment), self.run.keyframe(fragment, 0));
            let bytes = tensors::keyframe_bytes(fragment, 0, &state);
            let keyframe = FileRecord::of_bytes(key.clone(), &bytes);
            let state_digest = Digest::blake3(&state.0);
            let manifest = FragmentManifest { fragment, version: 0, t: u64::MAX, keyframe, delta: None, state: state_digest };
            self.plant(&self.run.state(fragment, 0), tensors::state_bytes(&state));
            self.plant(&key, bytes);
            self.plant_signed(&self.run.fragment_manifest(fragment, 0), &manifest);
        }
        let of = |one: &FragmentSetup| FragmentHead { version: 0, length: one.keyframe_length, digest: one.keyframe };
        let fragments = self.setup.fragments.iter().map(of).collect();
        let head = Head::first(fragments, self.setup.release.clone(), self.setup.catalog);
        self.plant_signed(&self.head_key, &head);
    }

    /// Puts in a document that the operator signs.
    fn plant_signed<D: Document>(&self, key: &str, document: &D) {
        let now_ms = EPOCH_MS + self.executor.now_ms();
        self.plant(key, Bytes::from(envelope::sign(document, &self.context, &*self.office.signer, now_ms, now_ms)));
    }

    pub fn me(&self) -> Rc<Self> {
        self.me.upgrade().expect("the world outlives its events")
    }

    /// What a node's clock shows.
    pub fn clock_ms(&self, node: super::net::Node) -> u64 {
        (EPOCH_MS + self.executor.now_ms()).saturating_add_signed(self.clocks[node].get().off_ms)
    }

    /// What a node's clock shows that nobody sets.
    pub fn steady_ms(&self, node: super::net::Node) -> u64 {
        self.executor.now_ms() - self.clocks[node].get().slept_ms
    }

    pub fn steady(&self, node: super::net::Node) -> Instant {
        self.begun + Duration::from_millis(self.steady_ms(node))
    }

    /// A node's clocks change.
    pub fn set_clock(&self, node: super::net::Node, change: impl FnOnce(&mut Clock)) {
        let mut clock = self.clocks[node].get();
        change(&mut clock);
        self.clocks[node].set(clock);
    }

    /// The newest block, whether anybody hears of it or not.
    pub fn block(&self) -> u64 {
        self.chain.health().block.map_or(0, |block| block.number)
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.clocks.len()
    }

    /// The orchestrator that writes, or wrote last.
    fn writer(&self) -> &RefCell<orchestrator::Node> {
        let epoch_of = |node: &&RefCell<orchestrator::Node>| node.borrow().machine().map(|machine| machine.epoch());
        self.orchestrators.iter().max_by_key(epoch_of).expect("there is a host")
    }

    /// What the orchestrator's `status` would say now.
    pub fn status(&self) -> Option<Status> {
        self.writer().borrow().machine().map(|machine| machine.status())
    }

    pub fn head_key(&self) -> &str {
        &self.head_key
    }

    pub fn lease_key(&self) -> &str {
        &self.lease_key
    }

    /// A document of the run that an orchestrator signed, however old it is.
    ///
    /// # Errors
    /// It is none.
    pub fn open_office<D: Document>(&self, bytes: &[u8]) -> Result<Verified<D>, EnvelopeError> {
        self.plan.scheme.open(bytes, &self.context, Expect::Account(&self.office.account), None)
    }

    /// Opens the head, which everybody reads: what is the same for all of them is done once.
    pub fn open_head(&self, object: &Object, now_ms: u64) -> Option<Verified<Head>> {
        let mut newest = self.newest_head.borrow_mut();
        if newest.as_ref().is_none_or(|(etag, _)| *etag != object.etag) {
            let opened = self.open_office::<Head>(&object.bytes).ok()?;
            *newest = Some((object.etag.clone(), opened));
        }
        let (_, head) = newest.as_ref()?;
        let is_fresh = head.header.issued_ms <= now_ms + SKEW_MS && now_ms <= head.header.expires_ms + SKEW_MS;
        is_fresh.then(|| head.clone())
    }

    pub fn slot_keys(&self, slot: Slot) -> Rc<SlotKeys> {
        self.slot_keys.borrow_mut().entry(slot).or_insert_with(|| Rc::new(SlotKeys::of(&self.run, slot))).clone()
    }

    /// Prints an event, if somebody wants to see them.
    pub fn say(&self, node: super::net::Node, event: impl FnOnce() -> String) {
        if self.plan.is_verbose {
            let text: String = event().chars().take(SAID_MAX).collect();
            println!("{:>9.3} node {node} {text}", self.executor.now_ms() as f64 / 1e3);
        }
    }

    /// Adds an event to the trace.
    pub fn trace(&self, numbers: &[u64]) {
        let mut hash = self.trace.get();
        for number in numbers {
            hash = (hash ^ number).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(17);
        }
        self.trace.set(hash);
        self.events.set(self.events.get() + 1);
    }

    pub fn behaviour(&self, hotkey: &AccountId) -> Option<Behaviour> {
        let index = self.learners.iter().position(|node| node.borrow().identity.account == *hotkey)?;
        Some(self.plan.behaviours[index])
    }

    /// Starts everybody and the weather.
    pub fn begin(&self) {
        for host in 0..self.orchestrators.len() {
            self.start_orchestrator(host);
        }
        for index in 0..self.plan.validators {
            self.start_validator(index);
        }
        for index in 0..self.plan.miners {
            let mut random = self.random.borrow_mut();
            let is_late = random.chance(self.plan.faults.late_ppm);
            let delay_ms = if is_late { random.between(1_000, self.plan.faults.until_ms.max(2_000)) } else { random.below(2_000) };
            drop(random);
            let world = self.me();
            self.executor.after(delay_ms, WORLD, move || world.start_miner(index));
        }
        for (number, (at_ms, action)) in (1..).zip(self.orders()) {
            let world = self.me();
            self.executor.after(at_ms, WORLD, move || {
                world.plant_signed(&world.run.order(number), &Order { number, action, reason: "as planned".into() });
            });
        }
        for Permit { uid, changed_ms, back_ms } in self.plan.permits.clone() {
            for at_ms in [changed_ms, back_ms] {
                let world = self.me();
                self.executor.after(at_ms, WORLD, move || world.change_permit(uid));
            }
        }
        let world = self.me();
        self.executor.spawn(WORLD, async move { world.make_blocks().await });
        super::weather::begin(&self.me());
    }

    /// A hotkey that had a validator permit has none from here on, and one that had none has one.
    fn change_permit(&self, uid: usize) {
        let neuron = self.chain.neuron(uid as u16).expect("its hotkey is registered");
        self.chain.register(Neuron { validator_permit: !neuron.validator_permit, ..neuron });
    }

    /// What the operator orders, and when, in the order of time.
    pub fn orders(&self) -> Vec<(u64, Action)> {
        let mut orders = self.plan.orders.clone();
        for ban in &self.plan.bans {
            let hotkey = self.learners[ban.miner].borrow().identity.account;
            orders.push((ban.banned_ms, Action::Ban { hotkey }));
            orders.extend(ban.unbanned_ms.map(|at_ms| (at_ms, Action::Unban { hotkey })));
        }
        orders.sort_by_key(|(at_ms, _)| *at_ms);
        orders
    }

    async fn make_blocks(self: Rc<Self>) {
        loop {
            self.executor.sleep(self.plan.block_ms).await;
            let (is_over, goes_on) = {
                let net = self.net.borrow();
                (net.chain_stalled_until_ms <= self.executor.now_ms(), net.chain_goes_on)
            };
            if is_over {
                self.chain.set_reachable(true);
            }
            if is_over || goes_on {
                self.chain.advance(1);
            }
        }
    }

    /// From the beginning to the end.
    pub fn live(self: &Rc<Self>) -> Outcome {
        self.begin();
        let outcome = self.finish();
        // Tasks and processes hold the world, and the world holds them.
        self.executor.clear();
        self.forget_orchestrators();
        outcome
    }

    /// Runs to the end: complete and settled, or out of time.
    pub fn finish(&self) -> Outcome {
        loop {
            if !self.executor.turn() {
                break;
            }
            let now_ms = self.executor.now_ms();
            self.store_ms.store(EPOCH_MS + now_ms, Ordering::Relaxed);
            let completed_ms = self.watch.borrow().completed_ms;
            let is_over = completed_ms.is_some_and(|completed_ms| now_ms > completed_ms + SETTLE_MS);
            if (is_over && !self.plan.is_open_ended) || now_ms > self.plan.limit_ms {
                break;
            }
        }
        if !self.plan.is_open_ended {
            self.watch.borrow_mut().end(self);
        }
        self.outcome()
    }

    fn outcome(&self) -> Outcome {
        let watch = self.watch.borrow();
        let mut newest: Vec<u8> = Vec::new();
        for fragment in 0..self.plan.parameters.fragments {
            let merges = watch.manifests.values().filter(|(_, merge)| merge.fragment == fragment);
            let last = merges.max_by_key(|(_, merge)| merge.version);
            newest.extend(last.map_or(Digest::ZERO, |(_, merge)| merge.keyframe).0);
        }
        let sum = |of: fn(&orchestrator::Node) -> u64| self.orchestrators.iter().map(|node| of(&node.borrow())).sum::<u64>();
        let (now_ms, stepping) = (self.executor.now_ms(), self.stepping.get());
        let useful_ms: u64 = self.learners.iter().map(|node| node.borrow().useful_ms).sum();
        Outcome {
            violations: watch.violations.clone(),
            trace: self.trace.get(),
            events: self.events.get(),
            virtual_ms: self.executor.now_ms(),
            completed_ms: watch.completed_ms,
            merges: watch.manifests.values().filter(|(_, merge)| merge.version > merge.base_version).count() as u64,
            contributions: watch.manifests.values().map(|(_, merge)| merge.accepted().count() as u64).sum(),
            crashes: sum(|node| node.crashes),
            miner_crashes: self.learners.iter().map(|node| node.borrow().crashes).sum(),
            lost_disks: sum(|node| node.lost_disks),
            writes: sum(|node| node.writes),
            requests: self.net.borrow().asked,
            takeovers: watch.takeovers,
            fenced: sum(|node| node.fenced),
            effects: sum(|node| node.effects),
            longest_stall_ms: watch.longest_stall_ms,
            longest_stall_before_ms: watch.longest_stall_before_ms,
            longest_idle_ms: stepping.longest_idle_ms,
            goodput: useful_ms as f64 / (self.plan.miners as u64 * stepping.total_ms(now_ms)).max(1) as f64,
            uptime: 1.0 - stepping.idle_ms as f64 / stepping.total_ms(now_ms).max(1) as f64,
            traffic: self.net.borrow().traffic,
            verdicts: watch.verdicts.iter().map(|(name, count)| (*name, *count)).collect(),
            model: Digest::blake3(&newest),
            status: self.status(),
            miners: self.learners.iter().map(|node| node.borrow().describe()).collect(),
            steps: self.learners.iter().map(|node| node.borrow().steps).sum(),
        }
    }
}

/// Runs one world.
pub fn run(plan: Plan) -> Outcome {
    World::new(plan).live()
}
