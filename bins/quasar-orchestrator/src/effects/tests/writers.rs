//! Writers beside each other: leases that are lost, and what they were about to write.

use storage::Presign;

use super::*;
use crate::machine::{Key, Want};

#[tokio::test]
async fn a_writer_that_lost_its_lease_never_moves_the_head_again() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (first, journal) = bucket.orchestrator(folder.path()).await;
    let claimed = first.claim_head(first.fence.epoch().await).await.unwrap();
    assert_eq!(claimed.epoch, 1);
    first.publish_head(&Head { outer_step: 3, ..claimed.clone() }).await;
    drop(journal);
    // The same disk in a new process, while the old one still runs somewhere: a paused virtual machine.
    let journal_of = folder.path().join("twin");
    std::fs::create_dir_all(&journal_of).unwrap();
    let (second, _journal) = bucket.orchestrator(&journal_of).await;
    let taken = second.claim_head(second.fence.epoch().await).await.unwrap();
    assert_eq!((taken.epoch, taken.outer_step), (2, 3), "what the first one wrote until then stands");
    second.publish_head(&Head { outer_step: 4, ..taken }).await;

    let key = first.run.head();
    let before = bucket.store.get(&key, 1 << 20).await.unwrap().bytes;
    let late = Head { outer_step: 99, ..claimed };
    let write = first.publish_head(&late);
    assert!(tokio::time::timeout(Duration::from_secs(1), write).await.is_err(), "it waits for ever, and stops");
    assert_eq!(bucket.store.get(&key, 1 << 20).await.unwrap().bytes, before);
    assert!(first.fence.renew().await.is_err() && !second.fence.is_lost());
    assert!(
        tokio::time::timeout(Duration::from_secs(1), first.put_latest("quasar/job", 1, || Ok(Bytes::from_static(b"x")))).await.is_err()
    );
    assert!(matches!(bucket.store.head("quasar/job").await, Err(StoreError::NotFound { .. })));
}

/// A store that answers questions about one key only once it is told to, and fails the next so many reads and writes of
/// leases.
pub(super) struct Slow {
    inner: MemoryStore,
    key: String,
    pub failing: std::sync::atomic::AtomicU32,
    asked: tokio::sync::Notify,
    go_on: tokio::sync::Notify,
}

impl Slow {
    pub(super) fn new(bucket: &Bucket, key: &str) -> Self {
        Self {
            inner: bucket.store.clone(),
            key: key.to_owned(),
            failing: Default::default(),
            asked: Default::default(),
            go_on: Default::default(),
        }
    }

    fn answers(&self, key: &str) -> Result<(), StoreError> {
        let left = |failing: u32| failing.checked_sub(1);
        if key.ends_with("writer.qsr") && self.failing.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).is_ok() {
            return Err(StoreError::Unavailable { key: key.to_owned(), reason: "no answer".into() });
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl ObjectStore for Slow {
    async fn get_if_changed(&self, key: &str, etag: Option<&str>, limit: u64) -> Result<Option<storage::Object>, StoreError> {
        if key == self.key {
            self.asked.notify_one();
            self.go_on.notified().await;
        }
        self.answers(key)?;
        self.inner.get_if_changed(key, etag, limit).await
    }

    async fn get_range(&self, key: &str, start: u64, end: u64) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, start, end).await
    }

    async fn head(&self, key: &str) -> Result<storage::ObjectMeta, StoreError> {
        self.inner.head(key).await
    }

    async fn put(&self, key: &str, bytes: Bytes, condition: PutCondition) -> Result<String, StoreError> {
        self.answers(key)?;
        self.inner.put(key, bytes, condition).await
    }

    async fn put_file(&self, key: &str, path: &Path, file: &FileRecord) -> Result<(), StoreError> {
        self.inner.put_file(key, path, file).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<storage::ObjectMeta>, StoreError> {
        self.inner.list(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner.delete(key).await
    }

    fn presign(&self, request: &storage::Presign) -> Result<protocol::GrantRequest, StoreError> {
        self.inner.presign(request)
    }
}

#[tokio::test]
async fn a_writer_that_slept_while_it_looked_at_a_key_overwrites_nothing_of_its_successor() {
    const KEY: &str = "quasar/job";
    let (bucket, folder, other) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, _journal) = bucket.orchestrator(folder.path()).await;
    let slow = Arc::new(Slow::new(&bucket, KEY));
    let first = Arc::new(with_store(first, slow.clone()));
    let writing = tokio::spawn({
        let first = first.clone();
        async move { first.put_latest(KEY, 1, || Ok(Bytes::from_static(b"old"))).await }
    });
    slow.asked.notified().await;
    // It held the lease when it asked; nobody renews it, and the successor writes there.
    let (second, _journal) = bucket.orchestrator(other.path()).await;
    second.put_latest(KEY, 1, || Ok(Bytes::from_static(b"new"))).await;
    slow.go_on.notify_one();
    assert!(tokio::time::timeout(Duration::from_secs(1), writing).await.is_err(), "it waits for a lease that never comes back");
    assert_eq!(bucket.store.get(KEY, 16).await.unwrap().bytes, "new");
}

#[tokio::test]
async fn what_a_writer_signs_follows_what_its_predecessor_signed_with_a_clock_that_was_ahead() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (writer, _journal) = bucket.orchestrator(folder.path()).await;
    let job = |leases| Job { hotkey: miner(5), slot: 0, session_epoch: 1, leases };
    let key = writer.run.job(&miner(5), 0);
    let ahead_ms = daemon::clock::now_ms() + 600_000;
    let theirs = sign(&job(Vec::new()), &bucket.context, &*bucket.signer, ahead_ms, ahead_ms);
    bucket.store.put(&key, Bytes::from(theirs), PutCondition::Always).await.unwrap();
    writer.publish_job(1, &job(Vec::new())).await;
    let ours = writer.open_own::<Job>(&bucket.store.get(&key, 1 << 20).await.unwrap().bytes).unwrap();
    assert!(ours.header.sequence > ahead_ms, "{} after {ahead_ms}", ours.header.sequence);
}

#[tokio::test]
async fn a_lease_is_confirmed_by_the_store_and_not_by_its_silence() {
    let (bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let slow = Arc::new(Slow::new(&bucket, ""));
    let settings = |store: Arc<dyn ObjectStore>, folder: &Path| FenceSettings {
        store,
        key: Keys::new(NETUID).run(bucket.context.run).writer_lease(),
        context: bucket.context,
        signer: bucket.signer.clone(),
        roots: bucket.roots(),
        sequence: Arc::new(Sequence::open(Arc::new(Journal::open(folder).unwrap()), "orchestrator").unwrap()),
        instances: [[1; 16], [101; 16]],
        host: "host".into(),
        lease: LEASE,
    };
    let acquire = async |settings| Fence::acquire(settings, Wait::Standby, &Shutdown::new()).await.unwrap().unwrap();
    let first = acquire(settings(slow.clone(), one.path())).await;
    let second = acquire(settings(Arc::new(bucket.store.clone()), two.path())).await;
    slow.failing.store(3, Ordering::Relaxed);
    assert_eq!(first.renew().await, Ok(()), "nobody has said anything");
    assert_eq!(first.confirm().await, Err(Lost));
    assert_eq!(second.confirm().await, Ok(()));
}

#[tokio::test]
async fn the_log_does_not_fork_where_two_writers_add_to_it() {
    let entries = |numbers: &[u8]| -> Vec<LogEntry> {
        numbers.iter().map(|number| LogEntry { kind: LogKind::Merge, document: Digest::blake3(&[*number]) }).collect()
    };
    let after = |before: &Frontier, numbers: &[u8]| {
        let entries = entries(numbers);
        LogHead { previous: before.size(), frontier: before.extended(&entries), entries }
    };
    let (bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, _journal) = bucket.orchestrator(one.path()).await;
    let old = after(&Frontier::default(), &[1, 2]);
    assert_eq!(first.publish_log(&old).await, old);
    // The successor has read the bucket before that, and would go on from there with fewer entries.
    let (second, _journal) = bucket.orchestrator(two.path()).await;
    assert_eq!(second.publish_log(&after(&Frontier::default(), &[3])).await, old, "what follows is fixed");
    assert!(matches!(bucket.store.head(&second.run.log(1)).await, Err(StoreError::NotFound { .. })));
    // One that was fixed by a writer that died before it showed it is shown by whoever comes next.
    let fixed = after(&old.frontier, &[4, 5]);
    bucket.publish(&second.run.log_after(2), &fixed).await;
    assert_eq!(second.publish_log(&after(&old.frontier, &[6])).await, fixed);
    assert!(bucket.store.head(&second.run.log(4)).await.is_ok());
}

#[tokio::test]
async fn an_orchestrator_stops_when_another_run_is_current_and_leaves_the_pointer_alone() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let (key, outside) = (Keys::new(NETUID).current(), bucket.context.without_run());
    service.publish_current().await;
    service.publish_current().await;
    assert!(service.stopped.lock().unwrap().is_none(), "its own pointer is renewed");
    let other = CurrentRun { run: RunId([9; 16]), ..service.current.clone() };
    let pointer = sign(&other, &outside, &*bucket.signer, 1, 1);
    bucket.put(&key, pointer.clone()).await;
    service.publish_current().await;
    assert_eq!(*service.stopped.lock().unwrap(), Some(Stop::OtherRun));
    assert_eq!(bucket.store.get(&key, 1 << 20).await.unwrap().bytes, pointer);
}

#[tokio::test]
async fn a_lease_whose_number_somebody_else_has_used_is_told_to_nobody() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let rows = vec![RowRange { shard: "a".into(), start: 0, end: 96 }];
    let lease = Lease { id: 7, rows, seed: Digest::ZERO, batch_rows: 4, steps: 24, schedule_start: 0, deadline_ms: 0 };
    let job = |lease| Job { hotkey: miner(5), slot: 0, session_epoch: 1, leases: vec![lease] };
    let record = service.run.lease(7);
    bucket.publish(&record, &job(Lease { steps: 12, ..lease.clone() })).await;
    let before = bucket.objects().await;
    let why = stops(&service, service.publish_job(1, &job(lease))).await;
    assert!(why.contains(&record) && why.contains("hint:"), "{why}");
    assert_eq!(bucket.objects().await, before);
}

#[tokio::test]
async fn a_large_part_of_an_opening_is_granted_volume_by_volume_and_all_else_with_its_digest() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let (slot, audit, sha256) = ((AccountId([7; 32]), 1), Digest::blake3(b"audit"), Digest::sha256(b"bytes"));
    let wants = |key, length| service.presign_of(&Want::WriteOnce { key, length, sha256 }, 10, 1_000);
    let put = |request: &Presign| match request {
        Presign::Put { key, length, sha256, if_absent: true, .. } => (key.rsplit_once('/').unwrap().1.to_owned(), *length, *sha256),
        other => panic!("{other:?}"),
    };
    let part = |length| -> Vec<_> { wants(Key::Opening { slot, audit, part: 1 }, length).iter().map(put).collect() };
    assert_eq!(part(10), [("1".to_owned(), 10, Some(sha256))]);
    assert_eq!(part(25), [("1".to_owned(), 10, None), ("1.1".to_owned(), 10, None), ("1.2".to_owned(), 5, None)]);
    assert_eq!(put(&wants(Key::Payload { slot, t: 3 }, 25)[0]).1, 25);
}
