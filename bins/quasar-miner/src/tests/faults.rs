//! Values that are not finite, refused grants, restarts.

use std::sync::atomic::Ordering;

use daemon::{Exit, Machine};
use protocol::Reason;
use protocol::documents::LearnerState;

use super::world::{REPLAY_STEPS, START_MS, STEP_MS, Store, World, lease};
use crate::machine::{End, Fault, Input, Trouble};

fn world() -> (tempfile::TempDir, World) {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::new(folder.path(), START_MS);
    world.job.leases = vec![lease(1, 400)];
    (folder, world)
}

fn train(world: &mut World, steps: u64) {
    for _ in 0..1_000 {
        if world.records.last().is_some_and(|record| record.local_step >= steps) {
            return;
        }
        world.run_for(STEP_MS);
    }
    panic!("no {steps} steps: {:?}", world.records.last());
}

#[test]
fn after_a_value_that_is_not_finite_the_learner_goes_back_says_so_and_goes_on() {
    let (_folder, mut world) = world();
    train(&mut world, 6);
    world.failures.store(1, Ordering::Relaxed);
    let faulted_at = world.boundaries.len();
    train(&mut world, 16);
    assert!(world.records.iter().any(|record| (record.state, record.reason) == (LearnerState::Faulted, Reason::TrainingFault)));
    assert_eq!((world.record().state, world.record().reason), (LearnerState::Training, Reason::None));
    let restore = world.boundaries[faulted_at..].iter().find(|boundary| boundary.restore.is_some()).unwrap();
    let step = restore.step.as_ref().unwrap();
    assert_eq!(restore.restore.unwrap() % REPLAY_STEPS, 0);
    assert_eq!(step.local_step % REPLAY_STEPS, 0, "a new segment begins");
    assert_eq!(restore.snapshot.as_ref().unwrap().local_step, step.local_step);
    let rows: Vec<u32> = world.boundaries.iter().filter_map(|boundary| boundary.step.as_ref()).map(|step| step.lease_step).collect();
    assert!(rows.windows(2).all(|pair| pair[0] < pair[1]), "no rows twice, the bad ones neither: {rows:?}");
}

#[test]
fn versions_received_since_the_snapshot_are_applied_again_after_going_back() {
    let (_folder, mut world) = world();
    train(&mut world, 5);
    world.publish(1, 1);
    // Within the segment that began at step 4: the snapshot still has version 0.
    while world.boundaries.last().unwrap().apply != [(1, 1)] {
        world.run_for(10);
    }
    world.failures.store(1, Ordering::Relaxed);
    let from = world.boundaries.len();
    let local_step = world.record().local_step;
    train(&mut world, local_step + 6);
    let restore = world.boundaries[from..].iter().find(|boundary| boundary.restore.is_some()).unwrap();
    if restore.snapshot.as_ref().is_some_and(|snapshot| restore.restore.unwrap() < snapshot.local_step) {
        assert!(world.record().fragments[1].version == 1 && restore.snapshot.as_ref().unwrap().versions[1] == 1);
    }
}

#[test]
fn no_pull_is_answered_from_a_segment_with_a_fault_in_it() {
    let (_folder, mut world) = world();
    train(&mut world, 6);
    world.failures.store(1, Ordering::Relaxed);
    world.run_for(2 * STEP_MS);
    world.open_pull(0);
    world.run_for(1_000);
    let order = world.boundaries.iter().flat_map(|boundary| &boundary.export).next().unwrap();
    let restored = world.boundaries.iter().find(|boundary| boundary.restore.is_some()).unwrap().step.as_ref().unwrap().local_step;
    assert!(order.start_step >= restored, "{order:?}");
}

#[test]
fn repeated_faults_take_every_fragment_anew() {
    let (_folder, mut world) = world();
    train(&mut world, 5);
    world.failures.store(3, Ordering::Relaxed);
    let from = world.boundaries.len();
    train(&mut world, 22);
    assert!(world.boundaries[from..].iter().any(|boundary| boundary.apply.len() == 3));
    assert_eq!(world.record().state, LearnerState::Training);
}

#[test]
fn a_device_without_memory_ends_the_learner_with_its_reason_in_the_record() {
    let (_folder, mut world) = world();
    train(&mut world, 2);
    let number = world.boundaries.last().unwrap().number;
    let what = "the GPU has too little memory: 4096 bytes are missing";
    world.handle(Input::Faulted { number, fault: Fault::OutOfMemory(what.into()) });
    world.run_for(200);
    assert_eq!((world.record().state, world.record().reason), (LearnerState::Faulted, Reason::OutOfMemory));
    assert_eq!((world.end(), world.machine.exit()), (Some(&End::OutOfMemory(what.into())), Some(Exit::Unavailable)));
}

#[test]
fn refused_grants_are_renewed_and_work_goes_on() {
    let (_folder, mut world) = world();
    train(&mut world, 2);
    world.open_pull(0);
    world.run_for(300);
    world.grant_uploads();
    world.store = Store::RefusesGrants;
    world.run_for(1_000);
    assert!(world.uploads.is_empty());
    world.store = Store::Works;
    world.run_for(3_000);
    assert_eq!(world.uploads, ["payload 0"]);
    assert_eq!(world.record().state, LearnerState::Training);
}

#[test]
fn without_grants_for_the_shards_training_waits() {
    let (_folder, mut world) = world();
    world.shards_granted = false;
    world.run_for(2_000);
    assert_eq!((world.record().local_step, world.record().state), (0, LearnerState::Ready));
    world.shards_granted = true;
    train(&mut world, 1);
}

#[test]
fn a_restart_goes_on_from_the_snapshot_in_a_new_session() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::new(folder.path(), START_MS);
    world.job.leases = vec![lease(1, 40)];
    train(&mut world, 9);
    world.plane.spool.flush().unwrap();
    let mut again = World::new(folder.path(), START_MS + 60_000);
    let elements = model::toy_plan(super::world::FRAGMENTS).total_elements() as usize;
    let state = std::fs::read(again.plane.spool.newest_state(elements).unwrap()).unwrap();
    assert!(model::TrainerState::from_bytes(&state, elements).unwrap().step >= 8, "moments and step count are kept");
    again.job.leases = vec![lease(2, 40)];
    train(&mut again, 3);
    let first = &again.boundaries[0];
    assert_eq!((first.apply.len(), again.record().session_epoch), (3, START_MS + 60_000));
    assert_eq!(again.boundaries.iter().find_map(|boundary| boundary.step.as_ref()).unwrap().local_step, 0);
}

#[test]
fn a_trainer_that_does_not_open_ends_the_learner() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::new(folder.path(), START_MS);
    world.run_for(30);
    world.handle(Input::TrainerOpened(Err(Fault::Broken("no such device".into()))));
    world.run_for(4_000);
    assert_eq!(world.end(), Some(&End::Broken("no such device".into())));
    assert_eq!(world.record().state, LearnerState::Faulted);
}

#[test]
fn a_full_disk_ends_the_learner_with_its_reason() {
    let (_folder, mut world) = world();
    train(&mut world, 1);
    world.publish(0, 1);
    world.handle(Input::KeyframeFetched { fragment: 0, version: 1, result: Err(Trouble::DiskFull) });
    world.run_for(200);
    assert_eq!((world.record().state, world.record().reason), (LearnerState::Faulted, Reason::DiskFull));
    assert_eq!((world.end(), world.machine.exit()), (Some(&End::DiskFull), Some(Exit::Unavailable)));
}
