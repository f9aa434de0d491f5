//! Measures a GPU: `gpu TORCH_FOLDER bench LAYERS BATCH SEQUENCE STEPS [recompute] [f32] [cache=FOLDER]`.

use std::path::{Path, PathBuf};

use quasar_model::torch::bench::{BenchOptions, bench};
use quasar_model::{MomentType, TrainerOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: gpu TORCH_FOLDER bench LAYERS BATCH SEQUENCE STEPS [recompute] [f32] [cache=FOLDER]";
    let [torch, command, layers, batch, sequence, steps, rest @ ..] = &arguments[..] else { return Err(usage.into()) };
    if command != "bench" {
        return Err(usage.into());
    }
    quasar_model::load_cuda(Path::new(torch))?;
    let has = |word: &str| rest.iter().any(|other| other == word);
    let trainer = TrainerOptions {
        device: "cuda:0".into(),
        recompute: has("recompute"),
        moments: if has("f32") { MomentType::F32 } else { MomentType::Bytes },
        kernel_cache: rest.iter().find_map(|word| word.strip_prefix("cache=")).map(PathBuf::from),
        ..TrainerOptions::default()
    };
    let options =
        BenchOptions { layers: layers.parse()?, batch: batch.parse()?, sequence_length: sequence.parse()?, steps: steps.parse()?, trainer };
    println!("{}", serde_json::to_string(&bench(&options)?)?);
    Ok(())
}
