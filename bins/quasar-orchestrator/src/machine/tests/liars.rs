//! What a registered miner gets out of records that say anything at all.

use protocol::documents::{Commitment, Pull};

use super::*;

/// A learner that takes no step and says what it likes.
fn idle(world: &mut World, index: usize) -> Slot {
    world.learners[index].next_step_ms = u64::MAX;
    world.learners[index].slot
}

/// It begins anew, and says that it has trained a step.
fn begin_anew(world: &mut World, index: usize) {
    let sim = &mut world.learners[index];
    sim.record.session_epoch += 1;
    (sim.record.state, sim.record.local_step) = (LearnerState::Training, 1);
    sim.lease_steps.clear();
}

/// Answers all open pulls with the whole of the newest lease, each always with the same payload.
fn commit_to_all(world: &mut World, index: usize) {
    let pulls = world.head.as_ref().map(|head| head.pulls.clone()).unwrap_or_default();
    let sim = &mut world.learners[index];
    let Some((lease, steps)) = sim.lease_steps.last_key_value().map(|(id, steps)| (*id, *steps)) else { return };
    let commitment = |pull: &Pull| Commitment {
        t: pull.t,
        fragment: pull.fragment,
        base_version: pull.version,
        length: 1_000,
        sha256: Digest::ZERO,
        blake3: Digest::blake3(&[99, pull.t as u8]),
        steps: 1,
        tokens: 0,
        lease,
        lease_step: steps,
        local_step: 1,
        start_step: 0,
        start_digest: Digest::ZERO,
        step_chain: Digest::ZERO,
    };
    sim.record.commitments = pulls.iter().map(commitment).collect();
    (sim.record.lease, sim.record.lease_step) = (lease, steps);
}

#[test]
fn commitments_prove_no_more_steps_than_the_time_allows_over_any_number_of_sessions() {
    let mut world = World::new(0, 4);
    world.run(5_000);
    let slot = idle(&mut world, 0);
    world.withheld.insert(slot);
    let booked = |world: &World| -> u64 {
        let of_slot = world.leases.values().filter(|job| job.hotkey == slot.0).flat_map(|job| &job.leases);
        of_slot.filter_map(|lease| Some(world.lease_ends.get(&lease.id)?.done_steps(lease.steps).count() as u64)).sum()
    };
    let (before, from_ms) = (booked(&world), world.now_ms);
    for _ in 0..100 {
        begin_anew(&mut world, 0);
        world.run(100);
        commit_to_all(&mut world, 0);
        world.run(100);
    }
    let steps = (world.now_ms - from_ms) / world.machine.timing.step_ms();
    let done = booked(&world) - before;
    assert!(done <= 16 * steps + 24, "{done} steps are booked as done in the time of {steps}");
    // A record that commits to several steps is an entry for each.
    let entries = logged(&world).into_iter().filter(|entry| entry.kind == LogKind::Commitment).count();
    assert!(entries <= world.commitments.len(), "{entries} entries of {} commitments", world.commitments.len());
}

#[test]
fn an_upload_is_checked_once_however_often_its_learner_begins_anew() {
    for reason in [Reason::None, Reason::Malformed] {
        let mut world = World::new(0, 4);
        world.run(5_000);
        let slot = idle(&mut world, 0);
        world.rejects.insert(slot, reason);
        // A pull that stays open: the others answer no more.
        world.learners[1..].iter_mut().for_each(|sim| sim.mute = true);
        world.run(2_000);
        world.record = Some(Vec::new());
        for _ in 0..20 {
            begin_anew(&mut world, 0);
            world.run(100);
            commit_to_all(&mut world, 0);
            world.run(100);
            let uploaded = world.learners[0].record.commitments.iter().map(|commitment| commitment.t).collect();
            world.learners[0].record.uploaded = uploaded;
            world.run(100);
        }
        let mut checked: BTreeMap<u64, usize> = BTreeMap::new();
        for (_, input) in world.record.iter().flatten() {
            if let Input::PayloadChecked { slot: of, t, .. } = input
                && *of == slot
            {
                *checked.entry(*t).or_default() += 1;
            }
        }
        assert!(checked.values().all(|times| *times == 1), "{reason:?}: {checked:?}");
    }
}

#[test]
fn uploads_of_sessions_that_are_over_hold_up_no_pull() {
    let mut world = World::new(0, 4);
    world.run(10_000);
    let slot = world.learners[0].slot;
    world.withheld.insert(slot);
    let t = world.run_until(|world| world.answered(slot));
    // It is large, and takes long to fetch.
    world.unchecked.insert(slot);
    world.learners[0].record.session_epoch += 1;
    world.run(3_000);
    assert!(world.tapes.contains_key(&t) && !world.is_merged(t, slot));
}

#[test]
fn who_commits_to_nothing_of_use_is_soon_not_waited_for_and_beginning_anew_does_not_change_that() {
    let merges = |liars: usize| {
        let mut world = World::new(0, 3 + liars as u8);
        for index in 3..3 + liars {
            // Commitments to no steps at all are refused.
            world.learners[index].claims = 0;
        }
        world.run(10_000);
        let before = world.merges.len();
        for _ in 0..60 {
            for index in 3..3 + liars {
                world.learners[index].record.session_epoch += 1;
            }
            world.run(1_000);
        }
        world.merges.len() - before
    };
    let (alone, beset) = (merges(0), merges(5));
    assert!(beset * 10 >= alone * 9, "{beset} merges beside five who commit to nothing, {alone} without them");
}

#[test]
fn a_hotkey_has_one_vote_on_the_pace_and_no_vote_goes_far_beyond_the_target() {
    let mut world = World::new(0, 4);
    // The third hotkey runs two learners, ten times slower than all others.
    world.learners[3].slot = (miner(3), 1);
    world.learners[3].record.slot = 1;
    for index in [2, 3] {
        world.learners[index].step_ms = 10 * STEP_MS;
    }
    world.run(60_000);
    assert!(world.machine.timing.step_ms() < 2 * STEP_MS, "{} ms", world.machine.timing.step_ms());

    let mut setup = setup(0);
    setup.parameters.step_target_ms = 200;
    let mut world = World::of(setup, 3);
    world.learners.iter_mut().for_each(|sim| sim.step_ms = 4_000);
    world.run(60_000);
    assert_eq!(world.machine.timing.step_ms(), 8 * 200);
}

#[test]
fn leases_are_given_no_faster_than_they_can_be_used_up_over_any_number_of_sessions() {
    let mut world = World::new(0, 4);
    world.run(5_000);
    let slot = idle(&mut world, 0);
    let given = |world: &World| world.leases.values().filter(|job| job.hotkey == slot.0).count() as u64;
    let (before, from_ms) = (given(&world), world.now_ms);
    for _ in 0..100 {
        begin_anew(&mut world, 0);
        world.run(100);
    }
    // A lease counts as half of a whole one at least: twelve steps, at a sixteenth of what a step of all takes.
    let fastest_ms = 12 * (world.machine.timing.step_ms() / 16);
    let most = 4 + (world.now_ms - from_ms) / fastest_ms;
    let leases = given(&world) - before;
    assert!(leases > 4 && leases <= most, "{leases} leases, at most {most}");
    let held = world.machine.leases.values().filter(|record| record.slot == slot && !record.ended).count();
    assert!(held <= 2, "{held}");
}
