use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redb::backends::InMemoryBackend;

use super::*;

fn entry(sequence: u64, now_ms: u64, bytes: &[u8]) -> Entry {
    Entry { sequence, now_ms, bytes: bytes.to_vec() }
}

#[test]
fn what_was_appended_is_loaded_in_order_by_the_next_process() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(directory.path()).unwrap();
    assert_eq!(journal.append(&[(5, b"a".as_slice()), (5, b"b")]).unwrap(), 2);
    assert_eq!(journal.append(&[(9, b"")]).unwrap(), 3);
    drop(journal);
    let loaded = Journal::open(directory.path()).unwrap().load().unwrap();
    assert_eq!(loaded, Loaded { snapshot: None, entries: vec![entry(1, 5, b"a"), entry(2, 5, b"b"), entry(3, 9, b"")] });
}

#[test]
fn a_snapshot_replaces_the_entries_before_it_and_numbering_goes_on() {
    let journal = Journal::in_memory().unwrap();
    journal.append(&[(1, b"a"), (2, b"b")]).unwrap();
    journal.snapshot(b"state").unwrap();
    assert_eq!(journal.append(&[(3, b"c")]).unwrap(), 3);
    let loaded = journal.load().unwrap();
    assert_eq!(loaded, Loaded { snapshot: Some(b"state".to_vec()), entries: vec![entry(3, 3, b"c")] });
    journal.snapshot(b"").unwrap();
    journal.snapshot(b"newer").unwrap();
    assert_eq!(journal.append(&[(4, b"d")]).unwrap(), 4);
    assert_eq!(journal.load().unwrap().snapshot.as_deref(), Some(b"newer".as_slice()));
}

#[test]
fn values_survive_and_do_not_mix_with_the_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(directory.path()).unwrap();
    assert_eq!(journal.get("sequence/progress").unwrap(), None);
    journal.put("sequence/progress", &7_u64.to_le_bytes()).unwrap();
    journal.snapshot(b"state").unwrap();
    drop(journal);
    let journal = Journal::open(directory.path()).unwrap();
    assert_eq!(journal.get("sequence/progress").unwrap(), Some(7_u64.to_le_bytes().to_vec()));
}

#[test]
fn a_second_holder_of_the_state_directory_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let first = Journal::open(directory.path()).unwrap();
    let Err(error) = Journal::open(directory.path()) else { panic!("opened twice") };
    assert!(matches!(&error, JournalError::InUse { holder: Some(pid), .. } if *pid == std::process::id()), "{error}");
    assert!(error.to_string().contains("hint: stop the other process"));
    assert_eq!(error.exit(), crate::Exit::TryLater);
    drop(first);
    Journal::open(directory.path()).unwrap();
}

#[test]
fn a_record_over_the_limit_is_refused_before_it_is_written() {
    let journal = Journal::in_memory().unwrap();
    let bytes = vec![0; ENTRY_BYTES_MAX + 1];
    assert!(matches!(journal.append(&[(1, bytes.as_slice())]), Err(JournalError::TooLarge { .. })));
    assert!(matches!(journal.put("k", &bytes), Err(JournalError::TooLarge { .. })));
    assert_eq!(journal.load().unwrap(), Loaded::default());
}

#[test]
fn a_file_that_is_no_journal_is_damaged_with_a_hint() {
    for bytes in [vec![7; 5], vec![0; 8192], b"not a journal at all".repeat(1000)] {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(JOURNAL_FILE), &bytes).unwrap();
        let Err(error) = Journal::open(directory.path()) else { panic!("opened {} bytes of nonsense", bytes.len()) };
        assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("hint: move the file away"));
    }
}

#[test]
fn a_cut_or_altered_file_is_damaged_or_still_holds_exactly_what_was_accepted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(JOURNAL_FILE);
    let journal = Journal::open(directory.path()).unwrap();
    let batch: Vec<(u64, Vec<u8>)> = (0..64).map(|i| (i, vec![i as u8; 900])).collect();
    journal.append(&batch).unwrap();
    journal.snapshot(b"the state").unwrap();
    journal.append(&batch).unwrap();
    let expected = journal.load().unwrap();
    drop(journal);
    let whole = fs::read(&path).unwrap();
    let mut damaged = 0;
    for step in 1..48 {
        let at = whole.len() * step / 48;
        let mut altered = whole.clone();
        if step % 2 == 0 {
            altered.truncate(at);
        } else {
            altered[at] ^= 0x10;
        }
        fs::write(&path, &altered).unwrap();
        match Journal::open(directory.path()).and_then(|journal| journal.load()) {
            Ok(loaded) => assert_eq!(loaded, expected, "byte {at}"),
            Err(JournalError::Damaged { .. } | JournalError::Unusable { .. }) => damaged += 1,
            Err(other) => panic!("byte {at}: {other}"),
        }
    }
    assert!(damaged > 20, "only {damaged} of 47 changes were noticed");
}

/// A disk that fills up when it is told to.
#[derive(Debug)]
struct Filling {
    inner: InMemoryBackend,
    full: Arc<AtomicBool>,
}

impl Filling {
    fn check(&self) -> Result<(), std::io::Error> {
        if self.full.load(Ordering::SeqCst) {
            return Err(std::io::Error::from(ErrorKind::StorageFull));
        }
        Ok(())
    }
}

impl StorageBackend for Filling {
    fn len(&self) -> Result<u64, std::io::Error> {
        self.inner.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
        self.inner.read(offset, out)
    }
    fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
        self.check()?;
        self.inner.set_len(len)
    }
    fn sync_data(&self) -> Result<(), std::io::Error> {
        self.check()?;
        self.inner.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
        self.check()?;
        self.inner.write(offset, data)
    }
}

#[test]
fn a_full_disk_is_an_error_of_its_own_and_nothing_of_the_batch_is_kept() {
    let full = Arc::new(AtomicBool::new(false));
    let journal = Journal::on_backend(Filling { inner: InMemoryBackend::new(), full: full.clone() }).unwrap();
    journal.append(&[(1, b"a")]).unwrap();
    full.store(true, Ordering::SeqCst);
    let error = journal.append(&[(2, b"b")]).unwrap_err();
    assert!(matches!(error, JournalError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("hint: free space"));
    assert_eq!(error.exit(), crate::Exit::Unavailable);
    full.store(false, Ordering::SeqCst);
    // Whatever redb allows after the failure, the entry that was refused is not among the accepted ones.
    if let Ok(loaded) = journal.load() {
        assert_eq!(loaded.entries, vec![entry(1, 1, b"a")]);
    }
}

#[tokio::test]
async fn whoever_waits_hears_of_the_first_call_that_failed_and_nobody_of_what_was_refused() {
    let full = Arc::new(AtomicBool::new(false));
    let journal = Journal::on_backend(Filling { inner: InMemoryBackend::new(), full: full.clone() }).unwrap();
    let hears = async || tokio::time::timeout(std::time::Duration::from_millis(20), journal.failed()).await.ok();
    assert!(journal.put("k", &vec![0; ENTRY_BYTES_MAX + 1]).is_err());
    assert!(hears().await.is_none(), "too large a record is no failure of the journal");
    full.store(true, Ordering::SeqCst);
    assert!(journal.put("k", b"v").is_err());
    full.store(false, Ordering::SeqCst);
    assert!(matches!(hears().await, Some(JournalError::DiskFull { .. })));
    assert!(matches!(hears().await, Some(JournalError::DiskFull { .. })), "also who comes later");
}
