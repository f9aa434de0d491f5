//! The outer optimizer: SGD with Nesterov momentum in f32, on the merged pseudo-gradient of one fragment.

use rayon::prelude::*;

const TASK_ELEMENTS: usize = 1 << 16;

/// One outer step, element by element: `b ← μ b + d`, then `θ ← θ − lr (d + μ b)`.
///
/// `theta`, `momentum` (`b`) and `delta` (`d`: base minus learner, merged) are the fragment in slice order. The result
/// does not depend on the number of threads.
///
/// # Panics
/// If the three lengths differ.
pub fn step(theta: &mut [f32], momentum: &mut [f32], delta: &[f32], lr: f32, mu: f32) {
    assert!(theta.len() == delta.len() && momentum.len() == delta.len(), "state and delta are of one fragment");
    let tasks = theta.par_chunks_mut(TASK_ELEMENTS).zip(momentum.par_chunks_mut(TASK_ELEMENTS)).zip(delta.par_chunks(TASK_ELEMENTS));
    tasks.for_each(|((theta, momentum), delta)| {
        for ((theta, momentum), delta) in theta.iter_mut().zip(momentum).zip(delta) {
            *momentum = mu * *momentum + delta;
            *theta -= lr * (delta + mu * *momentum);
        }
    });
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
        assert_eq!(theta, [2.5, -2.25]);
    }
}
