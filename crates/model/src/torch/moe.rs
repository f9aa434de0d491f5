//! The mixture of experts: sigmoid router limited to groups, sorted dispatch, no token ever dropped.

use tch::{Device, Kind, Tensor};

use super::network::Weights;
use super::ops::{Result, add_linear, gated, linear, wide};
use crate::{QuasarConfig, Routes, TrainError};

/// Expert choices of a forward pass: forced ones going in, recorded ones coming out, one entry `[N, K]` per mixture layer
/// that is passed.
#[derive(Default)]
pub(crate) struct Routing {
    forced: Option<Vec<Tensor>>,
    recorded: Option<Vec<Tensor>>,
    passed: usize,
    /// Most assignments that an expert takes; the rest is dropped.
    capacity: Option<usize>,
}

impl Routing {
    /// `tokens` is the number of tokens in the batch.
    pub fn new(
        config: &QuasarConfig,
        tokens: usize,
        forced: Option<&Routes>,
        record: bool,
        device: Device,
    ) -> std::result::Result<Self, TrainError> {
        let recorded = record.then(Vec::new);
        let Some(routes) = forced else { return Ok(Self { recorded, ..Self::default() }) };
        let per_pass = tokens * config.num_experts_per_tok;
        routes.check(config, tokens)?;
        let shape = [tokens as i64, config.num_experts_per_tok as i64];
        let layers = routes.0.chunks(per_pass).map(|chunk| {
            let experts: Vec<i64> = chunk.iter().map(|expert| i64::from(*expert)).collect();
            Tensor::f_from_slice(&experts)?.f_reshape(shape)?.f_to_device(device)
        });
        Ok(Self { forced: Some(layers.collect::<Result<_>>()?), recorded, ..Self::default() })
    }

    /// Lets experts drop what is beyond `capacity`.
    pub fn cap(&mut self, capacity: usize) {
        self.capacity = Some(capacity);
    }

    /// The recorded choices, if recording was asked for.
    pub fn into_routes(self) -> std::result::Result<Option<Routes>, TrainError> {
        let Some(layers) = self.recorded else { return Ok(None) };
        let mut routes = Vec::new();
        for layer in layers {
            routes.extend(host(&layer)?.into_iter().map(|expert| expert as u16)); // the configuration bounds experts to u16
        }
        Ok(Some(Routes(routes)))
    }

    /// The experts of the next mixture layer.
    fn choose(&mut self, score: &Tensor, bias: &Tensor, config: &QuasarConfig) -> Result<Tensor> {
        let experts = match &self.forced {
            Some(layers) => layers[self.passed].shallow_clone(),
            None => tch::no_grad(|| select(score, bias, config))?,
        };
        self.passed += 1;
        if let Some(recorded) = &mut self.recorded {
            recorded.push(experts.shallow_clone());
        }
        Ok(experts)
    }
}

/// An integer tensor as numbers, in memory order.
fn host(x: &Tensor) -> Result<Vec<i64>> {
    let x = x.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut values = vec![0i64; x.numel()];
    let count = values.len();
    x.f_copy_data(&mut values, count)?;
    Ok(values)
}

/// The best experts `[N, K]` by score plus bias, inside the best groups; a group is as good as the sum of its best two.
fn select(score: &Tensor, bias: &Tensor, config: &QuasarConfig) -> Result<Tensor> {
    let groups = config.n_group as i64;
    let ranking = score.f_detach()?.f_add(bias)?.f_reshape([-1, groups, config.num_experts as i64 / groups])?;
    let ranking = if config.topk_group == config.n_group {
        ranking
    } else {
        let best_two = ranking.f_topk(2, -1, true, false)?.0.f_sum_dim_intlist([-1].as_slice(), false, None)?;
        let open = best_two.f_topk(config.topk_group as i64, -1, true, false)?.1;
        let closed = best_two.f_ones_like()?.f_to_kind(Kind::Bool)?.f_scatter_value(1, &open, 0)?;
        ranking.f_masked_fill(&closed.f_unsqueeze(-1)?, f64::NEG_INFINITY)?
    };
    Ok(ranking.f_reshape([-1, config.num_experts as i64])?.f_topk(config.num_experts_per_tok as i64, -1, true, true)?.1)
}

/// Where each of the `N K` assignments goes when they are sorted by expert.
struct Dispatch {
    /// Assignments per expert.
    counts: Vec<i64>,
    /// Assignment at each sorted place, and its token.
    order: Tensor,
    token: Tensor,
    /// Sorted place of each assignment.
    place: Tensor,
    /// 1 for sorted places that are kept, 0 for dropped ones, f32; absent if all are kept.
    kept: Option<Tensor>,
}

impl Dispatch {
    /// Counting sort on the host, stable: experts take their tokens in order.
    fn new(experts: &Tensor, config: &QuasarConfig, capacity: Option<usize>) -> Result<Self> {
        let (device, choices) = (experts.device(), host(experts)?);
        let mut counts = vec![0i64; config.num_experts];
        choices.iter().for_each(|expert| counts[*expert as usize] += 1);
        let mut next = vec![0i64; counts.len()];
        for expert in 1..counts.len() {
            next[expert] = next[expert - 1] + counts[expert - 1];
        }
        let (mut order, mut token, mut place) = (vec![0i64; choices.len()], vec![0i64; choices.len()], vec![0i64; choices.len()]);
        for (assignment, expert) in choices.iter().enumerate() {
            let at = &mut next[*expert as usize];
            order[*at as usize] = assignment as i64;
            token[*at as usize] = (assignment / config.num_experts_per_tok) as i64;
            place[assignment] = *at;
            *at += 1;
        }
        let kept = capacity.filter(|capacity| counts.iter().any(|count| *count > *capacity as i64)).map(|capacity| {
            let of_expert = |count: &i64| (0..*count).map(move |number| if number < capacity as i64 { 1f32 } else { 0.0 });
            let kept: Vec<f32> = counts.iter().flat_map(of_expert).collect();
            Tensor::f_from_slice(&kept)?.f_to_device(device)
        });
        let [order, token, place] = [order, token, place].map(|values| Tensor::f_from_slice(&values)?.f_to_device(device));
        Ok(Self { counts, order: order?, token: token?, place: place?, kept: kept.transpose()? })
    }
}

/// Rows of `x` by number. As an embedding lookup: its gradient adds rows in a fixed order on every device.
fn rows_of(x: &Tensor, index: &Tensor) -> Result<Tensor> {
    Tensor::f_embedding(x, index, -1, false, false)
}

/// `x [N K, in]`, sorted by expert, times the matrices `[E, in, out]` of the experts.
fn by_expert(x: &Tensor, matrices: &Tensor, counts: &[i64]) -> Result<Tensor> {
    if x.device().is_cuda() && x.f_kind()? == Kind::BFloat16 {
        let ends: Vec<i32> = counts
            .iter()
            .scan(0, |end, count| {
                *end += *count as i32;
                Some(*end)
            })
            .collect();
        let ends = Tensor::f_from_slice(&ends)?.f_to_device(x.device())?;
        return x.f_internal_grouped_mm(matrices, Some(&ends), None::<&Tensor>, None);
    }
    let (parts, matrices) = (x.f_split_with_sizes(counts, 0)?, matrices.f_unbind(0)?);
    let products: Vec<Tensor> = parts.iter().zip(&matrices).map(|(part, matrix)| part.f_mm(matrix)).collect::<Result<_>>()?;
    Tensor::f_cat(&products, 0)
}

/// Adds the mixture's output for the normed input `h [N, D]` to the residual stream `x`.
pub(crate) fn add_moe(
    x: &Tensor,
    h: &Tensor,
    weights: &Weights,
    prefix: &str,
    config: &QuasarConfig,
    routing: &mut Routing,
) -> Result<Tensor> {
    let get = |name: &str| weights.get(&format!("{prefix}{name}"));
    let score = linear(&wide(h)?, &wide(get("gate.weight"))?)?.f_sigmoid()?;
    let experts = routing.choose(&score, get("gate.expert_bias"), config)?;
    let share = score.f_gather(1, &experts, false)?; // without the bias
    let share = share.f_div(&share.f_sum_dim_intlist([-1].as_slice(), true, None)?.f_add_scalar(1e-20)?)?;
    let share = share.f_mul_scalar(config.routed_scaling_factor)?.f_to_kind(h.f_kind()?)?;

    let dispatch = Dispatch::new(&experts, config, routing.capacity)?;
    let inner = gated(&by_expert(&rows_of(h, &dispatch.token)?, get("experts_w12"), &dispatch.counts)?)?;
    // The share multiplies the narrow inside of the expert rather than its output: the same product, fewer elements.
    let share = share.f_reshape([-1])?.f_gather(0, &dispatch.order, false)?;
    let share = match &dispatch.kept {
        Some(kept) => share.f_mul(&kept.f_to_kind(share.f_kind()?)?)?,
        None => share,
    };
    let inner = inner.f_mul(&share.f_unsqueeze(-1)?)?;
    let outer = by_expert(&inner, get("experts_w3"), &dispatch.counts)?;
    let outer = rows_of(&outer, &dispatch.place)?.f_reshape([-1, config.num_experts_per_tok as i64, config.hidden_size as i64])?;
    let shared = add_swiglu(x, h, weights, &format!("{prefix}shared_experts."))?;
    shared.f_add(&outer.f_sum_dim_intlist([1].as_slice(), false, None)?)
}

/// Adds a SwiGLU of `h` to `x`.
pub(crate) fn add_swiglu(x: &Tensor, h: &Tensor, weights: &Weights, prefix: &str) -> Result<Tensor> {
    let inner = gated(&linear(h, weights.get(&format!("{prefix}in")))?)?;
    add_linear(x, &inner, weights.get(&format!("{prefix}down_proj.weight")))
}
