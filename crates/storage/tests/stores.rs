//! One suite for every store: in memory, and over the S3 protocol against the embedded server in memory and on disk.

use std::future::Future;

use bytes::Bytes;
use protocol::{Digest, FileRecord};
use quasar_storage::check::{ConformanceError, conformance, conformance_with};
use quasar_storage::client::{GrantAccess, GrantClient, GrantError, PublicRead, PublicReader, PutOutcome};
use quasar_storage::server::{Backend, Faults, S3Server, ServerSettings};
use quasar_storage::transfer::{self, TransferError, download};
use quasar_storage::{MemoryGrants, MemoryStore, ObjectStore, Presign, PutCondition, S3Settings, S3Store, StoreError};

const LIMIT: u64 = 32 << 20;
const SECRET: &str = "not-for-the-log";

struct World {
    server: S3Server,
    store: S3Store,
    grants: GrantClient,
    public: PublicReader,
    _folder: tempfile::TempDir,
}

async fn world(on_disk: bool) -> World {
    let folder = tempfile::tempdir().unwrap();
    let server = start(if on_disk { Backend::Disk(folder.path().to_owned()) } else { Backend::Memory }).await;
    let store = store_at(&server.endpoint(), Some(SECRET));
    let grants = GrantClient::new(vec![server.address().to_string()]).unwrap();
    let public = PublicReader::new(&server.endpoint(), "quasar").unwrap();
    World { server, store, grants, public, _folder: folder }
}

async fn start(backend: Backend) -> S3Server {
    S3Server::start(ServerSettings {
        backend,
        bucket: "quasar".into(),
        access_key: "access".into(),
        secret_key: SECRET.into(),
        public_prefixes: vec!["q/public/".into()],
        listen: "127.0.0.1:0".parse().unwrap(),
    })
    .await
    .unwrap()
}

fn store_at(endpoint: &str, secret_key: Option<&str>) -> S3Store {
    S3Store::new(settings_at(endpoint, secret_key)).unwrap()
}

fn settings_at(endpoint: &str, secret_key: Option<&str>) -> S3Settings {
    S3Settings {
        endpoint: Some(endpoint.to_owned()),
        region: "us-east-1".into(),
        bucket: "quasar".into(),
        access_key: secret_key.map(|_| "access".to_owned()),
        secret_key: secret_key.map(str::to_owned),
        path_style: true,
    }
}

#[expect(clippy::disallowed_methods, reason = "the embedded server judges expiry by the real clock")]
fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

/// Runs `suite` on each kind of store.
async fn on_every_store<F: Future<Output = ()>>(suite: impl Fn(std::sync::Arc<dyn ObjectStore>) -> F) {
    suite(std::sync::Arc::new(MemoryStore::new())).await;
    for on_disk in [false, true] {
        let World { server, store, _folder, .. } = world(on_disk).await;
        suite(std::sync::Arc::new(store)).await;
        server.stop().await;
    }
}

#[tokio::test]
async fn files_are_uploaded_from_the_disk_once_and_others_in_their_place_are_told_apart() {
    on_every_store(|store| async move {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..9u32 << 20).map(|at| (at % 251) as u8).collect();
        let path = folder.path().join("file");
        std::fs::write(&path, &bytes).unwrap();
        let record = FileRecord::of_file("file", &path).unwrap();
        assert!(record.chunks.len() > 2);
        transfer::upload(&*store, "up/file", &record, &path).await.unwrap();
        assert_eq!(store.get("up/file", LIMIT).await.unwrap().bytes, bytes);
        transfer::upload(&*store, "up/file", &record, &path).await.unwrap();
        assert!(matches!(store.put_file("up/file", &path, &record).await, Err(StoreError::PreconditionFailed { .. })));
        // Another file of the same length lies there; and one that changed after it was described.
        let other = bytes.iter().map(|byte| byte ^ 1).collect::<Vec<u8>>();
        std::fs::write(&path, &other).unwrap();
        let changed = FileRecord::of_file("file", &path).unwrap();
        assert!(matches!(transfer::upload(&*store, "up/file", &changed, &path).await, Err(StoreError::PreconditionFailed { .. })));
        assert!(transfer::upload(&*store, "up/changed", &record, &path).await.is_err());
        assert!(matches!(store.head("up/changed").await, Err(StoreError::NotFound { .. })));
        let gone = folder.path().join("gone");
        assert!(matches!(transfer::upload(&*store, "up/gone", &record, &gone).await, Err(StoreError::Invalid { .. })));
    })
    .await;
}

fn upload(key: &str, bytes: &[u8], if_absent: bool) -> Presign {
    Presign::Put {
        key: key.into(),
        length: bytes.len() as u64,
        sha256: Some(Digest::sha256(bytes)),
        if_absent,
        now_ms: now_ms(),
        expires_in_ms: 60_000,
    }
}

fn reading(key: &str) -> Presign {
    Presign::Get { key: key.into(), now_ms: now_ms(), expires_in_ms: 60_000 }
}

#[tokio::test]
async fn what_is_written_is_read_back_whole_in_ranges_and_by_tag() {
    on_every_store(|store| async move {
        for length in [0usize, 1, 5_000, 3 << 20] {
            let bytes = Bytes::from((0..length).map(|index| (index * 7 % 256) as u8).collect::<Vec<_>>());
            let key = format!("a/netuid=1/{length}.bin");
            let etag = store.put(&key, bytes.clone(), PutCondition::Always).await.unwrap();
            let object = store.get(&key, LIMIT).await.unwrap();
            assert_eq!(object.bytes, bytes);
            assert_eq!(object.etag.as_deref(), Some(etag.as_str()));
            assert_eq!(store.get_if_changed(&key, Some(&etag), LIMIT).await.unwrap(), None);
            assert_eq!(store.head(&key).await.unwrap().length, length as u64);
            let again = store.put(&key, bytes, PutCondition::Always).await.unwrap();
            assert_ne!(again, etag, "a tag names a write, not a content");
            assert!(store.get_if_changed(&key, Some(&etag), LIMIT).await.unwrap().is_some());
        }
        let key = "a/netuid=1/5000.bin";
        assert_eq!(store.get_range(key, 1, 4).await.unwrap().as_ref(), [7, 14, 21]);
        assert_eq!(store.get_range(key, 4_999, 5_000).await.unwrap().len(), 1);
        assert!(store.get_range(key, 9, 9).await.unwrap().is_empty());
        for (start, end) in [(4_999, 5_001), (5_000, 5_001), (3, 2)] {
            assert!(matches!(store.get_range(key, start, end).await, Err(StoreError::Invalid { .. })), "{start}..{end}");
        }
        assert!(matches!(store.get(key, 4_999).await, Err(StoreError::TooLarge { limit: 4_999, .. })));
        assert!(store.get(key, 5_000).await.is_ok());
    })
    .await;
}

#[tokio::test]
async fn conditional_writes_have_one_winner_and_losers_change_nothing() {
    on_every_store(|store| async move {
        let refused = |result| matches!(result, Err(StoreError::PreconditionFailed { .. }));
        let first = store.put("k", "1".into(), PutCondition::IfAbsent).await.unwrap();
        assert!(refused(store.put("k", "2".into(), PutCondition::IfAbsent).await));
        let second = store.put("k", "2".into(), PutCondition::IfMatch(first.clone())).await.unwrap();
        assert!(refused(store.put("k", "3".into(), PutCondition::IfMatch(first)).await));
        assert_eq!(store.get("k", LIMIT).await.unwrap().bytes, "2");
        store.delete("k").await.unwrap();
        assert!(refused(store.put("k", "3".into(), PutCondition::IfMatch(second)).await));
        store.put("k", "4".into(), PutCondition::IfAbsent).await.unwrap();

        // Sixteen writers increase one counter through compare-and-swap: no increment is lost.
        store.put("count", "0".into(), PutCondition::Always).await.unwrap();
        let increments = (0..16).map(|_| {
            let store = store.clone();
            async move {
                loop {
                    let object = store.get("count", LIMIT).await.unwrap();
                    let count: u32 = std::str::from_utf8(&object.bytes).unwrap().parse().unwrap();
                    let next = Bytes::from((count + 1).to_string());
                    match store.put("count", next, PutCondition::IfMatch(object.etag.unwrap())).await {
                        Ok(_) => break,
                        Err(StoreError::PreconditionFailed { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        });
        futures::future::join_all(increments).await;
        assert_eq!(store.get("count", LIMIT).await.unwrap().bytes, "16");
    })
    .await;
}

#[tokio::test]
async fn listings_are_sorted_by_key_and_deletions_show_at_once() {
    on_every_store(|store| async move {
        for key in ["run-1/1", "run/2", "run/1", "run/1-a", "rum"] {
            store.put(key, Bytes::from(key.to_owned()), PutCondition::Always).await.unwrap();
        }
        let keys = |objects: Vec<quasar_storage::ObjectMeta>| objects.into_iter().map(|object| object.key).collect::<Vec<_>>();
        assert_eq!(keys(store.list("run").await.unwrap()), ["run-1/1", "run/1", "run/1-a", "run/2"]);
        assert_eq!(keys(store.list("run/").await.unwrap()), ["run/1", "run/1-a", "run/2"]);
        assert!(store.list("nothing/").await.unwrap().is_empty());
        assert_eq!(store.list("").await.unwrap().len(), 5);
        store.delete("run/1").await.unwrap();
        store.delete("run/1").await.unwrap();
        assert_eq!(keys(store.list("run/").await.unwrap()), ["run/1-a", "run/2"]);
        assert!(matches!(store.get("run/1", LIMIT).await, Err(StoreError::NotFound { .. })));
        assert!(matches!(store.head("run/1").await, Err(StoreError::NotFound { .. })));
    })
    .await;
}

#[tokio::test]
async fn listings_longer_than_a_page_are_complete() {
    let world = world(false).await;
    let writes = (0..2_345).map(|index| world.store.put_owned(format!("many/{index:05}")));
    use futures::StreamExt;
    futures::stream::iter(writes).buffer_unordered(16).collect::<Vec<()>>().await;
    let listed = world.store.list("many/").await.unwrap();
    assert_eq!(listed.len(), 2_345);
    assert!(listed.is_sorted_by(|a, b| a.key < b.key));
}

trait PutOwned {
    async fn put_owned(&self, key: String);
}

impl PutOwned for S3Store {
    async fn put_owned(&self, key: String) {
        self.put(&key, Bytes::from_static(b"x"), PutCondition::Always).await.unwrap();
    }
}

#[tokio::test]
async fn keys_that_stores_disagree_on_are_refused_everywhere() {
    on_every_store(|store| async move {
        for key in ["", "/a", "a/", "a//b", "../a", "a b", "ä", "a?b"] {
            assert!(matches!(store.put(key, "x".into(), PutCondition::Always).await, Err(StoreError::Invalid { .. })), "{key}");
            assert!(matches!(store.get(key, 1).await, Err(StoreError::Invalid { .. })), "{key}");
            assert!(store.presign(&reading(key)).is_err(), "{key}");
        }
    })
    .await;
}

#[tokio::test]
async fn every_store_of_ours_passes_the_start_up_examination_and_is_left_clean() {
    let store = MemoryStore::new();
    let time = now_ms();
    conformance_with(&store, &MemoryGrants::new(store.clone(), move || time + 10), "q/private/", time).await.unwrap();
    assert!(store.list("").await.unwrap().is_empty());
    for on_disk in [false, true] {
        let world = world(on_disk).await;
        conformance(&world.store, "q/private/", now_ms()).await.unwrap();
        assert!(world.store.list("").await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn examinations_at_the_same_time_leave_each_other_and_everything_else_alone() {
    let (world, time) = (world(false).await, now_ms());
    world.store.put("q/private/check-of-another", Bytes::from_static(b"x"), PutCondition::Always).await.unwrap();
    for prefix in ["q/private/check", "q/private/check/"] {
        let together = futures::future::join_all((0..8).map(|_| conformance(&world.store, prefix, time))).await;
        for result in together {
            result.unwrap();
        }
    }
    assert_eq!(world.store.list("").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_store_that_does_not_honour_conditions_or_checksums_is_named_as_such() {
    let world = world(false).await;
    world.server.set_faults(Faults { ignore_conditions: true, ..Faults::default() });
    let Err(error @ ConformanceError::Broken { .. }) = conformance(&world.store, "q/private/", now_ms()).await else { panic!() };
    assert!(error.to_string().contains("exactly one wins") && error.to_string().contains("hint:"), "{error}");
    world.server.set_faults(Faults { ignore_checksums: true, ..Faults::default() });
    let Err(ConformanceError::Broken { broken }) = conformance(&world.store, "q/private/", now_ms()).await else { panic!() };
    assert!(broken.contains(&"an upload with another SHA-256 is refused and leaves nothing"), "{broken:?}");
    world.server.set_faults(Faults { refuse: true, ..Faults::default() });
    let Err(error) = conformance(&world.store, "q/private/", now_ms()).await else { panic!() };
    assert!(matches!(&error, ConformanceError::Store(StoreError::Denied { .. })) && !error.is_retryable(), "{error}");
    // One that is not there may be there later.
    drop(world.server);
    let Err(error) = conformance(&world.store, "q/private/", now_ms()).await else { panic!() };
    assert!(error.is_retryable(), "{error}");
}

/// What a store may fail to look at when a grant is redeemed, and the promise that it breaks by it.
const BLIND_TO: [(&str, &str); 9] = [
    ("digest", "an upload with another SHA-256 is refused and leaves nothing"),
    ("length", "an upload of another length is refused and leaves nothing"),
    ("signature", "an unsigned upload is refused and leaves nothing"),
    ("key", "a grant for one key is refused for another"),
    ("time of a write", "an expired upload grant is refused and leaves nothing"),
    ("what is there", "a write-once grant works once"),
    ("method of a read", "an upload grant reads nothing"),
    ("method of a write", "a read grant writes nothing"),
    ("time of a read", "an expired grant is refused"),
];

/// A store that looks at everything but one thing.
struct Blind {
    store: MemoryStore,
    grants: MemoryGrants,
    to: &'static str,
    now_ms: u64,
}

#[async_trait::async_trait]
impl GrantAccess for Blind {
    async fn get(&self, grant: &protocol::GrantRequest, range: Option<(u64, u64)>, limit: u64) -> Result<Bytes, GrantError> {
        let wrong = if grant.expires_ms <= self.now_ms { "time of a read" } else { "method of a read" };
        match self.grants.get(grant, range, limit).await {
            Err(GrantError::Expired { .. }) if wrong == self.to => Ok(self.store.get(&grant.key, limit).await.unwrap().bytes),
            given => given,
        }
    }

    async fn put(&self, grant: &protocol::GrantRequest, bytes: Bytes) -> Result<PutOutcome, GrantError> {
        let wrong = match (self.grants.put(grant, bytes.clone()).await?, grant.length) {
            (PutOutcome::Stored, _) => return Ok(PutOutcome::Stored),
            (PutOutcome::AlreadyThere, _) => "what is there",
            (PutOutcome::Refused { .. }, _) => "digest",
            (PutOutcome::Expired, _) if !grant.url.contains("signature=") => "signature",
            (PutOutcome::Expired, _) if grant.expires_ms <= self.now_ms => "time of a write",
            (PutOutcome::Expired, _) if grant.headers.is_empty() => "method of a write",
            (PutOutcome::Expired, None) => "length",
            (PutOutcome::Expired, Some(_)) => "key",
        };
        if wrong != self.to {
            return Ok(if wrong == "what is there" { PutOutcome::AlreadyThere } else { PutOutcome::Expired });
        }
        self.store.put(&grant.key, bytes, PutCondition::Always).await.unwrap();
        Ok(PutOutcome::Stored)
    }
}

#[tokio::test]
async fn a_store_that_looks_at_everything_but_one_thing_breaks_that_promise_and_no_other() {
    const NOW_MS: u64 = 10_000_000;
    for (to, promise) in BLIND_TO {
        let store = MemoryStore::new();
        let grants = Blind { grants: MemoryGrants::new(store.clone(), || NOW_MS), store: store.clone(), to, now_ms: NOW_MS };
        let Err(ConformanceError::Broken { broken }) = conformance_with(&store, &grants, "q/private/", NOW_MS).await else {
            panic!("{to}")
        };
        assert_eq!(broken, [promise], "blind to the {to}");
        assert!(store.list("").await.unwrap().is_empty(), "an examination leaves nothing");
    }
}

#[tokio::test]
async fn a_store_that_does_not_answer_a_grant_breaks_no_promise_but_cannot_be_examined() {
    let world = world(false).await;
    world.server.set_faults(Faults { only_paths_with: Some("/grant".into()), errors_ppm: 1_000_000, ..Faults::default() });
    let Err(error) = conformance(&world.store, "q/private/", now_ms()).await else { panic!() };
    assert!(matches!(&error, ConformanceError::Grant(_)) && error.is_retryable(), "{error}");
    // Nor does one that answers now and then, whichever request it leaves out.
    for seed in 0..8 {
        world.server.set_faults(Faults { errors_ppm: 450_000, seed, ..Faults::default() });
        if let Err(error) = conformance(&world.store, "q/private/", now_ms()).await {
            assert!(error.is_retryable(), "{error}");
        }
    }
}

#[tokio::test]
async fn a_bucket_that_is_not_there_is_named_with_what_to_do() {
    let world = world(false).await;
    let elsewhere = S3Store::new(S3Settings { bucket: "quasra".into(), ..settings_at(&world.server.endpoint(), Some(SECRET)) }).unwrap();
    let written = elsewhere.put("q/a", Bytes::from_static(b"a"), PutCondition::IfAbsent).await.unwrap_err();
    let read = elsewhere.get("q/a", LIMIT).await.unwrap_err();
    for error in [written, read] {
        let told = error.to_string();
        assert!(!error.is_retryable() && told.contains("no bucket `quasra`") && told.contains("hint:"), "{told}");
    }
}

#[tokio::test]
async fn a_grant_is_good_for_its_own_bytes_once_and_for_nothing_else() {
    for on_disk in [false, true] {
        let World { store, grants, .. } = &world(on_disk).await;
        let bytes = Bytes::from(vec![42; 1 << 20]);
        let grant = store.presign(&upload("q/in/a", &bytes, true)).unwrap();
        assert!(matches!(grants.put(&grant, Bytes::from_static(b"short")).await, Err(GrantError::Forbidden { .. })));
        let mut other = bytes.to_vec();
        other[77] ^= 1;
        assert_eq!(grants.put(&grant, other.into()).await.unwrap(), PutOutcome::Refused { status: 400 });
        assert!(matches!(store.head("q/in/a").await, Err(StoreError::NotFound { .. })));
        assert_eq!(grants.put(&grant, bytes.clone()).await.unwrap(), PutOutcome::Stored);
        assert_eq!(grants.put(&grant, bytes.clone()).await.unwrap(), PutOutcome::AlreadyThere);

        // Signed for one key and method: the URL of another key, or the other method, does not verify.
        let moved = protocol::GrantRequest { key: "q/in/b".into(), url: grant.url.replace("q/in/a", "q/in/b"), ..grant.clone() };
        assert_eq!(grants.put(&moved, bytes.clone()).await.unwrap(), PutOutcome::Expired);
        let turned = protocol::GrantRequest { method: protocol::Method::Get, ..grant.clone() };
        assert!(matches!(grants.get(&turned, None, LIMIT).await, Err(GrantError::Expired { .. })));
        let stretched = protocol::GrantRequest { url: grant.url.replace("X-Amz-Expires=60", "X-Amz-Expires=99"), ..grant };
        assert_eq!(grants.put(&stretched, bytes.clone()).await.unwrap(), PutOutcome::Expired);

        // Overwriting grants, as for progress records, go on working.
        let plain = store.presign(&upload("q/in/progress", &bytes, false)).unwrap();
        for _ in 0..2 {
            assert_eq!(grants.put(&plain, bytes.clone()).await.unwrap(), PutOutcome::Stored);
        }

        let read = store.presign(&reading("q/in/a")).unwrap();
        assert_eq!(grants.get(&read, None, LIMIT).await.unwrap(), bytes);
        assert_eq!(grants.get(&read, Some((5, 9)), LIMIT).await.unwrap().len(), 4);
        assert!(matches!(grants.get(&read, None, 1_000).await, Err(GrantError::TooLarge { .. })));
        let absent = store.presign(&reading("q/in/none")).unwrap();
        assert!(matches!(grants.get(&absent, None, LIMIT).await, Err(GrantError::Absent { .. })));
        let past = Presign::Get { key: "q/in/a".into(), now_ms: now_ms() - 100_000, expires_in_ms: 1_000 };
        assert!(matches!(grants.get(&store.presign(&past).unwrap(), None, LIMIT).await, Err(GrantError::Expired { .. })));
        let stranger = GrantClient::new(vec!["store.example".into()]).unwrap();
        assert!(matches!(stranger.get(&read, None, LIMIT).await, Err(GrantError::Forbidden { .. })));
    }
}

#[tokio::test]
async fn the_world_reads_public_objects_only_and_cannot_tell_missing_from_hidden() {
    for on_disk in [false, true] {
        let World { server, store, public, .. } = &world(on_disk).await;
        store.put("q/public/head", "1".into(), PutCondition::Always).await.unwrap();
        store.put("q/private/head", "2".into(), PutCondition::Always).await.unwrap();
        let PublicRead::Found(object) = public.get("q/public/head", None, LIMIT).await.unwrap() else { panic!() };
        assert_eq!(object.bytes, "1");
        let etag = object.etag.unwrap();
        assert_eq!(public.get("q/public/head", Some(&etag), LIMIT).await.unwrap(), PublicRead::Unchanged);
        store.put("q/public/head", "3".into(), PutCondition::IfMatch(etag.clone())).await.unwrap();
        assert!(matches!(public.get("q/public/head", Some(&etag), LIMIT).await.unwrap(), PublicRead::Found(object) if object.bytes == "3"));
        for key in ["q/public/none", "q/private/head", "q/private/none"] {
            assert_eq!(public.get(key, None, LIMIT).await.unwrap(), PublicRead::Absent);
        }
        assert!(matches!(public.get("q/public/head", None, 0).await, Err(StoreError::TooLarge { .. })));

        let anonymous = store_at(&server.endpoint(), None);
        assert_eq!(anonymous.get("q/public/head", LIMIT).await.unwrap().bytes, "3");
        assert!(matches!(anonymous.get("q/private/head", LIMIT).await, Err(StoreError::NotFound { .. })));
        let denied = |error| matches!(error, StoreError::Denied { .. });
        assert!(denied(anonymous.put("q/public/x", "x".into(), PutCondition::Always).await.unwrap_err()));
        assert!(denied(anonymous.delete("q/public/head").await.unwrap_err()));
        assert!(denied(anonymous.list("q/public/").await.unwrap_err()));
        assert!(anonymous.presign(&reading("q/public/head")).is_err());
        assert_eq!(store.get("q/public/head", LIMIT).await.unwrap().bytes, "3");
        let wrong = store_at(&server.endpoint(), Some("wrong"));
        assert!(matches!(wrong.get("q/public/head", LIMIT).await, Err(StoreError::Denied { .. })));
    }
}

#[tokio::test]
async fn a_flaky_and_slow_store_is_ridden_out_and_a_dead_one_is_reported() {
    let World { server, store, grants, public, .. } = world(false).await;
    store.put("q/public/k", "v".into(), PutCondition::Always).await.unwrap();
    let latency = std::time::Duration::from_millis(5);
    server.set_faults(Faults { errors_ppm: 100_000, lost_answers_ppm: 100_000, seed: 1, latency, ..Faults::default() });
    for index in 0..20 {
        let bytes = Bytes::from(format!("{index}"));
        let key = format!("q/flaky/{index}");
        // A write whose first answer got lost must not be taken for somebody else's.
        store.put(&key, bytes.clone(), PutCondition::IfAbsent).await.unwrap();
        assert!(matches!(public.get("q/public/k", None, LIMIT).await.unwrap(), PublicRead::Found(_)));
        let read = store.presign(&reading(&key)).unwrap();
        assert_eq!(grants.get(&read, None, LIMIT).await.unwrap(), bytes);
    }
    // A conditional write whose every answer is lost is a failure to the writer, though it happened.
    server.set_faults(Faults { lost_answers_ppm: 1_000_000, ..Faults::default() });
    assert!(store.put("q/lost", "x".into(), PutCondition::IfAbsent).await.unwrap_err().is_retryable());
    server.set_faults(Faults { errors_ppm: 1_000_000, ..Faults::default() });
    let error = store.get("q/public/k", LIMIT).await.unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("hint:"));
    server.set_faults(Faults { cut_bodies_after: Some(0), ..Faults::default() });
    assert!(store.get("q/public/k", LIMIT).await.unwrap_err().is_retryable());
    assert!(public.get("q/public/k", None, LIMIT).await.unwrap_err().is_retryable());
    server.stop().await;
    assert!(public.get("q/public/k", None, LIMIT).await.unwrap_err().is_retryable());
}

#[tokio::test]
async fn large_files_are_downloaded_through_a_grant_and_resumed_after_faults() {
    for on_disk in [false, true] {
        let World { server, store, grants, _folder, .. } = world(on_disk).await;
        let bytes = Bytes::from((0..(20usize << 20) + 123).map(|index| (index * 13 % 251) as u8).collect::<Vec<_>>());
        let record = protocol::FileRecord::of_bytes("tokens.bin", &bytes);
        store.put("q/data/tokens.bin", bytes.clone(), PutCondition::IfAbsent).await.unwrap();
        let source = (grants, store.presign(&reading("q/data/tokens.bin")).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let dest = folder.path().join("tokens.bin");
        server.set_faults(Faults { refuse: true, ..Faults::default() });
        assert!(matches!(download(&source, &record, &dest).await, Err(TransferError::Expired { .. })));
        server.set_faults(Faults { errors_ppm: 300_000, seed: 5, ..Faults::default() });
        while download(&source, &record, &dest).await.is_err() {}
        assert_eq!(std::fs::read(&dest).unwrap(), bytes);
    }
}

#[tokio::test]
async fn objects_on_disk_survive_a_restart_of_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(Backend::Disk(folder.path().to_owned())).await;
    let etag = store_at(&server.endpoint(), Some(SECRET)).put("q/public/x", "kept".into(), PutCondition::Always).await.unwrap();
    server.stop().await;
    let server = start(Backend::Disk(folder.path().to_owned())).await;
    let store = store_at(&server.endpoint(), Some(SECRET));
    assert_eq!(store.get_if_changed("q/public/x", Some(&etag), LIMIT).await.unwrap(), None);
    assert_eq!(store.get("q/public/x", LIMIT).await.unwrap().bytes, "kept");
    store.put("q/public/x", "new".into(), PutCondition::IfMatch(etag)).await.unwrap();
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Log(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn presigned_urls_and_secrets_appear_in_no_log_at_any_level() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    // All tasks of this test run on this thread.
    let _guard = tracing::subscriber::set_default(subscriber);
    let World { server: _server, store, grants, .. } = world(false).await;
    let write = store.presign(&upload("q/in/a", b"abc", true)).unwrap();
    for _ in 0..2 {
        grants.put(&write, Bytes::from_static(b"abc")).await.unwrap();
    }
    let read = store.presign(&reading("q/in/a")).unwrap();
    grants.get(&read, None, LIMIT).await.unwrap();
    let absent = store.presign(&reading("q/in/none")).unwrap();
    grants.get(&absent, None, LIMIT).await.unwrap_err();
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let leaked = text.lines().find(|line| line.contains("X-Amz-Signature") || line.contains(SECRET));
    assert_eq!(leaked, None);
    assert!(!text.is_empty(), "the log was captured");
}
