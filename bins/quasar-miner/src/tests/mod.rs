//! A learner against a made-up orchestrator on virtual time: its real machine, its real trainer thread's work (with the toy
//! model), its real spool; no network, no clock. And its edge against a real object server.

mod audits;
mod faults;
mod learning;
mod looks;
pub(crate) mod published;
pub(crate) mod world;
