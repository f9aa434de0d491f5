//! Finding the active run and following it, through anonymous public reads alone.
//!
//! Trust starts at the owner that the user named: root version 1 is signed by it, version N signs version N + 1; the newest root
//! names the orchestrator's key; everything else is signed by that key and tied together by digests. Nobody sets a run id. A reader
//! that runs follows the roots as well ([`Roots`]): what a newly named key signs counts at once, and what the key before it signs does
//! not any more.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use protocol::documents::{CatalogPage, CatalogRef, Codec, CurrentRun, Equivocation, Head, RunManifest, RunRoot};
use protocol::envelope::{Context, Document, EnvelopeError, Expect, PROTOCOL_VERSION, RunId, SequenceGuard, Verified, open, open_stored};
use protocol::paths::{Keys, RunKeys};
use protocol::{Digest, FragmentPlan, ShardManifest};

use crate::StoreError;
use crate::client::{PublicRead, PublicReader};
use crate::roots::{RootChain, Roots};

#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    #[error(
        "no run is published in this bucket yet\nhint: check bucket, endpoint and netuid; if they are right, wait for the orchestrator"
    )]
    NoRun,
    #[error(
        "the bucket's current run is {current}, but this machine is pinned to {pinned}\nhint: remove QUASAR_RUN_ID; the run is found by itself"
    )]
    Pinned { current: RunId, pinned: RunId },
    #[error(
        "the run speaks protocol {min} to {max}, this build speaks {PROTOCOL_VERSION}\nhint: install a release of this software that the run accepts"
    )]
    ProtocolVersion { min: u16, max: u16 },
    #[error(
        "the run's versions go out in {down:?}, the programs of this build read bf16 and int4\nhint: install a release of this software that reads the run's versions"
    )]
    CodecDown { down: Codec },
    #[error(
        "the newest run root in the bucket is version {found}, and version {seen} was seen before\nhint: the bucket was set back, or somebody hides what the owner signed; ask the owner of the run"
    )]
    RootHidden { found: u32, seen: u32 },
    #[error(
        "run root {version} in the bucket is another one than was seen before\nhint: somebody who holds the key of an earlier owner has replaced it; ask the owner of the run"
    )]
    RootReplaced { version: u32 },
    #[error("what was seen of the run root cannot be kept: {0}\nhint: check the disk of the state folder; this is retried")]
    Memory(String),
    #[error(
        "{key} is signed by a key that run root {version} does not name any more\nhint: wait until the orchestrator with the key that it names has started"
    )]
    Replaced { key: String, version: u32 },
    #[error("{key}: {error}")]
    Envelope { key: String, error: EnvelopeError },
    #[error("{key} is missing\nhint: the run is incomplete in the bucket; its operator has to publish it again")]
    Missing { key: String },
    #[error(
        "{key} has another digest than the document that names it\nhint: the object was replaced; the orchestrator's bucket is damaged or hostile"
    )]
    DigestMismatch { key: String },
    #[error("{key} contradicts the run root: {what}\nhint: the run's operator exceeded the bounds that the owner signed")]
    OutOfBounds { key: String, what: &'static str },
    /// The proof holds for whoever reads it.
    #[error(
        "the orchestrator signed two different documents with the same sequence at {key}\nhint: the proof is kept in the state folder; show it to the owner of the run"
    )]
    Equivocation { key: String, proof: Box<Equivocation> },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl DiscoveryError {
    /// Whether a person has to change something before discovery can succeed.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Pinned { .. } | Self::ProtocolVersion { .. } | Self::CodecDown { .. } => true,
            Self::Envelope { error, .. } => matches!(
                error,
                EnvelopeError::Genesis { .. } | EnvelopeError::Netuid { .. } | EnvelopeError::Signer { .. } | EnvelopeError::Version(_)
            ),
            _ => false,
        }
    }

    /// Why `file`, read from `key`, was not accepted after `last`. Two documents that contradict each other are more than an error:
    /// together they are a proof.
    pub(crate) fn refused(key: &str, error: EnvelopeError, last: Option<&[u8]>, file: &[u8]) -> Self {
        let key = key.to_owned();
        match (error, last) {
            (EnvelopeError::Equivocation { .. }, Some(last)) => {
                let proof = Equivocation { key: key.clone(), first: last.to_vec(), second: file.to_vec() };
                Self::Equivocation { key, proof: Box::new(proof) }
            }
            (error, _) => Self::Envelope { key, error },
        }
    }

    /// The proof, where somebody contradicted himself.
    pub fn proof(&self) -> Option<&Equivocation> {
        match self {
            Self::Equivocation { proof, .. } => Some(proof),
            _ => None,
        }
    }
}

/// What stays for the whole run.
#[derive(Clone, Debug)]
pub struct RunFacts {
    /// The newest one when the run was found: who signs may change, its hosts and bounds do not within a run ([`RunReader::moved`]).
    pub root: RunRoot,
    pub manifest: RunManifest,
    pub plan: FragmentPlan,
    pub shards: Shards,
    pub context: Context,
    pub keys: Keys,
    pub run: RunKeys,
}

/// The run's shards so far, in the order of their pages. Clones show the same ones.
#[derive(Clone, Debug, Default)]
pub struct Shards(Arc<RwLock<Pages>>);

#[derive(Debug, Default)]
struct Pages {
    newest: Option<CatalogRef>,
    shards: Arc<Vec<ShardManifest>>,
}

impl Shards {
    /// What is known now.
    pub fn list(&self) -> Arc<Vec<ShardManifest>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).shards.clone()
    }

    /// Reads the pages up to `newest`: each names the one before it, and the last must be the one that is asked for.
    async fn extend(
        &self,
        public: &PublicReader,
        run: &RunKeys,
        context: &Context,
        expect: Expect<'_>,
        newest: &CatalogRef,
    ) -> Result<(), DiscoveryError> {
        let mut pages = Vec::new();
        for page in self.next_page()..=newest.page {
            pages.push(stored::<CatalogPage>(public, &run.catalog(page), context, expect).await?);
        }
        self.take(pages, newest).map_err(|page| DiscoveryError::DigestMismatch { key: run.catalog(page) })
    }

    /// Shards that are known already, up to this page.
    pub fn known(newest: CatalogRef, shards: Vec<ShardManifest>) -> Self {
        Self(Arc::new(RwLock::new(Pages { newest: Some(newest), shards: Arc::new(shards) })))
    }

    /// The first page that was not taken yet.
    pub fn next_page(&self) -> u32 {
        self.0.read().unwrap_or_else(PoisonError::into_inner).newest.map_or(0, |known| known.page.saturating_add(1))
    }

    /// Takes the pages that follow, each with the digest of its file: all of them, or none where one does not name the page before
    /// it, or the last is not `newest`.
    ///
    /// # Errors
    /// The number of the page that does not fit.
    pub fn take(&self, pages: Vec<(CatalogPage, Digest)>, newest: &CatalogRef) -> Result<(), u32> {
        let mut taken = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let (mut known, mut shards) = (taken.newest, Vec::new());
        for (document, digest) in pages {
            let page = known.map_or(0, |known| known.page.saturating_add(1));
            let follows = document.page == page && document.previous == known.map_or(Digest::ZERO, |known| known.digest);
            if !follows || !document.shards.iter().all(|shard| shard.file.is_consistent()) {
                return Err(page);
            }
            known = Some(CatalogRef { page, digest });
            shards.extend(document.shards);
        }
        if known.as_ref() != Some(newest) {
            return Err(newest.page);
        }
        Arc::make_mut(&mut taken.shards).extend(shards);
        taken.newest = known;
        Ok(())
    }
}

/// Follows one run.
#[derive(Clone)]
pub struct RunReader {
    public: PublicReader,
    roots: Roots,
    facts: Arc<RunFacts>,
    etags: BTreeMap<String, String>,
    guard: SequenceGuard,
    /// What was last accepted at each polled key: one half of a proof, should the other half ever come.
    last: BTreeMap<String, Bytes>,
}

impl RunReader {
    /// Finds the run that is current in the bucket behind `public`, which may show nothing older than what `roots` have seen there.
    pub async fn discover(public: PublicReader, roots: Roots, pin: Option<RunId>, now_ms: u64) -> Result<Self, DiscoveryError> {
        let outside = *roots.outside();
        let keys = Keys::new(outside.netuid);
        roots.follow(&public).await?;

        let key = keys.current();
        let bytes = read(&public, &key, CurrentRun::PURPOSE.limit()).await?.ok_or(DiscoveryError::NoRun)?;
        let (current, chain) = open_present::<CurrentRun>(&public, &roots, &key, &outside, &bytes, now_ms).await?;
        roots.accept(&key, &current, &bytes)?;
        let current = current.document;
        // An orchestrator that is still named may not have read the newest root yet.
        if chain.digest(current.root_version) != Some(current.root_digest) {
            return Err(DiscoveryError::DigestMismatch { key });
        }
        if let Some(pinned) = pin
            && pinned != current.run
        {
            return Err(DiscoveryError::Pinned { current: current.run, pinned });
        }
        let root = &chain.newest;

        let context = Context { run: current.run, ..outside };
        let run = keys.run(current.run);
        // Written once, perhaps before a rotation of the key; digests tie all of it to the present one.
        let expect = Expect::Any(&chain.orchestrators);
        let (manifest, digest) = stored::<RunManifest>(&public, &run.manifest(), &context, expect).await?;
        if digest != current.manifest_digest {
            return Err(DiscoveryError::DigestMismatch { key: run.manifest() });
        }
        if !(manifest.protocol_min..=manifest.protocol_max).contains(&PROTOCOL_VERSION) {
            return Err(DiscoveryError::ProtocolVersion { min: manifest.protocol_min, max: manifest.protocol_max });
        }
        let down = manifest.parameters.codec_down;
        if down.withholds() {
            return Err(DiscoveryError::CodecDown { down });
        }
        let out_of_bounds = |what| DiscoveryError::OutOfBounds { key: run.manifest(), what };
        if manifest.parameters.fragments > root.bounds.fragments_max || manifest.parameters.fragments == 0 {
            return Err(out_of_bounds("the number of fragments"));
        }
        if manifest.parameters.slots > root.bounds.slots_max || manifest.parameters.slots == 0 {
            return Err(out_of_bounds("the number of slots"));
        }
        let (plan, _) = stored::<FragmentPlan>(&public, &run.plan(&manifest.plan), &context, expect).await?;
        if plan.digest() != manifest.plan || plan.fragments.len() != usize::from(manifest.parameters.fragments) {
            return Err(DiscoveryError::DigestMismatch { key: run.plan(&manifest.plan) });
        }
        let shards = Shards::default();
        if let Some(newest) = manifest.catalog.last() {
            shards.extend(&public, &run, &context, expect, newest).await?;
        }
        let facts = Arc::new(RunFacts { root: root.clone(), manifest, plan, shards, context, keys, run });
        Ok(Self { public, roots, facts, etags: BTreeMap::new(), guard: SequenceGuard::default(), last: BTreeMap::new() })
    }

    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    pub fn facts(&self) -> &Arc<RunFacts> {
        &self.facts
    }

    /// The head, if it changed since the last call. Shards that joined the run with it are in [`RunFacts::shards`] by then.
    pub async fn head(&mut self, now_ms: u64) -> Result<Option<Head>, DiscoveryError> {
        let key = self.facts.run.head();
        let Some(verified) = self.poll::<Head>(&key, now_ms).await? else { return Ok(None) };
        let head = verified.document;
        if head.fragments.len() != self.facts.plan.fragments.len() {
            return Err(DiscoveryError::OutOfBounds { key, what: "the number of fragments" });
        }
        let (facts, chain) = (&self.facts, self.roots.known()?);
        let extended = facts.shards.extend(&self.public, &facts.run, &facts.context, Expect::Any(&chain.orchestrators), &head.catalog);
        if let Err(error) = extended.await {
            // The head was not given out: it is not what the next look compares with.
            self.etags.remove(&key);
            return Err(error);
        }
        Ok(Some(head))
    }

    /// A mutable public object of the orchestrator, if it is there and changed since the last call.
    pub async fn poll<D: Document>(&mut self, key: &str, now_ms: u64) -> Result<Option<Verified<D>>, DiscoveryError> {
        let object = match self.public.get(key, self.etags.get(key).map(String::as_str), D::PURPOSE.file_limit()).await? {
            PublicRead::Absent | PublicRead::Unchanged => return Ok(None),
            PublicRead::Found(object) => object,
        };
        let (verified, _) = open_present::<D>(&self.public, &self.roots, key, &self.facts.context, &object.bytes, now_ms).await?;
        let accepted = self.guard.accept(key, &verified.header, &verified.id);
        accepted.map_err(|error| DiscoveryError::refused(key, error, self.last.get(key).map(AsRef::as_ref), &object.bytes))?;
        self.last.insert(key.to_owned(), object.bytes);
        match object.etag {
            Some(etag) => self.etags.insert(key.to_owned(), etag),
            None => self.etags.remove(key),
        };
        Ok(Some(verified))
    }

    /// A write-once public object; `None` while it is absent.
    pub async fn once<D: Document>(&self, key: &str, expect: Expect<'_>) -> Result<Option<Verified<D>>, DiscoveryError> {
        match read(&self.public, key, D::PURPOSE.limit()).await? {
            Some(bytes) => checked(key, open_stored(&bytes, &self.facts.context, expect)).map(Some),
            None => Ok(None),
        }
    }

    /// A write-once public object of the orchestrator, from before or after a rotation of its key; `None` while it is absent.
    pub async fn published<D: Document>(&self, key: &str) -> Result<Option<Verified<D>>, DiscoveryError> {
        Ok(self.published_file(key).await?.map(|(verified, _)| verified))
    }

    /// As [`RunReader::published`], with the file as it was signed.
    pub async fn published_file<D: Document>(&self, key: &str) -> Result<Option<(Verified<D>, Bytes)>, DiscoveryError> {
        let Some(bytes) = read(&self.public, key, D::PURPOSE.limit()).await? else { return Ok(None) };
        let attempt = |chain: Arc<RootChain>| open_stored(&bytes, &self.facts.context, Expect::Any(&chain.orchestrators));
        let opened = match attempt(self.roots.known()?) {
            Err(EnvelopeError::Signer { .. }) => attempt(self.roots.follow(&self.public).await?),
            opened => opened,
        };
        let verified = checked(key, opened)?;
        Ok(Some((verified, bytes)))
    }

    /// Whether another run is current by now, or this one has to be found anew because the owner names other hosts or bounds. Follows the
    /// roots in any case: a key that lost its power has none over a reader that runs.
    pub async fn moved(&mut self, now_ms: u64) -> Result<bool, DiscoveryError> {
        self.roots.follow(&self.public).await?;
        let key = self.facts.keys.current();
        let Some(bytes) = read(&self.public, &key, CurrentRun::PURPOSE.limit()).await? else { return Ok(false) };
        let outside = self.facts.context.without_run();
        let (current, chain) = open_present::<CurrentRun>(&self.public, &self.roots, &key, &outside, &bytes, now_ms).await?;
        self.roots.accept(&key, &current, &bytes)?;
        let (root, then) = (&chain.newest, &self.facts.root);
        let is_elsewhere = (&root.store_hosts, &root.bounds) != (&then.store_hosts, &then.bounds);
        Ok(is_elsewhere || current.document.run != self.facts.context.run)
    }
}

/// Opens what the orchestrator signs again and again: with the key that the newest root names, and no other. Where the signer does not
/// fit, the owner may have named another one meanwhile. Gives the roots that it was checked against as well.
async fn open_present<D: Document>(
    public: &PublicReader,
    roots: &Roots,
    key: &str,
    context: &Context,
    bytes: &[u8],
    now_ms: u64,
) -> Result<(Verified<D>, Arc<RootChain>), DiscoveryError> {
    let attempt = |chain: &RootChain| open::<D>(bytes, context, Expect::Key(&chain.newest.orchestrator), now_ms);
    let mut chain = roots.known()?;
    let mut result = attempt(&chain);
    if matches!(result, Err(EnvelopeError::Signer { .. })) {
        chain = roots.follow(public).await?;
        result = attempt(&chain);
    }
    match result {
        Ok(verified) => Ok((verified, chain)),
        // Signed before the rotation, and nobody with the new key was there since.
        Err(EnvelopeError::Signer { .. }) if open_stored::<D>(bytes, context, Expect::Any(&chain.orchestrators)).is_ok() => {
            Err(DiscoveryError::Replaced { key: key.to_owned(), version: chain.newest.version })
        }
        Err(error) => Err(DiscoveryError::Envelope { key: key.to_owned(), error }),
    }
}

async fn read(public: &PublicReader, key: &str, limit: usize) -> Result<Option<bytes::Bytes>, DiscoveryError> {
    match public.get(key, None, limit as u64 + 512).await? {
        PublicRead::Found(object) => Ok(Some(object.bytes)),
        PublicRead::Absent | PublicRead::Unchanged => Ok(None),
    }
}

/// A write-once document that must be there, with the digest of its file.
async fn stored<D: Document>(
    public: &PublicReader,
    key: &str,
    context: &Context,
    expect: Expect<'_>,
) -> Result<(D, Digest), DiscoveryError> {
    let bytes = read(public, key, D::PURPOSE.limit()).await?.ok_or_else(|| DiscoveryError::Missing { key: key.to_owned() })?;
    let verified = checked::<D>(key, open_stored(&bytes, context, expect))?;
    Ok((verified.document, Digest::blake3(&bytes)))
}

fn checked<D>(key: &str, result: Result<Verified<D>, EnvelopeError>) -> Result<Verified<D>, DiscoveryError> {
    result.map_err(|error| DiscoveryError::Envelope { key: key.to_owned(), error })
}
