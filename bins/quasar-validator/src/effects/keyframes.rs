//! Published fragment versions on disk: fetched as they appear, because grants for old ones run out, and kept for the audits of
//! the last cycles.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use fragments::keyframe::{self, KeyframeId};
use protocol::Digest;
use storage::discovery::RunFacts;

use super::base::BaseTree;
use super::files;
use super::grants::Grants;
use super::trouble::Trouble;
use crate::machine::cycles::{KeyframeRef, VERSIONS_KEPT};

/// Keyframes of one run.
pub struct Keyframes {
    facts: Arc<RunFacts>,
    grants: Arc<Grants>,
    base: Arc<BaseTree>,
    folder: PathBuf,
    /// Digests that merge manifests stated.
    known: Mutex<HashMap<(u16, u64), Digest>>,
}

impl Keyframes {
    pub fn new(facts: Arc<RunFacts>, grants: Arc<Grants>, base: Arc<BaseTree>, folder: PathBuf) -> Self {
        Self { facts, grants, base, folder, known: Mutex::default() }
    }

    fn path(&self, fragment: u16, version: u64) -> PathBuf {
        self.folder.join(format!("{fragment}-{version}.safetensors"))
    }

    fn id(&self, fragment: u16, version: u64) -> KeyframeId {
        KeyframeId { plan: self.facts.manifest.plan, fragment: u32::from(fragment), version }
    }

    /// Remembers a version that a merge manifest stated, fetches it, and lets go of what no audit needs any more.
    pub async fn keep(&self, one: KeyframeRef) -> Result<(), Trouble> {
        {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert((one.fragment, one.version), one.digest);
            if let Some(old) = one.version.checked_sub(VERSIONS_KEPT) {
                known.remove(&(one.fragment, old));
                let _ = fs::remove_file(self.path(one.fragment, old));
            }
        }
        self.bytes(one).await.map(drop)
    }

    /// Values of a fragment version, in slice order.
    pub async fn values(&self, fragment: u16, version: u64) -> Result<Vec<f32>, Trouble> {
        if version == 0 {
            return self.base.fragment(fragment).await;
        }
        let digest = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&(fragment, version)).copied();
        let digest = digest.ok_or(Trouble::UnknownKeyframe { fragment, version })?;
        let bytes = self.bytes(KeyframeRef { fragment, version, digest }).await?;
        keyframe::read(&self.facts.plan, &self.id(fragment, version), &bytes)
            .map_err(|error| Trouble::malformed(self.facts.run.keyframe(fragment, version), error))
    }

    /// The file of a version: from disk if it is there undamaged, else through its grant.
    async fn bytes(&self, one: KeyframeRef) -> Result<Vec<u8>, Trouble> {
        let path = self.path(one.fragment, one.version);
        if let Ok(bytes) = fs::read(&path)
            && Digest::blake3(&bytes) == one.digest
        {
            return Ok(bytes);
        }
        let key = self.facts.run.keyframe(one.fragment, one.version);
        let limit = keyframe::keyframe_bytes(&self.facts.plan, &self.id(one.fragment, one.version))
            .map_err(|error| Trouble::malformed(&key, error))?;
        let bytes = self.grants.get(None, &key, limit).await?;
        if Digest::blake3(&bytes) != one.digest {
            return Err(Trouble::Digest { key });
        }
        files::write_whole(&path, &bytes).map_err(Trouble::io(&path))?;
        Ok(bytes.to_vec())
    }
}

/// Removes the folders of other runs.
pub fn tidy(runs: &Path, current: &Path) {
    for entry in fs::read_dir(runs).into_iter().flatten().flatten() {
        if entry.path() != current {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
