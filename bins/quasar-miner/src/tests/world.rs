//! The world around one learner. The test moves it; the learner sees it when it looks.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use daemon::Machine;
use model::{Batch, HostValues, Hyper, Routes, StepReport, ToyTrainer, TrainError, Trainer, TrainerState, toy_plan};
use protocol::documents::{
    AuditParameters, CatalogRef, Codec, FragmentHead, Head, InnerOptimizer, Job, Lease, LrSchedule, Notice, OpeningManifest, Progress,
    Pull, Receipt, ReleaseRef, RowRange, RunParameters, RunState,
};
use protocol::envelope::RunId;
use protocol::paths::{Keys, RunKeys};
use protocol::{AccountId, Digest, FragmentPlan, Method};
use storage::seal_stream;
use zeroize::Zeroizing;

use crate::edge::{Announced, Feedback, Keyframes, LeaseTokens, Plane, Spool, Staged, TokenStore};
use crate::machine::{
    Boundary, Effect, End, Found, GrantInfo, Input, Learner, LearnerSettings, Look, NotPrepared, PreparedPart, Put, Trouble,
};
use crate::trainer::Worker;

pub const FRAGMENTS: usize = 3;
pub const US: AccountId = AccountId([1; 32]);
pub const SLOT: u8 = 0;
pub const ROW_TOKENS: usize = 8;
pub const REPLAY_STEPS: u64 = 4;
pub const POLL_MS: u64 = 100;
pub const STEP_MS: u64 = 50;
pub const START_MS: u64 = 1_000_000;
/// What the orchestrator grants lives so long.
const GRANT_MS: u64 = 900_000;

pub fn parameters() -> RunParameters {
    RunParameters {
        fragments: FRAGMENTS as u16,
        inner_steps: 8,
        overlap: 2,
        grace_ppm: 800_000,
        cycles: 0,
        outer_lr_ppm: 1_000_000,
        outer_momentum_ppm: 0,
        step_target_ms: 0,
        poll_ms: POLL_MS,
        slots: 2,
        quorum_min: 1,
        pull_deadline_ms: 60_000,
        learner_ttl_ms: 10_000,
        sequence_length: ROW_TOKENS as u32,
        batch_rows: 2,
        lease_steps: 6,
        codec_up: Codec::Bf16,
        codec_down: Codec::Bf16,
        release_every_cycles: 0,
        inner: InnerOptimizer {
            lr_nano: 20_000_000,
            beta1_ppm: 900_000,
            beta2_ppm: 950_000,
            eps_pico: 10_000,
            weight_decay_ppm: 0,
            clip_norm_ppm: 1_000_000,
            schedule: LrSchedule { warmup_steps: 0, total_steps: 0, final_ppm: 0 },
        },
        audit: AuditParameters {
            rate_ppm: 1_000_000,
            loss_rows: 4,
            replay_steps: REPLAY_STEPS as u16,
            replay_tolerance_ppm: 10_000,
            beacon_blocks: 3,
            opening_ms: 60_000,
        },
        training: Default::default(),
    }
}

/// What openings are sealed to.
fn opening_key() -> (Zeroizing<[u8; 32]>, [u8; 32]) {
    seal_stream::key_pair(&[3; 32])
}

pub fn toy() -> ToyTrainer {
    ToyTrainer::new(toy_plan(FRAGMENTS), 5).unwrap()
}

/// The toy model, which can be told to meet values that are not finite.
pub struct Moody {
    pub toy: ToyTrainer,
    /// Steps that fail from now on.
    pub failures: Arc<AtomicU32>,
}

impl Trainer for Moody {
    fn plan(&self) -> &FragmentPlan {
        self.toy.plan()
    }

    fn step(&mut self, batch: &Batch, hyper: &Hyper, forced: Option<&Routes>, record: bool) -> Result<StepReport, TrainError> {
        if self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return Err(TrainError::NotFinite { what: "the loss", step: self.toy.steps() + 1 });
        }
        let mut report = self.toy.step(batch, hyper, forced, record)?;
        // The toy has no experts; something to recognise takes their place.
        report.routes = record.then(|| Routes(vec![self.toy.steps() as u16; 3]));
        Ok(report)
    }

    fn export(&self, fragment: usize) -> Result<Vec<f32>, TrainError> {
        self.toy.export(fragment)
    }

    fn contribute(&mut self, fragment: usize) -> Result<HostValues, TrainError> {
        self.toy.contribute(fragment)
    }

    fn apply(&mut self, fragment: usize, values: &[f32]) -> Result<(), TrainError> {
        Trainer::apply(&mut self.toy, fragment, values)
    }

    fn steps(&self) -> u64 {
        self.toy.steps()
    }

    fn state(&self) -> Result<TrainerState, TrainError> {
        self.toy.state()
    }

    fn restore(&mut self, state: &TrainerState) -> Result<(), TrainError> {
        self.toy.restore(state)
    }
}

pub fn lease(id: u64, steps: u32) -> Lease {
    let start = id * 1_000;
    Lease {
        id,
        rows: vec![RowRange { shard: "s".into(), start, end: start + 2 * u64::from(steps) }],
        seed: Digest::blake3(&id.to_le_bytes()),
        batch_rows: 2,
        steps,
        schedule_start: 100 * id,
        deadline_ms: START_MS + 600_000,
    }
}

/// Tokens of every row of every shard.
pub fn token(row: u64, column: usize) -> u32 {
    ((row + 1) * (column as u64 + 3) % 29) as u32
}

/// The head of a run that has just begun.
pub fn head() -> Head {
    Head {
        epoch: 1,
        state: RunState::Open,
        outer_step: 0,
        closed_below: 0,
        block: 1,
        run_step: 0,
        pulls: vec![],
        fragments: vec![FragmentHead { version: 0, length: 0, digest: Digest::ZERO }; FRAGMENTS],
        release: ReleaseRef { release: "base".into(), manifest: Digest::ZERO },
        catalog: CatalogRef { page: 0, digest: Digest::ZERO },
        ledger: Digest::ZERO,
        log: (&protocol::log::Frontier::default()).into(),
        notices: vec![],
    }
}

/// What the world does with uploads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    Works,
    /// Every presigned request answers 403.
    RefusesGrants,
    /// No request is ever answered.
    Hangs,
}

fn settings(session_epoch: u64, keys: &Keys, run: &RunKeys) -> LearnerSettings {
    LearnerSettings {
        worker: "w".into(),
        hotkey: US,
        slot: SLOT,
        session_epoch,
        keys: keys.clone(),
        run: run.clone(),
        parameters: parameters(),
        base_release: "base".into(),
        leases_max: None,
    }
}

pub struct World {
    pub now_ms: u64,
    pub session_epoch: u64,
    pub machine: Learner,
    worker: Worker,
    pub plane: Arc<Plane>,
    pub failures: Arc<AtomicU32>,
    pub run: RunKeys,
    pub keys: Keys,
    pub head: Head,
    pub job: Job,
    /// Session that the orchestrator echoes in grants, and whether it gives any.
    pub echo: Option<u64>,
    /// Pull grants for payloads (outer steps) and opening parts, as the orchestrator mints them.
    pub payload_grants: Vec<(u64, Digest)>,
    pub receipt_grants: Vec<(u64, Digest)>,
    pub opening_grants: Vec<(Digest, u8, Digest)>,
    pub shards_granted: bool,
    pub store: Store,
    pub registered: Option<bool>,
    pub moved: bool,
    /// Every record that reached the store.
    pub records: Vec<Progress>,
    pub boundaries: Vec<Boundary>,
    /// Payloads and opening parts that reached the store.
    pub uploads: Vec<String>,
    pub dropped: Vec<u64>,
    /// Receipts that were signed, by lease.
    pub receipts: BTreeMap<u64, Receipt>,
    later: BTreeMap<u64, VecDeque<Input>>,
    openings: crate::edge::OpeningFiles,
}

impl World {
    /// A learner that starts now in `folder`, which an earlier one may have left.
    pub fn new(folder: &Path, now_ms: u64) -> Self {
        Self::with_codec(folder, now_ms, Codec::Bf16)
    }

    /// The same, in a run whose payloads have this codec.
    pub fn with_codec(folder: &Path, now_ms: u64, codec: Codec) -> Self {
        let (keys, failures) = (Keys::new(24), Arc::new(AtomicU32::new(0)));
        let run = keys.run(RunId([7; 16]));
        let plane = Arc::new(Plane {
            keyframes: Keyframes::open(folder.join("fragments"), toy_plan(FRAGMENTS), (codec, Codec::Bf16)).unwrap(),
            staged: Staged::default(),
            tokens: TokenStore::default(),
            payloads: Announced::default(),
            spool: Spool::open(folder.join("spool"), now_ms, 24).unwrap(),
            feedback: codec.withholds().then(|| Feedback::open(folder.join("feedback")).unwrap()),
        });
        let mut trainer = Moody { toy: toy(), failures: failures.clone() };
        if let Some(path) = plane.spool.newest_state(trainer.plan().total_elements() as usize) {
            trainer.load(&mut std::fs::File::open(path).unwrap()).unwrap();
        }
        let machine = Learner::new(settings(now_ms, &keys, &run));
        let mut world = Self {
            now_ms,
            session_epoch: now_ms,
            machine,
            worker: Worker::new(Box::new(trainer), plane.clone(), parameters().inner),
            plane,
            failures,
            run,
            keys,
            head: head(),
            job: Job { hotkey: US, slot: SLOT, session_epoch: now_ms, leases: vec![lease(1, 6)] },
            echo: Some(now_ms),
            payload_grants: vec![],
            receipt_grants: vec![],
            opening_grants: vec![],
            shards_granted: true,
            store: Store::Works,
            registered: Some(true),
            moved: false,
            records: vec![],
            boundaries: vec![],
            uploads: vec![],
            dropped: vec![],
            receipts: BTreeMap::new(),
            later: BTreeMap::new(),
            openings: crate::edge::OpeningFiles::open(folder.join("openings"), u64::MAX).unwrap(),
        };
        for fragment in 0..FRAGMENTS {
            world.publish(fragment as u16, 0);
        }
        world
    }

    /// The values that version `version` of a fragment has in this world.
    pub fn values(fragment: u16, version: u64) -> Vec<f32> {
        let elements = toy_plan(FRAGMENTS).elements(usize::from(fragment)) as usize;
        (0..elements)
            .map(|n| ((n as f32) * 0.37 + version as f32).sin() * 0.125)
            .map(|value| f32::from_bits(value.to_bits() & 0xffff_0000))
            .collect()
    }

    /// A new version of a fragment is there.
    pub fn publish(&mut self, fragment: u16, version: u64) {
        let promise = self.plane.keyframes.plant(fragment, version, &Self::values(fragment, version));
        self.head.fragments[usize::from(fragment)] = FragmentHead { version, length: promise.length, digest: promise.digest };
    }

    pub fn open_pull(&mut self, t: u64) {
        let fragment = (t % FRAGMENTS as u64) as u16;
        let version = self.head.fragments[usize::from(fragment)].version;
        self.head.pulls.push(Pull { t, fragment, version, deadline_ms: self.now_ms + 60_000 });
    }

    pub fn notice(&mut self, audit: Digest, t: u64) {
        self.head.notices.push(Notice::OpenAudit {
            audit,
            hotkey: US,
            slot: SLOT,
            t,
            deadline_ms: self.now_ms + 60_000,
            key: opening_key().1,
        });
    }

    /// Mints what the newest record asks for.
    pub fn grant_uploads(&mut self) {
        if let Some(record) = self.records.last() {
            self.payload_grants = record.commitments.iter().map(|commitment| (commitment.t, commitment.sha256)).collect();
            self.receipt_grants = record.receipt.iter().map(|offer| (offer.lease, offer.sha256)).collect();
            self.opening_grants = record.openings.iter().map(|part| (part.audit, part.part, part.sha256)).collect();
        }
    }

    /// The learner stops after so many leases. To be called before anything runs.
    pub fn limit_leases(&mut self, most: u64) {
        self.machine = Learner::new(LearnerSettings { leases_max: Some(most), ..settings(self.session_epoch, &self.keys, &self.run) });
    }

    pub fn record(&self) -> &Progress {
        self.records.last().expect("a record was written")
    }

    pub fn end(&self) -> Option<&End> {
        self.machine.end()
    }

    /// Lets the world run for `span_ms`.
    pub fn run_for(&mut self, span_ms: u64) {
        let until = self.now_ms + span_ms;
        self.handle(Input::Tick);
        while self.end().is_none() {
            let next_input = self.later.first_key_value().map(|(at, _)| *at);
            let deadline = self.machine.deadline().inspect(|at| assert!(*at > self.now_ms, "a deadline in the past would spin"));
            let Some(at) = next_input.into_iter().chain(deadline).min().filter(|at| *at <= until) else { break };
            self.now_ms = at.max(self.now_ms);
            let input = match self.later.first_entry() {
                Some(mut entry) if *entry.key() <= self.now_ms => {
                    let input = entry.get_mut().pop_front();
                    if entry.get().is_empty() {
                        entry.remove();
                    }
                    input
                }
                _ => Some(Input::Tick),
            };
            self.handle(input.unwrap_or(Input::Tick));
        }
        self.now_ms = until;
    }

    pub fn handle(&mut self, input: Input) {
        self.machine.handle(self.now_ms, input);
        while let Some(effect) = self.machine.poll_effect() {
            self.perform(effect);
        }
    }

    fn answer(&mut self, after_ms: u64, input: Input) {
        self.later.entry(self.now_ms + after_ms).or_default().push_back(input);
    }

    fn grant(method: Method, key: String, sha256: Option<Digest>, now_ms: u64) -> GrantInfo {
        GrantInfo { method, key, sha256, expires_ms: now_ms + GRANT_MS }
    }

    fn standing(&self) -> Vec<GrantInfo> {
        let get = |key: String| Self::grant(Method::Get, key, None, self.now_ms);
        let mut grants = vec![
            Self::grant(Method::Put, self.run.progress(&US, SLOT), None, self.now_ms),
            get(self.keys.release_manifest("base")),
            get(self.keys.release_file("base", "config.json")),
        ];
        if self.echo == Some(self.session_epoch) {
            grants.extend(
                (0..FRAGMENTS as u16)
                    .flat_map(|fragment| (0..8).map(move |version| (fragment, version)))
                    .map(|(f, v)| get(self.run.keyframe(f, v))),
            );
        }
        grants
    }

    fn pull_grants(&self) -> Vec<GrantInfo> {
        let mut grants = Vec::new();
        if self.shards_granted {
            grants.push(Self::grant(Method::Get, self.keys.shard_tokens("s"), None, self.now_ms));
        }
        let payload = |(t, sha256): &(u64, Digest)| Self::grant(Method::Put, self.run.payload(&US, SLOT, *t), Some(*sha256), self.now_ms);
        grants.extend(self.payload_grants.iter().map(payload));
        let part = |(audit, part, sha256): &(Digest, u8, Digest)| {
            Self::grant(Method::Put, self.run.opening(&US, SLOT, audit, *part), Some(*sha256), self.now_ms)
        };
        grants.extend(self.opening_grants.iter().map(part));
        let receipt =
            |(lease, sha256): &(u64, Digest)| Self::grant(Method::Put, self.run.receipt(&US, SLOT, *lease), Some(*sha256), self.now_ms);
        grants.extend(self.receipt_grants.iter().map(receipt));
        grants
    }

    fn found(&self, at: Look) -> Found {
        match (at, self.echo) {
            (Look::Head, _) => Found::Head(Box::new(self.head.clone())),
            (Look::Moved, _) => Found::Moved(self.moved),
            (Look::Job, _) if !self.records.is_empty() => Found::Job(Box::new(self.job.clone())),
            (Look::Standing, Some(session_epoch)) => Found::Grants { session_epoch, grants: self.standing() },
            (Look::Pull, Some(session_epoch)) if !self.records.is_empty() => Found::Grants { session_epoch, grants: self.pull_grants() },
            _ => Found::Nothing,
        }
    }

    fn put(&mut self, what: String) -> Put {
        if self.store == Store::RefusesGrants {
            return Put::Grant;
        }
        self.uploads.push(what);
        Put::Stored
    }

    fn perform(&mut self, effect: Effect) {
        if self.store == Store::Hangs && matches!(effect, Effect::PutProgress(_) | Effect::PutPayload { .. } | Effect::PutOpening { .. }) {
            return;
        }
        match effect {
            Effect::Look(at) => self.answer(2, Input::Looked { at, found: self.found(at) }),
            Effect::CheckRegistration => self.answer(3, Input::Registration { registered: self.registered }),
            Effect::PutProgress(progress) => {
                let put = if self.store == Store::RefusesGrants { Put::Grant } else { Put::Stored };
                if put == Put::Stored {
                    self.records.push(*progress);
                }
                self.answer(3, Input::ProgressPut(put));
            }
            Effect::FetchBase => self.answer(20, Input::BaseFetched(Ok(()))),
            Effect::OpenTrainer => self.answer(20, Input::TrainerOpened(Ok(false))),
            Effect::FetchKeyframe { fragment, version, digest, .. } => {
                assert_eq!(digest, self.head.fragments[usize::from(fragment)].digest);
                let result = if self.store == Store::RefusesGrants { Err(Trouble::Grant) } else { Ok(()) };
                self.answer(4, Input::KeyframeFetched { fragment, version, result });
            }
            Effect::FetchTokens(lease) => {
                self.plane.tokens.insert(lease.id, LeaseTokens::made_up(&lease, ROW_TOKENS, token));
                self.answer(4, Input::TokensFetched { lease: lease.id, result: Ok(()) });
            }
            Effect::DropTokens { lease } => {
                // The step of the newest boundary is under way until it is reported.
                let in_use = self.later.values().flatten().any(|input| matches!(input, Input::Finished { step: Some(_), .. }))
                    && self.boundaries.last().and_then(|boundary| boundary.step.as_ref()).is_some_and(|step| step.lease == lease);
                assert!(!in_use, "the trainer still reads these rows");
                self.plane.tokens.remove(lease);
            }
            Effect::Boundary(boundary) => self.pass(*boundary),
            Effect::PutPayload { t } => {
                assert!(self.plane.payloads.get(t).is_some());
                let put = self.put(format!("payload {t}"));
                self.answer(5, Input::PayloadPut { t, put });
            }
            Effect::DropPayload { t } => self.dropped.push(t),
            Effect::PrepareReceipt(receipt) => {
                let (lease, bytes) = (receipt.lease, protocol::codec::encode(&*receipt));
                self.receipts.insert(lease, *receipt);
                self.answer(2, Input::ReceiptPrepared { lease, signed: Some((bytes.len() as u64, Digest::sha256(&bytes))) });
            }
            Effect::PutReceipt { lease } => {
                let put = self.put(format!("receipt {lease}"));
                self.answer(5, Input::ReceiptPut { lease, put });
            }
            Effect::DropReceipt { .. } => {}
            Effect::PrepareOpening { audit, t, key } => {
                let parts = self.prepare(audit, t, key);
                self.answer(5, Input::OpeningPrepared { audit, parts });
            }
            Effect::PutOpening { audit, part } => {
                let put = self.put(format!("opening {part}"));
                self.answer(5, Input::OpeningPut { audit, part, put });
            }
            Effect::KeepOpenings { asked, .. } => self.openings.retain(|audit| asked.iter().any(|(of, _)| of == audit)),
        }
    }

    fn pass(&mut self, boundary: Boundary) {
        let told = std::sync::Mutex::new(Vec::new());
        let result = self.worker.pass(&boundary, &|input| {
            told.lock().unwrap().push(input);
            true
        });
        let number = boundary.number;
        self.boundaries.push(boundary);
        for input in told.into_inner().unwrap() {
            self.answer(1, input);
        }
        self.answer(
            STEP_MS,
            match result {
                Ok(step) => Input::Finished { number, step },
                Err(fault) => Input::Faulted { number, fault },
            },
        );
    }

    fn prepare(&self, audit: Digest, t: u64, key: [u8; 32]) -> Result<Vec<PreparedPart>, NotPrepared> {
        let sign = |manifest: &OpeningManifest| protocol::codec::encode(manifest);
        let spool = (&self.plane.spool, toy().plan().total_elements() as usize);
        let mut commitments = self.records.iter().flat_map(|record| &record.commitments);
        let payload = commitments.rfind(|commitment| commitment.t == t).ok_or(NotPrepared::Gone)?.blake3;
        let preparation = self.openings.begin(audit);
        self.openings.prepare((&preparation, t, &payload), &key, |part| vec![part], spool, sign).map_err(|_| NotPrepared::Gone)
    }

    /// A part of a prepared opening, as its validator sees it.
    pub fn opening_part(&self, audit: &Digest, part: u8) -> Vec<u8> {
        let (sealed, mut plain) = (self.openings.read(audit, part, 0..u64::MAX).unwrap(), Vec::new());
        seal_stream::open(&opening_key().0, &[part], &mut &sealed[..], &mut plain, 1 << 30).unwrap();
        plain
    }
}
