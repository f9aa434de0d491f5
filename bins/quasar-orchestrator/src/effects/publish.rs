//! Public documents: head, current, jobs, status, audit orders; and the write-once copies of commitments.

use bytes::Bytes;
use daemon::clock;
use protocol::audits::Selection;
use protocol::documents::{AuditOrder, Head, Job, Lease, OpenedPart, Progress, VERDICT_COMMIT_BYTES, VERDICT_REVEAL_BYTES};
use protocol::envelope::{self, Expect, Purpose, header_for, open_stored, peek};
use protocol::{Digest, GrantBundle, codec};
use storage::{Presign, PutCondition, StoreError, bundle};

use super::{Service, persist};
use crate::machine::{Slot, Status};

/// How long a validator has for an audit.
const AUDIT_GRANTS_MS: u64 = 6 * 3_600_000;

impl Service {
    /// Moves the head by compare-and-swap. A head that somebody else moved means that another orchestrator writes to this run.
    pub(super) async fn publish_head(&self, head: &Head) {
        let key = self.run.head();
        let mut etag = self.head_etag.lock().await;
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
            match self.store.put(&key, bytes, condition).await {
                Ok(fresh) => {
                    *etag = Some(fresh);
                    return;
                }
                Err(StoreError::PreconditionFailed { .. }) => {
                    tracing::error!("another orchestrator moved the head of this run; this one stops");
                    self.fenced.store(true, std::sync::atomic::Ordering::Relaxed);
                    self.shutdown.trigger();
                    return;
                }
                Err(error) => {
                    tracing::warn!("the head cannot be written: {error}");
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

    /// Copies the signed progress envelope that holds a commitment, and gives the id of the copy. `None` if the learner has
    /// overwritten it meanwhile without that commitment.
    pub(super) async fn store_commitment(&self, slot: Slot, t: u64, id: Digest) -> Option<Digest> {
        let key = self.run.commitment(&slot.0, slot.1, t);
        let known = self.records.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get(&slot).cloned();
        let bytes = match known {
            Some((newest, bytes)) if newest == id => bytes,
            _ => {
                let progress = self.run.progress(&slot.0, slot.1);
                persist(&progress, || async {
                    match self.store.get(&progress, Purpose::Progress.limit() as u64).await {
                        Ok(object) => Ok(Some(object.bytes)),
                        Err(StoreError::NotFound { .. }) => Ok(None),
                        Err(error) => Err(error),
                    }
                })
                .await?
            }
        };
        let record = open_stored::<Progress>(&bytes, &self.context, Expect::Account(&slot.0)).ok()?;
        if !record.document.commitments.iter().any(|commitment| commitment.t == t) {
            return None;
        }
        let stored = persist(&key, || self.put_bytes_once(&key, bytes.clone())).await;
        peek(&stored).ok().map(|(_, _, id)| id)
    }

    pub(super) async fn read_beacon(&self, block: u64) -> [u8; 32] {
        persist("reading the beacon", || async {
            match self.chain.block_hash(block).await {
                Ok(Some(hash)) => Ok(hash),
                Ok(None) => Err(format!("block {block} is not finalized yet")),
                Err(error) => Err(error.to_string()),
            }
        })
        .await
    }

    /// Delivers the grants of an audit to its validator.
    pub(super) async fn order_audit(&self, selection: &Selection, parts: &[(u64, Digest)], leases: Vec<Lease>) {
        let key = self.run.audit(&selection.validator, &selection.audit);
        let (hotkey, slot) = (selection.hotkey, selection.slot);
        persist(&key, || async {
            let now_ms = clock::now_ms();
            let read = |key: String| Presign::Get { key, now_ms, expires_in_ms: AUDIT_GRANTS_MS };
            let write = |key: String, length: u64| Presign::Put {
                key,
                length,
                sha256: None,
                if_absent: true,
                now_ms,
                expires_in_ms: AUDIT_GRANTS_MS,
            };
            let mut wanted = vec![
                read(self.run.payload(&hotkey, slot, selection.t)),
                read(self.run.commitment(&hotkey, slot, selection.t)),
                write(self.run.verdict_commit(&selection.validator, &selection.audit), VERDICT_COMMIT_BYTES),
                write(self.run.verdict_reveal(&selection.validator, &selection.audit), VERDICT_REVEAL_BYTES),
            ];
            wanted.extend((0..parts.len()).map(|part| read(self.run.opening(&hotkey, slot, &selection.audit, part as u8))));
            let mut shards: Vec<&String> = leases.iter().flat_map(|lease| lease.rows.iter().map(|range| &range.shard)).collect();
            shards.sort();
            shards.dedup();
            wanted.extend(shards.into_iter().map(|shard| read(self.keys.shard_tokens(shard))));
            let requests =
                wanted.iter().map(|request| self.store.presign(request)).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
            let sequence = self.sequence.next(now_ms).map_err(|error| error.to_string())?;
            let header = header_for::<AuditOrder>(&self.context, self.signer.key(), sequence, now_ms);
            let sealed = match bundle::seal_to(&self.context, Purpose::AuditOrder, &header, &selection.validator, &GrantBundle { requests })
            {
                Ok(sealed) => sealed,
                Err(error) => {
                    tracing::warn!(validator = %selection.validator, "audit not delivered: {error}");
                    return Ok(());
                }
            };
            let order = AuditOrder {
                audit: selection.audit,
                validator: selection.validator,
                cycle: selection.cycle,
                hotkey,
                slot,
                t: selection.t,
                beacon_block: selection.beacon_block,
                opening: parts.iter().map(|(length, sha256)| OpenedPart { length: *length, sha256: *sha256 }).collect(),
                leases: leases.clone(),
                sealed,
            };
            debug_assert!(codec::encode(&order).len() <= Purpose::AuditOrder.limit());
            let bytes = Bytes::from(envelope::sign_with_header(header, &order, &*self.signer));
            self.put_bytes_once(&key, bytes).await.map(drop).map_err(|error| error.to_string())
        })
        .await;
        tracing::info!(
            cycle = selection.cycle,
            hotkey = %hotkey.short(),
            slot,
            t = selection.t,
            validator = %selection.validator.short(),
            opened = !parts.is_empty(),
            "audit ordered"
        );
    }
}
