//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use daemon::identity::{self, IdentityCommand};
use daemon::settings::{CommonArgs, ConfigArgs, MinerArgs};
use daemon::{Exit, Failure, Role, exit};
use protocol::DType;

use crate::commands;
use crate::commands::bench::{BenchArgs, PlanArgs};

const EXAMPLES: &str = "\
Examples:
  quasar-miner identity new --wallet-name miner --hotkey-name default
  quasar-miner identity show --network finney --netuid 24 --wallet-name miner --hotkey-name default
  quasar-miner doctor --network finney --netuid 24 --wallet-name miner --hotkey-name default --s3-bucket BUCKET
  quasar-miner doctor --determinism --devices 0 --torch-cuda-dir /opt/torch/lib/python3.12/site-packages/torch
  quasar-miner run --worker-id home --owner-identity 5F… --wallet-name miner --hotkey-name default
  QUASAR_MINER_DEVICES=0,1 quasar-miner run --worker-id rig --owner-identity 5F…
  quasar-miner checkpoint init --config config.json --seed 1 --out fresh/
  quasar-miner checkpoint convert --from old/ --out new/ --dtype bf16
  quasar-miner bench --layers 6 --batch 8 --torch-cuda-dir /opt/torch/lib/python3.12/site-packages/torch
  quasar-miner plan-memory --config config.json --device cuda:0
  quasar-miner plan-memory --device-memory 78 --host-memory 100
  quasar-miner inspect head.qsr

Exit codes: 0 done, 64 wrong command line, 69 something needed does not answer, 75 try later, 78 change something first.";

/// Trains a share of a Quasar run and uploads what it learned.
#[derive(Debug, Parser)]
#[command(name = "quasar-miner", version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join the current run and train until stopped
    Run {
        #[command(flatten)]
        miner: MinerArgs,
        #[command(flatten)]
        common: CommonArgs,
    },
    /// Check what a miner needs, and say what is missing
    Doctor {
        /// Check the devices alone, and prove that they compute the same bits each time: the same training steps twice, and once more with
        /// the recorded expert choices forced
        #[arg(long)]
        determinism: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        miner: MinerArgs,
        #[command(flatten)]
        common: CommonArgs,
    },
    /// Measure training steps on a GPU: the released model's layers, random tokens
    Bench {
        #[command(flatten)]
        bench: BenchArgs,
        #[command(flatten)]
        miner: MinerArgs,
        #[command(flatten)]
        common: CommonArgs,
    },
    /// Print what training takes of a GPU's memory, and the strategy that would be chosen
    PlanMemory {
        #[command(flatten)]
        plan: PlanArgs,
    },
    /// Checkpoints on this disk
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// The hotkey
    Identity {
        #[command(subcommand)]
        command: IdentityCommand,
        #[command(flatten)]
        common: CommonArgs,
    },
    /// Print any signed document as JSON, with the result of its verification
    Inspect {
        /// A `.qsr` file
        file: PathBuf,
    },
    /// The effective settings
    Config {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        common: CommonArgs,
    },
}

#[derive(Debug, Subcommand)]
enum CheckpointCommand {
    /// Write a fresh model
    Init {
        /// Model configuration (`config.json`)
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// The same seed gives the same bytes on every machine
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Element type of the parameters
        #[arg(long, value_enum, default_value_t = Precision::F32)]
        dtype: Precision,
        /// Folder to write to, new or empty
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Write a checkpoint of an older layout anew, as runs need it
    ///
    /// Experts that lie one by one are stacked, constants that are missing are computed; tokenizer and model code come along.
    Convert {
        /// The checkpoint: a folder with config.json and safetensors files, of any sharding and element types
        #[arg(long, value_name = "DIR")]
        from: PathBuf,
        /// Element type of the parameters [default: those that they have]
        #[arg(long, value_enum)]
        dtype: Option<Precision>,
        /// Folder to write to, new or empty
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Precision {
    F32,
    Bf16,
    F16,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
            Precision::F16 => Self::F16,
        }
    }
}

/// Runs the command that the arguments name.
///
/// # Errors
/// With the exit code that the failure stands for.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> Result<Exit, Failure> {
    exit::with_arguments(arguments, |cli: Cli| match cli.command {
        Command::Run { miner, common } => crate::run::main(&common, &miner),
        Command::Doctor { determinism, json, miner, common } => commands::doctor::main(&common, &miner, determinism, json),
        Command::Bench { bench, miner, common } => commands::bench::main(&common, &miner, &bench),
        Command::PlanMemory { plan } => commands::bench::plan(&plan),
        Command::Checkpoint(CheckpointCommand::Init { config, seed, dtype, out }) => {
            commands::checkpoint::init(&config, seed, dtype.into(), &out)
        }
        Command::Checkpoint(CheckpointCommand::Convert { from, dtype, out }) => {
            commands::checkpoint::convert(&from, dtype.map(DType::from), &out)
        }
        Command::Identity { command, common } => identity::run(&common, Role::Miner, command, |text| println!("{text}")),
        Command::Inspect { file } => commands::inspect::main(&file),
        Command::Config { config, common } => commands::config::main(&common, &config),
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_documented_commands_parse() {
        for line in [
            "quasar-miner run --worker-id w --owner-identity 5F --hotkey h --devices 0,1 --first-slot 2 --max-jobs 3",
            "quasar-miner checkpoint init --config config.json --seed 7 --out fresh --dtype bf16",
            "quasar-miner checkpoint convert --from old --out new --dtype bf16",
            "quasar-miner identity show --wallet-path p --wallet-name w --hotkey-name h --json",
            "quasar-miner identity new --wallet-path p --wallet-name w --hotkey-name h --kind sr25519 --encrypt --password-file f",
            "quasar-miner identity certify --network local --netuid 24 --wallet-name w --hotkey-name h --replace --json",
            "quasar-miner inspect head.qsr",
            "quasar-miner config show --json",
            "quasar-miner doctor --json",
            "quasar-miner doctor --determinism --devices 0 --torch-cuda-dir torch",
            "quasar-miner bench --layers 6 --batch 8 --sequence-length 2048 --device cuda:0 --steps 10 --json",
            "quasar-miner plan-memory --config config.json --device cuda:0 --batch 8 --json",
            "quasar-miner plan-memory --config config.json --device-memory 78 --host-memory 100",
        ] {
            parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
        assert!(matches!(
            parse("quasar-miner checkpoint init --config c.json --out o").unwrap().command,
            Command::Checkpoint(CheckpointCommand::Init { config, .. }) if config.as_os_str() == "c.json"
        ));
    }
}
