//! Two orchestrators on one bucket: whatever their order, one merge, one head, one set of bytes.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use chain::{ChainLink, Hyperparameters, MemoryChain, MemorySettings};
use daemon::driver::recover;
use daemon::sequence::Sequence;
use daemon::{Exit, Journal, Machine, Shutdown};
use fragments::codec::{self, PayloadHeader};
use fragments::keyframe::{self, KeyframeId};
use fragments::state::{FragmentState, StateHeader};
use protocol::documents::{
    AuditParameters, Bounds, CatalogRef, Codec, Commitment, CurrentRun, FragmentHead, FragmentManifest, Head, InnerOptimizer, Job,
    LearnerState, Lease, LrSchedule, MergeManifest, Progress, ReleaseRef, RowRange, RunManifest, RunParameters, RunRoot, Tape, TapeInput,
};
use protocol::envelope::{Context, Document, Expect, RunId, open_stored, sign};
use protocol::log::{Frontier, LogEntry, LogHead, LogKind};
use protocol::paths::Keys;
use protocol::{
    AccountId, DType, Digest, Ed25519Signer, FileRecord, FragmentPlan, KeyRef, MergeRule, Reason, ShardManifest, Signer, Slice,
};
use storage::roots::Roots;
use storage::{MemoryStore, ObjectStore, PutCondition, StoreError};
use zeroize::Zeroizing;

use super::fence::{Fence, FenceSettings, Lost, Wait};
use super::{Service, Stop};
use crate::machine::{FragmentSetup, Input, LEASE_EPOCH_SHIFT, Orchestrator, RunSetup, ShardRows};
use crate::takeover;

mod audits;
mod faults;
mod merges;
mod polls;
mod rotations;
mod takeovers;
mod writers;

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
        audit: AuditParameters {
            rate_ppm: 1_000_000,
            loss_rows: 16,
            replay_steps: 4,
            replay_tolerance_ppm: 1,
            beacon_blocks: 3,
            opening_ms: 20_000,
        },
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

/// The same orchestrator with another store; its lease stays where it is.
fn with_store(service: Arc<Service>, store: Arc<dyn ObjectStore>) -> Service {
    let Ok(mut service) = Arc::try_unwrap(service) else { panic!("nobody else holds it") };
    service.store = store;
    service
}

/// Why the service stops because of this work, which must not end.
async fn stops<T>(service: &Service, work: impl Future<Output = T>) -> String {
    let stopped = async {
        tokio::select! {
            biased;
            _ = work => panic!("it went on"),
            () = service.shutdown.triggered() => {}
        }
    };
    tokio::time::timeout(Duration::from_secs(20), stopped).await.expect("it is tried for ever");
    let why = service.stopped.lock().unwrap().clone();
    why.expect("it says why").to_string()
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
        bucket.rotate(1, Digest::ZERO, bucket.signer.key()).await;
        let head = Head::first(heads, bucket.setup.release.clone(), bucket.setup.catalog);
        bucket.publish(&keys.head(), &head).await;
        bucket
    }

    fn owner() -> Ed25519Signer {
        Ed25519Signer::from_seed([7; 32])
    }

    fn store(&self) -> Arc<dyn ObjectStore> {
        Arc::new(self.store.clone())
    }

    /// As a process reads them that begins.
    fn roots(&self) -> Roots {
        Roots::unremembered(self.context.genesis, NETUID, Self::owner().key().account())
    }

    /// The owner signs this version of the root; gives its digest.
    async fn rotate(&self, version: u32, previous: Digest, orchestrator: KeyRef) -> Digest {
        let bounds = Bounds { fragments_max: 24, slots_max: 8, payload_bytes_max: 1 << 20, checkpoint_bytes_max: 1 << 20 };
        let owner = Self::owner().key();
        let root = RunRoot { version, previous, owner, orchestrator, store_hosts: vec!["store.example".into()], bounds };
        let bytes = sign(&root, &self.context.without_run(), &Self::owner(), 1, 1_000);
        self.put(&Keys::new(NETUID).root(version), bytes.clone()).await;
        Digest::blake3(&bytes)
    }

    async fn put(&self, key: &str, bytes: Vec<u8>) {
        self.store.put(key, Bytes::from(bytes), PutCondition::Always).await.unwrap();
    }

    async fn publish<D: Document>(&self, key: &str, document: &D) {
        self.put(key, sign(document, &self.context, &*self.signer, 1, 1_000)).await;
    }

    /// An orchestrator whose state is in `folder`, with the lease.
    async fn orchestrator(&self, folder: &Path) -> (Arc<Service>, Arc<Journal>) {
        let signers = self.roots().follow(&*self.store()).await.unwrap().orchestrators.clone();
        let lease_key = Keys::new(NETUID).run(self.context.run).writer_lease();
        let last = super::fence::read_lease(&self.store, &lease_key, &self.context, &signers).await.unwrap();
        let (journal, instances) = takeover::open_journal(folder, last.as_ref().map(|(lease, _)| &lease.document)).unwrap();
        self.with_journal(self.store(), folder, Arc::new(journal), instances, LEASE).await
    }

    /// An orchestrator that works with this store and this journal.
    async fn with_journal(
        &self,
        store: Arc<dyn ObjectStore>,
        folder: &Path,
        journal: Arc<Journal>,
        instances: [[u8; 16]; 2],
        lease: Duration,
    ) -> (Arc<Service>, Arc<Journal>) {
        let roots = self.roots();
        let signers = roots.follow(&*store).await.unwrap().orchestrators.clone();
        let keys = Keys::new(NETUID).run(self.context.run);
        let sequence = Arc::new(Sequence::open(journal.clone(), "orchestrator").unwrap());
        let shutdown = Shutdown::new();
        let settings = FenceSettings {
            store: store.clone(),
            key: keys.writer_lease(),
            context: self.context,
            signer: self.signer.clone(),
            roots: roots.clone(),
            sequence: sequence.clone(),
            instances,
            host: folder.display().to_string(),
            lease,
        };
        let fence = Arc::new(Fence::acquire(settings, Wait::Standby, &shutdown).await.unwrap().unwrap());
        for name in ["payloads", "states", "releases"] {
            std::fs::create_dir_all(folder.join(name)).unwrap();
        }
        let plan = plan();
        let service = Service {
            store,
            chain: Arc::new(ChainLink::connected(Arc::new(chain()))),
            signer: self.signer.clone(),
            sequence,
            fence,
            roots,
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
