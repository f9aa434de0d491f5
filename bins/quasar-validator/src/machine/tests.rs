//! The machine as a whole, driven by hand.

use daemon::Machine as _;
use protocol::Reason;
use protocol::documents::VerdictResult;

use super::fixture::{account, contribution, merge, parameters, verdict};
use super::*;
use crate::audit::Judgement;

const OWN: OwnNeuron = OwnNeuron { uid: 9, validator_permit: true, last_update: 0, tempo: 30, rate_limit: 10 };

fn machine() -> Machine {
    Machine::new(MachineSettings {
        run: RunId([1; 16]),
        own: account(9),
        parameters: parameters(),
        poll_ms_max: 1_000,
        weights: WeightTimes { refresh_ms: 1_000_000, retry_base_ms: 100, retry_max_ms: 1_000 },
    })
}

/// Gives one fact at a time and collects what the machine wants.
fn give(machine: &mut Machine, now_ms: u64, input: Input) -> Vec<Effect> {
    machine.handle(now_ms, input);
    std::iter::from_fn(|| machine.poll_effect()).collect()
}

fn head(state: RunState, closed_below: u64) -> Input {
    let fragment = FragmentHead { version: 1, length: 1, digest: Digest::ZERO };
    let log = (&protocol::log::Frontier::default()).into();
    Input::Head(Some(Box::new(HeadFacts { state, closed_below, fragments: vec![fragment; 2], log })))
}

fn chain(block: u64, own: Option<OwnNeuron>) -> Input {
    Input::Chain(Some(Box::new(ChainView { block, validators: vec![account(9)], own })))
}

fn merged(t: u64) -> Input {
    let contributions = vec![contribution(1, 0, 100, Reason::None), contribution(2, 0, 50, Reason::None)];
    Input::Merge { t, manifest: Some(Box::new(merge(t, 2, contributions))) }
}

/// A machine that follows a complete run of one cycle, up to the beacon; gives the two audits.
fn audited(machine: &mut Machine, state: RunState) -> Vec<Subject> {
    give(machine, 0, Input::Tick);
    give(machine, 0, chain(20, Some(OWN)));
    give(machine, 0, head(state, 2));
    give(machine, 0, merged(0));
    let effects = give(machine, 0, merged(1));
    assert!(effects.contains(&Effect::ReadBeacon { cycle: 0, block: 8 }), "{effects:?}");
    let effects = give(machine, 10, Input::Beacon { cycle: 0, hash: Some([4; 32]) });
    let subjects = effects.into_iter().filter_map(|effect| match effect {
        Effect::ReadVerdict(subject) => Some(*subject),
        _ => None,
    });
    subjects.collect()
}

/// Plays the audit of `subject` from order to reveal with this result.
fn play(machine: &mut Machine, subject: &Subject, result: VerdictResult, now_ms: u64) {
    let audit = subject.selection.audit;
    let effects = give(machine, now_ms, Input::Verdict { audit, verdict: None });
    assert!(effects.contains(&Effect::ReadOrder(subject.selection.clone())));
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

fn weights_wanted(effects: &[Effect]) -> Option<(Vec<(AccountId, u64)>, Due)> {
    effects.iter().find_map(|effect| match effect {
        Effect::SetWeights { scores, due, .. } => Some((scores.clone(), *due)),
        _ => None,
    })
}

#[test]
fn a_fresh_machine_looks_at_head_chain_and_current_run() {
    let effects = give(&mut machine(), 0, Input::Tick);
    assert_eq!(effects, [Effect::ReadHead, Effect::ReadBlock, Effect::ReadChain, Effect::CheckMoved]);
}

#[test]
fn before_anything_is_merged_the_weights_are_set_for_nobody() {
    let mut machine = machine();
    give(&mut machine, 0, chain(20, Some(OWN)));
    let effects = give(&mut machine, 0, head(RunState::Open, 0));
    assert_eq!(weights_wanted(&effects), Some((vec![], Due::Regular)));
}

#[test]
fn no_weights_are_set_before_all_published_manifests_are_read() {
    let mut machine = machine();
    give(&mut machine, 0, chain(20, Some(OWN)));
    assert_eq!(weights_wanted(&give(&mut machine, 0, head(RunState::Open, 2))), None);
    assert_eq!(weights_wanted(&give(&mut machine, 0, merged(0))), None);
    let wanted = weights_wanted(&give(&mut machine, 0, merged(1)));
    assert_eq!(wanted, Some((vec![(account(1), 200), (account(2), 100)], Due::Regular)));
}

#[test]
fn a_complete_run_is_audited_and_ends_with_final_weights_without_the_failed_learner() {
    let mut machine = machine();
    let subjects = audited(&mut machine, RunState::Complete);
    assert_eq!(subjects.len(), 2);
    give(&mut machine, 10, Input::Weights(WeightsOutcome::Set { block: 21, weights: Vec::new() }));
    for (subject, result) in subjects.iter().zip([VerdictResult::Mismatch, VerdictResult::Pass]) {
        assert_eq!(weights_wanted(&give(&mut machine, 20, Input::Tick)), None);
        play(&mut machine, subject, result, 20);
    }
    let effects = give(&mut machine, 30, Input::Block(Some(31)));
    let honest = (subjects[1].selection.hotkey, if subjects[1].selection.hotkey == account(1) { 200 } else { 100 });
    assert_eq!(weights_wanted(&effects), Some((vec![honest], Due::Final)));
    give(&mut machine, 40, Input::Weights(WeightsOutcome::Set { block: 32, weights: Vec::new() }));
    assert_eq!(weights_wanted(&give(&mut machine, 90_000, chain(500, Some(OWN)))), None);
}

#[test]
fn a_restarted_machine_reads_the_same_facts_and_comes_to_the_same_scores() {
    let (mut first, mut second) = (machine(), machine());
    let subjects = audited(&mut first, RunState::Open);
    for subject in &subjects {
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
        Input::Beacon { cycle: 3, hash: Some([1; 32]) },
        Input::Order { audit, read: OrderRead::Fits },
        Input::Committed { audit, written: Written::Done },
        Input::Revealed { audit, written: Written::Done },
        Input::Verdict { audit, verdict: None },
        Input::Weights(WeightsOutcome::DryRun),
        Input::Merge { t: 77, manifest: None },
    ] {
        give(&mut machine, 0, input);
    }
    assert!(machine.audits.is_settled() && machine.scores.scores().is_empty());
}
