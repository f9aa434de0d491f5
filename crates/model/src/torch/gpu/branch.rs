//! The linear-attention branches, and the gains, adapter and gate through which their output joins the residual stream.

mod decay;
mod delta;
mod slots;

use tch::{Kind, Tensor};

use super::attention::Heads;
use super::driver::Argument;
use super::engine::Pass;
use super::kernels::warps;
use super::store::Gradients;
use crate::Branch;
use crate::torch::ops::Result;

/// Lower bound of the divisor that cancels `branch_output_gain`.
const GAIN_FLOOR: f64 = 1e-6;

/// What the backward pass needs.
pub(crate) struct BranchSaved {
    inner: Inner,
    /// Output of the branch before its output projection's input was gated or normed.
    core: Tensor,
    /// Output of the branch `[N, D]`.
    y: Tensor,
    low_rank: Tensor,
    mix: Mix,
}

enum Inner {
    Delta { normed: Tensor, scale: Tensor, projected: Tensor, gate: Tensor },
    Slots { scale: Tensor },
    Decay,
}

impl Inner {
    fn kind(&self) -> Branch {
        match self {
            Self::Delta { .. } => Branch::Quasar,
            Self::Slots { .. } => Branch::Raven,
            Self::Decay => Branch::Gla,
        }
    }
}

/// Gains `[D]` and the gate, f32.
struct Mix {
    ratio: Tensor,
    global: Tensor,
    channel: Tensor,
    gains: Tensor,
    mix: Tensor,
}

impl Mix {
    fn new(pass: &Pass, prefix: &str) -> Result<Self> {
        let get = |name: &str| pass.weight(&format!("{prefix}{name}"))?.f_to_kind(Kind::Float);
        let ratio = get("branch_output_gain")?.f_div_scalar(GAIN_FLOOR)?.f_clamp_max(1.0)?;
        let (global, channel) = (get("branch_global_output_gain")?, get("branch_output_channel_gain")?);
        let gains = global.f_mul(&ratio)?.f_mul(&channel)?;
        Ok(Self { ratio, global, channel, gains, mix: get("replace_alpha_raw")?.f_sigmoid()? })
    }
}

fn inner_prefix(prefix: &str, kind: Branch) -> String {
    format!("{prefix}{}_attention.", kind.name())
}

/// The branch's output projection.
fn output_key(inner_prefix: &str, kind: Branch) -> String {
    format!("{inner_prefix}{}", if kind == Branch::Gla { "dense.weight" } else { "o_proj.weight" })
}

/// Adds the branch to the residual stream `x`. `h` is the normed input, `projected` the input projection of attention and branch.
pub(crate) fn forward(
    pass: &Pass,
    kind: Branch,
    x: &Tensor,
    h: &Tensor,
    projected: &Tensor,
    prefix: &str,
) -> Result<(Tensor, BranchSaved)> {
    let inner_name = inner_prefix(prefix, kind);
    // Taken before the temporary tensors of the branch: what is kept must not lie in the middle of what they leave to the allocator.
    let y = pass.empty(&[pass.tokens(), pass.config.hidden_size as i64])?;
    let (gated, core, inner) = match kind {
        Branch::Quasar => delta::forward(pass, h, &inner_name)?,
        Branch::Raven => slots::forward(pass, projected, &inner_name)?,
        Branch::Gla => decay::forward(pass, projected, &inner_name)?,
    };
    let _ = gated.f_mm_out(&y, &pass.weight(&output_key(&inner_name, kind))?.f_tr()?)?;
    drop(gated);
    let mix = Mix::new(pass, prefix)?;
    let scaled = scale(pass, &y, &mix.gains)?;
    let low_rank = pass.linear(&scaled, &format!("{prefix}branch_output_adapter_down.weight"))?;
    let adapted = pass.add_linear(&scaled, &low_rank, &format!("{prefix}branch_output_adapter_up.weight"))?;
    let out = pass.empty(&x.size())?;
    let elements = x.numel() as i64;
    let arguments = [x.into(), (&adapted).into(), (&mix.mix).into(), (&out).into(), elements.into()];
    pass.kernels.launch("branch_add", elements.div_euclid(8 * 256) + 1, 256u32, &arguments)?;
    Ok((out, BranchSaved { inner, core, y, low_rank, mix }))
}

fn scale(pass: &Pass, y: &Tensor, gains: &Tensor) -> Result<Tensor> {
    let scaled = pass.empty(&y.size())?;
    let elements = y.numel() as i64;
    let arguments = [y.into(), gains.into(), (&scaled).into(), elements.into()];
    pass.kernels.launch("branch_scale", elements.div_euclid(8 * 256) + 1, 256u32, &arguments)?;
    Ok(scaled)
}

/// Gradients of the branch. Its columns of `dprojected` are written; the delta rule, which has its own projection, returns the gradient
/// of `h` instead.
#[expect(clippy::too_many_arguments, reason = "one call site; the pieces of a layer's state have no better home")]
pub(crate) fn backward(
    pass: &Pass,
    dx: &Tensor,
    h: &Tensor,
    projected: &Tensor,
    dprojected: &Tensor,
    saved: BranchSaved,
    prefix: &str,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let BranchSaved { inner, core, y, low_rank, mix } = saved;
    let rows = pass.tokens();
    let blocks = pass.kernels.walkers(rows);
    let dt = pass.empty(&y.size())?;
    let partial = pass.floats(&[i64::from(blocks)])?;
    let threads = pass.kernels.row_threads();
    let arguments = [dx.into(), (&y).into(), (&mix.gains).into(), (&mix.mix).into(), (&dt).into(), (&partial).into(), (rows as i32).into()];
    pass.kernels.launch("branch_enter", blocks, threads, &arguments)?;
    let (down_key, up_key) = (format!("{prefix}branch_output_adapter_down.weight"), format!("{prefix}branch_output_adapter_up.weight"));
    let dlow = pass.linear_backward(&dt, &up_key)?;
    gradients.linear(up_key, &dt, &low_rank)?;
    // The adapter's part of sum(dx * t) is sum(dlow * low_rank) / mix.
    let adapter = dlow.f_to_kind(Kind::Float)?.f_mul(&low_rank)?.f_sum(None)?;
    let dmix = partial.f_sum(None)?.f_mul(&mix.mix)?.f_add(&adapter)?.f_mul(&mix.mix.f_neg()?.f_add_scalar(1.0)?)?;
    gradients.vector(&format!("{prefix}replace_alpha_raw"), &dmix)?;
    let scaled = scale(pass, &y, &mix.gains)?;
    let dy = dt.f_addmm(&dlow, pass.weight(&down_key)?)?;
    gradients.linear(down_key, &dlow, &scaled)?;
    drop(scaled);
    drop(dt);
    let partial = pass.floats(&[i64::from(blocks), pass.config.hidden_size as i64])?;
    let arguments = [(&dy).into(), (&y).into(), (&mix.gains).into(), (&partial).into(), (rows as i32).into()];
    pass.kernels.launch("branch_leave", blocks, threads, &arguments)?;
    let dgains = pass.kernels.column_sums(&partial)?;
    drop(y);
    gradients.vector(&format!("{prefix}branch_output_channel_gain"), &dgains.f_mul(&mix.global)?.f_mul(&mix.ratio)?)?;
    let dglobal = dgains.f_mul(&mix.channel)?.f_sum(None)?;
    gradients.vector(&format!("{prefix}branch_global_output_gain"), &dglobal.f_mul(&mix.ratio)?)?;
    // Zero while the gain divides out.
    let free = mix.ratio.f_lt(1.0)?.f_to_kind(Kind::Float)?;
    gradients.vector(&format!("{prefix}branch_output_gain"), &dglobal.f_mul(&mix.global)?.f_mul(&free)?.f_div_scalar(GAIN_FLOOR)?)?;
    let kind = inner.kind();
    let inner_name = inner_prefix(prefix, kind);
    let key = output_key(&inner_name, kind);
    let dgated = pass.linear_backward(&dy, &key)?;
    // What was projected is computed again with the gradient of what it came from.
    let into = match &inner {
        Inner::Delta { gate, .. } => {
            let dgate = pass.empty(&gate.size())?;
            let (dcore, gated) =
                head_gate_backward(pass, &dgated, &core, (gate, 0), (&dgate, 0), &format!("{inner_name}o_norm.weight"), gradients)?;
            (dcore, gated, Some(dgate))
        }
        Inner::Slots { scale } => {
            let (dcore, gated) = slots::norm_backward(pass, &dgated, &core, scale, &inner_name, gradients)?;
            (dcore, gated, None)
        }
        Inner::Decay => {
            let at = 2 * Heads::of(pass).qkv();
            let weight_key = format!("{inner_name}g_norm.weight");
            let (dcore, gated) = head_gate_backward(pass, &dgated, &core, (projected, at), (dprojected, at), &weight_key, gradients)?;
            (dcore, gated, None)
        }
    };
    let (dcore, gated, dgate) = into;
    gradients.linear(key, &dy, &gated)?;
    drop((dy, dgated, gated, core));
    match (inner, dgate) {
        (Inner::Delta { normed, scale, projected, .. }, Some(dgate)) => {
            let saved = delta::Saved { normed, scale, projected };
            Ok(Some(delta::backward(pass, h, saved, dcore, dgate, &inner_name, gradients)?))
        }
        (Inner::Slots { .. }, _) => slots::backward(pass, projected, dprojected, dcore, &inner_name, gradients).map(|()| None),
        (Inner::Decay | Inner::Delta { .. }, _) => {
            decay::backward(pass, projected, dprojected, dcore, &inner_name, gradients).map(|()| None)
        }
    }
}

/// Number of chunks and of heads over all rows.
fn chunks(pass: &Pass, size: i64) -> (i64, i64) {
    ((pass.row_tokens + size - 1) / size, pass.rows * pass.config.num_attention_heads as i64)
}

/// `rms(core) * weight * sigmoid(gate)` by heads; the gate's rows lie `stride` apart from element `offset` on.
fn head_gate(pass: &Pass, core: &Tensor, gate: (&Tensor, i64), weight: &Tensor) -> Result<Tensor> {
    let tokens = pass.tokens();
    let y = pass.empty(&[tokens, pass.config.hidden_size as i64])?;
    let is_shared = weight.numel() == pass.config.head_dim;
    let arguments = [
        core.into(),
        Argument::at(gate.0, gate.1),
        gate.0.size()[1].into(),
        weight.into(),
        i32::from(is_shared).into(),
        (&y).into(),
        (tokens as i32).into(),
        (pass.config.rms_norm_eps as f32).into(),
    ];
    pass.kernels.launch("head_gate_forward", warps(tokens * pass.config.num_attention_heads as i64), 256u32, &arguments)?;
    Ok(y)
}

/// Gradient of [`head_gate`]: of core (returned), of the gate (written to `dgate`), of the weight; and the gated output again.
fn head_gate_backward(
    pass: &Pass,
    dy: &Tensor,
    core: &Tensor,
    gate: (&Tensor, i64),
    dgate: (&Tensor, i64),
    weight_key: &str,
    gradients: &mut Gradients,
) -> Result<(Tensor, Tensor)> {
    let (tokens, hidden) = (pass.tokens(), pass.config.hidden_size as i64);
    let weight = pass.weight(weight_key)?;
    let is_shared = weight.numel() == pass.config.head_dim;
    let (dcore, y) = (pass.empty(&core.size())?, pass.empty(&[tokens, hidden])?);
    let blocks = pass.kernels.walkers(tokens);
    let partial = pass.floats(&[i64::from(blocks), hidden])?;
    let arguments = [
        dy.into(),
        core.into(),
        Argument::at(gate.0, gate.1),
        gate.0.size()[1].into(),
        weight.into(),
        i32::from(is_shared).into(),
        (&dcore).into(),
        Argument::at(dgate.0, dgate.1),
        dgate.0.size()[1].into(),
        (&y).into(),
        (&partial).into(),
        (tokens as i32).into(),
        (pass.config.rms_norm_eps as f32).into(),
    ];
    pass.kernels.launch("head_gate_backward", blocks, 256u32, &arguments)?;
    let sums = pass.kernels.column_sums(&partial)?;
    let dweight =
        if is_shared { sums.f_reshape([-1, weight.numel() as i64])?.f_sum_dim_intlist([0].as_slice(), false, None)? } else { sums };
    gradients.vector(weight_key, &dweight)?;
    Ok((dcore, y))
}
