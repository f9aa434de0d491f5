//! Many seeds, one world each, on as many threads as there are cores.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use quasar_tests::sim::{self, Outcome, Plan};

use crate::SchemeName;
use crate::worlds::{World, live};

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

pub fn run(seeds: &Seeds) -> ExitCode {
    let begun = Instant::now();
    let next = AtomicU64::new(0);
    let worlds: Mutex<Vec<(u64, World)>> = Mutex::new(Vec::new());
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
                    let world = live(|| sim::run(seeds.plan(seed)));
                    world.tell_if_failed(seed, &seeds.replay(seed));
                    worlds.lock().unwrap_or_else(PoisonError::into_inner).push((seed, world));
                }
            });
        }
    });
    let seconds = begun.elapsed().as_secs_f64();
    let mut worlds = worlds.into_inner().unwrap_or_else(PoisonError::into_inner);
    worlds.sort_by_key(|(seed, _)| *seed);
    let failed: Vec<u64> = worlds.iter().filter(|(_, world)| world.has_failed()).map(|(seed, _)| *seed).collect();
    let violations: usize = worlds.iter().map(|(_, world)| world.violations().len()).sum();
    let sum = |of: fn(&Outcome) -> u64| worlds.iter().filter_map(|(_, world)| world.outcome()).map(of).sum::<u64>();
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
    if let [(seed, world)] = worlds.as_slice()
        && let Some(outcome) = world.outcome()
    {
        println!(
            "seed {seed}: trace {:016x}, model {}, {} s of virtual time",
            outcome.trace,
            outcome.model.short(),
            outcome.virtual_ms / 1_000
        );
        if !outcome.violations.is_empty() {
            println!("{:#}", serde_json::json!(outcome.status));
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
