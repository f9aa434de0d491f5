//! Received fragment versions on disk: what the trainer applies, and Θ̂ of the base that payloads are taken against.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;

use fragments::keyframe::{self, KeyframeError, KeyframeId};
use protocol::{Digest, FragmentPlan, GrantRequest};
use storage::client::{GrantAccess, GrantError};

use super::files;
use crate::machine::Trouble;

/// Bytes that are asked for at a time; a broken download goes on behind the last complete piece.
const PIECE_BYTES: u64 = 16 << 20;
const ENDING: &str = ".safetensors";

#[derive(Debug, thiserror::Error)]
pub enum KeyframeStoreError {
    #[error("{}: {source}\nhint: do not touch the state folder while the miner runs", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: {error}", path.display())]
    Content { path: PathBuf, error: KeyframeError },
}

/// Keyframes of one run in one folder.
pub struct Keyframes {
    folder: PathBuf,
    plan: FragmentPlan,
    plan_digest: Digest,
}

/// Length and BLAKE3 that the head states of a keyframe.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    pub length: u64,
    pub digest: Digest,
}

impl Keyframes {
    pub fn open(folder: PathBuf, plan: FragmentPlan) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        let plan_digest = plan.digest();
        Ok(Self { folder, plan, plan_digest })
    }

    pub fn plan(&self) -> &FragmentPlan {
        &self.plan
    }

    pub fn plan_digest(&self) -> Digest {
        self.plan_digest
    }

    fn path(&self, fragment: u16, version: u64) -> PathBuf {
        self.folder.join(format!("{fragment}-{version}{ENDING}"))
    }

    fn id(&self, fragment: u16, version: u64) -> KeyframeId {
        KeyframeId { plan: self.plan_digest, fragment: u32::from(fragment), version }
    }

    /// Brings a keyframe to this disk, unless it is there already.
    pub async fn fetch(
        &self,
        access: &dyn GrantAccess,
        grant: &GrantRequest,
        fragment: u16,
        version: u64,
        promise: Promise,
    ) -> Result<(), Trouble> {
        if keyframe::keyframe_bytes(&self.plan, &self.id(fragment, version)).ok() != Some(promise.length) {
            tracing::error!(fragment, version, length = promise.length, "the head states a length that the plan does not give");
            return Err(Trouble::Corrupt);
        }
        let path = self.path(fragment, version);
        if digest_of(&path).await.is_some_and(|digest| digest == promise.digest) {
            return Ok(());
        }
        let partial = path.with_extension("part");
        let mut at = fs::metadata(&partial).map_or(0, |meta| meta.len());
        if at > promise.length {
            fs::remove_file(&partial).map_err(|error| files::trouble(&error))?;
            at = 0;
        }
        while at < promise.length {
            let end = (at + PIECE_BYTES).min(promise.length);
            let range = (end - at < promise.length).then_some((at, end));
            let bytes = access.get(grant, range, end - at).await.map_err(|error| grant_trouble(&error))?;
            if bytes.len() as u64 != end - at {
                return Err(Trouble::Corrupt);
            }
            append(&partial, &bytes).map_err(|error| files::trouble(&error))?;
            at = end;
        }
        if digest_of(&partial).await != Some(promise.digest) {
            tracing::error!(fragment, version, "a keyframe does not have the digest that the head states; it is fetched again");
            let _ = fs::remove_file(&partial);
            return Err(Trouble::Corrupt);
        }
        fs::rename(&partial, &path).map_err(|error| files::trouble(&error))
    }

    /// Values of a keyframe in slice order.
    pub fn load(&self, fragment: u16, version: u64) -> Result<Vec<f32>, KeyframeStoreError> {
        let path = self.path(fragment, version);
        let bytes = fs::read(&path).map_err(|source| KeyframeStoreError::Io { path: path.clone(), source })?;
        keyframe::read(&self.plan, &self.id(fragment, version), &bytes).map_err(|error| KeyframeStoreError::Content { path, error })
    }

    /// Puts a keyframe where a fetch would; gives its length and digest.
    #[cfg(test)]
    pub fn plant(&self, fragment: u16, version: u64, values: &[f32]) -> Promise {
        let bytes = keyframe::write(&self.plan, &self.id(fragment, version), values).unwrap();
        fs::write(self.path(fragment, version), &bytes).unwrap();
        Promise { length: bytes.len() as u64, digest: Digest::blake3(&bytes) }
    }

    /// Removes versions of `fragment` older than `version`.
    pub fn retire(&self, fragment: u16, version: u64) {
        let older = |stem: &String| {
            let (of, number) = stem.split_once('-')?;
            (of.parse::<u16>().ok()? == fragment && number.parse::<u64>().ok()? < version).then_some(())
        };
        for stem in files::stems(&self.folder, ENDING).unwrap_or_default() {
            if older(&stem).is_some() {
                let _ = fs::remove_file(self.folder.join(format!("{stem}{ENDING}")));
            }
        }
    }
}

fn append(path: &PathBuf, bytes: &[u8]) -> io::Result<()> {
    OpenOptions::new().create(true).append(true).open(path)?.write_all(bytes)
}

/// BLAKE3 of a file, if it can be read.
async fn digest_of(path: &std::path::Path) -> Option<Digest> {
    let path = path.to_owned();
    let hash = move || -> io::Result<Digest> {
        let (mut file, mut hasher, mut buffer) = (File::open(path)?, blake3::Hasher::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(Digest(*hasher.finalize().as_bytes())),
                read => hasher.update(&buffer[..read]),
            };
        }
    };
    tokio::task::spawn_blocking(hash).await.ok()?.ok()
}

/// What a failed read through a grant means to the machine.
pub fn grant_trouble(error: &GrantError) -> Trouble {
    match error {
        GrantError::Forbidden { .. } | GrantError::TooLarge { .. } | GrantError::Refused { .. } => {
            tracing::error!(error = error.to_string().replace('\n', "; "), "a read through a grant failed");
        }
        _ => tracing::debug!(%error, "a read through a grant failed"),
    }
    match error {
        GrantError::Expired { .. } | GrantError::Forbidden { .. } => Trouble::Grant,
        GrantError::Absent { .. } => Trouble::Absent,
        GrantError::Unavailable { .. } => Trouble::Unavailable,
        GrantError::TooLarge { .. } | GrantError::Refused { .. } => Trouble::Corrupt,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use storage::{MemoryGrants, MemoryStore, ObjectStore, Presign, PutCondition};

    use super::*;

    #[tokio::test]
    async fn a_keyframe_is_fetched_once_and_only_with_the_promised_digest() {
        let folder = tempfile::tempdir().unwrap();
        let plan = model::toy_plan(3);
        let store = Keyframes::open(folder.path().join("fragments"), plan.clone()).unwrap();
        let values = vec![0.5; plan.elements(1) as usize];
        let bytes = keyframe::write(&plan, &store.id(1, 7), &values).unwrap();
        let bucket = MemoryStore::new();
        bucket.put("k", Bytes::from(bytes.clone()), PutCondition::Always).await.unwrap();
        let grant = bucket.presign(&Presign::Get { key: "k".into(), now_ms: 0, expires_in_ms: 60_000 }).unwrap();
        let access = MemoryGrants::new(bucket, || 1_000);
        let promise = Promise { length: bytes.len() as u64, digest: Digest::blake3(&bytes) };
        let other = Promise { digest: Digest::ZERO, ..promise };
        assert_eq!(store.fetch(&access, &grant, 1, 7, other).await, Err(Trouble::Corrupt));
        assert_eq!(store.fetch(&access, &grant, 1, 7, Promise { length: 9, ..promise }).await, Err(Trouble::Corrupt));
        assert_eq!(store.fetch(&access, &grant, 1, 7, promise).await, Ok(()));
        assert_eq!(store.load(1, 7).unwrap(), values);
        let late = MemoryGrants::new(MemoryStore::new(), || 90_000);
        assert_eq!(store.fetch(&late, &grant, 1, 7, promise).await, Ok(()), "it is on disk");
        store.retire(1, 8);
        assert_eq!(store.fetch(&late, &grant, 1, 7, promise).await, Err(Trouble::Grant));
    }
}
