//! The simulation's command line: `cargo xtask sim`.
//!
//! ```text
//! sim [--seeds N] [--first-seed S] [--miners M] [--cycles C] [--scheme cheap|ed25519] [--threads T] [--json]
//! sim goodput | requests                     measurements of docs/reliability.md
//! sim crash-points | failing-requests        enumerations of a small run
//! ```
//!
//! Exit code 1 says that an invariant did not hold, or that a world panicked; each failing seed is printed with the command that
//! replays it.

mod enumerations;
mod goodput;
mod requests;
mod seeds;
mod worlds;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use quasar_tests::sim::paper::Scheme;

/// Runs simulated worlds and checks that every invariant holds.
#[derive(Parser)]
#[command(name = "sim")]
struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    seeds: seeds::Seeds,
}

#[derive(Subcommand)]
enum What {
    /// Goodput and uptime under the failure model of Decoupled DiLoCo, and the stall when a quarter of the miners is killed
    Goodput(goodput::Goodput),
    /// Requests and bytes for each miner-hour at the default polling
    Requests(Print),
    /// A small run, crashed at every boundary of an effect in turn
    CrashPoints(enumerations::CrashPoints),
    /// A small run, in which each request of the orchestrator to the store fails in turn
    FailingRequests(enumerations::FailingRequests),
}

#[derive(clap::Args)]
struct Print {
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum SchemeName {
    Cheap,
    Ed25519,
}

impl From<SchemeName> for Scheme {
    fn from(name: SchemeName) -> Self {
        match name {
            SchemeName::Cheap => Self::Cheap,
            SchemeName::Ed25519 => Self::Ed25519,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.what {
        None => seeds::run(&arguments.seeds),
        Some(What::Goodput(arguments)) => goodput::run(&arguments),
        Some(What::Requests(print)) => requests::run(print.json),
        Some(What::CrashPoints(arguments)) => enumerations::crash_points(&arguments),
        Some(What::FailingRequests(arguments)) => enumerations::failing_requests(&arguments),
    }
}
