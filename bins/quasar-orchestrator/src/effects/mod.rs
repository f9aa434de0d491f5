//! Effects at the edge: bucket, chain, disk. None of them fails in the eyes of the machine: what the store or the chain cannot do
//! now is tried again until it can, and everything is idempotent by key. Where a key that is written once holds something else than
//! what belongs there, the process stops. Nothing is written without the writer lease ([`fence`]).

mod arithmetic;
mod audits;
mod catalog;
mod evidence;
pub mod fence;
mod grants;
mod merge;
pub(crate) mod payloads;
pub(crate) mod pollers;
mod publish;
mod release;
mod retire;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use chain::ChainLink;
use daemon::driver::{Executor, Inputs};
use daemon::sequence::Sequence;
use daemon::{Shutdown, clock};
use protocol::documents::{CurrentRun, RunManifest};
use protocol::envelope::{self, Context, Document, EnvelopeError, Expect, Header, Verified, open_stored};
use protocol::paths::{Keys, RunKeys};
use protocol::{Digest, FragmentPlan, KeyRef, ShardManifest, Signer};
use storage::discovery::DiscoveryError;
use storage::roots::Roots;
use storage::{ObjectStore, PutCondition, StoreError};
use zeroize::Zeroizing;

use crate::machine::{Effect, Input, SNAPSHOT_BYTES_MAX, Slot};

use fence::Fence;

pub use pollers::spawn_pollers;

/// Pause before an effect that failed is tried again, and its longest.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LONGEST: Duration = Duration::from_secs(15);

/// Why a process ends for good: no restart helps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    #[error("another orchestrator writes to this run\nhint: a second orchestrator runs as `run --standby`")]
    Fenced,
    #[error("another run is current\nhint: an orchestrator that is started now goes on with that one")]
    OtherRun,
    #[error("the owner signed a new root, which names another orchestrator\nhint: the wallet that the new root names has to run")]
    Renamed,
    #[error("{key} holds something else than what this orchestrator writes there\nhint: {hint}")]
    Contradicted { key: String, hint: &'static str },
}

/// Everything that effects work with.
pub struct Service {
    pub store: Arc<dyn ObjectStore>,
    pub chain: Arc<ChainLink>,
    pub signer: Arc<dyn Signer>,
    pub sequence: Arc<Sequence>,
    pub fence: Arc<Fence>,
    pub roots: Roots,
    /// Keys that the orchestrator's documents may be signed with: the signer's, and those before a rotation.
    pub signers: Vec<KeyRef>,
    pub context: Context,
    pub keys: Keys,
    pub run: RunKeys,
    pub manifest: RunManifest,
    pub current: CurrentRun,
    pub plan: Arc<FragmentPlan>,
    pub plan_digest: Digest,
    pub shards: Vec<ShardManifest>,
    pub base_files: Vec<protocol::FileRecord>,
    /// The keys that openings are sealed to are derived from this secret of the run.
    pub opening_secret: Zeroizing<[u8; 32]>,
    /// The base tree on the local disk.
    pub base_tree: PathBuf,
    pub state_dir: PathBuf,
    /// Why this process stops, if somebody else made it: another writer, another key. `shutdown` follows.
    pub stopped: Mutex<Option<Stop>>,
    pub shutdown: Shutdown,
    pub(crate) watched: Mutex<Watched>,
    /// Newest progress envelope of each slot.
    pub(crate) records: Mutex<HashMap<Slot, (Digest, Bytes)>>,
    pub(crate) head_etag: tokio::sync::Mutex<Option<String>>,
    pub(crate) outbox: Outbox,
    /// Leases whose record lies in the bucket.
    pub(crate) recorded: Mutex<HashSet<u64>>,
}

/// Slots whose records are read, as the newest revision says.
#[derive(Default)]
pub(crate) struct Watched {
    revision: u64,
    pub(crate) live: Vec<Slot>,
    pub(crate) silent: Vec<Slot>,
}

/// Writes to one key happen in order, and a write that was overtaken is left out.
#[derive(Default)]
pub struct Outbox(Mutex<BTreeMap<String, Turnstile>>);

/// Newest revision of a key, and the tag of what was last written there, behind the lock that its writers take in turn.
type Turnstile = (u64, Arc<tokio::sync::Mutex<Option<String>>>);

impl Outbox {
    /// Waits for the turn of `revision` at `key`; `None` if a newer one is there.
    async fn turn(&self, key: &str, revision: u64) -> Option<tokio::sync::OwnedMutexGuard<Option<String>>> {
        let lock = {
            let mut newest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let entry = newest.entry(key.to_owned()).or_default();
            entry.0 = entry.0.max(revision);
            entry.1.clone()
        };
        let guard = lock.lock_owned().await;
        let newest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        newest.get(key).is_some_and(|(newest, _)| *newest == revision).then_some(guard)
    }
}

/// Tries until it works. The pause grows, and each failure is logged with its reason.
pub(crate) async fn persist<T, E: std::fmt::Display, F: Future<Output = Result<T, E>>>(what: &str, mut attempt: impl FnMut() -> F) -> T {
    let mut pause = RETRY_FIRST;
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(error) => {
                tracing::warn!(retry_ms = pause.as_millis() as u64, "{what} failed: {error}");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_LONGEST);
            }
        }
    }
}

impl Service {
    pub(crate) fn sign<D: Document>(&self, document: &D) -> Result<Bytes, daemon::JournalError> {
        let now_ms = clock::now_ms();
        let sequence = self.sequence.next(now_ms)?;
        Ok(Bytes::from(envelope::sign(document, &self.context, &*self.signer, sequence, now_ms)))
    }

    /// Writes a signed document once; one that is there already stands. Gives the bytes that lie in the bucket.
    pub(crate) async fn put_once<D: Document>(&self, key: &str, document: &D) -> Bytes {
        persist(key, || async {
            let bytes = self.sign(document).map_err(|error| error.to_string())?;
            self.put_bytes_once(key, bytes).await.map_err(|error| error.to_string())
        })
        .await
    }

    /// Writes bytes once, or gives those that are there.
    pub(crate) async fn put_bytes_once(&self, key: &str, bytes: Bytes) -> Result<Bytes, StoreError> {
        let limit = bytes.len() as u64 * 2 + (1 << 20);
        match self.fence.write(self.store.put(key, bytes.clone(), PutCondition::IfAbsent)).await {
            Ok(_) => Ok(bytes),
            Err(StoreError::PreconditionFailed { .. }) => Ok(self.store.get(key, limit).await?.bytes),
            Err(error) => Err(error),
        }
    }

    /// Reads what somebody else wrote, at most `limit` bytes; `None` if it is not there, or longer.
    pub(crate) async fn get_present(&self, key: &str, limit: u64) -> Option<Bytes> {
        persist(key, || async {
            match self.store.get(key, limit).await {
                Ok(object) => Ok(Some(object.bytes)),
                Err(StoreError::NotFound { .. } | StoreError::TooLarge { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Reads what should be a document of at most `limit` bytes; `None` if nothing is there. What is longer is none, and no bytes are none
    /// either: it is read as that, because it stays as it is however often it is read.
    pub(crate) async fn read_document(&self, key: &str, limit: u64) -> Result<Option<Bytes>, StoreError> {
        match self.store.get(key, limit).await {
            Ok(object) => Ok(Some(object.bytes)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error @ StoreError::TooLarge { .. }) => {
                tracing::error!("{error}");
                Ok(Some(Bytes::new()))
            }
            Err(error) => Err(error),
        }
    }

    /// Overwrites a mutable key by compare-and-swap with what this process last wrote there. Whether it did: not where a newer revision is
    /// on its way.
    pub(crate) async fn put_latest(&self, key: &str, revision: u64, make: impl Fn() -> Result<Bytes, String> + Sync) -> bool {
        let Some(mut tag) = self.outbox.turn(key, revision).await else { return false };
        let make = &make;
        *tag = persist(key, || {
            let known = tag.clone();
            async move { self.swap(key, known, make).await }
        })
        .await;
        true
    }

    /// One attempt of a write by compare-and-swap; `known` is the tag of what this process wrote there last.
    async fn swap(
        &self,
        key: &str,
        known: Option<String>,
        make: &(dyn Fn() -> Result<Bytes, String> + Sync),
    ) -> Result<Option<String>, String> {
        let mut known = known;
        loop {
            let condition = match known.take() {
                Some(tag) => PutCondition::IfMatch(tag),
                None => self.look_before(key).await?,
            };
            let bytes = make()?;
            match self.fence.write(self.store.put(key, bytes, condition)).await {
                Ok(tag) => return Ok(Some(tag)),
                // An answer of ours was lost, or somebody else wrote: what lies there now tells, and whose the lease is.
                Err(StoreError::PreconditionFailed { .. }) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// The condition under which stays what this process finds at `key` and did not write, or does not know to have written. The lease is
    /// asked for after that: so it is no successor's. A predecessor's clock may have been ahead; our sequences follow those that it used.
    async fn look_before(&self, key: &str) -> Result<PutCondition, String> {
        let found = match self.store.get(key, SNAPSHOT_BYTES_MAX).await {
            Ok(object) => Some(object),
            Err(StoreError::NotFound { .. }) => None,
            Err(error) => return Err(error.to_string()),
        };
        self.confirm().await;
        let Some(object) = found else { return Ok(PutCondition::IfAbsent) };
        if let Ok((envelope, _)) = envelope::verify_as_stated(&object.bytes) {
            self.follow_numbers(&envelope.header).map_err(|error| error.to_string())?;
        }
        Ok(PutCondition::IfMatch(object.etag.unwrap_or_default()))
    }

    /// Numbers go on above those of a document that our key has signed. Readers count each key by itself: what a key before it has used, or
    /// whoever stole that, is nothing to us.
    fn follow_numbers(&self, header: &Header) -> Result<(), daemon::JournalError> {
        if header.signer == self.signer.key() { self.sequence.raise(header.sequence) } else { Ok(()) }
    }

    /// Looks for newer roots. An orchestrator that is named no more stops; the rest is a matter of who signs the next root.
    pub(crate) async fn follow_roots(&self) -> Result<(), DiscoveryError> {
        let chain = self.roots.follow(&*self.store).await?;
        if chain.newest.orchestrator != self.signer.key() {
            let (version, named) = (chain.newest.version, chain.newest.orchestrator.account());
            tracing::error!(version, %named, "a newer root names another orchestrator; this one stops and gives the lease back");
            self.stop(Stop::Renamed);
        }
        Ok(())
    }

    /// Effects begin beside each other: an older list must not take the place of a newer one.
    fn watch(&self, revision: u64, live: Vec<Slot>, silent: Vec<Slot>) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if revision > watched.revision {
            *watched = Watched { revision, live, silent };
        }
    }

    /// Asks the store whether the lease is still ours; stops everything if it is not.
    pub(crate) async fn confirm(&self) {
        if self.fence.confirm().await.is_err() {
            self.halt(Stop::Fenced).await
        }
    }

    pub(crate) fn stop(&self, why: Stop) {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.shutdown.trigger();
    }

    /// Stops everything. The effect that asks for it never ends, so nothing follows from what it was about to do.
    async fn halt<T>(&self, why: Stop) -> T {
        self.stop(why);
        std::future::pending().await
    }

    /// A key that is written once holds something else than what belongs there: no restart helps, a person has to look, and what would
    /// follow is not written.
    async fn contradicted<T>(&self, key: &str, hint: &'static str) -> T {
        tracing::error!("{key} holds something else than what this orchestrator writes there; it stops");
        self.halt(Stop::Contradicted { key: key.to_owned(), hint }).await
    }

    /// A document of the orchestrator from before or after a rotation of its key.
    pub(crate) fn open_own<D: Document>(&self, bytes: &[u8]) -> Result<Verified<D>, EnvelopeError> {
        open_stored(bytes, &self.context, Expect::Any(&self.signers))
    }
}

/// The driver's executor.
pub struct Hands(pub Arc<Service>);

impl Executor for Hands {
    type Input = Input;
    type Effect = Effect;

    async fn execute(&self, effect: Effect, inputs: Inputs<Input>) {
        let service = &self.0;
        match effect {
            Effect::Watch { revision, live, silent } => service.watch(revision, live, silent),
            Effect::PublishHead { head } => {
                service.publish_head(&head).await;
                service.sweep_payloads(head.closed_below);
                inputs.send(Input::HeadPublished).await;
            }
            Effect::PublishCurrent => service.publish_current().await,
            Effect::PublishJob { revision, job } => service.publish_job(revision, &job).await,
            Effect::PublishStanding { revision, slot, mark, cycle } => {
                service.publish_standing(revision, slot, &mark, cycle).await;
            }
            Effect::PublishPullGrants { revision, slot, session_epoch, recipient, wants } => {
                service.publish_pull_grants(revision, slot, session_epoch, recipient, &wants).await;
            }
            Effect::StoreCommitment { slot, t, id, commitment } => match service.store_commitment(slot, t, id, commitment).await {
                Some(Ok(id)) => inputs.send(Input::CommitmentStored { slot, t, id, commitment }).await,
                Some(Err(reason)) => {
                    tracing::debug!(hotkey = %slot.0.short(), slot = slot.1, t, "commitment refused: {reason}");
                    inputs.send(Input::CommitmentRefused { slot, t, commitment }).await;
                }
                None => {}
            },
            Effect::CheckPayload { slot, t, commitment } => {
                let outcome = service.check_payload(slot, t, &commitment).await;
                inputs.send(Input::PayloadChecked { slot, t, outcome }).await;
            }
            Effect::CheckReceipt { slot, lease, committed } => {
                let outcome = service.check_receipt(slot, &lease, &committed).await;
                inputs.send(Input::ReceiptChecked { slot, lease: lease.id, outcome }).await;
            }
            Effect::WriteTape { tape } => {
                let tape = Box::new(service.write_tape(&tape).await);
                inputs.send(Input::TapeWritten { tape }).await;
            }
            Effect::Merge { tape, rejected, previous_keyframe } => {
                let (manifest, id, keyframe_length) = service.merge(*tape, rejected, previous_keyframe).await;
                inputs.send(Input::Merged { manifest: Box::new(manifest), id, keyframe_length }).await;
            }
            Effect::ReadBeacon { cycle, block } => {
                let draw = Box::new(service.draw_audits(cycle, block).await);
                inputs.send(Input::Beacon { draw }).await;
            }
            Effect::MakeOpeningKeys { audits } => {
                let keys = audits.into_iter().map(|audit| (audit, service.opening_key(&audit).1)).collect();
                inputs.send(Input::OpeningKeys { keys }).await;
            }
            Effect::OrderAudit { selection, recipient, parts, leases } => {
                service.order_audit(&selection, recipient, &parts, leases).await;
                inputs.send(Input::AuditOrdered { audit: selection.audit }).await;
            }
            Effect::ReadVerdict { audit, validator } => {
                let verdict = service.read_verdict(&audit, &validator).await;
                inputs.send(Input::Verdict { audit, verdict }).await;
            }
            Effect::PublishLog { head } => {
                let stored = service.publish_log(&head).await;
                let input = if stored == *head { Input::LogPublished } else { Input::LogTaken { head: Box::new(stored) } };
                inputs.send(input).await;
            }
            Effect::Release { versions, tokens } => {
                let release = service.release(versions, tokens).await;
                inputs.send(Input::Released { release }).await;
            }
            Effect::PublishStatus { status } => service.publish_status(&status).await,
            Effect::StoreSnapshot { revision, bytes } => {
                let bytes = Bytes::from(bytes);
                if service.put_latest(&service.run.snapshot(), revision, || Ok(bytes.clone())).await {
                    // A successor may have read the one before it.
                    service.confirm().await;
                    inputs.send(Input::SnapshotStored { revision }).await;
                }
            }
            Effect::WritePage { page, previous, shards } => {
                let outcome = service.write_page(page, previous, &shards).await;
                inputs.send(Input::PageWritten { page, outcome }).await;
            }
            Effect::RecordLeaseEnd { end } => {
                let end = Box::new(service.record_lease_end(&end).await);
                inputs.send(Input::LeaseEnded { end }).await;
            }
            Effect::Retire { number, retired } => {
                service.retire(&retired).await;
                inputs.send(Input::RetiredAll { number }).await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
