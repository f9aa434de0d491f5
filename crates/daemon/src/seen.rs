//! What a client has seen of a subnet's bucket, kept in the journal: a restart forgets nothing that would let somebody show it an older
//! root, or an older pointer to the run.

use protocol::envelope::Seen;
use protocol::{AccountId, Digest};

use crate::{Journal, JournalError};

/// The memory of one bucket: of the subnet `netuid` on the chain `genesis`, with the owner that the user named.
pub struct Memory {
    key: String,
}

impl Memory {
    pub fn new(genesis: &[u8; 32], netuid: u16, owner: &AccountId) -> Self {
        Self { key: format!("seen/{}/{netuid}/{owner}", Digest(*genesis)) }
    }

    /// What was kept; nothing at the first start.
    ///
    /// # Errors
    /// The journal cannot be read, or holds something else there.
    pub fn recall(&self, journal: &Journal) -> Result<Seen, JournalError> {
        let Some(bytes) = journal.get(&self.key)? else { return Ok(Seen::default()) };
        serde_json::from_slice(&bytes)
            .map_err(|error| JournalError::Damaged { path: journal.path().to_owned(), reason: format!("`{}`: {error}", self.key) })
    }

    /// Keeps it.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn keep(&self, journal: &Journal, seen: &Seen) -> Result<(), JournalError> {
        let bytes = serde_json::to_vec(seen)
            .map_err(|error| JournalError::Damaged { path: journal.path().to_owned(), reason: error.to_string() })?;
        journal.put(&self.key, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_is_kept_over_a_restart_for_each_bucket_by_itself() {
        let folder = tempfile::tempdir().unwrap();
        let (owner, other) = (AccountId([1; 32]), AccountId([2; 32]));
        let seen = Seen { root: 3, root_digest: Some(Digest([9; 32])), ..Seen::default() };
        {
            let journal = Journal::open(folder.path()).unwrap();
            let memory = Memory::new(&[7; 32], 24, &owner);
            assert_eq!(memory.recall(&journal).unwrap(), Seen::default());
            // As it was kept before the digest was.
            journal.put(&memory.key, br#"{"root":2,"guard":{"seen":{}}}"#).unwrap();
            assert_eq!(memory.recall(&journal).unwrap(), Seen { root: 2, ..Seen::default() });
            memory.keep(&journal, &seen).unwrap();
        }
        let journal = Journal::open(folder.path()).unwrap();
        assert_eq!(Memory::new(&[7; 32], 24, &owner).recall(&journal).unwrap(), seen);
        for memory in [Memory::new(&[8; 32], 24, &owner), Memory::new(&[7; 32], 25, &owner), Memory::new(&[7; 32], 24, &other)] {
            assert_eq!(memory.recall(&journal).unwrap(), Seen::default());
        }
    }
}
