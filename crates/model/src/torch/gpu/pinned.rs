//! Weights of a fragment in pinned memory of the host, and the buffers for them, which are costly to make and so used again.

use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{Event, Gpu, HostMemory, Stream};
use crate::TrainError;
use crate::exported::Held;

/// Buffers that are kept for later: one that goes out, one that comes in.
const KEPT: usize = 2;

/// A buffer, and when the device is done with it.
type Used = (HostMemory, Option<Arc<Event>>);

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
            None => HostMemory::new(gpu, 4 * elements)?,
        };
        Ok(Pinned { memory: Some(memory), elements, event: Mutex::default(), pool: self.clone() })
    }
}

/// Values in pinned memory.
pub(crate) struct Pinned {
    /// Absent only while it is dropped.
    memory: Option<HostMemory>,
    elements: usize,
    /// When the device is done with it.
    event: Mutex<Option<Arc<Event>>>,
    pool: Pool,
}

impl Pinned {
    fn memory(&self) -> &HostMemory {
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

    /// Overwrites values from number `at` on. Only before the device knows of them.
    pub fn fill(&mut self, at: usize, values: &[f32]) {
        let all = self.memory.as_mut().expect("it is there until the end").floats_mut(self.elements);
        let to = &mut all[at..at + values.len()];
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
