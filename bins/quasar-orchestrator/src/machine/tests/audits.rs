//! Audits that wait for room in the head, and openings that are let go of.

use protocol::audits::{SEGMENT_CYCLES, Selection};
use protocol::documents::{AuditDraw, Notice, OpeningPart, RENEWALS_PER_TTL, opening_part_bytes_max};
use protocol::envelope::Purpose;

use super::super::audits::HEAD_SLOW_MS;
use super::*;

/// No learner of the small world has it.
const SLOT: u8 = 7;

fn case(hotkey: u16, cycle: u64) -> (Digest, AuditCase) {
    let (slot, [low, high]) = (SLOT, hotkey.to_le_bytes());
    let audit = Digest::derive("audit", &[&[low, high, slot], &cycle.to_le_bytes()]);
    let hotkey = AccountId(std::array::from_fn(|place| if place == 0 { low } else { high }));
    let selection = Selection { audit, validator: miner(200), cycle, hotkey, slot, t: cycle * u64::from(P), beacon_block: 1 };
    (audit, AuditCase { selection, leases: Vec::new(), key: None, deadline_ms: 0, parts: BTreeMap::new(), ordering: false })
}

#[test]
fn the_head_has_room_for_the_notices_of_a_whole_subnet_and_the_rest_waits() {
    let mut world = World::new(0, 2);
    world.run(1_000);
    // A hundred slots that have opened nothing for long, and 500 that were selected since.
    for cycle in 0..20 {
        world.machine.audits.extend((0..100).map(|hotkey| case(hotkey, cycle)));
    }
    for cycle in 20..23 {
        world.machine.audits.extend((100..600).map(|hotkey| case(hotkey, cycle)));
    }
    let size = |world: &World| codec::encode(&world.machine.head()).len();
    let noticed = |world: &World| -> BTreeMap<AccountId, usize> {
        let mut of_slots = BTreeMap::new();
        for notice in world.machine.head().notices {
            let Notice::OpenAudit { hotkey, .. } = notice;
            *of_slots.entry(hotkey).or_default() += 1;
        }
        of_slots
    };
    world.input(Input::Claimed { epoch: 2 });
    assert!(size(&world) > 128 << 10 && size(&world) <= Purpose::Head.limit(), "{} bytes", size(&world));
    let first = noticed(&world);
    assert_eq!(first.len(), 600, "nobody takes the room of the others");
    assert!(first.values().all(|count| *count <= 2), "{first:?}");
    // Who waited is noticed when there is room, and has all the time that the others had: twice 20 s, one after the other.
    let is_shown = |case: &&AuditCase| case.key.is_some() && case.slot().1 == SLOT;
    let shown: BTreeSet<Digest> = world.machine.audits.values().filter(is_shown).map(|case| case.selection.audit).collect();
    world.run(40_000);
    let later: Vec<&AuditCase> = world.machine.audits.values().filter(is_shown).collect();
    assert_eq!((shown.len(), later.len()), (600 * 2, 100 * 2 + 500));
    assert!(later.iter().all(|case| !shown.contains(&case.selection.audit) && case.deadline_ms > world.now_ms + 15_000));
    world.run(370_000);
    assert!(world.machine.audits.values().all(|case| case.slot().1 != SLOT));
}

#[test]
fn of_a_slot_that_opens_nothing_only_so_many_audits_stay_open() {
    let mut setup = setup(0);
    setup.parameters.audit.opening_ms = 3_600_000;
    let mut world = World::of(setup, 3);
    world.run(5_000);
    let slot = world.learners[0].slot;
    world.opens_nothing = Some(slot);
    world.run(60_000);
    let open = world.machine.audits.values().filter(|case| case.slot() == slot).count();
    assert_eq!(open, 8);
    let ordered = world.orders.iter().filter(|(selection, parts)| selection.hotkey == slot.0 && *parts == 0).count();
    assert!(ordered > 3, "{ordered} were ordered unopened");
    assert!(world.orders.iter().all(|(selection, parts)| selection.hotkey == slot.0 || *parts == 3), "the others open theirs");
    // Its leases stay as long as an order may have to name them.
    let machine = &world.machine;
    let needed = machine.audits.values().flat_map(|case| &case.leases);
    assert!(needed.clone().count() > 0 && needed.clone().all(|id| machine.leases.contains_key(id)));
}

#[test]
fn parts_that_are_longer_than_theirs_may_be_are_never_granted() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    let slot = world.learners[0].slot;
    world.opens_nothing = Some(slot);
    world.run(20_000);
    let (audit, record) =
        (world.machine.audits.values().find(|case| case.slot() == slot).unwrap().selection.audit, &world.learners[0].record);
    let elements = world.machine.setup.fragments.iter().map(|fragment| fragment.elements).sum();
    let parameters = world.machine.parameters().clone();
    let limit = |part| opening_part_bytes_max(part, elements, &parameters);
    assert!(limit(0) < 70_000 && limit(1) >= 16 << 20, "a list of steps is no state");
    let part = |part, length| OpeningPart { audit, part, length, sha256: Digest::ZERO, uploaded: false };
    let mut record = record.clone();
    record.openings = vec![part(0, limit(0) + 1), part(1, limit(1) + 1), part(2, limit(2) + 1), part(3, 1)];
    world.machine.on_openings(slot, &record);
    assert!(world.machine.audits[&audit].parts.is_empty() && world.machine.opening_wants(slot).is_empty());
    record.openings = (0..3).map(|number| part(number, limit(number))).collect();
    world.machine.on_openings(slot, &record);
    assert_eq!(world.machine.opening_wants(slot).len(), 3);
}

/// A world with a learner that opens nothing, and has notices.
fn with_notices() -> (World, Slot) {
    let mut world = World::new(0, 2);
    world.run(5_000);
    let slot = world.learners[0].slot;
    world.opens_nothing = Some(slot);
    world.run(20_000);
    (world, slot)
}

/// Deadlines of the noticed audits of a slot.
fn deadlines(world: &World, slot: Slot) -> BTreeMap<Digest, u64> {
    let ours = world.machine.audits.values().filter(|case| case.slot() == slot && case.key.is_some());
    ours.map(|case| (case.selection.audit, case.deadline_ms)).collect()
}

#[test]
fn nobody_is_late_while_the_orchestrator_is_out_of_touch_and_then_has_so_much_longer() {
    const AWAY_MS: u64 = 600_000;
    /// What each second of the time away tells the machine.
    type Second = fn(&World) -> Vec<Input>;
    let no_process: (u64, Second) = (AWAY_MS, |_| vec![Input::Claimed { epoch: 2 }]);
    let sleep_or_clock: (u64, Second) = (AWAY_MS, |_| vec![Input::Tick]);
    // A head is on its way, and does not come back.
    let no_store: (u64, Second) = (1_000, |_| vec![Input::Tick]);
    let no_store_for_writes: (u64, Second) = (1_000, |world| {
        let learner = &world.learners[1];
        let record = Box::new(learner.record.clone());
        vec![Input::Progress { slot: learner.slot, id: Digest::ZERO, is_current: true, record }]
    });
    let no_readable_record: (u64, Second) = (1_000, |_| vec![Input::HeadPublished, Input::Tick]);
    for (pause_ms, second) in [no_process, sleep_or_clock, no_store, no_store_for_writes, no_readable_record] {
        let (mut world, slot) = with_notices();
        // Until a head is slow, it may be under way; the first one is due within a second; and between two records lies a fifth of the time
        // after which a learner counts as gone.
        let usual_ms = HEAD_SLOW_MS + 1_000 + world.machine.parameters().learner_ttl_ms / RENEWALS_PER_TTL + 200;
        let mut before = deadlines(&world, slot);
        before.retain(|_, deadline_ms| *deadline_ms > world.now_ms + usual_ms);
        assert!(!before.is_empty());
        let (mut late, end_ms) = (0, world.now_ms + AWAY_MS);
        while world.now_ms < end_ms {
            world.now_ms += pause_ms;
            for input in second(&world) {
                world.machine.handle(world.now_ms, input);
            }
            let effects = std::iter::from_fn(|| world.machine.poll_effect());
            let is_late = |effect: &Effect| matches!(effect, Effect::OrderAudit { selection, .. } if before.contains_key(&selection.audit));
            late += effects.filter(is_late).count();
        }
        assert_eq!(late, 0);
        world.machine.handle(world.now_ms, Input::HeadPublished);
        world.run(200);
        let after = deadlines(&world, slot);
        let has_longer =
            |(audit, deadline_ms): (&Digest, &u64)| after.get(audit).is_some_and(|later| *later + usual_ms >= deadline_ms + AWAY_MS);
        assert!(before.iter().all(has_longer), "{before:?} {after:?}");
        // Then its time is over.
        world.run(100_000);
        assert!(before.keys().all(|audit| world.orders.iter().any(|(selection, parts)| selection.audit == *audit && *parts == 0)));
    }
}

#[test]
fn the_clock_of_an_orchestrator_that_no_learner_can_follow_makes_nobody_late() {
    const AHEAD_MS: u64 = 180_000;
    let (mut world, slot) = with_notices();
    let before = deadlines(&world, slot);
    // It reads records, and none that was signed just now.
    let mut orders = 0;
    for second in 1..=120 {
        let right_ms = world.now_ms + 1_000 * second;
        let record = Box::new(world.learners[1].record.clone());
        let heard = Input::Progress { slot: world.learners[1].slot, id: Digest::ZERO, is_current: false, record };
        for input in [Input::HeadPublished, heard, Input::Tick] {
            world.machine.handle(right_ms + AHEAD_MS, input);
        }
        let effects = std::iter::from_fn(|| world.machine.poll_effect());
        orders += effects.filter(|effect| matches!(effect, Effect::OrderAudit { parts, .. } if parts.is_empty())).count();
    }
    assert!(!before.is_empty() && orders == 0);
    assert!(before.keys().all(|audit| world.machine.audits[audit].is_opening()));
}

#[test]
fn a_notice_stays_until_its_order_is_in_the_bucket() {
    let (mut world, slot) = with_notices();
    let (audit, _) = deadlines(&world, slot).pop_first().unwrap();
    let noticed = |world: &World| world.machine.head().notices.iter().any(|Notice::OpenAudit { audit: of, .. }| *of == audit);
    let mut record = world.learners[0].record.clone();
    record.openings = (0..3).map(|part| OpeningPart { audit, part, length: 1, sha256: Digest::ZERO, uploaded: true }).collect();
    world.machine.on_openings(slot, &record);
    world.machine.handle(world.now_ms + 1_000, Input::Tick);
    let is_order = |effect: &Effect| matches!(effect, Effect::OrderAudit { selection, .. } if selection.audit == audit);
    assert!(std::iter::from_fn(|| world.machine.poll_effect()).any(|effect| is_order(&effect)));
    assert!(noticed(&world), "a successor with an older snapshot may still need what is prepared for it");
    world.machine.handle(world.now_ms + 1_100, Input::AuditOrdered { audit });
    assert!(!noticed(&world));
}

#[test]
fn what_learners_have_let_go_of_before_the_beacon_came_is_not_audited() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    let cycle = world.machine.audit_cycle;
    let first = cycle * u64::from(P);
    let merges = |world: &World| world.machine.manifests.range(first..first + u64::from(P)).count();
    while merges(&world) < usize::from(P) {
        world.run(100);
    }
    assert_eq!(world.machine.audit_cycle, cycle, "its beacon is some blocks away");
    let mut late = world.machine.clone();
    late.next_t += SEGMENT_CYCLES * u64::from(P);
    for (machine, selected) in [(&mut world.machine, 2), (&mut late, 0)] {
        let before = machine.audits.len();
        let draw = AuditDraw { cycle, beacon_block: 1, beacon: Digest([7; 32]), validators: vec![miner(200)] };
        machine.on_beacon(&draw);
        assert_eq!((machine.audits.len() - before, machine.audit_cycle), (selected, cycle + 1));
    }
}

#[test]
fn while_the_chain_is_away_nothing_is_audited_by_a_block_that_may_be_known_already() {
    let mut world = World::new(6, 2);
    world.run(3_000);
    let cycle_of = |t: u64| protocol::schedule::cycle_of(t, P);
    world.is_chain_away = true;
    world.run(1_000);
    let (cycle, known) = (world.machine.audit_cycle, world.machine.block);
    let during = world.merges.len();
    world.run(2_000);
    assert!(cycle_of(world.merges.len() as u64) > cycle_of(during as u64), "the run goes on");
    assert!(world.merges.values().skip(during).all(|merge| merge.block == known));
    assert_eq!(world.machine.audit_cycle, cycle);
    world.is_chain_away = false;
    world.until_complete(120_000);
    world.run(60_000);
    assert_eq!(world.machine.audit_cycle, cycle_of(world.machine.closed_below));
    for (selection, _) in world.orders.iter().filter(|(one, _)| one.cycle + 1 < world.machine.audit_cycle) {
        let of_cycle = world.merges.values().filter(|merge| cycle_of(merge.t) == selection.cycle);
        let last = of_cycle.map(|merge| merge.block).max().unwrap();
        assert!(selection.beacon_block > last + 1, "cycle {}: block {} behind {last}", selection.cycle, selection.beacon_block);
    }
}

#[test]
fn of_a_slot_the_time_to_open_one_begins_when_that_of_the_one_before_is_over() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    let (slot, opening_ms) = (world.learners[0].slot, world.machine.parameters().audit.opening_ms);
    world.opens_nothing = Some(slot);
    let mut noticed = 0;
    for _ in 0..40 {
        world.run(1_000);
        let ours = world.machine.audits.values().filter(|case| case.slot() == slot && case.key.is_some() && case.is_opening());
        let mut ours: Vec<(u64, u64)> = ours.map(|case| (case.selection.cycle, case.deadline_ms)).collect();
        ours.sort_unstable();
        assert!(ours.windows(2).all(|pair| pair[1].1 >= pair[0].1 + opening_ms), "{ours:?}");
        noticed = noticed.max(ours.len());
    }
    assert_eq!(noticed, 2);
}

#[test]
fn a_run_that_audits_a_share_orders_so_many() {
    let orders = |rate_ppm| {
        let mut setup = setup(0);
        setup.parameters.audit.rate_ppm = rate_ppm;
        let mut world = World::of(setup, 5);
        world.run(200_000);
        assert!(world.machine.audit_cycle > 20);
        world.orders.len()
    };
    let (all, some) = (orders(1_000_000), orders(250_000));
    assert!(some > all / 8 && some < all / 2, "{some} of {all}");
}

#[test]
fn openings_are_deleted_once_each_when_their_verdict_is_there() {
    let mut world = World::new(0, 3);
    world.run(60_000);
    let opened: BTreeSet<Digest> = world.orders.iter().filter(|(_, parts)| *parts > 0).map(|(selection, _)| selection.audit).collect();
    let deleted: Vec<Digest> = world.retired.iter().flat_map(|retired| retired.openings.iter().map(|(_, audit)| *audit)).collect();
    let once: BTreeSet<Digest> = deleted.iter().copied().collect();
    assert!(once.len() > 6 && once.len() == deleted.len() && once.is_subset(&opened), "{} of {}", deleted.len(), opened.len());
    assert!(opened.len() - once.len() <= 6, "{} are left", opened.len() - once.len());
}

#[test]
fn an_order_is_sealed_to_the_key_that_the_machine_knows_also_while_the_chain_is_away() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    // A process begins, and nobody answers for the chain: no metagraph comes.
    world.machine.handle(world.now_ms, Input::Claimed { epoch: 2 });
    let effects: Vec<Effect> = std::iter::from_fn(|| world.machine.poll_effect()).collect();
    let of = |slot: &Slot| Some([slot.0.0[0]; 32]);
    let mut sealed = 0;
    for effect in &effects {
        match effect {
            Effect::PublishPullGrants { slot, recipient, .. } => assert_eq!(*recipient, of(slot)),
            Effect::PublishStanding { slot, mark, .. } => assert_eq!(mark.recipient, of(slot)),
            _ => continue,
        }
        sealed += 1;
    }
    assert!(sealed >= 5, "{effects:?}");
}

#[test]
fn verdicts_are_looked_for_in_turn_and_never_twice_at_a_time() {
    let mut world = World::new(0, 2);
    world.run(1_000);
    world.machine.verdicts_awaited.clear();
    let until_ms = world.now_ms + 10_000_000;
    for number in 0..1_000u64 {
        let audit = Digest::derive("audit", &[&number.to_le_bytes()]);
        world.machine.verdicts_awaited.insert(audit, AwaitedVerdict { validator: miner(200), until_ms, t: 0, is_opened: false });
    }
    let reads = |machine: &mut Orchestrator, now_ms: u64| -> Vec<Digest> {
        machine.handle(now_ms, Input::Tick);
        let read = |effect| if let Effect::ReadVerdict { audit, .. } = effect { Some(audit) } else { None };
        std::iter::from_fn(|| machine.poll_effect()).filter_map(read).collect()
    };
    // A store that is away for an hour finds no more reads than may be under way.
    let (mut now_ms, mut asked) = (world.now_ms, Vec::new());
    for _ in 0..360 {
        now_ms += 10_000;
        asked.extend(reads(&mut world.machine, now_ms));
    }
    let once: BTreeSet<Digest> = asked.iter().copied().collect();
    assert_eq!((asked.len(), once.len()), (256, 256));
    // It is back, and no verdict is there yet: everybody's turn comes.
    let mut seen = once;
    for _ in 0..3 {
        for audit in std::mem::take(&mut asked) {
            world.machine.handle(now_ms, Input::Verdict { audit, verdict: None });
        }
        now_ms += 100_000;
        asked = reads(&mut world.machine, now_ms);
        seen.extend(asked.iter().copied());
    }
    assert_eq!(seen.len(), 1_000);
}
