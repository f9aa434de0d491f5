//! Forward and backward pass of the whole network in bf16 with own kernels: what [`crate::torch::Network`] computes through
//! libtorch's autograd, written out, so that every step of the backward pass is one kernel or one product.
//!
//! Dense products are cuBLAS's and the experts' are libtorch's grouped ones; softmax attention is libtorch's, differentiated by
//! its autograd in a segment of its own. Everything between them is in `kernels/`. All work is put in one stream and nothing
//! waits for it before the step's verdict is read.

use tch::{Kind, Tensor};

use super::attention::{self, GqaSaved};
use super::branch::{self, BranchSaved};
use super::driver::Argument;
use super::kernels::Kernels;
use super::mixture::{self, MlpSaved, Routes};
use super::store::{Gradients, Store};
use crate::QuasarConfig;
use crate::torch::ops::Result;

/// Rows of logits held at a time.
const LOGIT_ROWS: i64 = 4096;

/// How rows are normed, as the kernels number it.
#[derive(Clone, Copy)]
pub(crate) enum Norm {
    Plain = 0,
    /// silu first.
    Silu = 1,
    /// Clamped first, no weight.
    Bounded = 2,
}

/// Everything that one pass works with.
pub(crate) struct Pass<'a> {
    pub kernels: &'a Kernels,
    pub store: &'a Store,
    pub config: &'a QuasarConfig,
    pub constants: &'a Constants,
    pub rows: i64,
    pub row_tokens: i64,
    /// Whether experts take a limited number of tokens.
    pub cap_experts: bool,
}

/// Constant tensors on the device.
pub(crate) struct Constants {
    /// Rotary tables `[length, 32]` f32, rounded to bf16 as the reference has them; the embedding is the identity behind them.
    pub cos: Tensor,
    pub sin: Tensor,
    /// Routing bias and decay slopes by name, f32.
    pub buffers: std::collections::HashMap<String, Tensor>,
}

impl Constants {
    /// For sequences of up to `tokens`.
    pub fn new(
        config: &QuasarConfig,
        buffers: &std::collections::HashMap<String, Vec<f32>>,
        tokens: usize,
        device: tch::Device,
    ) -> Result<Self> {
        let length = tokens.min(config.nope_after_position.unwrap_or(tokens)).max(1);
        let frequencies = config.inverse_frequencies();
        let table = |f: fn(f32) -> f32| -> Result<Tensor> {
            let round = |x: f32| half::bf16::from_f32(f(x)).to_f32();
            let values: Vec<f32> =
                (0..length).flat_map(|position| frequencies.iter().map(move |frequency| round(position as f32 * frequency))).collect();
            Tensor::f_from_slice(&values)?.f_reshape([length as i64, -1])?.f_to_device(device)
        };
        let buffer = |(name, values): (&String, &Vec<f32>)| -> Result<(String, Tensor)> {
            // The reference casts slopes to bf16.
            let is_slope = name.ends_with(".slope");
            let values: Vec<f32> = values.iter().map(|x| if is_slope { half::bf16::from_f32(*x).to_f32() } else { *x }).collect();
            Ok((name.clone(), Tensor::f_from_slice(&values)?.f_to_device(device)?))
        };
        Ok(Self { cos: table(libm::cosf)?, sin: table(libm::sinf)?, buffers: buffers.iter().map(buffer).collect::<Result<_>>()? })
    }

    fn buffer(&self, name: &str) -> Result<&Tensor> {
        self.buffers.get(name).ok_or_else(|| tch::TchError::Kind(format!("there is no buffer {name}")))
    }
}

/// What the backward pass of a layer needs.
struct LayerSaved {
    input: Tensor,
    input_scale: Tensor,
    attention: GqaSaved,
    branch: Option<BranchSaved>,
    middle: Tensor,
    middle_scale: Tensor,
    mlp: MlpSaved,
}

impl Pass<'_> {
    pub fn tokens(&self) -> i64 {
        self.rows * self.row_tokens
    }

    pub fn weight(&self, key: &str) -> Result<&Tensor> {
        self.store.weight(key)
    }

    pub fn buffer(&self, name: &str) -> Result<&Tensor> {
        self.constants.buffer(name)
    }

    /// `x W^T` for the matrix `key`.
    pub fn linear(&self, x: &Tensor, key: &str) -> Result<Tensor> {
        x.f_mm(&self.weight(key)?.f_tr()?)
    }

    /// `base + x W^T`.
    pub fn add_linear(&self, base: &Tensor, x: &Tensor, key: &str) -> Result<Tensor> {
        base.f_addmm(x, &self.weight(key)?.f_tr()?)
    }

    /// The gradient of `x` in [`Pass::linear`].
    pub fn linear_backward(&self, dy: &Tensor, key: &str) -> Result<Tensor> {
        dy.f_mm(self.weight(key)?)
    }

    /// An uninitialised bf16 tensor.
    pub fn empty(&self, shape: &[i64]) -> Result<Tensor> {
        self.kernels.empty(shape, Kind::BFloat16)
    }

    /// An uninitialised f32 tensor.
    pub fn floats(&self, shape: &[i64]) -> Result<Tensor> {
        self.kernels.empty(shape, Kind::Float)
    }

    /// RMS norm of `x [N, D]`; also `1 / rms [N]`.
    pub fn norm(&self, x: &Tensor, weight: Option<&Tensor>, eps: f64, mode: Norm) -> Result<(Tensor, Tensor)> {
        let rows = x.size()[0];
        let (y, scale) = (self.empty(&x.size())?, self.floats(&[rows])?);
        let arguments = [
            x.into(),
            weight.map_or(Argument::NULL, Argument::from),
            (&y).into(),
            (&scale).into(),
            (eps as f32).into(),
            (mode as i32).into(),
        ];
        self.kernels.launch("rms_forward", rows, self.kernels.row_threads(), &arguments)?;
        Ok((y, scale))
    }

    /// Gradient of [`Pass::norm`] by `x`, plus `carried`; and by the weight, f32.
    pub fn norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        weight: Option<&Tensor>,
        scale: &Tensor,
        carried: Option<&Tensor>,
        mode: Norm,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let rows = x.size()[0];
        let dx = self.empty(&x.size())?;
        let blocks = self.kernels.walkers(rows);
        let partial = weight.map(|_| self.floats(&[i64::from(blocks), self.config.hidden_size as i64])).transpose()?;
        let arguments = [
            dy.into(),
            x.into(),
            weight.map_or(Argument::NULL, Argument::from),
            scale.into(),
            carried.map_or(Argument::NULL, Argument::from),
            (&dx).into(),
            partial.as_ref().map_or(Argument::NULL, Argument::from),
            (rows as i32).into(),
            (mode as i32).into(),
        ];
        self.kernels.launch("rms_backward", blocks, self.kernels.row_threads(), &arguments)?;
        let dw = partial.map(|partial| self.kernels.column_sums(&partial)).transpose()?;
        Ok((dx, dw))
    }

    fn layer(&self, x: Tensor, layer: usize, routes: &mut Routes) -> Result<(Tensor, LayerSaved)> {
        let eps = self.config.rms_norm_eps;
        let prefix = format!("model.layers.{layer}.");
        let (h, input_scale) = self.norm(&x, Some(self.weight(&format!("{prefix}input_layernorm.weight"))?), eps, Norm::Plain)?;
        let (after, attention) = attention::forward(self, &x, &h, &format!("{prefix}attention."))?;
        let (middle, branch) = match self.config.branch(layer) {
            None => (after, None),
            Some(kind) => {
                let (middle, saved) = branch::forward(self, kind, &after, &h, &attention.projected, &format!("{prefix}attention."))?;
                (middle, Some(saved))
            }
        };
        let (h, middle_scale) =
            self.norm(&middle, Some(self.weight(&format!("{prefix}post_attention_layernorm.weight"))?), eps, Norm::Plain)?;
        let (out, mlp) = mixture::forward(self, &middle, &h, &format!("{prefix}mlp."), self.config.is_moe(layer), routes)?;
        Ok((out, LayerSaved { input: x, input_scale, attention, branch, middle, middle_scale, mlp }))
    }

    fn layer_backward(&self, dx: Tensor, saved: LayerSaved, layer: usize, gradients: &mut Gradients) -> Result<Tensor> {
        let eps = self.config.rms_norm_eps;
        let prefix = format!("model.layers.{layer}.");
        let LayerSaved { input, input_scale, attention, branch, middle, middle_scale, mlp } = saved;
        // Normed inputs are computed again: cheaper than to keep.
        let name = format!("{prefix}post_attention_layernorm.weight");
        let weight = self.weight(&name)?;
        let (h, _) = self.norm(&middle, Some(weight), eps, Norm::Plain)?;
        let dh = mixture::backward(self, &dx, &h, mlp, &format!("{prefix}mlp."), gradients)?;
        drop(h);
        let (dx, dw) = self.norm_backward(&dh, &middle, Some(weight), &middle_scale, Some(&dx), Norm::Plain)?;
        drop((dh, middle));
        if let Some(dw) = dw {
            gradients.vector(&name, &dw)?;
        }

        let name = format!("{prefix}input_layernorm.weight");
        let weight = self.weight(&name)?;
        let (h, _) = self.norm(&input, Some(weight), eps, Norm::Plain)?;
        let inner = format!("{prefix}attention.");
        let dprojected = self.empty(&attention.projected.size())?;
        let from_branch = match branch {
            None => None,
            Some(saved) => branch::backward(self, &dx, &h, &attention.projected, &dprojected, saved, &inner, gradients)?,
        };
        let dh = attention::backward(self, &dx, &h, attention, dprojected, from_branch, &inner, gradients)?;
        let (dx, dw) = self.norm_backward(&dh, &input, Some(weight), &input_scale, Some(&dx), Norm::Plain)?;
        if let Some(dw) = dw {
            gradients.vector(&name, &dw)?;
        }
        Ok(dx)
    }

    /// The input of each layer, and the output of the final norm.
    pub fn trace(&self, tokens: &Tensor, routes: &mut Routes) -> Result<Vec<Tensor>> {
        let pad = self.config.pad_token_id.map_or(-1, i64::from);
        let mut hidden = vec![Tensor::f_embedding(self.weight("model.word_embeddings.weight")?, tokens, pad, false, false)?];
        for layer in 0..self.config.num_hidden_layers {
            let x = hidden[layer].shallow_clone();
            hidden.push(self.layer(x, layer, routes)?.0);
        }
        if let Some(x) = hidden.pop() {
            hidden.push(self.norm(&x, Some(self.weight("model.norm.weight")?), self.config.rms_norm_eps, Norm::Plain)?.0);
        }
        Ok(hidden)
    }

    /// The loss of every position, f32, 0 where there is no next token; gradients are added. `tokens` i64 and `targets` i32 are `[N]`; a negative target counts nothing; gradients are of
    /// the sum of losses times `scale`. With `recompute`, only the input of each layer is kept for the backward pass.
    pub fn run(
        &self,
        tokens: &Tensor,
        targets: &Tensor,
        scale: f64,
        recompute: bool,
        routes: &mut Routes,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let config = self.config;
        let pad = config.pad_token_id.map_or(-1, i64::from);
        let embedding = "model.word_embeddings.weight";
        let mut x = Tensor::f_embedding(self.weight(embedding)?, tokens, pad, false, false)?;
        let mut saved = Vec::new();
        let mut inputs = Vec::new();
        for layer in 0..config.num_hidden_layers {
            if recompute {
                inputs.push(x.shallow_clone());
                x = self.layer(x, layer, routes)?.0;
            } else {
                let (out, one) = self.layer(x, layer, routes)?;
                x = out;
                saved.push(one);
            }
        }
        let name = "model.norm.weight";
        let (hidden, last_scale) = self.norm(&x, Some(self.weight(name)?), config.rms_norm_eps, Norm::Plain)?;
        let (losses, dhidden) = self.head(&hidden, targets, scale, gradients)?;
        drop(hidden);
        let (mut dx, dw) = self.norm_backward(&dhidden, &x, Some(self.weight(name)?), &last_scale, None, Norm::Plain)?;
        drop((dhidden, x));
        if let Some(dw) = dw {
            gradients.vector(name, &dw)?;
        }
        for layer in (0..config.num_hidden_layers).rev() {
            let one = match inputs.pop() {
                Some(input) => self.layer(input, layer, &mut routes.of_layer(config, layer))?.1,
                None => saved.pop().ok_or_else(|| tch::TchError::Kind("a layer's state is missing".into()))?,
            };
            dx = self.layer_backward(dx, one, layer, gradients)?;
        }
        gradients.matrix(embedding.to_owned(), Tensor::f_embedding_dense_backward(&dx, tokens, config.vocab_size as i64, pad, false)?)?;
        Ok(losses)
    }

    /// Next-token losses `[N]` f32 of the final norm's output, its gradient, and that of the output matrix. Logits exist for
    /// some rows at a time and become their own gradient in place.
    fn head(&self, hidden: &Tensor, targets: &Tensor, scale: f64, gradients: &mut Gradients) -> Result<(Tensor, Tensor)> {
        let key = "lm_head.weight";
        let head = self.weight(key)?;
        let (count, width) = (hidden.size()[0], hidden.size()[1]);
        let (losses, dhidden) = (self.floats(&[count])?, self.empty(&[count, width])?);
        let logits = self.empty(&[LOGIT_ROWS.min(count), self.config.vocab_size as i64])?;
        for from in (0..count).step_by(LOGIT_ROWS as usize) {
            let rows = LOGIT_ROWS.min(count - from);
            let part = |x: &Tensor| x.f_narrow(0, from, rows);
            let (h, logits) = (part(hidden)?, logits.f_narrow(0, 0, rows)?);
            let _ = h.f_mm_out(&logits, &head.f_tr()?)?;
            let arguments = [(&logits).into(), Argument::at(targets, from), Argument::at(&losses, from), (scale as f32).into()];
            self.kernels.launch("cross_entropy", rows, 1024u32, &arguments)?;
            let _ = logits.f_mm_out(&part(&dhidden)?, head)?;
            gradients.linear(key.to_owned(), &logits, &h)?;
        }
        Ok((losses, dhidden))
    }
}
