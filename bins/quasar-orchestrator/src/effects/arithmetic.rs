//! What follows from a tape: a pure function of it, the state and public form it starts from, and the payloads. Whoever computes it
//! gets the same bytes.

use bytes::Bytes;
use fragments::codec::{FileSource, PayloadHeader};
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
pub struct Completed {
    /// One for each input of the tape.
    pub contributions: Vec<Contribution>,
    /// `None` if nothing was accepted.
    pub version: Option<Version>,
}

/// Why the result of a merge cannot be published.
#[derive(Debug, thiserror::Error)]
enum Unpublishable {
    #[error(transparent)]
    Keyframe(#[from] KeyframeError),
    #[error(transparent)]
    Delta(#[from] DeltaError),
    #[error(transparent)]
    State(#[from] StateError),
}

/// Merges, takes the outer step, and writes the new version.
pub fn complete(
    plan: &FragmentPlan,
    plan_digest: Digest,
    parameters: &RunParameters,
    tape: &Tape,
    base: Base,
    inputs: &[Contributed],
) -> Completed {
    let slices = &plan.fragments[usize::from(tape.fragment)];
    let (merged, reports) = if tape.closing { merge(&averaged(slices), tape, inputs) } else { merge(slices, tape, inputs) };
    let contributions: Vec<Contribution> = tape
        .inputs
        .iter()
        .zip(&reports)
        .map(|(input, report)| Contribution {
            hotkey: input.hotkey,
            slot: input.slot,
            commitment: input.commitment,
            payload: input.payload,
            base_version: input.base_version,
            steps: input.steps,
            tokens: input.tokens,
            weight_ppm: input.weight_ppm,
            norm: report.norm_micro,
            clip_ppm: report.clip_ppm,
            cosine_ppm: report.cosine_ppm,
            neighbour_ppm: report.neighbour_ppm,
            rest_ppm: report.rest_ppm,
            outcome: report.outcome,
        })
        .collect();
    let accepted = contributions.iter().any(|contribution| contribution.outcome == Reason::None);
    let version = merged.filter(|_| accepted).and_then(|merged| {
        let version = step(plan, plan_digest, parameters, tape, base, merged);
        version.inspect_err(|error| tracing::error!(t = tape.t, "the result is not publishable: {error}")).ok()
    });
    Completed { contributions, version }
}

/// Merges what can be read. Every payload was checked when it was uploaded, so one that cannot be read now is a fault of ours or of the
/// disk; it is left out, and the others are merged.
fn merge(slices: &[Slice], tape: &Tape, inputs: &[Contributed]) -> (Option<Merged>, Vec<InputReport>) {
    const UNREAD: InputReport =
        InputReport { outcome: Reason::HeaderMismatch, norm_micro: 0, clip_ppm: 0, cosine_ppm: 0, neighbour_ppm: 0, rest_ppm: 0 };
    let mut reports = vec![UNREAD; inputs.len()];
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
                return (Some(merged), reports);
            }
            Err(error @ (MergeError::NotFinite { input } | MergeError::Payload { input, .. })) => {
                tracing::error!(t = tape.t, "a checked payload cannot be merged and is left out: {error}");
                readable.remove(input);
            }
            Err(error) => {
                tracing::error!(t = tape.t, "nothing was merged: {error}");
                return (None, reports);
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
    let from = KeyframeId { plan: plan_digest, fragment: u32::from(tape.fragment), version: tape.base_version };
    let version = tape.base_version + 1;
    let (keyframe, delta) = match replica {
        Some(replica) => {
            let frame = delta::write(plan, &from, &replica, &state.theta)?;
            (frame.keyframe, Some(Bytes::from(frame.bytes)))
        }
        None => (keyframe::write(plan, &KeyframeId { version, ..from }, &state.theta)?, None),
    };
    let elements = state.theta.len() as u64;
    let header = StateHeader { plan: plan_digest, fragment: u64::from(tape.fragment), version, elements };
    let state = Bytes::from(state.to_bytes(&header)?);
    Ok(Version { state, keyframe: Bytes::from(keyframe), delta, step_norm: merged.norm_micro, step_limit_ppm })
}
