//! Effects that wait, and how many of them run at the same time: what is large or comes in masses has its own place, so that a head, a
//! job or a merge never waits behind a thousand downloads.

use std::collections::VecDeque;

use crate::machine::{Lane, Machine};

/// The effects of one machine on their way to an executor. In each lane they begin in order.
pub struct Lanes<M: Machine> {
    lanes: [Queue<M::Effect>; Lane::ALL.len()],
}

struct Queue<E> {
    waiting: VecDeque<E>,
    running: usize,
    most: usize,
}

impl<M: Machine> Lanes<M> {
    /// Of prompt effects `most` run at a time, of many a half of it, of bulky ones a quarter; of each at least one.
    pub fn new(most: usize) -> Self {
        Self { lanes: Lane::ALL.map(|lane| Queue { waiting: VecDeque::new(), running: 0, most: (most >> lane as usize).max(1) }) }
    }

    /// Adds an effect, in the place of a waiting one that it makes superfluous.
    pub fn push(&mut self, effect: M::Effect) {
        let waiting = &mut self.lanes[M::lane(&effect) as usize].waiting;
        match waiting.iter_mut().find(|waiting| M::replaces(&effect, waiting)) {
            Some(waiting) => *waiting = effect,
            None => waiting.push_back(effect),
        }
    }

    /// The next effect to begin, with the lane to tell at its [end](Lanes::ended).
    pub fn begin(&mut self) -> Option<(Lane, M::Effect)> {
        Lane::ALL.into_iter().find_map(|lane| {
            let queue = &mut self.lanes[lane as usize];
            if queue.running == queue.most {
                return None;
            }
            let effect = queue.waiting.pop_front()?;
            queue.running += 1;
            Some((lane, effect))
        })
    }

    pub fn ended(&mut self, lane: Lane) {
        let running = &mut self.lanes[lane as usize].running;
        *running = running.saturating_sub(1);
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.lanes.iter().map(|queue| queue.waiting.len()).sum()
    }

    /// What waits, lane by lane.
    #[cfg(test)]
    pub(super) fn in_order(&self) -> impl Iterator<Item = &M::Effect> {
        self.lanes.iter().flat_map(|queue| &queue.waiting)
    }

    pub fn running(&self) -> usize {
        self.lanes.iter().map(|queue| queue.running).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sorted;

    impl Machine for Sorted {
        type Input = ();
        type Effect = (Lane, u8);

        fn handle(&mut self, _now_ms: u64, (): ()) {}

        fn poll_effect(&mut self) -> Option<(Lane, u8)> {
            None
        }

        fn lane(effect: &(Lane, u8)) -> Lane {
            effect.0
        }

        fn replaces(new: &(Lane, u8), waiting: &(Lane, u8)) -> bool {
            new.1 == waiting.1
        }

        fn deadline(&self) -> Option<u64> {
            None
        }

        fn tick() {}
    }

    #[test]
    fn what_is_prompt_waits_behind_nothing_else_and_of_the_rest_fewer_run() {
        let mut lanes = Lanes::<Sorted>::new(4);
        for number in 0..9 {
            Lane::ALL.into_iter().rev().for_each(|lane| lanes.push((lane, number)));
        }
        let mut begun = Vec::new();
        while let Some((_, effect)) = lanes.begin() {
            begun.push(effect);
        }
        let of = |lane, numbers: std::ops::Range<u8>| numbers.map(move |number| (lane, number));
        let expected: Vec<_> = of(Lane::Prompt, 0..4).chain(of(Lane::Many, 0..2)).chain(of(Lane::Bulk, 0..1)).collect();
        assert_eq!((&begun, lanes.running(), lanes.waiting()), (&expected, 7, 20));
        // A place goes to the next of the same lane.
        lanes.ended(Lane::Bulk);
        assert_eq!((lanes.begin(), lanes.begin()), (Some((Lane::Bulk, (Lane::Bulk, 1))), None));
        // The newest takes the place of one that waits, in its own lane.
        lanes.push((Lane::Bulk, 8));
        assert_eq!(lanes.waiting(), 19);
    }
}
