//! Against software that we did not write: the official Python SDK reads our node, sets weights on it and understands what our client
//! sent; the official wallet package reads our key files and we read its.
//!
//! `cargo xtask interop` installs the packages and runs these tests; without them they say that they were skipped.

use std::path::{Path, PathBuf};
use std::process::Command;

use chain::devnode::{Change, DevNode, DevOptions};
use chain::timelock::WeightsPayload;
use chain::{Chain, How, Password, Wallet, WeightsRequest};
use protocol::{AccountId, KeyKind, Signer as _};
use serde_json::{Value, json};

use crate::world::{NETUID, connect, dev_chain, hotkey, neurons, set_row};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop")
}

#[expect(clippy::disallowed_macros, reason = "a skipped test must be heard")]
#[expect(clippy::disallowed_methods, reason = "the developer command that runs these tests names the Python")]
fn python() -> Option<PathBuf> {
    let python = std::env::var_os("QUASAR_INTEROP_PYTHON").map(PathBuf::from);
    if python.is_none() {
        eprintln!("SKIPPED: no official packages to test against; `cargo xtask interop` installs them");
    }
    python
}

/// Runs a script and gives the JSON of its last line.
async fn ask(python: &Path, script: &str, arguments: &[&str]) -> Value {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(python);
    // The SDK keeps metadata in the home folder; ours begins empty each time.
    command.arg(folder().join(script)).args(arguments).env("HOME", home.path()).env("XDG_CACHE_HOME", home.path());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    drop(home);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script} {arguments:?}: {stderr}");
    serde_json::from_str(stdout.lines().last().unwrap_or_default()).unwrap_or_else(|error| panic!("{script}: {error}: {stdout}"))
}

fn wallets() -> (tempfile::TempDir, Vec<AccountId>) {
    let folder = tempfile::tempdir().unwrap();
    let accounts = [("ed", KeyKind::Ed25519), ("sr", KeyKind::Sr25519)].map(|(name, kind)| {
        let wallet = Wallet::new(folder.path(), "w", name);
        if kind == KeyKind::Ed25519 {
            wallet.create_throwaway_coldkey().unwrap();
        }
        wallet.create_hotkey(kind).unwrap().account()
    });
    (folder, accounts.to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_sdk_reads_our_nodes_subnet() {
    let Some(python) = python() else { return };
    let node = DevNode::start_with(dev_chain(250), DevOptions { weights_version: 7, ..Default::default() }).await.unwrap();
    let netuid = NETUID.to_string();
    let answer = ask(&python, "sdk.py", &[&node.endpoint(), &netuid, "read"]).await;
    let expected: Vec<Value> = (0u16..)
        .zip(neurons())
        .map(|(uid, neuron)| {
            json!({
                "uid": uid,
                "hotkey": neuron.hotkey.to_string(),
                "coldkey": neuron.coldkey.to_string(),
                "stake": neuron.stake,
                "validator_permit": neuron.validator_permit,
                "last_update": 0,
            })
        })
        .collect();
    assert_eq!(answer["neurons"], json!(expected));
    let parameters = &answer["hyperparameters"];
    assert_eq!(parameters["tempo"], 30);
    assert_eq!(parameters["weights_version"], 7);
    assert_eq!(parameters["commit_reveal_weights_enabled"], false);
    assert_eq!(answer["spec_version"], 461);
    // Our own list is the same.
    let client = connect(&node).await;
    for entry in client.hyperparameter_list(NETUID).await.unwrap() {
        let theirs = match &parameters[&entry.name] {
            Value::Bool(flag) => u8::from(*flag).to_string(),
            other => other.to_string(),
        };
        assert_eq!(theirs, entry.value, "{}", entry.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_sdk_sets_weights_on_our_node_with_keys_of_both_kinds() {
    let Some(python) = python() else { return };
    let (folder, accounts) = wallets();
    let mut chain = dev_chain(250);
    for (neuron, account) in chain.neurons.iter_mut().zip(&accounts) {
        neuron.hotkey = *account;
    }
    let node = DevNode::start_with(chain, DevOptions { mechanisms: 2, ..Default::default() }).await.unwrap();
    let client = connect(&node).await;
    let (endpoint, netuid, path) = (node.endpoint(), NETUID.to_string(), folder.path().to_str().unwrap());
    let set = async |hotkey: &str, mechanism: &str, row: Value| {
        ask(&python, "sdk.py", &[&endpoint, &netuid, "set", path, "w", hotkey, mechanism, &row.to_string()]).await
    };
    for (uid, hotkey) in [(0, "ed"), (1, "sr")] {
        let answer = set(hotkey, "0", json!({ "1": 10, "2": 20, "3": 40 })).await;
        assert_eq!(answer["success"], true, "{answer}");
        assert_eq!(client.weights(NETUID, uid).await.unwrap(), [(1, 16384), (2, 32768), (3, 65535)]);
    }
    let answer = set("ed", "1", json!({ "0": 1, "2": 1 })).await;
    assert_eq!(answer["success"], true, "{answer}");
    assert_eq!(node.weights(1, 0), [(0, 65535), (2, 65535)]);
    // Its own words for our refusals.
    let again = set("ed", "0", json!({ "1": 1, "2": 1 })).await;
    assert_eq!(again["success"], false);
    assert!(again["error"].as_str().unwrap().contains("rate limit"), "{again}");

    // Where commit-reveal is on, it commits by itself.
    node.change(Change::CommitReveal(true));
    node.change(Change::WeightsRateLimit(0));
    node.produce();
    let answer = set("sr", "0", json!({ "2": 5, "3": 10 })).await;
    assert_eq!(answer["success"], true, "{answer}");
    let view = client.weights_view(NETUID, 0, &accounts[1]).await.unwrap();
    assert_eq!(view.commits.len(), 1, "{view:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_packages_understand_rows_and_commits_of_our_client() {
    let Some(python) = python() else { return };
    let node = DevNode::start(dev_chain(250)).await.unwrap();
    let client = connect(&node).await;
    set_row(&client, 0, &[(1, 21845), (3, 43690), (2, 65535)], 0).await.unwrap();
    node.change(Change::CommitReveal(true));
    node.change(Change::RevealPeriod(20));
    node.produce();
    let view = client.weights_view(NETUID, 0, &hotkey(1).account()).await.unwrap();
    let row = vec![(0, 7), (3, 65535)];
    // To the genuine beacon, and to a round whose signature is known.
    let beacon = chain::drand::Beacon::quicknet();
    let round = view.last_stored_round + 1_000_000;
    let how = How::Timelocked { round, commit_version: view.commit_version, beacon: beacon.clone() };
    let request = WeightsRequest { netuid: NETUID, mechanism: 0, row: row.clone(), version_key: 3, how };
    client.send_weights(&hotkey(1), &request, &|_| {}).await.unwrap();

    let netuid = NETUID.to_string();
    let answer = ask(&python, "sdk.py", &[&node.endpoint(), &netuid, "weights", "0"]).await;
    let shares = &answer["rows"]["0"];
    for (uid, share) in [("1", 1.0 / 6.0), ("3", 2.0 / 6.0), ("2", 3.0 / 6.0)] {
        assert!((shares[uid].as_f64().unwrap() - share).abs() < 1e-4, "{answer}");
    }
    let commits: Vec<&Value> = answer["commits"].as_object().unwrap().values().flat_map(|list| list.as_array().unwrap()).collect();
    assert_eq!(commits.len(), 1, "{answer}");
    assert_eq!(commits[0]["hotkey"], hotkey(1).account().to_string());
    assert_eq!(commits[0]["reveal_round"], round);

    let golden: Value = serde_json::from_str(include_str!("../data/golden-461.json")).unwrap();
    let signature = golden["reference"]["timelock"]["signature_hex"].as_str().unwrap();
    let payload = parity_scale_codec::Encode::encode(&WeightsPayload::new(&hotkey(1).account(), &row, 3));
    let sealed = hex::encode(chain::timelock::seal(&beacon, 1000, &payload).unwrap());
    let opened = ask(&python, "wallets.py", &["open", &sealed, "1000", signature]).await;
    assert_eq!(opened["plaintext"], hex::encode(payload));
}

#[tokio::test(flavor = "multi_thread")]
async fn our_wallets_are_read_by_the_official_package_and_its_by_us() {
    let Some(python) = python() else { return };
    let (ours, accounts) = wallets();
    let path = ours.path().to_str().unwrap();
    for (name, account) in ["ed", "sr"].iter().zip(accounts) {
        let answer = ask(&python, "wallets.py", &["read", path, "w", name]).await;
        assert_eq!(answer["address"], account.to_string());
        let key = Wallet::new(ours.path(), "w", *name).load_hotkeypub().unwrap();
        assert_eq!(answer["crypto_type"], key.kind as u8);
        let signature: [u8; 64] = hex::decode(answer["signature"].as_str().unwrap()).unwrap().try_into().unwrap();
        assert_eq!(protocol::verify_signature(&key, b"interoperability", &signature), Ok(()));
    }
    let theirs = tempfile::tempdir().unwrap();
    let path = theirs.path().to_str().unwrap();
    for kind in ["0", "1"] {
        let made = ask(&python, "wallets.py", &["make", path, "v", kind, kind]).await;
        let read = Wallet::new(theirs.path(), "v", kind).load_hotkey().unwrap();
        assert_eq!(made["address"], read.account().to_string());
        assert_eq!(protocol::verify_signature(&read.key(), b"m", &read.sign(b"m")), Ok(()));
    }
    let made = ask(&python, "wallets.py", &["make", path, "v", "locked", "1", "pass word"]).await;
    let locked = Wallet::new(theirs.path(), "v", "locked");
    assert!(locked.is_hotkey_encrypted().unwrap());
    let read = locked.load_hotkey_with(&Password::new("pass word".to_owned())).unwrap();
    assert_eq!(made["address"], read.account().to_string());
}
