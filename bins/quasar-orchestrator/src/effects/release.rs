//! Releases: the base tree with every contract tensor replaced from the absolute fragment states.
//!
//! A tree lies on the local disk from its assembly to the end of its upload. It is as large as the model, so at most one is there: that
//! of the release that is being made.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use fragments::CheckpointTree;
use fragments::checkpoint::{CheckpointError, StateFile, UNFINISHED, assemble_states};
use protocol::documents::{Release, ReleaseRef};
use protocol::envelope::{self, Document, Expect, open_stored};
use protocol::{Digest, FileRecord, codec};
use storage::{StoreError, transfer};

use super::payloads::Download;
use super::{Service, persist};
use crate::operator::checkpoint::{describe, is_part_of_release};

/// Ending of a state that was fetched for a release, beside those that merges keep and remove.
const FETCHED: &str = "release";

/// What to do about a file of a release that is not the one that these fragment versions give.
const OTHER_FILE: &str = "if this release has no manifest.qsr, it is half of what an orchestrator of another version began: remove its files \
                          and start again; else start another run";

impl Service {
    /// Assembles, uploads and signs the release of these fragment versions. The same versions give the same release.
    pub(super) async fn release(&self, versions: Vec<u64>, tokens: u64) -> ReleaseRef {
        let name = format!("run-{}", Digest::derive("quasar/v1/release", &[&self.context.run.0, &codec::encode(&versions)]).short());
        let manifest = match self.released(&name).await {
            // By a process that ended before it was heard.
            Some(manifest) => manifest,
            None => {
                self.drop_releases(|other| other != name);
                persist("the release", || self.try_release(&name, &versions, tokens)).await
            }
        };
        self.drop_releases(|_| true);
        ReleaseRef { release: name, manifest }
    }

    /// Digest of the manifest of a release that lies in the bucket.
    async fn released(&self, name: &str) -> Option<Digest> {
        let bytes = self.get_present(&self.keys.release_manifest(name), Release::PURPOSE.file_limit()).await?;
        let is_ours = open_stored::<Release>(&bytes, &self.context.without_run(), Expect::Any(&self.signers)).is_ok();
        is_ours.then(|| Digest::blake3(&bytes))
    }

    /// Removes the trees of releases that are over, and the fetched states where no other tree is left.
    fn drop_releases(&self, is_over: impl Fn(&str) -> bool) {
        let (over, others): (Vec<_>, Vec<_>) =
            entries(&self.state_dir.join("releases")).into_iter().partition(|tree| is_over(&name_of(tree)));
        for tree in over {
            if let Err(error) = std::fs::remove_dir_all(&tree) {
                tracing::warn!("{} cannot be removed: {error}", tree.display());
            }
        }
        if others.is_empty() {
            let states = entries(&self.state_dir.join("states")).into_iter();
            for state in states.filter(|path| path.extension().is_some_and(|ending| ending == FETCHED)) {
                let _ = std::fs::remove_file(state);
            }
        }
    }

    /// Removes what an earlier process left of releases that are in the bucket. Another one may be what is still to be made, which goes
    /// on from there; if it is not, the next release removes it.
    pub(super) async fn sweep_releases(&self) {
        let mut over = Vec::new();
        for name in entries(&self.state_dir.join("releases")).iter().map(|tree| name_of(tree)) {
            if self.released(&name).await.is_some() {
                over.push(name);
            }
        }
        self.drop_releases(|name| over.iter().any(|over| over == name));
    }

    /// The f32 state of a version as a file on the local disk.
    async fn state_file(&self, fragment: u16, version: u64) -> Result<StateFile, String> {
        let (path, header) = (self.state_path(fragment, version), self.state_header(fragment, version));
        let fetched = path.with_extension(FETCHED);
        if let Ok(file) = StateFile::open(&path, &header).or_else(|_| StateFile::open(&fetched, &header)) {
            return Ok(file);
        }
        let key = self.run.state(fragment, version);
        match self.download(&key, header.state_bytes(), &fetched).await {
            Download::Done => StateFile::open(&fetched, &header).map_err(|error| error.to_string()),
            Download::Absent | Download::OtherLength => Err(format!("{key} is not in the bucket as it should be")),
        }
    }

    /// The files of the release's tree, which is assembled if that was not done before.
    async fn assembled(&self, out: &Path, versions: &[u64]) -> Result<Vec<FileRecord>, String> {
        let tree = out.to_owned();
        if let Some(files) = blocking(move || complete_tree(&tree)).await? {
            return Ok(files);
        }
        let mut states = Vec::with_capacity(versions.len());
        for (fragment, version) in versions.iter().enumerate() {
            states.push(self.state_file(fragment as u16, *version).await?);
        }
        let (plan, base, tree) = (self.plan.clone(), self.base_tree.clone(), out.to_owned());
        blocking(move || {
            let base = CheckpointTree::open(&base).map_err(|error| error.to_string())?;
            let assembled = assemble_states(&base, &plan, &states, &tree).map_err(|error| {
                if let CheckpointError::State { path, .. } = &error {
                    // The next attempt takes it from the bucket.
                    let _ = std::fs::remove_file(path);
                }
                error.to_string()
            })?;
            Ok(assembled.records.into_iter().filter(|record| is_part_of_release(&record.path)).collect())
        })
        .await
    }

    async fn try_release(&self, name: &str, versions: &[u64], tokens: u64) -> Result<Digest, String> {
        let out = self.state_dir.join("releases").join(name);
        let files = self.assembled(&out, versions).await?;
        for file in &files {
            let (key, path) = (self.keys.release_file(name, &file.path), out.join(&file.path));
            self.persist_upload(&key, file, &path).await.inspect_err(|_| {
                // The disk changed it: the next attempt assembles the tree again.
                let _ = std::fs::remove_dir_all(&out);
            })?;
        }
        let release = Release { release: name.to_owned(), versions: versions.to_vec(), files, tokens };
        let key = self.keys.release_manifest(name);
        let now_ms = daemon::clock::now_ms();
        let sequence = self.sequence.next(now_ms).map_err(|error| error.to_string())?;
        let outside = self.context.without_run();
        let bytes = Bytes::from(envelope::sign(&release, &outside, &*self.signer, sequence, now_ms));
        let stored = match self.put_bytes_once(&key, bytes).await {
            Ok(stored) => stored,
            // None of ours is so long, and no bytes are none of ours either.
            Err(StoreError::TooLarge { .. }) => Bytes::new(),
            Err(error) => return Err(error.to_string()),
        };
        if open_stored::<Release>(&stored, &outside, Expect::Any(&self.signers)).is_err() {
            return self.contradicted(&key, "somebody else wrote there: remove it and start again").await;
        }
        // Nothing counts as released before it was read back.
        let back = self.store.get(&key, stored.len() as u64).await.map_err(|error| error.to_string())?;
        tracing::info!(release = name, files = release.files.len(), tokens, "released");
        Ok(Digest::blake3(&back.bytes))
    }

    /// Uploads a file of a tree; what the store cannot do now is tried again. Where other bytes lie at its key they stay, and this stops.
    ///
    /// # Errors
    /// The file is not what was described.
    async fn persist_upload(&self, key: &str, file: &FileRecord, path: &Path) -> Result<(), String> {
        persist(key, || async {
            match self.fence.write(transfer::upload(&*self.store, key, file, path)).await {
                Ok(()) => Ok(Ok(())),
                Err(StoreError::PreconditionFailed { .. }) => {
                    // Should it be the disk that changed its copy: the next start assembles the tree again.
                    let _ = std::fs::remove_dir_all(path.parent().unwrap_or(path));
                    self.contradicted(key, OTHER_FILE).await
                }
                Err(error @ StoreError::Invalid { .. }) => {
                    let (record, path) = (file.clone(), path.to_owned());
                    let is_intact = blocking(move || transfer::is_complete(&record, &path).map_err(|error| error.to_string())).await;
                    if is_intact.unwrap_or(false) { Err(error) } else { Ok(Err(error.to_string())) }
                }
                Err(error) => Err(error),
            }
        })
        .await
    }
}

/// The files of a tree that was assembled to its end; makes way for a new one if there is none.
fn complete_tree(tree: &Path) -> Result<Option<Vec<FileRecord>>, String> {
    // An interrupted assembly is gone on with.
    if !tree.exists() || tree.join(UNFINISHED).exists() {
        return Ok(None);
    }
    if CheckpointTree::open(tree).is_ok() {
        return describe(tree).map(Some).map_err(|failure| format!("{:#}", failure.error));
    }
    std::fs::remove_dir_all(tree).map(|()| None).map_err(|error| format!("{}: {error}", tree.display()))
}

/// What lies in a folder; nothing where it cannot be read.
fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path()).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?
}
