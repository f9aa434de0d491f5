//! A small world for the machine: learners that commit and upload, a store and a chain that answer at once, virtual time, and crashes
//! wherever a test wants them.

use std::collections::VecDeque;

use protocol::audits::Selection;
use protocol::documents::{
    AuditDraw, AuditParameters, CatalogRef, Codec, Commitment, Contribution, FragmentProgress, Head, InnerOptimizer, Job, LearnerState,
    LeaseEnd, LrSchedule, Notice, OpeningPart, Progress, ReceiptOffer, RunState, Tape, VerdictResult,
};
use protocol::envelope::RunId;
use protocol::log::{LogHead, LogRef};
use protocol::{Reason, codec};

use crate::machine::*;

pub(super) const P: u16 = 4;
pub(super) const STEP_MS: u64 = 400;
/// Rows of a shard that joins the run.
pub(super) const ADDED_ROWS: u64 = 500;

pub(super) fn parameters(cycles: u64) -> RunParameters {
    RunParameters {
        fragments: P,
        inner_steps: P,
        overlap: 2,
        grace_ppm: 800_000,
        cycles,
        outer_lr_ppm: 1_000_000,
        outer_momentum_ppm: 0,
        step_target_ms: 0,
        poll_ms: 100,
        slots: 2,
        quorum_min: 2,
        pull_deadline_ms: 10_000,
        learner_ttl_ms: 5_000,
        sequence_length: 128,
        batch_rows: 4,
        lease_steps: 24,
        codec_up: Codec::Bf16,
        codec_down: Codec::Bf16,
        release_every_cycles: 0,
        inner: InnerOptimizer {
            lr_nano: 1,
            beta1_ppm: 1,
            beta2_ppm: 1,
            eps_pico: 1,
            weight_decay_ppm: 0,
            clip_norm_ppm: 1,
            schedule: LrSchedule { warmup_steps: 0, total_steps: 0, final_ppm: 0 },
        },
        audit: AuditParameters {
            rate_ppm: 1_000_000,
            loss_rows: 16,
            replay_steps: 4,
            replay_tolerance_ppm: 1,
            beacon_blocks: 1,
            opening_ms: 20_000,
        },
        training: Default::default(),
    }
}

pub(super) fn shard(id: &str, rows: u64) -> ShardRows {
    ShardRows { id: id.into(), source: "a source".into(), rows, row_tokens: 128 }
}

pub(super) fn setup(cycles: u64) -> RunSetup {
    RunSetup {
        run: RunId([7; 16]),
        parameters: parameters(cycles),
        release: ReleaseRef { release: "base".into(), manifest: Digest::ZERO },
        fragments: (0..P)
            .map(|fragment| FragmentSetup {
                keyframe: Digest::blake3(&[fragment as u8]),
                keyframe_length: 100,
                state: Digest::blake3(&[fragment as u8, 1]),
                elements: 468,
                payload_length: 1_000,
            })
            .collect(),
        catalog: CatalogRef { page: 0, digest: Digest::ZERO },
        shards: vec![shard("a", 10_000)],
    }
}

pub(super) fn miner(index: u8) -> AccountId {
    AccountId([index; 32])
}

/// A learner as far as the orchestrator can see it.
pub(super) struct Sim {
    pub(super) slot: Slot,
    pub(super) record: Progress,
    pub(super) next_step_ms: u64,
    pub(super) step_ms: u64,
    pub(super) lease_steps: BTreeMap<u64, u32>,
    /// Rows of a step of each lease, in thousandths of a whole batch: a step takes so much of `step_ms`.
    batches: BTreeMap<u64, u64>,
    pub(super) silent: bool,
    /// Trains, and answers no pull.
    pub(super) mute: bool,
    pub(super) hands_in_receipts: bool,
    /// Has no rows left: answers pulls, and trains no more.
    pub(super) is_used_up: bool,
    /// Its commitments claim so many steps for each that it did.
    pub(super) claims: u32,
}

impl Sim {
    pub(super) fn new(index: u8, session_epoch: u64, step_ms: u64) -> Self {
        let record = Progress {
            worker: format!("miner-{index}"),
            session_epoch,
            slot: 0,
            protocol: 1,
            state: LearnerState::Ready,
            reason: Reason::None,
            lease: 0,
            lease_step: 0,
            local_step: 0,
            step_ms: step_ms as u32,
            loss: 8_000_000,
            step_chain: Digest::ZERO,
            fragments: vec![FragmentProgress::default(); usize::from(P)],
            commitments: Vec::new(),
            uploaded: Vec::new(),
            openings: Vec::new(),
            receipt: None,
            padding: Vec::new(),
        };
        Self {
            slot: (miner(index), 0),
            record,
            next_step_ms: 0,
            step_ms,
            lease_steps: BTreeMap::new(),
            batches: BTreeMap::new(),
            silent: false,
            mute: false,
            hands_in_receipts: true,
            is_used_up: false,
            claims: 1,
        }
    }

    /// One step boundary: apply what the head shows, answer its pulls, train.
    pub(super) fn step(&mut self, head: &Head, now_ms: u64) {
        if now_ms < self.next_step_ms || self.lease_steps.is_empty() {
            return;
        }
        self.next_step_ms = now_ms + self.step_ms;
        for (fragment, progress) in self.record.fragments.iter_mut().enumerate() {
            if head.fragments[fragment].version > progress.version {
                *progress = FragmentProgress { version: head.fragments[fragment].version, steps: 0 };
            }
        }
        self.record.commitments.retain(|commitment| head.pulls.iter().any(|pull| pull.t == commitment.t));
        for pull in &head.pulls {
            let progress = self.record.fragments[usize::from(pull.fragment)];
            if self.mute || progress.steps == 0 || self.record.commitments.iter().any(|commitment| commitment.t == pull.t) {
                continue;
            }
            self.record.commitments.push(Commitment {
                t: pull.t,
                fragment: pull.fragment,
                base_version: progress.version,
                length: 1_000,
                sha256: Digest::ZERO,
                blake3: Digest::blake3(&[self.slot.0.0[0], pull.t as u8]),
                steps: progress.steps * self.claims,
                tokens: 0,
                lease: self.record.lease,
                lease_step: self.record.lease_step,
                local_step: self.record.local_step,
                start_step: 0,
                start_digest: Digest::ZERO,
                step_chain: Digest::ZERO,
            });
        }
        if self.is_used_up {
            self.record.state = LearnerState::Ready;
            return;
        }
        let current = self
            .lease_steps
            .iter()
            .find(|(id, steps)| **id > self.record.lease || (**id == self.record.lease && self.record.lease_step < **steps));
        let Some((id, _)) = current else { return };
        if *id != self.record.lease {
            if self.record.lease > 0 && self.hands_in_receipts {
                self.record.receipt = Some(ReceiptOffer { lease: self.record.lease, length: 100, sha256: Digest::ZERO, uploaded: false });
            }
            self.record.lease = *id;
            self.record.lease_step = 0;
        }
        self.record.lease_step += 1;
        if self.lease_steps.len() == 1
            && self.lease_steps.get(&self.record.lease) == Some(&self.record.lease_step)
            && self.hands_in_receipts
        {
            // Nothing comes after it so far.
            self.record.receipt = Some(ReceiptOffer { lease: self.record.lease, length: 100, sha256: Digest::ZERO, uploaded: false });
        }
        self.record.local_step += 1;
        let step_ms = self.step_ms * self.batches.get(&self.record.lease).unwrap_or(&1_000) / 1_000;
        (self.next_step_ms, self.record.step_ms) = (now_ms + step_ms, step_ms as u32);
        self.record.state = LearnerState::Training;
        for progress in &mut self.record.fragments {
            progress.steps += 1;
        }
    }
}

pub(super) struct World {
    pub(super) machine: Orchestrator,
    pub(super) now_ms: u64,
    pub(super) head: Option<Head>,
    pub(super) learners: Vec<Sim>,
    /// Everything that is written once: a second write finds the first.
    pub(super) tapes: BTreeMap<u64, Tape>,
    pub(super) merges: BTreeMap<u64, MergeManifest>,
    pub(super) orders: Vec<(Selection, usize)>,
    pub(super) released: u32,
    pub(super) log: BTreeMap<u64, LogHead>,
    /// What checks of receipts give for some slots.
    pub(super) receipts: BTreeMap<Slot, Result<(Digest, Vec<u32>), Reason>>,
    pub(super) rejects: BTreeMap<Slot, Reason>,
    /// Learners whose uploads are still being fetched to be checked.
    pub(super) unchecked: BTreeSet<Slot>,
    /// Learners that never use an upload grant.
    pub(super) withheld: BTreeSet<Slot>,
    /// Learners whose commitments of an earlier session lie in the bucket.
    pub(super) answered_before: BTreeSet<Slot>,
    /// Crash and recover after so many inputs, once.
    pub(super) crash_after: Option<u64>,
    pub(super) inputs: u64,
    pub(super) trace: Vec<String>,
    pub(super) guests: Vec<Guest>,
    /// The crash takes the journal along: the successor has the bucket only.
    pub(super) loses_disk: bool,
    pub(super) epoch: u64,
    pub(super) snapshot: Option<Vec<u8>>,
    /// Lease records, written once.
    pub(super) leases: BTreeMap<u64, Job>,
    pub(super) lease_ends: BTreeMap<u64, LeaseEnd>,
    /// Evidence of commitments, written once.
    pub(super) commitments: BTreeMap<(u64, Slot), StoredCommitment>,
    pub(super) retired: Vec<Retired>,
    /// Catalog pages that were added, written once.
    pub(super) pages: Vec<StoredPage>,
    /// Bundles of grants on demand that were published.
    pub(super) bundles: u64,
    /// Releases do not come to an end.
    pub(super) holds_releases: bool,
    /// Snapshots do not reach the bucket.
    pub(super) holds_snapshots: bool,
    /// Nor do deletions.
    pub(super) holds_deletions: bool,
    /// Nor do merges: they lie in `held_merges`.
    pub(super) holds_merges: bool,
    pub(super) held_merges: Vec<Effect>,
    /// This learner opens no audit.
    pub(super) opens_nothing: Option<Slot>,
    /// No new block is heard of.
    pub(super) is_chain_away: bool,
    /// This learner counts ten steps for each.
    pub(super) liar: Option<usize>,
    /// Inputs from here on, for a twin.
    pub(super) record: Option<Vec<(u64, Input)>>,
}

impl World {
    pub(super) fn new(cycles: u64, miners: u8) -> Self {
        Self::of(setup(cycles), miners)
    }

    pub(super) fn of(setup: RunSetup, miners: u8) -> Self {
        let mut world = Self {
            machine: Orchestrator::new(setup),
            now_ms: 1_000_000,
            head: None,
            learners: (1..=miners).map(|index| Sim::new(index, 500, STEP_MS + u64::from(index) * 20)).collect(),
            tapes: BTreeMap::new(),
            merges: BTreeMap::new(),
            orders: Vec::new(),
            released: 0,
            log: BTreeMap::new(),
            receipts: BTreeMap::new(),
            rejects: BTreeMap::new(),
            unchecked: BTreeSet::new(),
            withheld: BTreeSet::new(),
            answered_before: BTreeSet::new(),
            crash_after: None,
            inputs: 0,
            trace: Vec::new(),
            guests: Vec::new(),
            loses_disk: false,
            epoch: 1,
            snapshot: None,
            leases: BTreeMap::new(),
            lease_ends: BTreeMap::new(),
            commitments: BTreeMap::new(),
            retired: Vec::new(),
            pages: Vec::new(),
            bundles: 0,
            holds_releases: false,
            holds_snapshots: false,
            holds_deletions: false,
            holds_merges: false,
            held_merges: Vec::new(),
            opens_nothing: None,
            is_chain_away: false,
            liar: None,
            record: None,
        };
        let guest = |index| Guest { hotkey: miner(index), validator: false, recipient: Some([index; 32]) };
        let mut guests: Vec<Guest> = (1..=miners).map(guest).collect();
        guests.push(Guest { hotkey: miner(200), validator: true, recipient: Some([200; 32]) });
        world.guests = guests.clone();
        world.input(Input::Claimed { epoch: 1 });
        world.input(Input::Metagraph { guests });
        world
    }

    pub(super) fn input(&mut self, input: Input) {
        let mut queue = VecDeque::from([input]);
        while let Some(input) = queue.pop_front() {
            self.inputs += 1;
            if let Some(record) = &mut self.record {
                record.push((self.now_ms, input.clone()));
            }
            self.machine.handle(self.now_ms, input);
            if self.crash_after == Some(self.inputs) {
                // The process dies before any effect of this input is executed; its successor has the journal, or the bucket.
                self.trace.push(format!("{} crash", self.inputs));
                queue.clear();
                if self.loses_disk {
                    queue.push_back(self.recover_from_bucket());
                    queue.push_back(Input::Metagraph { guests: self.guests.clone() });
                    continue;
                }
                let bytes = bincode::serde::encode_to_vec(&self.machine, bincode::config::standard()).unwrap();
                self.machine = bincode::serde::decode_from_slice(&bytes, bincode::config::standard()).unwrap().0;
                queue.push_back(Input::Claimed { epoch: self.machine.epoch() });
                continue;
            }
            while let Some(effect) = self.machine.poll_effect() {
                queue.extend(self.execute(effect));
            }
        }
    }

    pub(super) fn execute(&mut self, effect: Effect) -> Option<Input> {
        match effect {
            Effect::PublishHead { head } => {
                if let Some(old) = &self.head {
                    for (old, new) in old.fragments.iter().zip(&head.fragments) {
                        assert!(new.version >= old.version, "the head never goes back");
                    }
                    assert!(head.closed_below >= old.closed_below);
                }
                let logged = self.log.get(&head.log.size).map(|log| LogRef::from(&log.frontier));
                assert!(head.log.size == 0 || logged == Some(head.log), "the head names a log head that is there");
                assert!(head.pulls.len() <= 1 + usize::from(self.machine.parameters().overlap), "at most τ + 1 pulls");
                self.head = Some(*head);
                Some(Input::HeadPublished)
            }
            Effect::PublishJob { job, .. } => {
                let whole = u64::from(self.machine.parameters().batch_rows);
                for lease in &job.leases {
                    let record = Job { leases: vec![lease.clone()], ..(*job).clone() };
                    let stored = self.leases.entry(lease.id).or_insert_with(|| record.clone());
                    assert_eq!(*stored, record, "a lease is given out once");
                }
                if let Some(sim) =
                    self.learners.iter_mut().find(|sim| sim.slot == (job.hotkey, job.slot) && sim.record.session_epoch == job.session_epoch)
                {
                    sim.lease_steps = job.leases.iter().map(|lease| (lease.id, lease.steps)).collect();
                    sim.batches = job.leases.iter().map(|lease| (lease.id, u64::from(lease.batch_rows) * 1_000 / whole)).collect();
                }
                None
            }
            Effect::PublishPullGrants { slot, wants, .. } => {
                self.bundles += 1;
                let withheld = self.withheld.contains(&slot);
                let sim = self.learners.iter_mut().find(|sim| sim.slot == slot)?;
                for want in wants {
                    match want {
                        Want::WriteOnce { key: Key::Payload { t, .. }, .. } if !withheld && !sim.record.uploaded.contains(&t) => {
                            sim.record.uploaded.push(t);
                        }
                        Want::WriteOnce { key: Key::Receipt { lease, .. }, .. } => {
                            for offer in sim.record.receipt.iter_mut().filter(|offer| offer.lease == lease) {
                                offer.uploaded = true;
                            }
                        }
                        Want::WriteOnce { key: Key::Opening { part, audit, .. }, .. } => {
                            for opening in &mut sim.record.openings {
                                opening.uploaded |= opening.audit == audit && opening.part == part;
                            }
                        }
                        _ => {}
                    }
                }
                None
            }
            Effect::StoreCommitment { slot, t, commitment, .. } if self.answered_before.contains(&slot) => {
                Some(Input::CommitmentRefused { slot, t, commitment })
            }
            Effect::StoreCommitment { slot, t, id, .. } => {
                let record = self.learners.iter().find(|sim| sim.slot == slot).map(|sim| &sim.record)?;
                let commitment = record.commitments.iter().find(|commitment| commitment.t == t)?.clone();
                let stored = self.commitments.entry((t, slot)).or_insert(StoredCommitment { slot, id, commitment });
                Some(Input::CommitmentStored { slot, t, id: stored.id, commitment: stored.commitment.digest() })
            }
            Effect::CheckPayload { slot, .. } if self.unchecked.contains(&slot) => None,
            Effect::CheckPayload { slot, t, .. }
                if !self.learners.iter().any(|sim| sim.slot == slot && sim.record.uploaded.contains(&t)) =>
            {
                Some(Input::PayloadChecked { slot, t, outcome: Reason::NotUploaded })
            }
            Effect::CheckPayload { slot, t, .. } => {
                let outcome = self.rejects.get(&slot).copied().unwrap_or(Reason::None);
                Some(Input::PayloadChecked { slot, t, outcome })
            }
            Effect::CheckReceipt { slot, lease, committed } => {
                assert!(committed.len() <= lease.steps as usize + 1);
                let id = Digest::derive("receipt", &[&slot.0.0, &lease.id.to_le_bytes()]);
                let outcome = self.receipts.get(&slot).cloned().unwrap_or_else(|| Ok((id, (0..lease.steps).collect())));
                Some(Input::ReceiptChecked { slot, lease: lease.id, outcome })
            }
            Effect::MakeOpeningKeys { audits } => {
                Some(Input::OpeningKeys { keys: audits.into_iter().map(|audit| (audit, audit.0)).collect() })
            }
            Effect::ReadVerdict { audit, .. } => {
                Some(Input::Verdict { audit, verdict: Some((Digest::derive("verdict", &[&audit.0]), VerdictResult::Pass)) })
            }
            Effect::PublishLog { head } => {
                let size = head.frontier.size();
                let stored = self.log.entry(size).or_insert_with(|| (*head).clone());
                if self.loses_disk && *stored != *head {
                    return Some(Input::LogTaken { head: Box::new(stored.clone()) });
                }
                assert_eq!(*stored, *head, "a log head is written once");
                Some(Input::LogPublished)
            }
            Effect::WriteTape { tape } => {
                let tape = self.tapes.entry(tape.t).or_insert(*tape).clone();
                Some(Input::TapeWritten { tape: Box::new(tape) })
            }
            Effect::Merge { .. } if self.holds_merges => {
                self.held_merges.push(effect);
                None
            }
            Effect::Merge { tape, rejected, previous_keyframe } => {
                let source = (tape.fragment, tape.restores.unwrap_or(tape.base_version));
                assert!(!self.retired.iter().any(|retired| retired.versions.contains(&source)), "{source:?} is deleted");
                let manifest = self.merges.entry(tape.t).or_insert_with(|| merge(&tape, rejected, previous_keyframe)).clone();
                self.trace.push(format!("merge {} v{}", manifest.t, manifest.version));
                let id = Digest::blake3(&codec::encode(&manifest));
                Some(Input::Merged { manifest: Box::new(manifest), id, keyframe_length: 100 })
            }
            Effect::ReadBeacon { cycle, block } => {
                let validators = self.guests.iter().filter(|guest| guest.validator).map(|guest| guest.hotkey).collect();
                let draw = AuditDraw { cycle, beacon_block: block, beacon: Digest([block as u8; 32]), validators };
                Some(Input::Beacon { draw: Box::new(draw) })
            }
            Effect::OrderAudit { selection, parts, .. } => {
                let audit = selection.audit;
                if !self.orders.iter().any(|(known, _)| known.audit == audit) {
                    self.orders.push((*selection, parts.len()));
                }
                Some(Input::AuditOrdered { audit })
            }
            Effect::Release { .. } if self.holds_releases => None,
            Effect::Release { .. } => {
                self.released += 1;
                Some(Input::Released { release: ReleaseRef { release: format!("run-{}", self.released), manifest: Digest::ZERO } })
            }
            Effect::StoreSnapshot { .. } if self.holds_snapshots => None,
            Effect::StoreSnapshot { revision, bytes } => {
                self.snapshot = Some(bytes);
                Some(Input::SnapshotStored { revision })
            }
            Effect::WritePage { page, previous, shards } => {
                if shards.iter().any(|id| id == "held") {
                    return Some(Input::PageWritten { page, outcome: Err("shard held is held out".to_owned()) });
                }
                if !self.pages.iter().any(|stored| stored.reference.page == page) {
                    let digest = Digest::derive("page", &[&previous.0, &page.to_le_bytes()]);
                    let shards = shards.iter().map(|id| shard(id, ADDED_ROWS)).collect();
                    self.pages.push(StoredPage { reference: CatalogRef { page, digest }, shards });
                }
                let stored = self.pages.iter().find(|stored| stored.reference.page == page)?;
                Some(Input::PageWritten { page, outcome: Ok(stored.clone()) })
            }
            Effect::RecordLeaseEnd { end } => {
                let end = self.lease_ends.entry(end.lease).or_insert(*end).clone();
                Some(Input::LeaseEnded { end: Box::new(end) })
            }
            Effect::Retire { number, retired } => {
                self.retired.push(*retired);
                (!self.holds_deletions).then_some(Input::RetiredAll { number })
            }
            Effect::Watch { .. } | Effect::PublishCurrent | Effect::PublishStanding { .. } | Effect::PublishStatus { .. } => None,
        }
    }

    /// Lets `ms` pass in polls of 100 ms.
    pub(super) fn run(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now_ms += 100;
            if self.now_ms.is_multiple_of(1_000) && !self.is_chain_away {
                self.input(Input::Block { number: self.now_ms / 1_000 });
            }
            for index in 0..self.learners.len() {
                if self.learners[index].silent {
                    continue;
                }
                if let Some(head) = self.head.clone() {
                    self.learners[index].step(&head, self.now_ms);
                    self.open_audits(index, &head);
                }
                if self.liar == Some(index) {
                    self.learners[index].record.local_step += 9;
                }
                let sim = &self.learners[index];
                let id = Digest::blake3(&codec::encode(&sim.record));
                let input = Input::Progress { slot: sim.slot, id, is_current: true, record: Box::new(sim.record.clone()) };
                self.input(input);
            }
            self.input(Input::Tick);
        }
    }

    /// Lets time pass until `look` finds something.
    pub(super) fn run_until<T>(&mut self, look: impl Fn(&Self) -> Option<T>) -> T {
        for _ in 0..300 {
            self.run(100);
            if let Some(found) = look(self) {
                return found;
            }
        }
        panic!("it is not there after half a minute; trace {:?}", self.trace)
    }

    /// The open pull that a learner's stored commitment answers.
    pub(super) fn answered(&self, slot: Slot) -> Option<u64> {
        let is_open = |t: &u64| self.machine.pulls.get(t).is_some_and(|pull| pull.stage == PullStage::Open);
        self.commitments.keys().find(|(t, of)| *of == slot && is_open(t)).map(|(t, _)| *t)
    }

    /// Whether the merge of step `t` takes what this learner gave.
    pub(super) fn is_merged(&self, t: u64, slot: Slot) -> bool {
        self.tapes[&t].inputs.iter().any(|input| (input.hotkey, input.slot) == slot)
    }

    pub(super) fn open_audits(&mut self, index: usize, head: &Head) {
        let sim = &mut self.learners[index];
        if self.opens_nothing == Some(sim.slot) {
            return;
        }
        let ours = |notice: &&Notice| {
            let Notice::OpenAudit { audit, hotkey, key, .. } = notice;
            assert_eq!(*key, audit.0, "the key that was made for this audit");
            *hotkey == sim.slot.0
        };
        // One after the other.
        let Some(Notice::OpenAudit { audit, .. }) = head.notices.iter().find(ours) else { return };
        if !sim.record.openings.iter().any(|part| part.audit == *audit) {
            sim.record.openings =
                (0..3).map(|part| OpeningPart { audit: *audit, part, length: 5, sha256: Digest::ZERO, uploaded: false }).collect();
        }
    }

    pub(super) fn until_complete(&mut self, limit_ms: u64) {
        let end = self.now_ms + limit_ms;
        while self.machine.state() != RunState::Complete {
            assert!(self.now_ms < end, "not complete; trace {:?}", self.trace);
            self.run(1_000);
        }
    }
}

pub(super) fn merge(tape: &Tape, mut contributions: Vec<Contribution>, previous: (Digest, u64)) -> MergeManifest {
    contributions.extend(tape.inputs.iter().map(|input| Contribution { norm: 1, cosine_ppm: 1, ..input.contribution(Reason::None) }));
    let unmoved = MergeManifest::unmoved(tape, previous.0, contributions);
    if tape.inputs.is_empty() && tape.restores.is_none() {
        return unmoved;
    }
    let result = Digest::blake3(&codec::encode(tape));
    MergeManifest { version: tape.base_version + 1, keyframe: result, state: result, step_norm: 1, ..unmoved }
}
