//! What a miner costs the store at the default polling: requests and bytes of the control plane for each miner-hour.

use std::process::ExitCode;

use quasar_tests::sim::{self, Plan};

/// Mainnet's first settings: ξ = 20 s, 2 s polls.
const STEP_MS: u64 = 20_000;
const POLL_MS: u64 = 2_000;
const MINERS: usize = 20;
const HOURS: u64 = 2;

pub fn run(json: bool) -> ExitCode {
    let mut plan = Plan::calm(1, MINERS, 0);
    plan.parameters = sim::plan::parameters(24, 0, POLL_MS, STEP_MS);
    plan.step_ms = STEP_MS;
    plan.block_ms = 12_000;
    (plan.limit_ms, plan.is_open_ended) = (HOURS * 3_600_000, true);
    let outcome = sim::run(plan);
    let hours = (MINERS as u64 * HOURS) as f64;
    println!("for each miner-hour, at {POLL_MS} ms polling and steps of {} s, without payloads and keyframes:", STEP_MS / 1_000);
    println!("{:<14} {:>8} {:>16} {:>8} {:>14} {:>10}", "by", "GET", "of these empty", "PUT", "received kB", "sent kB");
    let mut rows = Vec::new();
    for (name, traffic) in ["orchestrator", "miner", "validators"].into_iter().zip(outcome.traffic) {
        let each = |count: u64| count as f64 / hours;
        let (gets, empty, puts) = (each(traffic.gets), each(traffic.empty), each(traffic.puts));
        let (received, sent) = (each(traffic.received_bytes) / 1e3, each(traffic.sent_bytes) / 1e3);
        println!("{name:<14} {gets:>8.0} {empty:>16.0} {puts:>8.0} {received:>14.0} {sent:>10.0}");
        rows.push(serde_json::json!({ "by": name, "gets": gets, "empty": empty, "puts": puts, "received_kb": received, "sent_kb": sent }));
    }
    if json {
        println!("{}", serde_json::json!({ "rows": rows, "merges": outcome.merges }));
    }
    ExitCode::SUCCESS
}
