//! Public documents: head, current, jobs, status.

use std::sync::PoisonError;

use bytes::Bytes;
use daemon::{Failure, clock};
use protocol::documents::{CurrentRun, Head, Job, Lease, LeaseEnd};
use protocol::envelope::{self, Expect, Purpose, open_stored};
use protocol::log::LogHead;
use storage::discovery::DiscoveryError;
use storage::{PutCondition, StoreError};

use super::{Service, Stop, persist};
use crate::machine::Status;

impl Service {
    /// Moves the head by compare-and-swap with the one that this process wrote last, or claimed.
    pub(super) async fn publish_head(&self, head: &Head) {
        let key = self.run.head();
        let mut tag = self.head_etag.lock().await;
        let place = key.as_str();
        let make = || self.sign(head).map_err(|error| error.to_string());
        let make = &make;
        *tag = persist(place, || {
            let known = tag.clone();
            async move { self.swap(place, known, make).await }
        })
        .await;
    }

    /// Signs the head that lies there anew, under this writer's epoch: from here on a writer before it cannot move it any more.
    /// What it wrote until then is in the head that this gives.
    pub async fn claim_head(&self, epoch: u64) -> Result<Head, Failure> {
        let key = self.run.head();
        let mut tag = self.head_etag.lock().await;
        loop {
            let object = match self.store.get(&key, Purpose::Head.file_limit()).await {
                Ok(object) => object,
                Err(error @ StoreError::NotFound { .. }) => {
                    return Err(Failure::configuration(error).hint("the run is incomplete: create it again with `run create`"));
                }
                Err(error) => return Err(Failure::unavailable(error)),
            };
            let found = self.open_own::<Head>(&object.bytes).map_err(|error| Failure::configuration(error).context(key.clone()))?;
            if found.document.fragments.len() != self.plan.fragments.len() {
                return Err(Failure::configuration(anyhow::anyhow!(
                    "{key}: it names {} fragments, the plan {}",
                    found.document.fragments.len(),
                    self.plan.fragments.len()
                ))
                .hint("the bucket holds objects of different runs under one id; nothing was changed but the writer lease"));
            }
            self.follow_numbers(&found.header)?;
            let lost = |lost| Failure::configuration(lost).hint("start again with `run --standby`");
            // What was read may be a successor's already: no clock of this machine tells, the store does.
            self.fence.confirm().await.map_err(lost)?;
            let claimed = Head { epoch, ..found.document };
            let bytes = self.sign(&claimed)?;
            match self.fence.write(self.store.put(&key, bytes, PutCondition::IfMatch(object.etag.unwrap_or_default()))).await {
                Ok(fresh) => {
                    *tag = Some(fresh);
                    return Ok(claimed);
                }
                Err(StoreError::PreconditionFailed { .. }) => {}
                Err(error) => return Err(Failure::unavailable(error)),
            }
        }
    }

    /// The pointer to this run, which goes on under the newest root.
    fn current(&self) -> Result<CurrentRun, DiscoveryError> {
        let chain = self.roots.known()?;
        Ok(CurrentRun { root_version: chain.newest.version, root_digest: chain.newest_digest(), ..self.current.clone() })
    }

    pub(super) async fn publish_current(&self) {
        let key = self.keys.current();
        let is_ours = persist(&key, || async {
            let condition = match self.store.get(&key, Purpose::CurrentRun.file_limit()).await {
                Ok(object) => {
                    let outside = self.context.without_run();
                    // What a key before this one signed is replaced, whatever it names.
                    let found = open_stored::<CurrentRun>(&object.bytes, &outside, Expect::Key(&self.signer.key()));
                    if found.is_ok_and(|found| found.document.run != self.context.run) {
                        return Ok(false);
                    }
                    PutCondition::IfMatch(object.etag.unwrap_or_default())
                }
                Err(StoreError::NotFound { .. }) => PutCondition::IfAbsent,
                Err(error) => return Err(error.to_string()),
            };
            // What was read may be a successor's already, and its numbers are above ours.
            self.confirm().await;
            let now_ms = clock::now_ms();
            let sequence = self.sequence.next(now_ms).map_err(|error| error.to_string())?;
            let current = self.current().map_err(|error| error.to_string())?;
            let bytes = envelope::sign(&current, &self.context.without_run(), &*self.signer, sequence, now_ms);
            self.fence.write(self.store.put(&key, Bytes::from(bytes), condition)).await.map_err(|error| error.to_string())?;
            Ok(true)
        })
        .await;
        if !is_ours {
            tracing::error!("another run was created and is current now; this orchestrator stops");
            self.stop(Stop::OtherRun);
        }
    }

    pub(super) async fn publish_job(&self, revision: u64, job: &Job) {
        let mut recorded = Vec::new();
        for lease in &job.leases {
            recorded.extend(self.record_lease(job, lease).await);
        }
        // A successor that claimed the run before these records were there does not know of them: so nobody may hear of them.
        if !recorded.is_empty() {
            self.confirm().await;
            self.recorded.lock().unwrap_or_else(PoisonError::into_inner).extend(recorded);
        }
        let key = self.run.job(&job.hotkey, job.slot);
        self.put_latest(&key, revision, || self.sign(job).map_err(|error| error.to_string())).await;
    }

    /// Writes down who got which rows, before anybody is told: a successor gives them to nobody else. Gives the lease, if it was not known
    /// to be written down. Where another one lies under its number, nobody is told of either.
    async fn record_lease(&self, job: &Job, lease: &Lease) -> Option<u64> {
        let is_known = || self.recorded.lock().unwrap_or_else(PoisonError::into_inner).contains(&lease.id);
        if is_known() {
            return None;
        }
        let record = Job { leases: vec![lease.clone()], ..job.clone() };
        let key = self.run.lease(lease.id);
        let bytes = self.put_once(&key, &record).await;
        match self.open_own::<Job>(&bytes) {
            Ok(stored) if stored.document.leases == record.leases => Some(lease.id),
            _ => self.contradicted(&key, "somebody else gave out a lease of this number: find out who writes to this run").await,
        }
    }

    /// Writes down how a lease is booked, and gives what lies there: ours, or what another writer has put there first.
    pub(super) async fn record_lease_end(&self, end: &LeaseEnd) -> LeaseEnd {
        let bytes = self.put_once(&self.run.lease_end(end.lease), end).await;
        match self.open_own::<LeaseEnd>(&bytes) {
            Ok(stored) if stored.document.lease == end.lease => stored.document,
            _ => {
                tracing::error!(lease = end.lease, "what lies at the end of this lease is none; it is booked as this writer decided");
                end.clone()
            }
        }
    }

    /// Publishes the head that follows the log of its size before, and gives it: ours, or the one that another writer has put there
    /// first. Two heads of different sizes lie under different keys; what follows a head is therefore fixed before it is shown.
    pub(super) async fn publish_log(&self, head: &LogHead) -> LogHead {
        let bytes = self.put_once(&self.run.log_after(head.previous), head).await;
        let fixed = self.open_own::<LogHead>(&bytes).map_or_else(|_| head.clone(), |verified| verified.document);
        let key = self.run.log(fixed.frontier.size());
        persist(&key, || self.put_bytes_once(&key, bytes.clone())).await;
        fixed
    }

    pub(super) async fn publish_status(&self, status: &Status) {
        if !self.fence.is_trusted() {
            return;
        }
        let key = self.run.status();
        let Ok(bytes) = serde_json::to_vec(status) else { return };
        if let Err(error) = self.store.put(&key, Bytes::from(bytes), PutCondition::Always).await {
            tracing::debug!("status not written: {error}");
        }
    }
}
