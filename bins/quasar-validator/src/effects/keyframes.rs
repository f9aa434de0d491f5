//! Published fragment versions on disk: fetched as they appear, because grants for old ones run out, and kept for the audits of
//! the last cycles. They come as keyframes, or as frames from the version before; on disk each is a keyframe.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use fragments::delta;
use fragments::keyframe::{self, KeyframeId};
use protocol::Digest;
use protocol::documents::Codec;
use protocol::schedule::keyframe_version;
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
        self.read(fragment, version, &bytes)
    }

    /// The file of a version: from disk if it is there undamaged, else through its grants.
    async fn bytes(&self, one: KeyframeRef) -> Result<Vec<u8>, Trouble> {
        let path = self.path(one.fragment, one.version);
        if let Ok(bytes) = fs::read(&path)
            && Digest::blake3(&bytes) == one.digest
        {
            return Ok(bytes);
        }
        let near = self.near(one.fragment, one.version);
        let keyframe = keyframe_version(self.facts.manifest.parameters.codec_down, one.version);
        let bytes = match near {
            None if keyframe == one.version => self.fetch_keyframe(one.fragment, keyframe, Some(one.digest)).await?,
            _ => self.follow(near.unwrap_or(keyframe), one).await?,
        };
        files::write_whole(&path, &bytes).map_err(Trouble::io(&path))?;
        Ok(bytes)
    }

    /// The newest version that is here undamaged and from which frames lead to `version`.
    fn near(&self, fragment: u16, version: u64) -> Option<u64> {
        let down = self.facts.manifest.parameters.codec_down;
        let before = version.checked_sub(1).filter(|_| down != Codec::Bf16)?;
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let is_here = |version: &u64| {
            let file = fs::read(self.path(fragment, *version));
            file.is_ok_and(|bytes| known.get(&(fragment, *version)) == Some(&Digest::blake3(&bytes)))
        };
        (keyframe_version(down, before).max(1)..version).rev().find(is_here)
    }

    /// A keyframe by its grant; compares its digest where one is known.
    async fn fetch_keyframe(&self, fragment: u16, version: u64, digest: Option<Digest>) -> Result<Vec<u8>, Trouble> {
        let key = self.facts.run.keyframe(fragment, version);
        let limit = keyframe::keyframe_bytes(&self.facts.plan, &self.id(fragment, version));
        let bytes = self.grants.get(None, &key, limit.map_err(|error| Trouble::malformed(&key, error))?).await?;
        match digest {
            Some(digest) if Digest::blake3(&bytes) != digest => Err(Trouble::Digest { key }),
            _ => Ok(bytes.to_vec()),
        }
    }

    /// From version `start`, which is here, version 0 or a published keyframe, by the frames since. The digest at the end vouches for
    /// the whole way.
    async fn follow(&self, start: u64, to: KeyframeRef) -> Result<Vec<u8>, Trouble> {
        let fragment = to.fragment;
        let base = match fs::read(self.path(fragment, start)) {
            _ if start == 0 => self.base.fragment(fragment).await?,
            Ok(bytes) => self.read(fragment, start, &bytes)?,
            Err(_) => self.read(fragment, start, &self.fetch_keyframe(fragment, start, None).await?)?,
        };
        let limit = delta::delta_bytes(&self.facts.plan, usize::from(fragment));
        let mut frames = Vec::new();
        for version in start + 1..=to.version {
            frames.push(self.grants.get(None, &self.facts.run.delta(fragment, version), limit).await?);
        }
        let (facts, id) = (self.facts.clone(), self.id(fragment, start));
        let work = move || delta::follow(&facts.plan, &id, base, &frames, &to.digest);
        let followed = tokio::task::spawn_blocking(work).await.map_err(|_| Trouble::BenchGone)?;
        followed.map_err(|error| Trouble::malformed(self.facts.run.delta(fragment, to.version), error))
    }

    fn read(&self, fragment: u16, version: u64, bytes: &[u8]) -> Result<Vec<f32>, Trouble> {
        keyframe::read(&self.facts.plan, &self.id(fragment, version), bytes)
            .map_err(|error| Trouble::malformed(self.facts.run.keyframe(fragment, version), error))
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
