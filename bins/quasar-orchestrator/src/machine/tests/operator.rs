//! Orders of the operator, releases on schedule, and learners that are not as they should be.

use super::*;

#[test]
fn what_lies_at_the_key_of_an_order_and_is_none_is_said_and_passed_over() {
    let mut world = World::new(0, 2);
    world.run(2_000);
    world.input(Input::Order { order: StoredOrder { number: 1, order: Err("its signature is not valid".into()) } });
    let hotkey = world.learners[0].slot.0;
    world.input(order(2, Action::Ban { hotkey }));
    let outcomes = world.machine.status().outcomes;
    assert!(!outcomes[0].done && outcomes[0].text.contains("signature"), "{outcomes:?}");
    assert!(outcomes[1].done && world.machine.orders_taken() == 2, "{outcomes:?}");
}

#[test]
fn a_process_that_died_before_it_told_a_banned_learner_tells_it_when_it_begins_again() {
    let mut world = World::new(0, 2);
    world.run(2_000);
    let hotkey = world.learners[0].slot.0;
    world.machine.handle(world.now_ms, order(1, Action::Ban { hotkey }));
    while world.machine.poll_effect().is_some() {}
    world.machine.handle(world.now_ms, Input::Claimed { epoch: 2 });
    let effects: Vec<Effect> = std::iter::from_fn(|| world.machine.poll_effect()).collect();
    let is_told = |effect: &Effect| matches!(effect, Effect::PublishJob { job, .. } if job.hotkey == hotkey && job.leases.is_empty());
    assert!(effects.iter().any(is_told), "{effects:?}");
}

#[test]
fn what_was_being_deleted_when_a_process_died_is_deleted_by_the_next() {
    let mut world = World::new(0, 3);
    world.run(5_000);
    // Deletions go out and are not heard of again.
    let from = world.retired.len();
    world.holds_deletions = true;
    world.run(60_000);
    let asked = world.retired[from..].to_vec();
    assert!(asked.len() > 3, "{asked:?}");
    world.holds_deletions = false;
    world.input(Input::Claimed { epoch: 2 });
    assert_eq!(world.retired[from + asked.len()..][..asked.len()], asked[..]);
    let after = world.retired.len();
    world.input(Input::Claimed { epoch: 3 });
    assert_eq!(world.retired.len(), after, "each once");
}

#[test]
fn an_order_is_taken_once_and_in_its_turn() {
    let mut world = World::new(0, 2);
    world.run(2_000);
    world.input(order(2, Action::Drain));
    assert_eq!((world.machine.state(), world.machine.orders_taken()), (RunState::Open, 0), "number 1 comes first");
    world.input(order(1, Action::Unban { hotkey: miner(1) }));
    world.input(order(1, Action::Drain));
    assert_eq!((world.machine.state(), world.machine.orders_taken()), (RunState::Open, 1));
    world.input(order(2, Action::Drain));
    assert_eq!((world.machine.state(), world.machine.orders_taken()), (RunState::Draining, 2));
    world.until_complete(30_000);
    assert_eq!(world.released, 1);
}

#[test]
fn a_banned_hotkey_gets_no_rows_and_does_not_count_until_it_is_unbanned() {
    let mut world = World::new(0, 3);
    world.run(5_000);
    let slot = world.learners[0].slot;
    world.input(order(1, Action::Ban { hotkey: slot.0 }));
    let from = world.machine.next_t;
    let leased = world.machine.ledger.totals().leased_rows;
    assert!(world.machine.leases.values().filter(|record| record.slot == slot).all(|record| record.ended));
    world.run(10_000);
    assert!(world.machine.ledger.totals().leased_rows <= leased + 2 * 24 * 4);
    assert!(world.tapes.range(from..).all(|(_, tape)| tape.inputs.iter().all(|input| input.hotkey != slot.0)), "it does not count");
    assert!(world.tapes.range(from..).any(|(_, tape)| !tape.inputs.is_empty()), "the others do");
    world.input(order(2, Action::Unban { hotkey: slot.0 }));
    world.run(10_000);
    let last = world.machine.next_t;
    assert!(world.tapes.range(from..last).any(|(_, tape)| tape.inputs.iter().any(|input| input.hotkey == slot.0)), "it does again");
}

#[test]
fn what_a_forgotten_learner_offered_is_dropped_when_its_hotkey_is_banned() {
    let mut world = World::new(0, 3);
    let slot = world.learners[0].slot;
    // The others answer nothing: what it offered waits.
    world.learners[1..].iter_mut().for_each(|sim| sim.mute = true);
    let has_offer = |world: &World| {
        let mut open = world.machine.pulls.values().filter(|pull| pull.stage == PullStage::Open);
        open.any(|pull| pull.offers.contains_key(&slot))
    };
    world.run_until(|world| has_offer(world).then_some(()));
    world.learners[0].silent = true;
    world.run(6_000);
    let guests = world.guests.iter().filter(|guest| guest.hotkey != slot.0).cloned().collect();
    world.input(Input::Metagraph { guests });
    assert!(!world.machine.learners.contains_key(&slot) && has_offer(&world));
    world.input(order(1, Action::Ban { hotkey: slot.0 }));
    assert!(!has_offer(&world));
    world.machine.check_invariants().unwrap();
}

#[test]
fn releases_come_on_schedule_while_everybody_trains_and_reset_nobody() {
    let mut world = World::new(0, 3);
    world.machine.setup.parameters.release_every_cycles = 2;
    world.run(40_000);
    let cycles = world.machine.fragment_versions().into_iter().min().unwrap();
    assert!(world.released >= 2 && u64::from(world.released) <= cycles / 2, "{} releases in {cycles} cycles", world.released);
    assert!(world.machine.learners.values().all(|learner| learner.session_epoch == 500 && learner.live));
    assert!(world.learners.iter().all(|sim| sim.record.local_step > 60), "training went on");
    assert_eq!(world.machine.state(), RunState::Open);
}

#[test]
fn a_release_of_what_was_released_last_is_logged_once() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    world.input(order(1, Action::Release));
    // Nothing was merged meanwhile: the same versions give the same release.
    let release = world.machine.release.clone();
    world.holds_releases = true;
    world.input(order(2, Action::Release));
    world.input(Input::Released { release: release.clone() });
    world.run(5_000);
    let logged = world.log.values().flat_map(|head| &head.entries).filter(|entry| entry.kind == LogKind::Release);
    assert_eq!((logged.count(), &world.machine.release), (1, &release));
}

#[test]
fn a_release_that_is_under_way_is_asked_for_again_after_a_crash_and_the_last_one_waits_for_it() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    world.holds_releases = true;
    world.input(order(1, Action::Release));
    assert!(world.machine.releasing.is_some());
    world.input(order(2, Action::Drain));
    world.run(10_000);
    assert_eq!((world.machine.state(), world.released), (RunState::Draining, 0), "the last release waits for the one under way");
    world.holds_releases = false;
    world.input(Input::Claimed { epoch: 2 });
    world.until_complete(10_000);
    assert_eq!(world.released, 2);
}

#[test]
fn old_versions_payloads_and_releases_are_let_go_of_when_no_audit_needs_them() {
    let mut world = World::new(0, 3);
    world.machine.setup.parameters.release_every_cycles = 1;
    world.run(200_000);
    let versions = world.machine.fragment_versions();
    let retired: BTreeSet<(u16, u64)> = world.retired.iter().flat_map(|retired| retired.versions.clone()).collect();
    assert!(!retired.is_empty(), "{versions:?}");
    for (fragment, version) in &retired {
        assert!(version + 8 <= versions[usize::from(*fragment)] + 1, "version {version} of {fragment} is still needed");
    }
    assert_eq!(retired.len(), world.retired.iter().map(|retired| retired.versions.len()).sum::<usize>(), "each once");
    let payloads: Vec<u64> = world.retired.iter().flat_map(|retired| retired.payloads.iter().map(|(_, t)| *t)).collect();
    assert!(!payloads.is_empty() && payloads.iter().all(|t| *t + 4 * u64::from(P) <= world.machine.closed_below()));
    let kept = world.machine.releases.iter().filter(|name| !name.is_empty()).count();
    let made = world.machine.releases.len();
    assert!(made > 12 && kept == 3 + (made - 3) / 10, "{kept} of {made} releases are kept");
}

#[test]
fn a_learner_that_counts_its_steps_as_it_likes_moves_no_schedule() {
    let honest = |liar: bool| {
        let mut world = World::new(0, 5);
        if liar {
            world.liar = Some(0);
        }
        world.run(30_000);
        (world.machine.timing.step_ms(), world.tapes.len())
    };
    let ((before, merges), (after, merges_with_liar)) = (honest(false), honest(true));
    assert!(after * 10 >= before * 8 && after * 10 <= before * 12, "{before} ms became {after} ms");
    assert!(merges_with_liar <= merges * 5 / 4, "H does not collapse: {merges} merges became {merges_with_liar}");
}

#[test]
fn a_learner_that_leaves_two_pulls_of_three_unanswered_is_waited_for_no_more_than_one_that_leaves_all() {
    let mut learner = Learner::of_session(1, 0);
    let waited = (0..30).filter(|pull| {
        learner.note_answer(pull % 3 == 2);
        learner.answers_mostly()
    });
    assert!(waited.count() <= 15);
    (0..3).for_each(|_| learner.note_answer(true));
    assert!(learner.answers_mostly(), "who answers again is waited for again");
}

#[test]
fn learners_that_never_answer_are_not_waited_for_again_and_again() {
    let mut world = World::new(0, 6);
    // Four of six say that they train and answer nothing: the quorum of three cannot be reached at first.
    for index in 0..4 {
        world.learners[index].mute = true;
    }
    world.run(60_000);
    let before = world.tapes.len();
    world.run(20_000);
    let merged = world.tapes.len() - before;
    assert!(merged >= 20, "{merged} merges in 20 s: each still waits for the deadline of 10 s");
    // So are learners that commit and never upload.
    let committing = {
        let mut world = World::new(0, 6);
        world.withheld = (0..4).map(|index| world.learners[index].slot).collect();
        world.run(60_000);
        let before = world.tapes.len();
        world.run(20_000);
        world.tapes.len() - before
    };
    assert!(committing >= 20, "{committing} merges in 20 s");
    // They are pulled all the same, and count as soon as they answer.
    world.learners.iter_mut().for_each(|sim| sim.mute = false);
    let from = world.machine.next_t;
    world.run(20_000);
    let contributors = world.tapes.range(from + 8..).map(|(_, tape)| tape.inputs.len()).max().unwrap();
    assert_eq!(contributors, 6);
}

#[test]
fn a_run_in_which_nobody_answered_for_a_while_goes_on_when_somebody_does() {
    let mut world = World::new(0, 4);
    world.run(10_000);
    world.learners.iter_mut().for_each(|sim| sim.mute = true);
    world.run(120_000);
    assert!(world.machine.learners.values().all(|learner| !learner.is_eligible()), "nobody is waited for any more");
    world.learners.iter_mut().for_each(|sim| sim.mute = false);
    let from = world.machine.next_t;
    world.run(30_000);
    let contributors = world.tapes.range(from + 8..).map(|(_, tape)| tape.inputs.len()).max().unwrap_or(0);
    assert_eq!(contributors, 4);
}
