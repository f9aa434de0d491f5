//! The three kinds of run that are compared, from the same initial weights.

use std::time::Instant;

use model::Trainer;
use quasar_tests::training::setting::{Base, Model, Order, Setting};
use quasar_tests::training::swarm::{self, Scheme};

/// Learners that merge.
const LEARNERS: usize = 3;

/// Held-out losses of one seed, in nats.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub seed: u64,
    /// Of the initial weights, the same for all.
    pub start: f64,
    /// After training by three learners with decoupled merges.
    pub merged: f64,
    /// After the same number of steps by the first of these learners alone.
    pub alone: f64,
    /// After the same number of steps with the three learners' rows in one batch.
    pub parallel: f64,
    pub seconds: f64,
}

/// Runs all three kinds with one seed, two at a time: the merging learners take about as long as the other two together.
pub fn run(setting: &Setting, seed: u64) -> anyhow::Result<Run> {
    let start = Instant::now();
    let base = setting.base(seed)?;
    let order = setting.order(seed, LEARNERS);
    let (merged, others) = std::thread::scope(|scope| {
        let merged = scope.spawn(|| merging(setting, &base, &order, &format!("seed {seed}, three learners")));
        let others = plain(setting, &base, &order, 1, &format!("seed {seed}, one alone")).and_then(|alone| {
            let parallel = plain(setting, &base, &order, LEARNERS, &format!("seed {seed}, data-parallel"))?;
            Ok((alone, parallel))
        });
        (merged.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), others)
    });
    let (merged, (alone, parallel)) = (merged?, others?);
    Ok(Run {
        seed,
        start: setting.held_out_loss(&base, None)?,
        merged: setting.held_out_loss(&base, Some(&merged))?,
        alone: setting.held_out_loss(&base, Some(&alone))?,
        parallel: setting.held_out_loss(&base, Some(&parallel))?,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// One trainer that takes the rows of the first `learners` learners in each step.
fn plain(setting: &Setting, base: &Base, order: &Order, learners: usize, name: &str) -> anyhow::Result<Model> {
    let mut trainer = setting.trainer(base)?;
    let mut losses = Mean::default();
    for step in 0..setting.steps {
        losses.add(setting.train(&mut trainer, step, (0..learners).flat_map(|learner| order.of(step, learner)))?);
        tell(setting, name, step, &mut losses);
    }
    Ok((0..base.plan.fragments.len()).map(|fragment| trainer.export(fragment)).collect::<Result<_, _>>()?)
}

/// Three learners, and the orchestrator's arithmetic in between, as in the daemons.
fn merging(setting: &Setting, base: &Base, order: &Order, name: &str) -> anyhow::Result<Model> {
    let mut losses = Mean::default();
    let scheme = Scheme::of(&setting.parameters, LEARNERS);
    swarm::train(
        setting,
        base,
        order,
        scheme,
        |_| (),
        |step, loss| {
            losses.add(loss);
            tell(setting, name, step, &mut losses);
        },
    )
}

/// Mean of the training losses since the last report.
#[derive(Default)]
struct Mean {
    sum: f64,
    count: u32,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }
}

/// One line of progress at the end of each cycle.
fn tell(setting: &Setting, name: &str, step: u64, losses: &mut Mean) {
    let cycle_steps = u64::from(setting.parameters.inner_steps);
    if (step + 1).is_multiple_of(cycle_steps) {
        let Mean { sum, count } = std::mem::take(losses);
        eprintln!(
            "{name}: cycle {} of {}, training loss {:.3}",
            (step + 1) / cycle_steps,
            setting.parameters.cycles,
            sum / f64::from(count)
        );
    }
}
