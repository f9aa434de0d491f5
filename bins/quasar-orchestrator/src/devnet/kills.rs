//! The orchestrator killed again and again: how often, and how long until its next process works.

use std::time::{Duration, Instant};

use daemon::Failure;

use super::children::{Child, Children};
use super::place::Place;
use super::view::View;

/// What the kills did.
#[derive(Clone, Debug, Default)]
pub struct Kills {
    every: Option<Duration>,
    last: Option<Instant>,
    /// A process was started then, and the status was that of this epoch before. The head of its epoch is claimed before its machine is there;
    /// the status is the machine's.
    awaited: Option<(Instant, u64)>,
    recoveries: Vec<f64>,
}

impl Kills {
    pub fn new(every_sec: Option<u64>) -> Self {
        Self { every: every_sec.map(Duration::from_secs), ..Self::default() }
    }

    /// Kills the orchestrator when it is time, and starts it again at once; for a caller that awaits no return.
    pub async fn advance(&mut self, place: &Place, children: &mut Children, view: &mut View) -> Result<(), Failure> {
        let Some(every) = self.every else { return Ok(()) };
        let last = *self.last.get_or_insert_with(Instant::now);
        if last.elapsed() < every {
            return Ok(());
        }
        let Some(before) = place.status().await.map(|status| status.epoch) else { return Ok(()) };
        view.note("killing orchestrator");
        children.kill(Child::Orchestrator).await;
        children.start(place.orchestrator()?)?;
        self.awaited = Some((Instant::now(), before));
        self.last = Some(Instant::now());
        Ok(())
    }

    /// Looks whether a killed orchestrator works again.
    pub async fn note_return(&mut self, place: &Place, view: &mut View) {
        let Some((started, before)) = self.awaited else { return };
        if place.status().await.is_some_and(|status| status.epoch > before) {
            let seconds = started.elapsed().as_secs_f64();
            view.note(&format!("the orchestrator is back after {seconds:.2} s"));
            self.recoveries.push(seconds);
            self.awaited = None;
        }
    }

    /// Whether the orchestrator is on its way back: worth looking more often.
    pub fn is_awaiting(&self) -> bool {
        self.awaited.is_some()
    }

    /// Number of kills that it came back from.
    pub fn count(&self) -> usize {
        self.recoveries.len()
    }

    /// Longest time from the start of a process to its first status, in seconds.
    pub fn slowest_seconds(&self) -> f64 {
        self.recoveries.iter().copied().fold(0.0, f64::max)
    }
}
