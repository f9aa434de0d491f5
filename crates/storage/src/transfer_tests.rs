//! Tests of resumable downloads against sources that fail in every way.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// Serves bytes and counts reads; fails the read with the given number.
struct Scripted {
    bytes: Bytes,
    reads: AtomicUsize,
    fail_at: Option<(usize, SourceError)>,
    damage_at: Option<usize>,
}

impl Scripted {
    fn new(bytes: &[u8]) -> Self {
        Self { bytes: Bytes::copy_from_slice(bytes), reads: AtomicUsize::new(0), fail_at: None, damage_at: None }
    }

    fn reads(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl RangeSource for Scripted {
    async fn read(&self, start: u64, end: u64) -> Result<Bytes, SourceError> {
        let number = self.reads.fetch_add(1, Ordering::SeqCst);
        match &self.fail_at {
            Some((at, error)) if number >= *at => return Err(error.clone()),
            _ => {}
        }
        let mut bytes = self.bytes.slice(start as usize..end as usize).to_vec();
        if self.damage_at == Some(number) {
            bytes[0] ^= 1;
        }
        Ok(bytes.into())
    }
}

const CHUNK: u64 = 1000;

fn sample(length: usize) -> (Vec<u8>, FileRecord) {
    let bytes: Vec<u8> = (0..length).map(|index| (index * 31 % 251) as u8).collect();
    let record = FileRecord {
        path: "sample".into(),
        length: length as u64,
        sha256: Digest::sha256(&bytes),
        blake3: Digest::blake3(&bytes),
        chunk_bytes: CHUNK,
        chunks: bytes.chunks(CHUNK as usize).map(Digest::blake3).collect(),
    };
    (bytes, record)
}

fn files_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn files_of_every_length_arrive_whole_and_leave_nothing_beside_them() {
    let folder = tempfile::tempdir().unwrap();
    for length in [0, 1, 999, 1000, 1001, 10_500] {
        let (bytes, record) = sample(length);
        let dest = folder.path().join(format!("new/{length}"));
        let result = download(&Scripted::new(&bytes), &record, &dest).await.unwrap();
        assert_eq!(result, Downloaded { fetched_bytes: length as u64, kept_bytes: 0 });
        assert_eq!(fs::read(&dest).unwrap(), bytes);
        let source = Scripted::new(&bytes);
        assert_eq!(download(&source, &record, &dest).await.unwrap().kept_bytes, length as u64);
        assert_eq!(source.reads(), 0, "a complete file is not fetched again");
    }
    assert_eq!(files_in(&folder.path().join("new")).len(), 6);
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let dest = folder.path().join("f");
    let (bytes, record) = sample(20_000);
    let source = Scripted { fail_at: Some((12, SourceError::Expired)), ..Scripted::new(&bytes) };
    assert!(matches!(download(&source, &record, &dest).await, Err(TransferError::Expired { .. })));
    assert_eq!(files_in(folder.path()), ["f.part", "f.part.map"]);

    let source = Scripted::new(&bytes);
    let result = download(&source, &record, &dest).await.unwrap();
    assert!(result.kept_bytes >= 8 * CHUNK && result.kept_bytes <= 12 * CHUNK, "{result:?}");
    assert_eq!(source.reads() as u64, result.fetched_bytes / CHUNK);
    assert_eq!(fs::read(&dest).unwrap(), bytes);
    assert_eq!(files_in(folder.path()), ["f"]);
}

#[tokio::test]
async fn chunks_that_the_map_claims_are_believed_only_if_their_digest_holds() {
    let folder = tempfile::tempdir().unwrap();
    let dest = folder.path().join("f");
    let (bytes, record) = sample(5_000);
    // A crash left a map that claims all five chunks, over bytes with one torn chunk and a missing tail.
    let mut torn = bytes[..4_500].to_vec();
    torn[1_234] ^= 1;
    fs::write(beside(&dest, ".part"), &torn).unwrap();
    let mut map = map_header(&record).0.to_vec();
    map.push(0b1_1111);
    fs::write(beside(&dest, ".part.map"), map).unwrap();
    let source = Scripted::new(&bytes);
    let result = download(&source, &record, &dest).await.unwrap();
    assert_eq!((result.kept_bytes, source.reads()), (3_000, 2));
    assert_eq!(fs::read(&dest).unwrap(), bytes);
}

#[tokio::test]
async fn a_map_of_another_version_of_the_file_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let dest = folder.path().join("f");
    let (_, old) = sample(9_000);
    let (bytes, record) = sample(2_500);
    fs::write(beside(&dest, ".part"), vec![0; 9_000]).unwrap();
    let mut map = map_header(&old).0.to_vec();
    map.extend([0xff, 0xff]);
    fs::write(beside(&dest, ".part.map"), map).unwrap();
    assert_eq!(download(&Scripted::new(&bytes), &record, &dest).await.unwrap().fetched_bytes, 2_500);
    assert_eq!(fs::read(&dest).unwrap(), bytes);
}

#[tokio::test]
async fn a_damaged_chunk_is_asked_for_again_once_and_then_named() {
    let folder = tempfile::tempdir().unwrap();
    let (bytes, record) = sample(3_000);
    let source = Scripted { damage_at: Some(1), ..Scripted::new(&bytes) };
    download(&source, &record, &folder.path().join("a")).await.unwrap();
    assert_eq!(source.reads(), 4);

    let mut other = bytes.clone();
    other[2_500] ^= 1;
    let error = download(&Scripted::new(&other), &record, &folder.path().join("b")).await.unwrap_err();
    assert!(matches!(error, TransferError::Corrupt { chunk: 2, .. }));
    assert!(!folder.path().join("b").exists());
}

#[tokio::test]
async fn records_that_contradict_themselves_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (bytes, record) = sample(3_000);
    let bad = [
        FileRecord { chunk_bytes: 0, ..record.clone() },
        FileRecord { chunk_bytes: u64::MAX, chunks: record.chunks[..1].to_vec(), ..record.clone() },
        FileRecord { length: 9_999, ..record.clone() },
        FileRecord { blake3: Digest::ZERO, ..record },
    ];
    for record in bad {
        let result = download(&Scripted::new(&bytes), &record, &folder.path().join("f")).await;
        assert!(matches!(result, Err(TransferError::BadRecord { .. })), "{record:?}");
        assert!(!folder.path().join("f").exists());
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_full_disk_is_an_error_of_its_own_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let dest = folder.path().join("f");
    let (bytes, record) = sample(3_000);
    // Every write to this device fails as on a full disk.
    std::os::unix::fs::symlink("/dev/full", beside(&dest, ".part")).unwrap();
    let error = download(&Scripted::new(&bytes), &record, &dest).await.unwrap_err();
    assert!(matches!(error, TransferError::DiskFull { .. }), "{error:?}");
    assert!(error.to_string().contains("hint:"));
    assert!(!dest.exists());
}

#[tokio::test]
async fn two_downloads_to_the_same_file_do_not_mix() {
    let folder = tempfile::tempdir().unwrap();
    let dest = folder.path().join("f");
    let (bytes, record) = sample(3_000);
    let _first = Partial::open(record.clone(), dest.clone()).unwrap();
    let second = download(&Scripted::new(&bytes), &record, &dest).await;
    assert!(matches!(second, Err(TransferError::Busy { .. })));
}

#[tokio::test]
async fn an_expired_grant_is_replaced_by_the_next_without_starting_over() {
    use crate::{MemoryGrants, MemoryStore, Presign, PutCondition};
    let folder = tempfile::tempdir().unwrap();
    let (bytes, record) = sample(3_000);
    let store = MemoryStore::new();
    store.put("k", bytes.clone().into(), PutCondition::Always).await.unwrap();
    let grant = |now_ms| store.presign(&Presign::Get { key: "k".into(), now_ms, expires_in_ms: 60_000 }).unwrap();
    let access = MemoryGrants::new(store.clone(), || 1_000_000);
    let (sender, receiver) = watch::channel(grant(0));
    let source = RenewedSource::new(access.clone(), receiver.clone(), Duration::from_secs(10));
    let dest = folder.path().join("f");
    let (result, ()) = tokio::join!(download(&source, &record, &dest), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        sender.send(grant(990_000)).unwrap();
    });
    assert_eq!(result.unwrap().fetched_bytes, 3_000);

    let old = (access, grant(0));
    assert!(matches!(download(&old, &record, &folder.path().join("g")).await, Err(TransferError::Expired { .. })));
    let by_key = (&store, "k");
    assert_eq!(download(&by_key, &record, &folder.path().join("g")).await.unwrap().fetched_bytes, 3_000);
}
