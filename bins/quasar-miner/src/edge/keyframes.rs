//! Received fragment versions on disk: what the trainer applies, and Θ̂ of the base that payloads are taken against. They come as
//! keyframes, or as frames from the version before; on disk each is a keyframe.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use daemon::files;
use fragments::codec::PayloadHeader;
use fragments::delta;
use fragments::keyframe::{self, KeyframeError, KeyframeId};
use protocol::documents::Codec;
use protocol::paths::RunKeys;
use protocol::schedule::keyframe_version;
use protocol::{Digest, FragmentPlan, GrantRequest, Method};
use storage::client::{GrantAccess, GrantError};
use tokio::sync::Semaphore;

use crate::machine::Trouble;

/// Bytes that are asked for at a time; a broken download goes on behind the last complete piece.
const PIECE_BYTES: u64 = 16 << 20;
const ENDING: &str = ".safetensors";
/// Of keyframes of which the first pieces are here.
const PARTIAL: &str = ".part";
/// Versions that all learners of this process make from frames at the same time: each is in memory as numbers, twice, and as a file. At
/// mainnet's size these are gigabytes, and after an outage all learners want all fragments at once.
const MADE_AT_ONCE: usize = 2;

/// Room for what is made from frames.
static ROOM: Semaphore = Semaphore::const_new(MADE_AT_ONCE);

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
    plan: Arc<FragmentPlan>,
    plan_digest: Digest,
    /// Codec of the run's payloads, and how its versions come.
    up: Codec,
    down: Codec,
}

/// The way to objects of the run: their keys, the grants at hand, and the store.
pub struct Route<'a> {
    pub keys: &'a RunKeys,
    pub grant: &'a (dyn Fn(Method, &str) -> Option<GrantRequest> + Sync),
    pub access: &'a dyn GrantAccess,
}

/// Length and BLAKE3 that the head states of a keyframe.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    pub length: u64,
    pub digest: Digest,
}

impl Keyframes {
    pub fn open(folder: PathBuf, plan: FragmentPlan, (up, down): (Codec, Codec)) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        files::remove_leftovers(&folder)?;
        let plan_digest = plan.digest();
        Ok(Self { folder, plan: Arc::new(plan), plan_digest, up, down })
    }

    /// Header of a payload against a version of a fragment.
    pub fn payload_header(&self, fragment: u16, base_version: u64) -> PayloadHeader {
        PayloadHeader::new(self.up, &self.plan, self.plan_digest, usize::from(fragment), base_version)
    }

    fn path(&self, fragment: u16, version: u64) -> PathBuf {
        self.folder.join(format!("{fragment}-{version}{ENDING}"))
    }

    fn partial_path(&self, fragment: u16, version: u64) -> PathBuf {
        self.folder.join(format!("{fragment}-{version}{PARTIAL}"))
    }

    fn id(&self, fragment: u16, version: u64) -> KeyframeId {
        KeyframeId { plan: self.plan_digest, fragment: u32::from(fragment), version }
    }

    /// Brings a version to this disk, unless it is there already.
    pub async fn fetch(&self, route: &Route<'_>, fragment: u16, version: u64, promise: Promise) -> Result<(), Trouble> {
        if keyframe::keyframe_bytes(&self.plan, &self.id(fragment, version)).ok() != Some(promise.length) {
            tracing::error!(fragment, version, length = promise.length, "the head states a length that the plan does not give");
            return Err(Trouble::Corrupt);
        }
        if digest_of(&self.path(fragment, version)).await.is_some_and(|digest| digest == promise.digest) {
            return Ok(());
        }
        if let Some(near) = self.near(fragment, version) {
            let mut reached = near;
            match self.follow(route, fragment, (&mut reached, version), promise.digest).await {
                // What is here or a frame is damaged: the whole way from the keyframe.
                Err(Trouble::Corrupt) => {}
                // So it is where a frame is not granted any more. With the newest one every way ends: it has to come.
                Err(Trouble::Grant | Trouble::Absent) if reached + 1 < version => {}
                result => return result,
            }
        }
        let keyframe = keyframe_version(self.down, version);
        if keyframe == version {
            return self.fetch_keyframe(route, fragment, version, promise.length, Some(promise.digest)).await;
        }
        // Nobody states the digest of an older keyframe; the digest at the end of the chain vouches for it.
        self.fetch_keyframe(route, fragment, keyframe, promise.length, None).await?;
        self.follow(route, fragment, (&mut { keyframe }, version), promise.digest).await
    }

    /// The newest version on this disk from which frames lead to `version`.
    fn near(&self, fragment: u16, version: u64) -> Option<u64> {
        let before = version.checked_sub(1).filter(|_| self.down != Codec::Bf16)?;
        (keyframe_version(self.down, before)..version).rev().find(|version| self.path(fragment, *version).exists())
    }

    /// From a version on this disk to a later one by the frames between them, of which one is in memory at a time. `reached` begins as the
    /// former, and is where the frames led that came.
    async fn follow(&self, route: &Route<'_>, fragment: u16, (reached, version): (&mut u64, u64), digest: Digest) -> Result<(), Trouble> {
        let start = *reached;
        let way = (fragment, start, version);
        // Most ways are one frame long: for that one, nobody waits who has room.
        let mut frame = self.fetch_frame(route, fragment, start + 1).await?;
        let _room = ROOM.acquire().await;
        let (plan, id, from) = (self.plan.clone(), self.id(fragment, start), self.path(fragment, start));
        let read = move || -> Result<Vec<f32>, Trouble> {
            let base = fs::read(&from).map_err(|error| file_trouble(&error))?;
            keyframe::read(&plan, &id, &base).map_err(|error| astray(way, &error))
        };
        let mut replica = tokio::task::spawn_blocking(read).await.map_err(|_| Trouble::Unavailable)??;
        for next in start + 1..=version {
            if next > start + 1 {
                frame = self.fetch_frame(route, fragment, next).await?;
            }
            // Nobody states the digests on the way; the one at its end vouches for it.
            let result = if next == version { digest } else { delta::claimed_result(&frame).unwrap_or(Digest::ZERO) };
            let (plan, id, frame) = (self.plan.clone(), self.id(fragment, next - 1), frame.clone());
            let apply = move || delta::apply(&plan, &id, &replica, &frame, &result).map_err(|error| astray(way, &error));
            replica = tokio::task::spawn_blocking(apply).await.map_err(|_| Trouble::Unavailable)??;
            *reached = next;
        }
        let (plan, id, to) = (self.plan.clone(), self.id(fragment, version), self.path(fragment, version));
        let write = move || -> Result<(), Trouble> {
            let keyframe = keyframe::write(&plan, &id, &replica).map_err(|error| astray(way, &error))?;
            files::write_whole(&to, &[&keyframe]).map_err(|error| file_trouble(&error))
        };
        tokio::task::spawn_blocking(write).await.map_err(|_| Trouble::Unavailable)?
    }

    /// The frame that leads to a version.
    async fn fetch_frame(&self, route: &Route<'_>, fragment: u16, version: u64) -> Result<Bytes, Trouble> {
        let grant = (route.grant)(Method::Get, &route.keys.delta(fragment, version)).ok_or(Trouble::Grant)?;
        let length = delta::delta_bytes(&self.plan, usize::from(fragment));
        route.access.get(&grant, None, length).await.map_err(|error| grant_trouble(&error))
    }

    /// Fetches a keyframe; compares its digest where one is known.
    async fn fetch_keyframe(
        &self,
        route: &Route<'_>,
        fragment: u16,
        version: u64,
        length: u64,
        digest: Option<Digest>,
    ) -> Result<(), Trouble> {
        let grant = (route.grant)(Method::Get, &route.keys.keyframe(fragment, version)).ok_or(Trouble::Grant)?;
        let (path, partial) = (self.path(fragment, version), self.partial_path(fragment, version));
        let mut at = fs::metadata(&partial).map_or(0, |meta| meta.len());
        if at > length {
            fs::remove_file(&partial).map_err(|error| file_trouble(&error))?;
            at = 0;
        }
        while at < length {
            let end = (at + PIECE_BYTES).min(length);
            let range = (end - at < length).then_some((at, end));
            let bytes = route.access.get(&grant, range, end - at).await.map_err(|error| grant_trouble(&error))?;
            if bytes.len() as u64 != end - at {
                return Err(Trouble::Corrupt);
            }
            append(&partial, &bytes).map_err(|error| file_trouble(&error))?;
            at = end;
        }
        if digest.is_some() && digest_of(&partial).await != digest {
            tracing::error!(fragment, version, "a keyframe does not have the digest that the head states; it is fetched again");
            let _ = fs::remove_file(&partial);
            return Err(Trouble::Corrupt);
        }
        fs::rename(&partial, &path).map_err(|error| file_trouble(&error))
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

    /// Removes versions of `fragment` older than `version`, those that were overtaken on their way here included.
    pub fn retire(&self, fragment: u16, version: u64) {
        files::remove_versions(&self.folder, &[ENDING, PARTIAL], fragment, version);
    }
}

/// What is here, or a frame, is damaged.
fn astray((fragment, start, version): (u16, u64, u64), error: &dyn std::fmt::Display) -> Trouble {
    tracing::error!(fragment, start, version, %error, "a chain of frames does not lead to the version that the head states");
    Trouble::Corrupt
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

/// What a failed write of a file means to the machine.
pub fn file_trouble(error: &io::Error) -> Trouble {
    if files::is_disk_full(error) { Trouble::DiskFull } else { Trouble::Unavailable }
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
    use std::sync::atomic::{AtomicBool, Ordering};

    use storage::{MemoryGrants, MemoryStore, ObjectStore, Presign, PutCondition};

    use super::*;

    fn keys() -> RunKeys {
        protocol::paths::Keys::new(4).run(protocol::envelope::RunId([1; 16]))
    }

    /// A bucket of these objects, grants for all of them, and the store on this disk.
    async fn bucket(objects: &[(String, &[u8])]) -> (MemoryStore, Vec<GrantRequest>) {
        let bucket = MemoryStore::new();
        let mut grants = Vec::new();
        for (key, bytes) in objects {
            bucket.put(key, Bytes::copy_from_slice(bytes), PutCondition::Always).await.unwrap();
            grants.push(bucket.presign(&Presign::Get { key: key.clone(), now_ms: 0, expires_in_ms: 60_000 }).unwrap());
        }
        (bucket, grants)
    }

    #[tokio::test]
    async fn versions_between_keyframes_come_as_frames() {
        let folder = tempfile::tempdir().unwrap();
        let (plan, keys) = (model::toy_plan(3), keys());
        let store = Keyframes::open(folder.path().join("fragments"), plan.clone(), (Codec::Int4, Codec::Int4)).unwrap();
        let mut theta: Vec<f32> = (0..plan.elements(1)).map(|at| (at as f32).sin()).collect();
        let first = keyframe::write(&plan, &store.id(1, 0), &theta).unwrap();
        let mut replica = keyframe::read(&plan, &store.id(1, 0), &first).unwrap();
        let mut objects = vec![(keys.keyframe(1, 0), first)];
        let mut promises = Vec::new();
        for version in 1..=3 {
            theta.iter_mut().for_each(|value| *value += 1e-3 * value.cos());
            let frame = delta::write(&plan, &store.id(1, version - 1), &replica, &theta).unwrap();
            promises.push(Promise { length: frame.keyframe.len() as u64, digest: Digest::blake3(&frame.keyframe) });
            objects.push((keys.delta(1, version), frame.bytes));
            replica = frame.replica;
        }
        let objects: Vec<(String, &[u8])> = objects.iter().map(|(key, bytes)| (key.clone(), bytes.as_slice())).collect();
        let (bucket, grants) = bucket(&objects).await;
        let access = MemoryGrants::new(bucket, || 1_000);
        let find = |_: Method, key: &str| grants.iter().zip(&objects).find(|(_, (of, _))| of == key).map(|(grant, _)| grant.clone());
        let route = Route { keys: &keys, grant: &find, access: &access };
        // Where others make versions, a keyframe comes all the same, and its frames wait.
        let others = ROOM.acquire_many(MADE_AT_ONCE as u32).await.unwrap();
        let keyframe = async {
            while !store.path(1, 0).exists() {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            result = store.fetch(&route, 1, 2, promises[1]) => panic!("there was no room for it: {result:?}"),
            () = keyframe => {}
        }
        drop(others);
        // A newcomer takes the keyframe and all frames since; who has a version takes the frames behind it.
        assert_eq!(store.fetch(&route, 1, 2, promises[1]).await, Ok(()));
        let other = Promise { digest: Digest::ZERO, ..promises[2] };
        assert_eq!(store.fetch(&route, 1, 3, other).await, Err(Trouble::Corrupt));
        let no_keyframe = |method: Method, key: &str| find(method, key).filter(|_| key != keys.keyframe(1, 0));
        let route = Route { grant: &no_keyframe, ..route };
        assert_eq!(store.fetch(&route, 1, 3, promises[2]).await, Ok(()), "from version 2, which is here");
        assert_eq!(store.load(1, 3).unwrap(), replica);
        // The newest frame is not there yet: no other way leads around it, and nothing is fetched in vain.
        let is_keyframe_asked = AtomicBool::new(false);
        let no_newest = |method: Method, key: &str| {
            is_keyframe_asked.fetch_or(key == keys.keyframe(1, 0), Ordering::Relaxed);
            find(method, key).filter(|_| key != keys.delta(1, 3))
        };
        fs::remove_file(store.path(1, 3)).unwrap();
        let route = Route { grant: &no_newest, ..route };
        assert_eq!(store.fetch(&route, 1, 3, promises[2]).await, Err(Trouble::Grant));
        assert!(!is_keyframe_asked.load(Ordering::Relaxed));
        let nothing = |_: Method, _: &str| None;
        let route = Route { grant: &nothing, ..route };
        store.retire(1, 4);
        assert_eq!(store.fetch(&route, 1, 3, promises[2]).await, Err(Trouble::Grant));
    }

    #[test]
    fn a_newer_version_retires_what_is_here_and_what_was_on_its_way() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Keyframes::open(folder.path().to_owned(), model::toy_plan(3), (Codec::Bf16, Codec::Bf16)).unwrap();
        let store = open();
        for (fragment, version) in [(1, 6), (1, 7), (2, 6)] {
            fs::write(store.path(fragment, version), b"").unwrap();
            fs::write(store.partial_path(fragment, version), b"").unwrap();
        }
        fs::write(store.path(1, 7).with_extension("safetensors.tmp"), b"killed").unwrap();
        let left = |ending| {
            let mut stems = files::stems(folder.path(), ending).unwrap();
            stems.sort();
            stems
        };
        store.retire(1, 7);
        assert_eq!([left(ENDING), left(PARTIAL)], [["1-7", "2-6"], ["1-7", "2-6"]]);
        open();
        assert_eq!(left("").len(), 4, "what a kill broke off is gone");
    }

    #[tokio::test]
    async fn a_keyframe_is_fetched_once_and_only_with_the_promised_digest() {
        let folder = tempfile::tempdir().unwrap();
        let plan = model::toy_plan(3);
        let store = Keyframes::open(folder.path().join("fragments"), plan.clone(), (Codec::Bf16, Codec::Bf16)).unwrap();
        let values = vec![0.5; plan.elements(1) as usize];
        let bytes = keyframe::write(&plan, &store.id(1, 7), &values).unwrap();
        let keys = keys();
        let (bucket, grants) = bucket(&[(keys.keyframe(1, 7), bytes.as_slice())]).await;
        let access = MemoryGrants::new(bucket, || 1_000);
        let find = |_: Method, key: &str| (key == keys.keyframe(1, 7)).then(|| grants[0].clone());
        let route = Route { keys: &keys, grant: &find, access: &access };
        let promise = Promise { length: bytes.len() as u64, digest: Digest::blake3(&bytes) };
        let other = Promise { digest: Digest::ZERO, ..promise };
        assert_eq!(store.fetch(&route, 1, 7, other).await, Err(Trouble::Corrupt));
        assert_eq!(store.fetch(&route, 1, 7, Promise { length: 9, ..promise }).await, Err(Trouble::Corrupt));
        assert_eq!(store.fetch(&route, 1, 7, promise).await, Ok(()));
        assert_eq!(store.load(1, 7).unwrap(), values);
        let late = MemoryGrants::new(MemoryStore::new(), || 90_000);
        let route = Route { access: &late, ..route };
        assert_eq!(store.fetch(&route, 1, 7, promise).await, Ok(()), "it is on disk");
        store.retire(1, 8);
        assert_eq!(store.fetch(&route, 1, 7, promise).await, Err(Trouble::Grant));
    }
}
