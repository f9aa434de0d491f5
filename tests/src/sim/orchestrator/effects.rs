//! What each effect of the machine does to the bucket.

use bytes::Bytes;
use protocol::documents::{
    CatalogPage, Commitment, Job, Lease, LeaseEnd, OPENING_PARTS, Progress, PullGrants, Receipt, Tape, VerdictReveal,
};
use protocol::envelope::Expect;
use protocol::log::LogHead;
use protocol::{Digest, Reason};
use quasar_orchestrator::machine::{Effect, Input, Retired, Slot, StoredPage};
use storage::{Presign, PutCondition};

use super::super::tensors;
use super::Hands;

impl Hands {
    pub(super) async fn execute(&self, effect: Effect) -> Option<Input> {
        Some(match effect {
            Effect::Watch { live, silent, .. } => {
                *self.watched.borrow_mut() = (live, silent);
                return None;
            }
            Effect::PublishHead { head } => {
                self.publish_head(&head).await;
                Input::HeadPublished
            }
            Effect::PublishCurrent => {
                self.publish_current().await;
                return None;
            }
            Effect::PublishJob { revision, job } => {
                let mut recorded = Vec::new();
                for lease in &job.leases {
                    recorded.extend(self.record_lease(&job, lease).await);
                }
                if !recorded.is_empty() {
                    self.confirm().await;
                    self.recorded.borrow_mut().extend(recorded);
                }
                let key = self.world.slot_keys((job.hotkey, job.slot)).job.clone();
                self.put_latest(&key, revision, || self.sign_ours::<Job>(&job, &self.world.context)).await;
                return None;
            }
            Effect::PublishStanding { revision, slot, mark, cycle } => {
                self.publish_standing(revision, slot, &mark, cycle).await;
                return None;
            }
            Effect::PublishPullGrants { revision, slot, session_epoch, recipient, wants } => {
                let key = self.world.slot_keys(slot).pull.clone();
                let make = || {
                    let wanted: Vec<Presign> = wants.iter().map(|want| self.presign_of(want)).collect();
                    self.world.watch.borrow_mut().grants(&self.world, &wanted);
                    let document = |sealed| PullGrants { hotkey: slot.0, slot: slot.1, session_epoch, sealed };
                    self.bundle::<PullGrants>(recipient, &wanted, document)
                };
                self.put_latest(&key, revision, make).await;
                return None;
            }
            Effect::StoreCommitment { slot, t, id, commitment } => match self.store_commitment(slot, t, id, commitment).await? {
                Ok(id) => Input::CommitmentStored { slot, t, id, commitment },
                Err(_) => Input::CommitmentRefused { slot, t, commitment },
            },
            Effect::CheckPayload { slot, t, commitment } => {
                Input::PayloadChecked { slot, t, outcome: self.check_payload(slot, t, &commitment).await }
            }
            Effect::CheckReceipt { slot, lease, committed } => {
                let outcome = self.check_receipt(slot, &lease, &committed).await;
                Input::ReceiptChecked { slot, lease: lease.id, outcome }
            }
            Effect::WriteTape { tape } => {
                let bytes = self.put_once(&self.world.run.tape(tape.t), &*tape).await;
                let stored = self.world.open_office::<Tape>(&bytes);
                Input::TapeWritten { tape: Box::new(stored.map_or_else(|_| (*tape).clone(), |verified| verified.document)) }
            }
            Effect::Merge { tape, rejected, previous_keyframe } => {
                let (manifest, id, keyframe_length) = self.merge(*tape, rejected, previous_keyframe).await;
                Input::Merged { manifest: Box::new(manifest), id, keyframe_length }
            }
            Effect::ReadBeacon { cycle, block } => Input::Beacon { draw: Box::new(self.draw_audits(cycle, block).await) },
            Effect::MakeOpeningKeys { audits } => {
                Input::OpeningKeys { keys: audits.into_iter().map(|audit| (audit, Digest::blake3(&audit.0).0)).collect() }
            }
            Effect::OrderAudit { selection, recipient, parts, leases } => {
                let audit = selection.audit;
                self.order_audit(&selection, recipient, &parts, leases).await;
                Input::AuditOrdered { audit }
            }
            Effect::ReadVerdict { audit, validator } => {
                let key = self.world.run.verdict_reveal(&validator, &audit);
                let found = self.world.get(self.id, &key, None).await.ok().flatten();
                let verdict = found.and_then(|object| {
                    let opened = self
                        .world
                        .plan
                        .scheme
                        .open::<VerdictReveal>(&object.bytes, &self.world.context, Expect::Account(&validator), None)
                        .ok()?;
                    (opened.document.verdict.audit == audit).then_some((opened.id, opened.document.verdict.result))
                });
                Input::Verdict { audit, verdict }
            }
            Effect::PublishLog { head } => {
                let bytes = self.put_once(&self.world.run.log_after(head.previous), &*head).await;
                let fixed = self.world.open_office::<LogHead>(&bytes).map_or_else(|_| (*head).clone(), |verified| verified.document);
                let key = self.world.run.log(fixed.frontier.size());
                self.persist(|| self.put_bytes_once(&key, bytes.clone())).await;
                if fixed == *head { Input::LogPublished } else { Input::LogTaken { head: Box::new(fixed) } }
            }
            Effect::StoreSnapshot { revision, bytes } => {
                let bytes = Bytes::from(bytes);
                if !self.put_latest(&self.world.run.snapshot(), revision, || bytes.clone()).await {
                    return None;
                }
                // A successor may have read the one before it.
                self.confirm().await;
                Input::SnapshotStored { revision }
            }
            Effect::RecordLeaseEnd { end } => {
                let bytes = self.put_once(&self.world.run.lease_end(end.lease), &*end).await;
                let stored = self.world.open_office::<LeaseEnd>(&bytes);
                Input::LeaseEnded { end: stored.map_or(end, |verified| Box::new(verified.document)) }
            }
            Effect::Retire { number, retired } => {
                self.retire(&retired).await;
                Input::RetiredAll { number }
            }
            Effect::WritePage { page, previous, shards } => {
                Input::PageWritten { page, outcome: Ok(self.write_page(page, previous, &shards).await) }
            }
            Effect::Release { versions, tokens } => Input::Released { release: self.release(versions, tokens).await },
            Effect::PublishStatus { status } => {
                if !self.is_trusted() {
                    return None;
                }
                // Nobody here reads it, and addresses as text are most of its cost.
                let bytes = Bytes::from(status.outer_step.to_string());
                let _ = self.world.put(self.id, &self.world.run.status(), bytes, PutCondition::Always).await;
                return None;
            }
        })
    }

    /// Every shard that an order names is published.
    async fn write_page(&self, page: u32, previous: Digest, shards: &[String]) -> StoredPage {
        let document = CatalogPage { page, previous, shards: shards.iter().map(|id| tensors::shard(id, tensors::SHARD_ROWS)).collect() };
        let bytes = self.put_once(&self.world.run.catalog(page), &document).await;
        let opened = self.world.open_office::<CatalogPage>(&bytes);
        StoredPage::new(Digest::blake3(&bytes), &opened.map_or(document, |verified| verified.document))
    }

    /// Writes down who got which rows, before anybody is told.
    pub(super) async fn record_lease(&self, job: &Job, lease: &Lease) -> Option<u64> {
        if self.recorded.borrow().contains(&lease.id) {
            return None;
        }
        let record = Job { leases: vec![lease.clone()], ..job.clone() };
        self.put_once(&self.world.run.lease(lease.id), &record).await;
        Some(lease.id)
    }

    pub(super) async fn retire(&self, retired: &Retired) {
        let versions = retired
            .versions
            .iter()
            .flat_map(|(fragment, version)| [self.world.run.keyframe(*fragment, *version), self.world.run.state(*fragment, *version)]);
        let payloads = retired.payloads.iter().map(|(slot, t)| self.world.slot_keys(*slot).own.payload(*t));
        let openings = retired
            .openings
            .iter()
            .flat_map(|(slot, audit)| (0..OPENING_PARTS).map(move |part| self.world.slot_keys(*slot).own.opening(audit, part)));
        let releases = retired.releases.iter().map(|release| self.world.keys.release_manifest(release));
        for key in versions.chain(payloads).chain(openings).chain(releases) {
            self.hold().await;
            self.world.delete(self.id, &key).await;
        }
    }

    pub(super) async fn store_commitment(&self, slot: Slot, t: u64, id: Digest, commitment: Digest) -> Option<Result<Digest, Reason>> {
        let keys = self.world.slot_keys(slot);
        let known = self.records.borrow().get(&slot).cloned();
        let bytes = match known {
            Some((newest, bytes)) if newest == id => bytes,
            _ => self.get_present(&keys.progress).await?,
        };
        let open = |bytes: &Bytes| self.world.plan.scheme.open::<Progress>(bytes, &self.world.context, Expect::Account(&slot.0), None).ok();
        let record = open(&bytes)?;
        let committed = record.document.commitments.iter().find(|one| one.t == t)?.digest();
        let key = keys.own.commitment(t);
        let stored = if committed == commitment {
            Some(self.persist(|| self.put_bytes_once(&key, bytes.clone())).await)
        } else {
            self.get_present(&key).await
        };
        let holds = |record: &Progress| record.commitments.iter().any(|one| one.t == t && one.digest() == commitment);
        Some(match stored.as_ref().and_then(open) {
            Some(evidence) if holds(&evidence.document) => Ok(evidence.id),
            _ => Err(Reason::RepeatedCommitment),
        })
    }

    pub(super) async fn check_payload(&self, slot: Slot, t: u64, commitment: &Commitment) -> Reason {
        let Some(bytes) = self.get_present(&self.world.slot_keys(slot).own.payload(t)).await else { return Reason::NotUploaded };
        if bytes.len() as u64 != commitment.length {
            Reason::LengthMismatch
        } else if Digest::blake3(&bytes) != commitment.blake3 || Digest::sha256(&bytes) != commitment.sha256 {
            Reason::DigestMismatch
        } else if !tensors::is_payload_of(&bytes, commitment.fragment, commitment.base_version) {
            Reason::HeaderMismatch
        } else {
            Reason::None
        }
    }

    pub(super) async fn check_receipt(&self, slot: Slot, lease: &Lease, committed: &[(u64, Digest)]) -> Result<(Digest, Vec<u32>), Reason> {
        let bytes = self.get_present(&self.world.slot_keys(slot).own.receipt(lease.id)).await.ok_or(Reason::NotUploaded)?;
        let receipt = self
            .world
            .plan
            .scheme
            .open::<Receipt>(&bytes, &self.world.context, Expect::Account(&slot.0), None)
            .map_err(|_| Reason::ReceiptMismatch)?;
        receipt.document.check(&slot.0, slot.1, lease, committed).map_err(|_| Reason::ReceiptMismatch)?;
        Ok((receipt.id, receipt.document.steps.iter().map(|step| step.lease_step).collect()))
    }
}
