//! Writes that are tried until they stand, once or by compare-and-swap, and the reads that go with them.

use bytes::Bytes;
use protocol::documents::Head;
use protocol::envelope::{self, Context, Document, next_sequence};
use quasar_orchestrator::machine::Input;
use storage::{PutCondition, StoreError};

use super::Hands;

const RETRY_FIRST_MS: u64 = 200;
const RETRY_LONGEST_MS: u64 = 15_000;

impl Hands {
    /// Tries until it works.
    pub(super) async fn persist<T, F: Future<Output = Option<T>>>(&self, mut attempt: impl FnMut() -> F) -> T {
        let mut pause_ms = RETRY_FIRST_MS;
        loop {
            if let Some(value) = attempt().await {
                return value;
            }
            self.world.executor.sleep(pause_ms).await;
            pause_ms = (pause_ms * 2).min(RETRY_LONGEST_MS);
        }
    }

    pub(super) fn next_sequence(&self, now_ms: u64) -> u64 {
        let mut node = self.world.orchestrators[self.host].borrow_mut();
        node.disk.sequence = next_sequence(node.disk.sequence, now_ms);
        node.disk.sequence
    }

    /// Numbers of this process are above this one.
    pub(super) fn raise_sequence(&self, floor: u64) {
        let mut node = self.world.orchestrators[self.host].borrow_mut();
        node.disk.sequence = node.disk.sequence.max(floor);
    }

    pub(super) fn tell(&self, input: Input) {
        self.world.tell_orchestrator(self.host, self.life, input);
    }

    pub(super) fn sign_ours<D: Document>(&self, document: &D, context: &Context) -> Bytes {
        let now_ms = self.world.clock_ms(self.id);
        let sequence = self.next_sequence(now_ms);
        Bytes::from(envelope::sign(document, context, &*self.world.office.signer, sequence, now_ms))
    }

    pub(super) async fn put_bytes_once(&self, key: &str, bytes: Bytes) -> Option<Bytes> {
        self.hold().await;
        match self.world.put(self.id, key, bytes.clone(), PutCondition::IfAbsent).await {
            Ok(_) => Some(bytes),
            Err(StoreError::PreconditionFailed { .. }) => {
                self.world.get(self.id, key, None).await.ok().flatten().map(|object| object.bytes)
            }
            Err(_) => None,
        }
    }

    pub(super) async fn put_once<D: Document>(&self, key: &str, document: &D) -> Bytes {
        self.persist(|| self.put_bytes_once(key, self.sign_ours(document, &self.world.context))).await
    }

    pub(super) async fn put_latest(&self, key: &str, revision: u64, make: impl Fn() -> Bytes) -> bool {
        let lock = {
            let mut outbox = self.outbox.borrow_mut();
            let entry = outbox.entry(key.to_owned()).or_default();
            entry.newest = entry.newest.max(revision);
            entry.lock.clone()
        };
        let mut tag = lock.lock().await;
        if self.outbox.borrow().get(key).is_some_and(|entry| entry.newest != revision) {
            return false;
        }
        let known = tag.take();
        *tag = Some(self.persist(|| self.swap(key, known.clone(), &make)).await);
        true
    }

    /// A snapshot that the machine did not ask for: it comes in the place of the last one that it did.
    pub(super) async fn put_newest_snapshot(&self, bytes: Bytes) {
        let key = self.world.run.snapshot();
        let revision = self.outbox.borrow().get(&key).map_or(0, |entry| entry.newest);
        self.put_latest(&key, revision, || bytes.clone()).await;
    }

    pub(super) async fn get_present(&self, key: &str) -> Option<Bytes> {
        self.persist(|| async {
            match self.world.get(self.id, key, None).await {
                Ok(object) => Some(object.map(|object| object.bytes)),
                Err(StoreError::NotFound { .. }) => Some(None),
                Err(_) => None,
            }
        })
        .await
    }

    pub(super) async fn publish_head(&self, head: &Head) {
        let key = self.world.run.head();
        let known = self.head_etag.borrow().clone();
        let make = || self.sign_ours(head, &self.world.context);
        let tag = self.persist(|| self.swap(&key, known.clone(), &make)).await;
        *self.head_etag.borrow_mut() = Some(tag);
    }

    pub(super) async fn publish_current(&self) {
        let key = self.world.keys.current();
        self.persist(|| async {
            let condition = self.condition_of(&key).await?;
            self.confirm().await;
            let bytes = self.sign_ours(&self.world.current, &self.world.context.without_run());
            self.hold().await;
            self.world.put(self.id, &key, bytes, condition).await.ok().map(drop)
        })
        .await;
    }

    /// One attempt of a write by compare-and-swap; `known` is the tag of what this process wrote there last.
    async fn swap(&self, key: &str, known: Option<String>, make: &dyn Fn() -> Bytes) -> Option<String> {
        let mut known = known;
        loop {
            let condition = match known.take() {
                Some(tag) => PutCondition::IfMatch(tag),
                None => self.look_before(key).await?,
            };
            let bytes = make();
            self.hold().await;
            match self.world.put(self.id, key, bytes, condition).await {
                Ok(tag) => return Some(tag),
                // An answer of ours was lost, or somebody else wrote: what lies there now tells, and whose the lease is.
                Err(StoreError::PreconditionFailed { .. }) => {}
                Err(_) => return None,
            }
        }
    }

    /// The condition under which stays what lies at `key`, and what this process signs follows it.
    async fn look_before(&self, key: &str) -> Option<PutCondition> {
        let found = match self.world.get(self.id, key, None).await {
            Ok(object) => Some(object?),
            Err(StoreError::NotFound { .. }) => None,
            Err(_) => return None,
        };
        self.confirm().await;
        let Some(object) = found else { return Some(PutCondition::IfAbsent) };
        if let Ok((envelope, _, _)) = envelope::peek(&object.bytes) {
            self.raise_sequence(envelope.header.sequence);
        }
        Some(PutCondition::IfMatch(object.etag.unwrap_or_default()))
    }

    /// The condition under which the object stays as it is now.
    async fn condition_of(&self, key: &str) -> Option<PutCondition> {
        match self.world.get(self.id, key, None).await {
            Ok(object) => Some(PutCondition::IfMatch(object.and_then(|object| object.etag).unwrap_or_default())),
            Err(StoreError::NotFound { .. }) => Some(PutCondition::IfAbsent),
            Err(_) => None,
        }
    }
}
