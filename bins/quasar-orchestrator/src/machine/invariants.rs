//! What holds for a machine between two inputs, whatever they were. The names are those of `docs/reliability.md`: debug builds look at
//! themselves, and the simulation looks at the machines of its worlds.

use std::collections::BTreeSet;

use protocol::documents::RowRange;

use super::{OfferStage, Orchestrator, PullStage};

/// The name of an invariant that does not hold, and what is wrong.
pub type Broken = (&'static str, String);

impl Orchestrator {
    /// # Errors
    /// The first invariant that does not hold.
    pub fn check_invariants(&self) -> Result<(), Broken> {
        self.check_pulls()?;
        self.check_leases()?;
        self.check_bans()
    }

    fn check_pulls(&self) -> Result<(), Broken> {
        let open = || self.pulls.iter().filter(|(_, pull)| pull.stage == PullStage::Open);
        let fragments: BTreeSet<u16> = open().map(|(_, pull)| pull.fragment).collect();
        if fragments.len() != open().count() || fragments.len() > usize::from(self.parameters().overlap) + 1 {
            return Err(("one_pull_per_fragment", format!("{} open pulls of fragments {fragments:?}", open().count())));
        }
        for (t, pull) in &self.pulls {
            if self.is_closed(*t) || *t >= self.next_t {
                return Err(("merged_once", format!("step {t} is pulled, of those below {} it is closed or not begun", self.next_t)));
            }
            let count = |is_of: fn(OfferStage) -> bool| pull.offers.values().filter(|offer| is_of(offer.stage)).count();
            if pull.stage == PullStage::Open && pull.counts() != (count(OfferStage::is_accepted), count(OfferStage::is_pending)) {
                return Err(("accepted_is_merged", format!("step {t} counts other offers than it has: {:?}", pull.counts())));
            }
        }
        Ok(())
    }

    fn check_leases(&self) -> Result<(), Broken> {
        let held = self.leases.values().filter(|record| !record.ended || record.booking.is_some());
        let rows: u64 = held.flat_map(|record| &record.lease.rows).map(RowRange::rows).sum();
        let leased = self.ledger.totals().leased_rows;
        if rows != leased {
            return Err(("rows_once", format!("leases hold {rows} rows, the ledger counts {leased}")));
        }
        for (slot, learner) in &self.learners {
            let is_its = |id: &u64| self.leases.get(id).is_some_and(|record| record.slot == *slot && !record.ended);
            if let Some(id) = learner.leases.iter().find(|id| !is_its(id)) {
                return Err(("rows_once", format!("lease {id} is over, or not of {}", slot.0.short())));
            }
        }
        Ok(())
    }

    fn check_bans(&self) -> Result<(), Broken> {
        let holder = self.open_leases().map(|(_, slot)| slot).find(|slot| self.banned.contains_key(&slot.0));
        let open = self.pulls.values().filter(|pull| pull.stage == PullStage::Open);
        let offerer = open.flat_map(|pull| pull.offers.keys().copied()).find(|slot| self.banned.contains_key(&slot.0));
        match holder.or(offerer) {
            Some(slot) => Err(("banned_is_left_out", format!("{} holds rows, or answers a pull", slot.0.short()))),
            None => Ok(()),
        }
    }
}
