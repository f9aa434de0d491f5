//! A miner that is stopped as systemd stops it, and started again.

use std::time::{Duration, Instant};

use quasar_tests::office::Office;

const START: Duration = Duration::from_secs(180);
/// The step under way, the last records, and the end of the process.
const STOP: Duration = Duration::from_secs(30);
/// Far below what this run waits for a learner that says nothing.
const RETURN: Duration = Duration::from_secs(30);

#[test]
fn a_miner_that_is_stopped_hands_its_rows_back_at_once_and_comes_back_when_it_is_started_again() {
    let alone =
        [("cycles = 8", "cycles = 0"), ("quorum_min = 2", "quorum_min = 1"), ("learner_ttl_ms = 10_000", "learner_ttl_ms = 3_600_000")];
    let office = Office::open_with(&alone);
    let writer = office.start("orchestrator", "first", &["run"]);
    let mut miner = office.start_client("quasar-miner", "miner");
    let leased_rows = || {
        let status = office.says_json("orchestrator", &["status", "--json"]);
        status["status"]["rows"]["leased_rows"].as_u64().expect("a number")
    };
    let closed = |steps: u64, miner: &str| {
        let logs = || format!("MINER\n{miner}\nORCHESTRATOR\n{}", writer.log());
        office.head_within(START, |seen| seen.head.closed_below >= steps, &logs).0.head.closed_below
    };
    let before = closed(4, "");
    assert!(leased_rows() > 0);

    miner.signal("TERM");
    assert_eq!(miner.ended_within(STOP).code(), Some(0), "{}", miner.log());
    let begun = Instant::now();
    while leased_rows() > 0 {
        assert!(begun.elapsed() < RETURN, "MINER\n{}\nORCHESTRATOR\n{}", miner.log(), writer.log());
        std::thread::sleep(Duration::from_millis(500));
    }
    println!("from the end of the process until its rows are the next one's: {:.1} s", begun.elapsed().as_secs_f64());

    let miner = office.start_client("quasar-miner", "miner");
    closed(before + 8, &miner.log());
    assert!(leased_rows() > 0, "{}", miner.log());
}
