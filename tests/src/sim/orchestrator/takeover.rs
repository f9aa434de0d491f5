//! Going on without the disk: the snapshot in the bucket, and what lies write-once beyond it.

use daemon::Machine;
use daemon::driver::DriverOptions;
use protocol::Digest;
use protocol::documents::{CatalogPage, Head, Job, MergeManifest, Tape};
use protocol::envelope::{Document, Expect, Verified};
use protocol::log::{LOG_ENTRIES_MAX, LogHead};
use quasar_orchestrator::machine::{BucketFacts, Input, Orchestrator, StepFact, StoredPage};

use super::super::executor::Life;
use super::super::world::World;

impl World {
    /// The machine of a writer that begins with an empty disk, and the sequence number that its documents have to be above.
    pub(super) fn recover_from_bucket(&self, life: Life, now_ms: u64) -> (u64, Orchestrator) {
        let snapshot = self.peek(&self.run.snapshot());
        let (taken_ms, mut machine) = match snapshot {
            Some(bytes) => Orchestrator::from_snapshot(&bytes).expect("our own snapshot"),
            None => (0, Orchestrator::new(self.setup.clone())),
        };
        // A run is created with a head; here the first writer writes it.
        let Some(head) = self.document::<Head>(self.head_key()) else { return (0, machine) };
        let facts = self.gather(&machine, head.document, life);
        machine.handle(now_ms.max(taken_ms), Input::Recovered { facts: Box::new(facts) });
        while machine.poll_effect().is_some() {}
        (head.header.sequence, machine)
    }

    fn document<D: Document>(&self, key: &str) -> Option<Verified<D>> {
        let bytes = self.peek(key)?;
        self.plan.scheme.open::<D>(&bytes, &self.context, Expect::Account(&self.office.account), None).ok()
    }

    fn gather(&self, machine: &Orchestrator, head: Head, epoch: Life) -> BucketFacts {
        let mut steps = Vec::new();
        let reach = u64::from(self.plan.parameters.overlap) + 2;
        let (mut t, mut absent) = (machine.closed_below(), 0);
        while t < head.outer_step || absent < reach {
            match self.document::<Tape>(&self.run.tape(t)) {
                None => absent += u64::from(t >= head.outer_step),
                Some(tape) => {
                    absent = 0;
                    if !machine.is_closed(t) {
                        steps.push(self.step(tape.document));
                    }
                }
            }
            t += 1;
        }
        let mut pages: Vec<StoredPage> = Vec::new();
        loop {
            let newest = pages.last().map_or(machine.newest_page(), |page| page.reference);
            let Some(bytes) = self.peek(&self.run.catalog(newest.page + 1)) else { break };
            let Some(page) = self.document::<CatalogPage>(&self.run.catalog(newest.page + 1)) else { break };
            pages.push(StoredPage::new(Digest::blake3(&bytes), &page.document));
        }
        let mut leases = Vec::new();
        for first in machine.unknown_leases_from(epoch) {
            let (mut id, mut absent) = (first, 0);
            while absent < DriverOptions::default().in_flight_max {
                match self.document::<Job>(&self.run.lease(id)) {
                    Some(job) => {
                        leases.push(job.document);
                        absent = 0;
                    }
                    None => absent += 1,
                }
                id += 1;
            }
        }
        let mut log = Vec::new();
        let mut size = head.log.size;
        while size > machine.log_size() {
            let Some(entry) = self.document::<LogHead>(&self.run.log(size)) else { break };
            size = entry.document.previous;
            log.push(entry.document);
        }
        log.reverse();
        let mut size = head.log.size.max(machine.log_size());
        let follows = |size: u64| {
            let mut next = (size + 1..=size + LOG_ENTRIES_MAX as u64).filter_map(|next| self.document::<LogHead>(&self.run.log(next)));
            next.find(|entry| entry.document.previous == size)
        };
        while let Some(entry) = follows(size) {
            size = entry.document.frontier.size();
            log.push(entry.document);
        }
        BucketFacts { epoch, head, steps, pages, leases, log }
    }

    fn step(&self, tape: Tape) -> StepFact {
        let Some(merge) = self.document::<MergeManifest>(&self.run.merge(tape.t)) else { return StepFact::Taped(tape) };
        let (manifest, id) = (Box::new(merge.document), merge.id);
        let keyframe = self.peek(&self.run.keyframe(manifest.fragment, manifest.version));
        StepFact::Merged { manifest, id, keyframe_length: keyframe.map_or(0, |bytes| bytes.len() as u64) }
    }
}
