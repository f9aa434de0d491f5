//! `run`: find the current run, follow it with a fresh machine, and begin again when the next run is current.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chain::{ChainLink, Hotkey};
use daemon::driver::{DriverOptions, Recovered};
use daemon::evidence::Evidence;
use daemon::health::{self, Health};
use daemon::seen::Memory;
use daemon::settings::{CommonArgs, Role, ValidatorArgs, ValidatorSettings};
use daemon::{Driver, Exit, Failure, Journal, Settings, Shutdown, Waiting, clock, identity, network, supervisor, telemetry};
use model::{QuasarEvaluator, QuasarTrainer, TrainError, TrainerOptions};
use protocol::documents::TrainingOptions;
use protocol::envelope::RunId;
use protocol::{AccountId, FragmentPlan, Reason};
use storage::client::{GrantClient, PublicReader};
use storage::discovery::{DiscoveryError, RunReader};
use storage::roots::Roots;

use crate::audit::Engine;
use crate::effects::bench::OpenEngine;
use crate::effects::chain::recall;
use crate::effects::{EffectSettings, Effects};
use crate::machine::weights::WeightSettings;
use crate::machine::{Ended, Machine, MachineSettings};

/// Pause between two looks for a run, and between two tries to reach what does not answer.
const RETRY: Duration = Duration::from_secs(2);
/// A driver that did not turn for so long is dead.
const STALE_AFTER: Duration = Duration::from_secs(30);
/// How long effects under way may go on after a stop.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// Longest time without a look at what stands on the chain.
const LOOK_MAX_MS: u64 = 600_000;

#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("`{0}` is not a run id\nhint: unset QUASAR_RUN_ID; the run is found by itself")]
    RunId(String),
    #[error("the hotkey {0} is not registered\nhint: {remedy}", remedy = Reason::NotRegistered.remedy())]
    Unregistered(AccountId),
}

/// Everything that stays while runs come and go.
struct Validator {
    settings: Settings,
    own: ValidatorSettings,
    hotkey: Arc<Hotkey>,
    link: Arc<ChainLink>,
    public: PublicReader,
    journal: Arc<Journal>,
    state_dir: PathBuf,
    netuid: u16,
    owner: AccountId,
    pin: Option<RunId>,
    device: String,
    health: Health,
    shutdown: Shutdown,
}

/// The command.
pub fn main(common: &CommonArgs, args: &ValidatorArgs) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Validator, args)?;
    telemetry::init(settings.log_format(), settings.log_filter())?;
    for notice in &settings.notices {
        tracing::warn!("{notice}");
    }
    // Before any tensor is made and any thread is started.
    model::tune_allocator();
    let device = device(&settings.validator()).map_err(|error| match error {
        TrainError::GpuNotReady(_) => Failure::try_later(error),
        _ => Failure::configuration(error),
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::unavailable)?;
    let exit = runtime.block_on(async {
        let shutdown = Shutdown::on_signals().map_err(Failure::unavailable)?;
        Validator::start(settings, device, shutdown).await?.run().await
    });
    // Transfers that hang must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_millis(500));
    exit
}

/// The device to audit on, as the models know it. Loads the CUDA part of libtorch if the settings name a folder with it.
fn device(settings: &ValidatorSettings) -> Result<String, TrainError> {
    if let (Some(folder), true) = (&settings.torch_cuda_dir, settings.device != "cpu") {
        model::load_cuda(folder)?;
    }
    Ok(match settings.device.as_str() {
        "auto" if model::cuda_is_available() => "cuda:0".to_owned(),
        "auto" => "cpu".to_owned(),
        named => named.to_owned(),
    })
}

/// Opens evaluator and trainer on a base tree.
fn opener(device: String, plan: FragmentPlan, threads: usize, training: &TrainingOptions) -> OpenEngine {
    let TrainingOptions { document_end, train_step_sizes } = *training;
    Arc::new(move |tree: &Path| {
        let evaluator = QuasarEvaluator::open(tree, &plan, &device, threads)?;
        let options = TrainerOptions { device: device.clone(), threads, document_end, train_step_sizes, ..TrainerOptions::default() };
        let trainer = QuasarTrainer::open_with(tree, plan.clone(), &options)?;
        Ok(Engine::new(Box::new(evaluator), Box::new(trainer)))
    })
}

fn public_reader(settings: &Settings) -> Result<PublicReader, Failure> {
    let store = settings.store()?;
    let endpoint = store.endpoint_url.unwrap_or_else(|| format!("https://s3.{}.amazonaws.com", store.region));
    PublicReader::new(&endpoint, &store.bucket).map_err(Failure::configuration)
}

/// The run that is current now. The proof that somebody named two of them with one sequence is kept in `folder`.
pub(crate) async fn find(
    public: &PublicReader,
    roots: &Roots,
    pin: Option<RunId>,
    finder: &Arc<Hotkey>,
    folder: &Path,
) -> Result<RunReader, DiscoveryError> {
    let found = RunReader::discover(public.clone(), roots.clone(), pin, clock::now_ms()).await;
    if let Some(proof) = found.as_ref().err().and_then(DiscoveryError::proof) {
        Evidence { folder: folder.to_owned(), context: *roots.outside(), finder: finder.clone() }.keep(proof);
    }
    found
}

impl Validator {
    async fn start(settings: Settings, device: String, shutdown: Shutdown) -> Result<Self, Failure> {
        let link = Arc::new(network::link(&settings)?);
        let (netuid, owner) = (settings.netuid()?, settings.owner_identity()?);
        let pin = match settings.run_id() {
            Some(text) => Some(text.parse().map_err(|_| Failure::configuration(RunError::RunId(text.to_owned())))?),
            None => None,
        };
        let public = public_reader(&settings)?;
        let hotkey = Arc::new(identity::hotkey(&settings)?);
        let state_dir = settings.state_dir()?;
        let journal = Arc::new(Journal::open(&state_dir)?);
        let health = Health::new();
        health.probe("chain", {
            let link = link.clone();
            move || link.trouble()
        });
        // Without the chain there are no audits and no weights, so a new process costs nothing and may help.
        health.vital_probe("chain", {
            let link = link.clone();
            move || link.silence()
        });
        supervisor::report(&health, &shutdown);
        if let Some(address) = settings.health_listen() {
            let address = health::serve(address, health.clone(), shutdown.clone()).await?;
            tracing::info!(%address, "health pages");
        }
        let own = settings.validator();
        tracing::info!(hotkey = %hotkey.account(), device, name = own.worker_id, version = env!("CARGO_PKG_VERSION"), "validator started");
        Ok(Self { settings, own, hotkey, link, public, journal, state_dir, netuid, owner, pin, device, health, shutdown })
    }

    async fn run(&self) -> Result<Exit, Failure> {
        let following = self.follow(self.settings.network()?.genesis);
        tokio::pin!(following);
        tokio::select! {
            exit = &mut following => exit,
            failure = network::attend(&self.link, &self.hotkey, self.netuid, self.settings.dry_run()) => {
                self.shutdown.trigger();
                following.await?;
                Err(failure)
            }
            // It is of no use any more until it is opened anew, and what the driver journals is elsewhere: nothing else would end this
            // process, in which no verdict is written any more.
            error = self.journal.failed() => {
                self.shutdown.trigger();
                // What else fails now fails for the same reason.
                let _ = following.await;
                Err(error.into())
            }
        }
    }

    async fn follow(&self, genesis: [u8; 32]) -> Result<Exit, Failure> {
        let roots = self.roots(genesis)?;
        loop {
            let Some(reader) = self.discover(&roots).await? else { return Ok(Exit::Done) };
            let Some(archive) = self.discover(&roots).await? else { return Ok(Exit::Done) };
            if reader.facts().context != archive.facts().context {
                continue;
            }
            match self.serve(reader, archive).await? {
                Some(Ended::Moved) => tracing::info!("looking for the next run"),
                Some(Ended::Unregistered) => return Err(Failure::try_later(RunError::Unregistered(self.hotkey.account()))),
                None => return Ok(Exit::Done),
            }
        }
    }

    /// The owner's roots, with what this machine has seen of them.
    fn roots(&self, genesis: [u8; 32]) -> Result<Roots, Failure> {
        let (memory, journal) = (Memory::new(&genesis, self.netuid, &self.owner), self.journal.clone());
        let seen = memory.recall(&journal)?;
        let keep = move |seen: &_| memory.keep(&journal, seen).map_err(|error| error.to_string());
        Ok(Roots::new(genesis, self.netuid, self.owner, seen, keep))
    }

    /// The current run; `None` if a stop comes first.
    async fn discover(&self, roots: &Roots) -> Result<Option<RunReader>, Failure> {
        let component = self.health.component("run");
        let mut waiting = Waiting::default();
        loop {
            match find(&self.public, roots, self.pin, &self.hotkey, &self.state_dir).await {
                Ok(reader) => {
                    component.ready();
                    return Ok(Some(reader));
                }
                Err(error) if error.is_final() => return Err(Failure::configuration(error)),
                Err(error) => {
                    component.not_ready("no run found yet");
                    waiting.log(&error.to_string());
                }
            }
            if !self.shutdown.sleep(RETRY).await {
                return Ok(None);
            }
        }
    }

    /// Follows one run; gives why its machine ended, or `None` after a stop.
    async fn serve(&self, reader: RunReader, archive: RunReader) -> Result<Option<Ended>, Failure> {
        let facts = reader.facts().clone();
        tracing::info!(run = %facts.context.run, name = facts.manifest.name, "run found");
        let mut machine = Machine::new(MachineSettings {
            run: facts.context.run,
            own: self.hotkey.account(),
            parameters: facts.manifest.parameters.clone(),
            poll_ms_max: self.own.poll_interval_ms,
            weights: WeightSettings {
                netuid: self.netuid,
                mechanism: self.own.weight_mechanism,
                refresh_ms: self.own.weight_refresh_ms,
                retry_base_ms: self.own.weight_retry_base_ms,
                retry_max_ms: self.own.weight_retry_max_ms,
                look_max_ms: LOOK_MAX_MS,
                is_dry_run: self.settings.dry_run(),
            },
        });
        let place = (self.netuid, self.own.weight_mechanism);
        if let Some(memory) = recall(&self.journal, &facts.context.genesis, place, &self.hotkey.account())? {
            machine.recall_weights(clock::now_ms(), memory);
        }
        let effects = Effects::new(EffectSettings {
            reader,
            archive,
            access: Arc::new(GrantClient::new(facts.root.store_hosts.clone()).map_err(Failure::configuration)?),
            link: self.link.clone(),
            hotkey: self.hotkey.clone(),
            secret: self.hotkey.sealing_secret(),
            journal: self.journal.clone(),
            state_dir: &self.state_dir,
            open_engine: opener(self.device.clone(), facts.plan.clone(), self.own.threads, &facts.manifest.parameters.training),
            mechanism: self.own.weight_mechanism,
            store_health: self.health.component("store"),
            weights_health: self.health.component("weights"),
        })
        .map_err(Failure::unavailable)?;
        // Nothing ends a thread that hangs but the end of its process.
        self.health.vital_probe("bench", {
            let watch = effects.bench_watch();
            move || watch.silence()
        });
        let component = self.health.watched("driver", STALE_AFTER);
        component.ready();
        let options = DriverOptions { stop_grace: STOP_GRACE, ..DriverOptions::default() };
        // Public facts are the machine's memory: it starts fresh.
        let driver = Driver::forgetful(Recovered::fresh(machine), Arc::new(effects), options).component(component);
        let (machine, _) = driver.run(&self.shutdown).await?;
        Ok(machine.ended())
    }
}
