//! The devnet: the whole system on one machine, as separate processes with their own wallets over the real bucket protocol.
//!
//! This process hosts the embedded S3 server and the development chain and supervises; it opens the run with the operator's own
//! commands, starts the production binaries, and ends by loading the release back.

mod children;
mod kills;
mod merged;
mod place;
mod report;
mod view;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use chain::{Chain, ConnectSettings, SubtensorClient};
use daemon::{Exit, Failure, Shutdown};

use children::{Child, Children};
use kills::Kills;
use place::Place;
use report::Summary;
use view::View;

use crate::machine::Status;

/// How long the validators may take for the last audits and weights after the run is complete.
const SETTLE: Duration = Duration::from_secs(120);
/// How long a killed process stays away.
const CHAOS_PAUSE: Duration = Duration::from_secs(3);
/// Blocks that may pass between the last verdict and its being noticed here.
const NOTICE_BLOCKS: u64 = 2;
/// Blocks in which a validator notices the last verdict and, after its rate limit, sets its row.
const CHANCE_BLOCKS: u64 = 25;
const POLL: Duration = Duration::from_millis(250);
const POLL_EAGER: Duration = Duration::from_millis(20);

/// Train a small Quasar across real daemons on this machine, release a checkpoint, set weights
#[derive(Debug, Clone, clap::Args)]
pub struct DevnetArgs {
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub miners: u16,
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub validators: u16,
    /// Merges of every fragment
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub cycles: u64,
    /// Codec in which learners send their changes: bf16, int4 or topk; default: that of configs/run-devnet.toml
    #[arg(long, value_name = "CODEC")]
    pub codec_up: Option<String>,
    /// Codec in which new versions go out: bf16 or int4
    #[arg(long, value_name = "CODEC")]
    pub codec_down: Option<String>,
    /// Configuration of another model, whose vocabulary has 4,096 entries; default: configs/devnet-model.json
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Other run parameters; default: configs/run-devnet.toml
    #[arg(long, value_name = "FILE")]
    pub run_file: Option<PathBuf>,
    /// Where miners train and validators audit: cpu or cuda:N, all of them on the same device
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device)]
    pub device: String,
    /// Folder of a full torch installation, for CUDA
    #[arg(long, value_name = "DIR", env = "QUASAR_TORCH_CUDA_DIR")]
    pub torch_cuda_dir: Option<PathBuf>,
    /// Folder for everything; must be new or empty
    #[arg(long, value_name = "DIR", default_value = "devnet")]
    pub dir: PathBuf,
    /// Seed of the fresh model
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Kill one miner, one validator and the orchestrator once each, and start them again
    #[arg(long)]
    pub chaos: bool,
    /// Kill the orchestrator each so many seconds, as often as the run lasts, and start it again at once
    #[arg(long, value_name = "SECONDS")]
    pub kill_every: Option<u64>,
    /// Print one JSON object as the last line
    #[arg(long)]
    pub json: bool,
    /// Where quasar-miner and quasar-validator are; default: beside this binary
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Give up after this long
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    pub timeout_sec: u64,
    #[command(flatten)]
    pub s3: ForeignStore,
}

fn device(text: &str) -> Result<String, String> {
    match text.strip_prefix("cuda:").map(str::parse::<u32>) {
        Some(Ok(_)) => Ok(text.to_owned()),
        _ if text == "cpu" => Ok(text.to_owned()),
        _ => Err("say cpu, or cuda:0 and so on".to_owned()),
    }
}

/// A bucket elsewhere, in place of the embedded server. Its part below `quasar/` is made for this devnet and must be empty.
#[derive(Debug, Clone, clap::Args)]
pub struct ForeignStore {
    /// Use this S3 server instead of the embedded one, e.g. http://127.0.0.1:8333
    #[arg(long, value_name = "URL", requires_all = ["s3_access_key", "s3_secret_key"])]
    pub s3_endpoint: Option<String>,
    #[arg(long, value_name = "NAME", default_value = "quasar")]
    pub s3_bucket: String,
    #[arg(long, value_name = "KEY", env = "QUASAR_DEVNET_S3_ACCESS_KEY")]
    pub s3_access_key: Option<String>,
    /// Best given by the environment, where other users do not see it
    #[arg(long, value_name = "KEY", env = "QUASAR_DEVNET_S3_SECRET_KEY", hide_env_values = true)]
    pub s3_secret_key: Option<String>,
}

/// Runs a devnet from nothing to its summary.
pub async fn run(arguments: DevnetArgs) -> Result<Exit, Failure> {
    let begun = Instant::now();
    let shutdown = Shutdown::on_signals().map_err(Failure::unavailable)?;
    let mut view = View::new(&arguments);
    view.note("preparing wallets, bucket, chain, model and data");
    let place = Place::prepare(&arguments, &shutdown).await?;
    view.note(&format!("run is open; logs are in {}", place.logs().display()));

    let mut children = Children::default();
    children.start(place.orchestrator()?)?;
    for index in 0..arguments.miners {
        children.start(place.miner(index)?)?;
    }
    for index in 0..arguments.validators {
        children.start(place.validator(index)?)?;
    }
    let chain = SubtensorClient::connect(ConnectSettings { endpoints: vec![place.chain_endpoint()], genesis: Some(place.genesis()) })
        .await
        .map_err(Failure::unavailable)?;

    let mut kills = Kills::new(arguments.kill_every);
    let outcome = supervise(&arguments, &place, &chain, &mut children, &mut kills, &mut view, &shutdown, begun).await;
    children.stop_all().await;
    let status = outcome?;
    view.note("loading the release back");
    let summary = Summary::collect(&arguments, &place, &chain, &status, &kills, begun).await?;
    view.finish();
    summary.print(arguments.json);
    Ok(if summary.ok { Exit::Done } else { Exit::Unavailable })
}

/// Watches until the run is complete, audited and weighted.
#[allow(clippy::too_many_arguments)]
async fn supervise(
    arguments: &DevnetArgs,
    place: &Place,
    chain: &SubtensorClient,
    children: &mut Children,
    kills: &mut Kills,
    view: &mut View,
    shutdown: &Shutdown,
    begun: Instant,
) -> Result<Status, Failure> {
    let mut chaos = arguments.chaos.then(|| Chaos::new(arguments));
    let mut complete: Option<Instant> = None;
    let mut settling = Settling::default();
    let end = begun + Duration::from_secs(arguments.timeout_sec);
    loop {
        if !shutdown.sleep(if kills.is_awaiting() { POLL_EAGER } else { POLL }).await {
            return Err(Failure::try_later(anyhow::anyhow!("stopped before the run was complete")));
        }
        if let Some(name) = children.unexpected_exit() {
            return Err(Failure::unavailable(anyhow::anyhow!("{name} ended by itself"))
                .hint(format!("its log is {}", place.logs().join(format!("{name}.log")).display())));
        }
        if Instant::now() > end {
            return Err(Failure::unavailable(anyhow::anyhow!("not finished after {} s", arguments.timeout_sec))
                .hint(format!("the logs in {} say who waits for whom", place.logs().display())));
        }
        let Some(status) = place.status().await else { continue };
        view.show(&status);
        if let Some(chaos) = &mut chaos {
            chaos.advance(&status, arguments, place, children, view).await?;
        }
        kills.note_return(place, view).await;
        if kills.is_awaiting() {
            continue;
        }
        if status.state != protocol::documents::RunState::Complete {
            kills.advance(place, children, view).await?;
            continue;
        }
        let since = *complete.get_or_insert_with(|| {
            view.note("run complete; waiting for the last audits and for weights on chain");
            Instant::now()
        });
        if settling.is_done(arguments, place, chain, &status).await || since.elapsed() > SETTLE {
            return Ok(status);
        }
    }
}

/// The last duties after a run is complete: every ordered audit has its verdict, and after that every validator's weights were
/// set once more.
#[derive(Default)]
struct Settling {
    /// Block at which the last verdict was there.
    audited_at: Option<u64>,
}

impl Settling {
    async fn is_done(&mut self, arguments: &DevnetArgs, place: &Place, chain: &SubtensorClient, status: &Status) -> bool {
        let Some(audited_at) = self.audited_at else {
            let audited =
                status.audits_open == 0 && place.audit_cycles_done(status) && place.verdict_count().await >= status.audits_ordered;
            if audited && let Ok(head) = chain.head().await {
                self.audited_at = Some(head.number);
            }
            return false;
        };
        // A row that the last verdicts did not change is not sent again: after this long, everybody had the chance.
        if chain.head().await.is_ok_and(|head| head.number >= audited_at + CHANCE_BLOCKS) {
            return true;
        }
        let Ok(metagraph) = chain.metagraph(place.netuid()).await else { return false };
        (0..arguments.validators).all(|index| {
            let neuron = metagraph.by_uid(place.validator_uid(index));
            neuron.is_some_and(|neuron| neuron.last_update + NOTICE_BLOCKS >= audited_at)
        })
    }
}

/// One kill each of a miner, a validator and the orchestrator, spread over the run.
struct Chaos {
    /// Share of the outer steps done at which the next kill is due, in percent, with the victim.
    plan: Vec<(u64, Child)>,
    away: Option<(Instant, Child)>,
}

impl Chaos {
    fn new(arguments: &DevnetArgs) -> Self {
        let mut plan = vec![(60, Child::Orchestrator)];
        if arguments.validators > 0 {
            plan.push((45, Child::Validator(0)));
        }
        plan.push((25, Child::Miner(arguments.miners.saturating_sub(1))));
        Self { plan, away: None }
    }

    async fn advance(
        &mut self,
        status: &Status,
        arguments: &DevnetArgs,
        place: &Place,
        children: &mut Children,
        view: &mut View,
    ) -> Result<(), Failure> {
        if let Some((since, child)) = self.away {
            if since.elapsed() >= CHAOS_PAUSE {
                self.away = None;
                view.note(&format!("starting {child} again"));
                children.start(match child {
                    Child::Orchestrator => place.orchestrator()?,
                    Child::Miner(index) => place.miner(index)?,
                    Child::Validator(index) => place.validator(index)?,
                })?;
            }
            return Ok(());
        }
        let steps = arguments.cycles * u64::from(place.fragments());
        if let Some((percent, child)) = self.plan.last().copied()
            && status.closed_below * 100 >= steps * percent
        {
            self.plan.pop();
            view.note(&format!("killing {child}"));
            children.kill(child).await;
            self.away = Some((Instant::now(), child));
        }
        Ok(())
    }
}
