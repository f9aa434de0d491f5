//! A reason for waiting, logged without repeating itself.

use std::time::Duration;

use tokio::time::Instant;

/// A reason that stays is logged again after this long.
const REMIND: Duration = Duration::from_secs(60);

/// Says why it waits, once when the reason changes and then once a minute.
#[derive(Debug, Default)]
pub struct Waiting {
    last: Option<(String, Instant)>,
}

impl Waiting {
    pub fn log(&mut self, reason: &str) {
        let is_new = self.last.as_ref().is_none_or(|(last, at)| last != reason || at.elapsed() >= REMIND);
        if is_new {
            tracing::warn!(reason = reason.replace('\n', "; "), "waiting");
            self.last = Some((reason.to_owned(), Instant::now()));
        }
    }
}
