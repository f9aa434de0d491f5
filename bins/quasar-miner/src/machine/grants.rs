//! Which requests the orchestrator has granted, without their URLs.

use protocol::{Digest, KeyMap, Method};

use super::io::GrantInfo;

/// Grants by key.
#[derive(Clone, Debug, Default)]
struct Bundle {
    get: KeyMap<GrantInfo>,
    put: KeyMap<GrantInfo>,
}

impl Bundle {
    fn of(grants: Vec<GrantInfo>) -> Self {
        let mut bundle = Self::default();
        for grant in grants {
            bundle.by_method_mut(grant.method).insert(grant.key.clone(), grant);
        }
        bundle
    }

    fn by_method(&self, method: Method) -> &KeyMap<GrantInfo> {
        match method {
            Method::Get => &self.get,
            Method::Put => &self.put,
        }
    }

    fn by_method_mut(&mut self, method: Method) -> &mut KeyMap<GrantInfo> {
        match method {
            Method::Get => &mut self.get,
            Method::Put => &mut self.put,
        }
    }
}

/// The newest standing and pull bundle. A grant that the store refused is forgotten until the next bundle brings it anew.
#[derive(Clone, Debug, Default)]
pub(super) struct Grants {
    standing: Bundle,
    pull: Bundle,
    /// Session that the standing grants were made for; `None` before the first bundle.
    standing_epoch: Option<u64>,
    /// Something that is needed was refused and is awaited in the next bundle.
    is_renewing: bool,
}

impl Grants {
    pub(super) fn set_standing(&mut self, session_epoch: u64, grants: Vec<GrantInfo>) {
        self.standing = Bundle::of(grants);
        self.standing_epoch = Some(session_epoch);
        self.is_renewing = false;
    }

    pub(super) fn set_pull(&mut self, grants: Vec<GrantInfo>) {
        self.pull = Bundle::of(grants);
        self.is_renewing = false;
    }

    pub(super) fn has_standing(&self) -> bool {
        self.standing_epoch.is_some()
    }

    /// Whether the standing grants are those of a live learner in session `session_epoch`.
    pub(super) fn is_live(&self, session_epoch: u64) -> bool {
        self.standing_epoch == Some(session_epoch)
    }

    fn find(&self, method: Method, key: &str, now_ms: u64) -> Option<&GrantInfo> {
        let bundles = [&self.pull, &self.standing].into_iter();
        bundles.filter_map(|bundle| bundle.by_method(method).get(key)).find(|grant| grant.expires_ms > now_ms)
    }

    pub(super) fn can_get(&self, key: &str, now_ms: u64) -> bool {
        self.find(Method::Get, key, now_ms).is_some()
    }

    pub(super) fn can_put(&self, key: &str, now_ms: u64) -> bool {
        self.find(Method::Put, key, now_ms).is_some()
    }

    /// Whether a body with this digest may be put. A grant for another body is one of an earlier session.
    pub(super) fn can_put_body(&self, key: &str, sha256: &Digest, now_ms: u64) -> bool {
        self.find(Method::Put, key, now_ms).is_some_and(|grant| grant.sha256.is_none_or(|bound| bound == *sha256))
    }

    /// The store did not accept a grant: it is not used again.
    pub(super) fn refused(&mut self, method: Method, key: &str) {
        self.standing.by_method_mut(method).remove(key);
        self.pull.by_method_mut(method).remove(key);
        self.is_renewing = true;
    }

    pub(super) fn is_renewing(&self) -> bool {
        self.is_renewing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, expires_ms: u64, sha256: Option<Digest>) -> GrantInfo {
        GrantInfo { method: Method::Put, key: key.into(), sha256, expires_ms }
    }

    #[test]
    fn a_grant_counts_until_it_expires_or_the_store_refuses_it() {
        let mut grants = Grants::default();
        assert!(!grants.has_standing() && !grants.is_live(7));
        grants.set_standing(7, vec![put("a", 100, None)]);
        assert!(grants.is_live(7) && grants.can_put("a", 99) && !grants.can_put("a", 100) && !grants.can_get("a", 1));
        grants.refused(Method::Put, "a");
        assert!(!grants.can_put("a", 1) && grants.is_renewing());
        grants.set_standing(7, vec![put("a", 200, None)]);
        assert!(grants.can_put("a", 150) && !grants.is_renewing());
    }

    #[test]
    fn a_grant_that_is_bound_to_other_bytes_is_not_ours() {
        let mut grants = Grants::default();
        grants.set_pull(vec![put("p", 100, Some(Digest::blake3(b"ours")))]);
        assert!(grants.can_put_body("p", &Digest::blake3(b"ours"), 1));
        assert!(!grants.can_put_body("p", &Digest::blake3(b"of another session"), 1));
    }
}
