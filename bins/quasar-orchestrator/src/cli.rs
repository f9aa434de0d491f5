//! Command line of `quasar-orchestrator`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use daemon::settings::{CommonArgs, ConfigArgs, show};
use daemon::{Exit, Failure, Role, exit};
use protocol::documents::Action;

use crate::office::Office;
use crate::operator::{checkpoint, cost, data, orders, replay, root, run, shards, status, store};
use crate::{devnet, serve};

/// Orchestrator of a Quasar training run
#[derive(Debug, Parser)]
#[command(name = "quasar-orchestrator", version, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  quasar-orchestrator devnet --miners 3 --validators 2 --cycles 8
  quasar-orchestrator root sign --orchestrator 5F…  (with the owner's wallet)
  quasar-orchestrator checkpoint publish --tree ./Quasar-Preview
  quasar-orchestrator data publish --dir ./shards
  quasar-orchestrator run create --config configs/run-mainnet.toml --release base-1a2b3c4d
  quasar-orchestrator run
  quasar-orchestrator run add-shards --reason \"the next crawl\"
  quasar-orchestrator status
  quasar-orchestrator rollback --to-version 41 --reason \"diverged after shard web-0042\"
  quasar-orchestrator inspect head.qsr";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the orchestrator, create a run, or add to its data
    Run {
        /// Wait until the orchestrator that runs now is gone, then take over
        #[arg(long)]
        standby: bool,
        #[command(subcommand)]
        command: Option<RunCommand>,
    },
    /// Show where the run stands
    Status(status::StatusArgs),
    /// End the run: no more leases, a closing round, the last release
    Drain(orders::OrderArgs),
    /// Make a release of what is merged now; training goes on
    Release(orders::OrderArgs),
    /// Go back to an earlier version, as a new version
    Rollback(orders::RollbackArgs),
    /// Exclude a hotkey from the run
    Ban(orders::BanArgs),
    /// Take a ban back
    Unban(orders::BanArgs),
    RotateKey(root::RotateArgs),
    /// Print what a journal remembers, and where the run stands after it
    Replay(replay::ReplayArgs),
    /// The bucket
    Store {
        #[command(subcommand)]
        command: StoreCommand,
    },
    Cost(cost::CostArgs),
    /// The trust anchor that the owner signs
    Root {
        #[command(subcommand)]
        command: RootCommand,
    },
    /// Checkpoints: publish, fetch, cut into fragments, put together
    Checkpoint {
        #[command(subcommand)]
        command: CheckpointCommand,
    },
    /// Token shards
    Data {
        #[command(subcommand)]
        command: DataCommand,
    },
    /// Train a small model across real daemons on this machine
    Devnet(devnet::DevnetArgs),
    /// Print a signed document as JSON, with the result of its verification
    Inspect {
        file: PathBuf,
    },
    /// Show or check the configuration
    Config(ConfigArgs),
}

#[derive(Debug, Subcommand)]
enum RunCommand {
    Create(run::CreateArgs),
    AddShards(shards::AddShardsArgs),
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Check that the bucket keeps the promises that a run relies on
    Check(store::CheckArgs),
}

#[derive(Debug, Subcommand)]
enum RootCommand {
    Sign(root::SignArgs),
}

#[derive(Debug, Subcommand)]
enum CheckpointCommand {
    Publish(checkpoint::PublishArgs),
    Fetch(checkpoint::FetchArgs),
    Plan(checkpoint::PlanArgs),
    Split(checkpoint::SplitArgs),
    Assemble(checkpoint::AssembleArgs),
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    Prepare(data::PrepareArgs),
    TrainTokenizer(data::TrainTokenizerArgs),
    Publish(data::PublishArgs),
}

/// Parses the command line and does what it says.
///
/// # Errors
/// With the exit code that the failure stands for.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> Result<Exit, Failure> {
    exit::with_arguments(arguments, obey)
}

fn obey(cli: Cli) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::unavailable)?;
    let common = cli.common;
    let office = || Office::open(&common);
    match cli.command {
        Command::Run { standby, command: None } => return runtime.block_on(serve::serve(office()?, standby)),
        Command::Run { command: Some(RunCommand::Create(arguments)), .. } => runtime.block_on(run::create(&office()?, arguments))?,
        Command::Run { command: Some(RunCommand::AddShards(arguments)), .. } => {
            return runtime.block_on(shards::add(&office()?, arguments));
        }
        Command::Status(arguments) => return runtime.block_on(status::show(&office()?, &arguments)),
        Command::Drain(arguments) => return runtime.block_on(orders::give(&office()?, (Action::Drain, arguments))),
        Command::Release(arguments) => return runtime.block_on(orders::give(&office()?, (Action::Release, arguments))),
        Command::Rollback(arguments) => return runtime.block_on(orders::give(&office()?, arguments.into_order())),
        Command::Ban(arguments) => return runtime.block_on(orders::give(&office()?, arguments.into_ban())),
        Command::Unban(arguments) => return runtime.block_on(orders::give(&office()?, arguments.into_unban())),
        Command::RotateKey(arguments) => runtime.block_on(root::rotate(&office()?, arguments))?,
        Command::Replay(arguments) => replay::replay(&arguments)?,
        Command::Store { command: StoreCommand::Check(arguments) } => runtime.block_on(store::check(&office()?, &arguments))?,
        Command::Cost(arguments) => cost::cost(&arguments)?,
        Command::Root { command: RootCommand::Sign(arguments) } => runtime.block_on(root::sign(&office()?, arguments))?,
        Command::Checkpoint { command } => match command {
            CheckpointCommand::Publish(arguments) => runtime.block_on(checkpoint::publish(&office()?, arguments))?,
            CheckpointCommand::Fetch(arguments) => runtime.block_on(checkpoint::fetch(&office()?, arguments))?,
            CheckpointCommand::Plan(arguments) => checkpoint::plan(&arguments)?,
            CheckpointCommand::Split(arguments) => checkpoint::split(&arguments)?,
            CheckpointCommand::Assemble(arguments) => checkpoint::assemble(&arguments)?,
        },
        Command::Data { command } => match command {
            DataCommand::Prepare(arguments) => data::prepare(arguments)?,
            DataCommand::TrainTokenizer(arguments) => data::train_tokenizer(&arguments)?,
            DataCommand::Publish(arguments) => runtime.block_on(data::publish(&office()?, arguments))?,
        },
        Command::Devnet(arguments) => return runtime.block_on(devnet::run(arguments)),
        Command::Inspect { file } => return inspect(&file),
        Command::Config(arguments) => return config(&common, &arguments),
    }
    Ok(Exit::Done)
}

fn config(common: &CommonArgs, arguments: &ConfigArgs) -> Result<Exit, Failure> {
    let (text, exit) = show::answer(Role::Orchestrator, &common.sources(())?, &arguments.command)?;
    print!("{text}");
    Ok(exit)
}

fn inspect(file: &std::path::Path) -> Result<Exit, Failure> {
    let inspected = daemon::inspect::file(file)?;
    println!("{:#}", inspected.json);
    Ok(inspected.exit())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_command_of_the_examples_exists() {
        Cli::command().debug_assert();
        let hotkey = protocol::AccountId([1; 32]).to_string();
        for line in EXAMPLES.lines().filter_map(|line| line.strip_prefix("  ")) {
            // Without the note behind it; what stands in quotes is one word.
            let line = line.split("  (").next().unwrap_or_default().replace("5F…", &hotkey);
            let quoted = line.split('"').enumerate();
            let words = quoted.flat_map(|(at, part)| if at % 2 == 1 { vec![part] } else { part.split_whitespace().collect() });
            Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn a_wrong_command_line_ends_with_the_documented_code() {
        for line in ["quasar-orchestrator", "quasar-orchestrator fly", "quasar-orchestrator cost --miners many"] {
            assert_eq!(main(line.split_whitespace().map(OsString::from)).unwrap(), Exit::Usage, "{line}");
        }
        assert_eq!(main(["quasar-orchestrator", "--version"].map(OsString::from)).unwrap(), Exit::Done);
    }
}
