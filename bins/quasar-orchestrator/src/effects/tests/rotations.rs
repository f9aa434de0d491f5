//! A rotation of the orchestrator's key: who goes on, who ends, and which numbers count.

use std::time::Instant;

use daemon::Failure;

use super::writers::Slow;
use super::*;

fn key(seed: u8) -> Arc<Ed25519Signer> {
    Arc::new(Ed25519Signer::from_seed([seed; 32]))
}

impl Bucket {
    /// What a process with this key and a journal of its own takes the lease with.
    fn settings(&self, store: Arc<dyn ObjectStore>, signer: Arc<Ed25519Signer>, instance: u8) -> FenceSettings {
        FenceSettings {
            store,
            key: Keys::new(NETUID).run(self.context.run).writer_lease(),
            context: self.context,
            signer,
            roots: self.roots(),
            sequence: Arc::new(Sequence::open(Arc::new(Journal::in_memory().unwrap()), "orchestrator").unwrap()),
            instances: [[instance; 16], [instance + 100; 16]],
            host: format!("host-{instance}"),
            lease: LEASE,
        }
    }

    async fn take(&self, signer: Arc<Ed25519Signer>, instance: u8, wait: Wait) -> Result<Fence, Failure> {
        Ok(Fence::acquire(self.settings(self.store(), signer, instance), wait, &Shutdown::new()).await?.unwrap())
    }

    /// The owner names another key in the second root.
    async fn rotate_to(&self, orchestrator: KeyRef) -> Digest {
        let first = self.store.get(&Keys::new(NETUID).root(1), 1 << 16).await.unwrap().bytes;
        self.rotate(2, Digest::blake3(&first), orchestrator).await
    }
}

#[tokio::test]
async fn a_plain_run_with_the_new_key_waits_for_a_holder_with_the_old_one_and_gets_the_lease_when_it_is_given_back() {
    let bucket = Bucket::new().await;
    let old = Arc::new(bucket.take(key(1), 1, Wait::ForItsEnd).await.unwrap());
    let keeper = Shutdown::new();
    tokio::spawn(old.clone().keep(keeper.clone()));
    bucket.rotate_to(key(2).key()).await;
    let waiting = bucket.take(key(2), 2, Wait::ForItsEnd);
    tokio::pin!(waiting);
    assert!(tokio::time::timeout(LEASE * 3 / 4, &mut waiting).await.is_err(), "it waits, though the lease is renewed");
    keeper.trigger();
    old.release().await;
    let new = tokio::time::timeout(LEASE / 2, waiting).await.expect("at once").unwrap();
    assert_eq!(new.epoch().await, 2);
}

#[tokio::test]
async fn a_holder_with_a_replaced_key_that_does_not_notice_loses_its_lease_after_its_time() {
    let bucket = Bucket::new().await;
    let old = Arc::new(bucket.take(key(1), 1, Wait::ForItsEnd).await.unwrap());
    let keeper = Shutdown::new();
    tokio::spawn(old.clone().keep(keeper.clone()));
    bucket.rotate_to(key(2).key()).await;
    let begun = Instant::now();
    let new = bucket.take(key(2), 2, Wait::ForItsEnd).await.unwrap();
    assert!((LEASE..LEASE * 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert_eq!((old.renew().await, new.renew().await), (Err(Lost), Ok(())), "it reads who has it, signed by a key that it did not know");
}

#[tokio::test]
async fn a_standby_with_the_old_key_ends_without_taking_the_lease() {
    let bucket = Bucket::new().await;
    let old = bucket.take(key(1), 1, Wait::ForItsEnd).await.unwrap();
    let standby = bucket.take(key(1), 3, Wait::Standby);
    tokio::pin!(standby);
    assert!(tokio::time::timeout(LEASE / 4, &mut standby).await.is_err());
    bucket.rotate_to(key(2).key()).await;
    old.release().await;
    let ended = tokio::time::timeout(LEASE, standby).await.expect("at its next look").err().unwrap();
    assert_eq!(ended.exit, Exit::Configuration);
    assert!(ended.to_string().contains("root version 2 names orchestrator"), "{ended}");
    let new = bucket.take(key(2), 2, Wait::ForItsEnd).await.unwrap();
    assert_eq!(new.epoch().await, 2, "nobody had it in between");
}

#[tokio::test]
async fn a_standby_keeps_its_watch_while_the_store_does_not_answer() {
    let bucket = Bucket::new().await;
    let _killed = bucket.take(key(1), 1, Wait::ForItsEnd).await.unwrap();
    let slow = Arc::new(Slow::new(&bucket, ""));
    let (begun, shutdown) = (Instant::now(), Shutdown::new());
    let standby = Fence::acquire(bucket.settings(slow.clone(), key(1), 2), Wait::Standby, &shutdown);
    tokio::pin!(standby);
    assert!(tokio::time::timeout(LEASE / 2, &mut standby).await.is_err());
    // Half of its looks from here on, and then its first claim.
    slow.failing.store(4, Ordering::Relaxed);
    let taken = standby.await.unwrap().unwrap();
    assert!((LEASE..LEASE * 3 / 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert_eq!((taken.epoch().await, taken.is_own()), (2, false));
}

#[tokio::test]
async fn an_orchestrator_stops_once_a_root_names_another_key_and_goes_on_where_only_the_owner_changes() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let stopped = || service.stopped.lock().unwrap().clone();
    service.follow_roots().await.unwrap();
    assert_eq!(stopped(), None);
    // What does not follow from the root is none.
    let second = Keys::new(NETUID).root(2);
    bucket.rotate(2, Digest::ZERO, key(2).key()).await;
    assert!(service.follow_roots().await.is_err());
    assert_eq!(stopped(), None);
    bucket.store.delete(&second).await.unwrap();
    // One that names this key again: the pointer goes on under it.
    let digest = bucket.rotate_to(bucket.signer.key()).await;
    service.follow_roots().await.unwrap();
    service.publish_current().await;
    let bytes = bucket.store.get(&Keys::new(NETUID).current(), 1 << 16).await.unwrap().bytes;
    let current = open_stored::<CurrentRun>(&bytes, &bucket.context.without_run(), Expect::Key(&bucket.signer.key())).unwrap().document;
    assert_eq!((current.root_version, current.root_digest), (2, digest));
    assert_eq!(stopped(), None);
    bucket.rotate(3, digest, key(2).key()).await;
    service.follow_roots().await.unwrap();
    assert_eq!(stopped(), Some(Stop::Renamed));
}

#[tokio::test]
async fn a_new_key_takes_over_no_numbers_of_the_one_before_it_however_far_that_ran() {
    let (mut bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (old, _journal) = bucket.orchestrator(one.path()).await;
    let head = old.claim_head(1).await.unwrap();
    let (outside, current) = (bucket.context.without_run(), Keys::new(NETUID).current());
    let (job, job_key) = (Job { hotkey: miner(5), slot: 0, session_epoch: 1, leases: Vec::new() }, old.run.job(&miner(5), 0));
    // Whoever stole the old key leaves the largest number everywhere, and a pointer to a run of his.
    let stolen = bucket.signer.clone();
    let last = bucket.store.get(&old.run.writer_lease(), 1 << 16).await.unwrap().bytes;
    let lease = old.open_own::<protocol::documents::WriterLease>(&last).unwrap().document;
    bucket.put(&old.run.writer_lease(), sign(&lease, &bucket.context, &*stolen, u64::MAX, 1)).await;
    bucket.put(&old.run.head(), sign(&head, &bucket.context, &*stolen, u64::MAX, 1)).await;
    bucket.put(&job_key, sign(&job, &bucket.context, &*stolen, u64::MAX, 1)).await;
    let theirs = CurrentRun { run: RunId([9; 16]), ..old.current.clone() };
    bucket.put(&current, sign(&theirs, &outside, &*stolen, u64::MAX, 1)).await;

    bucket.rotate_to(key(2).key()).await;
    bucket.signer = key(2);
    let (new, _journal) = bucket.orchestrator(two.path()).await;
    new.claim_head(new.fence.epoch().await).await.unwrap();
    new.publish_job(1, &job).await;
    new.publish_current().await;
    assert!(new.stopped.lock().unwrap().is_none(), "a replaced key points nowhere");
    let far = daemon::clock::now_ms() + 60_000;
    let numbers = async |key: &str, context: &Context| {
        let bytes = bucket.store.get(key, 1 << 20).await.unwrap().bytes;
        let header = protocol::envelope::verify_as_stated(&bytes).unwrap().0.header;
        assert_eq!((header.signer, header.run), (bucket.signer.key(), context.run), "{key}");
        header.sequence
    };
    for (key, context) in [(&new.run.writer_lease(), &bucket.context), (&new.run.head(), &bucket.context), (&job_key, &bucket.context)] {
        assert!(numbers(key, context).await < far, "{key}");
    }
    assert!(numbers(&current, &outside).await < far);
}

#[tokio::test]
async fn a_key_whose_numbers_somebody_else_used_up_is_an_error_that_says_so() {
    let bucket = Bucket::new().await;
    let settings = bucket.settings(bucket.store(), key(1), 1);
    let first = Fence::acquire(settings, Wait::ForItsEnd, &Shutdown::new()).await.unwrap().unwrap();
    first.release().await;
    let at = Keys::new(NETUID).run(bucket.context.run).writer_lease();
    let bytes = bucket.store.get(&at, 1 << 16).await.unwrap().bytes;
    let lease = open_stored::<protocol::documents::WriterLease>(&bytes, &bucket.context, Expect::Key(&key(1).key())).unwrap().document;
    bucket.put(&at, sign(&lease, &bucket.context, &*key(1), u64::MAX, 1)).await;
    let refused = bucket.take(key(1), 2, Wait::Standby).await.err().unwrap();
    assert_eq!(refused.exit, Exit::Configuration);
    assert!(refused.to_string().contains("rotate-key"), "{refused}");
}
