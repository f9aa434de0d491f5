//! Effects at the edge: bucket, chain, disk. None of them fails in the eyes of the machine: what the store or the chain cannot do
//! now is tried again until it can, and everything is idempotent by key.

mod audits;
mod evidence;
mod grants;
mod merge;
mod pollers;
mod publish;
mod release;

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use chain::{Chain, KeyCertificate};
use daemon::driver::{Executor, Inputs};
use daemon::sequence::Sequence;
use daemon::{Shutdown, clock};
use protocol::documents::{CurrentRun, RunManifest};
use protocol::envelope::{self, Context, Document};
use protocol::paths::{Keys, RunKeys};
use protocol::{AccountId, Digest, FragmentPlan, ShardManifest, Signer};
use storage::{ObjectStore, PutCondition, StoreError};
use zeroize::Zeroizing;

use crate::machine::{Effect, Input, Slot};

pub use pollers::spawn_pollers;

/// Pause before an effect that failed is tried again, and its longest.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LONGEST: Duration = Duration::from_secs(15);

/// Everything that effects work with.
pub struct Service {
    pub store: Arc<dyn ObjectStore>,
    pub chain: Arc<dyn Chain>,
    pub signer: Arc<dyn Signer>,
    pub sequence: Sequence,
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
    /// Set when another process turns out to write to this run; `shutdown` follows.
    pub fenced: AtomicBool,
    pub shutdown: Shutdown,
    pub(crate) watched: Mutex<(Vec<Slot>, Vec<Slot>)>,
    /// Key certificates of the subnet; `None` before the chain was asked, when nobody can know what to seal to.
    pub(crate) certificates: Mutex<Option<HashMap<AccountId, KeyCertificate>>>,
    /// Newest progress envelope of each slot.
    pub(crate) records: Mutex<HashMap<Slot, (Digest, Bytes)>>,
    pub(crate) head_etag: tokio::sync::Mutex<Option<String>>,
    pub(crate) outbox: Outbox,
}

/// Writes to one key happen in order, and a write that was overtaken is left out.
#[derive(Default)]
pub struct Outbox(Mutex<BTreeMap<String, Turnstile>>);

/// Newest revision of a key, and the lock that its writers take in turn.
type Turnstile = (u64, Arc<tokio::sync::Mutex<()>>);

impl Outbox {
    /// Waits for the turn of `revision` at `key`; `None` if a newer one is there.
    async fn turn(&self, key: &str, revision: u64) -> Option<tokio::sync::OwnedMutexGuard<()>> {
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
        match self.store.put(key, bytes.clone(), PutCondition::IfAbsent).await {
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

    /// Overwrites a mutable key that only this process writes.
    pub(crate) async fn put_latest(&self, key: &str, revision: u64, make: impl Fn() -> Result<Bytes, String>) {
        let Some(_turn) = self.outbox.turn(key, revision).await else { return };
        persist(key, || async {
            let bytes = make()?;
            self.store.put(key, bytes, PutCondition::Always).await.map_err(|error| error.to_string())
        })
        .await;
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
            Effect::Watch { live, silent } => {
                *service.watched.lock().unwrap_or_else(PoisonError::into_inner) = (live, silent);
            }
            Effect::PublishHead { head } => {
                service.publish_head(&head).await;
                inputs.send(Input::HeadPublished).await;
            }
            Effect::PublishCurrent => service.publish_current().await,
            Effect::PublishJob { revision, job } => service.publish_job(revision, &job).await,
            Effect::PublishStanding { revision, slot, validator, mark, cycle } => {
                service.publish_standing(revision, slot, validator, &mark, cycle).await;
            }
            Effect::PublishPullGrants { revision, slot, session_epoch, wants } => {
                service.publish_pull_grants(revision, slot, session_epoch, &wants).await;
            }
            Effect::StoreCommitment { slot, t, id } => {
                if let Some(id) = service.store_commitment(slot, t, id).await {
                    inputs.send(Input::CommitmentStored { slot, t, id }).await;
                }
            }
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
                let hash = service.read_beacon(block).await;
                inputs.send(Input::Beacon { cycle, block, hash }).await;
            }
            Effect::MakeOpeningKeys { audits } => {
                let keys = audits.into_iter().map(|audit| (audit, service.opening_key(&audit).1)).collect();
                inputs.send(Input::OpeningKeys { keys }).await;
            }
            Effect::OrderAudit { selection, parts, leases } => {
                service.order_audit(&selection, &parts, leases).await;
                inputs.send(Input::AuditOrdered { audit: selection.audit }).await;
            }
            Effect::ReadVerdict { audit, validator } => {
                let verdict = service.read_verdict(&audit, &validator).await;
                inputs.send(Input::Verdict { audit, verdict }).await;
            }
            Effect::PublishLog { head } => {
                service.put_once(&service.run.log(head.frontier.size()), &*head).await;
                inputs.send(Input::LogPublished).await;
            }
            Effect::Release { versions, tokens } => {
                let release = service.release(versions, tokens).await;
                inputs.send(Input::Released { release }).await;
            }
            Effect::PublishStatus { status } => service.publish_status(&status).await,
        }
    }
}
