//! The `chain` commands against a development node: what is on chain, what would be sent, which rule stands against it, and with
//! which exit code a script hears of it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use chain::devnode::{Change, DevChain, DevNeuron, DevNode, DevOptions};
use chain::{Hotkey, Wallet};
use protocol::{AccountId, KeyKind};
use serde_json::{Value, json};

const NETUID: u16 = 24;

/// A validator with uid 0, two miners, and a chain.
struct Place {
    folder: tempfile::TempDir,
    node: DevNode,
    /// Outlives the node.
    _runtime: tokio::runtime::Runtime,
}

fn miner(n: u8) -> AccountId {
    Hotkey::from_seed(KeyKind::Ed25519, &[n; 32]).account()
}

impl Place {
    fn new(options: DevOptions) -> Self {
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
        let place = Self { folder, node, _runtime: runtime };
        place.name_chain(place.node.genesis(), &place.node.endpoint());
        std::fs::write(place.path("scores.json"), json!({ miner(1).to_string(): 10, miner(2).to_string(): 30 }).to_string()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn name_chain(&self, genesis: [u8; 32], endpoint: &str) {
        let local = json!({ "genesis": format!("0x{}", protocol::Digest(genesis)), "endpoint": endpoint });
        std::fs::write(self.path("chain.json"), local.to_string()).unwrap();
    }

    /// The change is in force in the next block.
    fn change(&self, change: Change) {
        self.node.change(change);
        self.node.produce();
    }

    fn run_as(&self, hotkey: &str, arguments: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quasar-validator"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("QUASAR_") || name.to_string_lossy().starts_with("AWS_") {
                command.env_remove(name);
            }
        }
        command.arg("chain").args(arguments).stdin(Stdio::null());
        command.args(["--network", "local", "--netuid", &NETUID.to_string(), "--wallet-name", "w", "--hotkey-name", hotkey]);
        for (flag, name) in [("--local-chain", "chain.json"), ("--wallet-path", "wallets"), ("--state-dir", "state")] {
            command.arg(flag).arg(self.path(name));
        }
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    /// Exit code and JSON of `set-weights`.
    fn set(&self, hotkey: &str, more: &[&str]) -> (i32, Value) {
        let scores = self.path("scores.json").display().to_string();
        let arguments = [&["set-weights", "--json", "--scores", &scores], more].concat();
        let (code, stdout, stderr) = self.run_as(hotkey, &arguments);
        (code, serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout} {stderr}")))
    }
}

const ROW: [(u16, u16); 2] = [(1, 21845), (2, 65535)];

#[test]
fn a_dry_run_shows_the_row_and_sends_nothing_and_a_real_one_is_read_back_from_the_chain() {
    let place = Place::new(DevOptions::default());
    let (code, answer) = place.set("own", &["--dry-run"]);
    assert_eq!(code, 0, "{answer}");
    assert_eq!(answer["row"][1], json!({ "uid": 2, "hotkey": miner(2).to_string(), "value": 65535, "share_ppm": 750_000 }));
    assert_eq!((&answer["dry_run"], &answer["refused_by"], &answer["reveal_round"]), (&json!(true), &Value::Null, &Value::Null));
    assert_eq!(place.node.weights(0, 0), []);

    let (code, answer) = place.set("own", &[]);
    assert_eq!((code, &answer["is_on_chain"]), (0, &json!(true)), "{answer}");
    assert_eq!(place.node.weights(0, 0), ROW);
    let (code, stdout, _) = place.run_as("own", &["weights", "--json"]);
    let shown: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &shown["row"], &shown["is_registered"]), (0, &answer["row"], &json!(true)));
    // The same once more: it is there.
    assert_eq!(place.set("own", &[]).0, 0);
    // Another row: the rate limit, which passes by itself.
    std::fs::write(place.path("scores.json"), json!({ miner(1).to_string(): 10 }).to_string()).unwrap();
    let (code, answer) = place.set("own", &["--dry-run"]);
    assert_eq!(code, 75, "{answer}");
    assert!(answer["refused_by"]["reason"].as_str().unwrap().contains("rate limit"), "{answer}");
    assert!(answer["stage"].as_str().unwrap().contains("rate limit lasts until block"), "{answer}");
    let (code, stdout, _) = place.run_as("own", &["status"]);
    for part in ["uid 0, with a validator permit and 5 of stake", "rate limit 10000 blocks", "commit-reveal off", "it has not run here"] {
        assert!(code == 0 && stdout.contains(part), "{part}: {stdout}");
    }
}

#[test]
fn where_commit_reveal_is_on_the_row_is_locked_and_committed() {
    let place = Place::new(DevOptions { commit_reveal: true, ..Default::default() });
    let (code, answer) = place.set("own", &["--dry-run"]);
    assert!(code == 0 && answer["reveal_round"].is_u64(), "{answer}");
    let (code, answer) = place.set("own", &[]);
    assert!(code == 0 && answer["stage"].as_str().unwrap().contains("committed in block"), "{answer}");
    assert_eq!(place.node.weights(0, 0), [], "nobody sees it yet");
    let (_, stdout, _) = place.run_as("own", &["weights", "--json"]);
    let shown: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(shown["waiting_commits"].as_array().map(Vec::len), Some(1), "{shown}");
}

#[test]
fn each_rule_that_stands_in_the_way_is_named_with_its_remedy_and_exit_code() {
    let place = Place::new(DevOptions::default());
    for (raise, lift, code, reason) in [
        (Change::ValidatorPermit { uid: 0, has_permit: false }, Change::ValidatorPermit { uid: 0, has_permit: true }, 78, "permit"),
        (Change::WeightsVersion(9), Change::WeightsVersion(0), 78, "version 9"),
        (Change::Tempo(0), Change::Tempo(10_000), 78, "no epochs"),
    ] {
        place.change(raise);
        for arguments in [&["--dry-run"][..], &[]] {
            let (found, answer) = place.set("own", arguments);
            assert!(found == code && answer["stage"].as_str().unwrap().contains(reason), "{found} {answer}");
            assert!(!answer["hint"].as_str().unwrap().is_empty());
        }
        place.change(lift);
    }
    let (code, answer) = place.set("stranger", &["--dry-run"]);
    assert!(code == 75 && answer["stage"].as_str().unwrap().contains("not registered"), "{code} {answer}");
    place.change(Change::StakeThreshold(9_000_000_000));
    // What is inherited counts too, and only the chain adds it up: a dry run can but warn.
    let (code, answer) = place.set("own", &["--dry-run"]);
    assert!(code == 0 && answer["is_stake_below_threshold"] == true, "{code} {answer}");
    let (code, answer) = place.set("own", &[]);
    assert!(code == 78 && answer["stage"].as_str().unwrap().contains("stake is too low"), "{code} {answer}");
    assert_eq!(place.node.weights(0, 0), []);
}

#[test]
fn the_wrong_network_and_unusable_scores_are_refused_and_a_dead_endpoint_is_told_apart() {
    let place = Place::new(DevOptions::default());
    let told = |arguments: &[&str], code: i32, part: &str| {
        let (found, _, stderr) = place.run_as("own", arguments);
        assert!(found == code && stderr.contains(part) && stderr.contains("hint: "), "{found} {stderr}");
    };
    told(&["set-weights"], 78, "no scores are known");
    for text in ["[1]", "{\"5xyz\": 1}", "{\"5xyz\": -1}", "nothing"] {
        std::fs::write(place.path("broken.json"), text).unwrap();
        told(&["set-weights", "--dry-run", "--scores", &place.path("broken.json").display().to_string()], 78, "broken.json cannot be read");
    }
    let scores = place.path("scores.json").display().to_string();
    place.name_chain([0x22; 32], &place.node.endpoint());
    for arguments in [&["status"][..], &["weights"], &["set-weights", "--scores", &scores]] {
        told(arguments, 78, "serves another network");
    }
    assert_eq!(place.node.weights(0, 0), [], "nothing was sent to the wrong place");
    place.name_chain(place.node.genesis(), "ws://127.0.0.1:1");
    told(&["status"], 69, "failed");
}
