//! What training takes of a GPU's memory, and what to do when that is too much.
//!
//! A pure estimate of the learner with own kernels: parameters in bf16 with 16 bits behind them, gradients in bf16, moments in 8 bits
//! or f32, what each layer keeps for the backward pass, the largest layer's temporary tensors, and a tile of logits. While the backward
//! pass goes down the layers, gradients come and kept tensors go, so that the peak is looked for layer by layer; where a batch is cut into
//! several passes, the gradients of the first are there all the while. Of the host's memory it counts what is pinned: optimizer state,
//! and fragments on their way.

use serde::Serialize;

use crate::{Branch, QuasarConfig};

/// Rows of logits that exist at a time (`gpu/engine.rs`).
const LOGIT_ROWS: u64 = 4096;
/// Tokens in a pass that fill the GPU.
const FULL_TOKENS: u64 = 16_384;
/// What libtorch, its libraries and the driver take for themselves, and what the allocator loses between blocks: bytes, and per mille.
const RESERVE_BYTES: u64 = 1 << 30;
const RESERVE_PER_MILLE: u64 = 45;
/// Fragments in pinned memory at a time: exported ones until their answer comes, and versions that wait for the next boundary.
const FRAGMENTS_OUT: u64 = 3;
const FRAGMENTS_IN: u64 = 3;
const GIB: f64 = (1u64 << 30) as f64;

/// What a learner works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Rows in a batch.
    pub rows: u64,
    /// Tokens in a row.
    pub row_tokens: u64,
    /// Fragments of equal size that the model is cut into; 0: none is exchanged.
    pub fragments: u64,
    /// Whether documents inside a row pass through one by one, each up to a whole row.
    pub by_document: bool,
}

impl Work {
    /// Most rows in a pass.
    fn rows_at_once(&self) -> u64 {
        if self.by_document { 1 } else { self.rows.max(1) }
    }

    /// Ever fewer rows in a pass: all, half of them, and so on down to one.
    fn parts(&self) -> impl Iterator<Item = u64> {
        std::iter::successors(Some(self.rows_at_once()), |part| (*part > 1).then(|| part.div_ceil(2)))
    }
}

/// How memory is saved, cheapest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Strategy {
    /// 8-bit moments instead of f32.
    pub byte_moments: bool,
    /// Keep only each layer's input and compute the layer again in the backward pass: about a fifth slower.
    pub recompute: bool,
    /// Lower halves of the weights and moments in pinned memory of the host: each step waits for the bus.
    pub offload: bool,
    /// Rows in one forward and backward pass.
    pub rows_per_pass: u64,
}

impl std::fmt::Display for Strategy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let moments = if self.byte_moments { "8-bit moments" } else { "f32 moments" };
        let recompute = if self.recompute { ", recomputation" } else { "" };
        let offload = if self.offload { ", optimizer state in the host's memory" } else { "" };
        let rows = if self.rows_per_pass == 1 { "row" } else { "rows" };
        write!(f, "{moments}{recompute}{offload}, {} {rows} a pass", self.rows_per_pass)
    }
}

/// Bytes of one strategy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    #[serde(flatten)]
    pub strategy: Strategy,
    /// Weights and moments on the GPU.
    pub state_bytes: u64,
    /// Pinned memory of the host: weights and moments that are not on the GPU, and fragments on their way.
    pub host_bytes: u64,
    /// Of these, the fragments: they are needed with every strategy.
    pub fragment_bytes: u64,
    /// Gradients of all parameters.
    pub gradient_bytes: u64,
    /// Everything at the worst moment of a step.
    pub peak_bytes: u64,
}

/// Elements of each layer's trained and frozen parameters, and of those outside of layers.
fn parameters_by_layer(config: &QuasarConfig) -> (Vec<u64>, u64) {
    let (mut layers, mut outside) = (vec![0; config.num_hidden_layers], 0);
    for tensor in config.tensors().iter().filter(|tensor| !tensor.is_buffer) {
        let layer = tensor.name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()).and_then(|n| n.parse::<usize>().ok());
        match layer.and_then(|layer| layers.get_mut(layer)) {
            Some(sum) => *sum += tensor.elements(),
            None => outside += tensor.elements(),
        }
    }
    (layers, outside)
}

/// Bytes that a layer keeps for its backward pass, for each token.
fn kept_per_token(config: &QuasarConfig, layer: usize) -> u64 {
    let (hidden, heads, kv) = (config.hidden_size as u64, config.num_attention_heads as u64, config.num_key_value_heads as u64);
    let (head, qkv) = (config.head_dim as u64, config.qkv_rows() as u64);
    // Input, middle, projection, queries and keys, attention's output.
    let mut halves = 2 * hidden + qkv + (heads + kv) * head + hidden;
    halves += match config.branch(layer) {
        None => 0,
        // Its own normed input and projection, gate, core, output; the others' projections are part of the layer's.
        Some(Branch::Quasar) => hidden + (3 * hidden + head + heads) + 3 * hidden,
        Some(Branch::Raven) => qkv + heads * (config.raven_slots as u64 + 1) + 2 * hidden,
        Some(Branch::Gla) => qkv + hidden + 2 * hidden,
    };
    let width = config.moe_intermediate_size as u64;
    let choices = config.num_experts_per_tok as u64;
    if config.is_moe(layer) {
        2 * (halves + 2 * width + choices * (2 * width + 1)) + 4 * (config.num_experts as u64 + 3 * choices)
    } else {
        2 * (halves + 2 * config.intermediate_size as u64)
    }
}

/// Bytes of the temporary tensors of a layer's backward pass, for each token: what the experts' part holds at once, the widest of them.
fn working_per_token(config: &QuasarConfig) -> u64 {
    let (hidden, width, choices) = (config.hidden_size as u64, config.moe_intermediate_size as u64, config.num_experts_per_tok as u64);
    2 * (choices * (2 * hidden + 4 * width) + 6 * hidden)
}

/// The estimate for a strategy.
pub fn memory_of(config: &QuasarConfig, work: Work, strategy: Strategy) -> MemoryPlan {
    let (layers, outside) = parameters_by_layer(config);
    let parameters: u64 = layers.iter().sum::<u64>() + outside;
    let moments = if strategy.byte_moments { 2 * parameters + parameters / 32 } else { 8 * parameters };
    // Scales of 8-bit moments stay on the GPU.
    let away = if strategy.offload { 2 * parameters + if strategy.byte_moments { 2 * parameters } else { moments } } else { 0 };
    let state_bytes = 4 * parameters + moments - away;
    let fragment_bytes = match work.fragments {
        0 => 0,
        fragments => 4 * parameters.div_ceil(fragments) * (FRAGMENTS_OUT.min(fragments) + FRAGMENTS_IN.min(fragments)),
    };
    let tokens = strategy.rows_per_pass * work.row_tokens;
    let input = 2 * config.hidden_size as u64 * tokens;
    let kept: Vec<u64> =
        (0..layers.len()).map(|layer| if strategy.recompute { input } else { kept_per_token(config, layer) * tokens }).collect();
    let working = working_per_token(config) * tokens;
    let logits = 2 * LOGIT_ROWS.min(tokens) * config.vocab_size as u64;
    // A later pass adds to the gradients of the first; those of the experts and of the embedding are made by themselves before.
    let is_cut = work.by_document || strategy.rows_per_pass < work.rows;
    let added = if is_cut { 4 * (config.num_experts * config.hidden_size * config.moe_intermediate_size) as u64 } else { 0 };
    // At the head: everything kept, logits, the gradient of the head (half of what is outside of layers).
    let mut live: u64 = kept.iter().sum::<u64>() + if is_cut { 2 * parameters } else { outside };
    let mut most = live + logits + 2 * input;
    for layer in (0..layers.len()).rev() {
        let again = if strategy.recompute { kept_per_token(config, layer) * tokens } else { 0 };
        live += if is_cut { 0 } else { 2 * layers[layer] };
        most = most.max(live + again + working + logits + added);
        live -= kept[layer];
    }
    most = most.max(2 * parameters + if is_cut { outside } else { 0 });
    let peak = state_bytes + most;
    let peak_bytes = peak + RESERVE_BYTES + peak / 1000 * RESERVE_PER_MILLE;
    let host_bytes = away + fragment_bytes;
    MemoryPlan { strategy, state_bytes, host_bytes, fragment_bytes, gradient_bytes: 2 * parameters, peak_bytes }
}

/// What there is.
#[derive(Clone, Copy, Debug)]
pub struct Available {
    /// Bytes of the GPU.
    pub device_bytes: u64,
    /// Bytes of host memory that may be pinned; 0: none.
    pub host_bytes: u64,
    /// Whether f32 moments are wanted where they fit.
    pub f32_moments: bool,
}

impl Available {
    fn holds(&self, plan: &MemoryPlan) -> bool {
        plan.peak_bytes <= self.device_bytes && is_lent(plan, self.host_bytes)
    }
}

/// Whether a plan pins no more than `host_bytes`, as far as there is a choice: fragments need their buffers all the same.
fn is_lent(plan: &MemoryPlan, host_bytes: u64) -> bool {
    !plan.strategy.offload || plan.host_bytes <= host_bytes
}

/// All strategies for a batch, cheapest first: f32 moments if wanted, then 8-bit moments, fewer rows in a pass, recomputation, and last the
/// host's memory. Each takes less of the GPU than those before it.
pub fn strategies(config: &QuasarConfig, work: Work, f32_moments: bool) -> Vec<MemoryPlan> {
    let mut list: Vec<MemoryPlan> = Vec::new();
    let mut add = |byte_moments, recompute, offload, rows_per_pass| {
        let plan = memory_of(config, work, Strategy { byte_moments, recompute, offload, rows_per_pass });
        if list.iter().all(|cheaper| plan.peak_bytes < cheaper.peak_bytes) {
            list.push(plan);
        }
    };
    if f32_moments {
        add(false, false, false, work.rows_at_once());
    }
    // Smaller passes cost less than computing twice, down to the size at which products no longer fill the GPU.
    let mut is_full = true;
    for part in work.parts().take_while(|part| std::mem::replace(&mut is_full, part * work.row_tokens > FULL_TOKENS)) {
        add(true, false, false, part);
    }
    for offload in [false, true] {
        for part in work.parts() {
            add(true, true, offload, part);
        }
    }
    list
}

/// The cheapest strategy that fits; otherwise the one that takes least of the GPU, which says how much is missing.
///
/// # Errors
/// Nothing fits.
pub fn plan_memory(config: &QuasarConfig, work: Work, available: Available) -> Result<MemoryPlan, MemoryPlan> {
    let list = strategies(config, work, available.f32_moments);
    let smallest = list.iter().copied().filter(|plan| is_lent(plan, available.host_bytes)).min_by_key(|plan| plan.peak_bytes);
    list.iter().find(|plan| available.holds(plan)).copied().ok_or(smallest.unwrap_or(list[0]))
}

/// Recomputation and rows in a pass for a learner whose moments lie where they lie, with `bytes` of the GPU in all: the cheapest that
/// fits, or the smallest there is. `recompute`: whether it must, or must not, be recomputed.
pub fn plan_pass(config: &QuasarConfig, work: Work, byte_moments: bool, offload: bool, recompute: Option<bool>, bytes: u64) -> MemoryPlan {
    let of = |recompute, rows_per_pass| memory_of(config, work, Strategy { byte_moments, recompute, offload, rows_per_pass });
    let list: Vec<MemoryPlan> = match recompute {
        Some(recompute) => work.parts().map(|part| of(recompute, part)).collect(),
        None => strategies(config, work, false).iter().map(|plan| of(plan.strategy.recompute, plan.strategy.rows_per_pass)).collect(),
    };
    let smallest = list.iter().copied().min_by_key(|plan| plan.peak_bytes).expect("there is always a strategy");
    list.into_iter().find(|plan| plan.peak_bytes <= bytes).unwrap_or(smallest)
}

/// What would fit after `missing` bytes were missing with `used`: the cheapest strategy that takes so much less, with at most `host_bytes`
/// of pinned memory if there is such a one.
pub fn advice(config: &QuasarConfig, work: Work, used: Strategy, missing: u64, host_bytes: u64) -> String {
    let budget = memory_of(config, work, used).peak_bytes.saturating_sub(missing.max(1));
    let list = strategies(config, work, false);
    let mut fitting = list.iter().filter(|plan| plan.peak_bytes <= budget);
    let gib = |bytes: u64| bytes as f64 / GIB;
    match fitting.clone().find(|plan| is_lent(plan, host_bytes)).or_else(|| fitting.next()) {
        Some(plan) if !is_lent(plan, host_bytes) => format!(
            "this would fit: {} ({:.1} GiB of the GPU); allow {:.1} GiB of pinned host memory for it",
            plan.strategy,
            gib(plan.peak_bytes),
            gib(plan.host_bytes)
        ),
        Some(plan) => format!("this would fit: {} ({:.1} GiB of the GPU)", plan.strategy, gib(plan.peak_bytes)),
        None => {
            let least = list.iter().map(|plan| plan.peak_bytes).min().unwrap_or_default();
            format!("no way of saving memory is enough: the thriftiest takes {:.1} GiB of the GPU; use a larger one", gib(least))
        }
    }
}

/// Least bytes of a GPU that training through libtorch's operations takes: weights and both moments in f32, and gradients twice, while they
/// are put together and while a step is taken.
pub fn least_through_libtorch(config: &QuasarConfig) -> u64 {
    const BYTES: u64 = 4 * (3 + 2);
    RESERVE_BYTES + BYTES * config.parameter_count()
}

/// What to do where the host could not give what a strategy pins, `host_bytes` being what was planned with.
pub fn host_advice(config: &QuasarConfig, work: Work, used: Strategy, host_bytes: u64) -> String {
    let plan = memory_of(config, work, used);
    let [needed, fragments, lent] = [plan.host_bytes, plan.fragment_bytes, host_bytes].map(|bytes| bytes as f64 / GIB);
    let lent = if used.offload { format!(", and {lent:.1} GiB were planned with") } else { String::new() };
    format!(
        "this pins {needed:.1} GiB of the host's memory ({used}; {fragments:.1} GiB of it for fragments on their way){lent}; free so much, raise the container's limit, or set QUASAR_MINER_HOST_MEMORY_GIB to what may be pinned"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAGMENTS: u64 = 24;

    fn work(rows: u64) -> Work {
        Work { rows, row_tokens: 2048, fragments: FRAGMENTS, by_document: false }
    }

    #[test]
    fn the_estimate_is_near_what_was_measured() {
        // Measured on an H100 and an H200, sequence 2,048: layers, rows, recompute, GiB, with what the allocator keeps where there is room.
        for (layers, rows, recompute, measured) in [
            (6, 4, false, 39.94),
            (6, 8, false, 42.02),
            (6, 16, false, 46.58),
            (6, 24, false, 53.03),
            (6, 8, true, 40.34),
            (20, 4, false, 134.34),
            (20, 8, false, 137.04),
            (20, 4, true, 126.64),
            (20, 8, true, 128.04),
            (20, 16, true, 130.25),
        ] {
            let config = QuasarConfig::preview(layers).unwrap();
            let strategy = Strategy { byte_moments: true, recompute, offload: false, rows_per_pass: rows };
            let estimate = memory_of(&config, work(rows), strategy).peak_bytes as f64 / GIB;
            assert!(
                estimate > 0.975 * measured && estimate < 1.1 * measured,
                "{layers} layers, {rows} rows: {estimate} against {measured}"
            );
        }
    }

    fn plan(layers: usize, rows: u64, device_gib: u64, host_gib: u64) -> Result<MemoryPlan, MemoryPlan> {
        let available = Available { device_bytes: device_gib << 30, host_bytes: host_gib << 30, f32_moments: true };
        plan_memory(&QuasarConfig::preview(layers).unwrap(), work(rows), available)
    }

    #[test]
    fn the_cheapest_strategy_that_fits_is_chosen() {
        assert!(!plan(6, 16, 141, 0).unwrap().strategy.byte_moments);
        let strategy = plan(6, 16, 60, 0).unwrap().strategy;
        assert!(strategy.byte_moments && !strategy.recompute && strategy.rows_per_pass == 16);
        let small = plan(6, 16, 8, 0).unwrap_err();
        assert!(small.strategy.recompute && small.peak_bytes > 8 << 30, "nothing fits");
    }

    #[test]
    fn the_released_model_trains_on_141_gb_and_with_the_hosts_memory_on_80_gb() {
        assert!(!plan(20, 8, 139, 0).unwrap().strategy.offload);
        assert!(plan(20, 8, 78, 0).is_err());
        let offloaded = plan(20, 8, 78, 100).unwrap();
        assert!(offloaded.strategy.offload && offloaded.host_bytes > 60 << 30);
        assert!(plan(20, 8, 78, 70).is_err(), "fragments on their way have to find room beside the optimizer's state");
    }

    #[test]
    fn fragments_on_their_way_count_as_the_hosts_memory() {
        let config = QuasarConfig::preview(20).unwrap();
        let of = |offload, fragments| {
            let strategy = Strategy { byte_moments: true, recompute: true, offload, rows_per_pass: 8 };
            memory_of(&config, Work { fragments, ..work(8) }, strategy)
        };
        let parameters = config.parameter_count();
        let (kept, offloaded) = (of(false, FRAGMENTS), of(true, FRAGMENTS));
        assert_eq!(kept.host_bytes, kept.fragment_bytes);
        assert_eq!(kept.fragment_bytes, 6 * 4 * parameters.div_ceil(FRAGMENTS));
        assert_eq!(offloaded.host_bytes, 4 * parameters + kept.fragment_bytes);
        assert_eq!((kept.peak_bytes, offloaded.peak_bytes), (of(false, 0).peak_bytes, of(true, 0).peak_bytes));
        assert_eq!(of(false, 1).host_bytes, 8 * parameters, "a single fragment is at most once under way in each direction");
        assert_eq!(of(false, 0).host_bytes, 0);
    }

    #[test]
    fn a_host_that_is_short_of_memory_is_told_what_is_pinned_and_by_which_setting() {
        let config = QuasarConfig::preview(20).unwrap();
        let used = Strategy { byte_moments: true, recompute: true, offload: true, rows_per_pass: 8 };
        let needed = format!("{:.1} GiB of the host's memory", memory_of(&config, work(8), used).host_bytes as f64 / GIB);
        let text = host_advice(&config, work(8), used, 40 << 30);
        assert!(text.contains(&needed) && text.contains("40.0 GiB were planned with"), "{text}");
        assert!(text.contains("QUASAR_MINER_HOST_MEMORY_GIB") && !text.contains("of the GPU"), "{text}");
        let text = host_advice(&config, work(8), Strategy { offload: false, ..used }, 0);
        assert!(text.contains("fragments on their way") && !text.contains("planned with"), "{text}");
    }

    /// On an H200, 8 rows of the released model pass through at once with everything kept; in a second pass, beside the gradients of the
    /// first, they do not.
    #[test]
    fn a_batch_that_is_cut_keeps_the_gradients_of_its_first_pass() {
        let strategy = |rows| plan(20, rows, 138, 0).unwrap().strategy;
        assert!(!strategy(8).recompute && strategy(8).rows_per_pass == 8);
        for rows in [16, 64, 192] {
            assert!(strategy(rows).recompute && strategy(rows).rows_per_pass <= 32, "{rows} rows: {}", strategy(rows));
        }
    }

    /// Documents pass one by one, so that the gradients are there from the second on, whatever the number of rows.
    #[test]
    fn documents_take_what_a_single_row_takes_beside_all_gradients() {
        let config = QuasarConfig::preview(20).unwrap();
        let of = |rows, by_document| {
            let strategy = Strategy { byte_moments: true, recompute: false, offload: false, rows_per_pass: 1 };
            memory_of(&config, Work { by_document, ..work(rows) }, strategy).peak_bytes
        };
        assert_eq!((of(1, true), of(64, true)), (of(2, false), of(2, false)));
        assert!(of(1, true) > of(1, false));
        let plan = plan_memory(
            &config,
            Work { by_document: true, ..work(192) },
            Available { device_bytes: 138 << 30, host_bytes: 0, f32_moments: true },
        );
        assert_eq!(plan.unwrap().strategy.rows_per_pass, 1);
    }

    #[test]
    fn a_learner_that_is_already_there_saves_by_smaller_passes_then_by_recomputation() {
        let config = QuasarConfig::preview(6).unwrap();
        let strategy = |gib: u64| plan_pass(&config, work(32), true, false, None, gib << 30).strategy;
        assert_eq!((strategy(78).recompute, strategy(78).rows_per_pass), (false, 32));
        assert_eq!((strategy(58).recompute, strategy(58).rows_per_pass), (false, 16));
        assert_eq!((strategy(50).recompute, strategy(50).rows_per_pass), (false, 8));
        assert!(strategy(42).recompute);
        assert_eq!(strategy(1).rows_per_pass, 1, "nothing fits: the smallest is tried");
        assert!(!plan_pass(&config, work(32), false, true, None, 78 << 30).strategy.byte_moments);
        let forced = |recompute| plan_pass(&config, work(32), true, false, Some(recompute), 44 << 30).strategy;
        assert!(forced(true).recompute && !forced(false).recompute && forced(false).rows_per_pass < forced(true).rows_per_pass);
    }

    #[test]
    fn the_advice_names_the_cheapest_saving_that_makes_up_for_what_is_missing() {
        let config = QuasarConfig::preview(20).unwrap();
        let used = Strategy { byte_moments: true, recompute: false, offload: false, rows_per_pass: 8 };
        let advise = |missing_gib: u64, host_gib: u64| advice(&config, work(8), used, missing_gib << 30, host_gib << 30);
        let next = advise(0, 0);
        assert!(next.contains("8-bit moments, recomputation, 8 rows a pass ("), "a text without a number asks for the next saving: {next}");
        // Several passes keep all gradients, so that only the smallest make up for it.
        assert!(advise(1, 0).contains("8-bit moments, recomputation, 1 row a pass ("), "{}", advise(1, 0));
        let far = advise(60, 0);
        assert!(far.contains("optimizer state in the host's memory") && far.contains("allow "), "{far}");
        assert!(!advise(60, 100).contains("allow "));
        assert!(advise(130, 100).starts_with("no way of saving memory is enough"));
    }

    #[test]
    fn every_saving_saves() {
        let config = QuasarConfig::preview(20).unwrap();
        let peak = |byte_moments, recompute, offload, rows_per_pass| {
            memory_of(&config, work(32), Strategy { byte_moments, recompute, offload, rows_per_pass }).peak_bytes
        };
        assert!(peak(true, false, false, 32) < peak(false, false, false, 32));
        assert!(peak(true, true, false, 32) < peak(true, false, false, 32));
        assert!(peak(true, true, false, 16) < peak(true, true, false, 32));
        assert!(peak(true, true, true, 16) < peak(true, true, false, 16));
    }
}
