//! The trainer as a whole: determinism, forced routes, fragments, state, guards, evaluation of files.
#![cfg(feature = "libtorch")]

mod common;

use common::{data, fresh, plan, small, tokens, trainer};
use fragments::CheckpointTree;
use protocol::DType;
use quasar_model::{
    Batch, Evaluator, EvaluatorOptions, Hyper, QuasarConfig, QuasarEvaluator, QuasarTrainer, Routes, TrainError, Trainer, TrainerOptions,
    TrainerState, checkpoint_loss,
};

const ROWS: usize = 4;
const ROW_TOKENS: usize = 40;

fn rows(seed: u32) -> Vec<u32> {
    tokens(ROWS * ROW_TOKENS, 96, seed)
}

fn batch(tokens: &[u32]) -> Batch<'_> {
    Batch { tokens, rows: ROWS, row_tokens: ROW_TOKENS }
}

fn bits(state: &TrainerState) -> Vec<u32> {
    [&state.weights, &state.first, &state.second].into_iter().flatten().map(|value| value.to_bits()).collect()
}

#[test]
fn two_trainers_from_the_same_state_take_bit_identical_steps_with_free_and_forced_routes() {
    let folder = fresh(1);
    let (mut one, mut two, mut forced) = (trainer(folder.path()), trainer(folder.path()), trainer(folder.path()));
    for step in 0..3 {
        let tokens = rows(step);
        let report = one.step(&batch(&tokens), &Hyper::default(), None, true).unwrap();
        let other = two.step(&batch(&tokens), &Hyper::default(), None, false).unwrap();
        let routes = report.routes.unwrap();
        let again = forced.step(&batch(&tokens), &Hyper::default(), Some(&routes), true).unwrap();
        assert_eq!((report.loss, report.grad_norm), (other.loss, other.grad_norm));
        assert_eq!((report.loss, report.grad_norm), (again.loss, again.grad_norm));
        assert!(other.routes.is_none());
        assert_eq!(again.routes.unwrap(), routes);
        assert_eq!(report.tokens, (ROWS * ROW_TOKENS) as u64);
    }
    let state = one.state().unwrap();
    assert_eq!(state.step, 3);
    assert_eq!(bits(&state), bits(&two.state().unwrap()));
    assert_eq!(bits(&state), bits(&forced.state().unwrap()));
    assert_eq!(state.digest(), forced.state().unwrap().digest());
}

#[test]
fn forced_routes_change_the_loss_and_wrong_ones_are_refused() {
    let folder = small();
    let mut trainer = trainer(folder.path());
    let tokens = rows(1);
    let free = trainer.loss_and_gradients(&batch(&tokens), None).unwrap().0;
    let per_step = 4 * ROWS * ROW_TOKENS * 3;
    let other = Routes((0..per_step).map(|n| (n % 8) as u16).collect());
    assert_ne!(trainer.loss_and_gradients(&batch(&tokens), Some(&other)).unwrap().0, free);
    for wrong in [Routes(vec![0; per_step - 1]), Routes(vec![8; per_step]), Routes(vec![])] {
        assert!(matches!(trainer.step(&batch(&tokens), &Hyper::default(), Some(&wrong), false), Err(TrainError::Routes(_))));
    }
    assert_eq!(trainer.steps(), 0);
}

#[test]
fn the_loss_of_a_fresh_model_starts_at_chance_and_falls() {
    let folder = fresh(3);
    let mut trainer = trainer(folder.path());
    let tokens = rows(0);
    let first = trainer.step(&batch(&tokens), &Hyper::default(), None, false).unwrap();
    assert!((first.loss - 96f64.ln()).abs() < 0.2, "{}", first.loss);
    let mut last = first.loss;
    for _ in 0..40 {
        last = trainer.step(&batch(&tokens), &Hyper::default(), None, false).unwrap().loss;
    }
    assert!(last < first.loss - 1.5, "{} -> {last}", first.loss);
}

#[test]
fn every_tensor_with_a_gradient_moves_and_the_others_stay() {
    let folder = fresh(4);
    let mut trainer = trainer(folder.path());
    let before = trainer.state().unwrap();
    for step in 0..4 {
        // Weight decay too: it must not touch frozen tensors.
        trainer.step(&batch(&rows(step)), &Hyper { weight_decay: 0.1, ..Hyper::default() }, None, false).unwrap();
    }
    let after = trainer.state().unwrap();
    let mut at = 0;
    for slice in trainer.plan().fragments.iter().flatten() {
        let range = at..at + slice.elements() as usize;
        at = range.end;
        let moved = before.weights[range.clone()] != after.weights[range];
        // branch_output_gain divides out: its gradient is zero.
        let frozen =
            ["f_proj.weight", "mix_logits", "mix_logit", "quasar_attention.A_log", "quasar_attention.dt_bias", ".branch_output_gain"];
        let frozen = frozen.iter().any(|end| slice.tensor.ends_with(end));
        assert_eq!(moved, !frozen, "{}", slice.tensor);
    }
}

#[test]
fn a_restored_state_continues_bit_for_bit() {
    let folder = fresh(5);
    let mut one = trainer(folder.path());
    one.step(&batch(&rows(1)), &Hyper::default(), None, false).unwrap();
    let bytes = one.state().unwrap().to_bytes();
    // Another plan over the same model would order the state otherwise; the same plan must be used.
    let mut two = trainer(fresh(6).path());
    two.restore(&TrainerState::from_bytes(&bytes, one.plan().total_elements() as usize).unwrap()).unwrap();
    assert_eq!(two.steps(), 1);
    one.step(&batch(&rows(2)), &Hyper::default(), None, false).unwrap();
    two.step(&batch(&rows(2)), &Hyper::default(), None, false).unwrap();
    assert_eq!(bits(&one.state().unwrap()), bits(&two.state().unwrap()));
    assert!(two.restore(&TrainerState { weights: vec![0.0; 3], ..TrainerState::default() }).is_err());
    assert_eq!(bits(&one.state().unwrap()), bits(&two.state().unwrap()), "a refused state changes nothing");
}

#[test]
fn a_learner_keeps_what_it_trained_since_it_contributed() {
    let mut one = trainer(fresh(9).path());
    let exported = one.contribute(0).unwrap().values().unwrap().to_vec();
    one.step(&batch(&rows(1)), &Hyper::default(), None, false).unwrap();
    let state = one.state().unwrap();
    assert_eq!(state.exported, [(0, exported.clone())]);
    let mut two = trainer(fresh(10).path());
    two.restore(&TrainerState::from_bytes(&state.to_bytes(), one.plan().total_elements() as usize).unwrap()).unwrap();
    let version: Vec<f32> = exported.iter().map(|value| value * 0.5).collect();
    let trained = one.export(0).unwrap();
    for learner in [&mut one, &mut two] {
        Trainer::apply(learner, 0, &version).unwrap();
        let expected: Vec<f32> = version.iter().zip(&trained).zip(&exported).map(|((new, now), then)| new + (now - then)).collect();
        assert_eq!(learner.export(0).unwrap(), expected);
        Trainer::apply(learner, 0, &version).unwrap();
        assert_eq!(learner.export(0).unwrap(), version, "the next version without a contribution is taken as it is");
    }
    for exported in [vec![(0, vec![0.0; 3])], vec![(99, vec![0.0; 3])]] {
        assert!(two.restore(&TrainerState { exported, ..state.clone() }).is_err());
    }
    assert_eq!(one.state().unwrap(), two.state().unwrap());
}

#[test]
fn fragments_carry_weights_but_not_moments_and_equal_the_checkpoint() {
    let folder = fresh(7);
    let tree = fragments::CheckpointTree::open(folder.path()).unwrap();
    let (mut one, mut two) = (trainer(folder.path()), trainer(fresh(8).path()));
    for fragment in 0..one.plan().fragments.len() {
        assert_eq!(one.export(fragment).unwrap(), tree.read_fragment(one.plan(), fragment).unwrap());
    }
    two.step(&batch(&rows(1)), &Hyper::default(), None, false).unwrap();
    let moments = two.state().unwrap().first;
    for fragment in 0..one.plan().fragments.len() {
        Trainer::apply(&mut two, fragment, &one.export(fragment).unwrap()).unwrap();
    }
    let (one_state, two_state) = (one.state().unwrap(), two.state().unwrap());
    assert_eq!(one_state.weights, two_state.weights);
    assert_eq!(two_state.first, moments);
    assert!(matches!(Trainer::apply(&mut one, 0, &[1.0]), Err(TrainError::FragmentLength { fragment: 0, .. })));
    let poisoned = vec![f32::INFINITY; one.plan().elements(1) as usize];
    assert!(matches!(Trainer::apply(&mut one, 1, &poisoned), Err(TrainError::FragmentNotFinite { fragment: 1 })));
    assert!(matches!(one.export(99), Err(TrainError::NoFragment { fragment: 99, .. })));
    assert_eq!(one.state().unwrap(), one_state);
}

#[test]
fn a_step_that_is_not_finite_is_refused_and_leaves_the_state_alone() {
    let folder = fresh(9);
    let mut trainer = trainer(folder.path());
    trainer.step(&batch(&rows(1)), &Hyper::default(), None, false).unwrap();
    // Finite weights whose logits overflow.
    for fragment in 0..trainer.plan().fragments.len() {
        let huge = vec![1e30; trainer.plan().elements(fragment) as usize];
        Trainer::apply(&mut trainer, fragment, &huge).unwrap();
    }
    let before = trainer.state().unwrap();
    let error = trainer.step(&batch(&rows(2)), &Hyper::default(), None, false).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { step: 2, .. }), "{error}");
    assert_eq!(bits(&trainer.state().unwrap()), bits(&before));
    assert_eq!(trainer.steps(), 1);
}

#[test]
fn clipping_bounds_the_gradient_but_reports_its_true_norm() {
    let folder = small();
    let (mut free, mut clipped) = (trainer(folder.path()), trainer(folder.path()));
    let tokens = rows(1);
    let one = free.step(&batch(&tokens), &Hyper { clip_norm: f64::INFINITY, ..Hyper::default() }, None, false).unwrap();
    let two = clipped.step(&batch(&tokens), &Hyper { clip_norm: 0.01, ..Hyper::default() }, None, false).unwrap();
    assert_eq!(one.grad_norm, two.grad_norm);
    let norm = |trainer: &QuasarTrainer| trainer.state().unwrap().first.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    assert!((norm(&free) - 0.1 * one.grad_norm).abs() < 1e-4 * one.grad_norm);
    assert!((norm(&clipped) - 0.1 * 0.01).abs() < 1e-6);
}

#[test]
fn batches_that_are_no_batches_are_refused() {
    let folder = fresh(10);
    let mut trainer = trainer(folder.path());
    let step = |trainer: &mut QuasarTrainer, tokens: &[u32], rows, row_tokens| {
        trainer.step(&Batch { tokens, rows, row_tokens }, &Hyper::default(), None, false).unwrap_err()
    };
    assert!(matches!(step(&mut trainer, &[1, 2, 96, 3], 1, 4), TrainError::Token { token: 96, vocabulary: 96 }));
    assert!(matches!(step(&mut trainer, &[1, 2, 3], 2, 2), TrainError::Batch(_)));
    assert!(matches!(step(&mut trainer, &[], 0, 4), TrainError::Batch(_)));
    assert!(matches!(step(&mut trainer, &[1, 2], 2, 1), TrainError::Batch(_)));
    let tokens = rows(1);
    let unsound = Hyper { lr: f64::NAN, ..Hyper::default() };
    assert!(trainer.step(&batch(&tokens), &unsound, None, false).is_err());
    assert_eq!(trainer.steps(), 0);
}

#[test]
fn an_evaluator_with_the_trainers_fragments_measures_the_trainers_loss() {
    let folder = fresh(11);
    let mut trainer = trainer(folder.path());
    for step in 0..5 {
        trainer.step(&batch(&rows(step)), &Hyper::default(), None, false).unwrap();
    }
    let mut evaluator = QuasarEvaluator::open(fresh(12).path(), &plan(folder.path(), 5), "cpu", 1).unwrap();
    for fragment in 0..trainer.plan().fragments.len() {
        Evaluator::apply(&mut evaluator, fragment, &trainer.export(fragment).unwrap()).unwrap();
    }
    let tokens = rows(9);
    let losses = evaluator.losses(&batch(&tokens)).unwrap();
    let loss = trainer.loss_and_gradients(&batch(&tokens), None).unwrap().0;
    assert_eq!(losses.len(), ROWS);
    assert!((losses.iter().sum::<f64>() / ROWS as f64 - loss).abs() < 1e-5);
    let alone = evaluator.losses(&Batch { tokens: &tokens[..ROW_TOKENS], rows: 1, row_tokens: ROW_TOKENS }).unwrap();
    assert!((alone[0] - losses[0]).abs() < 1e-5, "rows do not see each other");
}

#[test]
fn the_loss_of_a_checkpoint_on_a_file_is_the_mean_over_its_whole_rows() {
    let folder = small();
    let tokens = tokens(21 * 30 + 7, 96, 1);
    let file = folder.path().join("tokens.bin");
    std::fs::write(&file, tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    let options = EvaluatorOptions::default();
    let all = checkpoint_loss(folder.path(), &file, 30, &options, None).unwrap();
    assert_eq!((all.rows, all.tokens), (21, 630));
    let mut evaluator = QuasarEvaluator::open_with(folder.path(), None, &options).unwrap();
    let rows = evaluator.losses(&Batch { tokens: &tokens[..630], rows: 21, row_tokens: 30 }).unwrap();
    assert!((all.loss - rows.iter().sum::<f64>() / 21.0).abs() < 1e-5);
    let some = checkpoint_loss(folder.path(), &file, 30, &options, Some(4)).unwrap();
    assert!((some.loss - rows[..4].iter().sum::<f64>() / 4.0).abs() < 1e-5 && some.rows == 4);
    for (length, rows) in [(1, None), (1000, None), (30, Some(0))] {
        assert!(checkpoint_loss(folder.path(), &file, length, &options, rows).is_err());
    }
    std::fs::write(&file, [1, 2, 3]).unwrap();
    assert!(checkpoint_loss(folder.path(), &file, 30, &options, None).is_err());
    assert!(checkpoint_loss(folder.path(), &folder.path().join("absent"), 30, &options, None).is_err());
}

#[test]
fn checkpoints_that_do_not_fit_the_configuration_are_refused() {
    let refused = |change: &dyn Fn(&std::path::Path)| {
        let folder = small();
        change(folder.path());
        QuasarEvaluator::open_with(folder.path(), None, &EvaluatorOptions::default()).err().expect("accepted").to_string()
    };
    let config = |from: &'static str, to: &'static str| {
        move |folder: &std::path::Path| {
            let text = std::fs::read_to_string(data("small_config.json")).unwrap();
            assert!(text.contains(from));
            std::fs::write(folder.join("config.json"), text.replace(from, to)).unwrap();
        }
    };
    let shape = refused(&config("\"vocab_size\": 96", "\"vocab_size\": 97"));
    assert!(shape.contains("model.word_embeddings.weight") && shape.contains("hint:"), "{shape}");
    let missing = refused(&config("\"num_hidden_layers\": 5", "\"num_hidden_layers\": 6"));
    assert!(missing.contains("missing"), "{missing}");
    let extra = refused(&config("\"hybrid_attention_layers\": [1, 2, 3, 4]", "\"hybrid_attention_layers\": [1, 2, 3]"));
    assert!(extra.contains("model.layers.4"), "{extra}");
    let off = refused(&config("\"num_loops\": 1", "\"num_loops\": 1, \"use_looped_injection\": true"));
    assert!(off.contains("use_looped_injection"), "{off}");
    refused(&|folder| std::fs::remove_file(folder.join("model.safetensors")).unwrap());
    refused(&|folder| std::fs::write(folder.join("model.safetensors"), [0xff; 64]).unwrap());
    let not_finite = refused(&|folder| {
        let path = folder.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
    });
    assert!(not_finite.contains("finite"), "{not_finite}");
}

#[test]
fn unknown_devices_are_refused_with_a_hint() {
    let folder = small();
    for device in ["tpu", "cuda:x", "cuda:99", ""] {
        let error = QuasarTrainer::open(folder.path(), plan(folder.path(), 2), device, 1).err().expect(device).to_string();
        assert!(error.contains("hint:"), "{error}");
    }
    let foreign = quasar_model::toy_plan(2);
    assert!(matches!(QuasarTrainer::open(folder.path(), foreign, "cpu", 1), Err(TrainError::Plan(_))));
}

#[test]
fn running_the_layers_twice_needs_routes_for_both_passes() {
    let folder = small();
    let text = std::fs::read_to_string(data("small_config.json")).unwrap();
    std::fs::write(folder.path().join("config.json"), text.replace("\"num_loops\": 1", "\"num_loops\": 2")).unwrap();
    let mut trainer = trainer(folder.path());
    let tokens = rows(1);
    let report = trainer.step(&batch(&tokens), &Hyper::default(), None, true).unwrap();
    assert_eq!(report.routes.unwrap().0.len(), 2 * 4 * ROWS * ROW_TOKENS * 3);
}

/// Rows and columns exchanged.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// Experts one by one as in older checkpoints, in two shards with an index, constants left out: the same model.
#[test]
fn older_checkpoints_with_single_experts_in_shards_are_the_same_model() {
    use safetensors::tensor::{Dtype, TensorView};

    let folder = small();
    let config = QuasarConfig::from_dir(folder.path()).unwrap();
    let (hidden, width) = (config.hidden_size, config.moe_intermediate_size);
    let old = tempfile::tempdir().unwrap();
    std::fs::copy(folder.path().join("config.json"), old.path().join("config.json")).unwrap();
    let values = common::read(&folder.path().join("model.safetensors"));
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut add = |name: String, shape: Vec<usize>, values: &[f32]| {
        tensors.push((name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect()));
    };
    for tensor in config.tensors() {
        let values = &values[&tensor.name];
        let shape: Vec<usize> = tensor.shape.iter().map(|n| *n as usize).collect();
        let Some(prefix) = tensor.name.strip_suffix("experts_w12").or_else(|| tensor.name.strip_suffix("experts_w3")) else {
            if !tensor.name.ends_with("slope") && !tensor.name.ends_with("inv_freq") {
                add(tensor.name.clone(), shape, values);
            }
            continue;
        };
        for (expert, matrix) in values.chunks_exact(shape[1] * shape[2]).enumerate() {
            let name = |part: &str| format!("{prefix}experts.{expert}.{part}_proj.weight");
            let turned = transposed(matrix, shape[1], shape[2]);
            if tensor.name.ends_with("w12") {
                add(name("gate"), vec![width, hidden], &turned[..width * hidden]);
                add(name("up"), vec![width, hidden], &turned[width * hidden..]);
            } else {
                add(name("down"), vec![hidden, width], &turned);
            }
        }
    }
    let mut weight_map = serde_json::Map::new();
    for (number, shard) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let file = format!("model-{number}.safetensors");
        let views = shard.iter().map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &old.path().join(&file)).unwrap();
        weight_map.extend(shard.iter().map(|(name, ..)| (name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({ "weight_map": weight_map }).to_string();
    std::fs::write(old.path().join("model.safetensors.index.json"), index).unwrap();

    let tokens = rows(2);
    let losses = |folder: &std::path::Path| {
        let mut evaluator = QuasarEvaluator::open_with(folder, None, &EvaluatorOptions::default())?;
        Ok::<_, TrainError>(evaluator.losses(&batch(&tokens)).unwrap())
    };
    let (new, same) = (losses(folder.path()).unwrap(), losses(old.path()).unwrap());
    for (one, two) in new.iter().zip(&same) {
        assert!((one - two).abs() < 1e-6, "{one} {two}");
    }
    // Runs want the released model's tensors: written anew, they are those of the tree that the experts came from, bit for bit.
    let anew = folder.path().join("anew");
    std::fs::write(old.path().join("tokenizer.json"), "{}").unwrap();
    quasar_model::convert(old.path(), None, &anew).unwrap();
    assert!(anew.join("tokenizer.json").exists(), "what belongs to a checkpoint comes along");
    assert_eq!(common::read(&anew.join("model.safetensors")), values);
    let of = |folder: &std::path::Path| CheckpointTree::open(folder).unwrap().contract().clone();
    assert_eq!(of(&anew), of(folder.path()));
    trainer(&anew).step(&batch(&tokens), &Hyper::default(), None, false).unwrap();
    let refused = quasar_model::convert(old.path(), None, &anew).unwrap_err().to_string();
    assert!(refused.contains("is not empty"), "{refused}");
    let narrow = folder.path().join("narrow");
    quasar_model::convert(old.path(), Some(DType::Bf16), &narrow).unwrap();
    assert!(of(&narrow).tensors.iter().all(|tensor| tensor.dtype == DType::Bf16));
    // An expert that is missing is named.
    let index = index_without(&old.path().join("model.safetensors.index.json"), "model.layers.1.mlp.experts.3.down_proj.weight");
    std::fs::write(old.path().join("model.safetensors.index.json"), index).unwrap();
    assert!(losses(old.path()).unwrap_err().to_string().contains("experts.3.down_proj"));
}

fn overwrite(path: &std::path::Path, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

#[test]
fn a_checkpoint_with_a_value_that_is_not_finite_is_not_converted() {
    let folder = small();
    let path = folder.path().join("model.safetensors");
    let last = std::fs::metadata(&path).unwrap().len() - 4;
    overwrite(&path, last, &f32::NAN.to_le_bytes());
    let out = folder.path().join("out");
    let refused = quasar_model::convert(folder.path(), None, &out).unwrap_err().to_string();
    assert!(refused.contains("finite"), "{refused}");
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0, "nothing of it is left");

    // A value that the element type does not hold.
    overwrite(&path, last, &1e6f32.to_le_bytes());
    let refused = quasar_model::convert(folder.path(), Some(DType::F16), &out).unwrap_err().to_string();
    assert!(refused.contains("holds 1000000, which F16 cannot\nhint: "), "{refused}");
    quasar_model::convert(folder.path(), Some(DType::Bf16), &out).unwrap();
    assert_eq!(CheckpointTree::open(&out).unwrap().contract().tensors[0].dtype, DType::Bf16);
}

fn index_without(path: &std::path::Path, name: &str) -> String {
    let mut index: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    index["weight_map"].as_object_mut().unwrap().remove(name).unwrap();
    index.to_string()
}

#[test]
fn experts_drop_tokens_only_if_asked_to_and_only_beyond_their_capacity() {
    // All tokens to the same three of eight experts: 160 assignments each, of which 128 fit.
    let folder = small();
    let tokens = rows(1);
    let all = Routes((0..4 * ROWS * ROW_TOKENS).flat_map(|_| [0, 1, 2]).collect());
    let even = Routes((0..4 * ROWS * ROW_TOKENS).flat_map(|n| [0, 3, 6].map(|k| ((n + k) % 8) as u16)).collect());
    let config = QuasarConfig::from_dir(folder.path()).unwrap();
    assert_eq!(config.expert_capacity(ROWS * ROW_TOKENS), 128);
    assert_eq!(QuasarConfig::released().unwrap().expert_capacity(16_384), 1024);
    let capped = TrainerOptions { cap_experts: true, ..TrainerOptions::default() };
    let run = |options: &TrainerOptions, routes: &Routes| {
        common::trainer_with(folder.path(), options).loss_and_gradients(&batch(&tokens), Some(routes)).unwrap()
    };
    let (free, limited) = (run(&TrainerOptions::default(), &all), run(&capped, &all));
    assert_ne!(free.0, limited.0);
    assert_eq!(run(&TrainerOptions::default(), &even), run(&capped, &even), "nothing is beyond the capacity");
    // The last tokens in order are dropped: what they would have given the experts is missing, the first ones' is there.
    let gradient = |result: &(f64, std::collections::BTreeMap<String, Vec<f32>>)| result.1["model.layers.4.mlp.experts_w3"].clone();
    assert!(common::relative_difference(&gradient(&limited), &gradient(&free)) > 0.05);
}

#[test]
fn documents_in_a_row_are_trained_as_if_each_had_a_row_of_its_own() {
    let folder = small();
    let packed = TrainerOptions { document_end: Some(2), ..TrainerOptions::default() };
    // One row of three documents of 10, 13 and 17 tokens, each ending with token 2.
    let mut row: Vec<u32> = tokens(40, 96, 3).iter().map(|token| if *token == 2 { 5 } else { *token }).collect();
    let bounds = [0, 10, 23, 40];
    bounds[1..].iter().for_each(|at| row[*at - 1] = 2);
    let alone = |from: usize, to: usize| {
        let batch = Batch { tokens: &row[from..to], rows: 1, row_tokens: to - from };
        trainer(folder.path()).loss_and_gradients(&batch, None).unwrap()
    };
    let batch = Batch { tokens: &row, rows: 1, row_tokens: 40 };
    let mut learner = common::trainer_with(folder.path(), &packed);
    let (loss, gradients) = learner.loss_and_gradients(&batch, None).unwrap();
    let parts: Vec<_> = bounds.windows(2).map(|pair| (f64::from((pair[1] - pair[0] - 1) as u32) / 37.0, alone(pair[0], pair[1]))).collect();
    let expected: f64 = parts.iter().map(|(weight, part)| weight * part.0).sum();
    assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
    for name in ["lm_head.weight", "model.layers.1.attention.quasar_attention.q_proj.weight", "model.layers.2.mlp.experts_w12"] {
        let count = gradients[name].len();
        let sum: Vec<f32> = (0..count).map(|n| parts.iter().map(|(weight, part)| *weight as f32 * part.1[name][n]).sum()).collect();
        let difference = common::relative_difference(&gradients[name], &sum);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
    assert!((trainer(folder.path()).loss_and_gradients(&batch, None).unwrap().0 - loss).abs() > 1e-4, "one sequence is something else");
    // Recorded routes are those of the whole row, and force the same step.
    let zero = Hyper { lr: 0.0, ..Hyper::default() };
    let routes = learner.step(&batch, &zero, None, true).unwrap().routes.unwrap();
    let again = learner.step(&batch, &zero, Some(&routes), true).unwrap();
    assert_eq!((again.loss, again.routes.unwrap()), (learner.step(&batch, &zero, None, true).unwrap().loss, routes));
}

#[test]
fn a_saved_state_is_the_state_piece_by_piece() {
    let mut one = trainer(fresh(9).path());
    one.contribute(1).unwrap();
    one.step(&batch(&rows(1)), &Hyper::default(), None, false).unwrap();
    let elements = one.plan().total_elements() as usize;
    let mut file = Vec::new();
    let digest = one.save(&mut file).unwrap();
    assert_eq!(file[file.len() - 32..], digest.0);
    quasar_model::check_state(&mut file.as_slice(), elements).unwrap();
    assert_eq!(bits(&TrainerState::from_bytes(&file, elements).unwrap()), bits(&one.state().unwrap()));
    let mut two = trainer(fresh(10).path());
    two.load(&mut file.as_slice()).unwrap();
    let state = TrainerState { exported: Vec::new(), ..one.state().unwrap() };
    assert_eq!(bits(&two.state().unwrap()), bits(&state), "nothing counts as exported");
    // The dense form, which other trainers write, is read as well.
    two = trainer(fresh(11).path());
    two.load(&mut state.to_bytes().as_slice()).unwrap();
    assert_eq!(bits(&two.state().unwrap()), bits(&state));
    assert!(two.load(&mut &file[..file.len() - 1]).is_err());
}
