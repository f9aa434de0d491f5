//! AdamW (Loshchilov and Hutter, 2019) on flat `f32` buffers, one pass over memory.
//!
//! The arithmetic of each element is fixed (no fused multiply-add, correctly rounded division and square root), so the
//! result is bit-identical for every vector width and number of threads.

use std::ops::Range;

use crate::Hyper;

/// One step's constants.
#[derive(Clone, Copy)]
struct Constants {
    gradient_scale: f32,
    first_rate: f32,
    beta2: f32,
    second_rate: f32,
    step_size: f32,
    root_correction: f32,
    eps: f32,
}

/// Bias corrections `1 - beta^step` of both moments.
pub(crate) fn bias_corrections(hyper: &Hyper, step: u64) -> (f64, f64) {
    let step = step as f64;
    (1.0 - libm::pow(hyper.beta1, step), 1.0 - libm::pow(hyper.beta2, step))
}

/// By how much the gradient is scaled so that its norm is at most `hyper.clip_norm`.
pub(crate) fn clip_scale(hyper: &Hyper, norm: f64) -> f64 {
    if norm > hyper.clip_norm { hyper.clip_norm / norm } else { 1.0 }
}

/// L2 norm, summed in f64 in a fixed order.
pub(crate) fn norm(values: &[f32]) -> f64 {
    // Independent partial sums let the compiler use vector registers; their number is part of the result's definition.
    let mut lanes = [0.0f64; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }
    let rest: f64 = rest.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
    (lanes.iter().sum::<f64>() + rest).sqrt()
}

/// The buffers of one step, all of equal length.
pub(crate) struct Buffers<'a> {
    pub weights: &'a mut [f32],
    pub first: &'a mut [f32],
    pub second: &'a mut [f32],
    pub gradient: &'a [f32],
}

/// Step number `step` (counted from 1), with the gradient scaled by `scale`; `decayed` are the ranges under weight decay.
pub(crate) fn update(buffers: Buffers, decayed: &[Range<usize>], hyper: &Hyper, scale: f64, step: u64, threads: usize) {
    let Buffers { weights, first, second, gradient } = buffers;
    if hyper.weight_decay > 0.0 {
        let keep = (1.0 - hyper.lr * hyper.weight_decay) as f32;
        decayed.iter().for_each(|range| weights[range.clone()].iter_mut().for_each(|weight| *weight *= keep));
    }
    let (correction1, correction2) = bias_corrections(hyper, step);
    let constants = Constants {
        gradient_scale: scale as f32,
        first_rate: (1.0 - hyper.beta1) as f32,
        beta2: hyper.beta2 as f32,
        second_rate: (1.0 - hyper.beta2) as f32,
        step_size: (hyper.lr / correction1) as f32,
        root_correction: correction2.sqrt() as f32,
        eps: hyper.eps as f32,
    };
    let part = weights.len().div_ceil(threads.max(1)).max(1);
    if part >= weights.len() {
        return update_part(weights, first, second, gradient, constants);
    }
    std::thread::scope(|scope| {
        let moments = first.chunks_mut(part).zip(second.chunks_mut(part));
        for ((weights, (first, second)), gradient) in weights.chunks_mut(part).zip(moments).zip(gradient.chunks(part)) {
            scope.spawn(move || update_part(weights, first, second, gradient, constants));
        }
    });
}

fn update_part(weights: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32], constants: Constants) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { update_avx2(weights, first, second, gradient, constants) };
    }
    update_loop(weights, first, second, gradient, constants);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn update_avx2(weights: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32], constants: Constants) {
    update_loop(weights, first, second, gradient, constants);
}

#[inline(always)]
fn update_loop(weights: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32], c: Constants) {
    for (((weight, first), second), gradient) in weights.iter_mut().zip(first).zip(second).zip(gradient) {
        let gradient = gradient * c.gradient_scale;
        *first += (gradient - *first) * c.first_rate;
        *second = *second * c.beta2 + gradient * gradient * c.second_rate;
        *weight -= c.step_size * *first / (second.sqrt() / c.root_correction + c.eps);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYPER: Hyper = Hyper { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.5, clip_norm: 1.0 };

    fn run(threads: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let mut weights: Vec<f32> = (0..37).map(|n| n as f32 * 0.3 - 4.0).collect();
        let (mut first, mut second) = (vec![0.0; 37], vec![0.0; 37]);
        for step in 1..=5 {
            let gradient: Vec<f32> = weights.iter().map(|weight| weight * 0.7 + step as f32).collect();
            let buffers = Buffers { weights: &mut weights, first: &mut first, second: &mut second, gradient: &gradient };
            update(buffers, &[0..10, 20..37], &HYPER, 0.5, step, threads);
        }
        (weights, first, second)
    }

    #[test]
    fn steps_are_bit_identical_for_any_number_of_threads() {
        assert_eq!(run(1), run(3));
        assert_eq!(run(1), run(64));
    }

    #[test]
    fn a_step_follows_the_published_formula() {
        let (mut weights, mut first, mut second) = (vec![2.0, 2.0], vec![0.1, 0.1], vec![0.04, 0.04]);
        let buffers = Buffers { weights: &mut weights, first: &mut first, second: &mut second, gradient: &[3.0, 3.0] };
        update(buffers, std::slice::from_ref(&(0..1)), &HYPER, 1.0, 2, 1);
        let (m, v) = (0.9 * 0.1 + 0.1 * 3.0, 0.99 * 0.04 + 0.01 * 9.0);
        let moved = 0.1 * (m / (1.0 - 0.9f64.powi(2))) / ((v / (1.0 - 0.99f64.powi(2))).sqrt() + 1e-8);
        assert!((f64::from(weights[0]) - (2.0 * (1.0 - 0.05) - moved)).abs() < 1e-6);
        assert!((f64::from(weights[1]) - (2.0 - moved)).abs() < 1e-6, "outside the decayed ranges");
    }

    #[test]
    fn the_norm_and_the_clip_scale_agree() {
        let values: Vec<f32> = (0..100).map(|n| n as f32).collect();
        assert!((norm(&values) - 328_350f64.sqrt()).abs() < 1e-9);
        assert_eq!(clip_scale(&HYPER, 0.5), 1.0);
        assert_eq!(clip_scale(&HYPER, 4.0), 0.25);
    }
}
