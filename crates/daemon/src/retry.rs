//! One way to try again: exponential backoff with full jitter and a deadline.

use std::collections::hash_map::RandomState;
use std::future::Future;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use tokio::time::Instant;

/// When to try again.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// Upper bound of the first pause; each further bound is twice the one before.
    pub first: Duration,
    /// No pause is longer.
    pub longest: Duration,
    /// No new attempt begins later than this after the first.
    pub deadline: Duration,
}

impl Backoff {
    /// For requests that a person or a schedule waits for: 200 ms, 400 ms … 10 s, for one minute.
    pub const REQUEST: Self =
        Self { first: Duration::from_millis(200), longest: Duration::from_secs(10), deadline: Duration::from_secs(60) };

    /// Pause before attempt `attempt + 1`: evenly drawn from the upper half of the bound, so that many clients of one
    /// store that failed together do not come back together, and none comes back at once.
    pub fn pause(&self, attempt: u32) -> Duration {
        let bound = self.first.saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX)).min(self.longest);
        let half = bound / 2;
        half + half.mul_f64(unit_draw())
    }
}

/// A number in [0, 1): the standard library seeds each hasher anew. Good enough to spread retries, for nothing else.
fn unit_draw() -> f64 {
    (RandomState::new().build_hasher().finish() >> 11) as f64 / (1_u64 << 53) as f64
}

/// Calls `operation` until it succeeds, fails with an error that `is_retryable` denies, or the deadline leaves no room for
/// another pause. Gives the last error. Never wrap a client that retries by itself.
pub async fn retry<T, E, F, Fut>(backoff: Backoff, is_retryable: impl Fn(&E) -> bool, mut operation: F) -> Result<T, E>
where
    E: std::fmt::Display,
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, E>>,
{
    let begun = Instant::now();
    let mut attempt = 0;
    loop {
        let error = match operation().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let pause = backoff.pause(attempt);
        if !is_retryable(&error) || begun.elapsed() + pause > backoff.deadline {
            return Err(error);
        }
        tracing::debug!(attempt, pause_ms = pause.as_millis() as u64, %error, "trying again");
        tokio::time::sleep(pause).await;
        attempt = attempt.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Backoff = Backoff { first: Duration::from_millis(1), longest: Duration::from_millis(4), deadline: Duration::from_secs(5) };

    #[tokio::test]
    async fn a_call_that_recovers_succeeds() {
        let mut calls = 0;
        let result: Result<u32, String> = retry(
            QUICK,
            |_| true,
            || {
                calls += 1;
                let answer = if calls < 4 { Err("busy".to_owned()) } else { Ok(calls) };
                async move { answer }
            },
        )
        .await;
        assert_eq!(result, Ok(4));
    }

    #[tokio::test]
    async fn an_error_that_no_retry_repairs_is_returned_at_once() {
        let mut calls = 0;
        let result: Result<(), &str> = retry(
            QUICK,
            |_| false,
            || {
                calls += 1;
                async { Err("denied") }
            },
        )
        .await;
        assert_eq!((result, calls), (Err("denied"), 1));
    }

    #[tokio::test]
    async fn the_deadline_ends_the_attempts() {
        let short = Backoff { deadline: Duration::from_millis(20), ..QUICK };
        let begun = Instant::now();
        let result: Result<(), &str> = retry(short, |_| true, || async { Err("busy") }).await;
        assert_eq!(result, Err("busy"));
        assert!(begun.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn pauses_grow_up_to_the_longest_and_stay_in_the_upper_half_of_their_bound() {
        let backoff = Backoff::REQUEST;
        for attempt in 0..70 {
            let bound = Duration::from_millis(200).saturating_mul(1 << attempt.min(10)).min(backoff.longest);
            let pause = backoff.pause(attempt);
            assert!(pause >= bound / 2 && pause <= bound, "attempt {attempt}: {pause:?} of {bound:?}");
        }
    }
}
