//! The token ledger: every row of every shard is waiting, leased, done or lost, exactly once in each epoch.
//!
//! Shards whose rows all wait or are all over are one bit; only a shard that leases cut holds detail, a sorted list of runs of rows in
//! one state. Once none of its rows waits or is leased any more, it is over until the next epoch, and of its lost rows their number is
//! enough: however many leases break off in an epoch, they cost nothing but in the shards that are under way (which rows of a lease were
//! lost is written down where it ended). Sums are kept as rows move, so that neither a lease nor a look at the books reads more than the
//! shards that it touches: ten trillion tokens in 150,000 shards are some ten megabytes, and a lease is a matter of microseconds.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::documents::RowRange;

mod bits;

use bits::Bits;

/// A lease names at most so many ranges: rows that come back lie scattered in the order of their lease, most of them alone, and a job
/// names the ranges of several leases ([`crate::envelope::Purpose::limit`]).
pub const RANGES_MAX: usize = 2_048;
/// A lease reads from at most so many shards: each takes a presigned request in the learner's grants.
pub const SHARDS_MAX: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
    id: Box<str>,
    rows: u64,
    row_tokens: u32,
    epoch: u32,
    source: u16,
}

/// Counts of rows and tokens by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerTotals {
    pub waiting_rows: u64,
    pub leased_rows: u64,
    pub done_rows: u64,
    pub lost_rows: u64,
    /// Of all epochs.
    pub done_tokens: u64,
}

impl LedgerTotals {
    fn of(&mut self, state: RowState) -> &mut u64 {
        match state {
            RowState::Waiting => &mut self.waiting_rows,
            RowState::Leased(_) => &mut self.leased_rows,
            RowState::Done => &mut self.done_rows,
            RowState::Lost => &mut self.lost_rows,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenLedger {
    /// In the order in which they were added, which is the order in which they are leased: adding one never shifts another.
    shards: Vec<Shard>,
    /// Indices of `shards`, sorted by id.
    by_id: Vec<u32>,
    /// Shards with waiting rows, by epoch.
    waiting: BTreeMap<u32, Bits>,
    /// Shards whose rows are all done or lost.
    over: Bits,
    /// Of these, the number of rows that were lost, where there are any.
    lost: BTreeMap<u32, u64>,
    /// Ends ascending; the first run starts at row 0, the last ends at the shard's rows. A shard without an entry is over, or waits as
    /// a whole.
    detail: BTreeMap<u32, Vec<Run>>,
    totals: LedgerTotals,
    sources: Vec<(String, LedgerTotals)>,
}

impl TokenLedger {
    /// Adds a shard of an unnamed source; see [`TokenLedger::add_shard_of`].
    pub fn add_shard(&mut self, id: &str, rows: u64, row_tokens: u32) {
        self.add_shard_of("", id, rows, row_tokens);
    }

    /// Adds a shard; one that is known already is left as it is.
    pub fn add_shard_of(&mut self, source: &str, id: &str, rows: u64, row_tokens: u32) {
        let Err(place) = self.find(id) else { return };
        let source = match self.sources.iter().position(|(name, _)| name == source) {
            Some(known) => known,
            None => {
                self.sources.push((source.to_owned(), LedgerTotals::default()));
                self.sources.len() - 1
            }
        };
        let index = self.shards.len() as u32;
        self.shards.push(Shard { id: id.into(), rows, row_tokens, epoch: 0, source: source as u16 });
        self.by_id.insert(place, index);
        if rows > 0 {
            self.waiting.entry(0).or_default().set(index);
            self.totals.waiting_rows += rows;
            self.sources[source].1.waiting_rows += rows;
        }
    }

    /// Index of a shard, or where it belongs among the sorted ones.
    fn find(&self, id: &str) -> Result<u32, usize> {
        // Shards are mostly added in the order of their ids.
        if self.by_id.last().is_some_and(|last| *self.shards[*last as usize].id < *id) {
            return Err(self.by_id.len());
        }
        self.by_id.binary_search_by(|index| (*self.shards[*index as usize].id).cmp(id)).map(|at| self.by_id[at])
    }

    /// Leases up to `rows` waiting rows to `lease`, lowest epoch first, then in the order in which the shards were added. When no row
    /// waits, the next epoch begins in every shard of which none is leased. Where the rows lie scattered they are fewer ([`RANGES_MAX`],
    /// [`SHARDS_MAX`]): whole batches of `batch_rows` then, if there are enough for one.
    pub fn lease(&mut self, lease: u64, rows: u64, batch_rows: u64) -> Vec<RowRange> {
        if self.totals.waiting_rows == 0 {
            self.begin_epoch();
        }
        let (mut ranges, mut missing, mut shards) = (Vec::new(), rows, 0);
        while missing > 0 && ranges.len() < RANGES_MAX && shards < SHARDS_MAX {
            let Some(index) = self.waiting.values().find_map(Bits::first) else { break };
            shards += 1;
            for (start, end) in self.waiting_in(index) {
                if missing == 0 || ranges.len() == RANGES_MAX {
                    break;
                }
                let end = end.min(start + missing);
                self.assign(index, start, end, RowState::Waiting, RowState::Leased(lease));
                missing -= end - start;
                ranges.push(RowRange { shard: self.shards[index as usize].id.to_string(), start, end });
            }
            self.settle(index);
        }
        let taken = rows - missing;
        if missing > 0 && self.totals.waiting_rows > 0 && taken > batch_rows {
            self.give_back(lease, &mut ranges, taken % batch_rows.max(1));
        }
        ranges
    }

    /// The last `rows` of these ranges wait again.
    fn give_back(&mut self, lease: u64, ranges: &mut Vec<RowRange>, mut rows: u64) {
        while rows > 0
            && let Some(last) = ranges.last_mut()
            && let Ok(index) = self.find(&last.shard)
        {
            let end = last.end;
            last.end -= rows.min(last.rows());
            rows -= end - last.end;
            self.assign(index, last.end, end, RowState::Leased(lease), RowState::Waiting);
            self.settle(index);
            if last.rows() == 0 {
                ranges.pop();
            }
        }
    }

    /// The next epoch begins in every shard whose rows are all done or lost.
    fn begin_epoch(&mut self) {
        for index in 0..self.shards.len() as u32 {
            if !self.over.has(index) {
                continue;
            }
            let lost = self.lost.remove(&index).unwrap_or(0);
            self.count(index, RowState::Lost, RowState::Waiting, lost);
            self.count(index, RowState::Done, RowState::Waiting, self.shards[index as usize].rows - lost);
            self.over.clear(index);
            self.shards[index as usize].epoch += 1;
            let epoch = self.shards[index as usize].epoch;
            self.mark_waiting(index, epoch, true);
        }
    }

    /// Ends a lease: of the rows it took, in the order of the lease's permutation `rows`, the first `done` have evidence, the
    /// next `lost` were consumed without one, the rest return.
    pub fn end_lease<'a>(&mut self, lease: u64, rows: impl Iterator<Item = (&'a str, u64)>, done: u64, lost: u64) {
        let mut outcomes: Vec<(u32, RowState, u64)> = Vec::new();
        let mut last: Option<(&str, u32)> = None;
        for (place, (shard, row)) in rows.enumerate() {
            let state = match place as u64 {
                place if place < done => RowState::Done,
                place if place < done + lost => RowState::Lost,
                _ => RowState::Waiting,
            };
            let index = match last {
                Some((known, index)) if known == shard => index,
                _ => match self.find(shard) {
                    Ok(index) => index,
                    Err(_) => continue,
                },
            };
            last = Some((shard, index));
            outcomes.push((index, state, row));
        }
        outcomes.sort_unstable();
        let mut touched = BTreeSet::new();
        for same in outcomes.chunk_by(|a, b| a.0 == b.0 && a.1 == b.1 && b.2 <= a.2 + 1) {
            let ((index, state, start), (_, _, last)) = (same[0], same[same.len() - 1]);
            self.assign(index, start, last + 1, RowState::Leased(lease), state);
            touched.insert(index);
        }
        touched.into_iter().for_each(|index| self.settle(index));
    }

    /// Ends a lease of which every row has evidence (`done`) or returns.
    pub fn end_lease_whole(&mut self, lease: u64, ranges: &[RowRange], done: bool) {
        let state = if done { RowState::Done } else { RowState::Waiting };
        for range in ranges {
            let Ok(index) = self.find(&range.shard) else { continue };
            self.assign(index, range.start, range.end, RowState::Leased(lease), state);
            self.settle(index);
        }
    }

    /// Takes rows for a lease that was given out by another writer, and says whether they were there to be taken. Leases are taken up
    /// in the order of their numbers, each with its end; rows that are done or lost then say that the other had begun an epoch.
    pub fn adopt_lease(&mut self, lease: u64, ranges: &[RowRange]) -> bool {
        if ranges.iter().any(|range| self.find(&range.shard).is_ok_and(|index| self.over.has(index))) {
            self.begin_epoch();
        }
        let mut rows = 0;
        let before = self.totals.leased_rows;
        for range in ranges {
            let Ok(index) = self.find(&range.shard) else { return false };
            self.assign(index, range.start, range.end, RowState::Waiting, RowState::Leased(lease));
            self.settle(index);
            rows += range.rows();
        }
        self.totals.leased_rows - before == rows
    }

    pub fn totals(&self) -> LedgerTotals {
        self.totals
    }

    /// The books of each source, in the order in which the sources appeared.
    pub fn sources(&self) -> &[(String, LedgerTotals)] {
        &self.sources
    }

    pub fn has_shard(&self, id: &str) -> bool {
        self.find(id).is_ok()
    }

    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Bytes held, allocations' own overhead left out.
    pub fn bytes(&self) -> usize {
        let shards: usize = self.shards.iter().map(|shard| size_of::<Shard>() + shard.id.len()).sum();
        let detail: usize = self.detail.values().map(|runs| 32 + runs.len() * size_of::<Run>()).sum();
        let bits = self.over.bytes() + self.waiting.values().map(Bits::bytes).sum::<usize>();
        shards + self.by_id.len() * 4 + detail + self.lost.len() * size_of::<(u32, u64)>() + bits
    }

    /// State of one row; `None` if there is no such row, and in a shard that is over and lost some: which ones is not kept.
    pub fn row(&self, shard: &str, row: u64) -> Option<RowState> {
        let index = self.find(shard).ok()?;
        if row >= self.shards[index as usize].rows {
            return None;
        }
        match self.detail.get(&index) {
            Some(runs) => runs.get(runs.partition_point(|run| run.end <= row)).map(|run| run.state),
            None if !self.over.has(index) => Some(RowState::Waiting),
            None => (!self.lost.contains_key(&index)).then_some(RowState::Done),
        }
    }

    /// Ranges of the rows that wait in a shard that is not over.
    fn waiting_in(&self, index: u32) -> Vec<(u64, u64)> {
        let Some(runs) = self.detail.get(&index) else { return vec![(0, self.shards[index as usize].rows)] };
        let starts = std::iter::once(0).chain(runs.iter().map(|run| run.end));
        starts.zip(runs).filter(|(_, run)| run.state == RowState::Waiting).map(|(start, run)| (start, run.end)).collect()
    }

    /// Moves the rows of `[start, end)` that are in state `from`, waiting or leased, to state `to`; [`TokenLedger::settle`] follows.
    fn assign(&mut self, index: u32, start: u64, end: u64, from: RowState, to: RowState) {
        let rows = self.shards[index as usize].rows;
        let end = end.min(rows);
        if start >= end || from == to || self.over.has(index) {
            return;
        }
        let runs = self.detail.entry(index).or_insert_with(|| vec![Run { end: rows, state: RowState::Waiting }]);
        let mut moved = 0;
        let mut at = runs.partition_point(|run| run.end <= start);
        let mut begin = if at == 0 { 0 } else { runs[at - 1].end };
        while at < runs.len() && begin < end {
            let run_end = runs[at].end;
            if runs[at].state == from {
                let (cut_start, cut_end) = (begin.max(start), run_end.min(end));
                moved += cut_end - cut_start;
                let mut pieces = [None, None, None];
                if begin < cut_start {
                    pieces[0] = Some(Run { end: cut_start, state: from });
                }
                pieces[1] = Some(Run { end: cut_end, state: to });
                if cut_end < run_end {
                    pieces[2] = Some(Run { end: run_end, state: from });
                }
                let added = pieces.iter().flatten().count();
                runs.splice(at..=at, pieces.into_iter().flatten());
                at += added;
            } else {
                at += 1;
            }
            begin = run_end;
        }
        self.count(index, from, to, moved);
    }

    /// Melts neighbours in one state, forgets detail that a bit says, and notes whether rows wait.
    fn settle(&mut self, index: u32) {
        let Some(runs) = self.detail.get_mut(&index) else { return };
        runs.dedup_by(|next, before| {
            let is_same = next.state == before.state;
            if is_same {
                before.end = next.end;
            }
            is_same
        });
        let waits = runs.iter().any(|run| run.state == RowState::Waiting);
        if runs.iter().all(|run| matches!(run.state, RowState::Done | RowState::Lost)) {
            let starts = std::iter::once(0).chain(runs.iter().map(|run| run.end));
            let lost: u64 =
                starts.zip(runs.iter()).filter(|(_, run)| run.state == RowState::Lost).map(|(start, run)| run.end - start).sum();
            if lost > 0 {
                self.lost.insert(index, lost);
            }
            self.over.set(index);
            self.detail.remove(&index);
        } else if matches!(runs.as_slice(), [Run { state: RowState::Waiting, .. }]) {
            self.detail.remove(&index);
        }
        let epoch = self.shards[index as usize].epoch;
        self.mark_waiting(index, epoch, waits);
    }

    fn mark_waiting(&mut self, index: u32, epoch: u32, waits: bool) {
        if waits {
            self.waiting.entry(epoch).or_default().set(index);
        } else if let Some(bits) = self.waiting.get_mut(&epoch) {
            bits.clear(index);
            if bits.is_empty() {
                self.waiting.remove(&epoch);
            }
        }
    }

    fn count(&mut self, index: u32, from: RowState, to: RowState, rows: u64) {
        let shard = &self.shards[index as usize];
        let tokens = if to == RowState::Done { rows * u64::from(shard.row_tokens) } else { 0 };
        for totals in [&mut self.totals, &mut self.sources[usize::from(shard.source)].1] {
            *totals.of(from) -= rows;
            *totals.of(to) += rows;
            totals.done_tokens += tokens;
        }
    }
}

#[cfg(test)]
mod tests;
