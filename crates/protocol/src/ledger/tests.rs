use proptest::prelude::*;

use super::*;

fn of(ledger: &TokenLedger, id: u64, rows: u64) -> (TokenLedger, Vec<RowRange>) {
    let mut ledger = ledger.clone();
    let ranges = ledger.lease(id, rows, 1);
    (ledger, ranges)
}

#[test]
fn rows_return_count_as_done_or_are_lost_exactly_once() {
    let mut ledger = TokenLedger::default();
    ledger.add_shard("a", 4, 128);
    ledger.add_shard("b", 10, 128);
    let rows = ledger.lease(1, 6, 1);
    assert_eq!(rows, [RowRange { shard: "a".into(), start: 0, end: 4 }, RowRange { shard: "b".into(), start: 0, end: 2 }]);
    ledger.add_shard("aa", 3, 128);
    ledger.end_lease(1, [("a", 2), ("a", 0), ("b", 1), ("a", 1), ("a", 3), ("b", 0)].into_iter(), 3, 1);
    let totals = ledger.totals();
    assert_eq!((totals.done_rows, totals.lost_rows, totals.leased_rows, totals.waiting_rows), (3, 1, 0, 13));
    assert_eq!(totals.done_tokens, 3 * 128);
    ledger.end_lease(1, [("a", 2)].into_iter(), 0, 1);
    assert_eq!(ledger.totals(), totals, "a lease ends once");
}

#[test]
fn a_new_epoch_begins_only_when_no_row_waits() {
    let mut ledger = TokenLedger::default();
    ledger.add_shard("a", 4, 10);
    assert_eq!(ledger.lease(1, 4, 1).len(), 1);
    assert!(ledger.lease(2, 4, 1).is_empty(), "leased rows do not come twice in an epoch");
    ledger.end_lease(1, (0..4).map(|row| ("a", row)), 4, 0);
    assert_eq!(ledger.lease(3, 2, 1), [RowRange { shard: "a".into(), start: 0, end: 2 }]);
    assert_eq!(ledger.totals().done_tokens, 40);
}

#[test]
fn a_shard_that_is_added_shifts_no_other() {
    let mut ledger = TokenLedger::default();
    for id in ["m", "q"] {
        ledger.add_shard(id, 8, 1);
    }
    ledger.lease(1, 5, 1);
    let (_, before) = of(&ledger, 2, 9);
    // Its id sorts first, and still nothing that was to come next moves.
    ledger.add_shard("a", 8, 1);
    ledger.add_shard("q", 80, 1);
    let (after, ranges) = of(&ledger, 2, 9);
    assert_eq!(ranges, before);
    assert_eq!(after.totals().waiting_rows, 24 - 5 - 9);
    assert_eq!(ledger.row("a", 0), Some(RowState::Waiting));
    assert_eq!(ledger.row("q", 8), None, "a known shard is left as it is");
}

#[test]
fn each_source_has_its_own_books() {
    let mut ledger = TokenLedger::default();
    ledger.add_shard_of("web", "a", 10, 100);
    ledger.add_shard_of("code", "b", 5, 100);
    ledger.add_shard_of("web", "c", 10, 100);
    let ranges = ledger.lease(1, 12, 1);
    ledger.end_lease_whole(1, &ranges, true);
    let books: Vec<(&str, u64, u64)> =
        ledger.sources().iter().map(|(source, totals)| (source.as_str(), totals.done_tokens, totals.waiting_rows)).collect();
    assert_eq!(books, [("web", 1_000, 10), ("code", 200, 3)]);
}

#[test]
fn a_lease_that_was_given_out_before_is_taken_over_once() {
    let mut ledger = TokenLedger::default();
    ledger.add_shard("a", 10, 1);
    let rows = [RowRange { shard: "a".into(), start: 2, end: 6 }];
    assert!(ledger.adopt_lease(7, &rows));
    assert!(!ledger.adopt_lease(8, &rows), "its rows do not wait any more");
    assert_eq!(ledger.lease(9, 100, 1).iter().map(RowRange::rows).sum::<u64>(), 6);
    ledger.end_lease_whole(7, &rows, false);
    assert_eq!(ledger.totals().waiting_rows, 4);
}

#[test]
fn scattered_rows_are_leased_in_whole_batches_that_a_job_has_room_for() {
    let mut ledger = TokenLedger::default();
    let rows = 4 * RANGES_MAX as u64;
    ledger.add_shard("a", rows, 1);
    ledger.lease(1, rows, 192);
    // Every second row comes back: none lies beside another.
    let order = (0..rows).map(|place| ("a", place * 2 % rows + place * 2 / rows));
    ledger.end_lease(1, order, rows / 2, 0);
    let waiting = ledger.totals().waiting_rows;
    assert_eq!(waiting, rows / 2);
    let ranges = ledger.lease(2, rows, 192);
    let leased: u64 = ranges.iter().map(RowRange::rows).sum();
    assert_eq!(leased, RANGES_MAX as u64 / 192 * 192, "whole batches, and no more ranges than a job holds");
    assert_eq!((ledger.totals().leased_rows, ledger.totals().waiting_rows), (leased, waiting - leased));
    // The rest is given out by and by; only the last batch is not full.
    let mut left = waiting - leased;
    for id in 3.. {
        let taken: u64 = ledger.lease(id, rows, 192).iter().map(RowRange::rows).sum();
        assert!(taken.is_multiple_of(192) || taken == left, "{taken} of {left}");
        left -= taken;
        if left == 0 {
            break;
        }
    }

    for shard in 0..SHARDS_MAX + 1 {
        ledger.add_shard(&format!("s{shard}"), 10, 1);
    }
    let ranges = ledger.lease(99, 1_000, 7);
    assert_eq!(ranges.iter().map(RowRange::rows).sum::<u64>(), SHARDS_MAX as u64 * 10 / 7 * 7);
}

#[test]
fn leases_that_break_off_cost_nothing_once_their_shards_are_over() {
    const ROWS: u64 = 4_096;
    let shards: Vec<String> = (0..64).map(|shard| format!("s{shard:02}")).collect();
    let mut ledger = TokenLedger::default();
    shards.iter().for_each(|shard| ledger.add_shard(shard, ROWS, 1));
    let before = ledger.bytes();
    // Each lease loses scattered rows: every fourth, as its permutation has it.
    for id in 0.. {
        let ranges = ledger.lease(id, 512, 8);
        let rows = || ranges.iter().flat_map(|range| (range.start..range.end).map(|row| (range.shard.as_str(), row)));
        let (lost, done): (Vec<_>, Vec<_>) = rows().partition(|(_, row)| row % 4 == 1);
        ledger.end_lease(id, done.iter().chain(&lost).copied(), done.len() as u64, lost.len() as u64);
        if ledger.totals().waiting_rows == 0 {
            break;
        }
    }
    assert_eq!(ledger.totals().lost_rows, 64 * ROWS / 4);
    assert!(ledger.detail.is_empty() && ledger.bytes() <= before + 64 * 16 + 64, "{before} before, {} after", ledger.bytes());
    // The next epoch has all of them again.
    assert_eq!(ledger.lease(9_999, ROWS, 8), [RowRange { shard: "s00".into(), start: 0, end: ROWS }]);
    assert_eq!((ledger.totals().lost_rows, ledger.totals().done_rows, ledger.totals().waiting_rows), (0, 0, 63 * ROWS));
}

/// The rules, row by row.
#[derive(Default)]
struct Plain {
    rows: BTreeMap<(usize, u64), RowState>,
}

proptest! {
    #[test]
    fn the_books_balance_and_say_what_a_list_of_rows_says(steps in proptest::collection::vec((1u64..30, 0u64..20, 0u64..5, 0u8..4), 1..80)) {
        let shards = [("x", 37u64), ("y", 11), ("z", 1)];
        let mut ledger = TokenLedger::default();
        let mut plain = Plain::default();
        for (index, (id, rows)) in shards.into_iter().enumerate() {
            ledger.add_shard(id, rows, 1);
            plain.rows.extend((0..rows).map(|row| ((index, row), RowState::Waiting)));
        }
        let index_of = |id: &str| shards.iter().position(|(name, _)| *name == id).unwrap();
        for (id, (rows, done, lost, how)) in steps.into_iter().enumerate() {
            let id = id as u64;
            if !plain.rows.values().any(|state| *state == RowState::Waiting) {
                for (index, (_, rows)) in shards.iter().enumerate() {
                    if !(0..*rows).any(|row| matches!(plain.rows[&(index, row)], RowState::Leased(_))) {
                        (0..*rows).for_each(|row| { plain.rows.insert((index, row), RowState::Waiting); });
                    }
                }
            }
            let ranges = ledger.lease(id, rows, 1);
            let mut order: Vec<(String, u64)> = ranges.iter().flat_map(|range| (range.start..range.end).map(|row| (range.shard.clone(), row))).collect();
            prop_assert!(order.len() as u64 <= rows);
            for (shard, row) in &order {
                let before = plain.rows.insert((index_of(shard), *row), RowState::Leased(id));
                prop_assert_eq!(before, Some(RowState::Waiting), "a row is given out once");
            }
            order.reverse();
            match how {
                0 => {}
                1 => {
                    ledger.end_lease_whole(id, &ranges, true);
                    order.iter().for_each(|(shard, row)| { plain.rows.insert((index_of(shard), *row), RowState::Done); });
                }
                _ => {
                    ledger.end_lease(id, order.iter().map(|(shard, row)| (shard.as_str(), *row)), done, lost);
                    for (place, (shard, row)) in order.iter().enumerate() {
                        let place = place as u64;
                        let state = if place < done { RowState::Done } else if place < done + lost { RowState::Lost } else { RowState::Waiting };
                        plain.rows.insert((index_of(shard), *row), state);
                    }
                }
            }
            for (index, (id, rows)) in shards.iter().enumerate() {
                let states = || (0..*rows).map(|row| plain.rows[&(index, row)]);
                let is_over = states().all(|state| matches!(state, RowState::Done | RowState::Lost));
                let are_kept = !(is_over && states().any(|state| state == RowState::Lost));
                for (row, state) in states().enumerate() {
                    prop_assert_eq!(ledger.row(id, row as u64), are_kept.then_some(state));
                }
                prop_assert_eq!(ledger.detail.contains_key(&(index as u32)), !is_over && states().any(|state| state != RowState::Waiting));
            }
            let totals = ledger.totals();
            let count = |matches: fn(&RowState) -> bool| plain.rows.values().filter(|state| matches(state)).count() as u64;
            prop_assert_eq!(totals.waiting_rows, count(|state| *state == RowState::Waiting));
            prop_assert_eq!(totals.leased_rows, count(|state| matches!(state, RowState::Leased(_))));
            prop_assert_eq!(totals.done_rows, count(|state| *state == RowState::Done));
            prop_assert_eq!(totals.lost_rows, count(|state| *state == RowState::Lost));
            for runs in ledger.detail.values() {
                prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].end && pair[0].state != pair[1].state));
            }
            let copy: TokenLedger = bincode::serde::decode_from_slice(&bincode::serde::encode_to_vec(&ledger, bincode::config::standard()).unwrap(), bincode::config::standard()).unwrap().0;
            prop_assert_eq!(copy, ledger.clone());
        }
    }
}
