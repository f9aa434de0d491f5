//! The orchestrator: publishes the run, leases data, owns the global state in fragments, merges, releases.
//!
//! [`machine`] holds its rules as a pure state machine; [`effects`] executes them against bucket, chain and disk; [`operator`]
//! holds the commands that open a run; [`devnet`] runs everything on one machine. Training code is never linked here.

pub mod cli;
pub mod devnet;
pub mod effects;
pub mod lease;
pub mod machine;
pub mod office;
pub mod operator;
pub mod serve;
pub mod takeover;
