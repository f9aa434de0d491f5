//! Measures training steps of a model with the released model's layer shapes on random tokens.

use std::time::Instant;

use serde::Serialize;
use tch::Device;

use super::device::parse_device;
use super::gpu::GpuLearner;
use super::layout::Layout;
use super::learner::Learner;
use super::trainer::TrainerOptions;
use crate::{Batch, Branch, Hyper, QuasarConfig, TrainError};

/// Vocabulary entries at the end that random tokens leave out: special tokens.
const SPECIAL_TOKENS: usize = 1000;
/// Steps before the clock starts.
const WARM_UP: usize = 3;
const SEED: u64 = 1;
/// Parts that a run cuts the model into, and steps with an exchange that are timed.
const FRAGMENTS: usize = 24;
const EXCHANGES: usize = 5;

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Layers of the model; fewer than the released model's 20 give one dense layer, then layers with mixture and branch.
    pub layers: usize,
    /// Rows in a batch.
    pub batch: usize,
    pub sequence_length: usize,
    pub steps: usize,
    pub trainer: TrainerOptions,
}

/// What was measured. `step_s` is the median.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    pub tokens_per_s: f64,
    pub step_s: f64,
    /// Memory that the GPU had given out at the end, GiB, all of the process.
    pub peak_gib: f64,
    /// `6 * active parameters * tokens / s`, nothing computed twice counted twice.
    pub model_tflops: f64,
    pub loss: f64,
    pub params: u64,
    pub active_params: u64,
    pub layers: usize,
    pub batch: usize,
    pub sequence_length: usize,
    /// From the start to the end of the first step: kernels compiled and loaded, memory taken.
    pub start_s: f64,
    /// A step during which a 24th of the model goes out, seconds; and one before which a new version of another 24th comes in as well.
    pub send_step_s: f64,
    pub exchange_step_s: f64,
    /// Of a step, how long the host takes to launch its work; the device waits for the host if that is not far below `step_s`.
    pub launch_s: f64,
    pub step_s_all: Vec<f64>,
}

/// Parameters that take part in the computation for one token, the embedding left out.
pub fn active_parameters(config: &QuasarConfig) -> u64 {
    let (hidden, head) = (config.hidden_size, config.head_dim);
    let (heads, qkv) = (config.num_attention_heads, config.qkv_rows());
    let mut sum = config.vocab_size * hidden;
    for layer in 0..config.num_hidden_layers {
        sum += qkv * hidden + hidden * hidden;
        sum += match config.branch(layer) {
            None => 0,
            Some(Branch::Quasar) => 4 * hidden * hidden + heads * hidden + 2 * head * hidden,
            Some(Branch::Raven) => {
                2 * hidden * hidden + 2 * config.num_key_value_heads * head * hidden + heads * config.raven_slots * hidden
            }
            Some(Branch::Gla) => qkv * hidden + 2 * hidden * hidden,
        };
        sum += if config.is_moe(layer) {
            3 * hidden * config.moe_intermediate_size * (config.num_experts_per_tok + 1) + config.num_experts * hidden
        } else {
            3 * hidden * config.intermediate_size
        };
    }
    sum as u64
}

/// Runs the bench.
///
/// # Errors
/// The device is no GPU, has too little memory, or the kernels cannot be used.
pub fn bench(options: &BenchOptions) -> Result<BenchReport, TrainError> {
    let begun = Instant::now();
    let config = QuasarConfig::preview(options.layers)?;
    let device = parse_device(&options.trainer.device)?;
    if device == Device::Cpu {
        return Err(TrainError::Device { device: "cpu".into(), reason: "the bench measures GPUs".into() });
    }
    let (params, active_params) = (config.parameter_count(), active_parameters(&config));
    let layout = Layout::new(&config, false);
    let buffers = config.tensors().into_iter().filter(|tensor| tensor.is_buffer);
    let buffers = buffers.map(|tensor| (tensor.name.clone(), crate::init::values(&config, SEED, &tensor))).collect();
    let vocabulary = config.vocab_size - SPECIAL_TOKENS;
    let mut learner = GpuLearner::new(config, layout, buffers, device, FRAGMENTS, &options.trainer)?;
    learner.randomise(SEED)?;
    let hyper = Hyper { lr: 1e-5, beta2: 0.999, ..Hyper::default() };
    let tokens_per_step = options.batch * options.sequence_length;
    let mut word = SEED;
    let (mut times, mut launches, mut loss, mut start_s) = (Vec::new(), Vec::new(), 0.0, 0.0);
    for step in 0..WARM_UP + options.steps {
        let mut next = || {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((word >> 33) % vocabulary as u64) as u32
        };
        let tokens: Vec<u32> = (0..tokens_per_step).map(|_| next()).collect();
        let batch = Batch { tokens: &tokens, rows: options.batch, row_tokens: options.sequence_length };
        batch.check(vocabulary)?;
        let is_last = step + 1 == WARM_UP + options.steps;
        if is_last {
            learner.profile(true)?;
        }
        learner.synchronize()?;
        let start = Instant::now();
        loss = learner.take_step(&batch, &hyper, None, false, step as u64 + 1)?.loss;
        learner.synchronize()?;
        if step == 0 {
            start_s = begun.elapsed().as_secs_f64();
        }
        if step >= WARM_UP {
            times.push(start.elapsed().as_secs_f64());
            launches.push(learner.launching().as_secs_f64());
        }
        if is_last {
            learner.profile(false)?;
        }
    }
    let (free, total) = learner.memory()?;
    let (mut sends, mut exchanges) = (Vec::new(), Vec::new());
    let part = learner.layout().elements / FRAGMENTS;
    let (mut one, mut other) = (0..part, part..2 * part);
    let version = learner.host_memory().hold(learner.read(std::slice::from_ref(&one))?)?;
    for step in 0..2 * EXCHANGES {
        let tokens: Vec<u32> = (0..tokens_per_step).map(|n| (n % vocabulary) as u32).collect();
        let batch = Batch { tokens: &tokens, rows: options.batch, row_tokens: options.sequence_length };
        learner.synchronize()?;
        let start = Instant::now();
        // The first steps only send, the others receive as well.
        if step >= EXCHANGES {
            learner.carry(std::slice::from_ref(&one), &version, None)?;
        }
        let out = learner.contribute(std::slice::from_ref(&other))?;
        learner.take_step(&batch, &hyper, None, false, (WARM_UP + options.steps + step) as u64 + 1)?;
        learner.synchronize()?;
        let side = if step < EXCHANGES { &mut sends } else { &mut exchanges };
        side.push(start.elapsed().as_secs_f64());
        drop(out);
        std::mem::swap(&mut one, &mut other);
    }
    let step_s_all = times.clone();
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let (step_s, launch_s) = (median(times), median(launches));
    let (send_step_s, exchange_step_s) = (median(sends), median(exchanges));
    let tokens_per_s = tokens_per_step as f64 / step_s;
    Ok(BenchReport {
        tokens_per_s,
        step_s,
        peak_gib: (total - free) as f64 / f64::from(1 << 30),
        model_tflops: 6.0 * active_params as f64 * tokens_per_s / 1e12,
        loss,
        params,
        active_params,
        layers: options.layers,
        batch: options.batch,
        sequence_length: options.sequence_length,
        start_s,
        send_step_s,
        exchange_step_s,
        launch_s,
        step_s_all,
    })
}
