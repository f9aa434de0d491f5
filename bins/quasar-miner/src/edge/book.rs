//! The grants themselves, with their URLs. They stay in here and in the client that redeems them: no log line, error or
//! state machine ever holds one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use protocol::{GrantBundle, GrantRequest, Method};

use crate::machine::GrantInfo;

type Bundle = HashMap<(Method, String), GrantRequest>;

#[derive(Default)]
struct Bundles {
    standing: Bundle,
    pull: Bundle,
}

/// The newest bundle of either kind.
#[derive(Default)]
pub struct GrantBook(Mutex<Bundles>);

impl GrantBook {
    fn lock(&self) -> MutexGuard<'_, Bundles> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the standing grants; gives what the machine may know of them.
    pub fn set_standing(&self, bundle: GrantBundle) -> Vec<GrantInfo> {
        replace(&mut self.lock().standing, bundle)
    }

    /// Replaces the pull grants; gives what the machine may know of them.
    pub fn set_pull(&self, bundle: GrantBundle) -> Vec<GrantInfo> {
        replace(&mut self.lock().pull, bundle)
    }

    /// The unexpired request for `method` and `key`.
    pub fn find(&self, method: Method, key: &str, now_ms: u64) -> Option<GrantRequest> {
        let bundles = self.lock();
        let name = (method, key.to_owned());
        [&bundles.pull, &bundles.standing]
            .into_iter()
            .filter_map(|bundle| bundle.get(&name))
            .find(|grant| grant.expires_ms > now_ms)
            .cloned()
    }
}

fn replace(bundle: &mut Bundle, fresh: GrantBundle) -> Vec<GrantInfo> {
    let info = |grant: &GrantRequest| GrantInfo {
        method: grant.method,
        key: grant.key.clone(),
        sha256: grant.sha256,
        expires_ms: grant.expires_ms,
    };
    let infos = fresh.requests.iter().map(info).collect();
    *bundle = fresh.requests.into_iter().map(|grant| ((grant.method, grant.key.clone()), grant)).collect();
    infos
}
