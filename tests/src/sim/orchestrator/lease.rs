//! The writer lease at the edge: how a process takes it, keeps it, and stops when it is somebody else's. The rules are those of
//! `quasar_orchestrator::lease`; the order of requests is `effects::fence`'s.

use bytes::Bytes;
use protocol::documents::{WRITER_LEASE_MS, WriterLease};
use protocol::envelope::Verified;
use quasar_orchestrator::lease::{Candidate, Claim, Moment, Next, Trust, Wait, is_still, renewed};
use storage::{PutCondition, StoreError};

use super::Hands;

const LOOK_MS: u64 = WRITER_LEASE_MS / 15;
const RENEW_MS: u64 = WRITER_LEASE_MS / 3;
const RETRY_MS: u64 = 200;

/// A lease that is held, or was.
pub(super) struct Holding {
    held: WriterLease,
    tag: String,
    trust: Trust,
    is_lost: bool,
}

impl Hands {
    fn moment(&self) -> Moment {
        Moment { steady_ms: self.world.steady_ms(self.id), wall_ms: self.world.clock_ms(self.id) }
    }

    /// The lease in the bucket with its tag, if the store answers.
    async fn look_at_lease(&self) -> Option<Option<(Verified<WriterLease>, String)>> {
        match self.world.get(self.id, &self.world.run.writer_lease(), None).await {
            Ok(object) => {
                let object = object?;
                let lease = self.world.open_office::<WriterLease>(&object.bytes).ok()?;
                Some(Some((lease, object.etag.unwrap_or_default())))
            }
            Err(StoreError::NotFound { .. }) => Some(None),
            Err(_) => None,
        }
    }

    /// The instance number of the journal that the last writer worked with.
    pub(super) async fn last_writer(&self) -> Option<[u8; 16]> {
        self.persist(|| self.look_at_lease()).await.map(|(lease, _)| lease.document.instance)
    }

    /// Stands by until the lease is ours. Gives its epoch, and whether nobody wrote since the journal at hand did.
    pub(super) async fn acquire(&self, instances: [[u8; 16]; 2]) -> (u64, bool) {
        let mut candidate = Candidate::new(instances, format!("host-{}", self.host), WRITER_LEASE_MS, Wait::Standby);
        loop {
            let begun = self.moment();
            let Some(found) = self.look_at_lease().await else {
                // The process ends, and its supervisor starts it again; the journal that it opened stays.
                self.world.executor.sleep(LOOK_MS).await;
                continue;
            };
            let next = candidate.look(self.moment().steady_ms, found.as_ref().map(|(lease, tag)| (lease, tag.as_str())));
            let Next::Claim(Claim { lease, condition, sequence_floor, is_own }) = next else {
                self.world.executor.sleep(LOOK_MS).await;
                continue;
            };
            self.raise_sequence(sequence_floor);
            let bytes = self.sign_ours(&lease, &self.world.context);
            match self.world.put(self.id, &self.world.run.writer_lease(), bytes, condition).await {
                Ok(tag) => {
                    let epoch = lease.epoch;
                    let trust = Trust::from(begun, WRITER_LEASE_MS);
                    *self.holding.borrow_mut() = Some(Holding { held: lease, tag, trust, is_lost: false });
                    return (epoch, is_own);
                }
                Err(_) => self.world.executor.sleep(RETRY_MS).await,
            }
        }
    }

    /// Of the journal that whoever holds the lease works with.
    pub(super) fn instance(&self) -> Option<[u8; 16]> {
        self.holding.borrow().as_ref().map(|holding| holding.held.instance)
    }

    fn is_lost(&self) -> bool {
        self.holding.borrow().as_ref().is_some_and(|holding| holding.is_lost)
    }

    pub(super) fn is_trusted(&self) -> bool {
        self.holding.borrow().as_ref().is_some_and(|holding| !holding.is_lost && holding.trust.holds(self.moment()))
    }

    /// Waits until this process may write; for ever once the lease is lost.
    pub(super) async fn hold(&self) {
        while !self.is_trusted() {
            if self.is_lost() {
                std::future::pending::<()>().await;
            }
            self.world.executor.sleep(RETRY_MS).await;
        }
    }

    /// Whether the lease is ours, if the store says so; a renewal later than number `before` has said so already.
    async fn renew(&self, before: u64) -> Option<bool> {
        let _turn = self.renewing.lock().await;
        if self.is_lost() {
            return Some(false);
        }
        if self.answered.get() > before {
            return Some(true);
        }
        let number = self.asked.get() + 1;
        self.asked.set(number);
        let said = self.ask_store().await;
        if said == Some(true) {
            self.answered.set(number);
        }
        said
    }

    async fn ask_store(&self) -> Option<bool> {
        let begun = self.moment();
        let (next, tag) = self.holding.borrow().as_ref().map(|holding| (renewed(&holding.held), holding.tag.clone()))?;
        let bytes: Bytes = self.sign_ours(&next, &self.world.context);
        match self.world.put(self.id, &self.world.run.writer_lease(), bytes, PutCondition::IfMatch(tag)).await {
            Ok(tag) => {
                let trust = Trust::from(begun, WRITER_LEASE_MS);
                *self.holding.borrow_mut() = Some(Holding { held: next, tag, trust, is_lost: false });
                Some(true)
            }
            Err(StoreError::PreconditionFailed { .. }) => self.look_again().await,
            Err(_) => None,
        }
    }

    /// The lease is not as it was left: an answer of ours was lost, or somebody else has it.
    async fn look_again(&self) -> Option<bool> {
        let found = self.look_at_lease().await?;
        let mut holding = self.holding.borrow_mut();
        let holding = holding.as_mut()?;
        match found {
            Some((lease, tag)) if is_still(&holding.held, &lease.document) => {
                (holding.held, holding.tag) = (lease.document, tag);
                Some(true)
            }
            _ => {
                holding.is_lost = true;
                Some(false)
            }
        }
    }

    /// Renews until the lease is lost.
    pub(super) async fn keep(&self) {
        loop {
            self.world.executor.sleep(RENEW_MS).await;
            if self.renew(u64::MAX).await == Some(false) {
                return self.world.fenced(self.host, self.life);
            }
        }
    }

    /// Asks the store until it has said whose the lease is; the process ends if it is not ours.
    pub(super) async fn confirm(&self) {
        let before = self.asked.get();
        loop {
            match self.renew(before).await {
                Some(true) => return,
                None => self.world.executor.sleep(RETRY_MS).await,
                Some(false) => {
                    self.world.fenced(self.host, self.life);
                    std::future::pending::<()>().await;
                }
            }
        }
    }
}
