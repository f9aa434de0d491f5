//! Goodput and uptime under the failure model of Decoupled DiLoCo: chips fail independently, once a year each; M learners share N
//! chips, so a learner fails M / N times a year; a failure stops its learner until it has been restarted and has rejoined.

use std::process::ExitCode;

use quasar_tests::sim::{self, Plan};

/// One year.
const MTBI_MS: f64 = 365.25 * 24.0 * 3_600_000.0;
/// From a failure to the start of the learner's next process.
pub const RESTART_MS: u64 = 15_000;
/// Duration of an inner step.
const STEP_MS: u64 = 2_000;
/// Chips, and the paper's goodput in percent with 8 and with 16 learners.
const ROWS: [(u64, u64, u64); 5] =
    [(150_000, 98, 99), (300_000, 96, 98), (600_000, 94, 96), (1_200_000, 88, 93), (2_400_000, 80, 86)];
/// Virtual time of one measurement.
const SPAN_MS: u64 = 4 * 3_600_000;

pub fn run(json: bool) -> ExitCode {
    println!("goodput: share of all learners' time in steps that were not lost; uptime: share of time in which some learner steps");
    println!("a failed learner starts again after {} s and then rejoins; steps of {} s, snapshots every 4 steps", RESTART_MS / 1_000, STEP_MS / 1_000);
    println!("{:>10} {:>3} {:>12} {:>10} {:>8} {:>8} {:>10}", "chips", "M", "failures/h", "goodput %", "paper %", "uptime %", "violations");
    let (mut holds, mut rows) = (true, Vec::new());
    for (chips, eight, sixteen) in ROWS {
        for (learners, paper) in [(8, eight), (16, sixteen)] {
            let mean_ms = (MTBI_MS * learners as f64 / chips as f64) as u64;
            let outcome = sim::run(plan(learners, mean_ms));
            let (goodput, uptime) = (outcome.goodput * 100.0, outcome.uptime * 100.0);
            holds &= goodput.round() as u64 >= paper && outcome.violations.is_empty();
            let per_hour = 3_600_000.0 / mean_ms as f64 * learners as f64;
            println!(
                "{chips:>10} {learners:>3} {per_hour:>12.0} {goodput:>10.1} {paper:>8} {uptime:>8.2} {:>10}",
                outcome.violations.len()
            );
            for violation in &outcome.violations {
                println!("  {}: {}", violation.invariant, violation.what);
            }
            rows.push(serde_json::json!({
                "chips": chips, "learners": learners, "goodput": goodput, "paper": paper, "uptime": uptime
            }));
        }
    }
    let (before_ms, after_ms, quorum_ms) = quarter_killed();
    let stall_ms = after_ms.saturating_sub(before_ms);
    println!(
        "25 of 100 miners killed at once: longest time between two merges {:.1} s before, {:.1} s after; stall {:.1} s; longest pause without a training learner {:.1} s",
        before_ms as f64 / 1e3,
        after_ms as f64 / 1e3,
        stall_ms as f64 / 1e3,
        quorum_ms as f64 / 1e3,
    );
    if json {
        println!("{}", serde_json::json!({ "rows": rows, "stall_ms": stall_ms, "holds": holds }));
    }
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A world in which only learners fail.
fn plan(learners: usize, mean_ms: u64) -> Plan {
    let mut plan = Plan::calm(1, learners, 0);
    plan.parameters = sim::plan::parameters(24, 0, 1_000, STEP_MS);
    plan.step_ms = STEP_MS;
    plan.validators = 1;
    plan.block_ms = 12_000;
    plan.faults.until_ms = SPAN_MS;
    plan.faults.miner_crash_ms = mean_ms;
    plan.faults.restart_ms = Some(RESTART_MS);
    (plan.limit_ms, plan.is_open_ended) = (SPAN_MS, true);
    plan
}

/// Longest times between merges before and after, and the longest pause in which nobody trained.
fn quarter_killed() -> (u64, u64, u64) {
    let mut plan = Plan::calm(1, 100, 0);
    (plan.limit_ms, plan.is_open_ended) = (1_200_000, true);
    plan.kill_quarter_ms = Some(600_000);
    let outcome = sim::run(plan);
    (outcome.longest_stall_before_ms, outcome.longest_stall_ms, outcome.longest_idle_ms)
}
