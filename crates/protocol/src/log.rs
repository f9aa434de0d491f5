//! The append-only log: a Merkle tree (RFC 6962 §2.1, with BLAKE3) over the ids of everything that decides about merges and pay.
//! Its heads are public and each extends the one before, so that nothing can be taken back or slipped in without two signed
//! heads that contradict each other.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::Digest;

/// Most entries of one [`LogHead`].
pub const LOG_ENTRIES_MAX: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogKind {
    Commitment = 0,
    Merge = 1,
    Verdict = 2,
    Receipt = 3,
    Release = 4,
}

/// One leaf: a document by the id of its envelope (a release by the BLAKE3 of its manifest's file).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct LogEntry {
    pub kind: LogKind,
    pub document: Digest,
}

impl LogEntry {
    fn leaf(&self) -> Digest {
        Digest::derive("quasar/v1/log-leaf", &[&[self.kind as u8], &self.document.0])
    }
}

fn node(left: &Digest, right: &Digest) -> Digest {
    Digest::derive("quasar/v1/log-node", &[&left.0, &right.0])
}

/// What is needed of a log in order to append to it: the roots of its complete subtrees, largest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Frontier {
    size: u64,
    peaks: Vec<Digest>,
}

impl Frontier {
    /// Number of entries.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn append(&mut self, entry: &LogEntry) {
        let mut subtree = entry.leaf();
        let mut complete = self.size;
        while complete & 1 == 1
            && let Some(left) = self.peaks.pop()
        {
            subtree = node(&left, &subtree);
            complete >>= 1;
        }
        self.peaks.push(subtree);
        self.size += 1;
    }

    /// This log with some more entries.
    pub fn extended(&self, entries: &[LogEntry]) -> Self {
        let mut frontier = self.clone();
        entries.iter().for_each(|entry| frontier.append(entry));
        frontier
    }

    /// The Merkle tree hash over all entries.
    pub fn root(&self) -> Digest {
        let mut peaks = self.peaks.iter().rev();
        let Some(last) = peaks.next() else { return Digest::derive("quasar/v1/log-empty", &[]) };
        peaks.fold(*last, |right, left| node(left, &right))
    }

    /// One subtree for each bit of the size: to be asked of every frontier from outside.
    pub fn is_well_formed(&self) -> bool {
        self.peaks.len() == self.size.count_ones() as usize
    }
}

/// Size and root of the log: what the head of the run names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct LogRef {
    pub size: u64,
    pub root: Digest,
}

impl From<&Frontier> for LogRef {
    fn from(frontier: &Frontier) -> Self {
        Self { size: frontier.size(), root: frontier.root() }
    }
}

/// The log after some more entries. A reader can begin at any head, and checks each that follows against what it has.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct LogHead {
    /// Size of the log before these entries: where the previous head lies.
    pub previous: u64,
    pub entries: Vec<LogEntry>,
    /// The log with these entries.
    pub frontier: Frontier,
}

/// Two signed statements about the log that cannot both be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogFault {
    #[error("the log head at size {0} does not follow from its own entries and the head before it")]
    NotAnExtension(u64),
    #[error("the run's head names another root for size {0} than the log head at that size")]
    OtherRoot(u64),
}

impl LogHead {
    /// Checks that this head extends `before` by exactly its entries.
    pub fn extends(&self, before: &Frontier) -> Result<(), LogFault> {
        let is_extension = self.previous == before.size() && !self.entries.is_empty() && before.extended(&self.entries) == self.frontier;
        if is_extension { Ok(()) } else { Err(LogFault::NotAnExtension(self.frontier.size())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u64) -> LogEntry {
        let kinds = [LogKind::Commitment, LogKind::Merge, LogKind::Verdict, LogKind::Receipt, LogKind::Release];
        LogEntry { kind: kinds[number as usize % kinds.len()], document: Digest::blake3(&number.to_le_bytes()) }
    }

    /// The definition of RFC 6962 §2.1, literally.
    fn tree_hash(entries: &[LogEntry]) -> Digest {
        match entries {
            [] => Digest::derive("quasar/v1/log-empty", &[]),
            [one] => one.leaf(),
            many => {
                let split = 1 << (many.len() - 1).ilog2();
                node(&tree_hash(&many[..split]), &tree_hash(&many[split..]))
            }
        }
    }

    #[test]
    fn the_root_is_the_merkle_tree_hash_of_rfc_6962_at_every_size() {
        let entries: Vec<LogEntry> = (0..70).map(entry).collect();
        let mut frontier = Frontier::default();
        for size in 0..=entries.len() {
            assert_eq!(frontier.root(), tree_hash(&entries[..size]), "size {size}");
            assert!(frontier.is_well_formed());
            if let Some(next) = entries.get(size) {
                frontier.append(next);
            }
        }
    }

    #[test]
    fn a_head_that_drops_changes_or_reorders_an_entry_is_no_extension() {
        let mut before = Frontier::default();
        before.append(&entry(0));
        let mut frontier = before.clone();
        let entries = vec![entry(1), entry(2)];
        for entry in &entries {
            frontier.append(entry);
        }
        let head = LogHead { previous: 1, entries, frontier };
        assert_eq!(head.extends(&before), Ok(()));
        let fault = Err(LogFault::NotAnExtension(3));
        assert_eq!(head.extends(&Frontier::default()), fault);
        for changed in [
            LogHead { entries: vec![entry(2), entry(1)], ..head.clone() },
            LogHead { entries: vec![entry(1), entry(3)], ..head.clone() },
            LogHead { entries: vec![entry(1)], ..head.clone() },
            LogHead { previous: 0, ..head.clone() },
        ] {
            assert_eq!(changed.extends(&before), fault);
        }
    }

    #[test]
    fn the_fullest_head_fits_its_file() {
        let frontier = Frontier { size: (1 << 40) - 1, peaks: vec![Digest::ZERO; 40] };
        assert!(frontier.is_well_formed());
        let head = LogHead { previous: 0, entries: vec![entry(1); LOG_ENTRIES_MAX], frontier };
        assert!(crate::codec::encode(&head).len() + 200 <= crate::envelope::Purpose::LogHead.limit());
    }
}
