//! A validator's node: its real machine, and an edge that reads the public record, audits digests and publishes verdicts in two
//! phases like `quasar-validator`'s. Decided verdicts are its journal and outlive the process.

use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use chain::{Chain, Hotkey, setter};
use daemon::Machine as _;
use daemon::clock::Steady;
use futures::FutureExt;
use protocol::audits::Selection;
use protocol::documents::{
    AuditDraw, AuditOrder, Measurements, MergeManifest, OpeningManifest, Progress, Verdict, VerdictCommit, VerdictResult, VerdictReveal,
};
use protocol::envelope::{self, Document, Expect, SequenceGuard, next_sequence};
use protocol::log::LogHead;
use protocol::{AccountId, Digest, GrantBundle, Method, Reason, steps};
use quasar_validator::audit::{Judgement, Subject};
use quasar_validator::machine::audits::{Judged, OrderRead, Written, compare};
use quasar_validator::machine::cycles::DrawRead;
use quasar_validator::machine::weights::{WeightSettings, WeightsMemory};
use quasar_validator::machine::{Agreed, ChainView, Effect, Ended, HeadFacts, Input, Machine, MachineSettings, OwnNeuron};
use storage::StoreError;
use storage::client::{GrantError, PutOutcome};

use super::executor::{Life, WORLD};
use super::net::Node as NodeId;
use super::paper::Identity;
use super::tensors;
use super::world::World;

/// Nodes forget the states of older blocks.
const STATE_BLOCKS: u64 = 5;
/// What measuring one contribution takes.
const JUDGE_MS: u64 = 800;

#[derive(Default)]
struct Disk {
    verdicts: BTreeMap<Digest, VerdictReveal>,
    /// Who could audit at these blocks.
    auditors: BTreeMap<u64, Vec<AccountId>>,
    /// Rows of weights under way.
    weights: Option<WeightsMemory>,
    sequence: u64,
}

#[derive(Default)]
struct Memory {
    head_etag: Option<String>,
    guard: SequenceGuard,
    orders: BTreeMap<Digest, (AuditOrder, GrantBundle)>,
}

pub struct Node {
    pub identity: Identity,
    pub id: NodeId,
    hotkey: Rc<Hotkey>,
    disk: Disk,
    memory: Memory,
    machine: Option<Machine>,
    pub life: Life,
    time: Steady,
    tick_ms: Option<u64>,
    pub ended: Option<Ended>,
}

impl Node {
    /// See [`Machine::agreed`].
    pub fn agreed(&mut self) -> Option<Agreed> {
        self.machine.as_mut()?.agreed()
    }

    pub fn new(identity: Identity, hotkey: Rc<Hotkey>, id: NodeId) -> Self {
        Self {
            identity,
            id,
            hotkey,
            disk: Disk::default(),
            memory: Memory::default(),
            machine: None,
            life: WORLD,
            time: Steady::new(0),
            tick_ms: None,
            ended: None,
        }
    }

    pub fn is_running(&self) -> bool {
        self.machine.is_some()
    }
}

impl World {
    pub fn start_validator(&self, index: usize) {
        let life = self.executor.new_life();
        {
            let mut node = self.validators[index].borrow_mut();
            if node.machine.is_some() {
                return;
            }
            let weights = WeightSettings {
                netuid: self.context.netuid,
                mechanism: 0,
                refresh_ms: 3_600_000,
                retry_base_ms: 1_000,
                retry_max_ms: 30_000,
                look_max_ms: 30_000,
                is_dry_run: false,
            };
            let settings = MachineSettings {
                run: self.context.run,
                own: node.identity.account,
                parameters: self.plan.parameters.clone(),
                poll_ms_max: 2_000,
                weights,
            };
            node.memory = Memory::default();
            node.life = life;
            node.time = Steady::new(0);
            let mut machine = Machine::new(settings);
            if let Some(memory) = node.disk.weights.clone() {
                machine.recall_weights(self.clock_ms(node.id), memory);
            }
            node.machine = Some(machine);
        }
        self.tell_validator(index, life, Input::Tick);
    }

    pub fn crash_validator(&self, index: usize) {
        let life = {
            let mut node = self.validators[index].borrow_mut();
            node.machine = None;
            node.tick_ms = None;
            node.life
        };
        self.executor.end(life);
    }

    fn tell_validator(&self, index: usize, life: Life, input: Input) {
        let mut node = self.validators[index].borrow_mut();
        let node = &mut *node;
        if node.life != life {
            return;
        }
        let now_ms = node.time.read(self.clock_ms(node.id), self.steady(node.id));
        self.trace(&[self.executor.now_ms(), node.id as u64, kind_of(&input)]);
        self.say(node.id, || format!("{input:?}"));
        let Some(machine) = &mut node.machine else { return };
        machine.handle(now_ms, input);
        while let Some(effect) = machine.poll_effect() {
            let world = self.me();
            self.executor.spawn(life, async move {
                if let Some(input) = world.do_for_validator(index, effect).await {
                    world.tell_validator(index, life, input);
                }
            });
        }
        if let Some(ended) = machine.ended() {
            node.ended = Some(ended);
            node.machine = None;
            return;
        }
        let Some(deadline) = machine.deadline() else { return };
        let delay_ms = deadline.saturating_sub(now_ms).clamp(1, 2_000);
        let at_ms = self.executor.now_ms() + delay_ms;
        if node.tick_ms == Some(at_ms) {
            return;
        }
        node.tick_ms = Some(at_ms);
        let world = self.me();
        self.executor.after(delay_ms, life, move || {
            let is_due = world.validators[index].borrow().tick_ms == Some(at_ms);
            if is_due {
                world.validators[index].borrow_mut().tick_ms = None;
                world.tell_validator(index, life, Input::Tick);
            }
        });
    }

    async fn do_for_validator(&self, index: usize, effect: Effect) -> Option<Input> {
        let (id, account) = {
            let node = self.validators[index].borrow();
            (node.id, node.identity.account)
        };
        Some(match effect {
            Effect::ReadHead => Input::Head(self.read_head(index, id).await),
            Effect::ReadMerge { t } => Input::Merge { t, manifest: self.published::<MergeManifest>(id, &self.run.merge(t)).await },
            Effect::Keep { .. } => return None,
            Effect::ReadBlock => {
                self.executor.sleep(self.plan.latency_ms).await;
                Input::Block(self.chain.head().now_or_never().and_then(Result::ok).map(|head| head.number))
            }
            Effect::ReadChain => {
                self.executor.sleep(self.plan.latency_ms).await;
                Input::Chain(self.view(index).map(Box::new))
            }
            Effect::ReadBeacon { cycle, block } => {
                self.executor.sleep(self.plan.latency_ms).await;
                Input::Beacon { cycle, read: self.read_draw(index, id, (cycle, block)).await.unwrap_or(DrawRead::Failed) }
            }
            Effect::ReadOrder(selection) => Input::Order { audit: selection.audit, read: self.read_order(index, id, &selection).await },
            Effect::Judge { subject, .. } => {
                let audit = subject.selection.audit;
                let decided = self.validators[index].borrow().disk.verdicts.get(&audit).copied();
                let judged = match decided {
                    Some(VerdictReveal { verdict, .. }) => {
                        let note = "decided before the restart".to_owned();
                        let (result, reason, measured) = (verdict.result, verdict.reason, verdict.measured);
                        Judged::Done(Box::new(Judgement { result, reason, measured, note }))
                    }
                    None => {
                        self.executor.sleep(JUDGE_MS).await;
                        self.judge(index, id, &subject).await
                    }
                };
                Input::Judged { audit, judged }
            }
            Effect::Commit(verdict) => {
                let audit = verdict.audit;
                let decided = {
                    let mut node = self.validators[index].borrow_mut();
                    let salt = Digest::derive("quasar simulation salt", &[&account.0, &audit.0]).0;
                    *node.disk.verdicts.entry(audit).or_insert(VerdictReveal { verdict: *verdict, salt })
                };
                let commit = VerdictCommit { audit, commitment: decided.verdict.commitment(&decided.salt) };
                let key = self.run.verdict_commit(&account, &audit);
                Input::Committed { audit, written: self.put_verdict(index, id, &audit, &key, &commit).await }
            }
            Effect::Reveal(audit) => {
                let decided = self.validators[index].borrow().disk.verdicts.get(&audit).copied();
                let written = match decided {
                    Some(decided) => self.put_verdict(index, id, &audit, &self.run.verdict_reveal(&account, &audit), &decided).await,
                    None => Written::Lost("no verdict on this audit is in the journal".into()),
                };
                Input::Revealed { audit, written }
            }
            Effect::ReadVerdict(subject) => {
                let audit = subject.selection.audit;
                match self.revealed(id, &subject).await {
                    Ok(verdict) => Input::Verdict { audit, verdict: verdict.map(Box::new) },
                    Err(_) => Input::NoVerdict { audit },
                }
            }
            Effect::Weights(effect) => Input::Weights(self.weights(index, &effect).await),
            Effect::SendWeights { send, memory } => {
                self.validators[index].borrow_mut().disk.weights = Some(*memory);
                Input::Weights(self.weights(index, &send).await)
            }
            Effect::KeepWeights(memory) => {
                self.validators[index].borrow_mut().disk.weights = Some(*memory);
                return None;
            }
            Effect::PublishScores { epoch, scores, .. } => {
                self.watch.borrow_mut().weights(self, &scores, epoch);
                return None;
            }
            Effect::ShowWeights(_) => return None,
            Effect::ReadLog { size } => Input::LogHead { size, head: self.published::<LogHead>(id, &self.run.log(size)).await },
            Effect::CheckMoved => {
                self.executor.sleep(self.plan.latency_ms).await;
                Input::Moved(false)
            }
        })
    }

    fn view(&self, index: usize) -> Option<ChainView> {
        let metagraph = self.chain.metagraph(self.context.netuid).now_or_never()?.ok()?;
        let account = self.validators[index].borrow().identity.account;
        let own = metagraph.by_hotkey(&account).map(|neuron| OwnNeuron { uid: neuron.uid, validator_permit: neuron.validator_permit });
        Some(ChainView { block: metagraph.block.number, own })
    }

    /// What the chain says, or was seen to say before it has forgotten, and what was written down; `None` if either does not answer.
    async fn read_draw(&self, index: usize, id: NodeId, (cycle, block): (u64, u64)) -> Option<DrawRead> {
        let head = self.chain.head().now_or_never()?.ok()?.number;
        let hash = self.chain.block_hash(block).now_or_never()?.ok()??;
        let kept = self.validators[index].borrow().disk.auditors.get(&block).cloned();
        let seen = match kept {
            None if block + STATE_BLOCKS >= head => {
                let draw = self.draw_at(cycle, block)?;
                self.validators[index].borrow_mut().disk.auditors.insert(block, draw.validators.clone());
                Some(draw.validators)
            }
            kept => kept,
        };
        let written = match self.get(id, &self.run.draw(cycle), None).await {
            Err(StoreError::NotFound { .. }) => None,
            found => found.ok()?.and_then(|object| self.open_office::<AuditDraw>(&object.bytes).ok()),
        };
        Some(DrawRead::of(cycle, (block, Some(Digest(hash))), seen, written.map(|written| written.document)))
    }

    /// What the setter asks of the chain; a row takes a block.
    async fn weights(&self, index: usize, effect: &setter::Effect) -> setter::Input {
        let is_row = matches!(effect, setter::Effect::Send { .. });
        self.executor.sleep(if is_row { self.plan.block_ms } else { self.plan.latency_ms }).await;
        let hotkey = self.validators[index].borrow().hotkey.clone();
        // Nobody listens: how far a row is on its way changes nothing.
        let (progress, _) = tokio::sync::mpsc::channel(1);
        let answer = setter::execute(&self.chain, &hotkey, effect, (self.context.netuid, 0), &progress).now_or_never();
        answer.unwrap_or_else(|| setter::Input::Unreachable { why: "the chain does not answer".to_owned() })
    }

    async fn read_head(&self, index: usize, id: NodeId) -> Option<Box<HeadFacts>> {
        let etag = self.validators[index].borrow().memory.head_etag.clone();
        let object = self.get(id, self.head_key(), etag.as_deref()).await.ok().flatten()?;
        let head = self.open_head(&object, self.clock_ms(id))?;
        let mut node = self.validators[index].borrow_mut();
        node.memory.guard.accept(self.head_key(), &head.header, &head.id).ok()?;
        node.memory.head_etag = object.etag;
        Some(Box::new(HeadFacts::from(head.document)))
    }

    pub(super) async fn published<D: Document>(&self, id: NodeId, key: &str) -> Option<Box<D>> {
        let object = self.get(id, key, None).await.ok().flatten()?;
        self.open_office::<D>(&object.bytes).ok().map(|verified| Box::new(verified.document))
    }

    async fn read_order(&self, index: usize, id: NodeId, selection: &Selection) -> OrderRead {
        let account = self.validators[index].borrow().identity.account;
        let key = self.run.audit(&account, &selection.audit);
        let Ok(Some(object)) = self.get(id, &key, None).await else { return OrderRead::Absent };
        let Ok(order) = self.open_office::<AuditOrder>(&object.bytes) else { return OrderRead::Absent };
        let read = compare(selection, &order.document);
        let identity = self.validators[index].borrow().identity.clone();
        let unsealed = self.plan.scheme.unseal(&self.context, &order.header, &order.document.sealed, &identity);
        let Some(grants) = unsealed else { return OrderRead::Absent };
        self.validators[index].borrow_mut().memory.orders.insert(selection.audit, (order.document, grants));
        read
    }

    async fn granted(&self, index: usize, id: NodeId, audit: &Digest, key: &str) -> Result<Bytes, Judged> {
        let now_ms = self.clock_ms(id);
        let grant = {
            let node = self.validators[index].borrow();
            node.memory.orders.get(audit).and_then(|(_, grants)| grants.find(Method::Get, key, now_ms).cloned())
        };
        let grant = grant.ok_or_else(|| Judged::Failed(format!("no grant for {key}")))?;
        self.redeem_get(id, &grant, 0).await.map_err(|error| match error {
            GrantError::Expired { .. } | GrantError::Absent { .. } | GrantError::Unavailable { .. } => {
                Judged::Unavailable(error.to_string())
            }
            error => Judged::Failed(error.to_string()),
        })
    }

    async fn judge(&self, index: usize, id: NodeId, subject: &Subject) -> Judged {
        match self.examine(index, id, subject).await {
            Ok((result, reason)) => {
                let measured = Measurements { replayed_steps: 1, ..Measurements::NONE };
                Judged::Done(Box::new(Judgement { result, reason, measured, note: String::new() }))
            }
            Err(judged) => judged,
        }
    }

    /// Replays the opened segment; the error says why nothing could be judged.
    async fn examine(&self, index: usize, id: NodeId, subject: &Subject) -> Result<(VerdictResult, Reason), Judged> {
        let failed = |why: &str| Judged::Failed(why.to_owned());
        let Selection { audit, hotkey, slot, t, .. } = &subject.selection;
        let order = self.validators[index].borrow().memory.orders.get(audit).map(|(order, _)| order.clone());
        let order = order.ok_or_else(|| failed("no order"))?;
        let keys = self.slot_keys((*hotkey, *slot));
        let bytes = self.granted(index, id, audit, &keys.own.commitment(*t)).await?;
        let record = self.plan.scheme.open::<Progress>(&bytes, &self.context, Expect::Account(hotkey), None);
        let record = record.map_err(|error| failed(&error.to_string()))?;
        if record.id != subject.contribution.commitment {
            return Err(failed("the stored commitment is not the one that the merge manifest lists"));
        }
        let commitment = record.document.commitments.iter().find(|one| one.t == *t && one.blake3 == subject.contribution.payload).cloned();
        let commitment = commitment.ok_or_else(|| failed("the signed record holds no commitment to this contribution"))?;
        let payload = self.granted(index, id, audit, &keys.own.payload(*t)).await?;
        if Digest::blake3(&payload) != commitment.blake3 {
            return Ok((VerdictResult::Inconclusive, Reason::DigestMismatch));
        }
        if order.opening.len() != usize::from(protocol::documents::OPENING_PARTS) {
            return Ok((VerdictResult::NoOpening, Reason::NoOpening));
        }
        let mut parts = Vec::new();
        for part in 0..protocol::documents::OPENING_PARTS {
            let key = keys.own.opening(audit, part);
            if self.peek(&key).is_none() {
                return Ok((VerdictResult::NoOpening, Reason::NoOpening));
            }
            parts.push(self.granted(index, id, audit, &key).await?);
        }
        let mismatch = |reason| Ok((VerdictResult::Mismatch, reason));
        let opened = self.plan.scheme.open::<OpeningManifest>(&parts[0], &self.context, Expect::Account(hotkey), None);
        let Ok(manifest) = opened.map(|verified| verified.document) else { return mismatch(Reason::BadOpening) };
        let Some(state) = tensors::Weights::from_bytes(&parts[1]) else { return mismatch(Reason::BadOpening) };
        let digest = steps::segment_digest(manifest.start_step, &state.digest(), &manifest.versions);
        if manifest.start_step != commitment.start_step || digest != commitment.start_digest {
            return mismatch(Reason::StartMismatch);
        }
        let expected = commitment.local_step.saturating_sub(commitment.start_step);
        if expected == 0 || expected > u64::from(self.plan.parameters.audit.replay_steps) || manifest.steps.len() as u64 != expected {
            return mismatch(Reason::BadOpening);
        }
        let keyframe = |fragment, version| self.peek(&self.run.keyframe(fragment, version));
        let Some(replayed) = tensors::replay(state, &manifest.steps, commitment.fragment, commitment.base_version, keyframe) else {
            return Err(failed("a keyframe is missing"));
        };
        if replayed != payload {
            return mismatch(Reason::ReplayMismatch);
        }
        Ok((VerdictResult::Pass, Reason::None))
    }

    async fn put_verdict<D: Document>(&self, index: usize, id: NodeId, audit: &Digest, key: &str, document: &D) -> Written {
        let now_ms = self.clock_ms(id);
        let (grant, bytes) = {
            let mut node = self.validators[index].borrow_mut();
            let grant = node.memory.orders.get(audit).and_then(|(_, grants)| grants.find(Method::Put, key, now_ms).cloned());
            node.disk.sequence = next_sequence(node.disk.sequence, now_ms);
            let bytes = envelope::sign(document, &self.context, &*node.identity.signer, node.disk.sequence, now_ms);
            (grant, Bytes::from(bytes))
        };
        let Some(grant) = grant else { return Written::NoGrant };
        match self.redeem_put(id, &grant, bytes, 0).await {
            Ok(PutOutcome::Stored | PutOutcome::AlreadyThere) => Written::Done,
            Ok(PutOutcome::Expired) => Written::NoGrant,
            Ok(PutOutcome::Refused { status }) => Written::Lost(format!("the store refuses it with HTTP status {status}")),
            Err(error) => Written::Unavailable(error.to_string()),
        }
    }

    /// The revealed verdict; the error is the store's.
    async fn revealed(&self, id: NodeId, subject: &Subject) -> Result<Option<Verdict>, StoreError> {
        let Selection { audit, validator, .. } = &subject.selection;
        let Some(reveal) = self.of_validator::<VerdictReveal>(id, &self.run.verdict_reveal(validator, audit), validator).await? else {
            return Ok(None);
        };
        let commit = self.of_validator::<VerdictCommit>(id, &self.run.verdict_commit(validator, audit), validator).await?;
        let belongs = reveal.verdict.audit == *audit && reveal.verdict.payload == subject.contribution.payload;
        let opens = commit.is_some_and(|commit| commit.commitment == reveal.verdict.commitment(&reveal.salt));
        Ok((belongs && opens).then_some(reveal.verdict))
    }

    async fn of_validator<D: Document>(&self, id: NodeId, key: &str, validator: &AccountId) -> Result<Option<D>, StoreError> {
        let found = match self.get(id, key, None).await {
            Err(StoreError::NotFound { .. }) => None,
            found => found?,
        };
        let open =
            |object: storage::Object| self.plan.scheme.open::<D>(&object.bytes, &self.context, Expect::Account(validator), None).ok();
        Ok(found.and_then(open).map(|verified| verified.document))
    }
}

fn kind_of(input: &Input) -> u64 {
    match input {
        Input::Tick => 64,
        Input::Head(head) => 65 + (u64::from(head.is_some()) << 8),
        Input::Merge { t, .. } => 66 + (t << 8),
        Input::Block(_) => 67,
        Input::Chain(_) => 68,
        Input::Beacon { cycle, .. } => 69 + (cycle << 8),
        Input::Order { audit, .. } => 70 + (u64::from(audit.0[0]) << 8),
        Input::Judged { audit, .. } => 71 + (u64::from(audit.0[0]) << 8),
        Input::Committed { audit, .. } => 72 + (u64::from(audit.0[0]) << 8),
        Input::Revealed { audit, .. } => 73 + (u64::from(audit.0[0]) << 8),
        Input::Verdict { audit, .. } => 74 + (u64::from(audit.0[0]) << 8),
        Input::Weights(_) => 75,
        Input::LogHead { size, .. } => 76 + (size << 8),
        Input::Moved(_) => 77,
        Input::NoVerdict { audit } => 78 + (u64::from(audit.0[0]) << 8),
    }
}
