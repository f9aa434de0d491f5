//! The setter as a task of a daemon: the machine, the chain, a clock, and channels for scores and reports.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::sleep;

use super::{Effect, Input, Outcome, Report, Setter, execute};
use crate::hotkey::Hotkey;
use crate::link::ChainLink;

/// Steps of a sent row that wait to be told; there are four, and two more for each fork.
const PROGRESS_MAX: usize = 32;

/// What a [`Setter`] needs to run.
pub struct SetterTask {
    pub setter: Setter,
    pub link: Arc<ChainLink>,
    pub hotkey: Arc<Hotkey>,
    /// Unix time in milliseconds.
    pub now_ms: fn() -> u64,
    /// Scores, as they come.
    pub inputs: mpsc::Receiver<Input>,
    /// What happens. A full queue loses reports, and never holds the setter up.
    pub reports: mpsc::Sender<Report>,
}

impl SetterTask {
    /// Runs until the other end of `inputs` is dropped, and gives the machine back; a row that is on its way is followed to its end
    /// first. `store` is called with the machine after everything that changed it, so that a restart goes on where this one
    /// stopped.
    pub async fn run(mut self, mut store: impl FnMut(&Setter) + Send) -> Setter {
        self.setter.resume((self.now_ms)());
        let mut is_open = true;
        loop {
            self.handle(Input::Tick, &mut store);
            while let Some(effect) = self.setter.poll_effect() {
                self.perform(effect, &mut store).await;
            }
            if !is_open {
                return self.setter;
            }
            let deadline = self.setter.deadline();
            let now_ms = (self.now_ms)();
            let wake = async {
                match deadline {
                    Some(at_ms) => sleep(Duration::from_millis(at_ms.saturating_sub(now_ms))).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                input = self.inputs.recv() => match input {
                    Some(input) => self.handle(input, &mut store),
                    None => is_open = false,
                },
                () = wake => {}
            }
        }
    }

    /// Does one thing for the machine and tells it what came of it, its progress included.
    async fn perform(&mut self, effect: Effect, store: &mut (impl FnMut(&Setter) + Send)) {
        let client = match self.link.client().await {
            Ok(client) => client,
            Err(error) => {
                let why = error.to_string().replace('\n', "; ");
                let answer = match effect {
                    Effect::Look => Input::Unreachable { why },
                    Effect::Send { attempt, .. } => Input::Ended { attempt, outcome: Outcome::NotSent { why } },
                };
                return self.handle(answer, store);
            }
        };
        let place = self.setter.place();
        let hotkey = self.hotkey.clone();
        let (tell, mut progress) = mpsc::channel(PROGRESS_MAX);
        let doing = execute(client.as_ref(), &hotkey, &effect, place, &tell);
        tokio::pin!(doing);
        let answer = loop {
            tokio::select! {
                biased;
                Some(step) = progress.recv() => self.handle(step, store),
                answer = &mut doing => break answer,
            }
        };
        self.handle(answer, store);
    }

    fn handle(&mut self, input: Input, store: &mut impl FnMut(&Setter)) {
        let is_tick = input == Input::Tick;
        self.setter.handle((self.now_ms)(), input);
        if !is_tick {
            store(&self.setter);
        }
        while let Some(report) = self.setter.poll_report() {
            let _ = self.reports.try_send(report);
        }
    }
}
