//! The miner of a Quasar training run.
//!
//! One process serves one hotkey with one learner for each device. A learner is a pure machine ([`machine`]), an edge that
//! executes its effects ([`edge`]), and a thread that trains ([`trainer`]); [`session`] runs the three together and [`run`]
//! starts a session for each device on whatever run is current.

#[cfg(feature = "libtorch")]
pub mod cli;
#[cfg(feature = "libtorch")]
mod commands;
#[cfg(feature = "libtorch")]
pub mod device;
pub mod edge;
mod host;
pub mod machine;
#[cfg(feature = "libtorch")]
pub mod run;
pub mod session;
pub mod trainer;

#[cfg(test)]
mod tests;
