//! Where the slices of a fragment plan lie in one flat buffer of all parameters.
//!
//! A slice is a range of rows of one tensor, and a tensor is contiguous in the buffer, so a slice is one range of it:
//! moving a fragment in or out is a handful of copies.

use std::ops::Range;

use protocol::{FragmentPlan, Slice};

use crate::{TrainError, TrainerState};

/// Where a tensor lies in the flat buffer.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub offset: usize,
    pub rows: u64,
    pub row_elements: u64,
}

/// Element ranges of every fragment, in slice order.
#[derive(Clone, Debug)]
pub struct PlanRanges {
    fragments: Vec<Vec<Range<usize>>>,
    elements: usize,
}

impl PlanRanges {
    /// Maps `plan` onto a buffer of `elements` elements. Every element must be covered exactly once.
    pub fn new(plan: &FragmentPlan, elements: usize, place: impl Fn(&str) -> Option<Place>) -> Result<Self, TrainError> {
        let locate = |slice: &Slice| -> Result<Range<usize>, TrainError> {
            let name = &slice.tensor;
            let place = place(name).ok_or_else(|| TrainError::Plan(format!("the model has no tensor {name}")))?;
            if slice.row_start >= slice.row_end || slice.row_end > place.rows || slice.row_elements != place.row_elements {
                return Err(TrainError::Plan(format!(
                    "rows {}..{} of {} elements of {name}, which has {} rows of {}",
                    slice.row_start, slice.row_end, slice.row_elements, place.rows, place.row_elements
                )));
            }
            let start = place.offset + (slice.row_start * place.row_elements) as usize;
            Ok(start..start + slice.elements() as usize)
        };
        let fragments: Vec<Vec<Range<usize>>> =
            plan.fragments.iter().map(|slices| slices.iter().map(locate).collect()).collect::<Result<_, _>>()?;
        let mut sorted: Vec<&Range<usize>> = fragments.iter().flatten().collect();
        sorted.sort_by_key(|range| range.start);
        let end = sorted.iter().try_fold(0, |end, range| (range.start == end).then_some(range.end));
        if end != Some(elements) {
            return Err(TrainError::Plan("it does not cover every parameter exactly once".into()));
        }
        Ok(Self { fragments, elements })
    }

    pub fn fragments(&self) -> usize {
        self.fragments.len()
    }

    /// Elements of all fragments.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Ranges of one fragment in the flat buffer.
    pub fn of(&self, fragment: usize) -> Result<&[Range<usize>], TrainError> {
        let fragments = self.fragments.len();
        self.fragments.get(fragment).map(Vec::as_slice).ok_or(TrainError::NoFragment { fragment, fragments })
    }

    /// The ranges of `fragment`, after checking that `values` can be written to them: right length, all finite.
    pub fn check(&self, fragment: usize, values: &[f32]) -> Result<&[Range<usize>], TrainError> {
        let ranges = self.of(fragment)?;
        let expected: usize = ranges.iter().map(Range::len).sum();
        if values.len() != expected {
            return Err(TrainError::FragmentLength { fragment, expected: expected as u64, found: values.len() });
        }
        if !values.iter().all(|value| value.is_finite()) {
            return Err(TrainError::FragmentNotFinite { fragment });
        }
        Ok(ranges)
    }

    /// Checks that the exported fragments of a state are fragments of the plan.
    pub fn check_exported(&self, state: &TrainerState) -> Result<(), TrainError> {
        state.exported.iter().try_for_each(|(fragment, values)| self.check(usize::from(*fragment), values).map(drop))
    }

    /// Copies one fragment out of the flat buffer.
    pub fn export(&self, fragment: usize, buffer: &[f32]) -> Result<Vec<f32>, TrainError> {
        let ranges = self.of(fragment)?;
        let mut values = Vec::with_capacity(ranges.iter().map(Range::len).sum());
        ranges.iter().for_each(|range| values.extend_from_slice(&buffer[range.clone()]));
        Ok(values)
    }

    /// Copies checked values of one fragment into the flat buffer.
    pub fn import(&self, fragment: usize, values: &[f32], buffer: &mut [f32]) -> Result<(), TrainError> {
        let mut rest = values;
        for range in self.check(fragment, values)? {
            let (head, tail) = rest.split_at(range.len());
            buffer[range.clone()].copy_from_slice(head);
            rest = tail;
        }
        Ok(())
    }

    /// The whole buffer in (fragment, slice) order.
    pub fn to_plan_order(&self, buffer: &[f32]) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.elements);
        self.fragments.iter().flatten().for_each(|range| values.extend_from_slice(&buffer[range.clone()]));
        values
    }

    /// The inverse of [`PlanRanges::to_plan_order`]; `values` has [`PlanRanges::elements`] elements.
    pub fn from_plan_order(&self, values: &[f32]) -> Vec<f32> {
        let mut buffer = vec![0.0; self.elements];
        let mut rest = values;
        for range in self.fragments.iter().flatten() {
            let (head, tail) = rest.split_at(range.len());
            buffer[range.clone()].copy_from_slice(head);
            rest = tail;
        }
        buffer
    }
}

#[cfg(test)]
mod tests {
    use protocol::{DType, MergeRule};

    use super::*;

    fn slice(tensor: &str, row_start: u64, row_end: u64, row_elements: u64) -> Slice {
        let (unit_rows, dtype, rule) = (row_end - row_start, DType::F32, MergeRule::Mean);
        Slice { tensor: tensor.into(), row_start, row_end, row_elements, unit_rows, dtype, rule }
    }

    fn place(name: &str) -> Option<Place> {
        match name {
            "a" => Some(Place { offset: 0, rows: 4, row_elements: 2 }),
            "b" => Some(Place { offset: 8, rows: 3, row_elements: 1 }),
            _ => None,
        }
    }

    #[test]
    fn fragments_go_out_and_in_again_in_slice_order() {
        let plan = FragmentPlan {
            fragments: vec![vec![slice("a", 2, 4, 2), slice("b", 0, 1, 1)], vec![slice("a", 0, 2, 2), slice("b", 1, 3, 1)]],
        };
        let ranges = PlanRanges::new(&plan, 11, place).unwrap();
        let buffer: Vec<f32> = (0..11).map(|n| n as f32).collect();
        assert_eq!(ranges.export(0, &buffer).unwrap(), [4.0, 5.0, 6.0, 7.0, 8.0]);
        assert_eq!(ranges.to_plan_order(&buffer), [4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 1.0, 2.0, 3.0, 9.0, 10.0]);
        assert_eq!(ranges.from_plan_order(&ranges.to_plan_order(&buffer)), buffer);
        let mut copy = vec![0.0; 11];
        ranges.import(0, &ranges.export(0, &buffer).unwrap(), &mut copy).unwrap();
        ranges.import(1, &ranges.export(1, &buffer).unwrap(), &mut copy).unwrap();
        assert_eq!(copy, buffer);
    }

    #[test]
    fn a_plan_with_gaps_overlaps_or_foreign_tensors_is_refused() {
        let refused = |fragments| PlanRanges::new(&FragmentPlan { fragments }, 11, place).is_err();
        assert!(refused(vec![vec![slice("a", 0, 4, 2)]]));
        assert!(refused(vec![vec![slice("a", 0, 4, 2), slice("a", 0, 1, 2), slice("b", 0, 3, 1)]]));
        assert!(refused(vec![vec![slice("a", 0, 5, 2), slice("b", 0, 3, 1)]]));
        assert!(refused(vec![vec![slice("a", 0, 4, 3), slice("b", 0, 3, 1)]]));
        assert!(refused(vec![vec![slice("c", 0, 4, 2)]]));
        assert!(refused(vec![]));
    }

    #[test]
    fn values_of_the_wrong_length_or_not_finite_are_refused() {
        let plan = FragmentPlan { fragments: vec![vec![slice("a", 0, 4, 2), slice("b", 0, 3, 1)]] };
        let ranges = PlanRanges::new(&plan, 11, place).unwrap();
        assert!(matches!(ranges.check(0, &[0.0; 10]), Err(TrainError::FragmentLength { expected: 11, found: 10, .. })));
        assert!(matches!(ranges.check(0, &[f32::NAN; 11]), Err(TrainError::FragmentNotFinite { fragment: 0 })));
        assert!(matches!(ranges.check(1, &[0.0; 11]), Err(TrainError::NoFragment { fragment: 1, fragments: 1 })));
    }
}
