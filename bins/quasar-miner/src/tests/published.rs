//! A run that has just begun, in a real object server, for the edge of one learner.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chain::{ChainLink, ConnectSettings, Deadlines, Hotkey};
use daemon::sequence::Sequence;
use daemon::{Exit, Journal, clock};
use model::{TrainError, Trainer, toy_plan};
use protocol::documents::{Bounds, CatalogPage, CatalogRef, CurrentRun, Head, Job, PullGrants, RunManifest, RunRoot, StandingGrants};
use protocol::envelope::{Context, Document, Expect, PROTOCOL_VERSION, RunId, header_for, open_stored, peek, sign, sign_with_header};
use protocol::paths::{Keys, RunKeys, public_prefix};
use protocol::{Digest, Ed25519Signer, GrantBundle, KeyKind, SealedBytes, Signer};
use storage::client::{GrantClient, PublicReader};
use storage::discovery::RunReader;
use storage::roots::Roots;
use storage::server::{Backend, Faults, S3Server, ServerSettings};
use storage::{ObjectStore, PutCondition, S3Settings, S3Store, bundle};
use tokio::sync::mpsc;

use super::world::{FRAGMENTS, SLOT, head, parameters, toy};
use crate::edge::{BaseTrees, ChunkCache, Edge, Plane, Shared};
use crate::trainer::TrainerThread;

const NETUID: u16 = 24;
const BUCKET: &str = "quasar";

pub struct Published {
    server: S3Server,
    store: S3Store,
    pub public: PublicReader,
    owner: Ed25519Signer,
    orchestrator: Ed25519Signer,
    pub hotkey: Arc<Hotkey>,
    context: Context,
    pub keys: Keys,
    pub run: RunKeys,
    /// The first head.
    pub head: Head,
    /// Of the learner; proofs are kept here.
    pub folder: tempfile::TempDir,
}

impl Published {
    /// Everything that a learner looks at is there, with sequence 1.
    pub async fn new() -> Self {
        let settings = ServerSettings {
            backend: Backend::Memory,
            bucket: BUCKET.into(),
            access_key: "key".into(),
            secret_key: "secret".into(),
            public_prefixes: vec![public_prefix(NETUID)],
            listen: "127.0.0.1:0".parse().unwrap(),
        };
        let server = S3Server::start(settings).await.unwrap();
        let store = S3Store::new(S3Settings {
            endpoint: Some(server.endpoint()),
            region: "us-east-1".into(),
            bucket: BUCKET.into(),
            access_key: Some("key".into()),
            secret_key: Some("secret".into()),
            path_style: true,
        })
        .unwrap();
        let (keys, run) = (Keys::new(NETUID), RunId([7; 16]));
        let mut published = Self {
            public: PublicReader::new(&server.endpoint(), BUCKET).unwrap(),
            server,
            store,
            owner: Ed25519Signer::from_seed([1; 32]),
            orchestrator: Ed25519Signer::from_seed([2; 32]),
            hotkey: Arc::new(Hotkey::from_seed(KeyKind::Ed25519, &[4; 32])),
            context: Context { genesis: [1; 32], netuid: NETUID, run },
            run: keys.run(run),
            keys,
            head: head(),
            folder: tempfile::tempdir().unwrap(),
        };
        published.publish_run().await;
        published.publish_looks().await;
        published
    }

    async fn publish_run(&mut self) {
        let (outside, now_ms) = (self.context.without_run(), clock::now_ms());
        let plan = toy_plan(FRAGMENTS);
        self.publish(&self.run.plan(&plan.digest()), &plan, 1).await;
        let page = CatalogPage { page: 0, previous: Digest::ZERO, shards: Vec::new() };
        self.head.catalog = CatalogRef { page: 0, digest: self.publish(&self.run.catalog(0), &page, 1).await };
        let manifest = RunManifest {
            run: self.context.run,
            name: "test".into(),
            protocol_min: PROTOCOL_VERSION,
            protocol_max: PROTOCOL_VERSION,
            created_ms: 0,
            plan: plan.digest(),
            base_release: "base".into(),
            base_manifest: Digest::ZERO,
            catalog: vec![self.head.catalog],
            parameters: parameters(),
        };
        let manifest_digest = self.publish(&self.run.manifest(), &manifest, 1).await;
        let root = RunRoot {
            version: 1,
            previous: Digest::ZERO,
            owner: self.owner.key(),
            orchestrator: self.orchestrator.key(),
            store_hosts: vec![self.server.address().to_string()],
            bounds: Bounds { fragments_max: 24, slots_max: 8, payload_bytes_max: 1 << 20, checkpoint_bytes_max: 1 << 20 },
        };
        let root = sign(&root, &outside, &self.owner, 1, now_ms);
        let current = CurrentRun { root_version: 1, root_digest: Digest::blake3(&root), run: self.context.run, manifest_digest };
        self.put(&self.keys.root(1), root).await;
        self.put(&self.keys.current(), sign(&current, &outside, &self.orchestrator, 1, now_ms)).await;
    }

    async fn publish_looks(&self) {
        let (hotkey, slot, session_epoch) = (self.hotkey.account(), SLOT, 1);
        self.publish(&self.run.head(), &self.head, 1).await;
        let job = Job { hotkey, slot, session_epoch, leases: Vec::new() };
        self.publish(&self.run.job(&hotkey, slot), &job, 1).await;
        let standing = |sealed| StandingGrants { hotkey, slot, session_epoch, sealed };
        self.publish_grants(&self.run.standing(&hotkey, slot), standing).await;
        let pull = |sealed| PullGrants { hotkey, slot, session_epoch, sealed };
        self.publish_grants(&self.run.pull_grants(&hotkey, slot), pull).await;
    }

    async fn publish_grants<D: Document>(&self, key: &str, grants: impl FnOnce(SealedBytes) -> D) {
        let header = header_for::<D>(&self.context, self.orchestrator.key(), 1, clock::now_ms());
        let (recipient, requests) = (self.hotkey.sealing_public(), GrantBundle { requests: Vec::new() });
        let sealed = bundle::seal_to(&self.context, D::PURPOSE, &header, &recipient, &requests).unwrap();
        self.put(key, sign_with_header(header, &grants(sealed), &self.orchestrator)).await;
    }

    async fn put(&self, key: &str, file: Vec<u8>) {
        self.store.put(key, file.into(), PutCondition::Always).await.unwrap();
    }

    /// Signs and writes a document of the orchestrator; gives the digest of its file.
    pub async fn publish<D: Document>(&self, key: &str, document: &D, sequence: u64) -> Digest {
        let file = sign(document, &self.context, &self.orchestrator, sequence, clock::now_ms());
        let digest = Digest::blake3(&file);
        self.put(key, file).await;
        digest
    }

    /// Replaces the orchestrator's document at `key` by another one with its sequence.
    pub async fn contradict<D: Document>(&self, key: &str, change: impl FnOnce(&mut D)) {
        let file = self.store.get(key, D::PURPOSE.file_limit()).await.unwrap().bytes;
        let header = peek(&file).unwrap().0.header;
        let context = Context { run: header.run, ..self.context };
        let mut document = open_stored::<D>(&file, &context, Expect::Key(&self.orchestrator.key())).unwrap().document;
        change(&mut document);
        self.put(key, sign(&document, &context, &self.orchestrator, header.sequence, clock::now_ms())).await;
    }

    /// So many proofs lie in the folder, and each convicts the orchestrator.
    pub fn assert_convicted(&self, proofs: usize) {
        let is_proof = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("equivocation-") && name.ends_with(".qsr")
        };
        let files = std::fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let kept: Vec<PathBuf> = files.filter(is_proof).collect();
        assert_eq!(kept.len(), proofs, "{kept:?}");
        for path in &kept {
            let shown = daemon::inspect::file(path).unwrap();
            assert_eq!(shown.exit(), Exit::Done, "{}", shown.json["proof"]);
            assert_eq!(shown.json["proof"]["convicted"], self.orchestrator.key().account().to_string(), "{}", shown.json["proof"]);
        }
    }

    /// Requests for this key alone are not answered any more.
    pub fn hang(&self, key: &str) {
        let latency = Duration::from_secs(3_600);
        self.server.set_faults(Faults { only_paths_with: Some(key.to_owned()), latency, ..Faults::default() });
    }

    /// Every request is answered again.
    pub fn answer(&self) {
        self.server.set_faults(Faults::default());
    }

    pub fn roots(&self) -> Roots {
        Roots::unremembered(self.context.genesis, NETUID, self.owner.key().account())
    }

    pub async fn edge(&self) -> Arc<Edge> {
        let reader = RunReader::discover(self.public.clone(), self.roots(), None, clock::now_ms()).await.unwrap();
        let (facts, folder) = (reader.facts().clone(), self.folder.path());
        let plane = Arc::new(Plane::open(folder, 1, &facts).unwrap());
        let open = |_: &Path| -> Result<Box<dyn Trainer>, TrainError> { Ok(Box::new(toy())) };
        let (inner, (inputs, _)) = (facts.manifest.parameters.inner.clone(), mpsc::channel(1));
        let trainer = TrainerThread::start("learner".into(), Box::new(open), plane.clone(), inner, inputs).unwrap();
        let shared = Arc::new(Shared {
            hotkey: self.hotkey.clone(),
            chain: Arc::new(ChainLink::new(ConnectSettings { endpoints: Vec::new(), genesis: None }, Deadlines::default())),
            access: Arc::new(GrantClient::new(facts.root.store_hosts.clone()).unwrap()),
            bases: BaseTrees::new(folder.join("checkpoints")),
            chunks: ChunkCache::open(folder.join("chunks")).unwrap(),
            sequence: Sequence::open(Arc::new(Journal::in_memory().unwrap()), "signed").unwrap(),
        });
        Arc::new(Edge::new(shared, reader, SLOT, self.hotkey.sealing_secret(), folder, plane, trainer).unwrap())
    }
}
