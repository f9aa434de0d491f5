//! Bundles of presigned requests, and the audit orders that carry one.

use bytes::Bytes;
use protocol::audits::Selection;
use protocol::documents::{
    AuditDraw, AuditOrder, Lease, OpenedPart, PROGRESS_BYTES, SCORES_BYTES, StandingGrants, VERDICT_COMMIT_BYTES, VERDICT_REVEAL_BYTES,
};
use protocol::envelope::{self, Document};
use protocol::{Digest, GrantBundle, SealedBytes};
use quasar_orchestrator::machine::{Key, Slot, StandingMark, VERDICT_MS, VERSIONS_AHEAD, Want};
use storage::{ObjectStore, Presign};

use super::super::world::{BASE_FILE, BASE_RELEASE};
use super::Hands;

const STANDING_MS: u64 = 60 * 60_000;
const ON_DEMAND_MS: u64 = 15 * 60_000;

impl Hands {
    pub(super) fn presign_of(&self, want: &Want) -> Presign {
        let now_ms = self.world.clock_ms(self.id);
        let spell = |key: &Key| match key {
            Key::Shard(shard) => self.world.keys.shard_tokens(shard),
            Key::Payload { slot, t } => self.world.slot_keys(*slot).own.payload(*t),
            Key::Receipt { slot, lease } => self.world.slot_keys(*slot).own.receipt(*lease),
            Key::Opening { slot, audit, part } => self.world.slot_keys(*slot).own.opening(audit, *part),
        };
        match want {
            Want::Read { key } => Presign::Get { key: spell(key), now_ms, expires_in_ms: ON_DEMAND_MS },
            Want::WriteOnce { key, length, sha256 } => Presign::Put {
                key: spell(key),
                length: *length,
                sha256: Some(*sha256),
                if_absent: true,
                now_ms,
                expires_in_ms: ON_DEMAND_MS,
            },
        }
    }

    pub(super) async fn publish_standing(&self, revision: u64, slot: Slot, mark: &StandingMark, cycle: u64) {
        let key = self.world.slot_keys(slot).standing.clone();
        let make = || {
            let now_ms = self.world.clock_ms(self.id);
            let read = |key: String| Presign::Get { key, now_ms, expires_in_ms: STANDING_MS };
            let write = |key: String, length: u64, if_absent: bool| Presign::Put {
                key,
                length,
                sha256: None,
                if_absent,
                now_ms,
                expires_in_ms: STANDING_MS,
            };
            let mut wanted =
                vec![read(self.world.keys.release_manifest(BASE_RELEASE)), read(self.world.keys.release_file(BASE_RELEASE, BASE_FILE))];
            if mark.validator {
                wanted
                    .extend((cycle..=cycle + VERSIONS_AHEAD).map(|epoch| write(self.world.run.scores(&slot.0, epoch), SCORES_BYTES, true)));
            }
            wanted.push(write(self.world.slot_keys(slot).progress.clone(), PROGRESS_BYTES as u64, false));
            if mark.live {
                for (fragment, version) in mark.versions.iter().enumerate() {
                    let from = if mark.validator { version.saturating_sub(VERSIONS_AHEAD / 2) } else { *version };
                    wanted.extend((from..=version + VERSIONS_AHEAD).map(|version| read(self.world.run.keyframe(fragment as u16, version))));
                }
            }
            let session_epoch = mark.session_epoch;
            let document = |sealed| StandingGrants { hotkey: slot.0, slot: slot.1, session_epoch, sealed };
            self.bundle::<StandingGrants>(mark.recipient, &wanted, document)
        };
        self.put_latest(&key, revision, make).await;
    }

    /// Presigns, seals and signs.
    pub(super) fn bundle<D: Document>(
        &self,
        recipient: Option<[u8; 32]>,
        wanted: &[Presign],
        document: impl Fn(SealedBytes) -> D,
    ) -> Bytes {
        let requests = wanted.iter().filter_map(|request| self.world.store.presign(request).ok()).collect();
        let grants = GrantBundle { requests };
        let now_ms = self.world.clock_ms(self.id);
        let header = envelope::header_for::<D>(&self.world.context, self.world.office.signer.key(), self.next_sequence(now_ms), now_ms);
        let recipient = recipient.expect("an Ed25519 hotkey can be sealed to");
        let sealed = self.world.plan.scheme.seal::<D>(&self.world.context, &header, &recipient, &grants);
        Bytes::from(envelope::sign_with_header(header, &document(sealed), &*self.world.office.signer))
    }

    pub(super) async fn draw_audits(&self, cycle: u64, block: u64) -> AuditDraw {
        let key = self.world.run.draw(cycle);
        let bytes = match self.get_present(&key).await {
            Some(bytes) => bytes,
            None => {
                let draw = self.persist(|| async { self.world.draw_at(cycle, block) }).await;
                self.put_once(&key, &draw).await
            }
        };
        self.world.open_office::<AuditDraw>(&bytes).expect("our own draw").document
    }

    pub(super) async fn order_audit(
        &self,
        selection: &Selection,
        recipient: Option<[u8; 32]>,
        parts: &[(u64, Digest)],
        leases: Vec<Lease>,
    ) {
        self.world.watch.borrow_mut().drawn(&self.world, selection);
        let key = self.world.run.audit(&selection.validator, &selection.audit);
        let (hotkey, slot) = (selection.hotkey, selection.slot);
        self.persist(|| async {
            let now_ms = self.world.clock_ms(self.id);
            let read = |key: String| Presign::Get { key, now_ms, expires_in_ms: VERDICT_MS };
            let write =
                |key: String, length: u64| Presign::Put { key, length, sha256: None, if_absent: true, now_ms, expires_in_ms: VERDICT_MS };
            let keys = self.world.slot_keys((hotkey, slot));
            let mut wanted = vec![
                read(keys.own.payload(selection.t)),
                read(keys.own.commitment(selection.t)),
                write(self.world.run.verdict_commit(&selection.validator, &selection.audit), VERDICT_COMMIT_BYTES),
                write(self.world.run.verdict_reveal(&selection.validator, &selection.audit), VERDICT_REVEAL_BYTES),
            ];
            wanted.extend((0..parts.len()).map(|part| read(keys.own.opening(&selection.audit, part as u8))));
            let document = |sealed: SealedBytes| AuditOrder {
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
                opening_key: SealedBytes { encapsulated: [0; 32], ciphertext: Vec::new() },
            };
            let bytes = self.bundle::<AuditOrder>(recipient, &wanted, document);
            self.put_bytes_once(&key, bytes).await.map(drop)
        })
        .await;
    }
}
