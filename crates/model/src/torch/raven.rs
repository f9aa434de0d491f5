//! The Raven branch: a memory of slots that a router writes to, a few slots per token.

use tch::Tensor;

use super::attention::Shape;
use super::chunked;
use super::network::Weights;
use super::ops::{Result, linear, rms_norm, wide};
use crate::QuasarConfig;

/// The output norm keeps the default of the reference's fused call, not `rms_norm_eps`.
const OUTPUT_EPS: f64 = 1e-5;

/// Widths of the branch's part of the stacked input projection: queries, keys and values, router scores, decay.
pub(crate) fn widths(config: &QuasarConfig, shape: Shape) -> [i64; 3] {
    [shape.qkv(), shape.heads * config.raven_slots as i64, shape.heads]
}

/// The branch's output `[N, D]` from its projections, of the widths above.
pub(crate) fn raven(parts: &[Tensor], weights: &Weights, prefix: &str, shape: Shape, config: &QuasarConfig) -> Result<Tensor> {
    let get = |name: &str| weights.get(&format!("{prefix}{name}"));
    let (heads, kv_heads, width) = (shape.heads, shape.kv_heads, shape.head_dim);
    let (slots, kept) = (config.raven_slots as i64, config.raven_topk as i64);
    let kind = parts[0].f_kind()?;
    let qkv = shape.by_head(&parts[0].f_silu()?)?.f_split_with_sizes([heads + kv_heads, kv_heads], 2)?;
    let query = get("q_norm.weight").f_expand([heads, width], false)?;
    let key = get("k_norm.weight").f_expand([kv_heads, width], false)?;
    let qk = rms_norm(&qkv[0], &Tensor::f_cat(&[query, key], 0)?, config.rms_norm_eps)?.f_split_with_sizes([heads, kv_heads], 2)?;

    // The decay of each head, shared out over the slots that the router picks.
    let step = wide(&parts[2])?.f_add(&wide(get("dt_bias"))?)?.f_softplus()?;
    let head_decay = step.f_mul(&wide(get("A_log"))?.f_exp()?.f_neg()?)?; // [N, H], <= 0
    let score = parts[1].f_reshape([-1, heads, slots])?.f_sigmoid()?;
    let best = score.f_topk(kept, -1, true, false)?;
    let normed = best.0.f_div(&best.0.f_sum_dim_intlist([-1].as_slice(), true, None)?.f_add_scalar(1e-9)?)?;
    let share = score.f_zeros_like()?.f_scatter(-1, &best.1, &normed)?; // [N, H, M]
    let log_decay = head_decay.f_unsqueeze(-1)?.f_mul(&share)?.f_to_kind(kind)?;
    let write = log_decay.f_exp()?.f_neg()?.f_add_scalar(1.0)?; // 0 for slots not picked

    let heads_first = |x: &Tensor| -> Result<Tensor> {
        let last = *x.size().last().unwrap_or(&1);
        wide(&x.f_reshape([shape.rows, shape.tokens, heads, last])?.f_transpose(1, 2)?)?.f_reshape([-1, shape.tokens, last])
    };
    let repeated = |x: &Tensor| x.f_repeat_interleave_self_int(heads / kv_heads, 2, None);
    let (query, key, value) = (heads_first(&qk[0])?, heads_first(&repeated(&qk[1])?)?, heads_first(&repeated(&qkv[1])?)?);
    let size = chunked::slot_chunk_for(shape.tokens);
    let out = chunked::slots(&query, &key, &value, &heads_first(&log_decay)?, &heads_first(&write)?, size)?;
    let out = out.f_to_kind(kind)?.f_reshape([shape.rows, heads, shape.tokens, width])?.f_transpose(1, 2)?;
    let out = rms_norm(&out.f_reshape([-1, shape.hidden()])?.f_silu()?, get("g_norm.weight"), OUTPUT_EPS)?;
    linear(&out, get("o_proj.weight"))
}
