//! When pulls open, and how long they wait for whom.

use super::*;

const POLL_MS: u64 = 100;
/// What a step takes where nothing else is said.
const XI_MS: u64 = 400;

/// Three learners that step together, and pulls so far apart that none is open beside another.
fn paced() -> World {
    let mut setup = setup(0);
    setup.parameters.inner_steps = 3 * P;
    setup.parameters.step_target_ms = XI_MS;
    let mut world = World::of(setup, 3);
    world.learners.iter_mut().for_each(|learner| learner.step_ms = XI_MS);
    world
}

/// γ (τ ξ − ξ_quorum − ξ_sync) between 0 and ξ, where γ is 0.8 and τ is 2.
fn grace_ms(quorum_ms: u64, sync_ms: u64) -> u64 {
    ((2 * XI_MS).saturating_sub(quorum_ms + sync_ms) * 4 / 5).min(XI_MS)
}

/// Lets polls pass until `at_ms`, and gives the machine one more input at that very time.
fn input_at(world: &mut World, at_ms: u64, input: Input) {
    world.run(at_ms - world.now_ms);
    let poll_ms = std::mem::replace(&mut world.now_ms, at_ms);
    world.input(input);
    world.now_ms = poll_ms;
}

/// Goes on until pull `t` has its quorum and is still open: when it was opened, and when it had the quorum.
fn until_quorum(world: &mut World, t: u64) -> (u64, u64) {
    for _ in 0..100 {
        world.run(POLL_MS);
        assert!(!world.tapes.contains_key(&t), "pull {t} did not wait");
        if let Some(pull) = world.machine.pulls.get(&t)
            && let Some(quorum_ms) = pull.quorum_ms
        {
            assert_eq!(world.machine.timing.step_ms(), XI_MS);
            return (pull.opened_ms, quorum_ms);
        }
    }
    panic!("pull {t} has no quorum");
}

/// Pull `t` waits for one of three learners to the very end of the grace; when that is.
fn waits_for_the_grace(world: &mut World, t: u64, sync_ms: u64) -> u64 {
    let (opened_ms, quorum_ms) = until_quorum(world, t);
    let grace_ms = grace_ms(quorum_ms - opened_ms, sync_ms);
    assert!(grace_ms > 0, "the quorum came too late");
    let closes_ms = quorum_ms + grace_ms;
    input_at(world, closes_ms - 1, Input::Tick);
    assert!(!world.tapes.contains_key(&t), "pull {t} is closed before {grace_ms} ms are over");
    input_at(world, closes_ms, Input::Tick);
    assert!(world.tapes.get(&t).is_some_and(|tape| tape.inputs.len() == 2), "pull {t} is open after {grace_ms} ms");
    closes_ms
}

#[test]
fn pulls_open_no_faster_than_h_xi_by_p_also_where_learners_answer_and_merge_at_once() {
    // H, the target of a step, and what a step takes.
    for (inner_steps, step_target_ms, step_ms) in [(3 * P, 700, 100_u64), (3 * P, 0, 400), (P / 2, 1_000, 100)] {
        let mut setup = setup(0);
        setup.parameters.inner_steps = inner_steps;
        setup.parameters.step_target_ms = step_target_ms;
        let mut world = World::of(setup, 3);
        world.learners.iter_mut().for_each(|learner| learner.step_ms = step_ms);
        let interval_ms = u64::from(inner_steps) * step_ms.max(step_target_ms) / u64::from(P);
        // Until the first steps have been timed nobody knows what they take.
        let first = u64::from(P);
        let mut opened: BTreeMap<u64, u64> = BTreeMap::new();
        for _ in 0..30 * interval_ms / POLL_MS {
            world.run(POLL_MS);
            let pulls = &world.machine.pulls;
            opened.extend(pulls.iter().map(|(t, pull)| (*t, pull.opened_ms)));
            assert!(world.machine.next_t <= first || pulls.len() <= 1, "nothing but the interval holds the next pull back");
        }
        assert!(opened.keys().copied().eq(0..world.machine.next_t), "{opened:?}");
        let times: Vec<u64> = opened.range(first..).map(|(_, opened_ms)| *opened_ms).collect();
        let apart: Vec<u64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(apart.len() > 20, "{apart:?}");
        assert!(apart.iter().all(|ms| (interval_ms..interval_ms + POLL_MS).contains(ms)), "{interval_ms} ms: {apart:?}");
    }
}

#[test]
fn as_many_pulls_are_open_as_may_overlap_and_one_more() {
    for overlap in 0..3 {
        let mut setup = setup(0);
        setup.parameters.overlap = overlap;
        let mut world = World::of(setup, 2);
        // Two are the quorum: the first pulls wait for both until their deadline, far beyond the time between two of them.
        world.learners[1].mute = true;
        let mut most = 0;
        for _ in 0..world.machine.parameters().pull_deadline_ms / POLL_MS {
            world.run(POLL_MS);
            let fragments: BTreeSet<u16> = world.machine.pulls.values().map(|pull| pull.fragment).collect();
            assert_eq!(fragments.len(), world.machine.pulls.len(), "two pulls of one fragment");
            most = most.max(fragments.len());
        }
        assert_eq!(most, usize::from(overlap) + 1);
        world.run_until(|world| (world.merges.len() > 10).then_some(()));
    }
}

#[test]
fn a_pull_with_a_quorum_waits_for_the_grace_and_no_longer_for_a_slow_learner() {
    let mut world = paced();
    world.learners[2].mute = true;
    for t in 0..6 {
        waits_for_the_grace(&mut world, t, 0);
    }
}

#[test]
fn what_a_merge_takes_comes_off_the_grace() {
    const SYNC_MS: u64 = 150;
    let mut world = paced();
    world.learners[2].mute = true;
    world.holds_merges = true;
    let closed_ms = waits_for_the_grace(&mut world, 0, 0);
    world.holds_merges = false;
    let merge = world.held_merges.pop().unwrap();
    let merged = world.execute(merge).unwrap();
    input_at(&mut world, closed_ms + SYNC_MS, merged);
    waits_for_the_grace(&mut world, 1, SYNC_MS);
}

#[test]
fn a_merge_that_was_under_way_in_an_outage_leaves_the_next_ones_their_grace() {
    for is_restarted in [true, false] {
        let mut world = paced();
        world.holds_merges = true;
        world.run_until(|world| (!world.held_merges.is_empty()).then_some(()));
        world.now_ms += 3_600_000;
        if is_restarted {
            world.held_merges.clear();
            world.input(Input::Claimed { epoch: 1 });
        }
        world.holds_merges = false;
        let merge = world.held_merges.pop().unwrap();
        let merged = world.execute(merge).unwrap();
        world.input(merged);
        let most_ms = if is_restarted { 0 } else { 2 * XI_MS };
        assert!(world.machine.timing.sync_ms() <= most_ms, "{} ms", world.machine.timing.sync_ms());
    }
}

#[test]
fn a_pull_that_everybody_has_answered_is_closed_at_once() {
    let mut world = paced();
    for _ in 0..200 {
        world.run(POLL_MS);
        assert!(world.machine.pulls.values().all(|pull| pull.counts().0 < 3), "{:?}", world.machine.pulls);
    }
    assert!(world.tapes.len() > 10 && world.tapes.values().all(|tape| tape.inputs.len() == 3), "{:?}", world.tapes);
    // The last answer comes within the grace, and ends it.
    let mut world = paced();
    world.learners[2].mute = true;
    let (opened_ms, quorum_ms) = until_quorum(&mut world, 0);
    (world.learners[2].mute, world.learners[2].next_step_ms) = (false, 0);
    world.run(POLL_MS);
    assert!(!world.tapes.contains_key(&0), "its upload is on its way");
    world.run(POLL_MS);
    assert!(world.now_ms < quorum_ms + grace_ms(quorum_ms - opened_ms, 0));
    assert_eq!(world.tapes[&0].inputs.len(), 3);
}
