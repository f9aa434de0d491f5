//! What can go wrong, told as two lines: what happened, and what to do about it.

use std::fmt;
use std::path::Path;

/// A failure of a developer command. Every one carries a hint.
#[derive(Debug)]
pub struct Error {
    message: String,
    hint: String,
    exit_code: u8,
}

impl Error {
    /// The command could not do its work (exit code 1).
    pub fn failed(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into(), exit_code: 1 }
    }

    /// The command line makes no sense (exit code 64, as for the daemons).
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into(), exit_code: 64 }
    }

    /// The machine lacks something that a person must install (exit code 78, as for the daemons).
    pub fn configuration(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into(), exit_code: 78 }
    }

    /// An operation on a file failed.
    pub fn io(what: &str, path: impl AsRef<Path>, cause: std::io::Error) -> Self {
        let hint = match cause.kind() {
            std::io::ErrorKind::PermissionDenied => "check who owns the folder, and run as that user",
            std::io::ErrorKind::StorageFull => "free some disk space (setup needs about 1.2 GB) and run the command again",
            _ => "run the command again; if it stays, look at the path",
        };
        Self::failed(format!("{what} {}: {cause}", path.as_ref().display()), hint)
    }

    /// The process exit code.
    pub fn exit_code(&self) -> u8 {
        self.exit_code
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "error: {}\nhint: {}", self.message, self.hint)
    }
}
