//! Pollers: progress records of watched slots, blocks and metagraph of the chain, roots and orders. They report changes only.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chain::{ChainError, KeyCertificate, certificate};
use daemon::driver::Inputs;
use daemon::{Shutdown, Waiting, clock};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use protocol::AccountId;
use protocol::documents::{Order, Progress};
use protocol::envelope::{Expect, Purpose, SequenceGuard, open};
use storage::{Object, StoreError};
use tokio::time::Instant;

use super::{Service, Watched};
use crate::machine::{Guest, Input, Slot, StoredOrder};

/// Reads of progress records that run at the same time: of live slots, and of silent ones.
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
    spawn_progress(service, inputs, shutdown);
    tokio::spawn(poll_chain(service.clone(), inputs.clone(), shutdown.clone()));
    tokio::spawn(poll_roots(service.clone(), shutdown.clone()));
    tokio::spawn(poll_orders(service.clone(), orders_taken, inputs.clone(), shutdown.clone()));
    let service = service.clone();
    tokio::spawn(async move { service.sweep_releases().await });
}

/// Polls the progress records of the watched slots, the silent ones by themselves and more rarely: however many they are, no live one
/// waits for them.
pub(super) fn spawn_progress(service: &Arc<Service>, inputs: &Inputs<Input>, shutdown: &Shutdown) {
    let interval = Duration::from_millis(service.manifest.parameters.poll_ms);
    let silent_interval = interval * SILENT_FACTOR as u32;
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let live = |watched: &Watched| watched.live.clone();
    let silent = |watched: &Watched| watched.silent.clone();
    tokio::spawn(poll_progress(service.clone(), seen.clone(), live, interval, inputs.clone(), shutdown.clone()));
    tokio::spawn(poll_progress(service.clone(), seen, silent, silent_interval, inputs.clone(), shutdown.clone()));
}

/// What was seen of all slots. One that falls silent, or is heard again, goes on where it was.
#[derive(Default)]
struct Seen {
    etags: HashMap<Slot, String>,
    guard: SequenceGuard,
    /// Slots whose record is being read.
    reading: HashSet<Slot>,
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the store answered to the read of a slot's record; `None` where it is as it was.
type Answer = (Slot, Result<Option<Object>, StoreError>);

/// Reads the records of these slots in each interval. Each is told as it comes, and one whose read is still on its way is left out
/// meanwhile: a connection that hangs holds up nobody else's record.
async fn poll_progress(
    service: Arc<Service>,
    seen: Arc<Mutex<Seen>>,
    slots: fn(&Watched) -> Vec<Slot>,
    interval: Duration,
    inputs: Inputs<Input>,
    shutdown: Shutdown,
) {
    let mut due: VecDeque<Slot> = VecDeque::new();
    let mut reads: FuturesUnordered<BoxFuture<'static, Answer>> = FuturesUnordered::new();
    let mut next_round = Instant::now();
    loop {
        tokio::select! {
            () = shutdown.triggered() => return,
            () = tokio::time::sleep_until(next_round) => {
                next_round = Instant::now() + interval;
                let watched = slots(&service.watched.lock().unwrap_or_else(PoisonError::into_inner));
                due.retain(|slot| watched.contains(slot));
                let fresh: Vec<Slot> = watched.into_iter().filter(|slot| !due.contains(slot)).collect();
                due.extend(fresh);
            }
            Some((slot, answer)) = reads.next() => {
                let news = service.news(&mut lock(&seen), slot, answer);
                if let Some(input) = news {
                    inputs.send(input).await;
                }
                // Not before it was told: whoever reads the slot next tells of a later record.
                lock(&seen).reading.remove(&slot);
            }
        }
        while reads.len() < READS_AT_ONCE
            && let Some(slot) = due.pop_front()
        {
            let mut seen = lock(&seen);
            if seen.reading.insert(slot) {
                let etag = seen.etags.get(&slot).cloned();
                reads.push(Box::pin(read_progress(service.clone(), slot, etag)));
            }
        }
    }
}

async fn read_progress(service: Arc<Service>, slot: Slot, etag: Option<String>) -> Answer {
    let key = service.run.progress(&slot.0, slot.1);
    let patience = (Duration::from_millis(service.manifest.parameters.poll_ms) * READ_POLLS).max(READ_TIME_MIN);
    let read = service.store.get_if_changed(&key, etag.as_deref(), Purpose::Progress.file_limit());
    let late = |_| Err(StoreError::Unavailable { key: key.clone(), reason: "timed out".to_owned() });
    let answer = tokio::time::timeout(patience, read).await.unwrap_or_else(late);
    (slot, answer)
}

impl Service {
    /// What the answer to a read tells of a slot, if that is new.
    fn news(&self, seen: &mut Seen, slot: Slot, answer: Result<Option<Object>, StoreError>) -> Option<Input> {
        let object = match answer {
            Ok(Some(object)) => object,
            Ok(None) | Err(StoreError::NotFound { .. }) => return None,
            Err(error) => {
                tracing::debug!("{error}");
                return None;
            }
        };
        if let Some(etag) = object.etag {
            seen.etags.insert(slot, etag);
        }
        let now_ms = clock::now_ms();
        let verified = match open::<Progress>(&object.bytes, &self.context, Expect::Account(&slot.0), now_ms) {
            Ok(verified) => verified,
            Err(error) => {
                tracing::debug!(hotkey = %slot.0.short(), slot = slot.1, "progress record refused: {error}");
                return None;
            }
        };
        if !verified.document.is_well_formed(self.plan.fragments.len()) {
            tracing::warn!(hotkey = %slot.0.short(), slot = slot.1, "progress record refused: its lists exceed their bounds");
            return None;
        }
        let key = self.run.progress(&slot.0, slot.1);
        if let Err(error) = seen.guard.accept(&key, &verified.header, &verified.id) {
            tracing::warn!(hotkey = %slot.0.short(), slot = slot.1, "progress record refused: {error}");
            return None;
        }
        self.records.lock().unwrap_or_else(PoisonError::into_inner).insert(slot, (verified.id, object.bytes));
        let is_current = verified.header.is_current(now_ms);
        Some(Input::Progress { slot, id: verified.id, is_current, record: Box::new(verified.document) })
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
pub(super) async fn poll_orders(service: Arc<Service>, taken: u64, inputs: Inputs<Input>, shutdown: Shutdown) {
    let interval = Duration::from_millis((service.manifest.parameters.poll_ms * 5).clamp(200, 5_000));
    let mut next = taken + 1;
    while shutdown.sleep(interval).await {
        let key = service.run.order(next);
        match service.read_document(&key, Purpose::Order.file_limit()).await {
            Ok(Some(bytes)) => {
                inputs.send(Input::Order { order: StoredOrder::new(next, service.open_own::<Order>(&bytes)) }).await;
                next += 1;
            }
            Ok(None) => {}
            Err(error) => tracing::debug!("{error}"),
        }
    }
}
