//! Weights as they were exported: what lets a learner keep the steps that it takes while its contribution is on the way.
//!
//! A merged version answers what a learner had trained up to its export. When it arrives, τ steps later, the learner's weights become
//! the version plus the change since the export (Decoupled DiLoCo, arXiv 2604.21428, leaves the choice open; overwriting loses τ of
//! every H steps: `docs/benchmarks.md` has the difference).

use std::any::Any;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::TrainError;

/// Weights of a fragment as they were exported, in slice order. They may still be on their way from the device: whoever looks waits.
#[derive(Clone)]
pub struct Contribution(Arc<dyn Held>);

/// Where exported weights lie.
pub(crate) trait Held: Any + Send + Sync {
    /// Waits until they are there.
    fn values(&self) -> Result<&[f32], TrainError>;
}

impl Held for Vec<f32> {
    fn values(&self) -> Result<&[f32], TrainError> {
        Ok(self)
    }
}

impl Contribution {
    pub(crate) fn new(held: impl Held) -> Self {
        Self(Arc::new(held))
    }

    /// The weights.
    ///
    /// # Errors
    /// The device failed meanwhile.
    pub fn values(&self) -> Result<&[f32], TrainError> {
        self.0.values()
    }

    /// What holds them, if it is a `T`.
    #[cfg(feature = "libtorch")]
    pub(crate) fn held<T: Held>(&self) -> Option<&T> {
        (&*self.0 as &dyn Any).downcast_ref()
    }
}

impl std::fmt::Debug for Contribution {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Contribution")
    }
}

impl From<Vec<f32>> for Contribution {
    fn from(values: Vec<f32>) -> Self {
        Self::new(values)
    }
}

/// `now` becomes `version + (now - exported)`; all have the same length.
pub(crate) fn carry(now: &mut [f32], version: &[f32], exported: &[f32]) {
    for ((value, version), exported) in now.iter_mut().zip(version).zip(exported) {
        *value = version + (*value - exported);
    }
}

/// Exported weights of the fragments that got no newer version since, in slice order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exported(BTreeMap<usize, Contribution>);

impl Exported {
    pub fn put(&mut self, fragment: usize, values: Contribution) {
        self.0.insert(fragment, values);
    }

    #[cfg(feature = "libtorch")]
    pub fn get(&self, fragment: usize) -> Option<&Contribution> {
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
