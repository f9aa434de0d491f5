//! The rules of the writer lease, without a clock or a store: when it may be taken, and how long its holder may believe in it.

use protocol::KeyRef;
use protocol::documents::WriterLease;
use protocol::envelope::Verified;
use storage::PutCondition;

/// The holder believes in its lease for this share of its time, in percent: it stops before anybody may take over.
const TRUSTED_PERCENT: u64 = 80;

/// One moment on both clocks of a machine, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Never set; stands still while the machine is suspended.
    pub steady_ms: u64,
    pub wall_ms: u64,
}

/// What to do about somebody else's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Wait for it to end, but not for its holder to go on.
    ForItsEnd,
    /// Wait as long as it takes.
    Standby,
}

/// Somebody who wants to write.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Of the journal at hand.
    pub instance: [u8; 16],
    /// Of the journal that comes after it, should this one be history.
    pub next_instance: [u8; 16],
    pub host: String,
    pub lease_ms: u64,
    pub wait: Wait,
    /// Somebody else was seen to write: the journal at hand does not hold everything any more, whoever's lease lies there later.
    is_history: bool,
    /// The key that the newest root names. Holders with another one had their time.
    key: Option<KeyRef>,
    /// Tag of somebody else's lease, and since when it has stayed as it is.
    watched: Option<(String, u64)>,
}

/// What a candidate does after a look at the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    Claim(Claim),
    /// Somebody else has it; `is_new` at the first look at it as it is now.
    Wait {
        is_new: bool,
    },
    /// Somebody else goes on holding it.
    Refused,
}

/// A lease to write: it is held if the condition was met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub lease: WriterLease,
    pub condition: PutCondition,
    /// Whatever the holder before signed until its end, its sequence numbers are not above this.
    pub sequence_floor: u64,
    /// Nobody else has written since the journal at hand did: it holds everything.
    pub is_own: bool,
}

impl Candidate {
    /// `instances` of the journal at hand, and of the one after it.
    pub fn new([instance, next_instance]: [[u8; 16]; 2], host: String, lease_ms: u64, wait: Wait) -> Self {
        Self { instance, next_instance, host, lease_ms, wait, is_history: false, key: None, watched: None }
    }

    /// With the key that the newest root names.
    pub fn named(self, key: KeyRef) -> Self {
        Self { key: Some(key), ..self }
    }

    /// Decides upon the lease that lies there with its tag, read no later than `steady_ms`: it is taken at once if nobody has it,
    /// if it was given back, or if its holder worked with this very journal on this host, which no two processes open; else once it has
    /// stayed as it is for its whole time. Where it was held on another host, that one may have gone on with the original of this journal. One
    /// that is signed by another key than the root names ends after that time even if it is renewed: its holder has to notice within
    /// it, or is who the key was changed for.
    ///
    /// Once somebody else's lease was seen, the lease is taken for the next journal: whoever dies before that one is whole does not take the
    /// journal at hand for it.
    pub fn look(&mut self, steady_ms: u64, found: Option<(&Verified<WriterLease>, &str)>) -> Next {
        let is_elsewhere = |holder: &WriterLease| holder.instance != self.instance || holder.host != self.host;
        self.is_history |= found.is_some_and(|(verified, _)| is_elsewhere(&verified.document));
        let instance = if self.is_history { self.next_instance } else { self.instance };
        let lease = |epoch| WriterLease { epoch, instance, host: self.host.clone(), renewal: 0, released: false };
        let Some((verified, tag)) = found else {
            return Next::Claim(Claim { lease: lease(1), condition: PutCondition::IfAbsent, sequence_floor: 0, is_own: !self.is_history });
        };
        let holder = &verified.document;
        // Of the next journal is a lease whose claim was answered to nobody.
        let is_ours = [self.instance, self.next_instance].contains(&holder.instance) && holder.host == self.host;
        let is_own = !self.is_history;
        let is_replaced = self.key.is_some_and(|key| key != verified.header.signer);
        let stayed = |(known, since_ms): &(String, u64)| (is_replaced || known == tag) && steady_ms >= since_ms + self.lease_ms;
        if is_ours || holder.released || self.watched.as_ref().is_some_and(stayed) {
            // Readers count the numbers of each key by itself.
            let sequence_floor = if is_replaced { 0 } else { verified.header.sequence.saturating_add(2 * self.lease_ms) };
            let condition = PutCondition::IfMatch(tag.to_owned());
            return Next::Claim(Claim { lease: lease(holder.epoch.saturating_add(1)), condition, sequence_floor, is_own });
        }
        let is_new = self.watched.as_ref().is_none_or(|(known, _)| known != tag);
        if is_new && !is_replaced && self.watched.is_some() && self.wait == Wait::ForItsEnd {
            return Next::Refused;
        }
        if is_new {
            let since_ms = self.watched.as_ref().filter(|_| is_replaced).map_or(steady_ms, |(_, since_ms)| *since_ms);
            self.watched = Some((tag.to_owned(), since_ms));
        }
        Next::Wait { is_new }
    }
}

/// Until when a holder believes in its lease, by two clocks: a machine that was suspended has slept through one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trust {
    until: Moment,
}

impl Trust {
    /// After a renewal that was begun then and has succeeded.
    pub fn from(begun: Moment, lease_ms: u64) -> Self {
        let time_ms = lease_ms * TRUSTED_PERCENT / 100;
        Self { until: Moment { steady_ms: begun.steady_ms + time_ms, wall_ms: begun.wall_ms + time_ms } }
    }

    pub fn holds(&self, now: Moment) -> bool {
        now.steady_ms < self.until.steady_ms && now.wall_ms < self.until.wall_ms
    }
}

/// The lease of a holder that renews it.
pub fn renewed(held: &WriterLease) -> WriterLease {
    WriterLease { renewal: held.renewal.saturating_add(1), ..held.clone() }
}

/// Whether the lease that lies there is still the holder's, after a write of it met another one than it knew.
pub fn is_still(held: &WriterLease, found: &WriterLease) -> bool {
    (found.epoch, found.instance) == (held.epoch, held.instance)
}

#[cfg(test)]
mod tests {
    use protocol::documents::WRITER_LEASE_MS;
    use protocol::envelope::{Context, Expect, RunId, open_stored, sign};
    use protocol::{Ed25519Signer, Signer};

    use super::*;

    const CONTEXT: Context = Context { genesis: [1; 32], netuid: 24, run: RunId([2; 16]) };

    fn key() -> Ed25519Signer {
        Ed25519Signer::from_seed([3; 32])
    }

    fn signed(lease: &WriterLease, sequence: u64) -> Verified<WriterLease> {
        let signer = key();
        open_stored(&sign(lease, &CONTEXT, &signer, sequence, sequence), &CONTEXT, Expect::Key(&signer.key())).unwrap()
    }

    fn candidate(wait: Wait) -> Candidate {
        Candidate::new([[9; 16], [7; 16]], "host".into(), WRITER_LEASE_MS, wait).named(key().key())
    }

    fn lease() -> WriterLease {
        WriterLease { epoch: 4, instance: [8; 16], host: "other".into(), renewal: 7, released: false }
    }

    #[test]
    fn a_lease_is_taken_after_it_stayed_for_its_whole_time_and_each_renewal_begins_that_time_anew() {
        let mut standby = candidate(Wait::Standby);
        let held = signed(&lease(), 1_000);
        assert_eq!(standby.look(0, Some((&held, "a"))), Next::Wait { is_new: true });
        assert_eq!(standby.look(WRITER_LEASE_MS - 1, Some((&held, "a"))), Next::Wait { is_new: false });
        assert_eq!(standby.look(WRITER_LEASE_MS, Some((&held, "b"))), Next::Wait { is_new: true }, "it was renewed");
        let Next::Claim(claim) = standby.look(2 * WRITER_LEASE_MS, Some((&held, "b"))) else { panic!("it is over") };
        assert_eq!((claim.lease.epoch, claim.condition, claim.is_own), (5, PutCondition::IfMatch("b".into()), false));
        assert_eq!(claim.sequence_floor, 1_000 + 2 * WRITER_LEASE_MS);
    }

    #[test]
    fn nobody_waits_for_a_lease_that_was_given_back_or_was_its_own() {
        let released = signed(&WriterLease { released: true, ..lease() }, 5);
        assert!(matches!(candidate(Wait::ForItsEnd).look(0, Some((&released, "a"))), Next::Claim(Claim { is_own: false, .. })));
        let own = signed(&WriterLease { instance: [9; 16], host: "host".into(), ..lease() }, 5);
        assert!(matches!(candidate(Wait::ForItsEnd).look(0, Some((&own, "a"))), Next::Claim(Claim { is_own: true, .. })));
        assert!(matches!(candidate(Wait::ForItsEnd).look(0, None), Next::Claim(Claim { is_own: true, .. })));
    }

    #[test]
    fn a_copy_of_the_journal_on_another_host_takes_no_lease_from_whoever_works_with_the_original() {
        let held = signed(&WriterLease { instance: [9; 16], ..lease() }, 5);
        let mut copy = candidate(Wait::ForItsEnd);
        assert_eq!(copy.look(0, Some((&held, "a"))), Next::Wait { is_new: true });
        assert_eq!(copy.clone().look(10_000, Some((&held, "b"))), Next::Refused);
        // Nobody renews it; what the original wrote since lies in the bucket.
        let Next::Claim(claim) = copy.look(WRITER_LEASE_MS, Some((&held, "a"))) else { panic!("it is over") };
        assert_eq!((claim.lease.instance, claim.is_own), ([7; 16], false));
    }

    #[test]
    fn whoever_has_seen_somebody_else_write_takes_the_lease_for_a_journal_that_is_not_there_yet() {
        let mut standby = candidate(Wait::Standby);
        let own = signed(&WriterLease { instance: [9; 16], host: "host".into(), ..lease() }, 5);
        let Next::Claim(claim) = standby.look(0, Some((&own, "a"))) else { panic!("it was its own") };
        assert_eq!((claim.lease.instance, claim.is_own), ([9; 16], true));
        // Another one was quicker, and died.
        let other = signed(&lease(), 6);
        assert_eq!(standby.look(10, Some((&other, "b"))), Next::Wait { is_new: true });
        let Next::Claim(claim) = standby.look(10 + WRITER_LEASE_MS, Some((&other, "b"))) else { panic!("it is over") };
        assert_eq!((claim.lease.instance, claim.is_own), ([7; 16], false));
        // The claim was written, and its answer lost.
        let claimed = signed(&claim.lease, 7);
        let Next::Claim(claim) = standby.look(20 + WRITER_LEASE_MS, Some((&claimed, "c"))) else { panic!("it is ours") };
        assert_eq!((claim.lease.instance, claim.is_own), ([7; 16], false));
        // Started again before the journal was whole: this one is history.
        assert_eq!(candidate(Wait::Standby).look(0, Some((&signed(&lease(), 8), "d"))), Next::Wait { is_new: true });
    }

    #[test]
    fn whoever_does_not_stand_by_is_refused_once_the_lease_is_renewed() {
        let held = signed(&lease(), 5);
        let mut refused = candidate(Wait::ForItsEnd);
        assert_eq!(refused.look(0, Some((&held, "a"))), Next::Wait { is_new: true });
        assert_eq!(refused.look(10, Some((&held, "b"))), Next::Refused);
    }

    #[test]
    fn the_lease_of_a_replaced_key_is_waited_for_and_ends_after_its_time_however_often_it_is_renewed() {
        let mut successor = candidate(Wait::ForItsEnd).named(Ed25519Signer::from_seed([4; 32]).key());
        let held = signed(&WriterLease { epoch: u64::MAX, ..lease() }, u64::MAX);
        for (at, tag) in ["a", "b", "c"].into_iter().enumerate() {
            assert_eq!(successor.look(at as u64 * 10_000, Some((&held, tag))), Next::Wait { is_new: true });
        }
        let Next::Claim(claim) = successor.look(WRITER_LEASE_MS, Some((&held, "d"))) else { panic!("it is over") };
        assert_eq!(
            (claim.lease.epoch, claim.is_own, claim.sequence_floor),
            (u64::MAX, false, 0),
            "nothing overflows, nothing is inherited"
        );
        // With the same key, a number that cannot be followed is not followed by a small one.
        let Next::Claim(claim) =
            candidate(Wait::Standby).look(0, Some((&signed(&WriterLease { released: true, ..lease() }, u64::MAX), "a")))
        else {
            panic!("it was given back")
        };
        assert_eq!(claim.sequence_floor, u64::MAX);
    }

    #[test]
    fn trust_ends_on_whichever_clock_went_on() {
        let begun = Moment { steady_ms: 1_000, wall_ms: 500_000 };
        let trust = Trust::from(begun, WRITER_LEASE_MS);
        let after = |steady_ms: u64, wall_ms: u64| trust.holds(Moment { steady_ms: 1_000 + steady_ms, wall_ms: 500_000 + wall_ms });
        assert!(after(23_999, 23_999) && !after(24_000, 0) && !after(0, 24_000));
    }

    #[test]
    fn a_lease_is_still_ours_after_a_lost_answer_and_not_after_another_process_took_it() {
        let held = lease();
        assert!(is_still(&held, &renewed(&held)));
        assert!(!is_still(&held, &WriterLease { epoch: 5, ..held.clone() }));
        assert!(!is_still(&held, &WriterLease { instance: [1; 16], ..held.clone() }));
    }
}
