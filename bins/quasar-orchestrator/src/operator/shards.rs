//! `run add-shards`: published shards join the current run.

use std::collections::HashSet;

use daemon::{Exit, Failure};
use protocol::documents::{Action, CatalogPage, Head};
use protocol::paths::prefix;
use protocol::{KeyRef, ShardManifest};

use super::orders::{self, OrderArgs, run_of};
use super::run::roots_that_name_us;
use crate::office::{Office, unserved};

/// Add published training shards to the current run; learners get their rows after those that wait in the same epoch
#[derive(Debug, clap::Args)]
pub struct AddShardsArgs {
    /// Only these shards; default: all that are published and not in the run
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    shards: Vec<String>,
    #[command(flatten)]
    order: OrderArgs,
}

/// Gives an order for each page of them.
pub async fn add(office: &Office, arguments: AddShardsArgs) -> Result<Exit, Failure> {
    let AddShardsArgs { shards: only, order } = arguments;
    let roots = roots_that_name_us(office).await?;
    let known = in_the_run(office, &roots.orchestrators).await?;
    let published = published(office, &only, &roots.orchestrators).await?;
    // What is named is ordered, whatever it is: the answer says what is wrong with it.
    let joins = |shard: &&ShardManifest| !only.is_empty() || !(shard.held_out || known.contains(&shard.id));
    let shards: Vec<ShardManifest> = published.into_iter().filter(|shard| joins(&shard)).collect();
    if shards.is_empty() {
        return Err(Failure::configuration(anyhow::anyhow!("all published training shards are in the run"))
            .hint("`data prepare` with more text, then `data publish`"));
    }
    for page in CatalogPage::split(&shards) {
        let shards = page.iter().map(|shard| shard.id.clone()).collect();
        let exit = orders::give(office, (Action::AddShards { shards }, order.clone())).await?;
        if exit != Exit::Done {
            return Ok(exit);
        }
    }
    Ok(Exit::Done)
}

/// Ids of the shards on the pages that the head names.
async fn in_the_run(office: &Office, signers: &[KeyRef]) -> Result<HashSet<String>, Failure> {
    let (context, keys) = run_of(office).await?;
    let newest = office.read::<Head>(&keys.head(), &context, signers).await?.catalog;
    let mut ids = HashSet::new();
    for page in 0..=newest.page {
        let page = office.read::<CatalogPage>(&keys.catalog(page), &context, signers).await?;
        ids.extend(page.shards.into_iter().map(|shard| shard.id));
    }
    Ok(ids)
}

/// Manifests of the published shards, or of those that `only` names, sorted by id.
pub async fn published(office: &Office, only: &[String], signers: &[KeyRef]) -> Result<Vec<ShardManifest>, Failure> {
    let listing = format!("{}/data/shards/", prefix(office.context.netuid));
    let mut shards = Vec::new();
    for meta in office.store.list(&listing).await.map_err(unserved)? {
        if !meta.key.ends_with("/manifest.qsr") {
            continue;
        }
        let shard = office.read::<ShardManifest>(&meta.key, &office.context, signers).await?;
        if only.is_empty() || only.contains(&shard.id) {
            shards.push(shard);
        }
    }
    if let Some(missing) = only.iter().find(|id| !shards.iter().any(|shard| shard.id == **id)) {
        return Err(Failure::configuration(anyhow::anyhow!("shard {missing} is not published")).hint("`data publish --dir DIR`"));
    }
    shards.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(shards)
}
