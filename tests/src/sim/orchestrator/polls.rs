//! What the orchestrator looks at again and again: the records of its learners, and the chain.

use std::collections::HashMap;
use std::rc::Rc;

use chain::Chain;
use futures::FutureExt;
use protocol::documents::{Order, Progress};
use protocol::envelope::Expect;
use quasar_orchestrator::machine::{Guest, Input, Slot, StoredOrder};

use super::Hands;

/// Silent slots are looked at in each so many-th round.
const SILENT_FACTOR: u64 = 10;
const BLOCKS_PER_METAGRAPH: u64 = 10;

impl Hands {
    pub(super) async fn poll_progress(self: Rc<Self>) {
        let mut etags: HashMap<Slot, String> = HashMap::new();
        let mut sequences: HashMap<Slot, u64> = HashMap::new();
        let mut round = 0u64;
        loop {
            // The reads of a round go out together.
            self.world.executor.sleep(self.world.plan.latency_ms).await;
            let slots: Vec<Slot> = {
                let watched = self.watched.borrow();
                let silent = if round.is_multiple_of(SILENT_FACTOR) { watched.1.as_slice() } else { &[] };
                watched.0.iter().chain(silent).copied().collect()
            };
            round += 1;
            for slot in slots {
                let keys = self.world.slot_keys(slot);
                let found = self.world.get_soon(self.id, &keys.progress, etags.get(&slot).map(String::as_str));
                let Ok(Some(object)) = found else { continue };
                if let Some(etag) = object.etag {
                    etags.insert(slot, etag);
                }
                let now_ms = self.world.clock_ms(self.id);
                let opened =
                    self.world.plan.scheme.open::<Progress>(&object.bytes, &self.world.context, Expect::Account(&slot.0), Some(now_ms));
                let Ok(verified) = opened else {
                    self.world.watch.borrow_mut().records_refused += 1;
                    continue;
                };
                if !verified.document.is_well_formed(usize::from(self.world.plan.parameters.fragments))
                    || sequences.get(&slot).is_some_and(|seen| verified.header.sequence < *seen)
                {
                    continue;
                }
                sequences.insert(slot, verified.header.sequence);
                self.records.borrow_mut().insert(slot, (verified.id, object.bytes));
                let is_current = verified.header.is_current(now_ms);
                self.tell(Input::Progress { slot, id: verified.id, is_current, record: Box::new(verified.document) });
            }
            self.world.executor.sleep(self.world.plan.parameters.poll_ms).await;
        }
    }

    pub(super) async fn poll_orders(self: Rc<Self>, taken: u64) {
        let interval_ms = (self.world.plan.parameters.poll_ms * 5).clamp(200, 5_000);
        let mut next = taken + 1;
        while next <= self.world.orders().len() as u64 {
            self.world.executor.sleep(interval_ms).await;
            let Ok(Some(object)) = self.world.get(self.id, &self.world.run.order(next), None).await else { continue };
            let opened = self.world.open_office::<Order>(&object.bytes);
            self.tell(Input::Order { order: StoredOrder::new(next, opened) });
            next += 1;
        }
    }

    pub(super) async fn poll_chain(self: Rc<Self>) {
        let interval_ms = (self.world.plan.parameters.poll_ms * 5).clamp(500, 6_000);
        let (mut block, mut guests, mut round) = (0, Vec::new(), 0u64);
        loop {
            if let Some(Ok(head)) = self.world.chain.head().now_or_never()
                && head.number > block
            {
                block = head.number;
                self.tell(Input::Block { number: block });
            }
            if (round.is_multiple_of(BLOCKS_PER_METAGRAPH) || guests.is_empty())
                && let Some(Ok(metagraph)) = self.world.chain.metagraph(self.world.context.netuid).now_or_never()
            {
                let guest = |neuron: &chain::Neuron| Guest {
                    hotkey: neuron.hotkey,
                    validator: neuron.validator_permit,
                    recipient: chain::certificate::recipient(&neuron.hotkey, None),
                };
                let now: Vec<Guest> = metagraph.neurons.iter().map(guest).collect();
                if now != guests {
                    guests.clone_from(&now);
                    self.tell(Input::Metagraph { guests: now });
                }
            }
            round += 1;
            self.world.executor.sleep(interval_ms).await;
        }
    }
}
