//! What is fetched and uploaded, and when: base tree, fragments, tokens, payloads, receipts, openings.

use protocol::Method;
use protocol::documents::{Commitment, Lease};

use super::io::{Effect, Put, Trouble};
use super::{BASE_RETRY_MS, Learner, TrainerPhase};

impl Learner {
    pub(super) fn base_fetched(&mut self, result: Result<(), Trouble>, now_ms: u64) {
        self.disk(&result, now_ms);
        self.trainer = match result {
            Ok(()) => {
                tracing::info!(slot = self.settings.slot, release = self.settings.base_release, "base checkpoint ready");
                self.effects.push_back(Effect::OpenTrainer);
                TrainerPhase::Opening
            }
            Err(_) => TrainerPhase::NoBase { not_before_ms: now_ms + BASE_RETRY_MS },
        };
    }

    pub(super) fn tokens_fetched(&mut self, lease: u64, result: Result<(), Trouble>, now_ms: u64) {
        self.disk(&result, now_ms);
        if self.leases.fetched(lease, result, now_ms) {
            tracing::debug!(slot = self.settings.slot, lease, ?result, "tokens fetched");
        } else {
            self.drop_tokens(lease);
        }
    }

    /// The rows of a lease are not needed any more, once the trainer has finished what it does with them.
    pub(super) fn drop_tokens(&mut self, lease: u64) {
        self.tokens_to_drop.push(lease);
    }

    pub(super) fn drop_unused_tokens(&mut self) {
        let in_use = self.boundary.as_ref().and_then(|boundary| boundary.step.as_ref()).map(|step| step.lease);
        let effects = &mut self.effects;
        self.tokens_to_drop.retain(|lease| {
            if in_use != Some(*lease) {
                effects.push_back(Effect::DropTokens { lease: *lease });
            }
            in_use == Some(*lease)
        });
    }

    fn token_keys(&self, lease: &Lease) -> Vec<String> {
        let mut keys: Vec<String> = lease.rows.iter().map(|range| self.settings.keys.shard_tokens(&range.shard)).collect();
        keys.dedup();
        keys
    }

    pub(super) fn payload_put(&mut self, t: u64, put: Put, now_ms: u64) {
        let slot = self.settings.slot;
        match put {
            Put::Grant => {
                let key = self.keys.payload(t);
                self.grants.refused(Method::Put, &key);
            }
            Put::Refused => tracing::warn!(slot, t, "the store refused the payload"),
            _ => {}
        }
        if self.pulls.uploaded(t, put, now_ms) && put.is_done() {
            tracing::info!(slot, t, "uploaded");
        }
    }

    pub(super) fn fetch_base(&mut self, now_ms: u64) {
        if let TrainerPhase::NoBase { not_before_ms } = self.trainer
            && not_before_ms <= now_ms
            && self.grants.can_get(&self.settings.keys.release_manifest(&self.settings.base_release), now_ms)
        {
            self.trainer = TrainerPhase::FetchingBase;
            self.effects.push_back(Effect::FetchBase);
        }
    }

    pub(super) fn fetch_fragments(&mut self, now_ms: u64) {
        let Some(head) = &self.head else { return };
        for (fragment, version) in self.fragments.wanted(head, now_ms) {
            if self.grants.can_get(&self.settings.fragment_key(fragment, version), now_ms) {
                let known = &head.fragments[usize::from(fragment)];
                self.fragments.fetching(fragment, version);
                self.effects.push_back(Effect::FetchKeyframe { fragment, version, length: known.length, digest: known.digest });
            }
        }
    }

    pub(super) fn fetch_tokens(&mut self, now_ms: u64) {
        for lease in self.leases.missing_tokens(now_ms) {
            if self.token_keys(&lease).iter().all(|key| self.grants.can_get(key, now_ms)) {
                self.leases.fetching(lease.id);
                self.effects.push_back(Effect::FetchTokens(Box::new(lease)));
            }
        }
    }

    pub(super) fn upload(&mut self, now_ms: u64) {
        let grants = &self.grants;
        let is_granted = |(commitment, key): &(&Commitment, &str)| grants.can_put_body(key, &commitment.sha256, now_ms);
        let granted: Vec<u64> = self.pulls.waiting(now_ms).filter(is_granted).map(|(commitment, _)| commitment.t).collect();
        for t in granted {
            self.pulls.uploading(t);
            self.effects.push_back(Effect::PutPayload { t });
        }
    }

    pub(super) fn receipt_put(&mut self, lease: u64, put: Put, now_ms: u64) {
        if put == Put::Grant {
            let key = self.keys.receipt(lease);
            self.grants.refused(Method::Put, &key);
        }
        self.receipts.uploaded(lease, put, now_ms);
    }

    pub(super) fn hand_in_receipt(&mut self, now_ms: u64) {
        let Some((lease, sha256)) = self.receipts.waiting(now_ms) else { return };
        let key = self.keys.receipt(lease);
        if self.grants.can_put_body(&key, &sha256, now_ms) {
            self.receipts.uploading(lease);
            self.effects.push_back(Effect::PutReceipt { lease });
        }
    }

    pub(super) fn open_audits(&mut self, now_ms: u64) {
        if let Some((audit, t, key)) = self.openings.to_prepare(now_ms) {
            self.openings.preparing(&audit);
            self.effects.push_back(Effect::PrepareOpening { audit, t, key });
        }
        for (audit, part, sha256) in self.openings.waiting(now_ms) {
            if self.grants.can_put_body(&self.opening_key(&audit, part), &sha256, now_ms) {
                self.openings.uploading(&audit, part);
                self.effects.push_back(Effect::PutOpening { audit, part });
            }
        }
    }
}
