//! The outer optimizer: SGD with Nesterov momentum in f32, on the merged pseudo-gradient of one fragment, and the limit on the
//! length of its steps.

use protocol::documents::Codec;
use rayon::prelude::*;

use crate::simd::vectorised;

const TASK_ELEMENTS: usize = 1 << 16;

/// A merged pseudo-gradient longer than this many times the mean of those before is shortened to it.
pub const STEP_LIMIT: u64 = 2;

/// Steps that the mean looks back on; the limit applies from then on.
pub const MEAN_STEPS: u64 = 8;

/// One outer step, element by element: `b ← μ b + d`, then `θ ← θ − lr (d + μ b)`.
///
/// `theta`, `momentum` (`b`) and `delta` (`d`: base minus learner, merged) are the fragment in slice order; `momentum` may be empty
/// if `mu` is 0. The result does not depend on the number of threads.
///
/// # Panics
/// If lengths differ.
pub fn step(theta: &mut [f32], momentum: &mut [f32], delta: &[f32], lr: f32, mu: f32) {
    assert_eq!(theta.len(), delta.len(), "state and delta are of one fragment");
    if momentum.is_empty() && mu == 0.0 {
        let tasks = theta.par_chunks_mut(TASK_ELEMENTS).zip(delta.par_chunks(TASK_ELEMENTS));
        return tasks.for_each(|(theta, delta)| descend(theta, delta, lr));
    }
    assert_eq!(momentum.len(), delta.len(), "state and delta are of one fragment");
    let tasks = theta.par_chunks_mut(TASK_ELEMENTS).zip(momentum.par_chunks_mut(TASK_ELEMENTS)).zip(delta.par_chunks(TASK_ELEMENTS));
    tasks.for_each(|((theta, momentum), delta)| {
        nesterov(theta, momentum, delta, lr, mu);
    });
}

vectorised! {
    fn nesterov(theta: &mut [f32], momentum: &mut [f32], delta: &[f32], lr: f32, mu: f32) {
        for ((theta, momentum), delta) in theta.iter_mut().zip(momentum).zip(delta) {
            *momentum = mu * *momentum + delta;
            *theta -= lr * (delta + mu * *momentum);
        }
    }
}

vectorised! {
    fn descend(theta: &mut [f32], delta: &[f32], lr: f32) {
        for (theta, delta) in theta.iter_mut().zip(delta) {
            *theta -= lr * delta;
        }
    }
}

/// Whether contributions in `codec` go together with outer momentum `mu`. Error feedback is a momentum of its own, and both
/// together overshoot: dense codecs take Nesterov, top-k takes none.
pub fn momentum_fits(codec: Codec, mu: f32) -> bool {
    codec != Codec::TopK || mu == 0.0
}

/// The mean of the step norms of a fragment (in units of 1e-6, as in merge manifests) after one more of norm `norm`, from the mean
/// of the `steps` steps before; in integers: whoever has the manifests has the same.
///
/// Over the first [`MEAN_STEPS`] steps it is the plain mean. From then on it moves by one part in so many, and a norm counts for at
/// most [`STEP_LIMIT`] times the mean, so that one wild merge does not lift the limit for the next.
pub fn mean_norm(mean: u64, steps: u64, norm: u64) -> u64 {
    let (before, norm) = match steps < MEAN_STEPS {
        true => (steps, norm),
        false => (MEAN_STEPS - 1, norm.min(mean.saturating_mul(STEP_LIMIT))),
    };
    // Up by one at least, so that a mean of a few units can grow.
    let sum = u128::from(mean) * u128::from(before) + u128::from(norm);
    sum.div_ceil(u128::from(before + 1)) as u64
}

/// Shortens `delta` of norm `norm` to [`STEP_LIMIT`] times the mean of the `steps` steps before; returns the factor in parts per
/// million (1,000,000 where nothing was done). Norms in units of 1e-6. There is no limit in the first [`MEAN_STEPS`] steps, when
/// norms grow with the learning rate and with the number of steps that learners have done, and none on a mean of 0.
pub fn limit(delta: &mut [f32], norm: u64, mean: u64, steps: u64) -> u32 {
    const PPM: u128 = 1_000_000;
    let allowed = mean.saturating_mul(STEP_LIMIT);
    if steps < MEAN_STEPS || allowed == 0 || norm <= allowed {
        return PPM as u32;
    }
    let factor_ppm = (u128::from(allowed) * PPM / u128::from(norm)) as u32;
    let factor = f64::from(factor_ppm) / PPM as f64;
    delta.par_chunks_mut(TASK_ELEMENTS).for_each(|delta| {
        crate::kernels::scale(delta, factor);
    });
    factor_ppm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_steps_follow_the_nesterov_recurrence() {
        let (mut theta, mut momentum) = (vec![1.0f32], vec![0.0f32]);
        step(&mut theta, &mut momentum, &[0.5], 0.5, 0.5);
        assert_eq!((theta[0], momentum[0]), (1.0 - 0.5 * (0.5 + 0.25), 0.5));
        step(&mut theta, &mut momentum, &[0.25], 0.5, 0.5);
        assert_eq!((theta[0], momentum[0]), (0.625 - 0.5 * (0.25 + 0.25), 0.5));
    }

    #[test]
    fn without_momentum_and_with_rate_one_the_step_is_the_delta() {
        let (mut theta, mut momentum) = (vec![3.0, -2.0], vec![0.0, 0.0]);
        step(&mut theta, &mut momentum, &[0.5, 0.25], 1.0, 0.0);
        let mut plain = vec![3.0, -2.0];
        step(&mut plain, &mut [], &[0.5, 0.25], 1.0, 0.0);
        assert_eq!(plain, theta);
        assert_eq!(theta, [2.5, -2.25]);
    }

    #[test]
    fn a_step_far_longer_than_those_before_is_shortened_to_twice_their_mean() {
        let mut mean = 0;
        for steps in 0..MEAN_STEPS {
            let norm = 1_000_000 * (steps + 1);
            assert_eq!(limit(&mut [1.0], 50 * norm, mean, steps), 1_000_000, "no limit at the beginning");
            mean = mean_norm(mean, steps, norm);
        }
        assert_eq!(mean, 4_500_000, "the plain mean");
        let mut delta = [30.0, 40.0];
        assert_eq!(limit(&mut delta, 50_000_000, mean, 8), 180_000);
        assert_eq!(delta, [5.4, 7.2]);
        assert_eq!(mean_norm(mean, 8, 50_000_000), 5_062_500, "a wild step counts as the limit");
        assert_eq!(limit(&mut delta, 9_000_000, mean, 8), 1_000_000);
        assert_eq!(mean_norm(1, 9, 2), 2);
        assert_eq!(mean_norm(0, 9, 7), 0);
        assert_eq!(limit(&mut delta, u64::MAX, u64::MAX, 9), 1_000_000);
    }

    #[test]
    fn momentum_and_error_feedback_exclude_each_other() {
        assert!(momentum_fits(Codec::Bf16, 0.9) && momentum_fits(Codec::Int4, 0.9) && momentum_fits(Codec::TopK, 0.0));
        assert!(!momentum_fits(Codec::TopK, 0.5));
    }
}
