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

use protocol::documents::Action;

pub use net::{FailingRequest, Traffic};
pub use orchestrator::{Boundary, CrashPoint};
pub use plan::{Ban, Behaviour, Faults, Permit, Plan};
pub use watch::{INVARIANTS, Violation};
pub use world::{Outcome, World, run};

/// A small run in which nothing fails by itself: what crash points are enumerated on.
pub fn small(seed: u64, miners: usize) -> Plan {
    let mut plan = Plan::calm(seed, miners, 2);
    plan.parameters = plan::parameters(4, 2, 1_000, plan.step_ms);
    (plan.validators, plan.snapshot_every) = (1, 60);
    plan
}

/// A small run that an operator has a hand in: shards join, a hotkey is banned for a while, there are releases, a rollback and, before
/// its time, the end; and so many versions that old ones are deleted. Nothing fails by itself.
pub fn operated(seed: u64, miners: usize) -> Plan {
    let mut plan = small(seed, miners);
    plan.parameters = plan::parameters(2, 20, 1_000, plan.step_ms);
    plan.parameters.release_every_cycles = 4;
    let shards = vec!["added".to_owned()];
    plan.orders = vec![
        (10_000, Action::AddShards { shards }),
        (30_000, Action::Release),
        (100_000, Action::Rollback { version: 4 }),
        (200_000, Action::Drain),
    ];
    plan.bans = vec![Ban { miner: 0, banned_ms: 20_000, unbanned_ms: Some(50_000) }];
    plan
}

/// Runs a world in which one request of the orchestrator fails.
pub fn run_failing(plan: Plan, request: FailingRequest) -> Outcome {
    let world: Rc<World> = World::new(plan);
    world.net.borrow_mut().failing = Some(request);
    world.live()
}

/// Runs a world whose orchestrator dies at `point`, before it hears of what it did there, and is started again.
pub fn run_crashing(plan: Plan, point: CrashPoint) -> Outcome {
    let world: Rc<World> = World::new(plan);
    world.orchestrators[0].borrow_mut().crash_point = Some(point);
    world.live()
}
