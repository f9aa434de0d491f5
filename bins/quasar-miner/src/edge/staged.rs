//! Versions that have arrived, decoded, in memory that the trainer's device reads. They are brought there while a step is under way, so
//! that at the boundary nobody waits for a disk or a copy.

use std::collections::VecDeque;
use std::sync::{Mutex, OnceLock, PoisonError};

use model::{HostMemory, HostValues};

/// Versions that wait at a time: about as many as there are pulls under way. Further ones push out the oldest, and the trainer reads
/// those from the disk.
const MOST: usize = 3;

/// Versions of fragments that wait for the next boundary.
#[derive(Default)]
pub struct Staged {
    memory: OnceLock<Box<dyn HostMemory>>,
    versions: Mutex<VecDeque<(u16, u64, HostValues)>>,
}

impl Staged {
    /// From now on versions are held in the trainer's memory; before, none is.
    pub fn reach(&self, memory: Box<dyn HostMemory>) {
        let _ = self.memory.set(memory);
    }

    /// Holds a version, if there is a trainer. What cannot be held is read from the disk later, and complained about there.
    pub fn put<E>(&self, fragment: u16, version: u64, load: impl FnOnce() -> Result<Vec<f32>, E>) {
        let Some(memory) = self.memory.get() else { return };
        let Some(values) = load().ok().and_then(|values| memory.hold(values).ok()) else { return };
        let mut versions = self.versions.lock().unwrap_or_else(PoisonError::into_inner);
        versions.retain(|(of, _, _)| *of != fragment);
        while versions.len() >= MOST {
            versions.pop_front();
        }
        versions.push_back((fragment, version, values));
    }

    /// Gives a version away, if it is here.
    pub fn take(&self, fragment: u16, version: u64) -> Option<HostValues> {
        let mut versions = self.versions.lock().unwrap_or_else(PoisonError::into_inner);
        let at = versions.iter().position(|(of, number, _)| (*of, *number) == (fragment, version))?;
        versions.remove(at).map(|(_, _, values)| values)
    }
}

#[cfg(test)]
mod tests {
    use model::{ToyTrainer, Trainer, toy_plan};

    use super::*;

    fn put(staged: &Staged, fragment: u16, version: u64) {
        staged.put(fragment, version, || Ok::<_, ()>(vec![f32::from(fragment), version as f32]));
    }

    #[test]
    fn versions_wait_for_the_boundary_and_the_oldest_make_room() {
        let staged = Staged::default();
        put(&staged, 0, 1);
        assert!(staged.take(0, 1).is_none(), "there was no trainer yet");
        staged.reach(ToyTrainer::new(toy_plan(3), 1).unwrap().host_memory());
        for fragment in 0..4 {
            put(&staged, fragment, 1);
        }
        put(&staged, 2, 2);
        staged.put(1, 9, || Err(()));
        assert!(staged.take(0, 1).is_none() && staged.take(2, 1).is_none());
        assert_eq!(staged.take(2, 2).unwrap().values().unwrap(), [2.0, 2.0]);
        assert!(staged.take(2, 2).is_none() && staged.take(1, 1).is_some() && staged.take(3, 1).is_some());
    }
}
