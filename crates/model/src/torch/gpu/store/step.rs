//! A step's gradients, and the optimizer step that uses them up.

use std::collections::HashMap;
use std::ops::Range;

use tch::{Kind, Tensor};

use super::Store;
use super::buffer::{aligned, copy_blocks};
use super::moments::MOMENT_BLOCK;
use crate::Hyper;
use crate::adamw::bias_corrections;
use crate::torch::gpu::driver::{Argument, HostMemory};
use crate::torch::gpu::kernels::{Kernels, StepSettings, warps};
use crate::torch::ops::Result;

/// Blocks of the optimizer's kernel for each multiprocessor.
const WALKERS: u32 = 8;
const NORM_BLOCKS: i64 = 264;
const SPAN_WORDS: usize = 4;
const SPAN_BYTES: usize = 8 * SPAN_WORDS;

/// Gradients of one step: a tensor for each trained matrix, one f32 buffer for all trained vectors.
pub(crate) struct Gradients {
    pub matrices: HashMap<String, Tensor>,
    pub vectors: Tensor,
    places: HashMap<String, Range<i64>>,
}

impl Gradients {
    /// Adds the gradient of a matrix.
    pub fn matrix(&mut self, key: String, gradient: Tensor) -> Result<()> {
        if let Some(sum) = self.matrices.get_mut(&key) {
            let _ = sum.f_add_(&gradient)?;
        } else {
            self.matrices.insert(key, gradient);
        }
        Ok(())
    }

    /// Adds the gradient `dy^T x` of a matrix by which `x` was multiplied ([`crate::torch::gpu::engine::Pass::linear`]).
    pub fn linear(&mut self, key: String, dy: &Tensor, x: &Tensor) -> Result<()> {
        if let Some(sum) = self.matrices.get_mut(&key) {
            let _ = sum.f_addmm_(&dy.f_tr()?, x)?;
        } else {
            self.matrices.insert(key, dy.f_tr()?.f_mm(x)?);
        }
        Ok(())
    }

    /// The gradient of a trained vector, f32.
    pub fn of_vector(&self, key: &str) -> Result<Tensor> {
        let place = self.places.get(key).ok_or_else(|| tch::TchError::Kind(format!("{key} has no gradient")))?;
        self.vectors.f_narrow(0, place.start, place.end - place.start)
    }

    /// Adds the gradient of a vector; frozen ones are passed over.
    pub fn vector(&mut self, key: &str, gradient: &Tensor) -> Result<()> {
        let Some(place) = self.places.get(key) else { return Ok(()) };
        let gradient = gradient.f_reshape([-1])?.f_to_kind(Kind::Float)?;
        let _ = self.vectors.f_narrow(0, place.start, place.end - place.start)?.f_add_(&gradient)?;
        Ok(())
    }
}

/// Where the gradients of a step lie, for kernels that take all that is trained at once: rows of `[start, elements, address, is f32]`,
/// ascending (`Span` of `adamw.cu`).
pub(super) struct Spans {
    /// What the host writes. The device has read it when a step's verdict is there, before the next step begins.
    written: HostMemory,
    table: Tensor,
}

impl Spans {
    /// Room for so many.
    pub fn new(kernels: &Kernels, count: usize) -> Result<Self> {
        let written = HostMemory::new(&kernels.gpu, count * SPAN_BYTES).map_err(tch::TchError::Torch)?;
        Ok(Self { written, table: kernels.empty(&[count as i64, SPAN_WORDS as i64], Kind::Int64)? })
    }

    /// Puts the gradients of all matrices and of the vectors into the table; gives their number.
    fn fill(&mut self, kernels: &Kernels, matrices: &[(String, Range<i64>)], vectors: &Range<i64>, gradients: &Gradients) -> Result<i64> {
        let row = |range: &Range<i64>, gradient: &Tensor, is_wide: bool| {
            debug_assert!(gradient.is_contiguous() && gradient.numel() as i64 >= range.end - range.start);
            [range.start, range.end - range.start, gradient.data_ptr() as i64, i64::from(is_wide)]
        };
        let mut rows = Vec::with_capacity(matrices.len() + 1);
        for (key, range) in matrices {
            let gradient = gradients.matrices.get(key).ok_or_else(|| tch::TchError::Kind(format!("{key} has no gradient")))?;
            rows.push(row(range, gradient, false));
        }
        rows.push(row(vectors, &gradients.vectors, true));
        let bytes: &[u8] = bytemuck::cast_slice(&rows);
        self.written.slice_mut(0..bytes.len()).copy_from_slice(bytes);
        let arguments = [Argument::address(self.written.address(0)), (&self.table).into(), (bytes.len() as i64).into()];
        kernels.launch("copy_bytes", copy_blocks(bytes.len() as i64), 256u32, &arguments)?;
        Ok(rows.len() as i64)
    }
}

impl Store {
    /// Zero gradients for a step.
    pub fn gradients(&self) -> Result<Gradients> {
        let elements = aligned(self.vectors.end - self.vectors.start, MOMENT_BLOCK);
        let vectors = Tensor::f_zeros([elements], (Kind::Float, self.weights.device()))?;
        Ok(Gradients { matrices: HashMap::new(), vectors, places: self.vector_places.clone() })
    }

    /// Weighs the gradient and takes the optimizer step number `step`, if loss and gradient are finite. Returns
    /// `[loss, gradient norm, scale of the gradient, 1 if the step was taken]` f64, on the device. `losses` f32 are summed and scaled.
    pub fn step(
        &mut self,
        kernels: &Kernels,
        gradients: Gradients,
        losses: &Tensor,
        loss_scale: f64,
        hyper: &Hyper,
        step: u64,
    ) -> Result<Tensor> {
        self.hold_for_readers()?;
        let Some(moments) = &self.moments else { return Err(tch::TchError::Kind("these weights have no optimizer".into())) };
        let spans = self.spans.fill(kernels, &self.matrices, &self.vectors, &gradients)?;
        let partial = kernels.empty(&[spans * NORM_BLOCKS], Kind::Double)?;
        let arguments = [(&self.spans.table).into(), (&partial).into()];
        kernels.launch("square_sums", (NORM_BLOCKS, spans), 256u32, &arguments)?;
        let verdict = kernels.empty(&[4], Kind::Double)?;
        let arguments = [
            (&partial).into(),
            (partial.numel() as i32).into(),
            losses.into(),
            (losses.numel() as i32).into(),
            loss_scale.into(),
            hyper.clip_norm.into(),
            (&verdict).into(),
        ];
        kernels.launch("judge", 1u32, 256u32, &arguments)?;

        let (correction1, correction2) = bias_corrections(hyper, step);
        let settings = StepSettings {
            keep: (1.0 - hyper.lr * hyper.weight_decay) as f32,
            beta1: hyper.beta1 as f32,
            beta2: hyper.beta2 as f32,
            step_size: (hyper.lr / correction1) as f32,
            root_factor: correction2.sqrt().recip() as f32,
            eps: hyper.eps as f32,
            step: step as u32,
        };
        let [first, second, first_scales, second_scales] = moments.at(0);
        let blocks = moments.elements() / MOMENT_BLOCK;
        let arguments = [
            (&self.weights).into(),
            self.rests.at(0),
            first,
            second,
            first_scales,
            second_scales,
            (&self.spans.table).into(),
            blocks.into(),
            (&verdict).into(),
            settings.into(),
        ];
        kernels.launch("adamw", warps(blocks).min(i64::from(WALKERS * kernels.gpu.multiprocessors)), 256u32, &arguments)?;
        Ok(verdict)
    }
}
