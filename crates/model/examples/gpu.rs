//! Measurements on a GPU:
//!
//! ```text
//! gpu TORCH_FOLDER bench LAYERS BATCH SEQUENCE STEPS [keep|recompute] [resident|offload] [f32] [cache=FOLDER]
//! gpu TORCH_FOLDER moments TEXT_FILE STEPS SEEDS  loss on real text (bytes as tokens) with 8-bit and with f32 moments
//! gpu TORCH_FOLDER state CHECKPOINT  how long it takes to take a trainer's state
//! gpu TORCH_FOLDER tree CHECKPOINT TOKENS STEPS OUT  trains a checkpoint on a file of u32 tokens and writes the result as another
//! ```

use std::path::{Path, PathBuf};
use std::time::Instant;

use protocol::DType;
use quasar_model::torch::bench::{BenchOptions, bench};
use quasar_model::{Batch, Hyper, MomentType, QuasarConfig, QuasarTrainer, Trainer, TrainerOptions};

const USAGE: &str = "usage: gpu TORCH_FOLDER bench LAYERS BATCH SEQUENCE STEPS [keep|recompute] [resident|offload] [f32] [cache=FOLDER]\n       gpu TORCH_FOLDER moments TEXT_FILE STEPS SEEDS\n       gpu TORCH_FOLDER state CHECKPOINT\n       gpu TORCH_FOLDER tree CHECKPOINT TOKENS STEPS OUT";
/// What may be pinned where the GPU is too small for the optimizer.
const HOST_BYTES: u64 = 90 << 30;
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
            // Planned unless it is said.
            let either = |no: &str, yes: &str| if has(yes) { Some(true) } else { has(no).then_some(false) };
            let (layers, batch, sequence) = (layers.parse()?, batch.parse()?, sequence.parse()?);
            let trainer = TrainerOptions {
                device: "cuda:0".into(),
                recompute: either("keep", "recompute"),
                offload: either("resident", "offload"),
                host_bytes: HOST_BYTES,
                batch: (batch, sequence),
                moments: if has("f32") { MomentType::F32 } else { MomentType::Bytes },
                kernel_cache: rest.iter().find_map(|word| word.strip_prefix("cache=")).map(PathBuf::from),
                ..TrainerOptions::default()
            };
            let options = BenchOptions { layers, batch, sequence_length: sequence, steps: steps.parse()?, trainer };
            println!("{}", serde_json::to_string(&bench(&options)?)?);
            Ok(())
        }
        ("tree", [checkpoint, tokens, steps, out]) => tree(Path::new(checkpoint), Path::new(tokens), steps.parse()?, Path::new(out)),
        ("state", [checkpoint]) => state(Path::new(checkpoint)),
        ("moments", [text, steps, seeds]) => moments(Path::new(text), steps.parse()?, seeds.parse()?),
        _ => Err(USAGE.into()),
    }
}

/// Loads a checkpoint, takes steps on one batch of a file of tokens, and writes a checkpoint from what the trainer exports.
fn tree(checkpoint: &Path, tokens: &Path, steps: usize, out: &Path) -> Result<(), Box<dyn std::error::Error>> {
    const TOKENS: usize = 2048;
    let start = Instant::now();
    let base = fragments::CheckpointTree::open(checkpoint)?;
    let plan = fragments::plan(base.contract(), 24)?;
    let options = TrainerOptions { device: "cuda:0".into(), host_bytes: HOST_BYTES, ..TrainerOptions::default() };
    let mut trainer = QuasarTrainer::open_with(checkpoint, plan.clone(), &options)?;
    let parameters: u64 = (0..24).map(|fragment| plan.elements(fragment)).sum();
    println!("{parameters} parameters loaded after {:.0} s; {:?}", start.elapsed().as_secs_f64(), trainer.strategy());
    let tokens = std::fs::read(tokens)?;
    let tokens: Vec<u32> = tokens.as_chunks::<4>().0.iter().take(TOKENS).map(|bytes| u32::from_le_bytes(*bytes)).collect();
    for step in 1..=steps {
        let start = Instant::now();
        let hyper = Hyper { lr: 1e-4, ..Hyper::default() };
        let report = trainer.step(&Batch { tokens: &tokens, rows: 1, row_tokens: TOKENS }, &hyper, None, false)?;
        println!("step {step}: loss {:.4}, gradient norm {:.3}, {:.2} s", report.loss, report.grad_norm, start.elapsed().as_secs_f64());
    }
    let start = Instant::now();
    fragments::checkpoint::assemble_from(&base, &plan, |fragment| trainer.export(fragment), out)?;
    println!("written after {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Counts what passes through it.
#[derive(Default)]
struct Counter {
    writes: usize,
    bytes: u64,
}

impl std::io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.writes += 1;
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// How long it takes to take a trainer's state, and to take it into memory.
fn state(checkpoint: &Path) -> Result<(), Box<dyn std::error::Error>> {
    const ROWS: usize = 8;
    const ROW_TOKENS: usize = 256;
    let base = fragments::CheckpointTree::open(checkpoint)?;
    let plan = fragments::plan(base.contract(), 24)?;
    let options = TrainerOptions { device: "cuda:0".into(), batch: (ROWS, ROW_TOKENS), ..TrainerOptions::default() };
    let mut trainer = QuasarTrainer::open_with(checkpoint, plan.clone(), &options)?;
    let tokens: Vec<u32> = (0..ROWS * ROW_TOKENS).map(|at| (at * 7919 % 255) as u32).collect();
    let batch = Batch { tokens: &tokens, rows: ROWS, row_tokens: ROW_TOKENS };
    let mut memory = Vec::new();
    for round in 1..=4 {
        let start = Instant::now();
        trainer.step(&batch, &Hyper::default(), None, false)?;
        let step = start.elapsed();
        let start = Instant::now();
        let mut counter = Counter::default();
        trainer.save(&mut counter)?;
        let through = start.elapsed();
        let start = Instant::now();
        memory.clear();
        trainer.save(&mut memory)?;
        println!(
            "{round}: a step {:.3} s; its state, {} bytes in {} writes: {:.3} s, into memory {:.3} s",
            step.as_secs_f64(),
            counter.bytes,
            counter.writes,
            through.as_secs_f64(),
            start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

/// A small model of the released width with every branch, over bytes.
fn byte_model() -> Result<QuasarConfig, Box<dyn std::error::Error>> {
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
    Ok(QuasarConfig::from_json(&serde_json::Value::Object(keys).to_string())?)
}

/// Training losses of one run over the text. `reversed`: rows of each batch in the other order, which changes nothing but rounding.
fn curve(folder: &Path, text: &[u8], steps: usize, moments: MomentType, reversed: bool) -> Result<Vec<f64>, Box<dyn std::error::Error>> {
    let plan = fragments::plan(fragments::CheckpointTree::open(folder)?.contract(), 4)?;
    let options = TrainerOptions { device: "cuda:0".into(), moments, ..TrainerOptions::default() };
    let mut trainer = QuasarTrainer::open_with(folder, plan, &options)?;
    let mut losses = Vec::new();
    for step in 0..steps {
        // Row starts spread over the whole text by a fixed stride.
        let start = |row: usize| ((step * ROWS + row) * 104_729) % (text.len() - ROW_TOKENS);
        let place = |row: usize| if reversed { ROWS - 1 - row } else { row };
        let tokens: Vec<u32> =
            (0..ROWS).flat_map(|row| text[start(place(row))..][..ROW_TOKENS].iter().map(|byte| u32::from(*byte))).collect();
        let warm = (step as f64 / 50.0).min(1.0);
        let decay = 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
        let hyper = Hyper { lr: 6e-4 * warm * (0.1 + 0.9 * decay), ..Hyper::default() };
        losses.push(trainer.step(&Batch { tokens: &tokens, rows: ROWS, row_tokens: ROW_TOKENS }, &hyper, None, false)?.loss);
    }
    Ok(losses)
}

/// Trains models of several seeds on the same text: with 8-bit moments, with f32 moments, and with f32 moments and other rounding. The
/// last pair says how far apart two runs are for no reason. Prints the mean loss of each tenth of the steps, and differences with their
/// standard errors over the seeds.
fn moments(text: &Path, steps: usize, seeds: u64) -> Result<(), Box<dyn std::error::Error>> {
    let text = std::fs::read(text)?;
    let config = byte_model()?;
    let window = (steps / 10).max(1);
    // [tenth][seed]: 8-bit, f32, f32 rounded otherwise.
    let mut tenths: Vec<Vec<[f64; 3]>> = vec![Vec::new(); steps / window];
    for seed in 1..=seeds {
        let folder = tempfile::tempdir()?;
        quasar_model::init::fresh(&config, seed, DType::F32, folder.path())?;
        let run = |moments, reversed| curve(folder.path(), &text, steps, moments, reversed);
        let curves = [run(MomentType::Bytes, false)?, run(MomentType::F32, false)?, run(MomentType::F32, true)?];
        let mean = |curve: &[f64], tenth: usize| curve[tenth * window..][..window].iter().sum::<f64>() / window as f64;
        for (tenth, losses) in tenths.iter_mut().enumerate() {
            losses.push([0, 1, 2].map(|of: usize| mean(&curves[of], tenth)));
        }
        eprintln!("seed {seed} of {seeds} is done");
    }
    let difference = |losses: &[[f64; 3]], of: usize| {
        let all: Vec<f64> = losses.iter().map(|losses| 100.0 * (losses[of] / losses[1] - 1.0)).collect();
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let variance = all.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (all.len().max(2) - 1) as f64;
        format!("{mean:+.3} ± {:.3} %", (variance / all.len() as f64).sqrt())
    };
    println!("| steps | f32 | 8-bit | f32, other rounding |\n|---|---|---|---|");
    for (tenth, losses) in tenths.iter().enumerate() {
        let floats = losses.iter().map(|losses| losses[1]).sum::<f64>() / losses.len() as f64;
        println!(
            "| {} to {} | {floats:.5} | {} | {} |",
            tenth * window,
            (tenth + 1) * window,
            difference(losses, 0),
            difference(losses, 2)
        );
    }
    let whole: Vec<[f64; 3]> = (0..seeds as usize)
        .map(|seed| [0, 1, 2].map(|of: usize| tenths.iter().map(|losses| losses[seed][of]).sum::<f64>() / tenths.len() as f64))
        .collect();
    println!(
        "| all | {:.5} | {} | {} |",
        whole.iter().map(|l| l[1]).sum::<f64>() / whole.len() as f64,
        difference(&whole, 0),
        difference(&whole, 2)
    );
    Ok(())
}
