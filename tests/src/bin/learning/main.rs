//! Does merging pay? Three learners with decoupled merges, one learner alone, and data-parallel training, on the devnet's
//! model, text and settings, over several seeds; and the speed of a training step beside PyTorch's.
//!
//! `cargo xtask bench learning` runs this. Everything happens in this process, with the crates that the daemons are made of:
//! no bucket, no signatures, no waiting. What the numbers mean is in `docs/benchmarks.md`.

mod arms;
mod report;
mod speed;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use quasar_tests::training::setting::Setting;
use report::Report;

/// Compare three learners with decoupled merges to one alone and to data-parallel training
#[derive(Debug, Parser)]
#[command(name = "learning", after_help = "Exit code 1: a claim does not hold. Set QUASAR_DEV_PYTHON to name a Python with torch.")]
struct Arguments {
    /// Runs of each kind, with other initial weights and another order of the text each
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: u64,
    /// Length of a run: every fragment is merged this often
    #[arg(long, value_name = "C", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1000))]
    cycles: u64,
    /// Print the results as one JSON object too, the last line on standard output
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match bench(&arguments) {
        Ok(report) => {
            print!("{}", report.table());
            if arguments.json {
                println!("{}", report.json());
            }
            if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> anyhow::Result<Report> {
    let start = Instant::now();
    model::tune_allocator();
    let setting = Setting::prepare(arguments.cycles, "configs/devnet-model.json", None)?;
    // First, while nothing else of ours computes.
    let speed = speed::measure(&setting)?;
    let mut runs = Vec::new();
    for seed in 1..=arguments.seeds {
        let run = arms::run(&setting, seed)?;
        eprintln!("{}", report::line(&run));
        runs.push(run);
    }
    Ok(Report {
        cycles: arguments.cycles,
        steps: setting.steps,
        held_out_rows: setting.held_out.count(),
        runs,
        speed,
        elapsed: start.elapsed(),
    })
}
