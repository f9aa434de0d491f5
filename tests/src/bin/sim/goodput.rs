//! Goodput and uptime under the failure model of Decoupled DiLoCo: chips fail independently, once a year each; M learners share N
//! chips, so a learner fails M / N times a year; a failure stops its learner until it has been restarted and has rejoined.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use quasar_tests::sim::{self, Outcome, Plan};

/// One year.
const MTBI_MS: f64 = 365.25 * 24.0 * 3_600_000.0;
/// From a failure to the start of the learner's next process.
const RESTART_MS: u64 = 15_000;
/// Chips, and the paper's goodput in percent with 8 and with 16 learners.
const ROWS: [(u64, u64, u64); 5] = [(150_000, 98, 99), (300_000, 96, 98), (600_000, 94, 96), (1_200_000, 88, 93), (2_400_000, 80, 86)];

#[derive(clap::Args)]
pub struct Goodput {
    /// Virtual minutes of each measurement
    #[arg(long, default_value_t = 120)]
    minutes: u64,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Goodput) -> ExitCode {
    let span_ms = arguments.minutes * 60_000;
    println!("goodput: share of all learners' time in steps that were not lost; uptime: share of time in which some learner steps");
    println!("a failed learner starts again after {} s and then rejoins; steps of 2 s, snapshots every 4 steps", RESTART_MS / 1_000);
    println!("{:>10} {:>3} {:>12} {:>10} {:>8} {:>8} {:>10}", "chips", "M", "failures/h", "goodput %", "paper %", "uptime %", "violations");
    let cases: Vec<(u64, usize, u64)> =
        ROWS.into_iter().flat_map(|(chips, eight, sixteen)| [(chips, 8, eight), (chips, 16, sixteen)]).collect();
    let (mut holds, mut rows) = (true, Vec::new());
    for ((chips, learners, paper), outcome) in cases.iter().zip(measure(&cases, span_ms)) {
        let (goodput, uptime) = (outcome.goodput * 100.0, outcome.uptime * 100.0);
        holds &= goodput.round() as u64 >= *paper && outcome.violations.is_empty();
        let per_hour = 3_600_000.0 / mean_ms(*chips, *learners) as f64 * *learners as f64;
        let violations = outcome.violations.len();
        println!("{chips:>10} {learners:>3} {per_hour:>12.0} {goodput:>10.1} {paper:>8} {uptime:>8.2} {violations:>10}");
        for violation in &outcome.violations {
            println!("  {}: {}", violation.invariant, violation.what);
        }
        let row = serde_json::json!({ "chips": chips, "learners": learners, "goodput": goodput, "paper": paper, "uptime": uptime });
        rows.push(row);
    }
    let (before_ms, after_ms, quorum_ms) = quarter_killed();
    let stall_ms = after_ms.saturating_sub(before_ms);
    holds &= stall_ms == 0 && quorum_ms == 0;
    println!(
        "25 of 100 miners killed at once: longest time between two merges {:.1} s before, {:.1} s after; stall {:.1} s; longest pause without a training learner {:.1} s",
        before_ms as f64 / 1e3,
        after_ms as f64 / 1e3,
        stall_ms as f64 / 1e3,
        quorum_ms as f64 / 1e3,
    );
    if arguments.json {
        println!("{}", serde_json::json!({ "rows": rows, "stall_ms": stall_ms, "holds": holds }));
    }
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Mean time between two failures of one learner.
fn mean_ms(chips: u64, learners: usize) -> u64 {
    (MTBI_MS * learners as f64 / chips as f64) as u64
}

/// One world for each case, side by side.
fn measure(cases: &[(u64, usize, u64)], span_ms: u64) -> Vec<Outcome> {
    let next = AtomicUsize::new(0);
    let outcomes: Mutex<BTreeMap<usize, Outcome>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some((chips, learners, _)) = cases.get(index) else { return };
                    let outcome = sim::run(Plan::failing_learners(*learners, mean_ms(*chips, *learners), RESTART_MS, span_ms));
                    outcomes.lock().unwrap_or_else(PoisonError::into_inner).insert(index, outcome);
                }
            });
        }
    });
    outcomes.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

/// Longest times between merges before and after, and the longest pause in which nobody trained.
fn quarter_killed() -> (u64, u64, u64) {
    let outcome = sim::run(Plan::quarter_killed(100, 1_200_000));
    (outcome.longest_stall_before_ms, outcome.longest_stall_ms, outcome.longest_idle_ms)
}
