//! Releases: the base tree with every contract tensor replaced from the absolute fragment states.

use bytes::Bytes;
use fragments::CheckpointTree;
use fragments::checkpoint::{CheckpointError, StateFile, assemble_states};
use protocol::documents::{Release, ReleaseRef};
use protocol::{Digest, codec, envelope};
use storage::{StoreError, transfer};

use super::payloads::Download;
use super::{Service, persist};
use crate::operator::checkpoint::is_part_of_release;

impl Service {
    /// Assembles, uploads and signs the release of these fragment versions. The same versions give the same release.
    pub(super) async fn release(&self, versions: Vec<u64>, tokens: u64) -> ReleaseRef {
        let name = format!("run-{}", Digest::derive("quasar/v1/release", &[&self.context.run.0, &codec::encode(&versions)]).short());
        persist("the release", || self.try_release(&name, &versions, tokens)).await
    }

    /// The f32 state of a version as a file on the local disk.
    async fn state_file(&self, fragment: u16, version: u64) -> Result<StateFile, String> {
        let (path, header) = (self.state_path(fragment, version), self.state_header(fragment, version));
        if let Ok(file) = StateFile::open(&path, &header) {
            return Ok(file);
        }
        // Beside the files that merges keep and remove.
        let path = path.with_extension("release");
        let key = self.run.state(fragment, version);
        match self.download(&key, header.state_bytes(), &path).await {
            Download::Done => StateFile::open(&path, &header).map_err(|error| error.to_string()),
            Download::Absent | Download::OtherLength => Err(format!("{key} is not in the bucket as it should be")),
        }
    }

    async fn try_release(&self, name: &str, versions: &[u64], tokens: u64) -> Result<ReleaseRef, String> {
        let mut states = Vec::with_capacity(versions.len());
        for (fragment, version) in versions.iter().enumerate() {
            states.push(self.state_file(fragment as u16, *version).await?);
        }
        let out = self.state_dir.join("releases").join(name);
        let (plan, base, tree) = (self.plan.clone(), self.base_tree.clone(), out.clone());
        let files = tokio::task::spawn_blocking(move || {
            if tree.join("quasar_parameter_contract.json").exists() {
                std::fs::remove_dir_all(&tree).map_err(|error| error.to_string())?;
            }
            let base = CheckpointTree::open(&base).map_err(|error| error.to_string())?;
            let assembled = assemble_states(&base, &plan, &states, &tree).map_err(|error| {
                if let CheckpointError::State { path, .. } = &error {
                    // The next attempt takes it from the bucket.
                    let _ = std::fs::remove_file(path);
                }
                error.to_string()
            })?;
            Ok::<_, String>(assembled.records.into_iter().filter(|record| is_part_of_release(&record.path)).collect::<Vec<_>>())
        })
        .await
        .map_err(|error| error.to_string())??;
        for file in &files {
            let key = self.keys.release_file(name, &file.path);
            self.fence.hold().await;
            transfer::upload(&*self.store, &key, file, &out.join(&file.path)).await.map_err(|error| error.to_string())?;
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
