//! The validator of a Quasar training run.
//!
//! It believes nobody: it reads the public merge manifests and checks them again ([`machine`]), audits what the chain's beacon
//! gives it ([`audit`]), publishes signed verdicts and sets weights from what was merged and not disproved. [`effects`] does what
//! the machine decides; [`run`] brings both to a run and on to the next one.

pub mod audit;
#[cfg(feature = "libtorch")]
pub mod cli;
#[cfg(feature = "libtorch")]
mod commands;
pub mod effects;
pub mod machine;
#[cfg(feature = "libtorch")]
pub mod run;
