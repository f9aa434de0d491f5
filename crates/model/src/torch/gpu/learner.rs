//! A learner on one GPU: batches in, optimizer steps out.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::engine::{Constants, Pass};
use super::kernels::Kernels;
use super::mixture::{self, Routes};
use super::pinned::PinnedMemory;
use super::store::{Gradients, Store, to_slice};
use crate::host::Held;
use crate::memory::{self, MemoryPlan, Strategy, Work, plan_pass};
use crate::state::Run;
use crate::torch::layout::{Block, Layout};
use crate::torch::learner::{self, Learner, Taken};
use crate::torch::ops;
use crate::torch::pieces::Piece;
use crate::torch::trainer::{MomentType, TrainerOptions};
use crate::{Batch, HostMemory, HostValues, Hyper, Place, QuasarConfig, TrainError};

/// A model in training on one GPU.
pub(crate) struct GpuLearner {
    kernels: Kernels,
    store: Store,
    config: QuasarConfig,
    layout: Layout,
    /// Constants of the checkpoint, and the tables made from them for sequences up to a length.
    buffers: HashMap<String, Vec<f32>>,
    constants: (usize, Constants),
    options: TrainerOptions,
    /// Fragments that the model is cut into.
    fragments: usize,
    /// Shape of the last batch, and how it is passed through.
    shape: Option<((usize, usize), PassShape)>,
    /// Whether optimizer state lies in the host's memory.
    offload: bool,
    /// Bytes of the GPU that there were for state and batches when the learner was opened.
    device_bytes: u64,
    /// How long the host took to put the last step's work in the stream.
    launching: Duration,
}

/// How a batch goes through the network.
#[derive(Clone, Copy)]
struct PassShape {
    recompute: bool,
    rows: usize,
}

/// What one forward and backward pass over a batch gives.
struct Computed {
    gradients: Gradients,
    losses: Tensor,
    scale: f64,
    /// Choices of each group of rows.
    routes: Vec<Vec<Tensor>>,
}

fn work(batch: (usize, usize), fragments: usize, options: &TrainerOptions) -> Work {
    let by_document = options.document_end.is_some();
    Work { rows: batch.0 as u64, row_tokens: batch.1 as u64, fragments: fragments as u64, by_document }
}

/// Bytes of a GPU to plan with. One that nobody else uses has the same at every start, whatever its driver holds just then: so a batch is
/// passed through in the same groups of rows, which decide about the last bits.
fn usable(free: u64, total: u64) -> u64 {
    /// For driver and libraries.
    const HELD_BYTES: u64 = 1 << 30;
    let whole = total.saturating_sub(HELD_BYTES);
    if free >= whole { whole } else { free }
}

/// The strategy by which a learner is opened: optimizer state goes to the host's memory if nothing else fits and it may.
fn planned(config: &QuasarConfig, work: Work, options: &TrainerOptions, device_bytes: u64) -> MemoryPlan {
    let plan = |offload| plan_pass(config, work, options.moments == MomentType::Bytes, offload, options.recompute, device_bytes);
    let must_offload = || plan(false).peak_bytes > device_bytes && plan(true).host_bytes <= options.host_bytes;
    plan(options.offload.unwrap_or_else(must_offload))
}

/// Puts into an error about memory what to do: what would fit the GPU instead of the strategy that was used, or what the host has to give
/// for it.
fn advised(error: TrainError, config: &QuasarConfig, work: Work, used: Strategy, host_bytes: u64) -> TrainError {
    let TrainError::OutOfMemory { place, missing, .. } = error else { return error };
    let advice = match place {
        Place::Gpu => memory::advice(config, work, used, missing, host_bytes),
        Place::Host => memory::host_advice(config, work, used, host_bytes),
    };
    TrainError::OutOfMemory { place, missing, advice }
}

fn device_error(device: Device, reason: String) -> TrainError {
    TrainError::Device { device: format!("{device:?}"), reason }
}

impl GpuLearner {
    /// A learner whose weights are all zero, of a model that is exchanged in so many fragments, if in any.
    ///
    /// # Errors
    /// [`TrainError::Kernels`] if the kernels cannot be compiled or loaded; too little memory.
    pub fn new(
        config: QuasarConfig,
        layout: Layout,
        buffers: HashMap<String, Vec<f32>>,
        device: Device,
        fragments: usize,
        options: &TrainerOptions,
    ) -> Result<Self, TrainError> {
        if let Some(reason) = super::unsupported(&config) {
            return Err(TrainError::Kernels(reason));
        }
        // The first operation makes libtorch take hold of the GPU.
        let _ = Tensor::f_zeros([1], (Kind::Float, device))?;
        let kernels =
            Kernels::new(&config, device, options.kernel_cache.as_deref(), &options.compiler_options).map_err(TrainError::Kernels)?;
        let (free, total) = kernels.gpu.memory().map_err(|reason| device_error(device, reason))?;
        let device_bytes = options.device_bytes.unwrap_or(u64::MAX).min(usable(free as u64, total as u64));
        let work = work(options.batch, fragments, options);
        let plan = planned(&config, work, options, device_bytes);
        let offload = plan.strategy.offload;
        tracing::info!(
            strategy = %plan.strategy,
            gpu_gib = plan.peak_bytes >> 30,
            host_gib = plan.host_bytes >> 30,
            available_gib = device_bytes >> 30,
            "memory plan"
        );
        let store = Store::new(&kernels, &layout, Some(options.moments), offload)
            .map_err(|error| advised(error.into(), &config, work, plan.strategy, options.host_bytes))?;
        let constants = (1, Constants::new(&config, &buffers, 1, device)?);
        Ok(Self {
            kernels,
            store,
            config,
            layout,
            buffers,
            constants,
            options: options.clone(),
            fragments,
            shape: None,
            offload,
            device_bytes,
            launching: Duration::ZERO,
        })
    }

    /// Overwrites all weights with random ones (normal, standard deviation 0.02; vectors as a fresh model has them), for measurements.
    pub fn randomise(&mut self, seed: u64) -> Result<(), TrainError> {
        tch::manual_seed(seed as i64);
        tch::no_grad(|| -> ops::Result<()> {
            let is_drawn = |block: &&Block| block.shape.len() > 1 && !block.key.ends_with("adapter_up.weight");
            for block in self.layout.blocks.iter().filter(is_drawn) {
                let _ = self.store.weight(&block.key)?.shallow_clone().f_normal_(0.0, self.config.initializer_range)?;
            }
            Ok(())
        })?;
        for tensor in self.config.tensors().iter().filter(|tensor| tensor.shape.len() == 1 && !tensor.is_buffer) {
            if let Some(range) = self.layout.range(&tensor.name) {
                self.write(&range, &crate::init::values(&self.config, seed, tensor))?;
            }
        }
        Ok(())
    }

    /// Free and total bytes of the GPU.
    pub fn memory(&self) -> Result<(usize, usize), TrainError> {
        self.kernels.gpu.memory().map_err(|reason| device_error(self.kernels.device, reason))
    }

    /// How long the host took to put the last step's work in the stream: more than the step takes means that the device waits for the host.
    pub fn launching(&self) -> Duration {
        self.launching
    }

    /// Tells a profiler that it should look, or not any more.
    pub fn profile(&self, is_on: bool) -> Result<(), TrainError> {
        self.kernels.gpu.profile(is_on).map_err(|reason| device_error(self.kernels.device, reason))
    }

    /// Waits for everything under way.
    pub fn synchronize(&self) -> Result<(), TrainError> {
        self.kernels.gpu.synchronize().map_err(|reason| device_error(self.kernels.device, reason))
    }

    /// How a batch is passed through: as the options say, otherwise as memory allows.
    fn pass_shape(&mut self, batch: &Batch) -> PassShape {
        let of = (batch.rows, batch.row_tokens);
        if let Some((last, shape)) = self.shape
            && last == of
        {
            return shape;
        }
        let byte_moments = self.options.moments == MomentType::Bytes;
        let work = work(of, self.fragments, &self.options);
        let plan = plan_pass(&self.config, work, byte_moments, self.offload, self.options.recompute, self.device_bytes).strategy;
        let rows = self.options.pass_tokens.map_or(plan.rows_per_pass as usize, |tokens| tokens / batch.row_tokens);
        // Kernels have a line of blocks for each head of each row, and a grid so many lines.
        const LINES_MAX: usize = 65_535;
        let most = batch.rows.min(LINES_MAX / self.config.num_attention_heads);
        let shape = PassShape { recompute: plan.recompute, rows: rows.min(most).max(1) };
        tracing::info!(recompute = shape.recompute, rows_per_pass = shape.rows, rows = batch.rows, "memory plan of a batch");
        self.shape = Some((of, shape));
        shape
    }

    /// What to do if memory ran out with a batch, by its rows and their tokens.
    fn advised(&self, error: TrainError, batch: (usize, usize)) -> TrainError {
        let used = self.used(self.shape.map_or(PassShape { recompute: false, rows: batch.0 }, |(_, shape)| shape));
        advised(error, &self.config, work(batch, self.fragments, &self.options), used, self.options.host_bytes)
    }

    fn used(&self, PassShape { recompute, rows }: PassShape) -> Strategy {
        let byte_moments = self.options.moments == MomentType::Bytes;
        Strategy { byte_moments, recompute, offload: self.offload, rows_per_pass: rows as u64 }
    }

    /// What to do if memory ran out between two steps.
    fn advised_between(&self, error: impl Into<TrainError>) -> TrainError {
        self.advised(error.into(), self.shape.map_or(self.options.batch, |(batch, _)| batch))
    }

    /// Tables for rows of `row_tokens` tokens.
    fn prepare(&mut self, row_tokens: usize) -> ops::Result<()> {
        if self.constants.0 < row_tokens {
            self.constants = (row_tokens, Constants::new(&self.config, &self.buffers, row_tokens, self.kernels.device)?);
        }
        Ok(())
    }

    /// A pass over part of a batch.
    fn pass(&self, part: &Batch) -> Pass<'_> {
        Pass {
            kernels: &self.kernels,
            store: &self.store,
            config: &self.config,
            constants: &self.constants.1,
            rows: part.rows as i64,
            row_tokens: part.row_tokens as i64,
            cap_experts: self.options.cap_experts,
        }
    }

    /// Forward and backward pass. All that the device needs is copied to it before its first kernel is launched: a copy in between would
    /// wait for them.
    fn compute(&mut self, batch: &Batch, forced: Option<&crate::Routes>) -> ops::Result<Computed> {
        self.prepare(batch.row_tokens)?;
        let PassShape { recompute, rows: group } = self.pass_shape(batch);
        let pieces = batch.pieces(group, self.options.document_end);
        let scale = 1.0 / pieces.iter().map(Piece::predicted).sum::<usize>() as f64;
        let ids = self.ids(batch)?;
        // The token behind each, except behind the last of a sequence.
        let mut targets: Vec<i32> = batch.tokens.iter().skip(1).map(|token| *token as i32).chain([-1]).collect();
        for piece in &pieces {
            let ends = piece.range.clone().step_by(piece.row_tokens).map(|start| start + piece.row_tokens - 1);
            ends.for_each(|end| targets[end] = -1);
        }
        let targets = Tensor::f_from_slice(&targets)?.f_to_device(self.kernels.device)?;
        let forced = forced.map(|routes| self.forced(routes, batch.tokens.len())).transpose()?;
        let mut gradients = self.store.gradients()?;
        let (mut losses, mut routes) = (Vec::new(), Vec::new());
        for piece in &pieces {
            let of = |x: &Tensor| x.f_narrow(0, piece.range.start as i64, piece.range.len() as i64);
            let forced = forced.as_ref().map(|layers| layers.iter().map(of).collect::<ops::Result<Vec<_>>>()).transpose()?;
            let mut chosen = Routes { forced, used: Vec::new() };
            let pass = self.pass(&piece.of(batch));
            losses.push(pass.run(&of(&ids)?, &of(&targets)?, scale, recompute, &mut chosen, &mut gradients)?);
            routes.push(chosen.used);
        }
        Ok(Computed { gradients, losses: Tensor::f_cat(&losses, 0)?, scale, routes })
    }

    fn ids(&self, batch: &Batch) -> ops::Result<Tensor> {
        let ids: Vec<i64> = batch.tokens.iter().map(|token| i64::from(*token)).collect();
        Tensor::f_from_slice(&ids)?.f_to_device(self.kernels.device)
    }

    /// Forced choices on the device, layer by layer.
    fn forced(&self, forced: &crate::Routes, tokens: usize) -> ops::Result<Vec<Tensor>> {
        let choices = self.config.num_experts_per_tok;
        let layers = forced.0.chunks(tokens * choices).map(|layer| {
            let experts: Vec<i32> = layer.iter().map(|expert| i32::from(*expert)).collect();
            Tensor::f_from_slice(&experts)?.f_reshape([-1, choices as i64])?.f_to_device(self.kernels.device)
        });
        layers.collect()
    }

    /// Choices of all pieces in the order of a record: layer, token, choice.
    fn record(&self, pieces: &[Vec<Tensor>]) -> ops::Result<crate::Routes> {
        let parts = pieces.iter().map(|used| Ok(crate::Routes(mixture::to_numbers(used)?)));
        Ok(crate::Routes::join(&self.config, &parts.collect::<ops::Result<Vec<_>>>()?))
    }
}

impl Learner for GpuLearner {
    fn config(&self) -> &QuasarConfig {
        &self.config
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn strategy(&self) -> Option<Strategy> {
        self.shape.map(|(_, shape)| self.used(shape))
    }

    fn take_step(
        &mut self,
        batch: &Batch,
        hyper: &Hyper,
        forced: Option<&crate::Routes>,
        record: bool,
        step: u64,
    ) -> Result<Taken, TrainError> {
        let begun = Instant::now();
        let taken = tch::no_grad(|| -> ops::Result<_> {
            let Computed { gradients, losses, scale, routes } = self.compute(batch, forced)?;
            let verdict = self.store.step(&self.kernels, gradients, &losses, scale, hyper, step)?;
            self.launching = begun.elapsed();
            // The only place where the host waits for the device.
            let mut values = [0f64; 4];
            verdict.f_to_device(Device::Cpu)?.f_copy_data(&mut values, 4)?;
            let routes = if record { Some(self.record(&routes)?) } else { None };
            Ok((values, routes))
        });
        let ([loss, grad_norm, _, was_taken], routes) =
            taken.map_err(|error| self.advised(error.into(), (batch.rows, batch.row_tokens)))?;
        if was_taken == 0.0 {
            let what = if loss.is_finite() { "the gradient" } else { "the loss" };
            return Err(TrainError::NotFinite { what, step });
        }
        Ok(Taken { loss, grad_norm, routes })
    }

    fn loss_and_gradient(&mut self, batch: &Batch, forced: Option<&crate::Routes>) -> Result<(f64, Vec<f32>), TrainError> {
        let computed = tch::no_grad(|| -> ops::Result<_> {
            let computed = self.compute(batch, forced)?;
            let loss = computed.losses.f_sum(Kind::Double)?.f_double_value(&[])? * computed.scale;
            let mut flat = vec![0f32; self.layout.trained];
            let mut at = 0;
            for block in self.layout.blocks.iter().filter(|block| block.trained) {
                let elements = block.elements() as usize;
                let to = &mut flat[at..at + elements];
                match computed.gradients.matrices.get(&block.key) {
                    Some(gradient) => to_slice(&gradient.f_reshape([-1])?.f_to_kind(Kind::Float)?, to)?,
                    None => to_slice(&computed.gradients.of_vector(&block.key)?, to)?,
                }
                at += elements;
            }
            Ok((loss, flat))
        });
        computed.map_err(|error| self.advised(error.into(), (batch.rows, batch.row_tokens)))
    }

    fn hidden(&mut self, batch: &Batch, forced: Option<&crate::Routes>) -> Result<Vec<Vec<f32>>, TrainError> {
        let states = tch::no_grad(|| -> ops::Result<_> {
            self.prepare(batch.row_tokens)?;
            let forced = forced.map(|routes| self.forced(routes, batch.tokens.len())).transpose()?;
            let states = self.pass(batch).trace(&self.ids(batch)?, &mut Routes { forced, used: Vec::new() })?;
            states.iter().map(ops::to_host).collect()
        });
        states.map_err(|error| self.advised(error.into(), (batch.rows, batch.row_tokens)))
    }

    fn read(&self, ranges: &[Range<usize>]) -> Result<Vec<f32>, TrainError> {
        let mut values = Vec::with_capacity(ranges.iter().map(Range::len).sum());
        for group in learner::groups(&learner::cut(ranges)) {
            values.extend_from_slice(self.store.read(&self.kernels, group)?.values()?);
        }
        Ok(values)
    }

    fn hold(&self, ranges: &[Range<usize>]) -> Result<HostValues, TrainError> {
        Ok(HostValues::new(self.store.read(&self.kernels, ranges)?))
    }

    fn write(&mut self, range: &Range<usize>, values: &[f32]) -> Result<(), TrainError> {
        Ok(self.store.write(&self.kernels, range, values)?)
    }

    fn contribute(&mut self, ranges: &[Range<usize>]) -> Result<HostValues, TrainError> {
        self.store
            .contribute(&self.kernels, ranges)
            .map(HostValues::new)
            .map_err(|reason| self.advised_between(tch::TchError::Torch(reason)))
    }

    fn carry(&mut self, ranges: &[Range<usize>], version: &HostValues, exported: Option<&HostValues>) -> Result<(), TrainError> {
        let memory = PinnedMemory::of(&self.kernels);
        let reach = |values: &HostValues| memory.reach(values).map_err(|error| self.advised_between(error));
        let (version, exported) = (reach(version)?, exported.map(reach).transpose()?);
        let (version, exported) = (version.held().expect("pinned"), exported.as_ref().and_then(HostValues::held));
        self.store.carry(&self.kernels, ranges, version, exported).map_err(|reason| self.advised_between(tch::TchError::Torch(reason)))
    }

    fn host_memory(&self) -> Box<dyn HostMemory> {
        Box::new(PinnedMemory::of(&self.kernels))
    }

    fn moments(&self) -> Result<(Vec<f32>, Vec<f32>), TrainError> {
        Ok(self.store.read_moments(&self.kernels, self.layout.elements)?)
    }

    fn moments_of(&self, ranges: &[Range<usize>]) -> Result<Vec<Run>, TrainError> {
        Ok(self.store.moments_of(&self.kernels, ranges)?)
    }

    fn put_moments(&mut self, range: &Range<usize>, run: &Run) -> Result<bool, TrainError> {
        Ok(self.store.put_moments(&self.kernels, range, run)?)
    }

    fn set_moments(&mut self, first: &[f32], second: &[f32]) -> Result<(), TrainError> {
        Ok(self.store.write_moments(&self.kernels, first, second)?)
    }
}
