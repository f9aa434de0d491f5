//! A validator's wallet, a development node, and the program between them.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use chain::devnode::{Change, DevChain, DevNeuron, DevNode, DevOptions};
use chain::{Hotkey, Wallet};
use protocol::{AccountId, KeyKind};
use serde_json::{Value, json};

const NETUID: u16 = 24;

/// A validator with uid 0, two miners, and a chain.
pub struct Place {
    folder: tempfile::TempDir,
    pub node: DevNode,
    /// Outlives the node.
    pub runtime: tokio::runtime::Runtime,
}

pub fn miner(n: u8) -> AccountId {
    Hotkey::from_seed(KeyKind::Ed25519, &[n; 32]).account()
}

impl Place {
    pub fn new(options: DevOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let wallets = folder.path().join("wallets");
        let own = Wallet::new(&wallets, "w", "own").create_hotkey(KeyKind::Sr25519).unwrap().account();
        Wallet::new(&wallets, "w", "stranger").create_hotkey(KeyKind::Ed25519).unwrap();
        let neuron = |hotkey, stake| DevNeuron { hotkey, coldkey: hotkey, stake, validator_permit: stake > 0 };
        let chain = DevChain {
            netuid: NETUID,
            block_ms: 50,
            // So long that neither passes while a busy machine runs a test.
            tempo: 10_000,
            weights_rate_limit: 10_000,
            min_allowed_weights: 1,
            neurons: vec![neuron(own, 5_000_000_000), neuron(miner(1), 0), neuron(miner(2), 0)],
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let node = runtime.block_on(DevNode::start_with(chain, options)).unwrap();
        let place = Self { folder, node, runtime };
        place.name_chain(place.node.genesis(), &place.node.endpoint());
        std::fs::write(place.path("scores.json"), json!({ miner(1).to_string(): 10, miner(2).to_string(): 30 }).to_string()).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn name_chain(&self, genesis: [u8; 32], endpoint: &str) {
        let local = json!({ "genesis": format!("0x{}", protocol::Digest(genesis)), "endpoint": endpoint });
        std::fs::write(self.path("chain.json"), local.to_string()).unwrap();
    }

    /// The change is in force in the next block.
    pub fn change(&self, change: Change) {
        self.node.change(change);
        self.node.produce();
    }

    /// The program, with everything that the settings must name.
    pub fn command(&self, hotkey: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quasar-validator"));
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if ["QUASAR_", "AWS_", "SSL_CERT_", "NOTIFY_", "WATCHDOG_"].iter().any(|ours| name.starts_with(ours)) {
                command.env_remove(&*name);
            }
        }
        command.args(arguments).stdin(Stdio::null());
        command.args(["--network", "local", "--netuid", &NETUID.to_string(), "--wallet-name", "w", "--hotkey-name", hotkey]);
        for (flag, name) in [("--local-chain", "chain.json"), ("--wallet-path", "wallets"), ("--state-dir", "state")] {
            command.arg(flag).arg(self.path(name));
        }
        command
    }

    pub fn run_as(&self, hotkey: &str, arguments: &[&str]) -> (i32, String, String) {
        output(self.command(hotkey, &[&["chain"], arguments].concat()))
    }

    /// Exit code and JSON of `set-weights`.
    pub fn set(&self, hotkey: &str, more: &[&str]) -> (i32, Value) {
        let scores = self.path("scores.json").display().to_string();
        let arguments = [&["set-weights", "--json", "--scores", &scores], more].concat();
        let (code, stdout, stderr) = self.run_as(hotkey, &arguments);
        (code, serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout} {stderr}")))
    }
}

/// Exit code, standard output and standard error of a command.
pub fn output(mut command: Command) -> (i32, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}
