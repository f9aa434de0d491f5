//! Exit codes and the error that a person sees.
//!
//! The codes are a contract: the systemd units restart a daemon on 69 and 75 and leave it down on 64 and 78, because no
//! restart repairs a wrong flag, a missing wallet or a fenced session.

use std::ffi::OsString;
use std::fmt;
use std::process::{ExitCode, Termination};

use clap::Parser;

/// Marks the line of an error text that tells what to do; errors of all crates end in such a line.
const HINT_MARK: &str = "\nhint: ";

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The work is done, or a stop was asked for and obeyed.
    Done = 0,
    /// The command line is wrong.
    Usage = 64,
    /// Something that is needed does not answer: bucket, chain, disk.
    Unavailable = 69,
    /// Nothing is wrong here, the time has not come: not registered yet, no run published, store not ready.
    TryLater = 75,
    /// A person must change something first: settings, wallet, version, a second process with the same identity.
    Configuration = 78,
}

impl Exit {
    /// The process exit code.
    pub fn code(self) -> u8 {
        self as u8
    }
}

impl Termination for Exit {
    fn report(self) -> ExitCode {
        ExitCode::from(self.code())
    }
}

/// An error on its way to the terminal: exit code, cause, and what to do about it.
///
/// `main` may return `Result<Exit, Failure>` through [`run`], or print a failure with [`Failure::report`].
pub struct Failure {
    pub exit: Exit,
    pub error: anyhow::Error,
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a hint of its own; hints inside the error's text are still shown as such.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into(), hint: None }
    }

    /// The command line is wrong.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Usage, error)
    }

    /// Something that is needed does not answer.
    pub fn unavailable(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Unavailable, error)
    }

    /// The time has not come.
    pub fn try_later(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::TryLater, error)
    }

    /// A person must change something first.
    pub fn configuration(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Configuration, error)
    }

    /// Adds what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Puts what was being done in front of the cause.
    pub fn context(mut self, doing: impl fmt::Display + Send + Sync + 'static) -> Self {
        self.error = self.error.context(doing);
        self
    }

    /// Prints the failure to standard error and gives the exit code.
    pub fn report(&self) -> Exit {
        eprintln!("{self}");
        self.exit
    }
}

/// `error: outer: inner` in one line, then each hint on a line of its own.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut messages: Vec<String> = Vec::new();
        let mut hints: Vec<String> = Vec::new();
        for cause in self.error.chain() {
            let text = cause.to_string();
            let mut parts = text.split(HINT_MARK);
            let message = parts.next().unwrap_or_default();
            // A transparent wrapper and what it wraps say the same thing: once is enough.
            if !messages.iter().any(|earlier| earlier.contains(message)) {
                messages.push(message.to_owned());
            }
            hints.extend(parts.map(str::to_owned));
        }
        hints.extend(self.hint.clone());
        let mut shown: Vec<String> = Vec::new();
        for hint in hints {
            if !shown.contains(&hint) {
                shown.push(hint);
            }
        }
        write!(f, "error: {}", messages.join(": "))?;
        for hint in shown {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An error nobody classified: what was needed did not work, a restart may help.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::unavailable(error)
    }
}

/// What `main` calls: runs the body and turns a failure into text on standard error and an exit code.
pub fn run(body: impl FnOnce() -> Result<Exit, Failure>) -> Exit {
    body().unwrap_or_else(|failure| failure.report())
}

/// Runs the body with the command line that `arguments` are. One that is wrong ends with [`Exit::Usage`], and help and version with
/// success: clap prints them where they belong, and its own code for a wrong one is no code of ours.
///
/// # Errors
/// Those of the body; or the terminal cannot be written to.
pub fn with_arguments<C: Parser>(
    arguments: impl IntoIterator<Item = OsString>,
    body: impl FnOnce(C) -> Result<Exit, Failure>,
) -> Result<Exit, Failure> {
    match C::try_parse_from(arguments) {
        Ok(command_line) => body(command_line),
        Err(error) => {
            error.print().map_err(Failure::unavailable)?;
            Ok(if error.use_stderr() { Exit::Usage } else { Exit::Done })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("`{0}` cannot be read\nhint: check its permissions")]
    struct Unreadable(&'static str);

    #[test]
    fn the_cause_chain_is_one_line_and_hints_come_last() {
        let failure = Failure::configuration(Unreadable("wallet")).context("starting the miner").hint("run `doctor`");
        assert_eq!(
            failure.to_string(),
            "error: starting the miner: `wallet` cannot be read\nhint: check its permissions\nhint: run `doctor`"
        );
        assert_eq!(failure.exit, Exit::Configuration);
    }

    #[test]
    fn the_same_hint_and_the_same_message_are_shown_once() {
        let failure = Failure::usage(Unreadable("a")).hint("check its permissions");
        assert_eq!(failure.to_string().matches("hint:").count(), 1);
        let nested = Failure::usage(anyhow::Error::new(Unreadable("a")).context("`a` cannot be read"));
        assert_eq!(nested.to_string().matches("cannot be read").count(), 1);
    }

    #[test]
    fn exit_codes_are_the_documented_numbers() {
        let codes = [Exit::Done, Exit::Usage, Exit::Unavailable, Exit::TryLater, Exit::Configuration].map(Exit::code);
        assert_eq!(codes, [0, 64, 69, 75, 78]);
    }

    #[test]
    fn a_body_that_fails_gives_its_exit_code() {
        assert_eq!(run(|| Err(Failure::try_later(Unreadable("x")))), Exit::TryLater);
        assert_eq!(run(|| Ok(Exit::Done)), Exit::Done);
    }

    #[derive(Parser)]
    struct Line {
        #[arg(long)]
        number: u8,
    }

    #[test]
    fn a_wrong_command_line_is_a_usage_error_and_help_is_none() {
        let exit = |words: &[&str]| {
            let words = ["program"].iter().chain(words).map(OsString::from);
            with_arguments(words, |line: Line| if line.number == 7 { Ok(Exit::Done) } else { Ok(Exit::TryLater) }).unwrap()
        };
        assert_eq!([exit(&["--number", "7"]), exit(&["--number", "8"])], [Exit::Done, Exit::TryLater]);
        assert_eq!([exit(&[]), exit(&["--number", "x"]), exit(&["--unknown"])], [Exit::Usage; 3]);
        assert_eq!(exit(&["--help"]), Exit::Done);
    }
}
