//! The linear-attention branches, and the gains, adapter and gate through which their output joins the residual stream.

use tch::{Kind, Tensor};

use super::attention::{Heads, queries_and_keys, queries_and_keys_backward};
use super::driver::Argument;
use super::engine::{Norm, Pass};
use super::kernels::warps;
use super::store::Gradients;
use crate::Branch;
use crate::torch::ops::Result;

/// Lower bound of the divisor that cancels `branch_output_gain`.
const GAIN_FLOOR: f64 = 1e-6;
/// eps of the slot memory's output norm.
const SLOT_EPS: f64 = 1e-5;
/// Tokens in a chunk of the delta rule and the decayed form, and of the slot memory.
const CHUNK: i64 = 64;
const SLOT_CHUNK: i64 = 32;
const SLOTS: i64 = 64;

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
    let (gated, core, inner) = match kind {
        Branch::Quasar => delta_forward(pass, h, &inner_name)?,
        Branch::Raven => slots_forward(pass, projected, &inner_name)?,
        Branch::Gla => decay_forward(pass, projected, &inner_name)?,
    };
    let y = pass.linear(&gated, &output_key(&inner_name, kind))?;
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
            let (dcore, gated) = slot_norm_backward(pass, &dgated, &core, scale, &inner_name, gradients)?;
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
            let saved = DeltaSaved { normed, scale, projected };
            Ok(Some(delta_backward(pass, h, saved, dcore, dgate, &inner_name, gradients)?))
        }
        (Inner::Slots { .. }, _) => slots_backward(pass, projected, dprojected, dcore, &inner_name, gradients).map(|()| None),
        (Inner::Decay | Inner::Delta { .. }, _) => {
            decay_backward(pass, projected, dprojected, dcore, &inner_name, gradients).map(|()| None)
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

// ------------------------------------------------------------------------------------------------ delta rule

struct DeltaInputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    slope: Tensor,
}

fn delta_inputs(pass: &Pass, projected: &Tensor, prefix: &str) -> Result<DeltaInputs> {
    let heads = Heads::of(pass);
    let tokens = pass.tokens();
    let by_head = || pass.empty(&[tokens, heads.heads, heads.width]);
    let inputs = DeltaInputs {
        q: by_head()?,
        k: by_head()?,
        v: by_head()?,
        step: pass.floats(&[tokens, heads.heads])?,
        slope: pass.floats(&[tokens, heads.heads])?,
    };
    let arguments = [
        projected.into(),
        projected.size()[1].into(),
        pass.weight(&format!("{prefix}A_log"))?.into(),
        pass.weight(&format!("{prefix}dt_bias"))?.into(),
        (&inputs.q).into(),
        (&inputs.k).into(),
        (&inputs.v).into(),
        (&inputs.step).into(),
        (&inputs.slope).into(),
        (tokens as i32).into(),
    ];
    pass.kernels.launch("delta_inputs", warps(tokens * heads.heads), 256u32, &arguments)?;
    Ok(inputs)
}

/// What the walk over the chunks leaves.
struct DeltaStates {
    inverse: Tensor,
    w: Tensor,
    states: Tensor,
    fresh: Tensor,
}

fn delta_states(pass: &Pass, inputs: &DeltaInputs) -> Result<DeltaStates> {
    let (count, groups) = chunks(pass, CHUNK);
    let array = |rows: i64, columns: i64| pass.empty(&[groups, count, rows, columns]);
    let (inverse, w, u) = (array(CHUNK, CHUNK)?, array(CHUNK, 128)?, array(CHUNK, 128)?);
    let tokens = pass.row_tokens as i32;
    let arguments =
        [(&inputs.k).into(), (&inputs.v).into(), (&inputs.step).into(), (&inverse).into(), (&w).into(), (&u).into(), tokens.into()];
    pass.kernels.launch("delta_prepare", (count, groups), 256u32, &arguments)?;
    let (states, fresh) = (array(128, 128)?, array(CHUNK, 128)?);
    let arguments = [(&inputs.k).into(), (&w).into(), (&u).into(), (&states).into(), (&fresh).into(), tokens.into(), (count as i32).into()];
    pass.kernels.launch("delta_states", (2, groups), 256u32, &arguments)?;
    Ok(DeltaStates { inverse, w, states, fresh })
}

fn delta_forward(pass: &Pass, h: &Tensor, prefix: &str) -> Result<(Tensor, Tensor, Inner)> {
    let heads = Heads::of(pass);
    let (normed, scale) = pass.norm(h, None, 1e-6, Norm::Bounded)?;
    let projected = pass.linear(&normed, &format!("{prefix}in"))?;
    let inputs = delta_inputs(pass, &projected, prefix)?;
    let walked = delta_states(pass, &inputs)?;
    let core = pass.empty(&[pass.tokens(), heads.heads, heads.width])?;
    let (count, groups) = chunks(pass, CHUNK);
    let arguments = [
        (&inputs.q).into(),
        (&inputs.k).into(),
        (&walked.fresh).into(),
        (&walked.states).into(),
        (&core).into(),
        (pass.row_tokens as i32).into(),
    ];
    pass.kernels.launch("delta_output", (count, groups), 256u32, &arguments)?;
    let low = projected.f_narrow(1, 3 * heads.hidden(), heads.width)?;
    let gate = pass.add_linear(pass.weight(&format!("{prefix}g_proj.1.bias"))?, &low, &format!("{prefix}g_proj.1.weight"))?;
    let gated = head_gate(pass, &core, (&gate, 0), pass.weight(&format!("{prefix}o_norm.weight"))?)?;
    Ok((gated, core, Inner::Delta { normed, scale, projected, gate }))
}

struct DeltaSaved {
    normed: Tensor,
    scale: Tensor,
    projected: Tensor,
}

/// The gradient of `h`, from those of the rule's output and of its gate.
fn delta_backward(
    pass: &Pass,
    h: &Tensor,
    saved: DeltaSaved,
    dcore: Tensor,
    dgate: Tensor,
    prefix: &str,
    gradients: &mut Gradients,
) -> Result<Tensor> {
    let DeltaSaved { normed, scale, projected } = saved;
    let heads = Heads::of(pass);
    let tokens = pass.tokens();
    let dprojected = pass.empty(&projected.size())?;
    let key = format!("{prefix}g_proj.1.weight");
    let low = projected.f_narrow(1, 3 * heads.hidden(), heads.width)?;
    dprojected.f_narrow(1, 3 * heads.hidden(), heads.width)?.f_copy_(&pass.linear_backward(&dgate, &key)?)?;
    gradients.linear(key, &dgate, &low)?;
    let blocks = pass.kernels.walkers(tokens);
    let partial = pass.floats(&[i64::from(blocks), heads.hidden()])?;
    let arguments = [(&dgate).into(), (&partial).into(), (tokens as i32).into()];
    pass.kernels.launch("column_partials", blocks, pass.kernels.row_threads(), &arguments)?;
    gradients.vector(&format!("{prefix}g_proj.1.bias"), &pass.kernels.column_sums(&partial)?)?;
    drop(dgate);

    let inputs = delta_inputs(pass, &projected, prefix)?;
    let walked = delta_states(pass, &inputs)?;
    let (count, groups) = chunks(pass, CHUNK);
    let row_tokens = pass.row_tokens as i32;
    let dfresh = pass.empty(&walked.fresh.size())?;
    let arguments = [(&inputs.q).into(), (&inputs.k).into(), (&dcore).into(), (&dfresh).into(), row_tokens.into()];
    pass.kernels.launch("delta_local", (count, groups), 256u32, &arguments)?;
    let dstates = pass.empty(&walked.states.size())?;
    let arguments = [
        (&inputs.q).into(),
        (&inputs.k).into(),
        (&walked.w).into(),
        (&dcore).into(),
        (&dstates).into(),
        (&dfresh).into(),
        row_tokens.into(),
        (count as i32).into(),
    ];
    pass.kernels.launch("delta_states_backward", (2, groups), 256u32, &arguments)?;
    let like = |x: &Tensor| pass.empty(&x.size());
    let (dq, dk, dv, dstep) = (like(&inputs.q)?, like(&inputs.k)?, like(&inputs.v)?, pass.floats(&inputs.step.size())?);
    let arguments = [
        (&inputs.q).into(),
        (&inputs.k).into(),
        (&inputs.v).into(),
        (&inputs.step).into(),
        (&walked.inverse).into(),
        (&walked.fresh).into(),
        (&dfresh).into(),
        (&walked.states).into(),
        (&dstates).into(),
        (&dcore).into(),
        (&dq).into(),
        (&dk).into(),
        (&dv).into(),
        (&dstep).into(),
        row_tokens.into(),
    ];
    pass.kernels.launch("delta_gradients", (count, groups), 256u32, &arguments)?;
    drop((walked, dstates, dfresh, dcore));
    let arguments = [
        (&projected).into(),
        projected.size()[1].into(),
        (&dq).into(),
        (&dk).into(),
        (&dv).into(),
        (&dstep).into(),
        (&inputs.slope).into(),
        (&dprojected).into(),
        (tokens as i32).into(),
    ];
    pass.kernels.launch("delta_inputs_backward", warps(tokens * heads.heads), 256u32, &arguments)?;
    let key = format!("{prefix}in");
    let dnormed = pass.linear_backward(&dprojected, &key)?;
    gradients.linear(key, &dprojected, &normed)?;
    Ok(pass.norm_backward(&dnormed, h, None, &scale, None, Norm::Bounded)?.0)
}

// ------------------------------------------------------------------------------------------------ slot memory

struct SlotInputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
}

fn slot_inputs(pass: &Pass, projected: &Tensor, prefix: &str) -> Result<SlotInputs> {
    let heads = Heads::of(pass);
    let tokens = pass.tokens();
    let by_head = |count: i64, width: i64| pass.empty(&[tokens, count, width]);
    let inputs = SlotInputs {
        q: by_head(heads.heads, heads.width)?,
        k: by_head(heads.kv_heads, heads.width)?,
        v: by_head(heads.kv_heads, heads.width)?,
        log_decay: by_head(heads.heads, SLOTS)?,
    };
    let get = |name: &str| pass.weight(&format!("{prefix}{name}"));
    let arguments = [
        Argument::at(projected, heads.qkv()),
        projected.size()[1].into(),
        get("q_norm.weight")?.into(),
        get("k_norm.weight")?.into(),
        get("A_log")?.into(),
        get("dt_bias")?.into(),
        (&inputs.q).into(),
        (&inputs.k).into(),
        (&inputs.v).into(),
        (&inputs.log_decay).into(),
        (tokens as i32).into(),
        (pass.config.rms_norm_eps as f32).into(),
    ];
    pass.kernels.launch("slot_inputs", warps(tokens * 2 * (heads.heads + heads.kv_heads)), 256u32, &arguments)?;
    Ok(inputs)
}

/// Memories at the start of each chunk, and the gates they were made with.
struct SlotStates {
    weights: Tensor,
    ends: Tensor,
    keys: Tensor,
    values: Tensor,
}

/// Walks over the chunks: `x` for both memories with their weights.
fn slot_walk(pass: &Pass, x: [&Tensor; 2], weights: [&Tensor; 2], ends: &Tensor, is_backward: bool) -> Result<(Tensor, Tensor)> {
    let (count, groups) = chunks(pass, SLOT_CHUNK);
    let memory = || pass.empty(&[groups, count, 128, SLOTS]);
    let (keys, values) = (memory()?, memory()?);
    let arguments = [
        x[0].into(),
        x[1].into(),
        (x[0].size()[1] as i32).into(),
        weights[0].into(),
        weights[1].into(),
        ends.into(),
        (&keys).into(),
        (&values).into(),
        i32::from(is_backward).into(),
        (pass.row_tokens as i32).into(),
        (count as i32).into(),
    ];
    pass.kernels.launch("slot_walk", (4, groups), 256u32, &arguments)?;
    Ok((keys, values))
}

fn slot_states(pass: &Pass, inputs: &SlotInputs) -> Result<SlotStates> {
    let (count, groups) = chunks(pass, SLOT_CHUNK);
    let (weights, ends) = (pass.empty(&[groups, count, SLOT_CHUNK, SLOTS])?, pass.floats(&[groups, count, SLOTS])?);
    let arguments = [(&inputs.log_decay).into(), (&weights).into(), (&ends).into(), (pass.row_tokens as i32).into()];
    pass.kernels.launch("slot_gates", (count, groups), SLOTS, &arguments)?;
    let (keys, values) = slot_walk(pass, [&inputs.k, &inputs.v], [&weights, &weights], &ends, false)?;
    Ok(SlotStates { weights, ends, keys, values })
}

fn slots_forward(pass: &Pass, projected: &Tensor, prefix: &str) -> Result<(Tensor, Tensor, Inner)> {
    let heads = Heads::of(pass);
    let inputs = slot_inputs(pass, projected, prefix)?;
    let walked = slot_states(pass, &inputs)?;
    let core = pass.empty(&[pass.tokens(), heads.hidden()])?;
    let (count, groups) = chunks(pass, SLOT_CHUNK);
    let arguments = [
        (&inputs.q).into(),
        (&inputs.k).into(),
        (&inputs.v).into(),
        (&inputs.log_decay).into(),
        (&walked.keys).into(),
        (&walked.values).into(),
        (&core).into(),
        (pass.row_tokens as i32).into(),
    ];
    pass.kernels.launch("slot_output", (count, groups), 256u32, &arguments)?;
    let (normed, scale) = pass.norm(&core, Some(pass.weight(&format!("{prefix}g_norm.weight"))?), SLOT_EPS, Norm::Silu)?;
    Ok((normed, core, Inner::Slots { scale }))
}

/// Gradient of the output norm; and the normed output again.
fn slot_norm_backward(
    pass: &Pass,
    dnormed: &Tensor,
    core: &Tensor,
    scale: &Tensor,
    prefix: &str,
    gradients: &mut Gradients,
) -> Result<(Tensor, Tensor)> {
    let key = format!("{prefix}g_norm.weight");
    let weight = pass.weight(&key)?;
    let (normed, _) = pass.norm(core, Some(weight), SLOT_EPS, Norm::Silu)?;
    let (dcore, dw) = pass.norm_backward(dnormed, core, Some(weight), scale, None, Norm::Silu)?;
    if let Some(dw) = dw {
        gradients.vector(&key, &dw)?;
    }
    Ok((dcore, normed))
}

fn slots_backward(
    pass: &Pass,
    projected: &Tensor,
    dprojected: &Tensor,
    dcore: Tensor,
    prefix: &str,
    gradients: &mut Gradients,
) -> Result<()> {
    let heads = Heads::of(pass);
    let inputs = slot_inputs(pass, projected, prefix)?;
    let walked = slot_states(pass, &inputs)?;
    let (count, groups) = chunks(pass, SLOT_CHUNK);
    let row_tokens = pass.row_tokens as i32;
    let array = || pass.empty(&[groups, count, SLOT_CHUNK, SLOTS]);
    let (p, dlogits, grown, dgrown) = (array()?, array()?, array()?, array()?);
    let change = pass.floats(&[groups, count, SLOT_CHUNK, SLOTS])?;
    let mut arguments: Vec<Argument> = vec![
        (&inputs.q).into(),
        (&inputs.k).into(),
        (&inputs.v).into(),
        (&inputs.log_decay).into(),
        (&walked.keys).into(),
        (&walked.values).into(),
        (&dcore).into(),
    ];
    arguments.extend([&p, &dlogits, &grown, &dgrown, &change].map(Argument::from));
    arguments.push(row_tokens.into());
    pass.kernels.launch("slot_softmax_backward", (count, groups), 256u32, &arguments)?;
    let by_head = dcore.f_reshape([-1, heads.heads, heads.width])?;
    let (dkeys, dvalues) = slot_walk(pass, [&inputs.q, &by_head], [&dgrown, &grown], &walked.ends, true)?;
    let wide = || pass.empty(&[pass.tokens(), heads.heads, heads.width]);
    let (dq, dk, dv, ddecay) = (wide()?, wide()?, wide()?, pass.empty(&inputs.log_decay.size())?);
    let mut arguments: Vec<Argument> = [&inputs.q, &inputs.k, &inputs.v, &inputs.log_decay].map(Argument::from).into();
    arguments.extend([&walked.keys, &walked.values, &dkeys, &dvalues, &dcore].map(Argument::from));
    arguments.extend([&p, &dlogits, &dgrown, &change, &walked.weights, &walked.ends].map(Argument::from));
    arguments.extend([&dq, &dk, &dv, &ddecay].map(Argument::from));
    arguments.push(row_tokens.into());
    pass.kernels.launch("slot_gradients", (count, groups), 256u32, &arguments)?;
    drop((walked, dkeys, dvalues, p, dlogits, grown, dgrown, change));

    let names = ["q_norm.weight", "k_norm.weight", "A_log", "dt_bias"].map(|name| format!("{prefix}{name}"));
    let blocks = 4 * pass.kernels.gpu.multiprocessors;
    let partial = pass.floats(&[i64::from(blocks), 256 + 2 * heads.heads])?;
    let mut arguments: Vec<Argument> = vec![Argument::at(projected, heads.qkv()), projected.size()[1].into()];
    for name in &names {
        arguments.push(pass.weight(name)?.into());
    }
    arguments.extend([&dq, &dk, &dv, &ddecay].map(Argument::from));
    arguments.extend::<[Argument; 4]>([
        Argument::at(dprojected, heads.qkv()),
        (&partial).into(),
        (pass.tokens() as i32).into(),
        (pass.config.rms_norm_eps as f32).into(),
    ]);
    pass.kernels.launch("slot_inputs_backward", blocks, 256u32, &arguments)?;
    let sums = pass.kernels.column_sums(&partial)?;
    let mut at = 0;
    for (name, width) in names.iter().zip([128, 128, heads.heads, heads.heads]) {
        gradients.vector(name, &sums.f_narrow(0, at, width)?)?;
        at += width;
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------ constant decay

/// Queries, keys, values of the decayed branch, whose columns lie behind softmax attention's.
fn decay_inputs(pass: &Pass, projected: &Tensor, prefix: &str) -> Result<[Tensor; 3]> {
    let heads = Heads::of(pass);
    let (query, key) = queries_and_keys(pass, projected, heads.qkv(), prefix)?;
    let value = projected.f_narrow(1, heads.qkv() + (heads.heads + heads.kv_heads) * heads.width, heads.kv_heads * heads.width)?;
    Ok([query, key, value.f_contiguous()?])
}

fn decay_states(pass: &Pass, key: &Tensor, value: &Tensor, slope: &Tensor) -> Result<Tensor> {
    let (count, groups) = chunks(pass, CHUNK);
    let states = pass.empty(&[groups, count, 128, 128])?;
    let arguments = [key.into(), value.into(), slope.into(), (&states).into(), (pass.row_tokens as i32).into(), (count as i32).into()];
    pass.kernels.launch("decay_states", (2, groups), 256u32, &arguments)?;
    Ok(states)
}

fn decay_forward(pass: &Pass, projected: &Tensor, prefix: &str) -> Result<(Tensor, Tensor, Inner)> {
    let heads = Heads::of(pass);
    let [query, key, value] = decay_inputs(pass, projected, prefix)?;
    let slope = pass.buffer(&format!("{prefix}slope"))?;
    let states = decay_states(pass, &key, &value, slope)?;
    let core = pass.empty(&[pass.tokens(), heads.heads, heads.width])?;
    let (count, groups) = chunks(pass, CHUNK);
    let arguments =
        [(&query).into(), (&key).into(), (&value).into(), (&states).into(), slope.into(), (&core).into(), (pass.row_tokens as i32).into()];
    pass.kernels.launch("decay_output", (count, groups), 256u32, &arguments)?;
    let gated = head_gate(pass, &core, (projected, 2 * heads.qkv()), pass.weight(&format!("{prefix}g_norm.weight"))?)?;
    Ok((gated, core, Inner::Decay))
}

fn decay_backward(
    pass: &Pass,
    projected: &Tensor,
    dprojected: &Tensor,
    dcore: Tensor,
    prefix: &str,
    gradients: &mut Gradients,
) -> Result<()> {
    let heads = Heads::of(pass);
    let [query, key, value] = decay_inputs(pass, projected, prefix)?;
    let slope = pass.buffer(&format!("{prefix}slope"))?;
    let states = decay_states(pass, &key, &value, slope)?;
    let (count, groups) = chunks(pass, CHUNK);
    let dstates = pass.empty(&states.size())?;
    let row_tokens = pass.row_tokens as i32;
    let arguments = [(&query).into(), (&dcore).into(), slope.into(), (&dstates).into(), row_tokens.into(), (count as i32).into()];
    pass.kernels.launch("decay_states_backward", (2, groups), 256u32, &arguments)?;
    let wide = || pass.empty(&[pass.tokens(), heads.heads, heads.width]);
    let (dq, dk, dv) = (wide()?, wide()?, wide()?);
    let mut arguments: Vec<Argument> = [&query, &key, &value, slope, &states, &dstates, &dcore, &dq, &dk, &dv].map(Argument::from).into();
    arguments.push(row_tokens.into());
    pass.kernels.launch("decay_gradients", (count, groups), 256u32, &arguments)?;
    drop((states, dstates, dcore));
    // A key-value head serves several query heads.
    let added = |x: &Tensor| -> Result<Tensor> {
        let x = x.f_reshape([pass.rows, pass.row_tokens, heads.kv_heads, heads.heads / heads.kv_heads, heads.width])?;
        x.f_sum_dim_intlist([3].as_slice(), false, None)
    };
    let dq = dq.f_reshape([pass.rows, pass.row_tokens, heads.heads, heads.width])?;
    queries_and_keys_backward(pass, projected, heads.qkv(), prefix, [&dq, &added(&dk)?, &added(&dv)?], dprojected, gradients)
}
