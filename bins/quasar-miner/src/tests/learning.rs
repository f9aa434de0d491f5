//! Joining, training, pulls, leases, the end of a run.

use daemon::{Exit, Machine};
use protocol::Digest;
use protocol::documents::{LearnerState, RunState};
use protocol::steps::Exchange;

use super::world::{POLL_MS, SLOT, START_MS, STEP_MS, Store, US, World, lease, parameters};
use crate::machine::{End, Input};

fn world() -> (tempfile::TempDir, World) {
    let folder = tempfile::tempdir().unwrap();
    let world = World::new(folder.path(), START_MS);
    (folder, world)
}

/// What is exchanged before the first step of a session.
fn first_versions() -> [Exchange; 3] {
    [0, 1, 2].map(|fragment| Exchange::Applied { fragment, version: 0 })
}

/// Runs until the learner has done `steps` steps of its session.
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
fn a_learner_joins_takes_every_fragment_and_trains_its_lease() {
    let (_folder, mut world) = world();
    train(&mut world, 3);
    let states: Vec<LearnerState> = world.records.iter().map(|record| record.state).collect();
    assert_eq!(states[0], LearnerState::Fetching);
    assert_eq!(*states.last().unwrap(), LearnerState::Training);
    let first = &world.boundaries[0];
    assert_eq!(first.apply, [(0, 0), (1, 0), (2, 0)]);
    assert!(first.export.is_empty());
    let step = world.boundaries.iter().find_map(|boundary| boundary.step.as_ref()).unwrap();
    assert_eq!((step.local_step, step.lease, step.lease_step), (0, 1, 0));
    assert_eq!(step.exchanged, first_versions(), "what was applied before the first step belongs to it");
    assert_eq!(step.lr, parameters().inner.lr(100));
    let record = world.record();
    assert_eq!((record.session_epoch, record.lease, record.worker.as_str()), (START_MS, 1, "w"));
    assert!(record.fragments.iter().all(|fragment| u64::from(fragment.steps) == record.local_step));
    assert_ne!(record.step_chain, Digest::ZERO);
}

#[test]
fn a_pull_is_committed_first_uploaded_on_its_grant_and_forgotten_when_closed() {
    let (_folder, mut world) = world();
    train(&mut world, 2);
    world.open_pull(0);
    world.run_for(500);
    let commitment = world.record().commitments[0].clone();
    assert_eq!((commitment.t, commitment.fragment, commitment.base_version), (0, 0, 0));
    assert_eq!(commitment.start_step, (commitment.local_step - 1) / 4 * 4);
    assert!(commitment.steps >= 2 && commitment.tokens == u64::from(commitment.steps) * 16);
    assert_eq!(u64::from(commitment.lease_step), commitment.local_step);
    assert!(world.uploads.is_empty(), "no grant, no upload");
    world.payload_grants = vec![(0, Digest::blake3(b"a payload of an earlier session"))];
    world.run_for(500);
    assert!(world.uploads.is_empty(), "a grant for other bytes is none");
    world.grant_uploads();
    world.run_for(500);
    let payloads: Vec<&String> = world.uploads.iter().filter(|upload| upload.starts_with("payload")).collect();
    assert_eq!((payloads, world.record().uploaded.as_slice()), (vec![&"payload 0".to_owned()], [0].as_slice()));
    world.head.pulls.clear();
    world.run_for(500);
    assert_eq!((world.record().commitments.len(), world.record().uploaded.len(), world.dropped.as_slice()), (0, 0, [0].as_slice()));
}

#[test]
fn newer_versions_are_applied_before_pulls_are_answered() {
    let (_folder, mut world) = world();
    train(&mut world, 3);
    world.open_pull(0);
    world.open_pull(1);
    world.publish(0, 1);
    world.run_for(600);
    let answered = world.boundaries.iter().position(|boundary| boundary.export.iter().any(|order| order.t == 1)).unwrap();
    let applied = world.boundaries.iter().position(|boundary| boundary.apply == [(0, 1)]).unwrap();
    assert!(applied >= answered, "fragment 1 did not wait for fragment 0");
    for boundary in &world.boundaries {
        let clash = boundary.export.iter().any(|order| boundary.apply.iter().any(|(fragment, _)| *fragment == order.fragment));
        assert!(!clash, "a fragment that was just overwritten has nothing to answer with");
    }
    let record = world.record();
    assert_eq!(record.fragments[0].version, 1);
    assert!(record.fragments[0].steps < record.fragments[1].steps);
}

#[test]
fn a_base_one_version_behind_the_pull_answers_it_and_an_older_one_does_not() {
    let (_folder, mut world) = world();
    train(&mut world, 2);
    // The learner cannot get versions 1 of fragments 0 and 2 of fragment 1: its grants for them are refused.
    world.store = Store::RefusesGrants;
    world.publish(0, 1);
    world.publish(1, 2);
    world.open_pull(3);
    world.open_pull(4);
    world.run_for(250);
    let exports: Vec<(u64, u64)> =
        world.boundaries.iter().flat_map(|boundary| &boundary.export).map(|order| (order.t, order.base_version)).collect();
    assert_eq!(exports, [(3, 0)]);
}

#[test]
fn a_used_up_lease_is_receipted_with_what_the_commitments_were_bound_to() {
    let (_folder, mut world) = world();
    world.job.leases = vec![lease(1, 16), lease(2, 16)];
    train(&mut world, 2);
    world.open_pull(0);
    train(&mut world, 9);
    let commitment = world.record().commitments[0].clone();
    world.open_pull(1);
    train(&mut world, 18);
    let receipt = world.receipts[&1].clone();
    let committed: Vec<(u64, Digest)> =
        world.record().commitments.iter().map(|commitment| (commitment.local_step, commitment.step_chain)).collect();
    assert!(committed.contains(&(commitment.local_step, commitment.step_chain)));
    receipt.check(&US, SLOT, &lease(1, 16), &committed).unwrap();
    assert_eq!((receipt.session_epoch, receipt.chain, receipt.steps.len()), (START_MS, Digest::ZERO, 16));
    assert_eq!(receipt.steps[0].exchanged, first_versions());
    assert!(receipt.steps.iter().all(|step| step.state.is_some() == (step.local_step % 4 == 0)));

    world.run_for(500);
    let offer = world.record().receipt.unwrap();
    assert!(offer.lease == 1 && !offer.uploaded);
    world.grant_uploads();
    world.run_for(1_500);
    assert!(world.uploads.contains(&"receipt 1".to_owned()) && world.record().receipt.unwrap().uploaded);
    world.job.leases.remove(0);
    world.run_for(2_000);
    assert_ne!(world.record().receipt.map(|offer| offer.lease), Some(1), "the orchestrator has it");
}

#[test]
fn a_lease_ends_and_the_next_one_begins_where_its_schedule_says() {
    let (_folder, mut world) = world();
    world.job.leases = vec![lease(1, 3), lease(2, 3)];
    train(&mut world, 6);
    let steps: Vec<(u64, u32, f64)> =
        world.boundaries.iter().filter_map(|boundary| boundary.step.as_ref()).map(|step| (step.lease, step.lease_step, step.lr)).collect();
    let lr = |index| parameters().inner.lr(index);
    assert_eq!(steps[..6], [(1, 0, lr(100)), (1, 1, lr(101)), (1, 2, lr(102)), (2, 0, lr(200)), (2, 1, lr(201)), (2, 2, lr(202))]);
    assert!(world.plane.tokens.get(1).is_none());
    world.run_for(1_000);
    assert_eq!((world.record().state, world.record().local_step), (LearnerState::Ready, 6));
    assert_eq!((world.record().lease, world.record().lease_step), (2, 3));
    world.job.leases = vec![lease(3, 2)];
    train(&mut world, 8);
}

#[test]
fn a_lease_that_ends_in_the_middle_of_a_step_keeps_its_rows_until_the_step_is_done() {
    let (_folder, mut world) = world();
    train(&mut world, 2);
    world.job.leases = vec![lease(7, 6)];
    train(&mut world, 6);
    assert!(world.plane.tokens.get(1).is_none());
    assert_eq!(world.record().lease, 7);
}

#[test]
fn open_pulls_are_answered_while_no_lease_is_there() {
    let (_folder, mut world) = world();
    world.job.leases = vec![lease(1, 3)];
    train(&mut world, 3);
    world.open_pull(2);
    world.run_for(500);
    let commitment = &world.record().commitments[0];
    assert_eq!((commitment.lease, commitment.lease_step, commitment.local_step), (1, 3, 3));
}

#[test]
fn a_newer_session_fences_the_older_one_wherever_it_is_seen() {
    for place in 0..2 {
        let (_folder, mut world) = world();
        train(&mut world, 1);
        let records = world.records.len();
        match place {
            0 => world.job.session_epoch += 1,
            _ => world.echo = Some(START_MS + 1),
        }
        world.run_for(3_000);
        assert_eq!(world.end(), Some(&End::Fenced { newer: START_MS + 1 }));
        assert_eq!(world.machine.exit(), Some(Exit::Configuration));
        assert!(world.records.len() - records < 30, "the record belongs to the newer session");
    }
}

#[test]
fn a_job_of_an_earlier_session_is_not_trained() {
    let (_folder, mut world) = world();
    world.job.session_epoch = START_MS - 5;
    world.run_for(3_000);
    assert_eq!((world.record().local_step, world.record().state), (0, LearnerState::Ready));
}

#[test]
fn the_record_is_renewed_while_nothing_happens_and_not_more_often_than_polls() {
    let (_folder, mut world) = world();
    world.job.leases.clear();
    world.run_for(2_000);
    let before = world.records.len();
    world.run_for(20_000);
    let renewed = world.records.len() - before;
    assert!((9..=11).contains(&renewed), "{renewed} in ten fifths of the time to live");
    world.job.leases = vec![lease(1, 200)];
    let before = world.records.len();
    world.run_for(5_000);
    assert!(world.records.len() - before <= (5_000 / POLL_MS) as usize + 1);
}

#[test]
fn after_the_end_of_a_run_nothing_is_trained_and_the_next_run_is_waited_for() {
    let (_folder, mut world) = world();
    train(&mut world, 2);
    world.head.state = RunState::Complete;
    world.run_for(500);
    let steps = world.record().local_step;
    world.run_for(5_000);
    assert_eq!((world.record().local_step, world.record().state), (steps, LearnerState::Ready));
    assert_eq!(world.end(), None);
    world.moved = true;
    world.run_for(5_000);
    assert_eq!(world.end(), Some(&End::NextRun));
}

#[test]
fn a_stop_writes_a_last_record_and_ends_even_if_the_store_hangs() {
    let (_folder, mut world) = world();
    train(&mut world, 2);
    world.handle(Input::Stop);
    world.run_for(100);
    assert_eq!((world.record().state, world.end()), (LearnerState::Draining, Some(&End::Stopped)));

    let (_folder, mut world) = self::world();
    train(&mut world, 2);
    world.store = Store::Hangs;
    world.handle(Input::Stop);
    world.run_for(4_000);
    assert_eq!((world.end(), world.machine.exit()), (Some(&End::Stopped), Some(Exit::Done)));
}

#[test]
fn a_learner_that_shall_do_one_lease_stops_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::new(folder.path(), START_MS);
    world.limit_leases(1);
    world.job.leases = vec![lease(1, 2), lease(2, 2)];
    world.run_for(3_000);
    assert_eq!((world.end(), world.record().local_step), (Some(&End::LeasesDone), 2));
}

#[test]
fn an_unregistered_hotkey_is_told_so_and_given_up_after_ten_minutes() {
    let (_folder, mut world) = world();
    world.echo = None;
    world.registered = Some(false);
    assert!(world.machine.unready().unwrap().contains("granted"));
    world.run_for(599_000);
    assert_eq!(world.end(), None);
    assert!(world.machine.unready().unwrap().contains("not registered"));
    world.run_for(70_000);
    assert_eq!((world.end(), world.machine.exit()), (Some(&End::Unregistered), Some(Exit::TryLater)));
    assert!(world.records.is_empty());
}

#[test]
fn a_registered_hotkey_waits_for_its_grants_as_long_as_it_takes() {
    let (_folder, mut world) = world();
    world.echo = None;
    world.run_for(700_000);
    assert_eq!(world.end(), None);
    world.registered = None;
    world.run_for(700_000);
    assert_eq!(world.end(), None, "a silent chain is no reason to give up");
    world.echo = Some(START_MS);
    world.job.leases[0].deadline_ms = u64::MAX;
    train(&mut world, 1);
    assert_eq!(world.machine.unready(), None);
}
