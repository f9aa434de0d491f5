//! Weights as they were exported: what lets a learner keep the steps that it takes while its contribution is on the way.
//!
//! A merged version answers what a learner had trained up to its export. When it arrives, τ steps later, the learner's weights become
//! the version plus the change since the export (Decoupled DiLoCo, arXiv 2604.21428, leaves the choice open; overwriting loses τ of
//! every H steps: `docs/benchmarks.md` has the difference).

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::{HostValues, TrainError};

/// `now` becomes `version + (now - exported)`; all have the same length.
pub(crate) fn carry(now: &mut [f32], version: &[f32], exported: &[f32]) {
    for ((value, version), exported) in now.iter_mut().zip(version).zip(exported) {
        *value = version + (*value - exported);
    }
}

/// Exported weights of the fragments that got no newer version since, in slice order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exported(BTreeMap<usize, HostValues>);

impl Exported {
    pub fn put(&mut self, fragment: usize, values: HostValues) {
        self.0.insert(fragment, values);
    }

    #[cfg(feature = "libtorch")]
    pub fn get(&self, fragment: usize) -> Option<&HostValues> {
        self.0.get(&fragment)
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
        carry(&mut values, version, exported.values()?);
        Ok(values.into())
    }

    /// By fragment, ascending.
    #[cfg(feature = "libtorch")]
    pub fn values(&self) -> Result<Vec<(u16, &[f32])>, TrainError> {
        self.0.iter().map(|(fragment, values)| Ok((*fragment as u16, values.values()?))).collect()
    }

    /// As part of a state: by fragment, ascending.
    pub fn to_state(&self) -> Result<Vec<(u16, Vec<f32>)>, TrainError> {
        self.0.iter().map(|(fragment, values)| Ok((*fragment as u16, values.values()?.to_vec()))).collect()
    }

    pub fn from_state(state: &[(u16, Vec<f32>)]) -> Self {
        Self(state.iter().map(|(fragment, values)| (usize::from(*fragment), values.clone().into())).collect())
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
        exported.put(3, vec![1.0, 2.0].into());
        assert_eq!(*exported.carried(3, &version, || Ok(vec![1.5, 1.0])).unwrap(), [10.5, 19.0]);
        let state = exported.to_state().unwrap();
        assert_eq!(state, [(3, vec![1.0, 2.0])]);
        assert_eq!(Exported::from_state(&state).to_state().unwrap(), state);
        exported.forget(3);
        assert!(exported.to_state().unwrap().is_empty());
    }
}
