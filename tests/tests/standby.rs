//! Two orchestrators as real processes: one writes, one stands by and takes over.

use std::time::{Duration, Instant};

use quasar_tests::office::{Office, Running, SeenHead};

/// A lease of 30 s, looked at each 2 s, and a start of the process that takes over.
const TAKEOVER: Duration = Duration::from_secs(60);
const START: Duration = Duration::from_secs(60);
/// As documented: a person must change something.
const CONFIGURATION: i32 = 78;
const LOOK: Duration = Duration::from_millis(200);

/// A writer and one that waits.
fn two(office: &Office) -> (Running, Running) {
    let writer = office.start("orchestrator", "first", &["run"]);
    office.head_within(START, |seen| seen.head.epoch == 1, &|| writer.log());
    let standby = office.start("orchestrator", "second", &["run", "--standby"]);
    let begun = Instant::now();
    while !standby.log().contains("waiting for the writer lease") {
        assert!(begun.elapsed() < START, "{}", standby.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    (writer, standby)
}

/// Gives an order that only the successor can take, as nobody else runs. The head of its epoch is claimed before its machine is there;
/// it works once it has taken the order. Its first head, and how long both took.
fn succeeded(office: &Office, standby: &Running) -> (SeenHead, [Duration; 2]) {
    let begun = Instant::now();
    let miner = office.miner.to_string();
    let said = office.says("orchestrator", &["ban", &miner, "--reason", "for whoever writes next", "--no-wait"]);
    assert_eq!(said, "order 1 is written\n");
    let (seen, _) = office.head_within(TAKEOVER, |seen| seen.head.epoch == 2, &|| standby.log());
    let claimed = begun.elapsed();
    loop {
        let shown = office.run("orchestrator", &["status", "--json"]);
        let text = String::from_utf8_lossy(&shown.stdout);
        let shown: serde_json::Value = serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap_or_default();
        let status = &shown["status"];
        if status["epoch"] == 2 && status["orders"] == 1 && status["banned"][0] == miner {
            let working = begun.elapsed();
            assert!(working < TAKEOVER, "{working:?}");
            return (seen, [claimed, working]);
        }
        assert!(begun.elapsed() < TAKEOVER, "{text}\n{}", standby.log());
        std::thread::sleep(LOOK);
    }
}

#[test]
fn a_standby_takes_over_from_a_writer_that_is_killed() {
    let office = Office::open();
    let (mut writer, mut standby) = two(&office);
    writer.signal("KILL");
    let (seen, [claimed, working]) = succeeded(&office, &standby);
    println!("from SIGKILL to the first head of the standby: {:.1} s", claimed.as_secs_f64());
    println!("from SIGKILL to an order that it has taken: {:.1} s", working.as_secs_f64());
    assert_eq!(seen.signer, office.account("orchestrator"));
    assert!(!writer.is_up() && standby.is_up());
    // The killed one starts again while the other goes on: it is told, and nothing changes.
    let mut again = office.start("orchestrator", "first", &["run"]);
    assert_eq!(again.ended_within(TAKEOVER).code(), Some(CONFIGURATION), "{}", again.log());
    assert!(again.log().contains("holds the writer lease") && again.log().contains("hint: "), "{}", again.log());
    assert_eq!(office.head().head.epoch, 2);
    assert!(standby.is_up());
}

#[test]
fn a_writer_that_slept_through_its_lease_writes_nothing_more_when_it_wakes() {
    let office = Office::open();
    let (mut writer, mut standby) = two(&office);
    writer.signal("STOP");
    let (taken, [claimed, working]) = succeeded(&office, &standby);
    println!("from SIGSTOP to the first head of the standby: {:.1} s", claimed.as_secs_f64());
    println!("from SIGSTOP to an order that it has taken: {:.1} s", working.as_secs_f64());
    writer.signal("CONT");
    let begun = Instant::now();
    assert_eq!(writer.ended_within(TAKEOVER).code(), Some(CONFIGURATION), "{}", writer.log());
    println!("from SIGCONT to its end: {:.1} s", begun.elapsed().as_secs_f64());
    assert!(writer.log().contains("another orchestrator writes to this run"), "{}", writer.log());
    let now = office.head();
    assert!(now.is_no_older_than(&taken) && now.head.epoch == 2, "{now:?}");
    assert!(standby.is_up());
    // A stop gives the lease back: the next one need not wait.
    standby.signal("TERM");
    assert_eq!(standby.ended_within(START).code(), Some(0), "{}", standby.log());
    let third = office.start("orchestrator", "third", &["run"]);
    let (_, took) = office.head_within(START, |seen| seen.head.epoch == 3, &|| third.log());
    println!("after a lease that was given back: {:.1} s", took.as_secs_f64());
    assert!(took < Duration::from_secs(25), "{took:?}");
}
