//! The two things a run needs a model for: a learner that trains, and a judge that measures losses.
//!
//! Both exchange parameters with the rest of the system as *fragments*: flat `f32` buffers in the order of the run's
//! [`FragmentPlan`] (fragment, then slice, then element).

use std::io::{Read, Write};
use std::ops::Range;

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

    /// The batch as pieces that are passed through one after the other: groups of `rows` whole rows, or, with the token that begins a document,
    /// every document by itself. A row is cut before each such token, unless one side would have a single token, which predicts nothing.
    pub(crate) fn pieces(&self, rows: usize, document_start: Option<u32>) -> Vec<Piece> {
        let Some(start) = document_start else {
            let group = |from: usize| {
                let rows = rows.min(self.rows - from);
                Piece { range: from * self.row_tokens..(from + rows) * self.row_tokens, row_tokens: self.row_tokens }
            };
            return (0..self.rows).step_by(rows.max(1)).map(group).collect();
        };
        let mut pieces = Vec::new();
        for row in 0..self.rows {
            let (mut from, end) = (row * self.row_tokens, (row + 1) * self.row_tokens);
            for at in from + 1..end {
                if self.tokens[at] == start && at - from >= 2 && end - at >= 2 {
                    pieces.push(Piece { range: from..at, row_tokens: at - from });
                    from = at;
                }
            }
            pieces.push(Piece { range: from..end, row_tokens: end - from });
        }
        pieces
    }

    /// Row `row`.
    pub fn row(&self, row: usize) -> &'a [u32] {
        &self.tokens[row * self.row_tokens..][..self.row_tokens]
    }
}

/// A part of a batch: tokens `range`, in rows of `row_tokens`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub range: Range<usize>,
    pub row_tokens: usize,
}

impl Piece {
    pub fn of<'a>(&self, batch: &Batch<'a>) -> Batch<'a> {
        let tokens = &batch.tokens[self.range.clone()];
        Batch { tokens, rows: tokens.len() / self.row_tokens, row_tokens: self.row_tokens }
    }

    /// Tokens that are predicted.
    pub fn predicted(&self) -> usize {
        self.range.len() / self.row_tokens * (self.row_tokens - 1)
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
    /// The choices for some of the `tokens` tokens of a batch.
    pub(crate) fn part(&self, config: &QuasarConfig, tokens: usize, range: &Range<usize>) -> Self {
        let choices = config.num_experts_per_tok;
        let part = range.start * choices..range.end * choices;
        Self(self.0.chunks((tokens * choices).max(1)).flat_map(|layer| &layer[part.clone()]).copied().collect())
    }

    /// The choices of a batch from those of its pieces in order.
    pub(crate) fn join(config: &QuasarConfig, parts: &[Self]) -> Self {
        let layers = config.moe_passes();
        let of_layer =
            |layer: usize| parts.iter().flat_map(move |part| &part.0[part.0.len() / layers * layer..part.0.len() / layers * (layer + 1)]);
        Self((0..layers).flat_map(of_layer).copied().collect())
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_where_documents_begin() {
        let tokens = [9, 1, 2, 9, 3, 9, 9, 4, 5, 6, 7, 9];
        let batch = Batch { tokens: &tokens, rows: 2, row_tokens: 6 };
        let ranges = |start| batch.pieces(2, start).into_iter().map(|piece| piece.range).collect::<Vec<_>>();
        assert_eq!(ranges(None), vec![Range { start: 0, end: 12 }]);
        assert_eq!(ranges(Some(9)), [0..3, 3..6, 6..12], "a last or single token is no document");
        assert_eq!(batch.pieces(1, None).len(), 2);
        assert_eq!(batch.pieces(2, Some(9)).iter().map(Piece::predicted).sum::<usize>(), 2 + 2 + 5);
    }

    #[test]
    fn routes_of_pieces_join_to_those_of_the_batch() {
        let config = QuasarConfig::from_json(include_str!("../tests/data/small_config.json")).unwrap();
        let count = 7 * config.num_experts_per_tok * config.moe_passes();
        let routes = Routes((0..count).map(|n| (n % config.num_experts) as u16).collect());
        let parts = [0..2, 2..3, 3..7].map(|range| routes.part(&config, 7, &range));
        assert_eq!(Routes::join(&config, &parts), routes);
    }
}
