//! The `chain` commands against a development node: what is on chain, what would be sent, which rule stands against it, and with
//! which exit code a script hears of it.

use chain::devnode::{Change, DevOptions, VirtualClock};
use serde_json::{Value, json};

use crate::place::{Place, miner};

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
    assert!(stdout.contains("nothing committed waits to be opened"), "{stdout}");
    // A state folder of somebody else says nothing about this hotkey.
    let file = json!({
        "updated_ms": 0, "hotkey": miner(1).to_string(), "netuid": 24, "mechanism": 0, "run": "", "stage": "all is well", "next": "",
        "needs_a_person": false, "scores": [], "cycles": 0, "is_final": false,
    });
    std::fs::create_dir_all(place.path("state")).unwrap();
    std::fs::write(place.path("state/weights.json"), file.to_string()).unwrap();
    let (code, stdout, _) = place.run_as("own", &["status"]);
    assert!(
        code == 0 && stdout.contains(&format!("the state folder is that of {}", miner(1))) && !stdout.contains("all is well"),
        "{stdout}"
    );
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
    // This epoch has its commit: another row is a matter of time.
    std::fs::write(place.path("scores.json"), json!({ miner(1).to_string(): 10 }).to_string()).unwrap();
    let (code, answer) = place.set("own", &[]);
    assert!(code == 75 && answer["is_on_chain"] == false, "{code} {answer}");
    assert!(place.run_as("own", &["status"]).1.contains("1 committed row waits to be opened"));
}

#[test]
fn where_the_clocks_differ_nothing_is_committed_and_the_exit_code_asks_for_a_person() {
    // The chain's blocks are dated years before this machine's clock.
    let clock = VirtualClock { start_ms: 1_700_000_000_000, block_ms: 50 };
    let place = Place::new(DevOptions { commit_reveal: true, clock: Some(clock), ..Default::default() });
    for arguments in [&["--dry-run"][..], &[]] {
        let (code, answer) = place.set("own", arguments);
        assert!(code == 78 && answer["stage"].as_str().unwrap().contains("ahead of the chain's newest block"), "{code} {answer}");
        assert!(answer["hint"].as_str().unwrap().contains("timedatectl"), "{answer}");
    }
    assert_eq!(place.node.last_update(0, 0), 0, "nothing was committed");
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
