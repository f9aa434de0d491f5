//! The feed-forward part: dense SwiGLU, or the mixture of experts by sorted dispatch and grouped products.

use tch::{Device, Kind, Tensor};

use super::engine::Pass;
use super::kernels::warps;
use super::store::Gradients;
use crate::QuasarConfig;
use crate::torch::ops::Result;

/// Tokens that one block of the sort takes, and rows that one block gathers (`moe.cu`).
const SORT_TOKENS: i64 = 256;
const GATHER_ROWS: i64 = 8;

/// Expert choices of a pass, `[N, K]` i32 for each mixture layer: forced ones going in, those used coming out.
#[derive(Default)]
pub(crate) struct Routes {
    pub forced: Option<Vec<Tensor>>,
    pub used: Vec<Tensor>,
}

impl Routes {
    /// The choices that `layer` made, forced upon it.
    pub fn of_layer(&self, config: &QuasarConfig, layer: usize) -> Self {
        if !config.is_moe(layer) {
            return Self::default();
        }
        Self { forced: Some(vec![self.used[layer - config.first_k_dense_replace].shallow_clone()]), used: Vec::new() }
    }

    fn next(&self) -> Option<Tensor> {
        self.forced.as_ref().and_then(|forced| forced.get(self.used.len())).map(Tensor::shallow_clone)
    }
}

/// What the backward pass needs.
pub(crate) struct MlpSaved {
    /// Gate and up projection `[N, 2 I]` of the dense part or shared expert.
    dense: Tensor,
    experts: Option<ExpertsSaved>,
}

struct ExpertsSaved {
    logits: Tensor,
    experts: Tensor,
    place: Tensor,
    source: Tensor,
    ends: Tensor,
    shares: Tensor,
    /// `[N K, 2 I]`
    inner: Tensor,
}

fn swiglu(pass: &Pass, x: &Tensor, shares: Option<&Tensor>) -> Result<Tensor> {
    let (rows, width) = (x.size()[0], x.size()[1] / 2);
    let out = pass.empty(&[rows, width])?;
    let arguments = [x.into(), shares.map_or(super::driver::Argument::NULL, Into::into), (&out).into(), rows.into(), (width as i32).into()];
    pass.kernels.launch("swiglu_forward", warps(rows), 256u32, &arguments)?;
    Ok(out)
}

/// Gradient of [`swiglu`] by `x` and by the shares, and its output again.
fn swiglu_backward(pass: &Pass, x: &Tensor, shares: Option<&Tensor>, dout: &Tensor) -> Result<(Tensor, Tensor, Option<Tensor>)> {
    let (rows, width) = (x.size()[0], x.size()[1] / 2);
    let (dx, out) = (pass.empty(&x.size())?, pass.empty(&[rows, width])?);
    let dshares = shares.map(|_| pass.floats(&[rows])).transpose()?;
    let null = super::driver::Argument::NULL;
    let arguments = [
        x.into(),
        shares.map_or(null, Into::into),
        dout.into(),
        (&dx).into(),
        (&out).into(),
        dshares.as_ref().map_or(null, Into::into),
        rows.into(),
        (width as i32).into(),
    ];
    pass.kernels.launch("swiglu_backward", warps(rows), 256u32, &arguments)?;
    Ok((dx, out, dshares))
}

fn gather(pass: &Pass, x: &Tensor, source: &Tensor) -> Result<Tensor> {
    let rows = source.size()[0];
    let out = pass.empty(&[rows, x.size()[1]])?;
    let arguments = [x.into(), source.into(), (&out).into(), (rows as i32).into()];
    pass.kernels.launch("gather_rows", (rows + GATHER_ROWS - 1) / GATHER_ROWS, pass.kernels.row_threads(), &arguments)?;
    Ok(out)
}

fn combine(pass: &Pass, base: &Tensor, rows: &Tensor, place: &Tensor) -> Result<Tensor> {
    let out = pass.empty(&base.size())?;
    let arguments = [base.into(), rows.into(), place.into(), (&out).into()];
    pass.kernels.launch("combine_rows", base.size()[0], pass.kernels.row_threads(), &arguments)?;
    Ok(out)
}

fn grouped(x: &Tensor, matrices: &Tensor, ends: &Tensor) -> Result<Tensor> {
    x.f_internal_grouped_mm(matrices, Some(ends), None::<&Tensor>, None)
}

fn route(pass: &Pass, h: &Tensor, prefix: &str, routes: &mut Routes) -> Result<ExpertsSaved> {
    let config = pass.config;
    let (tokens, experts, choices) = (pass.tokens(), config.num_experts as i64, config.num_experts_per_tok as i64);
    // bf16 products are exact in f32, so that this is the f32 router of the reference.
    let logits = h.f_mm_dtype(&pass.weight(&format!("{prefix}gate.weight"))?.f_tr()?, Kind::Float)?;
    let forced = routes.next();
    let is_forced = forced.is_some();
    let integers = |shape: &[i64]| pass.kernels.empty(shape, Kind::Int);
    let chosen = forced.map_or_else(|| integers(&[tokens, choices]), Ok)?;
    let shares = pass.empty(&[tokens, choices])?;
    let arguments = [
        (&logits).into(),
        pass.buffer(&format!("{prefix}gate.expert_bias"))?.into(),
        (&chosen).into(),
        (&shares).into(),
        (config.routed_scaling_factor as f32).into(),
        i32::from(is_forced).into(),
        (tokens as i32).into(),
    ];
    pass.kernels.launch("route_forward", warps(tokens), 256u32, &arguments)?;
    routes.used.push(chosen.shallow_clone());

    let blocks = (tokens + SORT_TOKENS - 1) / SORT_TOKENS;
    let (counts, ends) = (integers(&[blocks, experts])?, integers(&[experts])?);
    let (place, source, sorted) = (integers(&[tokens * choices])?, integers(&[tokens * choices])?, pass.empty(&[tokens * choices])?);
    let count = tokens as i32;
    pass.kernels.launch("sort_count", blocks, experts, &[(&chosen).into(), (&counts).into(), count.into()])?;
    pass.kernels.launch("sort_scan", 1u32, experts, &[(&counts).into(), (&ends).into(), (blocks as i32).into()])?;
    let capacity = if pass.cap_experts { config.expert_capacity(tokens as usize) as i32 } else { 0 };
    let arguments = [
        (&chosen).into(),
        (&shares).into(),
        (&counts).into(),
        (&place).into(),
        (&source).into(),
        (&sorted).into(),
        capacity.into(),
        count.into(),
    ];
    pass.kernels.launch("sort_place", blocks, experts, &arguments)?;
    let inner = grouped(&gather(pass, h, &source)?, pass.weight(&format!("{prefix}experts_w12"))?, &ends)?;
    Ok(ExpertsSaved { logits, experts: chosen, place, source, ends, shares: sorted, inner })
}

/// Adds the feed-forward part of the normed input `h` to the residual stream `x`.
pub(crate) fn forward(pass: &Pass, x: &Tensor, h: &Tensor, prefix: &str, is_moe: bool, routes: &mut Routes) -> Result<(Tensor, MlpSaved)> {
    let dense_prefix = if is_moe { format!("{prefix}shared_experts.") } else { prefix.to_owned() };
    let dense = pass.linear(h, &format!("{dense_prefix}in"))?;
    let y = pass.add_linear(x, &swiglu(pass, &dense, None)?, &format!("{dense_prefix}down_proj.weight"))?;
    if !is_moe {
        return Ok((y, MlpSaved { dense, experts: None }));
    }
    let saved = route(pass, h, prefix, routes)?;
    // The share multiplies the narrow inside of the expert rather than its output: the same product, fewer elements.
    let inner = swiglu(pass, &saved.inner, Some(&saved.shares))?;
    let outer = grouped(&inner, pass.weight(&format!("{prefix}experts_w3"))?, &saved.ends)?;
    drop(inner);
    let y = combine(pass, &y, &outer, &saved.place)?;
    Ok((y, MlpSaved { dense, experts: Some(saved) }))
}

/// The gradient of `h`.
pub(crate) fn backward(pass: &Pass, dx: &Tensor, h: &Tensor, saved: MlpSaved, prefix: &str, gradients: &mut Gradients) -> Result<Tensor> {
    let is_moe = saved.experts.is_some();
    let dense_prefix = if is_moe { format!("{prefix}shared_experts.") } else { prefix.to_owned() };
    let (in_key, down_key) = (format!("{dense_prefix}in"), format!("{dense_prefix}down_proj.weight"));
    let (ddense, inner, _) = swiglu_backward(pass, &saved.dense, None, &pass.linear_backward(dx, &down_key)?)?;
    gradients.linear(down_key, dx, &inner)?;
    drop(inner);
    let mut dh = pass.linear_backward(&ddense, &in_key)?;
    gradients.linear(in_key, &ddense, h)?;
    drop(ddense);
    let Some(saved) = saved.experts else { return Ok(dh) };

    let (w12_key, w3_key, gate_key) = (format!("{prefix}experts_w12"), format!("{prefix}experts_w3"), format!("{prefix}gate.weight"));
    let douter = gather(pass, dx, &saved.source)?;
    let dinner = grouped(&douter, &pass.weight(&w3_key)?.f_transpose(1, 2)?, &saved.ends)?;
    let (dx12, inner, dshares) = swiglu_backward(pass, &saved.inner, Some(&saved.shares), &dinner)?;
    drop(dinner);
    gradients.matrix(w3_key, grouped(&inner.f_tr()?, &douter, &saved.ends)?)?;
    drop((inner, douter));
    let dsorted = grouped(&dx12, &pass.weight(&w12_key)?.f_transpose(1, 2)?, &saved.ends)?;
    gradients.matrix(w12_key, grouped(&gather(pass, h, &saved.source)?.f_tr()?, &dx12, &saved.ends)?)?;
    drop(dx12);
    let tokens = pass.tokens();
    let dlogits = pass.empty(&saved.logits.size())?;
    if let Some(dshares) = &dshares {
        let arguments = [
            (&saved.logits).into(),
            (&saved.experts).into(),
            (&saved.place).into(),
            dshares.into(),
            (&dlogits).into(),
            (pass.config.routed_scaling_factor as f32).into(),
            (tokens as i32).into(),
        ];
        pass.kernels.launch("route_backward", warps(tokens), 256u32, &arguments)?;
    }
    let _ = dh.f_addmm_(&dlogits, pass.weight(&gate_key)?)?;
    gradients.linear(gate_key, &dlogits, h)?;
    combine(pass, &dh, &dsorted, &saved.place)
}

/// The recorded choices as expert numbers, in memory order.
pub(crate) fn to_numbers(used: &[Tensor]) -> Result<Vec<u16>> {
    let mut numbers = Vec::new();
    for layer in used {
        let layer = layer.f_to_device(Device::Cpu)?.f_contiguous()?;
        let mut values = vec![0i32; layer.numel()];
        let count = values.len();
        layer.f_copy_data(&mut values, count)?;
        numbers.extend(values.into_iter().map(|expert| expert as u16)); // the configuration bounds experts to u16
    }
    Ok(numbers)
}
