//! The trainer: a learner on some device behind a fragment plan.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use protocol::{Digest, FragmentPlan};
use tch::Device;

use super::device::{ComputeType, parse_device, use_threads};
use super::flat::FlatLearner;
use super::gpu::{self, GpuLearner};
use super::layout::Layout;
use super::learner::{self, Learner};
use crate::checkpoint::Source;
use crate::exported::Exported;
use crate::memory::{self, Strategy};
use crate::state::{Run, StateReader, StateWriter};
use crate::{
    Batch, HostMemory, HostValues, Hyper, Place, PlanRanges, QuasarConfig, Routes, StepReport, TensorEntry, TrainError, Trainer,
    TrainerState,
};

/// How optimizer moments are kept on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MomentType {
    /// 8 bits each, in blocks of 256 with a scale.
    #[default]
    Bytes,
    F32,
}

/// Where and how a learner computes.
#[derive(Clone, Debug)]
pub struct TrainerOptions {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Threads of the CPU.
    pub threads: usize,
    /// `None`: bf16 with own kernels on a GPU if the model fits them, otherwise f32.
    pub compute: Option<ComputeType>,
    /// Whether `A_log` and `dt_bias` of Quasar branches are trained. Off in the reference.
    pub train_step_sizes: bool,
    /// Whether experts drop tokens beyond [`QuasarConfig::expert_capacity`] in each pass, as the reference does in training mode; the shares
    /// of the others are not scaled up. Off: no token is ever dropped.
    pub cap_experts: bool,
    /// The token that ends a document: rows are cut behind it, and positions, recurrent states and attention begin anew. Off: a row is one
    /// sequence.
    pub document_end: Option<u32>,
    /// Whether a GPU may use this crate's own kernels; otherwise it computes through libtorch's operations.
    pub own_kernels: bool,
    /// Folder in which compiled kernels are kept from start to start.
    pub kernel_cache: Option<PathBuf>,
    /// Further options for the kernels' compiler (NVRTC).
    pub compiler_options: Vec<String>,
    /// With own kernels; through libtorch's operations moments are f32.
    pub moments: MomentType,
    /// Keep the lower halves of the weights and the moments in pinned memory of the host (own kernels). `None`: if the GPU cannot hold
    /// them.
    pub offload: Option<bool>,
    /// Bytes of the host's memory that may be pinned for that, fragments on their way included.
    pub host_bytes: u64,
    /// Bytes of the GPU to plan for. `None`: what is free.
    pub device_bytes: Option<u64>,
    /// Rows of a batch and tokens of a row that memory is planned for until a batch is seen.
    pub batch: (usize, usize),
    /// Keep only the input of each layer for the backward pass and compute the layer again (own kernels). `None`: if memory demands it.
    pub recompute: Option<bool>,
    /// Most tokens in one forward and backward pass (own kernels); larger batches are cut into groups of rows whose gradients are added.
    /// `None`: as many as memory allows.
    pub pass_tokens: Option<usize>,
}

impl Default for TrainerOptions {
    fn default() -> Self {
        Self {
            device: "cpu".into(),
            threads: 1,
            compute: None,
            train_step_sizes: false,
            cap_experts: false,
            document_end: None,
            own_kernels: true,
            kernel_cache: None,
            compiler_options: Vec::new(),
            moments: MomentType::default(),
            offload: None,
            host_bytes: 0,
            device_bytes: None,
            batch: (1, 2048),
            recompute: None,
            pass_tokens: None,
        }
    }
}

/// A Quasar model in training on one device.
pub struct QuasarTrainer {
    learner: Box<dyn Learner>,
    plan: FragmentPlan,
    ranges: PlanRanges,
    exported: Exported,
    step: u64,
    threads: usize,
    fallback: Option<String>,
}

impl QuasarTrainer {
    /// Opens a checkpoint, with zero optimizer moments.
    pub fn open(folder: &Path, plan: FragmentPlan, device: &str, threads: usize) -> Result<Self, TrainError> {
        Self::open_with(folder, plan, &TrainerOptions { device: device.to_owned(), threads, ..TrainerOptions::default() })
    }

    /// As [`QuasarTrainer::open`], with all options.
    pub fn open_with(folder: &Path, plan: FragmentPlan, options: &TrainerOptions) -> Result<Self, TrainError> {
        use_threads(options.threads);
        let device = parse_device(&options.device)?;
        let config = QuasarConfig::from_dir(folder)?;
        let layout = Layout::new(&config, options.train_step_sizes);
        let ranges = PlanRanges::new(&plan, layout.elements, |name| layout.places.get(name).copied())?;
        let source = Source::open(&config, folder)?;
        let (mut learner, fallback) = learner(config, layout, source.buffers()?, device, ranges.fragments(), options)?;
        source.parameters(|name, values| match learner.layout().range(name) {
            Some(range) => learner.write(&range, &values),
            None => Ok(()),
        })?;
        Ok(Self { learner, plan, ranges, exported: Exported::default(), step: 0, threads: options.threads, fallback })
    }

    /// Why a GPU computes through libtorch's operations although own kernels were wanted and fit the model: they could not be compiled or
    /// loaded.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// How a GPU with own kernels saved memory with the last batch.
    pub fn strategy(&self) -> Option<Strategy> {
        self.learner.strategy()
    }

    /// The model's configuration.
    pub fn config(&self) -> &QuasarConfig {
        self.learner.config()
    }

    /// The loss of a batch and its gradient by tensor name, frozen tensors left out. For audits and tests; nothing changes.
    pub fn loss_and_gradients(&mut self, batch: &Batch, forced: Option<&Routes>) -> Result<(f64, BTreeMap<String, Vec<f32>>), TrainError> {
        self.check(batch, forced)?;
        let (loss, gradient) = self.learner.loss_and_gradient(batch, forced)?;
        let layout = self.learner.layout();
        let trained = layout.blocks.iter().filter(|block| block.trained).flat_map(|block| &block.members);
        let part = |name: &String| layout.range(name).map(|range| (name.clone(), gradient[range].to_vec()));
        Ok((loss, trained.filter_map(part).collect()))
    }

    /// The input of each layer and the output of the final norm, `[tokens * hidden_size]` each, for comparison with other forms. A row is one
    /// sequence here, whatever the options say.
    pub fn hidden_states(&mut self, batch: &Batch, forced: Option<&Routes>) -> Result<Vec<Vec<f32>>, TrainError> {
        self.check(batch, forced)?;
        self.learner.hidden(batch, forced)
    }

    /// All parameters in (fragment, slice) order, as ranges of the layout of at most [`RUN_MAX`] elements.
    fn pieces(&self) -> Vec<Range<usize>> {
        let ranges = (0..self.ranges.fragments()).filter_map(|fragment| self.ranges.of(fragment).ok()).flatten();
        learner::cut(ranges)
    }

    fn check(&self, batch: &Batch, forced: Option<&Routes>) -> Result<(), TrainError> {
        batch.check(self.config().vocab_size)?;
        forced.map_or(Ok(()), |routes| routes.check(self.config(), batch.tokens.len()))
    }
}

/// The learner for a device: own kernels on a GPU where they can be had, libtorch's operations otherwise; and why not, if they should be
/// had.
fn learner(
    config: QuasarConfig,
    layout: Layout,
    buffers: HashMap<String, Vec<f32>>,
    device: Device,
    fragments: usize,
    options: &TrainerOptions,
) -> Result<(Box<dyn Learner>, Option<String>), TrainError> {
    let wants_kernels = device.is_cuda() && options.own_kernels && options.compute != Some(ComputeType::F32);
    let (mut fallback, mut misfit) = (None, None);
    if wants_kernels {
        misfit = if options.train_step_sizes { Some("step sizes are trained".to_owned()) } else { gpu::unsupported(&config) };
        match &misfit {
            Some(reason) => tracing::info!(%reason, "this model trains through libtorch's operations"),
            None => match GpuLearner::new(config.clone(), layout.clone(), buffers.clone(), device, fragments, options) {
                Ok(learner) => return Ok((Box::new(learner), None)),
                Err(TrainError::Kernels(reason)) => {
                    tracing::warn!(%reason, "own kernels cannot be used; training through libtorch's operations, which is slower");
                    fallback = Some(reason);
                }
                Err(error) => return Err(error),
            },
        }
    }
    let reason = fallback.as_deref().or(misfit.as_deref());
    if let Device::Cuda(index) = device {
        // Of the whole GPU: what libtorch holds for later counts as taken, but is there for it.
        let there = gpu::total_bytes(index).unwrap_or(u64::MAX).min(options.device_bytes.unwrap_or(u64::MAX));
        too_large(&config, there, reason)?;
    }
    let (kind, least) = (options.compute.unwrap_or_default().kind(), memory::least_through_libtorch(&config));
    let learner = FlatLearner::new(config, layout, buffers, device, kind, options).map_err(|error| match error {
        TrainError::OutOfMemory { place: Place::Gpu, missing, .. } => without_kernels(least, missing, reason),
        error => error,
    })?;
    Ok((Box::new(learner), fallback))
}

/// Refuses a model that libtorch's operations cannot train in so many bytes of a GPU. They take several times as much as own kernels, which
/// cannot be used for `reason`.
fn too_large(config: &QuasarConfig, bytes: u64, reason: Option<&str>) -> Result<(), TrainError> {
    let least = memory::least_through_libtorch(config);
    if least > bytes { Err(without_kernels(least, least - bytes, reason)) } else { Ok(()) }
}

fn without_kernels(least: u64, missing: u64, reason: Option<&str>) -> TrainError {
    const GIB: f64 = (1u64 << 30) as f64;
    let least = least as f64 / GIB;
    let mut advice = format!("through libtorch's operations this model takes at least {least:.1} GiB of the GPU");
    // Of a compiler's log the first line.
    if let Some(reason) = reason.and_then(|reason| reason.lines().next()) {
        advice += &format!("; own kernels, which take less, cannot be used: {reason}");
    }
    TrainError::OutOfMemory { place: Place::Gpu, missing, advice }
}

/// A learner of a fresh model that is on no disk.
pub(crate) fn fresh(config: QuasarConfig, options: &TrainerOptions, seed: u64) -> Result<(Box<dyn Learner>, Option<String>), TrainError> {
    let device = parse_device(&options.device)?;
    let layout = Layout::new(&config, options.train_step_sizes);
    let tensors = config.tensors();
    let values = |tensor: &TensorEntry| crate::init::values(&config, seed, tensor);
    let buffers = tensors.iter().filter(|tensor| tensor.is_buffer).map(|tensor| (tensor.name.clone(), values(tensor))).collect();
    let (mut learner, fallback) = learner(config.clone(), layout, buffers, device, 0, options)?;
    for tensor in tensors.iter().filter(|tensor| !tensor.is_buffer) {
        if let Some(range) = learner.layout().range(&tensor.name) {
            learner.write(&range, &values(tensor))?;
        }
    }
    Ok((learner, fallback))
}

impl Trainer for QuasarTrainer {
    fn plan(&self) -> &FragmentPlan {
        &self.plan
    }

    fn step(&mut self, batch: &Batch, hyper: &Hyper, forced: Option<&Routes>, record: bool) -> Result<StepReport, TrainError> {
        hyper.check()?;
        self.check(batch, forced)?;
        use_threads(self.threads);
        let taken = self.learner.take_step(batch, hyper, forced, record, self.step + 1)?;
        self.step += 1;
        Ok(StepReport { loss: taken.loss, grad_norm: taken.grad_norm, tokens: batch.tokens.len() as u64, routes: taken.routes })
    }

    fn export(&self, fragment: usize) -> Result<Vec<f32>, TrainError> {
        self.learner.read(self.ranges.of(fragment)?)
    }

    fn contribute(&mut self, fragment: usize) -> Result<HostValues, TrainError> {
        let values = self.learner.contribute(self.ranges.of(fragment)?)?;
        self.exported.put(fragment, values.clone());
        Ok(values)
    }

    fn apply(&mut self, fragment: usize, values: &[f32]) -> Result<(), TrainError> {
        self.receive(fragment, &HostValues::from(values.to_vec()))
    }

    fn receive(&mut self, fragment: usize, values: &HostValues) -> Result<(), TrainError> {
        self.learner.carry(self.ranges.check(fragment, values.values()?)?, values, self.exported.get(fragment))?;
        self.exported.forget(fragment);
        Ok(())
    }

    fn host_memory(&self) -> Box<dyn HostMemory> {
        self.learner.host_memory()
    }

    fn steps(&self) -> u64 {
        self.step
    }

    fn state(&self) -> Result<TrainerState, TrainError> {
        let (first, second) = self.learner.moments()?;
        let weights = self.learner.read(std::slice::from_ref(&(0..self.ranges.elements())))?;
        let ordered = |values: Vec<f32>| self.ranges.to_plan_order(&values);
        let (weights, first, second) = (ordered(weights), ordered(first), ordered(second));
        Ok(TrainerState { step: self.step, weights, first, second, exported: self.exported.to_state()? })
    }

    fn restore(&mut self, state: &TrainerState) -> Result<(), TrainError> {
        state.check(self.ranges.elements())?;
        self.ranges.check_exported(state)?;
        self.learner.write(&(0..self.ranges.elements()), &self.ranges.from_plan_order(&state.weights))?;
        self.learner.set_moments(&self.ranges.from_plan_order(&state.first), &self.ranges.from_plan_order(&state.second))?;
        (self.step, self.exported) = (state.step, Exported::from_state(&state.exported));
        Ok(())
    }

    fn save(&self, to: &mut dyn Write) -> Result<Digest, TrainError> {
        let mut writer = StateWriter::new(to, self.step, self.ranges.elements())?;
        let pieces = self.pieces();
        let groups = learner::groups(&pieces);
        for group in &groups {
            writer.weights(self.learner.hold(group)?.values()?)?;
        }
        for group in &groups {
            for run in self.learner.moments_of(group)? {
                writer.run(&run)?;
            }
        }
        let exported = self.exported.values()?;
        Ok(writer.finish(&exported)?)
    }

    fn load(&mut self, from: &mut dyn Read) -> Result<(), TrainError> {
        let mut reader = StateReader::new(from, self.ranges.elements())?;
        let pieces = self.pieces();
        for piece in &pieces {
            self.learner.write(piece, &reader.weights(piece.len())?)?;
        }
        // Moments that are kept otherwise here go through f32, all at once.
        let mut dense: Option<(Vec<f32>, Vec<f32>)> = None;
        let mut left: Option<Run> = None;
        for piece in &pieces {
            let mut at = piece.start;
            while at < piece.end {
                let Some(run) = left.take().map_or_else(|| reader.run(), |run| Ok(Some(run)))? else { break };
                let (run, rest) = if run.len() > piece.end - at { run.split(piece.end - at) } else { (run, Run::Zero(0)) };
                left = (rest.len() > 0).then_some(rest);
                let part = at..at + run.len();
                if dense.is_none() && !self.learner.put_moments(&part, &run)? {
                    dense = Some(self.learner.moments()?);
                }
                if let Some((first, second)) = &mut dense {
                    let (one, two) = run.decode();
                    first[part.clone()].copy_from_slice(&one);
                    second[part.clone()].copy_from_slice(&two);
                }
                at = part.end;
            }
        }
        if let Some((first, second)) = dense {
            self.learner.set_moments(&first, &second)?;
        }
        self.step = reader.step;
        self.exported = Exported::default();
        reader.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_libtorch_cannot_hold_is_refused_with_the_reason_why_own_kernels_are_not_used() {
        let reason = "slots.cu: error: no such type\nand a long log";
        let released = QuasarConfig::released().unwrap();
        let error = too_large(&released, 80 << 30, Some(reason)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("slots.cu: error: no such type") && !text.contains("a long log"), "{text}");
        let TrainError::OutOfMemory { place: Place::Gpu, missing, advice } = error else { panic!("{text}") };
        assert_eq!(missing + (80 << 30), 20 * released.parameter_count() + (1 << 30));
        assert!(advice.contains("at least 309.3 GiB"), "{advice}");
        assert!(!too_large(&released, 80 << 30, None).unwrap_err().to_string().contains("own kernels"));
        too_large(&QuasarConfig::preview(2).unwrap(), 80 << 30, Some(reason)).unwrap();
    }
}
