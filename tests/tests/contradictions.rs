//! A bucket whose objects do not belong together, and an orchestrator that is started on it as a real process: it says which object
//! it is, and changes none.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use chain::{Hotkey, Wallet};
use protocol::documents::{CatalogPage, CurrentRun, Head, Release, RunManifest};
use protocol::envelope::{Document, Header, RunId, sign_with_header, verify_as_stated};
use protocol::paths::Keys;
use protocol::{Digest, FragmentPlan, codec};
use quasar_tests::files;
use quasar_tests::office::Office;

const START: Duration = Duration::from_secs(60);
/// As documented: a person must change something.
const CONFIGURATION: i32 = 78;

/// The bucket of an office, as its own server keeps it: each object is a file, whose time tells one version from the next as its tag
/// does.
struct Bucket<'a> {
    office: &'a Office,
    orchestrator: Hotkey,
}

impl<'a> Bucket<'a> {
    fn of(office: &'a Office) -> Self {
        let wallets = office.bucket().with_file_name("wallets");
        let orchestrator = Wallet::new(wallets, "orchestrator", "default").load_hotkey().expect("the wallet is there");
        Self { office, orchestrator }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.office.bucket().join("objects").join(key)
    }

    fn document<D: Document>(&self, key: &str) -> (Header, D) {
        let bytes = std::fs::read(self.path(key)).unwrap_or_else(|error| panic!("{key}: {error}"));
        let (envelope, _) = verify_as_stated(&bytes).expect("a signed document");
        (envelope.header, codec::decode(&envelope.payload, D::PURPOSE.limit()).expect("it decodes"))
    }

    /// All objects but those that a start tries the store with.
    fn objects(&self) -> BTreeMap<PathBuf, (SystemTime, Digest)> {
        let kept = |path: &PathBuf| !path.to_string_lossy().contains("/private/check/");
        let objects = files(&self.office.bucket().join("objects")).into_iter().filter(kept);
        let version = |path: &PathBuf| {
            let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified()).expect("an object has a time");
            (modified, Digest::blake3(&std::fs::read(path).expect("the bucket is readable")))
        };
        objects.map(|path| (path.clone(), version(&path))).collect()
    }

    /// Puts another document to the key, with a good signature; gives what was there.
    fn replace<D: Document>(&self, key: &str, change: impl FnOnce(&mut Header, &mut D)) -> Vec<u8> {
        let path = self.path(key);
        let whole = std::fs::read(&path).expect("the bucket is readable");
        let (mut header, mut document) = self.document::<D>(key);
        change(&mut header, &mut document);
        let other = sign_with_header(header, &document, &self.orchestrator);
        // The server knows the length of each object.
        assert!(other.len() == whole.len() && other != whole, "{key}");
        std::fs::write(&path, other).expect("the bucket is writable");
        whole
    }

    fn put_back(&self, key: &str, whole: Vec<u8>) {
        std::fs::write(self.path(key), whole).expect("the bucket is writable");
    }

    /// A start ends with the name of this object, and without a change.
    fn is_refused_for(&self, key: &str) {
        let before = self.objects();
        let mut refused = self.office.start("orchestrator", "first", &["run"]);
        assert_eq!(refused.ended_within(START).code(), Some(CONFIGURATION), "{key}: {}", refused.log());
        let log = refused.log();
        assert!(log.lines().any(|line| line.starts_with("error: ") && line.contains(key)), "{key}: {log}");
        assert!(log.lines().any(|line| line.starts_with("hint: ")), "{key}: {log}");
        let after = self.objects();
        let changed: Vec<&PathBuf> = before.keys().chain(after.keys()).filter(|path| before.get(*path) != after.get(*path)).collect();
        assert!(changed.is_empty(), "{key}: {changed:?} changed");
    }

    fn refuses<D: Document>(&self, key: &str, change: impl FnOnce(&mut Header, &mut D)) {
        let whole = self.replace(key, change);
        self.is_refused_for(key);
        self.put_back(key, whole);
    }

    /// Another run manifest, which the current run names: it says itself what it contradicts.
    fn refuses_manifest(&self, keys: &Keys, run: RunId, named: &str, change: impl FnOnce(&mut RunManifest)) {
        let key = keys.run(run).manifest();
        let manifest = self.replace::<RunManifest>(&key, |_, manifest| change(manifest));
        let digest = Digest::blake3(&std::fs::read(self.path(&key)).expect("the bucket is readable"));
        let current = self.replace::<CurrentRun>(&keys.current(), |_, current| current.manifest_digest = digest);
        self.is_refused_for(named);
        self.put_back(&key, manifest);
        self.put_back(&keys.current(), current);
    }
}

#[test]
fn a_bucket_that_contradicts_itself_is_refused_by_the_name_of_the_object_and_left_as_it_is() {
    let office = Office::open();
    let bucket = Bucket::of(&office);
    let objects = bucket.objects();
    let current = objects.keys().find(|path| path.ends_with("public/current.qsr")).expect("a run is current");
    let (envelope, _) = verify_as_stated(&std::fs::read(current).expect("the bucket is readable")).expect("a signed document");
    let keys = Keys::new(envelope.header.netuid);
    let (_, current) = bucket.document::<CurrentRun>(&keys.current());
    let run = keys.run(current.run);
    let (_, manifest) = bucket.document::<RunManifest>(&run.manifest());

    bucket.refuses::<Head>(&run.head(), |header, _| header.run = RunId([9; 16]));
    bucket.refuses::<RunManifest>(&run.manifest(), |_, manifest| manifest.created_ms += 1);
    bucket.refuses::<FragmentPlan>(&run.plan(&manifest.plan), |_, plan| plan.fragments.swap(0, 1));
    bucket.refuses::<CatalogPage>(&run.catalog(0), |_, page| page.previous = Digest([1; 32]));
    bucket.refuses::<Release>(&keys.release_manifest(&manifest.base_release), |_, release| release.tokens += 1);

    let plan = run.plan(&manifest.plan);
    bucket.refuses_manifest(&keys, current.run, &plan, |manifest| manifest.parameters.fragments -= 1);
    bucket.refuses_manifest(&keys, current.run, &run.manifest(), |manifest| manifest.parameters.slots = u8::MAX);

    // Nothing else kept it from running, and nobody has held the lease before.
    let mut writer = office.start("orchestrator", "first", &["run"]);
    office.head_within(START, |seen| seen.head.epoch == 1, &|| writer.log());
    assert!(writer.is_up());
}
