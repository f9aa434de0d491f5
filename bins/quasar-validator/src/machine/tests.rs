//! The machine as a whole, driven by hand.

use daemon::Machine as _;
use protocol::Reason;
use protocol::documents::{Contribution, VerdictResult};

use super::fixture::{account, contribution, drawn, merge, parameters, verdict, view};
use super::*;
use crate::audit::Judgement;

const OWN: OwnNeuron = OwnNeuron { uid: 2, validator_permit: true };

fn machine() -> Machine {
    Machine::new(MachineSettings {
        run: RunId([1; 16]),
        own: account(9),
        parameters: parameters(),
        poll_ms_max: 1_000,
        weights: WeightSettings {
            netuid: 24,
            mechanism: 0,
            refresh_ms: 1_000_000,
            retry_base_ms: 100,
            retry_max_ms: 1_000,
            look_max_ms: 1_000,
            is_dry_run: false,
        },
    })
}

/// Gives one fact at a time and collects what the machine wants.
fn give(machine: &mut Machine, now_ms: u64, input: Input) -> Vec<Effect> {
    machine.handle(now_ms, input);
    std::iter::from_fn(|| machine.poll_effect()).collect()
}

fn head(state: RunState, closed_below: u64) -> Input {
    head_at(state, closed_below, closed_below)
}

fn head_at(state: RunState, closed_below: u64, outer_step: u64) -> Input {
    let fragment = FragmentHead { version: 1, length: 1, digest: Digest::ZERO };
    let log = (&protocol::log::Frontier::default()).into();
    Input::Head(Some(Box::new(HeadFacts { state, outer_step, closed_below, fragments: vec![fragment; 2], log })))
}

fn chain(block: u64, own: Option<OwnNeuron>) -> Input {
    Input::Chain(Some(Box::new(ChainView { block, own })))
}

fn merged(t: u64) -> Input {
    let contributions = vec![contribution(1, 0, 100, Reason::None), contribution(2, 0, 50, Reason::None)];
    Input::Merge { t, manifest: Some(Box::new(merge(t, 2, contributions))) }
}

/// A machine that follows a run of one cycle up to the beacon, which in an open run another merge brings; gives the two audits.
fn audited(machine: &mut Machine, state: RunState) -> Vec<Subject> {
    let (last, block) = if state == RunState::Complete { (1, 8) } else { (2, 9) };
    give(machine, 0, Input::Tick);
    give(machine, 0, chain(20, Some(OWN)));
    give(machine, 0, head(state, last + 1));
    let effects: Vec<Effect> = (0..=last).flat_map(|t| give(machine, 0, merged(t))).collect();
    assert!(effects.contains(&Effect::ReadBeacon { cycle: 0, block }), "{effects:?}");
    let effects = give(machine, 10, Input::Beacon { cycle: 0, read: drawn(0, block, 9) });
    let subjects = effects.into_iter().filter_map(|effect| match effect {
        Effect::ReadVerdict(subject) => Some(*subject),
        _ => None,
    });
    subjects.collect()
}

/// The first look for a verdict finds none.
fn not_revealed(machine: &mut Machine, subject: &Subject, now_ms: u64) {
    let effects = give(machine, now_ms, Input::Verdict { audit: subject.selection.audit, verdict: None });
    assert!(effects.contains(&Effect::ReadOrder(subject.selection.clone())));
}

/// Plays the audit of `subject` from order to reveal with this result.
fn play(machine: &mut Machine, subject: &Subject, result: VerdictResult, now_ms: u64) {
    let audit = subject.selection.audit;
    give(machine, now_ms, Input::Order { audit, read: OrderRead::Fits });
    let judgement = Judgement { result, ..Judgement::not_evaluated("") };
    let effects = give(machine, now_ms, Input::Judged { audit, judged: Judged::Done(Box::new(judgement)) });
    let decided = effects.iter().find_map(|effect| match effect {
        Effect::Commit(verdict) => Some(verdict.clone()),
        _ => None,
    });
    assert_eq!(decided.map(|verdict| (verdict.audit, verdict.result)), Some((audit, result)));
    let effects = give(machine, now_ms, Input::Committed { audit, written: Written::Done });
    assert!(effects.contains(&Effect::Reveal(audit)));
    let effects = give(machine, now_ms, Input::Revealed { audit, written: Written::Done });
    assert!(effects.contains(&Effect::ReadVerdict(Box::new(subject.clone()))));
    let mut public = verdict(0, 0, 0, result);
    (public.audit, public.hotkey, public.slot) = (audit, subject.selection.hotkey, subject.selection.slot);
    give(machine, now_ms, Input::Verdict { audit, verdict: Some(Box::new(public)) });
}

/// Shows the chain at `block` to a machine that looked, and gives the row that it sends, if it does.
fn look(machine: &mut Machine, now_ms: u64, block: u64, row: &[(u16, u16)], last_update: u64) -> Option<(u64, Vec<(u16, u16)>)> {
    let mut seen = view(block, &[1, 2, 9]);
    seen.row = row.to_vec();
    seen.last_updates[2] = last_update;
    let effects = give(machine, now_ms, Input::Weights(setter::Input::View(Box::new(seen))));
    effects.into_iter().find_map(|effect| match effect {
        Effect::SendWeights { send: setter::Effect::Send { attempt, request }, .. } => Some((attempt, request.row)),
        _ => None,
    })
}

/// The row of `attempt` was read back from this block.
fn landed(machine: &mut Machine, now_ms: u64, attempt: u64, number: u64) {
    let landed = chain::Landed { block: chain::BlockRef { number, hash: [1; 32] }, commit: None };
    give(machine, now_ms, Input::Weights(setter::Input::Ended { attempt, outcome: setter::Outcome::Landed(landed) }));
}

fn looks(effects: &[Effect]) -> bool {
    effects.contains(&Effect::Weights(setter::Effect::Look))
}

#[test]
fn a_fresh_machine_looks_at_head_chain_and_current_run() {
    let effects = give(&mut machine(), 0, Input::Tick);
    assert_eq!(effects, [Effect::ReadHead, Effect::ReadBlock, Effect::ReadChain, Effect::CheckMoved]);
}

#[test]
fn before_anything_is_merged_the_weight_goes_to_the_validator_itself() {
    let mut machine = machine();
    give(&mut machine, 0, chain(20, Some(OWN)));
    assert!(looks(&give(&mut machine, 0, head(RunState::Open, 0))));
    assert_eq!(look(&mut machine, 0, 20, &[], 0).map(|(_, row)| row), Some(vec![(2, u16::MAX)]));
}

#[test]
fn no_weights_are_set_before_all_published_manifests_are_read() {
    let mut machine = machine();
    for input in [chain(1, Some(OWN)), head(RunState::Open, 2), merged(0)] {
        assert!(!looks(&give(&mut machine, 0, input)));
    }
    assert!(looks(&give(&mut machine, 0, merged(1))));
    assert_eq!(look(&mut machine, 0, 20, &[], 0).map(|(_, row)| row), Some(vec![(0, 65535), (1, 32768)]));
}

#[test]
fn after_the_chain_was_away_what_became_due_meanwhile_is_read_before_scores_are_made() {
    let mut machine = machine();
    give(&mut machine, 0, chain(7, Some(OWN)));
    give(&mut machine, 0, head(RunState::Complete, 2));
    (0..2).for_each(|t| drop(give(&mut machine, 0, merged(t))));
    assert!(machine.is_caught_up, "the beacon's block 8 is not there yet");
    give(&mut machine, CHAIN_SILENT_MS, Input::Block(None));
    assert!(!machine.is_caught_up);
    let now_ms = 2 * CATCH_UP_MS;
    give(&mut machine, now_ms, Input::Tick);
    assert!(!machine.is_caught_up, "how long the chain was away does not count");
    assert!(give(&mut machine, now_ms, Input::Block(Some(9))).contains(&Effect::ReadBeacon { cycle: 0, block: 8 }));
    give(&mut machine, now_ms, Input::Beacon { cycle: 0, read: DrawRead::Failed });
    let later_ms = now_ms + CATCH_UP_MS;
    give(&mut machine, later_ms - 1, Input::Block(Some(9)));
    assert!(!machine.is_caught_up);
    let mut impatient = machine.clone();
    give(&mut impatient, later_ms, Input::Tick);
    assert!(impatient.is_caught_up, "what can never be read keeps no weights away");
    for effect in give(&mut machine, later_ms - 1, Input::Beacon { cycle: 0, read: drawn(0, 8, 9) }) {
        if let Effect::ReadVerdict(subject) = effect {
            assert!(!machine.is_caught_up);
            not_revealed(&mut machine, &subject, later_ms - 1);
        }
    }
    assert!(machine.is_caught_up);
}

#[test]
fn an_audit_that_waits_for_manifests_does_not_keep_the_machine_awake() {
    let mut machine = machine();
    let subjects = audited(&mut machine, RunState::Open);
    subjects.iter().for_each(|subject| not_revealed(&mut machine, subject, 10));
    give(&mut machine, 20, head(RunState::Open, 9));
    give(&mut machine, 20, Input::Order { audit: subjects[0].selection.audit, read: OrderRead::Fits });
    assert!(machine.deadline() > Some(20));
    let effects: Vec<Effect> = (3..9).flat_map(|t| give(&mut machine, 21, merged(t))).collect();
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Judge { .. })), "{effects:?}");
}

#[test]
fn a_complete_run_is_audited_and_ends_with_final_weights_without_the_failed_learner() {
    let mut machine = machine();
    let subjects = audited(&mut machine, RunState::Complete);
    assert_eq!(subjects.len(), 2);
    assert_eq!(look(&mut machine, 10, 20, &[], 0), None, "a verdict that is there already would count");
    subjects.iter().for_each(|subject| not_revealed(&mut machine, subject, 10));
    let (attempt, regular) = look(&mut machine, 10, 20, &[], 0).expect("this epoch has no row yet");
    landed(&mut machine, 10, attempt, 21);
    for (subject, result) in subjects.iter().zip([VerdictResult::Mismatch, VerdictResult::Pass]) {
        assert_eq!(look(&mut machine, 20, 22, &regular, 21), None);
        play(&mut machine, subject, result, 20);
    }
    // The last verdict changed the row: it is set once more in the same epoch, as soon as the rate limit allows.
    assert_eq!(look(&mut machine, 20, 30, &regular, 21), None);
    let honest = if subjects[1].selection.hotkey == account(1) { 0 } else { 1 };
    let (attempt, last) = look(&mut machine, 30, 31, &regular, 21).expect("the final row");
    assert_eq!(last, [(honest, u16::MAX)]);
    landed(&mut machine, 40, attempt, 32);
    assert!(machine.weights.is_final_set());
    assert_eq!(look(&mut machine, 5_000, 45, &last, 32), None);
}

#[test]
fn a_restarted_machine_reads_the_same_facts_and_comes_to_the_same_scores() {
    let (mut first, mut second) = (machine(), machine());
    let subjects = audited(&mut first, RunState::Open);
    for subject in &subjects {
        not_revealed(&mut first, subject, 20);
        play(&mut first, subject, VerdictResult::Mismatch, 20);
    }
    let again = audited(&mut second, RunState::Open);
    assert_eq!(again, subjects);
    for subject in &again {
        let mut public = verdict(0, 0, 0, VerdictResult::Mismatch);
        (public.audit, public.hotkey, public.slot) = (subject.selection.audit, subject.selection.hotkey, subject.selection.slot);
        give(&mut second, 20, Input::Verdict { audit: subject.selection.audit, verdict: Some(Box::new(public)) });
    }
    assert_eq!(first.scores, second.scores);
    assert!(second.audits.is_settled(), "what is public already is not audited again");
}

/// The version that the last of so many cycles makes, and from which one on its fragment is kept, where beacons are answered or not.
fn kept_from(cycles: u64, has_beacons: bool) -> Option<(u64, u64)> {
    let mut machine = machine();
    give(&mut machine, 0, Input::Tick);
    let view = ChainView { block: 1_000, own: Some(OWN) };
    give(&mut machine, 0, Input::Chain(Some(Box::new(view))));
    let mut kept = None;
    for t in 0..2 * cycles {
        give(&mut machine, 0, head(RunState::Open, t + 1));
        let mut effects: VecDeque<Effect> = give(&mut machine, 0, merged(t)).into();
        while let Some(effect) = effects.pop_front() {
            effects.extend(match effect {
                Effect::Keep { keyframe, from, .. } => {
                    kept = Some((keyframe.version, from));
                    Vec::new()
                }
                Effect::ReadBeacon { cycle, block } if has_beacons => {
                    give(&mut machine, 0, Input::Beacon { cycle, read: drawn(cycle, block, 8) })
                }
                Effect::ReadVerdict(subject) => give(&mut machine, 0, Input::Verdict { audit: subject.selection.audit, verdict: None }),
                _ => Vec::new(),
            });
        }
    }
    kept
}

#[test]
fn the_last_versions_are_kept_and_while_earlier_cycles_wait_those_that_they_may_need_but_not_without_limit() {
    assert_eq!(kept_from(30, true), Some((30, 30 + 1 - VERSIONS_KEPT)));
    assert_eq!(kept_from(20, false), Some((20, 0)));
    assert_eq!(kept_from(30, false), Some((30, 30 + 1 - VERSIONS_KEPT_MAX)));
}

#[test]
fn an_unregistered_hotkey_ends_the_process_after_ten_minutes_and_another_run_at_once() {
    let mut machine = machine();
    give(&mut machine, 0, chain(20, None));
    assert_eq!(machine.exit(), None);
    give(&mut machine, REGISTRATION_MS, chain(20, None));
    assert_eq!((machine.exit(), machine.ended()), (Some(Exit::TryLater), Some(Ended::Unregistered)));
    let mut machine = self::machine();
    give(&mut machine, 0, Input::Moved(true));
    assert_eq!((machine.exit(), machine.ended()), (Some(Exit::Done), Some(Ended::Moved)));
}

#[test]
fn an_idle_machine_sleeps_until_its_next_poll() {
    let mut machine = machine();
    give(&mut machine, 0, Input::Tick);
    for input in [Input::Head(None), Input::Block(None), Input::Chain(None), Input::Moved(false)] {
        give(&mut machine, 5, input);
    }
    assert_eq!(machine.deadline(), Some(105));
}

#[test]
fn facts_in_the_wrong_order_or_about_unknown_audits_change_nothing() {
    let mut machine = machine();
    let audit = Digest::blake3(b"unknown");
    for input in [
        Input::Beacon { cycle: 3, read: drawn(3, 1, 9) },
        Input::Order { audit, read: OrderRead::Fits },
        Input::Committed { audit, written: Written::Done },
        Input::Revealed { audit, written: Written::Done },
        Input::Verdict { audit, verdict: None },
        Input::Weights(setter::Input::Tick),
        Input::Weights(setter::Input::Unreachable { why: String::new() }),
        Input::Merge { t: 77, manifest: None },
    ] {
        give(&mut machine, 0, input);
    }
    assert!(machine.audits.is_settled() && machine.scores.scores().is_empty());
}

#[test]
fn a_commitment_to_a_step_that_was_open_when_the_watch_began_may_have_been_logged_before() {
    let mut machine = machine();
    // Steps close in any order: step 4 is open, far above the first that is not closed.
    give(&mut machine, 0, head_at(RunState::Open, 1, 5));
    let mut log = machine.log.clone();
    let commitments = [4, 5].map(|t| Digest::blake3(&[t]));
    for (t, commitment) in [4, 5].into_iter().zip(commitments) {
        log.expect(&merge(t, 2, vec![Contribution { commitment, ..contribution(1, 0, 100, Reason::None) }]));
    }
    let nothing = (&protocol::log::Frontier::default()).into();
    (1..=12).for_each(|minute| log.follow(nothing, 6, minute * 60_000).unwrap());
    assert_eq!(log.overdue(), [commitments[1]]);
}
