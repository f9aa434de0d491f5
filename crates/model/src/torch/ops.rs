//! Small operations that several parts of the model share.

use tch::{Kind, TchError, Tensor};

pub(crate) type Result<T> = std::result::Result<T, TchError>;

/// f32, or f64 where the input is f64: the precision of statistics, recurrent states and the router.
pub(crate) fn wide(x: &Tensor) -> Result<Tensor> {
    match x.f_kind()? {
        Kind::Float | Kind::Double => Ok(x.shallow_clone()),
        _ => x.f_to_kind(Kind::Float),
    }
}

/// `x / sqrt(mean(x²) + eps)` over the last axis; statistics in f32, the result in x's type.
pub(crate) fn unit_rms(x: &Tensor, eps: f64) -> Result<Tensor> {
    let width = *x.size().last().unwrap_or(&1) as f64;
    let y = wide(x)?;
    // By the L2 norm rather than the mean of squares: one reduction instead of a stored square, and a cheaper gradient.
    // sqrt(mean + eps) = sqrt((norm² + width·eps) / width).
    let norm = y.f_norm_scalaropt_dim(2.0, [-1].as_slice(), true)?;
    let scale = norm.f_mul(&norm)?.f_add_scalar(width * eps)?.f_rsqrt()?.f_mul_scalar(width.sqrt())?;
    let scaled = y.f_mul(&scale)?;
    scaled.f_to_kind(x.f_kind()?)
}

/// RMS norm with a weight that multiplies after the cast.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if x.device().is_cuda() {
        let width = *x.size().last().unwrap_or(&1);
        return x.f_internal_fused_rms_norm([width], None::<&Tensor>, eps)?.0.f_to_kind(x.f_kind()?)?.f_mul(weight);
    }
    unit_rms(x, eps)?.f_mul(weight)
}

/// `x / max(‖x‖, 1e-12)` over the last axis.
pub(crate) fn l2_normalize(x: &Tensor) -> Result<Tensor> {
    let norm = x.f_norm_scalaropt_dim(2.0, [-1].as_slice(), true)?;
    x.f_mul(&norm.f_clamp_min(1e-12)?.f_reciprocal()?)
}

/// `silu(a) * b` of the two halves `[.., a | b]` of the last axis.
pub(crate) fn gated(x: &Tensor) -> Result<Tensor> {
    let halves = x.f_chunk(2, -1)?;
    halves[0].f_silu()?.f_mul(&halves[1])
}

/// `x + y · wᵀ` with `w` in the ordinary layout of a linear layer `[out, in]`.
pub(crate) fn add_linear(x: &Tensor, y: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.f_addmm(y, &weight.f_tr()?)
}

/// `y · wᵀ`.
pub(crate) fn linear(y: &Tensor, weight: &Tensor) -> Result<Tensor> {
    y.f_mm(&weight.f_tr()?)
}

/// The values of a tensor as f32, in memory order.
pub(crate) fn to_host(x: &Tensor) -> Result<Vec<f32>> {
    let x = x.f_to_kind(Kind::Float)?.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
    let mut values = vec![0f32; x.numel()];
    let count = values.len();
    x.f_copy_data(&mut values, count)?;
    Ok(values)
}
