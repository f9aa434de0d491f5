//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use daemon::identity::{self, IdentityCommand};
use daemon::settings::{CommonArgs, ConfigArgs, ValidatorArgs};
use daemon::{Exit, Failure, Role, exit};

use crate::commands;

const EXAMPLES: &str = "\
Examples:
  quasar-validator run --owner-identity 5F… --network finney --netuid 24 --wallet-name validator --hotkey-name default
  quasar-validator run --owner-identity 5F… --device cuda:0 --dry-run
  quasar-validator eval --checkpoint release/ --tokens held-out/tokens.bin --sequence-length 2048 --json
  quasar-validator chain status --network finney --netuid 24 --wallet-name validator --hotkey-name default
  quasar-validator chain set-weights --dry-run --network finney --netuid 24 --wallet-name validator --hotkey-name default
  quasar-validator identity new --kind sr25519 --wallet-name validator --hotkey-name default
  quasar-validator identity show --wallet-path ~/.bittensor/wallets --wallet-name validator --hotkey-name default --json
  quasar-validator config show
  quasar-validator inspect verdict.qsr

Exit codes: 0 done, 64 wrong command line, 69 something needed does not answer, 75 try later, 78 change something first.";

/// Audits the learners of a Quasar run and sets weights on chain.
#[derive(Debug, Parser)]
#[command(name = "quasar-validator", version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Follow the current run, audit and set weights until stopped
    Run(ValidatorArgs),
    /// Measure the loss of a checkpoint on a file of tokens
    Eval(EvalArgs),
    /// Print any signed document as JSON, with the result of its verification
    Inspect {
        /// A `.qsr` file
        file: PathBuf,
    },
    /// The chain: what it shows of this validator, and what would be sent
    #[command(subcommand)]
    Chain(ChainCommand),
    /// The hotkey
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// The effective settings
    Config(ConfigArgs),
}

/// Arguments of `eval`.
#[derive(Clone, Debug, clap::Args)]
pub struct EvalArgs {
    /// Checkpoint folder: config.json and safetensors
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,
    /// Headerless little-endian u32 tokens
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// Tokens in a row; a shorter rest at the end of the file is left out
    #[arg(long, value_name = "N")]
    pub sequence_length: usize,
    /// cpu or cuda:N
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: String,
    /// CPU threads; 0 takes all cores
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub threads: usize,
    /// Read at most so many rows
    #[arg(long, value_name = "R")]
    pub max_rows: Option<u64>,
    /// Print one JSON object: {"loss":f,"tokens":n,"rows":n}
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
enum ChainCommand {
    /// Print the connection, the subnet's rules, this validator's neuron, and how the daemon's weights stand
    Status {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print the row that the chain shows for this validator, and committed rows that wait to be opened
    Weights {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Set weights once, by the scores that the daemon left in the state folder; with --dry-run, print what would be sent and which
    /// rule would refuse it
    SetWeights {
        /// Scores from this file instead: {"SS58": number, …}
        #[arg(long, value_name = "FILE")]
        scores: Option<PathBuf>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command that the arguments name.
///
/// # Errors
/// With the exit code that the failure stands for.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> Result<Exit, Failure> {
    exit::with_arguments(arguments, |cli: Cli| match cli.command {
        Command::Run(validator) => crate::run::main(&cli.common, &validator),
        Command::Eval(eval) => commands::eval::main(&cli.common, &eval),
        Command::Inspect { file } => commands::inspect::main(&file),
        Command::Chain(ChainCommand::Status { json }) => commands::chain::status(&cli.common, json),
        Command::Chain(ChainCommand::Weights { json }) => commands::chain::weights(&cli.common, json),
        Command::Chain(ChainCommand::SetWeights { scores, json }) => commands::chain::set_weights(&cli.common, scores.as_deref(), json),
        Command::Identity(command) => identity::run(&cli.common, Role::Validator, command, |text| println!("{text}")),
        Command::Config(config) => commands::config::main(&cli.common, &config),
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_documented_commands_parse() {
        for line in [
            "quasar-validator run --owner-identity 5F --worker-id v0 --device cpu --threads 1 --poll-interval-sec 5 --dry-run",
            "quasar-validator eval --checkpoint c --tokens t --sequence-length 128 --device cuda:0 --max-rows 9 --json",
            "quasar-validator identity show --wallet-path p --wallet-name w --hotkey-name h --json",
            "quasar-validator identity new --kind sr25519 --encrypt --password-file f --json",
            "quasar-validator identity certify --replace --json",
            "quasar-validator chain status --json --network local --local-chain f",
            "quasar-validator chain weights --json",
            "quasar-validator chain set-weights --dry-run --scores f --json",
            "quasar-validator config show --json",
            "quasar-validator config validate",
            "quasar-validator inspect verdict.qsr",
        ] {
            Cli::try_parse_from(line.split_whitespace()).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
        assert!(Cli::try_parse_from(["quasar-validator", "eval", "--checkpoint", "c"]).is_err());
    }

    #[test]
    fn every_command_of_the_examples_exists() {
        for line in EXAMPLES.lines().filter_map(|line| line.trim().strip_prefix("quasar-validator ")) {
            let words = std::iter::once("quasar-validator").chain(line.split_whitespace());
            Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }
}
