//! All parameters in one flat buffer, in an order that serves the computation.
//!
//! - Trained parameters come first, frozen ones behind them: the optimizer runs over one range, and the gradient of the
//!   whole model is one tensor. In both parts matrices come before vectors.
//! - Matrices that multiply the same input stand next to each other, so that a view of the buffer is the stacked matrix
//!   and one product does the work of several (a *block*).
//! - Every tensor is contiguous, so each slice of a fragment plan is one range.

use std::collections::HashMap;
use std::ops::Range;

use crate::ranges::Place;
use crate::{Branch, QuasarConfig};

/// Tensors of a block that stand one upon the other along the first axis.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// How the forward pass asks for it.
    pub key: String,
    pub members: Vec<String>,
    pub shape: Vec<i64>,
    pub trained: bool,
}

impl Block {
    pub fn elements(&self) -> i64 {
        self.shape.iter().product()
    }
}

/// Blocks in the order of the buffer, and where each tensor lies.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub blocks: Vec<Block>,
    pub places: HashMap<String, Place>,
    /// Elements of trained parameters, which come first.
    pub trained: usize,
    /// Elements of all parameters.
    pub elements: usize,
    /// Ranges of trained matrices, which weight decay applies to.
    pub decayed: Vec<Range<usize>>,
}

impl Layout {
    /// `train_step_sizes`: whether `A_log` and `dt_bias` of Quasar branches are trained.
    pub fn new(config: &QuasarConfig, train_step_sizes: bool) -> Self {
        let shapes: HashMap<String, Vec<u64>> =
            config.tensors().into_iter().filter(|tensor| !tensor.is_buffer).map(|tensor| (tensor.name, tensor.shape)).collect();
        let mut blocks: Vec<Block> = stacked(config).into_iter().map(|(key, members)| block(key, members, &shapes)).collect();
        let mut covered: Vec<&String> = blocks.iter().flat_map(|block| &block.members).collect();
        covered.sort();
        let alone: Vec<String> = config
            .tensors()
            .into_iter()
            .filter(|tensor| !tensor.is_buffer && covered.binary_search(&&tensor.name).is_err())
            .map(|tensor| tensor.name)
            .collect();
        blocks.extend(alone.into_iter().map(|name| block(name.clone(), vec![name], &shapes)));
        for block in &mut blocks {
            block.trained = !is_frozen(&block.key, train_step_sizes);
        }
        // Vectors behind matrices: products want matrices to begin at multiples of 16 bytes. Stable otherwise.
        blocks.sort_by_key(|block| (!block.trained, block.shape.len() == 1));

        let mut layout = Self { blocks, places: HashMap::new(), trained: 0, elements: 0, decayed: Vec::new() };
        for block in &layout.blocks {
            for name in &block.members {
                let shape = &shapes[name];
                let (rows, row_elements) = (shape[0], shape[1..].iter().product::<u64>());
                layout.places.insert(name.clone(), Place { offset: layout.elements, rows, row_elements });
                let end = layout.elements + (rows * row_elements) as usize;
                if block.trained && shape.len() > 1 {
                    layout.decayed.push(layout.elements..end);
                }
                layout.elements = end;
            }
            if block.trained {
                layout.trained = layout.elements;
            }
        }
        layout
    }

    /// The range of a tensor in the buffer.
    pub fn range(&self, name: &str) -> Option<Range<usize>> {
        let place = self.places.get(name)?;
        Some(place.offset..place.offset + (place.rows * place.row_elements) as usize)
    }
}

/// Parameters without gradient: unused ones (the reference keeps them in its files), those whose gradient vanishes
/// identically, and, unless asked for, the step-size parameters of Quasar branches.
fn is_frozen(name: &str, train_step_sizes: bool) -> bool {
    let step_size = name.ends_with("quasar_attention.A_log") || name.ends_with("quasar_attention.dt_bias");
    ["quasar_attention.f_proj.weight", "branch_mix_logits", "branch_local_window_mix_logit"].iter().any(|end| name.ends_with(end))
        || (step_size && !train_step_sizes)
}

fn block(key: String, members: Vec<String>, shapes: &HashMap<String, Vec<u64>>) -> Block {
    let rows: u64 = members.iter().map(|name| shapes[name][0]).sum();
    let mut shape: Vec<i64> = shapes[&members[0]].iter().map(|n| *n as i64).collect();
    shape[0] = rows as i64;
    Block { key, members, shape, trained: true }
}

/// Blocks of more than one matrix.
fn stacked(config: &QuasarConfig) -> Vec<(String, Vec<String>)> {
    let mut blocks = Vec::new();
    for layer in 0..config.num_hidden_layers {
        let attention = format!("model.layers.{layer}.attention.");
        let below = |prefix: &str, names: &[&str]| names.iter().map(|name| format!("{attention}{prefix}{name}.weight")).collect::<Vec<_>>();
        // Raven and the decayed branch read the same normed input as softmax attention; Quasar norms it once more.
        let mut input = below("", &["query_key_value"]);
        match config.branch(layer) {
            Some(Branch::Raven) => input.extend(below("raven_attention.", &["q_proj", "k_proj", "v_proj", "r_proj", "a_proj"])),
            Some(Branch::Gla) => input.extend(below("gla_attention.", &["query_key_value", "g_proj"])),
            Some(Branch::Quasar) => {
                let names = ["q_proj", "k_proj", "v_proj", "g_proj.0", "b_proj"];
                blocks.push((format!("{attention}quasar_attention.in"), below("quasar_attention.", &names)));
            }
            None => {}
        }
        blocks.push((format!("{attention}in"), input));
        let mlp = format!("model.layers.{layer}.mlp.{}", if config.is_moe(layer) { "shared_experts." } else { "" });
        blocks.push((format!("{mlp}in"), vec![format!("{mlp}gate_proj.weight"), format!("{mlp}up_proj.weight")]));
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_has_its_own_place_and_trained_ones_come_first() {
        let config = QuasarConfig::from_json(include_str!("../../tests/data/small_config.json")).unwrap();
        for train_step_sizes in [false, true] {
            let layout = Layout::new(&config, train_step_sizes);
            assert_eq!(layout.elements as u64, config.parameter_count());
            let mut ranges: Vec<_> = layout.places.keys().map(|name| (layout.range(name).unwrap(), name)).collect();
            ranges.sort_by_key(|(range, _)| range.start);
            let mut end = 0;
            for (range, name) in ranges {
                assert_eq!(range.start, end, "{name}");
                assert_eq!(range.end <= layout.trained, !is_frozen(name, train_step_sizes), "{name}");
                end = range.end;
            }
            assert_eq!(end, layout.elements);
            assert_eq!(layout.blocks.iter().map(Block::elements).sum::<i64>(), layout.elements as i64);
            assert!(layout.decayed.iter().all(|range| range.end <= layout.trained));
        }
    }
}
