//! The leases of the job, in order of their numbers: which one is being trained, whose tokens are here, which are used up.

use std::collections::BTreeMap;

use protocol::documents::{Job, Lease, RowRange};

use super::io::Trouble;

/// Leases that are kept in mind at a time: the current one and those that follow.
const LEASES_MAX: usize = 8;
/// Most rows in one lease: their order is held in memory.
const ROWS_MAX: u64 = 1 << 24;
/// Pause before tokens are tried again.
const RETRY_MS: u64 = 1_000;
/// With so many steps left and no next lease, the job is looked at eagerly.
const LOW_STEPS: u32 = 8;

#[derive(Clone, Debug)]
struct Entry {
    lease: Lease,
    /// Steps whose rows were taken.
    step: u32,
    tokens: Tokens,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Tokens {
    Missing { not_before_ms: u64 },
    Fetching,
    Here,
}

/// What a new job or the passing of time changed.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Changes {
    pub(super) begun: Vec<u64>,
    /// Ended before all steps were done.
    pub(super) ended: Vec<u64>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Leases {
    open: BTreeMap<u64, Entry>,
    /// Leases up to this number are over for this session.
    over: u64,
    used_up: u64,
    /// The lease that was trained last, and the steps done in it: what records and commitments name.
    last: Option<(u64, u32)>,
}

fn rows_of(lease: &Lease) -> u64 {
    lease.rows.iter().map(RowRange::rows).fold(0, u64::saturating_add)
}

/// Steps for which the lease has rows.
fn steps_of(lease: &Lease) -> u32 {
    let by_rows = rows_of(lease).div_ceil(u64::from(lease.batch_rows.max(1)));
    lease.steps.min(u32::try_from(by_rows).unwrap_or(u32::MAX))
}

fn is_sound(lease: &Lease) -> bool {
    lease.batch_rows > 0 && lease.rows.iter().all(|range| range.start < range.end) && rows_of(lease) <= ROWS_MAX && steps_of(lease) > 0
}

impl Leases {
    /// Takes over the job's leases. Leases that it does not name any more have ended.
    pub(super) fn set_job(&mut self, job: &Job, now_ms: u64) -> Changes {
        let mut changes = Changes::default();
        let mut named: Vec<&Lease> = job.leases.iter().filter(|lease| is_sound(lease) && lease.deadline_ms > now_ms).collect();
        named.sort_by_key(|lease| lease.id);
        named.truncate(LEASES_MAX);
        let gone: Vec<u64> = self.open.keys().copied().filter(|id| !named.iter().any(|lease| lease.id == *id)).collect();
        for id in gone {
            self.end(id);
            changes.ended.push(id);
        }
        for lease in named {
            if lease.id > self.over && !self.open.contains_key(&lease.id) {
                self.open.insert(lease.id, Entry { lease: lease.clone(), step: 0, tokens: Tokens::Missing { not_before_ms: 0 } });
                changes.begun.push(lease.id);
            }
        }
        changes
    }

    /// Ends leases whose deadline has passed: their rows have returned.
    pub(super) fn expire(&mut self, now_ms: u64) -> Vec<u64> {
        let gone: Vec<u64> = self.open.values().filter(|entry| entry.lease.deadline_ms <= now_ms).map(|entry| entry.lease.id).collect();
        for id in &gone {
            self.end(*id);
        }
        gone
    }

    fn end(&mut self, id: u64) {
        self.open.remove(&id);
        self.over = self.over.max(id);
    }

    fn first(&self) -> Option<&Entry> {
        self.open.values().next()
    }

    /// The next step to train: lease, step in it, and the run's learning-rate index.
    pub(super) fn next_step(&self) -> Option<(u64, u32, u64)> {
        let entry = self.first()?;
        let index = entry.lease.schedule_start + u64::from(entry.step);
        (entry.tokens == Tokens::Here).then_some((entry.lease.id, entry.step, index))
    }

    /// The rows of the current step were taken, with or without success; gives the lease's number if they were the last.
    pub(super) fn step_taken(&mut self, lease: u64) -> Option<u64> {
        let entry = self.open.get_mut(&lease)?;
        entry.step += 1;
        self.last = Some((lease, entry.step));
        if entry.step < steps_of(&entry.lease) {
            return None;
        }
        self.end(lease);
        self.used_up += 1;
        Some(lease)
    }

    /// Leases of which every step was taken.
    pub(super) fn used_up(&self) -> u64 {
        self.used_up
    }

    /// Lease and steps done in it; zeros before the first.
    pub(super) fn cursor(&self) -> (u64, u32) {
        match (self.first(), self.last) {
            (Some(entry), Some((lease, step))) if entry.lease.id == lease => (lease, step),
            // Before the first step of a lease, the one before it is still what commitments belong to.
            (_, Some(last)) => last,
            (Some(entry), None) => (entry.lease.id, 0),
            (None, None) => (0, 0),
        }
    }

    /// Whether more leases should be there: none waits behind the current one, which runs low.
    pub(super) fn runs_low(&self) -> bool {
        let left = |entry: &Entry| steps_of(&entry.lease).saturating_sub(entry.step);
        self.open.len() < 2 && self.first().is_none_or(|entry| left(entry) <= LOW_STEPS)
    }

    /// Leases whose tokens are to be fetched now.
    pub(super) fn missing_tokens(&self, now_ms: u64) -> Vec<Lease> {
        let is_due = |entry: &&Entry| matches!(entry.tokens, Tokens::Missing { not_before_ms } if not_before_ms <= now_ms);
        self.open.values().filter(is_due).map(|entry| entry.lease.clone()).collect()
    }

    /// Whether tokens of some lease are missing.
    pub(super) fn wants_tokens(&self) -> bool {
        self.open.values().any(|entry| matches!(entry.tokens, Tokens::Missing { .. }))
    }

    pub(super) fn fetching(&mut self, lease: u64) {
        if let Some(entry) = self.open.get_mut(&lease) {
            entry.tokens = Tokens::Fetching;
        }
    }

    /// Gives whether anybody still wants these tokens.
    pub(super) fn fetched(&mut self, lease: u64, result: Result<(), Trouble>, now_ms: u64) -> bool {
        let Some(entry) = self.open.get_mut(&lease) else { return false };
        entry.tokens = match result {
            Ok(()) => Tokens::Here,
            Err(_) => Tokens::Missing { not_before_ms: now_ms + RETRY_MS },
        };
        true
    }

    /// When something changes by itself: a lease ends, a fetch is tried again.
    pub(super) fn deadline(&self, now_ms: u64) -> Option<u64> {
        let retry = |entry: &Entry| match entry.tokens {
            Tokens::Missing { not_before_ms } if not_before_ms > now_ms => Some(not_before_ms),
            _ => None,
        };
        self.open.values().flat_map(|entry| [Some(entry.lease.deadline_ms), retry(entry)]).flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use protocol::{AccountId, Digest};

    use super::*;

    fn lease(id: u64, steps: u32) -> Lease {
        let rows = vec![RowRange { shard: "s".into(), start: 0, end: 8 }];
        Lease { id, rows, seed: Digest::ZERO, batch_rows: 4, steps, schedule_start: 10 * id, deadline_ms: 1_000 }
    }

    fn job(leases: Vec<Lease>) -> Job {
        Job { hotkey: AccountId([1; 32]), slot: 0, session_epoch: 1, leases }
    }

    #[test]
    fn leases_are_trained_in_order_and_each_step_once() {
        let mut leases = Leases::default();
        assert_eq!(leases.set_job(&job(vec![lease(6, 2), lease(5, 2)]), 0).begun, [5, 6]);
        assert_eq!(leases.next_step(), None, "tokens are not here yet");
        for id in [5, 6] {
            assert!(leases.fetched(id, Ok(()), 0));
        }
        assert_eq!(leases.next_step(), Some((5, 0, 50)));
        assert_eq!(leases.cursor(), (5, 0));
        assert_eq!(leases.step_taken(5), None);
        assert_eq!((leases.next_step(), leases.cursor()), (Some((5, 1, 51)), (5, 1)));
        assert_eq!(leases.step_taken(5), Some(5));
        assert_eq!((leases.next_step(), leases.cursor()), (Some((6, 0, 60)), (5, 2)));
        assert!(leases.set_job(&job(vec![lease(5, 2), lease(6, 2)]), 0).begun.is_empty(), "a used-up lease does not begin again");
    }

    #[test]
    fn a_lease_has_no_more_steps_than_rows_and_a_lease_without_rows_is_no_lease() {
        let mut leases = Leases::default();
        leases.set_job(&job(vec![lease(1, 100)]), 0);
        leases.fetched(1, Ok(()), 0);
        assert_eq!((leases.step_taken(1), leases.step_taken(1)), (None, Some(1)));
        let empty = Lease { rows: vec![], ..lease(2, 2) };
        let backwards = Lease { rows: vec![RowRange { shard: "s".into(), start: 8, end: 0 }], ..lease(3, 2) };
        assert!(leases.set_job(&job(vec![empty, backwards]), 0).begun.is_empty());
    }

    #[test]
    fn a_lease_ends_when_the_job_drops_it_or_its_deadline_passes() {
        let mut leases = Leases::default();
        leases.set_job(&job(vec![lease(1, 2), lease(2, 2)]), 0);
        assert_eq!(leases.set_job(&job(vec![lease(2, 2)]), 0), Changes { begun: vec![], ended: vec![1] });
        assert_eq!(leases.deadline(0), Some(1_000));
        assert_eq!(leases.expire(1_000), [2]);
        assert!(!leases.fetched(2, Ok(()), 0));
    }
}
