//! The thread on which audits are computed: models live here, and nothing that waits for the network's other work does.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::TrainError;
use protocol::Digest;
use storage::discovery::RunFacts;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::keyframes::Keyframes;
use super::tokens::TokenCache;
use super::trouble::Trouble;
use crate::audit::{Engine, Evidence, Inquiry, Judgement, RowRef, Rules, SourceError, Sources, Subject, judge};

/// Who computes for so long without asking for rows or keyframes hangs. To open the full model, or to replay the steps between two such
/// questions, takes minutes on a GPU; this leaves room for slow disks and processors. What is fetched meanwhile does not count: it has
/// limits of its own. The base tree is here before the thread hears of an audit.
const HANGS_AFTER: Duration = Duration::from_secs(2 * 3_600);

/// Opens the models of a run on its base tree.
pub type OpenEngine = Arc<dyn Fn(&Path) -> Result<Engine, TrainError> + Send + Sync>;

struct Job {
    tree: PathBuf,
    subject: Subject,
    evidence: Evidence,
    done: oneshot::Sender<Result<Judgement, Trouble>>,
}

/// Since when the thread computes: nothing while it waits for an audit, or for what an audit asks for. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<Mutex<Option<Instant>>>);

impl Watch {
    fn set(&self, since: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    /// That the thread hangs; `None` while it does not.
    pub fn silence(&self) -> Option<String> {
        self.silence_at(Instant::now())
    }

    fn silence_at(&self, now: Instant) -> Option<String> {
        let since = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        let busy = now.saturating_duration_since(since);
        (busy > HANGS_AFTER).then(|| format!("an audit has computed for {} minutes without a sign of life", busy.as_secs() / 60))
    }
}

/// Handle on the thread; it ends when this is dropped, after the audit under way.
pub struct Bench {
    jobs: SyncSender<Job>,
    watch: Watch,
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
        let watch = Watch::default();
        let watched = watch.clone();
        let work = move || serve(&queue, &facts, &open, &keyframes, &tokens, &handle, &watched);
        std::thread::Builder::new().name("audits".into()).spawn(work)?;
        Ok(Self { jobs, watch })
    }

    /// How the thread is doing, also after this is gone.
    pub fn watch(&self) -> Watch {
        self.watch.clone()
    }

    /// # Errors
    /// Something could not be fetched, or the models cannot be opened.
    pub async fn judge(&self, tree: PathBuf, subject: Subject, evidence: Evidence) -> Result<Judgement, Trouble> {
        let (done, outcome) = oneshot::channel();
        self.jobs.try_send(Job { tree, subject, evidence, done }).map_err(|_| Trouble::BenchGone)?;
        outcome.await.map_err(|_| Trouble::BenchGone)?
    }
}

fn serve(
    queue: &Receiver<Job>,
    facts: &RunFacts,
    open: &OpenEngine,
    keyframes: &Keyframes,
    tokens: &TokenCache,
    handle: &Handle,
    watch: &Watch,
) {
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
        let sources = Fetched { audit: subject.selection.audit, keyframes, tokens, handle, watch, trouble: Cell::default() };
        watch.set(Some(Instant::now()));
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let opened = match &mut engine {
                Some(opened) => opened,
                none => none.insert(open(&tree)?),
            };
            let inquiry = Inquiry { subject: &subject, evidence: &evidence, rules: &rules, sources: &sources };
            let judgement = judge(&inquiry, opened);
            // What could not be fetched has ended the audit, and says more than the judgement does.
            sources.trouble.take().map_or(Ok(judgement), Err)
        }));
        watch.set(None);
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
    watch: &'a Watch,
    /// Why something could not be fetched.
    trouble: Cell<Option<Trouble>>,
}

impl Fetched<'_> {
    fn wait<T>(&self, fetching: impl Future<Output = Result<T, Trouble>>) -> Result<T, SourceError> {
        self.watch.set(None);
        let fetched = self.handle.block_on(fetching);
        self.watch.set(Some(Instant::now()));
        fetched.map_err(|trouble| {
            let error = SourceError(trouble.line());
            self.trouble.set(Some(trouble));
            error
        })
    }
}

impl Sources for Fetched<'_> {
    fn rows(&self, rows: &[RowRef]) -> Result<Vec<u32>, SourceError> {
        self.wait(self.tokens.rows(&self.audit, rows))
    }

    fn keyframe(&self, fragment: u16, version: u64) -> Result<Vec<f32>, SourceError> {
        self.wait(self.keyframes.values(fragment, version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_computes_for_hours_counts_as_dead_and_one_that_waits_does_not() {
        let (watch, begun) = (Watch::default(), Instant::now());
        assert_eq!(watch.silence(), None);
        watch.set(Some(begun));
        assert_eq!(watch.silence_at(begun + HANGS_AFTER), None);
        let silence = watch.silence_at(begun + HANGS_AFTER + Duration::from_secs(60)).expect("it hangs");
        assert!(silence.contains("121 minutes"), "{silence}");
        watch.set(None);
        assert_eq!(watch.silence_at(begun + 2 * HANGS_AFTER), None);
    }
}
