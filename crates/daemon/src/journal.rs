//! The durable memory of one daemon: every input before it is handled, the newest snapshot, and a small key/value table.
//!
//! One redb file (copy-on-write B-trees, two-phase commit) in the state directory. A batch of inputs is one durable commit;
//! after a crash or power loss the file holds each batch whole or not at all. redb checks its own pages when the file is
//! opened; each record carries a check of its own beside that, so that a flipped bit is an error and never an input.
//!
//! A lock file keeps a second process away from the same state directory.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use protocol::Digest;
use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use tokio::sync::watch;

/// Sequence number to entry record.
const ENTRIES: TableDefinition<u64, &[u8]> = TableDefinition::new("entries");
/// Name to value: sequences, digests, and the snapshot.
const VALUES: TableDefinition<&str, &[u8]> = TableDefinition::new("values");
/// Name of the snapshot among the values; no caller's key starts with a slash.
const SNAPSHOT: &str = "/snapshot";

const JOURNAL_FILE: &str = "journal.redb";
const LOCK_FILE: &str = "lock";
/// Longest input or value, and longest snapshot, that is taken or given back.
pub const ENTRY_BYTES_MAX: usize = 16 << 20;
pub const SNAPSHOT_BYTES_MAX: usize = 1 << 30;
/// redb's page cache; its default of 1 GiB is for databases, not for a journal.
const CACHE_BYTES: usize = 16 << 20;
/// Leading bytes of a record: number (le64: time of an entry, covered sequence of a snapshot), then eight bytes of check.
const RECORD_HEAD: usize = 16;

#[derive(Clone, Debug, thiserror::Error)]
pub enum JournalError {
    #[error(
        "the state directory {} is in use by {}\nhint: stop the other process, or give this one its own --state-dir",
        directory.display(), holder.map_or("another process".to_owned(), |pid| format!("process {pid}"))
    )]
    InUse { directory: PathBuf, holder: Option<u32> },
    #[error(
        "the journal {} is damaged: {reason}\nhint: move the file away and start again; what is missing is read anew from \
         the bucket",
        path.display()
    )]
    Damaged { path: PathBuf, reason: String },
    #[error("the disk that holds {} is full\nhint: free space there and start again; nothing that was accepted is lost", path.display())]
    DiskFull { path: PathBuf },
    #[error("the journal {} cannot be used: {reason}\nhint: check the disk and the directory's owner and permissions", path.display())]
    Unusable { path: PathBuf, reason: String },
    #[error(
        "a record of {bytes} bytes is over the journal's limit of {limit} bytes\nhint: nothing was written; whoever sent so much is at \
         fault, or this build: report it with the log"
    )]
    TooLarge { bytes: usize, limit: usize },
    #[error("the numbers of `{name}` are used up: somebody else signed with this key\nhint: name another key (`rotate-key`)")]
    UsedUp { name: String },
}

impl JournalError {
    /// The exit code that a supervisor should see: no restart repairs a file.
    pub fn exit(&self) -> crate::Exit {
        match self {
            // By a process that a hanging driver keeps from ending, perhaps; or by one that should not run beside this.
            Self::InUse { .. } => crate::Exit::TryLater,
            Self::Damaged { .. } | Self::TooLarge { .. } | Self::UsedUp { .. } => crate::Exit::Configuration,
            Self::DiskFull { .. } | Self::Unusable { .. } => crate::Exit::Unavailable,
        }
    }
}

impl From<JournalError> for crate::Failure {
    fn from(error: JournalError) -> Self {
        Self::new(error.exit(), error)
    }
}

/// An input as it was appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub sequence: u64,
    pub now_ms: u64,
    pub bytes: Vec<u8>,
}

/// Everything that is needed to rebuild the machine: the newest snapshot and the entries after it, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    pub snapshot: Option<Vec<u8>>,
    pub entries: Vec<Entry>,
}

/// An open journal; dropping it closes the file and frees the directory. All calls block for the disk.
pub struct Journal {
    database: Database,
    path: PathBuf,
    /// Held for its lock only. `None` for a journal on a foreign backend.
    _lock: Option<File>,
    /// Why it cannot be used any more.
    failure: watch::Sender<Option<JournalError>>,
}

impl Journal {
    /// Opens or creates the journal of a state directory, which is created (mode 0700) if it is missing.
    ///
    /// # Errors
    /// See [`JournalError`]; a second process on the same directory is refused.
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        let path = directory.join(JOURNAL_FILE);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|error| from_io(&path, &error))?;
        let lock = lock(directory)?;
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
        let database = guarded(&path, || builder.create(&path).map_err(redb::Error::from))?;
        Self::with_tables(Self { database, path, _lock: Some(lock), failure: watch::Sender::new(None) })
    }

    /// Whether a process has the journal of a state directory open, and may be writing to it.
    pub fn is_in_use(directory: &Path) -> bool {
        // Opened only: where nobody ever began there is no lock.
        File::open(directory.join(LOCK_FILE)).is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// A journal on a storage backend of the caller's: in memory, or one that fails on purpose.
    ///
    /// # Errors
    /// As the backend fails.
    pub fn on_backend(backend: impl StorageBackend) -> Result<Self, JournalError> {
        let path = PathBuf::from("(backend)");
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        let database = guarded(&path, || builder.create_with_backend(backend).map_err(redb::Error::from))?;
        Self::with_tables(Self { database, path, _lock: None, failure: watch::Sender::new(None) })
    }

    /// A journal that forgets everything with the process, for simulations.
    ///
    /// # Errors
    /// None that is known.
    pub fn in_memory() -> Result<Self, JournalError> {
        Self::on_backend(redb::backends::InMemoryBackend::new())
    }

    fn with_tables(self) -> Result<Self, JournalError> {
        self.write(|transaction| {
            transaction.open_table(ENTRIES)?;
            transaction.open_table(VALUES)?;
            Ok(())
        })?;
        Ok(self)
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends inputs in order as one durable commit and gives the sequence number of the last. When this returns, they
    /// survive a power loss; when it fails, none of them is in the journal.
    ///
    /// # Errors
    /// See [`JournalError`].
    pub fn append<B: AsRef<[u8]>>(&self, batch: &[(u64, B)]) -> Result<u64, JournalError> {
        for (_, bytes) in batch {
            check_size(bytes.as_ref().len(), ENTRY_BYTES_MAX)?;
        }
        self.write(|transaction| {
            let mut entries = transaction.open_table(ENTRIES)?;
            let newest = entries.last()?.map(|(sequence, _)| sequence.value());
            let newest = match newest {
                Some(sequence) => sequence,
                None => transaction.open_table(VALUES)?.get(SNAPSHOT)?.map_or(0, |record| covered(record.value())),
            };
            let mut sequence = newest;
            for (now_ms, bytes) in batch {
                sequence += 1;
                entries.insert(sequence, record(*now_ms, sequence, bytes.as_ref()).as_slice())?;
            }
            Ok(sequence)
        })
    }

    /// Stores a snapshot of the state after all entries appended so far, and removes these entries, in one commit.
    ///
    /// # Errors
    /// See [`JournalError`]; the earlier snapshot and the entries then still stand.
    pub fn snapshot(&self, bytes: &[u8]) -> Result<(), JournalError> {
        check_size(bytes.len(), SNAPSHOT_BYTES_MAX)?;
        self.write(|transaction| {
            let mut entries = transaction.open_table(ENTRIES)?;
            let mut values = transaction.open_table(VALUES)?;
            let newest = entries.last()?.map(|(sequence, _)| sequence.value());
            let newest = match newest {
                Some(sequence) => sequence,
                None => values.get(SNAPSHOT)?.map_or(0, |record| covered(record.value())),
            };
            values.insert(SNAPSHOT, record(newest, 0, bytes).as_slice())?;
            entries.retain(|_, _| false)?;
            Ok(())
        })
    }

    /// Reads snapshot and entries back, checking each.
    ///
    /// # Errors
    /// See [`JournalError`].
    pub fn load(&self) -> Result<Loaded, JournalError> {
        let (snapshot, records) = self.read(|transaction| {
            let snapshot = transaction.open_table(VALUES)?.get(SNAPSHOT)?.map(|record| record.value().to_vec());
            let mut records = Vec::new();
            for item in transaction.open_table(ENTRIES)?.iter()? {
                let (sequence, record) = item?;
                records.push((sequence.value(), record.value().to_vec()));
            }
            Ok((snapshot, records))
        })?;
        let mut loaded = Loaded::default();
        let mut before = None;
        if let Some(record) = snapshot {
            before = Some(covered(&record));
            loaded.snapshot = Some(self.unpack(&record, 0, "the snapshot")?.1);
        }
        for (sequence, record) in records {
            if before.is_some_and(|before| sequence != before + 1) {
                return Err(self.damaged(format!("entry {sequence} does not follow entry {}", before.unwrap_or(0))));
            }
            let (now_ms, bytes) = self.unpack(&record, sequence, "an entry")?;
            loaded.entries.push(Entry { sequence, now_ms, bytes });
            before = Some(sequence);
        }
        Ok(loaded)
    }

    /// Whether no input and no snapshot was ever stored.
    ///
    /// # Errors
    /// See [`JournalError`].
    pub fn is_empty(&self) -> Result<bool, JournalError> {
        self.read(|transaction| {
            let has_snapshot = transaction.open_table(VALUES)?.get(SNAPSHOT)?.is_some();
            Ok(!has_snapshot && transaction.open_table(ENTRIES)?.first()?.is_none())
        })
    }

    /// Puts the journal of a state directory aside, under a name that says when, for a fresh one to begin. Nothing is deleted.
    ///
    /// # Errors
    /// See [`JournalError`].
    pub fn set_aside(self, now_ms: u64) -> Result<PathBuf, JournalError> {
        let Self { database, path, _lock, .. } = self;
        drop(database);
        let aside = path.with_file_name(format!("journal-until-{now_ms}.redb"));
        fs::rename(&path, &aside).map_err(|error| from_io(&path, &error))?;
        Ok(aside)
    }

    /// A value of the key/value table.
    ///
    /// # Errors
    /// See [`JournalError`].
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, JournalError> {
        let record = self.read(|transaction| Ok(transaction.open_table(VALUES)?.get(key)?.map(|record| record.value().to_vec())))?;
        record.map(|record| self.unpack(&record, 0, key).map(|(_, bytes)| bytes)).transpose()
    }

    /// Sets a value durably.
    ///
    /// # Errors
    /// See [`JournalError`].
    ///
    /// # Panics
    /// If the key starts with a slash: those are the journal's own.
    pub fn put(&self, key: &str, bytes: &[u8]) -> Result<(), JournalError> {
        assert!(!key.starts_with('/'), "keys that start with a slash are the journal's own");
        check_size(bytes.len(), ENTRY_BYTES_MAX)?;
        self.write(|transaction| {
            transaction.open_table(VALUES)?.insert(key, record(0, 0, bytes).as_slice())?;
            Ok(())
        })
    }

    /// Waits for the first call that failed, and gives why. From then on every call fails, also when the disk has room again: the file has
    /// to be opened anew, which is to say that the process has to end.
    pub async fn failed(&self) -> JournalError {
        let mut failure = self.failure.subscribe();
        // The sender lives as long as `self`, so waiting cannot fail.
        let known = failure.wait_for(Option::is_some).await.ok().and_then(|failure| failure.clone());
        match known {
            Some(error) => error,
            None => std::future::pending().await,
        }
    }

    fn note(&self, error: &JournalError) {
        self.failure.send_if_modified(|failure| failure.replace(error.clone()).is_none());
    }

    fn write<T>(&self, body: impl FnOnce(&redb::WriteTransaction) -> Result<T, redb::Error>) -> Result<T, JournalError> {
        guarded(&self.path, || {
            let transaction = self.database.begin_write()?;
            let value = body(&transaction)?;
            transaction.commit()?;
            Ok(value)
        })
        .inspect_err(|error| self.note(error))
    }

    fn read<T>(&self, body: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>) -> Result<T, JournalError> {
        guarded(&self.path, || body(&self.database.begin_read()?)).inspect_err(|error| self.note(error))
    }

    fn damaged(&self, reason: String) -> JournalError {
        JournalError::Damaged { path: self.path.clone(), reason }
    }

    /// The number and the content of a record whose check holds.
    fn unpack(&self, record: &[u8], sequence: u64, what: &str) -> Result<(u64, Vec<u8>), JournalError> {
        let Some((head, bytes)) = record.split_at_checked(RECORD_HEAD) else {
            return Err(self.damaged(format!("{what} is too short")));
        };
        let number = covered(head);
        if head[8..] != check(number, sequence, bytes) {
            return Err(self.damaged(format!("{what} does not match its check (sequence {sequence})")));
        }
        Ok((number, bytes.to_vec()))
    }
}

fn check_size(bytes: usize, limit: usize) -> Result<(), JournalError> {
    if bytes > limit { Err(JournalError::TooLarge { bytes, limit }) } else { Ok(()) }
}

/// `le64(number) ‖ check ‖ bytes`.
fn record(number: u64, sequence: u64, bytes: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(RECORD_HEAD + bytes.len());
    record.extend_from_slice(&number.to_le_bytes());
    record.extend_from_slice(&check(number, sequence, bytes));
    record.extend_from_slice(bytes);
    record
}

fn check(number: u64, sequence: u64, bytes: &[u8]) -> [u8; 8] {
    let digest = Digest::derive("quasar journal record", &[&number.to_le_bytes(), &sequence.to_le_bytes(), bytes]);
    let mut check = [0; 8];
    check.copy_from_slice(&digest.0[..8]);
    check
}

/// The leading number of a record, zero for a record that is too short (its check fails later).
fn covered(record: &[u8]) -> u64 {
    record.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Takes the directory's lock, or tells who holds it.
fn lock(directory: &Path) -> Result<File, JournalError> {
    let path = directory.join(LOCK_FILE);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|error| from_io(&path, &error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            // Only for the message: an unreadable number is no error of its own.
            let _ = file.read_to_string(&mut text);
            return Err(JournalError::InUse { directory: directory.to_owned(), holder: text.trim().parse().ok() });
        }
        Err(TryLockError::Error(error)) => return Err(from_io(&path, &error)),
    }
    file.set_len(0).and_then(|()| write!(file, "{}", std::process::id())).map_err(|error| from_io(&path, &error))?;
    Ok(file)
}

/// Runs a redb call. Debug builds of redb assert on damaged pages instead of returning an error, so a panic inside it is
/// read as damage; the journal is not used again after one.
fn guarded<T>(path: &Path, call: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, JournalError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(from_redb(path, error)),
        Err(_) => Err(JournalError::Damaged { path: path.to_owned(), reason: "its pages contradict each other".to_owned() }),
    }
}

fn from_redb(path: &Path, error: redb::Error) -> JournalError {
    match error {
        redb::Error::Io(error) => from_io(path, &error),
        redb::Error::Corrupted(reason) => JournalError::Damaged { path: path.to_owned(), reason },
        redb::Error::DatabaseAlreadyOpen => JournalError::InUse { directory: path.parent().unwrap_or(path).to_owned(), holder: None },
        redb::Error::UpgradeRequired(version) => {
            JournalError::Damaged { path: path.to_owned(), reason: format!("it has the old file format {version}") }
        }
        other => JournalError::Unusable { path: path.to_owned(), reason: other.to_string() },
    }
}

fn from_io(path: &Path, error: &std::io::Error) -> JournalError {
    let path = path.to_owned();
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => JournalError::DiskFull { path },
        ErrorKind::InvalidData | ErrorKind::UnexpectedEof => JournalError::Damaged { path, reason: error.to_string() },
        _ => JournalError::Unusable { path, reason: error.to_string() },
    }
}

#[cfg(test)]
mod tests;
