//! Runs a [`Machine`] against the world: journal every input, handle it, execute the effects, feed back what came of them.
//!
//! ```text
//! inputs ──► batch ──► journal (one durable commit) ──► machine ──► effects ──► executor (tokio tasks) ──► inputs
//! ```
//!
//! A batch is what has arrived while the last one was being written. The effects of an input begin only after the input is
//! durable, so that a restart never finds traces of a decision that it does not remember. [`recover`] rebuilds the machine
//! with effects muted; the first input of the new process ([`Driver::first`]) is the machine's occasion to ask again for
//! effects that its last life left open. Effects are idempotent by key, which makes doing one twice harmless.

mod lanes;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::health::Component;
use crate::journal::{ENTRY_BYTES_MAX, SNAPSHOT_BYTES_MAX};
use crate::machine::Lane;
use crate::{Exit, Journal, JournalError, Machine, Shutdown, clock};

pub use lanes::Lanes;

/// Name of the value that holds [`Machine::LAYOUT`].
const LAYOUT_KEY: &str = "driver/layout";
/// The driver wakes at least this often, to say that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// A machine whose deadline does not move when it is woken is woken no more often than this.
const TICK_PAUSE_MIN: Duration = Duration::from_millis(1);

#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(
        "the journal was written by a version with layout {found}, this one has {expected}\n\
         hint: run the version that wrote it, or move the state directory away to start fresh"
    )]
    Layout { found: u32, expected: u32 },
    #[error("{what} of the journal cannot be decoded: {reason}\nhint: run the version that wrote it, or move the state directory away")]
    Undecodable { what: &'static str, reason: String },
    #[error("{what} cannot be encoded: {reason}")]
    Unencodable { what: &'static str, reason: String },
    #[error("an effect panicked: {0}\nhint: this is a bug; the journal is intact and a restart goes on from it")]
    EffectPanicked(String),
}

impl DriverError {
    /// The exit code that a supervisor should see.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Journal(error) => error.exit(),
            Self::Layout { .. } | Self::Undecodable { .. } => Exit::Configuration,
            Self::Unencodable { .. } | Self::EffectPanicked(_) => Exit::Unavailable,
        }
    }
}

impl From<DriverError> for crate::Failure {
    fn from(error: DriverError) -> Self {
        Self::new(error.exit(), error)
    }
}

/// Executes effects. One instance serves all tasks; what it learns goes to `inputs`.
pub trait Executor: Send + Sync + 'static {
    type Input: Send + 'static;
    type Effect: Send + 'static;

    /// Does one thing, as a task of its own. Failures are inputs too: an effect that ends in silence leaves the machine to
    /// its deadlines.
    fn execute(&self, effect: Self::Effect, inputs: Inputs<Self::Input>) -> impl Future<Output = ()> + Send;
}

/// Where facts are handed to the driver: by effects, pollers, the trainer's thread.
pub struct Inputs<I>(mpsc::Sender<I>);

impl<I> Clone for Inputs<I> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<I> Inputs<I> {
    /// Hands over a fact, waiting while the driver is behind. After the driver has stopped, it is dropped: nobody is left
    /// to whom it matters, and the next life finds out by itself.
    pub async fn send(&self, input: I) {
        let _ = self.0.send(input).await;
    }

    /// The same from a thread outside the runtime.
    pub fn send_blocking(&self, input: I) {
        let _ = self.0.blocking_send(input);
    }

    /// Whether the driver has stopped.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

/// Limits of a driver.
#[derive(Clone, Copy, Debug)]
pub struct DriverOptions {
    /// Effects that run at the same time in a lane, at most ([`Lanes::new`]); further ones wait in order.
    pub in_flight_max: usize,
    /// Inputs in one durable commit.
    pub batch_max: usize,
    /// Journaled inputs after which a snapshot is taken.
    pub snapshot_every: usize,
    /// How long begun effects may go on after a stop.
    pub stop_grace: Duration,
    /// Unix milliseconds.
    pub clock: fn() -> u64,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self { in_flight_max: 64, batch_max: 256, snapshot_every: 4_096, stop_grace: Duration::from_secs(10), clock: clock::now_ms }
    }
}

/// A machine as the journal remembers it.
#[derive(Debug)]
pub struct Recovered<M> {
    pub machine: M,
    /// Entries that were handled again.
    pub replayed: usize,
    /// Whether the journal knew anything.
    pub is_new: bool,
    /// Time of the newest input; time goes on from here even if the wall clock went back.
    pub last_ms: u64,
}

impl<M> Recovered<M> {
    /// A machine without a past.
    pub fn fresh(machine: M) -> Self {
        Self { machine, replayed: 0, is_new: true, last_ms: 0 }
    }
}

/// Whether the journal was begun with this machine's layout; `false` if it was not begun yet.
///
/// # Errors
/// It was begun with another one.
pub fn has_layout<M: Machine>(journal: &Journal) -> Result<bool, DriverError> {
    let Some(bytes) = journal.get(LAYOUT_KEY)? else { return Ok(false) };
    let found = bytes.first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    if found == M::LAYOUT { Ok(true) } else { Err(DriverError::Layout { found, expected: M::LAYOUT }) }
}

/// Rebuilds a machine: newest snapshot, or `fresh()` if there is none, then every later input again with effects muted.
///
/// # Errors
/// The journal is damaged, or of another layout.
pub fn recover<M>(journal: &Journal, fresh: impl FnOnce() -> M) -> Result<Recovered<M>, DriverError>
where
    M: Machine + DeserializeOwned,
{
    recover_observed(journal, fresh, |_, _| {})
}

/// [`recover`], showing each input and its time before it is handled: what `replay` prints.
///
/// # Errors
/// As [`recover`].
pub fn recover_observed<M>(
    journal: &Journal,
    fresh: impl FnOnce() -> M,
    mut observe: impl FnMut(u64, &M::Input),
) -> Result<Recovered<M>, DriverError>
where
    M: Machine + DeserializeOwned,
{
    if !has_layout::<M>(journal)? {
        journal.put(LAYOUT_KEY, &M::LAYOUT.to_le_bytes())?;
    }
    let loaded = journal.load()?;
    let mut recovered = match &loaded.snapshot {
        Some(bytes) => {
            let (last_ms, machine) = decode::<(u64, M), SNAPSHOT_BYTES_MAX>(bytes, "the snapshot")?;
            Recovered { machine, replayed: 0, is_new: false, last_ms }
        }
        None => Recovered { is_new: loaded.entries.is_empty(), ..Recovered::fresh(fresh()) },
    };
    for entry in loaded.entries {
        let input = decode::<M::Input, ENTRY_BYTES_MAX>(&entry.bytes, "an input")?;
        observe(entry.now_ms, &input);
        recovered.machine.handle(entry.now_ms, input);
        while recovered.machine.poll_effect().is_some() {}
        recovered.last_ms = recovered.last_ms.max(entry.now_ms);
        recovered.replayed += 1;
    }
    Ok(recovered)
}

/// Makes `machine` what the journal remembers: for a machine that was read from elsewhere.
///
/// # Errors
/// The journal cannot be written.
pub fn seed<M: Machine + Serialize>(journal: &Journal, machine: &M, now_ms: u64) -> Result<(), DriverError> {
    journal.put(LAYOUT_KEY, &M::LAYOUT.to_le_bytes())?;
    Ok(journal.snapshot(&encode(&(now_ms, machine), "the snapshot")?)?)
}

/// Runs one machine; see the module's text.
pub struct Driver<M: Machine, E> {
    machine: M,
    /// `None` where the machine remembers nothing.
    journal: Option<Arc<Journal>>,
    executor: Arc<E>,
    options: DriverOptions,
    component: Option<Component>,
    first: Option<M::Input>,
    last: Option<M::Input>,
    time: clock::Steady,
    since_snapshot: usize,
    effects: Lanes<M>,
    tasks: JoinSet<Lane>,
    sender: mpsc::Sender<M::Input>,
    receiver: mpsc::Receiver<M::Input>,
}

impl<M, E> Driver<M, E>
where
    M: Machine + Serialize,
    M::Input: Send + 'static,
    M::Effect: Send + 'static,
    E: Executor<Input = M::Input, Effect = M::Effect>,
{
    pub fn new(recovered: Recovered<M>, journal: Arc<Journal>, executor: Arc<E>) -> Self {
        Self::with_options(recovered, journal, executor, DriverOptions::default())
    }

    pub fn with_options(recovered: Recovered<M>, journal: Arc<Journal>, executor: Arc<E>, options: DriverOptions) -> Self {
        Self { journal: Some(journal), ..Self::forgetful(recovered, executor, options) }
    }

    /// For a machine that finds all it needs outside when it begins anew: nothing is journaled.
    pub fn forgetful(recovered: Recovered<M>, executor: Arc<E>, options: DriverOptions) -> Self {
        let (sender, receiver) = mpsc::channel(options.batch_max.max(1));
        Self {
            machine: recovered.machine,
            journal: None,
            executor,
            options,
            component: None,
            first: None,
            last: None,
            time: clock::Steady::new(recovered.last_ms),
            since_snapshot: recovered.replayed,
            effects: Lanes::new(options.in_flight_max),
            tasks: JoinSet::new(),
            sender,
            receiver,
        }
    }

    /// The first input of this life, on which the machine asks again for the effects that are still open.
    pub fn first(mut self, input: M::Input) -> Self {
        self.first = Some(input);
        self
    }

    /// The input that announces a stop. The effects that follow from it are executed within the grace; without it, no new
    /// effect begins once a stop was asked for.
    pub fn last(mut self, input: M::Input) -> Self {
        self.last = Some(input);
        self
    }

    /// Reports liveness to the health page.
    pub fn component(mut self, component: Component) -> Self {
        self.component = Some(component);
        self
    }

    /// A way in for facts that no effect brings.
    pub fn inputs(&self) -> Inputs<M::Input> {
        Inputs(self.sender.clone())
    }

    /// Runs until the stop or the end of the machine's own life, and gives the machine back with the exit code.
    ///
    /// # Errors
    /// The journal fails or an effect panics. What was journaled before stands.
    pub async fn run(mut self, shutdown: &Shutdown) -> Result<(M, Exit), DriverError> {
        let mut batch: Vec<M::Input> = self.first.take().into_iter().collect();
        let mut earliest_tick = Instant::now();
        let exit = loop {
            let now_ms = self.now_ms();
            if self.machine.deadline().is_some_and(|deadline| deadline <= now_ms) && earliest_tick <= Instant::now() {
                batch.push(M::tick());
                earliest_tick = Instant::now() + TICK_PAUSE_MIN;
            }
            self.commit(&mut batch, now_ms).await?;
            if let Some(component) = &self.component {
                component.beat();
            }
            if let Some(exit) = self.machine.exit() {
                break exit;
            }
            self.begin_effects();
            let wake = self.next_wake(earliest_tick);
            tokio::select! {
                () = shutdown.triggered() => break Exit::Done,
                Some(ended) = self.tasks.join_next() => self.ended(ended)?,
                _ = self.receiver.recv_many(&mut batch, self.options.batch_max) => {}
                () = tokio::time::sleep_until(wake) => {}
            }
        };
        self.stop(exit).await
    }

    /// Time of the next batch.
    fn now_ms(&mut self) -> u64 {
        self.time.read((self.options.clock)(), Instant::now())
    }

    fn next_wake(&mut self, earliest_tick: Instant) -> Instant {
        let now_ms = self.now_ms();
        let beat = Instant::now() + HEARTBEAT;
        match self.machine.deadline() {
            Some(deadline) => {
                let tick = Instant::now() + Duration::from_millis(deadline.saturating_sub(now_ms)).min(HEARTBEAT);
                tick.max(earliest_tick).min(beat)
            }
            None => beat,
        }
    }

    /// Journals the batch, handles it, takes the effects, and snapshots when it is time.
    async fn commit(&mut self, batch: &mut Vec<M::Input>, now_ms: u64) -> Result<(), DriverError> {
        if batch.is_empty() {
            return Ok(());
        }
        if let Some(journal) = self.journal.clone() {
            let mut records = Vec::with_capacity(batch.len());
            for input in batch.iter() {
                records.push((now_ms, encode(input, "an input")?));
            }
            let begun = Instant::now();
            blocking(move || journal.append(&records)).await?;
            metrics::histogram!("quasar_journal_commit_seconds").record(begun.elapsed().as_secs_f64());
        }
        metrics::counter!("quasar_driver_inputs_total").increment(batch.len() as u64);
        self.since_snapshot += batch.len();
        for input in batch.drain(..) {
            self.machine.handle(now_ms, input);
            while let Some(effect) = self.machine.poll_effect() {
                self.effects.push(effect);
            }
        }
        if self.since_snapshot >= self.options.snapshot_every {
            self.snapshot().await?;
        }
        Ok(())
    }

    async fn snapshot(&mut self) -> Result<(), DriverError> {
        self.since_snapshot = 0;
        let Some(journal) = self.journal.clone() else { return Ok(()) };
        let bytes = encode(&(self.time.last_ms(), &self.machine), "the snapshot")?;
        blocking(move || journal.snapshot(&bytes)).await?;
        Ok(())
    }

    fn begin_effects(&mut self) {
        while let Some((lane, effect)) = self.effects.begin() {
            let (executor, inputs) = (self.executor.clone(), self.inputs());
            self.tasks.spawn(async move {
                executor.execute(effect, inputs).await;
                lane
            });
        }
        metrics::gauge!("quasar_driver_effects_in_flight").set(self.effects.running() as f64);
        metrics::gauge!("quasar_driver_effects_waiting").set(self.effects.waiting() as f64);
    }

    fn ended(&mut self, ended: Result<Lane, tokio::task::JoinError>) -> Result<(), DriverError> {
        match ended {
            Ok(lane) => self.effects.ended(lane),
            Err(error) if error.is_panic() => return Err(DriverError::EffectPanicked(panic_text(error))),
            Err(_) => {}
        }
        Ok(())
    }

    /// Lets begun effects end within the grace, takes what they report, and leaves a snapshot for a quick start.
    async fn stop(mut self, exit: Exit) -> Result<(M, Exit), DriverError> {
        let mut batch: Vec<M::Input> = self.last.take().into_iter().collect();
        let begins_more = !batch.is_empty() || self.machine.exit().is_some();
        let end = Instant::now() + self.options.stop_grace;
        loop {
            let now_ms = self.now_ms();
            self.commit(&mut batch, now_ms).await?;
            if begins_more {
                self.begin_effects();
            }
            while let Ok(input) = self.receiver.try_recv() {
                batch.push(input);
            }
            if !batch.is_empty() {
                continue;
            }
            if self.tasks.is_empty() {
                break;
            }
            tokio::select! {
                Some(ended) = self.tasks.join_next() => self.ended(ended)?,
                _ = self.receiver.recv_many(&mut batch, self.options.batch_max) => {}
                () = tokio::time::sleep_until(end) => {
                    tracing::warn!(effects = self.tasks.len(), "stopping before all effects ended; the next start asks for them again");
                    break;
                }
            }
        }
        self.tasks.shutdown().await;
        while let Ok(input) = self.receiver.try_recv() {
            batch.push(input);
        }
        let now_ms = self.now_ms();
        self.commit(&mut batch, now_ms).await?;
        self.snapshot().await?;
        Ok((self.machine, exit))
    }
}

fn panic_text(error: tokio::task::JoinError) -> String {
    let panic = error.into_panic();
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

/// Journal calls wait for the disk: not on the runtime's threads.
async fn blocking<T: Send + 'static>(call: impl FnOnce() -> Result<T, JournalError> + Send + 'static) -> Result<T, DriverError> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => Ok(result?),
        Err(error) if error.is_panic() => Err(DriverError::EffectPanicked(panic_text(error))),
        Err(error) => Err(DriverError::EffectPanicked(error.to_string())),
    }
}

fn encode<T: Serialize>(value: &T, what: &'static str) -> Result<Vec<u8>, DriverError> {
    bincode::serde::encode_to_vec(value, bincode::config::standard().with_fixed_int_encoding())
        .map_err(|error| DriverError::Unencodable { what, reason: error.to_string() })
}

fn decode<T: DeserializeOwned, const LIMIT: usize>(bytes: &[u8], what: &'static str) -> Result<T, DriverError> {
    let configuration = bincode::config::standard().with_fixed_int_encoding().with_limit::<LIMIT>();
    match bincode::serde::decode_from_slice(bytes, configuration) {
        Ok((value, consumed)) if consumed == bytes.len() => Ok(value),
        Ok(_) => Err(DriverError::Undecodable { what, reason: "bytes follow its end".to_owned() }),
        Err(error) => Err(DriverError::Undecodable { what, reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests;
