//! The trainer's thread: everything that touches weights happens here, in the order that the machine decided.

use std::fs::File;
use std::io::{BufReader, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use daemon::{Exit, files};
use fragments::codec::{self, CodecError};
use fragments::t0::Committed;
use model::{Batch, HostValues, Hyper, StateError, TrainError, Trainer};
use protocol::Digest;
use protocol::documents::{InnerOptimizer, OpenedStep, PPM, micro_nats};
use tokio::sync::mpsc;

use crate::edge::{FeedbackError, Plane, SpoolError};
use crate::host;
use crate::machine::{Boundary, Export, Exported, Fault, Input, Step, StepDone};

/// Opens the trainer on a base tree; runs on the trainer's own thread, because libtorch keeps settings per thread.
pub type OpenTrainer = Box<dyn FnOnce(&Path) -> Result<Box<dyn Trainer>, TrainError> + Send>;

/// Read from a snapshot at a time.
const READ_BYTES: usize = 1 << 20;
/// A snapshot is taken into memory if it needs no more than this part of what is free.
const SNAPSHOT_SHARE: u64 = 8;
/// Bytes of a snapshot for each parameter, at most: weight, both moments, and an exported fragment's.
const SNAPSHOT_BYTES: u64 = 16;
/// A trainer that takes a step hangs if it has been at it for longer than this, and for longer than so many of its longest steps.
const STEP_MAX: Duration = Duration::from_secs(600);
const STEPS_MAX: u32 = 20;
/// The same for all else: a base model is opened, a state goes to the disk or comes from it.
const OTHER_MAX: Duration = Duration::from_secs(3_600);

enum Order {
    Open(PathBuf),
    Pass(Box<Boundary>),
}

impl Order {
    /// Whether there is nothing to do but to take versions over and a step: neither the base model nor a disk is waited for.
    fn is_step(&self) -> bool {
        match self {
            Self::Open(_) => false,
            Self::Pass(boundary) => {
                boundary.step.is_some() && boundary.restore.is_none() && boundary.snapshot.is_none() && boundary.export.is_empty()
            }
        }
    }
}

/// What the thread is at, for those who wait for it.
#[derive(Default)]
struct Watch {
    under_way: Option<UnderWay>,
    longest_step: Duration,
}

struct UnderWay {
    is_step: bool,
    since: Instant,
    was_told: bool,
}

impl Watch {
    fn begin(&mut self, is_step: bool, now: Instant) {
        self.under_way = Some(UnderWay { is_step, since: now, was_told: false });
    }

    /// The order is done, with a step of `step_ms` or without one.
    fn end(&mut self, step_ms: Option<u32>) {
        self.under_way = None;
        self.longest_step = self.longest_step.max(Duration::from_millis(step_ms.unwrap_or(0).into()));
    }

    /// Whether the order under way takes so long that it will not end. Said once in the log.
    fn hangs(&mut self, now: Instant) -> bool {
        let Some(order) = &mut self.under_way else { return false };
        let limit = if order.is_step { STEP_MAX.max(self.longest_step * STEPS_MAX) } else { OTHER_MAX };
        let passed = now.saturating_duration_since(order.since);
        if passed > limit && !std::mem::replace(&mut order.was_told, true) {
            tracing::error!(seconds = passed.as_secs(), "the trainer hangs; hint: look at the device and its driver, then start again");
        }
        passed > limit
    }
}

/// Threads of learners that have not ended.
static AT_WORK: AtomicUsize = AtomicUsize::new(0);

/// Counts a thread until it ends, however it does.
struct AtWork;

impl AtWork {
    fn begin() -> Self {
        AT_WORK.fetch_add(1, Ordering::SeqCst);
        Self
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        AT_WORK.fetch_sub(1, Ordering::SeqCst);
    }
}

unsafe extern "C" {
    /// Ends the process without anything that is registered for its end (_exit(2)).
    #[link_name = "_exit"]
    safe fn exit_at_once(status: i32) -> !;
}

/// The last that a process does. While a trainer still computes, libtorch must not be taken down: that crashes, and a miner that was fenced
/// would be restarted for it, and fence the other.
pub fn leave(exit: Exit) -> Exit {
    if AT_WORK.load(Ordering::SeqCst) > 0 {
        tracing::warn!("a trainer still computes; the process ends without it");
        exit_at_once(exit.code().into());
    }
    exit
}

/// Handle on the thread of one learner.
pub struct TrainerThread {
    orders: Mutex<Option<Sender<Order>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    watch: Arc<Mutex<Watch>>,
}

impl TrainerThread {
    /// Starts the thread. Results go to `inputs`.
    pub fn start(
        name: String,
        open: OpenTrainer,
        plane: Arc<Plane>,
        inner: InnerOptimizer,
        inputs: mpsc::Sender<Input>,
    ) -> std::io::Result<Self> {
        let (orders, queue) = channel();
        let watch = Arc::new(Mutex::new(Watch::default()));
        let watched = watch.clone();
        let at_work = AtWork::begin();
        let work = move || {
            let _at_work = at_work;
            serve(open, &queue, &watched, &plane, &inner, &|input| inputs.blocking_send(input).is_ok());
        };
        let thread = std::thread::Builder::new().name(name).spawn(work)?;
        Ok(Self { orders: Mutex::new(Some(orders)), thread: Mutex::new(Some(thread)), watch })
    }

    /// Whether the order under way takes so long that it will not end.
    pub fn hangs(&self) -> bool {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner).hangs(Instant::now())
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &*self.orders.lock().unwrap_or_else(PoisonError::into_inner) {
            // The thread ends with this sender; had it ended earlier, it would have said why.
            let _ = orders.send(order);
        }
    }

    pub fn open(&self, tree: PathBuf) {
        self.order(Order::Open(tree));
    }

    pub fn pass(&self, boundary: Boundary) {
        self.order(Order::Pass(Box::new(boundary)));
    }

    /// Lets the thread end after the step under way, and waits for it at most so long.
    pub async fn stop(&self, patience: Duration) {
        drop(self.orders.lock().unwrap_or_else(PoisonError::into_inner).take());
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let until = Instant::now() + patience;
        while !thread.is_finished() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn serve(
    open: OpenTrainer,
    queue: &Receiver<Order>,
    watch: &Mutex<Watch>,
    plane: &Arc<Plane>,
    inner: &InnerOptimizer,
    tell: &(dyn Fn(Input) -> bool + Sync),
) {
    let watch = || watch.lock().unwrap_or_else(PoisonError::into_inner);
    let mut open = Some(open);
    let mut worker: Option<Worker> = None;
    while let Ok(order) = queue.recv() {
        watch().begin(order.is_step(), Instant::now());
        let done = match order {
            Order::Open(tree) => open.take().map(|open| {
                let opened = catch_unwind(AssertUnwindSafe(|| Worker::open(open, &tree, plane.clone(), inner.clone())));
                Input::TrainerOpened(match opened {
                    Ok(Ok((opened, restored))) => {
                        worker = Some(opened);
                        Ok(restored)
                    }
                    Ok(Err(error)) => Err(train_fault(&error)),
                    Err(_) => Err(panicked()),
                })
            }),
            Order::Pass(boundary) => worker.as_mut().map(|worker| {
                let number = boundary.number;
                match catch_unwind(AssertUnwindSafe(|| worker.pass(&boundary, tell))) {
                    Ok(Ok(step)) => Input::Finished { number, step },
                    Ok(Err(fault)) => Input::Faulted { number, fault },
                    Err(_) => Input::Faulted { number, fault: panicked() },
                }
            }),
        };
        watch().end(match &done {
            Some(Input::Finished { step, .. }) => step.map(|step| step.step_ms),
            _ => None,
        });
        if done.is_some_and(|done| !tell(done)) {
            break;
        }
    }
}

fn panicked() -> Fault {
    Fault::Broken("the trainer panicked\nhint: this is a bug; the local snapshots are intact and a restart goes on from them".into())
}

/// Goes back to a snapshot. What was exported before it counts as answered: versions that arrive from here on are taken as they are.
fn load(trainer: &mut dyn Trainer, path: &Path) -> Result<(), TrainError> {
    let file = File::open(path).map_err(StateError::Io)?;
    trainer.load(&mut BufReader::with_capacity(READ_BYTES, file))
}

/// A trainer with what it works on.
pub struct Worker {
    trainer: Box<dyn Trainer>,
    plane: Arc<Plane>,
    inner: InnerOptimizer,
    /// Snapshots go through memory, and to the disk beside the steps.
    takes_snapshots: bool,
}

impl Worker {
    /// Opens the trainer and goes on from the newest local snapshot, if there is one.
    fn open(open: OpenTrainer, tree: &Path, plane: Arc<Plane>, inner: InnerOptimizer) -> Result<(Self, bool), TrainError> {
        let mut trainer = open(tree)?;
        let elements = trainer.plan().total_elements() as usize;
        let restored = match plane.spool.newest_state(elements) {
            Some(path) => {
                load(&mut *trainer, &path)?;
                true
            }
            None => false,
        };
        plane.staged.reach(trainer.host_memory());
        let takes_snapshots = elements as u64 * SNAPSHOT_BYTES <= host::free_memory() / SNAPSHOT_SHARE;
        Ok((Self { trainer, plane, inner, takes_snapshots }, restored))
    }

    #[cfg(test)]
    pub fn new(trainer: Box<dyn Trainer>, plane: Arc<Plane>, inner: InnerOptimizer) -> Self {
        Self { trainer, plane, inner, takes_snapshots: true }
    }

    /// Passes one boundary, in the order of its fields. What is exported is encoded while the step is taken, and [`Input::Prepared`] is
    /// told as soon as that is done, so that commitments do not wait for the step, nor the step for them.
    pub fn pass(&mut self, boundary: &Boundary, tell: &(dyn Fn(Input) -> bool + Sync)) -> Result<Option<StepDone>, Fault> {
        if let Some(local_step) = boundary.restore {
            self.plane.spool.flush().map_err(|error| spool_fault(&error))?;
            let elements = self.trainer.plan().total_elements() as usize;
            let path = self.plane.spool.state(local_step, elements).map_err(|error| spool_fault(&error))?;
            load(&mut *self.trainer, &path).map_err(|error| train_fault(&error))?;
        }
        for (fragment, version) in &boundary.apply {
            let values = match self.plane.staged.take(*fragment, *version) {
                Some(values) => values,
                None => self.plane.keyframes.load(*fragment, *version).map_err(|error| Fault::Broken(error.to_string()))?.into(),
            };
            self.trainer.receive(usize::from(*fragment), &values).map_err(|error| train_fault(&error))?;
            self.plane.keyframes.retire(*fragment, *version);
        }
        let snapshot = match &boundary.snapshot {
            Some(order) => Some(self.snapshot(order.local_step, order.versions.clone())?),
            None => None,
        };
        let mut contributions = Vec::new();
        for order in &boundary.export {
            let weights = self.trainer.contribute(usize::from(order.fragment)).map_err(|error| train_fault(&error))?;
            contributions.push((order, weights));
        }
        let (plane, number) = (self.plane.clone(), boundary.number);
        let prepare = move || {
            let mut exported = Vec::new();
            let mut result = Ok(());
            for (order, weights) in contributions {
                match export(&plane, order, &weights) {
                    Ok(done) => exported.push(done),
                    Err(fault) => {
                        result = Err(fault);
                        break;
                    }
                }
            }
            // What is announced can be opened: the start of its segment is on disk.
            if !exported.is_empty()
                && let Err(error) = plane.spool.flush()
            {
                result = result.and(Err(spool_fault(&error)));
            }
            tell(Input::Prepared { number, snapshot, exported });
            result
        };
        let mut step = || boundary.step.as_ref().map(|step| self.step(step)).transpose();
        if boundary.export.is_empty() {
            prepare()?;
            return step();
        }
        std::thread::scope(|scope| {
            let prepared = scope.spawn(prepare);
            let done = step();
            prepared.join().unwrap_or_else(|_| Err(panicked()))?;
            done
        })
    }

    fn snapshot(&mut self, local_step: u64, versions: Vec<u64>) -> Result<Digest, Fault> {
        let (spool, trainer) = (&self.plane.spool, &self.trainer);
        let save = |to: &mut dyn Write| trainer.save(to);
        let saved = if self.takes_snapshots { spool.take_state(local_step, save) } else { spool.save_state(local_step, save) };
        let digest = saved.map_err(|error| train_fault(&error))?;
        self.plane.spool.put_segment(local_step, versions).map_err(|error| spool_fault(&error))?;
        Ok(digest)
    }

    fn step(&mut self, order: &Step) -> Result<StepDone, Fault> {
        let missing = || Fault::Broken(format!("the rows of step {} of lease {} are not here", order.lease_step, order.lease));
        let rows = self.plane.tokens.get(order.lease).and_then(|lease| lease.step(order.lease_step)).ok_or_else(missing)?;
        let batch = Batch { tokens: &rows.tokens, rows: rows.rows, row_tokens: rows.row_tokens };
        let begun = Instant::now();
        let report = self.trainer.step(&batch, &hyper(&self.inner, order.lr), None, true).map_err(|error| train_fault(&error))?;
        let loss = micro_nats(report.loss);
        let opened = OpenedStep {
            local_step: order.local_step,
            lease: order.lease,
            lease_step: order.lease_step,
            exchanged: order.exchanged.clone(),
            loss,
        };
        self.plane.spool.put_step(opened, report.routes.unwrap_or_default()).map_err(|error| spool_fault(&error))?;
        let step_ms = u32::try_from(begun.elapsed().as_millis()).unwrap_or(u32::MAX);
        Ok(StepDone { loss, tokens: report.tokens, step_ms })
    }
}

/// Θ̂ of the base version minus the learner's weights, encoded.
fn export(plane: &Plane, order: &Export, weights: &HostValues) -> Result<Exported, Fault> {
    let mut change = plane.keyframes.load(order.fragment, order.base_version).map_err(|error| Fault::Broken(error.to_string()))?;
    for (base, weight) in change.iter_mut().zip(weights.values().map_err(|error| train_fault(&error))?) {
        *base -= weight;
    }
    let header = plane.keyframes.payload_header(order.fragment, order.base_version);
    let (payload, residual) = match &plane.feedback {
        None => (codec::encode(&header, &change).map_err(|error| codec_fault(&error))?, None),
        Some(feedback) => {
            let encoded = feedback.encode(order.t, &header, &change).map_err(|error| feedback_fault(&error))?;
            (encoded.payload, Some(encoded.residual))
        }
    };
    let Committed { length, sha256, blake3 } = Committed::of(&payload);
    plane.payloads.insert(order.t, payload.into());
    let (digest, file) = residual.unzip();
    let steps = (order.start_step, order.local_step);
    plane.spool.put_export(order.t, steps, blake3, file.as_deref()).map_err(|error| spool_fault(&error))?;
    Ok(Exported { t: order.t, length, sha256, blake3, residual: digest })
}

/// Optimizer settings of a step with learning rate `lr`: the same arithmetic as a validator's replay, to the last bit.
pub fn hyper(inner: &InnerOptimizer, lr: f64) -> Hyper {
    let ppm = |value: u32| f64::from(value) / PPM as f64;
    Hyper {
        lr,
        beta1: ppm(inner.beta1_ppm),
        beta2: ppm(inner.beta2_ppm),
        eps: inner.eps_pico as f64 * 1e-12,
        weight_decay: ppm(inner.weight_decay_ppm),
        clip_norm: inner.clip_norm_ppm as f64 / PPM as f64,
    }
}

fn train_fault(error: &TrainError) -> Fault {
    match error {
        TrainError::NotFinite { .. } => Fault::NotFinite,
        TrainError::State(StateError::Io(error)) if files::is_disk_full(error) => Fault::DiskFull,
        TrainError::OutOfMemory { .. } => Fault::OutOfMemory(error.to_string()),
        error => Fault::Broken(error.to_string()),
    }
}

fn codec_fault(error: &CodecError) -> Fault {
    match error {
        CodecError::NotFinite { .. } => Fault::NotFinite,
        error => Fault::Broken(error.to_string()),
    }
}

fn feedback_fault(error: &FeedbackError) -> Fault {
    match error {
        FeedbackError::Codec(error) => codec_fault(error),
        FeedbackError::Io { source, .. } if files::is_disk_full(source) => Fault::DiskFull,
        error => Fault::Broken(error.to_string()),
    }
}

fn spool_fault(error: &SpoolError) -> Fault {
    if error.is_disk_full() { Fault::DiskFull } else { Fault::Broken(error.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Snapshot;

    #[test]
    fn a_step_hangs_after_ten_minutes_or_twenty_of_its_longest_and_all_else_after_an_hour() {
        let (mut watch, begun) = (Watch::default(), Instant::now());
        let hangs = |watch: &mut Watch, minutes: u64| watch.hangs(begun + Duration::from_secs(60 * minutes + 1));
        assert!(!hangs(&mut watch, 999), "nothing is under way");
        watch.begin(true, begun);
        assert!(!hangs(&mut watch, 9) && hangs(&mut watch, 10));
        watch.end(Some(60_000));
        assert!(!hangs(&mut watch, 999), "it ended after all");
        watch.begin(true, begun);
        assert!(!hangs(&mut watch, 19) && hangs(&mut watch, 20));
        watch.end(Some(1_000));
        watch.begin(false, begun);
        assert!(!hangs(&mut watch, 59) && hangs(&mut watch, 60));
    }

    #[test]
    fn an_order_that_waits_for_a_disk_is_more_than_a_step() {
        let step = Step { local_step: 4, lease: 1, lease_step: 0, lr: 0.1, exchanged: vec![] };
        let bare = Boundary { number: 1, apply: vec![(0, 1)], step: Some(step), ..Boundary::default() };
        let is_step = |boundary: Boundary| Order::Pass(Box::new(boundary)).is_step();
        let export = Export { t: 1, fragment: 1, base_version: 0, start_step: 0, local_step: 4 };
        assert!(is_step(bare.clone()));
        assert!(!is_step(Boundary { step: None, ..bare.clone() }));
        assert!(!is_step(Boundary { restore: Some(0), ..bare.clone() }));
        assert!(!is_step(Boundary { snapshot: Some(Snapshot { local_step: 4, versions: vec![] }), ..bare.clone() }));
        assert!(!is_step(Boundary { export: vec![export], ..bare }));
        assert!(!Order::Open(PathBuf::new()).is_step());
    }
}
