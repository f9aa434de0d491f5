//! One world from its beginning to its end, also where that is a panic: it takes no other world along, and its seed is not lost.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use quasar_tests::sim::Outcome;

/// How a world went.
pub enum World {
    Ended(Box<Outcome>),
    /// It ended with this panic, which counts as one violation.
    Panicked(String),
}

/// Runs a world. Nothing of it is used after a panic, so nothing that is half changed is seen.
pub fn live(run: impl FnOnce() -> Outcome) -> World {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(outcome) => World::Ended(Box::new(outcome)),
        Err(panic) => World::Panicked(text(&*panic)),
    }
}

/// What a panic says.
fn text(panic: &(dyn Any + Send)) -> String {
    let fixed = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    fixed.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a text".to_owned())
}

impl World {
    pub fn outcome(&self) -> Option<&Outcome> {
        match self {
            Self::Ended(outcome) => Some(outcome),
            Self::Panicked(_) => None,
        }
    }

    /// What did not hold, one text each.
    pub fn violations(&self) -> Vec<String> {
        match self {
            Self::Ended(outcome) => outcome.violations.iter().map(ToString::to_string).collect(),
            Self::Panicked(text) => vec![format!("panic: {text}")],
        }
    }

    /// Prints what did not hold, with the command that gives the same world again.
    pub fn tell_if_failed(&self, seed: u64, replay: &str) {
        if self.has_failed() {
            self.violations().iter().for_each(|what| println!("seed {seed}: {what}"));
            println!("replay: {replay}");
        }
    }

    pub fn has_failed(&self) -> bool {
        self.outcome().is_none_or(|outcome| !outcome.violations.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use quasar_tests::sim;

    use super::*;

    #[test]
    fn a_world_that_panics_is_one_violation_with_its_text() {
        let number = 7;
        let [fixed, made] = [live(|| panic!("the world fell")), live(|| panic!("node {number} fell"))];
        assert_eq!(
            (fixed.violations(), made.violations()),
            (vec!["panic: the world fell".to_owned()], vec!["panic: node 7 fell".to_owned()])
        );
        assert!(fixed.has_failed() && fixed.outcome().is_none());
        let ended = live(|| sim::run(sim::small(1, 3)));
        assert!(!ended.has_failed() && ended.violations().is_empty() && ended.outcome().is_some_and(|outcome| outcome.merges > 0));
    }
}
