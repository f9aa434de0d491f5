//! `root sign`, `rotate-key`: the owner names the orchestrator's online key, the store and hard bounds.

use std::sync::Arc;

use bytes::Bytes;
use daemon::Failure;
use protocol::documents::{Bounds, RunRoot};
use protocol::{AccountId, Digest, KeyKind, KeyRef};
use storage::discovery::DiscoveryError;
use storage::roots::RootChain;

use crate::office::{Office, unserved};

/// What an operator does after the owner named another key.
const NEXT_STEPS: &str = "\
1. start `run` with the new wallet: at once on another machine; on the same one, set its service to the new wallet and restart it.
   It waits until the old orchestrator gives the run back: 15 s, and 30 s at most for one that hangs
2. processes with the old wallet end by themselves with exit code 78, standbys too: give theirs the new wallet as well
Miners and validators follow by themselves and keep what they have trained";

/// Sign the run root with the owner's hotkey and publish it
#[derive(Debug, clap::Args)]
pub struct SignArgs {
    /// SS58 address of the orchestrator's online hotkey
    #[arg(long, value_name = "SS58")]
    orchestrator: AccountId,
    /// Kind of that hotkey
    #[arg(long, value_name = "KIND", default_value = "ed25519", value_parser = ["ed25519", "sr25519"])]
    orchestrator_kind: String,
    /// Hosts that grants may point to; default: the configured bucket's
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    store_host: Vec<String>,
    /// Most fragments of a run
    #[arg(long, default_value_t = 64)]
    fragments_max: u16,
    /// Most slots of a hotkey
    #[arg(long, default_value_t = 16)]
    slots_max: u8,
}

/// Name another online key, keeping everything else: the owner signs the next root version
#[derive(Debug, clap::Args)]
pub struct RotateArgs {
    /// SS58 address of the new online hotkey
    #[arg(long, value_name = "SS58")]
    orchestrator: AccountId,
    /// Kind of that hotkey
    #[arg(long, value_name = "KIND", default_value = "ed25519", value_parser = ["ed25519", "sr25519"])]
    orchestrator_kind: String,
    /// SS58 address of a new owner (ed25519), who signs the versions after this one
    #[arg(long, value_name = "SS58")]
    owner: Option<AccountId>,
}

fn key(account: &AccountId, kind: &str) -> KeyRef {
    let kind = if kind == "sr25519" { KeyKind::Sr25519 } else { KeyKind::Ed25519 };
    KeyRef { kind, public: account.0 }
}

pub async fn sign(office: &Office, arguments: SignArgs) -> Result<(), Failure> {
    let newest = newest(office).await?;
    let root = RunRoot {
        version: newest.as_ref().map_or(1, |chain| chain.newest.version + 1),
        previous: newest.map_or(Digest::ZERO, |chain| chain.newest_digest()),
        owner: office.key(),
        orchestrator: key(&arguments.orchestrator, &arguments.orchestrator_kind),
        store_hosts: if arguments.store_host.is_empty() { vec![office.store_host.clone()] } else { arguments.store_host },
        bounds: Bounds {
            fragments_max: arguments.fragments_max,
            slots_max: arguments.slots_max,
            payload_bytes_max: 16 << 30,
            checkpoint_bytes_max: 1 << 40,
        },
    };
    publish(office, &root).await
}

pub async fn rotate(office: &Office, arguments: RotateArgs) -> Result<(), Failure> {
    let Some(chain) = newest(office).await? else {
        return Err(Failure::configuration(anyhow::anyhow!("no run root is published")).hint("sign the first one with `root sign`"));
    };
    let (root, previous) = (chain.newest.clone(), chain.newest_digest());
    let orchestrator = key(&arguments.orchestrator, &arguments.orchestrator_kind);
    let owner = arguments.owner.map_or(root.owner, |owner| KeyRef { kind: KeyKind::Ed25519, public: owner.0 });
    if (orchestrator, owner) == (root.orchestrator, root.owner) {
        return Err(Failure::usage(anyhow::anyhow!("root version {} names these keys already", root.version))
            .hint("name the new key; if the rotation was done before, start `run` with its wallet"));
    }
    let is_same = orchestrator == root.orchestrator;
    publish(office, &RunRoot { version: root.version + 1, previous, owner, orchestrator, ..root }).await?;
    if is_same {
        println!("the orchestrator, miners and validators go on and need nothing; the new owner signs the next root");
    } else {
        println!("{NEXT_STEPS}");
    }
    Ok(())
}

async fn publish(office: &Office, root: &RunRoot) -> Result<(), Failure> {
    office.put_bytes_once(&office.keys.root(root.version), Bytes::from(office.sign(root, &office.context))).await?;
    println!("root version {} of owner {} names orchestrator {}", root.version, root.owner.account(), root.orchestrator.account());
    Ok(())
}

/// The roots in the bucket, if this wallet may sign the version after them.
async fn newest(office: &Office) -> Result<Option<Arc<RootChain>>, Failure> {
    // Version 1 is signed by the owner that the settings name, as everybody checks it.
    let first = office.settings.owner_identity().unwrap_or_else(|_| office.key().account());
    let chain = match office.roots_of(first).follow(&*office.store).await {
        Ok(chain) => chain,
        Err(DiscoveryError::NoRun) => return Ok(None),
        Err(DiscoveryError::Store(error)) => return Err(unserved(error)),
        Err(error) => return Err(Failure::configuration(error)),
    };
    let root = &chain.newest;
    if root.owner != office.key() {
        return Err(Failure::configuration(anyhow::anyhow!(
            "root version {} belongs to owner {}, this wallet is {}",
            root.version,
            root.owner.account(),
            office.key().account()
        ))
        .hint("the owner's wallet signs roots"));
    }
    Ok(Some(chain))
}
