//! The slot memory (`slots.cu`).

use tch::Tensor;

use super::{Inner, chunks};
use crate::torch::gpu::attention::Heads;
use crate::torch::gpu::driver::Argument;
use crate::torch::gpu::engine::{Norm, Pass};
use crate::torch::gpu::kernels::warps;
use crate::torch::gpu::store::Gradients;
use crate::torch::ops::Result;

/// eps of the output norm.
const EPS: f64 = 1e-5;
/// Tokens in a chunk.
const CHUNK: i64 = 32;
const SLOTS: i64 = 64;

struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
}

fn inputs(pass: &Pass, projected: &Tensor, prefix: &str) -> Result<Inputs> {
    let heads = Heads::of(pass);
    let tokens = pass.tokens();
    let by_head = |count: i64, width: i64| pass.empty(&[tokens, count, width]);
    let inputs = Inputs {
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
struct States {
    weights: Tensor,
    ends: Tensor,
    keys: Tensor,
    values: Tensor,
}

/// Walks over the chunks: `x` for both memories with their weights.
fn walk(pass: &Pass, x: [&Tensor; 2], weights: [&Tensor; 2], ends: &Tensor, is_backward: bool) -> Result<(Tensor, Tensor)> {
    let (count, groups) = chunks(pass, CHUNK);
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

fn states(pass: &Pass, inputs: &Inputs) -> Result<States> {
    let (count, groups) = chunks(pass, CHUNK);
    let (weights, ends) = (pass.empty(&[groups, count, CHUNK, SLOTS])?, pass.floats(&[groups, count, SLOTS])?);
    let arguments = [(&inputs.log_decay).into(), (&weights).into(), (&ends).into(), (pass.row_tokens as i32).into()];
    pass.kernels.launch("slot_gates", (count, groups), SLOTS, &arguments)?;
    let (keys, values) = walk(pass, [&inputs.k, &inputs.v], [&weights, &weights], &ends, false)?;
    Ok(States { weights, ends, keys, values })
}

pub(super) fn forward(pass: &Pass, projected: &Tensor, prefix: &str) -> Result<(Tensor, Tensor, Inner)> {
    let heads = Heads::of(pass);
    let inputs = inputs(pass, projected, prefix)?;
    let walked = states(pass, &inputs)?;
    let core = pass.empty(&[pass.tokens(), heads.hidden()])?;
    let (count, groups) = chunks(pass, CHUNK);
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
    let (normed, scale) = pass.norm(&core, Some(pass.weight(&format!("{prefix}g_norm.weight"))?), EPS, Norm::Silu)?;
    Ok((normed, core, Inner::Slots { scale }))
}

/// Gradient of the output norm; and the normed output again.
pub(super) fn norm_backward(
    pass: &Pass,
    dnormed: &Tensor,
    core: &Tensor,
    scale: &Tensor,
    prefix: &str,
    gradients: &mut Gradients,
) -> Result<(Tensor, Tensor)> {
    let key = format!("{prefix}g_norm.weight");
    let weight = pass.weight(&key)?;
    let (normed, _) = pass.norm(core, Some(weight), EPS, Norm::Silu)?;
    let (dcore, dw) = pass.norm_backward(dnormed, core, Some(weight), scale, None, Norm::Silu)?;
    if let Some(dw) = dw {
        gradients.vector(&key, &dw)?;
    }
    Ok((dcore, normed))
}

pub(super) fn backward(
    pass: &Pass,
    projected: &Tensor,
    dprojected: &Tensor,
    dcore: Tensor,
    prefix: &str,
    gradients: &mut Gradients,
) -> Result<()> {
    let heads = Heads::of(pass);
    let inputs = inputs(pass, projected, prefix)?;
    let walked = states(pass, &inputs)?;
    let (count, groups) = chunks(pass, CHUNK);
    let row_tokens = pass.row_tokens as i32;
    let array = || pass.empty(&[groups, count, CHUNK, SLOTS]);
    let (p, dlogits, grown, dgrown) = (array()?, array()?, array()?, array()?);
    let change = pass.floats(&[groups, count, CHUNK, SLOTS])?;
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
    let (dkeys, dvalues) = walk(pass, [&inputs.q, &by_head], [&dgrown, &grown], &walked.ends, true)?;
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
