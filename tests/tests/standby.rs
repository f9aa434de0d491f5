//! Two orchestrators as real processes: one writes, one stands by and takes over.

use std::time::{Duration, Instant};

use quasar_tests::office::{Office, Running};

/// A lease of 30 s, looked at each 2 s, and a start of the process that takes over.
const TAKEOVER: Duration = Duration::from_secs(60);
const START: Duration = Duration::from_secs(60);
/// As documented: a person must change something.
const CONFIGURATION: i32 = 78;

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

#[test]
fn a_standby_takes_over_from_a_writer_that_is_killed() {
    let office = Office::open();
    let (mut writer, mut standby) = two(&office);
    writer.signal("KILL");
    let (seen, took) = office.head_within(TAKEOVER, |seen| seen.head.epoch == 2, &|| standby.log());
    println!("from SIGKILL to the first head of the standby: {:.1} s", took.as_secs_f64());
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
    let (taken, took) = office.head_within(TAKEOVER, |seen| seen.head.epoch == 2, &|| standby.log());
    println!("from SIGSTOP to the first head of the standby: {:.1} s", took.as_secs_f64());
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
