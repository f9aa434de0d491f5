//! `run`: the daemon.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use chain::{ChainLink, ConnectSettings};
use daemon::driver::{Driver, DriverOptions};
use daemon::health::{self, Health};
use daemon::network;
use daemon::sequence::Sequence;
use daemon::{Exit, Failure, Shutdown, clock, files, supervisor};
use fragments::codec::PayloadHeader;
use protocol::documents::{CatalogPage, CurrentRun, FragmentManifest, Head, ReleaseRef, RunManifest};
use protocol::envelope::{Context, Expect, Purpose, open_stored};
use protocol::{FragmentPlan, KeyRef, ShardManifest};
use storage::roots::RootChain;
use storage::{PutCondition, StoreError, check};
use zeroize::Zeroizing;

use crate::effects::fence::{self, Fence, FenceSettings, Wait};
use crate::effects::{Hands, Service, Stop, spawn_pollers};
use crate::machine::{FragmentSetup, Orchestrator, RunSetup, ShardRows};
use crate::office::{Office, unserved};
use crate::operator::{checkpoint, run, store};
use crate::takeover;

/// A driver's loop that did not turn for so long is dead.
const STALE_AFTER: Duration = Duration::from_secs(30);
/// Journaled inputs between snapshots.
const SNAPSHOT_EVERY: usize = 2_000;

/// Runs the orchestrator of the current run until it is told to stop. A standby waits until the one before it is gone.
pub async fn serve(office: Office, standby: bool) -> Result<Exit, Failure> {
    let shutdown = Shutdown::on_signals().map_err(Failure::unavailable)?;
    let state_dir = office.state_dir()?;
    let now_ms = clock::now_ms();
    let examined = check::conformance(&*office.store, &store::prefix(&office), now_ms).await;
    examined.map_err(store::unfit)?;
    let roots = office.roots()?;
    let named = run::named(&roots, &*office.store, &office.key()).await?;
    let published = Published::read(&office, &named).await?;
    let Published { context, current, manifest, plan, shards } = published;
    let run_keys = office.keys.run(current.run);
    let folder = state_dir.join("runs").join(current.run.to_string());
    for name in ["payloads", "states", "releases"] {
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder)
            .and_then(|()| files::remove_leftovers(&folder))
            .map_err(|error| Failure::configuration(anyhow::anyhow!("{}: {error}", folder.display())))?;
    }
    let base_tree = state_dir.join("releases").join(&manifest.base_release);
    let (base, base_digest) = checkpoint::fetch_to(&office, &manifest.base_release, &base_tree).await?;
    if base_digest != manifest.base_manifest {
        let key = office.keys.release_manifest(&manifest.base_release);
        return Err(contradiction(&key, "it is not the release that the run was created from"));
    }
    let setup = setup(&office, &context, &manifest, &plan, &shards, &named.orchestrators).await?;
    let fresh = Orchestrator::new(setup);

    // Training goes on while it is away: grants are sealed by what the machine knows.
    let place = ConnectSettings { endpoints: office.settings.network()?.endpoints, genesis: Some(office.context.genesis) };
    let chain = Arc::new(ChainLink::new(place, network::deadlines(&office.settings)));
    let lease_key = run_keys.writer_lease();
    let last = fence::read_lease(&*office.store, &lease_key, &context, &named.orchestrators).await?;
    let (journal, instances) = takeover::open_journal(&folder, last.as_ref().map(|(lease, _)| &lease.document))?;
    let journal = Arc::new(journal);
    let sequence = Arc::new(Sequence::open(journal.clone(), &sequence_name(&office))?);
    let health = Health::new();
    health.probe("chain", {
        let chain = chain.clone();
        move || chain.trouble()
    });
    supervisor::report(&health, &shutdown);
    if let Some(address) = office.settings.health_listen() {
        health::serve(address, health.clone(), shutdown.clone()).await.map_err(Failure::configuration)?;
    }
    let lease = health.component("writer lease");
    lease.not_ready("waiting for it");
    let settings = FenceSettings {
        store: office.store.clone(),
        key: lease_key,
        context,
        signer: office.signer.clone(),
        roots: roots.clone(),
        sequence: sequence.clone(),
        instances,
        host: host(),
        lease: FenceSettings::LEASE,
    };
    let wait = if standby { Wait::Standby } else { Wait::ForItsEnd };
    let Some(fence) = Fence::acquire(settings, wait, &shutdown).await? else { return Ok(Exit::Done) };
    let fence = Arc::new(fence);
    tokio::spawn(fence.clone().keep(shutdown.clone()));
    let signers = roots.known().map_err(Failure::configuration)?.orchestrators.clone();

    // Whatever ends this, whoever comes next need not wait for the lease.
    let led = async {
        let opening_secret = opening_secret(&office, &run_keys).await?;
        let service = Arc::new(Service {
            store: office.store.clone(),
            chain: chain.clone(),
            signer: office.signer.clone(),
            roots,
            signers,
            sequence,
            fence: fence.clone(),
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
            stopped: Default::default(),
            shutdown: shutdown.clone(),
            watched: Default::default(),
            records: Default::default(),
            head_etag: Default::default(),
            outbox: Default::default(),
            recorded: Default::default(),
        });
        let head = service.claim_head(fence.epoch().await).await?;
        let (recovered, first) = takeover::recover(&service, &journal, head, fresh).await?;
        tracing::info!(run = %service.context.run, name = %service.manifest.name, replayed = recovered.replayed, "orchestrating");
        let options = DriverOptions { snapshot_every: SNAPSHOT_EVERY, ..DriverOptions::default() };
        lease.ready();
        let component = health.watched("driver", STALE_AFTER);
        component.ready();
        let orders_taken = recovered.machine.orders_taken();
        let driver = Driver::with_options(recovered, journal, Arc::new(Hands(service.clone())), options).first(first).component(component);
        spawn_pollers(&service, orders_taken, &driver.inputs(), &shutdown);
        let running = driver.run(&shutdown);
        tokio::pin!(running);
        let (_, exit) = tokio::select! {
            ended = &mut running => ended?,
            refused = network::connect(&chain) => {
                shutdown.trigger();
                running.await?;
                return Err(refused);
            }
        };
        if fence.is_lost() {
            service.stop(Stop::Fenced);
        }
        if let Some(why) = service.stopped.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(Failure::configuration(why));
        }
        Ok(exit)
    };
    let led: Result<Exit, Failure> = led.await;
    fence.release().await;
    tracing::info!("stopped");
    led
}

/// The numbers of this key in the journal: another key has others.
fn sequence_name(office: &Office) -> String {
    format!("orchestrator/{}", office.key().account())
}

/// This machine, for people.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().take(64).collect();
    if name.is_empty() { "unknown".to_owned() } else { name }
}

/// What was published when the run was created, checked against itself and against the roots.
struct Published {
    context: Context,
    current: CurrentRun,
    manifest: RunManifest,
    plan: FragmentPlan,
    shards: Vec<ShardManifest>,
}

impl Published {
    async fn read(office: &Office, roots: &RootChain) -> Result<Self, Failure> {
        let current = current_run(office, &roots.orchestrators).await?;
        if !roots.digests.contains(&current.root_digest) {
            let what = "the run was created under a root that is not among the owner's";
            return Err(Failure::configuration(anyhow::anyhow!("{}: {what}", office.keys.current())).hint("create a new run"));
        }
        let context = Context { run: current.run, ..office.context };
        let (keys, signers) = (office.keys.run(current.run), &roots.orchestrators);
        let (manifest, digest) = office.read_file::<RunManifest>(&keys.manifest(), &context, signers).await?;
        if digest != current.manifest_digest {
            return Err(contradiction(&keys.manifest(), "it is not the manifest that the current run names"));
        }
        let asked = usize::from(manifest.parameters.fragments);
        let bounds = &roots.newest.bounds;
        if manifest.parameters.fragments > bounds.fragments_max || manifest.parameters.slots > bounds.slots_max {
            return Err(contradiction(&keys.manifest(), "it exceeds the bounds of the root"));
        }
        let plan_key = keys.plan(&manifest.plan);
        let plan = office.read::<FragmentPlan>(&plan_key, &context, signers).await?;
        if plan.digest() != manifest.plan {
            return Err(contradiction(&plan_key, "it is not the plan that the run manifest names"));
        }
        if plan.fragments.len() != asked {
            let what = format!("it has {} fragments, and the run manifest asks for {asked}", plan.fragments.len());
            return Err(contradiction(&plan_key, &what));
        }
        let mut shards: Vec<ShardManifest> = Vec::new();
        for page in &manifest.catalog {
            let key = keys.catalog(page.page);
            let (found, digest) = office.read_file::<CatalogPage>(&key, &context, signers).await?;
            if digest != page.digest {
                return Err(contradiction(&key, "it is not the page that the run manifest names"));
            }
            shards.extend(found.shards);
        }
        let head = office.read::<Head>(&keys.head(), &context, signers).await?;
        if head.fragments.len() != asked {
            let what = format!("it names {} fragments, and the run manifest asks for {asked}", head.fragments.len());
            return Err(contradiction(&keys.head(), &what));
        }
        Ok(Self { context, current, manifest, plan, shards })
    }
}

/// What a person has to look at, before anything was changed.
fn contradiction(key: &str, what: &str) -> Failure {
    Failure::configuration(anyhow::anyhow!("{key}: {what}"))
        .hint("the bucket holds objects that do not belong together; nothing was changed")
}

/// The run's secret for the keys of openings. It lies in the private part of the bucket, so that a lost disk loses no audit.
async fn opening_secret(office: &Office, run_keys: &protocol::paths::RunKeys) -> Result<Zeroizing<[u8; 32]>, Failure> {
    let key = run_keys.opening_secret();
    let fresh = storage::seal_stream::fresh_secret();
    let bytes = match office.store.put(&key, bytes::Bytes::copy_from_slice(&*fresh), PutCondition::IfAbsent).await {
        Ok(_) => return Ok(fresh),
        Err(StoreError::PreconditionFailed { .. }) => office.store.get(&key, 32).await.map_err(unserved)?.bytes,
        Err(error) => return Err(unserved(error)),
    };
    let secret = <[u8; 32]>::try_from(&bytes[..]).map_err(|_| {
        Failure::configuration(anyhow::anyhow!("{key} is not 32 bytes"))
            .hint("somebody else wrote there: restore it from a backup of the bucket")
    })?;
    Ok(Zeroizing::new(secret))
}

/// The run that this orchestrator made current, also where the pointer has expired while nobody renewed it.
pub(crate) async fn current_run(office: &Office, signers: &[KeyRef]) -> Result<CurrentRun, Failure> {
    let key = office.keys.current();
    let object = match office.store.get(&key, Purpose::CurrentRun.file_limit()).await {
        Ok(object) => object,
        Err(StoreError::NotFound { .. }) => {
            return Err(Failure::try_later(anyhow::anyhow!("no run is published yet")).hint("create one with `run create`"));
        }
        Err(error) => return Err(unserved(error)),
    };
    open_stored::<CurrentRun>(&object.bytes, &office.context, Expect::Any(signers))
        .map(|verified| verified.document)
        .map_err(|error| Failure::configuration(error).context(key))
}

async fn setup(
    office: &Office,
    context: &Context,
    manifest: &RunManifest,
    plan: &FragmentPlan,
    shards: &[ShardManifest],
    signers: &[KeyRef],
) -> Result<RunSetup, Failure> {
    let newest =
        manifest.catalog.last().ok_or_else(|| Failure::configuration(anyhow::anyhow!("the run manifest names no catalog page")))?;
    let run_keys = office.keys.run(context.run);
    let mut fragments = Vec::new();
    for fragment in 0..plan.fragments.len() {
        let key = run_keys.fragment_manifest(fragment as u16, 0);
        let first = office.read::<FragmentManifest>(&key, context, signers).await?;
        fragments.push(FragmentSetup {
            keyframe: first.keyframe.blake3,
            keyframe_length: first.keyframe.length,
            state: first.state,
            elements: plan.elements(fragment),
            payload_length: PayloadHeader::new(manifest.parameters.codec_up, plan, manifest.plan, fragment, 0).payload_bytes(),
        });
    }
    Ok(RunSetup {
        run: context.run,
        parameters: manifest.parameters.clone(),
        release: ReleaseRef { release: manifest.base_release.clone(), manifest: manifest.base_manifest },
        fragments,
        catalog: *newest,
        shards: ShardRows::of(shards),
    })
}
