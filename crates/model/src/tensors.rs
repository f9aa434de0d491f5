//! The tensors of a Quasar checkpoint: names and shapes as Hugging Face files have them.
//!
//! Shapes use `D` hidden_size, `H` query heads, `KV` key/value heads, `d` head_dim, `E` experts, `I` expert width, `M`
//! slots. Buffers (`expert_bias`, `slope`, `inv_freq`) lie in the files too, but are constants: they belong to no fragment.

use crate::{Branch, QuasarConfig};

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    pub name: String,
    pub shape: Vec<u64>,
    /// Constant, not a parameter.
    pub is_buffer: bool,
}

impl TensorEntry {
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

struct List(Vec<TensorEntry>);

impl List {
    fn add(&mut self, name: String, shape: &[usize], is_buffer: bool) {
        self.0.push(TensorEntry { name, shape: shape.iter().map(|n| *n as u64).collect(), is_buffer });
    }

    fn parameter(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.add(name.into(), shape, false);
    }

    fn buffer(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.add(name.into(), shape, true);
    }

    /// Gate, up and down projection of a SwiGLU of the given width.
    fn swiglu(&mut self, prefix: &str, hidden: usize, width: usize) {
        self.parameter(format!("{prefix}gate_proj.weight"), &[width, hidden]);
        self.parameter(format!("{prefix}up_proj.weight"), &[width, hidden]);
        self.parameter(format!("{prefix}down_proj.weight"), &[hidden, width]);
    }
}

impl QuasarConfig {
    /// Every tensor of a checkpoint with this configuration, in the order of the model.
    pub fn tensors(&self) -> Vec<TensorEntry> {
        let mut list = List(Vec::new());
        list.parameter("model.word_embeddings.weight", &[self.vocab_size, self.hidden_size]);
        for layer in 0..self.num_hidden_layers {
            self.layer_tensors(&mut list, layer);
        }
        list.parameter("model.norm.weight", &[self.hidden_size]);
        list.buffer("model.rotary_emb.inv_freq", &[self.rotary_width() / 2]);
        list.parameter("lm_head.weight", &[self.vocab_size, self.hidden_size]);
        list.0
    }

    /// Number of parameters, buffers left out.
    pub fn parameter_count(&self) -> u64 {
        self.tensors().iter().filter(|tensor| !tensor.is_buffer).map(TensorEntry::elements).sum()
    }

    /// Rows of a fused query, key and value projection.
    pub(crate) fn qkv_rows(&self) -> usize {
        (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
    }

    fn layer_tensors(&self, list: &mut List, layer: usize) {
        let hidden = self.hidden_size;
        let prefix = format!("model.layers.{layer}.");
        list.parameter(format!("{prefix}input_layernorm.weight"), &[hidden]);
        list.parameter(format!("{prefix}post_attention_layernorm.weight"), &[hidden]);
        let attention = format!("{prefix}attention.");
        self.fused_attention(list, &attention);
        if let Some(branch) = self.branch(layer) {
            for scalar in ["replace_alpha_raw", "branch_output_gain", "branch_global_output_gain", "branch_local_window_mix_logit"] {
                list.parameter(format!("{attention}{scalar}"), &[1]);
            }
            list.parameter(format!("{attention}branch_mix_logits"), &[3]);
            list.parameter(format!("{attention}branch_output_channel_gain"), &[hidden]);
            list.parameter(format!("{attention}branch_output_adapter_down.weight"), &[self.adapter_rank, hidden]);
            list.parameter(format!("{attention}branch_output_adapter_up.weight"), &[hidden, self.adapter_rank]);
            let inner = format!("{attention}{}_attention.", branch.name());
            match branch {
                Branch::Quasar => self.quasar_tensors(list, &inner),
                Branch::Raven => self.raven_tensors(list, &inner),
                Branch::Gla => {
                    self.fused_attention(list, &inner);
                    list.parameter(format!("{inner}g_proj.weight"), &[hidden, hidden]);
                    list.parameter(format!("{inner}g_norm.weight"), &[hidden]);
                    list.buffer(format!("{inner}slope"), &[self.num_attention_heads]);
                }
            }
        }
        let mlp = format!("{prefix}mlp.");
        if !self.is_moe(layer) {
            return list.swiglu(&mlp, hidden, self.intermediate_size);
        }
        let width = self.moe_intermediate_size;
        list.parameter(format!("{mlp}experts_w12"), &[self.num_experts, hidden, 2 * width]);
        list.parameter(format!("{mlp}experts_w3"), &[self.num_experts, width, hidden]);
        list.parameter(format!("{mlp}gate.weight"), &[self.num_experts, hidden]);
        list.buffer(format!("{mlp}gate.expert_bias"), &[self.num_experts]);
        list.swiglu(&format!("{mlp}shared_experts."), hidden, width);
    }

    /// Projections and head norms of softmax attention, which the decayed branch has as well.
    fn fused_attention(&self, list: &mut List, prefix: &str) {
        list.parameter(format!("{prefix}query_key_value.weight"), &[self.qkv_rows(), self.hidden_size]);
        list.parameter(format!("{prefix}dense.weight"), &[self.hidden_size, self.hidden_size]);
        list.parameter(format!("{prefix}query_layernorm.weight"), &[self.head_dim]);
        list.parameter(format!("{prefix}key_layernorm.weight"), &[self.head_dim]);
    }

    fn quasar_tensors(&self, list: &mut List, prefix: &str) {
        let (hidden, head) = (self.hidden_size, self.head_dim);
        for name in ["q", "k", "v", "f", "o"] {
            list.parameter(format!("{prefix}{name}_proj.weight"), &[hidden, hidden]);
        }
        list.parameter(format!("{prefix}b_proj.weight"), &[self.num_attention_heads, hidden]);
        list.parameter(format!("{prefix}g_proj.0.weight"), &[head, hidden]);
        list.parameter(format!("{prefix}g_proj.1.weight"), &[hidden, head]);
        list.parameter(format!("{prefix}g_proj.1.bias"), &[hidden]);
        list.parameter(format!("{prefix}A_log"), &[self.num_attention_heads]);
        list.parameter(format!("{prefix}dt_bias"), &[hidden]);
        list.parameter(format!("{prefix}o_norm.weight"), &[head]);
    }

    fn raven_tensors(&self, list: &mut List, prefix: &str) {
        let (hidden, head) = (self.hidden_size, self.head_dim);
        let (heads, narrow) = (self.num_attention_heads, self.num_key_value_heads * head);
        list.parameter(format!("{prefix}q_proj.weight"), &[hidden, hidden]);
        list.parameter(format!("{prefix}k_proj.weight"), &[narrow, hidden]);
        list.parameter(format!("{prefix}v_proj.weight"), &[narrow, hidden]);
        list.parameter(format!("{prefix}r_proj.weight"), &[heads * self.raven_slots, hidden]);
        list.parameter(format!("{prefix}a_proj.weight"), &[heads, hidden]);
        list.parameter(format!("{prefix}o_proj.weight"), &[hidden, hidden]);
        list.parameter(format!("{prefix}A_log"), &[heads]);
        list.parameter(format!("{prefix}dt_bias"), &[heads]);
        list.parameter(format!("{prefix}q_norm.weight"), &[head]);
        list.parameter(format!("{prefix}k_norm.weight"), &[head]);
        list.parameter(format!("{prefix}g_norm.weight"), &[hidden]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_released_model_has_exactly_the_tensors_of_the_reference() {
        let config = QuasarConfig::from_json(include_str!("preview_config.json")).unwrap();
        let ours: BTreeMap<String, (String, bool)> = config
            .tensors()
            .into_iter()
            .map(|tensor| {
                let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
                (tensor.name, (shape.join("x"), tensor.is_buffer))
            })
            .collect();
        let reference: BTreeMap<String, (String, bool)> = include_str!("../tests/data/tensors.tsv")
            .lines()
            .map(|line| {
                let fields: Vec<&str> = line.split('\t').collect();
                (fields[0].to_owned(), (fields[1].to_owned(), fields[2] == "buffer"))
            })
            .collect();
        assert_eq!(reference.len(), 562);
        assert_eq!(ours.len(), config.tensors().len(), "a name occurs twice");
        for (name, expected) in &reference {
            assert_eq!(ours.get(name), Some(expected), "{name}");
        }
        assert_eq!(ours.len(), reference.len());
        assert_eq!(config.parameter_count(), 16_553_949_296);
    }

    #[test]
    fn slopes_follow_the_formula_of_the_released_model() {
        let config = QuasarConfig::from_json(include_str!("preview_config.json")).unwrap();
        let slopes = config.slopes(8);
        let expected = -(2f64.powf(-0.5)) * (1.0 - 7.0 / 19.0 + 1e-5);
        assert!((f64::from(slopes[0]) - expected).abs() < 1e-7);
        assert!((f64::from(slopes[15]) - (-(2f64.powf(-8.0)) * (1.0 - 7.0 / 19.0 + 1e-5))).abs() < 1e-9);
        assert_eq!(config.inverse_frequencies().len(), 32);
        assert!((config.inverse_frequencies()[31] - 10_000f32.powf(-62.0 / 64.0)).abs() < 1e-9);
    }
}
