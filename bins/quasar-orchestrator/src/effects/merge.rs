//! Tapes and merges: the edge around [`super::arithmetic`]. Everything is written in the order of the protocol, so that whoever finds
//! a tape can complete its step.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use daemon::files;
use fragments::delta;
use fragments::keyframe::{self, KeyframeId};
use fragments::state::{FragmentState, StateHeader};
use protocol::documents::{Codec, Contribution, FragmentManifest, MergeManifest, Tape};
use protocol::schedule::keyframe_version;
use protocol::{Digest, FileRecord};
use storage::StoreError;

use super::arithmetic::{Base, Completed, Contributed, Version, complete, encode};
use super::{Service, persist};

/// How the names of states and of what learners have of a version end.
const STATE: &str = ".qfs";
const REPLICA: &str = ".safetensors";

/// What to do about a result that is not what its tape gives.
const OTHER_RESULT: &str =
    "if no merge manifest names it, an orchestrator of another version may have left it: remove it and start again; else restore it";

impl Service {
    fn states(&self) -> PathBuf {
        self.state_dir.join("states")
    }

    pub(super) fn state_path(&self, fragment: u16, version: u64) -> PathBuf {
        self.states().join(format!("{fragment}-{version}{STATE}"))
    }

    fn replica_path(&self, fragment: u16, version: u64) -> PathBuf {
        self.states().join(format!("{fragment}-{version}{REPLICA}"))
    }

    pub(super) fn state_header(&self, fragment: u16, version: u64) -> StateHeader {
        StateHeader {
            plan: self.plan_digest,
            fragment: u64::from(fragment),
            version,
            elements: self.plan.elements(usize::from(fragment)),
            momentum: self.manifest.parameters.outer_momentum_ppm > 0,
        }
    }

    fn keyframe_id(&self, fragment: u16, version: u64) -> KeyframeId {
        KeyframeId { plan: self.plan_digest, fragment: u32::from(fragment), version }
    }

    /// The f32 state of a version: from the local disk, else from the bucket.
    pub(super) async fn state(&self, fragment: u16, version: u64) -> FragmentState {
        let header = self.state_header(fragment, version);
        if let Ok(bytes) = tokio::fs::read(self.state_path(fragment, version)).await
            && let Ok(state) = FragmentState::from_bytes(&bytes, &header)
        {
            return state;
        }
        let key = self.run.state(fragment, version);
        persist(&key, || async {
            let object = self.store.get(&key, header.state_bytes()).await.map_err(|error| error.to_string())?;
            FragmentState::from_bytes(&object.bytes, &header).map_err(|error| error.to_string())
        })
        .await
    }

    /// Θ̂ of a version where fragments travel as frames: from the local disk, else from the newest keyframe in the bucket and the frames
    /// since. `digest` is that of the version's keyframe.
    async fn replica(&self, fragment: u16, version: u64, digest: &Digest) -> Vec<f32> {
        let id = self.keyframe_id(fragment, version);
        if let Ok(bytes) = tokio::fs::read(self.replica_path(fragment, version)).await
            && Digest::blake3(&bytes) == *digest
            && let Ok(values) = keyframe::read(&self.plan, &id, &bytes)
        {
            return values;
        }
        let what = format!("fragment {fragment}, version {version}");
        persist(&what, || async {
            let start = self.keyframe_id(fragment, keyframe_version(self.manifest.parameters.codec_down, version));
            let limit = keyframe::keyframe_bytes(&self.plan, &start).map_err(|error| error.to_string())?;
            let get = |key: String, limit: u64| async move { self.store.get(&key, limit).await.map_err(|error| error.to_string()) };
            let first = get(self.run.keyframe(fragment, start.version), limit).await?.bytes;
            let first = keyframe::read(&self.plan, &start, &first).map_err(|error| error.to_string())?;
            let mut frames = Vec::new();
            for version in start.version + 1..=version {
                frames.push(get(self.run.delta(fragment, version), delta::delta_bytes(&self.plan, usize::from(fragment))).await?.bytes);
            }
            let keyframe = delta::follow(&self.plan, &start, first, &frames, digest).map_err(|error| error.to_string())?;
            keyframe::read(&self.plan, &id, &keyframe).map_err(|error| error.to_string())
        })
        .await
    }

    /// Writes the tape once; if one is there already, that one stands.
    pub(super) async fn write_tape(&self, tape: &Tape) -> Tape {
        let bytes = self.put_once(&self.run.tape(tape.t), tape).await;
        match self.open_own::<Tape>(&bytes) {
            Ok(stored) => stored.document,
            Err(error) => {
                tracing::error!(t = tape.t, "the tape in the bucket is not ours: {error}");
                tape.clone()
            }
        }
    }

    /// Completes an outer step from its tape: state, frame and keyframe, fragment manifest, merge manifest, in this order. Gives the
    /// merge manifest, the id of its envelope, and the keyframe's length. `previous` is the keyframe of the base version.
    pub(super) async fn merge(&self, tape: Tape, rejected: Vec<Contribution>, previous: (Digest, u64)) -> (MergeManifest, Digest, u64) {
        let fragment = tape.fragment;
        let version = tape.base_version + 1;
        let mut manifest = MergeManifest::unmoved(&tape, previous.0, rejected);
        let mut keyframe_length = previous.1;
        let completed = match tape.restores {
            Some(earlier) => self.restore(&tape, earlier, &previous.0).await,
            None if tape.inputs.is_empty() => Completed::default(),
            None => self.complete(&tape, &previous.0).await,
        };
        manifest.contributions.extend(completed.contributions);
        if let Some(result) = completed.version {
            manifest.version = version;
            manifest.keyframe = Digest::blake3(&result.keyframe);
            manifest.state = Digest::blake3(&result.state);
            (manifest.step_norm, manifest.step_limit_ppm) = (result.step_norm, result.step_limit_ppm);
            keyframe_length = result.keyframe.len() as u64;
            self.store_version(&tape, version, result).await;
        }
        if manifest.version == manifest.base_version {
            manifest.restores = None;
        }
        manifest.contributions.sort_by_key(|contribution| (contribution.hotkey, contribution.slot));
        let bytes = self.put_once(&self.run.merge(tape.t), &manifest).await;
        let mut id = Digest::blake3(&bytes);
        // A manifest that an earlier process wrote stands, with the refusals that it knew.
        if let Ok(stored) = self.open_own::<MergeManifest>(&bytes) {
            (manifest, id) = (stored.document, stored.id);
        }
        let accepted = manifest.accepted().count();
        tracing::info!(
            t = tape.t,
            fragment,
            version = manifest.version,
            contributors = accepted,
            offers = manifest.contributions.len(),
            "merged"
        );
        self.drop_payloads(tape.t);
        (manifest, id, keyframe_length)
    }

    async fn store_version(&self, tape: &Tape, version: u64, result: Version) {
        let fragment = tape.fragment;
        keep(&self.state_path(fragment, version), &result.state);
        let state_digest = Digest::blake3(&result.state);
        self.put_result(&self.run.state(fragment, version), result.state).await;
        let mut delta = None;
        if let Some(bytes) = result.delta {
            keep(&self.replica_path(fragment, version), &result.keyframe);
            let key = self.run.delta(fragment, version);
            delta = Some(FileRecord::of_bytes(key.clone(), &bytes));
            self.put_result(&key, bytes).await;
        }
        let key = self.run.keyframe(fragment, version);
        let keyframe = FileRecord::of_bytes(key.clone(), &result.keyframe);
        if keyframe_version(self.manifest.parameters.codec_down, version) == version {
            self.put_result(&key, result.keyframe).await;
        }
        let manifest = FragmentManifest { fragment, version, t: tape.t, keyframe, delta, state: state_digest };
        let key = self.run.fragment_manifest(fragment, version);
        let bytes = self.put_once(&key, &manifest).await;
        if !self.open_own::<FragmentManifest>(&bytes).is_ok_and(|stored| stored.document == manifest) {
            self.contradicted(&key, OTHER_RESULT).await
        }
        files::remove_versions(&self.states(), &[STATE, REPLICA], fragment, version.saturating_sub(1));
    }

    /// Writes what a tape gives. Everybody who completes it writes the same: where something else lies, nothing may be published that names
    /// these bytes.
    async fn put_result(&self, key: &str, bytes: Bytes) {
        let is_there = persist(key, || async {
            match self.put_bytes_once(key, bytes.clone()).await {
                Ok(stored) => Ok(stored == bytes),
                Err(StoreError::TooLarge { .. }) => Ok(false),
                Err(error) => Err(error),
            }
        })
        .await;
        if !is_there {
            self.contradicted(key, OTHER_RESULT).await
        }
    }

    /// What the next version follows: the f32 state of `version`, and the public form of the tape's base version where that is needed,
    /// whose keyframe has this digest.
    async fn base(&self, tape: &Tape, version: u64, keyframe: &Digest) -> Base {
        let replica = match self.manifest.parameters.codec_down {
            Codec::Bf16 => None,
            Codec::Int4 | Codec::TopK => Some(self.replica(tape.fragment, tape.base_version, keyframe).await),
        };
        Base { state: self.state(tape.fragment, version).await, replica }
    }

    /// An earlier version once more, as the next one.
    async fn restore(&self, tape: &Tape, earlier: u64, keyframe: &Digest) -> Completed {
        // Nobody waits for ever for what retention has deleted: the version before stands then.
        let key = self.run.state(tape.fragment, earlier);
        let is_kept = persist(&key, || async {
            match self.store.head(&key).await {
                Ok(_) => Ok(true),
                Err(StoreError::NotFound { .. }) => Ok(false),
                Err(error) => Err(error),
            }
        });
        if !is_kept.await {
            tracing::error!(t = tape.t, "version {earlier} is not kept any more: fragment {} stays as it is", tape.fragment);
            return Completed::default();
        }
        let base = self.base(tape, earlier, keyframe).await;
        let version = encode(&self.plan, self.plan_digest, tape, &base);
        let refuse = |error: &_| tracing::error!(t = tape.t, "version {earlier} cannot be published again: {error}");
        Completed { contributions: Vec::new(), version: version.inspect_err(refuse).ok() }
    }

    /// The arithmetic, on a thread of its own.
    async fn complete(&self, tape: &Tape, keyframe: &Digest) -> Completed {
        persist("the merge", || async {
            let base = self.base(tape, tape.base_version, keyframe).await;
            let mut inputs = Vec::with_capacity(tape.inputs.len());
            for input in &tape.inputs {
                let header = self.payload_header(tape.fragment, input.base_version);
                inputs.push(Contributed { header, payload: self.payload(input, tape.t).await });
            }
            let (plan, plan_digest, parameters) = (self.plan.clone(), self.plan_digest, self.manifest.parameters.clone());
            let of_step = tape.clone();
            let work = move || complete(&plan, plan_digest, &parameters, &of_step, base, &inputs);
            match tokio::task::spawn_blocking(work).await {
                Ok(completed) => completed.inspect_err(|unread| self.drop_payload(&tape.inputs[unread.input], tape.t)),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        })
        .await
    }
}

/// Keeps a file for the next merge. It is in the bucket too, so a full disk costs a download, nothing else.
fn keep(path: &Path, bytes: &[u8]) {
    if let Err(error) = files::write_whole(path, &[bytes]) {
        tracing::warn!("{} cannot be written; it is in the bucket: {error}", path.display());
    }
}
