//! Rows at the end of an epoch, and leases that nobody finishes.

use protocol::documents::RowRange;

use super::*;

const ROW_TOKENS: u64 = 128;

fn rows_of(job: &Job) -> u64 {
    job.leases.iter().flat_map(|lease| &lease.rows).map(RowRange::rows).sum()
}

#[test]
fn rows_that_fill_no_step_are_trained_too_and_then_the_next_epoch_begins() {
    let rows = 403;
    let mut world = World::of(RunSetup { shards: vec![shard("a", rows)], ..setup(0) }, 3);
    world.run(60_000);
    let odd: Vec<&Job> = world.leases.values().filter(|job| !rows_of(job).is_multiple_of(4)).collect();
    assert!(!odd.is_empty() && odd.iter().all(|job| u64::from(job.leases[0].steps) == rows_of(job).div_ceil(4)), "{odd:?}");
    let totals = world.machine.ledger.totals();
    assert!(totals.done_tokens >= 2 * rows * ROW_TOKENS, "two epochs are done: {totals:?}");
    assert_eq!(totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows, rows);
}

#[test]
fn a_learner_that_is_there_and_does_not_train_keeps_its_rows_until_the_deadline_only() {
    let mut setup = setup(0);
    setup.parameters.lease_steps = 2;
    let mut world = World::of(setup, 3);
    world.run(3_000);
    let slot = world.learners[0].slot;
    let first = world.machine.leases.iter().find(|(_, record)| record.slot == slot && !record.ended).map(|(id, _)| *id).unwrap();
    let deadline_ms = world.machine.leases[&first].lease.deadline_ms;
    // It goes on reporting, and takes no step.
    world.learners[0].next_step_ms = u64::MAX;
    let held = |world: &World| world.machine.leases.get(&first).is_some_and(|record| !record.ended);
    world.run(deadline_ms - world.now_ms - 1);
    assert!(held(&world), "they are its own until the deadline");
    world.run(20_000);
    assert!(!held(&world) && world.machine.learners[&slot].live);
    let newer = world.machine.leases.iter().any(|(id, record)| record.slot == slot && !record.ended && *id > first);
    assert!(newer, "it gets others in their place");
    assert!(world.machine.ledger.totals().leased_rows <= 3 * 3 * 2 * 4, "nothing piles up");
}

#[test]
fn the_leases_of_a_learner_that_uses_up_many_in_a_cycle_are_kept_until_its_audits_are_over() {
    let mut setup = setup(0);
    setup.parameters.lease_steps = 2;
    let mut world = World::of(setup, 3);
    let quick = world.learners[0].slot;
    world.learners[0].step_ms /= 8;
    world.run(20_000);
    let machine = &world.machine;
    let ended: Vec<&LeaseRecord> = machine.leases.values().filter(|record| record.slot == quick && record.ended).collect();
    let cycle = machine.next_t / u64::from(P);
    assert!(cycle > 4 && ended.len() > 20, "{} leases, cycle {cycle}", ended.len());
    assert!(ended[..ended.len() - 6].iter().all(|record| record.ended_t + 3 * u64::from(P) >= machine.next_t), "and no longer");
    let of_last = machine.leases_of(quick, cycle - 1);
    let needed = ended.iter().filter(|record| record.ended_t >= (cycle - 2) * u64::from(P)).count();
    assert!(of_last.len() >= needed && needed > 6, "{} of {needed}", of_last.len());
}
