//! Pages of the catalog: the manifests of published shards, copied under one signature.

use protocol::documents::CatalogPage;
use protocol::envelope::{Expect, Purpose, open_stored};
use protocol::{Digest, ShardManifest};

use super::Service;
use crate::machine::StoredPage;

impl Service {
    /// Writes a page with the manifests of `shards`, or finds the one that lies there. Says why not if a shard cannot be in the run.
    pub(super) async fn write_page(&self, page: u32, previous: Digest, shards: &[String]) -> Result<StoredPage, String> {
        let mut manifests = Vec::with_capacity(shards.len());
        for id in shards {
            manifests.push(self.trainable(id).await?);
        }
        let key = self.run.catalog(page);
        let document = CatalogPage { page, previous, shards: manifests };
        if !document.fits() {
            return Err(format!("the manifests of these {} shards are larger than a page: order fewer at a time", shards.len()));
        }
        let bytes = self.put_once(&key, &document).await;
        let stored = self.open_own::<CatalogPage>(&bytes).map_err(|error| format!("{key}: {error}"))?.document;
        if (stored.page, stored.previous) != (page, previous) {
            return Err(format!("{key} is there and does not follow the page before it"));
        }
        Ok(StoredPage::new(Digest::blake3(&bytes), &stored))
    }

    /// The manifest of a published shard that this run can train on.
    async fn trainable(&self, id: &str) -> Result<ShardManifest, String> {
        let key = self.keys.shard_manifest(id);
        let limit = Purpose::ShardManifest.file_limit();
        let bytes = self.get_present(&key, limit).await.ok_or_else(|| format!("shard {id} is not published"))?;
        // Shards belong to no run.
        let opened = open_stored::<ShardManifest>(&bytes, &self.context.without_run(), Expect::Any(&self.signers));
        let shard = opened.map_err(|error| format!("{key}: {error}"))?.document;
        if shard.id != id || !shard.file.is_consistent() {
            return Err(format!("{key} contradicts itself"));
        }
        if shard.held_out {
            return Err(format!("shard {id} is held out: what a run is measured on is chosen when it is created"));
        }
        let row_tokens = self.manifest.parameters.sequence_length;
        if shard.row_tokens != row_tokens {
            return Err(format!("shard {id} has rows of {} tokens, the run of {row_tokens}", shard.row_tokens));
        }
        if self.shards.first().is_some_and(|first| first.tokenizer != shard.tokenizer) {
            return Err(format!("shard {id} was made with another tokenizer than the run's shards"));
        }
        Ok(shard)
    }
}
