//! Does a store keep the promises that the protocol relies on? Asked once at start-up, because stores differ: of six S3 servers that were
//! measured, two answered 200 to a conditional write whose condition failed.

use bytes::Bytes;
use protocol::{Digest, GrantRequest, Method};

use crate::client::{GrantAccess, GrantClient, GrantError, PutOutcome};
use crate::seal_stream::fresh_secret;
use crate::{ObjectStore, Presign, PutCondition, StoreError};

/// Writers that race for one write-once key.
const RACERS: usize = 8;
const LIMIT: u64 = 1 << 20;

/// A store that does not keep a promise, or could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ConformanceError {
    #[error(
        "the store does not keep {} promise(s) that a run relies on: {}\nhint: use a store that honours conditional writes and signed headers (AWS S3, SeaweedFS 4, the embedded server)",
        broken.len(), broken.join("; ")
    )]
    Broken { broken: Vec<&'static str> },
    #[error("the store could not be examined: {0}")]
    Store(#[from] StoreError),
    #[error("the store could not be examined: {0}")]
    Grant(#[from] GrantError),
}

impl ConformanceError {
    /// Whether the same examination may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Broken { .. } => false,
            Self::Store(error) => error.is_retryable(),
            Self::Grant(error) => error.is_retryable(),
        }
    }
}

/// Each promise of a store, and whether it is kept.
pub type Report = Vec<(&'static str, bool)>;

/// Examines a store that is reached over HTTP, with keys of its own below `prefix` (ending in `/`), which are removed afterwards.
///
/// # Errors
/// A promise is broken, or the store could not be asked.
pub async fn conformance(store: &dyn ObjectStore, prefix: &str, now_ms: u64) -> Result<(), ConformanceError> {
    verdict(examine(store, prefix, now_ms).await?)
}

/// As [`conformance`], for the whole report.
///
/// # Errors
/// The store could not be asked.
pub async fn examine(store: &dyn ObjectStore, prefix: &str, now_ms: u64) -> Result<Report, ConformanceError> {
    // Its own grant tells which host has to be allowed.
    let probe = store.presign(&Presign::Get { key: format!("{prefix}probe"), now_ms, expires_in_ms: 60_000 })?;
    let host = url::Url::parse(&probe.url).ok().and_then(|url| {
        let port = url.port_or_known_default()?;
        Some(format!("{}:{port}", url.host_str()?))
    });
    let grants = GrantClient::new(host.into_iter().collect())?;
    examine_with(store, &grants, prefix, now_ms).await
}

/// As [`conformance`], for a store whose grants are redeemed through `grants`.
///
/// # Errors
/// As [`conformance`].
pub async fn conformance_with(
    store: &dyn ObjectStore,
    grants: &dyn GrantAccess,
    prefix: &str,
    now_ms: u64,
) -> Result<(), ConformanceError> {
    verdict(examine_with(store, grants, prefix, now_ms).await?)
}

async fn examine_with(store: &dyn ObjectStore, grants: &dyn GrantAccess, prefix: &str, now_ms: u64) -> Result<Report, ConformanceError> {
    // Others may examine the same store at the same time, or have broken off.
    let number: String = fresh_secret()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let prefix = format!("{prefix}conformance-{now_ms}-{number}/");
    let examination = Examination { store, grants, prefix: &prefix, now_ms, report: Vec::new() };
    let result = examination.run().await;
    for object in store.list(&prefix).await? {
        store.delete(&object.key).await?;
    }
    result
}

/// Whether all promises are kept.
///
/// # Errors
/// [`ConformanceError::Broken`] with those that are not.
pub fn verdict(report: Report) -> Result<(), ConformanceError> {
    let broken: Vec<&str> = report.into_iter().filter(|(_, kept)| !kept).map(|(promise, _)| promise).collect();
    if broken.is_empty() { Ok(()) } else { Err(ConformanceError::Broken { broken }) }
}

struct Examination<'a> {
    store: &'a dyn ObjectStore,
    grants: &'a dyn GrantAccess,
    prefix: &'a str,
    now_ms: u64,
    report: Report,
}

impl Examination<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn promise(&mut self, kept: bool, promise: &'static str) {
        self.report.push((promise, kept));
    }

    async fn is_absent(&self, key: &str) -> Result<bool, StoreError> {
        match self.store.head(key).await {
            Ok(_) => Ok(false),
            Err(StoreError::NotFound { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// A grant for one write of `bytes`, or of as many others.
    fn upload(&self, key: &str, bytes: &[u8], is_bound: bool) -> Result<GrantRequest, StoreError> {
        self.store.presign(&Presign::Put {
            key: key.to_owned(),
            length: bytes.len() as u64,
            sha256: is_bound.then(|| Digest::sha256(bytes)),
            if_absent: true,
            now_ms: self.now_ms,
            expires_in_ms: 120_000,
        })
    }

    /// Whether `grant` is refused for `bytes` and leaves nothing at its key, where nothing was.
    async fn is_refused(&self, grant: &GrantRequest, bytes: &'static [u8]) -> Result<bool, ConformanceError> {
        let is_refused = does_not_store(self.grants.put(grant, Bytes::from_static(bytes)).await)?;
        let is_absent = self.is_absent(&grant.key).await?;
        if !is_absent {
            self.store.delete(&grant.key).await?;
        }
        Ok(is_refused && is_absent)
    }

    async fn run(mut self) -> Result<Report, ConformanceError> {
        self.conditional_writes().await?;
        self.reads_and_lists().await?;
        self.grants().await?;
        Ok(self.report)
    }

    async fn conditional_writes(&mut self) -> Result<(), ConformanceError> {
        let (store, once) = (self.store, self.key("once"));
        let first = store.put(&once, Bytes::from_static(b"first"), PutCondition::IfAbsent).await?;
        let second = store.put(&once, Bytes::from_static(b"second"), PutCondition::IfAbsent).await;
        self.promise(is_conflict(second)?, "a second If-None-Match write is refused");
        self.promise(store.get(&once, LIMIT).await?.bytes == "first", "a refused write changes nothing");

        let moved = store.put(&once, Bytes::from_static(b"third"), PutCondition::IfMatch(first.clone())).await;
        self.promise(served(moved)?.is_some(), "an If-Match write with the current tag succeeds");
        let stale = store.put(&once, Bytes::from_static(b"fourth"), PutCondition::IfMatch(first)).await;
        self.promise(is_conflict(stale)?, "an If-Match write with an old tag is refused");
        let nothing = store.put(&self.key("nothing"), Bytes::from_static(b"x"), PutCondition::IfMatch("\"0\"".to_owned())).await;
        self.promise(is_conflict(nothing)?, "an If-Match write to a missing key is refused");

        let raced = self.key("raced");
        let writers = (0..RACERS).map(|racer| store.put(&raced, Bytes::from(vec![racer as u8]), PutCondition::IfAbsent));
        let written = futures::future::join_all(writers).await.into_iter().map(served).collect::<Result<Vec<_>, _>>()?;
        self.promise(written.iter().flatten().count() == 1, "of concurrent If-None-Match writes exactly one wins");
        Ok(())
    }

    async fn reads_and_lists(&mut self) -> Result<(), ConformanceError> {
        let (store, key) = (self.store, self.key("read"));
        store.put(&key, Bytes::from_static(b"0123456789"), PutCondition::Always).await?;
        let object = store.get(&key, LIMIT).await?;
        self.promise(object.etag.is_some(), "a read tells the ETag");
        let again = store.get_if_changed(&key, object.etag.as_deref(), LIMIT).await?;
        self.promise(again.is_none(), "a conditional read of an unchanged object transfers nothing");
        self.promise(store.get_range(&key, 2, 5).await? == "234", "a ranged read returns its range");
        let listed = store.list(&self.key("")).await?;
        self.promise(listed.iter().any(|object| object.key == key && object.length == 10), "a listing shows what was just written");
        store.delete(&key).await?;
        self.promise(self.is_absent(&key).await?, "a deleted object is gone");
        Ok(())
    }

    async fn grants(&mut self) -> Result<(), ConformanceError> {
        let grants = self.grants;
        let key = self.key("grant");
        let grant = self.upload(&key, b"granted", true)?;
        let kept = self.is_refused(&grant, b"GRANTED").await?;
        self.promise(kept, "an upload with another SHA-256 is refused and leaves nothing");

        // Records, verdicts and volumes are bound by their length alone. What this client knows of it would keep it from asking.
        let unbound = GrantRequest { length: None, ..self.upload(&key, b"granted", false)? };
        let kept = self.is_refused(&unbound, b"granted and more").await? && self.is_refused(&unbound, b"gran").await?;
        self.promise(kept, "an upload of another length is refused and leaves nothing");

        let bare_url = grant.url.split('?').next().unwrap_or_default().to_owned();
        let unsigned = GrantRequest { url: bare_url, headers: Vec::new(), length: None, ..grant.clone() };
        let kept = self.is_refused(&unsigned, b"granted").await?;
        self.promise(kept, "an unsigned upload is refused and leaves nothing");

        // The signature covers the key, the method and the time: none of them can be exchanged for another.
        let other_key = GrantRequest { key: self.key("elsewhere"), url: grant.url.replace("/grant?", "/elsewhere?"), ..grant.clone() };
        let kept = self.is_refused(&other_key, b"granted").await? && other_key.url != grant.url;
        self.promise(kept, "a grant for one key is refused for another");
        let late = self.store.presign(&Presign::Put {
            key: key.clone(),
            length: 7,
            sha256: Some(Digest::sha256(b"granted")),
            if_absent: true,
            now_ms: self.now_ms.saturating_sub(3_600_000),
            expires_in_ms: 1_000,
        })?;
        let kept = self.is_refused(&late, b"granted").await?;
        self.promise(kept, "an expired upload grant is refused and leaves nothing");

        let stored = grants.put(&grant, Bytes::from_static(b"granted")).await?;
        self.promise(stored == PutOutcome::Stored, "an upload as granted is stored");
        let replayed = grants.put(&grant, Bytes::from_static(b"granted")).await?;
        self.promise(replayed == PutOutcome::AlreadyThere, "a write-once grant works once");

        let sign_read = |now_ms, expires_in_ms| self.store.presign(&Presign::Get { key: key.clone(), now_ms, expires_in_ms });
        let read = answered(grants.get(&sign_read(self.now_ms, 60_000)?, None, LIMIT).await)?;
        self.promise(read.is_some_and(|bytes| bytes == "granted"), "a read grant reads");
        let as_read = GrantRequest { method: Method::Get, headers: Vec::new(), length: None, sha256: None, ..grant.clone() };
        let other_method = answered(grants.get(&as_read, None, LIMIT).await)?;
        self.promise(other_method.is_none(), "an upload grant reads nothing");
        let as_write = GrantRequest { method: Method::Put, ..sign_read(self.now_ms, 60_000)? };
        let other_method = grants.put(&as_write, Bytes::from_static(b"overwritten")).await;
        let kept = does_not_store(other_method)? && self.store.get(&key, LIMIT).await?.bytes == "granted";
        self.promise(kept, "a read grant writes nothing");
        let expired = answered(grants.get(&sign_read(self.now_ms.saturating_sub(3_600_000), 1_000)?, None, LIMIT).await)?;
        self.promise(expired.is_none(), "an expired grant is refused");
        Ok(())
    }
}

/// What a request gave; `None` where it was refused. A store that did not answer has refused nothing, and kept or broken no promise.
fn served<T>(result: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match result {
        Ok(given) => Ok(Some(given)),
        Err(error) if error.is_retryable() => Err(error),
        Err(_) => Ok(None),
    }
}

/// Whether a conditional write was refused for its condition.
fn is_conflict(written: Result<String, StoreError>) -> Result<bool, StoreError> {
    let is_conflict = matches!(written, Err(StoreError::PreconditionFailed { .. }));
    served(written).map(|_| is_conflict)
}

/// As [`served`], of a grant.
fn answered<T>(result: Result<T, GrantError>) -> Result<Option<T>, GrantError> {
    match result {
        Ok(given) => Ok(Some(given)),
        Err(error) if error.is_retryable() => Err(error),
        Err(_) => Ok(None),
    }
}

fn does_not_store(outcome: Result<PutOutcome, GrantError>) -> Result<bool, GrantError> {
    Ok(answered(outcome)? != Some(PutOutcome::Stored))
}
