//! Sealed bundles of presigned requests.

use bytes::Bytes;
use daemon::clock;
use protocol::documents::{Codec, PROGRESS_BYTES, PullGrants, SCORES_BYTES, StandingGrants, opening_volume_bytes, opening_volumes};
use protocol::envelope::{self, Document, Purpose, header_for};
use protocol::schedule::keyframe_version;
use protocol::{GrantBundle, SealedBytes};
use storage::{Presign, bundle};

use super::Service;
use crate::machine::{Key, Slot, StandingMark, VERSIONS_AHEAD, Want};

const STANDING_MS: u64 = 60 * 60_000;
const ON_DEMAND_MS: u64 = 15 * 60_000;

impl Service {
    pub(super) async fn publish_standing(&self, revision: u64, slot: Slot, mark: &StandingMark, cycle: u64) {
        let session_epoch = mark.session_epoch;
        let key = self.run.standing(&slot.0, slot.1);
        self.put_latest(&key, revision, || {
            let now_ms = clock::now_ms();
            let read = |key: String| Presign::Get { key, now_ms, expires_in_ms: STANDING_MS };
            let release = &self.manifest.base_release;
            let mut wanted = vec![read(self.keys.release_manifest(release))];
            wanted.extend(self.base_files.iter().map(|file| read(self.keys.release_file(release, &file.path))));
            let write = |key: String, length: u64, if_absent: bool| Presign::Put {
                key,
                length,
                sha256: None,
                if_absent,
                now_ms,
                expires_in_ms: STANDING_MS,
            };
            if mark.validator {
                let scores = |epoch| write(self.run.scores(&slot.0, epoch), SCORES_BYTES, true);
                wanted.extend((cycle..=cycle + VERSIONS_AHEAD).map(scores));
                let held_out = self.shards.iter().filter(|shard| shard.held_out);
                wanted.extend(held_out.map(|shard| read(self.keys.shard_tokens(&shard.id))));
            }
            wanted.push(write(self.run.progress(&slot.0, slot.1), PROGRESS_BYTES as u64, false));
            if mark.live {
                for (fragment, version) in mark.versions.iter().enumerate() {
                    // Replays go back to older versions; learners look ahead.
                    let from = if mark.validator { version.saturating_sub(VERSIONS_AHEAD / 2) } else { *version };
                    let (down, fragment) = (self.manifest.parameters.codec_down, fragment as u16);
                    // Where frames travel, the way to a version begins at the keyframe before it.
                    let from = keyframe_version(down, from);
                    for version in from..=version + VERSIONS_AHEAD {
                        if keyframe_version(down, version) == version {
                            wanted.push(read(self.run.keyframe(fragment, version)));
                        }
                        if down != Codec::Bf16 && version > 0 {
                            wanted.push(read(self.run.delta(fragment, version)));
                        }
                    }
                }
            }
            self.bundle::<StandingGrants>(mark.recipient, &wanted, |sealed| StandingGrants {
                hotkey: slot.0,
                slot: slot.1,
                session_epoch,
                sealed,
            })
        })
        .await;
    }

    pub(super) async fn publish_pull_grants(
        &self,
        revision: u64,
        slot: Slot,
        session_epoch: u64,
        recipient: Option<[u8; 32]>,
        wants: &[Want],
    ) {
        let key = self.run.pull_grants(&slot.0, slot.1);
        self.put_latest(&key, revision, || {
            let now_ms = clock::now_ms();
            let volume_bytes = opening_volume_bytes(self.plan.total_elements());
            let wanted: Vec<Presign> = wants.iter().flat_map(|want| self.presign_of(want, volume_bytes, now_ms)).collect();
            self.bundle::<PullGrants>(recipient, &wanted, |sealed| PullGrants { hotkey: slot.0, slot: slot.1, session_epoch, sealed })
        })
        .await;
    }

    /// The requests for what a learner wants: one, or one for each volume. A volume's digest is not granted: who reads the part checks it.
    pub(super) fn presign_of(&self, want: &Want, volume_bytes: u64, now_ms: u64) -> Vec<Presign> {
        let put = |key, length, sha256| Presign::Put { key, length, sha256, if_absent: true, now_ms, expires_in_ms: ON_DEMAND_MS };
        match want {
            Want::Read { key } => vec![Presign::Get { key: self.spell(key), now_ms, expires_in_ms: ON_DEMAND_MS }],
            Want::WriteOnce { key: Key::Opening { slot, audit, part }, length, .. } if *length > volume_bytes => {
                let keys = self.run.slot(&slot.0, slot.1);
                let volumes = opening_volumes(*length, volume_bytes);
                volumes.map(|(volume, bytes)| put(keys.opening_volume(audit, *part, volume), bytes.end - bytes.start, None)).collect()
            }
            Want::WriteOnce { key, length, sha256 } => vec![put(self.spell(key), *length, Some(*sha256))],
        }
    }

    fn spell(&self, key: &Key) -> String {
        match key {
            Key::Shard(shard) => self.keys.shard_tokens(shard),
            Key::Payload { slot, t } => self.run.payload(&slot.0, slot.1, *t),
            Key::Receipt { slot, lease } => self.run.receipt(&slot.0, slot.1, *lease),
            Key::Opening { slot, audit, part } => self.run.opening(&slot.0, slot.1, audit, *part),
        }
    }

    /// Presigns, seals to the X25519 key `recipient` and signs.
    fn bundle<D: Document>(
        &self,
        recipient: Option<[u8; 32]>,
        wanted: &[Presign],
        document: impl Fn(SealedBytes) -> D,
    ) -> Result<Bytes, String> {
        let now_ms = clock::now_ms();
        let requests =
            wanted.iter().map(|request| self.store.presign(request)).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        let sequence = self.sequence.next(now_ms).map_err(|error| error.to_string())?;
        let header = header_for::<D>(&self.context, self.signer.key(), sequence, now_ms);
        let purpose: Purpose = D::PURPOSE;
        let sealed = match recipient {
            Some(recipient) => bundle::seal_to(&self.context, purpose, &header, &recipient, &GrantBundle { requests })
                .map_err(|error| error.to_string())?,
            // Nothing can be sealed to this hotkey: an empty bundle says that it was seen, and that it needs a certificate.
            None => SealedBytes { encapsulated: [0; 32], ciphertext: Vec::new() },
        };
        Ok(Bytes::from(envelope::sign_with_header(header, &document(sealed), &*self.signer)))
    }
}
