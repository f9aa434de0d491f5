//! Revealed verdicts of all validators on all selected learner-cycles: watched until they are there or their time is over.

use std::collections::BTreeMap;
use std::ops::Bound;

use protocol::audits::{NOTICES_OF_SLOT, Selection};
use protocol::documents::{Verdict, VerdictResult};
use protocol::{AccountId, Digest};
use serde::{Deserialize, Serialize};

use super::poller::Poller;
use crate::audit::Subject;

/// Reads at the same time.
const READS_MAX: usize = 16;
/// Time for fetching and judging is at least this long, whatever a run says about openings.
const JUDGING_MS_MIN: u64 = 60_000;

/// An orchestrator that was away gives learners so much longer to open, and a learner opens one audit after the other. So an order or a
/// verdict that is not there in time may still come for so long, and is looked for now and then. Everybody has to count what was revealed.
pub const LATE_MS: u64 = 24 * 3_600_000;
/// Pause between two looks for what is late.
pub const LATE_EVERY_MS: u64 = 5 * 60_000;

/// How long a verdict may take from the beacon on: the time to open, also behind another one, then three quarters of it for order, queue and
/// judgement.
pub fn verdict_ms(opening_ms: u64) -> u64 {
    NOTICES_OF_SLOT * opening_ms + (opening_ms / 4 * 3).max(JUDGING_MS_MIN)
}

/// A sum over audits and their auditors, with one more: the same in whatever order they come.
pub fn with(mut sum: Digest, audit: &Digest, validator: &AccountId) -> Digest {
    let pair = Digest::blake3(&[audit.0, validator.0].concat());
    sum.0.iter_mut().zip(pair.0).for_each(|(sum, byte)| *sum ^= byte);
    sum
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Watch {
    subject: Subject,
    poller: Poller,
    /// When it is late.
    until_ms: u64,
    is_late: bool,
    /// A first look found nothing.
    is_open: bool,
}

/// Numbers of verdicts by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub pass: u64,
    pub fail: u64,
    pub other: u64,
    /// Selections whose verdict has not come in time.
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
    /// The one that was looked for last: all have their turn.
    last: Option<Digest>,
    /// Over all audits that were ever watched, with their auditors, in whatever order.
    drawn: Digest,
    tally: Tally,
}

impl Verdicts {
    pub fn new(every_ms: u64, opening_ms: u64) -> Self {
        Self { every_ms, opening_ms, watched: BTreeMap::new(), reading: 0, last: None, drawn: Digest::ZERO, tally: Tally::default() }
    }

    /// Starts to wait for the verdict on a selected learner-cycle.
    pub fn watch(&mut self, subject: Subject, now_ms: u64) {
        let until_ms = now_ms + verdict_ms(self.opening_ms);
        let Selection { audit, validator, .. } = &subject.selection;
        self.drawn = with(self.drawn, audit, validator);
        let watch = Watch { subject, poller: Poller::new(self.every_ms), until_ms, is_late: false, is_open: false };
        self.watched.insert(watch.subject.selection.audit, watch);
    }

    /// The next reveals to look for.
    pub fn wanted(&mut self, now_ms: u64) -> Vec<Subject> {
        let mut wanted = Vec::new();
        let last = self.last.unwrap_or(Digest::ZERO);
        for is_behind in [true, false] {
            let bounds = if is_behind { (Bound::Excluded(last), Bound::Unbounded) } else { (Bound::Unbounded, Bound::Included(last)) };
            for (audit, watch) in self.watched.range_mut(bounds) {
                if self.reading >= READS_MAX {
                    return wanted;
                }
                if watch.poller.begin(now_ms) {
                    self.reading += 1;
                    self.last = Some(*audit);
                    wanted.push(watch.subject.clone());
                }
            }
        }
        wanted
    }

    /// A look ended with no answer of the store.
    pub fn not_read(&mut self, audit: &Digest, now_ms: u64) {
        if let Some(watch) = self.watched.get_mut(audit) {
            self.reading = self.reading.saturating_sub(1);
            watch.poller.end(now_ms);
        }
    }

    /// Whether each of them was looked for.
    pub fn is_caught_up(&self) -> bool {
        self.watched.values().all(|watch| watch.is_open)
    }

    /// A look ended.
    pub fn looked(&mut self, audit: Digest, verdict: Option<Verdict>, now_ms: u64) -> Looked {
        let Some(watch) = self.watched.get_mut(&audit) else { return Looked::Nothing };
        self.reading = self.reading.saturating_sub(1);
        watch.poller.end(now_ms);
        if let Some(verdict) = verdict {
            self.tally.missing -= u64::from(watch.is_late);
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
            let was_late = std::mem::replace(&mut watch.is_late, true);
            self.tally.missing += u64::from(!was_late);
            watch.poller.rest(now_ms, LATE_EVERY_MS.max(self.every_ms));
            if watch.until_ms.saturating_add(LATE_MS) <= now_ms {
                self.watched.remove(&audit);
            }
        }
        Looked::Nothing
    }

    /// Looks for one audit's reveal without waiting for its turn.
    pub fn hurry(&mut self, audit: &Digest, now_ms: u64) {
        if let Some(watch) = self.watched.get_mut(audit) {
            watch.poller.hurry(now_ms);
        }
    }

    /// The same for everybody who watches the same audits of the same auditors.
    pub fn drawn(&self) -> Digest {
        self.drawn
    }

    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Whether no verdict is awaited any more that is not late.
    pub fn is_settled(&self) -> bool {
        self.watched.values().all(|watch| watch.is_late)
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
    fn a_verdict_that_is_late_is_counted_as_missing_until_it_comes() {
        let (one, late_ms) = (subject(1, 0), verdict_ms(1_000));
        let audit = one.selection.audit;
        let watching = |until_ms: u64| {
            let mut verdicts = Verdicts::new(100, 1_000);
            verdicts.watch(one.clone(), 0);
            let (mut now_ms, mut looks) = (0, 0);
            while now_ms < until_ms
                && let Some(due_ms) = verdicts.deadline()
            {
                now_ms = due_ms;
                assert_eq!(verdicts.wanted(now_ms).len(), 1);
                verdicts.looked(audit, None, now_ms);
                looks += 1;
                assert_eq!((verdicts.is_settled(), verdicts.tally().missing), (now_ms >= late_ms, u64::from(now_ms >= late_ms)));
            }
            (verdicts, now_ms, looks)
        };
        let (mut verdicts, now_ms, looks) = watching(6 * 3_600_000);
        assert!((late_ms / 100 + 60..late_ms / 100 + 80).contains(&looks), "{looks} looks in six hours");
        let found = verdicts.looked(audit, Some(verdict(0, 1, 0, VerdictResult::NoOpening)), now_ms + 1);
        assert!(matches!(found, Looked::Revealed(_)));
        assert_eq!(verdicts.tally(), Tally { other: 1, ..Tally::default() });
        let (verdicts, now_ms, _) = watching(u64::MAX);
        assert!((LATE_MS..LATE_MS + 2 * LATE_EVERY_MS).contains(&now_ms) && verdicts.watched.is_empty(), "{now_ms}");
        assert_eq!(verdicts.tally().missing, 1);
    }
}
