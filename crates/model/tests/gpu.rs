//! Own kernels on a GPU against libtorch's operations: gradients, determinism, moments, guards. They run where
//! `QUASAR_TORCH_CUDA_DIR` names the `torch` folder of a full installation and a GPU is there.
#![cfg(feature = "libtorch")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use common::{relative_difference, tokens};
use protocol::{DType, FragmentPlan};
use quasar_model::memory::{Strategy, Work, memory_of};
use quasar_model::{
    Batch, ComputeType, Hyper, MomentType, QuasarConfig, QuasarTrainer, Routes, TrainError, Trainer, TrainerOptions, TrainerState,
};

/// Relative L2 difference of hidden states from f32: of the embedding, after each layer of [`folder`], the last with the final norm, with the
/// same experts. A bf16 number is off by up to 4e-3; the slots that a slot memory chooses jump when scores are rounded.
const LAYER_TOLERANCE: [f64; 5] = [3e-3, 1.5e-2, 3e-2, 1.5e-1, 2e-1];

/// Two rows across the position from which rotary embedding is the identity, the last chunk short.
const ROWS: usize = 2;
const ROW_TOKENS: usize = 600;
const VOCABULARY: u32 = 4096;

/// The released model's widths and branches, everything else small.
fn config(layers: usize, cycle: &[&str]) -> QuasarConfig {
    config_with(layers, cycle, &[])
}

fn config_with(layers: usize, cycle: &[&str], further: &[(&str, usize)]) -> QuasarConfig {
    let mut keys: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&QuasarConfig::preview(layers).unwrap().to_json()).unwrap();
    for (key, value) in [
        ("vocab_size", VOCABULARY as usize),
        ("pad_token_id", 7),
        ("intermediate_size", 512),
        ("num_experts", 32),
        ("num_experts_per_tok", 4),
        ("moe_intermediate_size", 64),
        ("moe_shared_expert_intermediate_size", 64),
    ]
    .iter()
    .chain(further)
    {
        keys.insert((*key).into(), (*value).into());
    }
    keys.insert("hybrid_layerwise_cycle".into(), cycle.into());
    QuasarConfig::from_json(&serde_json::Value::Object(keys).to_string()).unwrap()
}

/// Whether there is a GPU to test on; loads CUDA.
fn has_gpu() -> bool {
    static LOADED: OnceLock<bool> = OnceLock::new();
    *LOADED.get_or_init(|| {
        let Some(torch) = std::env::var_os("QUASAR_TORCH_CUDA_DIR") else {
            eprintln!("QUASAR_TORCH_CUDA_DIR is not set: nothing is tested on a GPU");
            return false;
        };
        quasar_model::load_cuda(Path::new(&torch)).expect("the folder holds a usable libtorch_cuda.so");
        true
    })
}

/// A fresh checkpoint.
fn checkpoint(config: &QuasarConfig) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    quasar_model::init::fresh(config, 1, DType::F32, folder.path()).unwrap();
    folder
}

/// A checkpoint with all branches and half the width, made once; `None` without a GPU.
fn folder() -> Option<&'static Path> {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let half = [("hidden_size", 1024), ("num_attention_heads", 8), ("num_key_value_heads", 2)];
    has_gpu().then(|| FOLDER.get_or_init(|| checkpoint(&config_with(4, &["quasar", "raven", "gla"], &half)).keep()).as_path())
}

fn plan(folder: &Path) -> FragmentPlan {
    common::plan(folder, 4)
}

fn options(own_kernels: bool, compute: ComputeType) -> TrainerOptions {
    let cache = std::env::temp_dir().join("quasar-kernels");
    TrainerOptions { device: "cuda:0".into(), own_kernels, compute: Some(compute), kernel_cache: Some(cache), ..TrainerOptions::default() }
}

fn own() -> TrainerOptions {
    options(true, ComputeType::Bf16)
}

fn open(folder: &Path, options: &TrainerOptions) -> QuasarTrainer {
    QuasarTrainer::open_with(folder, plan(folder), options).unwrap()
}

fn rows(seed: u32) -> Vec<u32> {
    words(seed, ROWS * ROW_TOKENS, VOCABULARY)
}

fn words(seed: u32, count: usize, vocabulary: u32) -> Vec<u32> {
    let mut word = u64::from(seed) + 1;
    let mut next = || {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Unevenly distributed, so that there is something to learn.
        let x = (word >> 33) as f64 / (1u64 << 31) as f64;
        (x * x * f64::from(vocabulary)) as u32
    };
    (0..count).map(|_| next()).collect()
}

fn batch(tokens: &[u32]) -> Batch<'_> {
    Batch { tokens, rows: ROWS, row_tokens: tokens.len() / ROWS }
}

/// The experts that the exact model chooses: with them forced, all forms compute the same smooth function.
fn routes(folder: &Path, tokens: &[u32]) -> Routes {
    let mut exact = open(folder, &options(false, ComputeType::F32));
    exact.step(&batch(tokens), &Hyper { lr: 0.0, ..Hyper::default() }, None, true).unwrap().routes.unwrap()
}

/// A model of two layers with one kind of branch: bf16 noise grows from layer to layer in a fresh model, and would hide mistakes.
fn compare_branch(branch: &str, change: impl Fn(&mut TrainerOptions)) {
    let folder = checkpoint(&config(2, &[branch]));
    compare_gradients(branch, folder.path(), &batch(&rows(1)), change);
}

/// Loss and gradients of own kernels are as close to those of libtorch in f32 as those of libtorch in bf16 are, with `change` made to the
/// options of all three.
fn compare_gradients(what: &str, folder: &Path, batch: &Batch, change: impl Fn(&mut TrainerOptions)) {
    let with = |own_kernels, compute| {
        let mut options = options(own_kernels, compute);
        change(&mut options);
        options
    };
    let exact_options = with(false, ComputeType::F32);
    let zero = Hyper { lr: 0.0, ..Hyper::default() };
    let routes = open(folder, &exact_options).step(batch, &zero, None, true).unwrap().routes.unwrap();
    let gradients = |options: &TrainerOptions| open(folder, options).loss_and_gradients(batch, Some(&routes)).unwrap();
    let (exact_loss, exact) = gradients(&exact_options);
    let (bf16_loss, bf16) = gradients(&with(false, ComputeType::Bf16));
    let (own_loss, ours) = gradients(&with(true, ComputeType::Bf16));
    eprintln!("{what}: loss {exact_loss:.6} in f32, {bf16_loss:.6} in bf16, {own_loss:.6} by own kernels");
    assert_eq!(ours.len(), exact.len());
    let mut table = Vec::new();
    for (name, exact) in &exact {
        if name.ends_with(".branch_output_gain") {
            assert_eq!(ours[name], [0.0], "{name} divides out");
            continue;
        }
        table.push((relative_difference(&ours[name], exact), relative_difference(&bf16[name], exact), name));
    }
    table.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (mine, theirs, name) in table.iter().take(6) {
        eprintln!("{mine:.2e} (libtorch {theirs:.2e}) {name}");
    }
    assert!((own_loss - exact_loss).abs() < 1e-3 * exact_loss);
    // The error of a scalar is a single draw, which libtorch may win by chance: it is compared with the worst of its draws.
    let scalar = |name: &str| exact[name].len() == 1;
    let worst = table.iter().filter(|(_, _, name)| scalar(name)).fold(0.0, |worst: f64, (_, theirs, _)| worst.max(*theirs));
    for (mine, theirs, name) in &table {
        let limit = if scalar(name) { 3.0 * worst } else { 1.5 * theirs } + 0.02;
        assert!(*mine <= limit, "{name}: {mine} against {theirs}, limit {limit}");
    }
}

#[test]
fn gradients_of_own_kernels_are_as_close_to_f32_as_those_of_libtorch_in_bf16() {
    if !has_gpu() {
        return;
    }
    for branch in ["quasar", "raven", "gla"] {
        compare_branch(branch, |_| {});
    }
}

/// Vocabulary, experts and feed-forward widths of the released model, which the small models above leave out: half the hidden width, two
/// layers, and more tokens than one tile of logits holds.
mod released {
    use super::*;

    const ROWS: usize = 8;
    const VOCABULARY: u32 = 157_184;
    const WIDTHS: [(&str, usize); 9] = [
        ("vocab_size", VOCABULARY as usize),
        ("hidden_size", 1024),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 2),
        ("intermediate_size", 5120),
        ("num_experts", 256),
        ("num_experts_per_tok", 8),
        ("moe_intermediate_size", 512),
        ("moe_shared_expert_intermediate_size", 512),
    ];

    fn folder() -> tempfile::TempDir {
        checkpoint(&config_with(2, &["quasar"], &WIDTHS))
    }

    fn tokens() -> Vec<u32> {
        words(1, ROWS * ROW_TOKENS, VOCABULARY)
    }

    fn batch(tokens: &[u32]) -> Batch<'_> {
        Batch { tokens, rows: ROWS, row_tokens: ROW_TOKENS }
    }

    #[test]
    fn gradients_at_the_released_models_widths_are_as_close_to_f32_as_those_of_libtorch_in_bf16() {
        if !has_gpu() {
            return;
        }
        let (folder, tokens) = (folder(), tokens());
        compare_gradients("released widths", folder.path(), &batch(&tokens), |_| {});
    }

    /// In the first mixture layer inputs still agree but for rounding, so that only choices on the brink differ: no more of them than
    /// rounding to bf16 turns.
    #[test]
    fn own_kernels_choose_the_experts_that_libtorch_chooses_but_for_rounding() {
        if !has_gpu() {
            return;
        }
        let (folder, tokens) = (folder(), tokens());
        let chosen = |options: &TrainerOptions| -> Vec<Vec<u16>> {
            let mut trainer = open(folder.path(), options);
            let choices = trainer.config().num_experts_per_tok;
            let zero = Hyper { lr: 0.0, ..Hyper::default() };
            let routes = trainer.step(&batch(&tokens), &zero, None, true).unwrap().routes.unwrap();
            // The first layer of the record; of two layers, one has a mixture.
            routes.0.chunks(choices).take(tokens.len()).map(<[u16]>::to_vec).collect()
        };
        let share = |ours: &[Vec<u16>], theirs: &[Vec<u16>]| {
            let same = |(ours, theirs): (&Vec<u16>, &Vec<u16>)| ours.iter().filter(|expert| theirs.contains(expert)).count();
            let all: usize = ours.iter().map(Vec::len).sum();
            ours.iter().zip(theirs).map(same).sum::<usize>() as f64 / all as f64
        };
        let ours = chosen(&own());
        let theirs = chosen(&options(false, ComputeType::Bf16));
        let exact = chosen(&options(false, ComputeType::F32));
        assert_eq!((ours.len(), theirs.len()), (tokens.len(), tokens.len()));
        let (found, rounding, own) = (share(&ours, &theirs), share(&theirs, &exact), share(&ours, &exact));
        eprintln!("of the choices in f32 libtorch makes {rounding:.4} in bf16 and own kernels {own:.4}; with each other {found:.4}");
        assert!(rounding > 0.96 && own > rounding - 0.005 && found > rounding - 0.005);
    }
}

#[test]
fn experts_with_a_cap_and_documents_in_a_row_train_as_through_libtorch() {
    if !has_gpu() {
        return;
    }
    compare_branch("quasar", |options| options.cap_experts = true);
    let last = rows(1)[150];
    for branch in ["quasar", "raven", "gla"] {
        compare_branch(branch, |options| options.document_end = Some(last));
    }
}

/// The tolerance of bf16 by layer, and that own kernels are no worse than libtorch's bf16 form.
#[test]
fn hidden_states_stay_within_the_tolerance_of_each_kind_of_layer() {
    let Some(folder) = folder() else { return };
    let tokens = rows(2);
    let routes = routes(folder, &tokens);
    let states = |options: &TrainerOptions| open(folder, options).hidden_states(&batch(&tokens), Some(&routes)).unwrap();
    let exact = states(&options(false, ComputeType::F32));
    let errors = |options: &TrainerOptions| -> Vec<f64> {
        states(options).iter().zip(&exact).map(|(state, exact)| relative_difference(state, exact)).collect()
    };
    let (errors, libtorch) = (errors(&own()), errors(&options(false, ComputeType::Bf16)));
    let kinds =
        ["embedding", "softmax attention, dense", "delta rule, experts", "slot memory, experts", "constant decay, experts, final norm"];
    assert_eq!(errors.len(), LAYER_TOLERANCE.len());
    for (n, kind) in kinds.iter().enumerate() {
        eprintln!("after {kind}: {:.2e}, libtorch's bf16 {:.2e} (tolerance {:.1e})", errors[n], libtorch[n], LAYER_TOLERANCE[n]);
    }
    for (n, kind) in kinds.iter().enumerate() {
        assert!(errors[n] <= LAYER_TOLERANCE[n] && errors[n] <= 1.3 * libtorch[n] + 1e-3, "after {kind}: {}", errors[n]);
    }
}

#[test]
fn the_doctors_proof_of_determinism_holds_on_the_gpu_in_both_forms() {
    if !has_gpu() {
        return;
    }
    for (own_kernels, compute) in [(true, ComputeType::Bf16), (false, ComputeType::Bf16), (false, ComputeType::F32)] {
        let report = quasar_model::torch::determinism::check(&options(own_kernels, compute), 3).unwrap();
        eprintln!("{report:?}");
        assert!(report.fallback.is_none());
        assert!(report.holds(), "{report:?}");
    }
}

#[test]
fn out_of_memory_says_what_is_missing_and_what_would_fit_and_changes_nothing() {
    let Some(folder) = folder() else { return };
    let options = TrainerOptions { recompute: Some(false), pass_tokens: Some(usize::MAX), ..own() };
    let (mut trainer, mut other) = (open(folder, &options), open(folder, &own()));
    trainer.step(&batch(&rows(0)), &Hyper::default(), None, false).unwrap();
    other.step(&batch(&rows(0)), &Hyper::default(), None, false).unwrap();
    let before = trainer.state().unwrap().digest();
    let many: Vec<u32> = rows(1).into_iter().cycle().take(2048 * 2048).collect();
    let error = trainer.step(&Batch { tokens: &many, rows: 2048, row_tokens: 2048 }, &Hyper::default(), None, false).unwrap_err();
    eprintln!("{error}");
    let TrainError::OutOfMemory { missing, advice, .. } = error else { panic!("{error}") };
    assert!(missing > 0);
    assert!(advice.contains("would fit: 8-bit moments") && advice.contains("rows a pass"), "{advice}");
    assert_eq!(trainer.state().unwrap().digest(), before, "a refused step changes nothing");
    trainer.step(&batch(&rows(2)), &Hyper::default(), None, false).unwrap();
    other.step(&batch(&rows(2)), &Hyper::default(), None, false).unwrap();
    assert_eq!(trainer.state().unwrap().digest(), other.state().unwrap().digest(), "it goes on as if nothing had happened");
}

#[test]
fn fragments_go_out_and_come_in_beside_the_steps_to_the_last_bit() {
    let Some(folder) = folder() else { return };
    for offload in [false, true] {
        let options = TrainerOptions { offload: Some(offload), ..own() };
        let (mut one, mut two) = (open(folder, &options), open(folder, &options));
        let mut exported: [Option<Vec<f32>>; 2] = [None, None];
        for step in 0..4 {
            let fragment = step as usize % 2;
            let before = one.export(fragment).unwrap();
            let (out, there) = (one.contribute(fragment).unwrap(), two.contribute(fragment).unwrap());
            // Looked at before the step that changes the weights by one, after it by the other.
            assert_eq!(there.values().unwrap(), before, "step {step}");
            one.step(&batch(&rows(step)), &Hyper::default(), None, false).unwrap();
            two.step(&batch(&rows(step)), &Hyper::default(), None, false).unwrap();
            assert_eq!(out.values().unwrap(), before, "step {step}");
            assert_ne!(one.export(fragment).unwrap(), before, "the step changes weights");
            exported[fragment] = Some(before);
            let other = 1 - fragment;
            let Some(exported) = exported[other].take() else { continue };
            let now = one.export(other).unwrap();
            let version: Vec<f32> = exported.iter().map(|value| value * 0.5).collect();
            one.apply(other, &version).unwrap();
            let expected: Vec<f32> = version.iter().zip(&now).zip(&exported).map(|((new, now), then)| new + (now - then)).collect();
            assert_eq!(one.export(other).unwrap(), expected, "what was trained since the export stays");
            if step == 2 {
                // A restored learner holds the exported weights in ordinary memory.
                let state = two.state().unwrap();
                two.restore(&state).unwrap();
            }
            // Brought there before, from another thread.
            let memory = two.host_memory();
            let held = std::thread::spawn(move || memory.hold(version).unwrap()).join().unwrap();
            two.receive(other, &held).unwrap();
        }
        assert_eq!(one.state().unwrap().digest(), two.state().unwrap().digest());
    }
}

#[test]
fn kernels_that_cannot_be_compiled_are_replaced_by_libtorch_and_the_trainer_says_why() {
    let Some(folder) = folder() else { return };
    let options = TrainerOptions { compiler_options: vec!["--no-such-option".into()], kernel_cache: None, ..own() };
    let mut trainer = open(folder, &options);
    let reason = trainer.fallback().expect("the compiler refused").to_owned();
    eprintln!("{reason}");
    assert!(open(folder, &own()).fallback().is_none());
    let loss = trainer.step(&batch(&rows(0)), &Hyper::default(), None, false).unwrap().loss;
    let own = open(folder, &own()).step(&batch(&rows(0)), &Hyper::default(), None, false).unwrap().loss;
    assert!((loss - own).abs() < 1e-2 * own, "{loss} {own}");
    let little = TrainerOptions { device_bytes: Some(1 << 30), ..options };
    let Err(error) = QuasarTrainer::open_with(folder, plan(folder), &little) else { panic!("it does not fit into 1 GiB") };
    let TrainError::OutOfMemory { missing, advice, .. } = error else { panic!("{error}") };
    assert!(missing > 0 && advice.contains(reason.lines().next().unwrap()), "{advice}");
}

#[test]
fn steps_are_bit_identical_with_free_and_forced_routes_and_with_recomputation_and_offload() {
    let Some(folder) = folder() else { return };
    let saving = TrainerOptions { recompute: Some(true), offload: Some(true), ..own() };
    let mut trainers = [open(folder, &own()), open(folder, &own()), open(folder, &saving)];
    for step in 0..3 {
        let tokens = rows(step);
        let [one, two, three] = &mut trainers;
        let report = one.step(&batch(&tokens), &Hyper::default(), None, true).unwrap();
        let routes = report.routes.unwrap();
        let forced = two.step(&batch(&tokens), &Hyper::default(), Some(&routes), true).unwrap();
        let again = three.step(&batch(&tokens), &Hyper::default(), None, true).unwrap();
        assert_eq!((report.loss, report.grad_norm), (forced.loss, forced.grad_norm), "forced routes, step {step}");
        assert_eq!((report.loss, report.grad_norm), (again.loss, again.grad_norm), "recomputation, step {step}");
        assert_eq!(forced.routes.unwrap(), routes);
        assert_eq!(again.routes.unwrap(), routes);
    }
    let digests = trainers.each_ref().map(|trainer| trainer.state().unwrap().digest());
    assert!(digests.iter().all(|digest| *digest == digests[0]));
}

/// With so little memory that not everything can be kept, and no word about how to save.
#[test]
fn a_learner_saves_memory_by_itself_to_the_same_bits() {
    let Some(folder) = folder() else { return };
    let config = QuasarConfig::from_dir(folder).unwrap();
    let fragments = plan(folder).fragments.len() as u64;
    let work = Work { rows: ROWS as u64, row_tokens: ROW_TOKENS as u64, fragments, by_document: false };
    let peak = |recompute, offload, rows_per_pass| {
        memory_of(&config, work, Strategy { byte_moments: true, recompute, offload, rows_per_pass }).peak_bytes
    };
    let all = ROWS as u64;
    // Enough for recomputation; and not enough for anything without the host's memory.
    let recomputing = (peak(true, false, all), Strategy { byte_moments: true, recompute: true, offload: false, rows_per_pass: all });
    let least = peak(true, false, 1) - 1;
    let recompute = peak(false, true, all) > least;
    assert!(recomputing.0 < peak(false, false, all) && peak(recompute, true, all) <= least, "whole batches can be passed through");
    let offloading = (least, Strategy { byte_moments: true, recompute, offload: true, rows_per_pass: all });
    let steps = |options: &TrainerOptions, expected: Strategy| {
        let mut trainer = open(folder, options);
        let reports: Vec<_> = (0..3)
            .map(|step| trainer.step(&batch(&rows(step)), &Hyper::default(), None, false).unwrap())
            .map(|report| (report.loss, report.grad_norm))
            .collect();
        assert_eq!(trainer.strategy(), Some(expected));
        (reports, trainer.export(0).unwrap(), trainer.state().unwrap().digest())
    };
    let kept = TrainerOptions { offload: Some(false), recompute: Some(false), ..own() };
    let kept = steps(&kept, Strategy { byte_moments: true, recompute: false, offload: false, rows_per_pass: all });
    for (device_bytes, expected) in [recomputing, offloading] {
        let options = TrainerOptions { device_bytes: Some(device_bytes), host_bytes: 1 << 40, batch: (ROWS, ROW_TOKENS), ..own() };
        assert!(options.offload.is_none() && options.recompute.is_none() && options.pass_tokens.is_none());
        assert!(steps(&options, expected) == kept, "{expected}");
    }
}

#[test]
fn groups_of_rows_add_up_to_the_gradient_of_the_whole_batch() {
    if !has_gpu() {
        return;
    }
    let folder = checkpoint(&config(2, &["quasar"]));
    let folder = folder.path();
    let tokens = rows(3);
    let zero = Hyper { lr: 0.0, ..Hyper::default() };
    let mut whole = open(folder, &own());
    let routes = whole.step(&batch(&tokens), &zero, None, true).unwrap().routes.unwrap();
    let mut groups = open(folder, &TrainerOptions { pass_tokens: Some(ROW_TOKENS), ..own() });
    let recorded = groups.step(&batch(&tokens), &zero, Some(&routes), true).unwrap().routes.unwrap();
    assert_eq!(recorded, routes, "recorded in the order of the whole batch");
    let (one, all) = whole.loss_and_gradients(&batch(&tokens), Some(&routes)).unwrap();
    let (two, parts) = groups.loss_and_gradients(&batch(&tokens), Some(&routes)).unwrap();
    assert!((one - two).abs() < 1e-3, "{one} {two}");
    for (name, gradient) in all.iter().filter(|(name, _)| !name.ends_with(".branch_output_gain")) {
        let difference = relative_difference(&parts[name], gradient);
        assert!(difference < 0.05, "{name}: {difference}");
    }
}

#[test]
fn a_restored_state_continues_bit_for_bit_with_both_kinds_of_moments() {
    let Some(folder) = folder() else { return };
    for (moments, offload) in [(MomentType::Bytes, false), (MomentType::F32, true)] {
        let options = TrainerOptions { moments, offload: Some(offload), ..own() };
        let mut one = open(folder, &options);
        let before = one.state().unwrap();
        for step in 0..2 {
            one.step(&batch(&rows(step)), &Hyper::default(), None, false).unwrap();
        }
        let bytes = one.state().unwrap().to_bytes();
        let mut two = open(folder, &options);
        assert_eq!(two.state().unwrap().digest(), before.digest(), "weights come from the checkpoint exactly");
        two.restore(&TrainerState::from_bytes(&bytes, one.plan().total_elements() as usize).unwrap()).unwrap();
        assert_eq!(one.state().unwrap().digest(), two.state().unwrap().digest(), "{moments:?}");
        one.step(&batch(&rows(5)), &Hyper::default(), None, false).unwrap();
        two.step(&batch(&rows(5)), &Hyper::default(), None, false).unwrap();
        assert_eq!(one.state().unwrap().digest(), two.state().unwrap().digest(), "{moments:?}, a step later");
    }
}

#[test]
fn a_saved_state_takes_6_bytes_a_parameter_and_continues_bit_for_bit() {
    let Some(folder) = folder() else { return };
    for (moments, offload) in [(MomentType::Bytes, false), (MomentType::Bytes, true), (MomentType::F32, true)] {
        let options = TrainerOptions { moments, offload: Some(offload), ..own() };
        let mut one = open(folder, &options);
        for step in 0..2 {
            one.step(&batch(&rows(step)), &Hyper::default(), None, false).unwrap();
        }
        let mut file = Vec::new();
        let digest = one.save(&mut file).unwrap();
        let elements = one.plan().total_elements() as usize;
        assert_eq!(file[file.len() - 32..], digest.0);
        let per_parameter = file.len() as f64 / elements as f64;
        eprintln!("{moments:?}: {per_parameter:.3} bytes a parameter");
        assert!(per_parameter < if moments == MomentType::Bytes { 6.05 } else { 12.01 });
        // What is read as numbers is what the device says.
        assert_eq!(TrainerState::from_bytes(&file, elements).unwrap().digest(), one.state().unwrap().digest());
        let mut two = open(folder, &options);
        two.load(&mut file.as_slice()).unwrap();
        let mut again = Vec::new();
        assert_eq!(two.save(&mut again).unwrap(), digest);
        let loss = one.step(&batch(&rows(5)), &Hyper::default(), None, false).unwrap().loss;
        two.step(&batch(&rows(5)), &Hyper::default(), None, false).unwrap();
        assert_eq!(one.state().unwrap().digest(), two.state().unwrap().digest(), "{moments:?}, a step later");
        // Into a learner that keeps moments otherwise.
        let other = if moments == MomentType::Bytes { MomentType::F32 } else { MomentType::Bytes };
        let mut three = open(folder, &TrainerOptions { moments: other, ..own() });
        three.load(&mut file.as_slice()).unwrap();
        assert_eq!(three.steps(), 2);
        assert_eq!(three.step(&batch(&rows(5)), &Hyper::default(), None, false).unwrap().loss, loss, "the weights are the same");
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let Some(folder) = folder() else { return };
    let mut trainer = open(folder, &own());
    trainer.step(&batch(&rows(0)), &Hyper::default(), None, false).unwrap();
    let good = trainer.state().unwrap();
    let mut bad = good.clone();
    bad.weights.iter_mut().for_each(|weight| *weight = weight.signum() * 1e30);
    trainer.restore(&bad).unwrap();
    let damaged = trainer.state().unwrap().digest();
    let error = trainer.step(&batch(&rows(1)), &Hyper::default(), None, false).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { step: 2, .. }), "{error}");
    assert_eq!(trainer.state().unwrap().digest(), damaged, "a refused step changes nothing");
    assert_eq!(trainer.steps(), 1);
    trainer.restore(&good).unwrap();
    trainer.step(&batch(&rows(1)), &Hyper::default(), None, false).unwrap();
}

#[test]
fn optimizer_steps_follow_the_published_formula() {
    let Some(folder) = folder() else { return };
    let mut trainer = open(folder, &TrainerOptions { moments: MomentType::F32, ..own() });
    let hyper = Hyper { lr: 1e-3, clip_norm: 0.5, ..Hyper::default() };
    let plan = trainer.plan().clone();
    for step in 1..=3i32 {
        let tokens = rows(step as u32);
        let before = trainer.state().unwrap();
        let (_, gradients) = trainer.loss_and_gradients(&batch(&tokens), None).unwrap();
        let report = trainer.step(&batch(&tokens), &hyper, None, false).unwrap();
        let norm = gradients.values().flatten().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        assert!((norm / report.grad_norm - 1.0).abs() < 1e-3, "{norm} {}", report.grad_norm);
        let (scale, after) = ((hyper.clip_norm / report.grad_norm).min(1.0), trainer.state().unwrap());
        let (mut at, mut worst) = (0, 0f64);
        for slice in plan.fragments.iter().flatten() {
            let gradient = gradients.get(&slice.tensor);
            for element in (slice.row_start * slice.row_elements) as usize..(slice.row_end * slice.row_elements) as usize {
                let gradient = gradient.map_or(0.0, |values| f64::from(values[element]) * scale);
                let first = hyper.beta1 * f64::from(before.first[at]) + (1.0 - hyper.beta1) * gradient;
                let second = hyper.beta2 * f64::from(before.second[at]) + (1.0 - hyper.beta2) * gradient * gradient;
                let (first, second) = (first / (1.0 - hyper.beta1.powi(step)), second / (1.0 - hyper.beta2.powi(step)));
                let moved = f64::from(after.weights[at]) - f64::from(before.weights[at]);
                worst = worst.max((moved + hyper.lr * first / (second.sqrt() + hyper.eps)).abs());
                at += 1;
            }
        }
        eprintln!("step {step}: furthest weight off by {:.1e} of the learning rate", worst / hyper.lr);
        assert!(worst < 2e-2 * hyper.lr, "step {step}: {worst}");
    }
}

#[test]
fn training_learns_alike_with_8_bit_moments_f32_moments_and_libtorch() {
    if !has_gpu() {
        return;
    }
    let folder = checkpoint(&config(4, &["quasar", "raven", "gla"]));
    let folder = folder.path();
    let hyper = Hyper { lr: 1e-3, ..Hyper::default() };
    let run = |options: &TrainerOptions| -> Vec<f64> {
        let mut trainer = open(folder, options);
        (0..60).map(|step| trainer.step(&batch(&rows(step % 4)), &hyper, None, false).unwrap().loss).collect()
    };
    let bytes = run(&own());
    let floats = run(&TrainerOptions { moments: MomentType::F32, ..own() });
    let libtorch = run(&options(false, ComputeType::Bf16));
    for at in [0, 9, 19, 39, 59] {
        eprintln!("step {at}: {:.4} 8-bit, {:.4} f32 moments, {:.4} libtorch", bytes[at], floats[at], libtorch[at]);
    }
    let mean = |losses: &[f64]| losses[40..].iter().sum::<f64>() / 20.0;
    assert!(mean(&bytes) < 0.7 * bytes[0]);
    // Noise is learnt by heart here, and the loss falls by 1 % a step: runs are apart by some steps. On text the curves of the moments lie
    // within 0.2 % of each other (`examples/gpu.rs`).
    assert!((mean(&bytes) / mean(&floats) - 1.0).abs() < 0.15);
    assert!((mean(&floats) / mean(&libtorch) - 1.0).abs() < 0.15);
}

#[test]
fn models_of_other_shapes_train_on_a_gpu_through_libtorch() {
    let Some(_) = folder() else { return };
    let small = common::small();
    let mut gpu = QuasarTrainer::open(small.path(), plan(small.path()), "cuda:0", 1).unwrap();
    let mut cpu = QuasarTrainer::open(small.path(), plan(small.path()), "cpu", 1).unwrap();
    let tokens = tokens(80, 96, 1);
    for _ in 0..3 {
        let one = gpu.step(&Batch { tokens: &tokens, rows: 2, row_tokens: 40 }, &Hyper::default(), None, false).unwrap();
        let two = cpu.step(&Batch { tokens: &tokens, rows: 2, row_tokens: 40 }, &Hyper::default(), None, false).unwrap();
        assert!((one.loss - two.loss).abs() < 1e-3, "{} {}", one.loss, two.loss);
    }
}

/// The devnet's model and batch sizes: fresh, and after training at a high rate, when attention and experts have become sharp.
#[test]
fn gradients_in_f32_on_the_gpu_are_those_of_the_processor_fresh_and_trained() {
    if !has_gpu() {
        return;
    }
    let config = QuasarConfig::from_json(include_str!("../../../configs/devnet-model.json")).unwrap();
    let folder = checkpoint(&config);
    let mut cpu = QuasarTrainer::open(folder.path(), plan(folder.path()), "cpu", 8).unwrap();
    let mut gpu = open(folder.path(), &options(false, ComputeType::F32));
    let fragments = plan(folder.path()).fragments.len();
    for trained in [0, 30, 60] {
        let steps = if trained == 0 { 0 } else { 30 };
        for seed in 0..steps {
            let tokens = rows(trained + seed);
            let hyper = Hyper { lr: 1e-2, ..Hyper::default() };
            cpu.step(&Batch { tokens: &tokens[..1_152], rows: 9, row_tokens: 128 }, &hyper, None, false).unwrap();
        }
        for fragment in 0..fragments {
            gpu.apply(fragment, &cpu.export(fragment).unwrap()).unwrap();
        }
        for rows_of_batch in [4, 9] {
            let tokens = rows(1_000 + trained);
            let batch = Batch { tokens: &tokens[..rows_of_batch * 128], rows: rows_of_batch, row_tokens: 128 };
            let zero = Hyper { lr: 0.0, ..Hyper::default() };
            let routes = cpu.step(&batch, &zero, None, true).unwrap().routes.unwrap();
            let (exact_loss, exact) = cpu.loss_and_gradients(&batch, Some(&routes)).unwrap();
            let (loss, gradients) = gpu.loss_and_gradients(&batch, Some(&routes)).unwrap();
            let mut table: Vec<(f64, &String)> =
                exact.iter().map(|(name, exact)| (relative_difference(&gradients[name], exact), name)).collect();
            table.sort_by(|a, b| b.0.total_cmp(&a.0));
            eprintln!("{trained} steps, {rows_of_batch} rows: loss {exact_loss:.6} and {loss:.6}");
            for (difference, name) in table.iter().take(4) {
                eprintln!("    {difference:.2e} {name}");
            }
            assert!((loss - exact_loss).abs() < 1e-4 * exact_loss, "{loss} against {exact_loss}");
            for (difference, name) in &table {
                assert!(*difference < 3e-3 || name.ends_with(".branch_output_gain"), "{name}: {difference}");
            }
        }
    }
}
