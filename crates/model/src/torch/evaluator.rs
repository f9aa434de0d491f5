//! Losses without training.

use std::path::Path;

use protocol::FragmentPlan;
use tch::{Device, Tensor};

use super::device::{ComputeType, parse_device, use_threads};
use super::layout::Layout;
use super::moe::Routing;
use super::network::{Network, Trace};
use super::ops;
use crate::checkpoint::Source;
use crate::{Batch, Evaluator, PlanRanges, QuasarConfig, TrainError};

/// Tokens in one forward pass; larger batches are cut into groups of rows, which changes no row's loss beyond rounding.
const TOKENS_PER_PASS: usize = 8192;

/// Where and how an evaluator computes.
#[derive(Clone, Debug)]
pub struct EvaluatorOptions {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Threads of the CPU.
    pub threads: usize,
    pub compute: ComputeType,
}

impl Default for EvaluatorOptions {
    fn default() -> Self {
        Self { device: "cpu".into(), threads: 1, compute: ComputeType::F32 }
    }
}

/// A Quasar model for measuring losses.
pub struct QuasarEvaluator {
    network: Network,
    ranges: Option<PlanRanges>,
    /// All parameters in the order of the layout, in the type of the computation.
    weights: Tensor,
    threads: usize,
}

impl QuasarEvaluator {
    /// Opens a checkpoint whose fragments will be replaced as `plan` cuts them.
    pub fn open(folder: &Path, plan: &FragmentPlan, device: &str, threads: usize) -> Result<Self, TrainError> {
        Self::open_with(folder, Some(plan), &EvaluatorOptions { device: device.to_owned(), threads, ..EvaluatorOptions::default() })
    }

    /// As [`QuasarEvaluator::open`]. Without a plan the evaluator takes no fragments.
    pub fn open_with(folder: &Path, plan: Option<&FragmentPlan>, options: &EvaluatorOptions) -> Result<Self, TrainError> {
        use_threads(options.threads);
        let device = parse_device(&options.device)?;
        let config = QuasarConfig::from_dir(folder)?;
        let layout = Layout::new(&config, false);
        let ranges = plan.map(|plan| PlanRanges::new(plan, layout.elements, |name| layout.places.get(name).copied())).transpose()?;
        let source = Source::open(&config, folder)?;
        let kind = options.compute.kind();
        let weights = Tensor::f_zeros([layout.elements as i64], (kind, device))?;
        source.parameters(|name, values| match layout.range(name) {
            Some(range) => overwrite(&weights, &range, &values),
            None => Ok(()),
        })?;
        let network = Network::new(config, layout, source.buffers()?, device, kind)?;
        Ok(Self { network, ranges, weights, threads: options.threads })
    }

    /// The model's configuration.
    pub fn config(&self) -> &QuasarConfig {
        &self.network.config
    }

    fn parts(&self) -> ops::Result<(Tensor, Tensor)> {
        let (trained, all) = (self.network.layout.trained as i64, self.network.layout.elements as i64);
        Ok((self.weights.f_narrow(0, 0, trained)?, self.weights.f_narrow(0, trained, all - trained)?))
    }

    /// Hidden states and logits of a batch, for comparison with other implementations.
    pub fn trace(&mut self, batch: &Batch) -> Result<Trace, TrainError> {
        batch.check(self.network.config.vocab_size)?;
        use_threads(self.threads);
        let trace = tch::no_grad(|| {
            let (trained, frozen) = self.parts()?;
            let weights = self.network.weights(&trained, &frozen)?;
            let mut hidden = Vec::new();
            let last = self.network.hidden(&weights, &self.network.tokens(batch)?, &mut Routing::default(), Some(&mut hidden))?;
            let logits = ops::to_host(&ops::linear(&last, weights.get("lm_head.weight"))?)?;
            ops::Result::Ok(Trace { hidden: hidden.iter().map(ops::to_host).collect::<ops::Result<_>>()?, logits })
        })?;
        Ok(trace)
    }

    fn pass(&self, batch: &Batch) -> ops::Result<Vec<f64>> {
        tch::no_grad(|| {
            let (trained, frozen) = self.parts()?;
            let weights = self.network.weights(&trained, &frozen)?;
            let tokens = self.network.tokens(batch)?;
            let hidden = self.network.hidden(&weights, &tokens, &mut Routing::default(), None)?;
            let losses = self.network.losses(&weights, &hidden, &tokens)?;
            let means = losses.f_mean_dim([1].as_slice(), false, tch::Kind::Double)?.f_to_device(Device::Cpu)?;
            let mut values = vec![0f64; batch.rows];
            means.f_copy_data(&mut values, batch.rows)?;
            Ok(values)
        })
    }
}

fn overwrite(weights: &Tensor, range: &std::ops::Range<usize>, values: &[f32]) -> Result<(), TrainError> {
    let source = Tensor::f_from_slice(values)?;
    Ok(tch::no_grad(|| weights.f_narrow(0, range.start as i64, range.len() as i64)?.f_copy_(&source))?)
}

impl Evaluator for QuasarEvaluator {
    fn apply(&mut self, fragment: usize, values: &[f32]) -> Result<(), TrainError> {
        let Some(ranges) = &self.ranges else { return Err(TrainError::NoFragment { fragment, fragments: 0 }) };
        let mut rest = values;
        for range in ranges.check(fragment, values)? {
            let (head, tail) = rest.split_at(range.len());
            overwrite(&self.weights, range, head)?;
            rest = tail;
        }
        Ok(())
    }

    fn losses(&mut self, batch: &Batch) -> Result<Vec<f64>, TrainError> {
        batch.check(self.network.config.vocab_size)?;
        use_threads(self.threads);
        let rows = (TOKENS_PER_PASS / batch.row_tokens).max(1);
        let mut losses = Vec::with_capacity(batch.rows);
        for tokens in batch.tokens.chunks(rows * batch.row_tokens) {
            let part = Batch { tokens, rows: tokens.len() / batch.row_tokens, row_tokens: batch.row_tokens };
            losses.extend(self.pass(&part)?);
        }
        if !losses.iter().all(|loss| loss.is_finite()) {
            return Err(TrainError::NotFinite { what: "the loss", step: 0 });
        }
        Ok(losses)
    }
}
