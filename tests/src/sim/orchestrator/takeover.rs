//! Which memory a writer that begins goes on from, decided as `quasar_orchestrator::takeover` does: its own journal if nobody wrote
//! since, else the bucket, read by the code of a real successor.

use std::rc::Rc;

use bytes::Bytes;
use daemon::{Failure, Machine};
use protocol::AccountId;
use protocol::documents::{Head, Progress};
use protocol::envelope::{Document, EnvelopeError, Expect, Verified};
use quasar_orchestrator::machine::{Input, Orchestrator};
use quasar_orchestrator::takeover::{Bucket, gather, has_caught_up};
use storage::PutCondition;

use super::super::executor::Life;
use super::super::world::World;
use super::{Disk, Hands, decode, encode};

impl Bucket for Hands {
    async fn read(&self, key: &str, _limit: u64) -> Result<Option<Bytes>, Failure> {
        Ok(self.get_present(key).await)
    }

    fn open<D: Document>(&self, bytes: &[u8]) -> Result<Verified<D>, EnvelopeError> {
        self.world.open_office(bytes)
    }

    fn open_record(&self, bytes: &[u8], hotkey: &AccountId) -> Result<Verified<Progress>, EnvelopeError> {
        self.world.plan.scheme.open(bytes, &self.world.context, Expect::Account(hotkey), None)
    }
}

impl World {
    /// The life of a process until its machine runs: it opens its journal, stands by for the lease, claims the head, and remembers.
    pub(super) async fn lead(self: Rc<Self>, hands: Rc<Hands>, life: Life) {
        let host = hands.host;
        let last = hands.last_writer().await;
        let instances = {
            let mut node = self.orchestrators[host].borrow_mut();
            if last.is_some_and(|last| node.disk.instance != Some(last)) {
                node.put_journal_aside();
            }
            [node.instance(), node.fresh_instance()]
        };
        let (epoch, is_own) = hands.acquire(instances).await;
        {
            let keeper = hands.clone();
            self.executor.spawn(life, async move { keeper.keep().await });
        }
        self.watch.borrow_mut().claimed(epoch, hands.id);
        let head = hands.claim_head(epoch).await;
        let journal = if is_own { self.orchestrators[host].borrow().disk.replayed() } else { None };
        let machine = match journal.filter(|machine| !machine.is_behind(&head)) {
            Some(machine) => {
                self.watch.borrow_mut().recovered(&self, host, &encode(&machine));
                machine
            }
            None => {
                let (taken_ms, mut machine) = match hands.get_present(&self.run.snapshot()).await {
                    Some(bytes) => Orchestrator::from_snapshot(&bytes).expect("our own snapshot"),
                    None => (0, Orchestrator::new(self.setup.clone())),
                };
                let overlap = self.plan.parameters.overlap;
                let facts = gather(&*hands, &self.run, overlap, &machine, head.clone()).await.expect("the bucket holds together");
                let now_ms = self.clock_ms(hands.id).max(taken_ms);
                let found = (facts.leases.clone(), facts.orders.clone());
                machine.handle(now_ms, Input::Recovered { facts: Box::new(facts) });
                while machine.poll_effect().is_some() {}
                has_caught_up(&machine, &head).expect("the bucket leads to the head");
                let mut node = self.orchestrators[host].borrow_mut();
                let snapshot = Some((now_ms, encode(&machine)));
                node.disk = Disk { snapshot, entries: Vec::new(), instance: hands.instance(), ..std::mem::take(&mut node.disk) };
                self.watch.borrow_mut().succeeded(&self, host, &machine, &found);
                machine
            }
        };
        self.watch.borrow_mut().recalls(&self, &machine);
        self.begin_orchestrating(&hands, machine, epoch);
    }
}

impl Hands {
    /// Signs the head that lies there anew, under this writer's epoch.
    async fn claim_head(&self, epoch: u64) -> Head {
        loop {
            let read = || async { self.world.get(self.id, self.world.head_key(), None).await.ok().flatten() };
            let object = self.persist(read).await;
            let found = self.open::<Head>(&object.bytes).expect("our own head");
            self.raise_sequence(found.header.sequence);
            // What was read may be a successor's already.
            self.confirm().await;
            let claimed = Head { epoch, ..found.document };
            let bytes = self.sign_ours(&claimed, &self.world.context);
            let condition = PutCondition::IfMatch(object.etag.unwrap_or_default());
            self.hold().await;
            if let Ok(tag) = self.world.put(self.id, self.world.head_key(), bytes, condition).await {
                *self.head_etag.borrow_mut() = Some(tag);
                return claimed;
            }
        }
    }
}

impl Disk {
    /// The machine that the journal remembers, if there is one.
    pub(super) fn replayed(&self) -> Option<Orchestrator> {
        let mut machine = decode(&self.snapshot.as_ref()?.1);
        for (now_ms, input) in &self.entries {
            machine.handle(*now_ms, input.clone());
            while machine.poll_effect().is_some() {}
        }
        Some(machine)
    }
}
