//! The machine alone: what it decides by which view, and how it gets over everything that can happen to a row.

mod restarts;

use super::*;
use crate::drand::Beacon;
use crate::epoch;
use crate::epoch::EpochState;
use crate::types::{BlockRef, Hyperparameters, Metagraph, Neuron};
use crate::view::{How, PendingCommit};

const NETUID: u16 = 24;
const OWN: u16 = 1;
const EPOCH_START: u64 = 1000;
const BLOCK_MS: u64 = 12_000;
/// Time of block 0.
const START_MS: u64 = 1_800_000_000_000;

fn account(n: u16) -> AccountId {
    AccountId([n as u8; 32])
}

fn time(block: u64) -> u64 {
    START_MS + block * BLOCK_MS
}

fn block(number: u64) -> BlockRef {
    BlockRef { number, hash: [number as u8; 32] }
}

/// A subnet of four, tempo 360, epoch 7 since block 1000, ours is uid 1, which has a permit and never set weights.
fn view(number: u64) -> WeightsView {
    let neurons = (0..4)
        .map(|uid| Neuron {
            uid,
            hotkey: account(uid),
            coldkey: account(100 + uid),
            stake: 1_000,
            validator_permit: uid < 2,
            last_update: 0,
        })
        .collect();
    WeightsView {
        metagraph: Metagraph { block: block(number), neurons },
        hyperparameters: Hyperparameters {
            tempo: 360,
            weights_rate_limit: 100,
            min_allowed_weights: 1,
            max_weight_limit: u16::MAX,
            weights_version: 0,
            commit_reveal: false,
            stake_threshold: 500,
        },
        timestamp_ms: time(number),
        block_ms: BLOCK_MS,
        mechanisms: 1,
        last_updates: vec![0; 4],
        owner_hotkey: None,
        is_null_consensus: false,
        row: Vec::new(),
        epoch: EpochState {
            tempo: 360,
            last_epoch_block: EPOCH_START,
            pending_epoch_at: 0,
            index: 7,
            blocks_since_last_step: number.saturating_sub(EPOCH_START),
        },
        reveal_period_epochs: 1,
        commit_version: 4,
        beacon: Beacon::quicknet(),
        last_stored_round: 0,
        commits: Vec::new(),
    }
}

fn settings() -> SetterSettings {
    SetterSettings { look_ms: 1_000, ..SetterSettings::new(NETUID, account(OWN), 3) }
}

fn scores() -> Input {
    Input::Scores { scores: vec![(account(2), 10), (account(3), 20)], is_final: false }
}

const ROW: [(u16, u16); 2] = [(2, 32768), (3, 65535)];

/// A machine with scores that has seen `view`.
fn seen(view: WeightsView) -> Setter {
    let mut setter = Setter::new(settings());
    let now = view.timestamp_ms;
    setter.handle(now, scores());
    assert_eq!(setter.poll_effect(), Some(Effect::Look));
    setter.handle(now, Input::View(Box::new(view)));
    setter
}

fn sent(setter: &mut Setter) -> (u64, WeightsRequest) {
    match setter.poll_effect() {
        Some(Effect::Send { attempt, request }) => (attempt, request),
        other => panic!("expected a row to be sent, got {other:?} in stage {:?}", setter.stage()),
    }
}

fn obstacle(edit: impl FnOnce(&mut WeightsView)) -> Obstacle {
    let mut view = view(1100);
    edit(&mut view);
    let mut setter = seen(view);
    assert_eq!(setter.poll_effect(), None);
    match setter.stage() {
        Stage::Blocked(obstacle) => {
            assert!(setter.stage().needs_a_person() || matches!(obstacle, Obstacle::Rule(_)));
            assert!(!setter.stage().to_string().is_empty() && !setter.stage().hint().is_empty());
            obstacle.clone()
        }
        other => panic!("expected an obstacle, got {other:?}"),
    }
}

#[test]
fn a_row_that_was_never_set_is_due_at_once_and_counts_when_it_was_read_back() {
    let mut setter = seen(view(1100));
    let (attempt, request) = sent(&mut setter);
    let expected = WeightsRequest { netuid: NETUID, mechanism: 0, row: ROW.to_vec(), version_key: 3, how: How::Plain };
    assert_eq!(request, expected);
    assert_eq!(setter.deadline(), None, "the answer is awaited");
    for progress in [Progress::Validated, Progress::Submitted, Progress::Included(block(1101)), Progress::Retracted] {
        setter.handle(time(1101), Input::Progress { attempt, progress });
        assert_eq!(setter.stage(), &Stage::Sending { progress: Some(progress) });
    }
    let landed = Landed { block: block(1103), commit: None };
    setter.handle(time(1104), Input::Ended { attempt, outcome: Outcome::Landed(landed) });
    assert_eq!(setter.stage(), &Stage::OnChain { row: ROW.to_vec(), block: 1103 });
    let reports: Vec<Report> = std::iter::from_fn(|| setter.poll_report()).collect();
    assert!(reports.contains(&Report::OnChain { row: ROW.to_vec(), block: 1103, epoch: 7 }));
}

#[test]
fn one_row_is_set_in_each_epoch() {
    let mut setter = seen(view(1100));
    let (attempt, _) = sent(&mut setter);
    let landed = Landed { block: block(1103), commit: None };
    setter.handle(time(1104), Input::Ended { attempt, outcome: Outcome::Landed(landed) });
    assert_eq!(setter.poll_effect(), Some(Effect::Look));
    let mut later = view(1110);
    later.last_updates[1] = 1103;
    later.row = ROW.to_vec();
    setter.handle(time(1110), Input::View(Box::new(later.clone())));
    assert_eq!(setter.poll_effect(), None);
    assert!(matches!(setter.stage(), Stage::OnChain { .. }), "what was achieved stays in sight");
    // It looks again when the next epoch should have begun.
    assert_eq!(setter.deadline(), Some((time(1110) + 600_000).min(time(1360))));
    let mut next = view(1361);
    next.epoch = EpochState { last_epoch_block: 1360, index: 8, blocks_since_last_step: 1, ..next.epoch };
    next.last_updates = later.last_updates;
    setter.handle(time(1361), Input::Tick);
    assert_eq!(setter.poll_effect(), Some(Effect::Look));
    setter.handle(time(1361), Input::View(Box::new(next)));
    sent(&mut setter);
}

#[test]
fn after_a_restart_the_chains_record_says_what_is_set() {
    let mut set = view(1110);
    set.last_updates[1] = 1050;
    let setter = seen(set);
    assert_eq!(setter.stage(), &Stage::NotDue { from_block: 1360 });
}

#[test]
fn a_due_row_waits_for_the_end_of_the_rate_limit() {
    let mut early = view(1005);
    early.last_updates[1] = 990;
    let setter = seen(early);
    assert_eq!(setter.stage(), &Stage::TooSoon { from_block: 1090 });
    assert_eq!(setter.deadline(), Some((time(1005) + 600_000).min(time(1090))));
    let mut ended = view(1090);
    ended.last_updates[1] = 990;
    sent(&mut seen(ended));
}

#[test]
fn whatever_stands_in_the_way_is_told_by_name() {
    assert_eq!(obstacle(|view| view.metagraph.neurons[1].hotkey = account(9)), Obstacle::NotRegistered);
    assert_eq!(obstacle(|view| view.metagraph.neurons[1].validator_permit = false), Obstacle::NoPermit);
    let version = Obstacle::VersionTooOld { required: 4, ours: 3 };
    assert_eq!(obstacle(|view| view.hyperparameters.weights_version = 4), version);
    assert_eq!(obstacle(|view| view.epoch.tempo = 0), Obstacle::NoEpochs);
    let speaks = Obstacle::CommitVersion { required: 5, ours: 4 };
    assert_eq!(
        obstacle(|view| {
            view.hyperparameters.commit_reveal = true;
            view.commit_version = 5;
        }),
        speaks
    );
    let mut other = Setter::new(SetterSettings { mechanism: 1, ..settings() });
    other.handle(time(1100), scores());
    other.handle(time(1100), Input::View(Box::new(view(1100))));
    assert_eq!(other.stage(), &Stage::Blocked(Obstacle::NoMechanism { mechanism: 1, count: 1 }));
}

#[test]
fn too_little_stake_is_for_the_chain_to_judge() {
    let mut poor = view(1100);
    poor.metagraph.neurons[1].stake = 499;
    let mut setter = seen(poor);
    let (attempt, _) = sent(&mut setter);
    setter.handle(time(1100), Input::Ended { attempt, outcome: Outcome::Refused(WeightsRefusal::StakeTooLow) });
    assert_eq!(setter.stage(), &Stage::Blocked(Obstacle::StakeTooLow { stake: 499, threshold: 500 }));
    assert!(setter.stage().needs_a_person());
}

#[test]
fn commits_are_not_timed_by_a_wrong_clock() {
    let mut hidden = view(1100);
    hidden.hyperparameters.commit_reveal = true;
    for (now, is_ahead) in [(time(1100) + 700_000, true), (time(1100) - 700_000, false)] {
        let mut setter = Setter::new(settings());
        setter.handle(now, scores());
        setter.handle(now, Input::View(Box::new(hidden.clone())));
        assert_eq!(setter.stage(), &Stage::Blocked(Obstacle::Clock { apart_ms: 700_000, is_ahead }));
        assert!(setter.stage().hint().contains("clock"));
    }
    // A row in the open needs no clock.
    let mut setter = Setter::new(settings());
    setter.handle(0, scores());
    setter.handle(0, Input::View(Box::new(view(1100))));
    assert!(matches!(setter.stage(), Stage::Sending { .. }));
}

#[test]
fn without_accepted_work_the_weight_goes_to_oneself_even_without_a_permit() {
    let mut alone = view(1100);
    alone.metagraph.neurons[1].validator_permit = false;
    let mut setter = Setter::new(settings());
    setter.handle(time(1100), Input::Scores { scores: Vec::new(), is_final: false });
    setter.handle(time(1100), Input::View(Box::new(alone)));
    setter.poll_effect();
    assert_eq!(sent(&mut setter).1.row, [(OWN, u16::MAX)]);
}

#[test]
fn without_scores_nothing_is_sent() {
    let mut setter = Setter::new(settings());
    setter.handle(time(1100), Input::Tick);
    assert_eq!(setter.poll_effect(), Some(Effect::Look));
    setter.handle(time(1100), Input::View(Box::new(view(1100))));
    assert_eq!(setter.stage(), &Stage::NoScores);
    assert_eq!(setter.poll_effect(), None);
}

#[test]
fn a_refusal_is_looked_into_at_once_and_then_with_growing_pauses() {
    let mut setter = seen(view(1100));
    let mut now = time(1100);
    for pause in [0, 24_000, 48_000, 96_000] {
        let (attempt, _) = sent(&mut setter);
        setter.handle(now, Input::Ended { attempt, outcome: Outcome::Refused(WeightsRefusal::BadProof) });
        assert_eq!(setter.stage(), &Stage::Refused { reason: WeightsRefusal::BadProof, retry_at_ms: now + pause });
        assert_eq!(setter.poll_effect(), Some(Effect::Look));
        if pause > 0 {
            setter.handle(now, Input::View(Box::new(view(1100))));
            assert_eq!(setter.deadline(), Some(now + pause), "nothing is sent before");
            now += pause;
            setter.handle(now, Input::Tick);
            assert_eq!(setter.poll_effect(), Some(Effect::Look));
        }
        setter.handle(now, Input::View(Box::new(view(1100))));
    }
}

#[test]
fn a_switch_of_commit_reveal_in_between_changes_how_the_row_is_sent() {
    let mut setter = seen(view(1100));
    let (attempt, request) = sent(&mut setter);
    assert_eq!(request.how, How::Plain);
    setter.handle(time(1101), Input::Ended { attempt, outcome: Outcome::Refused(WeightsRefusal::CommitRevealEnabled) });
    assert_eq!(setter.poll_effect(), Some(Effect::Look));
    let mut hidden = view(1101);
    hidden.hyperparameters.commit_reveal = true;
    setter.handle(time(1101), Input::View(Box::new(hidden)));
    let (attempt, request) = sent(&mut setter);
    assert!(matches!(request.how, How::Timelocked { .. }));
    // And back.
    setter.handle(time(1102), Input::Ended { attempt, outcome: Outcome::Refused(WeightsRefusal::CommitRevealDisabled) });
    setter.poll_effect();
    setter.handle(time(1130), Input::View(Box::new(view(1130))));
    assert_eq!(sent(&mut setter).1.how, How::Plain);
}

/// A machine whose row was committed in block 1103 of epoch 7, to be opened from block 1360 on.
fn committed() -> (Setter, PendingCommit) {
    let mut hidden = view(1100);
    hidden.hyperparameters.commit_reveal = true;
    let mut setter = seen(hidden.clone());
    let (attempt, request) = sent(&mut setter);
    let How::Timelocked { round, .. } = request.how else { panic!("timelocked") };
    let reveal = hidden.epoch.reveal(1100, 1).unwrap();
    assert_eq!(round, epoch::reveal_round(&reveal, 1100, time(1100), BLOCK_MS, &Beacon::quicknet()));
    let commit = PendingCommit { epoch: 7, block: 1103, round };
    let landed = Landed { block: block(1103), commit: Some(commit) };
    setter.handle(time(1105), Input::Ended { attempt, outcome: Outcome::Landed(landed) });
    assert_eq!(setter.stage(), &Stage::Committed { block: 1103, round, reveal_block: 1360 });
    assert_eq!(setter.poll_effect(), Some(Effect::Look));
    (setter, commit)
}

/// The chain later, in `epoch` (8 begins at 1360), showing `row`.
fn later(number: u64, epoch: u64, row: &[(u16, u16)], commits: &[PendingCommit]) -> Input {
    let mut later = view(number);
    let start = EPOCH_START + (epoch - 7) * 360;
    later.hyperparameters.commit_reveal = true;
    later.epoch = EpochState { last_epoch_block: start, index: epoch, blocks_since_last_step: number - start, ..later.epoch };
    later.last_updates[1] = 1103;
    later.row = row.to_vec();
    later.commits = commits.to_vec();
    Input::View(Box::new(later))
}

fn outcomes(setter: &mut Setter) -> Vec<RevealOutcome> {
    std::iter::from_fn(|| setter.poll_report())
        .filter_map(|report| match report {
            Report::Reveal { outcome, .. } => Some(outcome),
            _ => None,
        })
        .collect()
}

#[test]
fn a_committed_row_counts_when_the_chain_has_opened_it() {
    let (mut setter, commit) = committed();
    setter.handle(time(1110), later(1110, 7, &[], &[commit]));
    setter.handle(time(1361), later(1361, 8, &[], &[commit]));
    assert_eq!(outcomes(&mut setter), []);
    assert_eq!(setter.awaited().len(), 1);
    // Epoch 8 has begun: its own row is sent while the last one is still awaited.
    sent(&mut setter);
    setter.handle(time(1364), later(1364, 8, &ROW, &[]));
    assert_eq!(outcomes(&mut setter), [RevealOutcome::Revealed]);
    assert!(setter.awaited().is_empty());
}

#[test]
fn a_reveal_that_never_came_is_told() {
    // Dropped by a rule: the commit is gone, the row is not there.
    let (mut setter, commit) = committed();
    setter.handle(time(1361), later(1361, 8, &[], &[commit]));
    setter.handle(time(1365), later(1365, 8, &[], &[]));
    assert_eq!(outcomes(&mut setter), [RevealOutcome::Missed]);
    // Expired with its epoch, while we watched.
    let (mut setter, commit) = committed();
    setter.handle(time(1361), later(1361, 8, &[], &[commit]));
    setter.handle(time(1721), later(1721, 9, &[], &[]));
    assert_eq!(outcomes(&mut setter), [RevealOutcome::Missed]);
    // Nobody looked.
    let (mut setter, _) = committed();
    setter.handle(time(1721), later(1721, 9, &[(0, 65535)], &[]));
    assert_eq!(outcomes(&mut setter), [RevealOutcome::Unseen]);
}

#[test]
fn a_row_of_unknown_fate_is_looked_for_before_it_is_sent_again() {
    let unknown = || Outcome::Unknown { why: "the connection broke".to_owned() };
    let mut setter = seen(view(1100));
    let (attempt, _) = sent(&mut setter);
    setter.handle(time(1101), Input::Ended { attempt, outcome: unknown() });
    assert!(matches!(setter.stage(), Stage::Unsure { .. }));
    assert_eq!(setter.poll_effect(), Some(Effect::Look));
    let mut landed = view(1105);
    landed.last_updates[1] = 1102;
    landed.row = ROW.to_vec();
    setter.handle(time(1105), Input::View(Box::new(landed)));
    assert_eq!(setter.stage(), &Stage::OnChain { row: ROW.to_vec(), block: 1102 });
    assert_eq!(setter.poll_effect(), None);
    // It did not land.
    let mut setter = seen(view(1100));
    let (attempt, _) = sent(&mut setter);
    setter.handle(time(1101), Input::Ended { attempt, outcome: unknown() });
    setter.poll_effect();
    setter.handle(time(1105), Input::View(Box::new(view(1105))));
    let (second, _) = sent(&mut setter);
    assert_eq!(second, attempt + 1);
    // Answers to the first attempt come too late to matter.
    let late = Landed { block: block(1102), commit: None };
    setter.handle(time(1106), Input::Ended { attempt, outcome: Outcome::Landed(late) });
    assert_eq!(setter.stage(), &Stage::Sending { progress: None });
}

#[test]
fn a_commit_of_unknown_fate_is_found_by_its_round() {
    let mut hidden = view(1100);
    hidden.hyperparameters.commit_reveal = true;
    let mut setter = seen(hidden.clone());
    let (attempt, request) = sent(&mut setter);
    let How::Timelocked { round, .. } = request.how else { panic!("timelocked") };
    setter.handle(time(1101), Input::Ended { attempt, outcome: Outcome::Unknown { why: "late".to_owned() } });
    hidden.metagraph.block = block(1106);
    hidden.last_updates[1] = 1104;
    hidden.commits = vec![PendingCommit { epoch: 7, block: 1104, round }];
    setter.handle(time(1106), Input::View(Box::new(hidden)));
    assert_eq!(setter.stage(), &Stage::Committed { block: 1104, round, reveal_block: 1360 });
}

#[test]
fn the_final_row_is_set_in_the_same_epoch_and_once() {
    let mut setter = seen(view(1010));
    let (attempt, _) = sent(&mut setter);
    setter.handle(time(1012), Input::Ended { attempt, outcome: Outcome::Landed(Landed { block: block(1011), commit: None }) });
    let last = Input::Scores { scores: vec![(account(0), 1)], is_final: true };
    setter.handle(time(1020), last.clone());
    let mut after = view(1020);
    after.last_updates[1] = 1011;
    after.row = ROW.to_vec();
    setter.handle(time(1020), Input::View(Box::new(after.clone())));
    assert_eq!(setter.stage(), &Stage::TooSoon { from_block: 1111 });
    after.metagraph.block = block(1111);
    setter.handle(time(1111), Input::View(Box::new(after.clone())));
    setter.poll_effect();
    let (attempt, request) = sent(&mut setter);
    assert_eq!(request.row, [(0, 65535)]);
    assert!(!setter.is_final_set());
    setter.handle(time(1113), Input::Ended { attempt, outcome: Outcome::Landed(Landed { block: block(1112), commit: None }) });
    assert!(setter.is_final_set());
    // Scores that say the same change nothing.
    setter.handle(time(1114), last);
    after.metagraph.block = block(1300);
    after.last_updates[1] = 1112;
    after.row = vec![(0, 65535)];
    setter.handle(time(1300), Input::View(Box::new(after)));
    assert_eq!(setter.poll_effect(), Some(Effect::Look));
    assert_eq!(setter.poll_effect(), None);
}

#[test]
fn after_a_restart_a_final_row_that_is_there_is_not_set_again() {
    let mut shown = view(1110);
    shown.last_updates[1] = 1050;
    shown.row = vec![(0, 65535)];
    let mut setter = Setter::new(settings());
    setter.handle(time(1110), Input::Scores { scores: vec![(account(0), 1)], is_final: true });
    setter.handle(time(1110), Input::View(Box::new(shown.clone())));
    assert!(setter.is_final_set());
    assert_eq!((setter.poll_effect(), setter.poll_effect()), (Some(Effect::Look), None));
    // Another row is there: the final one is sent.
    shown.row = ROW.to_vec();
    shown.metagraph.block = block(1160);
    let mut setter = Setter::new(settings());
    setter.handle(time(1160), Input::Scores { scores: vec![(account(0), 1)], is_final: true });
    setter.handle(time(1160), Input::View(Box::new(shown)));
    setter.poll_effect();
    assert_eq!(sent(&mut setter).1.row, [(0, 65535)]);
    assert!(!setter.is_final_set());
}

#[test]
fn new_scores_do_not_put_the_next_look_off() {
    let mut set = view(1110);
    set.last_updates[1] = 1050;
    let mut setter = seen(set);
    // The next epoch begins at 1360; the longest time without a look is 50 blocks.
    assert_eq!(setter.deadline(), Some(time(1160)));
    for n in 1..5 {
        setter.handle(time(1110 + n * 10), Input::Scores { scores: vec![(account(0), n)], is_final: false });
        assert_eq!(setter.deadline(), Some(time(1160)));
        assert_eq!(setter.poll_effect(), None);
    }
    setter.handle(time(1160), Input::Scores { scores: vec![(account(0), 9)], is_final: false });
    assert_eq!(setter.poll_effect(), Some(Effect::Look));
}

#[test]
fn a_lagging_endpoint_is_not_believed() {
    let mut newer = view(1110);
    newer.last_updates[1] = 1105;
    let mut setter = seen(newer);
    let stage = setter.stage().clone();
    // Before our row landed, or so this endpoint thinks.
    setter.handle(time(1111), Input::View(Box::new(view(1104))));
    assert_eq!(setter.stage(), &stage);
    assert_eq!(setter.poll_effect(), None);
}

#[test]
fn a_dry_run_sends_nothing_and_says_what_it_would() {
    let mut setter = Setter::new(SetterSettings { is_dry_run: true, ..settings() });
    setter.handle(time(1100), scores());
    setter.poll_effect();
    setter.handle(time(1100), Input::View(Box::new(view(1100))));
    assert_eq!(setter.poll_effect(), None);
    assert!(matches!(setter.stage(), Stage::DryRun { request } if request.row == ROW));
}

#[test]
fn while_the_chain_is_silent_it_is_asked_again() {
    let mut setter = Setter::new(settings());
    setter.handle(0, scores());
    for n in 1..5 {
        assert_eq!(setter.poll_effect(), Some(Effect::Look));
        setter.handle(n * 1_000, Input::Unreachable { why: "no route".to_owned() });
        assert!(matches!(setter.stage(), Stage::Unreachable { .. }));
        assert_eq!(setter.deadline(), Some(n * 1_000 + 1_000));
        setter.handle(n * 1_000 + 1_000, Input::Tick);
    }
}
