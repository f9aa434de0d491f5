//! What `quasar-orchestrator cost` computes against what a simulated run sends.

use quasar_orchestrator::operator::cost::{Scale, of_a_day};
use quasar_tests::requests::{MINER_HOURS, MINERS, STEP_MS, measured, plan};

/// By how much a sum may be off.
const TOLERANCE: f64 = 0.12;

#[test]
fn computed_requests_are_those_that_a_simulated_run_sends() {
    let (plan, measured) = (plan(), measured());
    assert!(measured.violations.is_empty(), "{:?}", measured.violations);
    let scale = Scale {
        miners: MINERS as u64,
        learners: 1,
        validators: plan.validators as u64,
        // Objects of one request each, as those of the simulation are.
        elements: 1 << 20,
        step_s: STEP_MS as f64 / 1e3,
    };
    let computed = of_a_day(&plan.parameters, &scale);
    let roles = [("orchestrator", computed.orchestrator), ("miners", computed.learners), ("validators", computed.validators)];
    for ((role, computed), counted) in roles.into_iter().zip(measured.traffic) {
        for (what, computed, counted) in [("PUT", computed.puts, counted.puts), ("GET", computed.gets, counted.gets)] {
            let (computed, counted) = (computed / 24.0 / MINERS as f64, counted as f64 / MINER_HOURS);
            println!("{role:<12} {what}: {computed:.0} computed, {counted:.0} counted for each miner-hour");
            assert!((computed / counted - 1.0).abs() < TOLERANCE, "{role} {what}: {computed} computed, {counted} counted");
        }
    }
}
