//! The delta rule (`linear.cu`).

use tch::Tensor;

use super::{Inner, chunks, head_gate};
use crate::torch::gpu::attention::Heads;
use crate::torch::gpu::engine::{Norm, Pass};
use crate::torch::gpu::kernels::warps;
use crate::torch::gpu::store::Gradients;
use crate::torch::ops::Result;

/// Tokens in a chunk.
const CHUNK: i64 = 64;

struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    slope: Tensor,
}

fn inputs(pass: &Pass, projected: &Tensor, prefix: &str) -> Result<Inputs> {
    let heads = Heads::of(pass);
    let tokens = pass.tokens();
    let by_head = || pass.empty(&[tokens, heads.heads, heads.width]);
    let inputs = Inputs {
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
struct States {
    inverse: Tensor,
    w: Tensor,
    states: Tensor,
    fresh: Tensor,
}

fn states(pass: &Pass, inputs: &Inputs) -> Result<States> {
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
    Ok(States { inverse, w, states, fresh })
}

pub(super) fn forward(pass: &Pass, h: &Tensor, prefix: &str) -> Result<(Tensor, Tensor, Inner)> {
    let heads = Heads::of(pass);
    let (normed, scale) = pass.norm(h, None, 1e-6, Norm::Bounded)?;
    let projected = pass.linear(&normed, &format!("{prefix}in"))?;
    let inputs = inputs(pass, &projected, prefix)?;
    let walked = states(pass, &inputs)?;
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

/// What the backward pass needs.
pub(super) struct Saved {
    pub normed: Tensor,
    pub scale: Tensor,
    pub projected: Tensor,
}

/// The gradient of `h`, from those of the rule's output and of its gate.
pub(super) fn backward(
    pass: &Pass,
    h: &Tensor,
    saved: Saved,
    dcore: Tensor,
    dgate: Tensor,
    prefix: &str,
    gradients: &mut Gradients,
) -> Result<Tensor> {
    let Saved { normed, scale, projected } = saved;
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

    let inputs = inputs(pass, &projected, prefix)?;
    let walked = states(pass, &inputs)?;
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
