//! Checks of uploads, tapes and merges. A merge is a pure function of its tape; whoever completes it writes the same bytes.

use std::path::PathBuf;

use bytes::Bytes;
use fragments::codec::PayloadHeader;
use fragments::keyframe::{self, KeyframeId};
use fragments::merge::{Input as MergeInput, averaged, robust_merge};
use fragments::state::{FragmentState, StateHeader};
use fragments::{outer, t0};
use protocol::documents::{Commitment, Contribution, FragmentManifest, MergeManifest, PPM, Tape, TapeInput};
use protocol::{Digest, FileRecord, Reason};

use super::{Service, persist};
use crate::machine::Slot;

impl Service {
    /// Static checks of an upload; the payload stays on the local disk for the merge.
    pub(super) async fn check_payload(&self, slot: Slot, t: u64, commitment: &Commitment) -> Reason {
        let key = self.run.payload(&slot.0, slot.1, t);
        let Some(bytes) = self.get_present(&key, commitment.length).await else { return Reason::NotUploaded };
        let committed = t0::Committed { length: commitment.length, sha256: commitment.sha256, blake3: commitment.blake3 };
        let header = self.payload_header(commitment.fragment, commitment.base_version);
        let path = self.payload_path(&commitment.blake3);
        let checked = tokio::task::spawn_blocking(move || {
            t0::check_payload(&bytes, &committed, &header)?;
            // A disk that is full costs a second download at the merge, nothing else.
            if let Err(error) = std::fs::write(&path, &bytes) {
                tracing::warn!("{}: {error}", path.display());
            }
            Ok(())
        })
        .await;
        match checked {
            Ok(Ok(())) => Reason::None,
            Ok(Err(reason)) => {
                tracing::warn!(hotkey = %slot.0.short(), slot = slot.1, t, "upload refused: {reason}");
                reason
            }
            Err(_) => Reason::NotEvaluated,
        }
    }

    fn payload_header(&self, fragment: u16, base_version: u64) -> PayloadHeader {
        PayloadHeader::bf16(&self.plan, self.plan_digest, usize::from(fragment), base_version)
    }

    fn payload_path(&self, digest: &Digest) -> PathBuf {
        self.state_dir.join("payloads").join(digest.to_string())
    }

    fn state_path(&self, fragment: u16, version: u64) -> PathBuf {
        self.state_dir.join("states").join(format!("{fragment}-{version}.qfs"))
    }

    fn state_header(&self, fragment: u16, version: u64) -> StateHeader {
        StateHeader { plan: self.plan_digest, fragment: u64::from(fragment), version, elements: self.plan.elements(usize::from(fragment)) }
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

    async fn payload(&self, input: &TapeInput, t: u64) -> Bytes {
        if let Ok(bytes) = tokio::fs::read(self.payload_path(&input.payload)).await
            && Digest::blake3(&bytes) == input.payload
        {
            return Bytes::from(bytes);
        }
        let key = self.run.payload(&input.hotkey, input.slot, t);
        persist(&key, || async {
            let object = self.store.get(&key, input.length).await.map_err(|error| error.to_string())?;
            if Digest::blake3(&object.bytes) == input.payload {
                Ok(object.bytes)
            } else {
                Err("its digest is not the committed one".to_owned())
            }
        })
        .await
    }

    /// Completes an outer step from its tape: state, keyframe, fragment manifest, merge manifest, in this order. Gives the merge
    /// manifest, the id of its envelope, and the keyframe's length.
    pub(super) async fn merge(&self, tape: Tape, rejected: Vec<Contribution>, previous: (Digest, u64)) -> (MergeManifest, Digest, u64) {
        let fragment = tape.fragment;
        let version = tape.base_version + 1;
        let mut manifest = MergeManifest {
            t: tape.t,
            fragment,
            base_version: tape.base_version,
            version: tape.base_version,
            block: tape.block,
            closing: tape.closing,
            contributions: rejected,
            keyframe: previous.0,
            state: tape.base_state,
            step_norm: 0,
        };
        let mut keyframe_length = previous.1;
        if let Some(earlier) = tape.restores {
            let state = self.state(fragment, earlier).await;
            match encode_version(&self.plan, self.plan_digest, &state, &self.state_header(fragment, version), 0) {
                Ok(result) => {
                    manifest.version = version;
                    manifest.keyframe = Digest::blake3(&result.keyframe);
                    manifest.state = Digest::blake3(&result.state);
                    keyframe_length = result.keyframe.len() as u64;
                    self.store_version(&tape, version, result).await;
                }
                Err(error) => tracing::error!(t = tape.t, "version {earlier} cannot be published again: {error}"),
            }
        } else if !tape.inputs.is_empty() {
            let state = self.state(fragment, tape.base_version).await;
            let mut payloads = Vec::with_capacity(tape.inputs.len());
            for input in &tape.inputs {
                payloads.push(self.payload(input, tape.t).await);
            }
            let merged = self.compute(&tape, state, payloads).await;
            manifest.contributions.extend(merged.contributions);
            if let Some(result) = merged.result {
                manifest.version = version;
                manifest.keyframe = Digest::blake3(&result.keyframe);
                manifest.state = Digest::blake3(&result.state);
                manifest.step_norm = result.step_norm;
                keyframe_length = result.keyframe.len() as u64;
                self.store_version(&tape, version, result).await;
            }
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
        for input in &tape.inputs {
            let _ = std::fs::remove_file(self.payload_path(&input.payload));
        }
        (manifest, id, keyframe_length)
    }

    async fn store_version(&self, tape: &Tape, version: u64, result: Version) {
        let fragment = tape.fragment;
        let local = self.state_path(fragment, version);
        let partial = local.with_extension("part");
        if std::fs::write(&partial, &result.state).and_then(|()| std::fs::rename(&partial, &local)).is_err() {
            tracing::warn!("{} cannot be written; the state is in the bucket", local.display());
        }
        let state_digest = Digest::blake3(&result.state);
        let key = self.run.state(fragment, version);
        persist(&key, || self.put_bytes_once(&key, result.state.clone())).await;
        let key = self.run.keyframe(fragment, version);
        let stored = persist(&key, || self.put_bytes_once(&key, result.keyframe.clone())).await;
        if stored != result.keyframe {
            tracing::error!(fragment, version, "the keyframe in the bucket differs from the one that the tape gives");
        }
        let record = FileRecord::of_bytes(key, &result.keyframe);
        let manifest = FragmentManifest { fragment, version, t: tape.t, keyframe: record, state: state_digest };
        self.put_once(&self.run.fragment_manifest(fragment, version), &manifest).await;
        if version >= 2 {
            let _ = std::fs::remove_file(self.state_path(fragment, version - 2));
        }
    }

    /// The arithmetic, on a thread of its own.
    async fn compute(&self, tape: &Tape, state: FragmentState, payloads: Vec<Bytes>) -> Computed {
        let (plan, plan_digest, tape) = (self.plan.clone(), self.plan_digest, tape.clone());
        let parameters = self.manifest.parameters.clone();
        let headers: Vec<PayloadHeader> = tape.inputs.iter().map(|input| self.payload_header(tape.fragment, input.base_version)).collect();
        let header = self.state_header(tape.fragment, tape.base_version + 1);
        let work = move || compute(&plan, plan_digest, &tape, state, &payloads, &headers, &header, &parameters);
        match tokio::task::spawn_blocking(work).await {
            Ok(computed) => computed,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

struct Version {
    state: Bytes,
    keyframe: Bytes,
    step_norm: u64,
}

struct Computed {
    contributions: Vec<Contribution>,
    /// `None` if nothing was accepted.
    result: Option<Version>,
}

#[allow(clippy::too_many_arguments)]
fn compute(
    plan: &protocol::FragmentPlan,
    plan_digest: Digest,
    tape: &Tape,
    mut state: FragmentState,
    payloads: &[Bytes],
    headers: &[PayloadHeader],
    header: &StateHeader,
    parameters: &protocol::documents::RunParameters,
) -> Computed {
    let slices = &plan.fragments[usize::from(tape.fragment)];
    let decoded: Vec<Option<Vec<f32>>> =
        payloads.iter().zip(headers).map(|(bytes, header)| fragments::codec::decode(bytes, header).ok()).collect();
    let inputs: Vec<MergeInput<'_>> = decoded
        .iter()
        .zip(&tape.inputs)
        .filter_map(|(values, input)| Some(MergeInput { values: values.as_deref()?, weight: input.weight_ppm }))
        .collect();
    let merged = if tape.closing { robust_merge(&averaged(slices), &inputs) } else { robust_merge(slices, &inputs) };
    let mut contributions: Vec<Contribution> = tape
        .inputs
        .iter()
        .map(|input| Contribution {
            hotkey: input.hotkey,
            slot: input.slot,
            commitment: input.commitment,
            payload: input.payload,
            base_version: input.base_version,
            steps: input.steps,
            tokens: input.tokens,
            weight_ppm: input.weight_ppm,
            norm: 0,
            clip_ppm: 0,
            cosine_ppm: 0,
            outcome: Reason::HeaderMismatch,
        })
        .collect();
    let merged = match merged {
        Ok(merged) => merged,
        Err(error) => {
            tracing::error!(t = tape.t, "nothing was merged: {error}");
            return Computed { contributions, result: None };
        }
    };
    let readable = contributions.iter_mut().zip(&decoded).filter(|(_, values)| values.is_some());
    for ((contribution, _), report) in readable.zip(&merged.inputs) {
        contribution.norm = report.norm_micro;
        contribution.clip_ppm = report.clip_ppm;
        contribution.cosine_ppm = report.cosine_ppm;
        contribution.outcome = report.outcome;
    }
    if !contributions.iter().any(|contribution| contribution.outcome == Reason::None) {
        return Computed { contributions, result: None };
    }
    let ppm = |value: u32| (f64::from(value) / PPM as f64) as f32;
    let (lr, mu) = if tape.closing { (1.0, 0.0) } else { (ppm(parameters.outer_lr_ppm), ppm(parameters.outer_momentum_ppm)) };
    outer::step(&mut state.theta, &mut state.momentum, &merged.delta, lr, mu);
    match encode_version(plan, plan_digest, &state, header, merged.norm_micro) {
        Ok(version) => Computed { contributions, result: Some(version) },
        Err(error) => {
            tracing::error!(t = tape.t, "the result is not publishable: {error}");
            Computed { contributions, result: None }
        }
    }
}

/// The objects of a version, whose number `header` gives.
fn encode_version(
    plan: &protocol::FragmentPlan,
    plan_digest: Digest,
    state: &FragmentState,
    header: &StateHeader,
    step_norm: u64,
) -> Result<Version, String> {
    let id = KeyframeId { plan: plan_digest, fragment: header.fragment as u32, version: header.version };
    let keyframe = keyframe::write(plan, &id, &state.theta).map_err(|error| error.to_string())?;
    let state = state.to_bytes(header).map_err(|error| error.to_string())?;
    Ok(Version { state: Bytes::from(state), keyframe: Bytes::from(keyframe), step_norm })
}
