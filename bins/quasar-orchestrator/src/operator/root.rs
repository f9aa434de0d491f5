//! `root sign`: the owner names the orchestrator's online key, the store and hard bounds.

use bytes::Bytes;
use daemon::Failure;
use protocol::documents::{Bounds, RunRoot};
use protocol::envelope::{Document, Expect, open_stored};
use protocol::{AccountId, Digest, KeyKind, KeyRef};
use storage::StoreError;

use crate::office::Office;

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

pub async fn sign(office: &Office, arguments: SignArgs) -> Result<(), Failure> {
    let (version, previous) = newest(office).await?;
    let kind = if arguments.orchestrator_kind == "sr25519" { KeyKind::Sr25519 } else { KeyKind::Ed25519 };
    let root = RunRoot {
        version: version + 1,
        previous,
        owner: office.key(),
        orchestrator: KeyRef { kind, public: arguments.orchestrator.0 },
        store_hosts: if arguments.store_host.is_empty() { vec![office.store_host.clone()] } else { arguments.store_host },
        bounds: Bounds {
            fragments_max: arguments.fragments_max,
            slots_max: arguments.slots_max,
            payload_bytes_max: 16 << 30,
            checkpoint_bytes_max: 1 << 40,
        },
    };
    let key = office.keys.root(root.version);
    office.put_bytes_once(&key, Bytes::from(office.sign(&root, &office.context))).await?;
    println!("root version {} of owner {} names orchestrator {}", root.version, root.owner.account(), root.orchestrator.account());
    Ok(())
}

/// Version and digest of the newest root in the bucket; version 0 if there is none.
async fn newest(office: &Office) -> Result<(u32, Digest), Failure> {
    let (mut version, mut digest, mut owner) = (0, Digest::ZERO, office.key());
    loop {
        match office.store.get(&office.keys.root(version + 1), RunRoot::PURPOSE.limit() as u64 + 512).await {
            Ok(object) => {
                let root = open_stored::<RunRoot>(&object.bytes, &office.context, Expect::Key(&owner)).map_err(Failure::configuration)?;
                owner = root.document.owner;
                digest = Digest::blake3(&object.bytes);
                version += 1;
            }
            Err(StoreError::NotFound { .. }) => return Ok((version, digest)),
            Err(error) => return Err(Failure::unavailable(error)),
        }
    }
}
