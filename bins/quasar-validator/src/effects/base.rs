//! The checkpoint that the run starts from, brought to this disk once: the models of audits are opened on it, and version 0 of
//! every fragment is read from it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fragments::CheckpointTree;
use fragments::keyframe::{self, KeyframeId};
use protocol::documents::Release;
use protocol::envelope::{Context, Document, Expect, open_stored, peek};
use protocol::{Digest, Method};
use storage::discovery::RunFacts;
use storage::{key, transfer};
use tokio::sync::OnceCell;

use super::grants::Grants;
use super::trouble::Trouble;

/// Most files in a checkpoint tree.
const FILES_MAX: usize = 100_000;

/// The run's base tree.
pub struct BaseTree {
    facts: Arc<RunFacts>,
    grants: Arc<Grants>,
    folder: PathBuf,
    is_here: OnceCell<()>,
}

impl BaseTree {
    /// `cache` is shared by all runs: trees lie under the digest of their manifest.
    pub fn new(facts: Arc<RunFacts>, grants: Arc<Grants>, cache: &Path) -> Self {
        let folder = cache.join(facts.manifest.base_manifest.to_string());
        Self { facts, grants, folder, is_here: OnceCell::new() }
    }

    /// The folder of the complete, verified tree; fetches what is missing, going on where an earlier attempt stopped.
    pub async fn folder(&self) -> Result<&Path, Trouble> {
        self.is_here.get_or_try_init(|| self.fetch()).await?;
        Ok(&self.folder)
    }

    async fn fetch(&self) -> Result<(), Trouble> {
        let release = &self.facts.manifest.base_release;
        let manifest_key = self.facts.keys.release_manifest(release);
        let bytes = self.grants.get(None, &manifest_key, Release::PURPOSE.file_limit()).await?;
        let manifest = read_manifest(&bytes, &self.facts, &manifest_key)?;
        for file in &manifest.files {
            let grant = self.grants.grant(None, Method::Get, &self.facts.keys.release_file(release, &file.path)).await?;
            transfer::download(&(self.grants.access(), &grant), file, &self.folder.join(&file.path)).await?;
        }
        tracing::info!(release, files = manifest.files.len(), "the base checkpoint is here");
        Ok(())
    }

    /// Version 0 of a fragment as it was published: the tree's values, rounded as keyframes are.
    pub async fn fragment(&self, fragment: u16) -> Result<Vec<f32>, Trouble> {
        let (folder, facts) = (self.folder().await?.to_owned(), self.facts.clone());
        let read = move || -> Result<Vec<f32>, Trouble> {
            let path = folder.display().to_string();
            let tree = CheckpointTree::open(&folder).map_err(|error| Trouble::malformed(&path, error))?;
            let values = tree.read_fragment(&facts.plan, usize::from(fragment)).map_err(|error| Trouble::malformed(&path, error))?;
            let id = KeyframeId { plan: facts.manifest.plan, fragment: u32::from(fragment), version: 0 };
            let bytes = keyframe::write(&facts.plan, &id, &values).map_err(|error| Trouble::malformed(&path, error))?;
            keyframe::read(&facts.plan, &id, &bytes).map_err(|error| Trouble::malformed(&path, error))
        };
        tokio::task::spawn_blocking(read).await.map_err(|_| Trouble::BenchGone)?
    }

    /// Removes trees of other runs from the cache.
    pub fn tidy(&self) {
        let Some(cache) = self.folder.parent() else { return };
        for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
            if entry.path() != self.folder {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// The manifest, if it is the one that the run manifest names by digest.
fn read_manifest(bytes: &[u8], facts: &RunFacts, name: &str) -> Result<Release, Trouble> {
    if Digest::blake3(bytes) != facts.manifest.base_manifest {
        return Err(Trouble::Digest { key: name.to_owned() });
    }
    // The tree may have been published before the run; whose signature it bears is settled by the digest.
    let header = peek(bytes).map_err(|error| Trouble::malformed(name, error))?.0.header;
    let context = Context { run: header.run, ..facts.context };
    let release =
        open_stored::<Release>(bytes, &context, Expect::Key(&header.signer)).map_err(|error| Trouble::malformed(name, error))?.document;
    let total = release.files.iter().fold(0, |sum: u64, file| sum.saturating_add(file.length));
    let is_inside = |path: &str| key::is_valid(path) && Path::new(path).is_relative();
    let is_sound = release.files.len() <= FILES_MAX
        && total <= facts.root.bounds.checkpoint_bytes_max
        && release.files.iter().all(|file| file.is_consistent() && is_inside(&file.path));
    if is_sound { Ok(release) } else { Err(Trouble::malformed(name, "it breaks the bounds of the run root")) }
}
