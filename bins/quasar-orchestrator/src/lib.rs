//! The orchestrator: publishes the run, leases data, owns the global state in fragments, merges, releases.

pub mod machine;
