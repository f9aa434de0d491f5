//! A store in memory for simulations and tests: the same rules as a real one, without a network, a clock or randomness.
//!
//! Grants work, too: their URLs carry a keyed hash over everything that a presigned request binds, and [`MemoryGrants`] redeems them as
//! a real store would.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use protocol::{Digest, FileRecord, GrantRequest, Method};

use crate::blobs::{BlobError, Blobs, MemoryBlobs, Stat};
use crate::client::{GrantAccess, GrantError, PutOutcome};
use crate::{Object, ObjectMeta, ObjectStore, Presign, PutCondition, StoreError, key};

/// Clones share the objects.
#[derive(Clone, Default)]
pub struct MemoryStore {
    blobs: MemoryBlobs,
}

impl MemoryStore {
    pub fn new() -> Self {
        Self::default()
    }

    fn stored(&self, key: &str) -> Result<(Stat, Bytes), StoreError> {
        // Under an invalid key there is nothing.
        self.blobs.get(key).ok_or_else(|| key::check(key).err().unwrap_or_else(|| StoreError::NotFound { key: key.to_owned() }))
    }

    fn found(&self, key: &str) -> Result<Object, StoreError> {
        let (stat, bytes) = self.stored(key)?;
        Ok(Object { bytes, etag: Some(quoted(&stat.etag())) })
    }
}

fn quoted(etag: &str) -> String {
    format!("\"{etag}\"")
}

fn slice(key: &str, bytes: &Bytes, start: u64, end: u64) -> Result<Bytes, StoreError> {
    if start > end || end > bytes.len() as u64 {
        return Err(StoreError::invalid(key, format!("the object ends before byte {end}")));
    }
    Ok(bytes.slice(start as usize..end as usize))
}

#[async_trait]
impl ObjectStore for MemoryStore {
    async fn get_if_changed(&self, key: &str, etag: Option<&str>, limit: u64) -> Result<Option<Object>, StoreError> {
        let (stat, bytes) = self.stored(key)?;
        if etag.is_some_and(|etag| stat.is_named_by(etag)) {
            return Ok(None);
        }
        if bytes.len() as u64 > limit {
            return Err(StoreError::TooLarge { key: key.to_owned(), limit });
        }
        Ok(Some(Object { bytes, etag: Some(quoted(&stat.etag())) }))
    }

    async fn get_range(&self, key: &str, start: u64, end: u64) -> Result<Bytes, StoreError> {
        slice(key, &self.found(key)?.bytes, start, end)
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta, StoreError> {
        let object = self.found(key)?;
        Ok(ObjectMeta { key: key.to_owned(), length: object.bytes.len() as u64, etag: object.etag })
    }

    async fn put(&self, key: &str, bytes: Bytes, condition: PutCondition) -> Result<String, StoreError> {
        key::check(key)?;
        match self.blobs.put(key, bytes, &condition) {
            Ok(stat) => Ok(quoted(&stat.etag())),
            Err(BlobError::ConditionFailed) => Err(StoreError::PreconditionFailed { key: key.to_owned() }),
            Err(error) => Err(StoreError::unavailable(key, error.to_string())),
        }
    }

    async fn put_file(&self, key: &str, path: &Path, file: &FileRecord) -> Result<(), StoreError> {
        let bytes = std::fs::read(path).map_err(|error| StoreError::invalid(key, format!("{}: {error}", path.display())))?;
        if (bytes.len() as u64, Digest::sha256(&bytes)) != (file.length, file.sha256) {
            return Err(StoreError::invalid(key, "the bytes are not those that were announced"));
        }
        self.put(key, Bytes::from(bytes), PutCondition::IfAbsent).await.map(drop)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, StoreError> {
        if !key::is_valid_prefix(prefix) {
            key::check(prefix)?;
        }
        let listed = self.blobs.list(prefix, None, usize::MAX);
        Ok(listed.into_iter().map(|(key, stat)| ObjectMeta { key, length: stat.length, etag: Some(quoted(&stat.etag())) }).collect())
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        key::check(key)?;
        self.blobs.delete(key);
        Ok(())
    }

    fn presign(&self, request: &Presign) -> Result<GrantRequest, StoreError> {
        key::check(request.key())?;
        let whole_seconds = |expires_in_ms: u64| (expires_in_ms / 1000).clamp(1, crate::presign::MAX_VALIDITY.as_secs()) * 1000;
        let mut grant = match request {
            Presign::Get { key, now_ms, expires_in_ms } => GrantRequest {
                method: Method::Get,
                key: key.clone(),
                url: String::new(),
                headers: Vec::new(),
                length: None,
                sha256: None,
                expires_ms: now_ms / 1000 * 1000 + whole_seconds(*expires_in_ms),
            },
            Presign::Put { key, length, sha256, if_absent, now_ms, expires_in_ms } => GrantRequest {
                method: Method::Put,
                key: key.clone(),
                url: String::new(),
                headers: if_absent.then(|| ("if-none-match".to_owned(), "*".to_owned())).into_iter().collect(),
                length: Some(*length),
                sha256: *sha256,
                expires_ms: now_ms / 1000 * 1000 + whole_seconds(*expires_in_ms),
            },
        };
        grant.url = ["memory://store/", &key::url_path(&grant.key), "?signature=", &signature(&grant).to_string()].concat();
        Ok(grant)
    }
}

/// A keyed hash over all that a grant binds, each part preceded by its length. The key is no secret: a simulation has nobody to hide
/// it from.
fn signature(grant: &GrantRequest) -> Digest {
    let mut bound = Vec::with_capacity(256);
    let mut bind = |part: &[u8]| {
        bound.extend_from_slice(&(part.len() as u64).to_le_bytes());
        bound.extend_from_slice(part);
    };
    bind(match grant.method {
        Method::Get => b"get",
        Method::Put => b"put",
    });
    bind(grant.key.as_bytes());
    bind(grant.length.map(u64::to_le_bytes).as_ref().map_or(&[], |length| &length[..]));
    bind(grant.sha256.as_ref().map_or(&[], |digest| &digest.0[..]));
    for (name, value) in &grant.headers {
        bind(name.as_bytes());
        bind(value.as_bytes());
    }
    bind(&grant.expires_ms.to_le_bytes());
    Digest(*blake3::keyed_hash(b"quasar memory store, grants, v1.", &bound).as_bytes())
}

/// Redeems the grants of a [`MemoryStore`], on a clock that the simulation owns.
#[derive(Clone)]
pub struct MemoryGrants {
    store: MemoryStore,
    /// Unix milliseconds.
    now_ms: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl MemoryGrants {
    pub fn new(store: MemoryStore, now_ms: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self { store, now_ms: Arc::new(now_ms) }
    }

    fn is_good(&self, grant: &GrantRequest, method: Method) -> bool {
        let signed = grant.url.rsplit_once("?signature=").and_then(|(_, text)| text.parse().ok());
        grant.method == method && signed == Some(signature(grant)) && grant.expires_ms > (self.now_ms)()
    }
}

#[async_trait]
impl GrantAccess for MemoryGrants {
    async fn get(&self, grant: &GrantRequest, range: Option<(u64, u64)>, limit: u64) -> Result<Bytes, GrantError> {
        let key = &grant.key;
        if !self.is_good(grant, Method::Get) {
            return Err(GrantError::Expired { key: key.clone() });
        }
        let object = self.store.found(key).map_err(|_| GrantError::Absent { key: key.clone() })?;
        let bytes = match range {
            None => object.bytes,
            Some((start, end)) => {
                slice(key, &object.bytes, start, end).map_err(|_| GrantError::Refused { key: key.clone(), status: 416 })?
            }
        };
        if bytes.len() as u64 > limit {
            return Err(GrantError::TooLarge { key: key.clone(), limit });
        }
        Ok(bytes)
    }

    async fn put(&self, grant: &GrantRequest, bytes: Bytes) -> Result<PutOutcome, GrantError> {
        let key = &grant.key;
        if !self.is_good(grant, Method::Put) {
            return Ok(PutOutcome::Expired);
        }
        let refused = |status| Ok(PutOutcome::Refused { status });
        if grant.length.is_some_and(|length| length != bytes.len() as u64) {
            return refused(403);
        }
        if grant.sha256.is_some_and(|sha256| sha256 != Digest::sha256(&bytes)) {
            return refused(400);
        }
        let once = grant.headers.iter().any(|(name, _)| name == "if-none-match");
        let condition = if once { PutCondition::IfAbsent } else { PutCondition::Always };
        match self.store.put(key, bytes, condition).await {
            Ok(_) => Ok(PutOutcome::Stored),
            Err(StoreError::PreconditionFailed { .. }) => Ok(PutOutcome::AlreadyThere),
            Err(_) => refused(400),
        }
    }
}
