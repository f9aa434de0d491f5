//! The grants of this validator: standing ones, and those of each audit order. URLs stay in here and in the client that redeems
//! them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use daemon::clock;
use daemon::evidence::Evidence;
use protocol::documents::{AuditOrder, Lease, OpenedPart, StandingGrants};
use protocol::envelope::Verified;
use protocol::{AccountId, Digest, GrantBundle, GrantRequest, Method};
use storage::bundle;
use storage::client::{GrantAccess, PutOutcome};
use storage::discovery::{RunFacts, RunReader};
use zeroize::Zeroizing;

use super::trouble::Trouble;

/// Least pause between two looks for newer standing grants.
const REFRESH_MS: u64 = 1_000;

/// What an order delivered.
#[derive(Clone)]
pub struct Order {
    pub leases: Vec<Lease>,
    pub opening: Vec<OpenedPart>,
    /// X25519 secret that the opening's parts are sealed to.
    pub opening_key: Arc<Zeroizing<[u8; 32]>>,
    bundle: Arc<GrantBundle>,
}

#[derive(Default)]
struct Bundles {
    standing: Arc<GrantBundle>,
    orders: HashMap<Digest, Order>,
    looked_ms: u64,
}

/// See the module's text.
pub struct Grants {
    facts: Arc<RunFacts>,
    reader: Arc<tokio::sync::Mutex<RunReader>>,
    access: Arc<dyn GrantAccess>,
    own: AccountId,
    secret: Zeroizing<[u8; 32]>,
    proofs: Arc<Evidence>,
    bundles: Mutex<Bundles>,
}

impl Grants {
    pub fn new(
        reader: Arc<tokio::sync::Mutex<RunReader>>,
        facts: Arc<RunFacts>,
        access: Arc<dyn GrantAccess>,
        own: AccountId,
        secret: Zeroizing<[u8; 32]>,
        proofs: Arc<Evidence>,
    ) -> Self {
        Self { facts, reader, access, own, secret, proofs, bundles: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Bundles> {
        self.bundles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn access(&self) -> &dyn GrantAccess {
        self.access.as_ref()
    }

    /// Opens an order's bundle and keeps it.
    pub fn keep(&self, order: Verified<AuditOrder>) -> Result<(), Trouble> {
        let document = order.document;
        let bundle = Arc::new(bundle::open(&self.facts.context, &order.header, &document.sealed, &self.secret)?);
        let key = bundle::open_bytes(&self.facts.context, &order.header, &document.opening_key, &self.secret)?;
        let key = <[u8; 32]>::try_from(key.as_slice()).map_err(|_| Trouble::malformed("the opening key", "it is not 32 bytes"))?;
        let opening_key = Arc::new(Zeroizing::new(key));
        let order = Order { leases: document.leases, opening: document.opening, opening_key, bundle };
        self.lock().orders.insert(document.audit, order);
        Ok(())
    }

    pub fn order(&self, audit: &Digest) -> Option<Order> {
        self.lock().orders.get(audit).cloned()
    }

    /// Forgets the grants of an audit that is over.
    pub fn forget(&self, audit: &Digest) {
        self.lock().orders.remove(audit);
    }

    /// Lets the grants of an audit expire.
    #[cfg(test)]
    pub fn expire(&self, audit: &Digest) {
        if let Some(order) = self.lock().orders.get_mut(audit) {
            Arc::make_mut(&mut order.bundle).requests.iter_mut().for_each(|request| request.expires_ms = 0);
        }
    }

    /// A request that has not expired, of the audit if one is named, or standing.
    fn find(&self, audit: Option<&Digest>, method: Method, key: &str) -> Option<GrantRequest> {
        let now_ms = clock::now_ms();
        let bundles = self.lock();
        let order = audit.and_then(|audit| bundles.orders.get(audit)).map(|order| order.bundle.as_ref());
        order.into_iter().chain([bundles.standing.as_ref()]).find_map(|bundle| bundle.find(method, key, now_ms).cloned())
    }

    /// Whether the order of the audit had a request for `key`: then nobody brings another one.
    fn was_ordered(&self, audit: Option<&Digest>, method: Method, key: &str) -> bool {
        let bundles = self.lock();
        let order = audit.and_then(|audit| bundles.orders.get(audit));
        order.is_some_and(|order| order.bundle.requests.iter().any(|request| request.method == method && request.key == key))
    }

    /// The request for `key`; looks for newer standing grants where there is none.
    pub async fn grant(&self, audit: Option<&Digest>, method: Method, key: &str) -> Result<GrantRequest, Trouble> {
        if let Some(grant) = self.find(audit, method, key) {
            return Ok(grant);
        }
        self.refresh().await?;
        self.find(audit, method, key).ok_or_else(|| {
            let key = key.to_owned();
            if self.was_ordered(audit, method, &key) { Trouble::OrderExpired { key } } else { Trouble::NoGrant { key } }
        })
    }

    /// Looks for newer standing grants, not too often.
    async fn refresh(&self) -> Result<(), Trouble> {
        let now_ms = clock::now_ms();
        {
            let mut bundles = self.lock();
            if now_ms < bundles.looked_ms + REFRESH_MS {
                return Ok(());
            }
            bundles.looked_ms = now_ms;
        }
        let key = self.facts.run.standing(&self.own, 0);
        let found = self.reader.lock().await.poll::<StandingGrants>(&key, now_ms).await.inspect_err(|error| {
            if let Some(proof) = error.proof() {
                self.proofs.keep(proof);
            }
        });
        let Some(grants) = found? else { return Ok(()) };
        let standing = bundle::open(&self.facts.context, &grants.header, &grants.document.sealed, &self.secret)?;
        tracing::debug!(grants = standing.requests.len(), "standing grants");
        self.lock().standing = Arc::new(standing);
        Ok(())
    }

    /// Reads `key` whole, at most `limit` bytes.
    pub async fn get(&self, audit: Option<&Digest>, key: &str, limit: u64) -> Result<Bytes, Trouble> {
        let grant = self.grant(audit, Method::Get, key).await?;
        Ok(self.access.get(&grant, None, limit).await?)
    }

    /// Reads bytes `[start, end)` of `key`.
    pub async fn get_range(&self, audit: Option<&Digest>, key: &str, start: u64, end: u64) -> Result<Bytes, Trouble> {
        let grant = self.grant(audit, Method::Get, key).await?;
        Ok(self.access.get(&grant, Some((start, end)), end - start).await?)
    }

    pub async fn put(&self, audit: Option<&Digest>, key: &str, bytes: Bytes) -> Result<PutOutcome, Trouble> {
        let grant = self.grant(audit, Method::Put, key).await?;
        Ok(self.access.put(&grant, bytes).await?)
    }
}
