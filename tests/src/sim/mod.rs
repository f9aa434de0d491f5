//! The simulation: every role's real machine, the bucket, the chain and all that can go wrong, in one thread on a virtual clock.
//!
//! ```text
//!            plan (seed)                                   watch (invariants)
//!                │                                             ▲ every object written, every batch handled
//!   weather ──► world ──► executor (virtual time)              │
//!                │
//!   orchestrator, learners, validators: the programs' own machines; thin edges
//!                │
//!               net (latency, losses, repetition) ──► storage::MemoryStore, MemoryGrants · chain::MemoryChain
//! ```
//!
//! The machines, the documents, the store's semantics and the grants are those of the programs. What is simulated are the
//! edges, which do the same operations on the bucket in the same order, with the same retries; and tensors, for which digests
//! stand ([`tensors`]). The same seed gives the same world, event by event.

mod books;
mod ear;
pub mod executor;
mod learner;
mod net;
mod orchestrator;
pub mod paper;
pub mod plan;
pub mod random;
mod spool;
mod tensors;
mod validator;
pub mod watch;
mod weather;
mod world;

use std::rc::Rc;

pub use net::Traffic;
pub use orchestrator::{Boundary, CrashPoint};
pub use plan::{Behaviour, Faults, Plan};
pub use watch::{INVARIANTS, Violation};
pub use world::{Outcome, World, run};

/// A small run in which nothing fails by itself: what crash points are enumerated on.
pub fn small(seed: u64, miners: usize) -> Plan {
    let mut plan = Plan::calm(seed, miners, 2);
    plan.parameters = plan::parameters(4, 2, 1_000, plan.step_ms);
    (plan.validators, plan.snapshot_every) = (1, 60);
    plan
}

/// Runs a world whose orchestrator dies at `point`, before it hears of what it did there, and is started again.
pub fn run_crashing(plan: Plan, point: CrashPoint) -> Outcome {
    let world: Rc<World> = World::new(plan);
    world.orchestrators[0].borrow_mut().crash_point = Some(point);
    world.live()
}
