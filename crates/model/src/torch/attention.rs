//! Softmax attention with grouped queries, rotary embedding, and the gate that adds a linear-attention branch.

use tch::{Device, Kind, Tensor};

use super::network::Weights;
use super::ops::{Result, add_linear, linear, rms_norm};
use crate::QuasarConfig;

/// Lower bound of the divisor that cancels `branch_output_gain`.
const GAIN_FLOOR: f64 = 1e-6;

/// Rotary tables for positions `0..T`: `rotated = x · cos + (x P) · sin`, with `P` the signed permutation that turns
/// channel `j` into minus channel `j + r/2` and back. Channels behind the rotary width have cos 1 and sin 0, as have all
/// channels from `nope_after_position` on.
pub(crate) struct Rope {
    /// `[T, 1, d]`
    cos: Tensor,
    sin: Tensor,
    /// `[d, d]`
    swap: Tensor,
}

impl Rope {
    pub fn new(config: &QuasarConfig, tokens: usize, kind: Kind, device: Device) -> Result<Self> {
        let (width, rotary) = (config.head_dim, config.rotary_width());
        let half = rotary / 2;
        let frequencies = config.inverse_frequencies();
        let (mut cos, mut sin) = (vec![1f32; tokens * width], vec![0f32; tokens * width]);
        for position in 0..tokens.min(config.nope_after_position.unwrap_or(tokens)) {
            for j in 0..rotary {
                let angle = position as f32 * frequencies[j % half];
                cos[position * width + j] = libm::cosf(angle);
                sin[position * width + j] = libm::sinf(angle);
            }
        }
        let mut swap = vec![0f32; width * width];
        for j in 0..half {
            swap[(j + half) * width + j] = -1.0;
            swap[j * width + j + half] = 1.0;
        }
        let tensor = |values: &[f32], shape: &[i64]| Tensor::f_from_slice(values)?.f_reshape(shape)?.f_to_kind(kind)?.f_to_device(device);
        let table = [tokens as i64, 1, width as i64];
        Ok(Self { cos: tensor(&cos, &table)?, sin: tensor(&sin, &table)?, swap: tensor(&swap, &[width as i64, width as i64])? })
    }

    /// `x [B, T, heads, d]`
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        x.f_mul(&self.cos)?.f_addcmul(&x.f_matmul(&self.swap)?, &self.sin)
    }
}

/// Sizes of a batch that every part needs.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub rows: i64,
    pub tokens: i64,
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
}

impl Shape {
    pub fn hidden(&self) -> i64 {
        self.heads * self.head_dim
    }

    /// Widths of a fused query, key and value projection.
    pub fn qkv(&self) -> i64 {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// `[N, width]` as `[B, T, width / d, d]`.
    pub fn by_head(&self, x: &Tensor) -> Result<Tensor> {
        x.f_reshape([self.rows, self.tokens, -1, self.head_dim])
    }
}

/// Queries `[B, T, H, d]`, keys and values `[B, T, KV, d]` of a fused projection `[N, (H + 2 KV) d]`: head norm, then rope.
pub(crate) fn fused_qkv(projected: &Tensor, weights: &Weights, prefix: &str, shape: Shape, eps: f64, rope: &Rope) -> Result<[Tensor; 3]> {
    let (heads, kv_heads, width) = (shape.heads, shape.kv_heads, shape.head_dim);
    let parts = shape.by_head(projected)?.f_split_with_sizes([heads + kv_heads, kv_heads], 2)?;
    // Queries and keys go through norm and rope together, with the weight that belongs to each head.
    let query = weights.get(&format!("{prefix}query_layernorm.weight")).f_expand([heads, width], false)?;
    let key = weights.get(&format!("{prefix}key_layernorm.weight")).f_expand([kv_heads, width], false)?;
    let normed = rms_norm(&parts[0], &Tensor::f_cat(&[query, key], 0)?, eps)?;
    let mut turned = rope.apply(&normed)?.f_split_with_sizes([heads, kv_heads], 2)?.into_iter();
    let (Some(query), Some(key)) = (turned.next(), turned.next()) else { unreachable!("a split into two parts has two parts") };
    Ok([query, key, parts[1].shallow_clone()])
}

/// Softmax attention `[N, D]`, before the output projection, of the fused projection.
pub(crate) fn gqa(projected: &Tensor, weights: &Weights, prefix: &str, shape: Shape, eps: f64, rope: &Rope) -> Result<Tensor> {
    let qkv = fused_qkv(projected, weights, prefix, shape, eps, rope)?;
    let mut heads_first = Vec::with_capacity(3);
    for x in &qkv {
        heads_first.push(x.f_transpose(1, 2)?);
    }
    let [query, key, value] = &heads_first[..] else { unreachable!("three tensors went in") };
    let grouped = shape.heads != shape.kv_heads;
    let out = Tensor::f_scaled_dot_product_attention(query, key, value, None::<&Tensor>, 0.0, true, None, grouped)?;
    out.f_transpose(1, 2)?.f_reshape([-1, shape.hidden()])
}

/// Adds the branch output `y [N, D]` to the residual stream `x`: gains, low-rank adapter, learnt gate.
pub(crate) fn add_branch(x: &Tensor, y: &Tensor, weights: &Weights, prefix: &str) -> Result<Tensor> {
    let get = |name: &str| weights.get(&format!("{prefix}{name}"));
    // gain / max(gain, 1e-6), written so that the gradient is exactly zero while the gain divides out: rounding noise in its
    // place would be blown up to full steps by AdamW, differently on every machine.
    let ratio = get("branch_output_gain").f_div_scalar(GAIN_FLOOR)?.f_clamp_max(1.0)?;
    // All gains as one vector: one product over the tokens.
    let gains = get("branch_global_output_gain").f_mul(&ratio)?.f_mul(get("branch_output_channel_gain"))?;
    let y = y.f_mul(&gains)?;
    let low_rank = linear(&y, get("branch_output_adapter_down.weight"))?;
    let y = add_linear(&y, &low_rank, get("branch_output_adapter_up.weight"))?;
    x.f_addcmul(&y, &get("replace_alpha_raw").f_sigmoid()?)
}
