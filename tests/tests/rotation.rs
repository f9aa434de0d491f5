//! The orchestrator's key is rotated as the documentation says while a miner trains and a validator audits: all of it as real processes.

use std::time::{Duration, Instant};

use protocol::documents::{MergeManifest, VerdictReveal};
use quasar_tests::office::Office;
use quasar_tests::{documents, files};

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
    goes_back_to_an_earlier_version(&office, &logs);
    assert_eq!(miner.log().matches("learner started").count(), 1, "{}", miner.log());
    assert_eq!(validator.log().matches("run found").count(), 1, "{}", validator.log());
    assert!(miner.is_up() && validator.is_up());
}

/// What was merged since the first version is taken back while the miner trains: by new versions, whose bytes are those of the first, and
/// with a release of them. Training goes on from there.
fn goes_back_to_an_earlier_version(office: &Office, logs: &dyn Fn() -> String) {
    office.head_within(AUDIT, |seen| seen.head.fragments.iter().filter(|fragment| fragment.version > 1).count() >= 3, logs);
    let said = office.says("orchestrator-2", &["rollback", "--to-version", "1", "--reason", "the loss rises"]);
    assert!(said.contains("each fragment beyond version 1 goes back to it, as a new version"), "{said}");
    let merges = || documents::<MergeManifest>(&office.bucket()).into_iter().map(|(_, merge)| merge);
    let begun = Instant::now();
    let last = loop {
        let restored = merges().filter(|merge| merge.restores.is_some()).map(|merge| merge.t).max();
        let goes_on = |merge: MergeManifest| restored.is_some_and(|t| merge.t > t + 24) && merge.accepted().count() > 0;
        if let Some(t) = restored.filter(|_| merges().any(goes_on)) {
            break t;
        }
        assert!(begun.elapsed() < AUDIT, "{}", logs());
        std::thread::sleep(Duration::from_secs(1));
    };
    let all: Vec<MergeManifest> = merges().collect();
    // Header and digest of a state name its version.
    let values = |version: u64, fragment: u16| {
        let ending = format!("/state/{fragment}/{version}.qfs");
        let path = files(&office.bucket()).into_iter().find(|path| path.to_string_lossy().ends_with(&ending));
        let state = std::fs::read(path.unwrap_or_else(|| panic!("{ending} is missing"))).expect("the bucket is readable");
        state[72..state.len() - 32].to_vec()
    };
    let restored: Vec<&MergeManifest> = all.iter().filter(|merge| merge.restores.is_some()).collect();
    assert!(restored.len() >= 3, "{} fragments went back until step {last}", restored.len());
    for back in restored {
        assert!((back.restores, back.version, back.accepted().count()) == (Some(1), back.base_version + 1, 0), "{back:?}");
        assert!(values(1, back.fragment) == values(back.version, back.fragment), "the values of version 1, bit for bit: {back:?}");
    }
    office.head_within(AUDIT, |seen| seen.head.release.release.starts_with("run-"), logs);
}
