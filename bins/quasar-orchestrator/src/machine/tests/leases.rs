//! Rows at the end of an epoch, and leases that nobody finishes.

use protocol::documents::{Lease, ReceiptOffer, RowRange};

use super::*;
use crate::machine::leases::LeasedSteps;

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
fn claims_take_rows_no_faster_than_steps_can_be() {
    let mut world = World::new(0, 4);
    world.run(10_000);
    let slot = world.learners[0].slot;
    let leased = |world: &World| -> u64 {
        let of_slot = world.leases.values().filter(|job| job.hotkey == slot.0);
        of_slot.flat_map(|job| &job.leases).map(|lease| u64::from(lease.steps)).sum()
    };
    let (before, from_ms) = (leased(&world), world.now_ms);
    // It says of each lease that it is used up, and hands in receipts of steps that it did not do.
    for _ in 0..100 {
        let newest = world.learners[0].lease_steps.last_key_value().map(|(id, steps)| (*id, *steps)).unwrap();
        let record = &mut world.learners[0].record;
        if newest.0 != record.lease {
            record.receipt = Some(ReceiptOffer { lease: record.lease, length: 100, sha256: Digest::ZERO, uploaded: false });
        }
        (record.lease, record.lease_step) = newest;
        world.run(100);
    }
    let steps = (world.now_ms - from_ms) / world.machine.timing.step_ms();
    let taken = leased(&world) - before;
    assert!(taken <= 16 * steps + 3 * 24, "{taken} steps of rows in the time of {steps} steps");
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
    // A segment may have begun in any of those just before.
    let just_before = ended.iter().rev().filter(|record| record.ended_t < (cycle - 2) * u64::from(P)).take(6);
    assert!(just_before.clone().count() > 0 && just_before.clone().all(|record| of_last.contains(&record.lease.id)));
}

#[test]
fn a_slow_learner_gets_smaller_batches_until_it_steps_at_the_pace_of_all_and_is_weighed_by_its_rows() {
    // Short leases are given out before a step of the one before was measured.
    for lease_steps in [8, 24] {
        a_slow_learner_keeps_pace(lease_steps);
    }
}

fn a_slow_learner_keeps_pace(lease_steps: u32) {
    let mut setup = setup(0);
    (setup.parameters.batch_rows, setup.parameters.lease_steps) = (32, lease_steps);
    let mut world = World::of(setup, 5);
    let slot = world.learners[4].slot;
    let newest = |world: &World, slot: Slot| {
        let record = world.machine.leases.values().rfind(|record| record.slot == slot).unwrap();
        record.lease.batch_rows
    };
    world.learners[4].step_ms = 4 * STEP_MS;
    world.run(120_000);
    for _ in 0..10 {
        world.run(2_000);
        assert!((6..=12).contains(&newest(&world, slot)), "{} rows of 32 in {lease_steps} steps", newest(&world, slot));
    }
    let (own_ms, all_ms) = (world.machine.learners[&slot].step.get().unwrap(), world.machine.timing.step_ms());
    assert!(own_ms * 100 <= all_ms * 125, "{own_ms} ms, {all_ms} ms");
    assert!(world.learners[..4].iter().all(|other| newest(&world, other.slot) == 32));
    let row_tokens = u64::from(world.machine.parameters().sequence_length);
    let inputs = world.tapes.values().rev().take(20).flat_map(|tape| &tape.inputs);
    let (of_it, of_others): (Vec<_>, Vec<_>) = inputs.partition(|input| (input.hotkey, input.slot) == slot);
    assert!(of_it.len() >= 15, "it answers pull after pull: {}", of_it.len());
    assert!(of_it.iter().all(|input| input.tokens <= u64::from(input.steps) * 12 * row_tokens));
    assert!(of_others.iter().all(|input| input.tokens == u64::from(input.steps) * 32 * row_tokens));
    // It has the machine to itself again.
    world.learners[4].step_ms = STEP_MS;
    world.run(120_000);
    assert_eq!(newest(&world, slot), 32);
}

#[test]
fn tokens_of_a_contribution_are_those_of_the_leases_that_it_was_trained_on() {
    let slot = (miner(1), 0);
    let record = |id, steps, batch_rows| {
        let lease = Lease { id, rows: Vec::new(), seed: Digest::ZERO, batch_rows, steps, schedule_start: 0, deadline_ms: 0 };
        (id, LeaseRecord::new(lease, slot, 0))
    };
    let leased = LeasedSteps::of(&BTreeMap::from([record(3, 10, 8), record(5, 10, 4), record(9, 10, 2)]));
    assert_eq!((leased.until(&slot, 9, 3), leased.until(&slot, 4, 3), leased.until(&(miner(2), 0), 9, 3)), (23, 10, 0));
    assert_eq!(leased.rows(&slot, 9, 3, 2), 4);
    assert_eq!(leased.rows(&slot, 9, 3, 14), 3 * 2 + 10 * 4 + 8);
    assert_eq!(leased.rows(&slot, 5, 10, 40), 10 * 4 + 10 * 8);
}
