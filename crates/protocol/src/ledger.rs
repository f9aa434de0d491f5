//! The token ledger: every row of every shard is waiting, leased, done or lost, exactly once in each epoch.
//!
//! A shard is a sorted list of runs of rows in one state, so its size grows with the number of leases that cut it and not with
//! its rows; neighbours in the same final state melt together.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::documents::RowRange;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RowState {
    Waiting,
    Leased(u64),
    Done,
    /// Consumed by a learner that left no evidence of it.
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    end: u64,
    state: RowState,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Shard {
    rows: u64,
    row_tokens: u32,
    epoch: u32,
    /// Ends ascending; the first run starts at row 0, the last ends at `rows`.
    runs: Vec<Run>,
}

/// Counts of rows and tokens by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerTotals {
    pub waiting_rows: u64,
    pub leased_rows: u64,
    pub done_rows: u64,
    pub lost_rows: u64,
    pub done_tokens: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenLedger {
    shards: BTreeMap<String, Shard>,
    /// Rows done in epochs that are over.
    past_done_tokens: u64,
}

impl TokenLedger {
    /// Adds a shard; one that is known already is left as it is, so that adding shards never shifts others.
    pub fn add_shard(&mut self, id: &str, rows: u64, row_tokens: u32) {
        self.shards.entry(id.to_owned()).or_insert_with(|| Shard {
            rows,
            row_tokens,
            epoch: 0,
            runs: if rows == 0 { Vec::new() } else { vec![Run { end: rows, state: RowState::Waiting }] },
        });
    }

    /// Leases up to `rows` waiting rows to `lease`, lowest epoch first, then in the order of shard ids. When no row waits and
    /// none is leased, the next epoch begins.
    pub fn lease(&mut self, lease: u64, rows: u64) -> Vec<RowRange> {
        if !self.shards.values().any(|shard| shard.has(RowState::Waiting)) {
            self.begin_epoch();
        }
        let mut order: Vec<(u32, &String)> = self.shards.iter().map(|(id, shard)| (shard.epoch, id)).collect();
        order.sort();
        let order: Vec<String> = order.into_iter().map(|(_, id)| id.clone()).collect();
        let (mut ranges, mut missing) = (Vec::new(), rows);
        for id in order {
            let Some(shard) = self.shards.get_mut(&id) else { continue };
            while missing > 0
                && let Some((start, end)) = shard.first(RowState::Waiting)
            {
                let end = end.min(start + missing);
                shard.set(start, end, RowState::Leased(lease));
                missing -= end - start;
                ranges.push(RowRange { shard: id.clone(), start, end });
            }
        }
        ranges
    }

    /// Starts another epoch in every shard of which no row is leased any more.
    fn begin_epoch(&mut self) {
        for shard in self.shards.values_mut() {
            if shard.rows > 0 && !shard.runs.iter().any(|run| matches!(run.state, RowState::Leased(_))) {
                self.past_done_tokens += shard.count(|state| state == RowState::Done) * u64::from(shard.row_tokens);
                shard.epoch += 1;
                shard.runs = vec![Run { end: shard.rows, state: RowState::Waiting }];
            }
        }
    }

    /// Ends a lease: of the rows it took, in the order of the lease's permutation `rows`, the first `done` have evidence, the
    /// next `lost` were consumed without one, the rest return.
    pub fn end_lease<'a>(&mut self, lease: u64, rows: impl Iterator<Item = (&'a str, u64)>, done: u64, lost: u64) {
        for (index, (shard, row)) in rows.enumerate() {
            let state = match index as u64 {
                index if index < done => RowState::Done,
                index if index < done + lost => RowState::Lost,
                _ => RowState::Waiting,
            };
            if let Some(shard) = self.shards.get_mut(shard)
                && shard.state(row) == Some(RowState::Leased(lease))
            {
                shard.set(row, row + 1, state);
            }
        }
    }

    pub fn totals(&self) -> LedgerTotals {
        let mut totals = LedgerTotals { done_tokens: self.past_done_tokens, ..Default::default() };
        for shard in self.shards.values() {
            let mut start = 0;
            for run in &shard.runs {
                let rows = run.end - start;
                start = run.end;
                match run.state {
                    RowState::Waiting => totals.waiting_rows += rows,
                    RowState::Leased(_) => totals.leased_rows += rows,
                    RowState::Done => {
                        totals.done_rows += rows;
                        totals.done_tokens += rows * u64::from(shard.row_tokens);
                    }
                    RowState::Lost => totals.lost_rows += rows,
                }
            }
        }
        totals
    }

    /// State of one row; `None` if there is no such row.
    pub fn row(&self, shard: &str, row: u64) -> Option<RowState> {
        self.shards.get(shard)?.state(row)
    }
}

impl Shard {
    fn has(&self, state: RowState) -> bool {
        self.runs.iter().any(|run| run.state == state)
    }

    fn count(&self, matches: impl Fn(RowState) -> bool) -> u64 {
        let mut start = 0;
        let mut rows = 0;
        for run in &self.runs {
            if matches(run.state) {
                rows += run.end - start;
            }
            start = run.end;
        }
        rows
    }

    fn first(&self, state: RowState) -> Option<(u64, u64)> {
        let mut start = 0;
        for run in &self.runs {
            if run.state == state {
                return Some((start, run.end));
            }
            start = run.end;
        }
        None
    }

    fn state(&self, row: u64) -> Option<RowState> {
        let at = self.runs.partition_point(|run| run.end <= row);
        self.runs.get(at).map(|run| run.state)
    }

    /// Sets rows `[start, end)` to `state`, splitting and melting runs around them.
    fn set(&mut self, start: u64, end: u64, state: RowState) {
        debug_assert!(start < end && end <= self.rows);
        let first = self.runs.partition_point(|run| run.end <= start);
        let last = self.runs.partition_point(|run| run.end < end);
        let first_start = if first == 0 { 0 } else { self.runs[first - 1].end };
        let mut fresh = Vec::with_capacity(3);
        if first_start < start {
            fresh.push(Run { end: start, state: self.runs[first].state });
        }
        fresh.push(Run { end, state });
        if end < self.runs[last].end {
            fresh.push(self.runs[last].clone());
        }
        self.runs.splice(first..=last, fresh);
        let from = first.saturating_sub(1);
        let to = (first + 3).min(self.runs.len());
        let mut i = from;
        let mut limit = to;
        while i + 1 < limit.min(self.runs.len()) {
            if self.runs[i].state == self.runs[i + 1].state {
                self.runs[i].end = self.runs[i + 1].end;
                self.runs.remove(i + 1);
                limit -= 1;
            } else {
                i += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_return_count_as_done_or_are_lost_exactly_once() {
        let mut ledger = TokenLedger::default();
        ledger.add_shard("b", 10, 128);
        ledger.add_shard("a", 4, 128);
        let rows = ledger.lease(1, 6);
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
        assert_eq!(ledger.lease(1, 4).len(), 1);
        assert!(ledger.lease(2, 4).is_empty(), "leased rows do not come twice in an epoch");
        ledger.end_lease(1, (0..4).map(|row| ("a", row)), 4, 0);
        assert_eq!(ledger.lease(3, 2), [RowRange { shard: "a".into(), start: 0, end: 2 }]);
        assert_eq!(ledger.totals().done_tokens, 40);
    }

    proptest! {
        #[test]
        fn the_books_balance_whatever_happens(steps in proptest::collection::vec((1u64..20, 0u64..20, 0u64..5), 1..60)) {
            let mut ledger = TokenLedger::default();
            ledger.add_shard("x", 37, 1);
            ledger.add_shard("y", 11, 1);
            for (id, (rows, done, lost)) in steps.into_iter().enumerate() {
                let ranges = ledger.lease(id as u64, rows);
                let order: Vec<(String, u64)> = ranges.iter().flat_map(|range| (range.start..range.end).map(|row| (range.shard.clone(), row))).collect();
                prop_assert!(order.len() as u64 <= rows);
                if id % 3 != 0 {
                    ledger.end_lease(id as u64, order.iter().map(|(shard, row)| (shard.as_str(), *row)), done, lost);
                }
                let totals = ledger.totals();
                prop_assert_eq!(totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows, 48);
                for shard in ledger.shards.values() {
                    prop_assert!(shard.runs.windows(2).all(|pair| pair[0].end < pair[1].end && pair[0].state != pair[1].state));
                }
            }
        }
    }
}
