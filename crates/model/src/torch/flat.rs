//! A learner through libtorch's operations and autograd, on any device: f32 master weights and moments in flat buffers.

use std::collections::HashMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::device::use_threads;
use super::layout::Layout;
use super::learner::{Learner, Taken};
use super::moe::Routing;
use super::network::Network;
use super::ops;
use super::trainer::TrainerOptions;
use crate::adamw::{self, Buffers};
use crate::state::Run;
use crate::{Batch, Hyper, QuasarConfig, Routes, TrainError};

/// All parameters, f32, in the order of the layout; `leaf` is the trained part, sharing memory.
pub(crate) struct FlatLearner {
    network: Network,
    weights: Tensor,
    leaf: Tensor,
    first: Tensor,
    second: Tensor,
    threads: usize,
    cap_experts: bool,
    document_end: Option<u32>,
}

/// Result of a forward and backward pass.
struct Pass {
    loss: f64,
    /// Gradient of the trained part, f32.
    gradient: Tensor,
    routes: Option<Routes>,
}

impl FlatLearner {
    /// A learner whose weights are all zero, computing in `kind`.
    pub fn new(
        config: QuasarConfig,
        layout: Layout,
        buffers: HashMap<String, Vec<f32>>,
        device: Device,
        kind: Kind,
        options: &TrainerOptions,
    ) -> Result<Self, TrainError> {
        let zeros = || Tensor::f_zeros([layout.elements as i64], (Kind::Float, device));
        let (weights, first, second) = (zeros()?, zeros()?, zeros()?);
        let leaf = weights.f_narrow(0, 0, layout.trained as i64)?.f_detach()?.f_requires_grad_(true)?;
        let network = Network::new(config, layout, buffers, device, kind)?;
        let TrainerOptions { threads, cap_experts, document_end, .. } = *options;
        Ok(Self { network, weights, leaf, first, second, threads, cap_experts, document_end })
    }

    fn pass(&self, batch: &Batch, forced: Option<&Routes>, record: bool, step: u64) -> Result<Pass, TrainError> {
        use_threads(self.threads);
        let network = &self.network;
        let (trained, all) = (network.layout.trained as i64, network.layout.elements as i64);
        let frozen = self.weights.f_narrow(0, trained, all - trained)?;
        let weights = network.weights(&self.leaf, &frozen)?;
        let pieces = batch.pieces(batch.rows, self.document_end);
        let (mut losses, mut routes) = (Vec::new(), Vec::new());
        for piece in &pieces {
            let part = piece.of(batch);
            let forced = forced.map(|routes| routes.part(&network.config, batch.tokens.len(), &piece.range));
            let mut routing = Routing::new(&network.config, part.tokens.len(), forced.as_ref(), record, network.device)?;
            if self.cap_experts {
                routing.cap(network.config.expert_capacity(part.tokens.len()));
            }
            let tokens = network.tokens(&part)?;
            let hidden = network.hidden(&weights, &tokens, &mut routing, None)?;
            losses.push(network.losses(&weights, &hidden, &tokens)?.f_reshape([-1])?);
            routes.extend(routing.into_routes()?);
        }
        let loss = if losses.len() == 1 { losses.remove(0) } else { Tensor::f_cat(&losses, 0)? }.f_mean(None::<Kind>)?;
        let value = loss.f_double_value(&[])?;
        if !value.is_finite() {
            return Err(TrainError::NotFinite { what: "the loss", step });
        }
        let mut gradients = Tensor::f_run_backward(&[&loss], &[&self.leaf], false, false)?;
        let gradient = gradients.pop().ok_or_else(|| TrainError::Torch("no gradient came back".into()))?;
        Ok(Pass { loss: value, gradient, routes: record.then(|| Routes::join(&self.network.config, &routes)) })
    }

    /// The same step as [`adamw::update`], as tensor operations for devices whose memory the host cannot see. The gradient is used up. All
    /// memory is taken before anything changes: an error for want of it leaves weights and moments as they were.
    fn update_on_device(&mut self, gradient: &mut Tensor, hyper: &Hyper, scale: f64, step: u64) -> Result<(), TrainError> {
        let trained = self.network.layout.trained as i64;
        tch::no_grad(|| -> ops::Result<()> {
            let mut spare = gradient.f_empty_like()?;
            let (mut first, mut second) = (self.first.f_narrow(0, 0, trained)?, self.second.f_narrow(0, 0, trained)?);
            if hyper.weight_decay > 0.0 {
                for range in &self.network.layout.decayed {
                    let mut part = self.weights.f_narrow(0, range.start as i64, range.len() as i64)?;
                    let _ = part.f_mul_scalar_(1.0 - hyper.lr * hyper.weight_decay)?;
                }
            }
            let (correction1, correction2) = adamw::bias_corrections(hyper, step);
            let _ = gradient.f_mul_scalar_(scale)?;
            let _ = first.f_lerp_(gradient, 1.0 - hyper.beta1)?;
            // Its square.
            let _ = gradient.f_mul_out(&spare, gradient)?;
            let _ = spare.f_mul_scalar_(1.0 - hyper.beta2)?;
            let _ = second.f_mul_scalar_(hyper.beta2)?.f_add_(&spare)?;
            // By what the first moment is divided.
            let _ = second.f_sqrt_out(&spare)?;
            let _ = spare.f_div_scalar_(correction2.sqrt())?.f_add_scalar_(hyper.eps)?;
            // How far weights move.
            let _ = first.f_div_out(gradient, &spare)?;
            let _ = gradient.f_mul_scalar_(hyper.lr / correction1)?;
            let _ = self.weights.f_narrow(0, 0, trained)?.f_sub_(gradient)?;
            Ok(())
        })?;
        Ok(())
    }
}

fn parts(buffer: &Tensor, ranges: &[Range<usize>]) -> ops::Result<Vec<f32>> {
    let mut values = Vec::with_capacity(ranges.iter().map(Range::len).sum());
    for range in ranges {
        values.extend(ops::to_host(&buffer.f_narrow(0, range.start as i64, range.len() as i64)?)?);
    }
    Ok(values)
}

fn overwrite(buffer: &Tensor, range: &Range<usize>, values: &[f32]) -> Result<(), TrainError> {
    let source = Tensor::f_from_slice(values)?;
    Ok(tch::no_grad(|| buffer.f_narrow(0, range.start as i64, range.len() as i64)?.f_copy_(&source))?)
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

impl Learner for FlatLearner {
    fn config(&self) -> &QuasarConfig {
        &self.network.config
    }

    fn layout(&self) -> &Layout {
        &self.network.layout
    }

    fn take_step(&mut self, batch: &Batch, hyper: &Hyper, forced: Option<&Routes>, record: bool, step: u64) -> Result<Taken, TrainError> {
        let Pass { loss, mut gradient, routes } = self.pass(batch, forced, record, step)?;
        let trained = self.network.layout.trained;
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
            self.update_on_device(&mut gradient, hyper, scale, step)?;
        }
        Ok(Taken { loss, grad_norm, routes })
    }

    fn loss_and_gradient(&mut self, batch: &Batch, forced: Option<&Routes>) -> Result<(f64, Vec<f32>), TrainError> {
        let pass = self.pass(batch, forced, false, 0)?;
        Ok((pass.loss, ops::to_host(&pass.gradient)?))
    }

    fn hidden(&mut self, batch: &Batch, forced: Option<&Routes>) -> Result<Vec<Vec<f32>>, TrainError> {
        use_threads(self.threads);
        let network = &self.network;
        let (trained, all) = (network.layout.trained as i64, network.layout.elements as i64);
        let mut routing = Routing::new(&network.config, batch.tokens.len(), forced, false, network.device)?;
        Ok(tch::no_grad(|| -> ops::Result<_> {
            let weights = network.weights(&self.leaf, &self.weights.f_narrow(0, trained, all - trained)?)?;
            let mut states = Vec::new();
            let _ = network.hidden(&weights, &network.tokens(batch)?, &mut routing, Some(&mut states))?;
            states.iter().map(ops::to_host).collect()
        })?)
    }

    fn read(&self, ranges: &[Range<usize>]) -> Result<Vec<f32>, TrainError> {
        Ok(parts(&self.weights, ranges)?)
    }

    fn write(&mut self, range: &Range<usize>, values: &[f32]) -> Result<(), TrainError> {
        overwrite(&self.weights, range, values)
    }

    fn moments(&self) -> Result<(Vec<f32>, Vec<f32>), TrainError> {
        Ok((ops::to_host(&self.first)?, ops::to_host(&self.second)?))
    }

    fn moments_of(&self, ranges: &[Range<usize>]) -> Result<Vec<Run>, TrainError> {
        let part = |x: &Tensor, range: &Range<usize>| parts(x, std::slice::from_ref(range));
        let run = |range| Ok(Run::Floats { first: part(&self.first, range)?, second: part(&self.second, range)? });
        ranges.iter().map(run).collect()
    }

    fn put_moments(&mut self, range: &Range<usize>, run: &Run) -> Result<bool, TrainError> {
        let (first, second) = run.decode();
        overwrite(&self.first, range, &first)?;
        overwrite(&self.second, range, &second)?;
        Ok(true)
    }

    fn set_moments(&mut self, first: &[f32], second: &[f32]) -> Result<(), TrainError> {
        overwrite(&self.first, &(0..first.len()), first)?;
        overwrite(&self.second, &(0..second.len()), second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_as_tensor_operations_gives_the_bits_of_the_formula_written_out() {
        let config = QuasarConfig::from_json(include_str!("../../tests/data/small_config.json")).unwrap();
        let layout = Layout::new(&config, false);
        let buffers = config.tensors().into_iter().filter(|tensor| tensor.is_buffer);
        let buffers = buffers.map(|tensor| (tensor.name.clone(), crate::init::values(&config, 1, &tensor))).collect();
        let options = TrainerOptions::default();
        let mut learner = FlatLearner::new(config, layout.clone(), buffers, Device::Cpu, Kind::Float, &options).unwrap();
        let trained = layout.trained as i64;
        tch::manual_seed(1);
        let weights = Tensor::randn([layout.elements as i64], (Kind::Float, Device::Cpu));
        tch::no_grad(|| learner.weights.copy_(&weights));
        let zeros = || Tensor::zeros([trained], (Kind::Float, Device::Cpu));
        let (mut first, mut second) = (zeros(), zeros());
        let hyper = Hyper { weight_decay: 0.1, ..Hyper::default() };
        for step in 1..4 {
            let gradient = Tensor::randn([trained], (Kind::Float, Device::Cpu));
            learner.update_on_device(&mut gradient.copy(), &hyper, 0.7, step).unwrap();
            for range in &layout.decayed {
                let mut part = weights.narrow(0, range.start as i64, range.len() as i64);
                let decayed = &part * (1.0 - hyper.lr * hyper.weight_decay);
                part.copy_(&decayed);
            }
            let (correction1, correction2) = adamw::bias_corrections(&hyper, step);
            let gradient = gradient * 0.7;
            first = first.lerp(&gradient, 1.0 - hyper.beta1);
            second = second * hyper.beta2 + &gradient * &gradient * (1.0 - hyper.beta2);
            let moved = &first / (second.sqrt() / correction2.sqrt() + hyper.eps) * (hyper.lr / correction1);
            let after = weights.narrow(0, 0, trained) - moved;
            weights.narrow(0, 0, trained).copy_(&after);
            assert_eq!(learner.weights, weights, "step {step}");
            assert_eq!((&learner.first.narrow(0, 0, trained), &learner.second.narrow(0, 0, trained)), (&first, &second), "step {step}");
        }
    }
}
