//! Published fragment versions on disk: fetched as they appear, because grants for old ones run out, and kept for the audits of
//! the last cycles. They come as keyframes, or as frames from the version before; on disk each is a keyframe.
//!
//! A validator that joins a run wants many at once, and each is large. So they wait in a queue of their own, where they are in nobody's
//! way, and are made a few at a time.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use daemon::files;
use fragments::delta;
use fragments::keyframe::{self, KeyframeId};
use protocol::Digest;
use protocol::documents::Codec;
use protocol::schedule::keyframe_version;
use storage::discovery::RunFacts;
use tokio::sync::{Notify, Semaphore};
use tokio::task::{Id, JoinHandle, JoinSet};

use super::base::BaseTree;
use super::grants::Grants;
use super::trouble::Trouble;
use crate::machine::cycles::KeyframeRef;

/// Keyframes that are made at the same time: each is in memory as numbers and as a file, beside the frames that lead to it.
const MADE_AT_ONCE: usize = 2;
/// Demands that wait, which is more than the versions that are kept of all fragments. Of more the oldest are forgotten: an audit that needs
/// one fetches it for itself.
const DEMANDS_MAX: usize = 4_096;
const SUFFIX: &str = ".safetensors";

/// Keyframes of one run.
pub struct Keyframes {
    facts: Arc<RunFacts>,
    grants: Arc<Grants>,
    base: Arc<BaseTree>,
    folder: PathBuf,
    demands: Mutex<Demands>,
    demanded: Notify,
    /// Of each fragment one version is made at a time, also where an audit asks for one: the next one then goes on from it.
    turns: Vec<tokio::sync::Mutex<()>>,
    room: Semaphore,
}

/// A version to fetch, and the oldest one of its fragment that is still needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Demand {
    keyframe: KeyframeRef,
    from: u64,
}

/// What merge manifests stated of versions that are still needed.
#[derive(Default)]
struct Demands {
    /// Digests.
    known: HashMap<(u16, u64), Digest>,
    /// Not begun yet, the newest last.
    waiting: VecDeque<Demand>,
}

impl Demands {
    fn add(&mut self, demand: Demand, is_wanted: bool) {
        let Demand { keyframe: KeyframeRef { fragment, version, digest }, from } = demand;
        self.known.retain(|(of, version), _| *of != fragment || *version >= from);
        self.known.insert((fragment, version), digest);
        self.waiting.retain(|waiting| waiting.keyframe.fragment != fragment || waiting.keyframe.version >= from);
        if !is_wanted {
            return;
        }
        if self.waiting.len() >= DEMANDS_MAX {
            self.waiting.pop_front();
        }
        self.waiting.push_back(demand);
    }

    /// The first demand that waits for a fragment which is not busy.
    fn next(&mut self, is_busy: impl Fn(u16) -> bool) -> Option<Demand> {
        let at = self.waiting.iter().position(|waiting| !is_busy(waiting.keyframe.fragment))?;
        self.waiting.remove(at)
    }
}

/// Works off what is demanded of [`Keyframes`]; ends when this is dropped.
pub struct Keeper(JoinHandle<()>);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Keyframes {
    pub fn new(facts: Arc<RunFacts>, grants: Arc<Grants>, base: Arc<BaseTree>, folder: PathBuf) -> Self {
        let turns = facts.plan.fragments.iter().map(|_| tokio::sync::Mutex::default()).collect();
        let room = Semaphore::new(MADE_AT_ONCE);
        Self { facts, grants, base, folder, demands: Mutex::default(), demanded: Notify::new(), turns, room }
    }

    fn demands(&self) -> MutexGuard<'_, Demands> {
        self.demands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, fragment: u16, version: u64) -> PathBuf {
        self.folder.join(format!("{fragment}-{version}{SUFFIX}"))
    }

    fn id(&self, fragment: u16, version: u64) -> KeyframeId {
        KeyframeId { plan: self.facts.manifest.plan, fragment: u32::from(fragment), version }
    }

    /// Remembers a version that a merge manifest stated, to be fetched by the [`Keeper`] if it `is_wanted`. Of its fragment, versions below
    /// `from` are not needed any more.
    pub fn demand(&self, keyframe: KeyframeRef, from: u64, is_wanted: bool) {
        self.demands().add(Demand { keyframe, from }, is_wanted);
        self.demanded.notify_one();
    }

    fn next_demand(&self, is_busy: impl Fn(u16) -> bool) -> Option<Demand> {
        self.demands().next(is_busy)
    }

    /// Begins to work off demands; must be called inside a runtime.
    pub fn keeper(self: &Arc<Self>) -> Keeper {
        let keyframes = self.clone();
        Keeper(tokio::spawn(async move {
            // What is being made ends with the set that holds it.
            let (mut making, mut fragments) = (JoinSet::<()>::new(), HashMap::<Id, u16>::new());
            loop {
                while making.len() < MADE_AT_ONCE
                    && let Some(demand) = keyframes.next_demand(|fragment| fragments.values().any(|busy| *busy == fragment))
                {
                    let keyframes = keyframes.clone();
                    let task = making.spawn(async move { keyframes.keep(demand).await });
                    fragments.insert(task.id(), demand.keyframe.fragment);
                }
                tokio::select! {
                    Some(ended) = making.join_next_with_id() => {
                        let task = match ended {
                            Ok((task, ())) => task,
                            Err(error) => {
                                tracing::error!(%error, "a keyframe was given up: this is a bug of the validator");
                                error.id()
                            }
                        };
                        fragments.remove(&task);
                    }
                    () = keyframes.demanded.notified() => {}
                }
            }
        }))
    }

    /// Lets go of versions that no audit needs any more, which makes room, and fetches the one that is demanded.
    async fn keep(&self, demand: Demand) {
        let Demand { keyframe: KeyframeRef { fragment, version, .. }, from } = demand;
        let folder = self.folder.clone();
        let _ = tokio::task::spawn_blocking(move || files::remove_versions(&folder, &[SUFFIX], fragment, from)).await;
        match self.bytes(demand.keyframe).await {
            Ok(_) => {}
            Err(trouble) if trouble.is_of_disk() => {
                tracing::warn!(fragment, version, error = trouble.line(), "a keyframe cannot be kept, and audits may lack it later");
            }
            Err(trouble) => tracing::debug!(fragment, version, error = trouble.line(), "a keyframe is fetched later"),
        }
    }

    /// Values of a fragment version, in slice order.
    pub async fn values(&self, fragment: u16, version: u64) -> Result<Vec<f32>, Trouble> {
        if version == 0 {
            return self.base.fragment(fragment).await;
        }
        let digest = self.demands().known.get(&(fragment, version)).copied();
        let digest = digest.ok_or(Trouble::UnknownKeyframe { fragment, version })?;
        let bytes = self.bytes(KeyframeRef { fragment, version, digest }).await?;
        self.read(fragment, version, &bytes)
    }

    /// The file of a version: from disk if it is there undamaged, else through its grants.
    async fn bytes(&self, one: KeyframeRef) -> Result<Vec<u8>, Trouble> {
        if let Some(bytes) = self.on_disk(&one) {
            return Ok(bytes);
        }
        let turn = self.turns.get(usize::from(one.fragment));
        let no_fragment = || Trouble::malformed(self.facts.run.keyframe(one.fragment, one.version), "no such fragment in the plan");
        let _turn = turn.ok_or_else(no_fragment)?.lock().await;
        // Whoever had the turn before may have made it.
        if let Some(bytes) = self.on_disk(&one) {
            return Ok(bytes);
        }
        let _room = self.room.acquire().await;
        let near = self.near(one.fragment, one.version);
        let keyframe = keyframe_version(self.facts.manifest.parameters.codec_down, one.version);
        let bytes = match near {
            None if keyframe == one.version => self.fetch_keyframe(one.fragment, keyframe, Some(one.digest)).await?,
            _ => self.follow(near.unwrap_or(keyframe), one).await?,
        };
        let path = self.path(one.fragment, one.version);
        files::write_whole(&path, &[&bytes]).map_err(Trouble::io(&path))?;
        Ok(bytes)
    }

    fn on_disk(&self, one: &KeyframeRef) -> Option<Vec<u8>> {
        fs::read(self.path(one.fragment, one.version)).ok().filter(|bytes| Digest::blake3(bytes) == one.digest)
    }

    /// The newest version that is here undamaged and from which frames lead to `version`.
    fn near(&self, fragment: u16, version: u64) -> Option<u64> {
        let down = self.facts.manifest.parameters.codec_down;
        let before = version.checked_sub(1).filter(|_| down != Codec::Bf16)?;
        let is_here = |version: &u64| {
            let digest = self.demands().known.get(&(fragment, *version)).copied();
            digest.is_some_and(|digest| self.on_disk(&KeyframeRef { fragment, version: *version, digest }).is_some())
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

/// Removes the folders of other runs, and what an earlier process left half written. To be called before anything is kept.
pub fn tidy(runs: &Path, current: &Path) {
    for entry in fs::read_dir(runs).into_iter().flatten().flatten() {
        if entry.path() != current {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    if let Err(error) = files::remove_leftovers(current) {
        tracing::warn!("{} cannot be tidied: {error}", current.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(fragment: u16, version: u64, from: u64) -> Demand {
        Demand { keyframe: KeyframeRef { fragment, version, digest: Digest::blake3(&version.to_le_bytes()) }, from }
    }

    #[test]
    fn a_demand_for_a_version_that_is_not_needed_any_more_is_dropped_and_the_newest_comes_last() {
        let mut demands = Demands::default();
        for (fragment, version) in [(0, 1), (1, 1), (0, 2), (1, 2)] {
            demands.add(demand(fragment, version, 0), true);
        }
        demands.add(demand(0, 9, 2), true);
        let waiting: Vec<_> = demands.waiting.iter().map(|one| (one.keyframe.fragment, one.keyframe.version)).collect();
        assert_eq!(waiting, [(1, 1), (0, 2), (1, 2), (0, 9)]);
        assert!(!demands.known.contains_key(&(0, 1)) && demands.known.contains_key(&(1, 1)));
    }

    #[test]
    fn demands_for_a_fragment_that_is_busy_let_others_pass() {
        let mut demands = Demands::default();
        for (fragment, version) in [(0, 1), (0, 2), (1, 1)] {
            demands.add(demand(fragment, version, 0), true);
        }
        assert_eq!(demands.next(|fragment| fragment == 0), Some(demand(1, 1, 0)));
        assert_eq!(demands.next(|fragment| fragment == 0), None);
        assert_eq!([demands.next(|_| false), demands.next(|_| false)], [Some(demand(0, 1, 0)), Some(demand(0, 2, 0))]);
    }

    #[test]
    fn demands_that_nobody_works_off_do_not_pile_up() {
        let mut demands = Demands::default();
        for version in 0..DEMANDS_MAX as u64 + 5 {
            demands.add(demand(0, version, 0), true);
        }
        assert_eq!((demands.waiting.len(), demands.waiting.front().copied()), (DEMANDS_MAX, Some(demand(0, 5, 0))));
    }
}
