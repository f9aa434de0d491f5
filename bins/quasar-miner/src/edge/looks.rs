//! Looks at mutable objects: read, verify, open what is sealed to us, and tell the machine what it may know.

use std::collections::BTreeMap;

use daemon::clock;
use protocol::documents::{Job, PullGrants, StandingGrants};
use protocol::envelope::{Document, Header};
use protocol::{GrantBundle, Reason, SealedBytes};
use storage::bundle;
use storage::discovery::{DiscoveryError, RunReader};

use super::Edge;
use crate::machine::{Found, Look};

/// The reader of the run, and what its last failure was: the same failure is logged once.
pub struct Looks {
    reader: RunReader,
    complaints: BTreeMap<Look, String>,
}

impl Looks {
    pub fn new(reader: RunReader) -> Self {
        Self { reader, complaints: BTreeMap::new() }
    }

    /// A public document of the orchestrator that is written once; `None` while it is absent or cannot be had.
    pub async fn published<D: Document>(&self, key: &str) -> Option<D> {
        match self.reader.published::<D>(key).await {
            Ok(found) => found.map(|verified| verified.document),
            Err(error) => {
                tracing::warn!(key, error = error.to_string().replace('\n', "; "), "a public document could not be read");
                None
            }
        }
    }

    fn complain(&mut self, at: Look, slot: u8, error: &DiscoveryError) {
        let text = error.to_string();
        if self.complaints.get(&at) != Some(&text) {
            tracing::warn!(slot, object = ?at, error = text.replace('\n', "; "), "a look failed");
            self.complaints.insert(at, text);
        }
    }
}

impl Edge {
    pub(super) async fn look(&self, at: Look) -> Found {
        let mut looks = self.looks.lock().await;
        let found = self.look_with(&mut looks.reader, at).await;
        match found {
            Ok(found) => {
                if found != Found::Nothing {
                    looks.complaints.remove(&at);
                }
                found
            }
            Err(error) => {
                if let Some(proof) = error.proof() {
                    self.evidence.keep(proof);
                }
                looks.complain(at, self.slot, &error);
                Found::Failed
            }
        }
    }

    async fn look_with(&self, reader: &mut RunReader, at: Look) -> Result<Found, DiscoveryError> {
        let (run, hotkey, now_ms) = (&self.facts.run, self.hotkey.account(), clock::now_ms());
        Ok(match at {
            Look::Head => reader.head(now_ms).await?.map_or(Found::Nothing, |head| Found::Head(Box::new(head))),
            Look::Moved => Found::Moved(reader.moved(now_ms).await?),
            Look::Job => match reader.poll::<Job>(&run.job(&hotkey, self.slot), now_ms).await? {
                Some(job) if (job.document.hotkey, job.document.slot) == (hotkey, self.slot) => Found::Job(Box::new(job.document)),
                Some(_) => Found::Failed,
                None => Found::Nothing,
            },
            Look::Standing => match reader.poll::<StandingGrants>(&run.standing(&hotkey, self.slot), now_ms).await? {
                Some(grants) if (grants.document.hotkey, grants.document.slot) == (hotkey, self.slot) => {
                    let session_epoch = grants.document.session_epoch;
                    match self.unseal(&grants.header, &grants.document.sealed) {
                        Some(bundle) => Found::Grants { session_epoch, grants: self.book.set_standing(bundle) },
                        None => Found::Failed,
                    }
                }
                Some(_) => Found::Failed,
                None => Found::Nothing,
            },
            Look::Pull => match reader.poll::<PullGrants>(&run.pull_grants(&hotkey, self.slot), now_ms).await? {
                Some(grants) if (grants.document.hotkey, grants.document.slot) == (hotkey, self.slot) => {
                    let session_epoch = grants.document.session_epoch;
                    match self.unseal(&grants.header, &grants.document.sealed) {
                        Some(bundle) => Found::Grants { session_epoch, grants: self.book.set_pull(bundle) },
                        None => Found::Failed,
                    }
                }
                Some(_) => Found::Failed,
                None => Found::Nothing,
            },
        })
    }

    fn unseal(&self, header: &Header, sealed: &SealedBytes) -> Option<GrantBundle> {
        if sealed.ciphertext.is_empty() {
            let reason = Reason::NeedsCertificate;
            tracing::warn!(slot = self.slot, hint = reason.remedy(), "{}", reason.sentence());
            return None;
        }
        match bundle::open(&self.facts.context, header, sealed, &self.secret) {
            Ok(bundle) => Some(bundle),
            Err(error) => {
                // Also what was sealed to an sr25519 key whose bytes happen to be an Ed25519 point, before its certificate was read.
                tracing::warn!(slot = self.slot, %error, "a grant bundle does not open");
                None
            }
        }
    }
}
