//! Going on without the disk: the snapshot in the bucket, and what lies write-once beyond it, read as a real successor reads it.

use bytes::Bytes;
use daemon::{Failure, Machine};
use futures::FutureExt;
use protocol::documents::Head;
use protocol::envelope::{Document, EnvelopeError, Expect, Verified};
use quasar_orchestrator::machine::{Input, Orchestrator};
use quasar_orchestrator::takeover::{Bucket, gather};

use super::super::executor::Life;
use super::super::world::World;

impl Bucket for World {
    async fn read(&self, key: &str, _limit: u64) -> Result<Option<Bytes>, Failure> {
        Ok(self.peek(key))
    }

    fn open<D: Document>(&self, bytes: &[u8]) -> Result<Verified<D>, EnvelopeError> {
        self.plan.scheme.open(bytes, &self.context, Expect::Account(&self.office.account), None)
    }
}

impl World {
    /// The machine of a writer that begins with an empty disk, and the sequence number that its documents have to be above.
    pub(super) fn recover_from_bucket(&self, life: Life, now_ms: u64) -> (u64, Orchestrator) {
        let snapshot = self.peek(&self.run.snapshot());
        let (taken_ms, mut machine) = match snapshot {
            Some(bytes) => Orchestrator::from_snapshot(&bytes).expect("our own snapshot"),
            None => (0, Orchestrator::new(self.setup.clone())),
        };
        // A run is created with a head; here the first writer writes it.
        let Some(bytes) = self.peek(self.head_key()) else { return (0, machine) };
        let found = self.open::<Head>(&bytes).expect("our own head");
        let head = Head { epoch: life, ..found.document };
        let gathered = gather(self, &self.run, self.plan.parameters.overlap, &machine, head).now_or_never();
        let facts = gathered.expect("the bucket answers at once").expect("the bucket holds together");
        machine.handle(now_ms.max(taken_ms), Input::Recovered { facts: Box::new(facts) });
        while machine.poll_effect().is_some() {}
        (found.header.sequence, machine)
    }
}
