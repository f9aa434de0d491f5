//! The run roots: a chain from the owner that the user named to the key that signs the run now.
//!
//! Version 1 is signed by that owner, version N signs version N + 1. Whoever knows a chain looks for its next version only, which is
//! mostly absent, and never leaves it: what was read is not read again, and the digest of the newest root outlives a restart. So
//! neither a key that lost its power nor an earlier owner's leads anybody back, whatever he writes to the bucket.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use protocol::documents::{CurrentRun, RunRoot};
use protocol::envelope::{Context, Document, Expect, RunId, Seen, Verified, open_stored};
use protocol::paths::Keys;
use protocol::{AccountId, Digest, KeyRef};

use crate::client::{PublicRead, PublicReader};
use crate::discovery::DiscoveryError;
use crate::{ObjectStore, StoreError};

/// Most root versions that anybody walks.
const ROOT_VERSIONS_MAX: u32 = 1_000;

/// All roots up to the newest one.
#[derive(Clone, Debug)]
pub struct RootChain {
    pub newest: RunRoot,
    /// BLAKE3 of the files of all versions, from version 1.
    pub digests: Vec<Digest>,
    /// Every key that a root named for the orchestrator, the present one first: write-once documents may be older than a rotation.
    pub orchestrators: Vec<KeyRef>,
}

impl RootChain {
    /// Of the file of this version, if there is one.
    pub fn digest(&self, version: u32) -> Option<Digest> {
        self.digests.get(version.checked_sub(1)? as usize).copied()
    }

    /// Of the newest root's file.
    pub fn newest_digest(&self) -> Digest {
        self.digests.last().copied().unwrap_or(Digest::ZERO)
    }

    /// `before` and the version after it, whose file lies at `key`.
    fn extended(before: Option<&Self>, owner: &AccountId, outside: &Context, key: String, file: &[u8]) -> Result<Self, DiscoveryError> {
        let expect = before.map_or(Expect::Account(owner), |before| Expect::Key(&before.newest.owner));
        let newest = match open_stored::<RunRoot>(file, outside, expect) {
            Ok(root) => root.document,
            Err(error) => return Err(DiscoveryError::Envelope { key, error }),
        };
        let (mut digests, mut orchestrators) =
            before.map_or_else(Default::default, |before| (before.digests.clone(), before.orchestrators.clone()));
        if newest.version as usize != digests.len() + 1 || newest.previous != digests.last().copied().unwrap_or(Digest::ZERO) {
            return Err(DiscoveryError::DigestMismatch { key });
        }
        digests.push(Digest::blake3(file));
        orchestrators.retain(|key| *key != newest.orchestrator);
        orchestrators.insert(0, newest.orchestrator);
        Ok(Self { newest, digests, orchestrators })
    }
}

/// Where roots lie.
pub trait RootSource {
    /// The object at `key`; `None` if there is none.
    fn root(&self, key: &str) -> impl Future<Output = Result<Option<Bytes>, StoreError>> + Send;
}

impl RootSource for PublicReader {
    async fn root(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        Ok(match self.get(key, None, RunRoot::PURPOSE.file_limit()).await? {
            PublicRead::Found(object) => Some(object.bytes),
            PublicRead::Absent | PublicRead::Unchanged => None,
        })
    }
}

impl RootSource for dyn ObjectStore + '_ {
    async fn root(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        match self.get(key, RunRoot::PURPOSE.file_limit()).await {
            Ok(object) => Ok(Some(object.bytes)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The roots of one owner as far as this process knows them. Clones know the same.
#[derive(Clone)]
pub struct Roots(Arc<Known>);

/// Keeps what was seen over a restart.
type Keep = dyn Fn(&Seen) -> Result<(), String> + Send + Sync;

struct Known {
    owner: AccountId,
    outside: Context,
    keep: Box<Keep>,
    state: RwLock<State>,
    /// One looks at a time, so that nobody goes back.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct State {
    chain: Option<Arc<RootChain>>,
    seen: Seen,
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Roots").field(&self.0.owner).finish_non_exhaustive()
    }
}

impl Roots {
    /// Of the `owner` that the user named, with what was `seen` before. `keep` is told of each newer root before anything that it says
    /// counts.
    pub fn new(
        genesis: [u8; 32],
        netuid: u16,
        owner: AccountId,
        seen: Seen,
        keep: impl Fn(&Seen) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        let outside = Context { genesis, netuid, run: RunId::NONE };
        let state = RwLock::new(State { chain: None, seen });
        Self(Arc::new(Known { owner, outside, keep: Box::new(keep), state, turn: tokio::sync::Mutex::default() }))
    }

    /// For a look that is not remembered.
    pub fn unremembered(genesis: [u8; 32], netuid: u16, owner: AccountId) -> Self {
        Self::new(genesis, netuid, owner, Seen::default(), |_| Ok(()))
    }

    /// Network and subnet.
    pub fn outside(&self) -> &Context {
        &self.0.outside
    }

    fn state(&self) -> State {
        self.0.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what is known, once that is kept.
    fn change(&self, change: impl FnOnce(&mut State) -> Result<(), DiscoveryError>) -> Result<(), DiscoveryError> {
        let mut known = self.0.state.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = known.clone();
        change(&mut state)?;
        if state.seen != known.seen {
            (self.0.keep)(&state.seen).map_err(DiscoveryError::Memory)?;
        }
        *known = state;
        Ok(())
    }

    /// What was seen so far.
    pub fn seen(&self) -> Seen {
        self.state().seen
    }

    /// The roots as they were read last.
    ///
    /// # Errors
    /// None was read yet.
    pub fn known(&self) -> Result<Arc<RootChain>, DiscoveryError> {
        self.state().chain.ok_or(DiscoveryError::NoRun)
    }

    /// Looks for versions beyond those that are known.
    ///
    /// # Errors
    /// There is no root; or one that does not follow from what was seen, and then nothing changes.
    pub async fn follow(&self, source: &(impl RootSource + ?Sized)) -> Result<Arc<RootChain>, DiscoveryError> {
        let _turn = self.0.turn.lock().await;
        let State { chain: before, seen } = self.state();
        let Known { owner, outside, .. } = &*self.0;
        let keys = Keys::new(outside.netuid);
        let mut chain = before.clone();
        let version = |chain: &Option<Arc<RootChain>>| chain.as_ref().map_or(0, |chain| chain.newest.version);
        while version(&chain) < ROOT_VERSIONS_MAX {
            let key = keys.root(version(&chain) + 1);
            let Some(file) = source.root(&key).await? else { break };
            chain = Some(Arc::new(RootChain::extended(chain.as_deref(), owner, outside, key, &file)?));
        }
        if version(&chain) < seen.root {
            return Err(DiscoveryError::RootHidden { found: version(&chain), seen: seen.root });
        }
        let Some(chain) = chain else { return Err(DiscoveryError::NoRun) };
        if seen.root_digest.is_some_and(|digest| chain.digest(seen.root) != Some(digest)) {
            return Err(DiscoveryError::RootReplaced { version: seen.root });
        }
        if before.is_none_or(|before| before.newest.version < chain.newest.version) {
            self.change(|state| {
                (state.seen.root, state.seen.root_digest) = (chain.newest.version, Some(chain.newest_digest()));
                state.chain = Some(chain.clone());
                Ok(())
            })?;
        }
        Ok(chain)
    }

    /// Takes a pointer to the current run, read from `key` as `file`, as the newest one that was seen.
    ///
    /// # Errors
    /// A newer one was seen, or another one with the same sequence: then with the proof.
    pub(crate) fn accept(&self, key: &str, current: &Verified<CurrentRun>, file: &Bytes) -> Result<(), DiscoveryError> {
        self.change(|State { seen, .. }| {
            let accepted = seen.guard.accept(key, &current.header, &current.id);
            let last = Some(&*seen.current).filter(|last| !last.is_empty());
            accepted.map_err(|error| DiscoveryError::refused(key, error, last, file))?;
            seen.current = file.to_vec();
            Ok(())
        })
    }
}
