//! The machine against a small world ([`world`]) on virtual time.

use protocol::documents::{Action, Job, LearnerState, Order, RunState, Tape};
use protocol::ledger::RowState;
use protocol::log::{Frontier, LogEntry, LogHead, LogKind, LogRef};
use protocol::{Reason, codec};

use super::*;

mod audits;
mod catalog;
mod leases;
mod liars;
mod operator;
mod pulls;
mod recovery;
mod rollback;
mod world;

use world::*;

fn order(number: u64, action: Action) -> Input {
    let order = Ok(Order { number, action, reason: "for the test".into() });
    Input::Order { order: StoredOrder { number, order } }
}

#[test]
fn every_fragment_is_merged_as_often_as_the_run_says_and_the_end_is_released_once() {
    let mut world = World::new(3, 3);
    world.until_complete(120_000);
    assert_eq!(world.machine.fragment_versions(), vec![4; usize::from(P)], "three cycles and the closing round");
    let closing: Vec<u16> = world.merges.values().filter(|merge| merge.closing).map(|merge| merge.fragment).collect();
    assert_eq!(closing.iter().collect::<BTreeSet<_>>().len(), usize::from(P), "{closing:?}");
    assert_eq!((closing.len(), world.released), (usize::from(P), 1));
    let tokens: u64 = world.merges.values().flat_map(|merge| merge.accepted().map(|c| c.tokens)).sum();
    assert!(tokens > 0);
}

#[test]
fn all_learners_that_answer_in_time_are_in_the_merge() {
    let mut world = World::new(6, 5);
    world.until_complete(240_000);
    let contributors: Vec<usize> = world.merges.values().map(|merge| merge.accepted().count()).collect();
    let mean = contributors.iter().sum::<usize>() as f64 / contributors.len() as f64;
    assert!(mean > 4.0, "mean {mean} of 5: {contributors:?}");
}

#[test]
fn a_crash_after_any_input_loses_no_merge_and_makes_none_twice() {
    let mut reference = World::new(1, 2);
    reference.until_complete(60_000);
    for crash_after in 1..=reference.inputs {
        let mut world = World::new(1, 2);
        world.crash_after = Some(crash_after + 2);
        world.until_complete(60_000);
        assert_eq!(world.machine.fragment_versions(), vec![2; usize::from(P)], "crash after {crash_after}");
        for (t, tape) in &world.tapes {
            assert_eq!(world.merges[t].base_version, tape.base_version);
        }
        let mut versions: Vec<(u16, u64)> =
            world.merges.values().filter(|merge| merge.version > merge.base_version).map(|merge| (merge.fragment, merge.version)).collect();
        let count = versions.len();
        versions.sort_unstable();
        versions.dedup();
        assert_eq!(versions.len(), count, "crash after {crash_after}: a version was made twice");
    }
}

#[test]
fn a_silent_learner_delays_no_merge_and_its_rows_return() {
    let mut world = World::new(0, 3);
    world.run(10_000);
    let before = world.merges.len();
    world.learners[2].silent = true;
    world.run(20_000);
    assert!(world.merges.len() > before + 10, "{} merges before, {} after", before, world.merges.len());
    let leased = world.machine.ledger.totals().leased_rows;
    assert!(leased <= 2 * 2 * 24 * 4, "{leased} rows are leased to two learners");
    let totals = world.machine.ledger.totals();
    assert_eq!(totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows, 10_000);
}

#[test]
fn a_learner_that_ran_out_of_memory_hands_its_job_back_at_once() {
    let mut world = World::new(0, 2);
    world.run(3_000);
    let slot = world.learners[0].slot;
    assert!(!world.machine.learners[&slot].leases.is_empty());
    let leased = world.machine.ledger.totals().leased_rows;
    let mut last = world.learners[0].record.clone();
    (last.state, last.reason) = (LearnerState::Faulted, Reason::OutOfMemory);
    world.input(Input::Progress { slot, id: Digest::blake3(b"last"), is_current: true, record: Box::new(last) });
    let learner = &world.machine.learners[&slot];
    assert!(!learner.live && learner.leases.is_empty());
    assert!(world.machine.ledger.totals().leased_rows < leased, "its rows wait for another learner");
}

#[test]
fn a_newer_session_takes_the_slot_and_the_older_one_is_not_heard_any_more() {
    let mut world = World::new(0, 2);
    world.run(3_000);
    let old = world.learners[0].record.clone();
    let slot = world.learners[0].slot;
    world.learners[0] = Sim::new(1, 600, STEP_MS);
    world.run(3_000);
    assert_eq!(world.machine.learners[&slot].session_epoch, 600);
    world.input(Input::Progress { slot, id: Digest::ZERO, is_current: true, record: Box::new(old) });
    assert_eq!(world.machine.learners[&slot].session_epoch, 600);
    assert!(world.learners[0].record.local_step > 0);
}

#[test]
fn a_refused_upload_is_named_in_the_manifest_and_does_not_move_the_merge() {
    let mut world = World::new(1, 3);
    let slot = world.learners[0].slot;
    world.rejects.insert(slot, Reason::NotFinite);
    world.until_complete(60_000);
    let outcomes: Vec<Reason> =
        world.merges.values().flat_map(|merge| &merge.contributions).filter(|c| (c.hotkey, c.slot) == slot).map(|c| c.outcome).collect();
    assert!(!outcomes.is_empty() && outcomes.iter().all(|outcome| *outcome == Reason::NotFinite), "{outcomes:?}");
    assert_eq!(world.machine.learners[&slot].contributions, 0);
}

#[test]
fn a_second_answer_to_a_pull_is_refused_where_the_first_is_in_evidence() {
    let mut world = World::new(1, 3);
    let slot = world.learners[0].slot;
    world.answered_before.insert(slot);
    world.until_complete(60_000);
    let of_slot =
        |manifest: &MergeManifest| manifest.contributions.iter().find(|one| (one.hotkey, one.slot) == slot).map(|one| one.outcome);
    let outcomes: Vec<Reason> = world.merges.values().filter_map(of_slot).collect();
    assert!(!outcomes.is_empty() && outcomes.iter().all(|outcome| *outcome == Reason::RepeatedCommitment), "{outcomes:?}");
}

#[test]
fn a_machine_that_a_replay_has_left_asks_again_for_all_that_its_last_process_had_asked_for() {
    let mut world = World::new(0, 2);
    world.run(3_000);
    // The last process died while it published a head.
    world.machine.head_dirty = true;
    world.machine.handle(world.now_ms, Input::Tick);
    while world.machine.poll_effect().is_some() {}
    world.machine.handle(world.now_ms, Input::Claimed { epoch: 2 });
    let effects: Vec<Effect> = std::iter::from_fn(|| world.machine.poll_effect()).collect();
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Watch { live, .. } if live.len() == 2)), "{effects:?}");
    assert!(effects.iter().any(|effect| matches!(effect, Effect::PublishHead { .. })), "{effects:?}");
    assert!(effects.iter().any(|effect| matches!(effect, Effect::PublishCurrent)), "{effects:?}");
}

#[test]
fn inputs_after_a_snapshot_give_the_machine_that_saw_all_of_them() {
    let encode = |machine: &Orchestrator| bincode::serde::encode_to_vec(machine, bincode::config::standard()).unwrap();
    let mut world = World::new(0, 2);
    world.run(2_900);
    let snapshot = encode(&world.machine);
    let mut replayed: Orchestrator = bincode::serde::decode_from_slice(&snapshot, bincode::config::standard()).unwrap().0;
    // Entries of the log wait for their turn, which depends on when the last ones were published.
    for step in 0..30 {
        let now_ms = world.now_ms + step * 100;
        for machine in [&mut world.machine, &mut replayed] {
            machine.log.add(LogKind::Receipt, Digest::blake3(&now_ms.to_le_bytes()));
            machine.handle(now_ms, if step % 7 == 6 { Input::LogPublished } else { Input::Tick });
            while machine.poll_effect().is_some() {}
        }
        assert!(encode(&world.machine) == encode(&replayed), "different after {step} inputs");
    }
}

#[test]
fn each_merged_learner_cycle_is_audited_once_and_opened() {
    let mut world = World::new(3, 3);
    world.until_complete(120_000);
    world.run(40_000);
    assert_eq!(world.orders.len(), 12, "three learners, three cycles and the closing round");
    assert!(world.orders.iter().all(|(_, parts)| *parts == 3));
    assert_eq!(world.machine.status().audits_open, 0);
}

#[test]
fn an_invariant_that_does_not_hold_is_named() {
    let broken = |change: fn(&mut Orchestrator)| {
        let mut world = World::new(0, 3);
        // Accepted offers wait for the others.
        world.withheld = BTreeSet::from([world.learners[0].slot]);
        while !world.machine.pulls.values().any(|pull| pull.counts().0 > 0) {
            world.run(100);
        }
        assert_eq!(world.machine.check_invariants(), Ok(()));
        change(&mut world.machine);
        world.machine.check_invariants().unwrap_err().0
    };
    assert_eq!(broken(|machine| drop(machine.ledger.lease(u64::MAX, 1, 1))), "rows_once");
    assert_eq!(broken(|machine| machine.next_t = 0), "merged_once");
    assert_eq!(broken(|machine| drop(machine.banned.insert(miner(2), "for the test".into()))), "banned_is_left_out");
    let forget = |machine: &mut Orchestrator| machine.pulls.values_mut().for_each(|pull| drop(std::mem::take(&mut pull.offers)));
    assert_eq!(broken(forget), "accepted_is_merged");
    let double = |machine: &mut Orchestrator| {
        let (t, pull) = machine.pulls.iter().map(|(t, pull)| (*t, pull.clone())).next_back().unwrap();
        machine.pulls.insert(t + 1, pull);
    };
    assert_eq!(broken(double), "one_pull_per_fragment");
}

#[test]
fn who_left_the_subnet_is_forgotten_and_counts_again_when_it_comes_back() {
    let mut world = World::new(0, 3);
    world.run(5_000);
    let slot = world.learners[0].slot;
    let all = world.guests.clone();
    let rest = all.iter().filter(|guest| guest.hotkey != slot.0).cloned().collect::<Vec<_>>();
    world.input(Input::Metagraph { guests: rest.clone() });
    world.run(10_000);
    world.input(Input::Metagraph { guests: rest });
    assert!(!world.machine.learners.contains_key(&slot) && !world.machine.standing.contains_key(&slot));
    assert!(world.machine.leases.values().all(|record| record.slot != slot || record.ended), "its rows came back");
    world.input(Input::Metagraph { guests: all });
    let from = world.machine.next_t;
    world.learners[0].record.session_epoch += 1;
    world.run(20_000);
    assert!(world.tapes.range(from..).any(|(_, tape)| tape.inputs.iter().any(|input| input.hotkey == slot.0)));
}

#[test]
fn a_miner_that_does_not_open_gets_an_order_without_opening() {
    let mut world = World::new(1, 2);
    let slot = world.learners[0].slot;
    world.opens_nothing = Some(slot);
    world.until_complete(60_000);
    world.learners[0].silent = true;
    world.run(60_000);
    let parts: Vec<usize> = world.orders.iter().filter(|(selection, _)| selection.hotkey == slot.0).map(|(_, parts)| *parts).collect();
    assert_eq!(parts, [0, 0], "of the cycle and of the closing round");
}

#[test]
fn every_outer_step_has_a_manifest_also_where_a_fragment_is_passed_over() {
    let mut world = World::new(3, 2);
    world.run(4_000);
    // Nobody answers for longer than a pull's deadline: at least one merge stays empty and is made up for later.
    for sim in &mut world.learners {
        sim.silent = true;
    }
    world.run(20_000);
    for sim in &mut world.learners {
        sim.silent = false;
    }
    world.until_complete(240_000);
    assert!(world.merges.values().any(|merge| merge.version == merge.base_version), "no merge was empty");
    let steps: Vec<u64> = world.merges.keys().copied().collect();
    assert_eq!(steps, (0..world.machine.closed_below).collect::<Vec<_>>());
}

/// Checks every log head against the one before, and gives the entries in order.
fn logged(world: &World) -> Vec<LogEntry> {
    let mut frontier = Frontier::default();
    let mut entries = Vec::new();
    for head in world.log.values() {
        head.extends(&frontier).unwrap();
        frontier = head.frontier.clone();
        entries.extend(head.entries.iter().copied());
    }
    assert_eq!(world.head.as_ref().unwrap().log, LogRef::from(&frontier));
    entries
}

#[test]
fn everything_that_decides_about_merges_and_pay_is_in_the_log_once() {
    let mut world = World::new(3, 3);
    world.until_complete(120_000);
    world.run(60_000);
    let entries = logged(&world);
    let of = |kind: LogKind| entries.iter().filter(|entry| entry.kind == kind).map(|entry| entry.document).collect::<Vec<_>>();
    let merges: BTreeSet<Digest> = world.merges.values().map(|merge| Digest::blake3(&codec::encode(merge))).collect();
    assert_eq!(of(LogKind::Merge).into_iter().collect::<BTreeSet<_>>(), merges);
    let commitments = of(LogKind::Commitment);
    let merged = world.merges.values().flat_map(|merge| merge.accepted().map(|one| one.commitment)).collect::<Vec<_>>();
    assert!(merged.iter().all(|commitment| commitments.contains(commitment)));
    assert_eq!((of(LogKind::Verdict).len(), of(LogKind::Release).len()), (12, 1));
    assert!(!of(LogKind::Receipt).is_empty());
    assert_eq!(world.machine.status().verdicts.pass, 12);
    let unique: BTreeSet<(LogKind, Digest)> = entries.iter().map(|entry| (entry.kind, entry.document)).collect();
    let others = |entry: &&LogEntry| entry.kind != LogKind::Commitment;
    assert_eq!(unique.iter().filter(|(kind, _)| *kind != LogKind::Commitment).count(), entries.iter().filter(others).count());
}

#[test]
fn a_finished_lease_counts_by_its_receipt_and_without_one_by_its_commitments() {
    let mut world = World::new(0, 3);
    let (refused, partial) = (world.learners[0].slot, world.learners[1].slot);
    world.receipts.insert(refused, Err(Reason::ReceiptMismatch));
    world.receipts.insert(partial, Ok((Digest::ZERO, vec![0, 1, 5])));
    world.learners[2].hands_in_receipts = false;
    world.run(40_000);
    let ended: Vec<&LeaseRecord> = world.machine.leases.values().filter(|record| record.ended).collect();
    assert!([refused, partial].iter().all(|slot| ended.iter().any(|record| record.slot == *slot)));
    for record in ended {
        let shard = |step: u32| protocol::lease::LeaseRows::of(&record.lease).step(step)[0].row;
        let state = |step: u32| world.machine.ledger.row("a", shard(step)).unwrap();
        if record.slot == partial {
            assert!(matches!(&record.receipt, ReceiptStage::Settled { trained, .. } if *trained == [0, 1, 5]));
            assert_eq!([0, 1, 5, 2, 23].map(state), [RowState::Done, RowState::Done, RowState::Done, RowState::Lost, RowState::Lost]);
        } else {
            let expected = |step: u32| if step < record.evidence { RowState::Done } else { RowState::Lost };
            assert!((0..record.reported).all(|step| state(step) == expected(step)), "{record:?}");
        }
    }
    let totals = world.machine.ledger.totals();
    assert_eq!(totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows, 10_000);
}

#[test]
fn what_learners_trained_is_in_the_last_release_also_where_their_rows_run_out_in_the_closing_round() {
    let mut world = World::new(0, 3);
    world.run(10_000);
    world.input(order(1, Action::Drain));
    world.learners.iter_mut().for_each(|learner| learner.is_used_up = true);
    world.until_complete(60_000);
    let closing: Vec<&MergeManifest> = world.merges.values().filter(|merge| merge.closing).collect();
    let answers: Vec<usize> = closing.iter().map(|merge| merge.accepted().count()).collect();
    assert!(answers.len() == usize::from(P) && answers.iter().filter(|count| **count == 3).count() >= 2, "{answers:?}");
    // Nobody had trained since the version before on what nobody answered for.
    let left =
        |merge: &&MergeManifest| world.learners.iter().any(|learner| learner.record.fragments[usize::from(merge.fragment)].steps > 0);
    assert!(!closing.iter().filter(|merge| merge.accepted().count() == 0).any(left), "{answers:?}");
    assert_eq!(world.released, 1);
}

#[test]
fn draining_stops_leases_and_pulls_and_releases() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    let opened = world.machine.next_t;
    world.input(order(1, Action::Drain));
    world.until_complete(30_000);
    assert_eq!(world.machine.next_t, opened + u64::from(P), "the closing round");
    let opened = world.machine.next_t;
    world.run(5_000);
    assert_eq!(world.machine.next_t, opened);
}

#[test]
fn a_hotkey_that_publishes_its_certificate_gets_its_grants_sealed_anew_at_once() {
    let mut machine = Orchestrator::new(setup(1));
    let mut sealed = |now_ms: u64, input: Input| {
        machine.handle(now_ms, input);
        let mut slots = Vec::new();
        while let Some(effect) = machine.poll_effect() {
            if let Effect::PublishStanding { slot, mark, .. } = effect {
                slots.push((slot, mark.recipient));
            }
        }
        (slots, machine.status().needs_certificate)
    };
    let guests = |recipient| vec![Guest { hotkey: miner(1), validator: false, recipient }];
    sealed(1_000, Input::Claimed { epoch: 1 });
    let (first, waiting) = sealed(1_000, Input::Metagraph { guests: guests(None) });
    assert_eq!((first.len(), waiting), (2, vec![miner(1)]), "an empty bundle for each slot says what is missing");
    assert_eq!(sealed(2_000, Input::Tick).0, []);
    let (again, waiting) = sealed(3_000, Input::Metagraph { guests: guests(Some([7; 32])) });
    assert_eq!(again, [((miner(1), 0), Some([7; 32])), ((miner(1), 1), Some([7; 32]))]);
    assert_eq!(waiting, []);
}

#[test]
fn a_learner_that_claims_more_steps_than_its_leases_hold_weighs_no_more() {
    let merged = |claims: u32| {
        let mut world = World::new(0, 3);
        world.learners[0].claims = claims;
        world.run(20_000);
        let slot = world.learners[0].slot;
        let first = world.merges.range(..u64::from(P)).flat_map(|(_, merge)| merge.accepted().cloned().collect::<Vec<_>>());
        let of_slot: Vec<(u32, u64, u64)> =
            first.filter(|one| (one.hotkey, one.slot) == slot).map(|one| (one.steps, one.tokens, one.weight_ppm)).collect();
        let leased: u32 = world.leases.values().filter(|job| (job.hotkey, job.slot) == slot).map(|job| job.leases[0].steps).sum();
        let all = world.merges.values().flat_map(|merge| merge.accepted()).filter(|one| (one.hotkey, one.slot) == slot);
        let most = all.map(|one| one.steps).max().unwrap_or_default();
        assert!(most <= leased, "{most} steps of {leased} leased ones");
        of_slot
    };
    let honest = merged(1);
    assert!(!honest.is_empty());
    // Before the first version nothing but the lease bounds a claim: the base is as old as the run.
    assert_eq!(merged(1_000), honest);
}

// A clock that is set back reaches no machine: `daemon::clock::Steady`.
#[test]
fn a_clock_that_jumps_ahead_by_hours_or_weeks_loses_no_merge_and_no_row() {
    const HOUR_MS: u64 = 3_600_000;
    for ahead_ms in [HOUR_MS, 6 * HOUR_MS, 400 * HOUR_MS] {
        let mut world = World::new(6, 3);
        world.run(10_000);
        let before = world.merges.len();
        world.now_ms += ahead_ms;
        world.run(10_000);
        assert!(world.merges.len() > before + 5, "{} merges before, {} after the jump", before, world.merges.len());
        let step_ms = world.machine.timing.step_ms();
        assert!(step_ms < 2 * STEP_MS, "a step is believed to take {step_ms} ms");
        world.until_complete(240_000);
        assert_eq!(world.machine.fragment_versions(), vec![7; usize::from(P)], "{ahead_ms} ms");
        let totals = world.machine.ledger.totals();
        assert_eq!(totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows, 10_000, "{totals:?}");
    }
}

#[test]
fn grants_are_published_for_what_is_to_be_uploaded_and_not_again_when_it_is_merged() {
    let mut world = World::new(0, 3);
    world.run(4_000);
    let (bundles, before) = (world.bundles, world.machine.status().contributions);
    world.run(20_000);
    let (bundles, merged) = (world.bundles - bundles, world.machine.status().contributions - before);
    assert!(merged > 60 && bundles < merged * 3 / 2, "{bundles} bundles for {merged} contributions");
}
