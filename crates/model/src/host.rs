//! Values of a fragment in the host's memory, where the trainer's device reaches them.

use std::any::Any;
use std::sync::Arc;

use crate::TrainError;

/// Values of a fragment, in slice order. They may still be on their way from the device: whoever looks waits.
#[derive(Clone)]
pub struct HostValues(Arc<dyn Held>);

/// What holds values.
pub(crate) trait Held: Any + Send + Sync {
    /// Waits until they are there.
    fn values(&self) -> Result<&[f32], TrainError>;
}

impl Held for Vec<f32> {
    fn values(&self) -> Result<&[f32], TrainError> {
        Ok(self)
    }
}

impl HostValues {
    #[cfg(feature = "libtorch")]
    pub(crate) fn new(held: impl Held) -> Self {
        Self(Arc::new(held))
    }

    /// The values.
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

impl std::fmt::Debug for HostValues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HostValues")
    }
}

impl From<Vec<f32>> for HostValues {
    fn from(values: Vec<f32>) -> Self {
        Self(Arc::new(values))
    }
}

/// Memory of the host that a trainer's device reads by itself. From any thread, also while the trainer takes a step, so that a version
/// that has arrived is in its place when the step is over.
pub trait HostMemory: Send + Sync {
    /// # Errors
    /// There is no such memory left.
    fn hold(&self, values: Vec<f32>) -> Result<HostValues, TrainError>;
}

/// The memory of a process, for trainers on its processor.
pub(crate) struct OrdinaryMemory;

impl HostMemory for OrdinaryMemory {
    fn hold(&self, values: Vec<f32>) -> Result<HostValues, TrainError> {
        Ok(values.into())
    }
}
