//! What store or disk cannot do once changes nothing of what comes out.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use daemon::Failure;
use futures::StreamExt;
use protocol::envelope::verify_as_stated;

use super::merges::write_base_tree;
use super::*;

/// How a call of the store ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Served,
    Refused,
    /// It is carried out, and its answer is lost.
    Unheard,
}

/// A store that asks about the fate of each call, by its key.
struct Fickle<F> {
    inner: MemoryStore,
    fate: F,
}

impl<F: Fn(&str) -> Fate> Fickle<F> {
    async fn call<T>(&self, key: &str, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let fate = (self.fate)(key);
        let unavailable = StoreError::Unavailable { key: key.to_owned(), reason: format!("{fate:?}") };
        if fate == Fate::Refused {
            return Err(unavailable);
        }
        let answer = call.await;
        if fate == Fate::Unheard { Err(unavailable) } else { answer }
    }
}

#[async_trait::async_trait]
impl<F: Fn(&str) -> Fate + Send + Sync + 'static> ObjectStore for Fickle<F> {
    async fn get_if_changed(&self, key: &str, etag: Option<&str>, limit: u64) -> Result<Option<storage::Object>, StoreError> {
        self.call(key, self.inner.get_if_changed(key, etag, limit)).await
    }

    async fn get_range(&self, key: &str, start: u64, end: u64) -> Result<Bytes, StoreError> {
        self.call(key, self.inner.get_range(key, start, end)).await
    }

    async fn head(&self, key: &str) -> Result<storage::ObjectMeta, StoreError> {
        self.call(key, self.inner.head(key)).await
    }

    async fn put(&self, key: &str, bytes: Bytes, condition: PutCondition) -> Result<String, StoreError> {
        self.call(key, self.inner.put(key, bytes, condition)).await
    }

    async fn put_file(&self, key: &str, path: &Path, file: &FileRecord) -> Result<(), StoreError> {
        self.call(key, self.inner.put_file(key, path, file)).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<storage::ObjectMeta>, StoreError> {
        self.call(prefix, self.inner.list(prefix)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.call(key, self.inner.delete(key)).await
    }

    fn presign(&self, request: &storage::Presign) -> Result<protocol::GrantRequest, StoreError> {
        self.inner.presign(request)
    }
}

impl Bucket {
    /// What lies there: of documents what they say, without times and numbers, and of all else the bytes. The writer lease says how often
    /// it was renewed.
    async fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let lease = Keys::new(NETUID).run(self.context.run).writer_lease();
        let mut contents = BTreeMap::new();
        for (key, _) in self.objects().await.into_iter().filter(|(key, _)| *key != lease) {
            let bytes = self.store.get(&key, u64::MAX).await.unwrap().bytes;
            let content = verify_as_stated(&bytes).map_or_else(|_| bytes.to_vec(), |(envelope, _)| envelope.payload);
            contents.insert(key, content);
        }
        contents
    }
}

/// Claims the run and goes on from the bucket. A process that cannot ends, and is started again.
async fn begin(bucket: &Bucket, service: &Service, journal: &Arc<Journal>) -> Head {
    loop {
        let begun = async {
            let head = service.claim_head(service.fence.epoch().await).await?;
            takeover::recover(service, journal, head.clone(), bucket.fresh()).await?;
            Ok::<_, Failure>(head)
        };
        match begun.await {
            Ok(head) => return head,
            Err(failure) => assert_eq!(failure.exit, Exit::Unavailable, "{failure}"),
        }
    }
}

/// Some work of an orchestrator from its claim to a release, in which call number `failing` has this fate. Gives the number of calls, and
/// what lies in the bucket then.
async fn work(failing: usize, fate: Fate) -> (usize, BTreeMap<String, Vec<u8>>) {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let rows = vec![RowRange { shard: "a".into(), start: 0, end: 96 }];
    let id = 1 << LEASE_EPOCH_SHIFT;
    let lease = Lease { id, rows, seed: Digest::ZERO, batch_rows: 4, steps: 24, schedule_start: 0, deadline_ms: 0 };
    let job = Job { hotkey: miner(11), slot: 0, session_epoch: 7, leases: vec![lease] };
    let (calls, counts) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let fates = {
        let (calls, counts, record) = (calls.clone(), counts.clone(), Keys::new(NETUID).run(bucket.context.run).lease(id));
        move |key: &str| {
            // A successor looks for a thousand records of leases that are not there: one look is like the other.
            let is_another = key.contains("/leases/") && key != record;
            let is_counted = counts.load(Ordering::Relaxed) && !is_another;
            if is_counted && calls.fetch_add(1, Ordering::Relaxed) == failing { fate } else { Fate::Served }
        }
    };
    let store = Arc::new(Fickle { inner: bucket.store.clone(), fate: fates });
    let journal = Arc::new(Journal::in_memory().unwrap());
    // Nobody renews it here.
    let long = LEASE * 300;
    let (service, journal) = bucket.with_journal(store, folder.path(), journal, [[1; 16], [101; 16]], long).await;
    write_base_tree(&service.base_tree);
    let tape = bucket.tape(0, 0, 1, &[11, 12]).await;

    counts.store(true, Ordering::Relaxed);
    let head = begin(&bucket, &service, &journal).await;
    let tape = service.write_tape(&tape).await;
    let (manifest, _, length) = service.merge(tape, Vec::new(), (Digest::ZERO, 0)).await;
    let mut next = Head { outer_step: 1, closed_below: 1, ..head };
    next.fragments[0] = FragmentHead { version: manifest.version, length, digest: manifest.keyframe };
    service.publish_head(&next).await;
    service.publish_job(1, &job).await;
    service.release(vec![1, 0], 1_000).await;
    assert_eq!(*service.stopped.lock().unwrap(), None);
    (calls.load(Ordering::Relaxed), bucket.contents().await)
}

#[tokio::test]
async fn whichever_call_of_the_store_fails_once_the_bucket_holds_the_same_in_the_end() {
    let (calls, expected) = work(usize::MAX, Fate::Served).await;
    assert!(calls > 20, "{calls} calls");
    let plans = (0..calls).flat_map(|call| [(call, Fate::Refused), (call, Fate::Unheard)]);
    // Beside each other, because each waits before it tries again.
    let mut runs = futures::stream::iter(plans)
        .map(|(call, fate)| async move {
            let patience = Duration::from_secs(120);
            (call, fate, tokio::time::timeout(patience, work(call, fate)).await)
        })
        .buffer_unordered(8);
    while let Some((call, fate, run)) = runs.next().await {
        let (_, contents) = run.unwrap_or_else(|_| panic!("call {call} {fate:?}: the work never ends"));
        let keys = contents.keys().chain(expected.keys());
        let different: Vec<&String> = keys.filter(|key| contents.get(*key) != expected.get(*key)).collect();
        assert!(different.is_empty(), "call {call} {fate:?}: {different:?}");
    }
}

#[tokio::test]
async fn an_upload_that_the_disk_here_does_not_give_back_is_fetched_again_and_judged_by_its_bytes_alone() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let input = bucket.tape(0, 0, 1, &[11]).await.inputs.remove(0);
    let slot = (input.hotkey, input.slot);
    let key = service.run.payload(&slot.0, slot.1, 0);
    let mut bytes = bucket.store.get(&key, 1 << 20).await.unwrap().bytes.to_vec();
    let commitment = Commitment {
        t: 0,
        fragment: 0,
        base_version: 0,
        length: input.length,
        sha256: Digest::sha256(&bytes),
        blake3: Digest::blake3(&bytes),
        steps: 4,
        tokens: 2_048,
        lease: 1,
        lease_step: 4,
        local_step: 4,
        start_step: 0,
        start_digest: Digest::ZERO,
        step_chain: Digest::ZERO,
    };
    let reads = Arc::new(AtomicUsize::new(0));
    let fate = {
        let (reads, key, partial) = (reads.clone(), key.clone(), folder.path().join(format!("payloads/0/{}-{}.part", slot.0, slot.1)));
        move |of: &str| {
            // Behind the length comes the only piece. What is written of it the first time is gone when it is looked for.
            if of == key && reads.fetch_add(1, Ordering::Relaxed) == 1 {
                std::fs::remove_file(&partial).unwrap();
                std::os::unix::fs::symlink("nowhere", &partial).unwrap();
            }
            Fate::Served
        }
    };
    let service = with_store(service, Arc::new(Fickle { inner: bucket.store.clone(), fate }));
    assert_eq!(service.check_payload(slot, 0, &commitment).await, Reason::None);
    assert_eq!(reads.load(Ordering::Relaxed), 4, "it was fetched twice");
    // Other bytes than committed are refused at once.
    *bytes.last_mut().unwrap() ^= 1;
    bucket.put(&key, bytes).await;
    assert_eq!(service.check_payload(slot, 0, &commitment).await, Reason::DigestMismatch);
    assert_eq!(reads.load(Ordering::Relaxed), 6);
}
