//! The writer lease: of all processes that hold the orchestrator's key, one writes.
//!
//! The lease is an object that moves by compare-and-swap. Its holder renews it each third of its time; whoever waits for it
//! watches with its own clock that it stays as it is for the whole time, so no two clocks are compared and a clock that jumps
//! hands out nothing ([`crate::lease`] holds these rules). A holder that could not renew in time stops writing until it has
//! (`Fence::hold`); one that finds somebody else's lease there has lost it for good. A write that was on its way meanwhile meets
//! compare-and-swap (head, jobs, grants, snapshot) or a write-once key whose content the tape fixes. Whoever waits ends once the
//! owner's newest root does not name its key any more.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use daemon::sequence::Sequence;
use daemon::{Exit, Failure, Shutdown, clock};
use protocol::documents::{WRITER_LEASE_MS, WriterLease};
use protocol::envelope::{self, Context, Document, Expect, Verified, open_stored};
use protocol::{KeyRef, Signer};
use storage::roots::Roots;
use storage::{ObjectStore, PutCondition, StoreError};
use tokio::time::Instant;

pub use crate::lease::Wait;
use crate::lease::{Candidate, Claim, Moment, Next, Trust, is_still, renewed};
use crate::operator::run;

/// Renewals within the time of a lease.
const RENEWALS: u32 = 3;
/// Looks at a lease that somebody else holds, within its time.
const LOOKS: u32 = 15;
const RETRY: Duration = Duration::from_millis(200);
/// A request about the lease gets this part of its time: one that hangs must not cost the lease.
const PATIENCE: u32 = 6;
/// Pause after a renewal that did not succeed, as part of the lease's time.
const SOON: u32 = 30;

/// What the lease works with.
pub struct FenceSettings {
    pub store: Arc<dyn ObjectStore>,
    pub key: String,
    pub context: Context,
    pub signer: Arc<dyn Signer>,
    /// The newest names the signer's key; leases may be signed with it, or with one before a rotation.
    pub roots: Roots,
    pub sequence: Arc<Sequence>,
    /// Of the journal at hand, and of the one that comes after it if this one is history.
    pub instances: [[u8; 16]; 2],
    pub host: String,
    pub lease: Duration,
}

impl FenceSettings {
    /// How long a lease lives in production.
    pub const LEASE: Duration = Duration::from_millis(WRITER_LEASE_MS);
}

/// A lease that is held, or was.
pub struct Fence {
    settings: FenceSettings,
    held: tokio::sync::Mutex<(WriterLease, String)>,
    trust: Mutex<Trust>,
    lost: AtomicBool,
    /// Renewals so far, and the newest of them that succeeded.
    asked: AtomicU64,
    answered: AtomicU64,
    /// Nobody else has written since the journal at hand did.
    is_own: bool,
}

/// The zero of the steady clock is where the process looked first.
static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);

fn moment() -> Moment {
    Moment { steady_ms: BEGUN.elapsed().as_millis() as u64, wall_ms: clock::now_ms() }
}

/// The lease is somebody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another orchestrator writes to this run")]
pub struct Lost;

/// The lease of the run, if there is one, with the tag of its object.
pub async fn read_lease(
    store: &dyn ObjectStore,
    key: &str,
    context: &Context,
    signers: &[KeyRef],
) -> Result<Option<(Verified<WriterLease>, String)>, Failure> {
    let object = match store.get(key, WriterLease::PURPOSE.file_limit()).await {
        Ok(object) => object,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(Failure::unavailable(error)),
    };
    let lease = open_stored::<WriterLease>(&object.bytes, context, Expect::Any(signers))
        .map_err(|error| Failure::configuration(error).context(key.to_owned()))?;
    Ok(Some((lease, object.etag.unwrap_or_default())))
}

impl Fence {
    /// Takes the lease: at once if nobody has it, if it was given back, or if its holder worked with this very journal; else
    /// after its time. `None` if a stop was asked for meanwhile. A store that does not answer is asked again.
    ///
    /// # Errors
    /// Somebody else goes on holding it and `wait` does not say to stand by; or the newest root does not name the signer's key (any
    /// more).
    pub async fn acquire(settings: FenceSettings, wait: Wait, shutdown: &Shutdown) -> Result<Option<Self>, Failure> {
        let lease_ms = settings.lease.as_millis() as u64;
        let mut candidate = Candidate::new(settings.instances, settings.host.clone(), lease_ms, wait).named(settings.signer.key());
        loop {
            let begun = moment();
            let found = match settings.in_time(settings.look()).await.map_err(Failure::unavailable).flatten() {
                Err(failure) if failure.exit == Exit::Unavailable => {
                    tracing::warn!("the writer lease cannot be read: {failure}");
                    if !shutdown.sleep(settings.lease / LOOKS).await {
                        return Ok(None);
                    }
                    continue;
                }
                found => found?,
            };
            let found = found.as_ref().map(|(lease, tag)| (lease, tag.as_str()));
            let claim = match candidate.look(moment().steady_ms, found) {
                Next::Claim(claim) => claim,
                Next::Refused => return Err(held_by(found.map_or("nobody", |(lease, _)| lease.document.host.as_str()))),
                Next::Wait { is_new } => {
                    if let Some((lease, _)) = found.filter(|_| is_new) {
                        let WriterLease { epoch, host, .. } = &lease.document;
                        tracing::info!(holder = host, epoch, "waiting for the writer lease to end");
                    }
                    if !shutdown.sleep(settings.lease / LOOKS).await {
                        return Ok(None);
                    }
                    continue;
                }
            };
            let Claim { lease, condition, sequence_floor, is_own } = claim;
            settings.sequence.raise(sequence_floor)?;
            let bytes = settings.sign(&lease)?;
            match settings.in_time(settings.store.put(&settings.key, bytes, condition)).await.flatten() {
                Ok(etag) => {
                    tracing::info!(epoch = lease.epoch, "holding the writer lease");
                    let trust = Mutex::new(Trust::from(begun, lease_ms));
                    return Ok(Some(Self {
                        held: tokio::sync::Mutex::new((lease, etag)),
                        trust,
                        lost: AtomicBool::new(false),
                        asked: AtomicU64::new(0),
                        answered: AtomicU64::new(0),
                        is_own,
                        settings,
                    }));
                }
                // Somebody was quicker, or our own answer was lost; both are seen at the next look.
                Err(StoreError::PreconditionFailed { .. }) => tokio::time::sleep(RETRY).await,
                Err(error) if error.is_retryable() => {
                    tracing::warn!("the writer lease cannot be taken: {error}");
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(Failure::unavailable(error)),
            }
        }
    }

    fn trust_from(&self, begun: Moment) {
        let lease_ms = self.settings.lease.as_millis() as u64;
        *self.trust.lock().unwrap_or_else(PoisonError::into_inner) = Trust::from(begun, lease_ms);
    }

    /// Whether nobody else has written since the journal at hand did: it holds everything then.
    pub fn is_own(&self) -> bool {
        self.is_own
    }

    /// Of the journal that whoever holds this lease works with.
    pub async fn instance(&self) -> [u8; 16] {
        self.held.lock().await.0.instance
    }

    /// The fencing epoch.
    pub async fn epoch(&self) -> u64 {
        self.held.lock().await.0.epoch
    }

    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Whether this process may write now.
    pub fn is_trusted(&self) -> bool {
        self.is_trusted_for(Duration::ZERO)
    }

    fn is_trusted_for(&self, time: Duration) -> bool {
        let (now, time_ms) = (moment(), time.as_millis() as u64);
        let then = Moment { steady_ms: now.steady_ms + time_ms, wall_ms: now.wall_ms + time_ms };
        !self.is_lost() && self.trust.lock().unwrap_or_else(PoisonError::into_inner).holds(then)
    }

    /// Waits until this process may write. Once the lease is lost, that is never: the stop ends the wait.
    pub async fn hold(&self) {
        while !self.is_trusted() {
            if self.is_lost() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Runs a write while this process may write: none of its attempts begins once the lease is over. One that is on its way then meets
    /// compare-and-swap, or what lies there.
    ///
    /// # Errors
    /// Those of the store; [`StoreError::Unavailable`] where the lease ran out meanwhile.
    pub async fn write<T>(&self, write: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        self.hold().await;
        tokio::pin!(write);
        loop {
            tokio::select! {
                biased;
                result = &mut write => return result,
                () = tokio::time::sleep(RETRY) => if !self.is_trusted() {
                    let reason = "the writer lease could not be renewed meanwhile".to_owned();
                    return Err(StoreError::Unavailable { key: self.settings.key.clone(), reason });
                },
            }
        }
    }

    /// Renews the lease now.
    ///
    /// # Errors
    /// [`Lost`] if somebody else has it; a store that does not answer is no error, but the trust runs out.
    pub async fn renew(&self) -> Result<(), Lost> {
        self.ask(u64::MAX).await.map(drop)
    }

    /// Asks the store until it has said whose the lease is: what was read before was then written by this process or by one before it. A
    /// clock proves that never, because a machine may have stood still with its clocks. Whoever asks while others wait shares their answer.
    ///
    /// # Errors
    /// [`Lost`] if somebody else has it.
    pub async fn confirm(&self) -> Result<(), Lost> {
        let before = self.asked.load(Ordering::Acquire);
        while !self.ask(before).await? {
            tokio::time::sleep(RETRY).await;
        }
        Ok(())
    }

    /// Renews the lease, unless a renewal later than number `before` has succeeded; `false` where the store did not say whose it is.
    async fn ask(&self, before: u64) -> Result<bool, Lost> {
        let mut held = self.held.lock().await;
        if self.is_lost() {
            return Err(Lost);
        }
        if self.answered.load(Ordering::Acquire) > before {
            return Ok(true);
        }
        let number = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let is_ours = self.ask_store(&mut held).await?;
        if is_ours {
            self.answered.store(number, Ordering::Release);
        }
        Ok(is_ours)
    }

    async fn ask_store(&self, held: &mut (WriterLease, String)) -> Result<bool, Lost> {
        let (settings, begun, next) = (&self.settings, moment(), renewed(&held.0));
        let Ok(bytes) = settings.sign(&next) else { return Ok(false) };
        let put = settings.store.put(&settings.key, bytes, PutCondition::IfMatch(held.1.clone()));
        match settings.in_time(put).await.flatten() {
            Ok(etag) => {
                *held = (next, etag);
                self.trust_from(begun);
                Ok(true)
            }
            Err(StoreError::PreconditionFailed { .. }) => self.look_again(held).await,
            // It may be there all the same: the next renewal meets it.
            Err(error) => {
                tracing::warn!("the writer lease cannot be renewed: {error}");
                Ok(false)
            }
        }
    }

    /// The lease is not as it was left: an answer of ours was lost, or somebody else has it.
    async fn look_again(&self, held: &mut (WriterLease, String)) -> Result<bool, Lost> {
        let settings = &self.settings;
        let look = settings.in_time(async {
            // Whoever has it may be named since by a newer root.
            if let Err(error) = settings.roots.follow(&*settings.store).await {
                tracing::warn!("the newest root cannot be read: {error}");
            }
            settings.read().await
        });
        match look.await.map_err(Failure::unavailable).flatten() {
            Ok(Some((lease, etag))) if is_still(&held.0, &lease.document) => {
                *held = (lease.document, etag);
                Ok(true)
            }
            Ok(found) => {
                let (epoch, host) = found.map_or((0, "nobody".to_owned()), |(lease, _)| (lease.document.epoch, lease.document.host));
                tracing::error!(epoch, host, "the writer lease is lost; this orchestrator stops writing");
                self.lost.store(true, Ordering::Relaxed);
                Err(Lost)
            }
            Err(failure) => {
                tracing::warn!("the writer lease cannot be read: {failure}");
                Ok(false)
            }
        }
    }

    /// Renews until the stop, which it asks for once the lease is lost.
    pub async fn keep(self: Arc<Self>, shutdown: Shutdown) {
        let lease = self.settings.lease;
        let mut pause = lease / RENEWALS;
        while shutdown.sleep(pause).await {
            if self.renew().await.is_err() {
                return shutdown.trigger();
            }
            // As long as the next regular one comes in time, and its patience is over.
            let is_renewed = self.is_trusted_for(lease / RENEWALS + lease / PATIENCE);
            pause = if is_renewed { lease / RENEWALS } else { lease / SOON };
        }
    }

    /// Gives the lease back, so that nobody has to wait for its end: nothing is written under it any more.
    pub async fn release(&self) {
        let mut held = self.held.lock().await;
        if self.lost.swap(true, Ordering::Relaxed) {
            return;
        }
        let last = WriterLease { released: true, ..renewed(&held.0) };
        let Ok(bytes) = self.settings.sign(&last) else { return };
        let put = self.settings.store.put(&self.settings.key, bytes, PutCondition::IfMatch(held.1.clone()));
        match self.settings.in_time(put).await.flatten() {
            Ok(etag) => *held = (last, etag),
            Err(error) => tracing::warn!("the writer lease could not be given back; it ends by itself: {error}"),
        }
    }
}

impl FenceSettings {
    /// The lease, for whoever wants to take it: the newest root has to name its key.
    async fn look(&self) -> Result<Option<(Verified<WriterLease>, String)>, Failure> {
        run::named(&self.roots, &*self.store, &self.signer.key()).await?;
        self.read().await
    }

    async fn read(&self) -> Result<Option<(Verified<WriterLease>, String)>, Failure> {
        let chain = self.roots.known().map_err(Failure::configuration)?;
        read_lease(&*self.store, &self.key, &self.context, &chain.orchestrators).await
    }

    /// What the store answers to a request about the lease, as long as the lease can wait for it.
    async fn in_time<T>(&self, request: impl Future<Output = T>) -> Result<T, StoreError> {
        let unanswered = |_| StoreError::Unavailable { key: self.key.clone(), reason: "the store does not answer".to_owned() };
        tokio::time::timeout(self.lease / PATIENCE, request).await.map_err(unanswered)
    }

    fn sign(&self, lease: &WriterLease) -> Result<Bytes, daemon::JournalError> {
        let now_ms = clock::now_ms();
        let sequence = self.sequence.next(now_ms)?;
        Ok(Bytes::from(envelope::sign(lease, &self.context, &*self.signer, sequence, now_ms)))
    }
}

fn held_by(host: &str) -> Failure {
    Failure::configuration(anyhow::anyhow!("the orchestrator on {host} holds the writer lease of this run and renews it"))
        .hint("run one orchestrator for a run; a second one with `run --standby` waits until the first is gone")
}

#[cfg(test)]
mod tests {
    use daemon::Journal;
    use protocol::documents::{Bounds, RunRoot};
    use protocol::envelope::RunId;
    use protocol::paths::Keys;
    use protocol::{Digest, Ed25519Signer};
    use storage::MemoryStore;

    use super::*;

    const LEASE: Duration = Duration::from_millis(300);

    const CONTEXT: Context = Context { genesis: [2; 32], netuid: 24, run: RunId([3; 16]) };

    fn key(seed: u8) -> Ed25519Signer {
        Ed25519Signer::from_seed([seed; 32])
    }

    /// A bucket in which the owner (key 7) named key 1.
    async fn bucket() -> MemoryStore {
        let store = MemoryStore::new();
        name(&store, 1, Digest::ZERO, 1).await;
        store
    }

    /// The owner signs this version of the root; gives its digest.
    async fn name(store: &MemoryStore, version: u32, previous: Digest, orchestrator: u8) -> Digest {
        let root = RunRoot {
            version,
            previous,
            owner: key(7).key(),
            orchestrator: key(orchestrator).key(),
            store_hosts: vec!["store.example".into()],
            bounds: Bounds { fragments_max: 24, slots_max: 8, payload_bytes_max: 1 << 20, checkpoint_bytes_max: 1 << 20 },
        };
        let bytes = Bytes::from(envelope::sign(&root, &CONTEXT.without_run(), &key(7), 1, 1));
        store.put(&Keys::new(CONTEXT.netuid).root(version), bytes.clone(), PutCondition::IfAbsent).await.unwrap();
        Digest::blake3(&bytes)
    }

    fn settings(store: &MemoryStore, instance: u8) -> FenceSettings {
        with_key(store, instance, 1)
    }

    fn with_key(store: &MemoryStore, instance: u8, seed: u8) -> FenceSettings {
        FenceSettings {
            store: Arc::new(store.clone()),
            key: "private/writer.qsr".into(),
            context: CONTEXT,
            roots: Roots::unremembered(CONTEXT.genesis, CONTEXT.netuid, key(7).key().account()),
            signer: Arc::new(key(seed)),
            sequence: Arc::new(Sequence::open(Arc::new(Journal::in_memory().unwrap()), "orchestrator").unwrap()),
            instances: [[instance; 16], [instance + 100; 16]],
            host: format!("host-{instance}"),
            lease: LEASE,
        }
    }

    async fn take(store: &MemoryStore, instance: u8, wait: Wait) -> Result<Fence, Failure> {
        Ok(Fence::acquire(settings(store, instance), wait, &Shutdown::new()).await?.unwrap())
    }

    #[tokio::test]
    async fn the_same_journal_takes_its_lease_back_at_once_and_the_process_before_is_fenced() {
        let store = bucket().await;
        let first = take(&store, 1, Wait::ForItsEnd).await.unwrap();
        let begun = Instant::now();
        let second = take(&store, 1, Wait::ForItsEnd).await.unwrap();
        assert!(begun.elapsed() < LEASE / 2);
        assert_eq!((first.epoch().await, second.epoch().await), (1, 2));
        assert_eq!(first.renew().await, Err(Lost));
        assert!(tokio::time::timeout(LEASE, first.hold()).await.is_err(), "a lost lease never lets anybody write again");
        assert_eq!(second.renew().await, Ok(()));
    }

    #[tokio::test]
    async fn another_journal_waits_for_the_end_of_a_lease_that_nobody_renews() {
        let store = bucket().await;
        let first = take(&store, 1, Wait::ForItsEnd).await.unwrap();
        let begun = Instant::now();
        let second = take(&store, 2, Wait::ForItsEnd).await.unwrap();
        assert!(begun.elapsed() >= LEASE, "{:?}", begun.elapsed());
        assert!(!first.is_trusted(), "the old holder had stopped to trust its lease before");
        assert_eq!(second.epoch().await, 2);
    }

    #[tokio::test]
    async fn a_second_orchestrator_is_refused_while_the_first_goes_on_unless_it_stands_by() {
        let store = bucket().await;
        let first = Arc::new(take(&store, 1, Wait::ForItsEnd).await.unwrap());
        let (stop, keeper) = (Shutdown::new(), Shutdown::new());
        let keeping = tokio::spawn(first.clone().keep(keeper.clone()));
        let refused = take(&store, 2, Wait::ForItsEnd).await.err().unwrap();
        assert_eq!(refused.exit, daemon::Exit::Configuration);
        assert!(refused.to_string().contains("host-1") && refused.to_string().contains("--standby"), "{refused}");

        let waiting = {
            let (settings, stop) = (settings(&store, 3), stop.clone());
            tokio::spawn(async move { Fence::acquire(settings, Wait::Standby, &stop).await.map(|fence| fence.unwrap()) })
        };
        tokio::time::sleep(LEASE * 2).await;
        assert!(!waiting.is_finished(), "the first one renews");
        // Killed: nobody renews any more, and nothing was given back.
        keeper.trigger();
        keeping.await.unwrap();
        let begun = Instant::now();
        let standby = waiting.await.unwrap().unwrap();
        assert!(begun.elapsed() < LEASE * 2, "{:?}", begun.elapsed());
        assert_eq!(standby.epoch().await, 2);
        assert_eq!(first.renew().await, Err(Lost));
    }

    #[tokio::test]
    async fn a_lease_that_was_given_back_is_free_at_once_and_numbers_go_on_above_it() {
        let store = bucket().await;
        let first = take(&store, 1, Wait::ForItsEnd).await.unwrap();
        first.release().await;
        assert!(!first.is_trusted(), "nothing is written under it any more");
        let before = first.settings.read().await.unwrap().unwrap().0;
        let begun = Instant::now();
        let second = take(&store, 2, Wait::ForItsEnd).await.unwrap();
        assert!(begun.elapsed() < LEASE / 2);
        assert!(second.settings.sequence.next(0).unwrap() > before.header.sequence + 2 * LEASE.as_millis() as u64);
    }

    #[tokio::test]
    async fn a_lease_of_another_run_is_refused_and_left_alone() {
        let store = bucket().await;
        take(&store, 1, Wait::ForItsEnd).await.unwrap();
        let mut foreign = settings(&store, 2);
        foreign.context.run = RunId([9; 16]);
        let refused = Fence::acquire(foreign, Wait::Standby, &Shutdown::new()).await.err().unwrap();
        assert_eq!(refused.exit, daemon::Exit::Configuration);
        assert!(refused.to_string().contains("belongs to run"), "{refused}");
    }
}
