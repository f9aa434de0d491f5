//! Deletes what nobody needs any more. Tapes, manifests, commitments and receipts stay: they are small, and they are the record.

use protocol::documents::{Codec, OPENING_PARTS, opening_bytes_max, opening_volume_bytes};
use storage::StoreError;

use super::{Service, persist};
use crate::machine::Retired;

impl Service {
    pub(super) async fn retire(&self, retired: &Retired) {
        let mut keys = Vec::new();
        for (fragment, version) in &retired.versions {
            keys.extend([self.run.keyframe(*fragment, *version), self.run.state(*fragment, *version)]);
            if self.manifest.parameters.codec_down != Codec::Bf16 {
                keys.push(self.run.delta(*fragment, *version));
            }
        }
        let elements = self.plan.total_elements();
        let has_volumes = opening_bytes_max(elements) > opening_volume_bytes(elements);
        for ((hotkey, slot), audit) in &retired.openings {
            let of_slot = self.run.slot(hotkey, *slot);
            if has_volumes {
                let prefix = of_slot.openings(audit);
                let listed = persist(&prefix, || async { self.store.list(&prefix).await }).await;
                keys.extend(listed.into_iter().map(|meta| meta.key));
            } else {
                keys.extend((0..OPENING_PARTS).map(|part| of_slot.opening(audit, part)));
            }
        }
        keys.extend(retired.payloads.iter().map(|((hotkey, slot), t)| self.run.payload(hotkey, *slot, *t)));
        for release in &retired.releases {
            let prefix = self.keys.release_file(release, "");
            let listed = persist(&prefix, || async { self.store.list(&prefix).await }).await;
            // The manifest first: a release without it is none.
            let (manifests, files): (Vec<_>, Vec<_>) =
                listed.into_iter().map(|meta| meta.key).partition(|key| *key == self.keys.release_manifest(release));
            keys.extend(manifests.into_iter().chain(files));
        }
        for key in &keys {
            persist(key, || async {
                match self.fence.write(self.store.delete(key)).await {
                    Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
                    Err(error) => Err(error),
                }
            })
            .await;
        }
        tracing::debug!(objects = keys.len(), "deleted what nobody needs any more");
    }
}
