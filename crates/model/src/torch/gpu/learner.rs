//! A learner on one GPU: batches in, optimizer steps out.

use std::collections::HashMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::engine::{Constants, Pass};
use super::kernels::Kernels;
use super::mixture::{self, Routes};
use super::store::{Gradients, Store, to_slice};
use crate::memory::{Strategy, memory_of, plan_pass};
use crate::torch::context;
use crate::torch::layout::Layout;
use crate::torch::learner::{Learner, Taken};
use crate::torch::ops;
use crate::torch::trainer::{MomentType, TrainerOptions};
use crate::train::Piece;
use crate::{Batch, Hyper, QuasarConfig, TrainError};

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
    /// Shape of the last batch, and how it is passed through.
    shape: Option<((usize, usize), PassShape)>,
    /// Free bytes of the GPU before the first batch.
    free_at_first: Option<usize>,
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

fn device_error(device: Device, reason: String) -> TrainError {
    TrainError::Device { device: format!("{device:?}"), reason }
}

impl GpuLearner {
    /// A learner whose weights are all zero.
    ///
    /// # Errors
    /// The model does not fit the kernels, or they cannot be compiled or loaded.
    pub fn new(
        config: QuasarConfig,
        layout: Layout,
        buffers: HashMap<String, Vec<f32>>,
        device: Device,
        options: &TrainerOptions,
    ) -> Result<Self, TrainError> {
        if let Some(reason) = super::unsupported(&config) {
            return Err(device_error(device, reason));
        }
        // The first operation makes libtorch take hold of the GPU.
        let _ = Tensor::f_zeros([1], (Kind::Float, device))?;
        context::choose_reproducible_attention();
        let kernels = Kernels::new(&config, device, options.kernel_cache.as_deref()).map_err(|reason| device_error(device, reason))?;
        let store = Store::new(&kernels, &layout, Some(options.moments), options.offload)?;
        let constants = (1, Constants::new(&config, &buffers, 1, device)?);
        Ok(Self { kernels, store, config, layout, buffers, constants, options: options.clone(), shape: None, free_at_first: None })
    }

    /// Overwrites all weights with random ones (normal, standard deviation 0.02; vectors as a fresh model has them), for measurements.
    pub fn randomise(&mut self, seed: u64) -> Result<(), TrainError> {
        tch::manual_seed(seed as i64);
        tch::no_grad(|| -> ops::Result<()> {
            for (key, view) in self.store.views() {
                if view.dim() > 1 && !key.ends_with("adapter_up.weight") {
                    let _ = view.shallow_clone().f_normal_(0.0, self.config.initializer_range)?;
                }
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

    /// Waits for everything under way.
    pub fn synchronize(&self) -> Result<(), TrainError> {
        self.kernels.gpu.synchronize().map_err(|reason| device_error(self.kernels.device, reason))
    }

    /// How a batch is passed through: as the options say, otherwise as memory allows.
    fn pass_shape(&mut self, batch: &Batch) -> ops::Result<PassShape> {
        let of = (batch.rows, batch.row_tokens);
        if let Some((last, shape)) = self.shape
            && last == of
        {
            return Ok(shape);
        }
        let (byte_moments, offload) = (self.options.moments == MomentType::Bytes, self.options.offload);
        let (rows, row_tokens) = (batch.rows as u64, batch.row_tokens as u64);
        let (free, _) = self.kernels.gpu.memory().map_err(tch::TchError::Torch)?;
        // What is free at the first batch, and what the learner held before it; later batches reuse what earlier ones left with the allocator.
        let free = *self.free_at_first.get_or_insert(free);
        let held = memory_of(&self.config, row_tokens, Strategy { byte_moments, recompute: true, offload, rows_per_pass: 1 }).state_bytes;
        let bytes = free as u64 + held;
        let plan = plan_pass(&self.config, rows, row_tokens, byte_moments, offload, bytes);
        let pass_rows = self.options.pass_tokens.map_or(plan.strategy.rows_per_pass as usize, |tokens| tokens / batch.row_tokens);
        let shape =
            PassShape { recompute: self.options.recompute.unwrap_or(plan.strategy.recompute), rows: pass_rows.clamp(1, batch.rows) };
        tracing::info!(
            recompute = shape.recompute,
            rows_per_pass = shape.rows,
            estimated_gib = plan.peak_bytes >> 30,
            available_gib = bytes >> 30,
            "memory plan"
        );
        self.shape = Some((of, shape));
        Ok(shape)
    }

    fn compute(&mut self, batch: &Batch, forced: Option<&crate::Routes>) -> ops::Result<Computed> {
        let device = self.kernels.device;
        if self.constants.0 < batch.row_tokens {
            self.constants = (batch.row_tokens, Constants::new(&self.config, &self.buffers, batch.row_tokens, device)?);
        }
        let PassShape { recompute, rows: group } = self.pass_shape(batch)?;
        let pieces = batch.pieces(group, self.options.document_start);
        let scale = 1.0 / pieces.iter().map(Piece::predicted).sum::<usize>() as f64;
        let mut gradients = self.store.gradients()?;
        let (mut losses, mut routes) = (Vec::new(), Vec::new());
        for piece in &pieces {
            let part = piece.of(batch);
            let ids: Vec<i64> = part.tokens.iter().map(|token| i64::from(*token)).collect();
            let mut targets: Vec<i32> = part.tokens[1..].iter().map(|token| *token as i32).collect();
            targets.push(-1);
            targets.iter_mut().skip(part.row_tokens - 1).step_by(part.row_tokens).for_each(|target| *target = -1);
            let ids = Tensor::f_from_slice(&ids)?.f_to_device(device)?;
            let targets = Tensor::f_from_slice(&targets)?.f_to_device(device)?;
            let forced = forced.map(|routes| self.forced(&routes.part(&self.config, batch.tokens.len(), &piece.range), part.tokens.len()));
            let mut chosen = Routes { forced: forced.transpose()?, used: Vec::new() };
            let pass = Pass {
                kernels: &self.kernels,
                store: &self.store,
                config: &self.config,
                constants: &self.constants.1,
                rows: part.rows as i64,
                row_tokens: part.row_tokens as i64,
                cap_experts: self.options.cap_experts,
            };
            losses.push(pass.run(&ids, &targets, scale, recompute, &mut chosen, &mut gradients)?);
            routes.push(chosen.used);
        }
        Ok(Computed { gradients, losses: Tensor::f_cat(&losses, 0)?, scale, routes })
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

    fn take_step(
        &mut self,
        batch: &Batch,
        hyper: &Hyper,
        forced: Option<&crate::Routes>,
        record: bool,
        step: u64,
    ) -> Result<Taken, TrainError> {
        let taken = tch::no_grad(|| -> ops::Result<_> {
            let Computed { gradients, losses, scale, routes } = self.compute(batch, forced)?;
            let verdict = self.store.step(&self.kernels, gradients, &losses, scale, hyper, step)?;
            // The only place where the host waits for the device.
            let mut values = [0f64; 4];
            verdict.f_to_device(Device::Cpu)?.f_copy_data(&mut values, 4)?;
            let routes = if record { Some(self.record(&routes)?) } else { None };
            Ok((values, routes))
        });
        let ([loss, grad_norm, _, was_taken], routes) = taken?;
        if was_taken == 0.0 {
            let what = if loss.is_finite() { "the gradient" } else { "the loss" };
            return Err(TrainError::NotFinite { what, step });
        }
        Ok(Taken { loss, grad_norm, routes })
    }

    fn loss_and_gradient(&mut self, batch: &Batch, forced: Option<&crate::Routes>) -> Result<(f64, Vec<f32>), TrainError> {
        Ok(tch::no_grad(|| -> ops::Result<_> {
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
        })?)
    }

    fn read(&self, range: &Range<usize>) -> Result<Vec<f32>, TrainError> {
        Ok(self.store.read(&self.kernels, range)?)
    }

    fn write(&mut self, range: &Range<usize>, values: &[f32]) -> Result<(), TrainError> {
        Ok(self.store.write(&self.kernels, range, values)?)
    }

    fn moments(&self) -> Result<(Vec<f32>, Vec<f32>), TrainError> {
        Ok(self.store.read_moments(&self.kernels, self.layout.elements)?)
    }

    fn set_moments(&mut self, first: &[f32], second: &[f32]) -> Result<(), TrainError> {
        Ok(self.store.write_moments(&self.kernels, first, second)?)
    }
}
