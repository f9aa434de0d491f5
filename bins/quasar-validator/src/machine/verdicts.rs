//! Revealed verdicts of all validators on all selected learner-cycles: watched until they are there or their time is over.

use std::collections::BTreeMap;

use protocol::Digest;
use protocol::documents::{Verdict, VerdictResult};
use serde::{Deserialize, Serialize};

use super::poller::Poller;
use crate::audit::Subject;

/// Reads at the same time.
const READS_MAX: usize = 16;
/// Time for fetching and judging is at least this long, whatever a run says about openings.
const JUDGING_MS_MIN: u64 = 60_000;

/// How long a verdict may take from the beacon on: the time to open, then three quarters of it for order, queue and judgement.
pub fn verdict_ms(opening_ms: u64) -> u64 {
    opening_ms + (opening_ms / 4 * 3).max(JUDGING_MS_MIN)
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Watch {
    subject: Subject,
    poller: Poller,
    until_ms: u64,
    /// A first look found nothing.
    is_open: bool,
}

/// Numbers of verdicts by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub pass: u64,
    pub fail: u64,
    pub other: u64,
    /// Selections whose verdict never came.
    pub missing: u64,
}

/// What a look at the bucket brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Looked {
    /// Nothing yet; the first time for this audit.
    FirstTime(Box<Subject>),
    Nothing,
    Revealed(Box<Verdict>),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdicts {
    every_ms: u64,
    opening_ms: u64,
    watched: BTreeMap<Digest, Watch>,
    reading: usize,
    tally: Tally,
}

impl Verdicts {
    pub fn new(every_ms: u64, opening_ms: u64) -> Self {
        Self { every_ms, opening_ms, watched: BTreeMap::new(), reading: 0, tally: Tally::default() }
    }

    /// Starts to wait for the verdict on a selected learner-cycle.
    pub fn watch(&mut self, subject: Subject, now_ms: u64) {
        let until_ms = now_ms + verdict_ms(self.opening_ms);
        let watch = Watch { subject, poller: Poller::new(self.every_ms), until_ms, is_open: false };
        self.watched.insert(watch.subject.selection.audit, watch);
    }

    /// The next reveals to look for.
    pub fn wanted(&mut self, now_ms: u64) -> Vec<Subject> {
        let mut wanted = Vec::new();
        for watch in self.watched.values_mut() {
            if self.reading >= READS_MAX {
                break;
            }
            if watch.poller.begin(now_ms) {
                self.reading += 1;
                wanted.push(watch.subject.clone());
            }
        }
        wanted
    }

    /// A look ended.
    pub fn looked(&mut self, audit: Digest, verdict: Option<Verdict>, now_ms: u64) -> Looked {
        let Some(watch) = self.watched.get_mut(&audit) else { return Looked::Nothing };
        self.reading = self.reading.saturating_sub(1);
        watch.poller.end(now_ms);
        if let Some(verdict) = verdict {
            self.watched.remove(&audit);
            match verdict.result {
                VerdictResult::Pass => self.tally.pass += 1,
                VerdictResult::Mismatch => self.tally.fail += 1,
                _ => self.tally.other += 1,
            }
            return Looked::Revealed(Box::new(verdict));
        }
        let is_first = !std::mem::replace(&mut watch.is_open, true);
        if is_first {
            return Looked::FirstTime(Box::new(watch.subject.clone()));
        }
        if watch.until_ms <= now_ms {
            self.watched.remove(&audit);
            self.tally.missing += 1;
        }
        Looked::Nothing
    }

    /// Looks for one audit's reveal without waiting for its turn.
    pub fn hurry(&mut self, audit: &Digest, now_ms: u64) {
        if let Some(watch) = self.watched.get_mut(audit) {
            watch.poller.hurry(now_ms);
        }
    }

    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Whether no verdict is awaited any more.
    pub fn is_settled(&self) -> bool {
        self.watched.is_empty()
    }

    pub fn deadline(&self) -> Option<u64> {
        if self.reading >= READS_MAX {
            return None;
        }
        self.watched.values().filter_map(|watch| watch.poller.deadline()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fixture::{subject, verdict};

    #[test]
    fn a_verdict_is_looked_for_until_it_is_revealed() {
        let mut verdicts = Verdicts::new(100, 1_000);
        let one = subject(1, 0);
        let audit = one.selection.audit;
        verdicts.watch(one.clone(), 0);
        assert_eq!(verdicts.wanted(0), std::slice::from_ref(&one));
        assert!(verdicts.wanted(50).is_empty());
        assert_eq!(verdicts.looked(audit, None, 50), Looked::FirstTime(Box::new(one.clone())));
        assert_eq!((verdicts.wanted(149).len(), verdicts.wanted(150).len()), (0, 1));
        assert_eq!(verdicts.looked(audit, None, 160), Looked::Nothing);
        verdicts.hurry(&audit, 161);
        assert_eq!(verdicts.wanted(161).len(), 1);
        let fail = verdict(0, 1, 0, VerdictResult::Mismatch);
        assert_eq!(verdicts.looked(audit, Some(fail), 170), Looked::Revealed(Box::new(fail)));
        assert!(verdicts.is_settled());
        assert_eq!(verdicts.tally(), Tally { fail: 1, ..Tally::default() });
    }

    #[test]
    fn a_verdict_that_never_comes_is_given_up_and_counted() {
        let mut verdicts = Verdicts::new(100, 1_000);
        let one = subject(1, 0);
        verdicts.watch(one.clone(), 0);
        for now_ms in [0, verdict_ms(1_000)] {
            assert_eq!(verdicts.wanted(now_ms).len(), 1);
            verdicts.looked(one.selection.audit, None, now_ms);
        }
        assert!(verdicts.is_settled());
        assert_eq!(verdicts.tally().missing, 1);
    }
}
