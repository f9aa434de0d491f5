//! Where decisions meet the world: every [`Effect`] is executed against bucket, grants, chain, journal and the audit thread, and
//! what came of it goes back to the machine as an [`Input`]. All of them can be done twice without harm.

pub mod base;
pub mod bench;
pub mod chain;
pub mod grants;
mod heads;
pub mod keyframes;
mod openings;
#[cfg(test)]
mod tests;
pub mod tokens;
mod trouble;
pub mod verdicts;

use std::path::Path;
use std::sync::{Arc, Mutex};

use ::chain::Hotkey;
use bytes::Bytes;
use daemon::driver::Inputs;
use daemon::evidence::Evidence as Proofs;
use daemon::health::Component;
use daemon::sequence::Sequence;
use daemon::{Executor, Journal, clock};
use fragments::codec::PayloadHeader;
use protocol::audits::Selection;
use protocol::documents::{
    AuditDraw, AuditOrder, OPENING_PARTS, OpenedPart, PROGRESS_BYTES, Score, Scores, VerdictResult, opening_part_bytes_max,
    opening_volume_bytes,
};
use protocol::envelope::Document;
use protocol::paths::SlotKeys;
use protocol::{AccountId, Digest};
use storage::client::{GrantAccess, GrantError};
use storage::discovery::{RunFacts, RunReader};
use zeroize::Zeroizing;

use crate::audit::{Evidence, Judgement, Opening, Subject};
use crate::machine::audits::{Judged, OrderRead, Written, compare};
use crate::machine::cycles::DrawRead;
use crate::machine::{Effect, HeadFacts, Input};
use ::chain::ChainLink;
use base::BaseTree;
use bench::{Bench, OpenEngine};
use chain::ChainDesk;
use grants::Grants;
use heads::LogHeads;
use keyframes::{Keeper, Keyframes};
use openings::OpenedParts;
use tokens::TokenCache;
pub use trouble::Trouble;
use verdicts::VerdictDesk;

/// What the effects of one run need.
pub struct EffectSettings<'a> {
    /// Follows mutable objects.
    pub reader: RunReader,
    /// Reads write-once objects.
    pub archive: RunReader,
    pub access: Arc<dyn GrantAccess>,
    pub link: Arc<ChainLink>,
    pub hotkey: Arc<Hotkey>,
    /// Opens sealed grants.
    pub secret: Zeroizing<[u8; 32]>,
    pub journal: Arc<Journal>,
    pub state_dir: &'a Path,
    pub open_engine: OpenEngine,
    /// The mechanism that weights are set on.
    pub mechanism: u8,
    pub store_health: Component,
    pub weights_health: Component,
}

/// Executes the effects of one run's machine.
pub struct Effects {
    own: AccountId,
    proofs: Arc<Proofs>,
    log: LogHeads,
    facts: Arc<RunFacts>,
    reader: Arc<tokio::sync::Mutex<RunReader>>,
    archive: Arc<RunReader>,
    grants: Arc<Grants>,
    base: Arc<BaseTree>,
    keyframes: Arc<Keyframes>,
    openings: OpenedParts,
    /// Fetches keyframes as long as this lives.
    _keeper: Keeper,
    bench: Bench,
    verdicts: VerdictDesk,
    chain: ChainDesk,
    store_health: Component,
}

impl Effects {
    /// Sets everything up; must be called inside a runtime.
    pub fn new(settings: EffectSettings<'_>) -> Result<Self, Trouble> {
        let EffectSettings {
            reader,
            archive,
            access,
            link,
            hotkey,
            secret,
            journal,
            state_dir,
            open_engine,
            mechanism,
            store_health,
            weights_health,
        } = settings;
        let (facts, own) = (reader.facts().clone(), hotkey.account());
        let elements = facts.plan.total_elements();
        let (reader, archive) = (Arc::new(tokio::sync::Mutex::new(reader)), Arc::new(archive));
        let proofs = Arc::new(Proofs { folder: state_dir.to_owned(), context: facts.context, finder: hotkey.clone() });
        let grants = Arc::new(Grants::new(reader.clone(), facts.clone(), access, own, secret, proofs.clone()));
        let log = LogHeads::new(archive.clone(), state_dir.join("log-heads").join(facts.context.run.to_string()));
        let base = Arc::new(BaseTree::new(facts.clone(), grants.clone(), &state_dir.join("checkpoints")));
        let (runs, folder) = (state_dir.join("runs"), state_dir.join("runs").join(facts.context.run.to_string()));
        base.tidy();
        keyframes::tidy(&runs, &folder);
        let keyframes = Arc::new(Keyframes::new(facts.clone(), grants.clone(), base.clone(), folder));
        let keeper = keyframes.keeper();
        let tokens = Arc::new(TokenCache::new(facts.clone(), grants.clone(), state_dir.join("tokens")));
        let handle = tokio::runtime::Handle::current();
        let bench = Bench::start(facts.clone(), open_engine, keyframes.clone(), tokens, handle).map_err(Trouble::io(state_dir))?;
        let sequence = Arc::new(Sequence::open(journal.clone(), "signed")?);
        let verdicts = VerdictDesk {
            facts: facts.clone(),
            reader: archive.clone(),
            grants: grants.clone(),
            hotkey: hotkey.clone(),
            journal: journal.clone(),
            sequence,
        };
        let chain = ChainDesk {
            link,
            hotkey,
            netuid: facts.context.netuid,
            mechanism,
            run: facts.context.run,
            journal,
            health: weights_health,
            file: state_dir.join(chain::WEIGHTS_FILE),
            shown: Mutex::default(),
            kept: Arc::default(),
            genesis: facts.context.genesis,
        };
        Ok(Self {
            own,
            proofs,
            log,
            facts,
            reader,
            archive,
            grants,
            base,
            keyframes,
            openings: OpenedParts::new(state_dir.join("openings"), opening_volume_bytes(elements)),
            _keeper: keeper,
            bench,
            verdicts,
            chain,
            store_health,
        })
    }

    /// How the thread that audits is doing.
    pub fn bench_watch(&self) -> bench::Watch {
        self.bench.watch()
    }

    async fn head(&self) -> Option<Box<HeadFacts>> {
        match self.reader.lock().await.head(clock::now_ms()).await {
            Ok(head) => {
                self.store_health.ready();
                let head = head?;
                self.log.is_named(head.log).await;
                Some(Box::new(HeadFacts::from(head)))
            }
            Err(error) => {
                if let Some(proof) = error.proof() {
                    self.proofs.keep(proof);
                }
                self.store_health.not_ready(Trouble::from(error).line());
                None
            }
        }
    }

    /// A write-once document of the orchestrator; `None` = absent or unreadable.
    async fn published<D: Document>(&self, key: &str) -> Option<Box<D>> {
        match self.archive.published::<D>(key).await {
            Ok(document) => document.map(|document| Box::new(document.document)),
            Err(error) => {
                tracing::warn!(key, error = Trouble::from(error).line(), "a public document could not be read");
                None
            }
        }
    }

    /// The chain's answer. Where there is none the machine asks again; the connection itself reports how it is doing.
    fn of_chain<T, E: Into<Trouble>>(answer: Result<T, E>) -> Option<T> {
        answer.map_err(|error| tracing::debug!(error = error.into().line(), "the chain was not read")).ok()
    }

    /// What a cycle's audits are drawn with: the chain's beacon, and who could audit at its block, as the chain says or, where it has
    /// forgotten that, as it was written down then.
    async fn draw(&self, cycle: u64, block: u64) -> DrawRead {
        self.try_draw(cycle, block).await.unwrap_or_else(|trouble| {
            tracing::debug!(cycle, block, error = trouble.line(), "what audits are drawn with was not read");
            DrawRead::Failed
        })
    }

    async fn try_draw(&self, cycle: u64, block: u64) -> Result<DrawRead, Trouble> {
        let (hash, validators) = self.chain.beacon(block).await?;
        let written = self.archive.published::<AuditDraw>(&self.facts.run.draw(cycle)).await.map_err(Trouble::from);
        let written = match written {
            Err(trouble) if trouble.is_in_the_object() => {
                tracing::error!(cycle, error = trouble.line(), "what the orchestrator draws audits with is no document of its own");
                None
            }
            written => written?.map(|draw| draw.document),
        };
        Ok(DrawRead::of(cycle, (block, hash), validators, written))
    }

    async fn order(&self, selection: &Selection) -> OrderRead {
        let key = self.facts.run.audit(&self.own, &selection.audit);
        let order = match self.archive.published::<AuditOrder>(&key).await {
            Ok(Some(order)) => order,
            Ok(None) => return OrderRead::Absent,
            Err(error) => {
                tracing::warn!(audit = selection.audit.short(), error = Trouble::from(error).line(), "an audit order could not be read");
                return OrderRead::Absent;
            }
        };
        let read = compare(selection, &order.document);
        // A differing order still carries the grants for the verdict that says so, where it names the same audit.
        match self.grants.keep(order) {
            Ok(()) => read,
            Err(trouble) => {
                tracing::warn!(audit = selection.audit.short(), error = trouble.line(), "the grants of an audit order could not be opened");
                OrderRead::Absent
            }
        }
    }

    async fn judge(&self, subject: Subject, versions: Vec<u64>) -> Judged {
        let audit = subject.selection.audit;
        let judge = async {
            // What was decided before a restart is not decided again.
            if let Some(decided) = self.verdicts.decided(&audit).await? {
                let verdict = decided.verdict;
                let note = "decided before the restart".to_owned();
                let judgement = Judgement { result: verdict.result, reason: verdict.reason, measured: verdict.measured, note };
                return Ok(Judged::Done(Box::new(judgement)));
            }
            let tree = self.base.folder().await?.to_owned();
            let evidence = self.evidence(&subject, versions).await?;
            let judgement = self.bench.judge(tree, subject.clone(), evidence).await?;
            // The machine decides how often that is tried.
            Ok(match judgement.result {
                VerdictResult::NotEvaluated => Judged::Failed(judgement.note),
                _ => Judged::Done(Box::new(judgement)),
            })
        };
        judge.await.unwrap_or_else(|trouble: Trouble| {
            let line = trouble.line();
            if trouble.is_passing() { Judged::Unavailable(line) } else { Judged::Failed(line) }
        })
    }

    async fn evidence(&self, subject: &Subject, versions: Vec<u64>) -> Result<Evidence, Trouble> {
        let Selection { audit, hotkey, slot, t, .. } = &subject.selection;
        let order = self.grants.order(audit).ok_or(Trouble::NoOrder)?;
        let run = &self.facts.run;
        let (codec, fragment) = (self.facts.manifest.parameters.codec_up, usize::from(subject.fragment));
        let payload_bytes = PayloadHeader::new(codec, &self.facts.plan, self.facts.manifest.plan, fragment, 0).payload_bytes();
        let commitment = self.grants.get(Some(audit), &run.commitment(hotkey, *slot, *t), PROGRESS_BYTES as u64).await?;
        let payload = self.grants.get(Some(audit), &run.payload(hotkey, *slot, *t), payload_bytes).await?;
        let keys = run.slot(hotkey, *slot);
        let mut parts = Vec::new();
        for (number, part) in (0..OPENING_PARTS).zip(&order.opening) {
            let Some(part) = self.opened_part(&keys, (audit, number), part, &order.opening_key).await? else { break };
            parts.push(part);
        }
        let opening =
            <[_; OPENING_PARTS as usize]>::try_from(parts).ok().map(|[manifest, state, routes]| Opening { manifest, state, routes });
        Ok(Evidence { commitment, payload, opening, leases: order.leases, versions })
    }

    /// A part of an opening as it was before it was sealed; `None` where that cannot be had, so that nothing was opened: whose fault it is
    /// cannot be proved, and what nobody can look at was not shown.
    async fn opened_part(
        &self,
        keys: &SlotKeys,
        (audit, number): (&Digest, u8),
        part: &OpenedPart,
        secret: &Arc<Zeroizing<[u8; 32]>>,
    ) -> Result<Option<Bytes>, Trouble> {
        let key = keys.opening(audit, number);
        let limit = opening_part_bytes_max(number, self.facts.plan.total_elements(), &self.facts.manifest.parameters);
        if part.length > limit {
            return Err(Trouble::malformed(key, "longer than this part of an opening of this run may be"));
        }
        // A disk may damage what was fetched, once.
        for _ in 0..2 {
            let fetched = match self.openings.fetch(&self.grants, keys, (audit, number), part).await {
                // The grants of an order end before what they are for is deleted.
                Err(Trouble::Grant(GrantError::Absent { key })) => {
                    tracing::warn!(audit = audit.short(), part = number, key, "a part that its miner called uploaded is not there");
                    return Ok(None);
                }
                fetched => fetched?,
            };
            let (info, secret) = (self.facts.context.opening_info(audit, number), secret.clone());
            let open = move || Ok(fetched.is_intact()?.then(|| fetched.unsealed(&secret, &info, limit)));
            let opened = tokio::task::spawn_blocking(open).await.map_err(|_| Trouble::BenchGone)?;
            match opened.map_err(Trouble::io(key.clone()))? {
                Some(Ok(part)) => return Ok(Some(part)),
                Some(Err(error)) => {
                    tracing::warn!(audit = audit.short(), part = number, "an opened part cannot be unsealed: {error}");
                    return Ok(None);
                }
                None => self.openings.remove(audit),
            }
        }
        tracing::warn!(audit = audit.short(), part = number, "an opened part is not what its miner announced");
        Ok(None)
    }

    async fn verdict(&self, subject: &Subject) -> Input {
        let audit = subject.selection.audit;
        match self.verdicts.revealed(subject).await {
            Ok(verdict) => Input::Verdict { audit, verdict: verdict.map(Box::new) },
            Err(trouble) => {
                let (validator, error) = (subject.selection.validator.short(), trouble.line());
                tracing::warn!(audit = audit.short(), validator, error, "a verdict could not be read");
                // What is none stays none.
                if trouble.is_in_the_object() { Input::Verdict { audit, verdict: None } } else { Input::NoVerdict { audit } }
            }
        }
    }

    /// Publishes what the weights on the chain were made from. They count without it, so a store that fails is not waited for.
    async fn publish_scores(&self, epoch: u64, block: u64, weights: Vec<Score>) {
        let key = self.facts.run.scores(&self.own, epoch);
        let publish = async {
            let scores = Scores::new(self.own, epoch, block, weights);
            self.verdicts.put(None, &key, &scores).await
        };
        match publish.await {
            Ok(Written::Done) => tracing::debug!(epoch, "scores are published"),
            Ok(other) => tracing::warn!(epoch, ?other, "the scores were not published"),
            Err(trouble) => tracing::warn!(epoch, error = trouble.line(), "the scores were not published"),
        }
    }

    async fn moved(&self) -> bool {
        match self.reader.lock().await.moved(clock::now_ms()).await {
            Ok(has_moved) => has_moved,
            Err(error) => {
                if let Some(proof) = error.proof() {
                    self.proofs.keep(proof);
                }
                tracing::debug!(error = Trouble::from(error).line(), "the current run could not be looked up");
                false
            }
        }
    }
}

impl Executor for Effects {
    type Input = Input;
    type Effect = Effect;

    async fn execute(&self, effect: Effect, inputs: Inputs<Input>) {
        let input = match effect {
            Effect::ReadHead => Input::Head(self.head().await),
            Effect::ReadMerge { t } => Input::Merge { t, manifest: self.published(&self.facts.run.merge(t)).await },
            Effect::Keep { keyframe, from, is_wanted } => return self.keyframes.demand(keyframe, from, is_wanted),
            Effect::ReadBlock => Input::Block(Self::of_chain(self.chain.block().await)),
            Effect::ReadChain => Input::Chain(Self::of_chain(self.chain.view().await).map(Box::new)),
            Effect::ReadBeacon { cycle, block } => Input::Beacon { cycle, read: self.draw(cycle, block).await },
            Effect::ReadOrder(selection) => Input::Order { audit: selection.audit, read: self.order(&selection).await },
            Effect::Judge { subject, versions } => {
                Input::Judged { audit: subject.selection.audit, judged: self.judge(*subject, versions).await }
            }
            Effect::Commit(verdict) => {
                self.openings.remove(&verdict.audit);
                Input::Committed { audit: verdict.audit, written: self.verdicts.commit(*verdict).await }
            }
            Effect::Reveal(audit) => Input::Revealed { audit, written: self.verdicts.reveal(audit).await },
            Effect::ReadVerdict(subject) => self.verdict(&subject).await,
            Effect::Weights(effect) => Input::Weights(self.chain.weights(effect, &inputs).await),
            Effect::SendWeights { send, memory } => Input::Weights(self.chain.send(send, *memory, &inputs).await),
            Effect::KeepWeights(memory) => return self.chain.keep(*memory).await,
            Effect::PublishScores { epoch, block, scores } => return self.publish_scores(epoch, block, scores).await,
            Effect::ShowWeights(standing) => return self.chain.show(*standing),
            Effect::ReadLog { size } => {
                let head = self.log.read(size).await.unwrap_or_else(|trouble| {
                    tracing::warn!(size, error = trouble.line(), "a log head could not be read");
                    None
                });
                Input::LogHead { size, head: head.map(Box::new) }
            }
            Effect::CheckMoved => Input::Moved(self.moved().await),
        };
        inputs.send(input).await;
    }
}
