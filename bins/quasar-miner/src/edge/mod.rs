//! Executes a learner's effects against the world: the bucket through grants, the chain, the disk, the trainer's thread.
//!
//! Every effect ends in an input, whatever happens; every failure is sorted by what the machine can do about it.

mod base;
mod book;
mod feedback;
mod keyframes;
mod looks;
mod openings;
mod spool;
mod staged;
mod tokens;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use chain::Hotkey;
use daemon::evidence::Evidence;
use daemon::sequence::Sequence;
use daemon::{JournalError, clock};
use protocol::audits::SEGMENT_CYCLES;
use protocol::documents::{Lease, MergeManifest, Progress, Receipt, encode_progress, opening_volume_bytes};
use protocol::envelope::{self, Document};
use protocol::schedule::cycle_of;
use protocol::{Digest, GrantRequest, Method};
use storage::client::{GrantAccess, GrantError, PutOutcome};
use storage::discovery::{RunFacts, RunReader};
use tokio::sync::mpsc;
use zeroize::Zeroizing;

pub use base::BaseTrees;
use book::GrantBook;
pub use feedback::{Feedback, FeedbackError};
pub use keyframes::{KeyframeStoreError, Keyframes, Promise, Route};
use looks::Looks;
pub use openings::OpeningFiles;
pub use spool::{Spool, SpoolError};
pub use staged::Staged;
pub use tokens::{ChunkCache, LeaseTokens, TokenStore};

use crate::machine::{Effect, Input, NotPrepared, PreparedPart, Put, Trouble};
use crate::trainer::TrainerThread;
use chain::ChainLink;

/// A progress record that was not written after this part of the time to live is given up; the next one is newer.
const PROGRESS_TRIES_PER_TTL: u64 = 5;
const PROGRESS_TIMEOUT_MIN: Duration = Duration::from_secs(2);
/// At the end, the spool may take so long to reach the disk. Without a state that is not there by then, the next session goes on from the
/// one before.
const FLUSH_PATIENCE: Duration = Duration::from_secs(40);

/// Bytes that were announced and wait for their upload: payloads by outer step, receipts by lease.
#[derive(Default)]
pub struct Announced(Mutex<HashMap<u64, Bytes>>);

impl Announced {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Bytes>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn insert(&self, number: u64, bytes: Bytes) {
        self.lock().insert(number, bytes);
    }

    pub fn get(&self, number: u64) -> Option<Bytes> {
        self.lock().get(&number).cloned()
    }

    fn remove(&self, number: u64) {
        self.lock().remove(&number);
    }
}

/// What the trainer's thread and the network tasks of one learner share.
pub struct Plane {
    pub keyframes: Keyframes,
    pub staged: Staged,
    pub tokens: TokenStore,
    pub payloads: Announced,
    pub spool: Spool,
    /// In runs whose codec withholds something.
    pub feedback: Option<Feedback>,
}

impl Plane {
    /// Opens the learner's folder for a new session.
    pub fn open(folder: &Path, session: u64, facts: &RunFacts) -> Result<Self, SpoolError> {
        let fail = |source: io::Error| SpoolError::Io { path: folder.to_owned(), source };
        let parameters = &facts.manifest.parameters;
        let outer_steps_kept = SEGMENT_CYCLES * u64::from(parameters.fragments);
        let codecs = (parameters.codec_up, parameters.codec_down);
        Ok(Self {
            keyframes: Keyframes::open(folder.join("fragments"), facts.plan.clone(), codecs).map_err(fail)?,
            staged: Staged::default(),
            tokens: TokenStore::default(),
            payloads: Announced::default(),
            spool: Spool::open(folder.join("spool"), session, outer_steps_kept)?,
            feedback: match parameters.codec_up.withholds() {
                true => Some(Feedback::open(folder.join("feedback")).map_err(fail)?),
                false => None,
            },
        })
    }
}

/// What all learners of a process share.
pub struct Shared {
    pub hotkey: Arc<Hotkey>,
    pub chain: Arc<ChainLink>,
    pub access: Arc<dyn GrantAccess>,
    pub bases: BaseTrees,
    pub chunks: ChunkCache,
    /// Numbers of everything that this hotkey signs here.
    pub sequence: Sequence,
}

/// The edge of one learner.
pub struct Edge {
    facts: Arc<RunFacts>,
    slot: u8,
    hotkey: Arc<Hotkey>,
    secret: Zeroizing<[u8; 32]>,
    shared: Arc<Shared>,
    book: GrantBook,
    looks: Looks,
    plane: Arc<Plane>,
    receipts: Announced,
    openings: OpeningFiles,
    trainer: TrainerThread,
    /// Proofs against others.
    evidence: Evidence,
}

impl Edge {
    /// `secret` is the hotkey's X25519 secret, `folder` the learner's folder.
    pub fn new(
        shared: Arc<Shared>,
        reader: RunReader,
        slot: u8,
        secret: Zeroizing<[u8; 32]>,
        folder: &Path,
        plane: Arc<Plane>,
        trainer: TrainerThread,
    ) -> io::Result<Self> {
        let facts = reader.facts().clone();
        let volume_bytes = opening_volume_bytes(facts.plan.total_elements());
        Ok(Self {
            slot,
            evidence: Evidence { folder: folder.to_owned(), context: facts.context, finder: shared.hotkey.clone() },
            facts,
            hotkey: shared.hotkey.clone(),
            secret,
            shared,
            book: GrantBook::default(),
            looks: Looks::new(reader),
            plane,
            receipts: Announced::default(),
            openings: OpeningFiles::open(folder.join("openings"), volume_bytes)?,
            trainer,
        })
    }

    /// Whether the trainer has been at one order for so long that it will not end it.
    pub fn trainer_hangs(&self) -> bool {
        self.trainer.hangs()
    }

    /// Lets the trainer end after the step under way, for which it waits at most so long, and brings the spool to disk.
    pub async fn close(&self, patience: Duration) {
        self.trainer.stop(patience).await;
        let plane = self.plane.clone();
        let flush = tokio::task::spawn_blocking(move || plane.spool.flush());
        match tokio::time::timeout(FLUSH_PATIENCE, flush).await {
            Ok(Ok(Err(error))) => tracing::warn!(slot = self.slot, %error, "the last segments are not on disk"),
            Ok(_) => {}
            Err(_) => tracing::warn!(slot = self.slot, "the disk is too slow for the last segments"),
        }
    }

    /// Does one thing and reports what came of it.
    pub async fn execute(self: Arc<Self>, effect: Effect, inputs: mpsc::Sender<Input>) {
        if let Some(input) = self.perform(effect).await {
            // Nobody listens any more after the end.
            let _ = inputs.send(input).await;
        }
    }

    async fn perform(self: &Arc<Self>, effect: Effect) -> Option<Input> {
        let (run, account) = (&self.facts.run, self.hotkey.account());
        Some(match effect {
            Effect::Look(at) => Input::Looked { at, found: self.look(at).await },
            Effect::CheckRegistration => {
                let registered = self.shared.chain.is_registered(self.facts.context.netuid, &account).await;
                let registered = registered.inspect_err(|error| {
                    tracing::warn!(slot = self.slot, error = error.to_string().replace('\n', "; "), "the chain does not answer");
                });
                Input::Registration { registered: registered.ok() }
            }
            Effect::PutProgress(progress) => Input::ProgressPut(self.put_progress(*progress).await),
            Effect::FetchBase => {
                let grant = |key: &str| self.grant(Method::Get, key);
                Input::BaseFetched(self.shared.bases.fetch(&self.facts, &*self.shared.access, grant).await)
            }
            Effect::OpenTrainer => {
                self.trainer.open(self.shared.bases.tree(&self.facts));
                self.settle_feedback().await;
                return None;
            }
            Effect::Boundary(boundary) => {
                self.trainer.pass(*boundary);
                return None;
            }
            Effect::FetchKeyframe { fragment, version, length, digest } => {
                let grant = |method: Method, key: &str| self.grant(method, key);
                let route = Route { keys: run, grant: &grant, access: &*self.shared.access };
                let result = self.plane.keyframes.fetch(&route, fragment, version, Promise { length, digest }).await;
                if result.is_ok() {
                    let plane = self.plane.clone();
                    let stage = move || plane.staged.put(fragment, version, || plane.keyframes.load(fragment, version));
                    let _ = tokio::task::spawn_blocking(stage).await;
                }
                Input::KeyframeFetched { fragment, version, result }
            }
            Effect::FetchTokens(lease) => Input::TokensFetched { lease: lease.id, result: self.fetch_tokens(&lease).await },
            Effect::DropTokens { lease } => {
                self.plane.tokens.remove(lease);
                return None;
            }
            Effect::PutPayload { t } => {
                let put = match self.plane.payloads.get(t) {
                    Some(payload) => self.put(&run.payload(&account, self.slot, t), payload).await,
                    None => Put::Refused,
                };
                Input::PayloadPut { t, put }
            }
            Effect::DropPayload { t } => {
                self.plane.payloads.remove(t);
                self.settle_feedback().await;
                return None;
            }
            Effect::PrepareReceipt(receipt) => {
                let lease = receipt.lease;
                Input::ReceiptPrepared { lease, signed: self.prepare_receipt(*receipt).await }
            }
            Effect::PutReceipt { lease } => {
                let put = match self.receipts.get(lease) {
                    Some(receipt) => self.put(&run.receipt(&account, self.slot, lease), receipt).await,
                    None => Put::Refused,
                };
                Input::ReceiptPut { lease, put }
            }
            Effect::DropReceipt { lease } => {
                self.receipts.remove(lease);
                return None;
            }
            Effect::PrepareOpening { audit, t, key } => Input::OpeningPrepared { audit, parts: self.prepare_opening(audit, t, key).await },
            Effect::PutOpening { audit, part } => {
                let put = self.put_opening(audit, part).await.unwrap_or_else(|error| {
                    tracing::error!(slot = self.slot, audit = %audit.short(), part, %error, "a prepared opening cannot be read");
                    Put::Unavailable
                });
                Input::OpeningPut { audit, part, put }
            }
            Effect::KeepOpenings { revision, asked } => {
                let this = self.clone();
                let keep = move || {
                    if this.openings.is_newest(revision) {
                        this.openings.retain(|audit| asked.iter().any(|(of, _)| of == audit));
                        this.plane.spool.keep(asked.into_iter().map(|(_, t)| t).collect());
                    }
                };
                // To delete a state takes a while.
                let _ = tokio::task::spawn_blocking(keep).await;
                return None;
            }
        })
    }

    /// Looks which payloads were merged whose pulls are closed: what these left out stays withheld, what was not merged is
    /// given back whole.
    async fn settle_feedback(self: &Arc<Self>) {
        let pending = self.plane.feedback.as_ref().map(Feedback::pending).unwrap_or_default();
        for sent in pending.into_iter().filter(|sent| self.plane.payloads.get(sent.t).is_none()) {
            let manifest = self.published::<MergeManifest>(&self.facts.run.merge(sent.t)).await;
            // Where the pull of an earlier session is still open, there is none yet.
            let Some(manifest) = manifest.filter(|manifest| (manifest.t, manifest.fragment) == (sent.t, sent.fragment)) else { continue };
            let us = (self.hotkey.account(), self.slot);
            let is_merged = manifest.accepted().any(|contribution| (contribution.hotkey, contribution.slot) == us);
            let plane = self.plane.clone();
            let settle = move || {
                let header = plane.keyframes.payload_header(sent.fragment, sent.base_version);
                plane.feedback.as_ref().map_or(Ok(()), |feedback| feedback.settle(&sent, (!is_merged).then_some(&header)))
            };
            match tokio::task::spawn_blocking(settle).await {
                Ok(Ok(())) => tracing::debug!(slot = self.slot, t = sent.t, is_merged, "a payload is settled"),
                Ok(Err(error)) => tracing::warn!(slot = self.slot, t = sent.t, %error, "a payload is not settled"),
                Err(_) => {}
            }
        }
    }

    /// A public document of the orchestrator that is written once; `None` while it is absent or cannot be had.
    async fn published<D: Document>(&self, key: &str) -> Option<D> {
        self.looks.published::<D>(key).await
    }

    fn grant(&self, method: Method, key: &str) -> Option<GrantRequest> {
        self.book.find(method, key, clock::now_ms())
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Put {
        let Some(grant) = self.grant(Method::Put, key) else { return Put::Grant };
        match self.shared.access.put(&grant, bytes).await {
            Ok(PutOutcome::Stored) => Put::Stored,
            Ok(PutOutcome::AlreadyThere) => Put::AlreadyThere,
            Ok(PutOutcome::Expired) => Put::Grant,
            Ok(PutOutcome::Refused { status }) => {
                tracing::warn!(slot = self.slot, key, status, "the store refused an upload");
                Put::Refused
            }
            Err(GrantError::Unavailable { reason, .. }) => {
                tracing::warn!(slot = self.slot, key, reason, "an upload failed; it is tried again");
                Put::Unavailable
            }
            Err(error) => {
                tracing::error!(slot = self.slot, %error, "an upload grant cannot be used");
                Put::Refused
            }
        }
    }

    /// Uploads a part volume by volume. What arrived is not sent again, whoever asks for it.
    async fn put_opening(self: &Arc<Self>, audit: Digest, part: u8) -> std::io::Result<Put> {
        let keys = self.facts.run.slot(&self.hotkey.account(), self.slot);
        for (volume, bytes) in self.openings.unsent(&audit, part)? {
            let this = self.clone();
            let read = move || this.openings.read(&audit, part, bytes);
            let bytes = tokio::task::spawn_blocking(read).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))?;
            let put = self.put(&keys.opening_volume(&audit, part, volume), bytes.into()).await;
            if !put.is_done() {
                return Ok(put);
            }
            self.openings.sent(&audit, part, volume)?;
        }
        Ok(Put::Stored)
    }

    async fn put_progress(self: &Arc<Self>, progress: Progress) -> Put {
        let encode = move |this: &Self, sequence, now_ms| encode_progress(progress, &this.facts.context, &*this.hotkey, sequence, now_ms);
        let bytes = match self.sign("the progress record", encode).await {
            Ok(bytes) => bytes,
            Err(put) => return put,
        };
        let key = self.facts.run.progress(&self.hotkey.account(), self.slot);
        let patience =
            Duration::from_millis(self.facts.manifest.parameters.learner_ttl_ms / PROGRESS_TRIES_PER_TTL).max(PROGRESS_TIMEOUT_MIN);
        tokio::time::timeout(patience, self.put(&key, bytes.into())).await.unwrap_or(Put::Unavailable)
    }

    async fn fetch_tokens(&self, lease: &Lease) -> Result<(), Trouble> {
        let grant = |shard: &str| self.grant(Method::Get, &self.facts.keys.shard_tokens(shard));
        let row_tokens = self.facts.manifest.parameters.sequence_length;
        let (shards, access) = (self.facts.shards.list(), &*self.shared.access);
        let tokens = LeaseTokens::fetch(&self.shared.chunks, access, grant, &shards, row_tokens, lease).await?;
        self.plane.tokens.insert(lease.id, tokens);
        Ok(())
    }

    async fn prepare_receipt(self: &Arc<Self>, receipt: Receipt) -> Option<(u64, Digest)> {
        let lease = receipt.lease;
        let encode = move |this: &Self, sequence, now_ms| envelope::sign(&receipt, &this.facts.context, &*this.hotkey, sequence, now_ms);
        let bytes = self.sign("a receipt", encode).await.ok()?;
        let (length, sha256) = (bytes.len() as u64, Digest::sha256(&bytes));
        self.receipts.insert(lease, bytes.into());
        Some((length, sha256))
    }

    /// Signs with the next sequence number, which waits for the disk: not on the runtime's threads. Gives why nothing can be put
    /// where that fails.
    async fn sign(self: &Arc<Self>, what: &str, encode: impl FnOnce(&Self, u64, u64) -> Vec<u8> + Send + 'static) -> Result<Vec<u8>, Put> {
        let this = self.clone();
        let signing = move || -> Result<Vec<u8>, JournalError> {
            let now_ms = clock::now_ms();
            let sequence = this.shared.sequence.next(now_ms)?;
            Ok(encode(&this, sequence, now_ms))
        };
        match tokio::task::spawn_blocking(signing).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(error)) => {
                tracing::error!(slot = self.slot, error = error.to_string().replace('\n', "; "), "{what} cannot be signed");
                Err(if matches!(error, JournalError::DiskFull { .. }) { Put::DiskFull } else { Put::Unavailable })
            }
            Err(_) => Err(Put::Unavailable),
        }
    }

    async fn prepare_opening(self: &Arc<Self>, audit: Digest, t: u64, key: [u8; 32]) -> Result<Vec<PreparedPart>, NotPrepared> {
        let preparation = self.openings.begin(audit);
        // Which of the payloads that several sessions may have offered was taken.
        let manifest = self.published::<MergeManifest>(&self.facts.run.merge(t)).await.ok_or(NotPrepared::Unknown)?;
        let us = (self.hotkey.account(), self.slot);
        let ours = manifest.contributions.into_iter().find(|one| (one.hotkey, one.slot) == us);
        let payload = ours.ok_or(NotPrepared::Gone)?.payload;
        let this = self.clone();
        let prepare = move || -> anyhow::Result<_> {
            let now_ms = clock::now_ms();
            let sequence = this.shared.sequence.next(now_ms)?;
            let sign = |manifest: &_| envelope::sign(manifest, &this.facts.context, &*this.hotkey, sequence, now_ms);
            let info = |part| this.facts.context.opening_info(&audit, part);
            let spool = (&this.plane.spool, this.facts.plan.total_elements() as usize);
            let parts = this.openings.prepare((&preparation, t, &payload), &key, info, spool, sign)?;
            // One payload of a learner and cycle is audited: with this one, nobody asks for the others, nor for earlier ones.
            let fragments = this.facts.manifest.parameters.fragments;
            this.plane.spool.release(t, (cycle_of(t, fragments) + 1) * u64::from(fragments))?;
            Ok(parts)
        };
        match tokio::task::spawn_blocking(prepare).await {
            Ok(Ok(parts)) => Ok(parts),
            Ok(Err(error)) => {
                tracing::warn!(slot = self.slot, audit = %audit.short(), t, %error, "an opening cannot be prepared");
                let spool_error = error.downcast_ref::<SpoolError>();
                let is_gone = spool_error.is_some_and(SpoolError::is_gone);
                Err(if is_gone { NotPrepared::Gone } else { NotPrepared::Failed })
            }
            Err(_) => Err(NotPrepared::Failed),
        }
    }
}
