//! Logs to standard error: one line for people, or JSON for machines. Standard output belongs to results.
//!
//! The filter is that of `tracing_subscriber::EnvFilter` (`info`, `debug,hyper=warn`, …) and comes from the setting
//! `log.filter`, never from `RUST_LOG`: every setting has one name.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// `2026-11-22T14:03:11Z  INFO merged fragment=3 version=12`
    #[default]
    Human,
    /// One JSON object a line, fields flat.
    Json,
}

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("`{filter}` is no log filter: {reason}\nhint: examples are `info`, `debug`, `info,quasar_miner=debug`")]
    Filter { filter: String, reason: String },
    #[error("logging was set up twice in one process")]
    Twice,
}

impl From<TelemetryError> for crate::Failure {
    fn from(error: TelemetryError) -> Self {
        Self::configuration(error)
    }
}

/// Checks a filter without using it.
///
/// # Errors
/// It does not parse.
pub fn check_filter(filter: &str) -> Result<(), TelemetryError> {
    parse(filter).map(drop)
}

fn parse(filter: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(filter).map_err(|error| TelemetryError::Filter { filter: filter.to_owned(), reason: error.to_string() })
}

/// Sets up logging for the process, once.
///
/// # Errors
/// The filter does not parse, or logging is set up already.
pub fn init(format: LogFormat, filter: &str) -> Result<(), TelemetryError> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(parse(filter)?)
        .with_writer(std::io::stderr)
        .with_span_events(FmtSpan::NONE)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Human => builder.compact().with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init(),
    }
    .map_err(|_| TelemetryError::Twice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_does_not_parse_is_an_error_with_examples() {
        let error = check_filter("info,quasar=loudest").unwrap_err();
        assert!(error.to_string().contains("hint: examples"));
        check_filter("info,quasar_miner=debug").unwrap();
    }

    #[test]
    fn logging_is_set_up_once() {
        init(LogFormat::Human, "info").unwrap();
        assert!(matches!(init(LogFormat::Json, "info"), Err(TelemetryError::Twice)));
    }
}
