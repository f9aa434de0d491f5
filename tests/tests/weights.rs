//! Weights of a validator that is killed: its real process against a bucket with a run and a chain with commit-reveal.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use chain::devnode::{DevChain, DevNeuron, DevNode, DevOptions};
use chain::{Chain as _, ConnectSettings, PendingCommit, SubtensorClient, Wallet, WeightsView};
use daemon::clock;
use protocol::documents::*;
use protocol::envelope::{Context, Document, RunId, sign};
use protocol::paths::{Keys, public_prefix};
use protocol::{AccountId, Digest, Ed25519Signer, KeyKind, Signer as _};
use quasar_tests::binary;
use quasar_tests::sim::plan::parameters;
use storage::server::{Backend, S3Server, ServerSettings};
use storage::{ObjectStore as _, PutCondition, S3Settings, S3Store};

const NETUID: u16 = 24;
const FRAGMENTS: u16 = 2;
const BLOCK_MS: u64 = 200;
/// An epoch of 30 seconds: a commit is final, and a process restarted, well before its end.
const TEMPO: u16 = 150;
const PATIENCE: Duration = Duration::from_secs(120);

/// A bucket with a run that has not merged anything yet: a validator puts the whole weight on itself.
struct Place {
    folder: tempfile::TempDir,
    bucket: S3Server,
    owner: AccountId,
    own: AccountId,
    node: DevNode,
    client: SubtensorClient,
}

async fn publish(server: &S3Server, owner: &Ed25519Signer, genesis: [u8; 32]) {
    let store = S3Store::new(S3Settings {
        endpoint: Some(server.endpoint()),
        region: "us-east-1".into(),
        bucket: "quasar".into(),
        access_key: Some("key".into()),
        secret_key: Some("secret".into()),
        path_style: true,
    })
    .expect("the store's settings are right");
    let orchestrator = Ed25519Signer::from_seed([2; 32]);
    let (keys, run_id) = (Keys::new(NETUID), RunId([3; 16]));
    let (run, context) = (keys.run(run_id), Context { genesis, netuid: NETUID, run: run_id });
    let outside = context.without_run();
    let put = async |key: String, bytes: Vec<u8>| {
        let digest = Digest::blake3(&bytes);
        store.put(&key, bytes.into(), PutCondition::Always).await.expect("the store takes it");
        digest
    };
    fn signed<D: Document>(document: &D, context: &Context, signer: &Ed25519Signer) -> Vec<u8> {
        let now_ms = clock::now_ms();
        sign(document, context, signer, now_ms, now_ms)
    }

    let plan = model::toy_plan(usize::from(FRAGMENTS));
    put(run.plan(&plan.digest()), signed(&plan, &context, &orchestrator)).await;
    let page = signed(&CatalogPage { page: 0, previous: Digest::ZERO, shards: Vec::new() }, &context, &orchestrator);
    let catalog = CatalogRef { page: 0, digest: put(run.catalog(0), page).await };
    let manifest = RunManifest {
        run: run_id,
        name: "test".into(),
        protocol_min: 1,
        protocol_max: 1,
        created_ms: 0,
        plan: plan.digest(),
        base_release: "base".into(),
        base_manifest: Digest::ZERO,
        catalog: vec![catalog],
        parameters: parameters(FRAGMENTS, 2, 50, 1_000),
    };
    let manifest_digest = put(run.manifest(), signed(&manifest, &context, &orchestrator)).await;
    let root = RunRoot {
        version: 1,
        previous: Digest::ZERO,
        owner: owner.key(),
        orchestrator: orchestrator.key(),
        store_hosts: vec![server.address().to_string()],
        bounds: Bounds { fragments_max: 24, slots_max: 8, payload_bytes_max: 1 << 20, checkpoint_bytes_max: 1 << 20 },
    };
    let root_digest = put(keys.root(1), signed(&root, &outside, owner)).await;
    let current = CurrentRun { root_version: 1, root_digest, run: run_id, manifest_digest };
    put(keys.current(), signed(&current, &outside, &orchestrator)).await;
    let fragment = FragmentHead { version: 0, length: 0, digest: Digest::ZERO };
    let release = ReleaseRef { release: "base".into(), manifest: Digest::ZERO };
    let head = Head { epoch: 1, ..Head::first(vec![fragment; usize::from(FRAGMENTS)], release, catalog) };
    put(run.head(), signed(&head, &context, &orchestrator)).await;
}

impl Place {
    async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let own = Wallet::new(folder.path().join("wallets"), "w", "own").create_hotkey(KeyKind::Sr25519).expect("a hotkey").account();
        let neuron = DevNeuron { hotkey: own, coldkey: own, stake: 5_000_000_000, validator_permit: true };
        let chain = DevChain {
            netuid: NETUID,
            block_ms: BLOCK_MS,
            tempo: TEMPO,
            weights_rate_limit: 5,
            min_allowed_weights: 1,
            neurons: vec![neuron],
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        };
        let options = DevOptions { commit_reveal: true, finality_lag: 2, ..Default::default() };
        let node = DevNode::start_with(chain, options).await.expect("the node starts");
        let bucket = S3Server::start(ServerSettings {
            backend: Backend::Memory,
            bucket: "quasar".into(),
            access_key: "key".into(),
            secret_key: "secret".into(),
            public_prefixes: vec![public_prefix(NETUID)],
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        })
        .await
        .expect("the bucket's server starts");
        let owner = Ed25519Signer::from_seed([1; 32]);
        publish(&bucket, &owner, node.genesis()).await;
        let local = serde_json::json!({ "genesis": format!("0x{}", Digest(node.genesis())), "endpoint": node.endpoint() });
        std::fs::write(folder.path().join("chain.json"), local.to_string()).expect("the folder is writable");
        let settings = ConnectSettings { endpoints: vec![node.endpoint()], genesis: Some(node.genesis()) };
        let client = SubtensorClient::connect(settings).await.expect("the node answers");
        Self { folder, bucket, owner: owner.key().account(), own, node, client }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// One life of the validator; what it says goes into `log`.
    fn start(&self, log: &Path) -> Running {
        let mut command = Command::new(binary("quasar-validator"));
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("QUASAR_") || text.starts_with("AWS_") {
                command.env_remove(&name);
            }
        }
        command.args(["run", "--device", "cpu", "--network", "local", "--netuid", &NETUID.to_string(), "--s3-bucket", "quasar"]);
        command.args(["--owner-identity", &self.owner.to_string(), "--s3-endpoint-url", &self.bucket.endpoint()]);
        command.args(["--wallet-name", "w", "--hotkey-name", "own"]);
        for (flag, name) in [("--local-chain", "chain.json"), ("--wallet-path", "wallets"), ("--state-dir", "state")] {
            command.arg(flag).arg(self.path(name));
        }
        let file = std::fs::File::create(log).expect("the folder is writable");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        Running(command.spawn().expect("the validator starts"))
    }

    async fn view(&self) -> WeightsView {
        self.client.weights_view(NETUID, 0, &self.own).await.expect("the node answers")
    }

    /// What the daemon says of its weights.
    fn stage(&self) -> String {
        let bytes = std::fs::read(self.path("state/weights.json")).unwrap_or_default();
        let file: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
        file["stage"].as_str().unwrap_or_default().to_owned()
    }
}

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    /// SIGKILL.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Looks until something is there, at least once in each block.
async fn until<T>(what: &str, log: &Path, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: {}", std::fs::read_to_string(log).unwrap_or_default());
        tokio::time::sleep(Duration::from_millis(BLOCK_MS / 4)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_validator_that_is_killed_between_commit_and_reveal_follows_its_row_and_commits_once_in_each_epoch() {
    let place = Place::new().await;
    let logs: Vec<PathBuf> = (0..3).map(|life| place.path(&format!("life-{life}.log"))).collect();
    let mut seen: Vec<PendingCommit> = Vec::new();

    let first = place.start(&logs[0]);
    let commit = until("a row is committed", &logs[0], async || place.view().await.commits.first().copied()).await;
    // Whether the daemon has heard of its commit by now is chance; either way it is to be followed.
    drop(first);
    seen.push(commit);
    assert_eq!(place.node.weights(0, 0), [], "nobody has seen the row yet");

    // A second life, which is killed too, before the reveal.
    let _ = std::fs::remove_file(place.path("state/weights.json"));
    let second = place.start(&logs[1]);
    until("the commit is recognised", &logs[1], async || place.stage().contains("committed in block").then_some(())).await;
    let view = place.view().await;
    assert_eq!((view.commits.as_slice(), view.epoch.index), (&[commit][..], commit.epoch), "nothing is committed again");
    drop(second);

    let third = place.start(&logs[2]);
    let told = |text: &str| std::fs::read_to_string(&logs[2]).unwrap_or_default().contains(text);
    until("the opened row is read back", &logs[2], async || {
        for commit in place.view().await.commits {
            if !seen.contains(&commit) {
                seen.push(commit);
            }
        }
        (told("weights are on the chain") && told("the chain has opened the committed weights")).then_some(())
    })
    .await;
    assert_eq!(place.node.weights(0, 0), [(0, u16::MAX)]);
    assert!(told("weights that were committed before the restart are followed"), "{}", std::fs::read_to_string(&logs[2]).unwrap());
    drop(third);
    let mut epochs: Vec<u64> = seen.iter().map(|commit| commit.epoch).collect();
    epochs.dedup();
    assert_eq!(epochs.len(), seen.len(), "an epoch has two commits: {seen:?}");
}
