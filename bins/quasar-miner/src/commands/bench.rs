//! `bench`: training steps of the released model's layer shapes on random tokens, and `plan-memory`: what fits a GPU.

use std::path::{Path, PathBuf};

use daemon::settings::{CommonArgs, MinerArgs, Role};
use daemon::{Exit, Failure};
use model::memory::{Available, MemoryPlan, Work, plan_memory, strategies};
use model::torch::bench::{BenchOptions, bench};
use model::{MomentType, Place, QuasarConfig, TrainError, TrainerOptions};

use crate::device;

/// Flags of `bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Layers of the model; the released one has 20, fewer give the same shapes in a smaller model
    #[arg(long, default_value_t = 6)]
    layers: usize,
    /// Rows in a batch
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens in a row
    #[arg(long, default_value_t = 2048)]
    sequence_length: usize,
    /// Steps that are timed, after three that are not
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// The GPU: cuda:N
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Keep only each layer's input for the backward pass
    #[arg(long)]
    recompute: bool,
    /// Keep optimizer state in the host's memory
    #[arg(long)]
    offload: bool,
    /// f32 moments instead of 8-bit ones
    #[arg(long)]
    f32_moments: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Flags of `plan-memory`.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// Model configuration (`config.json`); without it the released model's
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Plan for a GPU of this machine (cuda:N): what is free on it, and of the host's memory what a miner would pin
    #[arg(long)]
    device: Option<String>,
    /// Memory of the GPU, GiB [default: what is free on --device, otherwise 78]
    #[arg(long, value_name = "GIB")]
    device_memory: Option<f64>,
    /// Memory of the host that may be pinned, GiB [default: with --device three quarters of what is free, otherwise 0]
    #[arg(long, value_name = "GIB")]
    host_memory: Option<f64>,
    /// Rows in a batch
    #[arg(long, default_value_t = 8)]
    batch: u64,
    /// Tokens in a row
    #[arg(long, default_value_t = 2048)]
    sequence_length: u64,
    /// Fragments that the run cuts the model into
    #[arg(long, default_value_t = 24)]
    fragments: u64,
    /// Prefer f32 moments where they fit
    #[arg(long)]
    f32_moments: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const GIB: f64 = (1u64 << 30) as f64;
/// Memory of a GPU to plan for if none is named: an 80 GB one with nothing else on it.
const DEVICE_GIB: f64 = 78.0;

/// Most layers, rows and tokens that are measured.
const LAYERS_MAX: usize = 128;
const TOKENS_MAX: usize = 1 << 24;

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("layers, batch, sequence length and steps must be at least 1 (sequence length 2), and a step at most {TOKENS_MAX} tokens")]
    Sizes,
    #[error("batch and fragments must be at least 1, the sequence length at least 2, and a step at most {TOKENS_MAX} tokens")]
    Batch,
    #[error("{device}: {reason}\nhint: --device-memory plans for a GPU that is elsewhere")]
    NoGpu { device: String, reason: String },
    #[error(
        "no strategy fits: the smallest takes {needed:.1} GiB of the GPU, {missing:.1} GiB more than there are\nhint: fewer rows, more --host-memory for optimizer state in the host's memory, or a larger GPU"
    )]
    NothingFits { needed: f64, missing: f64 },
}

/// Out of memory is for a person with another machine or other options to change; the rest is a matter of settings.
fn failure(error: TrainError, args: &BenchArgs) -> Failure {
    match error {
        TrainError::OutOfMemory { place: Place::Gpu, .. } => Failure::unavailable(error).hint(saving(args)),
        TrainError::OutOfMemory { .. } => Failure::unavailable(error),
        error => Failure::configuration(error),
    }
}

/// The flags by which a bench saves memory of the GPU.
fn saving(args: &BenchArgs) -> String {
    let ways = [
        (args.f32_moments, "no --f32-moments"),
        (!args.recompute, "--recompute (layers computed again)"),
        (!args.offload, "--offload (optimizer state in the host's memory)"),
        (true, "a smaller --batch"),
    ];
    let ways: Vec<&str> = ways.iter().filter(|(is_left, _)| *is_left).map(|(_, way)| *way).collect();
    format!("what saves memory here: {}", ways.join(", "))
}

pub fn main(common: &CommonArgs, miner: &MinerArgs, args: &BenchArgs) -> Result<Exit, Failure> {
    let tokens = args.batch.saturating_mul(args.sequence_length);
    let is_sound =
        (1..=LAYERS_MAX).contains(&args.layers) && args.batch > 0 && args.sequence_length > 1 && args.steps > 0 && tokens <= TOKENS_MAX;
    if !is_sound {
        return Err(Failure::new(Exit::Usage, Refused::Sizes));
    }
    let settings = common.settings(Role::Miner, miner)?.miner();
    if let Some(folder) = &settings.torch_cuda_dir {
        model::load_cuda(folder).map_err(Failure::configuration)?;
    }
    let trainer = TrainerOptions {
        device: args.device.clone(),
        recompute: Some(args.recompute),
        offload: Some(args.offload),
        host_bytes: device::pinnable(),
        moments: if args.f32_moments { MomentType::F32 } else { MomentType::Bytes },
        ..TrainerOptions::default()
    };
    let options =
        BenchOptions { layers: args.layers, batch: args.batch, sequence_length: args.sequence_length, steps: args.steps, trainer };
    let report = bench(&options).map_err(|error| failure(error, args))?;
    if args.json {
        println!("{}", serde_json::to_string(&report).map_err(Failure::unavailable)?);
    } else {
        println!(
            "{:.0} tokens/s, {:.4} s a step, {:.1} GiB, {:.0} model TFLOP/s, loss {:.3}, {} parameters",
            report.tokens_per_s, report.step_s, report.peak_gib, report.model_tflops, report.loss, report.params
        );
    }
    Ok(Exit::Done)
}

fn configuration(path: Option<&Path>) -> Result<QuasarConfig, Failure> {
    let config = match path {
        Some(path) => QuasarConfig::from_file(path),
        None => QuasarConfig::released(),
    };
    config.map_err(Failure::configuration)
}

fn line(plan: &MemoryPlan) -> String {
    let (gpu, host) = (plan.peak_bytes as f64 / GIB, plan.host_bytes as f64 / GIB);
    format!("{gpu:7.1} GiB of the GPU, {host:6.1} GiB of the host: {}", plan.strategy)
}

/// Free bytes of the GPU `cuda:N`.
fn free_bytes(device: &str) -> Result<u64, Refused> {
    let fail = |reason: String| Refused::NoGpu { device: device.to_owned(), reason };
    let number = if device == "cuda" { Some("0") } else { device.strip_prefix("cuda:") };
    let number: usize = number.and_then(|number| number.parse().ok()).ok_or_else(|| fail("this is no GPU; expected cuda:N".into()))?;
    let gpus = match model::gpus() {
        Ok(gpus) => gpus,
        Err(TrainError::Device { reason, .. }) => return Err(fail(format!("no GPU can be asked: {reason}"))),
        Err(error) => return Err(fail(error.to_string())),
    };
    gpus.get(number).map(|gpu| gpu.free_bytes).ok_or_else(|| fail(format!("there is no such GPU; the driver shows {}", gpus.len())))
}

pub fn plan(args: &PlanArgs) -> Result<Exit, Failure> {
    let tokens = args.batch.saturating_mul(args.sequence_length);
    if args.batch == 0 || args.sequence_length < 2 || args.fragments == 0 || tokens > TOKENS_MAX as u64 {
        return Err(Failure::new(Exit::Usage, Refused::Batch));
    }
    let config = configuration(args.config.as_deref())?;
    let bytes = |gib: f64| (gib.max(0.0) * GIB) as u64;
    let device_bytes = match (args.device_memory, &args.device) {
        (Some(gib), _) => bytes(gib),
        (None, Some(device)) => free_bytes(device).map_err(Failure::configuration)?,
        (None, None) => bytes(DEVICE_GIB),
    };
    let host_bytes = match (args.host_memory, &args.device) {
        (Some(gib), _) => bytes(gib),
        (None, Some(_)) => device::pinnable(),
        (None, None) => 0,
    };
    let available = Available { device_bytes, host_bytes, f32_moments: args.f32_moments };
    let work = Work { rows: args.batch, row_tokens: args.sequence_length, fragments: args.fragments, by_document: false };
    let chosen = plan_memory(&config, work, available);
    if args.json {
        let all = strategies(&config, work, args.f32_moments);
        let there = serde_json::json!({ "device_bytes": device_bytes, "host_bytes": host_bytes });
        println!("{}", serde_json::json!({ "available": there, "chosen": chosen.as_ref().ok(), "strategies": all }));
    } else {
        println!("planned with {:.1} GiB of the GPU and {:.1} GiB of the host", device_bytes as f64 / GIB, host_bytes as f64 / GIB);
        for plan in strategies(&config, work, args.f32_moments) {
            println!("{} {}", if chosen.as_ref().ok() == Some(&plan) { "->" } else { "  " }, line(&plan));
        }
    }
    match chosen {
        Ok(_) => Ok(Exit::Done),
        Err(smallest) => {
            let needed = smallest.peak_bytes as f64 / GIB;
            Err(Failure::unavailable(Refused::NothingFits { needed, missing: needed - device_bytes as f64 / GIB }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bench_that_runs_out_of_memory_names_the_flags_that_are_left() {
        let device = "cuda:0".to_owned();
        let mut args = BenchArgs {
            layers: 20,
            batch: 8,
            sequence_length: 2048,
            steps: 10,
            device,
            recompute: false,
            offload: false,
            f32_moments: false,
            json: false,
        };
        let of = |place, args: &BenchArgs| failure(TrainError::OutOfMemory { place, missing: 7, advice: "less".into() }, args).to_string();
        let text = of(Place::Gpu, &args);
        assert!(text.contains("7 bytes") && text.contains("--recompute") && text.contains("--offload"), "{text}");
        assert!(!text.contains("--f32-moments"), "{text}");
        assert!(!of(Place::Host, &args).contains("--offload"));
        (args.recompute, args.f32_moments) = (true, true);
        let text = of(Place::Gpu, &args);
        assert!(!text.contains("--recompute") && text.contains("--offload") && text.contains("no --f32-moments"), "{text}");
    }
}
