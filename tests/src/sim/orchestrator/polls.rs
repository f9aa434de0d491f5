//! What the orchestrator looks at again and again: the records of its learners, and the chain.

use std::collections::HashMap;
use std::rc::Rc;

use chain::Chain;
use futures::FutureExt;
use protocol::documents::{Order, Progress};
use protocol::envelope::Expect;
use quasar_orchestrator::machine::{Guest, Input, Slot};

use super::super::executor::Life;
use super::super::world::World;
use super::NODE;

/// Silent slots are looked at in each so many-th round.
const SILENT_FACTOR: u64 = 10;
const BLOCKS_PER_METAGRAPH: u64 = 10;

impl World {
    pub(super) async fn poll_progress(self: Rc<Self>, life: Life) {
        let hands = self.orchestrator.borrow().hands.clone();
        let mut etags: HashMap<Slot, String> = HashMap::new();
        let mut sequences: HashMap<Slot, u64> = HashMap::new();
        let mut round = 0u64;
        loop {
            // The reads of a round go out together.
            self.executor.sleep(self.plan.latency_ms).await;
            let slots: Vec<Slot> = {
                let watched = hands.watched.borrow();
                let silent = if round.is_multiple_of(SILENT_FACTOR) { watched.1.as_slice() } else { &[] };
                watched.0.iter().chain(silent).copied().collect()
            };
            round += 1;
            for slot in slots {
                let keys = self.slot_keys(slot);
                let found = self.get_soon(NODE, &keys.progress, etags.get(&slot).map(String::as_str));
                let Ok(Some(object)) = found else { continue };
                if let Some(etag) = object.etag {
                    etags.insert(slot, etag);
                }
                let now_ms = self.clock_ms(NODE);
                let opened = self.plan.scheme.open::<Progress>(&object.bytes, &self.context, Expect::Account(&slot.0), Some(now_ms));
                let Ok(verified) = opened else {
                    self.watch.borrow_mut().records_refused += 1;
                    continue;
                };
                if !verified.document.is_well_formed(usize::from(self.plan.parameters.fragments))
                    || sequences.get(&slot).is_some_and(|seen| verified.header.sequence < *seen)
                {
                    continue;
                }
                sequences.insert(slot, verified.header.sequence);
                hands.records.borrow_mut().insert(slot, (verified.id, object.bytes));
                self.tell_orchestrator(life, Input::Progress { slot, id: verified.id, record: Box::new(verified.document) });
            }
            self.executor.sleep(self.plan.parameters.poll_ms).await;
        }
    }

    pub(super) async fn poll_orders(self: Rc<Self>, life: Life, taken: u64) {
        let interval_ms = (self.plan.parameters.poll_ms * 5).clamp(200, 5_000);
        let mut next = taken + 1;
        while next <= self.plan.orders.len() as u64 {
            self.executor.sleep(interval_ms).await;
            let Ok(Some(object)) = self.get(NODE, &self.run.order(next), None).await else { continue };
            let office = Expect::Account(&self.office.account);
            let Ok(opened) = self.plan.scheme.open::<Order>(&object.bytes, &self.context, office, None) else { continue };
            self.tell_orchestrator(life, Input::Order { order: opened.document });
            next += 1;
        }
    }

    pub(super) async fn poll_chain(self: Rc<Self>, life: Life) {
        let interval_ms = (self.plan.parameters.poll_ms * 5).clamp(500, 6_000);
        let (mut block, mut guests, mut round) = (0, Vec::new(), 0u64);
        loop {
            if let Some(Ok(head)) = self.chain.head().now_or_never()
                && head.number > block
            {
                block = head.number;
                self.tell_orchestrator(life, Input::Block { number: block });
            }
            if (round.is_multiple_of(BLOCKS_PER_METAGRAPH) || guests.is_empty())
                && let Some(Ok(metagraph)) = self.chain.metagraph(self.context.netuid).now_or_never()
            {
                let guest = |neuron: &chain::Neuron| Guest {
                    hotkey: neuron.hotkey,
                    validator: neuron.validator_permit,
                    recipient: chain::certificate::recipient(&neuron.hotkey, None),
                };
                let now: Vec<Guest> = metagraph.neurons.iter().map(guest).collect();
                if now != guests {
                    guests.clone_from(&now);
                    self.tell_orchestrator(life, Input::Metagraph { guests: now });
                }
            }
            round += 1;
            self.executor.sleep(interval_ms).await;
        }
    }
}
