//! One session of one learner: the loop that feeds its machine and executes what it decides.

use std::sync::Arc;
use std::time::Duration;

use daemon::health::Component;
use daemon::{Machine, Shutdown, clock};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::edge::Edge;
use crate::machine::{End, Input, Learner};

/// Inputs that may wait for the machine.
pub const INPUTS: usize = 256;
/// The loop turns at least this often, to say that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Wake-ups are at least this far apart.
const TICK_PAUSE_MIN: Duration = Duration::from_millis(1);
/// Over a wall clock that is set back, the machine's time goes on more slowly until both meet. It is ahead by so much at most: what others
/// date (grants, pulls, leases) would be over for it before it began.
const BEHIND_MAX_MS: u64 = 60_000;
/// A step under way at the end may take so long: what it computes is in the spool then. With the last record and the spool's way to the
/// disk this must fit into the 120 s that the systemd unit gives a stop, and the same of a watchdog that hears nothing meanwhile.
const STEP_PATIENCE: Duration = Duration::from_secs(60);

/// Runs a learner to its end.
pub async fn run(
    slot: u8,
    mut machine: Learner,
    edge: Arc<Edge>,
    inputs: mpsc::Sender<Input>,
    queue: mpsc::Receiver<Input>,
    shutdown: Shutdown,
    component: Component,
) -> End {
    let mut sources = Sources::new(queue, shutdown, clock::now_ms);
    let mut input = Input::Tick;
    let end = loop {
        measure(slot, &input);
        machine.handle(sources.now_ms(), input);
        while let Some(effect) = machine.poll_effect() {
            sources.tasks.spawn(edge.clone().execute(effect, inputs.clone()));
        }
        let report = || report(&machine, edge.trainer_hangs(), &component);
        report();
        if let Some(end) = machine.end() {
            break end.clone();
        }
        input = match sources.next(machine.deadline(), &report).await {
            Ok(input) => input,
            Err(end) => break end,
        };
    };
    // The first learner that ends, ends all: the others do not wait for its last step.
    sources.shutdown.trigger();
    sources.tasks.shutdown().await;
    edge.close(STEP_PATIENCE).await;
    end
}

/// A sign of life, and what the learner waits for. While the trainer hangs there is none, whatever else turns.
fn report(machine: &Learner, trainer_hangs: bool, component: &Component) {
    match machine.unready() {
        _ if trainer_hangs => {}
        None => component.ready(),
        Some(reason) => component.not_ready(reason),
    }
}

/// Counts what the metrics page shows.
fn measure(slot: u8, input: &Input) {
    let labels = || [("slot", slot.to_string())];
    match input {
        Input::Finished { step: Some(done), .. } => {
            metrics::counter!("quasar_miner_steps_total", &labels()).increment(1);
            metrics::counter!("quasar_miner_tokens_total", &labels()).increment(done.tokens);
            metrics::gauge!("quasar_miner_loss_nats", &labels()).set(done.loss as f64 * 1e-6);
            metrics::histogram!("quasar_miner_step_seconds", &labels()).record(f64::from(done.step_ms) * 1e-3);
        }
        Input::Faulted { .. } => metrics::counter!("quasar_miner_faults_total", &labels()).increment(1),
        Input::PayloadPut { put, .. } if put.is_done() => metrics::counter!("quasar_miner_uploads_total", &labels()).increment(1),
        _ => {}
    }
}

/// Where a learner's facts come from.
struct Sources {
    tasks: JoinSet<()>,
    queue: mpsc::Receiver<Input>,
    shutdown: Shutdown,
    asked_to_stop: bool,
    /// The machine's time.
    time: clock::Steady,
    /// The wall clock, in Unix milliseconds.
    wall: fn() -> u64,
}

impl Sources {
    fn new(queue: mpsc::Receiver<Input>, shutdown: Shutdown, wall: fn() -> u64) -> Self {
        Self { tasks: JoinSet::new(), queue, shutdown, asked_to_stop: false, time: clock::Steady::new(0), wall }
    }

    fn now_ms(&mut self) -> u64 {
        self.time.read((self.wall)(), Instant::now())
    }

    /// Waits for the next fact: something happened, the machine's deadline came, or a stop was asked for. Calls `report` while it waits.
    ///
    /// # Errors
    /// The session is over: a task panicked, or the wall clock was set back.
    async fn next(&mut self, deadline: Option<u64>, report: &impl Fn()) -> Result<Input, End> {
        loop {
            let now_ms = self.now_ms();
            let behind_ms = now_ms.saturating_sub((self.wall)());
            if behind_ms > BEHIND_MAX_MS {
                tracing::warn!(behind_s = behind_ms / 1_000, "the wall clock was set back; the session ends, for the next one to go by it");
                return Err(End::ClockSetBack);
            }
            let begun = Instant::now();
            let wake = deadline.map(|deadline| begun + Duration::from_millis(deadline.saturating_sub(now_ms)).max(TICK_PAUSE_MIN));
            let beat = begun + HEARTBEAT;
            tokio::select! {
                biased;
                () = self.shutdown.triggered(), if !self.asked_to_stop => {
                    self.asked_to_stop = true;
                    return Ok(Input::Stop);
                }
                Some(ended) = self.tasks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        let what = "a task panicked\nhint: this is a bug; a restart goes on from the local snapshots";
                        return Err(End::Broken(what.to_owned()));
                    }
                }
                Some(input) = self.queue.recv() => return Ok(input),
                () = tokio::time::sleep_until(wake.unwrap_or(beat)), if wake.is_some_and(|wake| wake <= beat) => return Ok(Input::Tick),
                () = tokio::time::sleep_until(beat) => report(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use daemon::Exit;
    use daemon::health::Health;

    use super::*;
    use crate::machine::{Found, Look};
    use crate::tests::world::{POLL_MS, START_MS, World};

    /// A learner that has looked at the head, and looks again after the poll interval.
    fn learner() -> Learner {
        let folder = tempfile::tempdir().unwrap();
        let mut machine = World::new(folder.path(), START_MS).machine;
        machine.handle(START_MS, Input::Tick);
        machine.handle(START_MS, Input::Looked { at: Look::Head, found: Found::Nothing });
        assert_eq!(machine.deadline(), Some(START_MS + POLL_MS));
        machine
    }

    /// Sources whose clock was at [`START_MS`], and shows `wall` from now on.
    fn sources(wall: fn() -> u64) -> (Sources, mpsc::Sender<Input>) {
        let (inputs, queue) = mpsc::channel(INPUTS);
        let mut sources = Sources::new(queue, Shutdown::new(), || START_MS);
        assert_eq!(sources.now_ms(), START_MS);
        sources.wall = wall;
        (sources, inputs)
    }

    #[tokio::test]
    async fn a_clock_that_is_set_back_a_little_holds_up_no_deadline() {
        let (machine, (mut sources, _inputs)) = (learner(), sources(|| START_MS - 50_000));
        let next = sources.next(machine.deadline(), &|| {});
        let next = tokio::time::timeout(Duration::from_secs(20), next).await.expect("it is woken by its own time");
        assert_eq!(next, Ok(Input::Tick));
    }

    #[tokio::test]
    async fn a_clock_that_is_set_right_by_more_than_a_minute_ends_the_session_for_another_try() {
        let (machine, (mut sources, _inputs)) = (learner(), sources(|| START_MS - 60_001));
        let end = sources.next(machine.deadline(), &|| {}).await.unwrap_err();
        assert_eq!((&end, end.exit()), (&End::ClockSetBack, Exit::TryLater));
    }

    #[test]
    fn a_learner_is_ready_once_it_has_grants_and_gives_no_sign_of_life_while_its_trainer_hangs() {
        let (mut machine, health) = (learner(), Health::new());
        let component = health.watched("learner-0", Duration::from_secs(3_600));
        report(&machine, true, &component);
        assert_eq!(health.unready(), ["learner-0: starting"]);
        report(&machine, false, &component);
        assert_eq!(health.unready(), ["learner-0: the orchestrator has not granted anything yet"]);
        let found = Found::Grants { session_epoch: START_MS, grants: vec![] };
        machine.handle(START_MS, Input::Looked { at: Look::Standing, found });
        report(&machine, false, &component);
        assert!(health.unready().is_empty());
    }
}
