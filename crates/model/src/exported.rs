//! Weights as they were exported: what lets a learner keep the steps that it takes while its contribution is on the way.
//!
//! A merged version answers what a learner had trained up to its export. When it arrives, τ steps later, the learner's weights become
//! the version plus the change since the export (Decoupled DiLoCo, arXiv 2604.21428, leaves the choice open; overwriting loses τ of
//! every H steps: `docs/benchmarks.md` has the difference).

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::TrainError;

/// Exported weights of the fragments that got no newer version since, in slice order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Exported(BTreeMap<usize, Vec<f32>>);

impl Exported {
    pub fn put(&mut self, fragment: usize, values: Vec<f32>) {
        self.0.insert(fragment, values);
    }

    /// The version arrived and the weights are what [`Exported::carried`] said.
    pub fn forget(&mut self, fragment: usize) {
        self.0.remove(&fragment);
    }

    /// What the weights of a fragment become with a new version: `version + (now - exported)`, or the version alone where nothing was
    /// exported. `now` gives the weights; all have the same length.
    pub fn carried<'a>(
        &self,
        fragment: usize,
        version: &'a [f32],
        now: impl FnOnce() -> Result<Vec<f32>, TrainError>,
    ) -> Result<Cow<'a, [f32]>, TrainError> {
        let Some(exported) = self.0.get(&fragment) else { return Ok(version.into()) };
        let mut values = now()?;
        for ((value, version), exported) in values.iter_mut().zip(version).zip(exported) {
            *value = version + (*value - exported);
        }
        Ok(values.into())
    }

    /// As part of a state: by fragment, ascending.
    pub fn to_state(&self) -> Vec<(u16, Vec<f32>)> {
        self.0.iter().map(|(fragment, values)| (*fragment as u16, values.clone())).collect()
    }

    pub fn from_state(state: &[(u16, Vec<f32>)]) -> Self {
        Self(state.iter().map(|(fragment, values)| (usize::from(*fragment), values.clone())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_after_an_export_are_carried_into_the_version_that_arrives() {
        let mut exported = Exported::default();
        let version = [10.0, 20.0];
        assert_eq!(*exported.carried(3, &version, || unreachable!("nothing was exported")).unwrap(), version);
        exported.put(3, vec![1.0, 2.0]);
        assert_eq!(*exported.carried(3, &version, || Ok(vec![1.5, 1.0])).unwrap(), [10.5, 19.0]);
        assert_eq!(Exported::from_state(&exported.to_state()), exported);
        exported.forget(3);
        assert_eq!(exported, Exported::default());
    }
}
