//! The Quasar branch: a delta rule whose step size is the exact discretisation of the underlying flow.

use tch::Tensor;

use super::attention::Shape;
use super::chunked;
use super::network::Weights;
use super::ops::{Result, l2_normalize, linear, unit_rms, wide};

/// Bounds that the reference puts on intermediate values. Its replacement of NaN is left out: a NaN here reaches the
/// residual stream through softmax attention as well, and the step is refused as a whole.
const INPUT_BOUND: f64 = 60.0;
const OUTPUT_BOUND: f64 = 1e4;
const GATE_BOUND: f64 = 30.0;
const STEP_BOUNDS: (f64, f64) = (1e-4, 0.95);

/// The step size `[B, T, H]` from the squared key norm `n [B, T, H]`, `b [B, T, H]` in (0, 1), `a_log [H]` and `dt_bias [H d]`:
/// the mean over channels of `(1 - exp(-e^a · softplus(b + dt))) / (n + 1e-6)`, bounded.
pub fn step_size(squared_norm: &Tensor, b: &Tensor, a_log: &Tensor, dt_bias: &Tensor) -> Result<Tensor> {
    let heads = a_log.size()[0];
    let bias = wide(dt_bias)?.f_reshape([heads, -1])?;
    let softened = wide(b)?.f_unsqueeze(-1)?.f_add(&bias)?.f_softplus()?;
    let kept = softened.f_mul(&wide(a_log)?.f_exp()?.f_neg()?.f_unsqueeze(-1)?)?.f_exp()?.f_mean_dim(-1, false, None)?;
    let length = squared_norm.f_clamp(0.1, 10.0)?.f_add_scalar(1e-6)?;
    kept.f_neg()?.f_add_scalar(1.0)?.f_div(&length)?.f_clamp(STEP_BOUNDS.0, STEP_BOUNDS.1)
}

/// The branch's output `[N, D]` for the normed input `h [N, D]`.
pub(crate) fn quasar(h: &Tensor, weights: &Weights, prefix: &str, shape: Shape, eps: f64) -> Result<Tensor> {
    let get = |name: &str| weights.get(&format!("{prefix}{name}"));
    let (heads, width, hidden) = (shape.heads, shape.head_dim, shape.hidden());
    // A second, weightless norm; every projection reads its result.
    let h = unit_rms(&wide(h)?.f_clamp(-INPUT_BOUND, INPUT_BOUND)?, 1e-6)?.f_to_kind(h.f_kind()?)?;
    let projected = linear(&h, get("in"))?.f_split_with_sizes([3 * hidden, width, heads], -1)?;
    let qkv = shape.by_head(&projected[0].f_silu()?)?.f_split_with_sizes([2 * heads, heads], 2)?;
    // [B, T, 2H, d] -> [2, B, H, T, d]
    let qk = l2_normalize(&qkv[0])?.f_reshape([shape.rows, shape.tokens, 2, heads, width])?.f_permute([2, 0, 3, 1, 4])?;
    let qk = wide(&qk)?.f_contiguous()?.f_reshape([2, -1, shape.tokens, width])?.f_unbind(0)?;
    let v = wide(&qkv[1].f_transpose(1, 2)?)?.f_reshape([-1, shape.tokens, width])?;

    let by_token = [shape.rows, shape.tokens, heads];
    let b = projected[2].f_reshape(by_token)?.f_sigmoid()?;
    // The key is normalised, so its squared norm is 1 but for rounding, and constant: no gradient flows through it.
    let key = qk[1].f_detach()?;
    let squared = key.f_mul(&key)?.f_sum_dim_intlist([-1].as_slice(), false, None)?;
    let squared = squared.f_reshape([shape.rows, heads, shape.tokens])?.f_transpose(1, 2)?;
    let beta = step_size(&squared, &b, get("A_log"), get("dt_bias"))?.f_to_kind(h.f_kind()?)?;
    let beta = wide(&beta.f_transpose(1, 2)?)?.f_reshape([-1, shape.tokens])?;

    let out = chunked::delta_rule(&qk[0], &qk[1], &v, &beta, chunked::chunk_for(shape.tokens))?;
    let out = out.f_clamp(-OUTPUT_BOUND, OUTPUT_BOUND)?.f_to_kind(h.f_kind()?)?;
    let out = out.f_reshape([shape.rows, heads, shape.tokens, width])?.f_transpose(1, 2)?;
    let gate = get("g_proj.1.bias").f_addmm(&projected[1], &get("g_proj.1.weight").f_tr()?)?;
    let gate = shape.by_head(&wide(&gate)?.f_clamp(-GATE_BOUND, GATE_BOUND)?.f_sigmoid()?.f_to_kind(h.f_kind()?)?)?;
    let out = unit_rms(&out, eps)?.f_mul(&get("o_norm.weight").f_clamp(0.0, 4.0)?)?.f_mul(&gate)?;
    linear(&out.f_reshape([-1, hidden])?, get("o_proj.weight"))
}
