//! Writes that are tried until they stand, once or by compare-and-swap, and the reads that go with them.

use bytes::Bytes;
use protocol::documents::Head;
use protocol::envelope::{self, Context, Document, next_sequence};
use storage::{PutCondition, StoreError};

use super::super::world::World;
use super::{Hands, NODE};

const RETRY_FIRST_MS: u64 = 200;
const RETRY_LONGEST_MS: u64 = 15_000;

impl World {
    /// Tries until it works.
    pub(super) async fn persist<T, F: Future<Output = Option<T>>>(&self, mut attempt: impl FnMut() -> F) -> T {
        let mut pause_ms = RETRY_FIRST_MS;
        loop {
            if let Some(value) = attempt().await {
                return value;
            }
            self.executor.sleep(pause_ms).await;
            pause_ms = (pause_ms * 2).min(RETRY_LONGEST_MS);
        }
    }

    pub(super) fn next_sequence(&self, now_ms: u64) -> u64 {
        let mut node = self.orchestrator.borrow_mut();
        node.disk.sequence = next_sequence(node.disk.sequence, now_ms);
        node.disk.sequence
    }

    pub(super) fn sign_ours<D: Document>(&self, document: &D, context: &Context) -> Bytes {
        let now_ms = self.clock_ms(NODE);
        let sequence = self.next_sequence(now_ms);
        Bytes::from(envelope::sign(document, context, &*self.office.signer, sequence, now_ms))
    }

    pub(super) async fn put_bytes_once(&self, key: &str, bytes: Bytes) -> Option<Bytes> {
        match self.put(NODE, key, bytes.clone(), PutCondition::IfAbsent).await {
            Ok(_) => Some(bytes),
            Err(StoreError::PreconditionFailed { .. }) => self.get(NODE, key, None).await.ok().flatten().map(|object| object.bytes),
            Err(_) => None,
        }
    }

    pub(super) async fn put_once<D: Document>(&self, key: &str, document: &D) -> Bytes {
        self.persist(|| self.put_bytes_once(key, self.sign_ours(document, &self.context))).await
    }

    pub(super) async fn put_latest(&self, hands: &Hands, key: &str, revision: u64, make: impl Fn() -> Bytes) {
        let lock = {
            let mut outbox = hands.outbox.borrow_mut();
            let entry = outbox.entry(key.to_owned()).or_default();
            entry.newest = entry.newest.max(revision);
            entry.lock.clone()
        };
        let mut tag = lock.lock().await;
        if hands.outbox.borrow().get(key).is_some_and(|entry| entry.newest != revision) {
            return;
        }
        let known = tag.take();
        *tag = Some(self.persist(|| self.swap(key, known.clone(), make())).await);
    }

    pub(super) async fn get_present(&self, key: &str) -> Option<Bytes> {
        self.persist(|| async {
            match self.get(NODE, key, None).await {
                Ok(object) => Some(object.map(|object| object.bytes)),
                Err(StoreError::NotFound { .. }) => Some(None),
                Err(_) => None,
            }
        })
        .await
    }

    pub(super) async fn publish_head(&self, hands: &Hands, head: &Head) {
        let key = self.run.head();
        let known = hands.head_etag.borrow().clone();
        let tag = self.persist(|| self.swap(&key, known.clone(), self.sign_ours(head, &self.context))).await;
        *hands.head_etag.borrow_mut() = Some(tag);
    }

    /// One attempt of a write by compare-and-swap; `known` is what was last seen there. The only writer finds at most an answer of
    /// its own that was lost.
    pub(super) async fn swap(&self, key: &str, known: Option<String>, bytes: Bytes) -> Option<String> {
        let mut known = known;
        loop {
            let condition = match known.take() {
                Some(tag) => PutCondition::IfMatch(tag),
                None => match self.get(NODE, key, None).await {
                    Ok(object) => PutCondition::IfMatch(object.and_then(|object| object.etag).unwrap_or_default()),
                    Err(StoreError::NotFound { .. }) => PutCondition::IfAbsent,
                    Err(_) => return None,
                },
            };
            match self.put(NODE, key, bytes.clone(), condition).await {
                Ok(tag) => return Some(tag),
                Err(StoreError::PreconditionFailed { .. }) => {}
                Err(_) => return None,
            }
        }
    }
}
