//! Fresh weights.
//!
//! Every tensor has its own random stream, keyed by seed and name, and elementary functions come from portable Rust: the
//! same configuration and seed give the same bytes on every machine. Distributions follow the model specification's table
//! of initial values, with one difference: expert weights, which the reference leaves at zero because it always loads them,
//! are drawn like other matrices, since with zeros they would never get a gradient.
//!
//! Any part of a tensor can be drawn on its own, so threads share a tensor out, and memory holds one at a time.

use std::f64::consts::TAU;
use std::ops::Range;
use std::path::Path;

use protocol::DType;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::tree::{self, Fill, TASK_ELEMENTS, TreeError};
use crate::{QuasarConfig, TensorEntry};

/// Writes a fresh model to `out`, a new or empty folder. Parameters are stored as `dtype`.
///
/// # Errors
/// The folder is not empty or cannot be written.
pub fn fresh(config: &QuasarConfig, seed: u64, dtype: DType, out: &Path) -> Result<(), TreeError> {
    tree::write(config, &|_| dtype, &|tensor| Ok(initial(config, seed, tensor)), &|| Ok(()), out)
}

fn initial(config: &QuasarConfig, seed: u64, tensor: &TensorEntry) -> Fill {
    let initial = Initial::new(config, seed, tensor);
    Box::new(move |first, values| initial.fill(first, values))
}

/// Initial values of one tensor, parameters and buffers alike.
pub fn values(config: &QuasarConfig, seed: u64, tensor: &TensorEntry) -> Vec<f32> {
    let initial = Initial::new(config, seed, tensor);
    let mut values = vec![0.0; tensor.elements() as usize];
    values.par_chunks_mut(TASK_ELEMENTS).enumerate().for_each(|(task, values)| initial.fill(task * TASK_ELEMENTS, values));
    values
}

/// How the elements of a tensor are drawn.
enum Law {
    Known(Vec<f32>),
    Same(f32),
    /// Of a number in (0, 1).
    Uniform(Box<dyn Fn(f64) -> f64 + Send + Sync>),
    /// Normal with this standard deviation (Box and Muller, 1958), in pairs.
    Normal(f64),
}

/// What a tensor begins with.
struct Initial {
    law: Law,
    random: ChaCha8Rng,
    /// Elements that are zero all the same.
    zeros: Range<usize>,
}

impl Initial {
    fn new(config: &QuasarConfig, seed: u64, tensor: &TensorEntry) -> Self {
        let name = tensor.name.as_str();
        let uniform = |map: fn(f64) -> f64| Law::Uniform(Box::new(map));
        let kaiming = || symmetric(1.0 / (*tensor.shape.last().expect("a matrix") as f64).sqrt());
        // Linear layers inside a branch keep the tensor library's default initial values, those of the trunk are normal.
        let in_branch = ["quasar_attention.", "raven_attention.", "gla_attention."].iter().any(|part| name.contains(part));
        let layer = || name.split('.').nth(2).and_then(|n| n.parse().ok()).expect("a name below model.layers.N");
        let last = name.rsplit('.').next().expect("split gives at least one part");
        let law = match last {
            "inv_freq" => Law::Known(config.inverse_frequencies()),
            "slope" => Law::Known(config.slopes(layer())),
            "expert_bias" | "branch_mix_logits" => Law::Same(0.0),
            "replace_alpha_raw" => Law::Same(config.alpha_init as f32),
            "branch_output_gain" | "branch_global_output_gain" | "branch_output_channel_gain" => Law::Same(1.0),
            "branch_local_window_mix_logit" => Law::Same(libm::log(1e-6 / (1.0 - 1e-6)) as f32),
            "A_log" if name.contains("raven") => uniform(|u| libm::log((16.0 * u).max(f64::MIN_POSITIVE))),
            "A_log" => uniform(|u| libm::log(1.0 + 15.0 * u)),
            "dt_bias" if name.contains("raven") => {
                let (low, high) = (libm::log(0.001), libm::log(0.1));
                Law::Uniform(Box::new(move |u| {
                    let step = libm::exp(low + (high - low) * u).max(1e-4);
                    step + libm::log(-libm::expm1(-step)) // inverse of softplus
                }))
            }
            "dt_bias" => Law::Same(0.0),
            "bias" => symmetric(1.0 / (config.head_dim as f64).sqrt()), // g_proj.1, fan-in head_dim
            _ if name.contains("norm.weight") => Law::Same(1.0),
            _ if name.ends_with("adapter_up.weight") => Law::Same(0.0),
            _ if name.ends_with("adapter_down.weight") || name.ends_with("mlp.gate.weight") || in_branch => kaiming(),
            _ => Law::Normal(config.initializer_range),
        };
        let pad = config.pad_token_id.filter(|_| name == "model.word_embeddings.weight").map(|pad| pad as usize * config.hidden_size);
        let zeros = pad.map_or(0..0, |start| start..start + config.hidden_size);
        Self { law, random: stream(seed, name), zeros }
    }

    /// Elements from `first`, an even number, on.
    fn fill(&self, first: usize, out: &mut [f32]) {
        let mut random = self.random.clone();
        // An element of a pair or a single one takes 64 bits.
        random.set_word_pos(2 * first as u128);
        match &self.law {
            Law::Known(values) => out.copy_from_slice(&values[first..first + out.len()]),
            Law::Same(value) => out.fill(*value),
            Law::Uniform(map) => out.fill_with(|| map(open_unit(&mut random)) as f32),
            Law::Normal(deviation) => {
                for pair in out.chunks_mut(2) {
                    let radius = deviation * (-2.0 * libm::log(open_unit(&mut random))).sqrt();
                    let (sin, cos) = libm::sincos(TAU * open_unit(&mut random));
                    pair.iter_mut().zip([radius * cos, radius * sin]).for_each(|(value, drawn)| *value = drawn as f32);
                }
            }
        }
        for element in self.zeros.clone() {
            if let Some(value) = element.checked_sub(first).and_then(|place| out.get_mut(place)) {
                *value = 0.0;
            }
        }
    }
}

fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new_derive_key("quasar model initial values v1");
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// A number in (0, 1): never 0, so that its logarithm is finite.
fn open_unit(random: &mut ChaCha8Rng) -> f64 {
    ((random.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Uniform in (-bound, bound).
fn symmetric(bound: f64) -> Law {
    Law::Uniform(Box::new(move |u| (2.0 * u - 1.0) * bound))
}

/// Numbers of a stream of their own, uniform in (-bound, bound).
pub(crate) fn uniform(seed: u64, name: &str, elements: usize, bound: f64) -> Vec<f32> {
    let mut values = vec![0.0; elements];
    Initial { law: symmetric(bound), random: stream(seed, name), zeros: 0..0 }.fill(0, &mut values);
    values
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn config() -> QuasarConfig {
        QuasarConfig::from_json(include_str!("../tests/data/small_config.json")).unwrap()
    }

    #[test]
    fn the_same_seed_writes_the_same_bytes_and_another_seed_others() {
        let folder = tempfile::tempdir().unwrap();
        let write = |seed, name: &str| {
            let out = folder.path().join(name);
            fresh(&config(), seed, DType::F32, &out).unwrap();
            std::fs::read(out.join("model.safetensors")).unwrap()
        };
        let one = write(1, "a");
        assert_eq!(one, write(1, "b"));
        assert_ne!(one, write(2, "c"));
        assert!(matches!(fresh(&config(), 1, DType::F32, &folder.path().join("a")), Err(TreeError::NotEmpty { .. })));
    }

    #[test]
    fn a_known_seed_gives_known_values() {
        // Pins the generator: released seeds must keep their meaning.
        let entry = |name: &str| config().tensors().into_iter().find(|tensor| tensor.name == name).unwrap();
        let embedding = values(&config(), 7, &entry("model.word_embeddings.weight"));
        assert_eq!(embedding[..2].iter().map(|value| value.to_bits()).collect::<Vec<_>>(), PINNED);
        assert!(embedding[3 * 32..4 * 32].iter().all(|value| *value == 0.0), "pad row");
    }
    const PINNED: [u32; 2] = [991_273_183, 1_008_629_026];

    #[test]
    fn distributions_have_the_specified_spread() {
        let all: HashMap<String, Vec<f32>> =
            config().tensors().into_iter().map(|tensor| (tensor.name.clone(), values(&config(), 3, &tensor))).collect();
        let deviation = |name: &str| (all[name].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / all[name].len() as f64).sqrt();
        assert!((deviation("lm_head.weight") - 0.02).abs() < 0.002);
        assert!((deviation("model.layers.1.mlp.experts_w12") - 0.02).abs() < 0.002, "experts must not be zero");
        assert!((deviation("model.layers.1.attention.quasar_attention.q_proj.weight") - (1.0 / 96f64).sqrt()).abs() < 0.01);
        let decay = &all["model.layers.1.attention.quasar_attention.A_log"];
        assert!(decay.iter().all(|v| (0.0..=16f32.ln()).contains(v)));
        assert!(all["model.layers.1.attention.branch_output_adapter_up.weight"].iter().all(|v| *v == 0.0));
        assert!(all["model.layers.1.attention.quasar_attention.o_norm.weight"].iter().all(|v| *v == 1.0));
        assert!(all.values().flatten().all(|v| v.is_finite()));
    }

    #[test]
    fn any_part_of_a_tensor_can_be_drawn_on_its_own() {
        let entry = |name: &str| config().tensors().into_iter().find(|tensor| tensor.name == name).unwrap();
        for name in ["model.word_embeddings.weight", "model.layers.1.attention.quasar_attention.q_proj.weight"] {
            let (initial, whole) = (Initial::new(&config(), 7, &entry(name)), values(&config(), 7, &entry(name)));
            for (first, count) in [(0, 5), (90, 100), (whole.len() - 8, 8)] {
                let mut part = vec![9.0; count];
                initial.fill(first, &mut part);
                assert_eq!(part, whole[first..first + count], "{name}, {count} from {first}");
            }
        }
    }
}
