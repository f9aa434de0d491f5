//! The operator's commands as a user types them, against a run without miners.

use std::time::Duration;

use quasar_tests::office::Office;

const START: Duration = Duration::from_secs(60);

#[test]
fn an_operator_checks_bans_rolls_back_rotates_and_drains() {
    let office = Office::open();
    let says = |arguments: &[&str]| office.says("orchestrator", arguments);

    // The bucket, before anything runs on it.
    let checked = says(&["store", "check"]);
    assert!(checked.lines().count() >= 8 && checked.lines().all(|line| line.starts_with("kept  ")), "{checked}");
    let checked = office.says_json("orchestrator", &["store", "check", "--json"]);
    assert_eq!(
        (&checked["ok"], checked["promises"].as_array().map(Vec::len)),
        (&true.into(), Some(says(&["store", "check"]).lines().count()))
    );

    // What a day of it costs, before anybody pays for it.
    let run_file = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/run-mainnet.toml");
    let cost = office.says_json("orchestrator", &["cost", "--config", run_file, "--miners", "100", "--json"]);
    assert!(cost["per_day"]["puts"].as_f64().is_some_and(|puts| puts > 1e6) && cost["price_per_day"].as_f64() > Some(0.0), "{cost}");
    assert!(says(&["cost", "--config", run_file, "--miners", "100"]).contains("a learner sends "));

    // Nobody runs yet: said as such, and nothing breaks.
    let early = office.run("orchestrator", &["status"]);
    let errors = String::from_utf8_lossy(&early.stderr);
    assert!(early.status.code() == Some(75) && errors.contains("hint: start one with `run`"), "{errors}");

    // A store that does not answer: what starts the daemons tries again.
    let away = office.run("orchestrator", &["run", "--s3-endpoint-url", "http://127.0.0.1:1"]);
    let errors = String::from_utf8_lossy(&away.stderr);
    assert!(away.status.code() == Some(69) && errors.contains("hint: "), "{errors}");

    let mut writer = office.start("orchestrator", "first", &["run"]);
    office.head_within(START, |seen| seen.head.epoch == 1, &|| writer.log());

    let miner = office.miner.to_string();
    let banned = says(&["ban", &miner, "--reason", "uploads what it did not train"]);
    assert!(banned.starts_with("order 1: "), "{banned}");
    let status = office.says_json("orchestrator", &["status", "--json"]);
    assert_eq!(status["status"]["orders"], 1, "{status}");
    assert!(status["writer"]["epoch"] == 1 && status["head_age_ms"].as_u64().is_some_and(|age| age < 120_000), "{status}");
    let shown = says(&["status"]);
    for part in [
        "run            ",
        "writer         ",
        "tokens done    0 of 10.00 T, 0 a day, days to go unknown",
        " waiting, 0 leased, 0 done, 0 lost",
        "  a test ",
        "order 1        done: ",
    ] {
        assert!(shown.contains(part), "{part} is missing:\n{shown}");
    }
    assert!(!shown.contains("NOT RUNNING") && shown.contains(&format!("banned         {miner}")), "{shown}");
    println!("{shown}");
    let unbanned = office.says_json("orchestrator", &["unban", &miner, "--reason", "it was our bug", "--json"]);
    assert_eq!((&unbanned["order"], &unbanned["done"]), (&2.into(), &true.into()), "{unbanned}");

    // Nothing was merged: there is nothing to go back to, and the order says so.
    let refused = office.run("orchestrator", &["rollback", "--to-version", "7", "--reason", "diverged"]);
    let text = String::from_utf8_lossy(&refused.stdout);
    assert!(refused.status.code() == Some(78) && text.starts_with("order 3 was refused: "), "{text}");
    let silent = office.run("orchestrator", &["ban", &miner, "--reason", " "]);
    assert_eq!(silent.status.code(), Some(64), "a reason is for everybody to read");

    // Another run while this one is under way: not by accident.
    let other = office.create_again(&[]);
    let errors = String::from_utf8_lossy(&other.stderr);
    assert!(other.status.code() == Some(78) && errors.contains("is under way") && errors.contains("--replace"), "{errors}");

    // More text for the running run.
    let nothing = office.run("orchestrator", &["run", "add-shards", "--reason", "more"]);
    let errors = String::from_utf8_lossy(&nothing.stderr);
    assert!(nothing.status.code() == Some(78) && errors.contains("are in the run") && errors.contains("hint: "), "{errors}");
    let rows = |status: &serde_json::Value| status["status"]["rows"]["waiting_rows"].as_u64().expect("a number");
    let more = office.publish_shard("more");
    let added = says(&["run", "add-shards", "--reason", "the text of the week"]);
    assert!(added.starts_with("order 4: the shard is in the run; the newest page of its catalog is 1"), "{added}");
    let grown = office.says_json("orchestrator", &["status", "--json"]);
    assert!(rows(&grown) > rows(&status), "{grown}");
    office.head_within(START, |seen| seen.head.catalog.page == 1, &|| writer.log());
    let unknown = office.run("orchestrator", &["run", "add-shards", "--shards", "nowhere", "--reason", "more"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("shard nowhere is not published"));

    // Another key: the owner signs, the new wallet runs, the old one cannot come back.
    let next = office.account("orchestrator-2").to_string();
    let foreign = office.run("orchestrator", &["rotate-key", "--orchestrator", &next]);
    assert_eq!(foreign.status.code(), Some(78), "{}", String::from_utf8_lossy(&foreign.stderr));
    let rotated = office.says("owner", &["rotate-key", "--orchestrator", &next]);
    assert!(rotated.contains("root version 2") && rotated.contains(&next), "{rotated}");
    writer.signal("TERM");
    assert_eq!(writer.ended_within(START).code(), Some(0), "{}", writer.log());
    let mut old = office.start("orchestrator", "first", &["run"]);
    assert_eq!(old.ended_within(START).code(), Some(78), "{}", old.log());
    let mut writer = office.start("orchestrator-2", "second", &["run"]);
    let (seen, _) = office.head_within(START, |seen| seen.head.epoch == 2, &|| writer.log());
    assert_eq!(seen.signer.to_string(), next);

    let drained = office.says("orchestrator-2", &["drain", "--reason", "the test is over"]);
    assert!(drained.starts_with("order 5: "), "{drained}");
    let state = office.says_json("orchestrator-2", &["status", "--json"])["status"]["state"].clone();
    assert!(state == "draining" || state == "complete", "{state}");
    writer.signal("TERM");
    assert_eq!(writer.ended_within(START).code(), Some(0), "{}", writer.log());
    assert!(says_after(&office).contains("NOT RUNNING"), "a writer that gave its lease back is not running");

    let spoiled = office.publish_over(&more);
    let errors = String::from_utf8_lossy(&spoiled.stderr);
    assert!(spoiled.status.code() == Some(78) && errors.contains("hint: the name of a shard holds a digest"), "{errors}");
}

fn says_after(office: &Office) -> String {
    office.says("orchestrator-2", &["status"])
}
