//! Public documents: head, current, jobs, status.

use bytes::Bytes;
use daemon::clock;
use protocol::documents::{Head, Job};
use protocol::envelope::{self, Purpose};
use storage::{PutCondition, StoreError};

use super::{Service, persist};
use crate::machine::Status;

impl Service {
    /// Moves the head by compare-and-swap. A head that somebody else moved means that another orchestrator writes to this run.
    pub(super) async fn publish_head(&self, head: &Head) {
        let key = self.run.head();
        let mut etag = self.head_etag.lock().await;
        // What attempts without an answer may have written.
        let mut tried: Vec<Bytes> = Vec::new();
        loop {
            let condition = match &*etag {
                Some(etag) => PutCondition::IfMatch(etag.clone()),
                None => match self.store.head(&key).await {
                    Ok(meta) => {
                        *etag = meta.etag;
                        continue;
                    }
                    Err(StoreError::NotFound { .. }) => PutCondition::IfAbsent,
                    Err(error) => {
                        tracing::warn!("the head cannot be read: {error}");
                        tokio::time::sleep(super::RETRY_FIRST).await;
                        continue;
                    }
                },
            };
            let bytes = match self.sign(head) {
                Ok(bytes) => bytes,
                Err(error) => {
                    tracing::error!("{error}");
                    tokio::time::sleep(super::RETRY_FIRST).await;
                    continue;
                }
            };
            let attempt = bytes.clone();
            match self.store.put(&key, bytes, condition).await {
                Ok(fresh) => {
                    *etag = Some(fresh);
                    return;
                }
                Err(StoreError::PreconditionFailed { .. }) if !tried.is_empty() => {
                    match self.store.get(&key, Purpose::Head.limit() as u64).await {
                        Ok(object) if tried.contains(&object.bytes) => {
                            *etag = object.etag;
                            return;
                        }
                        Ok(_) => tried.clear(),
                        Err(error) => {
                            tracing::warn!("the head cannot be read: {error}");
                            tokio::time::sleep(super::RETRY_FIRST).await;
                        }
                    }
                }
                Err(StoreError::PreconditionFailed { .. }) => {
                    tracing::error!("another orchestrator moved the head of this run; this one stops");
                    self.fenced.store(true, std::sync::atomic::Ordering::Relaxed);
                    self.shutdown.trigger();
                    return;
                }
                Err(error) => {
                    tracing::warn!("the head cannot be written: {error}");
                    tried.push(attempt);
                    tokio::time::sleep(super::RETRY_FIRST).await;
                }
            }
        }
    }

    pub(super) async fn publish_current(&self) {
        let key = self.keys.current();
        persist(&key, || async {
            let now_ms = clock::now_ms();
            let sequence = self.sequence.next(now_ms).map_err(|error| error.to_string())?;
            let bytes = envelope::sign(&self.current, &self.context.without_run(), &*self.signer, sequence, now_ms);
            self.store.put(&key, Bytes::from(bytes), PutCondition::Always).await.map_err(|error| error.to_string())
        })
        .await;
    }

    pub(super) async fn publish_job(&self, revision: u64, job: &Job) {
        let key = self.run.job(&job.hotkey, job.slot);
        self.put_latest(&key, revision, || self.sign(job).map_err(|error| error.to_string())).await;
    }

    pub(super) async fn publish_status(&self, status: &Status) {
        let key = self.run.status();
        let Ok(bytes) = serde_json::to_vec(status) else { return };
        if let Err(error) = self.store.put(&key, Bytes::from(bytes), PutCondition::Always).await {
            tracing::debug!("status not written: {error}");
        }
    }
}
