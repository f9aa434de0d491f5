//! What the three daemons share: configuration, journal, driver, telemetry, health, supervision by systemd, signals and exit codes.
//!
//! This is the only crate that reads the environment and parses configuration. The daemons' rules live in pure machines
//! ([`Machine`]); [`driver`] runs one against the world and [`journal`] remembers every input, so that a crash at any point is
//! a restart and not a special case.

pub mod clock;
pub mod driver;
pub mod evidence;
pub mod exit;
pub mod files;
pub mod health;
pub mod identity;
pub mod inspect;
pub mod journal;
pub mod machine;
pub mod network;
pub mod retry;
pub mod seen;
pub mod sequence;
pub mod settings;
pub mod shutdown;
pub mod supervisor;
pub mod telemetry;
pub mod waiting;

pub use driver::{Driver, DriverError, DriverOptions, Executor};
pub use exit::{Exit, Failure};
pub use journal::{Journal, JournalError};
pub use machine::Machine;
pub use settings::{Role, Settings};
pub use shutdown::Shutdown;
pub use waiting::Waiting;
