//! The shape of every role's rules: a pure state machine without clock, network, randomness or tensors.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Exit;

/// What an effect may have to wait behind: others of its kind, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// What others wait for.
    Prompt,
    /// What comes in masses.
    Many,
    /// What moves large bodies.
    Bulk,
}

impl Lane {
    pub const ALL: [Self; 3] = [Self::Prompt, Self::Many, Self::Bulk];
}

/// Facts go in, decisions come out. The same inputs at the same times give the same state and the same effects, which is
/// what lets [`crate::driver::recover`] rebuild a machine from its journal, and a simulation run many of them in one thread.
///
/// A machine that the driver runs is also `Serialize + DeserializeOwned`, so that snapshots of it can be kept. Snapshots and
/// inputs are stored as bincode: their types use no serde attribute that needs a self-describing format (`untagged`,
/// `flatten`, `skip_serializing_if`).
pub trait Machine {
    /// A fact that happened: object read, upload verified, tick.
    type Input: Serialize + DeserializeOwned;
    /// Something to do next: read, publish, train. Executing one twice is harmless (idempotent by key).
    type Effect;

    /// Layout of snapshot and inputs. Raise it with every change of their types; a journal of another layout is refused.
    const LAYOUT: u32 = 1;

    /// A fact happened at `now_ms`, which never goes back.
    fn handle(&mut self, now_ms: u64, input: Self::Input);

    /// The next thing to do; called until it gives `None` after each input.
    fn poll_effect(&mut self) -> Option<Self::Effect>;

    /// Where an effect waits until it begins. Between lanes there is no order.
    fn lane(_effect: &Self::Effect) -> Lane {
        Lane::Prompt
    }

    /// Whether `new` makes `waiting` superfluous, an effect of the same lane that has not begun: while the store is away, no more waits
    /// than there are things to write.
    fn replaces(_new: &Self::Effect, _waiting: &Self::Effect) -> bool {
        false
    }

    /// When the machine wants to be woken by [`Machine::tick`], in Unix milliseconds.
    fn deadline(&self) -> Option<u64>;

    /// The input of a wake-up at [`Machine::deadline`].
    fn tick() -> Self::Input;

    /// Set once the machine's life is over, with the exit code: fenced, run ended, wrong version. The driver then finishes
    /// the effects that were begun, and stops.
    fn exit(&self) -> Option<Exit> {
        None
    }
}
