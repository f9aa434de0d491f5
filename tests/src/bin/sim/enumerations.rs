//! One small run, once for each point at which something can fail.

use std::process::ExitCode;
use std::time::Instant;

use quasar_tests::sim::{self, Boundary, CrashPoint, FailingRequest, Outcome, Plan};

use crate::worlds::live;

/// Which small run is gone through, point by point.
#[derive(clap::Args)]
struct Small {
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value_t = 3)]
    miners: usize,
    /// The run that an operator has a hand in: shards join, a ban, releases, a rollback, an early end
    #[arg(long)]
    operated: bool,
    /// Each so many-th point only
    #[arg(long, default_value_t = 1)]
    every: usize,
    /// This point only; 0 is the run in which nothing fails
    #[arg(long)]
    point: Option<u64>,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

impl Small {
    fn plan(&self) -> Plan {
        if self.operated { sim::operated(self.seed, self.miners) } else { sim::small(self.seed, self.miners) }
    }

    /// The run without a failure, then one for each point up to the last that it has; gives their numbers, and violations.
    fn enumerate(
        &self,
        command: &str,
        last: impl Fn(&Outcome) -> u64,
        run: impl Fn(Plan, u64) -> Outcome,
    ) -> (Option<Outcome>, u64, usize) {
        let plan = self.plan();
        let replay = |point: u64| {
            let operated = if self.operated { " --operated" } else { "" };
            format!("cargo xtask sim {command}{operated} --seed {} --miners {} --point {point}", self.seed, self.miners)
        };
        let whole = live(|| sim::run(plan.clone()));
        let (mut points, mut violations) = (0, whole.violations().len());
        whole.tell_if_failed(self.seed, &replay(0));
        // One that did not come to its end says nothing of how many points there are.
        let last = whole.outcome().map_or(0, last);
        let (first, last) = self.point.map_or((1, last), |point| (point, point.min(last)));
        for count in (first.max(1)..=last).step_by(self.every.max(1)) {
            let world = live(|| run(plan.clone(), count));
            points += 1;
            violations += world.violations().len();
            world.tell_if_failed(self.seed, &replay(count));
        }
        (whole.outcome().cloned(), points, violations)
    }
}

#[derive(clap::Args)]
pub struct CrashPoints {
    #[command(flatten)]
    small: Small,
    /// Crash after each object that is written or deleted, not only after each effect
    #[arg(long)]
    writes: bool,
    /// Each crash takes the disk along: the next process has the bucket alone
    #[arg(long)]
    lose_disk: bool,
}

pub fn crash_points(arguments: &CrashPoints) -> ExitCode {
    let begun = Instant::now();
    let (writes, disk) = (if arguments.writes { " --writes" } else { "" }, if arguments.lose_disk { " --lose-disk" } else { "" });
    let boundary = if arguments.writes { Boundary::Write } else { Boundary::Effect };
    let (whole, points, violations) = arguments.small.enumerate(
        &format!("crash-points{writes}{disk}"),
        |whole| if arguments.writes { whole.writes } else { whole.effects },
        |plan, count| sim::run_crashing(plan, CrashPoint { boundary, count, loses_disk: arguments.lose_disk }),
    );
    let (effects, writes, merges) = whole.map_or((0, 0, 0), |whole| (whole.effects, whole.writes, whole.merges));
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{points} crash points of a run of {effects} effects, {writes} writes and {merges} merges: {violations} violations, {seconds:.1} s"
    );
    if arguments.small.json {
        println!(
            "{}",
            serde_json::json!({ "points": points, "effects": effects, "writes": writes, "violations": violations, "seconds": seconds })
        );
    }
    if violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[derive(clap::Args)]
pub struct FailingRequests {
    #[command(flatten)]
    small: Small,
    /// Each write and deletion fails, not each read
    #[arg(long)]
    writes: bool,
    /// What fails is done, and nobody hears of it
    #[arg(long)]
    done: bool,
}

pub fn failing_requests(arguments: &FailingRequests) -> ExitCode {
    let begun = Instant::now();
    let FailingRequests { small, writes: is_write, done: is_done } = arguments;
    let kind = format!("{}{}", if *is_write { " --writes" } else { "" }, if *is_done { " --done" } else { "" });
    let (whole, points, violations) = small.enumerate(
        &format!("failing-requests{kind}"),
        |whole| whole.requests[usize::from(*is_write)],
        |plan, count| sim::run_failing(plan, FailingRequest { is_write: *is_write, count, is_done: *is_done }),
    );
    let ([reads, writes], merges) = whole.map_or(([0; 2], 0), |whole| (whole.requests, whole.merges));
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{points} failing requests in a run of {reads} reads, {writes} writes and {merges} merges: {violations} violations, {seconds:.1} s"
    );
    if small.json {
        println!(
            "{}",
            serde_json::json!({ "points": points, "reads": reads, "writes": writes, "violations": violations, "seconds": seconds })
        );
    }
    if violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
