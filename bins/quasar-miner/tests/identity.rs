//! Identities against a chain, as a person meets them: registration and its cost, key certificates, encrypted hotkeys, and the wrong
//! network.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use chain::devnode::{DevChain, DevNeuron, DevNode};
use chain::{Chain as _, ConnectSettings, SubtensorClient, Wallet};
use protocol::AccountId;
use serde_json::{Value, json};

const NETUID: u16 = 24;

/// A folder with wallets, and a chain on which some of their hotkeys are registered.
struct Place {
    folder: tempfile::TempDir,
    node: Option<DevNode>,
    /// The subnet that the commands are told.
    netuid: u16,
    /// Outlives the node.
    runtime: tokio::runtime::Runtime,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), runtime: tokio::runtime::Runtime::new().unwrap(), node: None, netuid: NETUID }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn wallet(&self, hotkey: &str) -> Wallet {
        Wallet::new(self.path("wallets"), "w", hotkey)
    }

    fn command(&self, arguments: &[&str], hotkey: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quasar-miner"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("QUASAR_") || name.to_string_lossy().starts_with("AWS_") {
                command.env_remove(name);
            }
        }
        command.args(arguments).args(["--wallet-name", "w", "--hotkey-name", hotkey]).stdin(Stdio::null());
        command.arg("--wallet-path").arg(self.path("wallets"));
        if self.node.is_some() {
            command.args(["--network", "local", "--netuid", &self.netuid.to_string()]).arg("--local-chain").arg(self.path("chain.json"));
        }
        command
    }

    fn run(&self, arguments: &[&str], hotkey: &str) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(arguments, hotkey).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }

    fn answer(&self, arguments: &[&str], hotkey: &str) -> Value {
        let (code, stdout, stderr) = self.run(arguments, hotkey);
        assert_eq!(code, 0, "{arguments:?}: {stderr}");
        serde_json::from_str(&stdout).unwrap()
    }

    fn make(&self, hotkey: &str, kind: &str) -> AccountId {
        let made = self.answer(&["identity", "new", "--kind", kind, "--json"], hotkey);
        made["ss58_address"].as_str().unwrap().parse().unwrap()
    }

    /// Starts the chain with these hotkeys on it. The commands find it by its file, which may name another genesis.
    fn start(&mut self, hotkeys: &[AccountId], genesis: Option<[u8; 32]>) {
        let neuron = |hotkey: &AccountId| DevNeuron { hotkey: *hotkey, coldkey: *hotkey, stake: 0, validator_permit: false };
        let chain = DevChain {
            netuid: NETUID,
            block_ms: 50,
            tempo: 360,
            weights_rate_limit: 100,
            min_allowed_weights: 1,
            neurons: hotkeys.iter().map(neuron).collect(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        };
        let node = self.runtime.block_on(DevNode::start(chain)).unwrap();
        let genesis = protocol::Digest(genesis.unwrap_or(node.genesis()));
        let local = json!({ "genesis": format!("0x{genesis}"), "endpoint": node.endpoint() });
        std::fs::write(self.path("chain.json"), local.to_string()).unwrap();
        self.node = Some(node);
    }

    fn commitment(&self, hotkey: &str) -> Option<Vec<u8>> {
        let (node, account) = (self.node.as_ref().unwrap(), self.wallet(hotkey).load_hotkeypub().unwrap().account());
        let settings = ConnectSettings { endpoints: vec![node.endpoint()], genesis: None };
        self.runtime.block_on(async { SubtensorClient::connect(settings).await.unwrap().commitment(NETUID, &account).await.unwrap() })
    }
}

#[test]
fn an_sr25519_hotkey_is_certified_once_and_shown_with_its_registration() {
    let mut place = Place::new();
    let (ours, _) = (place.make("sr", "sr25519"), place.make("stranger", "sr25519"));
    let ed = place.make("ed", "ed25519");
    place.start(&[ed, ours], None);
    let shown = place.answer(&["identity", "show", "--json"], "sr");
    assert_eq!(
        (&shown["crypto_type"], &shown["standing"]["uid"], &shown["standing"]["certificate"]),
        (&json!("sr25519"), &json!(1), &json!("missing"))
    );
    assert_eq!(place.answer(&["identity", "show", "--json"], "ed")["standing"]["certificate"], "not_needed");

    assert_eq!(place.answer(&["identity", "certify", "--json", "--dry-run"], "sr")["on_chain"], false);
    assert_eq!(place.commitment("sr"), None, "a dry run sends nothing");
    let certified = place.answer(&["identity", "certify", "--json"], "sr");
    assert!(certified["block"].is_u64(), "{certified}");
    let key = hex(&place.wallet("sr").load_hotkey().unwrap().sealing_public());
    assert_eq!(certified["x25519"], key);
    assert!(hex(&place.commitment("sr").unwrap()).ends_with(&key));
    assert!(place.answer(&["identity", "certify", "--json"], "sr")["block"].is_null(), "it is there already");
    assert_eq!(place.answer(&["identity", "show", "--json"], "sr")["standing"]["certificate"], "published");

    let (code, stdout, _) = place.run(&["identity", "show"], "stranger");
    assert!(code == 0 && stdout.contains("not registered on subnet 24; registering costs"), "{stdout}");
    for arguments in [&["identity", "show"][..], &["identity", "certify"]] {
        place.netuid = 9;
        let (code, _, stderr) = place.run(arguments, "sr");
        assert!(code == 78 && stderr.contains("subnet 9 does not exist"), "{code} {stderr}");
        place.netuid = NETUID;
    }
    let (code, _, stderr) = place.run(&["identity", "certify"], "stranger");
    assert!(code == 75 && stderr.contains("not registered") && stderr.contains("hint: "), "{code} {stderr}");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_commitment_for_another_purpose_is_given_up_only_when_asked() {
    let mut place = Place::new();
    let account = place.make("sr", "sr25519");
    place.start(&[account], None);
    let settings = ConnectSettings { endpoints: vec![place.node.as_ref().unwrap().endpoint()], genesis: None };
    let hotkey = place.wallet("sr").load_hotkey().unwrap();
    place.runtime.block_on(async {
        SubtensorClient::connect(settings).await.unwrap().set_commitment(&hotkey, NETUID, b"something else").await.unwrap();
    });
    let (code, _, stderr) = place.run(&["identity", "certify"], "sr");
    assert!(code == 78 && stderr.contains("--replace"), "{code} {stderr}");
    assert_eq!(place.commitment("sr").as_deref(), Some(&b"something else"[..]));
    assert!(place.answer(&["identity", "certify", "--replace", "--json"], "sr")["block"].is_u64());
}

#[test]
fn the_wrong_network_is_refused_by_every_command_and_by_the_daemon_before_anything_is_sent() {
    let mut place = Place::new();
    let account = place.make("sr", "sr25519");
    place.start(&[account], Some([0x22; 32]));
    for arguments in [&["identity", "show"][..], &["identity", "certify"]] {
        let (code, _, stderr) = place.run(arguments, "sr");
        assert!(code == 78 && stderr.contains("serves another network") && stderr.contains("hint: "), "{code} {stderr}");
    }
    let owner = account.to_string();
    let mut daemon = place.command(&["run", "--worker-id", "w", "--owner-identity", &owner, "--devices", "cpu"], "sr");
    daemon.args(["--s3-bucket", "b", "--s3-endpoint-url", "http://127.0.0.1:1", "--state-dir"]).arg(place.path("state"));
    let ended = daemon.output().unwrap();
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.code() == Some(78) && stderr.contains("serves another network"), "{stderr}");
    assert_eq!(place.commitment("sr"), None);
}

#[test]
fn an_encrypted_hotkey_opens_with_systemds_credential_and_never_without_its_password() {
    let mut place = Place::new();
    let password = place.path("password");
    std::fs::write(&password, "correct horse\n").unwrap();
    let file = password.display().to_string();
    let made = place.answer(&["identity", "new", "--encrypt", "--kind", "sr25519", "--json", "--password-file", &file], "locked");
    assert!(std::fs::read(place.wallet("locked").hotkey_path()).unwrap().starts_with(b"$NACL"));
    place.start(&[made["ss58_address"].as_str().unwrap().parse().unwrap()], None);
    let certify = ["identity", "certify", "--dry-run", "--json"];
    let (code, _, stderr) = place.run(&certify, "locked");
    assert!(code == 78 && stderr.contains("encrypted") && stderr.contains("hotkey-password"), "{code} {stderr}");
    std::fs::write(place.path("hotkey-password"), "correct horse").unwrap();
    let opened = place.command(&certify, "locked").env("CREDENTIALS_DIRECTORY", place.folder.path()).output().unwrap();
    assert!(opened.status.success(), "{}", String::from_utf8_lossy(&opened.stderr));
    std::fs::write(place.path("hotkey-password"), "incorrect horse").unwrap();
    let wrong = place.command(&certify, "locked").env("CREDENTIALS_DIRECTORY", place.folder.path()).output().unwrap();
    let stderr = String::from_utf8_lossy(&wrong.stderr);
    assert!(wrong.status.code() == Some(78) && stderr.contains("password does not open") && !stderr.contains("horse"), "{stderr}");
}
