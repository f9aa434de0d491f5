//! `run`: the daemon.

use std::sync::Arc;

use chain::{Chain, ConnectSettings, SubtensorClient};
use daemon::driver::{self, Driver, DriverOptions};
use daemon::health::{self, Health};
use daemon::sequence::Sequence;
use daemon::{Exit, Failure, Journal, Shutdown, clock, supervisor};
use protocol::documents::{CurrentRun, FragmentManifest, ReleaseRef, RunManifest};
use protocol::envelope::{Context, Expect, Purpose, open_stored};
use protocol::{Digest, FragmentPlan, ShardManifest};
use storage::{PutCondition, StoreError, check};
use zeroize::Zeroizing;

use crate::effects::{Hands, Service, spawn_pollers};
use crate::machine::{FragmentSetup, Input, Orchestrator, RunSetup};
use crate::office::Office;
use crate::operator::{checkpoint, run};

/// Journaled inputs between snapshots.
const SNAPSHOT_EVERY: usize = 2_000;

/// Runs the orchestrator of the current run until it is told to stop.
pub async fn serve(office: Office) -> Result<Exit, Failure> {
    let shutdown = Shutdown::on_signals().map_err(Failure::unavailable)?;
    let state_dir = office.state_dir()?;
    let now_ms = clock::now_ms();
    check::conformance(&*office.store, &format!("{}/private/check", protocol::paths::prefix(office.context.netuid)), now_ms)
        .await
        .map_err(Failure::configuration)?;
    let (root, root_bytes) = run::newest_root(&office).await?;
    if root.orchestrator != office.key() {
        return Err(Failure::configuration(anyhow::anyhow!(
            "the root names orchestrator {}, this wallet is {}",
            root.orchestrator.account(),
            office.key().account()
        ))
        .hint("use the wallet that the root names, or sign a new root"));
    }
    let current = current_run(&office).await?;
    if current.root_digest != Digest::blake3(&root_bytes) {
        return Err(Failure::configuration(anyhow::anyhow!("the current run was created under another root")).hint("create a new run"));
    }
    let context = Context { run: current.run, ..office.context };
    let run_keys = office.keys.run(current.run);
    let manifest = office.read::<RunManifest>(&run_keys.manifest(), &context, &office.key()).await?.document;
    let plan = office.read::<FragmentPlan>(&run_keys.plan(&manifest.plan), &context, &office.key()).await?.document;
    let mut shards: Vec<ShardManifest> = Vec::new();
    for page in &manifest.catalog {
        shards.extend(
            office.read::<protocol::documents::CatalogPage>(&run_keys.catalog(page.page), &context, &office.key()).await?.document.shards,
        );
    }
    let folder = state_dir.join("runs").join(current.run.to_string());
    for name in ["payloads", "states", "releases"] {
        std::fs::create_dir_all(folder.join(name))
            .map_err(|error| Failure::configuration(anyhow::anyhow!("{}: {error}", folder.display())))?;
    }
    let base_tree = state_dir.join("releases").join(&manifest.base_release);
    let (base, base_digest) = checkpoint::fetch_to(&office, &manifest.base_release, &base_tree).await?;
    if base_digest != manifest.base_manifest {
        return Err(Failure::configuration(anyhow::anyhow!(
            "release {} is not the one that the run was created from",
            manifest.base_release
        )));
    }
    let setup = setup(&office, &context, &manifest, &plan, &shards).await?;

    let network = office.settings.network()?;
    let chain = SubtensorClient::connect(ConnectSettings { endpoints: network.endpoints, genesis: Some(office.context.genesis) })
        .await
        .map_err(|error| if error.needs_a_person() { Failure::configuration(error) } else { Failure::unavailable(error) })?;
    let chain: Arc<dyn Chain> = Arc::new(chain);
    let journal = Arc::new(Journal::open(&folder).map_err(|error| Failure::new(error.exit(), error))?);
    let recovered = driver::recover(&journal, || Orchestrator::new(setup))?;
    tracing::info!(run = %current.run, name = %manifest.name, replayed = recovered.replayed, "orchestrating");
    let opening_secret = opening_secret(&office, &run_keys).await?;
    let service = Arc::new(Service {
        store: office.store.clone(),
        chain: chain.clone(),
        signer: office.signer.clone(),
        sequence: Sequence::open(journal.clone(), "orchestrator").map_err(|error| Failure::new(error.exit(), error))?,
        plan_digest: manifest.plan,
        plan: Arc::new(plan),
        context,
        keys: office.keys.clone(),
        run: run_keys,
        manifest,
        current,
        shards,
        base_files: base.files,
        opening_secret,
        base_tree,
        state_dir: folder,
        fenced: Default::default(),
        shutdown: shutdown.clone(),
        watched: Default::default(),
        certificates: Default::default(),
        records: Default::default(),
        head_etag: Default::default(),
        outbox: Default::default(),
    });
    let health = Health::new();
    health.probe("chain", move || Some(chain.health()).filter(|health| !health.is_healthy()).map(|health| health.to_string()));
    supervisor::report(&health, &shutdown);
    if let Some(address) = office.settings.health_listen() {
        health::serve(address, health.clone(), shutdown.clone()).await.map_err(Failure::configuration)?;
    }
    let options = DriverOptions { snapshot_every: SNAPSHOT_EVERY, ..DriverOptions::default() };
    let component = health.component("orchestrator");
    component.ready();
    let driver =
        Driver::with_options(recovered, journal, Arc::new(Hands(service.clone())), options).first(Input::Started).component(component);
    spawn_pollers(&service, &driver.inputs(), &shutdown);
    let (_, exit) = driver.run(&shutdown).await?;
    if service.fenced.load(std::sync::atomic::Ordering::Relaxed) {
        return Err(Failure::configuration(anyhow::anyhow!("another orchestrator moved the head of this run"))
            .hint("run one orchestrator for a run; find the other one before starting this again"));
    }
    tracing::info!("stopped");
    Ok(exit)
}

/// The run's secret for the keys of openings. It lies in the private part of the bucket, so that a lost disk loses no audit.
async fn opening_secret(office: &Office, run_keys: &protocol::paths::RunKeys) -> Result<Zeroizing<[u8; 32]>, Failure> {
    let key = run_keys.opening_secret();
    let fresh = storage::seal_stream::fresh_secret();
    let bytes = match office.store.put(&key, bytes::Bytes::copy_from_slice(&*fresh), PutCondition::IfAbsent).await {
        Ok(_) => return Ok(fresh),
        Err(StoreError::PreconditionFailed { .. }) => office.store.get(&key, 32).await.map_err(Failure::unavailable)?.bytes,
        Err(error) => return Err(Failure::unavailable(error)),
    };
    let secret = <[u8; 32]>::try_from(&bytes[..]).map_err(|_| {
        Failure::configuration(anyhow::anyhow!("{key} is not 32 bytes"))
            .hint("somebody else wrote there: restore it from a backup of the bucket")
    })?;
    Ok(Zeroizing::new(secret))
}

/// The run that this orchestrator made current, also where the pointer has expired while nobody renewed it.
async fn current_run(office: &Office) -> Result<CurrentRun, Failure> {
    let object = match office.store.get(&office.keys.current(), Purpose::CurrentRun.limit() as u64).await {
        Ok(object) => object,
        Err(StoreError::NotFound { .. }) => {
            return Err(Failure::try_later(anyhow::anyhow!("no run is published yet")).hint("create one with `run create`"));
        }
        Err(error) => return Err(Failure::unavailable(error)),
    };
    open_stored::<CurrentRun>(&object.bytes, &office.context, Expect::Key(&office.key()))
        .map(|verified| verified.document)
        .map_err(Failure::configuration)
}

async fn setup(
    office: &Office,
    context: &Context,
    manifest: &RunManifest,
    plan: &FragmentPlan,
    shards: &[ShardManifest],
) -> Result<RunSetup, Failure> {
    let run_keys = office.keys.run(context.run);
    let mut fragments = Vec::new();
    for fragment in 0..plan.fragments.len() {
        let key = run_keys.fragment_manifest(fragment as u16, 0);
        let first = office.read::<FragmentManifest>(&key, context, &office.key()).await?.document;
        fragments.push(FragmentSetup {
            keyframe: first.keyframe.blake3,
            keyframe_length: first.keyframe.length,
            state: first.state,
            payload_length: fragments::codec::payload_bytes(plan, fragment),
        });
    }
    Ok(RunSetup {
        run: context.run,
        parameters: manifest.parameters.clone(),
        release: ReleaseRef { release: manifest.base_release.clone(), manifest: manifest.base_manifest },
        fragments,
        shards: shards.iter().filter(|shard| !shard.held_out).map(|shard| (shard.id.clone(), shard.rows, shard.row_tokens)).collect(),
    })
}
