//! Verdicts in two phases. A verdict and its salt are in the journal before the commitment goes out, so that whatever happens in
//! between, the reveal opens exactly what was committed.

use std::sync::Arc;

use bytes::Bytes;
use chain::Hotkey;
use daemon::sequence::Sequence;
use daemon::{Journal, JournalError, clock};
use protocol::documents::{Verdict, VerdictCommit, VerdictReveal};
use protocol::envelope::{Document, Expect, sign};
use protocol::{Digest, codec};
use storage::client::{GrantError, PutOutcome};
use storage::discovery::{RunFacts, RunReader};

use super::grants::Grants;
use super::trouble::Trouble;
use crate::audit::Subject;
use crate::machine::audits::Written;

/// The validator's own verdicts, and its eyes on those of others.
pub struct VerdictDesk {
    pub facts: Arc<RunFacts>,
    /// For write-once objects, which need no memory of what was seen.
    pub reader: Arc<RunReader>,
    pub grants: Arc<Grants>,
    pub hotkey: Arc<Hotkey>,
    pub journal: Arc<Journal>,
    pub sequence: Arc<Sequence>,
}

impl VerdictDesk {
    fn name(&self, audit: &Digest) -> String {
        format!("verdict/{}/{audit}", self.facts.context.run)
    }

    /// The decided verdict of an audit, if an earlier moment of this or another life decided one.
    pub async fn decided(&self, audit: &Digest) -> Result<Option<VerdictReveal>, Trouble> {
        let (journal, name) = (self.journal.clone(), self.name(audit));
        let Some(bytes) = blocking(move || journal.get(&name)).await? else { return Ok(None) };
        codec::decode(&bytes, VerdictReveal::PURPOSE.limit()).map(Some).map_err(|error| Trouble::malformed(self.name(audit), error))
    }

    /// Decides `verdict`, unless another one was decided before, and publishes the commitment to what stands.
    pub async fn commit(&self, verdict: Verdict) -> Written {
        self.try_commit(verdict).await.unwrap_or_else(|trouble| written(&trouble))
    }

    async fn try_commit(&self, verdict: Verdict) -> Result<Written, Trouble> {
        let audit = verdict.audit;
        let decided = match self.decided(&audit).await? {
            Some(decided) => decided,
            None => {
                let fresh = VerdictReveal { verdict, salt: self.salt(&verdict) };
                if let Some(public) = self.public_commit(&verdict).await?
                    && public.commitment != verdict.commitment(&fresh.salt)
                {
                    return Ok(Written::Lost("a commitment of an earlier life is published, and its verdict is not in the journal".into()));
                }
                let (journal, name, bytes) = (self.journal.clone(), self.name(&audit), codec::encode(&fresh));
                blocking(move || journal.put(&name, &bytes)).await?;
                fresh
            }
        };
        let commit = VerdictCommit { audit, commitment: decided.verdict.commitment(&decided.salt) };
        self.put(Some(&audit), &self.facts.run.verdict_commit(&verdict.validator, &audit), &commit).await
    }

    /// Publishes the decided verdict.
    pub async fn reveal(&self, audit: Digest) -> Written {
        let reveal = async {
            let Some(decided) = self.decided(&audit).await? else {
                return Ok(Written::Lost("no verdict on this audit is in the journal".into()));
            };
            self.put(Some(&audit), &self.facts.run.verdict_reveal(&decided.verdict.validator, &audit), &decided).await
        };
        let outcome = reveal.await.unwrap_or_else(|trouble: Trouble| written(&trouble));
        if outcome == Written::Done {
            self.grants.forget(&audit);
        }
        outcome
    }

    /// Signs `document` and writes it once, under a grant of the audit if one is named, else a standing one.
    pub async fn put<D: Document>(&self, audit: Option<&Digest>, key: &str, document: &D) -> Result<Written, Trouble> {
        let now_ms = clock::now_ms();
        let sequence = self.sequence.clone();
        let number = blocking(move || sequence.next(now_ms)).await?;
        let bytes = sign(document, &self.facts.context, self.hotkey.as_ref(), number, now_ms);
        Ok(match self.grants.put(audit, key, Bytes::from(bytes)).await? {
            // Write-once: what lies there already is ours, nobody else can sign it and the journal knows one verdict only.
            PutOutcome::Stored | PutOutcome::AlreadyThere => Written::Done,
            PutOutcome::Expired => Written::NoGrant,
            PutOutcome::Refused { status } => Written::Lost(format!("the store refuses it with HTTP status {status}")),
        })
    }

    /// 32 bytes that nobody without the hotkey can know, the same every time, so that even a validator that lost its disk can open
    /// what it committed.
    fn salt(&self, verdict: &Verdict) -> [u8; 32] {
        let message =
            Digest::derive("quasar/v1/verdict-salt", &[&self.facts.context.genesis, &self.facts.context.run.0, &codec::encode(verdict)]);
        Digest::derive("quasar/v1/salt", &[&*self.hotkey.sealing_secret(), &message.0]).0
    }

    async fn public_commit(&self, verdict: &Verdict) -> Result<Option<VerdictCommit>, Trouble> {
        let key = self.facts.run.verdict_commit(&verdict.validator, &verdict.audit);
        let commit = self.reader.once::<VerdictCommit>(&key, Expect::Account(&verdict.validator)).await?;
        Ok(commit.map(|commit| commit.document))
    }

    /// The revealed verdict on `subject`, if it is there, belongs to its commitment and judges what was selected.
    pub async fn revealed(&self, subject: &Subject) -> Result<Option<Verdict>, Trouble> {
        let selection = &subject.selection;
        let key = self.facts.run.verdict_reveal(&selection.validator, &selection.audit);
        let Some(reveal) = self.reader.once::<VerdictReveal>(&key, Expect::Account(&selection.validator)).await? else { return Ok(None) };
        let VerdictReveal { verdict, salt } = reveal.document;
        if !belongs(&verdict, subject) {
            return Err(Trouble::malformed(key, "the verdict judges something else than the selection"));
        }
        match self.public_commit(&verdict).await? {
            Some(commit) if commit.commitment == verdict.commitment(&salt) => Ok(Some(verdict)),
            Some(_) => Err(Trouble::malformed(key, "the verdict is not the one that was committed")),
            None => Err(Trouble::malformed(key, "the verdict was revealed without a commitment")),
        }
    }
}

fn belongs(verdict: &Verdict, subject: &Subject) -> bool {
    let selection = &subject.selection;
    (verdict.audit, verdict.validator, verdict.cycle, verdict.hotkey, verdict.slot, verdict.t, verdict.payload)
        == (
            selection.audit,
            selection.validator,
            selection.cycle,
            selection.hotkey,
            selection.slot,
            selection.t,
            subject.contribution.payload,
        )
}

fn written(trouble: &Trouble) -> Written {
    match trouble {
        Trouble::NoGrant { .. } | Trouble::OrderExpired { .. } | Trouble::NoOrder | Trouble::Grant(GrantError::Expired { .. }) => {
            Written::NoGrant
        }
        Trouble::Grant(GrantError::Forbidden { .. }) => Written::Lost(trouble.line()),
        _ => Written::Unavailable(trouble.line()),
    }
}

/// Journal calls wait for the disk: not on the runtime's threads.
pub(super) async fn blocking<T: Send + 'static>(call: impl FnOnce() -> Result<T, JournalError> + Send + 'static) -> Result<T, Trouble> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Trouble::BenchGone),
    }
}
