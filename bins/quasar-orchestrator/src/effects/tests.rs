//! Two orchestrators on one bucket: whatever their order, one merge, one head, one set of bytes.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use chain::{Hyperparameters, MemoryChain, MemorySettings};
use daemon::driver::recover;
use daemon::sequence::Sequence;
use daemon::{Exit, Journal, Machine, Shutdown};
use fragments::codec::{self, PayloadHeader};
use fragments::keyframe::{self, KeyframeId};
use fragments::state::{FragmentState, StateHeader};
use protocol::documents::{
    AuditParameters, CatalogRef, Codec, Commitment, CurrentRun, FragmentHead, FragmentManifest, Head, InnerOptimizer, Job, LearnerState,
    Lease, LrSchedule, MergeManifest, Progress, ReleaseRef, RowRange, RunManifest, RunParameters, Tape, TapeInput,
};
use protocol::envelope::{Context, Document, RunId, sign};
use protocol::log::{Frontier, LogEntry, LogHead, LogKind};
use protocol::paths::Keys;
use protocol::{AccountId, DType, Digest, Ed25519Signer, FileRecord, FragmentPlan, MergeRule, Reason, ShardManifest, Signer, Slice};
use storage::{MemoryStore, ObjectStore, PutCondition, StoreError};
use zeroize::Zeroizing;

use super::Service;
use super::fence::{Fence, FenceSettings, Lost, Wait};
use crate::machine::{FragmentSetup, Input, LEASE_EPOCH_SHIFT, Orchestrator, RunSetup, ShardRows};
use crate::takeover;

const NETUID: u16 = 24;
const ELEMENTS: usize = 256;
const LEASE: Duration = Duration::from_secs(2);

fn plan() -> FragmentPlan {
    let slice = |fragment: u64| Slice {
        tensor: format!("layer{fragment}"),
        row_start: 0,
        row_end: 4,
        row_elements: ELEMENTS as u64 / 4,
        unit_rows: 4,
        dtype: DType::Bf16,
        rule: MergeRule::Rda,
    };
    FragmentPlan { fragments: vec![vec![slice(0)], vec![slice(1)]] }
}

fn parameters() -> RunParameters {
    RunParameters {
        fragments: 2,
        inner_steps: 2,
        overlap: 1,
        grace_ppm: 800_000,
        cycles: 0,
        outer_lr_ppm: 700_000,
        outer_momentum_ppm: 900_000,
        step_target_ms: 0,
        poll_ms: 100,
        slots: 2,
        quorum_min: 1,
        pull_deadline_ms: 10_000,
        learner_ttl_ms: 5_000,
        sequence_length: 128,
        batch_rows: 4,
        lease_steps: 24,
        codec_up: Codec::Bf16,
        codec_down: Codec::Bf16,
        release_every_cycles: 0,
        inner: InnerOptimizer {
            lr_nano: 1,
            beta1_ppm: 1,
            beta2_ppm: 1,
            eps_pico: 1,
            weight_decay_ppm: 0,
            clip_norm_ppm: 1,
            schedule: LrSchedule { warmup_steps: 0, total_steps: 0, final_ppm: 0 },
        },
        audit: AuditParameters { loss_rows: 16, replay_steps: 4, replay_tolerance_ppm: 1, beacon_blocks: 3, opening_ms: 20_000 },
        training: Default::default(),
    }
}

/// A bucket with a run that has just been created.
struct Bucket {
    store: MemoryStore,
    context: Context,
    signer: Arc<Ed25519Signer>,
    setup: RunSetup,
}

fn chain() -> MemoryChain {
    MemoryChain::new(MemorySettings {
        netuid: NETUID,
        seed: 1,
        hyperparameters: Hyperparameters {
            tempo: 30,
            weights_rate_limit: 2,
            min_allowed_weights: 1,
            max_weight_limit: u16::MAX,
            weights_version: 0,
            commit_reveal: false,
            stake_threshold: 0,
        },
        neurons: Vec::new(),
        owner_hotkey: None,
    })
}

fn miner(index: u8) -> AccountId {
    Ed25519Signer::from_seed([index; 32]).key().account()
}

impl Bucket {
    async fn new() -> Self {
        let context = Context { genesis: [2; 32], netuid: NETUID, run: RunId([3; 16]) };
        let mut bucket = Self {
            store: MemoryStore::new(),
            context,
            signer: Arc::new(Ed25519Signer::from_seed([1; 32])),
            setup: RunSetup {
                run: context.run,
                parameters: parameters(),
                release: ReleaseRef { release: "base".into(), manifest: Digest::ZERO },
                fragments: Vec::new(),
                catalog: CatalogRef { page: 0, digest: Digest::ZERO },
                shards: vec![ShardRows { id: "a".into(), source: "a source".into(), rows: 1_000, row_tokens: 128 }],
            },
        };
        let (plan, keys) = (plan(), Keys::new(NETUID).run(context.run));
        let mut heads = Vec::new();
        for fragment in 0..2u16 {
            let theta: Vec<f32> = (0..ELEMENTS).map(|at| (at as f32 - 100.0) / 64.0 + f32::from(fragment)).collect();
            let id = KeyframeId { plan: plan.digest(), fragment: u32::from(fragment), version: 0 };
            let frame = keyframe::write(&plan, &id, &theta).unwrap();
            let has_momentum = parameters().outer_momentum_ppm > 0;
            let header = StateHeader {
                plan: plan.digest(),
                fragment: u64::from(fragment),
                version: 0,
                elements: ELEMENTS as u64,
                momentum: has_momentum,
            };
            let state = FragmentState::new(theta, has_momentum).to_bytes(&header).unwrap();
            let record = FileRecord::of_bytes(keys.keyframe(fragment, 0), &frame);
            let setup = FragmentSetup {
                keyframe: record.blake3,
                keyframe_length: record.length,
                state: Digest::blake3(&state),
                elements: ELEMENTS as u64,
                payload_length: PayloadHeader::bf16(&plan, plan.digest(), usize::from(fragment), 0).payload_bytes(),
            };
            heads.push(FragmentHead { version: 0, length: record.length, digest: record.blake3 });
            let manifest = FragmentManifest { fragment, version: 0, t: u64::MAX, keyframe: record, delta: None, state: setup.state };
            bucket.setup.fragments.push(setup);
            bucket.put(&keys.state(fragment, 0), state).await;
            bucket.put(&keys.keyframe(fragment, 0), frame).await;
            bucket.publish(&keys.fragment_manifest(fragment, 0), &manifest).await;
        }
        let head = Head::first(heads, bucket.setup.release.clone(), bucket.setup.catalog);
        bucket.publish(&keys.head(), &head).await;
        bucket
    }

    async fn put(&self, key: &str, bytes: Vec<u8>) {
        self.store.put(key, Bytes::from(bytes), PutCondition::Always).await.unwrap();
    }

    async fn publish<D: Document>(&self, key: &str, document: &D) {
        self.put(key, sign(document, &self.context, &*self.signer, 1, 1_000)).await;
    }

    /// An orchestrator whose state is in `folder`, with the lease.
    async fn orchestrator(&self, folder: &Path) -> (Arc<Service>, Arc<Journal>) {
        let signers = vec![self.signer.key()];
        let keys = Keys::new(NETUID).run(self.context.run);
        let last = super::fence::read_lease(&self.store, &keys.writer_lease(), &self.context, &signers).await.unwrap();
        let (journal, instance) = takeover::open_journal(folder, last.as_ref().map(|(lease, _)| &lease.document)).unwrap();
        let journal = Arc::new(journal);
        let sequence = Arc::new(Sequence::open(journal.clone(), "orchestrator").unwrap());
        let shutdown = Shutdown::new();
        let settings = FenceSettings {
            store: Arc::new(self.store.clone()),
            key: keys.writer_lease(),
            context: self.context,
            signer: self.signer.clone(),
            signers: signers.clone(),
            sequence: sequence.clone(),
            instance,
            host: folder.display().to_string(),
            lease: LEASE,
        };
        let fence = Arc::new(Fence::acquire(settings, Wait::Standby, &shutdown).await.unwrap().unwrap());
        for name in ["payloads", "states", "releases"] {
            std::fs::create_dir_all(folder.join(name)).unwrap();
        }
        let plan = plan();
        let service = Service {
            store: Arc::new(self.store.clone()),
            chain: Arc::new(chain()),
            signer: self.signer.clone(),
            sequence,
            fence,
            signers,
            context: self.context,
            keys: Keys::new(NETUID),
            run: keys,
            manifest: RunManifest {
                run: self.context.run,
                name: "test".into(),
                protocol_min: 1,
                protocol_max: 1,
                created_ms: 0,
                plan: plan.digest(),
                base_release: "base".into(),
                base_manifest: Digest::ZERO,
                catalog: Vec::new(),
                parameters: parameters(),
            },
            current: CurrentRun { root_version: 1, root_digest: Digest::ZERO, run: self.context.run, manifest_digest: Digest::ZERO },
            plan_digest: plan.digest(),
            plan: Arc::new(plan),
            shards: Vec::new(),
            base_files: Vec::new(),
            opening_secret: Zeroizing::new([0; 32]),
            base_tree: folder.join("base"),
            state_dir: folder.to_owned(),
            stopped: Default::default(),
            shutdown,
            watched: Default::default(),
            certificates: std::sync::Mutex::new(Some(Default::default())),
            records: Default::default(),
            head_etag: Default::default(),
            outbox: Default::default(),
            recorded: Default::default(),
        };
        (Arc::new(service), journal)
    }

    /// Uploads what `miners` contribute to outer step `t`, and gives the tape of it.
    async fn tape(&self, t: u64, base_version: u64, epoch: u64, miners: &[u8]) -> Tape {
        let (plan, keys) = (plan(), Keys::new(NETUID).run(self.context.run));
        let fragment = (t % 2) as u16;
        let mut inputs = Vec::new();
        for index in miners {
            let values: Vec<f32> = (0..ELEMENTS).map(|at| ((at * 7 + usize::from(*index) * 13) % 29) as f32 / 512.0).collect();
            let header = PayloadHeader::bf16(&plan, plan.digest(), usize::from(fragment), base_version);
            let bytes = codec::encode(&header, &values).unwrap();
            let (hotkey, payload, length) = (miner(*index), Digest::blake3(&bytes), bytes.len() as u64);
            self.put(&keys.payload(&hotkey, 0, t), bytes).await;
            let weight_ppm = 1_000_000 / miners.len() as u64;
            inputs.push(TapeInput {
                hotkey,
                slot: 0,
                commitment: Digest::derive("commitment", &[&[*index], &t.to_le_bytes()]),
                payload,
                length,
                base_version,
                steps: 4,
                tokens: 2_048,
                weight_ppm,
            });
        }
        inputs.sort_by_key(|input| (input.hotkey, input.slot));
        Tape { t, fragment, epoch, base_version, base_state: Digest::ZERO, block: 5, closing: false, restores: None, step_mean: 0, inputs }
    }

    fn fresh(&self) -> Orchestrator {
        Orchestrator::new(self.setup.clone())
    }

    /// Everything that lies there, for comparison.
    async fn objects(&self) -> Vec<(String, Option<String>)> {
        self.store.list("quasar/").await.unwrap().into_iter().map(|meta| (meta.key, meta.etag)).collect()
    }
}

#[tokio::test]
async fn a_writer_that_lost_its_lease_never_moves_the_head_again() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (first, journal) = bucket.orchestrator(folder.path()).await;
    let claimed = first.claim_head(first.fence.epoch().await).await.unwrap();
    assert_eq!(claimed.epoch, 1);
    first.publish_head(&Head { outer_step: 3, ..claimed.clone() }).await;
    drop(journal);
    // The same disk in a new process, while the old one still runs somewhere: a paused virtual machine.
    let journal_of = folder.path().join("twin");
    std::fs::create_dir_all(&journal_of).unwrap();
    let (second, _journal) = bucket.orchestrator(&journal_of).await;
    let taken = second.claim_head(second.fence.epoch().await).await.unwrap();
    assert_eq!((taken.epoch, taken.outer_step), (2, 3), "what the first one wrote until then stands");
    second.publish_head(&Head { outer_step: 4, ..taken }).await;

    let key = first.run.head();
    let before = bucket.store.get(&key, 1 << 20).await.unwrap().bytes;
    let late = Head { outer_step: 99, ..claimed };
    let write = first.publish_head(&late);
    assert!(tokio::time::timeout(Duration::from_secs(1), write).await.is_err(), "it waits for ever, and stops");
    assert_eq!(bucket.store.get(&key, 1 << 20).await.unwrap().bytes, before);
    assert!(first.fence.renew().await.is_err() && !second.fence.is_lost());
    assert!(
        tokio::time::timeout(Duration::from_secs(1), first.put_latest("quasar/job", 1, || Ok(Bytes::from_static(b"x")))).await.is_err()
    );
    assert!(matches!(bucket.store.head("quasar/job").await, Err(StoreError::NotFound { .. })));
}

/// A store that answers questions about one key only once it is told to, and fails the next so many writes of leases.
struct Slow {
    inner: MemoryStore,
    key: &'static str,
    failing: std::sync::atomic::AtomicU32,
    asked: tokio::sync::Notify,
    go_on: tokio::sync::Notify,
}

#[async_trait::async_trait]
impl ObjectStore for Slow {
    async fn get_if_changed(&self, key: &str, etag: Option<&str>, limit: u64) -> Result<Option<storage::Object>, StoreError> {
        if key == self.key {
            self.asked.notify_one();
            self.go_on.notified().await;
        }
        self.inner.get_if_changed(key, etag, limit).await
    }

    async fn get_range(&self, key: &str, start: u64, end: u64) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, start, end).await
    }

    async fn head(&self, key: &str) -> Result<storage::ObjectMeta, StoreError> {
        self.inner.head(key).await
    }

    async fn put(&self, key: &str, bytes: Bytes, condition: PutCondition) -> Result<String, StoreError> {
        let left = |failing: u32| failing.checked_sub(1);
        if key.ends_with("writer.qsr") && self.failing.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).is_ok() {
            return Err(StoreError::Unavailable { key: key.to_owned(), reason: "no answer".into() });
        }
        self.inner.put(key, bytes, condition).await
    }

    async fn put_file(&self, key: &str, path: &Path, file: &FileRecord) -> Result<(), StoreError> {
        self.inner.put_file(key, path, file).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<storage::ObjectMeta>, StoreError> {
        self.inner.list(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner.delete(key).await
    }

    fn presign(&self, request: &storage::Presign) -> Result<protocol::GrantRequest, StoreError> {
        self.inner.presign(request)
    }
}

#[tokio::test]
async fn a_writer_that_slept_while_it_looked_at_a_key_overwrites_nothing_of_its_successor() {
    const KEY: &str = "quasar/job";
    let (bucket, folder, other) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, _journal) = bucket.orchestrator(folder.path()).await;
    let slow = Arc::new(Slow {
        inner: bucket.store.clone(),
        key: KEY,
        failing: Default::default(),
        asked: Default::default(),
        go_on: Default::default(),
    });
    let Ok(mut first) = Arc::try_unwrap(first) else { panic!("nobody else holds it") };
    first.store = slow.clone();
    let first = Arc::new(first);
    let writing = tokio::spawn({
        let first = first.clone();
        async move { first.put_latest(KEY, 1, || Ok(Bytes::from_static(b"old"))).await }
    });
    slow.asked.notified().await;
    // It held the lease when it asked; nobody renews it, and the successor writes there.
    let (second, _journal) = bucket.orchestrator(other.path()).await;
    second.put_latest(KEY, 1, || Ok(Bytes::from_static(b"new"))).await;
    slow.go_on.notify_one();
    assert!(tokio::time::timeout(Duration::from_secs(1), writing).await.is_err(), "it waits for a lease that never comes back");
    assert_eq!(bucket.store.get(KEY, 16).await.unwrap().bytes, "new");
}

#[tokio::test]
async fn what_a_writer_signs_follows_what_its_predecessor_signed_with_a_clock_that_was_ahead() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (writer, _journal) = bucket.orchestrator(folder.path()).await;
    let job = |leases| Job { hotkey: miner(5), slot: 0, session_epoch: 1, leases };
    let key = writer.run.job(&miner(5), 0);
    let ahead_ms = daemon::clock::now_ms() + 600_000;
    let theirs = sign(&job(Vec::new()), &bucket.context, &*bucket.signer, ahead_ms, ahead_ms);
    bucket.store.put(&key, Bytes::from(theirs), PutCondition::Always).await.unwrap();
    writer.publish_job(1, &job(Vec::new())).await;
    let ours = writer.open_own::<Job>(&bucket.store.get(&key, 1 << 20).await.unwrap().bytes).unwrap();
    assert!(ours.header.sequence > ahead_ms, "{} after {ahead_ms}", ours.header.sequence);
}

#[tokio::test]
async fn a_lease_is_confirmed_by_the_store_and_not_by_its_silence() {
    let (bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let slow =
        Arc::new(Slow { inner: bucket.store.clone(), key: "", failing: 0.into(), asked: Default::default(), go_on: Default::default() });
    let settings = |store: Arc<dyn ObjectStore>, folder: &Path| FenceSettings {
        store,
        key: Keys::new(NETUID).run(bucket.context.run).writer_lease(),
        context: bucket.context,
        signer: bucket.signer.clone(),
        signers: vec![bucket.signer.key()],
        sequence: Arc::new(Sequence::open(Arc::new(Journal::open(folder).unwrap()), "orchestrator").unwrap()),
        instance: [1; 16],
        host: "host".into(),
        lease: LEASE,
    };
    let acquire = async |settings| Fence::acquire(settings, Wait::Standby, &Shutdown::new()).await.unwrap().unwrap();
    let first = acquire(settings(slow.clone(), one.path())).await;
    let second = acquire(settings(Arc::new(bucket.store.clone()), two.path())).await;
    slow.failing.store(3, Ordering::Relaxed);
    assert_eq!(first.renew().await, Ok(()), "nobody has said anything");
    assert_eq!(first.confirm().await, Err(Lost));
    assert_eq!(second.confirm().await, Ok(()));
}

#[tokio::test]
async fn a_commitment_that_was_exchanged_after_it_was_taken_in_is_evidence_of_nothing() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let learner = Ed25519Signer::from_seed([7; 32]);
    let slot = (learner.key().account(), 0);
    let record = |payload: Digest, loss: i64| {
        let commitment = Commitment {
            t: 4,
            fragment: 0,
            base_version: 0,
            length: 64,
            sha256: payload,
            blake3: payload,
            steps: 1,
            tokens: 128,
            lease: 1,
            lease_step: 1,
            local_step: 1,
            start_step: 0,
            start_digest: Digest::ZERO,
            step_chain: Digest::ZERO,
        };
        let record = Progress {
            worker: "learner".into(),
            session_epoch: 1,
            slot: 0,
            protocol: 1,
            state: LearnerState::Training,
            reason: Reason::None,
            lease: 1,
            lease_step: 1,
            local_step: 1,
            step_ms: 1,
            loss,
            step_chain: Digest::ZERO,
            fragments: Vec::new(),
            commitments: vec![commitment],
            uploaded: Vec::new(),
            openings: Vec::new(),
            receipt: None,
            padding: Vec::new(),
        };
        sign(&record, &bucket.context, &learner, 1, 1_000)
    };
    let [taken, other] = [1, 2].map(|number| Digest::blake3(&[number]));
    let newest = service.run.progress(&slot.0, slot.1);
    let evidence = service.run.commitment(&slot.0, slot.1, 4);
    // A process that has just begun knows no record yet, and the learner has put another payload into its own.
    bucket.put(&newest, record(other, 0)).await;
    assert_eq!(service.store_commitment(slot, 4, Digest::ZERO, taken).await, Some(Err(Reason::RepeatedCommitment)));
    assert!(matches!(bucket.store.head(&evidence).await, Err(StoreError::NotFound { .. })), "nothing was kept");
    // A later record with the same commitment is as good as the one that was read.
    bucket.put(&newest, record(taken, 1)).await;
    let kept = service.store_commitment(slot, 4, Digest::ZERO, taken).await.unwrap().unwrap();
    // What was kept stays, whatever the learner says afterwards.
    bucket.put(&newest, record(other, 2)).await;
    assert_eq!(service.store_commitment(slot, 4, Digest::ZERO, taken).await, Some(Ok(kept)));
    assert_eq!(service.store_commitment(slot, 4, Digest::ZERO, other).await, Some(Err(Reason::RepeatedCommitment)));
}

#[tokio::test]
async fn the_log_does_not_fork_where_two_writers_add_to_it() {
    let entries = |numbers: &[u8]| -> Vec<LogEntry> {
        numbers.iter().map(|number| LogEntry { kind: LogKind::Merge, document: Digest::blake3(&[*number]) }).collect()
    };
    let after = |before: &Frontier, numbers: &[u8]| {
        let entries = entries(numbers);
        LogHead { previous: before.size(), frontier: before.extended(&entries), entries }
    };
    let (bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, _journal) = bucket.orchestrator(one.path()).await;
    let old = after(&Frontier::default(), &[1, 2]);
    assert_eq!(first.publish_log(&old).await, old);
    // The successor has read the bucket before that, and would go on from there with fewer entries.
    let (second, _journal) = bucket.orchestrator(two.path()).await;
    assert_eq!(second.publish_log(&after(&Frontier::default(), &[3])).await, old, "what follows is fixed");
    assert!(matches!(bucket.store.head(&second.run.log(1)).await, Err(StoreError::NotFound { .. })));
    // One that was fixed by a writer that died before it showed it is shown by whoever comes next.
    let fixed = after(&old.frontier, &[4, 5]);
    bucket.publish(&second.run.log_after(2), &fixed).await;
    assert_eq!(second.publish_log(&after(&old.frontier, &[6])).await, fixed);
    assert!(bucket.store.head(&second.run.log(4)).await.is_ok());
}

#[tokio::test]
async fn whoever_completes_a_step_from_its_tape_writes_the_same_bytes() {
    let (bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, _journal) = bucket.orchestrator(one.path()).await;
    let wanted = bucket.tape(0, 0, 1, &[11, 12, 13]).await;
    let tape = first.write_tape(&wanted).await;
    let (manifest, id, length) = first.merge(tape.clone(), Vec::new(), (Digest::ZERO, 0)).await;
    assert_eq!((manifest.version, manifest.accepted().count()), (1, 3));
    let other = bucket.tape(0, 0, 2, &[11]).await;
    let objects = bucket.objects().await;
    first.fence.release().await;

    // A successor decides otherwise: the tape stands, and the merge comes out the same, from objects in the bucket alone.
    let (second, _journal) = bucket.orchestrator(two.path()).await;
    let stands = second.write_tape(&other).await;
    assert_eq!(stands, tape);
    let (again, same_id, same_length) = second.merge(stands, Vec::new(), (Digest::ZERO, 0)).await;
    assert_eq!((again, same_id, same_length), (manifest.clone(), id, length));
    let after: Vec<_> = bucket.objects().await;
    let changed: Vec<&String> = after.iter().filter(|object| !objects.contains(object)).map(|(key, _)| key).collect();
    assert_eq!(changed, [&second.run.writer_lease()], "nothing but the lease moved");
    let state = bucket.store.get(&second.run.state(0, 1), 1 << 20).await.unwrap().bytes;
    assert_eq!(Digest::blake3(&state), manifest.state);
}

/// A checkpoint with the tensors of [`plan`] and one that training leaves alone.
fn write_base_tree(folder: &Path) {
    let bytes = 2 * ELEMENTS;
    let entry =
        |at: usize| serde_json::json!({"dtype": "BF16", "shape": [4, ELEMENTS / 4], "data_offsets": [at * bytes, (at + 1) * bytes]});
    let header = serde_json::json!({"layer0": entry(0), "layer1": entry(1), "rotary.inv_freq": entry(2)}).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend((0..3 * bytes).map(|at| (at % 59) as u8));
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
    std::fs::write(folder.join("config.json"), "{}").unwrap();
}

#[tokio::test]
async fn a_release_is_made_again_bit_for_bit_from_the_tapes_by_somebody_who_has_seen_nothing_else() {
    let (first, one) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (second, two) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (maker, _journal) = first.orchestrator(one.path()).await;
    let (other, _journal) = second.orchestrator(two.path()).await;
    write_base_tree(&maker.base_tree);
    write_base_tree(&other.base_tree);
    let mut base = [(Digest::ZERO, 0); 2];
    for t in 0..6 {
        let (fragment, version) = ((t % 2) as usize, t / 2);
        let tape = maker.write_tape(&first.tape(t, version, 1, &[11, 12, 13][..1 + (t % 3) as usize]).await).await;
        let (manifest, _, length) = maker.merge(tape, Vec::new(), base[fragment]).await;
        assert_eq!(manifest.version, version + 1);
        base[fragment] = (manifest.keyframe, length);
    }
    let release = maker.release(vec![3, 3], 1_000).await;

    for meta in first.store.list("quasar/").await.unwrap() {
        if meta.key.contains("/tape/") || meta.key.ends_with("/payload.qfd") {
            second.put(&meta.key, first.store.get(&meta.key, 1 << 20).await.unwrap().bytes.to_vec()).await;
        }
    }
    let mut base = [(Digest::ZERO, 0); 2];
    for t in 0..6 {
        let bytes = second.store.get(&other.run.tape(t), 1 << 20).await.unwrap().bytes;
        let tape = other.open_own::<Tape>(&bytes).unwrap().document;
        let (manifest, _, length) = other.merge(tape, Vec::new(), base[(t % 2) as usize]).await;
        base[(t % 2) as usize] = (manifest.keyframe, length);
    }
    let again = other.release(vec![3, 3], 1_000).await;
    assert_eq!(again.release, release.release);
    let prefix = maker.keys.release_file(&release.release, "");
    let files = async |store: &MemoryStore| {
        let mut files = Vec::new();
        for meta in store.list(&prefix).await.unwrap().into_iter().filter(|meta| !meta.key.ends_with("manifest.qsr")) {
            files.push((meta.key.clone(), store.get(&meta.key, 1 << 20).await.unwrap().bytes));
        }
        files
    };
    let made = files(&first.store).await;
    assert!(made.iter().any(|(key, _)| key.ends_with("model.safetensors")) && made.len() >= 3, "{made:?}");
    assert_eq!(made, files(&second.store).await);
    let base_file = std::fs::read(maker.base_tree.join("model.safetensors")).unwrap();
    let moved = &made.iter().find(|(key, _)| key.ends_with("model.safetensors")).unwrap().1;
    assert_ne!(moved[..], base_file[..], "it was trained");
    assert_eq!(moved[moved.len() - 2 * ELEMENTS..], base_file[base_file.len() - 2 * ELEMENTS..], "what is not trained stays");
}

#[tokio::test]
async fn a_rollback_publishes_the_earlier_state_bit_for_bit() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    for (t, version) in [(0, 0), (2, 1)] {
        let tape = bucket.tape(t, version, 1, &[11, 12]).await;
        service.merge(tape, Vec::new(), (Digest::ZERO, 0)).await;
    }
    let (before, after) = (service.state(0, 1).await, service.state(0, 2).await);
    assert_ne!(before.theta, after.theta);
    let tape = Tape { t: 4, base_version: 2, restores: Some(1), inputs: Vec::new(), ..bucket.tape(4, 2, 1, &[]).await };
    let (manifest, ..) = service.merge(tape, Vec::new(), (Digest::ZERO, 0)).await;
    assert_eq!((manifest.version, manifest.contributions.len()), (3, 0));
    let restored = service.state(0, 3).await;
    assert_eq!((&restored.theta, &restored.momentum), (&before.theta, &before.momentum));
}

#[tokio::test]
async fn a_successor_without_the_disk_goes_on_from_the_bucket_alone() {
    let (bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, journal) = bucket.orchestrator(one.path()).await;
    let head = first.claim_head(1).await.unwrap();
    let (recovered, _) = takeover::recover(&first, &journal, head.clone(), bucket.fresh()).await.unwrap();
    let snapshot = recovered.machine.to_snapshot(5_000).unwrap();
    first.put_latest(&first.run.snapshot(), 1, || Ok(Bytes::from(snapshot.clone()))).await;
    // After the snapshot: one merge whole, one taped only, two leases, and the head knows of three steps.
    let merged = first.write_tape(&bucket.tape(0, 0, 1, &[11, 12]).await).await;
    let (manifest, ..) = first.merge(merged, Vec::new(), (Digest::ZERO, 0)).await;
    first.write_tape(&bucket.tape(1, 0, 1, &[11]).await).await;
    // Records are written beside each other: that of the lease between them is missing.
    for (index, start) in [(0u8, 0u64), (2, 96)] {
        // Ids of a writer's first life begin at its epoch.
        let id = (1 << LEASE_EPOCH_SHIFT) + u64::from(index);
        let rows = vec![RowRange { shard: "a".into(), start, end: start + 96 }];
        let lease = Lease { id, rows, seed: Digest::ZERO, batch_rows: 4, steps: 24, schedule_start: 0, deadline_ms: 0 };
        first.publish_job(id, &Job { hotkey: miner(11 + index), slot: 0, session_epoch: 7, leases: vec![lease] }).await;
    }
    first.publish_head(&Head { outer_step: 3, ..head }).await;
    first.fence.release().await;
    drop(journal);

    let (second, journal) = bucket.orchestrator(two.path()).await;
    let head = second.claim_head(second.fence.epoch().await).await.unwrap();
    let (recovered, input) = takeover::recover(&second, &journal, head.clone(), bucket.fresh()).await.unwrap();
    assert!(matches!(input, Input::Claimed { epoch: 2 }));
    let machine = &recovered.machine;
    assert_eq!((machine.fragment_versions(), machine.closed_below()), (vec![1, 0], 1));
    assert_eq!(machine.ledger().totals().leased_rows, 192);
    assert_eq!(machine.status().contributions, manifest.accepted().count() as u64);
    // A crash right here finds the journal complete: the same machine, and the taped step is merged.
    drop(recovered);
    let mut again = recover(&journal, || -> Orchestrator { unreachable!() }).unwrap();
    assert_eq!((again.machine.fragment_versions(), again.machine.ledger().totals().leased_rows), (vec![1, 0], 192));
    again.machine.handle(again.last_ms, input);
    let merges = std::iter::from_fn(|| again.machine.poll_effect())
        .filter(|effect| matches!(effect, crate::machine::Effect::Merge { tape, .. } if tape.t == 1))
        .count();
    assert_eq!(merges, 1);
}

#[tokio::test]
async fn a_disk_that_was_set_back_to_an_older_copy_does_not_move_the_head_back() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, journal) = bucket.orchestrator(folder.path()).await;
    let head = service.claim_head(1).await.unwrap();
    let (old, _) = takeover::recover(&service, &journal, head.clone(), bucket.fresh()).await.unwrap();
    assert!(!old.machine.is_behind(&head));
    // The journal remembers nothing of this merge and of the head that names it.
    let merged = service.write_tape(&bucket.tape(0, 0, 1, &[11, 12]).await).await;
    let (manifest, _, length) = service.merge(merged, Vec::new(), (Digest::ZERO, 0)).await;
    let mut later = Head { outer_step: 1, closed_below: 1, ..head };
    later.fragments[0] = FragmentHead { version: manifest.version, length, digest: manifest.keyframe };
    service.publish_head(&later).await;
    let head = service.claim_head(2).await.unwrap();
    let (recovered, _) = takeover::recover(&service, &journal, head.clone(), bucket.fresh()).await.unwrap();
    assert_eq!((recovered.machine.fragment_versions(), recovered.machine.closed_below()), (vec![1, 0], 1));
    // The journal holds that from now on.
    let again = recover(&journal, || -> Orchestrator { unreachable!() }).unwrap();
    assert!(!again.machine.is_behind(&head));
}

#[tokio::test]
async fn an_orchestrator_stops_when_another_run_is_current_and_leaves_the_pointer_alone() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let (key, outside) = (Keys::new(NETUID).current(), bucket.context.without_run());
    service.publish_current().await;
    service.publish_current().await;
    assert!(service.stopped.lock().unwrap().is_none(), "its own pointer is renewed");
    let other = CurrentRun { run: RunId([9; 16]), ..service.current.clone() };
    let pointer = sign(&other, &outside, &*bucket.signer, 1, 1);
    bucket.put(&key, pointer.clone()).await;
    service.publish_current().await;
    assert_eq!(*service.stopped.lock().unwrap(), Some("another run is current"));
    assert_eq!(bucket.store.get(&key, 1 << 20).await.unwrap().bytes, pointer);
}

#[tokio::test]
async fn a_rollback_to_a_version_that_is_deleted_leaves_the_fragment_and_the_run_goes_on() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    service.claim_head(1).await.unwrap();
    let tape = Tape { restores: Some(7), inputs: Vec::new(), ..bucket.tape(0, 9, 1, &[]).await };
    let previous = (Digest::blake3(b"keyframe"), 5);
    let (manifest, ..) = service.merge(tape, Vec::new(), previous).await;
    assert_eq!((manifest.version, manifest.restores, manifest.keyframe), (9, None, previous.0));
}

#[tokio::test]
async fn objects_that_contradict_each_other_are_refused_and_left_alone() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, journal) = bucket.orchestrator(folder.path()).await;
    let head = service.claim_head(1).await.unwrap();
    let tape = service.write_tape(&bucket.tape(0, 0, 1, &[11]).await).await;
    let manifest = MergeManifest {
        t: 0,
        fragment: 1,
        base_version: 0,
        version: 1,
        block: 0,
        closing: false,
        restores: None,
        contributions: Vec::new(),
        keyframe: Digest::ZERO,
        state: Digest::ZERO,
        step_norm: 0,
        step_limit_ppm: 1_000_000,
    };
    bucket.publish(&service.run.merge(tape.t), &manifest).await;
    let before = bucket.objects().await;
    let refused = takeover::recover(&service, &journal, head.clone(), bucket.fresh()).await.err().unwrap();
    assert_eq!(refused.exit, Exit::Configuration);
    assert!(refused.to_string().contains("contradicts its tape") && refused.to_string().contains("hint:"), "{refused}");
    assert_eq!(bucket.objects().await, before);
    // A snapshot of a newer version, and one that is damaged.
    let mut snapshot = bucket.fresh().to_snapshot(1).unwrap();
    snapshot[16] += 1;
    bucket.put(&service.run.snapshot(), snapshot.clone()).await;
    let refused = takeover::recover(&service, &journal, head.clone(), bucket.fresh()).await.err().unwrap();
    assert_eq!(refused.exit, Exit::Configuration);
    assert!(refused.to_string().contains("layout"), "{refused}");
    bucket.put(&service.run.snapshot(), b"not a snapshot".to_vec()).await;
    assert!(takeover::recover(&service, &journal, head, bucket.fresh()).await.is_err());
    assert!(journal.is_empty().unwrap(), "nothing was begun");
}

#[tokio::test]
async fn a_page_holds_published_training_shards_of_the_run_and_a_successor_finds_it() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, journal) = bucket.orchestrator(&folder.path().join("a")).await;
    let (keys, outside) = (Keys::new(NETUID), bucket.context.without_run());
    let shard = |id: &str| ShardManifest {
        id: id.into(),
        rows: 7,
        row_tokens: parameters().sequence_length,
        tokens: 7 * u64::from(parameters().sequence_length),
        file: FileRecord::of_bytes("tokens.bin", b"tokens"),
        tokenizer: Digest::ZERO,
        vocab_size: 16,
        licence: "public domain".into(),
        source: "a test".into(),
        held_out: false,
    };
    for (name, shard) in [
        ("good", shard("good")),
        ("held", ShardManifest { held_out: true, ..shard("held") }),
        ("short", ShardManifest { row_tokens: 3, ..shard("short") }),
        ("other-name", shard("good")),
    ] {
        bucket.put(&keys.shard_manifest(name), sign(&shard, &outside, &*bucket.signer, 1, 1)).await;
    }
    let first = service.manifest.catalog.last().map_or(Digest::ZERO, |page| page.digest);
    let page = async |ids: &[&str]| {
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        service.write_page(1, first, &ids).await
    };
    for (id, why) in
        [("nothing", "is not published"), ("held", "is held out"), ("short", "rows of 3 tokens"), ("other-name", "contradicts itself")]
    {
        let refused = page(&["good", id]).await.unwrap_err();
        assert!(refused.contains(why), "{refused}");
    }
    assert!(bucket.store.get(&service.run.catalog(1), 1 << 20).await.is_err(), "nothing was written");
    let stored = page(&["good"]).await.unwrap();
    assert_eq!((stored.shards.len(), stored.shards[0].rows), (1, 7));
    assert_eq!(page(&["good"]).await.unwrap(), stored, "what lies there stands");
    drop(journal);

    let head = service.claim_head(2).await.unwrap();
    let (_, journal) = bucket.orchestrator(&folder.path().join("b")).await;
    let (recovered, _) = takeover::recover(&service, &journal, head, bucket.fresh()).await.unwrap();
    assert_eq!(recovered.machine.newest_page(), stored.reference);
    assert!(recovered.machine.ledger().has_shard("good"));
}

#[tokio::test]
async fn a_journal_that_others_have_written_past_is_put_aside() {
    let (bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, journal) = bucket.orchestrator(one.path()).await;
    let head = first.claim_head(1).await.unwrap();
    takeover::recover(&first, &journal, head, bucket.fresh()).await.unwrap();
    first.fence.release().await;
    drop((first, journal));
    let (second, _journal) = bucket.orchestrator(two.path()).await;
    second.claim_head(2).await.unwrap();
    second.fence.release().await;
    // Back on the first machine: its journal knows nothing of the second one's time.
    let (_third, journal) = bucket.orchestrator(one.path()).await;
    assert!(journal.is_empty().unwrap());
    let aside =
        std::fs::read_dir(one.path()).unwrap().flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("journal-until-"));
    assert_eq!(aside.count(), 1, "it is kept under another name");
}
