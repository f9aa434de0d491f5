//! Measurements on a GPU:
//!
//! ```text
//! gpu TORCH_FOLDER bench LAYERS BATCH SEQUENCE STEPS [recompute] [offload] [f32] [cache=FOLDER]
//! gpu TORCH_FOLDER moments TEXT_FILE STEPS        loss on real text (bytes as tokens) with 8-bit and with f32 moments
//! ```

use std::path::{Path, PathBuf};

use protocol::DType;
use quasar_model::torch::bench::{BenchOptions, bench};
use quasar_model::{Batch, Hyper, MomentType, QuasarConfig, QuasarTrainer, Trainer, TrainerOptions};

const USAGE: &str = "usage: gpu TORCH_FOLDER bench LAYERS BATCH SEQUENCE STEPS [recompute] [offload] [f32] [cache=FOLDER]\n       gpu TORCH_FOLDER moments TEXT_FILE STEPS";
/// Shape of a batch of text.
const ROWS: usize = 8;
const ROW_TOKENS: usize = 512;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [torch, command, rest @ ..] = &arguments[..] else { return Err(USAGE.into()) };
    quasar_model::load_cuda(Path::new(torch))?;
    match (command.as_str(), rest) {
        ("bench", [layers, batch, sequence, steps, rest @ ..]) => {
            let has = |word: &str| rest.iter().any(|other| other == word);
            let trainer = TrainerOptions {
                device: "cuda:0".into(),
                recompute: Some(has("recompute")),
                offload: Some(has("offload")),
                moments: if has("f32") { MomentType::F32 } else { MomentType::Bytes },
                kernel_cache: rest.iter().find_map(|word| word.strip_prefix("cache=")).map(PathBuf::from),
                ..TrainerOptions::default()
            };
            let (layers, batch) = (layers.parse()?, batch.parse()?);
            let options = BenchOptions { layers, batch, sequence_length: sequence.parse()?, steps: steps.parse()?, trainer };
            println!("{}", serde_json::to_string(&bench(&options)?)?);
            Ok(())
        }
        ("moments", [text, steps]) => moments(Path::new(text), steps.parse()?),
        _ => Err(USAGE.into()),
    }
}

/// Trains the same small model on the same text twice.
fn moments(text: &Path, steps: usize) -> Result<(), Box<dyn std::error::Error>> {
    let text = std::fs::read(text)?;
    let mut keys: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&QuasarConfig::preview(4)?.to_json())?;
    for (key, value) in [
        ("vocab_size", 256),
        ("pad_token_id", 0),
        ("intermediate_size", 2048),
        ("num_experts", 32),
        ("num_experts_per_tok", 4),
        ("moe_intermediate_size", 256),
        ("moe_shared_expert_intermediate_size", 256),
    ] {
        keys.insert(key.into(), value.into());
    }
    keys.insert("hybrid_layerwise_cycle".into(), ["quasar", "raven", "gla"].as_slice().into());
    let folder = tempfile::tempdir()?;
    quasar_model::init::fresh(&QuasarConfig::from_json(&serde_json::Value::Object(keys).to_string())?, 1, DType::F32, folder.path())?;
    let plan = fragments::plan(fragments::CheckpointTree::open(folder.path())?.contract(), 4)?;
    let mut curves = Vec::new();
    for moments in [MomentType::Bytes, MomentType::F32] {
        let options = TrainerOptions { device: "cuda:0".into(), moments, ..TrainerOptions::default() };
        let mut trainer = QuasarTrainer::open_with(folder.path(), plan.clone(), &options)?;
        let mut losses = Vec::new();
        for step in 0..steps {
            // Row starts spread over the whole text by a fixed stride.
            let start = |row: usize| ((step * ROWS + row) * 104_729) % (text.len() - ROW_TOKENS);
            let tokens: Vec<u32> = (0..ROWS).flat_map(|row| text[start(row)..][..ROW_TOKENS].iter().map(|byte| u32::from(*byte))).collect();
            let warm = (step as f64 / 50.0).min(1.0);
            let decay = 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
            let hyper = Hyper { lr: 6e-4 * warm * (0.1 + 0.9 * decay), ..Hyper::default() };
            losses.push(trainer.step(&Batch { tokens: &tokens, rows: ROWS, row_tokens: ROW_TOKENS }, &hyper, None, false)?.loss);
        }
        curves.push(losses);
    }
    let mean = |curve: &[f64], at: usize, count: usize| curve[at..at + count].iter().sum::<f64>() / count as f64;
    let window = (steps / 10).max(1);
    for at in (0..steps - window + 1).step_by(window) {
        let (bytes, floats) = (mean(&curves[0], at, window), mean(&curves[1], at, window));
        println!("steps {at}..{}: {bytes:.5} 8-bit, {floats:.5} f32, {:+.3} %", at + window, 100.0 * (bytes / floats - 1.0));
    }
    Ok(())
}
