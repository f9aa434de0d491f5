//! Many seeds, one world each, on as many threads as there are cores; and one seed, crashed everywhere.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use quasar_tests::sim::{self, Boundary, CrashPoint, Outcome, Plan, Violation};

use crate::SchemeName;

#[derive(clap::Args)]
pub struct Seeds {
    /// Number of worlds
    #[arg(long, default_value_t = 50)]
    seeds: u64,
    #[arg(long, default_value_t = 1)]
    first_seed: u64,
    #[arg(long, default_value_t = 50)]
    miners: usize,
    /// Merges of each fragment
    #[arg(long, default_value_t = 3)]
    cycles: u64,
    /// How documents are signed: by a hash, or as in production
    #[arg(long, value_enum, default_value = "cheap")]
    scheme: SchemeName,
    /// Worlds at the same time; all cores if it is not given
    #[arg(long)]
    threads: Option<usize>,
    /// Print every event of every world
    #[arg(long)]
    verbose: bool,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

impl Seeds {
    fn plan(&self, seed: u64) -> Plan {
        Plan { scheme: self.scheme.into(), is_verbose: self.verbose, ..Plan::of_seed(seed, self.miners, self.cycles) }
    }

    fn replay(&self, seed: u64) -> String {
        let scheme = match self.scheme {
            SchemeName::Cheap => "",
            SchemeName::Ed25519 => " --scheme ed25519",
        };
        format!("cargo xtask sim --seeds 1 --first-seed {seed} --miners {} --cycles {}{scheme}", self.miners, self.cycles)
    }
}

fn tell(seed: u64, violations: &[Violation], replay: &str) {
    for violation in violations {
        let at_s = violation.at_ms as f64 / 1e3;
        println!("seed {seed}: {} at {at_s:.3} s: {}", violation.invariant, violation.what);
    }
    println!("replay: {replay}");
}

pub fn run(seeds: &Seeds) -> ExitCode {
    let begun = Instant::now();
    let next = AtomicU64::new(0);
    let outcomes: Mutex<Vec<(u64, Outcome)>> = Mutex::new(Vec::new());
    let threads = seeds.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= seeds.seeds {
                        return;
                    }
                    let seed = seeds.first_seed + index;
                    let outcome = sim::run(seeds.plan(seed));
                    if !outcome.violations.is_empty() {
                        tell(seed, &outcome.violations, &seeds.replay(seed));
                    }
                    if let Ok(mut outcomes) = outcomes.lock() {
                        outcomes.push((seed, outcome));
                    }
                }
            });
        }
    });
    let seconds = begun.elapsed().as_secs_f64();
    let mut outcomes = outcomes.into_inner().unwrap_or_default();
    outcomes.sort_by_key(|(seed, _)| *seed);
    let failed: Vec<u64> = outcomes.iter().filter(|(_, outcome)| !outcome.violations.is_empty()).map(|(seed, _)| *seed).collect();
    let violations: usize = outcomes.iter().map(|(_, outcome)| outcome.violations.len()).sum();
    let sum = |of: fn(&Outcome) -> u64| outcomes.iter().map(|(_, outcome)| of(outcome)).sum::<u64>();
    println!(
        "{} worlds of {} miners, {} cycles: {} events, {} merges of {} contributions, {} crashes of the orchestrator, {} with its disk, \
         {} takeovers, {} processes fenced",
        seeds.seeds,
        seeds.miners,
        seeds.cycles,
        sum(|outcome| outcome.events),
        sum(|outcome| outcome.merges),
        sum(|outcome| outcome.contributions),
        sum(|outcome| outcome.crashes),
        sum(|outcome| outcome.lost_disks),
        sum(|outcome| outcome.takeovers),
        sum(|outcome| outcome.fenced),
    );
    println!("{seconds:.1} s on {threads} threads, {:.2} worlds a second; {violations} violations", seeds.seeds as f64 / seconds);
    if let [(seed, outcome)] = outcomes.as_slice() {
        println!(
            "seed {seed}: trace {:016x}, model {}, {} s of virtual time",
            outcome.trace,
            outcome.model.short(),
            outcome.virtual_ms / 1_000
        );
        if !outcome.violations.is_empty() {
            println!("{:#}", outcome.status);
            outcome.miners.iter().for_each(|miner| println!("{miner}"));
        }
        println!("verdicts: {:?}; longest time between two merges {} ms", outcome.verdicts, outcome.longest_stall_ms);
    }
    if seeds.json {
        let summary = serde_json::json!({ "seeds": seeds.seeds, "violations": violations, "seconds": seconds, "failed_seeds": failed });
        println!("{summary}");
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[derive(clap::Args)]
pub struct CrashPoints {
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value_t = 3)]
    miners: usize,
    /// Crash at each so many-th boundary only
    #[arg(long, default_value_t = 1)]
    every: u64,
    /// Crash at this boundary only
    #[arg(long)]
    point: Option<u64>,
    /// Crash after each object that is written or deleted, not only after each effect
    #[arg(long)]
    writes: bool,
    /// Each crash takes the disk along: the next process has the bucket alone
    #[arg(long)]
    lose_disk: bool,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

pub fn crash_points(arguments: &CrashPoints) -> ExitCode {
    let begun = Instant::now();
    let plan = sim::small(arguments.seed, arguments.miners);
    let whole = sim::run(plan.clone());
    let (mut points, mut violations) = (0, whole.violations.len());
    arguments.tell_if_any(0, &whole);
    let (boundary, last) = if arguments.writes { (Boundary::Write, whole.writes) } else { (Boundary::Effect, whole.effects) };
    let (first, last) = arguments.point.map_or((1, last), |point| (point, point));
    for count in (first..=last).step_by(arguments.every.max(1) as usize) {
        let point = CrashPoint { boundary, count, loses_disk: arguments.lose_disk };
        let outcome = sim::run_crashing(plan.clone(), point);
        points += 1;
        violations += outcome.violations.len();
        arguments.tell_if_any(count, &outcome);
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{points} crash points of a run of {} effects, {} writes and {} merges: {violations} violations, {seconds:.1} s",
        whole.effects, whole.writes, whole.merges
    );
    if arguments.json {
        println!(
            "{}",
            serde_json::json!({ "points": points, "effects": whole.effects, "writes": whole.writes, "violations": violations, "seconds": seconds })
        );
    }
    if violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl CrashPoints {
    /// Point 0 is the run without a crash.
    fn tell_if_any(&self, point: u64, outcome: &Outcome) {
        if !outcome.violations.is_empty() {
            let (writes, disk) = (if self.writes { " --writes" } else { "" }, if self.lose_disk { " --lose-disk" } else { "" });
            let (seed, miners) = (self.seed, self.miners);
            let replay = format!("cargo xtask sim crash-points --seed {seed} --miners {miners} --point {point}{writes}{disk}");
            tell(seed, &outcome.violations, &replay);
        }
    }
}
