//! What must always hold, whatever goes wrong: checked while the world runs, by looking at the bucket and at the machines.
//!
//! Each invariant has a name; a violation is reported with the time and with the command that replays its seed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytes::Bytes;
use protocol::audits::Selection;
use protocol::documents::{
    Action, CatalogPage, Commitment, Head, Job, Lease, LeaseEnd, MergeManifest, Order, Progress, RunState, Score, Tape, VerdictResult,
    VerdictReveal,
};
use protocol::envelope::{Document, peek};
use protocol::ledger::LedgerTotals;
use protocol::log::{Frontier, LogHead, LogKind};
use protocol::schedule::cycle_of;
use protocol::{AccountId, Digest, ShardManifest, codec};
use quasar_orchestrator::machine::{OfferStage, Orchestrator, PullStage, Slot, StoredOrder, StoredPage};
use storage::Presign;

mod end;

use super::books::Books;
use super::ear::Ear;
use super::net::Node;
use super::plan::Behaviour;
use super::tensors;
use super::world::World;

/// Violations that are told of one run.
const TOLD_MAX: usize = 20;
/// The ledger is added up after so many batches of inputs.
const LEDGER_EVERY: u64 = 32;

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub invariant: &'static str,
    pub at_ms: u64,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:.3} s: {}", self.invariant, self.at_ms as f64 / 1e3, self.what)
    }
}

/// The names, for the documentation and for a test that keeps both together.
pub const INVARIANTS: &[(&str, &str)] = &[
    ("merged_once", "each (fragment, version) comes from exactly one outer step, and each outer step has one manifest"),
    ("contribution_once", "a payload of a learner is merged at most once"),
    ("accepted_is_merged", "what was accepted before a pull closed is in its tape, and what is in the tape is in the manifest"),
    ("tape_fixes_merge", "a tape starts from the state that the step before it left, and is never contradicted"),
    (
        "bit_identical",
        "the states and keyframes in the bucket are those that the tapes give, bit for bit, whoever completed them; the newest eight are there",
    ),
    ("head_monotone", "the head's versions, steps, log and state never go back"),
    ("head_names_what_exists", "keyframes, catalog pages and log heads that the head names lie in the bucket, with these digests"),
    ("one_pull_per_fragment", "at most one open pull of a fragment, and at most τ + 1 in all"),
    ("ledger_conserves", "rows waiting, leased, done and lost add up to the rows of the shards; done tokens never fall, whoever writes"),
    (
        "rows_once",
        "a row is leased to one learner at a time, and comes again only when its whole shard is used up; the ledger books what is recorded",
    ),
    ("pages_stand", "a page of the catalog never changes, and its shards join the ledger with it"),
    ("evidence_before_grant", "an upload grant for a payload follows the write-once copy of its commitment"),
    ("evidence_holds_payload", "the commitment that a merged contribution names lies in the bucket and is one to that very payload"),
    ("write_once", "a write-once object is written on the condition that it is absent"),
    ("log_append_only", "each published head of the log extends the one before, and holds no entry twice"),
    ("log_is_complete", "every merge is in the log in the end, with the commitments that it merged before it"),
    ("journal_is_exact", "snapshot and journal give the very machine that crashed"),
    (
        "beacon_after_work",
        "what is audited was committed before the block came that drew it, but for the cycles behind which no merge names another",
    ),
    ("honest_is_not_failed", "no honest miner is failed by a verdict, whatever goes wrong"),
    ("lie_is_failed", "no verdict passes a payload that was not trained, or work that was not shown"),
    (
        "weights_follow_verdicts",
        "scores are merged tokens, without those of learners that a revealed verdict calls failed or unopened, nothing else",
    ),
    ("only_writer", "an orchestrator that is alone is never fenced"),
    ("one_writer_per_epoch", "the head's epochs never fall, each is one process's, and a process that lost its lease ends"),
    ("banned_is_left_out", "what a banned hotkey sends is in no merge that was opened after the ban, and it holds no rows"),
    ("validators_agree", "validators draw the same audits, and with all verdicts have the same scores, to the token"),
    ("rollback_is_whole", "a rollback takes every fragment back that is beyond its version, in one round"),
    ("restored_is_kept", "what a rollback goes back to lies in the bucket until it is there again"),
    ("page_before_rows", "a learner takes rows of a shard only after it has read and checked the catalog page that names it"),
    ("nobody_cries", "no machine logs an error that accuses the orchestrator"),
    ("run_completes", "once the faults are over, the run ends: every fragment merged, released, audited"),
];

/// See the module's text.
#[derive(Default)]
pub struct Watch {
    pub violations: Vec<Violation>,
    ear: Ear,
    merged: BTreeMap<(u16, u64), u64>,
    payloads: BTreeSet<(Slot, u64)>,
    pub manifests: BTreeMap<u64, (Digest, MergeManifest)>,
    tapes: BTreeMap<u64, Tape>,
    accepted: BTreeMap<u64, BTreeSet<Slot>>,
    head: Option<Head>,
    heads: u64,
    log: Frontier,
    log_entries: BTreeSet<Digest>,
    log_order: BTreeMap<Digest, u64>,
    pub lies: BTreeSet<Digest>,
    /// Hotkeys that a verdict calls failed or unopened, in any cycle.
    unsound: BTreeSet<AccountId>,
    pub verdicts: BTreeMap<&'static str, u64>,
    /// Revealed verdicts, by audit and validator.
    revealed: BTreeMap<(Digest, AccountId), VerdictResult>,
    /// By host.
    crashed: BTreeMap<usize, Vec<u8>>,
    /// Epoch of the newest writer, and its node.
    epoch: u64,
    writer: Option<Node>,
    /// Block at which evidence was written, by its key.
    committed: BTreeMap<String, u64>,
    pub takeovers: u64,
    /// Which node moved the head in an epoch.
    writers: BTreeMap<u64, Node>,
    /// Orders up to this number were taken by somebody.
    orders_seen: u64,
    /// The outer steps from which on a banned hotkey is left out.
    banned: BTreeMap<AccountId, u64>,
    ledger: Option<LedgerTotals>,
    books: Books,
    /// Digest, rows and shards of the catalog pages that were added.
    pages: BTreeMap<u32, (Digest, u64, Vec<String>)>,
    batches: u64,
    pub records_refused: u64,
    newest_commitments: BTreeMap<AccountId, Commitment>,
    /// Longest time between two heads that moved a fragment, after the first.
    pub longest_stall_ms: u64,
    moved_ms: Option<u64>,
    pub longest_stall_before_ms: u64,
    pub completed_ms: Option<u64>,
}

fn decoded<D: Document>(bytes: &[u8]) -> Option<(Digest, D)> {
    let (envelope, _, id) = peek(bytes).ok()?;
    codec::decode(&envelope.payload, D::PURPOSE.limit()).ok().map(|document| (id, document))
}

impl Watch {
    pub fn violated(&mut self, world: &World, invariant: &'static str, what: String) {
        debug_assert!(INVARIANTS.iter().any(|(name, _)| *name == invariant), "{invariant} is not in the list");
        if self.violations.len() < TOLD_MAX {
            self.violations.push(Violation { invariant, at_ms: world.executor.now_ms(), what });
        }
    }

    fn hold(&mut self, world: &World, invariant: &'static str, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.violated(world, invariant, what());
        }
    }

    /// An object was written into the bucket.
    pub fn wrote(&mut self, world: &World, node: Node, key: &str, bytes: &Bytes, is_once: bool) {
        let name = key.rsplit('/').next().unwrap_or_default();
        let names = ["head.qsr", "current.qsr", "progress.qsr", "standing.qsr", "pull.qsr", "status.json", "snapshot.bin", "writer.qsr"];
        let is_mutable = names.contains(&name) || key.contains("/jobs/");
        self.hold(world, "write_once", is_once || is_mutable, || format!("node {node} wrote {key} without a condition"));
        match name {
            "head.qsr" => {
                if let Some((_, head)) = decoded::<Head>(bytes) {
                    self.moved(world, node, head);
                }
            }
            "progress.qsr" if world.plan.behaviours.contains(&Behaviour::Copier) => {
                if let Some((_, progress)) = decoded::<Progress>(bytes)
                    && let Some(commitment) = progress.commitments.last()
                    && let Ok((envelope, _, _)) = peek(bytes)
                {
                    self.newest_commitments.insert(envelope.header.signer.account(), commitment.clone());
                }
            }
            "commitment.qsr" => {
                self.committed.entry(key.to_owned()).or_insert_with(|| world.block());
            }
            name if name.ends_with(".reveal.qsr") => {
                if let Some((_, reveal)) = decoded::<VerdictReveal>(bytes) {
                    self.revealed(world, &reveal);
                }
            }
            _ if key.contains("/merges/") => {
                if let Some((id, manifest)) = decoded::<MergeManifest>(bytes) {
                    self.merged(world, id, manifest);
                }
            }
            _ if key.contains("/catalog/") => {
                if let Some((_, page)) = decoded::<CatalogPage>(bytes) {
                    self.page(world, &StoredPage::new(Digest::blake3(bytes), &page));
                }
            }
            name if name.ends_with(".end.qsr") => {
                if let Some((_, end)) = decoded::<LeaseEnd>(bytes) {
                    self.books.ended(&end);
                }
            }
            // One that was succeeded, and has not noticed, gives out what counts only if its successor finds it.
            _ if key.contains("/leases/") && self.writer == Some(node) => {
                if let Some((_, job)) = decoded::<Job>(bytes) {
                    job.leases.iter().for_each(|lease| self.given(world, lease));
                }
            }
            _ if key.contains("/tape/") => {
                if let Some((_, tape)) = decoded::<Tape>(bytes) {
                    self.taped(world, tape);
                }
            }
            _ if key.contains("/log/") && !key.contains("/private/") => {
                if let Some((_, head)) = decoded::<LogHead>(bytes) {
                    self.logged(world, &head);
                }
            }
            _ => {}
        }
    }

    fn given(&mut self, world: &World, lease: &Lease) {
        if let Err(what) = self.books.given(lease) {
            self.violated(world, "rows_once", what);
        }
    }

    fn taped(&mut self, world: &World, tape: Tape) {
        let mut accepted = self.accepted.remove(&tape.t).unwrap_or_default();
        if tape.epoch < self.epoch {
            // Decided by a writer that was succeeded meanwhile, and written before the lease was taken over, or late: it stands, with the
            // orders that this one took and nobody else.
            accepted.clear();
        }
        for slot in accepted {
            let is_in = tape.inputs.iter().any(|input| (input.hotkey, input.slot) == slot);
            self.hold(world, "accepted_is_merged", is_in, || {
                format!("step {}: {} was accepted and is not in the tape", tape.t, slot.0.short())
            });
        }
        let previous = self.manifests.values().map(|(_, merge)| merge).filter(|merge| merge.fragment == tape.fragment);
        let newest = previous.max_by_key(|merge| merge.version).map(|merge| (merge.version, merge.state));
        if let Some((version, state)) = newest {
            let fits = (version, state) == (tape.base_version, tape.base_state);
            self.hold(world, "tape_fixes_merge", fits, || {
                format!("step {}: based on version {}, the newest is {version}", tape.t, tape.base_version)
            });
        }
        self.tapes.insert(tape.t, tape);
    }

    fn merged(&mut self, world: &World, id: Digest, manifest: MergeManifest) {
        let t = manifest.t;
        if manifest.version > manifest.base_version {
            let other = self.merged.insert((manifest.fragment, manifest.version), t);
            self.hold(world, "merged_once", other.is_none(), || {
                format!("fragment {} version {} comes from steps {other:?} and {t}", manifest.fragment, manifest.version)
            });
            self.hold(world, "merged_once", manifest.version == manifest.base_version + 1, || format!("step {t} skips a version"));
        }
        for contribution in manifest.accepted() {
            let slot = (contribution.hotkey, contribution.slot);
            let evidence = world.peek(&world.slot_keys(slot).own.commitment(t)).and_then(|bytes| decoded::<Progress>(&bytes));
            let holds = evidence.is_some_and(|(id, record)| {
                id == contribution.commitment && record.commitments.iter().any(|one| one.t == t && one.blake3 == contribution.payload)
            });
            self.hold(world, "evidence_holds_payload", holds, || format!("step {t}: {}", slot.0.short()));
            let is_banned = self.banned.get(&slot.0).is_some_and(|from| t >= *from);
            self.hold(world, "banned_is_left_out", !is_banned, || format!("step {t}: {}", slot.0.short()));
            let is_new = self.payloads.insert((slot, t));
            self.hold(world, "contribution_once", is_new, || format!("{} is merged twice in step {t}", slot.0.short()));
        }
        match self.tapes.get(&t) {
            None => self.violated(world, "tape_fixes_merge", format!("step {t} was merged without a tape")),
            Some(tape) => {
                let missing: Vec<AccountId> = tape
                    .inputs
                    .iter()
                    .filter(|input| !manifest.contributions.iter().any(|one| one.hotkey == input.hotkey && one.payload == input.payload))
                    .map(|input| input.hotkey)
                    .collect();
                let foreign = manifest.accepted().any(|one| !tape.inputs.iter().any(|input| input.payload == one.payload));
                self.hold(world, "accepted_is_merged", missing.is_empty() && !foreign, || {
                    format!("step {t}: {missing:?} of the tape are not in the manifest, or it has others")
                });
            }
        }
        let is_first = self.manifests.insert(t, (id, manifest)).is_none();
        self.hold(world, "merged_once", is_first, || format!("step {t} has two manifests"));
    }

    fn moved(&mut self, world: &World, node: Node, head: Head) {
        self.heads += 1;
        let writer = *self.writers.entry(head.epoch).or_insert(node);
        let newest = self.writers.last_key_value().map_or(0, |(epoch, _)| *epoch);
        self.hold(world, "one_writer_per_epoch", writer == node && head.epoch == newest, || {
            format!("node {node} moved the head in epoch {}, which is node {writer}'s; the newest is {newest}", head.epoch)
        });
        if let Some(before) = self.head.clone() {
            let rank = |state: RunState| state as u8;
            let versions = head.fragments.iter().zip(&before.fragments).all(|(now, then)| now.version >= then.version);
            let rest = head.outer_step >= before.outer_step
                && head.closed_below >= before.closed_below
                && head.log.size >= before.log.size
                && head.catalog.page >= before.catalog.page
                && rank(head.state) >= rank(before.state);
            let text = format!(
                "step {} → {}, closed {} → {}, log {} → {}, {:?} → {:?}",
                before.outer_step,
                head.outer_step,
                before.closed_below,
                head.closed_below,
                before.log.size,
                head.log.size,
                before.state,
                head.state
            );
            self.hold(world, "head_monotone", versions && rest, || text);
            if head.fragments != before.fragments {
                let now_ms = world.executor.now_ms();
                if let Some(moved_ms) = self.moved_ms {
                    self.longest_stall_ms = self.longest_stall_ms.max(now_ms - moved_ms);
                }
                self.moved_ms = Some(now_ms);
            }
        }
        let changed: Vec<(usize, u64, Digest)> = head
            .fragments
            .iter()
            .enumerate()
            .filter(|(index, now)| self.head.as_ref().is_none_or(|before| before.fragments[*index] != **now))
            .map(|(index, now)| (index, now.version, now.digest))
            .collect();
        for (fragment, version, digest) in changed {
            let there = world.peek(&world.run.keyframe(fragment as u16, version)).map(|bytes| Digest::blake3(&bytes));
            self.hold(world, "head_names_what_exists", there == Some(digest), || format!("fragment {fragment} version {version}"));
        }
        let is_page = head.catalog.page == 0
            || world.peek(&world.run.catalog(head.catalog.page)).map(|bytes| Digest::blake3(&bytes)) == Some(head.catalog.digest);
        self.hold(world, "head_names_what_exists", is_page, || format!("page {} of the catalog", head.catalog.page));
        let published = self.log.size();
        let is_published =
            head.log.size < published || (head.log.size == published && (published == 0 || head.log.root == self.log.root()));
        self.hold(world, "head_names_what_exists", is_published, || {
            format!("log of size {} is not the published one of {published}", head.log.size)
        });
        let most = usize::from(world.plan.parameters.overlap) + 1;
        let fragments: BTreeSet<u16> = head.pulls.iter().map(|pull| pull.fragment).collect();
        self.hold(world, "one_pull_per_fragment", fragments.len() == head.pulls.len() && head.pulls.len() <= most, || {
            format!("{:?}", head.pulls)
        });
        if head.state == RunState::Complete && self.completed_ms.is_none() {
            self.completed_ms = Some(world.executor.now_ms());
        }
        self.head = Some(head);
    }

    fn logged(&mut self, world: &World, head: &LogHead) {
        let size = self.log.size();
        let extends = head.previous == size && self.log.extended(&head.entries) == head.frontier;
        self.hold(world, "log_append_only", extends, || {
            format!("a head of {} entries after {} does not extend the log of {size}", head.entries.len(), head.previous)
        });
        for entry in &head.entries {
            let is_new = self.log_entries.insert(entry.document);
            // One progress record may hold several commitments, each of which is an entry of its own.
            self.hold(world, "log_append_only", is_new || entry.kind == LogKind::Commitment, || {
                format!("{:?} {} is there twice", entry.kind, entry.document.short())
            });
            let at = self.log_order.len() as u64;
            self.log_order.entry(entry.document).or_insert(at);
        }
        self.log = head.frontier.clone();
    }

    fn revealed(&mut self, world: &World, reveal: &VerdictReveal) {
        let verdict = &reveal.verdict;
        let name = match verdict.result {
            VerdictResult::Pass => "pass",
            VerdictResult::Mismatch => "mismatch",
            VerdictResult::Inconclusive => "inconclusive",
            VerdictResult::NoOpening => "no opening",
            VerdictResult::NotEvaluated => "not evaluated",
        };
        *self.verdicts.entry(name).or_default() += 1;
        self.revealed.insert((verdict.audit, verdict.validator), verdict.result);
        let behaviour = world.behaviour(&verdict.hotkey);
        let is_lie = self.lies.contains(&verdict.payload) || behaviour == Some(Behaviour::Hollow);
        if verdict.result == VerdictResult::Mismatch {
            self.hold(world, "honest_is_not_failed", behaviour != Some(Behaviour::Honest), || {
                format!("{} in cycle {}: {:?}", verdict.hotkey.short(), verdict.cycle, verdict.reason)
            });
        }
        if matches!(verdict.result, VerdictResult::Mismatch | VerdictResult::NoOpening) {
            self.unsound.insert(verdict.hotkey);
        }
        self.hold(world, "lie_is_failed", !(is_lie && verdict.result == VerdictResult::Pass), || verdict.hotkey.short());
    }

    /// An orchestrator follows the beacon.
    pub fn drawn(&mut self, world: &World, selection: &Selection) {
        let cycle_of = |t: u64| cycle_of(t, world.plan.parameters.fragments);
        let merges = || self.manifests.values().map(|(_, merge)| merge);
        let last = merges().filter(|merge| cycle_of(merge.t) == selection.cycle).map(|merge| merge.block).max();
        if !merges().any(|merge| cycle_of(merge.t) > selection.cycle && Some(merge.block) > last) {
            return;
        }
        let keys = world.slot_keys((selection.hotkey, selection.slot));
        let is_drawn_from = |merge: &&MergeManifest| {
            let has_worked = || merge.worked().any(|one| (one.hotkey, one.slot) == (selection.hotkey, selection.slot));
            cycle_of(merge.t) == selection.cycle && has_worked()
        };
        let evidence = merges().filter(is_drawn_from).map(|merge| keys.own.commitment(merge.t));
        let newest = evidence.filter_map(|key| self.committed.get(&key)).max().copied();
        self.hold(world, "beacon_after_work", newest < Some(selection.beacon_block), || {
            format!(
                "{} in cycle {}: committed at {newest:?}, drawn by {}",
                selection.hotkey.short(),
                selection.cycle,
                selection.beacon_block
            )
        });
    }

    /// Upload grants are about to be published.
    pub fn grants(&mut self, world: &World, wanted: &[Presign]) {
        for request in wanted {
            if let Presign::Put { key, .. } = request
                && let Some(folder) = key.strip_suffix("payload.qfd")
            {
                let is_there = world.peek(&format!("{folder}commitment.qsr")).is_some();
                self.hold(world, "evidence_before_grant", is_there, || key.clone());
            }
        }
    }

    /// The chain shows weights that were made from these scores.
    pub fn weights(&mut self, world: &World, scores: &[Score], epoch: u64) {
        let fragments = world.plan.parameters.fragments;
        let mut most: BTreeMap<AccountId, u64> = BTreeMap::new();
        let mut least: BTreeMap<AccountId, u64> = BTreeMap::new();
        for (_, manifest) in self.manifests.values() {
            let cycle = cycle_of(manifest.t, fragments);
            for contribution in manifest.worked() {
                *most.entry(contribution.hotkey).or_default() += contribution.tokens;
                if cycle < epoch && !contribution.is_suspect() && !self.unsound.contains(&contribution.hotkey) {
                    *least.entry(contribution.hotkey).or_default() += contribution.tokens;
                }
            }
        }
        for Score { hotkey: account, tokens: score, .. } in scores {
            let (least, most) = (least.get(account).copied().unwrap_or(0), most.get(account).copied().unwrap_or(0));
            self.hold(world, "weights_follow_verdicts", (least..=most).contains(score), || {
                format!("{}: {score}, between {least} and {most}", account.short())
            });
        }
    }

    fn listen(&mut self, world: &World) {
        for text in self.ear.take() {
            self.violated(world, "nobody_cries", text);
        }
    }

    /// The orchestrator has handled a batch.
    pub fn orchestrator_is(&mut self, world: &World, machine: &Orchestrator) {
        self.listen(world);
        // One that was succeeded, and has not noticed, decides nothing.
        if machine.epoch() != self.epoch {
            return;
        }
        self.batches += 1;
        for (t, pull) in machine.pulls() {
            if pull.stage != PullStage::Open {
                continue;
            }
            let of_stage = |stage| pull.offers.iter().filter(move |(_, offer)| offer.stage == stage).map(|(slot, _)| *slot);
            let sought: BTreeSet<Slot> = of_stage(OfferStage::Sought).collect();
            let now: BTreeSet<Slot> = of_stage(OfferStage::Accepted).collect();
            let before = self.accepted.entry(*t).or_default();
            let lost = before.iter().find(|slot| !now.contains(slot) && !sought.contains(slot)).copied();
            before.extend(now);
            let what =
                || format!("step {t}: what {} offered was accepted and is gone", lost.map_or_else(String::new, |slot| slot.0.short()));
            self.hold(world, "accepted_is_merged", lost.is_none(), what);
        }
        if !self.batches.is_multiple_of(LEDGER_EVERY) {
            return;
        }
        if let Err((name, what)) = machine.check_invariants() {
            self.violated(world, name, what);
        }
        for (lease, slot) in machine.open_leases().filter(|_| !self.banned.is_empty()).collect::<Vec<_>>() {
            let holds = !self.banned.contains_key(&slot.0);
            self.hold(world, "banned_is_left_out", holds, || format!("{} holds lease {lease}", slot.0.short()));
        }
        let totals = machine.ledger().totals();
        let joined = self.pages.range(..=machine.newest_page().page).map(|(_, (_, rows, _))| rows);
        let rows: u64 = world.setup.shards.iter().map(|shard| &shard.rows).chain(joined).sum();
        let sum = totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows;
        self.hold(world, "ledger_conserves", sum == rows, || format!("{sum} rows of {rows}: {totals:?}"));
        if let Some(before) = self.ledger {
            let fell = totals.done_tokens < before.done_tokens;
            self.hold(world, "ledger_conserves", !fell, || format!("{totals:?} after {before:?}"));
        }
        self.ledger = Some(totals);
        let recorded = self.books.done_tokens;
        self.hold(world, "rows_once", totals.done_tokens <= recorded, || format!("{recorded} tokens are recorded: {totals:?}"));
    }

    /// A process has taken the lease.
    pub fn claimed(&mut self, epoch: u64, node: Node) {
        if epoch > self.epoch {
            (self.epoch, self.writer) = (epoch, Some(node));
        }
    }

    /// The writer takes an order. A rollback: what is open was trained on what is taken back, also where it is accepted already.
    pub fn ordered(&mut self, machine: &Orchestrator, stored: &StoredOrder) {
        if machine.epoch() != self.epoch || stored.number != machine.orders_taken() + 1 {
            return;
        }
        if let Ok(order) = &stored.order {
            self.take(machine, stored.number, &order.action);
        }
    }

    fn take(&mut self, machine: &Orchestrator, number: u64, action: &Action) {
        self.orders_seen = self.orders_seen.max(number);
        match action {
            Action::Rollback { .. } => self.accepted.clear(),
            Action::Ban { hotkey } => {
                self.banned.entry(*hotkey).or_insert_with(|| machine.status().outer_step);
                self.accepted.values_mut().for_each(|slots| slots.retain(|slot| slot.0 != *hotkey));
            }
            Action::Unban { hotkey } => {
                self.banned.remove(hotkey);
            }
            _ => {}
        }
    }

    /// A process goes on. A writer that had lost the lease, or was about to, may have taken orders that this one knows from its snapshot or
    /// journal.
    pub fn recalls(&mut self, world: &World, machine: &Orchestrator) {
        for number in self.orders_seen + 1..=machine.orders_taken() {
            if let Some((_, order)) = world.peek(&world.run.order(number)).and_then(|bytes| decoded::<Order>(&bytes)) {
                self.take(machine, number, &order.action);
            }
        }
    }

    /// A process went on from the bucket, with leases and orders that it found there. Open pulls are asked again, and what was accepted for
    /// them before is looked for.
    pub fn succeeded(&mut self, world: &World, host: usize, machine: &Orchestrator, (leases, orders): &(Vec<Job>, Vec<StoredOrder>)) {
        // Those of its snapshot too, which one that was succeeded may have written.
        let held: BTreeMap<u64, &Lease> = machine.leases().map(|lease| (lease.id, lease)).collect();
        held.values().for_each(|lease| self.given(world, lease));
        for lease in leases.iter().flat_map(|job| &job.leases).filter(|lease| !held.contains_key(&lease.id)) {
            if self.books.has_only_end_of(lease.id) {
                self.given(world, lease);
            }
            // What it does not take up has ended, or was given out by one that was succeeded, to nobody.
            let is_lost = self.books.is_open(lease.id);
            self.hold(world, "rows_once", !is_lost, || format!("lease {} is not taken up", lease.id));
        }
        // What it takes once more counts once more.
        if let Some(first) = orders.first() {
            self.orders_seen = self.orders_seen.min(first.number - 1);
        }
        self.takeovers += u64::from(self.epoch > 1);
        self.crashed.remove(&host);
    }

    /// A page of the catalog, as it lies in the bucket.
    fn page(&mut self, world: &World, stored: &StoredPage) {
        let rows = stored.shards.iter().map(|shard| shard.rows).sum();
        let entry = (stored.reference.digest, rows, stored.shards.iter().map(|shard| shard.id.clone()).collect());
        let known = self.pages.entry(stored.reference.page).or_insert_with(|| entry.clone());
        let stands = *known == entry;
        self.hold(world, "pages_stand", stands, || format!("{:?} is another one", stored.reference));
    }

    /// The machine as it was when its process died.
    pub fn crashed(&mut self, host: usize, machine: Vec<u8>) {
        self.crashed.insert(host, machine);
    }

    /// The machine as snapshot and journal give it.
    pub fn recovered(&mut self, world: &World, host: usize, machine: &[u8]) {
        if let Some(crashed) = self.crashed.remove(&host) {
            self.hold(world, "journal_is_exact", crashed == machine, || {
                let at = crashed.iter().zip(machine).position(|(a, b)| a != b);
                format!("{} and {} bytes, which differ from {at:?} on", crashed.len(), machine.len())
            });
        }
    }

    /// What was measured so far belongs to the time before; gives it.
    pub fn stalls_from_here(&mut self) -> u64 {
        std::mem::take(&mut self.longest_stall_ms)
    }

    /// A process found its lease in other hands.
    pub fn fenced(&mut self, world: &World) {
        let is_alone = !world.plan.has_standby;
        self.hold(world, "only_writer", !is_alone, || "an orchestrator that is alone was fenced".into());
    }

    /// A step of a rollback begins.
    pub fn restored(&mut self, world: &World, tape: &Tape, is_kept: bool) {
        let what = || format!("step {}: version {:?} of fragment {}", tape.t, tape.restores, tape.fragment);
        self.hold(world, "restored_is_kept", is_kept, what);
        // The round may be another one, which begins without an order.
        self.accepted.clear();
    }

    /// A learner works on a shard of the catalog.
    pub fn takes_rows(&mut self, world: &World, shard: &ShardManifest) {
        let is_first = world.setup.shards.iter().any(|own| own.id == shard.id);
        let known = is_first || self.pages.values().any(|(_, _, ids)| ids.contains(&shard.id));
        let rows = if is_first { world.plan.shard_rows } else { tensors::SHARD_ROWS };
        self.hold(world, "page_before_rows", known && *shard == tensors::shard(&shard.id, rows), || shard.id.clone());
    }

    /// Somebody else's newest commitment.
    pub fn a_commitment(&self, not_of: &AccountId) -> Option<Commitment> {
        self.newest_commitments.iter().find(|(account, _)| *account != not_of).map(|(_, commitment)| commitment.clone())
    }
}
