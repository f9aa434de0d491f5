//! A toy learner in plain Rust for simulations: it predicts the next token from the current one, by a table of logits.
//!
//! It is small and has no tensor library behind it, yet it is a real model: its loss on real token rows falls, steps
//! are bit-identical everywhere, and its parameters come in fragments as those of the large model do. Tokens are taken
//! modulo [`CLASSES`].

use std::slice;

use fragments::{Contract, TensorSpec};
use protocol::{DType, FragmentPlan, MergeRule, Slice};

use crate::adamw::{self, Buffers};
use crate::exported::Exported;
use crate::ranges::Place;
use crate::{Batch, Evaluator, HostValues, Hyper, PlanRanges, Routes, StepReport, TrainError, Trainer, TrainerState};

/// Token classes of the toy model.
pub const CLASSES: usize = 32;

const BIAS: &str = "toy.bias";
const TABLE: &str = "toy.table";
const ELEMENTS: usize = CLASSES + CLASSES * CLASSES;

/// The toy model's parameters as a contract: a bias per class and a table `[CLASSES, CLASSES]`.
pub fn toy_contract() -> Contract {
    let tensor = |name: &str, shape: &[usize]| {
        let shape = shape.iter().map(|n| *n as u64).collect();
        TensorSpec { name: name.to_owned(), shape, dtype: DType::F32 }
    };
    Contract { tensors: vec![tensor(BIAS, &[CLASSES]), tensor(TABLE, &[CLASSES, CLASSES])] }
}

/// A plan for the toy model with 1 to [`CLASSES`] fragments of nearly equal size: each has some rows of the table, the
/// first the bias as well.
pub fn toy_plan(fragments: usize) -> FragmentPlan {
    let fragments = fragments.clamp(1, CLASSES);
    let slice = |tensor: &str, rows: std::ops::Range<usize>, row_elements: usize, rule| Slice {
        tensor: tensor.to_owned(),
        row_start: rows.start as u64,
        row_end: rows.end as u64,
        row_elements: row_elements as u64,
        unit_rows: rows.len() as u64,
        dtype: DType::F32,
        rule,
    };
    let cut = |n: usize| n * CLASSES / fragments;
    let parts = (0..fragments).map(|n| {
        let bias = (n == 0).then(|| slice(BIAS, 0..CLASSES, 1, MergeRule::Mean));
        bias.into_iter().chain([slice(TABLE, cut(n)..cut(n + 1), CLASSES, MergeRule::Rda)]).collect()
    });
    FragmentPlan { fragments: parts.collect() }
}

fn place(name: &str) -> Option<Place> {
    let classes = CLASSES as u64;
    match name {
        BIAS => Some(Place { offset: 0, rows: classes, row_elements: 1 }),
        TABLE => Some(Place { offset: CLASSES, rows: classes, row_elements: classes }),
        _ => None,
    }
}

/// The toy model as [`Trainer`] and [`Evaluator`].
#[derive(Clone, Debug)]
pub struct ToyTrainer {
    plan: FragmentPlan,
    ranges: PlanRanges,
    step: u64,
    weights: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    exported: Exported,
}

impl ToyTrainer {
    /// Initial weights that depend on `seed` alone. The plan is [`toy_plan`] or another one over [`toy_contract`].
    pub fn new(plan: FragmentPlan, seed: u64) -> Result<Self, TrainError> {
        let ranges = PlanRanges::new(&plan, ELEMENTS, place)?;
        let weights = crate::init::uniform(seed, "toy", ELEMENTS, 0.1);
        let (first, second) = (vec![0.0; ELEMENTS], vec![0.0; ELEMENTS]);
        Ok(Self { plan, ranges, step: 0, weights, first, second, exported: Exported::default() })
    }

    /// Mean loss of a row, in nats; adds its gradient times `scale` to `gradient`.
    fn row(&self, row: &[u32], scale: f64, gradient: Option<&mut [f32]>) -> f64 {
        let (bias, table) = self.weights.split_at(CLASSES);
        let mut gradient = gradient;
        let mut sum = 0.0;
        for pair in row.windows(2) {
            let (from, to) = (pair[0] as usize % CLASSES, pair[1] as usize % CLASSES);
            let logits: Vec<f64> = (0..CLASSES).map(|n| f64::from(bias[n] + table[from * CLASSES + n])).collect();
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = logits.iter().map(|logit| libm::exp(logit - top)).sum();
            sum += libm::log(total) + top - logits[to];
            let Some(gradient) = gradient.as_deref_mut() else { continue };
            for (n, logit) in logits.iter().enumerate() {
                let slope = libm::exp(logit - top) / total - f64::from(u8::from(n == to));
                gradient[n] += (slope * scale) as f32;
                gradient[CLASSES + from * CLASSES + n] += (slope * scale) as f32;
            }
        }
        sum / (row.len() - 1) as f64
    }
}

impl Trainer for ToyTrainer {
    fn plan(&self) -> &FragmentPlan {
        &self.plan
    }

    fn step(&mut self, batch: &Batch, hyper: &Hyper, _: Option<&Routes>, record: bool) -> Result<StepReport, TrainError> {
        batch.check(usize::MAX)?;
        hyper.check()?;
        let mut gradient = vec![0.0; ELEMENTS];
        let scale = 1.0 / (batch.rows * (batch.row_tokens - 1)) as f64;
        let losses: f64 = (0..batch.rows).map(|row| self.row(batch.row(row), scale, Some(&mut gradient))).sum();
        let (loss, grad_norm, step) = (losses / batch.rows as f64, adamw::norm(&gradient), self.step + 1);
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(TrainError::NotFinite { what: "the loss", step });
        }
        let buffers = Buffers { weights: &mut self.weights, first: &mut self.first, second: &mut self.second, gradient: &gradient };
        adamw::update(buffers, slice::from_ref(&(CLASSES..ELEMENTS)), hyper, adamw::clip_scale(hyper, grad_norm), step, 1);
        self.step = step;
        let routes = record.then(Routes::default);
        Ok(StepReport { loss, grad_norm, tokens: batch.tokens.len() as u64, routes })
    }

    fn export(&self, fragment: usize) -> Result<Vec<f32>, TrainError> {
        self.ranges.export(fragment, &self.weights)
    }

    fn contribute(&mut self, fragment: usize) -> Result<HostValues, TrainError> {
        let values = HostValues::from(self.export(fragment)?);
        self.exported.put(fragment, values.clone());
        Ok(values)
    }

    fn apply(&mut self, fragment: usize, values: &[f32]) -> Result<(), TrainError> {
        self.ranges.check(fragment, values)?;
        let values = self.exported.carried(fragment, values, || self.export(fragment))?;
        self.ranges.import(fragment, &values, &mut self.weights)?;
        self.exported.forget(fragment);
        Ok(())
    }

    fn steps(&self) -> u64 {
        self.step
    }

    fn state(&self) -> Result<TrainerState, TrainError> {
        let [weights, first, second] = [&self.weights, &self.first, &self.second].map(|buffer| self.ranges.to_plan_order(buffer));
        Ok(TrainerState { step: self.step, weights, first, second, exported: self.exported.to_state()? })
    }

    fn restore(&mut self, state: &TrainerState) -> Result<(), TrainError> {
        state.check(ELEMENTS)?;
        self.ranges.check_exported(state)?;
        let [weights, first, second] = [&state.weights, &state.first, &state.second].map(|values| self.ranges.from_plan_order(values));
        let exported = Exported::from_state(&state.exported);
        *self = Self { step: state.step, weights, first, second, exported, plan: self.plan.clone(), ranges: self.ranges.clone() };
        Ok(())
    }
}

impl Evaluator for ToyTrainer {
    fn apply(&mut self, fragment: usize, values: &[f32]) -> Result<(), TrainError> {
        self.ranges.import(fragment, values, &mut self.weights)
    }

    fn losses(&mut self, batch: &Batch) -> Result<Vec<f64>, TrainError> {
        batch.check(usize::MAX)?;
        Ok((0..batch.rows).map(|row| self.row(batch.row(row), 0.0, None)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> Vec<u32> {
        (0..64u32).map(|n| (n * n + 3 * n) % 29).collect()
    }

    #[test]
    fn the_loss_of_the_toy_falls_and_both_traits_agree_on_it() {
        let tokens = tokens();
        let batch = Batch { tokens: &tokens, rows: 4, row_tokens: 16 };
        let mut toy = ToyTrainer::new(toy_plan(5), 1).unwrap();
        let before: f64 = toy.losses(&batch).unwrap().iter().sum::<f64>() / 4.0;
        let first = toy.step(&batch, &Hyper { lr: 0.05, ..Hyper::default() }, None, false).unwrap();
        assert!((before - first.loss).abs() < 1e-12);
        for _ in 0..30 {
            toy.step(&batch, &Hyper { lr: 0.05, ..Hyper::default() }, None, false).unwrap();
        }
        let after: f64 = toy.losses(&batch).unwrap().iter().sum::<f64>() / 4.0;
        assert!(after < before - 1.0, "{before} -> {after}");
    }

    #[test]
    fn a_restored_toy_takes_the_same_steps_and_fragments_move_weights() {
        let tokens = tokens();
        let batch = Batch { tokens: &tokens, rows: 4, row_tokens: 16 };
        let mut one = ToyTrainer::new(toy_plan(3), 1).unwrap();
        one.step(&batch, &Hyper::default(), None, false).unwrap();
        let mut two = ToyTrainer::new(toy_plan(3), 2).unwrap();
        two.restore(&one.state().unwrap()).unwrap();
        one.step(&batch, &Hyper::default(), None, false).unwrap();
        two.step(&batch, &Hyper::default(), None, false).unwrap();
        assert_eq!(one.state().unwrap(), two.state().unwrap());
        let mut three = ToyTrainer::new(toy_plan(3), 9).unwrap();
        for fragment in 0..3 {
            Trainer::apply(&mut three, fragment, &one.export(fragment).unwrap()).unwrap();
        }
        assert_eq!(three.state().unwrap().weights, one.state().unwrap().weights);
    }

    #[test]
    fn what_the_toy_trained_since_it_contributed_is_carried_into_the_next_version() {
        let tokens = tokens();
        let batch = Batch { tokens: &tokens, rows: 4, row_tokens: 16 };
        let mut toy = ToyTrainer::new(toy_plan(3), 1).unwrap();
        let exported = toy.contribute(1).unwrap().values().unwrap().to_vec();
        toy.step(&batch, &Hyper::default(), None, false).unwrap();
        let mut again = ToyTrainer::new(toy_plan(3), 2).unwrap();
        again.restore(&toy.state().unwrap()).unwrap();
        let (trained, version) = (toy.export(1).unwrap(), vec![0.25; exported.len()]);
        let expected: Vec<f32> = trained.iter().zip(&exported).map(|(now, then)| 0.25 + (now - then)).collect();
        for learner in [&mut toy, &mut again] {
            Trainer::apply(learner, 1, &version).unwrap();
            assert_eq!(learner.export(1).unwrap(), expected);
            Trainer::apply(learner, 1, &version).unwrap();
            assert_eq!(learner.export(1).unwrap(), version);
        }
    }

    #[test]
    fn the_general_plan_over_the_toy_contract_fits_too() {
        let plan = fragments::plan(&toy_contract(), 4).unwrap();
        assert_eq!(plan.total_elements(), ELEMENTS as u64);
        ToyTrainer::new(plan, 0).unwrap();
    }
}
