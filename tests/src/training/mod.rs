//! Training with merges in one process, with the crates that the daemons are made of: what `cargo xtask bench learning` and
//! `cargo xtask bench experiments` have in common. No bucket, no signatures, no waiting.

pub mod attack;
pub mod server;
pub mod setting;
pub mod swarm;
