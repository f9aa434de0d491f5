//! Time-outs and retries of everything that talks to a store, in one place.
//!
//! The SDK's own retries are switched off: stacked retry loops multiply, and only a loop that counts its own attempts can tell a conditional
//! write that lost from one whose first answer got lost.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Time to set up a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest silence while the answer to a request without a body is awaited, or any answer is read.
pub const READ_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest time in which nothing of an upload moves, and from its last byte to the answer: stores hash and copy before they give one.
pub const UPLOAD_SILENCE: Duration = Duration::from_secs(60);
/// Longest time for one attempt at a request without a large body.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);
/// Slowest transfer that is still worth waiting for, bytes per second; lengthens the time-out of large bodies.
pub const SLOWEST_BYTES_PER_SECOND: u64 = 256 << 10;
/// How long an idle connection is kept.
pub const IDLE_CONNECTION: Duration = Duration::from_secs(90);
/// Tries of one request, the first included.
pub const ATTEMPTS: u32 = 4;
/// Pause before the second try; doubles with each further one.
pub const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest error answer that is read, only so that its connection can be used again.
pub const LONGEST_ANSWER: u64 = 64 << 10;
/// Longest pause between tries.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Time-out of one attempt that moves `bytes`.
pub fn attempt_timeout(bytes: u64) -> Duration {
    ATTEMPT_TIMEOUT + Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND)
}

/// Whether an error answer with status 400 says that the store waited for bytes of the body in vain: S3 has no status of its own for it.
pub fn is_slow_upload(answer: &[u8]) -> bool {
    const CODE: &[u8] = b"<Code>RequestTimeout</Code>";
    answer.windows(CODE.len()).any(|window| window == CODE)
}

/// Runs `request(attempt)` (attempts count from 1) until it succeeds, fails for good, or [`ATTEMPTS`] are used up.
pub async fn retry<T, E, F, R>(is_retryable: impl Fn(&E) -> bool, mut request: R) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
    R: FnMut(u32) -> F,
{
    let mut attempt = 1;
    loop {
        match request(attempt).await {
            Err(error) if attempt < ATTEMPTS && is_retryable(&error) => {
                tokio::time::sleep(pause(attempt)).await;
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// Exponential with full-half jitter: between half and all of the nominal pause, so that clients do not return in step.
fn pause(attempt: u32) -> Duration {
    let nominal = FIRST_PAUSE.saturating_mul(1 << (attempt - 1).min(16)).min(LONGEST_PAUSE);
    // Each `RandomState` is keyed differently: enough randomness for jitter, without another dependency.
    let fraction = (RandomState::new().hash_one(attempt) % 1024) as u32;
    nominal / 2 + nominal / 2 * fraction / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_is_tried_a_bounded_number_of_times_and_only_while_that_can_help() {
        for (retryable, tries) in [(true, ATTEMPTS), (false, 1)] {
            let mut seen = 0;
            let result: Result<(), &str> = retry(
                |_| retryable,
                |attempt| {
                    seen = attempt;
                    async { Err("no") }
                },
            )
            .await;
            assert_eq!((result, seen), (Err("no"), tries));
        }
    }

    #[test]
    fn pauses_grow_and_stay_bounded() {
        for attempt in 1..40 {
            assert!(pause(attempt) <= LONGEST_PAUSE && pause(attempt) >= FIRST_PAUSE / 2);
        }
    }
}
