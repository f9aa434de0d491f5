//! Errors that machines log: a validator that accuses the orchestrator is heard.

use std::fmt::{Debug, Write as _};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::field::Field;
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Level, Metadata, Subscriber};

/// What the machines of this thread's world log as errors that accuse the orchestrator, while it lives.
pub struct Ear {
    heard: Cries,
    _listens: DefaultGuard,
}

impl Ear {
    /// What was heard since the last time.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.heard.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Default for Ear {
    fn default() -> Self {
        let heard = Cries::default();
        Self { _listens: tracing::subscriber::set_default(heard.clone()), heard }
    }
}

#[derive(Clone, Default)]
struct Cries(Arc<Mutex<Vec<String>>>);

impl Subscriber for Cries {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Validators are those who compare what the orchestrator signed.
        *metadata.level() == Level::ERROR && metadata.target().starts_with("quasar_validator::machine")
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::ERROR)
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = String::new();
        event.record(&mut |field: &Field, value: &dyn Debug| {
            let _ = write!(text, "{}: {value:?} ", field.name());
        });
        // A verdict or a row that is lost is bad luck, and nobody's lie.
        if !text.contains("lost") && !event.metadata().target().ends_with("::weights") {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(text);
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_accuses_the_orchestrator_is_heard_and_nothing_else_is() {
        let ear = Ear::default();
        tracing::error!(target: "quasar_validator::machine", fault = "fork", "the append-only log contradicts itself");
        tracing::error!(target: "quasar_validator::machine::audits", "the verdict could not be written in time and is lost");
        tracing::error!(target: "quasar_miner::machine", "another process uses this slot");
        tracing::warn!(target: "quasar_validator::machine", "the head could not be read");
        let heard = ear.take();
        assert!(heard.len() == 1 && heard[0].contains("fork") && heard[0].contains("contradicts itself"), "{heard:?}");
        drop(ear);
        let next = Ear::default();
        assert!(next.take().is_empty(), "each world hears its own machines");
    }
}
