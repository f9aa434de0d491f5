//! The two things a run needs a model for: a learner that trains, and a judge that measures losses.
//!
//! Both exchange parameters with the rest of the system as *fragments*: flat `f32` buffers in the order of the run's
//! [`FragmentPlan`] (fragment, then slice, then element).

use std::io::{Read, Write};

use protocol::{Digest, FragmentPlan};

use crate::host::OrdinaryMemory;
use crate::{HostMemory, HostValues, QuasarConfig, TrainError, TrainerState};

/// Token rows of equal length, one after the other. Rows are independent sequences that begin at position 0.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// `[rows * row_tokens]`
    pub tokens: &'a [u32],
    pub rows: usize,
    pub row_tokens: usize,
}

impl<'a> Batch<'a> {
    /// Checks that the batch has the shape it claims, that rows have a next token to predict, and that every token is in
    /// the vocabulary.
    pub fn check(&self, vocabulary: usize) -> Result<(), TrainError> {
        if self.rows == 0 || self.row_tokens < 2 || self.rows.checked_mul(self.row_tokens) != Some(self.tokens.len()) {
            let (rows, row_tokens, found) = (self.rows, self.row_tokens, self.tokens.len());
            return Err(TrainError::Batch(format!("{rows} rows of {row_tokens} tokens, but {found} tokens; a row needs at least 2")));
        }
        match self.tokens.iter().find(|token| **token as usize >= vocabulary) {
            Some(token) => Err(TrainError::Token { token: *token, vocabulary }),
            None => Ok(()),
        }
    }

    /// Row `row`.
    pub fn row(&self, row: usize) -> &'a [u32] {
        &self.tokens[row * self.row_tokens..][..self.row_tokens]
    }
}

/// Settings of one optimizer step (AdamW with decoupled weight decay).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Applied to matrices only, never to vectors and scalars (norm weights, gains, biases).
    pub weight_decay: f64,
    /// The gradient is scaled down to this global L2 norm where it is longer; infinity: never.
    pub clip_norm: f64,
}

impl Hyper {
    /// Refuses settings that would make a step meaningless.
    pub fn check(&self) -> Result<(), TrainError> {
        let rate = |value: f64| (0.0..1.0).contains(&value);
        let sound = self.lr.is_finite()
            && self.lr >= 0.0
            && rate(self.beta1)
            && rate(self.beta2)
            && self.eps.is_finite()
            && self.eps > 0.0
            && self.weight_decay.is_finite()
            && self.weight_decay >= 0.0
            && self.clip_norm > 0.0;
        if sound { Ok(()) } else { Err(TrainError::Batch(format!("optimizer settings are out of range: {self:?}"))) }
    }
}

impl Default for Hyper {
    fn default() -> Self {
        Self { lr: 6e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip_norm: 1.0 }
    }
}

/// The experts chosen in one step, `[mixture layer pass, token, k]`, the k choices in the router's order. Forcing them in
/// a replay removes the only discontinuity of the model, so that a replay on another machine stays close.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes(pub Vec<u16>);

impl Routes {
    /// Checks that there is one choice of an expert for each token, mixture layer and place.
    pub fn check(&self, config: &QuasarConfig, tokens: usize) -> Result<(), TrainError> {
        let (per_pass, passes) = (tokens * config.num_experts_per_tok, config.moe_passes());
        if self.0.len() != per_pass * passes {
            let found = self.0.len();
            return Err(TrainError::Routes(format!("{found} choices, expected {per_pass} for each of {passes} mixture layers")));
        }
        match self.0.iter().find(|expert| usize::from(**expert) >= config.num_experts) {
            Some(expert) => Err(TrainError::Routes(format!("there is no expert {expert}"))),
            None => Ok(()),
        }
    }
}

/// What a step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Mean next-token loss over the batch, before the update, in nats.
    pub loss: f64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens read (rows * row_tokens).
    pub tokens: u64,
    /// Present if recording was asked for.
    pub routes: Option<Routes>,
}

/// A learner: weights, optimizer moments and step count on one device.
pub trait Trainer: Send {
    /// The plan by which fragments are cut.
    fn plan(&self) -> &FragmentPlan;

    /// One optimizer step on `batch`. With `forced`, mixture layers use these experts; with `record`, the report carries
    /// the experts used. On an error nothing has changed.
    fn step(&mut self, batch: &Batch, hyper: &Hyper, forced: Option<&Routes>, record: bool) -> Result<StepReport, TrainError>;

    /// The weights of a fragment, in slice order.
    fn export(&self, fragment: usize) -> Result<Vec<f32>, TrainError>;

    /// As [`Trainer::export`], and remembers them as exported until a version is applied. A device may copy them to the host while it takes
    /// the next step.
    fn contribute(&mut self, fragment: usize) -> Result<HostValues, TrainError>;

    /// A new version of a fragment: its weights become `values`, plus what was trained since they were last exported by
    /// [`Trainer::contribute`], if that is after the version before. Optimizer moments stay.
    fn apply(&mut self, fragment: usize, values: &[f32]) -> Result<(), TrainError>;

    /// As [`Trainer::apply`]. Values that [`Trainer::host_memory`] holds are taken from there.
    fn receive(&mut self, fragment: usize, values: &HostValues) -> Result<(), TrainError> {
        self.apply(fragment, values.values()?)
    }

    /// Where versions are brought while a step is under way.
    fn host_memory(&self) -> Box<dyn HostMemory> {
        Box::new(OrdinaryMemory)
    }

    /// Optimizer steps taken.
    fn steps(&self) -> u64;

    /// Everything that the next step depends on, in (fragment, slice) order.
    fn state(&self) -> Result<TrainerState, TrainError>;

    /// Goes back to a state that [`Trainer::state`] gave.
    fn restore(&mut self, state: &TrainerState) -> Result<(), TrainError>;

    /// Writes the state piece by piece, moments as they are kept; gives the digest that ends it.
    fn save(&self, to: &mut dyn Write) -> Result<Digest, TrainError> {
        Ok(self.state()?.write(to)?)
    }

    /// Goes back to what [`Trainer::save`] wrote and [`crate::check_state`] found whole, except that nothing counts as exported. After an
    /// error the trainer's state is undefined.
    fn load(&mut self, from: &mut dyn Read) -> Result<(), TrainError> {
        let mut state = TrainerState::read(from, self.plan().total_elements() as usize)?;
        state.exported.clear();
        self.restore(&state)
    }
}

/// A judge: weights without an optimizer.
pub trait Evaluator: Send {
    /// Overwrites the weights of a fragment.
    fn apply(&mut self, fragment: usize, values: &[f32]) -> Result<(), TrainError>;

    /// Mean next-token loss of each row, in nats.
    fn losses(&mut self, batch: &Batch) -> Result<Vec<f64>, TrainError>;
}
