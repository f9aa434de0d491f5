//! `run`: find the current run, start a learner for each device, and begin again when the next run is current.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chain::Hotkey;
use daemon::evidence::Evidence;
use daemon::health::{self, Health};
use daemon::seen::Memory;
use daemon::sequence::Sequence;
use daemon::settings::{CommonArgs, MinerArgs, Role};
use daemon::{Exit, Failure, Journal, Settings, Shutdown, Waiting, clock, identity, network, supervisor, telemetry};
use protocol::AccountId;
use protocol::envelope::RunId;
use storage::client::{GrantClient, PublicReader};
use storage::discovery::{DiscoveryError, RunFacts, RunReader};
use storage::roots::Roots;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use crate::device;
use crate::edge::{BaseTrees, ChunkCache, Edge, Plane, Shared};
use crate::machine::{End, Learner, LearnerSettings};
use crate::session;
use crate::trainer::TrainerThread;
use chain::ChainLink;

/// Pause between two looks for a run, and between two tries to reach what does not answer.
const RETRY: Duration = Duration::from_secs(2);
/// A learner's loop that did not turn for so long is dead.
const STALE_AFTER: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(
        "the run has {slots} slots for a hotkey, but {learners} learners from slot {first} on do not fit\nhint: use fewer devices, a lower --first-slot, or another hotkey"
    )]
    Slots { slots: u8, learners: usize, first: u8 },
    #[error("`{0}` is not a run id\nhint: unset QUASAR_RUN_ID; the run is found by itself")]
    RunId(String),
    #[error("no GPU was found\nhint: set QUASAR_MINER_DEVICES=cpu, or QUASAR_TORCH_CUDA_DIR to a full torch installation")]
    NoDevice,
    #[error("{0}")]
    Ended(String),
    #[error("the hotkey {0} is not registered\nhint: {remedy}", remedy = protocol::Reason::NotRegistered.remedy())]
    Unregistered(AccountId),
    #[error("the same hotkey and slot was started elsewhere\nhint: {remedy}", remedy = protocol::Reason::SessionReplaced.remedy())]
    Fenced,
    #[error("the disk is full\nhint: {remedy}", remedy = protocol::Reason::DiskFull.remedy())]
    DiskFull,
    #[error("the clock of this machine was set back\nhint: start again, and let NTP keep the clock")]
    ClockSetBack,
    #[error(
        "{0}\nhint: QUASAR_MINER_DEVICE_MEMORY_GIB makes the learner plan for less, QUASAR_MINER_HOST_MEMORY_GIB lends it pinned memory; `plan-memory` shows both"
    )]
    OutOfMemory(String),
}

/// Everything that stays while runs come and go.
struct Miner {
    settings: Settings,
    hotkey: Arc<Hotkey>,
    secret: Zeroizing<[u8; 32]>,
    chain: Arc<ChainLink>,
    public: PublicReader,
    journal: Arc<Journal>,
    state_dir: PathBuf,
    netuid: u16,
    owner: AccountId,
    pin: Option<RunId>,
    devices: Vec<String>,
    health: Health,
    shutdown: Shutdown,
}

/// The command.
pub fn main(common: &CommonArgs, args: &MinerArgs) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Miner, args)?;
    telemetry::init(settings.log_format(), settings.log_filter())?;
    for notice in &settings.notices {
        tracing::warn!("{notice}");
    }
    // Before any tensor is made and any thread is started.
    model::tune_allocator();
    let devices = device::names(&settings.miner()).map_err(device::failure)?;
    if devices.is_empty() {
        return Err(Failure::configuration(RunError::NoDevice));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::unavailable)?;
    let exit = runtime.block_on(async {
        let shutdown = Shutdown::on_signals().map_err(Failure::unavailable)?;
        let miner = Miner::start(settings, devices, shutdown).await?;
        miner.run().await
    });
    // Transfers that hang must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_millis(500));
    exit
}

/// A reader of the bucket's public part.
pub(crate) fn public_reader(settings: &Settings) -> Result<PublicReader, Failure> {
    let store = settings.store()?;
    let endpoint = store.endpoint_url.unwrap_or_else(|| format!("https://s3.{}.amazonaws.com", store.region));
    PublicReader::new(&endpoint, &store.bucket).map_err(Failure::configuration)
}

/// The run that is current now. The proof that somebody named two of them with one sequence is kept in `folder`.
async fn find(
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

impl Miner {
    async fn start(settings: Settings, devices: Vec<String>, shutdown: Shutdown) -> Result<Self, Failure> {
        let chain = Arc::new(network::link(&settings)?);
        let (netuid, owner) = (settings.netuid()?, settings.owner_identity()?);
        let pin = match settings.run_id() {
            Some(text) => Some(text.parse().map_err(|_| Failure::configuration(RunError::RunId(text.to_owned())))?),
            None => None,
        };
        let public = public_reader(&settings)?;
        let hotkey = identity::hotkey(&settings)?;
        let (account, secret) = (hotkey.account(), hotkey.sealing_secret());
        let state_dir = settings.state_dir()?;
        let journal = Arc::new(Journal::open(&state_dir)?);
        let health = Health::new();
        health.probe("chain", {
            let chain = chain.clone();
            move || chain.trouble()
        });
        supervisor::report(&health, &shutdown);
        if let Some(address) = settings.health_listen() {
            let address = health::serve(address, health.clone(), shutdown.clone()).await?;
            tracing::info!(%address, "health pages");
        }
        if let Some(timeout_ms) = settings.miner().timeout_ms {
            let shutdown = shutdown.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(timeout_ms)).await;
                tracing::info!(timeout_ms, "the time is up");
                shutdown.trigger();
            });
        }
        tracing::info!(hotkey = %account, devices = devices.join(","), version = env!("CARGO_PKG_VERSION"), "miner started");
        Ok(Self {
            settings,
            hotkey: Arc::new(hotkey),
            secret,
            chain,
            public,
            journal,
            state_dir,
            netuid,
            owner,
            pin,
            devices,
            health,
            shutdown,
        })
    }

    async fn run(&self) -> Result<Exit, Failure> {
        let following = self.follow(self.settings.network()?.genesis);
        tokio::pin!(following);
        tokio::select! {
            exit = &mut following => exit,
            failure = network::attend(&self.chain, &self.hotkey, self.netuid, self.settings.dry_run()) => {
                self.shutdown.trigger();
                following.await?;
                Err(failure)
            }
            // Only a new process can open it again.
            error = self.journal.failed() => {
                self.shutdown.trigger();
                // Whatever that gives comes of this error.
                let _ = following.await;
                Err(error.into())
            }
        }
    }

    async fn follow(&self, genesis: [u8; 32]) -> Result<Exit, Failure> {
        let roots = self.roots(genesis)?;
        loop {
            let Some(reader) = self.discover(&roots).await? else { return Ok(Exit::Done) };
            match self.serve(&roots, reader).await? {
                End::NextRun if self.shutdown.is_triggered() => return Ok(Exit::Done),
                End::NextRun if holds_gpu_memory(&self.devices) => {
                    tracing::info!("the next run is current; starting anew");
                    return Ok(Exit::TryLater);
                }
                End::NextRun => tracing::info!("looking for the next run"),
                End::Stopped | End::LeasesDone => return Ok(Exit::Done),
                end => return Err(self.failure(end)),
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

    fn failure(&self, end: End) -> Failure {
        let exit = end.exit();
        let error = match end {
            End::Fenced { .. } => RunError::Fenced,
            End::Unregistered => RunError::Unregistered(self.hotkey.account()),
            End::DiskFull => RunError::DiskFull,
            End::ClockSetBack => RunError::ClockSetBack,
            End::OutOfMemory(what) => RunError::OutOfMemory(what),
            End::Broken(what) => RunError::Ended(what),
            End::Stopped | End::LeasesDone | End::NextRun => RunError::Ended("the miner has ended".to_owned()),
        };
        Failure::new(exit, error)
    }

    /// The current run; `None` if a stop comes first.
    async fn discover(&self, roots: &Roots) -> Result<Option<RunReader>, Failure> {
        let component = self.health.component("run");
        let mut waiting = Waiting::default();
        loop {
            match find(&self.public, roots, self.pin, &self.hotkey, &self.state_dir).await {
                Ok(reader) => {
                    let manifest = &reader.facts().manifest;
                    tracing::info!(run = %manifest.run, name = manifest.name, "run found");
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

    /// Runs all learners on one run, until the first of them ends, which ends all.
    async fn serve(&self, roots: &Roots, first: RunReader) -> Result<End, Failure> {
        let facts = first.facts().clone();
        let miner = self.settings.miner();
        let slots = facts.manifest.parameters.slots;
        if usize::from(miner.first_slot) + self.devices.len() > usize::from(slots) {
            return Err(Failure::configuration(RunError::Slots { slots, learners: self.devices.len(), first: miner.first_slot }));
        }
        self.tidy(&facts);
        let shared = Arc::new(self.shared(&facts)?);
        let stop = Shutdown::new();
        let mut readers = vec![first];
        while readers.len() < self.devices.len() {
            match self.discover(roots).await? {
                Some(reader) if reader.facts().context == facts.context => readers.push(reader),
                Some(_) => return Ok(End::NextRun),
                None => return Ok(End::Stopped),
            }
        }
        let mut learners = JoinSet::new();
        for ((index, device), reader) in self.devices.iter().enumerate().zip(readers) {
            self.start_learner(&mut learners, &shared, reader, miner.first_slot + index as u8, device, &stop)?;
        }
        let mut outcome: Option<End> = None;
        loop {
            tokio::select! {
                ended = learners.join_next() => match ended {
                    None => break,
                    Some(ended) => {
                        let end = ended.unwrap_or_else(|error| End::Broken(format!("a learner panicked: {error}")));
                        stop.trigger();
                        outcome = Some(worse(outcome, end));
                    }
                },
                () = self.shutdown.triggered(), if !stop.is_triggered() => stop.trigger(),
            }
        }
        // Nobody beats for them until the next run begins.
        for index in (0..self.devices.len()).filter(|_| outcome == Some(End::NextRun)) {
            self.health.component(&learner_name(miner.first_slot + index as u8)).not_ready("between two runs");
        }
        Ok(outcome.unwrap_or(End::Stopped))
    }

    /// Removes what earlier runs left: segments that no audit asks for any more, and checkpoints that nothing starts from.
    fn tidy(&self, facts: &RunFacts) {
        let kept = [("runs", facts.manifest.run.to_string()), ("cache/checkpoints", facts.manifest.base_manifest.to_string())];
        for (folder, kept) in kept {
            let entries = std::fs::read_dir(self.state_dir.join(folder)).into_iter().flatten().flatten();
            for entry in entries.filter(|entry| entry.file_name() != kept.as_str()) {
                tracing::info!(folder = %entry.path().display(), "removing what an earlier run left");
                if let Err(error) = std::fs::remove_dir_all(entry.path()) {
                    tracing::warn!(folder = %entry.path().display(), %error, "it cannot be removed");
                }
            }
        }
    }

    fn shared(&self, facts: &RunFacts) -> Result<Shared, Failure> {
        let cache = self.state_dir.join("cache");
        Ok(Shared {
            hotkey: self.hotkey.clone(),
            chain: self.chain.clone(),
            access: Arc::new(GrantClient::new(facts.root.store_hosts.clone()).map_err(Failure::configuration)?),
            bases: BaseTrees::new(cache.join("checkpoints")),
            chunks: ChunkCache::open(cache.join("chunks")).map_err(Failure::unavailable)?,
            sequence: Sequence::open(self.journal.clone(), "signed")?,
        })
    }

    fn start_learner(
        &self,
        learners: &mut JoinSet<End>,
        shared: &Arc<Shared>,
        reader: RunReader,
        slot: u8,
        device: &str,
        stop: &Shutdown,
    ) -> Result<(), Failure> {
        let (facts, miner) = (reader.facts().clone(), self.settings.miner());
        // A session must be newer than the last one even if the clock went back meanwhile.
        let sessions = Sequence::open(self.journal.clone(), &format!("session/{slot}"))?;
        let session_epoch = sessions.next(clock::now_ms())?;
        let folder = self.state_dir.join("runs").join(facts.manifest.run.to_string()).join(format!("slot-{slot}"));
        let plane = Arc::new(Plane::open(&folder, session_epoch, &facts).map_err(Failure::unavailable)?);
        let (inputs, queue) = mpsc::channel(session::INPUTS);
        let open = device::opener(
            device::options(device, self.devices.len(), &miner, &facts.manifest.parameters, &self.state_dir),
            facts.plan.clone(),
        );
        let inner = facts.manifest.parameters.inner.clone();
        let trainer = TrainerThread::start(learner_name(slot), open, plane.clone(), inner, inputs.clone()).map_err(Failure::unavailable)?;
        let machine = Learner::new(LearnerSettings {
            worker: miner.worker_name(slot, self.devices.len()),
            hotkey: self.hotkey.account(),
            slot,
            session_epoch,
            keys: facts.keys.clone(),
            run: facts.run.clone(),
            parameters: facts.manifest.parameters.clone(),
            base_release: facts.manifest.base_release.clone(),
            leases_max: miner.max_jobs,
        });
        let edge = Edge::new(shared.clone(), reader, slot, self.secret.clone(), &folder, plane, trainer).map_err(Failure::unavailable)?;
        let component = self.health.watched(&learner_name(slot), STALE_AFTER);
        tracing::info!(slot, device, session = session_epoch, "learner started");
        learners.spawn(session::run(slot, machine, Arc::new(edge), inputs, queue, stop.clone(), component));
        Ok(())
    }
}

/// Whether a process that trained on these devices keeps memory that the next run's learners would miss: libtorch gives none of a GPU's
/// back before the process ends.
fn holds_gpu_memory(devices: &[String]) -> bool {
    devices.iter().any(|device| device != "cpu")
}

/// Of a learner's thread, and of its part of the health page.
fn learner_name(slot: u8) -> String {
    format!("learner-{slot}")
}

/// Of two ends the one that the process reports: failures before a new run before a plain end.
fn worse(one: Option<End>, other: End) -> End {
    let rank = |end: &End| match end {
        End::Stopped => 0,
        End::LeasesDone => 1,
        End::NextRun => 2,
        _ => 3,
    };
    match one {
        Some(one) if rank(&one) >= rank(&other) => one,
        _ => other,
    }
}

#[cfg(test)]
mod tests {
    use protocol::Digest;
    use protocol::documents::CurrentRun;

    use super::*;
    use crate::tests::published::Published;

    #[tokio::test(flavor = "multi_thread")]
    async fn two_pointers_to_the_current_run_with_one_sequence_are_kept_as_a_proof_that_inspect_verifies() {
        let published = Published::new().await;
        let roots = published.roots();
        let look = || find(&published.public, &roots, None, &published.hotkey, published.folder.path());
        assert!(look().await.is_ok());
        published.contradict::<CurrentRun>(&published.keys.current(), |current| current.manifest_digest = Digest::ZERO).await;
        assert!(matches!(look().await, Err(DiscoveryError::Equivocation { .. })));
        published.assert_convicted(1);
    }

    #[test]
    fn a_process_goes_on_with_the_next_run_only_where_it_holds_no_memory_of_a_gpu() {
        let devices = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert!(!holds_gpu_memory(&devices(&["cpu"])));
        assert!(holds_gpu_memory(&devices(&["cuda:0"])) && holds_gpu_memory(&devices(&["cpu", "cuda:1"])));
    }

    #[test]
    fn of_all_ends_a_failure_is_the_one_that_is_reported() {
        assert_eq!(worse(Some(End::Stopped), End::ClockSetBack), End::ClockSetBack);
        assert_eq!(worse(Some(End::ClockSetBack), End::NextRun), End::ClockSetBack);
        assert_eq!(worse(Some(End::NextRun), End::Stopped), End::NextRun);
        assert_eq!(worse(None, End::LeasesDone), End::LeasesDone);
    }
}
