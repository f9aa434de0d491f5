//! The checkpoint that the run starts from, brought to this disk once and kept under the digest of its manifest.

use std::fs;
use std::path::{Path, PathBuf};

use protocol::documents::Release;
use protocol::envelope::{self, Document, Purpose};
use protocol::{Digest, GrantRequest, codec};
use storage::client::GrantAccess;
use storage::discovery::RunFacts;
use storage::transfer::{self, TransferError};

use super::keyframes::{file_trouble, grant_trouble};
use crate::machine::Trouble;

/// Most files in a checkpoint tree.
const FILES_MAX: usize = 100_000;
/// Written when every file of the tree was verified.
const COMPLETE: &str = ".complete";

/// Where base trees are kept. Learners of one process share it: the first one fetches, the others wait.
pub struct BaseTrees {
    folder: PathBuf,
    fetching: tokio::sync::Mutex<()>,
}

impl BaseTrees {
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, fetching: tokio::sync::Mutex::new(()) }
    }

    /// The folder of the run's base tree.
    pub fn tree(&self, facts: &RunFacts) -> PathBuf {
        self.folder.join(facts.manifest.base_manifest.to_string())
    }

    /// Brings the base tree of the run to this disk. `grant` gives the request for a key.
    pub async fn fetch(
        &self,
        facts: &RunFacts,
        access: &dyn GrantAccess,
        grant: impl Fn(&str) -> Option<GrantRequest>,
    ) -> Result<(), Trouble> {
        let _one_at_a_time = self.fetching.lock().await;
        let tree = self.tree(facts);
        if tree.join(COMPLETE).exists() {
            return Ok(());
        }
        let release = &facts.manifest.base_release;
        let manifest_grant = grant(&facts.keys.release_manifest(release)).ok_or(Trouble::Grant)?;
        let limit = Purpose::Release.file_limit();
        let bytes = access.get(&manifest_grant, None, limit).await.map_err(|error| grant_trouble(&error))?;
        let manifest = read_manifest(&bytes, facts)?;
        fs::create_dir_all(&tree).map_err(|error| file_trouble(&error))?;
        for file in &manifest.files {
            let grant = grant(&facts.keys.release_file(release, &file.path)).ok_or(Trouble::Grant)?;
            let done =
                transfer::download(&(access, &grant), file, &tree.join(&file.path)).await.map_err(|error| transfer_trouble(&error))?;
            tracing::debug!(file = file.path, bytes = file.length, fetched = done.fetched_bytes, "base file ready");
        }
        fs::write(tree.join(COMPLETE), []).map_err(|error| file_trouble(&error))
    }
}

/// The manifest, if it is the one that the run manifest names: that one is signed, so its digest is enough.
fn read_manifest(bytes: &[u8], facts: &RunFacts) -> Result<Release, Trouble> {
    if Digest::blake3(bytes) != facts.manifest.base_manifest {
        tracing::error!(release = facts.manifest.base_release, "the base release's manifest is not the one that the run names");
        return Err(Trouble::Corrupt);
    }
    let (envelope, _, _) = envelope::peek(bytes).map_err(|_| Trouble::Corrupt)?;
    let release: Release = codec::decode(&envelope.payload, Release::PURPOSE.limit()).map_err(|_| Trouble::Corrupt)?;
    let total = release.files.iter().map(|file| file.length).fold(0, u64::saturating_add);
    let is_sound = envelope.header.purpose == Release::PURPOSE as u16
        && release.files.len() <= FILES_MAX
        && total <= facts.root.bounds.checkpoint_bytes_max
        && release.files.iter().all(|file| file.is_consistent() && is_inside(&file.path));
    if is_sound {
        Ok(release)
    } else {
        tracing::error!(release = facts.manifest.base_release, "the base release's manifest breaks the run's bounds");
        Err(Trouble::Corrupt)
    }
}

/// Whether a path from a manifest stays inside its folder.
fn is_inside(path: &str) -> bool {
    storage::key::is_valid(path) && Path::new(path).is_relative() && path != COMPLETE
}

fn transfer_trouble(error: &TransferError) -> Trouble {
    tracing::warn!(%error, "the base checkpoint is not complete");
    match error {
        TransferError::DiskFull { .. } => Trouble::DiskFull,
        TransferError::Expired { .. } => Trouble::Grant,
        TransferError::Absent { .. } => Trouble::Absent,
        TransferError::Corrupt { .. } | TransferError::BadRecord { .. } | TransferError::Refused { .. } => Trouble::Corrupt,
        TransferError::Io { .. } | TransferError::Busy { .. } | TransferError::Unavailable { .. } => Trouble::Unavailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_from_a_manifest_never_leaves_its_folder() {
        for good in ["config.json", "model-00001-of-00002.safetensors", "a/b"] {
            assert!(is_inside(good), "{good}");
        }
        for bad in ["../x", "/etc/passwd", "a/../../b", "", "a//b", "a\\b", ".complete"] {
            assert!(!is_inside(bad), "{bad}");
        }
    }
}
