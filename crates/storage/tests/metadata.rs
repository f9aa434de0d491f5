//! The attacks on update metadata that TUF names, against the documents that lead to a run: what a reader refuses, and what it keeps
//! as proof.

extern crate quasar_storage as storage;

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use protocol::documents::{
    AuditParameters, Bounds, CatalogPage, CatalogRef, Codec, CurrentRun, FragmentHead, Head, InnerOptimizer, LrSchedule, ReleaseRef,
    RunManifest, RunParameters, RunRoot, RunState,
};
use protocol::envelope::{Context, Document, EnvelopeError, RunId, Seen, sign};
use protocol::log::{Frontier, LogRef};
use protocol::paths::Keys;
use protocol::{DType, Digest, Ed25519Signer, FileRecord, FragmentPlan, MergeRule, ShardManifest, Signer, Slice};
use storage::client::PublicReader;
use storage::discovery::{DiscoveryError, RunReader};
use storage::roots::Roots;
use storage::server::{Backend, S3Server, ServerSettings};
use storage::{ObjectStore, PutCondition, S3Settings, S3Store};

const NETUID: u16 = 24;
const GENESIS: [u8; 32] = [2; 32];
/// The readers' clock.
const NOW_MS: u64 = 1_700_000_000_000;

fn key(seed: u8) -> Ed25519Signer {
    Ed25519Signer::from_seed([seed; 32])
}

/// A bucket in which an owner (key 1) and an orchestrator (key 2) have opened a run.
struct Bucket {
    server: S3Server,
    store: S3Store,
    keys: Keys,
    outside: Context,
    context: Context,
    root: RunRoot,
}

impl Bucket {
    async fn new() -> Self {
        let server = S3Server::start(ServerSettings {
            backend: Backend::Memory,
            bucket: "quasar".into(),
            access_key: "key".into(),
            secret_key: "secret".into(),
            public_prefixes: vec![protocol::paths::public_prefix(NETUID)],
            listen: "127.0.0.1:0".parse().unwrap(),
        })
        .await
        .unwrap();
        let store = S3Store::new(S3Settings {
            endpoint: Some(server.endpoint()),
            region: "us-east-1".into(),
            bucket: "quasar".into(),
            access_key: Some("key".into()),
            secret_key: Some("secret".into()),
            path_style: true,
        })
        .unwrap();
        let outside = Context { genesis: GENESIS, netuid: NETUID, run: RunId::NONE };
        let root = RunRoot {
            version: 1,
            previous: Digest::ZERO,
            owner: key(1).key(),
            orchestrator: key(2).key(),
            store_hosts: vec!["store.example:443".into()],
            bounds: Bounds { fragments_max: 24, slots_max: 8, payload_bytes_max: 1 << 20, checkpoint_bytes_max: 1 << 20 },
        };
        let bucket = Self { server, store, keys: Keys::new(NETUID), outside, context: context(), root };
        bucket.put(&bucket.keys.root(1), &sign(&bucket.root, &outside, &key(1), 1, NOW_MS)).await;
        bucket.open_run(&key(2)).await;
        bucket
    }

    async fn put(&self, at: &str, bytes: &[u8]) {
        self.store.put(at, Bytes::copy_from_slice(bytes), PutCondition::Always).await.unwrap();
    }

    async fn publish<D: Document>(&self, at: &str, context: &Context, document: &D, signer: &Ed25519Signer, sequence: u64) -> Digest {
        let bytes = sign(document, context, signer, sequence, NOW_MS);
        self.put(at, &bytes).await;
        Digest::blake3(&bytes)
    }

    /// Everything below the root, by `signer`; gives the current run.
    async fn open_run(&self, signer: &Ed25519Signer) -> CurrentRun {
        let run = self.keys.run(self.context.run);
        let slice =
            Slice { tensor: "w".into(), row_start: 0, row_end: 4, row_elements: 8, unit_rows: 1, dtype: DType::Bf16, rule: MergeRule::Rda };
        let plan = FragmentPlan { fragments: vec![vec![slice]] };
        self.publish(&run.plan(&plan.digest()), &self.context, &plan, signer, 1).await;
        let digest = self.publish(&run.catalog(0), &self.context, &first_page(), signer, 1).await;
        let manifest = self.manifest(plan.digest(), digest);
        let manifest_digest = self.publish(&run.manifest(), &self.context, &manifest, signer, 1).await;
        self.publish(&run.head(), &self.context, &head(1), signer, 10).await;
        let current = CurrentRun { root_version: 1, root_digest: self.root_digest(), run: self.context.run, manifest_digest };
        self.publish(&self.keys.current(), &self.outside, &current, signer, 10).await;
        current
    }

    fn manifest(&self, plan: Digest, page: Digest) -> RunManifest {
        RunManifest {
            run: self.context.run,
            name: "test".into(),
            protocol_min: 1,
            protocol_max: 1,
            created_ms: NOW_MS,
            plan,
            base_release: "base".into(),
            base_manifest: Digest::ZERO,
            catalog: vec![CatalogRef { page: 0, digest: page }],
            parameters: parameters(),
        }
    }

    fn root_digest(&self) -> Digest {
        Digest::blake3(&sign(&self.root, &self.outside, &key(1), 1, NOW_MS))
    }

    async fn discover(&self, now_ms: u64) -> Result<RunReader, DiscoveryError> {
        self.discover_with(Roots::unremembered(GENESIS, NETUID, key(1).key().account()), now_ms).await
    }

    /// As a client that has seen this before.
    async fn discover_again(&self, seen: &Seen) -> Result<RunReader, DiscoveryError> {
        self.discover_with(Roots::new(GENESIS, NETUID, key(1).key().account(), seen.clone(), |_| Ok(())), NOW_MS).await
    }

    async fn discover_with(&self, roots: Roots, now_ms: u64) -> Result<RunReader, DiscoveryError> {
        RunReader::discover(PublicReader::new(&self.server.endpoint(), "quasar").unwrap(), roots, None, now_ms).await
    }

    /// The owner names another online key.
    async fn rotate(&self, orchestrator: &Ed25519Signer, signer: &Ed25519Signer) -> Digest {
        let root = RunRoot { version: 2, previous: self.root_digest(), orchestrator: orchestrator.key(), ..self.root.clone() };
        self.publish(&self.keys.root(2), &self.outside, &root, signer, 2).await
    }

    /// The orchestrator with the key that a root names takes the run over: it renews the pointer.
    async fn renew_current(&self, root_version: u32, root_digest: Digest, signer: &Ed25519Signer, sequence: u64) -> Vec<u8> {
        let manifest = self.store.get(&self.keys.run(self.context.run).manifest(), 1 << 20).await.unwrap().bytes;
        let manifest_digest = Digest::blake3(&manifest);
        let current = CurrentRun { root_version, root_digest, run: self.context.run, manifest_digest };
        self.publish(&self.keys.current(), &self.outside, &current, signer, sequence).await;
        self.store.get(&self.keys.current(), 1 << 20).await.unwrap().bytes.to_vec()
    }
}

fn context() -> Context {
    Context { genesis: GENESIS, netuid: NETUID, run: RunId([3; 16]) }
}

fn training_shard(id: &str) -> ShardManifest {
    ShardManifest {
        id: id.into(),
        rows: 1,
        row_tokens: 2,
        tokens: 2,
        file: FileRecord::of_bytes("tokens.bin", &[0; 8]),
        tokenizer: Digest::ZERO,
        vocab_size: 16,
        licence: "public domain".into(),
        source: "a test".into(),
        held_out: false,
    }
}

fn first_page() -> CatalogPage {
    CatalogPage { page: 0, previous: Digest::ZERO, shards: Vec::new() }
}

/// A head of a run whose catalog has the first page only, as the first orchestrator signed it.
fn head(outer_step: u64) -> Head {
    let page = sign(&first_page(), &context(), &key(2), 1, NOW_MS);
    Head {
        catalog: CatalogRef { page: 0, digest: Digest::blake3(&page) },
        epoch: 1,
        state: RunState::Open,
        outer_step,
        closed_below: 0,
        block: 0,
        run_step: 0,
        pulls: Vec::new(),
        fragments: vec![FragmentHead { version: 0, length: 1, digest: Digest::ZERO }],
        release: ReleaseRef { release: "base".into(), manifest: Digest::ZERO },
        ledger: Digest::ZERO,
        log: LogRef::from(&Frontier::default()),
        notices: Vec::new(),
    }
}

fn parameters() -> RunParameters {
    RunParameters {
        fragments: 1,
        inner_steps: 1,
        overlap: 1,
        grace_ppm: 1,
        cycles: 1,
        outer_lr_ppm: 1,
        outer_momentum_ppm: 0,
        step_target_ms: 0,
        poll_ms: 100,
        slots: 2,
        quorum_min: 1,
        pull_deadline_ms: 1,
        learner_ttl_ms: 1,
        sequence_length: 8,
        batch_rows: 1,
        lease_steps: 1,
        codec_up: Codec::Bf16,
        codec_down: Codec::Bf16,
        release_every_cycles: 0,
        inner: InnerOptimizer {
            lr_nano: 1,
            beta1_ppm: 1,
            beta2_ppm: 1,
            eps_pico: 1,
            weight_decay_ppm: 0,
            clip_norm_ppm: 1,
            schedule: LrSchedule { warmup_steps: 0, total_steps: 0, final_ppm: 0 },
        },
        audit: AuditParameters {
            rate_ppm: 1_000_000,
            loss_rows: 1,
            replay_steps: 1,
            replay_tolerance_ppm: 1,
            beacon_blocks: 1,
            opening_ms: 1,
        },
        training: Default::default(),
    }
}

fn of_envelope(error: DiscoveryError) -> EnvelopeError {
    match error {
        DiscoveryError::Envelope { error, .. } => error,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_rotated_key_signs_what_changes_and_what_was_written_once_before_still_counts() {
    let bucket = Bucket::new().await;
    assert!(bucket.discover(NOW_MS).await.is_ok());
    let root_digest = bucket.rotate(&key(5), &key(1)).await;
    // Until the new key has signed the current run, there is none; whoever starts meanwhile waits for it, also where it has expired.
    for now_ms in [NOW_MS, NOW_MS + 3_600_000] {
        let error = bucket.discover(now_ms).await.err().unwrap();
        assert!(matches!(&error, DiscoveryError::Replaced { key, version: 2 } if *key == bucket.keys.current()), "{error}");
        assert!(!error.is_final());
    }
    bucket.renew_current(2, root_digest, &key(5), 11).await;
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    assert_eq!(reader.roots().known().unwrap().orchestrators, [key(5).key(), key(2).key()]);
    // The old key, stolen perhaps, moves no head any more.
    assert!(matches!(reader.head(NOW_MS).await, Err(DiscoveryError::Replaced { .. })));
    bucket.publish(&bucket.keys.run(bucket.context.run).head(), &bucket.context, &head(2), &key(5), 12).await;
    assert_eq!(reader.head(NOW_MS).await.unwrap().unwrap().outer_step, 2);
    // A key that no root ever named is for a person to look at.
    bucket.renew_current(2, root_digest, &key(9), 12).await;
    assert!(bucket.discover(NOW_MS).await.is_err_and(|error| error.is_final()));
}

#[tokio::test]
async fn a_reader_that_runs_follows_a_rotation_and_keeps_it_before_anything_signed_by_the_new_key_counts() {
    let bucket = Bucket::new().await;
    let (run, kept) = (bucket.keys.run(bucket.context.run), Arc::new(Mutex::new(Vec::new())));
    let keep = {
        let kept = kept.clone();
        move |seen: &Seen| {
            kept.lock().unwrap().push((seen.root, seen.root_digest));
            Ok(())
        }
    };
    let roots = Roots::new(GENESIS, NETUID, key(1).key().account(), Seen::default(), keep);
    let mut reader = bucket.discover_with(roots.clone(), NOW_MS).await.unwrap();
    let archive = bucket.discover_with(roots, NOW_MS).await.unwrap();
    assert_eq!(reader.head(NOW_MS).await.unwrap().unwrap().outer_step, 1);
    assert!(kept.lock().unwrap().iter().all(|(version, _)| *version == 1));

    // The first thing that this reader meets is a head of the new key.
    let root_digest = bucket.rotate(&key(5), &key(1)).await;
    bucket.publish(&run.head(), &bucket.context, &head(2), &key(5), 3).await;
    assert_eq!(reader.head(NOW_MS).await.unwrap().unwrap().outer_step, 2);
    assert_eq!(kept.lock().unwrap().last(), Some(&(2, Some(root_digest))));
    // From then on the old one moves nothing, neither here nor at a reader beside it, and what it wrote once stays.
    bucket.publish(&run.head(), &bucket.context, &head(3), &key(2), u64::MAX).await;
    assert!(matches!(reader.head(NOW_MS).await, Err(DiscoveryError::Replaced { version: 2, .. })));
    assert!(matches!(reader.moved(NOW_MS).await, Err(DiscoveryError::Replaced { .. })));
    assert!(archive.published::<CatalogPage>(&run.catalog(0)).await.unwrap().is_some());
    bucket.publish(&run.catalog(1), &bucket.context, &first_page(), &key(5), 4).await;
    assert!(archive.published::<CatalogPage>(&run.catalog(1)).await.unwrap().is_some());
    bucket.renew_current(2, root_digest, &key(5), 5).await;
    assert!(!reader.moved(NOW_MS).await.unwrap(), "it is the same run");
    bucket.publish(&run.head(), &bucket.context, &head(4), &key(5), 6).await;
    assert_eq!(reader.head(NOW_MS).await.unwrap().unwrap().outer_step, 4);
}

#[tokio::test]
async fn a_revoked_key_loses_its_power_over_a_reader_that_runs_even_where_nobody_signs_with_the_new_one() {
    let bucket = Bucket::new().await;
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    bucket.rotate(&key(5), &key(1)).await;
    assert!(matches!(reader.moved(NOW_MS).await, Err(DiscoveryError::Replaced { .. })));
    assert!(matches!(reader.head(NOW_MS).await, Err(DiscoveryError::Replaced { .. })));
    // Whoever hides the root again does not lead a running reader back.
    bucket.store.delete(&bucket.keys.root(2)).await.unwrap();
    assert!(matches!(reader.head(NOW_MS).await, Err(DiscoveryError::Replaced { .. })));
}

#[tokio::test]
async fn a_root_that_cannot_be_kept_is_not_followed() {
    let bucket = Bucket::new().await;
    let keep = |seen: &Seen| if seen.root > 1 { Err("the disk is full".to_owned()) } else { Ok(()) };
    let roots = Roots::new(GENESIS, NETUID, key(1).key().account(), Seen::default(), keep);
    let mut reader = bucket.discover_with(roots.clone(), NOW_MS).await.unwrap();
    bucket.rotate(&key(5), &key(1)).await;
    let error = reader.moved(NOW_MS).await.unwrap_err();
    assert!(matches!(&error, DiscoveryError::Memory(why) if why == "the disk is full") && !error.is_final(), "{error}");
    assert_eq!((roots.known().unwrap().newest.version, roots.seen().root), (1, 1));
}

#[tokio::test]
async fn an_owner_that_handed_over_signs_no_further_root_and_none_in_the_place_of_one_that_was_seen() {
    let bucket = Bucket::new().await;
    let at = |version| bucket.keys.root(version);
    // Owner 1 hands over to owner 6; the orchestrator stays, and has not read it yet.
    let second = RunRoot { version: 2, previous: bucket.root_digest(), owner: key(6).key(), ..bucket.root.clone() };
    let digest = bucket.publish(&at(2), &bucket.outside, &second, &key(1), 2).await;
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    assert_eq!(reader.roots().known().unwrap().newest.owner, key(6).key());
    assert!(!reader.moved(NOW_MS).await.unwrap());
    let seen = reader.roots().seen();

    // The old owner goes on signing.
    let third = RunRoot { version: 3, previous: digest, orchestrator: key(9).key(), ..second.clone() };
    bucket.publish(&at(3), &bucket.outside, &third, &key(1), 3).await;
    assert!(matches!(of_envelope(bucket.discover(NOW_MS).await.err().unwrap()), EnvelopeError::Signer { .. }));
    assert!(matches!(of_envelope(reader.moved(NOW_MS).await.unwrap_err()), EnvelopeError::Signer { .. }));
    assert!(reader.head(NOW_MS).await.is_ok(), "who is named still counts");
    bucket.store.delete(&at(3)).await.unwrap();

    // He puts another second root in its place, for a key of his: whoever has seen the real one knows, before and after a restart.
    let other = RunRoot { owner: key(1).key(), orchestrator: key(9).key(), ..second.clone() };
    let stolen = bucket.publish(&at(2), &bucket.outside, &other, &key(1), 4).await;
    let (current, current_before) = (bucket.keys.current(), bucket.store.get(&bucket.keys.current(), 1 << 20).await.unwrap().bytes);
    bucket.renew_current(2, stolen, &key(9), 20).await;
    assert!(bucket.discover(NOW_MS).await.is_ok(), "a client that comes for the first time cannot know");
    let error = bucket.discover_again(&seen).await.err().unwrap();
    assert!(matches!(error, DiscoveryError::RootReplaced { version: 2 }), "{error}");
    assert!(reader.moved(NOW_MS).await.is_err());
    // Also where he goes on from there.
    let further = RunRoot { version: 3, previous: stolen, ..other };
    bucket.publish(&at(3), &bucket.outside, &further, &key(1), 5).await;
    assert!(matches!(bucket.discover_again(&seen).await, Err(DiscoveryError::RootReplaced { version: 2 })));
    assert!(reader.moved(NOW_MS).await.is_err());

    // Put right again, everybody goes on; and the new owner signs.
    bucket.publish(&at(2), &bucket.outside, &second, &key(1), 2).await;
    bucket.publish(&at(3), &bucket.outside, &third, &key(6), 6).await;
    bucket.put(&current, &current_before).await;
    assert!(matches!(reader.moved(NOW_MS).await, Err(DiscoveryError::Replaced { version: 3, .. })));
    assert_eq!(reader.roots().seen().root, 3);
}

#[tokio::test]
async fn roots_are_numbered_without_a_gap() {
    let bucket = Bucket::new().await;
    let next = RunRoot { version: 2, previous: bucket.root_digest(), orchestrator: key(5).key(), ..bucket.root.clone() };
    // At a key beyond the next one nobody looks.
    bucket.publish(&bucket.keys.root(3), &bucket.outside, &next, &key(1), 2).await;
    assert_eq!(bucket.discover(NOW_MS).await.unwrap().roots().known().unwrap().newest.version, 1);
    // At the next key a document has to be of that version.
    for version in [0, 1, 3, u32::MAX] {
        let stray = RunRoot { version, ..next.clone() };
        bucket.publish(&bucket.keys.root(2), &bucket.outside, &stray, &key(1), 2).await;
        let refused = bucket.discover(NOW_MS).await;
        assert!(matches!(refused, Err(DiscoveryError::DigestMismatch { key }) if key == bucket.keys.root(2)), "{version}");
    }
    bucket.store.delete(&bucket.keys.root(2)).await.unwrap();
    assert!(bucket.discover(NOW_MS).await.is_ok());
}

#[tokio::test]
async fn a_run_whose_owner_names_other_hosts_is_found_anew() {
    let bucket = Bucket::new().await;
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    let second =
        RunRoot { version: 2, previous: bucket.root_digest(), store_hosts: vec!["elsewhere.example:443".into()], ..bucket.root.clone() };
    bucket.publish(&bucket.keys.root(2), &bucket.outside, &second, &key(1), 2).await;
    assert!(reader.moved(NOW_MS).await.unwrap());
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    assert_eq!(reader.facts().root.store_hosts, second.store_hosts);
    assert!(!reader.moved(NOW_MS).await.unwrap());
}

#[tokio::test]
async fn a_root_that_the_owner_before_did_not_sign_is_refused() {
    let bucket = Bucket::new().await;
    bucket.rotate(&key(5), &key(9)).await;
    assert!(matches!(of_envelope(bucket.discover(NOW_MS).await.err().unwrap()), EnvelopeError::Signer { .. }));
    // Signed by the owner, but not the successor of what is there.
    let stray = RunRoot { version: 2, previous: Digest::blake3(b"another"), ..bucket.root.clone() };
    bucket.publish(&bucket.keys.root(2), &bucket.outside, &stray, &key(1), 3).await;
    assert!(matches!(bucket.discover(NOW_MS).await, Err(DiscoveryError::DigestMismatch { .. })));
}

#[tokio::test]
async fn a_frozen_run_expires() {
    let bucket = Bucket::new().await;
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    let late = NOW_MS + 20 * 60_000;
    assert!(matches!(of_envelope(bucket.discover(late).await.err().unwrap()), EnvelopeError::Expired { .. }));
    assert!(matches!(of_envelope(reader.head(late).await.unwrap_err()), EnvelopeError::Expired { .. }));
}

#[tokio::test]
async fn an_older_head_that_is_put_back_is_refused() {
    let bucket = Bucket::new().await;
    let at = bucket.keys.run(bucket.context.run).head();
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    bucket.publish(&at, &bucket.context, &head(5), &key(2), 20).await;
    assert_eq!(reader.head(NOW_MS).await.unwrap().unwrap().outer_step, 5);
    bucket.publish(&at, &bucket.context, &head(4), &key(2), 15).await;
    assert_eq!(of_envelope(reader.head(NOW_MS).await.unwrap_err()), EnvelopeError::Replayed { got: 15, seen: 20 });
}

#[tokio::test]
async fn a_restarted_client_is_shown_no_older_root_and_no_older_pointer() {
    let bucket = Bucket::new().await;
    let old_root = bucket.store.get(&bucket.keys.root(1), 1 << 20).await.unwrap().bytes;
    let old_current = bucket.store.get(&bucket.keys.current(), 1 << 20).await.unwrap().bytes;
    // The owner names another key, and a client sees it.
    let root_digest = bucket.rotate(&key(5), &key(1)).await;
    let new_current = bucket.renew_current(2, root_digest, &key(5), 31).await;
    let seen = bucket.discover(NOW_MS).await.unwrap().roots().seen();
    assert_eq!((seen.root, seen.root_digest), (2, Some(root_digest)));
    assert!(bucket.discover_again(&seen).await.is_ok());
    // Whoever holds the old key hides the second root and shows what he signed before.
    bucket.store.delete(&bucket.keys.root(2)).await.unwrap();
    bucket.put(&bucket.keys.root(1), &old_root).await;
    bucket.put(&bucket.keys.current(), &old_current).await;
    assert!(bucket.discover_again(&Seen::default()).await.is_ok(), "a client that comes for the first time cannot know");
    assert!(matches!(bucket.discover_again(&seen).await, Err(DiscoveryError::RootHidden { found: 1, seen: 2 })));
    // Or the bucket shows an older pointer of the same key.
    bucket.rotate(&key(5), &key(1)).await;
    bucket.renew_current(2, root_digest, &key(5), 40).await;
    let seen = bucket.discover_again(&seen).await.unwrap().roots().seen();
    bucket.put(&bucket.keys.current(), &new_current).await;
    let refused = bucket.discover_again(&seen).await;
    assert!(matches!(refused, Err(DiscoveryError::Envelope { error: EnvelopeError::Replayed { got: 31, seen: 40 }, .. })));
}

#[tokio::test]
async fn documents_of_different_times_do_not_mix() {
    let bucket = Bucket::new().await;
    let run = bucket.keys.run(bucket.context.run);
    // A validly signed manifest that is not the one that the current run names.
    let manifest = RunManifest { name: "other".into(), ..bucket.manifest(Digest::ZERO, Digest::ZERO) };
    bucket.publish(&run.manifest(), &bucket.context, &manifest, &key(2), 1).await;
    assert!(matches!(bucket.discover(NOW_MS).await, Err(DiscoveryError::DigestMismatch { key }) if key == run.manifest()));
    // A catalog page that is not the one that the manifest names.
    let current = bucket.open_run(&key(2)).await;
    let page = CatalogPage { page: 7, ..first_page() };
    bucket.publish(&run.catalog(0), &bucket.context, &page, &key(2), 1).await;
    assert!(matches!(bucket.discover(NOW_MS).await, Err(DiscoveryError::DigestMismatch { key }) if key == run.catalog(0)));
    // A current run that names another root.
    bucket.open_run(&key(2)).await;
    let stray = CurrentRun { root_digest: Digest::blake3(b"another root"), ..current };
    bucket.publish(&bucket.keys.current(), &bucket.outside, &stray, &key(2), 11).await;
    assert!(matches!(bucket.discover(NOW_MS).await, Err(DiscoveryError::DigestMismatch { key }) if key == bucket.keys.current()));
}

#[tokio::test]
async fn shards_that_join_a_run_are_read_with_the_head_that_names_them_and_only_in_an_unbroken_chain() {
    let bucket = Bucket::new().await;
    let (run, signer) = (bucket.keys.run(bucket.context.run), key(2));
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    let shards = reader.facts().shards.clone();
    let page = |page, previous, shard: &str| CatalogPage { page, previous, shards: vec![training_shard(shard)] };
    let named = |outer_step, page, digest| Head { catalog: CatalogRef { page, digest }, ..head(outer_step) };
    let first = head(1).catalog.digest;
    let second = bucket.publish(&run.catalog(1), &bucket.context, &page(1, first, "b"), &signer, 2).await;
    let third = page(2, second, "c");

    // The page is not there yet: no head, and none is missed.
    let digest = Digest::blake3(&sign(&third, &bucket.context, &signer, 3, NOW_MS));
    bucket.publish(&run.head(), &bucket.context, &named(2, 2, digest), &signer, 20).await;
    assert!(reader.head(NOW_MS).await.is_err());
    assert!(shards.list().is_empty());
    bucket.publish(&run.catalog(2), &bucket.context, &third, &signer, 3).await;
    assert_eq!(reader.head(NOW_MS).await.unwrap().unwrap().outer_step, 2);
    assert_eq!(shards.list().iter().map(|shard| shard.id.as_str()).collect::<Vec<_>>(), ["b", "c"]);
    // A late joiner reads the same.
    let mut late = bucket.discover(NOW_MS).await.unwrap();
    late.head(NOW_MS).await.unwrap();
    assert_eq!(late.facts().shards.list(), shards.list());

    // A page that does not follow, a head that names another page than lies there, a head that goes back.
    let mismatch = |error: DiscoveryError, page| matches!(error, DiscoveryError::DigestMismatch { key } if key == run.catalog(page));
    let stray = bucket.publish(&run.catalog(3), &bucket.context, &page(3, first, "d"), &signer, 4).await;
    bucket.publish(&run.head(), &bucket.context, &named(3, 3, stray), &signer, 21).await;
    assert!(mismatch(reader.head(NOW_MS).await.unwrap_err(), 3));
    bucket.publish(&run.head(), &bucket.context, &named(4, 2, stray), &signer, 22).await;
    assert!(mismatch(reader.head(NOW_MS).await.unwrap_err(), 2));
    bucket.publish(&run.head(), &bucket.context, &named(5, 1, second), &signer, 23).await;
    assert!(mismatch(reader.head(NOW_MS).await.unwrap_err(), 1));
    assert_eq!(shards.list().len(), 2, "what was known stays");
}

#[tokio::test]
async fn a_stolen_key_that_ran_ahead_with_the_numbers_locks_nobody_out_after_a_rotation() {
    let bucket = Bucket::new().await;
    let run = bucket.keys.run(bucket.context.run);
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    bucket.publish(&run.head(), &bucket.context, &head(9), &key(2), u64::MAX).await;
    assert!(reader.head(NOW_MS).await.is_ok());
    bucket.publish(&run.head(), &bucket.context, &head(10), &key(2), 30).await;
    assert!(matches!(of_envelope(reader.head(NOW_MS).await.unwrap_err()), EnvelopeError::Replayed { seen: u64::MAX, .. }));
    let root_digest = bucket.rotate(&key(5), &key(1)).await;
    bucket.renew_current(2, root_digest, &key(5), 31).await;
    bucket.publish(&run.head(), &bucket.context, &head(11), &key(5), 32).await;
    // Neither those that run nor those that come.
    assert_eq!(reader.head(NOW_MS).await.unwrap().unwrap().outer_step, 11);
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    assert_eq!(reader.head(NOW_MS).await.unwrap().unwrap().outer_step, 11);
}

#[tokio::test]
async fn two_heads_with_one_number_are_kept_as_a_proof_that_convicts_their_signer() {
    let bucket = Bucket::new().await;
    let at = bucket.keys.run(bucket.context.run).head();
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    bucket.publish(&at, &bucket.context, &head(5), &key(2), 20).await;
    reader.head(NOW_MS).await.unwrap();
    // The same document again is nothing.
    bucket.publish(&at, &bucket.context, &head(5), &key(2), 20).await;
    assert!(reader.head(NOW_MS).await.is_ok());
    bucket.publish(&at, &bucket.context, &head(6), &key(2), 20).await;
    let Err(DiscoveryError::Equivocation { proof, .. }) = reader.head(NOW_MS).await else { panic!("it was accepted") };
    let (convicted, sequence, ids) = proof.verify().unwrap();
    assert_eq!((convicted, sequence), (key(2).key().account(), 20));
    assert_ne!(ids[0], ids[1]);
}

#[tokio::test]
async fn two_pointers_to_the_current_run_with_one_number_convict_their_signer_also_over_a_restart() {
    let bucket = Bucket::new().await;
    let at = bucket.keys.current();
    let mut reader = bucket.discover(NOW_MS).await.unwrap();
    let root_digest = bucket.root_digest();
    bucket.renew_current(1, root_digest, &key(2), 20).await;
    assert!(!reader.moved(NOW_MS).await.unwrap());
    assert!(!reader.moved(NOW_MS).await.unwrap(), "the same document again is nothing");
    let seen = reader.roots().seen();

    let other = CurrentRun { root_version: 1, root_digest, run: RunId([9; 16]), manifest_digest: Digest::ZERO };
    bucket.publish(&at, &bucket.outside, &other, &key(2), 20).await;
    for error in [reader.moved(NOW_MS).await.unwrap_err(), bucket.discover_again(&seen).await.err().unwrap()] {
        let (convicted, sequence, _) = error.proof().expect("a proof").verify().unwrap();
        assert_eq!((convicted, sequence), (key(2).key().account(), 20));
        assert!(!error.is_final());
    }
    // What was refused is not what the next look compares with, and an older one is refused as well.
    assert_eq!(reader.roots().seen(), seen);
    bucket.renew_current(1, root_digest, &key(2), 19).await;
    assert_eq!(of_envelope(reader.moved(NOW_MS).await.unwrap_err()), EnvelopeError::Replayed { got: 19, seen: 20 });
    // A client that kept only the number still refuses it.
    let before = Seen { current: Vec::new(), ..seen };
    bucket.publish(&at, &bucket.outside, &other, &key(2), 20).await;
    let refused = bucket.discover_again(&before).await.err().unwrap();
    assert!(matches!(of_envelope(refused), EnvelopeError::Equivocation { sequence: 20, .. }));
}
