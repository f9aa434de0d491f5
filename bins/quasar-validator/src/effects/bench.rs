//! The thread on which audits are computed: models live here, and nothing that waits for the network's other work does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use model::TrainError;
use protocol::Digest;
use storage::discovery::RunFacts;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::keyframes::Keyframes;
use super::tokens::TokenCache;
use super::trouble::Trouble;
use crate::audit::{Engine, Evidence, Inquiry, Judgement, RowRef, Rules, SourceError, Sources, Subject, judge};

/// Opens the models of a run on its base tree.
pub type OpenEngine = Arc<dyn Fn(&Path) -> Result<Engine, TrainError> + Send + Sync>;

struct Job {
    tree: PathBuf,
    subject: Subject,
    evidence: Evidence,
    done: oneshot::Sender<Result<Judgement, Trouble>>,
}

/// Handle on the thread; it ends when this is dropped, after the audit under way.
pub struct Bench {
    jobs: SyncSender<Job>,
}

impl Bench {
    /// Starts the thread. Rows and keyframes are fetched on `handle`'s runtime while it waits.
    pub fn start(
        facts: Arc<RunFacts>,
        open: OpenEngine,
        keyframes: Arc<Keyframes>,
        tokens: Arc<TokenCache>,
        handle: Handle,
    ) -> std::io::Result<Self> {
        // The machine judges one audit at a time.
        let (jobs, queue) = sync_channel(1);
        std::thread::Builder::new().name("audits".into()).spawn(move || serve(&queue, &facts, &open, &keyframes, &tokens, &handle))?;
        Ok(Self { jobs })
    }

    pub async fn judge(&self, tree: PathBuf, subject: Subject, evidence: Evidence) -> Result<Judgement, Trouble> {
        let (done, outcome) = oneshot::channel();
        self.jobs.try_send(Job { tree, subject, evidence, done }).map_err(|_| Trouble::BenchGone)?;
        outcome.await.map_err(|_| Trouble::BenchGone)?
    }
}

fn serve(queue: &Receiver<Job>, facts: &RunFacts, open: &OpenEngine, keyframes: &Keyframes, tokens: &TokenCache, handle: &Handle) {
    let mut engine: Option<Engine> = None;
    while let Ok(Job { tree, subject, evidence, done }) = queue.recv() {
        let shards = facts.shards.list();
        let rules = Rules {
            context: &facts.context,
            parameters: &facts.manifest.parameters,
            plan: &facts.plan,
            plan_digest: facts.manifest.plan,
            shards: &shards,
        };
        let sources = Fetched { audit: subject.selection.audit, keyframes, tokens, handle };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let opened = match &mut engine {
                Some(opened) => opened,
                none => none.insert(open(&tree)?),
            };
            let inquiry = Inquiry { subject: &subject, evidence: &evidence, rules: &rules, sources: &sources };
            Ok(judge(&inquiry, opened))
        }));
        let outcome = outcome.unwrap_or_else(|_| {
            // What a panic left behind in the models is not used again.
            engine = None;
            Ok(Judgement::not_evaluated("the audit panicked: this is a bug of the validator"))
        });
        // Nobody waits any more during a stop.
        let _ = done.send(outcome);
    }
}

/// Sources that fetch what is missing.
struct Fetched<'a> {
    audit: Digest,
    keyframes: &'a Keyframes,
    tokens: &'a TokenCache,
    handle: &'a Handle,
}

impl Sources for Fetched<'_> {
    fn rows(&self, rows: &[RowRef]) -> Result<Vec<u32>, SourceError> {
        self.handle.block_on(self.tokens.rows(&self.audit, rows)).map_err(|trouble| SourceError(trouble.line()))
    }

    fn keyframe(&self, fragment: u16, version: u64) -> Result<Vec<f32>, SourceError> {
        self.handle.block_on(self.keyframes.values(fragment, version)).map_err(|trouble| SourceError(trouble.line()))
    }
}
