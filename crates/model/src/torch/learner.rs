//! What a trainer needs of the thing that holds weights on a device.

use std::ops::Range;

use super::layout::Layout;
use crate::host::OrdinaryMemory;
use crate::memory::Strategy;
use crate::state::{RUN_MAX, Run};
use crate::{Batch, HostMemory, HostValues, Hyper, QuasarConfig, Routes, TrainError, exported};

/// A step that was taken.
pub(crate) struct Taken {
    pub loss: f64,
    pub grad_norm: f64,
    pub routes: Option<Routes>,
}

/// Weights and moments in the order of a [`Layout`], on one device.
pub(crate) trait Learner: Send {
    fn config(&self) -> &QuasarConfig;

    fn layout(&self) -> &Layout;

    /// How memory is saved, as of the last batch; `None` before, and where there is no choice.
    fn strategy(&self) -> Option<Strategy> {
        None
    }

    /// Optimizer step number `step` on a checked batch; on an error nothing has changed.
    fn take_step(&mut self, batch: &Batch, hyper: &Hyper, forced: Option<&Routes>, record: bool, step: u64) -> Result<Taken, TrainError>;

    /// Loss and gradient of the trained part, in the layout's order.
    fn loss_and_gradient(&mut self, batch: &Batch, forced: Option<&Routes>) -> Result<(f64, Vec<f32>), TrainError>;

    /// The input of each layer and the output of the final norm, `[tokens * hidden_size]` each.
    fn hidden(&mut self, batch: &Batch, forced: Option<&Routes>) -> Result<Vec<Vec<f32>>, TrainError>;

    /// Master weights of ranges, one after the other.
    fn read(&self, ranges: &[Range<usize>]) -> Result<Vec<f32>, TrainError>;

    /// The same, where they can be had without a copy.
    fn hold(&self, ranges: &[Range<usize>]) -> Result<HostValues, TrainError> {
        Ok(self.read(ranges)?.into())
    }

    /// Overwrites master weights.
    fn write(&mut self, range: &Range<usize>, values: &[f32]) -> Result<(), TrainError>;

    /// Master weights of ranges, one after the other, as they are now. They may be on their way still when this returns.
    fn contribute(&mut self, ranges: &[Range<usize>]) -> Result<HostValues, TrainError> {
        Ok(self.read(ranges)?.into())
    }

    /// Overwrites master weights of ranges with `version`, plus what they changed since they were exported, if they were.
    fn carry(&mut self, ranges: &[Range<usize>], version: &HostValues, exported: Option<&HostValues>) -> Result<(), TrainError> {
        let (version, exported) = (version.values()?, exported.map(HostValues::values).transpose()?);
        let mut at = 0;
        for range in ranges {
            let part = at..at + range.len();
            match exported {
                None => self.write(range, &version[part.clone()])?,
                Some(exported) => {
                    let mut now = self.read(std::slice::from_ref(range))?;
                    exported::carry(&mut now, &version[part.clone()], &exported[part.clone()]);
                    self.write(range, &now)?;
                }
            }
            at = part.end;
        }
        Ok(())
    }

    /// Memory from which [`Learner::carry`] takes values without a copy.
    fn host_memory(&self) -> Box<dyn HostMemory> {
        Box::new(OrdinaryMemory)
    }

    /// First and second moments of the whole layout, zero for frozen parameters.
    fn moments(&self) -> Result<(Vec<f32>, Vec<f32>), TrainError>;

    /// Moments of ranges, one after the other, as they are kept.
    fn moments_of(&self, ranges: &[Range<usize>]) -> Result<Vec<Run>, TrainError>;

    /// Overwrites moments of a range if they are kept as `run` has them; says whether.
    fn put_moments(&mut self, range: &Range<usize>, run: &Run) -> Result<bool, TrainError>;

    /// Overwrites the moments.
    fn set_moments(&mut self, first: &[f32], second: &[f32]) -> Result<(), TrainError>;
}

/// Ranges in pieces of at most [`RUN_MAX`] elements.
pub(crate) fn cut<'a>(ranges: impl IntoIterator<Item = &'a Range<usize>>) -> Vec<Range<usize>> {
    let cut = |range: &Range<usize>| {
        let end = range.end;
        range.clone().step_by(RUN_MAX).map(move |start| start..end.min(start + RUN_MAX))
    };
    ranges.into_iter().flat_map(cut).collect()
}

/// Pieces that are read at a time: as many as together are no more than [`RUN_MAX`].
pub(crate) fn groups(pieces: &[Range<usize>]) -> Vec<&[Range<usize>]> {
    let (mut groups, mut first, mut elements) = (Vec::new(), 0, 0);
    for (at, piece) in pieces.iter().enumerate() {
        if elements + piece.len() > RUN_MAX && at > first {
            groups.push(&pieces[first..at]);
            (first, elements) = (at, 0);
        }
        elements += piece.len();
    }
    groups.push(&pieces[first..]);
    groups
}
