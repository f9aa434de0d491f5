//! Audits at the edge: the beacon, the keys that openings are sealed to, and the orders that deliver grants to validators.

use bytes::Bytes;
use chain::{ChainError, STATE_BLOCKS};
use daemon::clock;
use protocol::audits::Selection;
use protocol::documents::{
    AuditDraw, AuditOrder, Lease, OpenedPart, VERDICT_COMMIT_BYTES, VERDICT_REVEAL_BYTES, opening_volume_bytes, opening_volumes,
};
use protocol::envelope::{self, Document, Purpose, header_for};
use protocol::{Digest, GrantBundle, Reason, codec};
use storage::{Presign, bundle, seal_stream};
use zeroize::Zeroizing;

use super::{Service, persist};
use crate::machine::VERDICT_MS;

impl Service {
    /// What the audits of `cycle` are drawn with: what a process before this one wrote down, or what the chain says of `block`.
    pub(super) async fn draw_audits(&self, cycle: u64, block: u64) -> AuditDraw {
        let key = self.run.draw(cycle);
        persist("drawing audits", || async {
            let found = self.read_document(&key, AuditDraw::PURPOSE.file_limit()).await.map_err(|error| error.to_string())?;
            let bytes = match found {
                Some(bytes) => bytes,
                None => self.put_once(&key, &self.read_draw(cycle, block).await?).await,
            };
            self.open_own::<AuditDraw>(&bytes).map(|draw| draw.document).map_err(|error| error.to_string())
        })
        .await
    }

    async fn read_draw(&self, cycle: u64, block: u64) -> Result<AuditDraw, String> {
        let chain = self.chain.client().await.map_err(|error| error.to_string())?;
        let head = chain.head().await.map_err(|error| error.to_string())?.number;
        let hash = match chain.block_hash(block).await {
            Ok(Some(hash)) => hash,
            Ok(None) => return Err(format!("block {block} is not finalized yet")),
            Err(error) => return Err(error.to_string()),
        };
        // Others may have seen what this one comes too late for. A list of its own would set their audits apart from those of who reads it.
        let validators = match chain.metagraph_at(self.context.netuid, block).await {
            Ok(metagraph) => metagraph.validators(),
            // Of a newer block an endpoint says so that lags behind the others.
            Err(error @ ChainError::StateForgotten { .. }) if block + STATE_BLOCKS < head => {
                tracing::warn!(cycle, block, "this cycle is not audited, since it is not known who could audit: {error}");
                Vec::new()
            }
            Err(error) => return Err(error.to_string()),
        };
        Ok(AuditDraw { cycle, beacon_block: block, beacon: Digest(hash), validators })
    }

    /// X25519 secret and public key that the opening of an audit is sealed to: the same after any restart.
    pub(super) fn opening_key(&self, audit: &Digest) -> (Zeroizing<[u8; 32]>, [u8; 32]) {
        seal_stream::key_pair(&Digest::derive("quasar/v1/opening-key", &[&*self.opening_secret, &audit.0]).0)
    }

    /// Delivers the grants of an audit to its validator.
    pub(super) async fn order_audit(
        &self,
        selection: &Selection,
        recipient: Option<[u8; 32]>,
        parts: &[(u64, Digest)],
        leases: Vec<Lease>,
    ) {
        let key = self.run.audit(&selection.validator, &selection.audit);
        let (hotkey, slot) = (selection.hotkey, selection.slot);
        persist(&key, || async {
            let now_ms = clock::now_ms();
            let read = |key: String| Presign::Get { key, now_ms, expires_in_ms: VERDICT_MS };
            let write =
                |key: String, length: u64| Presign::Put { key, length, sha256: None, if_absent: true, now_ms, expires_in_ms: VERDICT_MS };
            let mut wanted = vec![
                read(self.run.payload(&hotkey, slot, selection.t)),
                read(self.run.commitment(&hotkey, slot, selection.t)),
                write(self.run.verdict_commit(&selection.validator, &selection.audit), VERDICT_COMMIT_BYTES),
                write(self.run.verdict_reveal(&selection.validator, &selection.audit), VERDICT_REVEAL_BYTES),
            ];
            let (keys, volume_bytes) = (self.run.slot(&hotkey, slot), opening_volume_bytes(self.plan.total_elements()));
            for (part, (length, _)) in parts.iter().enumerate() {
                let volumes = opening_volumes(*length, volume_bytes);
                wanted.extend(volumes.map(|(volume, _)| read(keys.opening_volume(&selection.audit, part as u8, volume))));
            }
            let mut shards: Vec<&String> = leases.iter().flat_map(|lease| lease.rows.iter().map(|range| &range.shard)).collect();
            shards.sort();
            shards.dedup();
            wanted.extend(shards.into_iter().map(|shard| read(self.keys.shard_tokens(shard))));
            let requests =
                wanted.iter().map(|request| self.store.presign(request)).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
            let sequence = self.sequence.next(now_ms).map_err(|error| error.to_string())?;
            let header = header_for::<AuditOrder>(&self.context, self.signer.key(), sequence, now_ms);
            let Some(recipient) = recipient else {
                tracing::warn!(validator = %selection.validator, "audit not delivered: {}", Reason::NeedsCertificate.sentence());
                return Ok(());
            };
            let (secret, _) = self.opening_key(&selection.audit);
            let seal = |plain: &[u8]| {
                bundle::seal_bytes(&self.context, Purpose::AuditOrder, &header, &recipient, plain).map_err(|error| error.to_string())
            };
            let (sealed, opening_key) = (seal(&codec::encode(&GrantBundle { requests }))?, seal(&*secret)?);
            let order = AuditOrder {
                audit: selection.audit,
                validator: selection.validator,
                cycle: selection.cycle,
                hotkey,
                slot,
                t: selection.t,
                beacon_block: selection.beacon_block,
                opening: parts.iter().map(|(length, sha256)| OpenedPart { length: *length, sha256: *sha256 }).collect(),
                leases: leases.clone(),
                sealed,
                opening_key,
            };
            debug_assert!(codec::encode(&order).len() <= Purpose::AuditOrder.limit());
            let bytes = Bytes::from(envelope::sign_with_header(header, &order, &*self.signer));
            self.put_bytes_once(&key, bytes).await.map(drop).map_err(|error| error.to_string())
        })
        .await;
        tracing::info!(
            cycle = selection.cycle,
            hotkey = %hotkey.short(),
            slot,
            t = selection.t,
            validator = %selection.validator.short(),
            opened = !parts.is_empty(),
            "audit ordered"
        );
    }
}
