//! Whose every row is, by what lies in the bucket alone: lease records and their ends. The machine's ledger has to say the same.

use std::collections::{BTreeMap, BTreeSet};

use protocol::documents::{Lease, LeaseEnd, RowRange};
use protocol::lease::LeaseRows;

use super::tensors::shard;

/// Rows by shard: which lease has them (0 = none), and how often they were used up.
#[derive(Default)]
pub struct Books {
    shards: BTreeMap<String, Shard>,
    leases: BTreeMap<u64, Lease>,
    known: BTreeSet<u64>,
    /// Ends of leases whose own record is still on its way.
    early: BTreeMap<u64, LeaseEnd>,
    /// Tokens of rows with evidence.
    pub done_tokens: u64,
}

#[derive(Default)]
struct Shard {
    holder: Vec<u64>,
    used_up: Vec<u32>,
}

impl Shard {
    fn reach(&mut self, rows: usize) {
        if self.holder.len() < rows {
            self.holder.resize(rows, 0);
            self.used_up.resize(rows, 0);
        }
    }
}

impl Books {
    /// Whether a lease was given out that has not ended.
    pub fn is_open(&self, lease: u64) -> bool {
        self.leases.contains_key(&lease)
    }

    /// Whether the end of a lease lies there that nobody is known to have given out.
    pub fn has_only_end_of(&self, lease: u64) -> bool {
        self.early.contains_key(&lease)
    }

    /// A lease was given out, or is taken up by a successor: each of its rows has to be nobody else's, and used up no more often than any other of its shard.
    pub fn given(&mut self, lease: &Lease) -> Result<(), String> {
        if !self.known.insert(lease.id) {
            return Ok(());
        }
        self.leases.insert(lease.id, lease.clone());
        if let Some(end) = self.early.remove(&lease.id) {
            self.ended(&end);
            return Ok(());
        }
        for RowRange { shard, start, end } in &lease.rows {
            let rows = *start as usize..*end as usize;
            let books = self.shards.entry(shard.clone()).or_default();
            books.reach(rows.end);
            if let Some(row) = rows.clone().find(|row| books.holder[*row] != 0) {
                return Err(format!("row {row} of {shard} is given to lease {} and is lease {}'s", lease.id, books.holder[row]));
            }
            let least = books.used_up.iter().copied().min().unwrap_or(0);
            if let Some(row) = rows.clone().find(|row| books.used_up[*row] > least) {
                return Err(format!("row {row} of {shard} is given to lease {} again, and others of this epoch are left", lease.id));
            }
            books.holder[rows].fill(lease.id);
        }
        Ok(())
    }

    /// A lease was booked: its rows are used up, or come back.
    pub fn ended(&mut self, end: &LeaseEnd) {
        let Some(lease) = self.leases.remove(&end.lease) else {
            self.early.insert(end.lease, end.clone());
            return;
        };
        let order = LeaseRows::of(&lease);
        let done: Vec<u32> = end.done_steps(lease.steps).collect();
        for step in 0..lease.steps {
            let is_done = done.contains(&step);
            for row in order.step(step) {
                let (books, at) = (self.shards.entry(row.shard.to_owned()).or_default(), row.row as usize);
                books.reach(at + 1);
                if books.holder[at] == lease.id {
                    books.holder[at] = 0;
                }
                books.used_up[at] += u32::from(is_done || step < end.reported);
                self.done_tokens += u64::from(is_done) * u64::from(shard(row.shard, 0).row_tokens);
            }
        }
    }
}
