//! What follows from a tape: a pure function of it, the state and public form it starts from, and the payloads. Whoever computes it
//! gets the same bytes.

use std::io;

use bytes::Bytes;
use fragments::codec::{CodecError, FileSource, PayloadHeader};
use fragments::delta::{self, DeltaError};
use fragments::keyframe::{self, KeyframeError, KeyframeId};
use fragments::merge::{InputReport, MergeError, Merged, Offer, averaged, merge_payloads};
use fragments::outer;
use fragments::state::{FragmentState, StateError, StateHeader};
use protocol::documents::{Contribution, PPM, RunParameters, Tape};
use protocol::{Digest, FragmentPlan, Reason, Slice};

/// A payload of the tape and the header that it must have.
pub struct Contributed {
    pub header: PayloadHeader,
    pub payload: FileSource,
}

/// What a merge starts from.
pub struct Base {
    pub state: FragmentState,
    /// Θ̂ of the base version, where the next one is published as a frame from it.
    pub replica: Option<Vec<f32>>,
}

/// The files of a new version.
pub struct Version {
    pub state: Bytes,
    pub keyframe: Bytes,
    pub delta: Option<Bytes>,
    pub step_norm: u64,
    pub step_limit_ppm: u32,
}

/// The outcome of an outer step.
#[derive(Default)]
pub struct Completed {
    /// One for each input of the tape.
    pub contributions: Vec<Contribution>,
    /// `None` if nothing was accepted.
    pub version: Option<Version>,
}

/// Why the result of a merge cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum Unpublishable {
    #[error(transparent)]
    Keyframe(#[from] KeyframeError),
    #[error(transparent)]
    Delta(#[from] DeltaError),
    #[error(transparent)]
    State(#[from] StateError),
}

/// A payload could not be read. What follows from the tape does not depend on somebody's disk: it has to be fetched again.
#[derive(Debug, thiserror::Error)]
#[error("the payload of input {input} cannot be read: {error}")]
pub struct Unread {
    pub input: usize,
    error: io::Error,
}

/// Merges, takes the outer step, and writes the new version.
///
/// # Errors
/// A payload could not be read: nothing follows yet.
pub fn complete(
    plan: &FragmentPlan,
    plan_digest: Digest,
    parameters: &RunParameters,
    tape: &Tape,
    base: Base,
    inputs: &[Contributed],
) -> Result<Completed, Unread> {
    let slices = &plan.fragments[usize::from(tape.fragment)];
    let (merged, reports) = if tape.closing { merge(&averaged(slices), tape, inputs)? } else { merge(slices, tape, inputs)? };
    let mut contributions: Vec<Contribution> = tape
        .inputs
        .iter()
        .zip(&reports)
        .map(|(input, report)| Contribution {
            norm: report.norm_micro,
            clip_ppm: report.clip_ppm,
            cosine_ppm: report.cosine_ppm,
            neighbour_ppm: report.neighbour_ppm,
            rest_ppm: report.rest_ppm,
            ..input.contribution(report.outcome)
        })
        .collect();
    let accepted = contributions.iter().any(|contribution| contribution.outcome == Reason::None);
    let version = merged.filter(|_| accepted).and_then(|merged| {
        let version = step(plan, plan_digest, parameters, tape, base, merged);
        version.inspect_err(|error| tracing::error!(t = tape.t, "the result is not publishable: {error}")).ok()
    });
    if version.is_none() {
        // Nothing came of them, and that is nobody's fault who sent one.
        let accepted = contributions.iter_mut().filter(|contribution| contribution.outcome == Reason::None);
        accepted.for_each(|contribution| contribution.outcome = Reason::NotEvaluated);
    }
    Ok(Completed { contributions, version })
}

/// Merges what can be merged. Every payload was checked when it was uploaded and has its digest now, so one that cannot be merged is a
/// fault of ours, and the same one wherever the tape is completed: it is left out, and the others are merged.
fn merge(slices: &[Slice], tape: &Tape, inputs: &[Contributed]) -> Result<(Option<Merged>, Vec<InputReport>), Unread> {
    const LEFT_OUT: InputReport =
        InputReport { outcome: Reason::NotEvaluated, norm_micro: 0, clip_ppm: 0, cosine_ppm: 0, neighbour_ppm: 0, rest_ppm: 0 };
    let mut reports = vec![LEFT_OUT; inputs.len()];
    let mut readable: Vec<usize> = (0..inputs.len()).collect();
    loop {
        let offer = |input: &usize| {
            let Contributed { header, payload } = &inputs[*input];
            Offer { header, payload, weight: tape.inputs[*input].weight_ppm, unit_weights: None }
        };
        let offers: Vec<Offer<'_>> = readable.iter().map(offer).collect();
        match merge_payloads(slices, &offers) {
            Ok(merged) => {
                for (input, report) in readable.iter().zip(&merged.inputs) {
                    reports[*input] = *report;
                }
                return Ok((Some(merged), reports));
            }
            Err(MergeError::Payload { input, source: CodecError::Read(error) }) => return Err(Unread { input: readable[input], error }),
            Err(error @ (MergeError::NotFinite { input } | MergeError::Payload { input, .. })) => {
                tracing::error!(t = tape.t, "a checked payload cannot be merged and is left out: {error}");
                readable.remove(input);
            }
            Err(error) => {
                tracing::error!(t = tape.t, "nothing was merged: {error}");
                return Ok((None, reports));
            }
        }
    }
}

fn step(
    plan: &FragmentPlan,
    plan_digest: Digest,
    parameters: &RunParameters,
    tape: &Tape,
    base: Base,
    mut merged: Merged,
) -> Result<Version, Unpublishable> {
    let ppm = |value: u32| (f64::from(value) / PPM as f64) as f32;
    let Base { mut state, replica } = base;
    let (lr, mu, step_limit_ppm) = if tape.closing {
        (1.0, 0.0, PPM as u32)
    } else {
        let limit = outer::limit(&mut merged.delta, merged.norm_micro, tape.step_mean, tape.base_version);
        (ppm(parameters.outer_lr_ppm), ppm(parameters.outer_momentum_ppm), limit)
    };
    outer::step(&mut state.theta, &mut state.momentum, &merged.delta, lr, mu);
    let version = encode(plan, plan_digest, tape, &Base { state, replica })?;
    Ok(Version { step_norm: merged.norm_micro, step_limit_ppm, ..version })
}

/// The files of the version after the tape's base version, from its state and the public form of the version before. With the state of an
/// earlier version it is a rollback.
pub fn encode(plan: &FragmentPlan, plan_digest: Digest, tape: &Tape, base: &Base) -> Result<Version, Unpublishable> {
    let Base { state, replica } = base;
    let from = KeyframeId { plan: plan_digest, fragment: u32::from(tape.fragment), version: tape.base_version };
    let version = tape.base_version + 1;
    let (keyframe, delta) = match replica {
        Some(replica) => {
            let frame = delta::write(plan, &from, replica, &state.theta)?;
            (frame.keyframe, Some(Bytes::from(frame.bytes)))
        }
        None => (keyframe::write(plan, &KeyframeId { version, ..from }, &state.theta)?, None),
    };
    let elements = state.theta.len() as u64;
    let momentum = !state.momentum.is_empty();
    let header = StateHeader { plan: plan_digest, fragment: u64::from(tape.fragment), version, elements, momentum };
    let state = Bytes::from(state.to_bytes(&header)?);
    Ok(Version { state, keyframe: Bytes::from(keyframe), delta, step_norm: 0, step_limit_ppm: PPM as u32 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fragments::codec;
    use protocol::documents::{AuditParameters, Codec, InnerOptimizer, LrSchedule, TapeInput};
    use protocol::{AccountId, DType, MergeRule};
    use std::path::Path;

    const ELEMENTS: u64 = 3_000;

    fn plan() -> FragmentPlan {
        let slice = |tensor: &str, rule| Slice {
            tensor: tensor.to_owned(),
            row_start: 0,
            row_end: ELEMENTS / 20,
            row_elements: 10,
            unit_rows: ELEMENTS / 20,
            dtype: DType::F32,
            rule,
        };
        FragmentPlan { fragments: vec![vec![slice("matrix", MergeRule::Rda), slice("norms", MergeRule::Mean)]] }
    }

    fn parameters() -> RunParameters {
        RunParameters {
            fragments: 1,
            inner_steps: 1,
            overlap: 0,
            grace_ppm: 0,
            cycles: 0,
            outer_lr_ppm: 700_000,
            outer_momentum_ppm: 500_000,
            step_target_ms: 0,
            poll_ms: 100,
            slots: 1,
            quorum_min: 1,
            pull_deadline_ms: 1,
            learner_ttl_ms: 1,
            sequence_length: 128,
            batch_rows: 1,
            lease_steps: 1,
            codec_up: Codec::Int4,
            codec_down: Codec::Int4,
            release_every_cycles: 0,
            inner: InnerOptimizer {
                lr_nano: 1,
                beta1_ppm: 0,
                beta2_ppm: 0,
                eps_pico: 0,
                weight_decay_ppm: 0,
                clip_norm_ppm: 0,
                schedule: LrSchedule { warmup_steps: 0, total_steps: 0, final_ppm: 0 },
            },
            audit: AuditParameters {
                rate_ppm: 1_000_000,
                loss_rows: 1,
                replay_steps: 1,
                replay_tolerance_ppm: 0,
                beacon_blocks: 1,
                opening_ms: 1,
            },
            training: Default::default(),
        }
    }

    fn values(seed: u64) -> Vec<f32> {
        (0..ELEMENTS).map(|at| ((at * 37 + seed * 1009) % 997) as f32 * 1e-3 - 0.5).collect()
    }

    /// Payloads of three learners on disk, and the tape that takes them.
    fn offers(folder: &Path, codec: Codec, version: u64) -> (Tape, Vec<Contributed>) {
        let (plan, mut inputs, mut contributed) = (plan(), Vec::new(), Vec::new());
        for learner in 0..3u8 {
            let header = PayloadHeader::new(codec, &plan, plan.digest(), 0, version);
            let change: Vec<f32> = values(u64::from(learner)).iter().map(|value| 0.01 * value).collect();
            let payload = codec::encode(&header, &change).unwrap();
            let path = folder.join(format!("{version}-{learner}"));
            std::fs::write(&path, &payload).unwrap();
            inputs.push(TapeInput {
                hotkey: AccountId([learner; 32]),
                slot: 0,
                commitment: Digest::ZERO,
                payload: Digest::blake3(&payload),
                length: payload.len() as u64,
                base_version: version,
                steps: 3,
                tokens: 100,
                weight_ppm: 333_333,
            });
            contributed.push(Contributed { header, payload: FileSource::open(&path).unwrap() });
        }
        let tape = Tape {
            t: 9,
            fragment: 0,
            epoch: 0,
            base_version: version,
            base_state: Digest::ZERO,
            block: 0,
            closing: false,
            restores: None,
            step_mean: 0,
            inputs,
        };
        (tape, contributed)
    }

    fn id(version: u64) -> KeyframeId {
        KeyframeId { plan: plan().digest(), fragment: 0, version }
    }

    #[test]
    fn a_tape_gives_the_same_files_whoever_completes_it_and_frames_lead_to_its_keyframes() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan();
        let mut state = FragmentState::new(values(77), true);
        let first = keyframe::write(&plan, &id(0), &state.theta).unwrap();
        let mut replica = keyframe::read(&plan, &id(0), &first).unwrap();
        let mut learner = replica.clone();
        for version in 0..3 {
            let (tape, inputs) = offers(folder.path(), Codec::Int4, version);
            let base = || Base { state: state.clone(), replica: Some(replica.clone()) };
            let complete = || complete(&plan, plan.digest(), &parameters(), &tape, base(), &inputs).unwrap();
            let (one, other) = (complete(), complete());
            assert_eq!(one.contributions, other.contributions);
            assert!(one.contributions.iter().all(|contribution| contribution.outcome == Reason::None && contribution.norm > 0));
            let (one, other) = (one.version.unwrap(), other.version.unwrap());
            assert_eq!((&one.state, &one.keyframe, &one.delta), (&other.state, &other.keyframe, &other.delta));
            let result = Digest::blake3(&one.keyframe);
            learner = keyframe::read(
                &plan,
                &id(version + 1),
                &delta::follow(&plan, &id(version), learner, &[one.delta.unwrap()], &result).unwrap(),
            )
            .unwrap();
            replica = keyframe::read(&plan, &id(version + 1), &one.keyframe).unwrap();
            assert_eq!(learner, replica);
            let header = StateHeader { plan: plan.digest(), fragment: 0, version: version + 1, elements: ELEMENTS, momentum: true };
            state = FragmentState::from_bytes(&one.state, &header).unwrap();
        }
        let close = state.theta.iter().zip(&replica).all(|(theta, replica)| (theta - replica).abs() < 0.01);
        assert!(close, "the public form follows the state");
    }

    #[test]
    fn a_bf16_downlink_has_keyframes_alone_and_closing_merges_are_averages() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan();
        let state = FragmentState { theta: values(5), momentum: values(6) };
        let (mut tape, inputs) = offers(folder.path(), Codec::Bf16, 4);
        tape.closing = true;
        let base = Base { state: state.clone(), replica: None };
        let completed = complete(&plan, plan.digest(), &parameters(), &tape, base, &inputs).unwrap();
        let version = completed.version.unwrap();
        assert!(version.delta.is_none());
        let values = keyframe::read(&plan, &id(5), &version.keyframe).unwrap();
        let decoded: Vec<Vec<f32>> = (0..3)
            .map(|learner| {
                codec::decode(&std::fs::read(folder.path().join(format!("4-{learner}"))).unwrap(), &inputs[learner].header).unwrap()
            })
            .collect();
        for (at, value) in values.iter().enumerate() {
            let mean = decoded.iter().map(|values| values[at]).sum::<f32>() / 3.0;
            assert!((value - (state.theta[at] - mean)).abs() < 4e-3, "element {at}");
        }
    }

    #[test]
    fn a_payload_that_went_bad_on_disk_is_left_out_and_the_others_are_merged() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan();
        let (tape, mut inputs) = offers(folder.path(), Codec::Int4, 0);
        let path = folder.path().join("0-1");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[codec::HEADER_BYTES..codec::HEADER_BYTES + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        inputs[1].payload = FileSource::open(&path).unwrap();
        let complete = |inputs: &[Contributed]| {
            let base = Base { state: FragmentState::new(values(1), true), replica: Some(vec![0.0; ELEMENTS as usize]) };
            complete(&plan, plan.digest(), &parameters(), &tape, base, inputs)
        };
        let completed = complete(&inputs).unwrap();
        let outcomes: Vec<Reason> = completed.contributions.iter().map(|contribution| contribution.outcome).collect();
        assert_eq!(outcomes, [Reason::None, Reason::NotEvaluated, Reason::None]);
        assert!(completed.version.is_some());
        // One that is cut off under the reader is no answer at all.
        std::fs::OpenOptions::new().write(true).open(folder.path().join("0-2")).unwrap().set_len(40).unwrap();
        assert_eq!(complete(&inputs).err().unwrap().input, 2);
    }

    #[test]
    fn a_result_that_cannot_be_published_leaves_the_version_and_blames_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan();
        let (tape, inputs) = offers(folder.path(), Codec::Bf16, 0);
        let state = FragmentState { theta: vec![-f32::MAX; ELEMENTS as usize], momentum: vec![f32::MAX; ELEMENTS as usize] };
        let completed = complete(&plan, plan.digest(), &parameters(), &tape, Base { state, replica: None }, &inputs).unwrap();
        assert!(completed.version.is_none());
        assert!(completed.contributions.iter().all(|contribution| contribution.outcome == Reason::NotEvaluated));
    }
}
