//! Audits of a simulated learner on the toy model: honest, and dishonest in every way that a replay is there to find. The
//! tests of the effects publish the same learner's work in a bucket.

use std::cell::RefCell;

use fragments::codec::{self, PayloadHeader};
use fragments::feedback::{BETA, ErrorFeedback};
use fragments::keyframe::{self, KeyframeId};
use model::{Batch, Hyper, ToyTrainer, Trainer, TrainerState, toy_plan};
use protocol::documents::{
    Codec, Commitment, LearnerState, OpenedStep, OpeningManifest, Progress, RowRange, RunParameters, encode_progress, micro_nats,
};
use protocol::envelope::{RunId, sign};
use protocol::lease::LeaseRows;
use protocol::steps::Exchange;
use protocol::{Ed25519Signer, FileRecord, Signer, steps};

use super::*;
use crate::machine::fixture::{contribution, parameters, subject};

pub const FRAGMENT: u16 = 1;
pub const T: u64 = 4;
const ROW_TOKENS: u32 = 16;

/// The run's side: plan, shards, published fragment versions.
pub struct World {
    pub context: Context,
    pub parameters: RunParameters,
    pub plan: FragmentPlan,
    pub shards: Vec<ShardManifest>,
    /// By fragment and version; rounded to bf16 as published.
    pub keyframes: Vec<Vec<Vec<f32>>>,
    pub lease: Lease,
    /// Selection to open for; that of the fixture if none.
    pub selection: Option<Selection>,
    /// Whether fragment 2 arrives in version 1 inside the segment.
    pub has_arrival: bool,
    /// What was asked for, to see that the audit needs no more.
    asked: RefCell<Vec<(u16, u64)>>,
    is_offline: bool,
}

/// Tokens with a pattern that a learner can learn.
pub fn tokens(shard: &str, row: u64) -> Vec<u32> {
    let seed = if shard == "held" { 5 } else { 11 };
    (0..u64::from(ROW_TOKENS)).map(|n| ((row * 7 + n * n * seed) % 29) as u32).collect()
}

/// The token file of a shard.
pub fn token_file(shard: &str, rows: u64) -> Vec<u8> {
    (0..rows).flat_map(|row| tokens(shard, row)).flat_map(u32::to_le_bytes).collect()
}

fn shard(id: &str, rows: u64, held_out: bool) -> ShardManifest {
    ShardManifest {
        id: id.into(),
        rows,
        row_tokens: ROW_TOKENS,
        tokens: rows * u64::from(ROW_TOKENS),
        file: FileRecord::of_bytes("tokens.bin", &token_file(id, rows)),
        tokenizer: Digest::ZERO,
        vocab_size: 32,
        licence: String::new(),
        source: String::new(),
        held_out,
    }
}

impl World {
    pub fn new() -> Self {
        let plan = toy_plan(3);
        let published = |seed: u64| -> Vec<Vec<f32>> {
            let toy = ToyTrainer::new(plan.clone(), seed).unwrap();
            (0..3).map(|fragment| rounded(&plan, fragment, &toy.export(fragment).unwrap())).collect()
        };
        let (first, second) = (published(1), published(2));
        let keyframes = first.into_iter().zip(second).map(|(first, second)| vec![first, second]).collect();
        let parameters = RunParameters { fragments: 3, ..parameters() };
        let lease = Lease {
            id: 7,
            rows: vec![RowRange { shard: "train".into(), start: 4, end: 40 }],
            seed: Digest::blake3(b"lease"),
            batch_rows: 2,
            steps: 12,
            schedule_start: 0,
            deadline_ms: 0,
        };
        Self {
            context: Context { genesis: [2; 32], netuid: 24, run: RunId([3; 16]) },
            parameters,
            plan,
            shards: vec![shard("train", 64, false), shard("held", 6, true)],
            keyframes,
            lease,
            selection: None,
            has_arrival: true,
            asked: RefCell::default(),
            is_offline: false,
        }
    }

    fn rules(&self) -> Rules<'_> {
        Rules {
            context: &self.context,
            parameters: &self.parameters,
            plan: &self.plan,
            plan_digest: self.plan.digest(),
            shards: &self.shards,
        }
    }

    fn judge(&self, case: &Case) -> Judgement {
        let toy = || Box::new(ToyTrainer::new(self.plan.clone(), 99).unwrap());
        let inquiry = Inquiry { subject: &case.subject, evidence: &case.evidence, rules: &self.rules(), sources: self };
        judge(&inquiry, &mut Engine::new(toy(), toy()))
    }
}

fn rounded(plan: &FragmentPlan, fragment: usize, values: &[f32]) -> Vec<f32> {
    let id = KeyframeId { plan: plan.digest(), fragment: fragment as u32, version: 0 };
    keyframe::read(plan, &id, &keyframe::write(plan, &id, values).unwrap()).unwrap()
}

impl Sources for World {
    fn rows(&self, rows: &[RowRef]) -> Result<Vec<u32>, SourceError> {
        Ok(rows.iter().flat_map(|row| tokens(&row.shard, row.row)).collect())
    }

    fn keyframe(&self, fragment: u16, version: u64) -> Result<Vec<f32>, SourceError> {
        if self.is_offline {
            return Err(SourceError("no keyframe".into()));
        }
        self.asked.borrow_mut().push((fragment, version));
        Ok(self.keyframes[usize::from(fragment)][version as usize].clone())
    }
}

pub struct Case {
    pub subject: Subject,
    pub evidence: Evidence,
}

/// How a learner departs from the rules.
#[derive(Default)]
pub struct Cheat {
    pub other_rows: bool,
    pub lr_factor: Option<f64>,
    /// Training of the last step is left out; the payload of the step before is sent.
    pub idle: bool,
    pub payload: Option<fn(&mut Vec<f32>)>,
    pub state: Option<fn(&mut TrainerState)>,
    pub residual: Option<fn(&mut Vec<f32>)>,
    pub opening: Option<fn(&mut OpeningManifest)>,
    pub raw_payload: Option<fn(&mut Vec<u8>)>,
    pub routes: Option<fn(&mut Vec<u8>)>,
    pub no_opening: bool,
    pub commitment: Option<fn(&mut Commitment)>,
}

pub fn signer() -> Ed25519Signer {
    Ed25519Signer::from_seed([1; 32])
}

/// What the learner had withheld of the audited fragment, if its codec withholds something.
fn withheld(world: &World) -> Option<Vec<f32>> {
    let values = (0..world.plan.elements(usize::from(FRAGMENT))).map(|at| (at as f32).cos() * 0.01).collect();
    world.parameters.codec_up.withholds().then_some(values)
}

/// The bytes that an opening has for it.
fn residual_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let digest = Digest::blake3(&bytes);
    bytes.extend(digest.0);
    bytes
}

/// Seven steps of a learner that exported fragment 2 before step 3 and fragment 0 before step 4, got their versions 1 before steps 5
/// and 6, and commits fragment 1 after step 6. The segment starts at step 4.
pub fn case(world: &World, cheat: &Cheat) -> Case {
    let (plan, fragment) = (&world.plan, usize::from(FRAGMENT));
    let mut toy = ToyTrainer::new(plan.clone(), 50).unwrap();
    for other in 0..3 {
        Trainer::apply(&mut toy, other, &world.keyframes[other][0]).unwrap();
    }
    let rows = LeaseRows::of(&world.lease);
    let mut versions = vec![0; 3];
    let (mut opened, mut start) = (Vec::new(), None);
    for local_step in 0..7u64 {
        let mut exchanged = Vec::new();
        for (arrives_at, fragment) in [(5, 2), (6, 0)] {
            if local_step == arrives_at && world.has_arrival {
                Trainer::apply(&mut toy, fragment, &world.keyframes[fragment][1]).unwrap();
                versions[fragment] = 1;
                exchanged.push(Exchange::Applied { fragment: fragment as u16, version: 1 });
            }
        }
        if local_step == 4 {
            start = Some((toy.state().unwrap(), versions.clone()));
        }
        for (exported_at, fragment) in [(3, 2), (4, 0)] {
            if local_step == exported_at {
                toy.contribute(fragment).unwrap();
                exchanged.push(Exchange::Exported { fragment: fragment as u16 });
            }
        }
        let shift = if cheat.other_rows && local_step == 6 { 20 } else { 0 };
        let batch: Vec<u32> = rows.step(local_step as u32).iter().flat_map(|row| tokens(row.shard, row.row + shift)).collect();
        let mut hyper = replay::hyper(&world.parameters.inner, local_step);
        hyper.lr *= cheat.lr_factor.unwrap_or(1.0);
        let report = if cheat.idle && local_step == 6 {
            None
        } else {
            let batch = Batch { tokens: &batch, rows: 2, row_tokens: ROW_TOKENS as usize };
            Some(toy.step(&batch, &hyper, None, false).unwrap())
        };
        if local_step >= 4 {
            let loss = report.map_or(0, |report| micro_nats(report.loss));
            opened.push(OpenedStep { local_step, lease: 7, lease_step: local_step as u32, exchanged, loss });
        }
    }
    let mut change: Vec<f32> =
        world.keyframes[fragment][0].iter().zip(toy.export(fragment).unwrap()).map(|(base, value)| base - value).collect();
    cheat.payload.inspect(|alter| alter(&mut change));
    let header = PayloadHeader::new(world.parameters.codec_up, plan, plan.digest(), fragment, 0);
    let mut residual = withheld(world);
    let mut payload = match residual.clone() {
        Some(residual) => ErrorFeedback::from_residual(residual, BETA).encode(&header, &change).unwrap(),
        None => codec::encode(&header, &change).unwrap(),
    };
    let (mut state, versions) = start.unwrap();
    let mut start_digest = steps::segment_digest(4, &state.digest(), &versions);
    if let Some(residual) = &residual {
        let values = residual_bytes(residual);
        start_digest = steps::with_residual(&start_digest, &Digest::blake3(&values[..values.len() - 32]));
    }
    residual.iter_mut().for_each(|residual| cheat.residual.iter().for_each(|alter| alter(residual)));
    cheat.state.inspect(|alter| alter(&mut state));
    let mut commitment = Commitment {
        t: T,
        fragment: FRAGMENT,
        base_version: 0,
        length: payload.len() as u64,
        sha256: Digest::sha256(&payload),
        blake3: Digest::blake3(&payload),
        steps: 7,
        tokens: 7 * 2 * u64::from(ROW_TOKENS),
        lease: 7,
        lease_step: 7,
        local_step: 7,
        start_step: 4,
        start_digest,
        step_chain: Digest::ZERO,
    };
    cheat.commitment.inspect(|alter| alter(&mut commitment));
    let mut record = progress();
    record.commitments = vec![commitment.clone()];
    let envelope = encode_progress(record, &world.context, &signer(), 1, 1_000);
    let mut subject = subject(1, 0);
    subject.fragment = FRAGMENT;
    (subject.selection.hotkey, subject.selection.t) = (signer().key().account(), T);
    if let Some(selection) = &world.selection {
        subject.selection = selection.clone();
    }
    subject.contribution = Contribution {
        hotkey: subject.selection.hotkey,
        commitment: protocol::envelope::peek(&envelope).unwrap().2,
        payload: commitment.blake3,
        ..contribution(1, 0, commitment.tokens, Reason::None)
    };
    cheat.raw_payload.inspect(|alter| alter(&mut payload));
    let mut manifest = OpeningManifest { audit: subject.selection.audit, t: T, start_step: 4, versions, steps: opened };
    cheat.opening.inspect(|alter| alter(&mut manifest));
    let mut routes = vec![0; 4 * manifest.steps.len()];
    cheat.routes.inspect(|alter| alter(&mut routes));
    let opening = Opening {
        manifest: sign(&manifest, &world.context, &signer(), 2, 1_000).into(),
        state: [state.to_bytes(), residual.map(|values| residual_bytes(&values)).unwrap_or_default()].concat().into(),
        routes: routes.into(),
    };
    let evidence = Evidence {
        commitment: envelope.into(),
        payload: payload.into(),
        opening: (!cheat.no_opening).then_some(opening),
        leases: vec![world.lease.clone()],
        versions: vec![1, 1, 1],
    };
    Case { subject, evidence }
}

fn progress() -> Progress {
    Progress {
        worker: "w".into(),
        session_epoch: 1,
        slot: 0,
        protocol: 1,
        state: LearnerState::Training,
        reason: Reason::None,
        lease: 7,
        lease_step: 7,
        local_step: 7,
        step_ms: 1,
        loss: 0,
        step_chain: Digest::ZERO,
        fragments: Vec::new(),
        commitments: Vec::new(),
        uploaded: Vec::new(),
        openings: Vec::new(),
        receipt: None,
        padding: Vec::new(),
    }
}

fn outcome(cheat: Cheat) -> (VerdictResult, Reason) {
    let world = World::new();
    let judgement = world.judge(&case(&world, &cheat));
    (judgement.result, judgement.reason)
}

const REPLAY: (VerdictResult, Reason) = (VerdictResult::Mismatch, Reason::ReplayMismatch);
const BAD_OPENING: (VerdictResult, Reason) = (VerdictResult::Mismatch, Reason::BadOpening);

#[test]
fn an_honest_segment_passes_with_error_zero_and_all_measurements() {
    let world = World::new();
    let judgement = world.judge(&case(&world, &Cheat::default()));
    assert_eq!(judgement.result, VerdictResult::Pass, "{judgement:?}");
    let measured = judgement.measured;
    assert_eq!((measured.replay_error_ppm, measured.loss_error, measured.replayed_steps), (0, 0, 3));
    assert!(measured.assigned_after < measured.assigned_before, "{measured:?}");
    assert!(measured.held_out_before < i64::MAX && measured.held_out_after < i64::MAX);
    assert!(world.asked.borrow().contains(&(2, 1)), "the fragment that arrived inside the segment is applied");
}

#[test]
fn a_payload_with_error_feedback_is_replayed_from_the_residual_that_was_committed() {
    let mut world = World::new();
    world.parameters.codec_up = Codec::TopK;
    let judgement = world.judge(&case(&world, &Cheat::default()));
    assert_eq!(judgement.result, VerdictResult::Pass, "{judgement:?}");
    assert_eq!((judgement.measured.replay_error_ppm, judgement.measured.replayed_steps), (0, 3));
    let outcome = |cheat| {
        let judgement = world.judge(&case(&world, &cheat));
        (judgement.result, judgement.reason)
    };
    let other: fn(&mut Vec<f32>) = |values| values[0] += 1.0;
    assert_eq!(outcome(Cheat { residual: Some(other), ..Cheat::default() }), (VerdictResult::Mismatch, Reason::StartMismatch));
    let broken: fn(&mut Vec<f32>) = |values| values[0] = f32::NAN;
    assert_eq!(outcome(Cheat { residual: Some(broken), ..Cheat::default() }), BAD_OPENING);
    let short: fn(&mut Vec<f32>) = |values| {
        values.pop();
    };
    assert_eq!(outcome(Cheat { residual: Some(short), ..Cheat::default() }), BAD_OPENING);
    let scaled: fn(&mut Vec<f32>) = |values| values.iter_mut().for_each(|value| *value *= 3.0);
    assert_eq!(outcome(Cheat { payload: Some(scaled), ..Cheat::default() }), REPLAY);
    assert_eq!(outcome(Cheat { other_rows: true, ..Cheat::default() }), REPLAY);
}

#[test]
fn other_data_in_a_single_step_is_a_mismatch() {
    assert_eq!(outcome(Cheat { other_rows: true, ..Cheat::default() }), REPLAY);
}

#[test]
fn another_learning_rate_is_a_mismatch() {
    assert_eq!(outcome(Cheat { lr_factor: Some(1.5), ..Cheat::default() }), REPLAY);
}

#[test]
fn a_step_that_was_not_trained_is_a_mismatch() {
    assert_eq!(outcome(Cheat { idle: true, ..Cheat::default() }), REPLAY);
}

#[test]
fn an_altered_payload_is_a_mismatch_even_if_it_was_committed() {
    let scaled: fn(&mut Vec<f32>) = |values| values.iter_mut().for_each(|value| *value *= 1.5);
    assert_eq!(outcome(Cheat { payload: Some(scaled), ..Cheat::default() }), REPLAY);
    let zero: fn(&mut Vec<f32>) = |values| values.fill(0.0);
    assert_eq!(outcome(Cheat { payload: Some(zero), ..Cheat::default() }), REPLAY);
}

#[test]
fn an_error_between_one_and_three_tolerances_proves_nothing() {
    let world = World::new();
    let slightly: fn(&mut Vec<f32>) = |values| values.iter_mut().for_each(|value| *value *= 1.01);
    let case = case(&world, &Cheat { payload: Some(slightly), ..Cheat::default() });
    let error = world.judge(&case).measured.replay_error_ppm;
    assert!(error > 1_000 && error < 100_000, "{error}");
    for (tolerance, result) in
        [(error, VerdictResult::Pass), (error - 1, VerdictResult::Inconclusive), (error / 3 - 1, VerdictResult::Mismatch)]
    {
        let mut world = World::new();
        world.parameters.audit.replay_tolerance_ppm = tolerance as u32;
        assert_eq!(world.judge(&case).result, result, "tolerance {tolerance}");
    }
}

#[test]
fn an_altered_start_state_is_a_start_mismatch() {
    let weights: fn(&mut TrainerState) = |state| state.weights[3] += 1e-3;
    let moments: fn(&mut TrainerState) = |state| state.second.fill(1.0);
    let exported: fn(&mut TrainerState) = |state| state.exported.clear();
    for state in [weights, moments, exported] {
        assert_eq!(outcome(Cheat { state: Some(state), ..Cheat::default() }), (VerdictResult::Mismatch, Reason::StartMismatch));
    }
    let versions: fn(&mut OpeningManifest) = |opening| opening.versions[0] = 9;
    assert_eq!(outcome(Cheat { opening: Some(versions), ..Cheat::default() }), (VerdictResult::Mismatch, Reason::StartMismatch));
}

fn applied(fragment: u16, version: u64) -> Exchange {
    Exchange::Applied { fragment, version }
}

#[test]
fn a_replay_keeps_steps_over_an_arrival_as_the_learner_did_and_misses_them_where_the_export_is_hidden() {
    let world = World::new();
    let hidden: fn(&mut OpeningManifest) = |opening| opening.steps[0].exchanged.clear();
    let error = |cheat: &Cheat| world.judge(&case(&world, cheat)).measured.replay_error_ppm;
    assert_eq!(error(&Cheat::default()), 0);
    assert!(error(&Cheat { opening: Some(hidden), ..Cheat::default() }) > 0);
}

#[test]
fn missing_repeated_or_invented_steps_are_a_bad_opening() {
    let fewer: fn(&mut OpeningManifest) = |opening| drop(opening.steps.pop());
    let gap: fn(&mut OpeningManifest) = |opening| opening.steps[1].local_step = 6;
    let none: fn(&mut OpeningManifest) = |opening| opening.steps.clear();
    let future: fn(&mut OpeningManifest) = |opening| opening.steps[1].exchanged = vec![applied(2, 55)];
    let fragment: fn(&mut OpeningManifest) = |opening| opening.steps[1].exchanged = vec![applied(200, 0)];
    let other: fn(&mut OpeningManifest) = |opening| opening.t = 3;
    let endless: fn(&mut OpeningManifest) = |opening| opening.steps[1].exchanged = vec![applied(2, 1); 900];
    let export: fn(&mut OpeningManifest) = |opening| opening.steps[1].exchanged = vec![Exchange::Exported { fragment: 200 }];
    for opening in [fewer, gap, none, future, fragment, export, other, endless] {
        assert_eq!(outcome(Cheat { opening: Some(opening), ..Cheat::default() }), BAD_OPENING);
    }
    let long: fn(&mut Commitment) = |commitment| commitment.local_step = 4_000;
    assert_eq!(outcome(Cheat { commitment: Some(long), ..Cheat::default() }), BAD_OPENING);
    let empty: fn(&mut Commitment) = |commitment| commitment.local_step = 4;
    assert_eq!(outcome(Cheat { commitment: Some(empty), ..Cheat::default() }), BAD_OPENING);
}

#[test]
fn rows_that_the_lease_does_not_give_are_a_rows_mismatch() {
    let foreign: fn(&mut OpeningManifest) = |opening| opening.steps[0].lease = 8;
    let behind: fn(&mut OpeningManifest) = |opening| opening.steps[2].lease_step = 12;
    let twice: fn(&mut OpeningManifest) = |opening| opening.steps[2].lease_step = 5;
    let later: fn(&mut OpeningManifest) = |opening| opening.steps[2].lease_step = 9;
    for opening in [foreign, behind, twice, later] {
        assert_eq!(outcome(Cheat { opening: Some(opening), ..Cheat::default() }), (VerdictResult::Mismatch, Reason::RowsMismatch));
    }
}

#[test]
fn openings_that_do_not_decode_are_bad_and_an_opening_of_somebody_else_is_too() {
    let world = World::new();
    for damage in [0, 1, 2] {
        let mut case = case(&world, &Cheat::default());
        let opening = case.evidence.opening.as_mut().unwrap();
        match damage {
            0 => opening.manifest = Bytes::from_static(b"nothing"),
            1 => opening.state = Bytes::from_static(b"QTRS"),
            _ => {
                opening.manifest = sign(
                    &OpeningManifest { audit: Digest::ZERO, t: T, start_step: 4, versions: vec![], steps: vec![] },
                    &world.context,
                    &Ed25519Signer::from_seed([9; 32]),
                    1,
                    1,
                )
                .into()
            }
        }
        let judgement = world.judge(&case);
        assert_eq!((judgement.result, judgement.reason), BAD_OPENING, "{damage}");
    }
    let short: fn(&mut Vec<u8>) = |bytes| bytes.truncate(5);
    let trailing: fn(&mut Vec<u8>) = |bytes| bytes.push(0);
    let endless: fn(&mut Vec<u8>) = |bytes| bytes[..4].fill(0xff);
    for routes in [short, trailing, endless] {
        assert_eq!(outcome(Cheat { routes: Some(routes), ..Cheat::default() }), BAD_OPENING);
    }
}

#[test]
fn without_an_opening_the_loss_is_still_measured() {
    let world = World::new();
    let judgement = world.judge(&case(&world, &Cheat { no_opening: true, ..Cheat::default() }));
    assert_eq!((judgement.result, judgement.reason), (VerdictResult::NoOpening, Reason::NoOpening));
    assert!(judgement.measured.assigned_after < i64::MAX && judgement.measured.replay_error_ppm == i64::MAX);
}

#[test]
fn a_contribution_that_raises_the_loss_but_replays_still_passes() {
    let mut world = World::new();
    world.parameters.inner.lr_nano = 100_000_000_000;
    let judgement = world.judge(&case(&world, &Cheat::default()));
    assert_eq!((judgement.result, judgement.reason), (VerdictResult::Pass, Reason::LossWorse), "{judgement:?}");
}

#[test]
fn bytes_that_are_not_the_committed_ones_fail_nobody_and_committed_nonsense_does() {
    let flipped: fn(&mut Vec<u8>) = |bytes| bytes[70] ^= 1;
    assert_eq!(outcome(Cheat { raw_payload: Some(flipped), ..Cheat::default() }), (VerdictResult::Inconclusive, Reason::DigestMismatch));
    let cut: fn(&mut Vec<u8>) = |bytes| bytes.truncate(bytes.len() - 1);
    assert_eq!(outcome(Cheat { raw_payload: Some(cut), ..Cheat::default() }), (VerdictResult::Inconclusive, Reason::LengthMismatch));
    // A committed payload with an infinite value: the store cannot know, the signature proves it.
    let world = World::new();
    let mut payload = case(&world, &Cheat::default()).evidence.payload.to_vec();
    payload[64..66].copy_from_slice(&0x7f80u16.to_le_bytes());
    let mut record = progress();
    let digest = Digest::blake3(&payload);
    record.commitments = vec![Commitment {
        t: T,
        fragment: FRAGMENT,
        base_version: 0,
        length: payload.len() as u64,
        sha256: Digest::sha256(&payload),
        blake3: digest,
        steps: 1,
        tokens: 1,
        lease: 7,
        lease_step: 7,
        local_step: 7,
        start_step: 4,
        start_digest: Digest::ZERO,
        step_chain: Digest::ZERO,
    }];
    let mut case = case(&world, &Cheat::default());
    case.evidence.commitment = encode_progress(record, &world.context, &signer(), 1, 1_000).into();
    case.subject.contribution.commitment = protocol::envelope::peek(&case.evidence.commitment).unwrap().2;
    case.subject.contribution.payload = digest;
    case.evidence.payload = payload.into();
    let judgement = world.judge(&case);
    assert_eq!((judgement.result, judgement.reason), (VerdictResult::Mismatch, Reason::NotFinite));
}

#[test]
fn records_of_the_orchestrator_that_contradict_each_other_are_nobodys_mismatch() {
    let world = World::new();
    let changes: [fn(&mut Case); 4] = [
        |case| case.evidence.commitment = Bytes::from_static(b"nothing"),
        |case| case.subject.contribution.commitment = Digest::ZERO,
        |case| case.subject.contribution.payload = Digest::ZERO,
        |case| case.subject.selection.slot = 3,
    ];
    for change in changes {
        let mut case = case(&world, &Cheat::default());
        change(&mut case);
        assert_eq!(world.judge(&case).result, VerdictResult::NotEvaluated);
    }
}

#[test]
fn what_we_cannot_fetch_is_not_the_miners_fault() {
    let mut world = World::new();
    let case = case(&world, &Cheat::default());
    world.is_offline = true;
    let judgement = world.judge(&case);
    assert_eq!((judgement.result, judgement.reason), (VerdictResult::NotEvaluated, Reason::NotEvaluated));
}

#[test]
fn the_signed_optimizer_becomes_the_trainers_settings() {
    let inner = parameters().inner;
    let expected = Hyper { lr: 0.02, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip_norm: 1.0 };
    let hyper = replay::hyper(&inner, 0);
    assert!((hyper.lr - expected.lr).abs() < 1e-12 && (hyper.eps - expected.eps).abs() < 1e-20);
    assert_eq!(Hyper { lr: expected.lr, eps: expected.eps, ..hyper }, expected);
}
