//! What a miner costs the store at the default polling: requests and bytes of the control plane for each miner-hour.

use std::process::ExitCode;

use quasar_tests::requests::{MINER_HOURS, POLL_MS, STEP_MS, measured};

pub fn run(json: bool) -> ExitCode {
    let outcome = measured();
    println!("for each miner-hour, at {POLL_MS} ms polling and steps of {} s, without payloads and keyframes:", STEP_MS / 1_000);
    println!("{:<14} {:>8} {:>16} {:>8} {:>14} {:>10}", "by", "GET", "of these empty", "PUT", "received kB", "sent kB");
    let mut rows = Vec::new();
    for (name, traffic) in ["orchestrator", "miner", "validators"].into_iter().zip(outcome.traffic) {
        let each = |count: u64| count as f64 / MINER_HOURS;
        let (gets, empty, puts) = (each(traffic.gets), each(traffic.empty), each(traffic.puts));
        let (received, sent) = (each(traffic.received_bytes) / 1e3, each(traffic.sent_bytes) / 1e3);
        println!("{name:<14} {gets:>8.0} {empty:>16.0} {puts:>8.0} {received:>14.0} {sent:>10.0}");
        rows.push(serde_json::json!({ "by": name, "gets": gets, "empty": empty, "puts": puts, "received_kb": received, "sent_kb": sent }));
    }
    if json {
        println!("{}", serde_json::json!({ "rows": rows, "merges": outcome.merges }));
    }
    for violation in &outcome.violations {
        println!("  {violation}");
    }
    if outcome.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
