//! The configuration of a Quasar model, read from a Hugging Face `config.json`.
//!
//! A configuration that asks for something this crate does not compute is refused with the name of the key: a model that
//! silently trained without one of its parts would be worse than none. Keys without influence on the computation are kept
//! and written back, so that a released checkpoint carries the configuration it began with.
//! Source: the model specification (`docs/`, Quasar architecture), configuration table.

use std::path::Path;

use protocol::DType;
use serde_json::{Map, Value};

use crate::json::Keys;

/// What a configuration can be refused for.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}: {source}\nhint: a checkpoint folder holds config.json beside its safetensors files")]
    Read { path: String, source: std::io::Error },
    #[error("the configuration is not a JSON object: {0}\nhint: expected the config.json of a quasar_long checkpoint")]
    Json(String),
    #[error("the configuration has no key `{key}`\nhint: expected the config.json of a quasar_long checkpoint")]
    Missing { key: &'static str },
    #[error("`{key}` is {found}; expected {expected}\nhint: correct this key in config.json")]
    Value { key: &'static str, found: String, expected: String },
    #[error(
        "`{key}` is {found}, which is not implemented (implemented: {implemented})\nhint: this program would compute another model than the configuration describes; turn the feature off or use a version that has it"
    )]
    Unsupported { key: String, found: String, implemented: String },
}

/// The linear-attention branch that a layer adds to its softmax attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Branch {
    /// Delta rule with an adaptive step size.
    Quasar,
    /// Gated slot memory.
    Raven,
    /// Linear attention with a constant decay per head.
    Gla,
}

impl Branch {
    /// The name in `hybrid_layerwise_cycle`; tensors lie under `attention.{name}_attention.`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Quasar => "quasar",
            Self::Raven => "raven",
            Self::Gla => "gla",
        }
    }
}

/// A valid configuration: shapes fit together and every feature that is on is implemented.
#[derive(Clone, Debug, PartialEq)]
pub struct QuasarConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// Width of the dense feed-forward layers.
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub partial_rotary_factor: f64,
    /// From this position on rotary embedding is the identity; `None`: nowhere.
    pub nope_after_position: Option<usize>,
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub n_group: usize,
    pub topk_group: usize,
    pub moe_intermediate_size: usize,
    /// The first layers have a dense feed-forward part, the others a mixture of experts.
    pub first_k_dense_replace: usize,
    pub routed_scaling_factor: f64,
    /// The branch of each layer, `num_hidden_layers` entries.
    pub branches: Vec<Option<Branch>>,
    pub raven_slots: usize,
    pub raven_topk: usize,
    pub adapter_rank: usize,
    /// Initial value of `replace_alpha_raw`, before the sigmoid.
    pub alpha_init: f64,
    pub initializer_range: f64,
    /// How often the stack of layers is run over the same weights.
    pub num_loops: usize,
    /// The embedding row of this token gets no gradient as an input.
    pub pad_token_id: Option<u32>,
    /// All keys as read, for writing back.
    raw: Map<String, Value>,
}

/// Upper bounds, far above any model of this family: sizes stay far from overflow.
mod limits {
    pub const VOCABULARY: usize = 1 << 24;
    pub const WIDTH: usize = 1 << 17;
    pub const LAYERS: usize = 1024;
    pub const LOOPS: usize = 64;
    /// Recorded routes hold expert numbers as `u16`.
    pub const EXPERTS: usize = 1 << 16;
    pub const POSITION: usize = u32::MAX as usize;
    /// Bytes of a config.json.
    pub const FILE: u64 = 1 << 20;
}

impl QuasarConfig {
    /// Reads and checks `config.json` in `folder`.
    pub fn from_dir(folder: &Path) -> Result<Self, ConfigError> {
        Self::from_file(&folder.join("config.json"))
    }

    /// Reads and checks a configuration file.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.display().to_string(), source };
        let length = std::fs::metadata(path).map_err(read)?.len();
        if length > limits::FILE {
            return Err(ConfigError::Json(format!("{} has {length} bytes, more than {}", path.display(), limits::FILE)));
        }
        Self::from_json(&std::fs::read_to_string(path).map_err(read)?)
    }

    /// Parses and checks a configuration.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let raw: Map<String, Value> = serde_json::from_str(text).map_err(|error| ConfigError::Json(error.to_string()))?;
        let keys = Keys(&raw);
        refuse_other_models(&keys)?;
        let num_hidden_layers = keys.size("num_hidden_layers", limits::LAYERS)?;
        let num_attention_heads = keys.size("num_attention_heads", limits::WIDTH)?;
        let hidden_size = keys.size("hidden_size", limits::WIDTH)?;
        let use_nope = keys.flag_or("use_nope", false)?;
        if use_nope {
            keys.only_text("long_context_mode", &["rope_short_nope_long"])?;
        }
        let config = Self {
            vocab_size: keys.size("vocab_size", limits::VOCABULARY)?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size", limits::WIDTH)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: keys.size("num_key_value_heads", limits::WIDTH)?,
            head_dim: keys.size_or("head_dim", limits::WIDTH, hidden_size.checked_div(num_attention_heads))?,
            rms_norm_eps: keys.number_or("rms_norm_eps", 1e-6)?,
            rope_theta: keys.number_or("rope_theta", 10_000.0)?,
            partial_rotary_factor: keys.number_or("partial_rotary_factor", 0.5)?,
            nope_after_position: use_nope.then(|| keys.size("nope_after_position", limits::POSITION)).transpose()?,
            num_experts: keys.size("num_experts", limits::EXPERTS)?,
            num_experts_per_tok: keys.size("num_experts_per_tok", limits::EXPERTS)?,
            n_group: keys.size("n_group", limits::EXPERTS)?,
            topk_group: keys.size("topk_group", limits::EXPERTS)?,
            moe_intermediate_size: keys.size("moe_intermediate_size", limits::WIDTH)?,
            first_k_dense_replace: keys.size("first_k_dense_replace", limits::LAYERS)?,
            routed_scaling_factor: keys.number_or("routed_scaling_factor", 1.0)?,
            branches: branches(&keys, num_hidden_layers)?,
            raven_slots: keys.size_or("hybrid_raven_slots", limits::WIDTH, Some(64))?,
            raven_topk: keys.size_or("hybrid_raven_topk", limits::WIDTH, Some(32))?,
            adapter_rank: keys.size_or("hybrid_output_adapter_rank", limits::WIDTH, Some(16))?,
            alpha_init: keys.number_or("hybrid_alpha_init", 0.8473)?,
            initializer_range: keys.number_or("initializer_range", 0.02)?,
            num_loops: keys.size_or("num_loops", limits::LOOPS, Some(1))?,
            pad_token_id: match raw.get("pad_token_id") {
                None | Some(Value::Null) => None,
                Some(_) => Some(keys.size("pad_token_id", limits::VOCABULARY)? as u32),
            },
            raw: Map::new(),
        };
        config.check_shapes()?;
        // These two repeat sizes that the code takes from elsewhere.
        keys.only_number("moe_shared_expert_intermediate_size", config.moe_intermediate_size as f64)?;
        keys.only_number("hybrid_gla_group_norm_size", num_attention_heads as f64)?;
        keys.only_number("hybrid_output_adapter_alpha", config.adapter_rank as f64)?;
        Ok(Self { raw, ..config })
    }

    /// The released model's configuration.
    pub fn released() -> Result<Self, ConfigError> {
        Self::from_json(include_str!("preview_config.json"))
    }

    /// The released model's configuration, with its exact layer shapes in `layers` layers. Fewer than its 20 give one dense layer, then
    /// layers with a mixture and a branch each.
    pub fn preview(layers: usize) -> Result<Self, ConfigError> {
        let released = Self::released()?;
        if layers == released.num_hidden_layers {
            return Ok(released);
        }
        let mut keys = released.raw;
        let hybrid: Vec<usize> = if layers < released.num_hidden_layers { (1..layers).collect() } else { (4..layers).collect() };
        keys.insert("num_hidden_layers".into(), layers.into());
        keys.insert("hybrid_attention_layers".into(), hybrid.into());
        Self::from_json(&Value::Object(keys).to_string())
    }

    /// The configuration as JSON: the keys as read, and the two by which Hugging Face finds the model's class.
    pub fn to_json(&self) -> String {
        let mut keys = self.raw.clone();
        keys.entry("model_type").or_insert_with(|| "quasar_long".into());
        keys.entry("architectures").or_insert_with(|| vec!["QuasarLongForCausalLM"].into());
        let mut text = serde_json::to_string_pretty(&Value::Object(keys)).expect("a map of JSON values can always be written");
        text.push('\n');
        text
    }

    /// Names another element type of the weights, where the configuration names one.
    pub(crate) fn say_dtype(&mut self, dtype: DType) {
        let name = match dtype {
            DType::F32 => "float32",
            DType::Bf16 => "bfloat16",
            DType::F16 => "float16",
        };
        for key in ["dtype", "torch_dtype"] {
            if let Some(value) = self.raw.get_mut(key) {
                *value = name.into();
            }
        }
    }

    /// The branch that layer `layer` has beside softmax attention.
    pub fn branch(&self, layer: usize) -> Option<Branch> {
        self.branches[layer]
    }

    /// Whether layer `layer` has a mixture of experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        layer >= self.first_k_dense_replace
    }

    /// Mixture-of-experts layers that one forward pass runs through, counting loops.
    pub fn moe_passes(&self) -> usize {
        self.num_hidden_layers.saturating_sub(self.first_k_dense_replace) * self.num_loops
    }

    /// Most assignments that an expert takes from `tokens` tokens in the reference's training mode: twice its even share, at least 128.
    pub fn expert_capacity(&self, tokens: usize) -> usize {
        const LEAST: usize = 128;
        (2 * (tokens * self.num_experts_per_tok / self.num_experts)).max(LEAST)
    }

    /// Channels of a head that rotary embedding turns.
    pub fn rotary_width(&self) -> usize {
        (self.head_dim as f64 * self.partial_rotary_factor) as usize
    }

    /// `1 / theta^(2j/r)` for `j` in `0..r/2`: the buffer `model.rotary_emb.inv_freq`, always recomputed, since a copy
    /// in bf16 would be rounded.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let width = self.rotary_width();
        (0..width / 2).map(|j| libm::powf(self.rope_theta as f32, (2 * j) as f32 / width as f32)).map(f32::recip).collect()
    }

    /// Log-decays of the heads of a decayed-attention layer, the buffer `slope` (negative).
    pub fn slopes(&self, layer: usize) -> Vec<f32> {
        let heads = self.num_attention_heads as f64;
        let depth = layer.saturating_sub(1) as f64 / (self.num_hidden_layers - 1).max(1) as f64;
        (0..self.num_attention_heads).map(|h| (-libm::exp2(-8.0 * (h as f64 + 1.0) / heads) * (1.0 - depth + 1e-5)) as f32).collect()
    }

    fn check_shapes(&self) -> Result<(), ConfigError> {
        let must = |holds: bool, key: &'static str, found: usize, expected: &str| {
            if holds { Ok(()) } else { Err(ConfigError::Value { key, found: found.to_string(), expected: expected.to_owned() }) }
        };
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("num_experts", self.num_experts),
            ("num_experts_per_tok", self.num_experts_per_tok),
            ("n_group", self.n_group),
            ("topk_group", self.topk_group),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("hybrid_raven_slots", self.raven_slots),
            ("hybrid_raven_topk", self.raven_topk),
            ("hybrid_output_adapter_rank", self.adapter_rank),
            ("num_loops", self.num_loops),
        ];
        for (key, value) in positive {
            must(value > 0, key, value, "at least 1")?;
        }
        must(
            self.head_dim * self.num_attention_heads == self.hidden_size,
            "head_dim",
            self.head_dim,
            "hidden_size / num_attention_heads (the branches cut the hidden width into heads)",
        )?;
        must(
            self.num_attention_heads.is_multiple_of(self.num_key_value_heads),
            "num_key_value_heads",
            self.num_key_value_heads,
            "a divisor of num_attention_heads",
        )?;
        let rotary = self.rotary_width();
        must(
            (0.0..=1.0).contains(&self.partial_rotary_factor) && rotary.is_multiple_of(2),
            "partial_rotary_factor",
            rotary,
            "an even number of rotary channels, at most head_dim",
        )?;
        must(self.rope_theta > 0.0, "rope_theta", self.rope_theta as usize, "a positive number")?;
        must(self.rms_norm_eps > 0.0, "rms_norm_eps", self.rms_norm_eps as usize, "a positive number")?;
        must(self.num_experts.is_multiple_of(self.n_group), "n_group", self.n_group, "a divisor of num_experts")?;
        must(
            self.num_experts / self.n_group >= 2,
            "n_group",
            self.n_group,
            "at most num_experts / 2: a group is judged by its two best experts",
        )?;
        must(self.topk_group <= self.n_group, "topk_group", self.topk_group, "at most n_group")?;
        must(
            self.num_experts_per_tok <= self.topk_group * (self.num_experts / self.n_group),
            "num_experts_per_tok",
            self.num_experts_per_tok,
            "at most the number of experts in topk_group groups",
        )?;
        must(self.raven_topk <= self.raven_slots, "hybrid_raven_topk", self.raven_topk, "at most hybrid_raven_slots")?;
        must(
            !self.branches.contains(&Some(Branch::Gla)) || self.num_attention_heads.is_power_of_two(),
            "num_attention_heads",
            self.num_attention_heads,
            "a power of two: the decays of the gla branch are defined for such counts",
        )?;
        must(
            self.pad_token_id.is_none_or(|id| (id as usize) < self.vocab_size),
            "pad_token_id",
            self.pad_token_id.unwrap_or(0) as usize,
            "less than vocab_size",
        )
    }
}

/// Refuses everything that is on in the configuration and not computed here.
fn refuse_other_models(keys: &Keys) -> Result<(), ConfigError> {
    keys.only_text("model_type", &["quasar_long"])?;
    keys.only_text("hidden_act", &["silu"])?;
    keys.only_text("score_function", &["sigmoid"])?;
    keys.only_text("router_dtype", &["fp32"])?;
    keys.only_text("hybrid_branch_layout", &["layerwise"])?;
    keys.only_text("hybrid_replacement_mode", &["add"])?;
    keys.only_text("hybrid_raven_decay_type", &["Mamba2"])?;
    keys.only_text("hybrid_quasar_mode", &["chunk"])?;
    // Kernels for the same function.
    keys.only_text("hybrid_gla_mode", &["chunk", "fused_chunk", "fused_recurrent"])?;
    for key in ["use_qk_norm", "norm_topk_prob", "moe_router_enable_expert_bias"] {
        keys.only_flag(key, true)?;
    }
    keys.only_number("num_shared_experts", 1.0)?;
    let off = [
        "use_qkv_bias",
        "use_bias",
        "tie_word_embeddings",
        "rope_scaling",
        "attention_dropout",
        "embedding_dropout",
        "output_dropout",
        "hidden_dropout",
        "resid_dropout",
        "engram_layers",
        "num_nextn_predict_layers",
        "use_looped_injection",
        "use_parcae_loop_stabilizer",
        "hybrid_local_window_size",
        "hybrid_eval_force_branch",
        "hybrid_use_short_conv",
        "hybrid_quasar_use_rope",
        "hybrid_raven_add_gumbel_noise",
        "hybrid_gla_kernel_fp32",
    ];
    off.into_iter().try_for_each(|key| keys.only_off(key))?;
    // Distillation losses that imitate a branch; the names vary, none is implemented.
    keys.0.keys().filter(|key| key.contains("mimic")).try_for_each(|key| keys.only_off(key))
}

/// The branch of every layer: the hybrid layers in ascending order take the branches of the cycle in turn.
fn branches(keys: &Keys, layers: usize) -> Result<Vec<Option<Branch>>, ConfigError> {
    let wrong = |key, found: &Value, expected: &str| ConfigError::Value { key, found: found.to_string(), expected: expected.to_owned() };
    let mut cycle = Vec::new();
    for item in keys.list("hybrid_layerwise_cycle")? {
        let (branch, enabled) = match item.as_str() {
            Some("quasar") => (Branch::Quasar, "hybrid_quasar_enabled"),
            Some("raven") => (Branch::Raven, "hybrid_raven_enabled"),
            Some("gla") => (Branch::Gla, "hybrid_gla_enabled"),
            _ => return Err(wrong("hybrid_layerwise_cycle", item, "\"quasar\", \"raven\" or \"gla\"")),
        };
        keys.only_flag(enabled, true)?;
        cycle.push(branch);
    }
    let mut hybrid = vec![false; layers];
    for item in keys.list("hybrid_attention_layers")? {
        let layer = item.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n < layers);
        let layer = layer.ok_or_else(|| wrong("hybrid_attention_layers", item, "layer numbers below num_hidden_layers"))?;
        hybrid[layer] = true;
    }
    if hybrid.contains(&true) && cycle.is_empty() {
        return Err(ConfigError::Missing { key: "hybrid_layerwise_cycle" });
    }
    let mut turn = 0;
    let next = |is_hybrid: bool| {
        is_hybrid.then(|| {
            turn += 1;
            cycle[(turn - 1) % cycle.len()]
        })
    };
    Ok(hybrid.into_iter().map(next).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = include_str!("../tests/data/small_config.json");

    fn with(key: &str, value: Value) -> Result<QuasarConfig, ConfigError> {
        let mut keys: Map<String, Value> = serde_json::from_str(SMALL).unwrap();
        keys.insert(key.to_owned(), value);
        QuasarConfig::from_json(&Value::Object(keys).to_string())
    }

    #[test]
    fn hybrid_layers_take_the_branches_of_the_cycle_in_turn() {
        let config = QuasarConfig::from_json(SMALL).unwrap();
        let names: Vec<_> = config.branches.iter().map(|branch| branch.map_or("-", Branch::name)).collect();
        assert_eq!(names, ["-", "quasar", "raven", "gla", "quasar"]);
    }

    #[test]
    fn every_feature_that_is_on_but_not_implemented_is_refused_by_name() {
        let cases: Vec<(&str, Value)> = vec![
            ("model_type", "quasar".into()),
            ("hidden_act", "gelu".into()),
            ("num_loops", 0.into()),
            ("use_looped_injection", true.into()),
            ("use_parcae_loop_stabilizer", true.into()),
            ("engram_layers", vec![1].into()),
            ("num_nextn_predict_layers", 1.into()),
            ("hybrid_local_window_size", 128.into()),
            ("hybrid_replacement_mode", "full".into()),
            ("hybrid_branch_layout", "parallel".into()),
            ("hybrid_quasar_mode", "fused_recurrent".into()),
            ("hybrid_quasar_use_rope", true.into()),
            ("hybrid_use_short_conv", true.into()),
            ("hybrid_raven_add_gumbel_noise", true.into()),
            ("hybrid_gla_kernel_fp32", true.into()),
            ("hybrid_raven_decay_type", "GLA".into()),
            ("hybrid_output_adapter_alpha", 32.into()),
            ("hybrid_gla_group_norm_size", 1.into()),
            ("hybrid_gla_enabled", false.into()),
            ("hybrid_branch_mimic_weight", 0.1.into()),
            ("attention_dropout", 0.1.into()),
            ("tie_word_embeddings", true.into()),
            ("use_qk_norm", false.into()),
            ("use_qkv_bias", true.into()),
            ("rope_scaling", serde_json::json!({"type": "linear", "factor": 2})),
            ("score_function", "softmax".into()),
            ("norm_topk_prob", false.into()),
            ("num_shared_experts", 2.into()),
            ("moe_shared_expert_intermediate_size", 7.into()),
            ("long_context_mode", "yarn".into()),
        ];
        for (key, value) in cases {
            let error = with(key, value.clone()).expect_err(&format!("{key} = {value} was accepted")).to_string();
            assert!(error.contains(key) && error.contains("hint:"), "{key}: {error}");
        }
    }

    #[test]
    fn shapes_that_do_not_fit_together_are_refused_by_name() {
        for (key, value) in [
            ("head_dim", 9),
            ("num_key_value_heads", 3),
            ("n_group", 3),
            ("topk_group", 99),
            ("num_experts_per_tok", 99),
            ("hybrid_raven_topk", 999),
            ("pad_token_id", 1 << 20),
            ("vocab_size", 0),
            ("num_experts", 1 << 20),
        ] {
            let error = with(key, value.into()).expect_err(&format!("{key} = {value} was accepted")).to_string();
            assert!(error.contains('`'), "{error}");
        }
        assert!(with("hybrid_attention_layers", vec![99].into()).unwrap_err().to_string().contains("hybrid_attention_layers"));
        assert!(QuasarConfig::from_json("[]").is_err());
        assert!(QuasarConfig::from_json("{").is_err());
        assert!(QuasarConfig::from_json("{}").unwrap_err().to_string().contains("num_hidden_layers"));
    }

    #[test]
    fn features_that_are_named_but_off_are_accepted_and_written_back() {
        with("hybrid_gla_kernel_fp32", false.into()).unwrap();
        let config = with("engram_layers", Value::Array(vec![])).unwrap();
        assert!(config.to_json().contains("engram_layers"));
        assert_eq!(QuasarConfig::from_json(&config.to_json()).unwrap().branches, config.branches);
    }
}
