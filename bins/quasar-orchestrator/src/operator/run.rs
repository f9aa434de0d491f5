//! `run create`: fragment states of version 0, plan, catalog, run manifest, head, current, in this order.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use daemon::{Failure, clock};
use fragments::CheckpointTree;
use fragments::codec::PayloadHeader;
use fragments::keyframe::{self, KeyframeId};
use fragments::outer::momentum_fits;
use fragments::state::{FragmentState, StateHeader};
use protocol::documents::{
    CatalogPage, CatalogRef, CurrentRun, FRAGMENTS_MAX, FragmentHead, FragmentManifest, Head, LEASE_STEPS_MAX, PPM, ReleaseRef,
    RunManifest, RunParameters, RunRoot, RunState,
};
use protocol::envelope::{Context, Document, Expect, PROTOCOL_VERSION, RunId, open, open_stored};
use protocol::{Digest, FileRecord, KeyRef};
use serde::Deserialize;
use storage::discovery::DiscoveryError;
use storage::roots::{RootChain, Roots};
use storage::{ObjectStore, PutCondition, StoreError};

use super::checkpoint;
use super::shards::published;
use crate::effects::fence::read_lease;
use crate::office::{Office, unserved};

/// Largest object that S3 stores take in a single PUT.
const PUT_BYTES_MAX: u64 = 5 << 30;

/// Create a run from a published release and published shards, and make it the current one
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// Run parameters (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Release that the run starts from
    #[arg(long, value_name = "NAME")]
    release: String,
    /// Only these shards; default: all that are published
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    shards: Vec<String>,
    /// Take the place of a run that is under way
    #[arg(long)]
    replace: bool,
}

/// A run's parameters as an operator writes them down.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    pub name: String,
    pub parameters: RunParameters,
}

impl RunFile {
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::configuration(anyhow::anyhow!("{} cannot be read: {error}", path.display()))
                .hint("--config names a file of run parameters, as configs/run-devnet.toml is one")
        })?;
        toml::from_str(&text).map_err(|error| {
            Failure::configuration(anyhow::anyhow!("{}: {error}", path.display())).hint("compare with configs/run-devnet.toml")
        })
    }
}

pub async fn create(office: &Office, arguments: CreateArgs) -> Result<(), Failure> {
    let file = RunFile::read(&arguments.config)?;
    let roots = roots_that_name_us(office).await?;
    let (root, orchestrators) = (&roots.newest, &roots.orchestrators);
    let parameters = file.parameters;
    check(&parameters, root)?;
    if !arguments.replace {
        refuse_to_replace(office, orchestrators).await?;
    }

    let tree_dir = office.state_dir()?.join("releases").join(&arguments.release);
    let (release, release_digest) = checkpoint::fetch_to(office, &arguments.release, &tree_dir).await?;
    let tree = CheckpointTree::open(&tree_dir).map_err(Failure::configuration)?;
    let plan = fragments::plan(tree.contract(), usize::from(parameters.fragments)).map_err(Failure::configuration)?;
    let digest = plan.digest();
    let shards = published(office, &arguments.shards, orchestrators).await?;
    if !shards.iter().any(|shard| !shard.held_out) {
        return Err(Failure::configuration(anyhow::anyhow!("no training shard is published")).hint("`data prepare`, then `data publish`"));
    }
    if let Some(shard) = shards.iter().find(|shard| shard.row_tokens != parameters.sequence_length) {
        return Err(Failure::configuration(anyhow::anyhow!(
            "shard {} has rows of {} tokens, the run of {}",
            shard.id,
            shard.row_tokens,
            parameters.sequence_length
        ))
        .hint("prepare the data with the run's sequence length"));
    }
    if let (Some(token), Some(shard)) = (parameters.training.document_end, shards.first())
        && token >= shard.vocab_size
    {
        return Err(Failure::configuration(anyhow::anyhow!("training.document_end {token} is no token of shard {}", shard.id))
            .hint("name the token that `data prepare` puts behind each document"));
    }

    let now_ms = clock::now_ms();
    let run = new_run_id(office, now_ms, &file.name);
    let context = Context { run, ..office.context };
    let run_keys = office.keys.run(run);

    let momentum = parameters.outer_momentum_ppm > 0;
    let header =
        |fragment: usize| StateHeader { plan: digest, fragment: fragment as u64, version: 0, elements: plan.elements(fragment), momentum };
    for fragment in 0..plan.fragments.len() {
        let state = header(fragment).state_bytes();
        if state > PUT_BYTES_MAX {
            tracing::warn!(
                fragment,
                state,
                limit = PUT_BYTES_MAX,
                "the state of a fragment is larger than AWS S3 takes in one PUT; more fragments make it smaller"
            );
            break;
        }
    }
    let mut heads = Vec::new();
    for fragment in 0..plan.fragments.len() {
        let theta = tree.read_fragment(&plan, fragment).map_err(Failure::configuration)?;
        let id = KeyframeId { plan: digest, fragment: fragment as u32, version: 0 };
        let keyframe = keyframe::write(&plan, &id, &theta).map_err(Failure::configuration)?;
        let header = header(fragment);
        let state = FragmentState::new(theta, header.momentum).to_bytes(&header).map_err(Failure::configuration)?;
        let number = fragment as u16;
        let key = run_keys.keyframe(number, 0);
        let record = FileRecord::of_bytes(key.clone(), &keyframe);
        let manifest = FragmentManifest {
            fragment: number,
            version: 0,
            t: u64::MAX,
            keyframe: record.clone(),
            delta: None,
            state: Digest::blake3(&state),
        };
        office.put_bytes_once(&run_keys.state(number, 0), Bytes::from(state)).await?;
        office.put_bytes_once(&key, Bytes::from(keyframe)).await?;
        office.put_once(&run_keys.fragment_manifest(number, 0), &manifest, &context).await?;
        heads.push(FragmentHead { version: 0, length: record.length, digest: record.blake3 });
        if PayloadHeader::new(parameters.codec_up, &plan, digest, fragment, 0).payload_bytes() > root.bounds.payload_bytes_max {
            return Err(Failure::configuration(anyhow::anyhow!(
                "a payload of fragment {fragment} exceeds the {} bytes that the root allows",
                root.bounds.payload_bytes_max
            ))
            .hint("more fragments, or a codec_up with fewer bits, make payloads smaller"));
        }
    }
    office.put_once(&run_keys.plan(&digest), &plan, &context).await?;
    let mut catalog: Vec<CatalogRef> = Vec::new();
    let mut newest = CatalogRef { page: 0, digest: Digest::ZERO };
    for (page, shards) in CatalogPage::split(&shards).into_iter().enumerate() {
        let page = CatalogPage { page: page as u32, previous: newest.digest, shards: shards.to_vec() };
        if !page.fits() {
            return Err(Failure::configuration(anyhow::anyhow!("the manifest of shard {} is too large", shards[0].id))
                .hint("prepare the data with smaller --shard-tokens"));
        }
        let bytes = office.put_once(&run_keys.catalog(page.page), &page, &context).await?;
        newest = CatalogRef { page: page.page, digest: Digest::blake3(&bytes) };
        catalog.push(newest);
    }
    let manifest = RunManifest {
        run,
        name: file.name,
        protocol_min: PROTOCOL_VERSION,
        protocol_max: PROTOCOL_VERSION,
        created_ms: now_ms,
        plan: digest,
        base_release: release.release.clone(),
        base_manifest: release_digest,
        catalog,
        parameters,
    };
    let manifest_bytes = office.put_once(&run_keys.manifest(), &manifest, &context).await?;
    let release = ReleaseRef { release: release.release, manifest: release_digest };
    let head = Head::first(heads, release, newest);
    let head = office.sign(&head, &context);
    office.store.put(&run_keys.head(), Bytes::from(head), PutCondition::IfAbsent).await.map_err(unserved)?;
    let current = CurrentRun {
        root_version: root.version,
        root_digest: roots.newest_digest(),
        run,
        manifest_digest: Digest::blake3(&manifest_bytes),
    };
    office.publish_current(&current).await.map_err(unserved)?;
    println!("run {run} is current: {} fragments, {} shards, plan {}", plan.fragments.len(), shards.len(), digest.short());
    Ok(())
}

/// A run that is under way is not replaced by accident: its miners and validators would leave it at once.
async fn refuse_to_replace(office: &Office, signers: &[KeyRef]) -> Result<(), Failure> {
    let read = async |key: &str, limit: u64| match office.store.get(key, limit).await {
        Ok(object) => Ok(Some(object.bytes)),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(unserved(error)),
    };
    let refuse = |why: String| Err(Failure::configuration(anyhow::anyhow!(why)).hint("`drain` it and wait, or say --replace"));
    let key = office.keys.current();
    let Some(bytes) = read(&key, CurrentRun::PURPOSE.file_limit()).await? else { return Ok(()) };
    let Ok(current) = open_stored::<CurrentRun>(&bytes, &office.context, Expect::Any(signers)) else {
        return refuse(format!("{key} names a run, signed by a key that no root of this owner names"));
    };
    let run = current.document.run;
    let (keys, context) = (office.keys.run(run), Context { run, ..office.context });
    let lease = read_lease(&*office.store, &keys.writer_lease(), &context, signers).await?;
    let Some(bytes) = read(&keys.head(), Head::PURPOSE.file_limit()).await? else { return Ok(()) };
    // Only a head that has not expired opens.
    match open::<Head>(&bytes, &context, Expect::Any(signers), clock::now_ms()) {
        Ok(head) if head.document.state != RunState::Complete && lease.is_some_and(|(lease, _)| !lease.document.released) => {
            refuse(format!("run {run} is under way, at outer step {}", head.document.outer_step))
        }
        _ => Ok(()),
    }
}

fn check(parameters: &RunParameters, root: &RunRoot) -> Result<(), Failure> {
    let wrong = |what: String, hint: &str| {
        Err(Failure::configuration(anyhow::anyhow!("the run parameters are wrong: {what}")).hint(format!("in the run file: {hint}")))
    };
    let fragments_max = usize::from(root.bounds.fragments_max).min(FRAGMENTS_MAX);
    if parameters.fragments == 0 || usize::from(parameters.fragments) > fragments_max {
        return wrong(format!("fragments is {}", parameters.fragments), &format!("1 to {fragments_max}, as root and protocol allow"));
    }
    if parameters.slots == 0 || parameters.slots > root.bounds.slots_max {
        return wrong(format!("slots is {}", parameters.slots), &format!("1 to {}, as the root allows", root.bounds.slots_max));
    }
    let counts = [
        ("inner_steps", u64::from(parameters.inner_steps)),
        ("batch_rows", u64::from(parameters.batch_rows)),
        ("lease_steps", u64::from(parameters.lease_steps)),
        ("poll_ms", parameters.poll_ms),
        ("audit.replay_steps", u64::from(parameters.audit.replay_steps)),
        ("audit.rate_ppm", u64::from(parameters.audit.rate_ppm)),
        ("audit.beacon_blocks", u64::from(parameters.audit.beacon_blocks)),
    ];
    if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
        return wrong(format!("{name} is zero"), "1 or more; configs/run-mainnet.toml says what each is for");
    }
    if u64::from(parameters.audit.rate_ppm) > PPM {
        return wrong(
            format!("audit.rate_ppm is {}, more than all learner-cycles", parameters.audit.rate_ppm),
            "1 to 1_000_000, which audits all of them",
        );
    }
    if parameters.lease_steps > LEASE_STEPS_MAX {
        return wrong(
            format!("lease_steps is {}: the receipt of so long a lease would not fit its file", parameters.lease_steps),
            &format!("at most {LEASE_STEPS_MAX}"),
        );
    }
    if parameters.codec_down.withholds() {
        return wrong(
            "codec_down leaves values out, and only learners can keep what a payload leaves out".to_owned(),
            "\"bf16\" or \"int4\"",
        );
    }
    if !momentum_fits(parameters.codec_up, parameters.outer_momentum_ppm as f32) {
        return wrong(
            "codec_up \"topk\" goes with no outer momentum: error feedback is a momentum of its own".to_owned(),
            "outer_momentum_ppm = 0, or another codec_up",
        );
    }
    Ok(())
}

/// A run id nobody can choose: from the key that signs, the time and the name.
fn new_run_id(office: &Office, now_ms: u64, name: &str) -> RunId {
    let digest = Digest::derive("quasar/v1/run", &[&office.key().public, &now_ms.to_le_bytes(), name.as_bytes()]);
    RunId(std::array::from_fn(|i| digest.0[i]))
}

/// Walks the roots from the owner that the settings name.
pub async fn roots(office: &Office) -> Result<Arc<RootChain>, Failure> {
    follow(&office.roots()?, &*office.store).await
}

/// As [`roots`], for the orchestrator that the newest root names.
pub async fn roots_that_name_us(office: &Office) -> Result<Arc<RootChain>, Failure> {
    named(&office.roots()?, &*office.store, &office.key()).await
}

/// Looks for newer roots; the newest has to name `key`.
pub async fn named(roots: &Roots, store: &dyn ObjectStore, key: &KeyRef) -> Result<Arc<RootChain>, Failure> {
    let chain = follow(roots, store).await?;
    if chain.newest.orchestrator != *key {
        return Err(Failure::configuration(anyhow::anyhow!(
            "root version {} names orchestrator {}, this wallet is {}",
            chain.newest.version,
            chain.newest.orchestrator.account(),
            key.account()
        ))
        .hint("use the wallet that the root names, or sign a new root"));
    }
    Ok(chain)
}

async fn follow(roots: &Roots, store: &dyn ObjectStore) -> Result<Arc<RootChain>, Failure> {
    roots.follow(store).await.map_err(|error| match error {
        DiscoveryError::Store(error) => unserved(error),
        DiscoveryError::NoRun => {
            Failure::configuration(anyhow::anyhow!("no run root is published")).hint("the owner signs one with `root sign`")
        }
        error => Failure::configuration(error),
    })
}

#[cfg(test)]
mod tests {
    use protocol::documents::{Bounds, Codec};
    use protocol::{Ed25519Signer, Signer};

    use super::*;

    type Change = fn(&mut RunParameters);

    #[test]
    fn parameters_that_no_run_can_have_are_refused_with_what_to_write_instead() {
        let key = Ed25519Signer::from_seed([1; 32]).key();
        let bounds = Bounds { fragments_max: 32, slots_max: 4, payload_bytes_max: 1 << 30, checkpoint_bytes_max: 1 << 30 };
        let root = RunRoot { version: 1, previous: Digest::ZERO, owner: key, orchestrator: key, store_hosts: Vec::new(), bounds };
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/run-devnet.toml");
        let good = RunFile::read(Path::new(file)).unwrap().parameters;
        check(&good, &root).unwrap();
        let refused = |change: Change| {
            let mut parameters = good.clone();
            change(&mut parameters);
            check(&parameters, &root).unwrap_err().to_string()
        };
        let changes: [(Change, &str); 12] = [
            (|p| p.fragments = 0, "1 to 32"),
            (|p| p.fragments = 33, "1 to 32"),
            (|p| p.slots = 5, "1 to 4"),
            (|p| p.inner_steps = 0, "1 or more"),
            (|p| p.poll_ms = 0, "1 or more"),
            (|p| p.audit.replay_steps = 0, "1 or more"),
            (|p| p.audit.rate_ppm = 0, "1 or more"),
            (|p| p.audit.beacon_blocks = 0, "1 or more"),
            (|p| p.audit.rate_ppm = 1_000_001, "1 to 1_000_000"),
            (|p| p.lease_steps = LEASE_STEPS_MAX + 1, "at most"),
            (|p| p.codec_down = Codec::TopK, "\"int4\""),
            (|p| (p.codec_up, p.outer_momentum_ppm) = (Codec::TopK, 1), "outer_momentum_ppm = 0"),
        ];
        for (change, hint) in changes {
            let text = refused(change);
            assert!(text.split_once("\nhint: in the run file: ").is_some_and(|(_, told)| told.contains(hint)), "{text}");
        }
        let missing = RunFile::read(Path::new("nowhere.toml")).err().unwrap().to_string();
        assert!(missing.contains("nowhere.toml cannot be read") && missing.contains("\nhint: "), "{missing}");
    }
}
