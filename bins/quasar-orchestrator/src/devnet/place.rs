//! Everything that a devnet stands on: folders, wallets, bucket, chain, base model, data, and the run itself.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chain::Wallet;
use chain::devnode::{DevChain, DevNeuron, DevNode};
use daemon::{Failure, Shutdown};
use protocol::documents::{CurrentRun, VerdictReveal};
use protocol::envelope::{Context, Expect, RunId, open_stored};
use protocol::paths::{Keys, RunKeys, public_prefix};
use protocol::{AccountId, KeyKind};
use storage::server::{Backend, S3Server, ServerSettings};
use storage::{ObjectStore, S3Settings, S3Store};

use super::DevnetArgs;
use super::children::{Child, Recipe};
use crate::machine::Status;

const NETUID: u16 = 24;
const BUCKET: &str = "quasar";
const REGION: &str = "us-east-1";
const HOTKEY: &str = "default";
const RUN_FILE: &str = include_str!("../../../../configs/run-devnet.toml");
const MODEL_FILE: &str = include_str!("../../../../configs/devnet-model.json");
const CORPUS: &[u8] = include_bytes!("../../../../configs/corpus/sotu.jsonl.xz");
const HELD_OUT: &str = include_str!("../../../../configs/corpus/held_out.txt");
const TOKENIZER: &[u8] = include_bytes!("../../../../configs/corpus/tokenizer.json");
/// Stake that gives a validator its permit, in rao.
const VALIDATOR_STAKE: u64 = 1_000_000_000_000;
/// The credentials of the embedded store: it listens on loopback and lives as long as this process.
const ACCESS_KEY: &str = "devnet";

/// Where the bucket is, and the credentials of its owner.
struct Bucket {
    endpoint: String,
    name: String,
    access_key: String,
    secret_key: String,
}

impl Bucket {
    fn store(&self) -> Result<S3Store, Failure> {
        S3Store::new(S3Settings {
            endpoint: Some(self.endpoint.clone()),
            region: REGION.to_owned(),
            bucket: self.name.clone(),
            access_key: Some(self.access_key.clone()),
            secret_key: Some(self.secret_key.clone()),
            path_style: true,
        })
        .map_err(Failure::configuration)
    }
}

pub struct Place {
    root: PathBuf,
    bins: PathBuf,
    /// The embedded server, where no other was named.
    _server: Option<S3Server>,
    chain: DevNode,
    store: Arc<S3Store>,
    bucket: Bucket,
    owner: AccountId,
    orchestrator: AccountId,
    validators: Vec<AccountId>,
    miners: Vec<AccountId>,
    run: RunId,
    fragments: u16,
    /// Tokens in a row.
    sequence_length: u32,
    device: String,
    torch_cuda_dir: Option<PathBuf>,
}

impl Place {
    /// Makes everything, by the operator's own commands where there is one.
    pub async fn prepare(arguments: &DevnetArgs, shutdown: &Shutdown) -> Result<Self, Failure> {
        let root = new_folder(&arguments.dir)?;
        let bins = match &arguments.bin_dir {
            Some(folder) => folder.clone(),
            None => std::env::current_exe().map_err(Failure::unavailable)?.parent().map(Path::to_path_buf).unwrap_or_default(),
        };
        for name in ["quasar-orchestrator", "quasar-miner", "quasar-validator"] {
            if !bins.join(name).is_file() {
                return Err(Failure::configuration(anyhow::anyhow!("{name} is not in {}", bins.display()))
                    .hint("build all binaries (`cargo build --bins`), or name their folder with --bin-dir"));
            }
        }
        let wallet = |name: &str, kind: KeyKind| -> Result<(AccountId, AccountId), Failure> {
            let wallet = Wallet::new(root.join("wallets"), name, HOTKEY);
            let hotkey = wallet.create_hotkey(kind).map_err(Failure::unavailable)?;
            let coldkey = wallet.create_throwaway_coldkey().map_err(Failure::unavailable)?;
            Ok((hotkey.account(), coldkey))
        };
        let owner = wallet("owner", KeyKind::Ed25519)?.0;
        let orchestrator = wallet("orchestrator", KeyKind::Ed25519)?.0;
        let mut neurons = Vec::new();
        let (mut validators, mut miners) = (Vec::new(), Vec::new());
        for index in 0..arguments.validators {
            let (hotkey, coldkey) = wallet(&format!("validator-{index}"), KeyKind::Ed25519)?;
            validators.push(hotkey);
            neurons.push(DevNeuron { hotkey, coldkey, stake: VALIDATOR_STAKE, validator_permit: true });
        }
        for index in 0..arguments.miners {
            // Keys of both kinds, as on every subnet: the last of several miners has to publish a key certificate.
            let is_last = arguments.miners > 1 && index + 1 == arguments.miners;
            let kind = if is_last { KeyKind::Sr25519 } else { KeyKind::Ed25519 };
            let (hotkey, coldkey) = wallet(&format!("miner-{index}"), kind)?;
            miners.push(hotkey);
            neurons.push(DevNeuron { hotkey, coldkey, stake: 0, validator_permit: false });
        }
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let chain = DevNode::start(DevChain {
            netuid: NETUID,
            block_ms: 1_000,
            tempo: 30,
            weights_rate_limit: 10,
            min_allowed_weights: 1,
            neurons,
            listen,
        })
        .await
        .map_err(Failure::unavailable)?;
        let (server, bucket) = bucket(arguments, &root, &orchestrator, &chain).await?;
        let store = bucket.store()?;
        if server.is_none() {
            store.make_public_bucket(&public_prefix(NETUID)).await.map_err(Failure::unavailable)?;
        }
        let local = serde_json::json!({ "genesis": format!("0x{}", hex::encode(chain.genesis())), "endpoint": chain.endpoint() });
        write(&root.join("chain.json"), local.to_string().as_bytes())?;
        let model = arguments.model.as_deref().map(read_text).transpose()?;
        write(&root.join("model.json"), model.as_deref().unwrap_or(MODEL_FILE).as_bytes())?;
        write(&root.join("corpus/sotu.jsonl.xz"), CORPUS)?;
        write(&root.join("corpus/held_out.txt"), HELD_OUT.as_bytes())?;
        write(&root.join("corpus/tokenizer.json"), TOKENIZER)?;
        let (run_file, fragments, sequence_length) = run_file(arguments)?;
        write(&root.join("run.toml"), run_file.as_bytes())?;
        for name in ["logs", "state"] {
            std::fs::create_dir_all(root.join(name)).map_err(Failure::unavailable)?;
        }
        let mut place = Self {
            root,
            bins,
            _server: server,
            chain,
            store: Arc::new(store),
            bucket,
            owner,
            orchestrator,
            validators,
            miners,
            run: RunId::NONE,
            fragments,
            sequence_length,
            device: arguments.device.clone(),
            torch_cuda_dir: arguments.torch_cuda_dir.clone(),
        };
        place.open_run(arguments, shutdown).await?;
        Ok(place)
    }

    /// The operator's path to a run.
    async fn open_run(&mut self, arguments: &DevnetArgs, shutdown: &Shutdown) -> Result<(), Failure> {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let at = |name: &str| text(self.root.join(name));
        let base = at("base");
        let seed = arguments.seed.to_string();
        let length = self.sequence_length.to_string();
        let orchestrator = self.orchestrator.to_string();
        let (corpus, tokenizer, held_out, shards, model, run_file) = (
            at("corpus/sotu.jsonl.xz"),
            at("corpus/tokenizer.json"),
            at("corpus/held_out.txt"),
            at("shards"),
            at("model.json"),
            at("run.toml"),
        );
        let steps: [(&str, &str, Vec<&str>); 6] = [
            ("quasar-miner", "", vec!["checkpoint", "init", "--config", &model, "--seed", &seed, "--out", &base]),
            (
                "quasar-orchestrator",
                "",
                vec![
                    "data",
                    "prepare",
                    "--input",
                    &corpus,
                    "--tokenizer",
                    &tokenizer,
                    "--sequence-length",
                    &length,
                    "--held-out",
                    &held_out,
                    "--shuffle-seed",
                    &seed,
                    "--licence",
                    "CC0-1.0",
                    "--source",
                    "State of the Union addresses",
                    "--name",
                    "sotu",
                    "--out",
                    &shards,
                ],
            ),
            ("quasar-orchestrator", "owner", vec!["root", "sign", "--orchestrator", &orchestrator]),
            ("quasar-orchestrator", "orchestrator", vec!["checkpoint", "publish", "--tree", &base, "--release", "base"]),
            ("quasar-orchestrator", "orchestrator", vec!["data", "publish", "--dir", &shards]),
            ("quasar-orchestrator", "orchestrator", vec!["run", "create", "--config", &run_file, "--release", "base"]),
        ];
        for (program, wallet, step) in steps {
            if shutdown.is_triggered() {
                return Err(Failure::try_later(anyhow::anyhow!("stopped")));
            }
            let recipe = Recipe {
                child: Child::Orchestrator,
                program: self.bins.join(program),
                arguments: step.iter().map(|argument| (*argument).to_owned()).collect(),
                environment: if wallet.is_empty() { Vec::new() } else { self.operator_environment(wallet) },
                log: self.logs().join("operator.log"),
            };
            let output = recipe.command().output().await.map_err(Failure::unavailable)?;
            if !output.status.success() {
                let errors = String::from_utf8_lossy(&output.stderr);
                return Err(Failure::unavailable(anyhow::anyhow!("`{program} {}` failed:\n{}", step.join(" "), errors.trim())));
            }
        }
        let object = self.store.get(&Keys::new(NETUID).current(), 1 << 16).await.map_err(Failure::unavailable)?;
        let outside = Context { genesis: self.chain.genesis(), netuid: NETUID, run: RunId::NONE };
        let current =
            open_stored::<CurrentRun>(&object.bytes, &outside, Expect::Account(&self.orchestrator)).map_err(Failure::unavailable)?;
        self.run = current.document.run;
        Ok(())
    }

    fn environment(&self, wallet: &str) -> Vec<(String, String)> {
        [
            ("QUASAR_NETWORK", "local".to_owned()),
            ("QUASAR_LOCAL_CHAIN", self.root.join("chain.json").to_string_lossy().into_owned()),
            ("QUASAR_NETUID", NETUID.to_string()),
            ("QUASAR_WALLET_PATH", self.root.join("wallets").to_string_lossy().into_owned()),
            ("QUASAR_WALLET_NAME", wallet.to_owned()),
            ("QUASAR_HOTKEY_NAME", HOTKEY.to_owned()),
            ("QUASAR_OWNER_IDENTITY", self.owner.to_string()),
            ("QUASAR_S3_BUCKET", self.bucket.name.clone()),
            ("QUASAR_S3_REGION", REGION.to_owned()),
            ("QUASAR_S3_ENDPOINT_URL", self.bucket.endpoint.clone()),
            ("QUASAR_STATE_DIR", self.root.join("state").join(wallet).to_string_lossy().into_owned()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }

    fn trainer_environment(&self, wallet: &str) -> Vec<(String, String)> {
        let mut environment = self.environment(wallet);
        if let Some(folder) = self.torch_cuda_dir.as_ref().filter(|_| self.device != "cpu") {
            environment.push(("QUASAR_TORCH_CUDA_DIR".to_owned(), folder.to_string_lossy().into_owned()));
        }
        environment
    }

    fn operator_environment(&self, wallet: &str) -> Vec<(String, String)> {
        let mut environment = self.environment(wallet);
        environment.push(("QUASAR_S3_ACCESS_KEY".to_owned(), self.bucket.access_key.clone()));
        environment.push(("QUASAR_S3_SECRET_KEY".to_owned(), self.bucket.secret_key.clone()));
        environment
    }

    fn recipe(&self, child: Child, program: &str, arguments: &[&str], environment: Vec<(String, String)>) -> Recipe {
        Recipe {
            child,
            program: self.bins.join(program),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            environment,
            log: self.logs().join(format!("{child}.log")),
        }
    }

    pub fn orchestrator(&self) -> Result<Recipe, Failure> {
        Ok(self.recipe(Child::Orchestrator, "quasar-orchestrator", &["run"], self.operator_environment("orchestrator")))
    }

    pub fn miner(&self, index: u16) -> Result<Recipe, Failure> {
        let name = format!("miner-{index}");
        let mut environment = self.trainer_environment(&name);
        let device = self.device.strip_prefix("cuda:").unwrap_or(&self.device);
        environment.push(("QUASAR_MINER_DEVICES".to_owned(), device.to_owned()));
        Ok(self.recipe(Child::Miner(index), "quasar-miner", &["run", "--worker-id", &name], environment))
    }

    pub fn validator(&self, index: u16) -> Result<Recipe, Failure> {
        let name = format!("validator-{index}");
        let mut environment = self.trainer_environment(&name);
        environment.push(("QUASAR_VALIDATOR_DEVICE".to_owned(), self.device.clone()));
        environment.push(("QUASAR_WEIGHT_RETRY_BASE_SEC".to_owned(), "2".to_owned()));
        Ok(self.recipe(Child::Validator(index), "quasar-validator", &["run", "--worker-id", &name], environment))
    }

    /// Loss of a tree on the held-out shard, by `quasar-validator eval`.
    pub async fn eval(&self, tree: &Path, tokens: &Path) -> Result<f64, Failure> {
        let length = self.sequence_length.to_string();
        let (tree, tokens) = (tree.to_string_lossy().into_owned(), tokens.to_string_lossy().into_owned());
        let arguments = ["eval", "--checkpoint", &tree, "--tokens", &tokens, "--sequence-length", &length, "--threads", "1", "--json"];
        let recipe = self.recipe(Child::Validator(0), "quasar-validator", &arguments, Vec::new());
        let output = recipe.command().output().await.map_err(Failure::unavailable)?;
        let answer = String::from_utf8_lossy(&output.stdout);
        let loss = answer
            .lines()
            .last()
            .and_then(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .and_then(|value| value["loss"].as_f64());
        loss.ok_or_else(|| {
            Failure::unavailable(anyhow::anyhow!("`quasar-validator eval` failed: {}", String::from_utf8_lossy(&output.stderr).trim()))
        })
    }

    /// Downloads a release with `checkpoint fetch`.
    pub async fn fetch_release(&self, release: &str) -> Result<PathBuf, Failure> {
        let out = self.root.join("release");
        let out_text = out.to_string_lossy().into_owned();
        let arguments = ["checkpoint", "fetch", "--release", release, "--out", &out_text];
        let recipe = self.recipe(Child::Orchestrator, "quasar-orchestrator", &arguments, self.operator_environment("orchestrator"));
        let output = recipe.command().output().await.map_err(Failure::unavailable)?;
        if output.status.success() {
            Ok(out)
        } else {
            Err(Failure::unavailable(anyhow::anyhow!("the release cannot be fetched: {}", String::from_utf8_lossy(&output.stderr).trim())))
        }
    }

    pub async fn status(&self) -> Option<Status> {
        let object = self.store.get(&self.run_keys().status(), 1 << 24).await.ok()?;
        serde_json::from_slice(&object.bytes).ok()
    }

    /// Revealed verdicts, verified.
    pub async fn verdicts(&self) -> Vec<VerdictReveal> {
        let prefix = format!("{}{}/verdicts/", public_prefix(NETUID), self.run);
        let mut verdicts = Vec::new();
        for meta in self.store.list(&prefix).await.unwrap_or_default() {
            if !meta.key.ends_with(".reveal.qsr") {
                continue;
            }
            let Ok(object) = self.store.get(&meta.key, 1 << 16).await else { continue };
            for validator in &self.validators {
                if let Ok(reveal) = open_stored::<VerdictReveal>(&object.bytes, &self.context(), Expect::Account(validator)) {
                    verdicts.push(reveal.document);
                }
            }
        }
        verdicts
    }

    pub async fn verdict_count(&self) -> u64 {
        self.verdicts().await.len() as u64
    }

    /// Whether the audits of the last cycle have been selected.
    pub fn audit_cycles_done(&self, status: &Status) -> bool {
        status.audit_cycle * u64::from(self.fragments) + u64::from(self.fragments) > status.closed_below
    }

    pub fn run_keys(&self) -> RunKeys {
        Keys::new(NETUID).run(self.run)
    }

    pub fn context(&self) -> Context {
        Context { genesis: self.chain.genesis(), netuid: NETUID, run: self.run }
    }

    pub fn store(&self) -> &S3Store {
        &self.store
    }

    pub fn orchestrator_account(&self) -> &AccountId {
        &self.orchestrator
    }

    pub fn netuid(&self) -> u16 {
        NETUID
    }

    pub fn fragments(&self) -> u16 {
        self.fragments
    }

    /// Validators come first on the development chain.
    pub fn validator_uid(&self, index: u16) -> u16 {
        index
    }

    /// Every neuron by uid.
    pub fn accounts(&self) -> Vec<AccountId> {
        self.validators.iter().chain(&self.miners).copied().collect()
    }

    pub fn chain_endpoint(&self) -> String {
        self.chain.endpoint()
    }

    pub fn genesis(&self) -> [u8; 32] {
        self.chain.genesis()
    }

    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    pub fn base_tree(&self) -> PathBuf {
        self.root.join("base")
    }

    pub fn shards(&self) -> PathBuf {
        self.root.join("shards")
    }
}

/// The bucket that was named, or that of an embedded server.
async fn bucket(
    arguments: &DevnetArgs,
    root: &Path,
    orchestrator: &AccountId,
    chain: &DevNode,
) -> Result<(Option<S3Server>, Bucket), Failure> {
    let s3 = &arguments.s3;
    if let (Some(endpoint), Some(access_key), Some(secret_key)) = (&s3.s3_endpoint, &s3.s3_access_key, &s3.s3_secret_key) {
        let (endpoint, name) = (endpoint.clone(), s3.s3_bucket.clone());
        return Ok((None, Bucket { endpoint, name, access_key: access_key.clone(), secret_key: secret_key.clone() }));
    }
    let secret_key = protocol::Digest::derive("quasar devnet secret", &[&orchestrator.0, &chain.genesis()]).to_string();
    let server = S3Server::start(ServerSettings {
        backend: Backend::Disk(root.join("bucket")),
        bucket: BUCKET.to_owned(),
        access_key: ACCESS_KEY.to_owned(),
        secret_key: secret_key.clone(),
        public_prefixes: vec![public_prefix(NETUID)],
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
    })
    .await
    .map_err(Failure::unavailable)?;
    let endpoint = server.endpoint();
    Ok((Some(server), Bucket { endpoint, name: BUCKET.to_owned(), access_key: ACCESS_KEY.to_owned(), secret_key }))
}

/// The run file with the wanted number of cycles and codecs; fragments and sequence length of it.
fn run_file(arguments: &DevnetArgs) -> Result<(String, u16, u32), Failure> {
    let broken = |what: &str| Failure::configuration(anyhow::anyhow!("the run file is wrong: {what}"));
    let text = arguments.run_file.as_deref().map(read_text).transpose()?;
    let mut table: toml::Table = text.as_deref().unwrap_or(RUN_FILE).parse().map_err(|_| broken("it does not parse"))?;
    let parameters = table.get_mut("parameters").and_then(toml::Value::as_table_mut).ok_or_else(|| broken("no [parameters]"))?;
    let cycles = arguments.cycles as i64;
    parameters.insert("cycles".to_owned(), toml::Value::Integer(cycles));
    for (key, codec) in [("codec_up", &arguments.codec_up), ("codec_down", &arguments.codec_down)] {
        if let Some(codec) = codec {
            parameters.insert(key.to_owned(), toml::Value::String(codec.clone()));
        }
    }
    let number = |key: &str| parameters.get(key).and_then(toml::Value::as_integer).ok_or_else(|| broken(key));
    let (fragments, length, inner_steps) = (number("fragments")?, number("sequence_length")?, number("inner_steps")?);
    // The learning rate falls over exactly this run.
    let schedule = parameters.get_mut("inner").and_then(|inner| inner.get_mut("schedule")).and_then(toml::Value::as_table_mut);
    let schedule = schedule.ok_or_else(|| broken("no [parameters.inner.schedule]"))?;
    schedule.insert("total_steps".to_owned(), toml::Value::Integer(cycles * inner_steps));
    Ok((table.to_string(), fragments as u16, length as u32))
}

fn read_text(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| Failure::configuration(anyhow::anyhow!("{}: {error}", path.display())))
}

fn new_folder(dir: &Path) -> Result<PathBuf, Failure> {
    let occupied = std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
    if occupied {
        return Err(Failure::configuration(anyhow::anyhow!("{} is not empty", dir.display())).hint("name a new folder with --dir"));
    }
    std::fs::create_dir_all(dir)
        .and_then(|()| dir.canonicalize())
        .map_err(|error| Failure::configuration(anyhow::anyhow!("{}: {error}", dir.display())))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)
        .and_then(|()| std::fs::write(path, bytes))
        .map_err(|error| Failure::unavailable(anyhow::anyhow!("{}: {error}", path.display())))
}
