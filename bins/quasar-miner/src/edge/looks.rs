//! Looks at mutable objects: read, verify, open what is sealed to us, and tell the machine what it may know.

use std::time::Duration;

use daemon::clock;
use protocol::documents::{Job, PullGrants, StandingGrants};
use protocol::envelope::{Document, Header};
use protocol::{GrantBundle, Reason, SealedBytes};
use storage::bundle;
use storage::discovery::{DiscoveryError, RunReader};
use tokio::sync::Mutex;

use super::Edge;
use crate::machine::{Found, Look};

/// A look takes no longer than this many polls, and not less time than a slow line needs.
const LOOK_POLLS: u32 = 3;
const LOOK_TIME_MIN: Duration = Duration::from_secs(3);
/// After each look that is given up the next one has twice the time, at most so often: a long catalog comes over a slow line too.
const DOUBLINGS_MAX: u32 = 8;

/// Readers of the run: one for each look, so that none waits for another.
pub struct Looks {
    /// Reads what is written once.
    archive: RunReader,
    /// By the number of the look.
    seen: [Mutex<Seen>; Look::ALL.len()],
    patience: Duration,
}

/// What is known of one object.
struct Seen {
    /// With the object's tag and sequence.
    reader: RunReader,
    /// What the last failure was: the same failure is logged once.
    complaint: Option<String>,
    /// Looks in a row that were given up.
    given_up: u32,
}

impl Looks {
    pub fn new(reader: RunReader) -> Self {
        let poll = Duration::from_millis(reader.facts().manifest.parameters.poll_ms);
        let unseen = || Mutex::new(Seen { reader: reader.clone(), complaint: None, given_up: 0 });
        Self { seen: Look::ALL.map(|_| unseen()), patience: poll.saturating_mul(LOOK_POLLS).max(LOOK_TIME_MIN), archive: reader }
    }

    /// A public document of the orchestrator that is written once; `None` while it is absent or cannot be had.
    pub async fn published<D: Document>(&self, key: &str) -> Option<D> {
        match self.archive.published::<D>(key).await {
            Ok(found) => found.map(|verified| verified.document),
            Err(error) => {
                tracing::warn!(key, error = error.to_string().replace('\n', "; "), "a public document could not be read");
                None
            }
        }
    }
}

impl Seen {
    fn complain(&mut self, at: Look, slot: u8, complaint: String) {
        if self.complaint.as_ref() != Some(&complaint) {
            tracing::warn!(slot, object = ?at, error = complaint.replace('\n', "; "), "a look failed");
            self.complaint = Some(complaint);
        }
    }
}

impl Edge {
    pub(super) async fn look(&self, at: Look) -> Found {
        let mut seen = self.looks.seen[at as usize].lock().await;
        let patience = self.looks.patience.saturating_mul(1 << seen.given_up.min(DOUBLINGS_MAX));
        // What a look that is given up has read was told to nobody: its tag and sequence are forgotten with its reader.
        let mut reader = seen.reader.clone();
        let Ok(found) = tokio::time::timeout(patience, self.look_with(&mut reader, at)).await else {
            seen.given_up += 1;
            seen.complain(at, self.slot, "there is no answer in time\nhint: the next look has more time".to_owned());
            return Found::Failed;
        };
        (seen.reader, seen.given_up) = (reader, 0);
        match found {
            Ok(found) => {
                if found != Found::Nothing {
                    seen.complaint = None;
                }
                found
            }
            Err(error) => {
                if let Some(proof) = error.proof() {
                    self.evidence.keep(proof);
                }
                seen.complain(at, self.slot, error.to_string());
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
