//! Learners, and the orchestrator's arithmetic in between.
//!
//! At each step boundary a learner applies what has arrived, then answers the pull, then trains, as the daemons do. With
//! equal learners and no network the schedule is exact: step t is followed by the pull of fragment t mod P from all of
//! them, and the merged version arrives τ steps later. After the last step what is on the way arrives, and in the closing round
//! every fragment is merged once more without a step in between.

use std::collections::VecDeque;

use fragments::codec::{self, PayloadHeader};
use fragments::feedback::ErrorFeedback;
use model::{QuasarTrainer, Trainer};
use protocol::documents::{Codec, PPM, RunParameters};
use protocol::{Reason, schedule};

use super::attack::Attack;
use super::server::{Rule, Server};
use super::setting::{Base, Model, Order, Setting};

/// How learners and orchestrator work together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scheme {
    pub learners: usize,
    pub up: Codec,
    /// Codec of the closing round.
    pub closing: Codec,
    /// Decay of the learners' error feedback; without it what the codec leaves out is lost.
    pub feedback: Option<f32>,
    /// Bf16: a keyframe for each version; int4: a chain of frames.
    pub down: Codec,
    pub outer_lr: f32,
    pub momentum: f32,
    pub apply: Apply,
    pub rule: Rule,
    /// The last so many learners attack.
    pub attack: Option<(Attack, usize)>,
}

/// What a learner makes of a new version and its own values, which it has trained further since it exported them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Apply {
    /// The new version.
    Overwrite,
    /// The new version, and the steps since the export on top.
    Keep,
    /// This part of its own values, the rest of the new version.
    Mix(f32),
}

impl Scheme {
    /// What the daemons do in a run with these parameters.
    pub fn of(parameters: &RunParameters, learners: usize) -> Self {
        let ppm = |value: u32| (f64::from(value) / PPM as f64) as f32;
        Self {
            learners,
            up: parameters.codec_up,
            closing: parameters.codec_up,
            feedback: (parameters.codec_up == Codec::TopK).then_some(fragments::feedback::BETA),
            down: parameters.codec_down,
            outer_lr: ppm(parameters.outer_lr_ppm),
            momentum: ppm(parameters.outer_momentum_ppm),
            apply: Apply::Keep,
            rule: Rule::Robust,
            attack: None,
        }
    }
}

/// What is seen of one merge.
pub struct Seen<'a> {
    pub step: u64,
    pub fragment: usize,
    /// Contributions as they were merged, those of attackers last.
    pub contributions: &'a [Vec<f32>],
    pub outcomes: &'a [Reason],
}

/// Trains all learners to the end of the run and gives what its release would hold. `seen` is shown each merge, `told` the mean
/// training loss of each step.
pub fn train(
    setting: &Setting,
    base: &Base,
    order: &Order,
    scheme: Scheme,
    mut seen: impl FnMut(&Seen),
    mut told: impl FnMut(u64, f64),
) -> anyhow::Result<Model> {
    let count = base.plan.fragments.len();
    let mut learners = (0..scheme.learners).map(|_| Learner::open(setting, base, &scheme)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut server = Server::new(base, scheme)?;
    let mut on_the_way: VecDeque<(u64, usize)> = VecDeque::new();
    for step in 0..setting.steps {
        let mut losses = 0.0;
        for (number, learner) in learners.iter_mut().enumerate() {
            losses += setting.train(&mut learner.trainer, step, order.of(step, number))?;
        }
        told(step, losses / scheme.learners as f64);
        while let Some((_, fragment)) = on_the_way.pop_front_if(|(due, _)| *due <= step) {
            arrive(&mut learners, &server, fragment)?;
        }
        let fragment = usize::from(schedule::fragment_of(step, count as u16));
        round(&mut learners, &mut server, step, fragment, &mut seen)?;
        on_the_way.push_back((step + u64::from(setting.parameters.overlap), fragment));
    }
    for (_, fragment) in on_the_way {
        arrive(&mut learners, &server, fragment)?;
    }
    server.close();
    for fragment in 0..count {
        round(&mut learners, &mut server, setting.steps, fragment, &mut seen)?;
    }
    Ok(server.into_model())
}

fn arrive(learners: &mut [Learner], server: &Server, fragment: usize) -> anyhow::Result<()> {
    learners.iter_mut().try_for_each(|learner| learner.apply(fragment, server.replica(fragment)))
}

/// One merge of a fragment, from all learners.
fn round(learners: &mut [Learner], server: &mut Server, step: u64, fragment: usize, seen: &mut impl FnMut(&Seen)) -> anyhow::Result<()> {
    let header = server.header(fragment);
    let answers = learners.iter_mut().map(|learner| learner.answer(&header, fragment, server.replica(fragment)));
    let payloads = answers.collect::<anyhow::Result<Vec<_>>>()?;
    let (contributions, outcomes) = server.merge(fragment, &payloads, step)?;
    for ((learner, payload), outcome) in learners.iter_mut().zip(&payloads).zip(&outcomes) {
        if *outcome != Reason::None {
            learner.give_back(&header, fragment, payload)?;
        }
    }
    seen(&Seen { step, fragment, contributions: &contributions, outcomes: &outcomes });
    Ok(())
}

struct Learner {
    trainer: QuasarTrainer,
    apply: Apply,
    /// Error feedback of each fragment, where the scheme has it.
    feedback: Vec<ErrorFeedback>,
}

impl Learner {
    fn open(setting: &Setting, base: &Base, scheme: &Scheme) -> anyhow::Result<Self> {
        let trainer = setting.trainer(base)?;
        let count = base.plan.fragments.len();
        let feedback = |beta: f32| (0..count).map(|fragment| ErrorFeedback::new(base.plan.elements(fragment) as usize, beta)).collect();
        let feedback = scheme.feedback.map(feedback).unwrap_or_default();
        Ok(Self { trainer, apply: scheme.apply, feedback })
    }

    /// The payload: base minus what it has now. Its base is the newest version, which it applied long ago.
    fn answer(&mut self, header: &PayloadHeader, fragment: usize, base: &[f32]) -> anyhow::Result<Vec<u8>> {
        // The trainer itself keeps the steps since a contribution.
        let own = match self.apply {
            Apply::Keep => self.trainer.contribute(fragment)?.values()?.to_vec(),
            Apply::Overwrite | Apply::Mix(_) => self.trainer.export(fragment)?,
        };
        let delta: Vec<f32> = base.iter().zip(&own).map(|(base, own)| base - own).collect();
        Ok(match self.feedback.get_mut(fragment) {
            Some(feedback) => feedback.encode(header, &delta)?,
            None => codec::encode(header, &delta)?,
        })
    }

    fn give_back(&mut self, header: &PayloadHeader, fragment: usize, payload: &[u8]) -> anyhow::Result<()> {
        if let Some(feedback) = self.feedback.get_mut(fragment) {
            feedback.give_back(header, payload)?;
        }
        Ok(())
    }

    fn apply(&mut self, fragment: usize, new: &[f32]) -> anyhow::Result<()> {
        let Apply::Mix(part) = self.apply else { return Ok(self.trainer.apply(fragment, new)?) };
        let own = self.trainer.export(fragment)?;
        let values: Vec<f32> = new.iter().zip(&own).map(|(new, own)| part * own + (1.0 - part) * new).collect();
        Ok(self.trainer.apply(fragment, &values)?)
    }
}
