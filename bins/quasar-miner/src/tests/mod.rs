//! A learner against a made-up orchestrator on virtual time: its real machine, its real trainer thread's work (with the toy
//! model), its real spool; no network, no clock.

mod audits;
mod faults;
mod learning;
pub(crate) mod world;
