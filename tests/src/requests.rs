//! The world in which the requests of each role are counted: mainnet's first settings, ξ = 20 s and polls of 2 s, without faults.

use crate::sim::{self, Outcome, Plan};

pub const STEP_MS: u64 = 20_000;
pub const POLL_MS: u64 = 2_000;
pub const MINERS: usize = 20;
const HOURS: u64 = 2;

/// Miner-hours of the world.
pub const MINER_HOURS: f64 = (MINERS as u64 * HOURS) as f64;

pub fn plan() -> Plan {
    let mut plan = Plan::calm(1, MINERS, 0);
    plan.parameters = sim::plan::parameters(24, 0, POLL_MS, STEP_MS);
    plan.step_ms = STEP_MS;
    plan.block_ms = 12_000;
    (plan.limit_ms, plan.is_open_ended) = (HOURS * 3_600_000, true);
    plan
}

/// What the orchestrator, the miners and the validators sent in it, in this order.
pub fn measured() -> Outcome {
    sim::run(plan())
}
