//! A run as its operator makes it, with nobody in it but whom the test starts: chain and bucket on loopback in this process, every
//! command and every daemon a process of its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use chain::Wallet;
use chain::devnode::{DevChain, DevNeuron, DevNode};
use protocol::documents::{CurrentRun, Head};
use protocol::envelope::{Document, RunId, verify_as_stated};
use protocol::paths::{Keys, RunKeys, public_prefix};
use protocol::{AccountId, Digest, KeyKind, codec};
use storage::server::{Backend, S3Server, ServerSettings};
use storage::{ObjectStore, PutCondition, S3Settings, S3Store, StoreError};
use tokio::runtime::Runtime;

use crate::binary;

const NETUID: u16 = 24;
const BUCKET: &str = "quasar";
const ACCESS_KEY: &str = "operator";
const SECRET_KEY: &str = "of an operator's test";
const REGION: &str = "us-east-1";
const VALIDATOR_STAKE: u64 = 1_000_000_000_000;
const LOOK: Duration = Duration::from_millis(100);
const CONFIGS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs");

/// Chain, bucket, wallets, and a run that was created.
pub struct Office {
    root: PathBuf,
    runtime: Runtime,
    _chain: DevNode,
    server: S3Server,
    store: S3Store,
    owner: AccountId,
    /// A registered miner, who comes where a test lets him.
    pub miner: AccountId,
    run: RunKeys,
    _folder: tempfile::TempDir,
}

/// A head with the sequence number of its envelope and who signed it.
#[derive(Clone, Debug)]
pub struct SeenHead {
    pub head: Head,
    pub sequence: u64,
    pub signer: AccountId,
}

impl SeenHead {
    /// Whether nothing of this head is older than in `before`.
    pub fn is_no_older_than(&self, before: &Self) -> bool {
        let (now, then) = (&self.head, &before.head);
        now.fragments.iter().zip(&then.fragments).all(|(now, then)| now.version >= then.version)
            && now.epoch >= then.epoch
            && now.outer_step >= then.outer_step
            && now.closed_below >= then.closed_below
            && now.log.size >= then.log.size
            // Each key has numbers of its own.
            && (self.sequence >= before.sequence || self.signer != before.signer)
    }
}

/// A daemon; it is killed with this.
pub struct Running {
    pub child: Child,
    log: PathBuf,
}

impl Running {
    /// `kill -SIGNAL`.
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").arg(format!("-{signal}")).arg(self.child.id().to_string()).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{signal}");
    }

    pub fn is_up(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_none()
    }

    /// Waits for its end.
    pub fn ended_within(&mut self, time: Duration) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be asked") {
                return status;
            }
            assert!(begun.elapsed() < time, "still running after {time:?}:\n{}", self.log());
            std::thread::sleep(LOOK);
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Also a stopped process dies of it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Office {
    /// From nothing to a run, by the operator's own commands.
    pub fn open() -> Self {
        Self::open_with(&[])
    }

    /// As [`Office::open`], with changes of the run's parameters.
    pub fn open_with(changes: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let root = folder.path().canonicalize().expect("a folder has a path");
        let runtime = Runtime::new().expect("a runtime");
        let wallet = |name: &str| {
            let wallet = Wallet::new(root.join("wallets"), name, "default");
            let hotkey = wallet.create_hotkey(KeyKind::Ed25519).expect("a hotkey").account();
            (hotkey, wallet.create_throwaway_coldkey().expect("a coldkey"))
        };
        let (owner, _) = wallet("owner");
        let orchestrator = wallet("orchestrator").0;
        wallet("orchestrator-2");
        let (miner, coldkey) = wallet("miner");
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let (validator, validators_coldkey) = wallet("validator");
        let neurons = vec![
            DevNeuron { hotkey: miner, coldkey, stake: 0, validator_permit: false },
            DevNeuron { hotkey: validator, coldkey: validators_coldkey, stake: VALIDATOR_STAKE, validator_permit: true },
        ];
        let settings =
            DevChain { netuid: NETUID, block_ms: 1_000, tempo: 30, weights_rate_limit: 10, min_allowed_weights: 1, neurons, listen };
        let chain = runtime.block_on(DevNode::start(settings)).expect("the chain starts");
        let server = runtime
            .block_on(S3Server::start(ServerSettings {
                backend: Backend::Disk(root.join("bucket")),
                bucket: BUCKET.to_owned(),
                access_key: ACCESS_KEY.to_owned(),
                secret_key: SECRET_KEY.to_owned(),
                public_prefixes: vec![public_prefix(NETUID)],
                listen,
            }))
            .expect("the bucket starts");
        let store = S3Store::new(S3Settings {
            endpoint: Some(server.endpoint()),
            region: REGION.to_owned(),
            bucket: BUCKET.to_owned(),
            access_key: Some(ACCESS_KEY.to_owned()),
            secret_key: Some(SECRET_KEY.to_owned()),
            path_style: true,
        })
        .expect("the store's settings are sound");
        let local = serde_json::json!({ "genesis": Digest(chain.genesis()).to_string(), "endpoint": chain.endpoint() });
        std::fs::write(root.join("chain.json"), local.to_string()).expect("the folder is writable");
        let run = Keys::new(NETUID).run(RunId::NONE);
        let mut office = Self { root, runtime, _chain: chain, server, store, owner, miner, run, _folder: folder };
        office.create_run(&orchestrator, changes);
        office
    }

    fn create_run(&mut self, orchestrator: &AccountId, changes: &[(&str, &str)]) {
        let at = |name: &str| self.root.join(name).to_string_lossy().into_owned();
        let base = at("base");
        let model = format!("{CONFIGS}/devnet-model.json");
        let made = Command::new(binary("quasar-miner"))
            .args(["checkpoint", "init", "--config", &model, "--seed", "1", "--out", &base])
            .output()
            .expect("quasar-miner starts");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut text = std::fs::read_to_string(format!("{CONFIGS}/run-devnet.toml")).expect("the file is there");
        for (from, to) in changes {
            assert_eq!(text.matches(from).count(), 1, "{from}");
            text = text.replace(from, to);
        }
        let parameters = at("run.toml");
        std::fs::write(&parameters, text).expect("the folder is writable");
        self.says("owner", &["root", "sign", "--orchestrator", &orchestrator.to_string()]);
        self.says("orchestrator", &["checkpoint", "publish", "--tree", &base, "--release", "base"]);
        self.publish_shard("words");
        self.says("orchestrator", &["run", "create", "--config", &parameters, "--release", "base"]);
        let keys = Keys::new(NETUID);
        let bytes = self.read(&keys.current()).expect("the run is current");
        let (envelope, _) = verify_as_stated(&bytes).expect("a signed document");
        let current: CurrentRun = codec::decode(&envelope.payload, CurrentRun::PURPOSE.limit()).expect("it decodes");
        self.run = keys.run(current.run);
    }

    /// `run create` once more, with these arguments besides.
    pub fn create_again(&self, more: &[&str]) -> Output {
        let parameters = format!("{CONFIGS}/run-devnet.toml");
        self.run("orchestrator", &[&["run", "create", "--config", &parameters, "--release", "base"][..], more].concat())
    }

    /// Prepares and publishes a shard of this name; gives the folder that it was prepared in.
    pub fn publish_shard(&self, name: &str) -> String {
        let at = |kind: &str| self.root.join(format!("{name}{kind}")).to_string_lossy().into_owned();
        let (text, shards) = (at(".jsonl"), at("-shards"));
        let words = [name, "run", "of", "which", "nobody", "trains", "a", "word", "and", "which", "is", "ordered", "about"];
        let lines = (0..200).map(|line| {
            let text: Vec<&str> = (0..300).map(|word| words[(line * 7 + word * (line % 5 + 1)) % words.len()]).collect();
            format!("{}\n", serde_json::json!({ "text": text.join(" ") }))
        });
        std::fs::write(&text, lines.collect::<String>()).expect("the folder is writable");
        let tokenizer = format!("{CONFIGS}/corpus/tokenizer.json");
        let shape = ["--tokenizer", &tokenizer, "--sequence-length", "128", "--name", name];
        let origin = ["--licence", "CC0-1.0", "--source", "a test"];
        self.says("orchestrator", &[&["data", "prepare", "--input", &text, "--out", &shards][..], &shape, &origin].concat());
        // Published twice, it is the same.
        for _ in 0..2 {
            self.says("orchestrator", &["data", "publish", "--dir", &shards]);
        }
        shards
    }

    /// Publishes what [`Office::publish_shard`] prepared once more, over other bytes at the key of its first shard.
    pub fn publish_over(&self, shards: &str) -> Output {
        let publish = ["data", "publish", "--dir", shards];
        let said = self.says("orchestrator", &publish);
        let id = said.split_whitespace().nth(2).expect("it names the shard");
        let other = bytes::Bytes::from_static(b"other bytes");
        let key = Keys::new(NETUID).shard_tokens(id);
        self.runtime.block_on(self.store.put(&key, other, PutCondition::Always)).expect("the bucket takes it");
        self.run("orchestrator", &publish)
    }

    pub fn account(&self, wallet: &str) -> AccountId {
        Wallet::new(self.root.join("wallets"), wallet, "default").load_hotkey().expect("the wallet is there").account()
    }

    /// A command of a program, as that wallet's user would type it on a machine of its own.
    fn command(&self, program: &str, wallet: &str, machine: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary(program));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("QUASAR_") || name.to_string_lossy().starts_with("AWS_") {
                command.env_remove(&name);
            }
        }
        command
            .args(arguments)
            .env("QUASAR_NETWORK", "local")
            .env("QUASAR_LOCAL_CHAIN", self.root.join("chain.json"))
            .env("QUASAR_NETUID", NETUID.to_string())
            .env("QUASAR_WALLET_PATH", self.root.join("wallets"))
            .env("QUASAR_WALLET_NAME", wallet)
            .env("QUASAR_HOTKEY_NAME", "default")
            .env("QUASAR_OWNER_IDENTITY", self.owner.to_string())
            .env("QUASAR_S3_BUCKET", BUCKET)
            .env("QUASAR_S3_REGION", REGION)
            .env("QUASAR_S3_ENDPOINT_URL", self.server.endpoint())
            .env("QUASAR_STATE_DIR", self.root.join("state").join(machine))
            .env("QUASAR_MINER_DEVICES", "cpu")
            .env("QUASAR_VALIDATOR_DEVICE", "cpu")
            .stdin(Stdio::null());
        if program == "quasar-orchestrator" {
            command.env("QUASAR_S3_ACCESS_KEY", ACCESS_KEY).env("QUASAR_S3_SECRET_KEY", SECRET_KEY);
        }
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, wallet: &str, arguments: &[&str]) -> Output {
        self.command("quasar-orchestrator", wallet, wallet, arguments).output().expect("quasar-orchestrator starts")
    }

    /// What a command prints that has to succeed.
    pub fn says(&self, wallet: &str, arguments: &[&str]) -> String {
        let output = self.run(wallet, arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`{}` ended with {}:\n{errors}", arguments.join(" "), output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The last line of what it prints, as JSON.
    pub fn says_json(&self, wallet: &str, arguments: &[&str]) -> serde_json::Value {
        let text = self.says(wallet, arguments);
        serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Starts an orchestrator on a machine of that name: each has a disk of its own.
    pub fn start(&self, wallet: &str, machine: &str, arguments: &[&str]) -> Running {
        self.start_program("quasar-orchestrator", wallet, machine, arguments)
    }

    /// Starts the miner, or the validator.
    pub fn start_client(&self, program: &str, wallet: &str) -> Running {
        self.start_program(program, wallet, wallet, &["run"])
    }

    fn start_program(&self, program: &str, wallet: &str, machine: &str, arguments: &[&str]) -> Running {
        let log = self.root.join(format!("{machine}.log"));
        let file = std::fs::File::create(&log).expect("the folder is writable");
        let both = file.try_clone().expect("a file can be shared");
        let child = self.command(program, wallet, machine, arguments).stdout(file).stderr(both).spawn().expect("the program starts");
        Running { child, log }
    }

    /// The folder that the bucket lies in.
    pub fn bucket(&self) -> PathBuf {
        self.root.join("bucket")
    }

    fn read(&self, key: &str) -> Option<bytes::Bytes> {
        match self.runtime.block_on(self.store.get(key, 1 << 24)) {
            Ok(object) => Some(object.bytes),
            Err(StoreError::NotFound { .. }) => None,
            Err(error) => panic!("{key}: {error}"),
        }
    }

    /// The head in the bucket.
    pub fn head(&self) -> SeenHead {
        let bytes = self.read(&self.run.head()).expect("a run has a head");
        let (envelope, _) = verify_as_stated(&bytes).expect("a signed document");
        let head = codec::decode(&envelope.payload, Head::PURPOSE.limit()).expect("it decodes");
        SeenHead { head, sequence: envelope.header.sequence, signer: envelope.header.signer.account() }
    }

    /// Looks at the head until it is as wanted, and checks that it never goes back meanwhile. Gives it with the time that it took.
    pub fn head_within(&self, time: Duration, wanted: impl Fn(&SeenHead) -> bool, logs: &dyn Fn() -> String) -> (SeenHead, Duration) {
        let begun = Instant::now();
        let mut last = self.head();
        loop {
            let head = self.head();
            assert!(head.is_no_older_than(&last), "the head went back from {last:?} to {head:?}");
            if wanted(&head) {
                return (head, begun.elapsed());
            }
            assert!(begun.elapsed() < time, "not within {time:?}: {head:?}\n{}", logs());
            last = head;
            std::thread::sleep(LOOK);
        }
    }
}
