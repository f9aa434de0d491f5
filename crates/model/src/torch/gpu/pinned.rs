//! Values of a fragment in pinned memory of the host, and the buffers for them, which are costly to make and so used again.

use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{self, Event, Gpu, Stream};
use super::kernels::Kernels;
use crate::host::Held;
use crate::{HostMemory, HostValues, TrainError};

/// Buffers that are kept for later: those that go out until their answer comes, and those that come in.
const KEPT: usize = 4;

/// A buffer, and when the device is done with it.
type Used = (driver::HostMemory, Option<Arc<Event>>);

/// Buffers that nobody uses.
#[derive(Clone, Default)]
pub(crate) struct Pool(Arc<Mutex<Vec<Used>>>);

impl Pool {
    /// A buffer for `elements` values, whatever they are.
    pub fn take(&self, gpu: &Gpu, elements: usize) -> Result<Pinned, String> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = free.iter().position(|(memory, _)| memory.bytes() >= 4 * elements);
        let used = fitting.map(|at| free.swap_remove(at));
        // Those that are too small would only take room.
        if used.is_none() {
            free.clear();
        }
        drop(free);
        let memory = match used {
            Some((memory, event)) => {
                event.map_or(Ok(()), |event| event.wait())?;
                memory
            }
            None => driver::HostMemory::new(gpu, 4 * elements)?,
        };
        Ok(Pinned { memory: Some(memory), elements, event: Mutex::default(), pool: self.clone() })
    }
}

/// Values in pinned memory.
pub(crate) struct Pinned {
    /// Absent only while it is dropped.
    memory: Option<driver::HostMemory>,
    elements: usize,
    /// When the device is done with it.
    event: Mutex<Option<Arc<Event>>>,
    pool: Pool,
}

impl Pinned {
    fn memory(&self) -> &driver::HostMemory {
        self.memory.as_ref().expect("it is there until the end")
    }

    /// Address of a value for kernels.
    pub fn address(&self, element: usize) -> i64 {
        self.memory().address(4 * element as i64)
    }

    /// Everything that `stream` holds by now may use the buffer.
    pub fn used_by(&self, gpu: &Gpu, stream: Stream) -> Result<Arc<Event>, String> {
        let event = Arc::new(Event::record(gpu, stream)?);
        *self.event.lock().unwrap_or_else(PoisonError::into_inner) = Some(event.clone());
        Ok(event)
    }

    /// Overwrites all values. Only before the device knows of them.
    fn fill(&mut self, values: &[f32]) {
        let to = self.memory.as_mut().expect("it is there until the end").floats_mut(self.elements);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let part = values.len().div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            for (to, from) in to.chunks_mut(part).zip(values.chunks(part)) {
                scope.spawn(move || to.copy_from_slice(from));
            }
        });
    }
}

impl Held for Pinned {
    fn values(&self) -> Result<&[f32], TrainError> {
        let event = self.event.lock().unwrap_or_else(PoisonError::into_inner).clone();
        event.map_or(Ok(()), |event| event.wait()).map_err(TrainError::Torch)?;
        Ok(self.memory().floats(self.elements))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let event = self.event.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = self.memory.take()
            && free.len() < KEPT
        {
            free.push((memory, event));
        }
    }
}

/// Pinned memory for whoever brings values to a learner.
#[derive(Clone)]
pub(crate) struct PinnedMemory {
    gpu: Gpu,
    pool: Pool,
}

impl PinnedMemory {
    pub fn of(kernels: &Kernels) -> Self {
        Self { gpu: kernels.gpu, pool: kernels.pool.clone() }
    }

    /// The same values in pinned memory: themselves if they lie there, otherwise a copy.
    pub fn reach(&self, values: &HostValues) -> Result<HostValues, TrainError> {
        if values.held::<Pinned>().is_some() { Ok(values.clone()) } else { self.copy(values.values()?) }
    }

    fn copy(&self, values: &[f32]) -> Result<HostValues, TrainError> {
        let pinned = self.pool.take(&self.gpu, values.len());
        let mut pinned = pinned.map_err(|reason| TrainError::from(tch::TchError::Torch(reason)))?;
        pinned.fill(values);
        Ok(HostValues::new(pinned))
    }
}

impl HostMemory for PinnedMemory {
    fn hold(&self, values: Vec<f32>) -> Result<HostValues, TrainError> {
        self.copy(&values)
    }
}
