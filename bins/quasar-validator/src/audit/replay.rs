//! The replay: the opened segment, trained once more from its committed start with the leased rows, the signed schedule and
//! the recorded expert choices, must end in the payload that was uploaded.

use bytes::Bytes;
use fragments::codec;
use fragments::feedback::{BETA, ErrorFeedback, read_residual};
use model::{Batch, Hyper, Routes, StateError, TrainError, Trainer, TrainerState};
use protocol::documents::{InnerOptimizer, Lease, Measurements, OpenedStep, OpeningManifest, PPM, VerdictResult, micro_nats};
use protocol::envelope::{Expect, open_stored};
use protocol::lease::LeaseRows;
use protocol::steps::Exchange;
use protocol::{Digest, Reason, steps};

use super::artifact::{self, Artifact};
use super::{Finding, Inquiry, Opening, RowRef, loss};

/// Between tolerance and this many tolerances nothing is proved: another machine may round differently.
const INCONCLUSIVE_FACTOR: i64 = 3;

/// Replays the segment and compares. `Ok` = within the tolerance.
pub fn test(
    inquiry: &Inquiry<'_>,
    opening: &Opening,
    artifact: &Artifact,
    base: &[f32],
    trainer: &mut dyn Trainer,
    measured: &mut Measurements,
) -> Result<(), Finding> {
    let Inquiry { subject, evidence, rules, sources } = *inquiry;
    let segment = Segment::open(inquiry, opening, artifact)?;
    let batches = batches(&segment.manifest.steps, inquiry, artifact)?;
    let fragment = usize::from(subject.fragment);
    trainer.restore(&segment.state).map_err(of_miner)?;
    let mut start = trainer.export(fragment)?;
    for (number, ((step, routes), batch)) in segment.manifest.steps.iter().zip(&segment.routes).zip(&batches).enumerate() {
        let exchanged: Vec<Exchange> =
            if number == 0 { Exchange::after_state(&step.exchanged).copied().collect() } else { step.exchanged.clone() };
        for exchange in exchanged {
            match exchange {
                Exchange::Exported { fragment } => drop(trainer.contribute(usize::from(fragment)).map_err(of_miner)?),
                Exchange::Applied { fragment: other, version } => {
                    let known = evidence.versions.get(usize::from(other)).is_some_and(|newest| version <= *newest);
                    if !known {
                        return Err(Finding::mismatch(Reason::BadOpening, format!("fragment {other} never had version {version}")));
                    }
                    trainer.apply(usize::from(other), &sources.keyframe(other, version)?)?;
                    if other == subject.fragment {
                        start = trainer.export(fragment)?;
                    }
                }
            }
        }
        let tokens = sources.rows(&batch.rows)?;
        let row_tokens = rules.parameters.sequence_length as usize;
        let input = Batch { tokens: &tokens, rows: batch.rows.len(), row_tokens };
        let report = trainer.step(&input, &batch.hyper, Some(routes), false).map_err(of_miner)?;
        let difference = micro_nats(report.loss).saturating_sub(step.loss).saturating_abs();
        measured.loss_error = if number == 0 { difference } else { measured.loss_error.max(difference) };
        measured.replayed_steps += 1;
    }
    let replayed = trainer.export(fragment)?;
    let error = error_ppm(inquiry, artifact, segment.residual, base, &start, &replayed)?;
    measured.replay_error_ppm = error;
    let tolerance = i64::from(rules.parameters.audit.replay_tolerance_ppm);
    let text = format!("replay error {error} ppm, tolerance {tolerance} ppm");
    if error <= tolerance {
        Ok(())
    } else if error <= tolerance.saturating_mul(INCONCLUSIVE_FACTOR) {
        Err(Finding::new(VerdictResult::Inconclusive, Reason::ReplayMismatch, text))
    } else {
        Err(Finding::mismatch(Reason::ReplayMismatch, text))
    }
}

/// An opening that is what was committed.
struct Segment {
    manifest: OpeningManifest,
    state: TrainerState,
    /// What the codec had withheld of the audited fragment; `None` if it withholds nothing.
    residual: Option<Vec<f32>>,
    /// One for each step.
    routes: Vec<Routes>,
}

impl Segment {
    fn open(inquiry: &Inquiry<'_>, opening: &Opening, artifact: &Artifact) -> Result<Self, Finding> {
        let (rules, selection, commitment) = (inquiry.rules, &inquiry.subject.selection, &artifact.commitment);
        let bad = |note: String| Finding::mismatch(Reason::BadOpening, note);
        let manifest = open_stored::<OpeningManifest>(&opening.manifest, rules.context, Expect::Account(&selection.hotkey))
            .map_err(|error| bad(format!("the opening manifest does not open: {error}")))?
            .document;
        if manifest.audit != selection.audit || manifest.t != selection.t {
            return Err(bad("the opening belongs to another audit".into()));
        }
        let elements = rules.plan.total_elements() as usize;
        let mut state_bytes: &[u8] = &opening.state;
        let mut residual = None;
        if rules.parameters.codec_up.withholds() {
            let elements = rules.plan.elements(usize::from(inquiry.subject.fragment)) as usize;
            let (before, opened) = split_residual(state_bytes, elements).ok_or_else(|| bad("the opened residual is not whole".into()))?;
            (state_bytes, residual) = (before, Some(opened));
        }
        let state = TrainerState::from_bytes(state_bytes, elements).map_err(|error| bad(format!("the opened state: {error}")))?;
        // The same state may be written in several ways; what was committed is the digest that ends these bytes.
        let state_digest = state_bytes.last_chunk::<32>().map_or(Digest::ZERO, |digest| Digest(*digest));
        let digest = steps::segment_digest(manifest.start_step, &state_digest, &manifest.versions);
        let digest = residual.as_ref().map_or(digest, |(_, residual)| steps::with_residual(&digest, residual));
        if manifest.start_step != commitment.start_step || digest != commitment.start_digest {
            let note = format!("the opened state is not the one that was committed for step {}", commitment.start_step);
            return Err(Finding::mismatch(Reason::StartMismatch, note));
        }
        let expected = commitment.local_step.saturating_sub(commitment.start_step);
        if expected == 0 || expected > u64::from(rules.parameters.audit.replay_steps) {
            return Err(bad(format!(
                "the committed segment has {expected} steps, 1 to {} are allowed",
                rules.parameters.audit.replay_steps
            )));
        }
        let contiguous = manifest.steps.iter().zip(commitment.start_step..).all(|(step, number)| step.local_step == number);
        if manifest.steps.len() as u64 != expected || !contiguous {
            return Err(bad(format!("{} steps were opened where {expected} were committed", manifest.steps.len())));
        }
        if manifest.steps.iter().any(|step| step.exchanged.len() > Exchange::PER_FRAGMENT_MAX * rules.plan.fragments.len()) {
            return Err(bad("a step exchanges more than there is".into()));
        }
        let routes = decode_routes(&opening.routes, manifest.steps.len()).ok_or_else(|| bad("the routes do not decode".into()))?;
        Ok(Self { manifest, state, residual: residual.map(|(values, _)| values), routes })
    }
}

/// What a codec had withheld of a fragment, and its BLAKE3.
type Residual = (Vec<f32>, Digest);

/// Cuts the residual of a fragment off the end of an opened state: finite values, with the digest that follows them.
fn split_residual(bytes: &[u8], elements: usize) -> Option<(&[u8], Residual)> {
    let length = elements.checked_mul(4)?.checked_add(32)?;
    let (state, residual) = bytes.split_at_checked(bytes.len().checked_sub(length)?)?;
    let residual = read_residual(residual)?;
    residual.0.iter().all(|value| value.is_finite()).then_some((state, residual))
}

/// Routes of exactly `count` steps.
fn decode_routes(bytes: &Bytes, count: usize) -> Option<Vec<Routes>> {
    let mut rest: &[u8] = bytes;
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (values, after) = after.split_at_checked((u32::from_le_bytes(*length) as usize).checked_mul(2)?)?;
        all.push(Routes(values.as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair)).collect()));
        rest = after;
    }
    rest.is_empty().then_some(all)
}

/// What one step trained on and with.
struct StepInput {
    rows: Vec<RowRef>,
    hyper: Hyper,
}

/// Rows and optimizer settings of every opened step, from the leases that the orchestrator gave.
fn batches(opened: &[OpenedStep], inquiry: &Inquiry<'_>, artifact: &Artifact) -> Result<Vec<StepInput>, Finding> {
    let Inquiry { evidence, rules, .. } = inquiry;
    let wrong = |note: String| Finding::mismatch(Reason::RowsMismatch, note);
    let mut held: Vec<(&Lease, LeaseRows)> = Vec::new();
    let mut inputs = Vec::with_capacity(opened.len());
    for (number, step) in opened.iter().enumerate() {
        if opened[..number].iter().any(|before| before.lease == step.lease && before.lease_step >= step.lease_step) {
            return Err(wrong(format!("step {} takes rows of lease {} a second time", step.local_step, step.lease)));
        }
        if held.iter().all(|(lease, _)| lease.id != step.lease) {
            let lease = evidence.leases.iter().find(|lease| lease.id == step.lease);
            let lease = lease.ok_or_else(|| wrong(format!("the learner never held lease {}", step.lease)))?;
            if loss::lease_rows(lease).is_none() {
                return Err(Finding::not_evaluated(format!("lease {} of the audit order is malformed", lease.id)));
            }
            held.push((lease, LeaseRows::of(lease)));
        }
        for (lease, rows) in held.iter().filter(|(lease, _)| lease.id == step.lease) {
            let rows: Vec<RowRef> =
                rows.step(step.lease_step).iter().map(|row| RowRef { shard: row.shard.to_owned(), row: row.row }).collect();
            if step.lease_step >= lease.steps || rows.is_empty() {
                return Err(wrong(format!("lease {} has no step {}", lease.id, step.lease_step)));
            }
            let index = lease.schedule_start.saturating_add(u64::from(step.lease_step));
            inputs.push(StepInput { rows, hyper: hyper(&rules.parameters.inner, index) });
        }
    }
    let commitment = &artifact.commitment;
    match opened.last() {
        Some(last) if last.lease == commitment.lease && last.lease_step >= commitment.lease_step => {
            Err(wrong(format!("the last opened step lies behind step {} of the commitment", commitment.lease_step)))
        }
        _ => Ok(inputs),
    }
}

/// The signed optimizer at run step `index`.
pub fn hyper(inner: &InnerOptimizer, index: u64) -> Hyper {
    let ppm = |value: u32| f64::from(value) / PPM as f64;
    Hyper {
        lr: inner.lr(index),
        beta1: ppm(inner.beta1_ppm),
        beta2: ppm(inner.beta2_ppm),
        eps: inner.eps_pico as f64 * 1e-12,
        weight_decay: ppm(inner.weight_decay_ppm),
        clip_norm: inner.clip_norm_ppm as f64 / PPM as f64,
    }
}

/// Errors that only the miner's own data can cause; the rest is ours.
fn of_miner(error: TrainError) -> Finding {
    match error {
        TrainError::NoFragment { fragment, .. } => {
            Finding::mismatch(Reason::BadOpening, format!("the opening exports fragment {fragment}, which does not exist"))
        }
        TrainError::FragmentLength { .. } | TrainError::FragmentNotFinite { .. } => {
            Finding::mismatch(Reason::BadOpening, format!("the opened state does not fit: {error}"))
        }
        TrainError::Routes(what) => Finding::mismatch(Reason::BadOpening, format!("the opened routes do not fit: {what}")),
        TrainError::State(StateError::Length { .. } | StateError::NotFinite) => {
            Finding::mismatch(Reason::BadOpening, format!("the opened state does not fit: {error}"))
        }
        // A learner offers nothing that diverged, and signed losses that are numbers.
        TrainError::NotFinite { .. } => Finding::mismatch(Reason::ReplayMismatch, format!("the replay diverged: {error}")),
        other => other.into(),
    }
}

/// ‖claimed − replayed‖ / ‖replayed − start‖ in parts per million; both payloads in the codec's precision.
fn error_ppm(
    inquiry: &Inquiry<'_>,
    artifact: &Artifact,
    residual: Option<Vec<f32>>,
    base: &[f32],
    start: &[f32],
    replayed: &[f32],
) -> Result<i64, Finding> {
    let header = artifact::header(inquiry, artifact.commitment.base_version);
    let change: Vec<f32> = base.iter().zip(replayed).map(|(base, value)| base - value).collect();
    let encoded = match residual {
        Some(residual) => ErrorFeedback::from_residual(residual, BETA).encode(&header, &change),
        None => codec::encode(&header, &change),
    };
    let expected = encoded
        .and_then(|bytes| codec::decode(&bytes, &header))
        .map_err(|error| Finding::mismatch(Reason::ReplayMismatch, format!("the replayed payload: {error}")))?;
    let distance = norm(artifact.values.iter().zip(&expected).map(|(claimed, expected)| f64::from(*claimed) - f64::from(*expected)));
    let moved = norm(replayed.iter().zip(start).map(|(end, start)| f64::from(*end) - f64::from(*start)));
    let error = match (distance, moved) {
        (0.0, _) => 0.0,
        (_, 0.0) => f64::INFINITY,
        (distance, moved) => distance / moved,
    };
    // A measured error stays below the value that means "not run".
    Ok(((error * PPM as f64).round() as i64).min(i64::MAX - 1))
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}
