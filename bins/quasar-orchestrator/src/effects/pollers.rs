//! Pollers: progress records of watched slots, blocks and metagraph of the chain, roots and orders. They report changes only.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use chain::{ChainError, KeyCertificate, certificate};
use daemon::driver::Inputs;
use daemon::{Shutdown, Waiting, clock};
use futures::StreamExt;
use protocol::AccountId;
use protocol::documents::{Order, Progress};
use protocol::envelope::{Expect, Purpose, SequenceGuard, open};
use storage::StoreError;

use super::Service;
use crate::machine::{Guest, Input, Slot, StoredOrder};

/// Reads of progress records that run at the same time.
const READS_AT_ONCE: usize = 32;
/// A read of a record takes no longer than this many polls, and not less time than a slow line needs.
const READ_POLLS: u32 = 2;
const READ_TIME_MIN: Duration = Duration::from_secs(3);
/// Silent slots are looked at so many times more rarely than live ones.
pub(crate) const SILENT_FACTOR: u64 = 10;
/// The metagraph is read after so many polls of the block.
const BLOCKS_PER_METAGRAPH: u64 = 10;

/// Looks for a newer root.
const ROOTS_INTERVAL: Duration = Duration::from_secs(10);

/// Starts all pollers, which end with `shutdown`, and the clearing of what an earlier process left on the disk.
pub fn spawn_pollers(service: &Arc<Service>, orders_taken: u64, inputs: &Inputs<Input>, shutdown: &Shutdown) {
    tokio::spawn(poll_progress(service.clone(), inputs.clone(), shutdown.clone()));
    tokio::spawn(poll_chain(service.clone(), inputs.clone(), shutdown.clone()));
    tokio::spawn(poll_roots(service.clone(), shutdown.clone()));
    tokio::spawn(poll_orders(service.clone(), orders_taken, inputs.clone(), shutdown.clone()));
    let service = service.clone();
    tokio::spawn(async move { service.sweep_releases().await });
}

#[derive(Default)]
struct Seen {
    etags: HashMap<Slot, String>,
    guard: SequenceGuard,
}

async fn poll_progress(service: Arc<Service>, inputs: Inputs<Input>, shutdown: Shutdown) {
    let interval = Duration::from_millis(service.manifest.parameters.poll_ms);
    let mut seen = Seen::default();
    let mut round = 0u64;
    while !shutdown.is_triggered() {
        let slots: Vec<(Slot, Option<String>)> = {
            let watched = service.watched.lock().unwrap_or_else(PoisonError::into_inner);
            let silent = if round.is_multiple_of(SILENT_FACTOR) { watched.silent.as_slice() } else { &[] };
            watched.live.iter().chain(silent).map(|slot| (*slot, seen.etags.get(slot).cloned())).collect()
        };
        round += 1;
        let reads = slots.into_iter().map(|(slot, etag)| {
            let service = service.clone();
            async move {
                let key = service.run.progress(&slot.0, slot.1);
                let read = service.store.get_if_changed(&key, etag.as_deref(), Purpose::Progress.file_limit());
                let result = tokio::time::timeout((interval * READ_POLLS).max(READ_TIME_MIN), read).await;
                let late = || Err(StoreError::Unavailable { key: key.clone(), reason: "timed out".to_owned() });
                let result = result.unwrap_or_else(|_| late());
                (slot, key, result)
            }
        });
        // Each is told as it comes: a connection that hangs holds up nobody else's record.
        let mut reads = futures::stream::iter(reads).buffer_unordered(READS_AT_ONCE);
        while let Some((slot, key, result)) = reads.next().await {
            match result {
                Ok(Some(object)) => {
                    if let Some(etag) = object.etag {
                        seen.etags.insert(slot, etag);
                    }
                    let now_ms = clock::now_ms();
                    match open::<Progress>(&object.bytes, &service.context, Expect::Account(&slot.0), now_ms) {
                        Ok(verified) if verified.document.is_well_formed(service.plan.fragments.len()) => {
                            if let Err(error) = seen.guard.accept(&key, &verified.header, &verified.id) {
                                tracing::warn!(hotkey = %slot.0.short(), slot = slot.1, "progress record refused: {error}");
                                continue;
                            }
                            service.records.lock().unwrap_or_else(PoisonError::into_inner).insert(slot, (verified.id, object.bytes));
                            inputs.send(Input::Progress { slot, id: verified.id, record: Box::new(verified.document) }).await;
                        }
                        Ok(_) => {
                            tracing::warn!(hotkey = %slot.0.short(), slot = slot.1, "progress record refused: its lists exceed their bounds")
                        }
                        Err(error) => tracing::debug!(hotkey = %slot.0.short(), slot = slot.1, "progress record refused: {error}"),
                    }
                }
                Ok(None) | Err(StoreError::NotFound { .. }) => {}
                Err(error) => tracing::debug!("{error}"),
            }
        }
        if !shutdown.sleep(interval).await {
            return;
        }
    }
}

async fn poll_chain(service: Arc<Service>, inputs: Inputs<Input>, shutdown: Shutdown) {
    let interval = Duration::from_millis((service.manifest.parameters.poll_ms * 5).clamp(500, 6_000));
    let netuid = service.context.netuid;
    let (mut block, mut guests, mut round) = (0, Vec::new(), 0u64);
    let mut waiting = Waiting::default();
    while !shutdown.is_triggered() {
        let chain = match service.chain.client().await {
            Ok(chain) => chain,
            Err(error) => {
                waiting.log(&format!("the chain cannot be reached: {error}"));
                if !shutdown.sleep(interval).await {
                    return;
                }
                continue;
            }
        };
        match chain.head().await {
            Ok(head) if head.number > block => {
                block = head.number;
                inputs.send(Input::Block { number: block }).await;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!("the chain's head cannot be read: {error}"),
        }
        if round.is_multiple_of(BLOCKS_PER_METAGRAPH) || guests.is_empty() {
            let read = async { Ok::<_, ChainError>((chain.metagraph(netuid).await?, certificate::read_all(&*chain, netuid).await?)) };
            match read.await {
                Ok((metagraph, certificates)) => {
                    let certificates: HashMap<AccountId, KeyCertificate> = certificates.into_iter().collect();
                    let now: Vec<Guest> = metagraph
                        .neurons
                        .iter()
                        .map(|neuron| Guest {
                            hotkey: neuron.hotkey,
                            validator: neuron.validator_permit,
                            recipient: certificate::recipient(&neuron.hotkey, certificates.get(&neuron.hotkey)),
                        })
                        .collect();
                    if now != guests {
                        tracing::info!(hotkeys = now.len(), validators = now.iter().filter(|guest| guest.validator).count(), "metagraph");
                        guests.clone_from(&now);
                        inputs.send(Input::Metagraph { guests: now }).await;
                    }
                }
                Err(error) => tracing::warn!("the metagraph cannot be read: {error}"),
            }
        }
        round += 1;
        if !shutdown.sleep(interval).await {
            return;
        }
    }
}

/// Notices that the owner named another key.
async fn poll_roots(service: Arc<Service>, shutdown: Shutdown) {
    while shutdown.sleep(ROOTS_INTERVAL).await {
        if let Err(error) = service.follow_roots().await {
            tracing::warn!("the newest root cannot be read: {}", error.to_string().replace('\n', "; "));
        }
    }
}

/// Looks for the operator's next order.
async fn poll_orders(service: Arc<Service>, taken: u64, inputs: Inputs<Input>, shutdown: Shutdown) {
    let interval = Duration::from_millis((service.manifest.parameters.poll_ms * 5).clamp(200, 5_000));
    let mut next = taken + 1;
    while shutdown.sleep(interval).await {
        let key = service.run.order(next);
        match service.store.get(&key, Purpose::Order.file_limit()).await {
            Ok(object) => {
                inputs.send(Input::Order { order: StoredOrder::new(next, service.open_own::<Order>(&object.bytes)) }).await;
                next += 1;
            }
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => tracing::debug!("{error}"),
        }
    }
}
