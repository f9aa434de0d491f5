//! Releases: the base tree with every contract tensor replaced from the absolute fragment states.

use std::sync::Arc;

use bytes::Bytes;
use fragments::CheckpointTree;
use fragments::checkpoint::assemble_from;
use protocol::documents::{Release, ReleaseRef};
use protocol::{Digest, codec, envelope};
use storage::StoreError;

use super::{Service, persist};
use crate::operator::checkpoint::describe;

impl Service {
    /// Assembles, uploads and signs the release of these fragment versions. The same versions give the same release.
    pub(super) async fn release(self: &Arc<Self>, versions: Vec<u64>, tokens: u64) -> ReleaseRef {
        let name = format!("run-{}", Digest::derive("quasar/v1/release", &[&self.context.run.0, &codec::encode(&versions)]).short());
        persist("the release", || self.try_release(&name, &versions, tokens)).await
    }

    async fn try_release(self: &Arc<Self>, name: &str, versions: &[u64], tokens: u64) -> Result<ReleaseRef, String> {
        let out = self.state_dir.join("releases").join(name);
        let (plan, base, tree) = (self.plan.clone(), self.base_tree.clone(), out.clone());
        let (service, runtime, wanted) = (self.clone(), tokio::runtime::Handle::current(), versions.to_vec());
        let files = tokio::task::spawn_blocking(move || {
            if tree.join("quasar_parameter_contract.json").exists() {
                std::fs::remove_dir_all(&tree).map_err(|error| error.to_string())?;
            }
            let base = CheckpointTree::open(&base).map_err(|error| error.to_string())?;
            // One fragment in memory at a time, whatever the model's size.
            let values =
                |fragment: usize| Ok::<_, std::io::Error>(runtime.block_on(service.state(fragment as u16, wanted[fragment])).theta);
            assemble_from(&base, &plan, values, &tree).map_err(|error| error.to_string())?;
            describe(&tree).map_err(|error| error.to_string())
        })
        .await
        .map_err(|error| error.to_string())??;
        for file in &files {
            let key = self.keys.release_file(name, &file.path);
            let bytes = tokio::fs::read(out.join(&file.path)).await.map_err(|error| error.to_string())?;
            let stored = self.put_bytes_once(&key, Bytes::from(bytes)).await.map_err(|error| error.to_string())?;
            if Digest::blake3(&stored) != file.blake3 {
                return Err(format!("{key} is there with other bytes"));
            }
        }
        let release = Release { release: name.to_owned(), versions: versions.to_vec(), files, tokens };
        let key = self.keys.release_manifest(name);
        let now_ms = daemon::clock::now_ms();
        let sequence = self.sequence.next(now_ms).map_err(|error| error.to_string())?;
        let bytes = Bytes::from(envelope::sign(&release, &self.context.without_run(), &*self.signer, sequence, now_ms));
        let stored = self.put_bytes_once(&key, bytes).await.map_err(|error: StoreError| error.to_string())?;
        // Nothing counts as released before it was read back.
        let back = self.store.get(&key, stored.len() as u64).await.map_err(|error| error.to_string())?;
        tracing::info!(release = name, files = release.files.len(), tokens, "released");
        Ok(ReleaseRef { release: name.to_owned(), manifest: Digest::blake3(&back.bytes) })
    }
}
