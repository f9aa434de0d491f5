//! Sequence numbers of signed envelopes, durable before they are used: `max(last + 1, now_ms)`, so that even a lost disk cannot
//! repeat one. The reader's side is [`protocol::envelope::SequenceGuard`].

use std::sync::{Arc, Mutex, PoisonError};

use protocol::envelope::next_sequence;

use crate::{Journal, JournalError};

/// Hands out the numbers of one signer.
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

    /// No number below `floor` is given any more: somebody else may have used those.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn raise(&self, floor: u64) -> Result<(), JournalError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if floor > *last {
            self.journal.put(&self.key, &floor.to_le_bytes())?;
            *last = floor;
        }
        Ok(())
    }

    /// The next number.
    ///
    /// # Errors
    /// The journal cannot be written, or the numbers are used up; none is given then.
    pub fn next(&self, now_ms: u64) -> Result<u64, JournalError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if *last == u64::MAX {
            return Err(JournalError::UsedUp { name: self.key.clone() });
        }
        let next = next_sequence(*last, now_ms);
        self.journal.put(&self.key, &next.to_le_bytes())?;
        *last = next;
        Ok(next)
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
        sequence.raise(150).unwrap();
        assert_eq!(sequence.next(10).unwrap(), 202, "a floor never lowers");
        sequence.raise(900).unwrap();
        assert_eq!(sequence.next(10).unwrap(), 901);
    }

    #[test]
    fn numbers_that_are_used_up_are_an_error_and_none_is_given_twice() {
        let sequence = Sequence::open(Arc::new(Journal::in_memory().unwrap()), "progress").unwrap();
        sequence.raise(u64::MAX - 1).unwrap();
        assert_eq!(sequence.next(10).unwrap(), u64::MAX);
        let error = sequence.next(10).unwrap_err();
        assert!(matches!(error, JournalError::UsedUp { .. }) && error.to_string().contains("hint: "), "{error}");
    }
}
