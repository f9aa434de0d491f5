//! Proof that training on a device is reproducible: the same steps of the same fresh model twice, and once more with the recorded choices
//! of the router forced, compared to the last bit. A validator's replay rests on it.

use serde::Serialize;
use tch::Device;

use super::device::{parse_device, use_threads};
use super::trainer::{TrainerOptions, fresh};
use crate::{Batch, Hyper, QuasarConfig, Routes, TrainError};

const SEED: u64 = 1;
const ROWS: usize = 2;

/// What was compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Determinism {
    pub device: String,
    /// Why the device computes through libtorch's operations although it is a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    pub steps: u64,
    /// Loss of the last step, nats.
    pub loss: f64,
    /// BLAKE3 of all weights and moments after the last step of the first run.
    pub state: String,
    /// Where another run left the first one, in words; `None`: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference: Option<String>,
}

impl Determinism {
    pub fn holds(&self) -> bool {
        self.difference.is_none()
    }
}

/// Every branch of the released model and its head shapes; small otherwise, and smaller on the CPU.
fn config(on_gpu: bool) -> Result<QuasarConfig, TrainError> {
    let mut keys: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&QuasarConfig::preview(4)?.to_json())
        .map_err(|error| TrainError::Batch(format!("the model for the check: {error}")))?;
    let sizes = [
        ("vocab_size", 4096),
        ("pad_token_id", 7),
        ("num_experts", 32),
        ("num_experts_per_tok", 4),
        ("intermediate_size", 512),
        ("moe_intermediate_size", 64),
        ("moe_shared_expert_intermediate_size", 64),
    ];
    // Own kernels want a width that is a multiple of 1,024.
    let heads = if on_gpu { [8, 2] } else { [2, 1] };
    let widths = [("hidden_size", 128 * heads[0]), ("num_attention_heads", heads[0]), ("num_key_value_heads", heads[1])];
    for (key, value) in sizes.into_iter().chain(widths) {
        keys.insert(key.into(), value.into());
    }
    keys.insert("hybrid_layerwise_cycle".into(), ["quasar", "raven", "gla"].as_slice().into());
    Ok(QuasarConfig::from_json(&serde_json::Value::Object(keys).to_string())?)
}

/// What a run left behind: of each step the bits of loss and gradient norm and the choices, of the end the digest of the state.
struct Trail {
    steps: Vec<(u64, u64, Routes)>,
    state: String,
    fallback: Option<String>,
}

fn run(config: &QuasarConfig, options: &TrainerOptions, batches: &[Vec<u32>], forced: Option<&Trail>) -> Result<Trail, TrainError> {
    let (mut learner, fallback) = fresh(config.clone(), options, SEED)?;
    let mut steps = Vec::new();
    for (n, tokens) in batches.iter().enumerate() {
        let batch = Batch { tokens, rows: ROWS, row_tokens: tokens.len() / ROWS };
        let routes = forced.map(|trail| &trail.steps[n].2);
        let taken = learner.take_step(&batch, &Hyper::default(), routes, true, n as u64 + 1)?;
        steps.push((taken.loss.to_bits(), taken.grad_norm.to_bits(), taken.routes.unwrap_or_default()));
    }
    let mut hasher = blake3::Hasher::new();
    let elements = learner.layout().elements;
    let (first, second) = learner.moments()?;
    for values in [learner.read(std::slice::from_ref(&(0..elements)))?, first, second] {
        for value in values {
            hasher.update(&value.to_bits().to_le_bytes());
        }
    }
    Ok(Trail { steps, state: hasher.finalize().to_hex().to_string(), fallback })
}

/// Where `other` leaves `one`.
fn difference(one: &Trail, other: &Trail, which: &str) -> Option<String> {
    for (n, (a, b)) in one.steps.iter().zip(&other.steps).enumerate() {
        let what = match (a, b) {
            (a, b) if a.0 != b.0 => format!("a loss of {} against {}", f64::from_bits(b.0), f64::from_bits(a.0)),
            (a, b) if a.1 != b.1 => format!("a gradient norm of {} against {}", f64::from_bits(b.1), f64::from_bits(a.1)),
            (a, b) if a.2 != b.2 => "other experts".to_owned(),
            _ => continue,
        };
        return Some(format!("{which}: step {} has {what}", n + 1));
    }
    (one.state != other.state).then(|| format!("{which}: weights or moments differ after the last step"))
}

/// Takes `steps` steps of a small model on the device of `options` three times and compares.
///
/// # Errors
/// The device cannot be used.
pub fn check(options: &TrainerOptions, steps: u64) -> Result<Determinism, TrainError> {
    use_threads(options.threads);
    let on_gpu = parse_device(&options.device)? != Device::Cpu;
    let config = config(on_gpu)?;
    // Past the end of the rotary part, with a chunk that is not full.
    let row_tokens = if on_gpu { 600 } else { 150 };
    let mut word = SEED;
    let mut next = || {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((word >> 33) % config.vocab_size as u64) as u32
    };
    let batches: Vec<Vec<u32>> = (0..steps).map(|_| (0..ROWS * row_tokens).map(|_| next()).collect()).collect();
    let one = run(&config, options, &batches, None)?;
    let two = run(&config, options, &batches, None)?;
    let replay = run(&config, options, &batches, Some(&one))?;
    let differs = difference(&one, &two, "the second run").or_else(|| difference(&one, &replay, "the run with forced experts"));
    Ok(Determinism {
        device: options.device.clone(),
        steps,
        loss: one.steps.last().map_or(f64::NAN, |step| f64::from_bits(step.0)),
        state: one.state,
        fallback: one.fallback,
        difference: differs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_on_the_cpu_are_reproducible_and_learn() {
        let report = check(&TrainerOptions::default(), 2).unwrap();
        assert!(report.holds(), "{report:?}");
        assert!(report.loss.is_finite() && report.loss < 10.0, "{report:?}");
        assert_ne!(report.state, check(&TrainerOptions::default(), 1).unwrap().state, "the state is that of the last step");
    }

    #[test]
    fn a_difference_is_named_by_the_step_in_which_it_begins() {
        let trail = |losses: &[f64], state: &str| Trail {
            steps: losses.iter().map(|loss| (loss.to_bits(), 0, Routes::default())).collect(),
            state: state.to_owned(),
            fallback: None,
        };
        let one = trail(&[3.0, 2.0], "a");
        assert_eq!(difference(&one, &trail(&[3.0, 2.0], "a"), "x"), None);
        assert_eq!(difference(&one, &trail(&[3.0, 2.5], "b"), "x").unwrap(), "x: step 2 has a loss of 2.5 against 2");
        assert_eq!(difference(&one, &trail(&[3.0, 2.0], "b"), "x").unwrap(), "x: weights or moments differ after the last step");
    }
}
