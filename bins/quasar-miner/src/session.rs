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
/// A step under way at the end may take so long. Leaving while libtorch computes may crash the process on its way out.
const STEP_PATIENCE: Duration = Duration::from_millis(1_500);

/// Runs a learner to its end.
pub async fn run(
    slot: u8,
    mut machine: Learner,
    edge: Arc<Edge>,
    inputs: mpsc::Sender<Input>,
    mut queue: mpsc::Receiver<Input>,
    shutdown: Shutdown,
    component: Component,
) -> End {
    let mut tasks: JoinSet<()> = JoinSet::new();
    let mut asked_to_stop = false;
    let mut time = clock::Steady::new(0);
    let mut input = Input::Tick;
    let end = loop {
        measure(slot, &input);
        machine.handle(time.read(clock::now_ms(), Instant::now()), input);
        while let Some(effect) = machine.poll_effect() {
            tasks.spawn(edge.clone().execute(effect, inputs.clone()));
        }
        component.beat();
        if let Some(end) = machine.end() {
            break end.clone();
        }
        input = match next_input(&machine, &mut tasks, &mut queue, &shutdown, &mut asked_to_stop, &component).await {
            Ok(input) => input,
            Err(panicked) => break End::Broken(panicked),
        };
    };
    tasks.shutdown().await;
    edge.close(STEP_PATIENCE).await;
    end
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

/// Waits for the next fact: something happened, the machine's deadline came, or a stop was asked for.
async fn next_input(
    machine: &Learner,
    tasks: &mut JoinSet<()>,
    queue: &mut mpsc::Receiver<Input>,
    shutdown: &Shutdown,
    asked_to_stop: &mut bool,
    component: &Component,
) -> Result<Input, String> {
    loop {
        let wake = machine.deadline().map(|deadline| {
            let pause = Duration::from_millis(deadline.saturating_sub(clock::now_ms()));
            Instant::now() + pause.max(TICK_PAUSE_MIN)
        });
        let beat = Instant::now() + HEARTBEAT;
        tokio::select! {
            biased;
            () = shutdown.triggered(), if !*asked_to_stop => {
                *asked_to_stop = true;
                return Ok(Input::Stop);
            }
            Some(ended) = tasks.join_next() => {
                if let Err(error) = ended && error.is_panic() {
                    return Err("a task panicked\nhint: this is a bug; a restart goes on from the local snapshots".to_owned());
                }
            }
            Some(input) = queue.recv() => return Ok(input),
            () = tokio::time::sleep_until(wake.unwrap_or(beat)), if wake.is_some_and(|wake| wake <= beat) => return Ok(Input::Tick),
            () = tokio::time::sleep_until(beat) => component.beat(),
        }
    }
}
