//! Command line of `quasar-orchestrator`.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use daemon::settings::{CommonArgs, ConfigArgs, OrchestratorArgs, show};
use daemon::{Exit, Failure, Role};

use crate::office::Office;
use crate::operator::{checkpoint, data, root, run};
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
  quasar-orchestrator inspect head.qsr";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the orchestrator, or create a run
    Run {
        #[command(flatten)]
        of_run: OrchestratorArgs,
        #[command(subcommand)]
        command: Option<RunCommand>,
    },
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
    Inspect { file: PathBuf },
    /// Show or check the configuration
    Config(ConfigArgs),
}

#[derive(Debug, Subcommand)]
enum RunCommand {
    Create(run::CreateArgs),
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
pub fn main() -> Result<Exit, Failure> {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::unavailable)?;
    let common = cli.common;
    let office = |of_run: &OrchestratorArgs| Office::open(&common, of_run);
    let plain = OrchestratorArgs::default();
    match cli.command {
        Command::Run { of_run, command: None } => return runtime.block_on(serve::serve(office(&of_run)?)),
        Command::Run { of_run, command: Some(RunCommand::Create(arguments)) } => {
            runtime.block_on(run::create(&office(&of_run)?, arguments))?
        }
        Command::Root { command: RootCommand::Sign(arguments) } => runtime.block_on(root::sign(&office(&plain)?, arguments))?,
        Command::Checkpoint { command } => match command {
            CheckpointCommand::Publish(arguments) => runtime.block_on(checkpoint::publish(&office(&plain)?, arguments))?,
            CheckpointCommand::Fetch(arguments) => runtime.block_on(checkpoint::fetch(&office(&plain)?, arguments))?,
            CheckpointCommand::Plan(arguments) => checkpoint::plan(&arguments)?,
            CheckpointCommand::Split(arguments) => checkpoint::split(&arguments)?,
            CheckpointCommand::Assemble(arguments) => checkpoint::assemble(&arguments)?,
        },
        Command::Data { command } => match command {
            DataCommand::Prepare(arguments) => data::prepare(arguments)?,
            DataCommand::TrainTokenizer(arguments) => data::train_tokenizer(&arguments)?,
            DataCommand::Publish(arguments) => runtime.block_on(data::publish(&office(&plain)?, arguments))?,
        },
        Command::Devnet(arguments) => return runtime.block_on(devnet::run(arguments)),
        Command::Inspect { file } => return inspect(&file),
        Command::Config(arguments) => return config(&common, &arguments),
    }
    Ok(Exit::Done)
}

fn config(common: &CommonArgs, arguments: &ConfigArgs) -> Result<Exit, Failure> {
    let (text, exit) = show::answer(Role::Orchestrator, &common.sources(&OrchestratorArgs::default())?, &arguments.command)?;
    print!("{text}");
    Ok(exit)
}

fn inspect(file: &std::path::Path) -> Result<Exit, Failure> {
    let inspected = daemon::inspect::file(file)?;
    println!("{:#}", inspected.json);
    Ok(inspected.exit())
}
