//! Shards that join the running run.

use protocol::documents::{Action, CATALOG_PAGE_SHARDS, CatalogRef, Order};

use super::*;

fn add(number: u64, shards: &[&str]) -> Input {
    let shards = shards.iter().map(|id| (*id).to_owned()).collect();
    let order = Ok(Order { number, action: Action::AddShards { shards }, reason: "more text".into() });
    Input::Order { order: StoredOrder { number, order } }
}

#[test]
fn shards_join_a_running_run_once_and_shift_no_row() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    let before = world.machine.ledger.clone();
    world.input(add(1, &["b", "c"]));
    assert_eq!((world.machine.newest_page().page, world.machine.ledger.shards()), (1, 3));
    for row in 0..10_000 {
        assert_eq!(world.machine.ledger.row("a", row), before.row("a", row));
    }
    assert_eq!(world.machine.ledger.totals().waiting_rows, before.totals().waiting_rows + 2 * ADDED_ROWS);
    // What is in the run already is left out.
    world.input(add(2, &["c", "d"]));
    assert_eq!(world.pages[1].shards, [shard("d", ADDED_ROWS)]);
    world.input(add(3, &["a", "d"]));
    assert_eq!((world.pages.len(), world.machine.newest_page().page), (2, 2), "nothing new, no page");
    let outcomes = world.machine.status().outcomes;
    assert!(outcomes.len() == 3 && outcomes.iter().all(|outcome| outcome.done), "{outcomes:?}");
    world.run(2_000);
    assert_eq!(world.head.as_ref().unwrap().catalog, world.machine.newest_page(), "everybody hears of the page");
    // Rows that wait longer go first; then learners get the new ones.
    for _ in 0..100 {
        world.run(20_000);
        if world.machine.ledger.row("b", 0) != Some(RowState::Waiting) {
            assert_ne!(world.machine.ledger.row("a", 9_999), Some(RowState::Waiting));
            return;
        }
    }
    panic!("nobody got a row that joined: {:?}", world.machine.ledger.totals());
}

#[test]
fn what_cannot_join_is_refused_with_the_reason_and_the_next_order_is_taken() {
    let mut world = World::new(0, 2);
    world.run(2_000);
    world.input(add(1, &["held", "b"]));
    world.input(add(2, &["c"]));
    world.input(add(3, &["d"; CATALOG_PAGE_SHARDS + 1]));
    world.input(order(4, Action::Drain));
    world.input(add(5, &["e"]));
    let outcomes = world.machine.status().outcomes;
    assert_eq!(outcomes.iter().map(|outcome| outcome.done).collect::<Vec<_>>(), [false, true, false, true, false], "{outcomes:?}");
    for (outcome, part) in outcomes.iter().zip(["is held out", "in the run", "257 shards are more", "draining", "the run is ending"]) {
        assert!(outcome.text.contains(part), "{outcome:?}");
    }
    assert_eq!((world.pages.len(), world.machine.ledger.shards()), (1, 2));
}

#[test]
fn a_crash_at_any_input_adds_the_rows_once_with_the_journal_and_with_the_bucket_alone() {
    for loses_disk in [false, true] {
        let mut crash_after = 0;
        loop {
            crash_after += 1;
            let mut world = World::new(0, 2);
            world.run(3_000);
            let begun = world.inputs;
            (world.crash_after, world.loses_disk) = (Some(begun + crash_after), loses_disk);
            let orders = [add(1, &["b", "c"]), add(2, &["d"])];
            for order in orders.clone() {
                world.input(order);
            }
            // Orders lie in the bucket: a successor takes those that it does not know.
            while (world.machine.orders_taken() as usize) < orders.len() {
                world.input(orders[world.machine.orders_taken() as usize].clone());
            }
            let inputs = world.inputs - begun;
            world.run(5_000);
            let totals = world.machine.ledger.totals();
            let rows = totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows;
            assert_eq!(rows, 10_000 + 3 * ADDED_ROWS, "crash after {crash_after}, disk lost: {loses_disk}");
            assert_eq!(world.head.as_ref().unwrap().catalog, world.machine.newest_page());
            if crash_after > inputs {
                break;
            }
        }
        assert!(crash_after > 4, "{crash_after}");
    }
}

#[test]
fn a_page_of_a_writer_before_stands_and_the_shards_that_were_ordered_follow_it() {
    let mut world = World::new(0, 2);
    world.run(2_000);
    let reference = CatalogRef { page: 1, digest: Digest::blake3(b"theirs") };
    world.pages.push(StoredPage { reference, shards: vec![shard("theirs", ADDED_ROWS)] });
    world.input(add(1, &["ours"]));
    assert_eq!(world.machine.newest_page().page, 2);
    assert!(world.machine.ledger.has_shard("theirs") && world.machine.ledger.has_shard("ours"));
    assert!(world.machine.status().outcomes[0].done);
}
