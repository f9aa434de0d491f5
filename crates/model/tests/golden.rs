//! The forward pass and its gradients against vectors of the executable specification.
//!
//! `tests/data/small_*`: a model of all branches with random weights, sequence length 150 (several chunks, the last one
//! short; the NoPE cut inside; the pad token occurs; step sizes below saturation), gradients computed in f64. Where the shared
//! golden vectors of the published code are at hand, they are compared as well.
#![cfg(feature = "libtorch")]

mod common;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use common::{data, largest_difference, plan, read, relative_difference, tree};
use quasar_model::{Batch, EvaluatorOptions, QuasarEvaluator, TrainerOptions};

struct Vectors {
    folder: tempfile::TempDir,
    io: HashMap<String, Vec<f32>>,
    gradients: HashMap<String, Vec<f32>>,
    tokens: Vec<u32>,
    rows: usize,
}

impl Vectors {
    fn read(config: &Path, weights: &Path, io: &Path, gradients: &Path, rows: usize) -> Self {
        let io = read(io);
        let tokens = io["input_ids"].iter().map(|id| *id as u32).collect();
        Self { folder: tree(config, weights), io, gradients: read(gradients), tokens, rows }
    }

    fn small() -> Self {
        Self::read(
            &data("small_config.json"),
            &data("small_model.safetensors"),
            &data("small_io.safetensors"),
            &data("small_grads.safetensors"),
            2,
        )
    }

    /// The published model's vectors, too large to be kept here.
    fn published() -> Option<Self> {
        let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "..", "..", "shared", "golden"].iter().collect();
        if !folder.is_dir() {
            eprintln!("{} does not exist: the published vectors are not compared", folder.display());
            return None;
        }
        let file = |name: &str| folder.join(name);
        Some(Self::read(
            &file("golden_config.json"),
            &file("golden_model.safetensors"),
            &file("golden_io.safetensors"),
            &file("golden_grads.safetensors"),
            2,
        ))
    }

    fn batch(&self) -> Batch<'_> {
        Batch { tokens: &self.tokens, rows: self.rows, row_tokens: self.tokens.len() / self.rows }
    }

    fn check_forward(&self) {
        let mut evaluator = QuasarEvaluator::open_with(self.folder.path(), None, &EvaluatorOptions::default()).unwrap();
        let trace = evaluator.trace(&self.batch()).unwrap();
        for (n, hidden) in trace.hidden.iter().enumerate() {
            let difference = largest_difference(hidden, &self.io[&format!("hidden.{n}")]);
            eprintln!("hidden.{n} {difference:.2e}");
            assert!(difference < 1e-4, "hidden.{n}: {difference}");
        }
        assert!(!self.io.contains_key(&format!("hidden.{}", trace.hidden.len())));
        let difference = largest_difference(&trace.logits, &self.io["logits"]);
        eprintln!("logits {difference:.2e}");
        assert!(difference < 1e-4, "logits: {difference}");
        let losses = quasar_model::Evaluator::losses(&mut evaluator, &self.batch()).unwrap();
        let loss = losses.iter().sum::<f64>() / losses.len() as f64;
        assert!((loss - f64::from(self.io["loss"][0])).abs() < 1e-5, "loss {loss}");
    }

    fn check_gradients(&self, tolerance: f64, without: usize) {
        let options = TrainerOptions { train_step_sizes: true, ..TrainerOptions::default() };
        let mut trainer = common::trainer_with(self.folder.path(), &options);
        let (loss, ours) = trainer.loss_and_gradients(&self.batch(), None).unwrap();
        assert!((loss - f64::from(self.io["loss"][0])).abs() < 1e-5, "loss {loss}");
        let mut worst = (0.0, "");
        for (name, theirs) in &self.gradients {
            let ours = &ours[name];
            if name.ends_with(".branch_output_gain") {
                // It divides out: zero here, rounding noise there.
                assert!(ours[0] == 0.0 && theirs[0].abs() < 1e-6, "{name}: {ours:?} {theirs:?}");
                continue;
            }
            let difference = relative_difference(ours, theirs);
            assert!(difference <= tolerance, "{name}: {difference}");
            worst = if difference > worst.0 { (difference, name) } else { worst };
        }
        eprintln!("gradients: worst relative difference {:.2e} ({})", worst.0, worst.1);
        assert_eq!(ours.len(), self.gradients.len());
        let plan = plan(self.folder.path(), 1);
        let parameters: BTreeSet<&String> = plan.fragments[0].iter().map(|slice| &slice.tensor).collect();
        assert_eq!(parameters.len() - ours.len(), without);
    }
}

#[test]
fn hidden_states_logits_and_loss_equal_the_specification() {
    Vectors::small().check_forward();
}

#[test]
fn gradients_equal_the_specification_in_f64() {
    Vectors::small().check_gradients(1e-4, 10);
}

#[test]
fn hidden_states_logits_and_loss_equal_the_published_code() {
    Vectors::published().iter().for_each(Vectors::check_forward);
}

#[test]
fn gradients_equal_the_shared_golden_ones() {
    if let Some(vectors) = Vectors::published() {
        vectors.check_gradients(3e-3, 13);
    }
}

#[test]
fn step_size_parameters_are_frozen_unless_asked_for() {
    let vectors = Vectors::small();
    let (_, gradients) = common::trainer(vectors.folder.path()).loss_and_gradients(&vectors.batch(), None).unwrap();
    assert_eq!(gradients.len(), vectors.gradients.len() - 4, "A_log and dt_bias of two Quasar layers");
    assert!(gradients.keys().all(|name| !name.contains("quasar_attention.A_log") && !name.contains("quasar_attention.dt_bias")));
    assert!(gradients.contains_key("model.layers.2.attention.raven_attention.A_log"));
}

#[test]
fn the_pad_token_gets_no_gradient_as_an_input() {
    let vectors = Vectors::small();
    assert!(vectors.tokens.contains(&3));
    let (_, gradients) = common::trainer(vectors.folder.path()).loss_and_gradients(&vectors.batch(), None).unwrap();
    let embedding = &gradients["model.word_embeddings.weight"];
    assert!(embedding[3 * 32..4 * 32].iter().all(|value| *value == 0.0));
    assert!(gradients["lm_head.weight"][3 * 32..4 * 32].iter().any(|value| *value != 0.0));
}
