//! The append-only log, watched: every head must extend the one before, and every merged commitment must be in it.
//!
//! The watch begins at the first head that is seen; what lies before it was watched by others, or by an earlier life. Heads are
//! read backwards, from the one that the run's head names to the last one that was checked.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use protocol::Digest;
use protocol::documents::MergeManifest;
use protocol::log::{Frontier, LogFault, LogHead, LogKind, LogRef};
use serde::{Deserialize, Serialize};

/// A commitment that is merged must be logged within this time, of which counts what heads came in.
const LATE_MS: u64 = 10 * 60_000;
/// Heads are signed anew each minute. Between two that are further apart than this the store was away, or the orchestrator.
const APART_MAX_MS: u64 = 2 * 60_000;
/// Logged commitments that are remembered for the merges that name them.
const REMEMBERED: usize = 1 << 14;
/// Heads that are read backwards at most; a watcher that fell further behind begins anew.
const BACKWARDS_MAX: usize = 1 << 12;

/// See the module's text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LogMonitor {
    retry_ms: u64,
    /// Everything up to here was checked.
    checked: Option<Frontier>,
    newest: Option<LogRef>,
    /// When the newest head came, and for how long heads have come so far: a silence is no sign of a missing entry.
    head_ms: Option<u64>,
    heard_ms: u64,
    /// Heads on the way back from the newest one, newest first.
    backwards: Vec<LogHead>,
    reading: Option<u64>,
    not_before_ms: u64,
    /// Merges of outer steps from here on have all their commitments in the watched part: none of them was open when the newest head came
    /// before the watch began.
    first_t: u64,
    /// The same if the watch began with the newest head.
    fresh_t: u64,
    logged: BTreeSet<Digest>,
    logged_order: VecDeque<Digest>,
    /// Merged commitments that were not seen in the log, and how long heads may come until they are.
    expected: BTreeMap<Digest, u64>,
}

impl LogMonitor {
    pub fn new(retry_ms: u64) -> Self {
        Self {
            retry_ms,
            checked: None,
            newest: None,
            head_ms: None,
            heard_ms: 0,
            backwards: Vec::new(),
            reading: None,
            not_before_ms: 0,
            first_t: 0,
            fresh_t: 0,
            logged: BTreeSet::new(),
            logged_order: VecDeque::new(),
            expected: BTreeMap::new(),
        }
    }

    /// The run's head names `log`. Outer steps from `fresh_t` on were not open yet when it did.
    pub fn follow(&mut self, log: LogRef, fresh_t: u64, now_ms: u64) -> Result<(), LogFault> {
        if let Some(before_ms) = self.head_ms.replace(now_ms) {
            self.heard_ms += now_ms.saturating_sub(before_ms).min(APART_MAX_MS);
        }
        self.fresh_t = fresh_t;
        if self.newest.is_none() && log.size == 0 {
            self.begin();
            self.checked = Some(Frontier::default());
        }
        let known = self.newest.replace(log);
        match known {
            Some(known) if log.size < known.size || (log.size == known.size && log != known) => Err(LogFault::OtherRoot(log.size)),
            _ => Ok(()),
        }
    }

    /// The head to read next.
    pub fn wanted(&mut self, now_ms: u64) -> Option<u64> {
        let newest = self.newest?;
        if self.reading.is_some() || now_ms < self.not_before_ms || newest.size == 0 {
            return None;
        }
        let checked = self.checked.as_ref().map(Frontier::size);
        let next = match self.backwards.last() {
            Some(head) => head.previous,
            None if checked.is_none_or(|checked| checked < newest.size) => newest.size,
            None => return None,
        };
        self.reading = Some(next);
        Some(next)
    }

    /// The head at `size` was read, or not.
    pub fn read(&mut self, size: u64, head: Option<LogHead>, now_ms: u64) -> Result<(), LogFault> {
        if self.reading.take() != Some(size) {
            return Ok(());
        }
        let Some(head) = head else {
            self.not_before_ms = now_ms + self.retry_ms;
            return Ok(());
        };
        let outcome = self.take(size, head);
        if outcome.is_err() {
            // Told once; the watch goes on from what the run's head names next.
            self.checked = None;
            self.backwards.clear();
            self.not_before_ms = now_ms + self.retry_ms;
        }
        outcome
    }

    fn take(&mut self, size: u64, head: LogHead) -> Result<(), LogFault> {
        if head.frontier.size() != size || !head.frontier.is_well_formed() || head.previous >= size {
            return Err(LogFault::NotAnExtension(size));
        }
        match self.backwards.last() {
            Some(above) => above.extends(&head.frontier)?,
            None if self.newest.is_some_and(|newest| newest.size == size && newest != LogRef::from(&head.frontier)) => {
                return Err(LogFault::OtherRoot(size));
            }
            None => {}
        }
        let previous = head.previous;
        self.backwards.push(head);
        match &self.checked {
            Some(checked) if previous == checked.size() => {
                if let Some(first) = self.backwards.last() {
                    first.extends(checked)?;
                }
            }
            Some(checked) if previous > checked.size() && self.backwards.len() < BACKWARDS_MAX => return Ok(()),
            Some(checked) if previous < checked.size() => return Err(LogFault::NotAnExtension(size)),
            _ => self.begin(),
        }
        for head in std::mem::take(&mut self.backwards).into_iter().rev() {
            for entry in head.entries.iter().filter(|entry| entry.kind == LogKind::Commitment) {
                self.note(entry.document);
            }
            self.checked = Some(head.frontier);
        }
        Ok(())
    }

    /// The watch begins here: what was logged before is not known, and from which step on that does not matter, is. Heads that came while
    /// the first one could not be read have moved it.
    fn begin(&mut self) {
        self.first_t = self.fresh_t;
        self.expected.clear();
    }

    fn note(&mut self, commitment: Digest) {
        self.expected.remove(&commitment);
        if self.logged.insert(commitment) {
            self.logged_order.push_back(commitment);
            if self.logged_order.len() > REMEMBERED
                && let Some(oldest) = self.logged_order.pop_front()
            {
                self.logged.remove(&oldest);
            }
        }
    }

    /// A merge was published: its commitments belong into the log. One record may commit to several outer steps; it is logged once.
    pub fn expect(&mut self, merge: &MergeManifest) {
        if self.checked.is_none() || merge.t < self.first_t {
            return;
        }
        for contribution in merge.accepted() {
            if !self.logged.contains(&contribution.commitment) {
                self.expected.insert(contribution.commitment, self.heard_ms + LATE_MS);
            }
        }
    }

    /// Whether the run's head names a log that was not checked to its end.
    fn is_behind(&self) -> bool {
        self.newest.is_some_and(|newest| newest.size > self.checked.as_ref().map_or(0, Frontier::size))
    }

    /// Commitments that should be in the log by now. Each is told once.
    pub fn overdue(&mut self) -> Vec<Digest> {
        if self.is_behind() {
            return Vec::new();
        }
        let is_late = |(_, until_ms): &(&Digest, &u64)| **until_ms <= self.heard_ms;
        let overdue: Vec<Digest> = self.expected.iter().filter(is_late).map(|(digest, _)| *digest).collect();
        for commitment in &overdue {
            self.expected.remove(commitment);
        }
        overdue
    }

    pub fn deadline(&self) -> Option<u64> {
        (self.is_behind() && self.reading.is_none() && self.not_before_ms > 0).then_some(self.not_before_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fixture::{contribution, merge};
    use protocol::Reason;
    use protocol::log::LogEntry;

    fn commitment(number: u64) -> Digest {
        Digest::blake3(&number.to_le_bytes())
    }

    /// Heads of a log with so many commitments in each.
    fn heads(counts: &[u64]) -> Vec<LogHead> {
        let mut frontier = Frontier::default();
        let mut number = 0;
        let mut head = |count: &u64| {
            let previous = frontier.size();
            let entries: Vec<LogEntry> =
                (0..*count).map(|n| LogEntry { kind: LogKind::Commitment, document: commitment(number + n) }).collect();
            number += count;
            entries.iter().for_each(|entry| frontier.append(entry));
            LogHead { previous, entries, frontier: frontier.clone() }
        };
        counts.iter().map(&mut head).collect()
    }

    fn named(head: &LogHead) -> LogRef {
        LogRef::from(&head.frontier)
    }

    /// Reads what is wanted until nothing is; gives the first fault.
    fn catch_up(monitor: &mut LogMonitor, heads: &[LogHead]) -> Result<usize, LogFault> {
        let mut reads = 0;
        while let Some(size) = monitor.wanted(0) {
            let head = heads.iter().find(|head| head.frontier.size() == size).cloned();
            monitor.read(size, head, 0)?;
            reads += 1;
        }
        Ok(reads)
    }

    #[test]
    fn the_watch_follows_head_by_head_however_many_it_missed() {
        let heads = heads(&[3, 1, 5, 2, 9]);
        let mut monitor = LogMonitor::new(100);
        monitor.follow(named(&heads[0]), 4, 0).unwrap();
        assert_eq!(catch_up(&mut monitor, &heads), Ok(1));
        monitor.follow(named(&heads[4]), 9, 0).unwrap();
        assert_eq!(catch_up(&mut monitor, &heads), Ok(4));
        assert_eq!(monitor.wanted(0), None);
        assert_eq!(monitor.deadline(), None);
    }

    #[test]
    fn an_unreadable_head_is_read_again_after_a_pause() {
        let heads = heads(&[3]);
        let mut monitor = LogMonitor::new(100);
        monitor.follow(named(&heads[0]), 0, 0).unwrap();
        assert_eq!(monitor.wanted(0), Some(3));
        monitor.read(3, None, 50).unwrap();
        assert_eq!((monitor.wanted(149), monitor.deadline()), (None, Some(150)));
        assert_eq!(monitor.wanted(150), Some(3));
    }

    #[test]
    fn what_was_logged_while_the_first_head_could_not_be_read_is_not_missed() {
        let heads = heads(&[2, 2, 2, 2]);
        let merged = |t: u64, number: u64| {
            let mut one = contribution(1, 0, 10, Reason::None);
            one.commitment = commitment(number);
            merge(t, 1, vec![one])
        };
        let mut monitor = LogMonitor::new(100);
        // The watch would begin with the first head, whose object does not come; then with the third. What the second holds nobody reads.
        monitor.follow(named(&heads[0]), 3, 0).unwrap();
        assert_eq!(monitor.wanted(0), Some(2));
        monitor.read(2, None, 0).unwrap();
        monitor.expect(&merged(3, 2));
        monitor.follow(named(&heads[2]), 5, 60_000).unwrap();
        assert_eq!(monitor.wanted(60_000), Some(6));
        monitor.read(6, Some(heads[2].clone()), 60_000).unwrap();
        monitor.expect(&merged(4, 3));
        // From here on everything is seen.
        monitor.expect(&merged(5, 77));
        for minute in 2..14 {
            monitor.follow(named(&heads[2]), 6, minute * 60_000).unwrap();
        }
        assert_eq!(monitor.overdue(), [commitment(77)]);
    }

    #[test]
    fn a_log_that_goes_back_forks_or_drops_an_entry_is_told() {
        let honest = heads(&[3, 2, 4]);
        let mut begun = LogMonitor::new(100);
        begun.follow(named(&honest[1]), 0, 0).unwrap();
        catch_up(&mut begun, &honest).unwrap();

        assert_eq!(begun.clone().follow(named(&honest[0]), 0, 0), Err(LogFault::OtherRoot(3)), "it went back");
        let mut forked = Frontier::default();
        (0..5).for_each(|n| forked.append(&LogEntry { kind: LogKind::Merge, document: commitment(n) }));
        assert_eq!(begun.clone().follow(LogRef::from(&forked), 0, 0), Err(LogFault::OtherRoot(5)), "another root for a known size");

        let mut other = heads(&[2, 3, 4]);
        other[1].entries.swap(0, 1);
        let mut monitor = begun.clone();
        monitor.follow(named(&other[2]), 0, 0).unwrap();
        assert!(catch_up(&mut monitor, &other).is_ok(), "the same entries in other pieces are the same log");
        let mut dropped = honest.clone();
        dropped[2].entries.remove(1);
        begun.follow(named(&honest[2]), 0, 0).unwrap();
        assert_eq!(catch_up(&mut begun, &dropped), Err(LogFault::NotAnExtension(9)));
    }

    #[test]
    fn a_merged_commitment_must_be_in_the_log_before_or_soon_after() {
        let heads = heads(&[2, 2]);
        let mut monitor = LogMonitor::new(100);
        monitor.follow(LogRef::from(&Frontier::default()), 3, 0).unwrap();
        let merged = |t: u64, numbers: &[u64]| {
            let mut one = |number: &u64| {
                let mut one = contribution(*number as u8, 0, 10, Reason::None);
                one.commitment = commitment(*number);
                one
            };
            merge(t, 1, numbers.iter().map(&mut one).collect())
        };
        monitor.expect(&merged(2, &[77]));
        monitor.follow(named(&heads[0]), 3, 0).unwrap();
        catch_up(&mut monitor, &heads).unwrap();
        monitor.expect(&merged(3, &[0, 1, 2]));
        monitor.expect(&merged(4, &[88]));
        monitor.follow(named(&heads[1]), 3, 0).unwrap();
        catch_up(&mut monitor, &heads).unwrap();
        // One record that committed to two steps, of which the second is merged later.
        monitor.expect(&merged(5, &[0, 2]));
        // The store is away for an hour: nobody can have seen anything.
        let mut now_ms = 3_600_000;
        let mut head = |monitor: &mut LogMonitor, pause_ms| {
            now_ms += pause_ms;
            monitor.follow(named(&heads[1]), 3, now_ms).unwrap();
            monitor.overdue()
        };
        assert!(head(&mut monitor, 0).is_empty());
        for _ in 0..7 {
            assert!(head(&mut monitor, 60_000).is_empty(), "heads came for less than ten minutes");
        }
        // The log was extended, and what came to it is not read yet.
        let mut longer = heads[1].frontier.clone();
        longer.append(&LogEntry { kind: LogKind::Commitment, document: commitment(88) });
        let mut behind = monitor.clone();
        behind.follow(LogRef::from(&longer), 3, 3_600_000 + 1_000_000).unwrap();
        assert!(behind.overdue().is_empty());
        assert_eq!(head(&mut monitor, 60_000), [commitment(88)], "and step 2 may have been open before the watch began");
        assert!(head(&mut monitor, 60_000).is_empty(), "it is told once");
    }
}
