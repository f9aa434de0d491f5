//! Assignment of rows inside a lease: once each, in an order that the lease's seed gives to everybody alike.

use crate::Digest;
use crate::documents::{Lease, RowRange};

/// One row of one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    pub shard: &'a str,
    pub row: u64,
}

/// A permutation of `0..rows` by Fisher and Yates, driven by the BLAKE3 output stream keyed with `seed`.
pub fn row_order(seed: &Digest, rows: u32) -> Vec<u32> {
    let mut stream = blake3::Hasher::new_keyed(&seed.0).update(b"rows").finalize_xof();
    let mut order: Vec<u32> = (0..rows).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, below(&mut stream, i as u64 + 1) as usize);
    }
    order
}

/// A number below `bound` without bias: draws that fall into the incomplete last interval are thrown away.
fn below(stream: &mut blake3::OutputReader, bound: u64) -> u64 {
    let zone = u64::MAX - u64::MAX % bound;
    loop {
        let mut bytes = [0; 8];
        stream.fill(&mut bytes);
        let draw = u64::from_le_bytes(bytes);
        if draw < zone {
            return draw % bound;
        }
    }
}

/// The rows of every step of a lease, in order: `steps` lists of `batch_rows` rows.
pub struct LeaseRows {
    ranges: Vec<RowRange>,
    /// Rows of each range and of those before it.
    ends: Vec<u64>,
    order: Vec<u32>,
    batch_rows: usize,
}

impl LeaseRows {
    pub fn new(ranges: &[RowRange], seed: &Digest, batch_rows: u32) -> Self {
        let mut rows = 0;
        let add = |range: &RowRange| {
            rows += range.rows();
            rows
        };
        let ends: Vec<u64> = ranges.iter().map(add).collect();
        let rows = rows.min(u64::from(u32::MAX)) as u32;
        Self { ranges: ranges.to_vec(), ends, order: row_order(seed, rows), batch_rows: batch_rows as usize }
    }

    pub fn of(lease: &Lease) -> Self {
        Self::new(&lease.rows, &lease.seed, lease.batch_rows)
    }

    /// Rows of step `step`; empty behind the end of the lease.
    pub fn step(&self, step: u32) -> Vec<Row<'_>> {
        let start = step as usize * self.batch_rows;
        self.order.iter().skip(start).take(self.batch_rows).filter_map(|index| self.locate(u64::from(*index))).collect()
    }

    fn locate(&self, index: u64) -> Option<Row<'_>> {
        let at = self.ends.partition_point(|end| *end <= index);
        let (range, end) = (self.ranges.get(at)?, self.ends.get(at)?);
        Some(Row { shard: &range.shard, row: range.end - (end - index) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_a_lease_is_taken_exactly_once() {
        let ranges = [RowRange { shard: "a".into(), start: 10, end: 17 }, RowRange { shard: "b".into(), start: 0, end: 5 }];
        let rows = LeaseRows::new(&ranges, &Digest::blake3(b"seed"), 4);
        let mut seen: Vec<(String, u64)> = (0..3).flat_map(|step| rows.step(step)).map(|row| (row.shard.to_owned(), row.row)).collect();
        assert_eq!(seen.len(), 12);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 12);
        assert!(rows.step(3).is_empty());
    }

    #[test]
    fn the_order_is_pinned_and_depends_on_the_seed() {
        assert_eq!(row_order(&Digest::blake3(b"seed"), 8), row_order(&Digest::blake3(b"seed"), 8));
        assert_ne!(row_order(&Digest::blake3(b"seed"), 64), row_order(&Digest::blake3(b"other"), 64));
        assert!(row_order(&Digest::ZERO, 0).is_empty());
        assert_eq!(row_order(&Digest::ZERO, 8), PINNED);
    }

    /// Changing these changes the data order of every run.
    const PINNED: [u32; 8] = [4, 0, 2, 6, 3, 5, 1, 7];
}
