//! A successor without the journal: what the bucket holds is enough.

use protocol::documents::{Action, Commitment, Head, Lease, LeaseEnd, Notice, Order};

use super::*;
use crate::machine::{BucketFacts, LEASE_EPOCH_SHIFT, StepFact};

impl World {
    /// What the edge does at a takeover: the machine of the newest snapshot, and everything write-once beyond it.
    pub(super) fn recover_from_bucket(&mut self) -> Input {
        self.epoch += 1;
        let machine = match &self.snapshot {
            Some(bytes) => Orchestrator::from_snapshot(bytes).unwrap().1,
            None => Orchestrator::new(setup(self.machine.parameters().cycles)),
        };
        let head = self.head.clone().unwrap_or_else(|| machine.head());
        let mut steps = Vec::new();
        for (t, tape) in self.tapes.range(machine.closed_below()..).filter(|(t, _)| !machine.is_closed(**t)) {
            steps.push(match self.merges.get(t) {
                None => StepFact::Taped(tape.clone()),
                Some(manifest) => {
                    let id = Digest::blake3(&codec::encode(manifest));
                    StepFact::Merged { tape: tape.clone(), manifest: Box::new(manifest.clone()), id, keyframe_length: 100 }
                }
            });
        }
        let pages = self.pages.iter().filter(|page| page.reference.page > machine.newest_page().page).cloned().collect();
        let mut leases = Vec::new();
        for first in machine.unknown_leases_from(self.epoch) {
            leases.extend((first..).map_while(|id| self.leases.get(&id)).cloned());
        }
        let given_out = leases.iter().flat_map(|job: &Job| &job.leases).map(|lease| lease.id);
        let may_have_ended = machine.leases_to_book().chain(given_out);
        let lease_ends = may_have_ended.filter_map(|id| self.lease_ends.get(&id)).cloned().collect();
        let mut log = Vec::new();
        let mut size = head.log.size;
        while size > machine.log_size() {
            log.push(self.log[&size].clone());
            size = self.log[&size].previous;
        }
        log.reverse();
        self.machine = machine;
        let orders = Vec::new();
        let is_open = |t: u64| !self.machine.is_closed(t) && !self.merges.contains_key(&t) && t < head.outer_step;
        let commitments = self.commitments.iter().filter(|((t, _), _)| is_open(*t)).map(|(_, stored)| stored.clone()).collect();
        Input::Recovered {
            facts: Box::new(BucketFacts { epoch: self.epoch, head, commitments, steps, pages, leases, lease_ends, orders, log }),
        }
    }

    /// The disk is gone, and a successor goes on from the bucket.
    fn succeed(&mut self) {
        self.succeed_with(Vec::new());
    }

    /// The same, with orders that the snapshot lacks.
    pub(super) fn succeed_with(&mut self, orders: Vec<StoredOrder>) {
        self.loses_disk = true;
        let Input::Recovered { mut facts } = self.recover_from_bucket() else { unreachable!("that is what it gives") };
        facts.orders = orders;
        self.input(Input::Recovered { facts });
        self.input(Input::Metagraph { guests: self.guests.clone() });
    }

    fn check_books(&self) {
        let machine = &self.machine;
        let totals = machine.ledger.totals();
        assert_eq!(totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows, 10_000);
        let mut leased = 0;
        for record in machine.leases.values().filter(|record| !record.ended) {
            for range in &record.lease.rows {
                for row in range.start..range.end {
                    assert_eq!(machine.ledger.row(&range.shard, row), Some(RowState::Leased(record.lease.id)), "{}", record.lease.id);
                }
                leased += range.rows();
            }
        }
        assert_eq!(leased, totals.leased_rows, "every leased row belongs to a live lease");
    }
}

#[test]
fn a_successor_with_the_bucket_alone_loses_no_merge_and_makes_none_twice() {
    let mut reference = World::new(1, 2);
    reference.until_complete(60_000);
    for crash_after in 3..=reference.inputs {
        let mut world = World::new(1, 2);
        world.crash_after = Some(crash_after);
        world.loses_disk = true;
        world.until_complete(60_000);
        world.check_books();
        // A closing round that only the head knew of begins anew.
        let versions = world.machine.fragment_versions();
        assert!(versions.iter().all(|version| (2..=3).contains(version)), "crash after {crash_after}: {versions:?}");
        let steps: Vec<u64> = world.merges.keys().copied().collect();
        assert_eq!(steps, (0..world.machine.closed_below()).collect::<Vec<_>>(), "crash after {crash_after}: a step is missing");
        for (t, tape) in &world.tapes {
            assert_eq!(world.merges[t].base_version, tape.base_version);
            assert!(tape.epoch >= 1 && tape.epoch <= 2);
        }
        let of_tapes: usize = world.tapes.values().map(|tape| tape.inputs.len()).sum();
        let counted = world.machine.status();
        assert_eq!(counted.contributions, of_tapes as u64, "crash after {crash_after}: each contribution counts once");
        assert_eq!((counted.merges + counted.empty_merges) as usize, world.merges.len());
    }
}

#[test]
fn rows_that_were_given_out_after_the_snapshot_are_given_to_nobody_else() {
    let mut world = World::new(0, 3);
    world.run(2_000);
    // No snapshot from here on: the bucket's is old when the disk is lost.
    let old = world.snapshot.clone();
    world.run(20_000);
    world.snapshot = old;
    let before: BTreeMap<u64, Job> = world.leases.clone();
    let known = Orchestrator::from_snapshot(world.snapshot.as_ref().unwrap()).unwrap().1.next_lease;
    assert!(before.keys().any(|id| *id >= known), "leases were given out since");
    let input = world.recover_from_bucket();
    world.input(input);
    world.input(Input::Metagraph { guests: world.guests.clone() });
    world.check_books();
    for (id, job) in before.iter().filter(|(id, _)| **id >= known) {
        let record = &world.machine.leases[id];
        assert_eq!((record.slot, &record.lease), ((job.hotkey, job.slot), &job.leases[0]));
    }
    world.run(20_000);
    world.check_books();
    let fresh: Vec<u64> = world.leases.keys().copied().filter(|id| !before.contains_key(id)).collect();
    assert!(!fresh.is_empty() && fresh.iter().all(|id| id >> LEASE_EPOCH_SHIFT == 2), "numbers begin anew with the epoch: {fresh:?}");
    // Learners went on with what they had: the same sessions, merged again.
    assert!(world.machine.learners.values().all(|learner| learner.session_epoch == 500 && learner.live));
}

#[test]
fn rows_that_came_back_and_were_given_out_again_after_the_snapshot_belong_to_whoever_has_them_now() {
    let mut world = World::new(0, 3);
    world.run(10_000);
    let old = world.snapshot.clone();
    // One learner falls silent: its rows return, and go to the others.
    world.learners[0].silent = true;
    world.run(40_000);
    world.snapshot = old;
    let known = Orchestrator::from_snapshot(world.snapshot.as_ref().unwrap()).unwrap().1;
    let shares = |one: &Job, other: &Job| {
        let (one, other) = (&one.leases[0].rows, &other.leases[0].rows);
        one.iter().any(|one| other.iter().any(|other| one.start < other.end && other.start < one.end))
    };
    let taken: Vec<u64> = known.leases.keys().copied().collect();
    let again = world.leases.iter().filter(|(id, job)| **id >= known.next_lease && taken.iter().any(|old| shares(&world.leases[old], job)));
    assert!(again.count() > 0, "rows of {taken:?} were given out again");
    let input = world.recover_from_bucket();
    world.input(input);
    world.input(Input::Metagraph { guests: world.guests.clone() });
    world.check_books();
    world.run(20_000);
    world.check_books();
}

/// A writer that stands still wakes up after it was succeeded and writes down leases of its own on rows that are somebody's by now: as a
/// record behind those that its successor found, or in a snapshot.
#[test]
fn rows_that_a_writer_gave_out_after_it_was_succeeded_stay_whose_they_are() {
    for in_snapshot in [false, true] {
        let mut world = World::new(0, 3);
        world.run(2_000);
        let old = world.snapshot.clone().unwrap();
        let mut of_first: Vec<Job> = world.leases.values().cloned().collect();
        let input = world.recover_from_bucket();
        world.input(input);
        world.input(Input::Metagraph { guests: world.guests.clone() });
        world.run(20_000);
        world.check_books();
        let open: Vec<u64> = world.machine.open_leases().map(|(id, _)| id).collect();
        let second = *open.iter().find(|id| **id >> LEASE_EPOCH_SHIFT == 2).expect("the successor gave out leases");
        let rows = world.leases[&second].leases[0].rows.clone();

        let last = of_first.last().unwrap().clone();
        let id = last.leases[0].id + 1;
        let late = Job { leases: vec![Lease { id, rows, ..last.leases[0].clone() }], ..last };
        if in_snapshot {
            let (now_ms, mut sleeper) = Orchestrator::from_snapshot(&old).unwrap();
            of_first.push(late);
            sleeper.adopt_leases(of_first, Vec::new());
            assert!(sleeper.open_leases().any(|(open, _)| open == id));
            world.snapshot = Some(sleeper.to_snapshot(now_ms).unwrap());
        } else {
            assert!(world.leases.insert(id, late).is_none());
            world.snapshot = Some(old);
        }
        let input = world.recover_from_bucket();
        world.input(input);
        assert!(world.machine.open_leases().all(|(open, _)| open != id), "nobody was told of it");
        for id in open {
            assert!(world.machine.open_leases().any(|(open, _)| open == id), "lease {id} was given out by a writer");
        }
        assert!(world.machine.learners.values().all(|learner| !learner.leases.contains(&id)));
        world.check_books();
        world.input(Input::Metagraph { guests: world.guests.clone() });
        world.run(20_000);
        world.check_books();
    }
}

#[test]
fn a_successor_books_every_row_as_its_predecessor_did_also_where_an_epoch_ended_meanwhile() {
    for rows in [403, 10_000] {
        let mut world = World::of(RunSetup { shards: vec![shard("a", rows / 2), shard("b", rows - rows / 2)], ..setup(0) }, 3);
        world.run(4_000);
        let old = world.snapshot.clone();
        world.run(50_000);
        let before = world.machine.ledger.clone();
        let receipts = world.lease_ends.values().filter(|end| end.receipt.is_some()).count();
        assert!(receipts > 3, "{receipts}");
        let epochs = before.totals().done_tokens / 128 / rows;
        assert!((rows == 403) == (epochs >= 1), "{epochs} epochs of {rows} rows");
        world.snapshot = old;
        let input = world.recover_from_bucket();
        world.input(input);
        let after = world.machine.ledger.totals();
        assert_eq!(after.done_tokens, before.totals().done_tokens, "{rows} rows");
        assert_eq!((after.lost_rows, after.done_rows), (before.totals().lost_rows, before.totals().done_rows), "{rows} rows");
        let lives = world.machine.open_leases().map(|(id, _)| id).collect::<Vec<_>>();
        assert!(lives.iter().all(|id| !world.lease_ends.contains_key(id)), "{lives:?}");
    }
}

#[test]
fn what_another_writer_wrote_at_the_end_of_a_lease_stands() {
    let mut world = World::new(0, 2);
    world.run(2_000);
    let (id, slot) = world.machine.open_leases().next().unwrap();
    let theirs = LeaseEnd::new(id, 0..2, 3, None);
    world.lease_ends.insert(id, theirs.clone());
    let hotkey = slot.0;
    let ban = Order { number: 1, action: Action::Ban { hotkey }, reason: "for the test".into() };
    world.input(Input::Order { order: StoredOrder { number: 1, order: Ok(ban) } });
    assert_eq!(world.lease_ends[&id], theirs);
    let totals = world.machine.ledger.totals();
    assert_eq!((totals.done_rows, totals.lost_rows), (2 * 4, 4));
    world.check_books();
}

#[test]
fn rows_stay_leased_until_their_end_is_written_down_and_a_new_process_writes_it() {
    let mut world = World::new(0, 2);
    world.run(2_000);
    let leased = world.machine.ledger.totals().leased_rows;
    let (id, slot) = world.machine.open_leases().next().unwrap();
    // The process dies with the write under way.
    world.machine.end_leases(slot);
    while world.machine.poll_effect().is_some() {}
    assert_eq!(world.machine.ledger.totals().leased_rows, leased);
    assert!(world.machine.open_leases().all(|(open, _)| open != id));
    world.input(Input::Claimed { epoch: 2 });
    assert!(world.lease_ends.contains_key(&id));
    world.check_books();
}

#[test]
fn a_successor_logs_nothing_twice_and_goes_on_with_the_log() {
    let mut world = World::new(0, 2);
    world.run(3_000);
    let old = world.snapshot.clone();
    world.run(10_000);
    world.snapshot = old;
    let input = world.recover_from_bucket();
    world.input(input);
    world.input(Input::Metagraph { guests: world.guests.clone() });
    world.run(20_000);
    let entries = logged(&world);
    let merges: Vec<Digest> = entries.iter().filter(|entry| entry.kind == LogKind::Merge).map(|entry| entry.document).collect();
    assert_eq!(merges.iter().collect::<BTreeSet<_>>().len(), merges.len(), "each merge once");
    let published: BTreeSet<Digest> = world.merges.values().map(|merge| Digest::blake3(&codec::encode(merge))).collect();
    assert!(merges.len() + 12 >= published.len(), "{} of {} merges are logged", merges.len(), published.len());
}

#[test]
fn what_a_predecessor_accepted_is_merged_also_where_its_learner_is_gone() {
    let accepted = |world: &World| {
        let open = world.machine.pulls.iter().filter(|(_, pull)| pull.stage == PullStage::Open);
        let offers = open.flat_map(|(t, pull)| pull.offers.iter().map(move |(slot, offer)| (*t, *slot, offer.stage)));
        offers.rev().find(|(_, _, stage)| *stage == OfferStage::Accepted).map(|(t, slot, _)| (t, slot))
    };
    for later in 0..8 {
        let mut world = World::new(0, 4);
        world.run(5_000 + 100 * later);
        let (t, slot) = loop {
            if let Some(found) = accepted(&world) {
                break found;
            }
            world.run(100);
        };
        world.learners.iter_mut().find(|sim| sim.slot == slot).unwrap().silent = true;
        world.succeed();
        world.run(20_000);
        assert!(world.tapes[&t].inputs.iter().any(|input| (input.hotkey, input.slot) == slot), "step {t}");
        let evidence = world.commitments[&(t, slot)].id;
        let logged = world.log.values().flat_map(|head| &head.entries).filter(|entry| entry.document == evidence);
        assert_eq!(logged.count(), 1, "its evidence is logged once");
    }
}

#[test]
fn a_commitment_whose_payload_was_not_uploaded_is_granted_again_by_the_successor() {
    let mut world = World::new(0, 3);
    world.run(5_000);
    let slot = world.learners[0].slot;
    // It commits, and does not get to upload before the orchestrator is gone.
    world.withheld.insert(slot);
    let granted = |world: &World| {
        let is_granted = |pull: &OpenPull| pull.offers.get(&slot).is_some_and(|offer| offer.stage == OfferStage::Granted);
        world.machine.pulls.iter().find(|(_, pull)| is_granted(pull)).map(|(t, _)| *t)
    };
    let t = world.run_until(granted);
    world.withheld.clear();
    world.succeed();
    world.run(5_000);
    assert!(world.tapes[&t].inputs.iter().any(|input| (input.hotkey, input.slot) == slot), "{:?}", world.tapes[&t]);
}

#[test]
fn a_log_head_of_an_earlier_writer_stands_and_what_it_lacks_follows() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    let machine = &mut world.machine;
    // What this machine wants to publish next lies there already, with other entries.
    let mine = LogEntry { kind: LogKind::Merge, document: Digest::blake3(b"mine") };
    let theirs = LogEntry { kind: LogKind::Merge, document: Digest::blake3(b"theirs") };
    machine.log.add(mine.kind, mine.document);
    let taken = world.log.values().last().unwrap().frontier.clone();
    let head = LogHead { previous: taken.size(), entries: vec![theirs], frontier: taken.extended(&[theirs]) };
    assert_eq!(machine.log.published().size, taken.size(), "the log is not being published just now");
    world.log.insert(head.frontier.size(), head.clone());
    world.input(Input::LogTaken { head: Box::new(head) });
    world.run(5_000);
    let entries = logged(&world);
    assert!(entries.contains(&mine) && entries.contains(&theirs));
}

#[test]
fn snapshots_of_other_versions_and_damaged_ones_are_refused_with_a_reason() {
    let mut world = World::new(0, 2);
    world.run(2_000);
    let snapshot = world.snapshot.unwrap();
    let (_, machine) = Orchestrator::from_snapshot(&snapshot).unwrap();
    assert_eq!(machine.epoch(), 1);
    let mut newer = snapshot.clone();
    newer[16] += 1;
    let error = Orchestrator::from_snapshot(&newer).unwrap_err();
    let found = format!("layout {}", Orchestrator::LAYOUT + 1);
    assert!(error.to_string().contains(&found) && error.to_string().contains("hint:"), "{error}");
    for at in [0, 30, snapshot.len() - 1] {
        let mut damaged = snapshot.clone();
        damaged[at] ^= 1;
        assert!(matches!(Orchestrator::from_snapshot(&damaged), Err(crate::machine::SnapshotError::Damaged(_))), "byte {at}");
    }
    for at in [0, 10, 20, 51, snapshot.len() - 1] {
        assert!(Orchestrator::from_snapshot(&snapshot[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn the_same_inputs_again_give_the_same_machine() {
    // What a restart relies on: nothing that decides is kept outside of the state.
    let mut world = World::new(2, 3);
    let bytes = |machine: &Orchestrator| bincode::serde::encode_to_vec(machine, bincode::config::standard()).unwrap();
    world.run(3_000);
    let mut twin: Orchestrator = bincode::serde::decode_from_slice(&bytes(&world.machine), bincode::config::standard()).unwrap().0;
    world.record = Some(Vec::new());
    world.run(10_000);
    for (now_ms, input) in world.record.take().unwrap() {
        twin.handle(now_ms, input);
        while twin.poll_effect().is_some() {}
    }
    assert_eq!(world.machine.leases.keys().collect::<Vec<_>>(), twin.leases.keys().collect::<Vec<_>>());
    assert_eq!(world.machine.pulls.keys().collect::<Vec<_>>(), twin.pulls.keys().collect::<Vec<_>>());
    assert_eq!(world.machine.ledger, twin.ledger);
    assert_eq!(world.machine.log_size(), twin.log_size());
    for (t, pull) in &world.machine.pulls {
        assert_eq!((pull.opened_ms, &pull.stage), (twin.pulls[t].opened_ms, &twin.pulls[t].stage));
    }
}

#[test]
fn a_successor_takes_the_orders_that_its_snapshot_lacks_before_it_asks_anybody() {
    let mut world = World::new(0, 3);
    world.run(5_000);
    let before = world.snapshot.clone();
    let hotkey = world.learners[0].slot.0;
    let ban = Order { number: 1, action: Action::Ban { hotkey }, reason: "for the test".into() };
    let ban = StoredOrder { number: 1, order: Ok(ban) };
    world.input(Input::Order { order: ban.clone() });
    let from = world.machine.next_t;
    // The snapshot with the ban did not come through.
    world.snapshot = before;
    world.succeed_with(vec![ban]);
    assert_eq!(world.machine.orders_taken(), 1);
    assert!(world.machine.open_leases().all(|(_, slot)| slot.0 != hotkey), "its rows are back");
    world.run(10_000);
    let merged = |hotkey| world.tapes.range(from..).any(|(_, tape)| tape.inputs.iter().any(|input| input.hotkey == hotkey));
    assert!(!merged(hotkey) && merged(world.learners[1].slot.0));
}

#[test]
fn what_a_pardoned_hotkey_committed_counts_though_the_snapshot_bans_it() {
    let mut world = World::new(0, 3);
    let slot = world.learners[0].slot;
    let order = |number, action| StoredOrder { number, order: Ok(Order { number, action, reason: "for the test".into() }) };
    world.run(3_000);
    world.input(Input::Order { order: order(1, Action::Ban { hotkey: slot.0 }) });
    world.run(2_000);
    let old = world.snapshot.clone();
    let pardon = order(2, Action::Unban { hotkey: slot.0 });
    world.input(Input::Order { order: pardon.clone() });
    let t = world.run_until(|world| world.answered(slot));
    // It says no more, and no snapshot since the pardon came through.
    world.learners[0].silent = true;
    world.snapshot = old;
    world.succeed_with(vec![pardon]);
    world.run(10_000);
    assert!(world.is_merged(t, slot), "step {t}");
}

#[test]
fn a_commitment_that_only_the_predecessors_tape_names_is_logged_before_the_merge() {
    let mut first = World::new(1, 3);
    first.until_complete(120_000);
    let mut tape = first.tapes[&2].clone();
    let foreign = Digest::blake3(b"the record that the predecessor saw");
    assert_ne!(std::mem::replace(&mut tape.inputs[0].commitment, foreign), foreign);
    // The successor has an offer of the same learner, under another record, when it meets the tape.
    let mut world = World::new(1, 3);
    world.tapes.insert(2, tape);
    world.until_complete(120_000);
    let entries = logged(&world);
    let merge = Digest::blake3(&codec::encode(&world.merges[&2]));
    let place = |document: Digest| entries.iter().position(|entry| entry.document == document);
    assert!(world.merges[&2].accepted().any(|one| one.commitment == foreign));
    assert!(place(foreign).unwrap() < place(merge).unwrap(), "{entries:?}");
}

#[test]
fn a_notice_that_the_snapshot_does_not_know_stays_in_the_head_until_its_audit_is_selected_again() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    let slot = world.learners[0].slot;
    world.opens_nothing = Some(slot);
    let deadlines = |head: &Head| -> BTreeMap<Digest, u64> {
        let ours = head.notices.iter().filter(|Notice::OpenAudit { hotkey, .. }| *hotkey == slot.0);
        ours.map(|Notice::OpenAudit { audit, deadline_ms, .. }| (*audit, *deadline_ms)).collect()
    };
    // Nothing goes to the bucket between that and the first notice.
    let mut snapshot = world.machine.to_snapshot(world.now_ms).unwrap();
    let noticed = loop {
        let before = world.machine.to_snapshot(world.now_ms).unwrap();
        world.run(100);
        let noticed = deadlines(&world.machine.head());
        if !noticed.is_empty() {
            break noticed;
        }
        snapshot = before;
    };
    world.snapshot = Some(snapshot);
    let recovered = world.recover_from_bucket();
    assert!(world.machine.audits.is_empty());
    world.machine.handle(world.now_ms, recovered);
    let effects: Vec<Effect> = std::iter::from_fn(|| world.machine.poll_effect()).collect();
    let keeps =
        |now: &BTreeMap<Digest, u64>| noticed.iter().all(|(audit, until_ms)| now.get(audit).is_some_and(|now_ms| now_ms >= until_ms));
    let heads: Vec<_> =
        effects.iter().filter_map(|effect| if let Effect::PublishHead { head } = effect { Some(deadlines(head)) } else { None }).collect();
    assert!(heads.len() == 1 && keeps(&heads[0]), "{noticed:?} {heads:?}");
    assert!(world.machine.audits.is_empty() && world.machine.inherited.len() >= noticed.len());
    let inherited = world.machine.inherited.clone();
    world.machine.inherit_notices(&inherited);
    assert_eq!(world.machine.inherited, inherited, "the next successor finds them twice: in the snapshot, and in the head");
    // The chain does not answer for longer than the time to open them, while learners are heard.
    for _ in 0..60 {
        world.now_ms += 1_000;
        let record = Box::new(world.learners[1].record.clone());
        let heard = Input::Progress { slot: world.learners[1].slot, id: Digest::ZERO, is_current: true, record };
        for input in [Input::HeadPublished, heard, Input::Tick] {
            world.machine.handle(world.now_ms, input);
        }
        while world.machine.poll_effect().is_some() {}
    }
    let now_ms = world.now_ms;
    assert!(deadlines(&world.machine.head()).values().all(|until_ms| *until_ms < now_ms + 60_000), "no more than the whole time anew");
    // The beacon gives the same audits again, which go on under these notices.
    let epoch = world.epoch;
    world.input(Input::Claimed { epoch });
    world.run(200);
    assert!(
        world.machine.inherited.is_empty() && keeps(&deadlines(&world.machine.head())),
        "{noticed:?} {:?}",
        world.machine.head().notices
    );
    assert!(noticed.keys().all(|audit| world.machine.audits.get(audit).is_some_and(|case| case.is_opening())), "nobody was late");
}

#[test]
fn a_closing_round_of_which_only_the_head_knows_begins_anew_and_pulls_every_fragment() {
    let mut world = World::new(0, 3);
    world.run(10_000);
    world.holds_merges = true;
    world.run(2_000);
    let old = world.snapshot.clone();
    world.holds_merges = false;
    let mut head = world.head.clone().unwrap();
    head.state = RunState::Draining;
    assert!(world.tapes.range(world.machine.closed_below()..).next().is_some_and(|(_, tape)| !tape.closing));
    world.snapshot = old;
    world.head = Some(head);
    world.succeed();
    world.until_complete(60_000);
    let closing: BTreeSet<u16> = world.tapes.values().filter(|tape| tape.closing).map(|tape| tape.fragment).collect();
    assert_eq!(closing.len(), usize::from(P));
}

#[test]
fn uploads_that_ended_while_no_process_ran_still_have_the_grace_of_their_pull() {
    let mut world = World::new(0, 4);
    world.run(10_000);
    let slow = world.learners[3].slot;
    world.withheld.insert(slow);
    let t = world.run_until(|world| {
        let is_awaited = |pull: &OpenPull| {
            let stage = pull.offers.get(&slow).map(|offer| offer.stage);
            pull.stage == PullStage::Open && pull.quorum_ms.is_some() && stage == Some(OfferStage::Granted)
        };
        world.machine.pulls.iter().find(|(_, pull)| is_awaited(pull)).map(|(t, _)| *t)
    });
    // It uploads while the process restarts.
    world.now_ms += 60_000;
    world.input(Input::Claimed { epoch: 1 });
    assert!(!world.tapes.contains_key(&t), "the pull is still open");
    world.withheld.clear();
    world.learners[3].record.uploaded.push(t);
    world.run(5_000);
    assert!(world.is_merged(t, slow));
}

#[test]
fn what_an_earlier_session_offered_stands_not_in_the_way_of_what_the_next_one_committed() {
    let mut world = World::new(0, 3);
    world.run(10_000);
    let slot = world.learners[0].slot;
    let t = world.run_until(|world| world.answered(slot));
    let input = world.recover_from_bucket();
    // The snapshot has what the session before offered, of which no evidence came into the bucket.
    let snapshot = world.snapshot.clone().unwrap();
    world.machine = Orchestrator::from_snapshot(&snapshot).unwrap().1;
    let offered = world.commitments[&(t, slot)].commitment.clone();
    let earlier = Commitment { blake3: Digest::blake3(b"of the session before"), ..offered };
    let fragment = protocol::schedule::fragment_of(t, P);
    let version = world.machine.fragments[usize::from(fragment)].version;
    let mut pull = OpenPull::new(fragment, version, world.now_ms, 10_000);
    let id = Digest::blake3(b"its record");
    pull.add(slot, Offer { commitment: earlier, id, stage: OfferStage::Committed, is_logged: false, has_left: false });
    world.machine.pulls.insert(t, pull);
    let learner = world.machine.learners.get_mut(&slot).unwrap();
    learner.session_epoch -= 1;
    world.machine.next_t = world.machine.next_t.max(t + 1);
    let Input::Recovered { mut facts } = input else { unreachable!("that is what it gives") };
    // A lease of the session that answered; its rows were given out after the snapshot.
    let lease = world.commitments[&(t, slot)].commitment.lease;
    let job = world.leases[&lease].clone();
    world.machine.end_leases(slot);
    world.machine.leases.remove(&lease);
    facts.leases.push(job);
    world.learners[0].silent = true;
    world.loses_disk = true;
    world.input(Input::Recovered { facts });
    world.input(Input::Metagraph { guests: world.guests.clone() });
    world.run(10_000);
    assert!(world.is_merged(t, slot), "step {t}");
}

#[test]
fn a_refusal_of_what_an_earlier_session_committed_is_none_of_this_ones() {
    let mut world = World::new(0, 3);
    world.run(10_000);
    let slot = world.learners[0].slot;
    let t = world.run_until(|world| world.answered(slot));
    let offer = world.machine.pulls[&t].offers[&slot].clone();
    let mut pull = OpenPull::new(protocol::schedule::fragment_of(t, P), 0, world.now_ms, 10_000);
    pull.add(slot, Offer { stage: OfferStage::Committed, ..offer.clone() });
    world.machine.pulls.insert(t, pull);
    world.machine.on_commitment_refused(slot, t, &Digest::ZERO);
    assert_eq!(world.machine.pulls[&t].offers[&slot].stage, OfferStage::Committed);
    world.machine.on_commitment_refused(slot, t, &offer.commitment.digest());
    assert_eq!(world.machine.pulls[&t].offers[&slot].stage, OfferStage::Rejected(Reason::RepeatedCommitment));
}

#[test]
fn what_was_uploaded_for_a_step_and_has_no_place_in_its_tape_is_in_the_manifest_of_a_successor_too() {
    let mut world = World::new(0, 4);
    world.run(10_000);
    let late = world.learners[3].slot;
    world.withheld.insert(late);
    let old = world.snapshot.clone();
    let first = world.machine.next_t;
    world.holds_merges = true;
    let has_late = |world: &World, t: u64| world.commitments.contains_key(&(t, late)) && world.tapes.contains_key(&t);
    let t = world.run_until(|world| (first..world.machine.next_t).find(|t| has_late(world, *t)));
    world.holds_merges = false;
    world.snapshot = old;
    world.learners[3].silent = true;
    world.succeed();
    world.run(2_000);
    let told = world.merges[&t].contributions.iter().find(|one| (one.hotkey, one.slot) == late).map(|one| one.outcome);
    assert_eq!(told, Some(Reason::NotUploaded));
}
