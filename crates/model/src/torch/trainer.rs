//! The learner: forward, backward and AdamW over one flat buffer of f32 master weights.

use std::collections::BTreeMap;
use std::path::Path;

use protocol::FragmentPlan;
use tch::{Device, Kind, Tensor};

use super::device::{ComputeType, parse_device, use_threads};
use super::layout::Layout;
use super::moe::Routing;
use super::network::Network;
use super::{checkpoint, ops};
use crate::adamw::{self, Buffers};
use crate::{Batch, Hyper, PlanRanges, QuasarConfig, Routes, StepReport, TrainError, Trainer, TrainerState};

/// Where and how a learner computes.
#[derive(Clone, Debug)]
pub struct TrainerOptions {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Threads of the CPU.
    pub threads: usize,
    pub compute: ComputeType,
    /// Whether `A_log` and `dt_bias` of Quasar branches are trained. Off in the reference.
    pub train_step_sizes: bool,
}

impl Default for TrainerOptions {
    fn default() -> Self {
        Self { device: "cpu".into(), threads: 1, compute: ComputeType::F32, train_step_sizes: false }
    }
}

/// A Quasar model in training on one device.
pub struct QuasarTrainer {
    network: Network,
    plan: FragmentPlan,
    ranges: PlanRanges,
    step: u64,
    /// All parameters, f32, in the order of the layout; `leaf` is its trained part, sharing memory.
    weights: Tensor,
    leaf: Tensor,
    first: Tensor,
    second: Tensor,
    threads: usize,
}

/// Result of a forward and backward pass.
struct Pass {
    loss: f64,
    /// Gradient of the trained part, f32.
    gradient: Tensor,
    routes: Option<Routes>,
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
        let loaded = checkpoint::load(&config, &layout, folder)?;
        let weights = Tensor::f_from_slice(&loaded.parameters)?.f_to_device(device)?;
        let leaf = weights.f_narrow(0, 0, layout.trained as i64)?.f_detach()?.f_requires_grad_(true)?;
        let zeros = || Tensor::f_zeros([layout.elements as i64], (Kind::Float, device));
        let (first, second) = (zeros()?, zeros()?);
        let network = Network::new(config, layout, loaded.buffers, device, options.compute.kind())?;
        Ok(Self { network, plan, ranges, step: 0, weights, leaf, first, second, threads: options.threads })
    }

    /// The model's configuration.
    pub fn config(&self) -> &QuasarConfig {
        &self.network.config
    }

    /// The loss of a batch and its gradient by tensor name, frozen tensors left out. For audits and tests; nothing changes.
    pub fn loss_and_gradients(&mut self, batch: &Batch, forced: Option<&Routes>) -> Result<(f64, BTreeMap<String, Vec<f32>>), TrainError> {
        let pass = self.pass(batch, forced, false)?;
        let gradient = to_host(&pass.gradient)?;
        let layout = &self.network.layout;
        let trained = layout.blocks.iter().filter(|block| block.trained).flat_map(|block| &block.members);
        let part = |name: &String| layout.range(name).map(|range| (name.clone(), gradient[range].to_vec()));
        Ok((pass.loss, trained.filter_map(part).collect()))
    }

    fn pass(&mut self, batch: &Batch, forced: Option<&Routes>, record: bool) -> Result<Pass, TrainError> {
        batch.check(self.network.config.vocab_size)?;
        use_threads(self.threads);
        let network = &self.network;
        let mut routing = Routing::new(&network.config, batch.tokens.len(), forced, record, network.device)?;
        let (trained, all) = (network.layout.trained as i64, network.layout.elements as i64);
        let frozen = self.weights.f_narrow(0, trained, all - trained)?;
        let weights = network.weights(&self.leaf, &frozen)?;
        let tokens = network.tokens(batch)?;
        let hidden = network.hidden(&weights, &tokens, &mut routing, None)?;
        let loss = network.losses(&weights, &hidden, &tokens)?.f_mean(None::<Kind>)?;
        let value = loss.f_double_value(&[])?;
        if !value.is_finite() {
            return Err(TrainError::NotFinite { what: "the loss", step: self.step + 1 });
        }
        let mut gradients = Tensor::f_run_backward(&[&loss], &[&self.leaf], false, false)?;
        let gradient = gradients.pop().ok_or_else(|| TrainError::Torch("no gradient came back".into()))?;
        Ok(Pass { loss: value, gradient, routes: routing.into_routes()? })
    }

    /// The same step as [`adamw::update`], as tensor operations for devices whose memory the host cannot see.
    fn update_on_device(&mut self, gradient: &Tensor, hyper: &Hyper, scale: f64, step: u64) -> Result<(), TrainError> {
        let trained = self.network.layout.trained as i64;
        tch::no_grad(|| -> ops::Result<()> {
            if hyper.weight_decay > 0.0 {
                for range in &self.network.layout.decayed {
                    let mut part = self.weights.f_narrow(0, range.start as i64, range.len() as i64)?;
                    let _ = part.f_mul_scalar_(1.0 - hyper.lr * hyper.weight_decay)?;
                }
            }
            let (correction1, correction2) = adamw::bias_corrections(hyper, step);
            let gradient = gradient.f_mul_scalar(scale)?;
            let (mut first, mut second) = (self.first.f_narrow(0, 0, trained)?, self.second.f_narrow(0, 0, trained)?);
            let _ = first.f_lerp_(&gradient, 1.0 - hyper.beta1)?;
            let mut squared = gradient.f_mul(&gradient)?;
            let _ = squared.f_mul_scalar_(1.0 - hyper.beta2)?;
            let _ = second.f_mul_scalar_(hyper.beta2)?.f_add_(&squared)?;
            let mut bound = second.f_sqrt()?;
            let _ = bound.f_div_scalar_(correction2.sqrt())?.f_add_scalar_(hyper.eps)?;
            let mut moved = first.f_div(&bound)?;
            let _ = moved.f_mul_scalar_(hyper.lr / correction1)?;
            let _ = self.weights.f_narrow(0, 0, trained)?.f_sub_(&moved)?;
            Ok(())
        })?;
        Ok(())
    }

    /// A copy of one of the flat buffers in (fragment, slice) order.
    fn in_plan_order(&self, buffer: &Tensor) -> Result<Vec<f32>, TrainError> {
        Ok(self.ranges.to_plan_order(&to_host(buffer)?))
    }

    fn overwrite(&self, buffer: &Tensor, values: &[f32]) -> Result<(), TrainError> {
        let source = Tensor::f_from_slice(&self.ranges.from_plan_order(values))?;
        Ok(tch::no_grad(|| buffer.shallow_clone().f_copy_(&source))?)
    }
}

/// A flat f32 tensor as numbers.
fn to_host(x: &Tensor) -> Result<Vec<f32>, TrainError> {
    let x = x.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut values = vec![0f32; x.numel()];
    let count = values.len();
    x.f_copy_data(&mut values, count)?;
    Ok(values)
}

/// The memory of a contiguous f32 tensor on the CPU.
///
/// # Safety
/// No other slice of the same memory may be alive, and no tensor operation may run on it, while the result is: tensors
/// share memory, so that the exclusive borrow alone does not say so.
unsafe fn memory(x: &mut Tensor, elements: usize) -> &mut [f32] {
    debug_assert!(x.device() == Device::Cpu && x.is_contiguous() && x.kind() == Kind::Float && x.numel() >= elements);
    unsafe { std::slice::from_raw_parts_mut(x.data_ptr().cast(), elements) }
}

impl Trainer for QuasarTrainer {
    fn plan(&self) -> &FragmentPlan {
        &self.plan
    }

    fn step(&mut self, batch: &Batch, hyper: &Hyper, forced: Option<&Routes>, record: bool) -> Result<StepReport, TrainError> {
        hyper.check()?;
        let Pass { loss, mut gradient, routes } = self.pass(batch, forced, record)?;
        let (step, trained) = (self.step + 1, self.network.layout.trained);
        let on_host = self.network.device == Device::Cpu;
        let grad_norm = if on_host {
            // SAFETY: the gradient is fresh, contiguous, and used by nothing else.
            adamw::norm(unsafe { memory(&mut gradient, trained) })
        } else {
            gradient.f_norm_scalaropt_dtype(2.0, Kind::Double)?.f_double_value(&[])?
        };
        if !grad_norm.is_finite() {
            return Err(TrainError::NotFinite { what: "the gradient", step });
        }
        let scale = adamw::clip_scale(hyper, grad_norm);
        if on_host {
            // SAFETY: four separate contiguous f32 tensors on the CPU; `self` is borrowed mutably.
            let buffers = unsafe {
                Buffers {
                    weights: memory(&mut self.weights, trained),
                    first: memory(&mut self.first, trained),
                    second: memory(&mut self.second, trained),
                    gradient: memory(&mut gradient, trained),
                }
            };
            adamw::update(buffers, &self.network.layout.decayed, hyper, scale, step, self.threads);
        } else {
            self.update_on_device(&gradient, hyper, scale, step)?;
        }
        self.step = step;
        Ok(StepReport { loss, grad_norm, tokens: batch.tokens.len() as u64, routes })
    }

    fn export(&self, fragment: usize) -> Result<Vec<f32>, TrainError> {
        let ranges = self.ranges.of(fragment)?;
        let mut values = Vec::new();
        for range in ranges {
            values.extend(to_host(&self.weights.f_narrow(0, range.start as i64, range.len() as i64)?)?);
        }
        Ok(values)
    }

    fn apply(&mut self, fragment: usize, values: &[f32]) -> Result<(), TrainError> {
        let mut rest = values;
        for range in self.ranges.check(fragment, values)? {
            let (head, tail) = rest.split_at(range.len());
            let source = Tensor::f_from_slice(head)?;
            tch::no_grad(|| self.weights.f_narrow(0, range.start as i64, range.len() as i64)?.f_copy_(&source))?;
            rest = tail;
        }
        Ok(())
    }

    fn steps(&self) -> u64 {
        self.step
    }

    fn state(&self) -> Result<TrainerState, TrainError> {
        Ok(TrainerState {
            step: self.step,
            weights: self.in_plan_order(&self.weights)?,
            first: self.in_plan_order(&self.first)?,
            second: self.in_plan_order(&self.second)?,
        })
    }

    fn restore(&mut self, state: &TrainerState) -> Result<(), TrainError> {
        state.check(self.ranges.elements())?;
        self.overwrite(&self.weights, &state.weights)?;
        self.overwrite(&self.first, &state.first)?;
        self.overwrite(&self.second, &state.second)?;
        self.step = state.step;
        Ok(())
    }
}
