//! Fresh weights for small models, written as a Hugging Face tree.
//!
//! Every tensor has its own random stream, keyed by seed and name, and elementary functions come from portable Rust: the
//! same configuration and seed give the same bytes on every machine. Distributions follow the model specification's table
//! of initial values, with one difference: expert weights, which the reference leaves at zero because it always loads them,
//! are drawn like other matrices, since with zeros they would never get a gradient.

use std::collections::HashMap;
use std::f64::consts::TAU;
use std::path::Path;

use fragments::contract::CONTRACT_FILE;
use fragments::{Contract, ContractError, TensorSpec};
use half::{bf16, f16};
use protocol::DType;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};

use crate::{ConfigError, QuasarConfig, TensorEntry};

/// Largest model that is initialised: all of it is held in memory.
pub const PARAMETERS_MAX: u64 = 2_000_000_000;

/// Why no fresh model was written.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(
        "the model has {parameters} parameters, more than {PARAMETERS_MAX}\nhint: fresh weights are for small models; start large ones from a published checkpoint"
    )]
    TooLarge { parameters: u64 },
    #[error("{path} is not empty\nhint: name a new folder; an existing checkpoint is never overwritten")]
    NotEmpty { path: String },
    #[error("cannot write {path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error("cannot write model.safetensors: {0}")]
    Safetensors(#[from] safetensors::SafeTensorError),
}

/// Writes `config.json`, `model.safetensors` and the parameter contract of a fresh model to `out`, a new or empty folder.
/// Parameters are stored as `dtype`, buffers as f32.
pub fn fresh(config: &QuasarConfig, seed: u64, dtype: DType, out: &Path) -> Result<(), InitError> {
    let parameters = config.parameter_count();
    if parameters > PARAMETERS_MAX {
        return Err(InitError::TooLarge { parameters });
    }
    let io = |path: &Path| {
        let path = path.display().to_string();
        move |source| InitError::Io { path, source }
    };
    std::fs::create_dir_all(out).map_err(io(out))?;
    if std::fs::read_dir(out).map_err(io(out))?.next().is_some() {
        return Err(InitError::NotEmpty { path: out.display().to_string() });
    }
    let tensors = config.tensors();
    let bytes: Vec<(Dtype, Vec<u8>)> = tensors.iter().map(|tensor| store(&values(config, seed, tensor), tensor.is_buffer, dtype)).collect();
    let mut views = Vec::with_capacity(tensors.len());
    for (tensor, (kind, data)) in tensors.iter().zip(&bytes) {
        let shape = tensor.shape.iter().map(|n| *n as usize).collect();
        views.push((tensor.name.as_str(), TensorView::new(*kind, shape, data)?));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), &out.join("model.safetensors"))?;

    let specs = tensors.iter().filter(|tensor| !tensor.is_buffer);
    let specs = specs.map(|tensor| TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), dtype });
    let contract = Contract::new(specs.collect())?;
    let path = out.join(CONTRACT_FILE);
    std::fs::write(&path, contract.to_json()).map_err(io(&path))?;
    // Last: a folder with config.json is a complete checkpoint.
    let path = out.join("config.json");
    std::fs::write(&path, config.to_json()).map_err(io(&path))
}

/// Initial values of one tensor, parameters and buffers alike.
pub fn values(config: &QuasarConfig, seed: u64, tensor: &TensorEntry) -> Vec<f32> {
    let elements = tensor.elements() as usize;
    let name = tensor.name.as_str();
    let kaiming = || uniform(seed, name, elements, 1.0 / (*tensor.shape.last().expect("a matrix") as f64).sqrt());
    // Linear layers inside a branch keep the tensor library's default initial values, those of the trunk are normal.
    let in_branch = ["quasar_attention.", "raven_attention.", "gla_attention."].iter().any(|part| name.contains(part));
    let layer = || name.split('.').nth(2).and_then(|n| n.parse().ok()).expect("a name below model.layers.N");
    let last = name.rsplit('.').next().expect("split gives at least one part");
    match last {
        "inv_freq" => config.inverse_frequencies(),
        "slope" => config.slopes(layer()),
        "expert_bias" | "branch_mix_logits" => vec![0.0; elements],
        "replace_alpha_raw" => vec![config.alpha_init as f32; elements],
        "branch_output_gain" | "branch_global_output_gain" | "branch_output_channel_gain" => vec![1.0; elements],
        "branch_local_window_mix_logit" => vec![libm::log(1e-6 / (1.0 - 1e-6)) as f32; elements],
        "A_log" if name.contains("raven") => each_uniform(seed, name, elements, |u| libm::log((16.0 * u).max(f64::MIN_POSITIVE))),
        "A_log" => each_uniform(seed, name, elements, |u| libm::log(1.0 + 15.0 * u)),
        "dt_bias" if name.contains("raven") => {
            let (low, high) = (libm::log(0.001), libm::log(0.1));
            each_uniform(seed, name, elements, |u| {
                let step = libm::exp(low + (high - low) * u).max(1e-4);
                step + libm::log(-libm::expm1(-step)) // inverse of softplus
            })
        }
        "dt_bias" => vec![0.0; elements],
        "bias" => uniform(seed, name, elements, 1.0 / (config.head_dim as f64).sqrt()), // g_proj.1, fan-in head_dim
        _ if name.contains("norm.weight") => vec![1.0; elements],
        _ if name.ends_with("adapter_up.weight") => vec![0.0; elements],
        _ if name.ends_with("adapter_down.weight") || name.ends_with("mlp.gate.weight") || in_branch => kaiming(),
        _ => {
            let mut values = normal(seed, name, elements, config.initializer_range);
            if let (true, Some(pad)) = (name == "model.word_embeddings.weight", config.pad_token_id) {
                values[pad as usize * config.hidden_size..][..config.hidden_size].fill(0.0);
            }
            values
        }
    }
}

fn store(values: &[f32], is_buffer: bool, dtype: DType) -> (Dtype, Vec<u8>) {
    match if is_buffer { DType::F32 } else { dtype } {
        DType::F32 => (Dtype::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        DType::Bf16 => (Dtype::BF16, values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()),
        DType::F16 => (Dtype::F16, values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect()),
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

fn each_uniform(seed: u64, name: &str, elements: usize, map: impl Fn(f64) -> f64) -> Vec<f32> {
    let mut random = stream(seed, name);
    (0..elements).map(|_| map(open_unit(&mut random)) as f32).collect()
}

/// Uniform in (-bound, bound).
pub(crate) fn uniform(seed: u64, name: &str, elements: usize, bound: f64) -> Vec<f32> {
    each_uniform(seed, name, elements, |u| (2.0 * u - 1.0) * bound)
}

/// Normal with the given standard deviation (Box and Muller, 1958).
fn normal(seed: u64, name: &str, elements: usize, deviation: f64) -> Vec<f32> {
    let mut random = stream(seed, name);
    let mut values = Vec::with_capacity(elements + 1);
    while values.len() < elements {
        let radius = deviation * (-2.0 * libm::log(open_unit(&mut random))).sqrt();
        let (sin, cos) = libm::sincos(TAU * open_unit(&mut random));
        values.extend([(radius * cos) as f32, (radius * sin) as f32]);
    }
    values.truncate(elements);
    values
}

#[cfg(test)]
mod tests {
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
        assert!(matches!(fresh(&config(), 1, DType::F32, &folder.path().join("a")), Err(InitError::NotEmpty { .. })));
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
    fn a_model_too_large_for_memory_is_refused() {
        let config = QuasarConfig::from_json(include_str!("preview_config.json")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(fresh(&config, 0, DType::F32, folder.path()), Err(InitError::TooLarge { parameters: 16_553_949_296 })));
    }
}
