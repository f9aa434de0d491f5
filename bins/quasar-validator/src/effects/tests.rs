//! A validator against a real object server, a chain in memory and toy models: from discovery to verdict and weights.

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ::chain::memory::MemorySettings;
use ::chain::{Chain as _, Hotkey, Hyperparameters, MemoryChain, Neuron};
use bytes::Bytes;
use daemon::driver::{DriverOptions, Recovered};
use daemon::health::Health;
use daemon::{Driver, Exit, Journal, Shutdown, clock};
use fragments::delta;
use fragments::keyframe::{self, KeyframeId};
use model::{ToyTrainer, TrainError};
use protocol::audits::select;
use protocol::documents::*;
use protocol::envelope::{Context, Document, Expect, RunId, header_for, open_stored, sign, sign_with_header};
use protocol::log::{Frontier, LogEntry, LogHead, LogKind, LogRef};
use protocol::paths::{Keys, RunKeys, public_prefix};
use protocol::{AccountId, Digest, Ed25519Signer, FileRecord, GrantBundle, GrantRequest, KeyKind, Reason, Signer};
use storage::client::{GrantClient, GrantError, PublicReader, PutOutcome};
use storage::roots::Roots;
use storage::server::{Backend, S3Server, ServerSettings};
use storage::{ObjectStore, Presign, PutCondition, S3Settings, S3Store, bundle, seal_stream};

use super::*;
use crate::audit::Engine;
use crate::audit::tests::{Case, Cheat, FRAGMENT, T, World, case, signer, token_file};
use crate::machine::cycles::KeyframeRef;
use crate::machine::fixture::{contribution, merge};
use crate::machine::weights::WeightSettings;
use crate::machine::{Machine, MachineSettings};

mod judging;
mod keeping;
mod proofs;
mod standing;

const NETUID: u16 = 24;
const RELEASE: &str = "base";
const HOUR_MS: u64 = 3_600_000;
const MINER_UID: u16 = 0;
const OWN_UID: u16 = 1;
const PATIENCE: Duration = Duration::from_secs(60);

/// A complete run of two cycles in which one learner merged one contribution, published in a bucket.
struct Published {
    _server: S3Server,
    store: S3Store,
    public: PublicReader,
    chain: MemoryChain,
    owner: Ed25519Signer,
    orchestrator: Ed25519Signer,
    hotkey: Arc<Hotkey>,
    world: World,
    case: Case,
    run: RunKeys,
    hosts: Vec<String>,
    state: tempfile::TempDir,
    journal: Arc<Journal>,
    sealed_parts: Mutex<HashMap<u8, Bytes>>,
    /// Keys of volumes behind the first ones, which an order grants as well.
    volumes: Mutex<Vec<String>>,
}

/// What the opening is sealed to.
fn opening_key() -> (Zeroizing<[u8; 32]>, [u8; 32]) {
    seal_stream::key_pair(&[6; 32])
}

fn neuron(uid: u16, hotkey: AccountId, validator_permit: bool) -> Neuron {
    Neuron { uid, hotkey, coldkey: hotkey, stake: 1_000, validator_permit, last_update: 0 }
}

/// The toy model of `World` as a safetensors file: version 0 of its fragments before rounding.
fn base_file(world: &World) -> Vec<u8> {
    let toy = ToyTrainer::new(world.plan.clone(), 1).unwrap();
    let mut tensors: HashMap<&str, Vec<f32>> = HashMap::from([("toy.bias", vec![0.0; 32]), ("toy.table", vec![0.0; 1024])]);
    for (fragment, slices) in world.plan.fragments.iter().enumerate() {
        let values = model::Trainer::export(&toy, fragment).unwrap();
        let mut rest = values.as_slice();
        for slice in slices {
            let (head, tail) = rest.split_at(slice.elements() as usize);
            let start = (slice.row_start * slice.row_elements) as usize;
            tensors.get_mut(slice.tensor.as_str()).unwrap()[start..start + head.len()].copy_from_slice(head);
            rest = tail;
        }
    }
    let header = r#"{"toy.bias":{"dtype":"F32","shape":[32],"data_offsets":[0,128]},"toy.table":{"dtype":"F32","shape":[32,32],"data_offsets":[128,4224]}}"#;
    let header = format!("{header:<width$}", width = header.len().next_multiple_of(8));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    for name in ["toy.bias", "toy.table"] {
        bytes.extend(tensors[name].iter().flat_map(|value| value.to_le_bytes()));
    }
    bytes
}

impl Published {
    async fn new(cheat: &Cheat) -> Self {
        Self::with_key(cheat, KeyKind::Ed25519).await
    }

    async fn with_key(cheat: &Cheat, kind: KeyKind) -> Self {
        let settings = ServerSettings {
            backend: Backend::Memory,
            bucket: "quasar".into(),
            access_key: "key".into(),
            secret_key: "secret".into(),
            public_prefixes: vec![public_prefix(NETUID)],
            listen: "127.0.0.1:0".parse().unwrap(),
        };
        let server = S3Server::start(settings).await.unwrap();
        let store = S3Store::new(S3Settings {
            endpoint: Some(server.endpoint()),
            region: "us-east-1".into(),
            bucket: "quasar".into(),
            access_key: Some("key".into()),
            secret_key: Some("secret".into()),
            path_style: true,
        })
        .unwrap();
        let hotkey = Arc::new(Hotkey::from_seed(kind, &[4; 32]));
        let chain = MemoryChain::new(MemorySettings {
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
            neurons: vec![neuron(MINER_UID, signer().key().account(), false), neuron(OWN_UID, hotkey.account(), true)],
            owner_hotkey: None,
        });
        chain.advance(50);

        let mut world = World::new();
        let run_id = RunId([3; 16]);
        world.context = Context { genesis: chain.genesis(), netuid: NETUID, run: run_id };
        world.has_arrival = false;
        world.parameters.poll_ms = 20;
        world.parameters.cycles = 2;
        let (orchestrator, run) = (Ed25519Signer::from_seed([2; 32]), Keys::new(NETUID).run(run_id));

        // The beacon draws the audit, then the learner opens for it.
        let merges = |contribution: Contribution, keyframe: Digest| -> Vec<MergeManifest> {
            let merges = (0..6).map(|t| {
                let mut one = merge(t, 3, if t == T { vec![contribution.clone()] } else { Vec::new() });
                one.base_version = u64::from(t % 3 == T % 3 && t > T);
                one.version = u64::from(t % 3 == T % 3 && t >= T);
                one.contributions.iter_mut().for_each(|one| (one.base_version, one.weight_ppm) = (0, 1_000_000));
                one.keyframe = if one.version == 1 { keyframe } else { Digest::ZERO };
                one
            });
            merges.collect()
        };
        let draft = Contribution { hotkey: signer().key().account(), ..contribution(1, 0, 100, Reason::None) };
        // The last cycle of a complete run, at block 6.
        let beacon_block = 6 + u64::from(world.parameters.audit.beacon_blocks);
        let beacon = chain.block_hash(beacon_block).await.unwrap().unwrap();
        let draw = AuditDraw { cycle: 1, beacon_block, beacon: Digest(beacon), validators: vec![hotkey.account()] };
        let selections = select(run_id, 1_000_000, &draw, &merges(draft, Digest::ZERO)[3..]);
        world.selection = Some(selections[0].clone());
        let case = case(&world, cheat);

        let id = KeyframeId { plan: world.plan.digest(), fragment: u32::from(FRAGMENT), version: 1 };
        let keyframe = keyframe::write(&world.plan, &id, &world.keyframes[usize::from(FRAGMENT)][1]).unwrap();
        let state = tempfile::tempdir().unwrap();
        let published = Self {
            public: PublicReader::new(&server.endpoint(), "quasar").unwrap(),
            hosts: vec![server.address().to_string()],
            journal: Arc::new(Journal::open(&state.path().join("journal")).unwrap()),
            _server: server,
            store,
            chain,
            owner: Ed25519Signer::from_seed([1; 32]),
            orchestrator,
            hotkey,
            run,
            state,
            case,
            world,
            sealed_parts: Mutex::default(),
            volumes: Mutex::default(),
        };
        published.publish_run(&merges(published.case.subject.contribution.clone(), Digest::blake3(&keyframe)), &keyframe).await;
        published
    }

    async fn put(&self, key: &str, bytes: impl Into<Bytes>) {
        self.store.put(key, bytes.into(), PutCondition::Always).await.unwrap();
    }

    /// Signs and writes a document of the orchestrator; gives the digest of the file.
    async fn put_document<D: Document>(&self, key: &str, context: &Context, document: &D) -> Digest {
        let now_ms = clock::now_ms();
        let bytes = sign(document, context, &self.orchestrator, now_ms, now_ms);
        let digest = Digest::blake3(&bytes);
        self.put(key, bytes).await;
        digest
    }

    async fn publish_run(&self, merges: &[MergeManifest], keyframe: &[u8]) {
        let (world, keys, outside) = (&self.world, Keys::new(NETUID), self.world.context.without_run());
        let base = base_file(world);
        let release = Release {
            release: RELEASE.into(),
            versions: Vec::new(),
            files: vec![FileRecord::of_bytes("model.safetensors", &base)],
            tokens: 0,
        };
        let base_manifest = self.put_document(&keys.release_manifest(RELEASE), &outside, &release).await;
        self.put(&keys.release_file(RELEASE, "model.safetensors"), base).await;
        self.put(&self.run.keyframe(FRAGMENT, 1), keyframe.to_vec()).await;
        for shard in &world.shards {
            self.put(&keys.shard_tokens(&shard.id), token_file(&shard.id, shard.rows)).await;
        }
        let plan = world.plan.digest();
        self.put_document(&self.run.plan(&plan), &world.context, &world.plan).await;
        let page = CatalogPage { page: 0, previous: Digest::ZERO, shards: world.shards.clone() };
        let page = CatalogRef { page: 0, digest: self.put_document(&self.run.catalog(0), &world.context, &page).await };
        let manifest = RunManifest {
            run: world.context.run,
            name: "test".into(),
            protocol_min: 1,
            protocol_max: 1,
            created_ms: 0,
            plan,
            base_release: RELEASE.into(),
            base_manifest,
            catalog: vec![page],
            parameters: world.parameters.clone(),
        };
        let manifest_digest = self.put_document(&self.run.manifest(), &world.context, &manifest).await;
        let root = RunRoot {
            version: 1,
            previous: Digest::ZERO,
            owner: self.owner.key(),
            orchestrator: self.orchestrator.key(),
            store_hosts: self.hosts.clone(),
            bounds: Bounds { fragments_max: 24, slots_max: 8, payload_bytes_max: 1 << 20, checkpoint_bytes_max: 1 << 20 },
        };
        let root_bytes = sign(&root, &outside, &self.owner, 1, clock::now_ms());
        let root_digest = Digest::blake3(&root_bytes);
        self.put(&keys.root(1), root_bytes).await;
        self.put_document(&keys.current(), &outside, &CurrentRun { root_version: 1, root_digest, run: world.context.run, manifest_digest })
            .await;
        for merge in merges {
            self.put_document(&self.run.merge(merge.t), &world.context, merge).await;
        }
        let fragment = |fragment: u16| FragmentHead {
            version: u64::from(fragment == FRAGMENT),
            length: keyframe.len() as u64,
            digest: if fragment == FRAGMENT { Digest::blake3(keyframe) } else { Digest::ZERO },
        };
        let head = Head {
            epoch: 1,
            state: RunState::Complete,
            outer_step: 6,
            closed_below: 6,
            block: 5,
            run_step: 0,
            pulls: Vec::new(),
            fragments: (0..3).map(fragment).collect(),
            release: ReleaseRef { release: RELEASE.into(), manifest: base_manifest },
            catalog: page,
            ledger: Digest::ZERO,
            log: (&protocol::log::Frontier::default()).into(),
            notices: Vec::new(),
        };
        self.put_document(&self.run.head(), &world.context, &head).await;

        self.publish_standing(1, &[]).await;
        let selection = &self.case.subject.selection;
        let evidence = &self.case.evidence;
        self.put(&self.run.payload(&selection.hotkey, 0, T), evidence.payload.clone()).await;
        self.put(&self.run.commitment(&selection.hotkey, 0, T), evidence.commitment.clone()).await;
        for (part, bytes) in self.parts().into_iter().enumerate() {
            self.put(&self.run.opening(&selection.hotkey, 0, &selection.audit, part as u8), bytes).await;
        }
    }

    /// Publishes standing grants: the usual ones, and for reading `more` keys.
    async fn publish_standing(&self, sequence: u64, more: &[String]) {
        let (keys, context, own) = (Keys::new(NETUID), &self.world.context, self.hotkey.account());
        let usual = [
            keys.release_manifest(RELEASE),
            keys.release_file(RELEASE, "model.safetensors"),
            self.run.keyframe(FRAGMENT, 1),
            keys.shard_tokens("held"),
        ];
        let scores = (0..4).map(|epoch| self.put_grant(&self.run.scores(&own, epoch), SCORES_BYTES));
        let requests = usual.iter().chain(more).map(|key| self.get_grant(key)).chain(scores).collect();
        let header = header_for::<StandingGrants>(context, self.orchestrator.key(), sequence, clock::now_ms());
        let purpose = protocol::envelope::Purpose::StandingGrants;
        let sealed = bundle::seal_to(context, purpose, &header, &self.hotkey.sealing_public(), &GrantBundle { requests }).unwrap();
        let grants = StandingGrants { hotkey: own, slot: 0, session_epoch: 0, sealed };
        self.put(&self.run.standing(&own, 0), sign_with_header(header, &grants, &self.orchestrator)).await;
    }

    fn parts(&self) -> Vec<Bytes> {
        let opening = self.case.evidence.opening.as_ref();
        let plain = opening.map_or_else(Vec::new, |opening| vec![opening.manifest.clone(), opening.state.clone(), opening.routes.clone()]);
        plain.into_iter().enumerate().map(|(part, bytes)| self.sealed(part as u8, &bytes)).collect()
    }

    /// A part as its miner seals it. Sealing draws a fresh key each time, so each part is sealed once.
    fn sealed(&self, part: u8, plain: &[u8]) -> Bytes {
        let mut parts = self.sealed_parts.lock().unwrap();
        let sealed = parts.entry(part).or_insert_with(|| {
            let info = self.world.context.opening_info(&self.case.subject.selection.audit, part);
            let mut sealed = Vec::new();
            seal_stream::seal(&opening_key().1, &info, &mut &plain[..], &mut sealed).unwrap();
            sealed.into()
        });
        sealed.clone()
    }

    fn get_grant(&self, key: &str) -> GrantRequest {
        self.store.presign(&Presign::Get { key: key.to_owned(), now_ms: clock::now_ms(), expires_in_ms: HOUR_MS }).unwrap()
    }

    fn put_grant(&self, key: &str, length: u64) -> GrantRequest {
        let request =
            Presign::Put { key: key.to_owned(), length, sha256: None, if_absent: true, now_ms: clock::now_ms(), expires_in_ms: HOUR_MS };
        self.store.presign(&request).unwrap()
    }

    /// Publishes the audit order; `change` alters what it says.
    async fn publish_order(&self, may_reveal: bool, change: impl FnOnce(&mut AuditOrder)) {
        self.publish_order_sealed_with(may_reveal, &opening_key().0, change).await;
    }

    async fn publish_order_sealed_with(&self, may_reveal: bool, secret: &[u8; 32], change: impl FnOnce(&mut AuditOrder)) {
        let (selection, own) = (&self.case.subject.selection, self.hotkey.account());
        let (hotkey, audit) = (&selection.hotkey, &selection.audit);
        let mut keys = vec![self.run.payload(hotkey, 0, T), self.run.commitment(hotkey, 0, T), Keys::new(NETUID).shard_tokens("train")];
        keys.extend((0..OPENING_PARTS).map(|part| self.run.opening(hotkey, 0, audit, part)));
        keys.extend(self.volumes.lock().unwrap().iter().cloned());
        let mut requests: Vec<GrantRequest> = keys.iter().map(|key| self.get_grant(key)).collect();
        requests.push(self.put_grant(&self.run.verdict_commit(&own, audit), VERDICT_COMMIT_BYTES));
        if may_reveal {
            requests.push(self.put_grant(&self.run.verdict_reveal(&own, audit), VERDICT_REVEAL_BYTES));
        }
        let header = header_for::<AuditOrder>(&self.world.context, self.orchestrator.key(), 1, clock::now_ms());
        let purpose = protocol::envelope::Purpose::AuditOrder;
        let recipient = self.hotkey.sealing_public();
        let sealed = bundle::seal_to(&self.world.context, purpose, &header, &recipient, &GrantBundle { requests }).unwrap();
        let opening_key = bundle::seal_bytes(&self.world.context, purpose, &header, &recipient, secret).unwrap();
        let opened = |part: &Bytes| OpenedPart { length: part.len() as u64, sha256: Digest::sha256(part) };
        let mut order = AuditOrder {
            audit: *audit,
            validator: own,
            cycle: selection.cycle,
            hotkey: *hotkey,
            slot: 0,
            t: T,
            beacon_block: selection.beacon_block,
            opening: self.parts().iter().map(opened).collect(),
            leases: vec![self.world.lease.clone()],
            sealed,
            opening_key,
        };
        change(&mut order);
        self.put(&self.run.audit(&own, audit), sign_with_header(header, &order, &self.orchestrator)).await;
    }

    async fn reader(&self) -> RunReader {
        let owner = self.owner.key().account();
        let roots = Roots::unremembered(self.chain.genesis(), NETUID, owner);
        RunReader::discover(self.public.clone(), roots, None, clock::now_ms()).await.unwrap()
    }

    async fn effects(&self, open_engine: OpenEngine) -> Effects {
        let health = Health::new();
        Effects::new(EffectSettings {
            reader: self.reader().await,
            archive: self.reader().await,
            access: Arc::new(GrantClient::new(self.hosts.clone()).unwrap()),
            link: Arc::new(ChainLink::connected(Arc::new(self.chain.clone()))),
            hotkey: self.hotkey.clone(),
            secret: self.hotkey.sealing_secret(),
            journal: self.journal.clone(),
            state_dir: self.state.path(),
            open_engine,
            mechanism: 0,
            store_health: health.component("store"),
            weights_health: health.component("weights"),
        })
        .unwrap()
    }

    /// One life of the validator, until `is_done` or for so long.
    async fn live(&self, open_engine: OpenEngine, is_dry_run: bool, mut is_done: impl AsyncFnMut(&Self) -> bool) {
        let effects = self.effects(open_engine).await;
        let mut machine = Machine::new(MachineSettings {
            run: self.world.context.run,
            own: self.hotkey.account(),
            parameters: self.world.parameters.clone(),
            poll_ms_max: 20,
            weights: WeightSettings {
                netuid: NETUID,
                mechanism: 0,
                refresh_ms: HOUR_MS,
                retry_base_ms: 100,
                retry_max_ms: 1_000,
                // The chain's blocks come much faster here than they say.
                look_max_ms: 100,
                is_dry_run,
            },
        });
        let place = (NETUID, 0);
        if let Some(memory) = chain::recall(&self.journal, &self.chain.genesis(), place, &self.hotkey.account()).unwrap() {
            machine.recall_weights(clock::now_ms(), memory);
        }
        let memory = Arc::new(Journal::in_memory().unwrap());
        let options = DriverOptions { stop_grace: Duration::from_secs(1), ..DriverOptions::default() };
        let driver = Driver::with_options(Recovered::fresh(machine), memory, Arc::new(effects), options);
        let shutdown = Shutdown::new();
        let driving = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { driver.run(&shutdown).await.map(|(_, exit)| exit) }
        });
        let begun = Instant::now();
        while !is_done(self).await {
            assert!(begun.elapsed() < PATIENCE, "the validator did not get there");
            self.chain.advance(1);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        shutdown.trigger();
        assert_eq!(driving.await.unwrap().unwrap(), Exit::Done);
    }

    async fn document<D: Document>(&self, key: &str) -> Option<D> {
        let object = self.store.get(key, 1 << 20).await.ok()?;
        Some(open_stored::<D>(&object.bytes, &self.world.context, Expect::Account(&self.hotkey.account())).unwrap().document)
    }

    async fn commit(&self) -> Option<VerdictCommit> {
        self.document(&self.run.verdict_commit(&self.hotkey.account(), &self.case.subject.selection.audit)).await
    }

    async fn reveal(&self) -> Option<VerdictReveal> {
        self.document(&self.run.verdict_reveal(&self.hotkey.account(), &self.case.subject.selection.audit)).await
    }

    /// What was published of the weights after both cycles.
    async fn scores(&self) -> Option<Scores> {
        self.document(&self.run.scores(&self.hotkey.account(), 2)).await
    }

    async fn row(&self) -> Vec<(u16, u16)> {
        self.chain.weights(NETUID, OWN_UID).await.unwrap()
    }
}

fn toys(world: &World) -> OpenEngine {
    let plan = world.plan.clone();
    Arc::new(move |_| {
        let toy = || Ok::<_, TrainError>(Box::new(ToyTrainer::new(plan.clone(), 77)?));
        Ok(Engine::new(toy()?, toy()?))
    })
}

/// Models that cannot be opened: a life in which nothing may be judged.
fn broken() -> OpenEngine {
    Arc::new(|_| Err(TrainError::Checkpoint("not in this life".into())))
}

/// Waits until `is_so`.
async fn until(mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "it did not get there");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Names of what lies in a folder, sorted.
fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
