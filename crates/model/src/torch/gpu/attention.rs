//! Softmax attention: projection, head norm and rotary embedding, libtorch's attention, output projection.

use tch::Tensor;

use super::driver::Argument;
use super::engine::Pass;
use super::kernels::warps;
use super::store::Gradients;
use crate::torch::ops::Result;

/// What the backward pass needs.
pub(crate) struct GqaSaved {
    /// The input projection `[N, W]`: queries, keys, values, then what the branch reads.
    pub projected: Tensor,
    /// Leaves of libtorch's attention, `[B, heads, T, d]`, and its output.
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
}

/// Sizes of the fused projection.
pub(crate) struct Heads {
    pub heads: i64,
    pub kv_heads: i64,
    pub width: i64,
}

impl Heads {
    pub fn of(pass: &Pass) -> Self {
        let config = pass.config;
        Self { heads: config.num_attention_heads as i64, kv_heads: config.num_key_value_heads as i64, width: config.head_dim as i64 }
    }

    pub fn hidden(&self) -> i64 {
        self.heads * self.width
    }

    pub fn qkv(&self) -> i64 {
        (self.heads + 2 * self.kv_heads) * self.width
    }
}

/// Normed and turned queries `[N, heads, d]` and keys `[N, kv_heads, d]` from the projection's columns from `offset` on.
pub(crate) fn queries_and_keys(pass: &Pass, projected: &Tensor, offset: i64, prefix: &str) -> Result<(Tensor, Tensor)> {
    let heads = Heads::of(pass);
    let tokens = pass.tokens();
    let query = pass.empty(&[tokens, heads.heads, heads.width])?;
    let key = pass.empty(&[tokens, heads.kv_heads, heads.width])?;
    let arguments = [
        Argument::at(projected, offset),
        projected.size()[1].into(),
        pass.weight(&format!("{prefix}query_layernorm.weight"))?.into(),
        pass.weight(&format!("{prefix}key_layernorm.weight"))?.into(),
        (&pass.constants.cos).into(),
        (&pass.constants.sin).into(),
        (&query).into(),
        (&key).into(),
        (tokens as i32).into(),
        (pass.row_tokens as i32).into(),
        (pass.constants.cos.size()[0] as i32).into(),
        (pass.config.rms_norm_eps as f32).into(),
    ];
    pass.kernels.launch("qk_forward", warps(tokens * (heads.heads + heads.kv_heads)), 256u32, &arguments)?;
    Ok((query, key))
}

/// Writes the gradient of the projection's columns from `offset` on, from those of queries, keys and values, each `[B, T, heads, d]` with
/// any strides over the first three axes.
pub(crate) fn queries_and_keys_backward(
    pass: &Pass,
    projected: &Tensor,
    offset: i64,
    prefix: &str,
    [dq, dk, dv]: [&Tensor; 3],
    out: &Tensor,
    gradients: &mut Gradients,
) -> Result<()> {
    let (query_key, key_key) = (format!("{prefix}query_layernorm.weight"), format!("{prefix}key_layernorm.weight"));
    let blocks = 4 * pass.kernels.gpu.multiprocessors;
    let partial = pass.floats(&[i64::from(blocks), 256])?;
    let stride = projected.size()[1];
    let mut arguments: Vec<Argument> = vec![
        Argument::at(projected, offset),
        stride.into(),
        pass.weight(&query_key)?.into(),
        pass.weight(&key_key)?.into(),
        (&pass.constants.cos).into(),
        (&pass.constants.sin).into(),
    ];
    let mut kept = Vec::new();
    for x in [dq, dk, dv] {
        let strides = x.stride();
        let x = if strides[3] == 1 && strides[..3].iter().all(|stride| stride % 4 == 0) { x.shallow_clone() } else { x.f_contiguous()? };
        let strides = x.stride();
        arguments.extend::<[Argument; 4]>([(&x).into(), strides[0].into(), strides[1].into(), strides[2].into()]);
        kept.push(x);
    }
    arguments.extend::<[Argument; 7]>([
        Argument::at(out, offset),
        stride.into(),
        (&partial).into(),
        (pass.tokens() as i32).into(),
        (pass.row_tokens as i32).into(),
        (pass.constants.cos.size()[0] as i32).into(),
        (pass.config.rms_norm_eps as f32).into(),
    ]);
    pass.kernels.launch("qk_backward", blocks, 256u32, &arguments)?;
    let sums = pass.kernels.column_sums(&partial)?;
    gradients.vector(&query_key, &sums.f_narrow(0, 0, 128)?)?;
    gradients.vector(&key_key, &sums.f_narrow(0, 128, 128)?)
}

/// Adds attention of the normed input `h` to the residual stream `x`.
pub(crate) fn forward(pass: &Pass, x: &Tensor, h: &Tensor, prefix: &str) -> Result<(Tensor, GqaSaved)> {
    let heads = Heads::of(pass);
    let projected = pass.linear(h, &format!("{prefix}in"))?;
    let (query, key) = queries_and_keys(pass, &projected, 0, prefix)?;
    let value = projected.f_narrow(1, (heads.heads + heads.kv_heads) * heads.width, heads.kv_heads * heads.width)?;
    let leaf = |x: &Tensor, count: i64| -> Result<Tensor> {
        // A view over rows and tokens of rows that may be longer than the heads themselves.
        let row = x.stride()[0];
        let view = x.f_as_strided([pass.rows, count, pass.row_tokens, heads.width], [row * pass.row_tokens, heads.width, row, 1], None)?;
        view.f_detach()?.f_requires_grad_(true)
    };
    let (query, key, value) = (leaf(&query, heads.heads)?, leaf(&key, heads.kv_heads)?, leaf(&value, heads.kv_heads)?);
    let is_grouped = heads.heads != heads.kv_heads;
    let out =
        tch::with_grad(|| Tensor::f_scaled_dot_product_attention(&query, &key, &value, None::<&Tensor>, 0.0, true, None, is_grouped))?;
    let flat = out.f_detach()?.f_transpose(1, 2)?.f_reshape([-1, heads.hidden()])?;
    let y = pass.add_linear(x, &flat, &format!("{prefix}dense.weight"))?;
    Ok((y, GqaSaved { projected, query, key, value, out }))
}

/// The gradient of `h`, from `dx` and, where the branch has its own way to `h`, `from_branch`. `dprojected` holds the branch's columns
/// already.
#[expect(clippy::too_many_arguments, reason = "one call site; the pieces of a layer's state have no better home")]
pub(crate) fn backward(
    pass: &Pass,
    dx: &Tensor,
    h: &Tensor,
    saved: GqaSaved,
    dprojected: Tensor,
    from_branch: Option<Tensor>,
    prefix: &str,
    gradients: &mut Gradients,
) -> Result<Tensor> {
    let GqaSaved { projected, query, key, value, out } = saved;
    let heads = Heads::of(pass);
    let dense = format!("{prefix}dense.weight");
    let flat = out.f_detach()?.f_transpose(1, 2)?.f_reshape([-1, heads.hidden()])?;
    gradients.linear(dense.clone(), dx, &flat)?;
    drop(flat);
    let dout = pass.linear_backward(dx, &dense)?.f_reshape([pass.rows, pass.row_tokens, heads.heads, heads.width])?.f_transpose(1, 2)?;
    // The gradient of sum(out * dout) by out is dout.
    let surrogate = tch::with_grad(|| out.f_mul(&dout)?.f_sum(None))?;
    let parts = Tensor::f_run_backward(&[&surrogate], &[&query, &key, &value], false, false)?;
    let mut by_token = Vec::new();
    for part in &parts {
        by_token.push(part.f_transpose(1, 2)?);
    }
    let [dq, dk, dv] = &by_token[..] else { return Err(tch::TchError::Kind("attention has three gradients".into())) };
    queries_and_keys_backward(pass, &projected, 0, prefix, [dq, dk, dv], &dprojected, gradients)?;
    let key = format!("{prefix}in");
    let matrix = pass.weight(&key)?;
    let dh = match from_branch {
        None => dprojected.f_mm(matrix)?,
        Some(mut sum) => {
            let _ = sum.f_addmm_(&dprojected, matrix)?;
            sum
        }
    };
    gradients.linear(key, &dprojected, h)?;
    Ok(dh)
}
