//! The miner of a Quasar training run.
//!
//! One process serves one hotkey with one learner for each device. A learner is a pure machine ([`machine`]), an edge that
//! executes its effects ([`edge`]), and a thread that trains ([`trainer`]); [`session`] runs the three together and [`run`]
//! starts a session for each device on whatever run is current.

pub mod cli;
mod commands;
pub mod device;
pub mod edge;
pub mod machine;
pub mod run;
pub mod session;
pub mod trainer;

#[cfg(test)]
mod tests;
