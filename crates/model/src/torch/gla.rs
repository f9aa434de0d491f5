//! The GLA branch: linear attention with a constant decay per head.

use tch::Tensor;

use super::attention::{Rope, Shape, fused_qkv};
use super::chunked;
use super::network::Weights;
use super::ops::{Result, linear, unit_rms, wide};

/// Widths of the branch's part of the stacked input projection: queries, keys and values; output gate.
pub(crate) fn widths(shape: Shape) -> [i64; 2] {
    [shape.qkv(), shape.hidden()]
}

/// The branch's output `[N, D]` from its projections, of the widths above.
pub(crate) fn gla(parts: &[Tensor], weights: &Weights, prefix: &str, shape: Shape, eps: f64, rope: &Rope) -> Result<Tensor> {
    let get = |name: &str| weights.get(&format!("{prefix}{name}"));
    let (heads, width, hidden) = (shape.heads, shape.head_dim, shape.hidden());
    let kind = parts[0].f_kind()?;
    let [query, key, value] = fused_qkv(&parts[0], weights, prefix, shape, eps, rope)?;
    let heads_first = |x: &Tensor| wide(&x.f_transpose(1, 2)?)?.f_reshape([-1, shape.tokens, width]);
    let repeated = |x: &Tensor| x.f_repeat_interleave_self_int(heads / shape.kv_heads, 2, None);
    let (query, key, value) = (heads_first(&query)?, heads_first(&repeated(&key)?)?, heads_first(&repeated(&value)?)?);
    // The reference casts the slope to the compute type.
    let slope = wide(&get("slope").f_to_kind(kind)?)?;
    let out = chunked::constant_decay(&query, &key, &value, &slope, chunked::chunk_for(shape.tokens))?;
    let out = out.f_to_kind(kind)?.f_reshape([shape.rows, heads, shape.tokens, width])?.f_transpose(1, 2)?;
    let out = unit_rms(&out, eps)?.f_reshape([-1, hidden])?.f_mul(get("g_norm.weight"))?.f_mul(&parts[1].f_sigmoid()?)?;
    linear(&out, get("dense.weight"))
}
