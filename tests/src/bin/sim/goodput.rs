//! Goodput and uptime under the failure model of Decoupled DiLoCo: chips fail independently, once a year each; M learners share N
//! chips, so a learner fails M / N times a year; a failure stops its learner until it has been restarted and has rejoined.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use protocol::schedule::pull_interval_ms;
use quasar_tests::sim::{self, Plan};

use crate::worlds::{World, live};

/// One year.
const MTBI_MS: f64 = 365.25 * 24.0 * 3_600_000.0;
/// Chips, and the paper's goodput in percent with 8 and with 16 learners.
const ROWS: [(u64, u64, u64); 5] = [(150_000, 98, 99), (300_000, 96, 98), (600_000, 94, 96), (1_200_000, 88, 93), (2_400_000, 80, 86)];

#[derive(clap::Args)]
pub struct Goodput {
    /// Virtual minutes of each measurement
    #[arg(long, default_value_t = 120)]
    minutes: u64,
    /// Seconds from a failure to the start of the learner's next process
    #[arg(long, default_value_t = 15)]
    restart_sec: u64,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Goodput) -> ExitCode {
    let (span_ms, restart_ms) = (arguments.minutes * 60_000, arguments.restart_sec * 1_000);
    println!("goodput: share of all learners' time in steps that were not lost; uptime: share of time in which some learner steps");
    println!("a failed learner starts again after {} s and then rejoins; steps of 2 s, snapshots every 4 steps", arguments.restart_sec);
    println!(
        "{:>10} {:>3} {:>10} {:>8} {:>10} {:>8} {:>8} {:>10}",
        "chips", "M", "expected", "failed", "goodput %", "paper %", "uptime %", "violations"
    );
    let cases: Vec<(u64, usize, u64)> =
        ROWS.into_iter().flat_map(|(chips, eight, sixteen)| [(chips, 8, eight), (chips, 16, sixteen)]).collect();
    let (mut holds, mut rows) = (true, Vec::new());
    for ((chips, learners, paper), world) in cases.iter().zip(measure(&cases, span_ms, restart_ms)) {
        let (goodput, uptime) = world.outcome().map_or((0.0, 0.0), |outcome| (outcome.goodput * 100.0, outcome.uptime * 100.0));
        holds &= goodput >= *paper as f64 && uptime >= 100.0 && !world.has_failed();
        let failed = world.outcome().map_or(0, |outcome| outcome.miner_crashes);
        let expected = span_ms as f64 / mean_ms(*chips, *learners) as f64 * *learners as f64;
        let violations = world.violations();
        println!(
            "{chips:>10} {learners:>3} {expected:>10.0} {failed:>8} {goodput:>10.1} {paper:>8} {uptime:>8.2} {:>10}",
            violations.len()
        );
        for violation in violations {
            println!("  {violation}");
        }
        let row = serde_json::json!({
            "chips": chips, "learners": learners, "failed": failed, "goodput": goodput, "paper": paper, "uptime": uptime
        });
        rows.push(row);
    }
    let quarter = quarter_killed();
    holds &= quarter.goes_on() && quarter.idle_ms == 0;
    println!(
        "25 of 100 miners killed at once: longest time in which nobody trained {:.1} s; longest time between two merges {:.1} s before, {:.1} s after",
        quarter.idle_ms as f64 / 1e3,
        quarter.before_ms as f64 / 1e3,
        quarter.after_ms as f64 / 1e3,
    );
    println!("{} merges in it; H ξ / P allows {} pulls", quarter.merges, quarter.pulls);
    for violation in &quarter.violations {
        println!("  {violation}");
    }
    if arguments.json {
        println!("{}", serde_json::json!({ "rows": rows, "stall_ms": quarter.idle_ms, "holds": holds }));
    }
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Mean time between two failures of one learner.
fn mean_ms(chips: u64, learners: usize) -> u64 {
    (MTBI_MS * learners as f64 / chips as f64) as u64
}

/// One world for each case, side by side.
fn measure(cases: &[(u64, usize, u64)], span_ms: u64, restart_ms: u64) -> Vec<World> {
    let next = AtomicUsize::new(0);
    let worlds: Mutex<BTreeMap<usize, World>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some((chips, learners, _)) = cases.get(index) else { return };
                    let plan = Plan::failing_learners(*learners, mean_ms(*chips, *learners), restart_ms, span_ms);
                    let world = live(|| sim::run(plan));
                    worlds.lock().unwrap_or_else(PoisonError::into_inner).insert(index, world);
                }
            });
        }
    });
    worlds.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

/// The run in which a quarter of the miners is killed half-way.
struct Quarter {
    violations: Vec<String>,
    /// Longest times between two merges before and after.
    before_ms: u64,
    after_ms: u64,
    /// Longest pause in which nobody trained.
    idle_ms: u64,
    merges: u64,
    /// Pulls that the schedule allows in this time.
    pulls: u64,
}

impl Quarter {
    /// Merges that stop for good end no time between two of them: then there are about half as many as pulls.
    fn goes_on(&self) -> bool {
        self.violations.is_empty() && self.merges * 4 >= self.pulls * 3
    }
}

fn quarter_killed() -> Quarter {
    let plan = Plan::quarter_killed(100, 1_200_000);
    let pulls = plan.limit_ms / pull_interval_ms(&plan.parameters, plan.step_ms);
    let world = live(|| sim::run(plan));
    let [before_ms, after_ms, idle_ms, merges] = world
        .outcome()
        .map_or([0; 4], |outcome| [outcome.longest_stall_before_ms, outcome.longest_stall_ms, outcome.longest_idle_ms, outcome.merges]);
    Quarter { violations: world.violations(), before_ms, after_ms, idle_ms, merges, pulls }
}
