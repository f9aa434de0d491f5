//! The orchestrator's key is rotated as the documentation says while a miner trains and a validator audits: all of it as real processes.

use std::time::{Duration, Instant};

use protocol::documents::{MergeManifest, VerdictReveal};
use quasar_tests::documents;
use quasar_tests::office::Office;

const START: Duration = Duration::from_secs(180);
/// A look at the root each 10 s, and a start of the process that takes over.
const TAKEOVER: Duration = Duration::from_secs(90);
/// Until a cycle that began after the rotation is merged and audited.
const AUDIT: Duration = Duration::from_secs(400);
/// As documented: a person must change something.
const CONFIGURATION: i32 = 78;

#[test]
fn a_miner_and_a_validator_that_run_follow_a_rotation_and_merges_go_on() {
    let office = Office::open_with(&[("cycles = 8", "cycles = 0"), ("quorum_min = 2", "quorum_min = 1")]);
    let mut old = office.start("orchestrator", "first", &["run"]);
    office.head_within(START, |seen| seen.head.epoch == 1, &|| old.log());
    let mut standby = office.start("orchestrator", "standby", &["run", "--standby"]);
    let mut miner = office.start_client("quasar-miner", "miner");
    let mut validator = office.start_client("quasar-validator", "validator");
    let logs = || format!("MINER\n{}\nVALIDATOR\n{}", miner.log(), validator.log());
    office.head_within(START, |seen| seen.head.closed_below >= 4, &logs);

    let next = office.account("orchestrator-2");
    let said = office.says("owner", &["rotate-key", "--orchestrator", &next.to_string()]);
    assert!(said.contains("start `run` with the new wallet") && said.contains("Miners and validators follow by themselves"), "{said}");
    // At once, and not as a standby.
    let new = office.start("orchestrator-2", "second", &["run"]);
    let (taken, took) = office.head_within(TAKEOVER, |seen| seen.head.epoch == 2, &|| format!("{}\n{}", old.log(), new.log()));
    println!("from the new root to the first head of the new key: {:.1} s", took.as_secs_f64());
    assert_eq!(taken.signer, next);
    assert_eq!(old.ended_within(TAKEOVER).code(), Some(CONFIGURATION), "{}", old.log());
    assert!(old.log().contains("names another orchestrator") && old.log().contains("hint: "), "{}", old.log());
    assert_eq!(standby.ended_within(TAKEOVER).code(), Some(CONFIGURATION), "{}", standby.log());
    assert!(!standby.log().contains("holding the writer lease"), "{}", standby.log());

    // Nobody is started again, and a whole cycle is merged, by the same session, and audited.
    let from = taken.head.outer_step;
    let logs = || format!("MINER\n{}\nVALIDATOR\n{}\nORCHESTRATOR\n{}", miner.log(), validator.log(), new.log());
    office.head_within(AUDIT, |seen| seen.head.closed_below >= from + 24, &logs);
    let merges: Vec<(_, MergeManifest)> = documents(&office.bucket());
    let later = merges.iter().filter(|(signer, merge)| *signer == next && merge.t >= from && merge.accepted().count() > 0);
    assert!(later.count() >= 12, "{}", logs());
    let begun = Instant::now();
    let audited = || documents::<VerdictReveal>(&office.bucket()).iter().any(|(_, reveal)| reveal.verdict.t >= from);
    while !audited() {
        assert!(begun.elapsed() < AUDIT, "{}", logs());
        std::thread::sleep(Duration::from_secs(1));
    }
    println!("until a payload of after the rotation was audited: {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(miner.log().matches("learner started").count(), 1, "{}", miner.log());
    assert_eq!(validator.log().matches("run found").count(), 1, "{}", validator.log());
    assert!(miner.is_up() && validator.is_up());
}
