//! Rollbacks: every fragment goes back, in one round, whoever goes on with it.

use super::*;

#[test]
fn a_rollback_gives_every_fragment_the_earlier_state_as_a_new_version() {
    let mut world = World::new(0, 3);
    world.run(30_000);
    let before = world.machine.fragment_versions();
    let target = before.iter().min().unwrap() - 1;
    assert!(target >= world.machine.rollback_from());
    let steps = world.tapes.len();
    world.input(order(1, Action::Rollback { version: target }));
    world.run(4_000);
    let restored: Vec<&Tape> = world.tapes.values().filter(|tape| tape.restores.is_some()).collect();
    assert_eq!(restored.iter().map(|tape| tape.fragment).collect::<BTreeSet<_>>().len(), usize::from(P));
    assert!(restored.iter().all(|tape| tape.restores == Some(target) && tape.inputs.is_empty()));
    for (fragment, version) in world.machine.fragment_versions().into_iter().enumerate() {
        assert!(version > before[fragment], "versions only go up");
    }
    // What was trained on the versions that were taken back does not come in again.
    for (t, tape) in world.tapes.iter().skip(steps) {
        for input in &tape.inputs {
            let restored = restored.iter().find(|restored| restored.fragment == tape.fragment && restored.t < *t);
            assert!(restored.is_none_or(|restored| input.base_version > restored.base_version), "{tape:?}");
        }
    }
    world.run(20_000);
    let merged = world.tapes.values().filter(|tape| tape.t > restored_last(&world) && !tape.inputs.is_empty()).count();
    assert!(merged > 0, "training goes on from there");
    assert!(world.machine.status().outcomes[0].done);
}

#[test]
fn what_a_rollback_goes_back_to_is_not_deleted_meanwhile_and_a_release_follows() {
    for offset in 0..12 {
        let mut setup = setup(0);
        setup.parameters.audit.opening_ms = 3_600_000;
        let mut world = World::of(setup, 3);
        world.opens_nothing = Some(world.learners[0].slot);
        world.run(60_000 + offset * 300);
        let target = world.machine.rollback_from();
        assert!(target > 0, "something was deleted before");
        // Audits come to an end while the order is on its way: what they let go of is deleted with the next merge.
        world.machine.audits.clear();
        world.machine.verdicts_awaited.clear();
        world.machine.audit_cycle += 8;
        world.input(order(1, Action::Rollback { version: target }));
        world.run(10_000);
        let restored: BTreeSet<u16> = world.tapes.values().filter(|tape| tape.restores == Some(target)).map(|tape| tape.fragment).collect();
        assert_eq!(restored.len(), usize::from(P));
        assert_eq!(world.released, 1, "the newest release does not hold what was taken back");
        assert!(world.machine.rollback_from() > target, "afterwards it may go");
    }
}

#[test]
fn a_drain_that_is_ordered_during_a_rollback_has_its_own_closing_round() {
    let mut world = World::new(0, 3);
    world.run(20_000);
    let target = world.machine.fragment_versions().into_iter().min().unwrap() - 1;
    let machine = &mut world.machine;
    machine.handle(world.now_ms, order(1, Action::Rollback { version: target }));
    machine.handle(world.now_ms, order(2, Action::Drain));
    let effects: Vec<Effect> = std::iter::from_fn(|| machine.poll_effect()).collect();
    let inputs: Vec<Input> = effects.into_iter().filter_map(|effect| world.execute(effect)).collect();
    inputs.into_iter().for_each(|input| world.input(input));
    world.until_complete(60_000);
    let fragments = |is_of: fn(&&Tape) -> bool| world.tapes.values().filter(is_of).map(|tape| tape.fragment).collect::<BTreeSet<_>>();
    assert_eq!(fragments(|tape| tape.restores.is_some()).len(), usize::from(P));
    assert_eq!(fragments(|tape| tape.closing && !tape.inputs.is_empty()).len(), usize::from(P), "each is pulled once more");
}

#[test]
fn a_rollback_that_a_predecessor_went_through_is_not_gone_on_with() {
    let (mut world, _) = going_back();
    begin_round(&mut world);
    world.run(1_500);
    assert!(world.machine.restoring.is_none(), "the round is over");
    let restored = |world: &World| world.tapes.values().filter(|tape| tape.restores.is_some()).count();
    let before = restored(&world);
    let recovered = world.recover_from_bucket();
    assert!(world.machine.restoring.is_some(), "the snapshot is from before it");
    world.loses_disk = true;
    world.input(recovered);
    let newest = world.machine.fragment_versions().into_iter().max().unwrap();
    assert_eq!(world.machine.rollback_from(), newest + 1 - 8, "what the predecessor may have deleted is not gone back to");
    world.run(10_000);
    assert_eq!(restored(&world), before);
}

fn restored_last(world: &World) -> u64 {
    world.tapes.values().filter(|tape| tape.restores.is_some()).map(|tape| tape.t).max().unwrap()
}

#[test]
fn a_rollback_to_what_is_deleted_or_not_there_yet_is_refused_and_changes_nothing() {
    let mut world = World::new(0, 2);
    world.run(10_000);
    let versions = world.machine.fragment_versions();
    world.input(order(1, Action::Rollback { version: 1_000 }));
    world.machine.fragments[0].kept_from = 2;
    world.input(order(2, Action::Rollback { version: 1 }));
    assert_eq!(world.machine.fragment_versions(), versions);
    let outcomes = world.machine.status().outcomes;
    assert!(!outcomes[0].done && outcomes[0].text.contains("no fragment is beyond"), "{outcomes:?}");
    assert!(!outcomes[1].done && outcomes[1].text.contains("is deleted"), "{outcomes:?}");
}

/// A world in which a rollback was ordered, and its target. The bucket knows of it, and the round has not begun.
fn going_back() -> (World, u64) {
    let mut world = World::new(0, 3);
    world.run(20_000);
    world.holds_releases = true;
    world.holds_snapshots = true;
    let target = world.machine.fragment_versions().into_iter().min().unwrap() - 1;
    world.input(order(1, Action::Rollback { version: target }));
    world.snapshot = Some(world.machine.to_snapshot(world.now_ms).unwrap());
    (world, target)
}

/// The process hears that its snapshot is stored.
fn begin_round(world: &mut World) {
    let revision = world.machine.restoring.as_ref().unwrap().revision + 1;
    world.input(Input::SnapshotStored { revision });
}

fn fragments_that_went_back(world: &World) -> BTreeSet<u16> {
    world.tapes.values().filter(|tape| tape.restores.is_some()).map(|tape| tape.fragment).collect()
}

#[test]
fn a_step_of_the_round_whose_tape_did_not_come_through_is_one_for_a_successor_too() {
    let (first, _) = going_back();
    let until = first.machine.restoring.as_ref().unwrap().until;
    for gap in until - u64::from(P)..until {
        let (mut world, target) = going_back();
        begin_round(&mut world);
        while world.machine.restoring.is_some() {
            world.run(100);
        }
        assert_eq!(world.machine.next_t, until, "nothing was opened since");
        // The head knows of the step; the process died with its tape on the way.
        let tape = world.tapes.remove(&gap).unwrap();
        world.merges.remove(&gap);
        let head = world.head.as_mut().unwrap();
        head.closed_below = head.closed_below.min(gap);
        head.fragments[usize::from(tape.fragment)].version = tape.base_version;
        world.loses_disk = true;
        let recovered = world.recover_from_bucket();
        world.input(recovered);
        world.run(1_000);
        assert_eq!(fragments_that_went_back(&world).len(), usize::from(P), "step {gap}");
        assert!(world.tapes.values().all(|tape| tape.restores.is_none_or(|version| version == target)));
    }
}

#[test]
fn a_step_of_the_round_that_an_earlier_writer_decided_goes_back_in_another_one() {
    for (at, is_succeeded) in (0..u64::from(P)).flat_map(|at| [(at, false), (at, true)]) {
        let (mut world, target) = going_back();
        // Its tape came late: that writer knew nothing of the round.
        let stray = Tape { restores: None, ..world.machine.restoring_tape(target, world.machine.next_t + at) };
        world.tapes.insert(stray.t, stray.clone());
        world.holds_snapshots = is_succeeded;
        begin_round(&mut world);
        world.run(2_000);
        let goes_back = |world: &World| {
            let mut later = world.tapes.range(stray.t + 1..).map(|(_, tape)| tape).filter(|tape| tape.fragment == stray.fragment);
            later.next().is_some_and(|tape| tape.restores == Some(target))
        };
        assert_eq!(goes_back(&world), !is_succeeded, "another round waits for a snapshot too");
        if is_succeeded {
            world.holds_snapshots = false;
            world.loses_disk = true;
            let recovered = world.recover_from_bucket();
            world.input(recovered);
            world.run(2_000);
        }
        assert!(goes_back(&world) && world.machine.restoring.is_none(), "step {at}");
        assert_eq!(fragments_that_went_back(&world).len(), usize::from(P));
    }
}

#[test]
fn the_round_waits_until_the_bucket_knows_of_it() {
    let (mut world, _) = going_back();
    world.run(3_000);
    let next_t = world.machine.next_t;
    assert!(fragments_that_went_back(&world).is_empty() && world.machine.status().outcomes.is_empty());
    // One that was asked for before says nothing.
    let earlier = world.machine.restoring.as_ref().unwrap().revision;
    world.input(Input::SnapshotStored { revision: earlier });
    assert!(world.machine.status().outcomes.is_empty());
    world.holds_snapshots = false;
    // The same process begins again.
    world.input(Input::Claimed { epoch: 1 });
    assert!(world.machine.status().outcomes[0].done);
    world.run(1_000);
    assert_eq!(fragments_that_went_back(&world).len(), usize::from(P));
    assert!(world.machine.next_t >= next_t + u64::from(P));
}

#[test]
fn a_successor_whose_snapshot_knows_nothing_of_a_rollback_begins_it_once() {
    let mut world = World::new(0, 3);
    world.run(20_000);
    let target = world.machine.fragment_versions().into_iter().min().unwrap() - 1;
    world.holds_snapshots = true;
    let rollback = Order { number: 1, action: Action::Rollback { version: target }, reason: "for the test".into() };
    let rollback = StoredOrder { number: 1, order: Ok(rollback) };
    world.input(Input::Order { order: rollback.clone() });
    world.run(500);
    world.holds_snapshots = false;
    world.succeed_with(vec![rollback]);
    world.run(1_000);
    let restored: Vec<u16> = world.tapes.values().filter(|tape| tape.restores.is_some()).map(|tape| tape.fragment).collect();
    assert_eq!((restored.len(), fragments_that_went_back(&world).len()), (usize::from(P), usize::from(P)));
    assert!(world.machine.status().outcomes[0].done);
}

#[test]
fn nothing_is_released_in_the_middle_of_a_rollback() {
    let (mut world, target) = going_back();
    world.holds_merges = true;
    world.holds_snapshots = false;
    begin_round(&mut world);
    world.machine.setup.parameters.release_every_cycles = 1;
    world.input(order(2, Action::Release));
    world.run(2_000);
    assert!(world.machine.restored_version() == Some(target) && world.machine.releasing.is_none());
    let outcomes = world.machine.status().outcomes;
    let release = outcomes.iter().find(|outcome| outcome.number == 2).unwrap();
    assert!(!release.done && release.text.contains("follows by itself"), "{release:?}");
    world.holds_merges = false;
    while let Some(merge) = world.held_merges.pop() {
        let merged = world.execute(merge).unwrap();
        world.input(merged);
    }
    world.run(1_000);
    assert_eq!(fragments_that_went_back(&world).len(), usize::from(P));
    let released = &world.machine.releasing.as_ref().unwrap().versions;
    let last = |fragment| world.tapes.values().rfind(|tape| tape.restores.is_some() && tape.fragment == fragment).unwrap();
    assert!((0..P).all(|fragment| released[usize::from(fragment)] > last(fragment).base_version), "{released:?}");
}
