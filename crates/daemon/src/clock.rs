//! The wall clock, at the one place where it may be read.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix time in milliseconds; zero for a clock set before 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as u64)
}
