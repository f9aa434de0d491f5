//! Shards that join the running run: what an order names becomes a page of the catalog, written once, and then rows in the ledger.

use std::collections::VecDeque;

use protocol::documents::{CATALOG_PAGE_SHARDS, CatalogRef, RunState};
use serde::{Deserialize, Serialize};

use super::{Effect, Orchestrator, StoredPage};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Catalog {
    /// The newest page whose shards are in the ledger.
    pub newest: CatalogRef,
    /// What is to join, one order after the other.
    additions: VecDeque<Addition>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Addition {
    order: u64,
    shards: Vec<String>,
}

impl Catalog {
    pub(super) fn new(newest: CatalogRef) -> Self {
        Self { newest, additions: VecDeque::new() }
    }
}

impl Orchestrator {
    /// The newest page whose shards are in the ledger.
    pub fn newest_page(&self) -> CatalogRef {
        self.catalog.newest
    }

    pub(super) fn order_shards(&mut self, order: u64, shards: Vec<String>) {
        if self.state != RunState::Open {
            return self.settle_order(order, Err("the run is ending: no more rows are given out".to_owned()));
        }
        if shards.len() > CATALOG_PAGE_SHARDS {
            return self.settle_order(order, Err(format!("{} shards are more than the {CATALOG_PAGE_SHARDS} of a page", shards.len())));
        }
        self.catalog.additions.push_back(Addition { order, shards });
        if self.catalog.additions.len() == 1 {
            self.write_next_page();
        }
    }

    /// Asks for the page of what is to join next, without the shards that are in the run already: an order that a successor takes
    /// again changes nothing.
    pub(super) fn write_next_page(&mut self) {
        while let Some(addition) = self.catalog.additions.front() {
            let missing: Vec<String> = addition.shards.iter().filter(|id| !self.ledger.has_shard(id)).cloned().collect();
            if !missing.is_empty() {
                let CatalogRef { page, digest: previous } = self.catalog.newest;
                return self.emit(Effect::WritePage { page: page + 1, previous, shards: missing });
            }
            let (order, shards, page) = (addition.order, addition.shards.len(), self.catalog.newest.page);
            self.catalog.additions.pop_front();
            let what = if shards == 1 { "the shard is".to_owned() } else { format!("all {shards} shards are") };
            self.settle_order(order, Ok(format!("{what} in the run; the newest page of its catalog is {page}")));
        }
    }

    pub(super) fn on_page_written(&mut self, page: u32, outcome: Result<StoredPage, String>) {
        if page != self.catalog.newest.page + 1 {
            return;
        }
        match outcome {
            // It may be the page of a writer before us, with other shards: it stands, and ours come on the next one.
            Ok(stored) => self.adopt_page(stored),
            Err(why) => {
                let Some(refused) = self.catalog.additions.pop_front() else { return };
                self.settle_order(refused.order, Err(why));
            }
        }
        self.write_next_page();
    }

    pub(super) fn adopt_page(&mut self, stored: StoredPage) {
        for shard in &stored.shards {
            self.ledger.add_shard_of(&shard.source, &shard.id, shard.rows, shard.row_tokens);
        }
        self.catalog.newest = stored.reference;
        self.head_dirty = true;
        self.pace.snapshot = true;
    }
}
