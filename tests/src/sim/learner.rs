//! A miner's node: its real machine, a trainer of digests, and an edge that reads, verifies and redeems grants like
//! `quasar-miner`'s. The spool is its disk: segments of earlier sessions stay, the machine begins anew.

use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use daemon::Machine;
use daemon::clock::Steady;
use protocol::documents::{
    CatalogPage, Commitment, Head, Job, Lease, MergeManifest, OPENING_PARTS, OpenedStep, OpeningManifest, Progress, PullGrants, Receipt,
    StandingGrants, encode_progress,
};
use protocol::envelope::{self, Document, Expect, Header, next_sequence};
use protocol::{AccountId, Digest, GrantBundle, GrantRequest, KeyMap, Method, SealedBytes};
use quasar_miner::machine::{
    Boundary, Effect, End, Exported, Fault, Found, GrantInfo, Input, Learner, LearnerSettings, Look, NotPrepared, PreparedPart, Put, Step,
    StepDone, Trouble,
};
use storage::StoreError;
use storage::client::{GrantError, PutOutcome};
use storage::discovery::Shards;

use super::executor::{Life, WORLD};
use super::net::Node as NodeId;
use super::paper::Identity;
use super::plan::Behaviour;
use super::spool::{Asked, Disk, Segment};
use super::tensors::{self, Weights};
use super::world::{BASE_FILE, BASE_RELEASE, SlotKeys, World};

/// A record that was not written for so long is given up.
const PROGRESS_TIMEOUT_PER_TTL: u64 = 5;
/// From the begin of a boundary to its commitments.
const PREPARE_MS: u64 = 40;
const BASE_MS: u64 = 500;
const OPEN_MS: u64 = 300;

/// Lives and dies with the process.
#[derive(Default)]
struct Memory {
    weights: Option<Weights>,
    standing: Grants,
    pull: Grants,
    /// The run's shards, as far as it has read the pages of the catalog.
    shards: Shards,
    payloads: BTreeMap<u64, Bytes>,
    receipts: BTreeMap<u64, Bytes>,
    asked: Asked,
    /// Rows of a step of each lease.
    batch_rows: BTreeMap<u64, u32>,
    /// Tag and highest sequence seen of each object that is looked at.
    seen: [(Option<Rc<str>>, u64); Look::ALL.len()],
}

pub struct Node {
    pub identity: Identity,
    pub id: NodeId,
    keys: Rc<SlotKeys>,
    behaviour: Behaviour,
    disk: Disk,
    memory: Memory,
    machine: Option<Learner>,
    pub life: Life,
    time: Steady,
    tick_ms: Option<u64>,
    pub step_ms: u64,
    pub ended: Option<End>,
    pub crashes: u64,
    pub steps: u64,
    /// Time in steps that were not lost; of it, what a crash would lose.
    pub useful_ms: u64,
    unsaved_ms: u64,
    is_stepping: bool,
}

impl Node {
    pub fn new(world_keys: Rc<SlotKeys>, identity: Identity, id: NodeId, behaviour: Behaviour) -> Self {
        Self {
            identity,
            id,
            keys: world_keys,
            behaviour,
            disk: Disk::default(),
            memory: Memory::default(),
            machine: None,
            life: WORLD,
            time: Steady::new(0),
            tick_ms: None,
            step_ms: 0,
            ended: None,
            crashes: 0,
            steps: 0,
            useful_ms: 0,
            unsaved_ms: 0,
            is_stepping: false,
        }
    }

    pub fn is_running(&self) -> bool {
        self.machine.is_some()
    }

    fn batch_rows(&self, step: &Step, world: &World) -> u32 {
        self.memory.batch_rows.get(&step.lease).copied().unwrap_or(world.plan.parameters.batch_rows)
    }

    /// For people.
    pub fn describe(&self) -> String {
        let state = match (&self.machine, &self.ended) {
            (Some(_), _) => "running".to_owned(),
            (None, Some(end)) => format!("ended: {end:?}"),
            (None, None) => "down".to_owned(),
        };
        format!("{} {:?} {state}, step {} ms, {} steps", self.identity.account.short(), self.behaviour, self.step_ms, self.steps)
    }

    fn find(&self, method: Method, key: &str, now_ms: u64) -> Option<Rc<GrantRequest>> {
        let bundles = [&self.memory.pull, &self.memory.standing].into_iter();
        bundles.filter_map(|bundle| bundle.by_method[method as usize].get(key)).find(|grant| grant.expires_ms > now_ms).cloned()
    }
}

/// The newest bundle of a kind, by method and key.
#[derive(Default)]
struct Grants {
    by_method: [KeyMap<Rc<GrantRequest>>; 2],
}

impl Grants {
    fn take_over(&mut self, fresh: GrantBundle) -> Vec<GrantInfo> {
        self.by_method.iter_mut().for_each(KeyMap::clear);
        let take = |grant: GrantRequest| {
            let info = GrantInfo { method: grant.method, key: grant.key.clone(), sha256: grant.sha256, expires_ms: grant.expires_ms };
            self.by_method[grant.method as usize].insert(grant.key.clone(), Rc::new(grant));
            info
        };
        fresh.requests.into_iter().map(take).collect()
    }
}

impl World {
    /// Starts a miner's process: a new session that goes on from the spool's newest state.
    pub fn start_miner(&self, index: usize) {
        let life = self.executor.new_life();
        {
            let mut node = self.learners[index].borrow_mut();
            if node.machine.is_some() {
                return;
            }
            let now_ms = self.clock_ms(node.id);
            node.disk.session = next_sequence(node.disk.session, now_ms);
            let settings = LearnerSettings {
                worker: format!("miner-{index}"),
                hotkey: node.identity.account,
                slot: 0,
                session_epoch: node.disk.session,
                keys: self.keys.clone(),
                run: self.run.clone(),
                parameters: self.plan.parameters.clone(),
                base_release: BASE_RELEASE.to_owned(),
                leases_max: None,
            };
            node.machine = Some(Learner::new(settings));
            let shards = self.setup.shards.iter().map(|shard| tensors::shard(&shard.id, self.plan.shard_rows)).collect();
            node.memory = Memory { shards: Shards::known(self.setup.catalog, shards), ..Memory::default() };
            node.life = life;
            node.ended = None;
            node.time = Steady::new(0);
        }
        self.tell_miner(index, life, Input::Tick);
    }

    /// Kills a miner's process where it stands.
    pub fn crash_miner(&self, index: usize) {
        let life = {
            let mut node = self.learners[index].borrow_mut();
            node.crashes += u64::from(node.machine.take().is_some());
            node.tick_ms = None;
            node.memory = Memory::default();
            node.useful_ms -= std::mem::take(&mut node.unsaved_ms);
            if std::mem::take(&mut node.is_stepping) {
                self.stepping.set(self.stepping.get().end(self.executor.now_ms()));
            }
            node.life
        };
        self.trace(&[self.executor.now_ms(), index as u64 + 1, u64::MAX]);
        self.say(index + 1, || "CRASH".into());
        self.executor.end(life);
    }

    /// SIGTERM.
    pub fn stop_miner(&self, index: usize) {
        let life = self.learners[index].borrow().life;
        self.tell_miner(index, life, Input::Stop);
    }

    fn tell_miner(&self, index: usize, life: Life, input: Input) {
        let mut node = self.learners[index].borrow_mut();
        let node = &mut *node;
        if node.life != life {
            return;
        }
        let now_ms = node.time.read(self.clock_ms(node.id), self.steady(node.id));
        self.trace(&[self.executor.now_ms(), index as u64 + 1, kind_of(&input)]);
        self.say(node.id, || format!("{input:?}"));
        let Some(machine) = &mut node.machine else { return };
        machine.handle(now_ms, input);
        while let Some(effect) = machine.poll_effect() {
            self.say(node.id, || format!("begins {effect:?}"));
            let world = self.me();
            self.executor.spawn(life, async move { world.perform(index, life, effect).await });
        }
        if let Some(end) = machine.end() {
            node.ended = Some(end.clone());
            node.machine = None;
            node.tick_ms = None;
            if std::mem::take(&mut node.is_stepping) {
                self.stepping.set(self.stepping.get().end(self.executor.now_ms()));
            }
            let world = self.me();
            self.executor.after(0, WORLD, move || world.executor.end(life));
            return;
        }
        if let Some(deadline) = machine.deadline() {
            let delay_ms = deadline.saturating_sub(now_ms).clamp(1, 60_000);
            let at_ms = self.executor.now_ms() + delay_ms;
            if node.tick_ms == Some(at_ms) {
                return;
            }
            node.tick_ms = Some(at_ms);
            let world = self.me();
            self.executor.after(delay_ms, life, move || {
                let is_due = world.learners[index].borrow().tick_ms == Some(at_ms);
                if is_due {
                    world.learners[index].borrow_mut().tick_ms = None;
                    world.tell_miner(index, life, Input::Tick);
                }
            });
        }
    }

    async fn perform(self: Rc<Self>, index: usize, life: Life, effect: Effect) {
        if let Effect::Boundary(boundary) = effect {
            return self.pass(index, life, *boundary).await;
        }
        if let Some(input) = self.answer(index, effect).await {
            self.tell_miner(index, life, input);
        }
    }

    async fn answer(&self, index: usize, effect: Effect) -> Option<Input> {
        let (id, keys, account) = {
            let node = self.learners[index].borrow();
            (node.id, node.keys.clone(), node.identity.account)
        };
        Some(match effect {
            Effect::Look(at) => Input::Looked { at, found: self.look(index, id, &keys, account, at).await },
            Effect::CheckRegistration => {
                self.executor.sleep(self.plan.latency_ms).await;
                Input::Registration { registered: (!self.is_cut(id)).then_some(true) }
            }
            Effect::PutProgress(progress) => {
                let bytes = self.record(index, *progress);
                let begun_ms = self.executor.now_ms();
                let put = self.put_granted(index, id, &keys.progress, bytes, 0).await;
                let patience_ms = (self.plan.parameters.learner_ttl_ms / PROGRESS_TIMEOUT_PER_TTL).max(2_000);
                Input::ProgressPut(if self.executor.now_ms() > begun_ms + patience_ms { Put::Unavailable } else { put })
            }
            Effect::FetchBase => {
                self.executor.sleep(BASE_MS).await;
                let key = self.keys.release_file(BASE_RELEASE, BASE_FILE);
                Input::BaseFetched(self.get_granted(index, id, &key, 0).await.map(drop))
            }
            Effect::OpenTrainer => {
                self.executor.sleep(OPEN_MS).await;
                let mut node = self.learners[index].borrow_mut();
                let restored = node.disk.states.last_key_value().map(|(_, (weights, _))| weights.clone().restored());
                let is_restored = restored.is_some();
                node.memory.weights = Some(restored.unwrap_or_else(|| Weights::fresh(self.plan.parameters.fragments)));
                Input::TrainerOpened(Ok(is_restored))
            }
            Effect::FetchKeyframe { fragment, version, length, digest } => {
                let key = self.run.keyframe(fragment, version);
                let known = self.learners[index].borrow().disk.keyframes.get(&(fragment, version)).map(|bytes| Digest::blake3(bytes));
                if known == Some(digest) {
                    return Some(Input::KeyframeFetched { fragment, version, result: Ok(()) });
                }
                let result = match self.get_granted(index, id, &key, self.plan.download_ms).await {
                    Ok(bytes) if bytes.len() as u64 == length && Digest::blake3(&bytes) == digest => {
                        self.learners[index].borrow_mut().disk.keyframes.insert((fragment, version), bytes);
                        Ok(())
                    }
                    Ok(_) => Err(Trouble::Corrupt),
                    Err(trouble) => Err(trouble),
                };
                Input::KeyframeFetched { fragment, version, result }
            }
            Effect::FetchTokens(lease) => Input::TokensFetched { lease: lease.id, result: self.fetch_tokens(index, id, &lease).await },
            Effect::PutPayload { t } => {
                let payload = self.learners[index].borrow().memory.payloads.get(&t).cloned();
                let behaviour = self.learners[index].borrow().behaviour;
                if behaviour == Behaviour::Late {
                    self.executor.sleep(self.plan.parameters.pull_deadline_ms).await;
                }
                let put = match payload {
                    Some(mut payload) => {
                        if behaviour == Behaviour::OtherBytes {
                            payload = Bytes::from([&payload[..63], b"x"].concat());
                        }
                        self.put_granted(index, id, &keys.own.payload(t), payload, self.plan.upload_ms).await
                    }
                    None => Put::Refused,
                };
                Input::PayloadPut { t, put }
            }
            Effect::PrepareReceipt(receipt) => {
                let lease = receipt.lease;
                let bytes = self.signed::<Receipt>(index, &receipt);
                let signed = (bytes.len() as u64, Digest::sha256(&bytes));
                self.learners[index].borrow_mut().memory.receipts.insert(lease, bytes);
                Input::ReceiptPrepared { lease, signed: Some(signed) }
            }
            Effect::PutReceipt { lease } => {
                let receipt = self.learners[index].borrow().memory.receipts.get(&lease).cloned();
                let put = match receipt {
                    Some(receipt) => self.put_granted(index, id, &keys.own.receipt(lease), receipt, 0).await,
                    None => Put::Refused,
                };
                Input::ReceiptPut { lease, put }
            }
            Effect::PrepareOpening { audit, t, .. } => {
                self.executor.sleep(PREPARE_MS).await;
                let manifest = self.published::<MergeManifest>(id, &self.run.merge(t)).await;
                let is_asked = self.learners[index].borrow().memory.asked.steps.contains(&t);
                let parts = if is_asked { self.prepare_opening(index, audit, t, manifest) } else { Err(NotPrepared::Failed) };
                Input::OpeningPrepared { audit, parts }
            }
            Effect::PutOpening { audit, part } => {
                let (bytes, behaviour) = {
                    let node = self.learners[index].borrow();
                    (node.disk.openings.get(&audit).map(|parts| parts[usize::from(part)].clone()), node.behaviour)
                };
                let put = match bytes {
                    Some(_) if behaviour == Behaviour::Hollow => Put::Stored,
                    Some(bytes) => self.put_granted(index, id, &keys.own.opening(&audit, part), bytes, 0).await,
                    None => Put::Unavailable,
                };
                Input::OpeningPut { audit, part, put }
            }
            Effect::DropTokens { .. } | Effect::Boundary(_) => return None,
            Effect::DropPayload { t } => {
                self.learners[index].borrow_mut().memory.payloads.remove(&t);
                return None;
            }
            Effect::DropReceipt { lease } => {
                self.learners[index].borrow_mut().memory.receipts.remove(&lease);
                return None;
            }
            Effect::KeepOpenings { asked, .. } => {
                let mut node = self.learners[index].borrow_mut();
                node.disk.openings.retain(|of, _| asked.iter().any(|(audit, _)| audit == of));
                node.memory.asked.steps = asked.into_iter().map(|(_, t)| t).collect();
                return None;
            }
        })
    }

    async fn look(&self, index: usize, id: NodeId, keys: &SlotKeys, account: AccountId, at: Look) -> Found {
        match at {
            Look::Head => match self.poll_head(index, id).await {
                Ok(Some(head)) => Found::Head(Box::new(head)),
                Ok(None) => Found::Nothing,
                Err(()) => Found::Failed,
            },
            Look::Job => match self.poll::<Job>(index, id, at, &keys.job).await {
                Ok(Some((_, job))) if (job.hotkey, job.slot) == (account, 0) => {
                    let leases = job.leases.iter().map(|lease| (lease.id, lease.batch_rows));
                    self.learners[index].borrow_mut().memory.batch_rows.extend(leases);
                    Found::Job(Box::new(job))
                }
                Ok(None) => Found::Nothing,
                _ => Found::Failed,
            },
            Look::Moved => {
                self.executor.sleep(self.plan.latency_ms).await;
                Found::Moved(false)
            }
            Look::Standing => match self.poll::<StandingGrants>(index, id, at, &keys.standing).await {
                Ok(Some((header, grants))) => match self.unseal(index, &header, &grants.sealed) {
                    Some(bundle) => {
                        let infos = self.learners[index].borrow_mut().memory.standing.take_over(bundle);
                        Found::Grants { session_epoch: grants.session_epoch, grants: infos }
                    }
                    None => Found::Failed,
                },
                Ok(None) => Found::Nothing,
                Err(()) => Found::Failed,
            },
            Look::Pull => match self.poll::<PullGrants>(index, id, at, &keys.pull).await {
                Ok(Some((header, grants))) => match self.unseal(index, &header, &grants.sealed) {
                    Some(bundle) => {
                        let infos = self.learners[index].borrow_mut().memory.pull.take_over(bundle);
                        Found::Grants { session_epoch: grants.session_epoch, grants: infos }
                    }
                    None => Found::Failed,
                },
                Ok(None) => Found::Nothing,
                Err(()) => Found::Failed,
            },
        }
    }

    /// A mutable object of the orchestrator, if it is there and changed; as `storage::discovery` reads it.
    async fn poll<D: Document>(&self, index: usize, id: NodeId, at: Look, key: &str) -> Result<Option<(Header, D)>, ()> {
        let etag = self.learners[index].borrow().memory.seen[at as usize].0.clone();
        let object = match self.get(id, key, etag.as_deref()).await {
            Ok(Some(object)) => object,
            Ok(None) | Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(_) => return Err(()),
        };
        let now_ms = self.clock_ms(id);
        let opened = self.plan.scheme.open::<D>(&object.bytes, &self.context, Expect::Account(&self.office.account), Some(now_ms));
        let verified = opened.map_err(|_| ())?;
        self.saw(index, at, object.etag, verified.header.sequence)?;
        Ok(Some((verified.header, verified.document)))
    }

    /// The head, as [`World::poll`] gives other objects.
    async fn poll_head(&self, index: usize, id: NodeId) -> Result<Option<Head>, ()> {
        let key = self.head_key();
        let etag = self.learners[index].borrow().memory.seen[Look::Head as usize].0.clone();
        let object = match self.get(id, key, etag.as_deref()).await {
            Ok(Some(object)) => object,
            Ok(None) | Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(_) => return Err(()),
        };
        let head = self.open_head(&object, self.clock_ms(id)).ok_or(())?;
        // Shards that joined the run with this head are known before it is given out.
        let shards = self.learners[index].borrow().memory.shards.clone();
        let mut pages = Vec::new();
        for page in shards.next_page()..=head.document.catalog.page {
            let object = self.get(id, &self.run.catalog(page), None).await.ok().flatten().ok_or(())?;
            let opened = self.open_office::<CatalogPage>(&object.bytes).map_err(|_| ())?;
            pages.push((opened.document, Digest::blake3(&object.bytes)));
        }
        shards.take(pages, &head.document.catalog).map_err(|_| ())?;
        self.saw(index, Look::Head, object.etag, head.header.sequence)?;
        Ok(Some(head.document))
    }

    /// Remembers an object that was read, unless a newer one was read before.
    fn saw(&self, index: usize, at: Look, etag: Option<String>, sequence: u64) -> Result<(), ()> {
        let mut node = self.learners[index].borrow_mut();
        let seen = &mut node.memory.seen[at as usize];
        if sequence < seen.1 {
            return Err(());
        }
        seen.1 = sequence;
        if let Some(etag) = etag {
            seen.0 = Some(etag.into());
        }
        Ok(())
    }

    fn unseal(&self, index: usize, header: &Header, sealed: &SealedBytes) -> Option<GrantBundle> {
        self.plan.scheme.unseal(&self.context, header, sealed, &self.learners[index].borrow().identity)
    }

    async fn get_granted(&self, index: usize, id: NodeId, key: &str, transfer_ms: u64) -> Result<Bytes, Trouble> {
        let grant = self.learners[index].borrow().find(Method::Get, key, self.clock_ms(id)).ok_or(Trouble::Grant)?;
        self.redeem_get(id, &grant, transfer_ms).await.map_err(|error| match error {
            GrantError::Expired { .. } => Trouble::Grant,
            GrantError::Absent { .. } => Trouble::Absent,
            _ => Trouble::Unavailable,
        })
    }

    async fn put_granted(&self, index: usize, id: NodeId, key: &str, bytes: Bytes, transfer_ms: u64) -> Put {
        let grant = self.learners[index].borrow().find(Method::Put, key, self.clock_ms(id));
        let Some(grant) = grant else { return Put::Grant };
        match self.redeem_put(id, &grant, bytes, transfer_ms).await {
            Ok(PutOutcome::Stored) => Put::Stored,
            Ok(PutOutcome::AlreadyThere) => Put::AlreadyThere,
            Ok(PutOutcome::Expired) => Put::Grant,
            Ok(PutOutcome::Refused { .. }) => Put::Refused,
            Err(GrantError::Unavailable { .. }) => Put::Unavailable,
            Err(_) => Put::Refused,
        }
    }

    fn next_of(&self, index: usize) -> (u64, u64) {
        let mut node = self.learners[index].borrow_mut();
        let now_ms = self.clock_ms(node.id);
        node.disk.sequence = next_sequence(node.disk.sequence, now_ms);
        (node.disk.sequence, now_ms)
    }

    fn signed<D: Document>(&self, index: usize, document: &D) -> Bytes {
        let (sequence, now_ms) = self.next_of(index);
        let signer = self.learners[index].borrow().identity.signer.clone();
        Bytes::from(envelope::sign(document, &self.context, &*signer, sequence, now_ms))
    }

    /// The signed progress record.
    fn record(&self, index: usize, mut progress: Progress) -> Bytes {
        let (sequence, now_ms) = self.next_of(index);
        let (signer, behaviour) = {
            let node = self.learners[index].borrow();
            (node.identity.signer.clone(), node.behaviour)
        };
        if behaviour == Behaviour::Copier
            && let Some(victim) = self.watch.borrow().a_commitment(&self.learners[index].borrow().identity.account)
        {
            copy_from(&mut progress.commitments, &victim);
        }
        let bytes = encode_progress(progress, &self.context, &*signer, sequence, now_ms);
        if behaviour == Behaviour::Forger {
            // Another miner's name, under a signature that cannot be his.
            let victim = self.learners[(index + 1) % self.learners.len()].borrow().identity.signer.key();
            let ours = signer.key().public;
            let mut forged = bytes;
            if let Some(at) = forged.windows(32).position(|window| window == ours) {
                forged[at..at + 32].copy_from_slice(&victim.public);
            }
            return Bytes::from(forged);
        }
        Bytes::from(bytes)
    }

    async fn fetch_tokens(&self, index: usize, id: NodeId, lease: &Lease) -> Result<(), Trouble> {
        let mut shards: Vec<&String> = lease.rows.iter().map(|range| &range.shard).collect();
        shards.sort();
        shards.dedup();
        for shard in shards {
            let known = self.learners[index].borrow().memory.shards.list();
            // A lease may be read before the head that names its shard's page.
            let manifest = known.iter().find(|known| known.id == *shard).ok_or(Trouble::Absent)?;
            self.watch.borrow_mut().takes_rows(self, manifest);
            self.get_granted(index, id, &self.keys.shard_tokens(shard), 100).await?;
        }
        Ok(())
    }

    async fn pass(self: Rc<Self>, index: usize, life: Life, boundary: Boundary) {
        self.executor.sleep(PREPARE_MS).await;
        let Some((prepared, step_ms, fails)) = self.prepare(index, &boundary) else { return };
        self.tell_miner(index, life, prepared);
        let number = boundary.number;
        let Some(step) = boundary.step else {
            return self.tell_miner(index, life, Input::Finished { number, step: None });
        };
        self.learners[index].borrow_mut().is_stepping = true;
        self.stepping.set(self.stepping.get().begin(self.executor.now_ms()));
        self.executor.sleep(step_ms).await;
        self.learners[index].borrow_mut().is_stepping = false;
        self.stepping.set(self.stepping.get().end(self.executor.now_ms()));
        if fails {
            return self.tell_miner(index, life, Input::Faulted { number, fault: Fault::NotFinite });
        }
        let done = {
            let mut node = self.learners[index].borrow_mut();
            let node = &mut *node;
            let rows = u64::from(node.batch_rows(&step, &self));
            let Some(weights) = &mut node.memory.weights else { return };
            let (loss, tokens) = (weights.loss(), rows * 128);
            weights.step(step.lease, step.lease_step);
            node.steps += 1;
            node.useful_ms += step_ms + PREPARE_MS;
            node.unsaved_ms += step_ms + PREPARE_MS;
            let opened =
                OpenedStep { local_step: step.local_step, lease: step.lease, lease_step: step.lease_step, exchanged: step.exchanged, loss };
            node.disk.steps.insert((node.disk.session, step.local_step), opened);
            StepDone { loss, tokens, step_ms: step_ms as u32 }
        };
        self.tell_miner(index, life, Input::Finished { number, step: Some(done) });
    }

    /// What comes before the step: restore, apply, snapshot, export.
    fn prepare(&self, index: usize, boundary: &Boundary) -> Option<(Input, u64, bool)> {
        let mut node = self.learners[index].borrow_mut();
        let node = &mut *node;
        let session = node.disk.session;
        let mut weights = node.memory.weights.clone()?;
        if let Some(local_step) = boundary.restore {
            weights = node.disk.states.get(&(session, local_step))?.0.clone().restored();
        }
        for (fragment, version) in &boundary.apply {
            let keyframe = node.disk.keyframes.get(&(*fragment, *version))?;
            weights.apply(*fragment, keyframe);
        }
        let snapshot = boundary.snapshot.as_ref().map(|order| {
            node.unsaved_ms = 0;
            let fragments = self.plan.parameters.fragments;
            node.disk.put_state(order.local_step, weights.clone(), order.versions.clone(), fragments, &node.memory.asked);
            weights.digest()
        });
        let mut exported = Vec::new();
        for order in &boundary.export {
            let keyframe = node.disk.keyframes.get(&(order.fragment, order.base_version))?;
            let mut payload = weights.export(order.fragment, order.base_version, keyframe);
            if node.behaviour == Behaviour::Liar {
                payload = tensors::payload(order.fragment, order.base_version, &Digest::blake3(&payload));
                self.watch.borrow_mut().lies.insert(Digest::blake3(&payload));
            }
            let (length, sha256, blake3) = (payload.len() as u64, Digest::sha256(&payload), Digest::blake3(&payload));
            node.memory.payloads.insert(order.t, payload);
            node.disk.put_export(order.t, order.start_step, order.local_step, blake3);
            exported.push(Exported { t: order.t, length, sha256, blake3, residual: None });
        }
        node.memory.weights = Some(weights);
        let mut random = self.random.borrow_mut();
        let mut step_ms = random.between(node.step_ms * 9 / 10, node.step_ms * 11 / 10).max(1);
        if let Some(step) = &boundary.step {
            step_ms = (step_ms * u64::from(node.batch_rows(step, self)) / u64::from(self.plan.parameters.batch_rows)).max(1);
        }
        let fails = self.executor.now_ms() < self.plan.faults.until_ms && random.chance(self.plan.faults.not_finite_ppm);
        Some((Input::Prepared { number: boundary.number, snapshot, exported }, step_ms, fails))
    }

    fn prepare_opening(
        &self,
        index: usize,
        audit: Digest,
        t: u64,
        manifest: Option<Box<MergeManifest>>,
    ) -> Result<Vec<PreparedPart>, NotPrepared> {
        let account = self.learners[index].borrow().identity.account;
        let ours = manifest.ok_or(NotPrepared::Unknown)?.contributions.into_iter().find(|one| one.hotkey == account);
        let payload = ours.ok_or(NotPrepared::Gone)?.payload;
        let is_prepared = self.learners[index].borrow().disk.openings.contains_key(&audit);
        if !is_prepared {
            let Segment { start_step, state, versions, steps } =
                self.learners[index].borrow().disk.segment(t, payload).ok_or(NotPrepared::Gone)?;
            let manifest = self.signed::<OpeningManifest>(index, &OpeningManifest { audit, t, start_step, versions, steps });
            let parts = [manifest, state.to_bytes(), Bytes::from_static(&[0; 4])];
            let mut node = self.learners[index].borrow_mut();
            let Node { disk, memory, .. } = &mut *node;
            disk.openings.insert(audit, parts);
            disk.release(t, self.plan.parameters.fragments, &mut memory.asked);
        }
        let node = self.learners[index].borrow();
        let describe = |(part, bytes): (u8, &Bytes)| PreparedPart { part, length: bytes.len() as u64, sha256: Digest::sha256(bytes) };
        Ok((0..OPENING_PARTS).zip(&node.disk.openings[&audit]).map(describe).collect())
    }
}

/// Commits to the bytes that another miner has committed to.
fn copy_from(commitments: &mut [Commitment], victim: &Commitment) {
    for commitment in commitments.iter_mut().filter(|commitment| commitment.t == victim.t) {
        (commitment.length, commitment.sha256, commitment.blake3) = (victim.length, victim.sha256, victim.blake3);
    }
}

/// A number for the trace.
fn kind_of(input: &Input) -> u64 {
    match input {
        Input::Tick => 32,
        Input::Stop => 33,
        Input::Looked { at, found } => 34 + ((*at as u64) << 8) + (u64::from(*found != Found::Nothing) << 16),
        Input::Registration { .. } => 35,
        Input::ProgressPut(put) => 36 + ((*put as u64) << 8),
        Input::BaseFetched(_) => 37,
        Input::TrainerOpened(_) => 38,
        Input::KeyframeFetched { fragment, version, .. } => 39 + (u64::from(*fragment) << 8) + (version << 24),
        Input::TokensFetched { lease, .. } => 40 + (lease << 8),
        Input::Prepared { number, .. } => 41 + (number << 8),
        Input::Finished { number, .. } => 42 + (number << 8),
        Input::Faulted { number, .. } => 43 + (number << 8),
        Input::PayloadPut { t, put } => 44 + ((*put as u64) << 8) + (t << 16),
        Input::ReceiptPrepared { lease, .. } => 45 + (lease << 8),
        Input::ReceiptPut { lease, .. } => 46 + (lease << 8),
        Input::OpeningPrepared { audit, .. } => 47 + (u64::from(audit.0[0]) << 8),
        Input::OpeningPut { part, .. } => 48 + (u64::from(*part) << 8),
    }
}
