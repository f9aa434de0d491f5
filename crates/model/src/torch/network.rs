//! The whole network: embedding, layers, final norm, and next-token losses.

use std::cell::RefCell;
use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::attention::{Rope, Shape, add_branch, gqa};
use super::layout::Layout;
use super::moe::{Routing, add_moe, add_swiglu};
use super::ops::{Result, add_linear, linear, rms_norm, wide};
use super::{gla, quasar, raven};
use crate::{Batch, Branch, QuasarConfig};

/// Logits held at a time where no gradient is needed, in elements.
const LOGITS_MAX: usize = 1 << 26;

/// Configuration, layout and constants of a model on one device; the parameters come with each call.
pub struct Network {
    pub(crate) config: QuasarConfig,
    pub(crate) layout: Layout,
    pub(crate) device: Device,
    pub(crate) kind: Kind,
    buffers: HashMap<String, Tensor>,
    /// Rotary tables of the last sequence length.
    rope: RefCell<Option<(usize, Rope)>>,
}

/// The parameters of one forward pass by block name (see the layout), and the constants.
pub(crate) struct Weights<'a> {
    blocks: HashMap<&'a str, Tensor>,
    buffers: &'a HashMap<String, Tensor>,
}

impl Weights<'_> {
    /// A block or buffer. The names come from this crate's own layout, made from a checked configuration.
    pub fn get(&self, name: &str) -> &Tensor {
        self.blocks.get(name).or_else(|| self.buffers.get(name)).expect("the layout has every block that a layer asks for")
    }
}

/// Intermediate values of a forward pass, for comparison with other implementations.
#[derive(Debug)]
pub struct Trace {
    /// Input of each layer and output of the final norm, `[rows * tokens * hidden_size]` each.
    pub hidden: Vec<Vec<f32>>,
    /// `[rows * tokens * vocab_size]`
    pub logits: Vec<f32>,
}

impl Network {
    /// `buffers` are the constants of the checkpoint by name.
    pub(crate) fn new(
        config: QuasarConfig,
        layout: Layout,
        buffers: HashMap<String, Vec<f32>>,
        device: Device,
        kind: Kind,
    ) -> Result<Self> {
        let buffers = buffers.into_iter().map(|(name, values)| Ok((name, Tensor::f_from_slice(&values)?.f_to_device(device)?)));
        Ok(Self { buffers: buffers.collect::<Result<_>>()?, config, layout, device, kind, rope: RefCell::new(None) })
    }

    /// Cuts the trained and the frozen part of the parameter buffer into blocks, in the type of the computation.
    pub(crate) fn weights(&self, trained: &Tensor, frozen: &Tensor) -> Result<Weights<'_>> {
        let (front, back): (Vec<_>, Vec<_>) = self.layout.blocks.iter().partition(|block| block.trained);
        let mut blocks = HashMap::new();
        for (part, list) in [(trained, front), (frozen, back)] {
            let sizes: Vec<i64> = list.iter().map(|block| block.elements()).collect();
            // One split, so that the gradient of all blocks is put together once.
            let pieces = part.f_to_kind(self.kind)?.f_split_with_sizes(sizes, 0)?;
            for (block, piece) in list.into_iter().zip(pieces) {
                blocks.insert(block.key.as_str(), piece.f_reshape(&block.shape)?);
            }
        }
        Ok(Weights { blocks, buffers: &self.buffers })
    }

    /// The tokens of a checked batch, `[rows, row_tokens]`.
    pub(crate) fn tokens(&self, batch: &Batch) -> Result<Tensor> {
        let tokens: Vec<i64> = batch.tokens.iter().map(|token| i64::from(*token)).collect();
        Tensor::f_from_slice(&tokens)?.f_reshape([batch.rows as i64, batch.row_tokens as i64])?.f_to_device(self.device)
    }

    /// The output of the final norm, `[rows * row_tokens, D]`. `trace` takes the input of each layer.
    pub(crate) fn hidden(
        &self,
        weights: &Weights,
        tokens: &Tensor,
        routing: &mut Routing,
        mut trace: Option<&mut Vec<Tensor>>,
    ) -> Result<Tensor> {
        let config = &self.config;
        let size = tokens.size();
        let shape = Shape {
            rows: size[0],
            tokens: size[1],
            heads: config.num_attention_heads as i64,
            kv_heads: config.num_key_value_heads as i64,
            head_dim: config.head_dim as i64,
        };
        let mut cached = self.rope.borrow_mut();
        let (_, rope) = match cached.take() {
            Some((length, rope)) if length == size[1] as usize => cached.insert((length, rope)),
            _ => cached.insert((size[1] as usize, Rope::new(config, size[1] as usize, self.kind, self.device)?)),
        };
        // The embedding row of the pad token gets no gradient.
        let pad = config.pad_token_id.map_or(-1, i64::from);
        let embedding = weights.get("model.word_embeddings.weight");
        let mut x = Tensor::f_embedding(embedding, &tokens.f_reshape([-1])?, pad, false, false)?;
        for layer in (0..config.num_loops).flat_map(|_| 0..config.num_hidden_layers) {
            if let Some(trace) = trace.as_deref_mut() {
                trace.push(x.shallow_clone());
            }
            x = self.layer(&x, weights, layer, shape, rope, routing)?;
        }
        let x = rms_norm(&x, weights.get("model.norm.weight"), config.rms_norm_eps)?;
        if let Some(trace) = trace {
            trace.push(x.shallow_clone());
        }
        Ok(x)
    }

    fn layer(&self, x: &Tensor, weights: &Weights, layer: usize, shape: Shape, rope: &Rope, routing: &mut Routing) -> Result<Tensor> {
        let (config, eps) = (&self.config, self.config.rms_norm_eps);
        let prefix = format!("model.layers.{layer}.");
        let attention = format!("{prefix}attention.");
        let branch = config.branch(layer);
        let inner = branch.map(|branch| format!("{attention}{}_attention.", branch.name())).unwrap_or_default();

        let h = rms_norm(x, weights.get(&format!("{prefix}input_layernorm.weight")), eps)?;
        let mut widths = vec![shape.qkv()];
        match branch {
            Some(Branch::Raven) => widths.extend(raven::widths(config, shape)),
            Some(Branch::Gla) => widths.extend(gla::widths(shape)),
            Some(Branch::Quasar) | None => {}
        }
        let projected = linear(&h, weights.get(&format!("{attention}in")))?;
        let parts = if widths.len() > 1 { projected.f_split_with_sizes(&widths, -1)? } else { vec![projected] };
        let mixed = gqa(&parts[0], weights, &attention, shape, eps, rope)?;
        let x = add_linear(x, &mixed, weights.get(&format!("{attention}dense.weight")))?;
        let y = match branch {
            None => None,
            Some(Branch::Quasar) => Some(quasar::quasar(&h, weights, &inner, shape, eps)?),
            Some(Branch::Raven) => Some(raven::raven(&parts[1..], weights, &inner, shape, config)?),
            Some(Branch::Gla) => Some(gla::gla(&parts[1..], weights, &inner, shape, eps, rope)?),
        };
        let x = y.map_or_else(|| Ok(x.shallow_clone()), |y| add_branch(&x, &y, weights, &attention))?;

        let h = rms_norm(&x, weights.get(&format!("{prefix}post_attention_layernorm.weight")), eps)?;
        let mlp = format!("{prefix}mlp.");
        if config.is_moe(layer) { add_moe(&x, &h, weights, &mlp, config, routing) } else { add_swiglu(&x, &h, weights, &mlp) }
    }

    /// Losses of every position but the last, `[rows, T - 1]` in f32, from the output of the final norm.
    pub(crate) fn losses(&self, weights: &Weights, hidden: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        let size = tokens.size();
        let targets = tokens.f_narrow(1, 1, size[1] - 1)?.f_reshape([-1])?;
        let hidden = hidden.f_reshape([size[0], size[1], -1])?.f_narrow(1, 0, size[1] - 1)?;
        let hidden = hidden.f_reshape([-1, self.config.hidden_size as i64])?;
        let head = weights.get("lm_head.weight");
        let step = (LOGITS_MAX / self.config.vocab_size).max(1) as i64;
        let mut losses = Vec::new();
        for (hidden, targets) in hidden.f_split(step, 0)?.iter().zip(targets.f_split(step, 0)?) {
            let logits = wide(&linear(hidden, head)?)?;
            losses.push(logits.f_cross_entropy_loss(&targets, None::<&Tensor>, tch::Reduction::None, -100, 0.0)?);
        }
        Tensor::f_cat(&losses, 0)?.f_reshape([size[0], -1])
    }
}
