//! The orchestrator's node: its real machine behind a journal, and hands that do to the simulated bucket what
//! `quasar-orchestrator`'s effects do to a real one: the same objects, conditions, order, retries and limits.

use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;

use bytes::Bytes;
use chain::Chain;
use daemon::Machine;
use futures::FutureExt;
use protocol::documents::{
    AuditOrder, Commitment, Contribution, CurrentRun, FragmentManifest, Head, Job, Lease, MergeManifest, OpenedPart, PROGRESS_BYTES,
    Progress, PullGrants, Receipt, Release, ReleaseRef, SCORES_BYTES, StandingGrants, Tape, VERDICT_COMMIT_BYTES, VERDICT_REVEAL_BYTES,
    VerdictReveal,
};
use protocol::envelope::{self, Context, Document, Expect, next_sequence};
use protocol::log::LogHead;
use protocol::{AccountId, Digest, FileRecord, GrantBundle, Reason, SealedBytes, codec};
use quasar_orchestrator::machine::{
    Effect, Guest, Input, Key, Orchestrator, Retired, Slot, StandingMark, VERDICT_MS, VERSIONS_AHEAD, Want,
};
use storage::{ObjectStore, Presign, PutCondition, StoreError, bundle};

use super::executor::{Life, WORLD};
use super::paper::Scheme;
use super::tensors;
use super::world::{BASE_FILE, BASE_RELEASE, World};

const NODE: usize = 0;
const RETRY_FIRST_MS: u64 = 200;
const RETRY_LONGEST_MS: u64 = 15_000;
/// As the driver's default.
const EFFECTS_AT_ONCE: usize = 64;
const STANDING_MS: u64 = 60 * 60_000;
const ON_DEMAND_MS: u64 = 15 * 60_000;
const SILENT_FACTOR: u64 = 10;
const BLOCKS_PER_METAGRAPH: u64 = 10;
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
    pub crashes: u64,
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
        {
            let mut node = self.orchestrator.borrow_mut();
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

    async fn poll_progress(self: Rc<Self>, life: Life) {
        let hands = self.orchestrator.borrow().hands.clone();
        let mut etags: HashMap<Slot, String> = HashMap::new();
        let mut sequences: HashMap<Slot, u64> = HashMap::new();
        let mut round = 0u64;
        loop {
            // The reads of a round go out together.
            self.executor.sleep(self.plan.latency_ms).await;
            let slots: Vec<Slot> = {
                let watched = hands.watched.borrow();
                let silent = if round.is_multiple_of(SILENT_FACTOR) { watched.1.as_slice() } else { &[] };
                watched.0.iter().chain(silent).copied().collect()
            };
            round += 1;
            for slot in slots {
                let keys = self.slot_keys(slot);
                let found = self.get_soon(NODE, &keys.progress, etags.get(&slot).map(String::as_str));
                let Ok(Some(object)) = found else { continue };
                if let Some(etag) = object.etag {
                    etags.insert(slot, etag);
                }
                let now_ms = self.clock_ms(NODE);
                let opened = self.plan.scheme.open::<Progress>(&object.bytes, &self.context, Expect::Account(&slot.0), Some(now_ms));
                let Ok(verified) = opened else {
                    self.watch.borrow_mut().records_refused += 1;
                    continue;
                };
                if !verified.document.is_well_formed(usize::from(self.plan.parameters.fragments))
                    || sequences.get(&slot).is_some_and(|seen| verified.header.sequence < *seen)
                {
                    continue;
                }
                sequences.insert(slot, verified.header.sequence);
                hands.records.borrow_mut().insert(slot, (verified.id, object.bytes));
                self.tell_orchestrator(life, Input::Progress { slot, id: verified.id, record: Box::new(verified.document) });
            }
            self.executor.sleep(self.plan.parameters.poll_ms).await;
        }
    }

    async fn poll_chain(self: Rc<Self>, life: Life) {
        let interval_ms = (self.plan.parameters.poll_ms * 5).clamp(500, 6_000);
        let (mut block, mut guests, mut round) = (0, Vec::new(), 0u64);
        loop {
            if let Some(Ok(head)) = self.chain.head().now_or_never()
                && head.number > block
            {
                block = head.number;
                self.tell_orchestrator(life, Input::Block { number: block });
            }
            if (round.is_multiple_of(BLOCKS_PER_METAGRAPH) || guests.is_empty())
                && let Some(Ok(metagraph)) = self.chain.metagraph(self.context.netuid).now_or_never()
            {
                let guest = |neuron: &chain::Neuron| Guest {
                    hotkey: neuron.hotkey,
                    validator: neuron.validator_permit,
                    recipient: chain::certificate::recipient(&neuron.hotkey, None),
                };
                let now: Vec<Guest> = metagraph.neurons.iter().map(guest).collect();
                if now != guests {
                    guests.clone_from(&now);
                    self.tell_orchestrator(life, Input::Metagraph { guests: now });
                }
            }
            round += 1;
            self.executor.sleep(interval_ms).await;
        }
    }

    /// Tries until it works.
    async fn persist<T, F: Future<Output = Option<T>>>(&self, mut attempt: impl FnMut() -> F) -> T {
        let mut pause_ms = RETRY_FIRST_MS;
        loop {
            if let Some(value) = attempt().await {
                return value;
            }
            self.executor.sleep(pause_ms).await;
            pause_ms = (pause_ms * 2).min(RETRY_LONGEST_MS);
        }
    }

    fn next_sequence(&self, now_ms: u64) -> u64 {
        let mut node = self.orchestrator.borrow_mut();
        node.disk.sequence = next_sequence(node.disk.sequence, now_ms);
        node.disk.sequence
    }

    fn sign_ours<D: Document>(&self, document: &D, context: &Context) -> Bytes {
        let now_ms = self.clock_ms(NODE);
        let sequence = self.next_sequence(now_ms);
        Bytes::from(envelope::sign(document, context, &*self.office.signer, sequence, now_ms))
    }

    async fn put_bytes_once(&self, key: &str, bytes: Bytes) -> Option<Bytes> {
        match self.put(NODE, key, bytes.clone(), PutCondition::IfAbsent).await {
            Ok(_) => Some(bytes),
            Err(StoreError::PreconditionFailed { .. }) => self.get(NODE, key, None).await.ok().flatten().map(|object| object.bytes),
            Err(_) => None,
        }
    }

    async fn put_once<D: Document>(&self, key: &str, document: &D) -> Bytes {
        self.persist(|| self.put_bytes_once(key, self.sign_ours(document, &self.context))).await
    }

    async fn put_latest(&self, hands: &Hands, key: &str, revision: u64, make: impl Fn() -> Bytes) {
        let lock = {
            let mut outbox = hands.outbox.borrow_mut();
            let entry = outbox.entry(key.to_owned()).or_default();
            entry.newest = entry.newest.max(revision);
            entry.lock.clone()
        };
        let mut tag = lock.lock().await;
        if hands.outbox.borrow().get(key).is_some_and(|entry| entry.newest != revision) {
            return;
        }
        let known = tag.take();
        *tag = Some(self.persist(|| self.swap(key, known.clone(), make())).await);
    }

    async fn get_present(&self, key: &str) -> Option<Bytes> {
        self.persist(|| async {
            match self.get(NODE, key, None).await {
                Ok(object) => Some(object.map(|object| object.bytes)),
                Err(StoreError::NotFound { .. }) => Some(None),
                Err(_) => None,
            }
        })
        .await
    }

    async fn execute(&self, hands: &Hands, effect: Effect) -> Option<Input> {
        Some(match effect {
            Effect::Watch { live, silent } => {
                *hands.watched.borrow_mut() = (live, silent);
                return None;
            }
            Effect::PublishHead { head } => {
                self.publish_head(hands, &head).await;
                Input::HeadPublished
            }
            Effect::PublishCurrent => {
                let key = self.keys.current();
                let make = || self.sign_ours::<CurrentRun>(&self.current, &self.context.without_run());
                self.persist(|| async { self.put(NODE, &key, make(), PutCondition::Always).await.ok() }).await;
                return None;
            }
            Effect::PublishJob { revision, job } => {
                for lease in &job.leases {
                    self.record_lease(hands, &job, lease).await;
                }
                let key = self.slot_keys((job.hotkey, job.slot)).job.clone();
                self.put_latest(hands, &key, revision, || self.sign_ours::<Job>(&job, &self.context)).await;
                return None;
            }
            Effect::PublishStanding { revision, slot, validator, mark, cycle } => {
                self.publish_standing(hands, revision, slot, validator, &mark, cycle).await;
                return None;
            }
            Effect::PublishPullGrants { revision, slot, session_epoch, wants } => {
                let key = self.slot_keys(slot).pull.clone();
                let make = || {
                    let wanted: Vec<Presign> = wants.iter().map(|want| self.presign_of(want)).collect();
                    self.watch.borrow_mut().grants(self, &wanted);
                    let document = |sealed| PullGrants { hotkey: slot.0, slot: slot.1, session_epoch, sealed };
                    self.bundle::<PullGrants>(&slot.0, &wanted, document)
                };
                self.put_latest(hands, &key, revision, make).await;
                return None;
            }
            Effect::StoreCommitment { slot, t, id } => match self.store_commitment(hands, slot, t, id).await? {
                Ok(id) => Input::CommitmentStored { slot, t, id },
                Err(_) => Input::CommitmentRefused { slot, t },
            },
            Effect::CheckPayload { slot, t, commitment } => {
                Input::PayloadChecked { slot, t, outcome: self.check_payload(slot, t, &commitment).await }
            }
            Effect::CheckReceipt { slot, lease, committed } => {
                let outcome = self.check_receipt(slot, &lease, &committed).await;
                Input::ReceiptChecked { slot, lease: lease.id, outcome }
            }
            Effect::WriteTape { tape } => {
                let bytes = self.put_once(&self.run.tape(tape.t), &*tape).await;
                let stored = self.plan.scheme.open::<Tape>(&bytes, &self.context, Expect::Account(&self.office.account), None);
                Input::TapeWritten { tape: Box::new(stored.map_or_else(|_| (*tape).clone(), |verified| verified.document)) }
            }
            Effect::Merge { tape, rejected, previous_keyframe } => {
                let (manifest, id, keyframe_length) = self.merge(*tape, rejected, previous_keyframe).await;
                Input::Merged { manifest: Box::new(manifest), id, keyframe_length }
            }
            Effect::ReadBeacon { cycle, block } => {
                let read = || async { self.chain.block_hash(block).now_or_never().and_then(Result::ok).flatten() };
                Input::Beacon { cycle, block, hash: self.persist(read).await }
            }
            Effect::MakeOpeningKeys { audits } => {
                Input::OpeningKeys { keys: audits.into_iter().map(|audit| (audit, Digest::blake3(&audit.0).0)).collect() }
            }
            Effect::OrderAudit { selection, parts, leases } => {
                let audit = selection.audit;
                self.order_audit(&selection, &parts, leases).await;
                Input::AuditOrdered { audit }
            }
            Effect::ReadVerdict { audit, validator } => {
                let key = self.run.verdict_reveal(&validator, &audit);
                let found = self.get(NODE, &key, None).await.ok().flatten();
                let verdict = found.and_then(|object| {
                    let opened =
                        self.plan.scheme.open::<VerdictReveal>(&object.bytes, &self.context, Expect::Account(&validator), None).ok()?;
                    (opened.document.verdict.audit == audit).then_some((opened.id, opened.document.verdict.result))
                });
                Input::Verdict { audit, verdict }
            }
            Effect::PublishLog { head } => {
                let bytes = self.put_once(&self.run.log(head.frontier.size()), &*head).await;
                match self.plan.scheme.open::<LogHead>(&bytes, &self.context, Expect::Account(&self.office.account), None) {
                    Ok(stored) if stored.document != *head => Input::LogTaken { head: Box::new(stored.document) },
                    _ => Input::LogPublished,
                }
            }
            Effect::StoreSnapshot { revision, bytes } => {
                let bytes = Bytes::from(bytes);
                self.put_latest(hands, &self.run.snapshot(), revision, || bytes.clone()).await;
                return None;
            }
            Effect::Retire { retired } => {
                self.retire(&retired).await;
                return None;
            }
            Effect::Release { versions, tokens } => Input::Released { release: self.release(versions, tokens).await },
            Effect::PublishStatus { status } => {
                // Nobody here reads it, and addresses as text are most of its cost.
                let bytes = Bytes::from(status.outer_step.to_string());
                let _ = self.put(NODE, &self.run.status(), bytes, PutCondition::Always).await;
                return None;
            }
        })
    }

    async fn publish_head(&self, hands: &Hands, head: &Head) {
        let key = self.run.head();
        let known = hands.head_etag.borrow().clone();
        let tag = self.persist(|| self.swap(&key, known.clone(), self.sign_ours(head, &self.context))).await;
        *hands.head_etag.borrow_mut() = Some(tag);
    }

    /// One attempt of a write by compare-and-swap; `known` is what was last seen there. The only writer finds at most an answer of
    /// its own that was lost.
    async fn swap(&self, key: &str, known: Option<String>, bytes: Bytes) -> Option<String> {
        let mut known = known;
        loop {
            let condition = match known.take() {
                Some(tag) => PutCondition::IfMatch(tag),
                None => match self.get(NODE, key, None).await {
                    Ok(object) => PutCondition::IfMatch(object.and_then(|object| object.etag).unwrap_or_default()),
                    Err(StoreError::NotFound { .. }) => PutCondition::IfAbsent,
                    Err(_) => return None,
                },
            };
            match self.put(NODE, key, bytes.clone(), condition).await {
                Ok(tag) => return Some(tag),
                Err(StoreError::PreconditionFailed { .. }) => {}
                Err(_) => return None,
            }
        }
    }

    /// Writes down who got which rows, before anybody is told.
    async fn record_lease(&self, hands: &Hands, job: &Job, lease: &Lease) {
        if hands.recorded.borrow().contains(&lease.id) {
            return;
        }
        let record = Job { leases: vec![lease.clone()], ..job.clone() };
        let bytes = self.put_once(&self.run.lease(lease.id), &record).await;
        let stored = self.plan.scheme.open::<Job>(&bytes, &self.context, Expect::Account(&self.office.account), None);
        if stored.is_ok_and(|stored| stored.document.leases == record.leases) {
            hands.recorded.borrow_mut().insert(lease.id);
        } else {
            self.watch.borrow_mut().fenced(self);
        }
    }

    async fn retire(&self, retired: &Retired) {
        let versions = retired
            .versions
            .iter()
            .flat_map(|(fragment, version)| [self.run.keyframe(*fragment, *version), self.run.state(*fragment, *version)]);
        let payloads = retired.payloads.iter().map(|(slot, t)| self.slot_keys(*slot).own.payload(*t));
        let releases = retired.releases.iter().map(|release| self.keys.release_manifest(release));
        for key in versions.chain(payloads).chain(releases) {
            self.delete(NODE, &key).await;
        }
    }

    fn presign_of(&self, want: &Want) -> Presign {
        let now_ms = self.clock_ms(NODE);
        let spell = |key: &Key| match key {
            Key::Shard(shard) => self.keys.shard_tokens(shard),
            Key::Payload { slot, t } => self.slot_keys(*slot).own.payload(*t),
            Key::Receipt { slot, lease } => self.slot_keys(*slot).own.receipt(*lease),
            Key::Opening { slot, audit, part } => self.slot_keys(*slot).own.opening(audit, *part),
        };
        match want {
            Want::Read { key } => Presign::Get { key: spell(key), now_ms, expires_in_ms: ON_DEMAND_MS },
            Want::WriteOnce { key, length, sha256 } => Presign::Put {
                key: spell(key),
                length: *length,
                sha256: Some(*sha256),
                if_absent: true,
                now_ms,
                expires_in_ms: ON_DEMAND_MS,
            },
        }
    }

    async fn publish_standing(&self, hands: &Hands, revision: u64, slot: Slot, validator: bool, mark: &StandingMark, cycle: u64) {
        let key = self.slot_keys(slot).standing.clone();
        let make = || {
            let now_ms = self.clock_ms(NODE);
            let read = |key: String| Presign::Get { key, now_ms, expires_in_ms: STANDING_MS };
            let write = |key: String, length: u64, if_absent: bool| Presign::Put {
                key,
                length,
                sha256: None,
                if_absent,
                now_ms,
                expires_in_ms: STANDING_MS,
            };
            let mut wanted = vec![read(self.keys.release_manifest(BASE_RELEASE)), read(self.keys.release_file(BASE_RELEASE, BASE_FILE))];
            if validator {
                wanted.extend((cycle..=cycle + VERSIONS_AHEAD).map(|epoch| write(self.run.scores(&slot.0, epoch), SCORES_BYTES, true)));
            } else {
                wanted.push(write(self.slot_keys(slot).progress.clone(), PROGRESS_BYTES as u64, false));
            }
            if mark.live {
                for (fragment, version) in mark.versions.iter().enumerate() {
                    let from = if validator { version.saturating_sub(VERSIONS_AHEAD / 2) } else { *version };
                    wanted.extend((from..=version + VERSIONS_AHEAD).map(|version| read(self.run.keyframe(fragment as u16, version))));
                }
            }
            let session_epoch = mark.session_epoch;
            let document = |sealed| StandingGrants { hotkey: slot.0, slot: slot.1, session_epoch, sealed };
            self.bundle::<StandingGrants>(&slot.0, &wanted, document)
        };
        self.put_latest(hands, &key, revision, make).await;
    }

    /// Presigns, seals and signs.
    fn bundle<D: Document>(&self, hotkey: &AccountId, wanted: &[Presign], document: impl Fn(SealedBytes) -> D) -> Bytes {
        let requests = wanted.iter().filter_map(|request| self.store.presign(request).ok()).collect();
        let grants = GrantBundle { requests };
        let now_ms = self.clock_ms(NODE);
        let header = envelope::header_for::<D>(&self.context, self.office.signer.key(), self.next_sequence(now_ms), now_ms);
        let sealed = match self.plan.scheme {
            Scheme::Cheap => SealedBytes { encapsulated: [0; 32], ciphertext: codec::encode(&grants) },
            Scheme::Ed25519 => {
                let recipient = chain::certificate::recipient(hotkey, None).expect("an Ed25519 hotkey can be sealed to");
                bundle::seal_to(&self.context, D::PURPOSE, &header, &recipient, &grants).expect("a point that is not weak")
            }
        };
        Bytes::from(envelope::sign_with_header(header, &document(sealed), &*self.office.signer))
    }

    async fn store_commitment(&self, hands: &Hands, slot: Slot, t: u64, id: Digest) -> Option<Result<Digest, Reason>> {
        let keys = self.slot_keys(slot);
        let known = hands.records.borrow().get(&slot).cloned();
        let bytes = match known {
            Some((newest, bytes)) if newest == id => bytes,
            _ => self.get_present(&keys.progress).await?,
        };
        let record = self.plan.scheme.open::<Progress>(&bytes, &self.context, Expect::Account(&slot.0), None).ok()?;
        let payload = record.document.commitments.iter().find(|commitment| commitment.t == t)?.blake3;
        let key = keys.own.commitment(t);
        let stored = self.persist(|| self.put_bytes_once(&key, bytes.clone())).await;
        let evidence = self.plan.scheme.open::<Progress>(&stored, &self.context, Expect::Account(&slot.0), None).ok();
        let holds = |record: &Progress| record.commitments.iter().any(|one| one.t == t && one.blake3 == payload);
        Some(match evidence {
            Some(evidence) if holds(&evidence.document) => Ok(evidence.id),
            _ => Err(Reason::RepeatedCommitment),
        })
    }

    async fn check_payload(&self, slot: Slot, t: u64, commitment: &Commitment) -> Reason {
        let Some(bytes) = self.get_present(&self.slot_keys(slot).own.payload(t)).await else { return Reason::NotUploaded };
        if bytes.len() as u64 != commitment.length {
            Reason::LengthMismatch
        } else if Digest::blake3(&bytes) != commitment.blake3 || Digest::sha256(&bytes) != commitment.sha256 {
            Reason::DigestMismatch
        } else if !tensors::is_payload_of(&bytes, commitment.fragment, commitment.base_version) {
            Reason::HeaderMismatch
        } else {
            Reason::None
        }
    }

    async fn check_receipt(&self, slot: Slot, lease: &Lease, committed: &[(u64, Digest)]) -> Result<(Digest, Vec<u32>), Reason> {
        let bytes = self.get_present(&self.slot_keys(slot).own.receipt(lease.id)).await.ok_or(Reason::NotUploaded)?;
        let receipt =
            self.plan.scheme.open::<Receipt>(&bytes, &self.context, Expect::Account(&slot.0), None).map_err(|_| Reason::ReceiptMismatch)?;
        receipt.document.check(&slot.0, slot.1, lease, committed).map_err(|_| Reason::ReceiptMismatch)?;
        Ok((receipt.id, receipt.document.steps.iter().map(|step| step.lease_step).collect()))
    }

    async fn merge(&self, tape: Tape, rejected: Vec<Contribution>, previous: (Digest, u64)) -> (MergeManifest, Digest, u64) {
        let (fragment, version) = (tape.fragment, tape.base_version + 1);
        let mut manifest = MergeManifest {
            t: tape.t,
            fragment,
            base_version: tape.base_version,
            version: tape.base_version,
            block: tape.block,
            closing: tape.closing,
            contributions: rejected,
            keyframe: previous.0,
            state: tape.base_state,
            step_norm: 0,
            step_limit_ppm: 1_000_000,
        };
        let mut keyframe_length = previous.1;
        if !tape.inputs.is_empty() {
            let key = self.run.state(fragment, tape.base_version);
            let base = self
                .persist(|| async {
                    let bytes = self.get(NODE, &key, None).await.ok().flatten()?.bytes;
                    bytes.first_chunk::<32>().map(|state| Digest(*state))
                })
                .await;
            for input in &tape.inputs {
                let key = self.slot_keys((input.hotkey, input.slot)).own.payload(tape.t);
                self.persist(|| async {
                    let bytes = self.get(NODE, &key, None).await.ok().flatten()?.bytes;
                    (Digest::blake3(&bytes) == input.payload).then_some(())
                })
                .await;
            }
            let state = tensors::merged(&base, &tape);
            let keyframe = tensors::keyframe_bytes(fragment, version, &state);
            manifest.contributions.extend(tape.inputs.iter().map(|input| Contribution {
                hotkey: input.hotkey,
                slot: input.slot,
                commitment: input.commitment,
                payload: input.payload,
                base_version: input.base_version,
                steps: input.steps,
                tokens: input.tokens,
                weight_ppm: input.weight_ppm,
                norm: 1,
                clip_ppm: 1_000_000,
                cosine_ppm: 0,
                neighbour_ppm: 0,
                rest_ppm: 0,
                outcome: Reason::None,
            }));
            manifest.version = version;
            manifest.keyframe = Digest::blake3(&keyframe);
            manifest.state = Digest::blake3(&state.0);
            keyframe_length = keyframe.len() as u64;
            let key = self.run.state(fragment, version);
            self.persist(|| self.put_bytes_once(&key, tensors::state_bytes(&state))).await;
            let key = self.run.keyframe(fragment, version);
            let stored = self.persist(|| self.put_bytes_once(&key, keyframe.clone())).await;
            if stored != keyframe {
                self.watch.borrow_mut().violated(self, "bit_identical", format!("fragment {fragment}, version {version}"));
            }
            let record = FileRecord::of_bytes(key, &keyframe);
            let file = FragmentManifest { fragment, version, t: tape.t, keyframe: record, delta: None, state: manifest.state };
            self.put_once(&self.run.fragment_manifest(fragment, version), &file).await;
        }
        manifest.contributions.sort_by_key(|contribution| (contribution.hotkey, contribution.slot));
        let bytes = self.put_once(&self.run.merge(tape.t), &manifest).await;
        let mut id = Digest::blake3(&bytes);
        if let Ok(stored) = self.plan.scheme.open::<MergeManifest>(&bytes, &self.context, Expect::Account(&self.office.account), None) {
            (manifest, id) = (stored.document, stored.id);
        }
        (manifest, id, keyframe_length)
    }

    async fn order_audit(&self, selection: &protocol::audits::Selection, parts: &[(u64, Digest)], leases: Vec<Lease>) {
        let key = self.run.audit(&selection.validator, &selection.audit);
        let (hotkey, slot) = (selection.hotkey, selection.slot);
        self.persist(|| async {
            let now_ms = self.clock_ms(NODE);
            let read = |key: String| Presign::Get { key, now_ms, expires_in_ms: VERDICT_MS };
            let write =
                |key: String, length: u64| Presign::Put { key, length, sha256: None, if_absent: true, now_ms, expires_in_ms: VERDICT_MS };
            let keys = self.slot_keys((hotkey, slot));
            let mut wanted = vec![
                read(keys.own.payload(selection.t)),
                read(keys.own.commitment(selection.t)),
                write(self.run.verdict_commit(&selection.validator, &selection.audit), VERDICT_COMMIT_BYTES),
                write(self.run.verdict_reveal(&selection.validator, &selection.audit), VERDICT_REVEAL_BYTES),
            ];
            wanted.extend((0..parts.len()).map(|part| read(keys.own.opening(&selection.audit, part as u8))));
            let document = |sealed: SealedBytes| AuditOrder {
                audit: selection.audit,
                validator: selection.validator,
                cycle: selection.cycle,
                hotkey,
                slot,
                t: selection.t,
                beacon_block: selection.beacon_block,
                opening: parts.iter().map(|(length, sha256)| OpenedPart { length: *length, sha256: *sha256 }).collect(),
                leases: leases.clone(),
                sealed,
                opening_key: SealedBytes { encapsulated: [0; 32], ciphertext: Vec::new() },
            };
            let bytes = self.bundle::<AuditOrder>(&selection.validator, &wanted, document);
            self.put_bytes_once(&key, bytes).await.map(drop)
        })
        .await;
    }

    async fn release(&self, versions: Vec<u64>, tokens: u64) -> ReleaseRef {
        let name = format!("run-{}", Digest::derive("quasar/v1/release", &[&self.context.run.0, &codec::encode(&versions)]).short());
        for (fragment, version) in versions.iter().enumerate() {
            let key = self.run.state(fragment as u16, *version);
            self.persist(|| async { self.get(NODE, &key, None).await.ok().flatten().map(drop) }).await;
        }
        let release = Release { release: name.clone(), versions, files: Vec::new(), tokens };
        let key = self.keys.release_manifest(&name);
        let stored = self.persist(|| self.put_bytes_once(&key, self.sign_ours(&release, &self.context.without_run()))).await;
        ReleaseRef { release: name, manifest: Digest::blake3(&stored) }
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
    }
}
