//! Sequence numbers of signed envelopes: `max(last + 1, now_ms)` (protocol.md §1), so that even a lost disk cannot repeat
//! one, and the highest number seen of each mutable key, so that an old document is not taken for a new one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::{Journal, JournalError};

/// The signer's side: hands out numbers, each durable before it is used.
pub struct Sequence {
    journal: Arc<Journal>,
    key: String,
    last: Mutex<u64>,
}

impl Sequence {
    /// The sequence `name` of this state directory.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn open(journal: Arc<Journal>, name: &str) -> Result<Self, JournalError> {
        let key = format!("sequence/{name}");
        let last = Mutex::new(read_number(&journal, &key)?.unwrap_or(0));
        Ok(Self { journal, key, last })
    }

    /// The next number.
    ///
    /// # Errors
    /// The journal cannot be written; no number is given then.
    pub fn next(&self, now_ms: u64) -> Result<u64, JournalError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let next = now_ms.max(last.saturating_add(1));
        self.journal.put(&self.key, &next.to_le_bytes())?;
        *last = next;
        Ok(next)
    }
}

/// The reader's side: remembers the highest number of each (signer, purpose, key).
pub struct HighestSeen {
    journal: Arc<Journal>,
    known: Mutex<HashMap<String, u64>>,
}

impl HighestSeen {
    pub fn new(journal: Arc<Journal>) -> Self {
        Self { journal, known: Mutex::new(HashMap::new()) }
    }

    /// The highest number taken so far under `name`.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn highest(&self, name: &str) -> Result<Option<u64>, JournalError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = known.get(name) {
            return Ok(Some(*number));
        }
        let stored = read_number(&self.journal, &format!("seen/{name}"))?;
        if let Some(number) = stored {
            known.insert(name.to_owned(), number);
        }
        Ok(stored)
    }

    /// Whether a document with this number may be taken: not older than the newest seen. The number is remembered. The same
    /// number again is allowed, because a mutable key is read many times between two writes.
    ///
    /// # Errors
    /// The journal cannot be read or written.
    pub fn accept(&self, name: &str, number: u64) -> Result<bool, JournalError> {
        match self.highest(name)? {
            Some(highest) if number < highest => Ok(false),
            Some(highest) if number == highest => Ok(true),
            _ => {
                self.journal.put(&format!("seen/{name}"), &number.to_le_bytes())?;
                self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), number);
                Ok(true)
            }
        }
    }
}

fn read_number(journal: &Journal, key: &str) -> Result<Option<u64>, JournalError> {
    let Some(bytes) = journal.get(key)? else { return Ok(None) };
    match <[u8; 8]>::try_from(bytes.as_slice()) {
        Ok(bytes) => Ok(Some(u64::from_le_bytes(bytes))),
        Err(_) => Err(JournalError::Damaged { path: journal.path().to_owned(), reason: format!("`{key}` is no number") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_the_clock_and_never_repeat_when_it_stands_or_goes_back() {
        let directory = tempfile::tempdir().unwrap();
        let sequence = Sequence::open(Arc::new(Journal::open(directory.path()).unwrap()), "progress").unwrap();
        assert_eq!([100, 100, 50, 200].map(|now| sequence.next(now).unwrap()), [100, 101, 102, 200]);
        drop(sequence);
        let sequence = Sequence::open(Arc::new(Journal::open(directory.path()).unwrap()), "progress").unwrap();
        assert_eq!(sequence.next(10).unwrap(), 201);
    }

    #[test]
    fn an_older_document_is_refused_also_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let seen = HighestSeen::new(Arc::new(Journal::open(directory.path()).unwrap()));
        assert_eq!([5, 5, 4, 6].map(|number| seen.accept("head", number).unwrap()), [true, true, false, true]);
        assert!(seen.accept("other", 1).unwrap());
        drop(seen);
        let seen = HighestSeen::new(Arc::new(Journal::open(directory.path()).unwrap()));
        assert!(!seen.accept("head", 5).unwrap());
        assert_eq!(seen.highest("head").unwrap(), Some(6));
    }
}
