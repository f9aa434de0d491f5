//! The three kinds of run that are compared, from the same initial weights.

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::anyhow;
use fragments::codec::{self, PayloadHeader};
use fragments::keyframe::{self, KeyframeId};
use fragments::merge::{Input, averaged, robust_merge};
use fragments::outer;
use fragments::state::FragmentState;
use model::{Batch, Evaluator, QuasarEvaluator, QuasarTrainer, Trainer};
use protocol::documents::{PPM, RunParameters};
use protocol::schedule::{self, Work};
use protocol::{Digest, FragmentPlan, Slice};

use crate::setting::{Base, LEARNERS, Order, Setting};

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

/// All values of a model by fragment.
type Model = Vec<Vec<f32>>;

/// Runs all three kinds with one seed, two at a time: the merging learners take about as long as the other two together.
pub fn run(setting: &Setting, seed: u64) -> anyhow::Result<Run> {
    let start = Instant::now();
    let base = setting.base(seed)?;
    let order = setting.order(seed);
    let (merged, others) = std::thread::scope(|scope| {
        let merged = scope.spawn(|| merging(setting, &base, &order, &format!("seed {seed}, three learners")));
        let others = plain(setting, &base, &order, 1, &format!("seed {seed}, one alone")).and_then(|alone| {
            let parallel = plain(setting, &base, &order, LEARNERS, &format!("seed {seed}, data-parallel"))?;
            Ok((alone, parallel))
        });
        (merged.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), others)
    });
    let (merged, (alone, parallel)) = (merged?, others?);
    let mut judge = QuasarEvaluator::open(&base.folder, &base.plan, "cpu", 1)?;
    let mut loss_of = |model: Option<Model>| -> anyhow::Result<f64> {
        for (fragment, values) in model.iter().flatten().enumerate() {
            judge.apply(fragment, values)?;
        }
        let rows = &setting.held_out;
        let losses = judge.losses(&Batch { tokens: rows.tokens(), rows: rows.count(), row_tokens: rows.row_tokens })?;
        Ok(losses.iter().sum::<f64>() / losses.len() as f64)
    };
    Ok(Run {
        seed,
        start: loss_of(None)?,
        merged: loss_of(Some(merged))?,
        alone: loss_of(Some(alone))?,
        parallel: loss_of(Some(parallel))?,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// One trainer that takes the rows of the first `learners` learners in each step.
fn plain(setting: &Setting, base: &Base, order: &Order, learners: usize, name: &str) -> anyhow::Result<Model> {
    let mut trainer = QuasarTrainer::open(&base.folder, base.plan.clone(), "cpu", 1)?;
    let mut losses = Mean::default();
    for step in 0..setting.steps {
        losses.add(train(setting, &mut trainer, step, (0..learners).flat_map(|learner| order.of(step, learner)))?);
        tell(setting, name, step, &mut losses);
    }
    Ok((0..base.plan.fragments.len()).map(|fragment| trainer.export(fragment)).collect::<Result<_, _>>()?)
}

/// Three learners, and the orchestrator's arithmetic in between.
///
/// At each step boundary a learner applies what has arrived, then answers the pull, then trains, as the daemons do. With
/// equal learners and no network the schedule is exact: step t is followed by the pull of fragment t mod P from all of
/// them, and the merged version arrives τ steps later.
fn merging(setting: &Setting, base: &Base, order: &Order, name: &str) -> anyhow::Result<Model> {
    let open = || QuasarTrainer::open(&base.folder, base.plan.clone(), "cpu", 1);
    let mut learners = (0..LEARNERS).map(|_| open()).collect::<Result<Vec<_>, _>>()?;
    let mut merger = Merger::new(base, &setting.parameters)?;
    let mut on_the_way: VecDeque<(u64, usize)> = VecDeque::new();
    let mut losses = Mean::default();
    for step in 0..setting.steps {
        for (number, learner) in learners.iter_mut().enumerate() {
            losses.add(train(setting, learner, step, order.of(step, number))?);
        }
        tell(setting, name, step, &mut losses);

        while let Some((_, fragment)) = on_the_way.pop_front_if(|(due, _)| *due <= step) {
            for learner in &mut learners {
                learner.apply(fragment, &merger.keyframes[fragment])?;
            }
        }
        let fragment = usize::from(schedule::fragment_of(step, setting.parameters.fragments));
        let payloads = learners.iter_mut().map(|learner| merger.answer(fragment, learner)).collect::<Result<Vec<_>, _>>()?;
        merger.merge(fragment, &payloads)?;
        on_the_way.push_back((step + u64::from(setting.parameters.overlap), fragment));
    }
    // The closing round: what is on the way arrives, then every fragment is merged once more without a step in between.
    for (_, fragment) in on_the_way {
        for learner in &mut learners {
            learner.apply(fragment, &merger.keyframes[fragment])?;
        }
    }
    merger.close();
    for fragment in 0..base.plan.fragments.len() {
        let payloads = learners.iter_mut().map(|learner| merger.answer(fragment, learner)).collect::<Result<Vec<_>, _>>()?;
        merger.merge(fragment, &payloads)?;
    }
    Ok(merger.states.into_iter().map(|state| state.theta).collect())
}

fn train(setting: &Setting, trainer: &mut QuasarTrainer, step: u64, rows: impl Iterator<Item = u32>) -> anyhow::Result<f64> {
    let (tokens, row_tokens) = (setting.training.gather(rows), setting.training.row_tokens);
    let batch = Batch { tokens: &tokens, rows: tokens.len() / row_tokens, row_tokens };
    Ok(trainer.step(&batch, &setting.hyper(step), None, false)?.loss)
}

/// What the orchestrator keeps: f32 states, the bf16 keyframes that everybody has, versions.
struct Merger<'a> {
    plan: &'a FragmentPlan,
    digest: Digest,
    /// How each slice is merged.
    slices: Vec<Vec<Slice>>,
    outer: (f32, f32),
    parameters: &'a RunParameters,
    states: Vec<FragmentState>,
    /// As read back from their files.
    keyframes: Model,
    versions: Vec<u64>,
}

impl<'a> Merger<'a> {
    fn new(base: &'a Base, parameters: &'a RunParameters) -> anyhow::Result<Self> {
        let (plan, digest) = (&base.plan, base.plan.digest());
        let ppm = |value: u32| (f64::from(value) / PPM as f64) as f32;
        let outer = (ppm(parameters.outer_lr_ppm), ppm(parameters.outer_momentum_ppm));
        let slices = plan.fragments.clone();
        let mut merger = Self { plan, digest, slices, outer, parameters, states: Vec::new(), keyframes: Vec::new(), versions: Vec::new() };
        for fragment in 0..plan.fragments.len() {
            merger.states.push(FragmentState::new(base.tree.read_fragment(plan, fragment)?));
            merger.versions.push(0);
            let keyframe = merger.keyframe(fragment)?;
            merger.keyframes.push(keyframe);
        }
        Ok(merger)
    }

    /// From here on merges give the average of the learners' weights.
    fn close(&mut self) {
        self.slices = self.plan.fragments.iter().map(|slices| averaged(slices)).collect();
        self.outer = (1.0, 0.0);
    }

    /// The state of a fragment through its published file.
    fn keyframe(&self, fragment: usize) -> anyhow::Result<Vec<f32>> {
        let id = KeyframeId { plan: self.digest, fragment: fragment as u32, version: self.versions[fragment] };
        let bytes = keyframe::write(self.plan, &id, &self.states[fragment].theta)?;
        Ok(keyframe::read(self.plan, &id, &bytes)?)
    }

    fn header(&self, fragment: usize) -> PayloadHeader {
        PayloadHeader::bf16(self.plan, self.digest, fragment, self.versions[fragment])
    }

    /// A learner's payload: base minus what it has now. Its base is the newest version, which it applied long ago.
    fn answer(&self, fragment: usize, learner: &mut QuasarTrainer) -> anyhow::Result<Vec<u8>> {
        let mut change = learner.contribute(fragment)?.values()?.to_vec();
        for (value, base) in change.iter_mut().zip(&self.keyframes[fragment]) {
            *value = base - *value;
        }
        Ok(codec::encode(&self.header(fragment), &change)?)
    }

    fn merge(&mut self, fragment: usize, payloads: &[Vec<u8>]) -> anyhow::Result<()> {
        let header = self.header(fragment);
        let decoded = payloads.iter().map(|bytes| codec::decode(bytes, &header)).collect::<Result<Vec<_>, _>>()?;
        // All have trained the same number of steps since they applied the base, on full batches.
        let tokens = u64::from(self.parameters.batch_rows) * u64::from(self.parameters.sequence_length);
        let weights = schedule::merge_weights(&vec![Work { tokens, versions_behind: 0 }; payloads.len()]);
        let inputs: Vec<Input> = decoded.iter().zip(weights).map(|(values, weight)| Input { values, weight }).collect();
        let merged = robust_merge(&self.slices[fragment], &inputs).map_err(|error| anyhow!("fragment {fragment}: {error}"))?;
        let ((lr, mu), state) = (self.outer, &mut self.states[fragment]);
        outer::step(&mut state.theta, &mut state.momentum, &merged.delta, lr, mu);
        self.versions[fragment] += 1;
        self.keyframes[fragment] = self.keyframe(fragment)?;
        Ok(())
    }
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
