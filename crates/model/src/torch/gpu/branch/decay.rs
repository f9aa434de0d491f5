//! Linear attention with a constant decay (`linear.cu`).

use tch::Tensor;

use super::{Inner, chunks, head_gate};
use crate::torch::gpu::attention::{Heads, queries_and_keys, queries_and_keys_backward};
use crate::torch::gpu::driver::Argument;
use crate::torch::gpu::engine::Pass;
use crate::torch::gpu::store::Gradients;
use crate::torch::ops::Result;

/// Tokens in a chunk.
const CHUNK: i64 = 64;

/// Queries, keys, values of the decayed branch, whose columns lie behind softmax attention's.
fn inputs(pass: &Pass, projected: &Tensor, prefix: &str) -> Result<[Tensor; 3]> {
    let heads = Heads::of(pass);
    let (query, key) = queries_and_keys(pass, projected, heads.qkv(), prefix)?;
    let value = projected.f_narrow(1, heads.qkv() + (heads.heads + heads.kv_heads) * heads.width, heads.kv_heads * heads.width)?;
    Ok([query, key, value.f_contiguous()?])
}

fn states(pass: &Pass, key: &Tensor, value: &Tensor, slope: &Tensor) -> Result<Tensor> {
    let (count, groups) = chunks(pass, CHUNK);
    let states = pass.empty(&[groups, count, 128, 128])?;
    let arguments = [key.into(), value.into(), slope.into(), (&states).into(), (pass.row_tokens as i32).into(), (count as i32).into()];
    pass.kernels.launch("decay_states", (2, groups), 256u32, &arguments)?;
    Ok(states)
}

pub(super) fn forward(pass: &Pass, projected: &Tensor, prefix: &str) -> Result<(Tensor, Tensor, Inner)> {
    let heads = Heads::of(pass);
    let [query, key, value] = inputs(pass, projected, prefix)?;
    let slope = pass.buffer(&format!("{prefix}slope"))?;
    let states = states(pass, &key, &value, slope)?;
    let core = pass.empty(&[pass.tokens(), heads.heads, heads.width])?;
    let (count, groups) = chunks(pass, CHUNK);
    let arguments =
        [(&query).into(), (&key).into(), (&value).into(), (&states).into(), slope.into(), (&core).into(), (pass.row_tokens as i32).into()];
    pass.kernels.launch("decay_output", (count, groups), 256u32, &arguments)?;
    let gated = head_gate(pass, &core, (projected, 2 * heads.qkv()), pass.weight(&format!("{prefix}g_norm.weight"))?)?;
    Ok((gated, core, Inner::Decay))
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
    let [query, key, value] = inputs(pass, projected, prefix)?;
    let slope = pass.buffer(&format!("{prefix}slope"))?;
    let states = states(pass, &key, &value, slope)?;
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
