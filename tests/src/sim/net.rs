//! Between a node and the store: latency, losses, repetitions, old answers, partitions; and what all of it amounts to in requests.

use std::collections::HashMap;

use bytes::Bytes;
use futures::FutureExt;
use protocol::{GrantRequest, KeyMap, Method};
use storage::client::{GrantAccess, GrantError, PutOutcome};
use storage::{Object, ObjectStore, PutCondition, StoreError};

use super::plan::Faults;
use super::random::Random;
use super::world::World;

/// 0 is the orchestrator; then come the miners, then the validators, then the orchestrator's standby.
pub type Node = usize;

/// Old versions are given out for so long after a write.
const STALE_MS: u64 = 3_000;
/// A request that nobody answers is given up after so long.
const TIMEOUT_MS: u64 = 10_000;

/// Requests and bytes of one kind of node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub gets: u64,
    /// Of these, answered with "not modified" or "absent".
    pub empty: u64,
    pub puts: u64,
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    /// Nothing happened.
    Lost,
    /// It happened, and nobody hears of it.
    ReplyLost,
    /// It happens once more, so much later.
    Twice(u64),
    Partial,
}

/// One request of the orchestrator that fails: nothing of it is done, or it is done and nobody hears of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailingRequest {
    pub is_write: bool,
    /// The so many-th of its reads, or of its writes and deletions.
    pub count: u64,
    pub is_done: bool,
}

/// The weather.
pub struct Net {
    random: Random,
    faults: Faults,
    latency_ms: u64,
    pub(super) unreachable_until: HashMap<Node, u64>,
    pub(super) down_until_ms: u64,
    pub(super) chain_stalled_until_ms: u64,
    /// It makes blocks of which nobody hears.
    pub(super) chain_goes_on: bool,
    pub(super) slow: Vec<Node>,
    previous: KeyMap<(u64, Object)>,
    pub traffic: [Traffic; 3],
    pub failing: Option<FailingRequest>,
    /// Reads and writes that the first orchestrator began, lost ones among them.
    pub asked: [u64; 2],
}

impl Net {
    pub fn new(random: Random, faults: Faults, latency_ms: u64) -> Self {
        Self {
            random,
            faults,
            latency_ms,
            unreachable_until: HashMap::new(),
            down_until_ms: 0,
            chain_stalled_until_ms: 0,
            chain_goes_on: false,
            slow: Vec::new(),
            previous: KeyMap::default(),
            traffic: [Traffic::default(); 3],
            failing: None,
            asked: [0; 2],
        }
    }

    fn draw(&mut self, node: Node, now_ms: u64, is_put: bool) -> (u64, Fate) {
        let mut delay_ms = self.random.between(self.latency_ms / 2 + 1, self.latency_ms * 3 / 2 + 1);
        if node == 0 {
            let count = &mut self.asked[usize::from(is_put)];
            *count += 1;
            if let Some(FailingRequest { is_done, .. }) = self.failing.filter(|one| (one.is_write, one.count) == (is_put, *count)) {
                return (delay_ms, if is_done { Fate::ReplyLost } else { Fate::Lost });
            }
        }
        let is_cut = self.unreachable_until.get(&node).is_some_and(|until| *until > now_ms) || self.down_until_ms > now_ms;
        if is_cut {
            return (TIMEOUT_MS.min(delay_ms * 20), Fate::Lost);
        }
        if now_ms > self.faults.until_ms {
            return (delay_ms, Fate::Done);
        }
        if self.random.chance(self.faults.tail_ppm) {
            delay_ms *= 20;
        }
        if self.slow.contains(&node) {
            delay_ms *= 4;
        }
        let fate = if self.random.chance(self.faults.error_ppm) {
            Fate::Lost
        } else if self.random.chance(self.faults.lost_reply_ppm) {
            Fate::ReplyLost
        } else if is_put && self.random.chance(self.faults.duplicate_ppm) {
            Fate::Twice(self.random.between(100, 5_000))
        } else if is_put && self.random.chance(self.faults.partial_ppm) {
            Fate::Partial
        } else {
            Fate::Done
        };
        (delay_ms, fate)
    }

    fn is_stale(&mut self, now_ms: u64) -> bool {
        now_ms <= self.faults.until_ms && self.random.chance(self.faults.stale_ppm)
    }
}

fn now<T>(future: impl Future<Output = T>) -> T {
    // Store and chain in memory answer at once.
    future.now_or_never().expect("a store in memory never waits")
}

fn unavailable(key: &str) -> StoreError {
    StoreError::Unavailable { key: key.to_owned(), reason: "simulated: no answer".into() }
}

impl World {
    fn role(&self, node: Node) -> usize {
        match node {
            0 => 0,
            node if node <= self.plan.miners => 1,
            node if node <= self.plan.miners + self.plan.validators => 2,
            _ => 0,
        }
    }

    /// Whether a node reaches anything at all just now.
    pub fn is_cut(&self, node: Node) -> bool {
        self.net.borrow().unreachable_until.get(&node).is_some_and(|until| *until > self.executor.now_ms())
    }

    /// A read with the bucket's credentials, or of a public object.
    pub async fn get(&self, node: Node, key: &str, etag: Option<&str>) -> Result<Option<Object>, StoreError> {
        let (delay_ms, fate) = self.net.borrow_mut().draw(node, self.executor.now_ms(), false);
        self.executor.sleep(delay_ms).await;
        self.get_now(node, key, etag, fate != Fate::Done)
    }

    /// The same without the time that it takes.
    pub fn get_soon(&self, node: Node, key: &str, etag: Option<&str>) -> Result<Option<Object>, StoreError> {
        let (_, fate) = self.net.borrow_mut().draw(node, self.executor.now_ms(), false);
        self.get_now(node, key, etag, fate != Fate::Done)
    }

    fn get_now(&self, node: Node, key: &str, etag: Option<&str>, is_lost: bool) -> Result<Option<Object>, StoreError> {
        let role = self.role(node);
        let mut net = self.net.borrow_mut();
        net.traffic[role].gets += 1;
        if is_lost {
            return Err(unavailable(key));
        }
        let now_ms = self.executor.now_ms();
        // Whoever moves head and lease reads them strongly consistent, as compare-and-swap needs it.
        if !(role == 0 && (key == self.head_key() || key == self.lease_key()))
            && net.is_stale(now_ms)
            && let Some((written_ms, object)) = net.previous.get(key)
            && written_ms + STALE_MS > now_ms
        {
            return Ok((object.etag.as_deref() != etag).then(|| object.clone()));
        }
        let found = now(self.store.get_if_changed(key, etag, u64::MAX));
        match &found {
            Ok(Some(object)) => net.traffic[role].received_bytes += object.bytes.len() as u64,
            _ => net.traffic[role].empty += 1,
        }
        found
    }

    /// A write with the bucket's credentials.
    pub async fn put(&self, node: Node, key: &str, bytes: Bytes, condition: PutCondition) -> Result<String, StoreError> {
        let (delay_ms, fate) = self.net.borrow_mut().draw(node, self.executor.now_ms(), true);
        self.executor.sleep(delay_ms / 2).await;
        let role = self.role(node);
        {
            let mut net = self.net.borrow_mut();
            net.traffic[role].puts += 1;
            net.traffic[role].sent_bytes += bytes.len() as u64;
        }
        let written = match fate {
            Fate::Lost | Fate::Partial => Err(unavailable(key)),
            Fate::Done | Fate::ReplyLost | Fate::Twice(_) => self.write(node, key, &bytes, condition.clone()),
        };
        if written.is_ok() {
            self.bucket_changed(node);
        }
        if let Fate::Twice(later_ms) = fate {
            let (world, key) = (self.me(), key.to_owned());
            self.executor.after(later_ms, super::executor::WORLD, move || {
                let _ = world.write(node, &key, &bytes, condition);
            });
        }
        self.executor.sleep(delay_ms / 2).await;
        if fate == Fate::ReplyLost { Err(unavailable(key)) } else { written }
    }

    /// Deletes an object; one that is gone already is no failure.
    pub async fn delete(&self, node: Node, key: &str) {
        loop {
            let (delay_ms, fate) = self.net.borrow_mut().draw(node, self.executor.now_ms(), true);
            self.executor.sleep(delay_ms).await;
            if fate != Fate::Lost && fate != Fate::Partial {
                let _ = now(self.store.delete(key));
                self.bucket_changed(node);
                return;
            }
            self.executor.sleep(1_000).await;
        }
    }

    fn write(&self, node: Node, key: &str, bytes: &Bytes, condition: PutCondition) -> Result<String, StoreError> {
        let is_once = condition == PutCondition::IfAbsent;
        if !is_once && self.plan.faults.stale_ppm > 0 {
            self.remember(key);
        }
        let etag = now(self.store.put(key, bytes.clone(), condition))?;
        self.watch.borrow_mut().wrote(self, node, key, bytes, is_once);
        Ok(etag)
    }

    fn remember(&self, key: &str) {
        if let Ok(Some(object)) = now(self.store.get_if_changed(key, None, u64::MAX)) {
            self.net.borrow_mut().previous.insert(key.to_owned(), (self.executor.now_ms(), object));
        }
    }

    /// Redeems a read grant; `transfer_ms` is what the bytes take.
    pub async fn redeem_get(&self, node: Node, grant: &GrantRequest, transfer_ms: u64) -> Result<Bytes, GrantError> {
        let (delay_ms, fate) = self.net.borrow_mut().draw(node, self.executor.now_ms(), false);
        self.executor.sleep(delay_ms + transfer_ms).await;
        let role = self.role(node);
        self.net.borrow_mut().traffic[role].gets += 1;
        if fate != Fate::Done {
            return Err(GrantError::Unavailable { key: grant.key.clone(), reason: "simulated: no answer" });
        }
        let bytes = now(self.grants.get(grant, None, u64::MAX))?;
        self.net.borrow_mut().traffic[role].received_bytes += bytes.len() as u64;
        Ok(bytes)
    }

    /// Redeems a write grant.
    pub async fn redeem_put(&self, node: Node, grant: &GrantRequest, bytes: Bytes, transfer_ms: u64) -> Result<PutOutcome, GrantError> {
        let (delay_ms, fate) = self.net.borrow_mut().draw(node, self.executor.now_ms(), true);
        let half_ms = (delay_ms + transfer_ms) / 2;
        self.executor.sleep(half_ms).await;
        let role = self.role(node);
        {
            let mut net = self.net.borrow_mut();
            net.traffic[role].puts += 1;
            net.traffic[role].sent_bytes += bytes.len() as u64;
        }
        let lost = || GrantError::Unavailable { key: grant.key.clone(), reason: "simulated: no answer" };
        let written = match fate {
            Fate::Lost => Err(lost()),
            // The store sees another length than the one that was signed.
            Fate::Partial => now(self.grants.put(grant, bytes.slice(..bytes.len() / 2))).and(Err(lost())),
            Fate::Done | Fate::ReplyLost | Fate::Twice(_) => self.write_granted(node, grant, &bytes),
        };
        if let Fate::Twice(later_ms) = fate {
            let (world, grant, bytes) = (self.me(), grant.clone(), bytes.clone());
            self.executor.after(later_ms, super::executor::WORLD, move || {
                let _ = world.write_granted(node, &grant, &bytes);
            });
        }
        self.executor.sleep(half_ms).await;
        if fate == Fate::ReplyLost { Err(lost()) } else { written }
    }

    fn write_granted(&self, node: Node, grant: &GrantRequest, bytes: &Bytes) -> Result<PutOutcome, GrantError> {
        debug_assert_eq!(grant.method, Method::Put);
        let is_once = grant.headers.iter().any(|(name, _)| name == "if-none-match");
        if !is_once && self.plan.faults.stale_ppm > 0 {
            self.remember(&grant.key);
        }
        let outcome = now(self.grants.put(grant, bytes.clone()))?;
        if outcome == PutOutcome::Stored {
            self.watch.borrow_mut().wrote(self, node, &grant.key, bytes, is_once);
        }
        Ok(outcome)
    }

    /// Bytes as they lie in the bucket, for those who watch.
    pub fn peek(&self, key: &str) -> Option<Bytes> {
        now(self.store.get_if_changed(key, None, u64::MAX)).ok().flatten().map(|object| object.bytes)
    }

    /// Puts something into the bucket before the world begins.
    pub fn plant(&self, key: &str, bytes: Bytes) {
        now(self.store.put(key, bytes, PutCondition::Always)).expect("a store in memory takes everything");
    }
}
