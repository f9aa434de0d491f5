//! The runs that are compared by the loss that they end with.

use model::Trainer;
use protocol::Reason;
use protocol::documents::{Codec, RunParameters};
use quasar_tests::training::attack::Attack;
use quasar_tests::training::server::Rule;
use quasar_tests::training::setting::Setting;
use quasar_tests::training::swarm::{self, Apply, Scheme, Seen};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    Codecs,
    Outer,
    Apply,
    Attacks,
}

/// A kind of run.
pub struct Arm {
    pub group: Group,
    pub name: String,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Merging(Scheme),
    /// The rows of so many learners in one batch, every step.
    Plain(usize),
}

/// What a run ends with.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Nats gained on held-out text; `None` if it diverged.
    pub gain: Option<f64>,
    /// Parts of the contributions of honest learners, and of attackers, that the filters left out.
    pub refused_honest: f64,
    pub refused_attackers: f64,
}

impl Outcome {
    pub fn text(&self) -> String {
        let Some(gain) = self.gain else { return "diverged".to_owned() };
        format!("{gain:.3}")
    }
}

/// The runs of some groups. In each group the first is what the daemons do by default.
pub fn all(parameters: &RunParameters, learners: usize, groups: &[Group]) -> Vec<Arm> {
    let dense = Scheme { up: Codec::Bf16, closing: Codec::Bf16, down: Codec::Bf16, feedback: None, ..Scheme::of(parameters, learners) };
    let mut arms = Vec::new();
    let mut add = |group: Group, name: &str, kind: Kind| arms.push(Arm { group, name: name.to_owned(), kind });
    let beta = Some(fragments::feedback::BETA);
    let top_k = Scheme { up: Codec::TopK, feedback: beta, ..dense };

    let mut merging = |group: Group, name: &str, scheme: Scheme| add(group, name, Kind::Merging(scheme));
    merging(Group::Codecs, "bf16 up, bf16 down", dense);
    merging(Group::Codecs, "int4 up, bf16 down", Scheme { up: Codec::Int4, closing: Codec::Int4, ..dense });
    merging(Group::Codecs, "top-k up with error feedback, bf16 down", Scheme { closing: Codec::TopK, ..top_k });
    merging(Group::Codecs, "the same, closing round in bf16", top_k);
    merging(Group::Codecs, "top-k up without error feedback, closing round in bf16", Scheme { feedback: None, ..top_k });
    merging(Group::Codecs, "bf16 up, int4 down", Scheme { down: Codec::Int4, ..dense });
    merging(Group::Codecs, "int4 up, int4 down", Scheme { up: Codec::Int4, closing: Codec::Int4, down: Codec::Int4, ..dense });
    merging(Group::Codecs, "top-k up with error feedback, int4 down, closing round in bf16", Scheme { down: Codec::Int4, ..top_k });

    for (outer_lr, momentum) in [(1.0, 0.0), (0.7, 0.0), (0.7, 0.5), (0.7, 0.9), (0.4, 0.9)] {
        merging(Group::Outer, &format!("learning rate {outer_lr}, momentum {momentum}"), Scheme { outer_lr, momentum, ..dense });
    }

    let applies = [
        ("keep the steps since the export", Apply::Keep),
        ("overwrite (alpha 0)", Apply::Overwrite),
        ("mix, alpha 0.25", Apply::Mix(0.25)),
        ("mix, alpha 0.5", Apply::Mix(0.5)),
    ];
    for (name, apply) in applies {
        merging(Group::Apply, name, Scheme { apply, ..dense });
    }

    for rule in [Rule::Robust, Rule::MedianRadius, Rule::MeanRadius, Rule::Mean] {
        merging(Group::Attacks, &format!("nobody; {}", rule.name()), Scheme { rule, ..dense });
    }
    for attack in Attack::ALL {
        for (attackers, rule) in [(learners / 8, Rule::Robust), (learners / 4, Rule::Robust), (learners / 4, Rule::Mean)] {
            let scheme = Scheme { rule, attack: Some((attack, attackers)), ..dense };
            merging(Group::Attacks, &format!("{attackers} of {learners}: {}; {}", attack.name(), rule.name()), scheme);
        }
    }
    add(Group::Codecs, "for comparison: data-parallel, one batch of all rows at every step", Kind::Plain(learners));
    add(Group::Codecs, "for comparison: one learner alone", Kind::Plain(1));
    arms.retain(|arm| groups.contains(&arm.group));
    arms
}

/// The number of the first arm that is the same run.
pub fn first(arms: &[Arm], arm: usize) -> usize {
    arms.iter().position(|other| other.kind == arms[arm].kind).unwrap_or(arm)
}

impl Arm {
    pub fn train(&self, setting: &Setting, seed: u64) -> anyhow::Result<Outcome> {
        match self.kind {
            Kind::Plain(learners) => plain(setting, seed, learners),
            Kind::Merging(scheme) => merging(setting, seed, scheme, &self.name),
        }
    }
}

fn merging(setting: &Setting, seed: u64, scheme: Scheme, name: &str) -> anyhow::Result<Outcome> {
    let (base, order) = (setting.base(seed)?, setting.order(seed, scheme.learners));
    let honest = scheme.learners - scheme.attack.map_or(0, |(_, attackers)| attackers);
    let (mut merges, mut refused_honest, mut refused_attackers) = (0, 0, 0);
    let refused = |outcomes: &[Reason]| outcomes.iter().filter(|outcome| **outcome != Reason::None).count();
    let seen = |seen: &Seen| {
        merges += 1;
        refused_honest += refused(&seen.outcomes[..honest]);
        refused_attackers += refused(&seen.outcomes[honest..]);
    };
    let model = swarm::train(setting, &base, &order, scheme, seen, |_, _| ());
    let gain = match model {
        Ok(model) => Some(setting.held_out_loss(&base, None)? - setting.held_out_loss(&base, Some(&model))?),
        Err(error) => {
            eprintln!("{name}: it ends here: {error:#}");
            None
        }
    };
    let part = |refused: usize, learners: usize| refused as f64 / (merges * learners).max(1) as f64;
    Ok(Outcome {
        gain: gain.filter(|gain| gain.is_finite()),
        refused_honest: part(refused_honest, honest),
        refused_attackers: part(refused_attackers, scheme.learners - honest),
    })
}

fn plain(setting: &Setting, seed: u64, learners: usize) -> anyhow::Result<Outcome> {
    let (base, order) = (setting.base(seed)?, setting.order(seed, learners));
    let mut trainer = setting.trainer(&base)?;
    for step in 0..setting.steps {
        setting.train(&mut trainer, step, (0..learners).flat_map(|learner| order.of(step, learner)))?;
    }
    let model = (0..base.plan.fragments.len()).map(|fragment| trainer.export(fragment)).collect::<Result<_, _>>()?;
    let gain = setting.held_out_loss(&base, None)? - setting.held_out_loss(&base, Some(&model))?;
    Ok(Outcome { gain: Some(gain).filter(|gain| gain.is_finite()), refused_honest: 0.0, refused_attackers: 0.0 })
}
