//! The machine against a small world: learners that commit and upload, a store and a chain that answer at once, virtual time, and
//! crashes wherever a test wants them.

use protocol::documents::{
    AuditParameters, Codec, Commitment, Contribution, FragmentProgress, InnerOptimizer, LearnerState, LrSchedule, OpeningPart, ReceiptOffer,
};
use protocol::ledger::RowState;
use protocol::log::{Frontier, LogEntry, LogRef};

use std::collections::VecDeque;

use protocol::audits::Selection;
use protocol::documents::{Head, Job, Notice, Progress, RunState, Tape, VerdictResult};
use protocol::envelope::RunId;
use protocol::log::{LogHead, LogKind};
use protocol::{Reason, codec};

use super::*;

mod operator;
mod recovery;

const P: u16 = 4;
const STEP_MS: u64 = 400;

fn parameters(cycles: u64) -> RunParameters {
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
        audit: AuditParameters { loss_rows: 16, replay_steps: 4, replay_tolerance_ppm: 1, beacon_blocks: 3, opening_ms: 20_000 },
    }
}

fn setup(cycles: u64) -> RunSetup {
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
        shards: vec![("a".into(), 10_000, 128)],
    }
}

fn miner(index: u8) -> AccountId {
    AccountId([index; 32])
}

/// A learner as far as the orchestrator can see it.
struct Sim {
    slot: Slot,
    record: Progress,
    next_step_ms: u64,
    step_ms: u64,
    lease_steps: BTreeMap<u64, u32>,
    silent: bool,
    /// Trains, and answers no pull.
    mute: bool,
    hands_in_receipts: bool,
}

impl Sim {
    fn new(index: u8, session_epoch: u64, step_ms: u64) -> Self {
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
            silent: false,
            mute: false,
            hands_in_receipts: true,
        }
    }

    /// One step boundary: apply what the head shows, answer its pulls, train.
    fn step(&mut self, head: &Head, now_ms: u64) {
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
                steps: progress.steps,
                tokens: 0,
                lease: self.record.lease,
                lease_step: self.record.lease_step,
                local_step: self.record.local_step,
                start_step: 0,
                start_digest: Digest::ZERO,
                step_chain: Digest::ZERO,
            });
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
        self.record.local_step += 1;
        self.record.state = LearnerState::Training;
        for progress in &mut self.record.fragments {
            progress.steps += 1;
        }
    }
}

struct World {
    machine: Orchestrator,
    now_ms: u64,
    head: Option<Head>,
    learners: Vec<Sim>,
    /// Everything that is written once: a second write finds the first.
    tapes: BTreeMap<u64, Tape>,
    merges: BTreeMap<u64, MergeManifest>,
    orders: Vec<(Selection, usize)>,
    released: u32,
    log: BTreeMap<u64, LogHead>,
    /// What checks of receipts give for some slots.
    receipts: BTreeMap<Slot, Result<(Digest, Vec<u32>), Reason>>,
    rejects: BTreeMap<Slot, Reason>,
    /// Learners whose commitments of an earlier session lie in the bucket.
    answered_before: BTreeSet<Slot>,
    /// Crash and recover after so many inputs, once.
    crash_after: Option<u64>,
    inputs: u64,
    trace: Vec<String>,
    guests: Vec<Guest>,
    /// The crash takes the journal along: the successor has the bucket only.
    loses_disk: bool,
    epoch: u64,
    snapshot: Option<Vec<u8>>,
    /// Lease records, written once.
    leases: BTreeMap<u64, Job>,
    retired: Vec<Retired>,
    /// Releases do not come to an end.
    holds_releases: bool,
    /// This learner counts ten steps for each.
    liar: Option<usize>,
    /// Inputs from here on, for a twin.
    record: Option<Vec<(u64, Input)>>,
}

impl World {
    fn new(cycles: u64, miners: u8) -> Self {
        let mut world = Self {
            machine: Orchestrator::new(setup(cycles)),
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
            answered_before: BTreeSet::new(),
            crash_after: None,
            inputs: 0,
            trace: Vec::new(),
            guests: Vec::new(),
            loses_disk: false,
            epoch: 1,
            snapshot: None,
            leases: BTreeMap::new(),
            retired: Vec::new(),
            holds_releases: false,
            liar: None,
            record: None,
        };
        let mut guests: Vec<Guest> = (1..=miners).map(|index| Guest { hotkey: miner(index), validator: false }).collect();
        guests.push(Guest { hotkey: miner(200), validator: true });
        world.guests = guests.clone();
        world.input(Input::Claimed { epoch: 1 });
        world.input(Input::Metagraph { guests });
        world
    }

    fn input(&mut self, input: Input) {
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
                queue.push_back(Input::Started);
                continue;
            }
            while let Some(effect) = self.machine.poll_effect() {
                queue.extend(self.execute(effect));
            }
        }
    }

    fn execute(&mut self, effect: Effect) -> Option<Input> {
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
                assert!(head.pulls.len() <= 3, "at most τ + 1 pulls");
                self.head = Some(*head);
                Some(Input::HeadPublished)
            }
            Effect::PublishJob { job, .. } => {
                for lease in &job.leases {
                    let record = Job { leases: vec![lease.clone()], ..(*job).clone() };
                    let stored = self.leases.entry(lease.id).or_insert_with(|| record.clone());
                    assert_eq!(*stored, record, "a lease is given out once");
                }
                if let Some(sim) =
                    self.learners.iter_mut().find(|sim| sim.slot == (job.hotkey, job.slot) && sim.record.session_epoch == job.session_epoch)
                {
                    sim.lease_steps = job.leases.iter().map(|lease| (lease.id, lease.steps)).collect();
                }
                None
            }
            Effect::PublishPullGrants { slot, wants, .. } => {
                let sim = self.learners.iter_mut().find(|sim| sim.slot == slot)?;
                for want in wants {
                    match want {
                        Want::WriteOnce { key: Key::Payload { t, .. }, .. } if !sim.record.uploaded.contains(&t) => {
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
            Effect::StoreCommitment { slot, t, .. } if self.answered_before.contains(&slot) => Some(Input::CommitmentRefused { slot, t }),
            Effect::StoreCommitment { slot, t, id } => Some(Input::CommitmentStored { slot, t, id }),
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
            Effect::Merge { tape, rejected, previous_keyframe } => {
                let manifest = self.merges.entry(tape.t).or_insert_with(|| merge(&tape, rejected, previous_keyframe)).clone();
                self.trace.push(format!("merge {} v{}", manifest.t, manifest.version));
                let id = Digest::blake3(&codec::encode(&manifest));
                Some(Input::Merged { manifest: Box::new(manifest), id, keyframe_length: 100 })
            }
            Effect::ReadBeacon { cycle, block } => Some(Input::Beacon { cycle, block, hash: [block as u8; 32] }),
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
            Effect::StoreSnapshot { bytes, .. } => {
                self.snapshot = Some(bytes);
                None
            }
            Effect::Retire { retired } => {
                self.retired.push(*retired);
                None
            }
            Effect::Watch { .. } | Effect::PublishCurrent | Effect::PublishStanding { .. } | Effect::PublishStatus { .. } => None,
        }
    }

    /// Lets `ms` pass in polls of 100 ms.
    fn run(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now_ms += 100;
            if self.now_ms.is_multiple_of(1_000) {
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
                let input = Input::Progress { slot: sim.slot, id, record: Box::new(sim.record.clone()) };
                self.input(input);
            }
            self.input(Input::Tick);
        }
    }

    fn open_audits(&mut self, index: usize, head: &Head) {
        let sim = &mut self.learners[index];
        for notice in &head.notices {
            let Notice::OpenAudit { audit, hotkey, key, .. } = notice;
            assert_eq!(*key, audit.0, "the key that was made for this audit");
            if *hotkey == sim.slot.0 && !sim.record.openings.iter().any(|part| part.audit == *audit) {
                sim.record.openings =
                    (0..3).map(|part| OpeningPart { audit: *audit, part, length: 5, sha256: Digest::ZERO, uploaded: false }).collect();
            }
        }
    }

    fn until_complete(&mut self, limit_ms: u64) {
        let end = self.now_ms + limit_ms;
        while self.machine.state() != RunState::Complete {
            assert!(self.now_ms < end, "not complete; trace {:?}", self.trace);
            self.run(1_000);
        }
    }
}

fn merge(tape: &Tape, rejected: Vec<Contribution>, previous: (Digest, u64)) -> MergeManifest {
    let accepted = tape.inputs.iter().map(|input| Contribution {
        hotkey: input.hotkey,
        slot: input.slot,
        commitment: input.commitment,
        payload: input.payload,
        base_version: input.base_version,
        steps: input.steps,
        tokens: input.tokens,
        weight_ppm: input.weight_ppm,
        norm: 1,
        clip_ppm: 1_000_000,
        cosine_ppm: 1,
        neighbour_ppm: 0,
        rest_ppm: 0,
        outcome: Reason::None,
    });
    let merged = !tape.inputs.is_empty() || tape.restores.is_some();
    MergeManifest {
        t: tape.t,
        fragment: tape.fragment,
        base_version: tape.base_version,
        version: tape.base_version + u64::from(merged),
        block: tape.block,
        closing: tape.closing,
        contributions: rejected.into_iter().chain(accepted).collect(),
        keyframe: if merged { Digest::blake3(&codec::encode(tape)) } else { previous.0 },
        state: Digest::blake3(&codec::encode(tape)),
        step_norm: 1,
        step_limit_ppm: 1_000_000,
    }
}

#[test]
fn every_fragment_is_merged_as_often_as_the_run_says_and_the_end_is_released_once() {
    let mut world = World::new(3, 3);
    world.until_complete(120_000);
    assert_eq!(world.machine.fragment_versions(), vec![4; usize::from(P)], "three cycles and the closing round");
    let closing: Vec<u16> = world.merges.values().filter(|merge| merge.closing).map(|merge| merge.fragment).collect();
    assert_eq!(closing.iter().collect::<BTreeSet<_>>().len(), usize::from(P), "{closing:?}");
    assert_eq!((closing.len(), world.released), (usize::from(P), 1));
    let tokens: u64 = world.merges.values().flat_map(|merge| merge.accepted().map(|c| c.tokens)).sum();
    assert!(tokens > 0);
}

#[test]
fn all_learners_that_answer_in_time_are_in_the_merge() {
    let mut world = World::new(6, 5);
    world.until_complete(240_000);
    let contributors: Vec<usize> = world.merges.values().map(|merge| merge.accepted().count()).collect();
    let mean = contributors.iter().sum::<usize>() as f64 / contributors.len() as f64;
    assert!(mean > 4.0, "mean {mean} of 5: {contributors:?}");
}

#[test]
fn a_crash_after_any_input_loses_no_merge_and_makes_none_twice() {
    let mut reference = World::new(1, 2);
    reference.until_complete(60_000);
    for crash_after in 1..=reference.inputs {
        let mut world = World::new(1, 2);
        world.crash_after = Some(crash_after + 2);
        world.until_complete(60_000);
        assert_eq!(world.machine.fragment_versions(), vec![2; usize::from(P)], "crash after {crash_after}");
        for (t, tape) in &world.tapes {
            assert_eq!(world.merges[t].base_version, tape.base_version);
        }
        let mut versions: Vec<(u16, u64)> =
            world.merges.values().filter(|merge| merge.version > merge.base_version).map(|merge| (merge.fragment, merge.version)).collect();
        let count = versions.len();
        versions.sort_unstable();
        versions.dedup();
        assert_eq!(versions.len(), count, "crash after {crash_after}: a version was made twice");
    }
}

#[test]
fn a_silent_learner_delays_no_merge_and_its_rows_return() {
    let mut world = World::new(0, 3);
    world.run(10_000);
    let before = world.merges.len();
    world.learners[2].silent = true;
    world.run(20_000);
    assert!(world.merges.len() > before + 10, "{} merges before, {} after", before, world.merges.len());
    let leased = world.machine.ledger.totals().leased_rows;
    assert!(leased <= 2 * 2 * 24 * 4, "{leased} rows are leased to two learners");
    let totals = world.machine.ledger.totals();
    assert_eq!(totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows, 10_000);
}

#[test]
fn a_learner_that_ran_out_of_memory_hands_its_job_back_at_once() {
    let mut world = World::new(0, 2);
    world.run(3_000);
    let slot = world.learners[0].slot;
    assert!(!world.machine.learners[&slot].leases.is_empty());
    let leased = world.machine.ledger.totals().leased_rows;
    let mut last = world.learners[0].record.clone();
    (last.state, last.reason) = (LearnerState::Faulted, Reason::OutOfMemory);
    world.input(Input::Progress { slot, id: Digest::blake3(b"last"), record: Box::new(last) });
    let learner = &world.machine.learners[&slot];
    assert!(!learner.live && learner.leases.is_empty());
    assert!(world.machine.ledger.totals().leased_rows < leased, "its rows wait for another learner");
}

#[test]
fn a_newer_session_takes_the_slot_and_the_older_one_is_not_heard_any_more() {
    let mut world = World::new(0, 2);
    world.run(3_000);
    let old = world.learners[0].record.clone();
    let slot = world.learners[0].slot;
    world.learners[0] = Sim::new(1, 600, STEP_MS);
    world.run(3_000);
    assert_eq!(world.machine.learners[&slot].session_epoch, 600);
    world.input(Input::Progress { slot, id: Digest::ZERO, record: Box::new(old) });
    assert_eq!(world.machine.learners[&slot].session_epoch, 600);
    assert!(world.learners[0].record.local_step > 0);
}

#[test]
fn a_refused_upload_is_named_in_the_manifest_and_does_not_move_the_merge() {
    let mut world = World::new(1, 3);
    let slot = world.learners[0].slot;
    world.rejects.insert(slot, Reason::NotFinite);
    world.until_complete(60_000);
    let outcomes: Vec<Reason> =
        world.merges.values().flat_map(|merge| &merge.contributions).filter(|c| (c.hotkey, c.slot) == slot).map(|c| c.outcome).collect();
    assert!(!outcomes.is_empty() && outcomes.iter().all(|outcome| *outcome == Reason::NotFinite), "{outcomes:?}");
    assert_eq!(world.machine.learners[&slot].contributions, 0);
}

#[test]
fn a_second_answer_to_a_pull_is_refused_where_the_first_is_in_evidence() {
    let mut world = World::new(1, 3);
    let slot = world.learners[0].slot;
    world.answered_before.insert(slot);
    world.until_complete(60_000);
    let of_slot = |manifest: &MergeManifest| manifest.contributions.iter().find(|one| (one.hotkey, one.slot) == slot).map(|one| one.outcome);
    let outcomes: Vec<Reason> = world.merges.values().filter_map(of_slot).collect();
    assert!(!outcomes.is_empty() && outcomes.iter().all(|outcome| *outcome == Reason::RepeatedCommitment), "{outcomes:?}");
}

#[test]
fn a_machine_that_a_replay_has_left_asks_again_for_all_that_its_last_process_had_asked_for() {
    let mut world = World::new(0, 2);
    world.run(3_000);
    // The last process died while it published a head.
    world.machine.head_dirty = true;
    world.machine.handle(world.now_ms, Input::Tick);
    while world.machine.poll_effect().is_some() {}
    world.machine.handle(world.now_ms, Input::Started);
    let effects: Vec<Effect> = std::iter::from_fn(|| world.machine.poll_effect()).collect();
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Watch { live, .. } if live.len() == 2)), "{effects:?}");
    assert!(effects.iter().any(|effect| matches!(effect, Effect::PublishHead { .. })), "{effects:?}");
    assert!(effects.iter().any(|effect| matches!(effect, Effect::PublishCurrent)), "{effects:?}");
}

#[test]
fn inputs_after_a_snapshot_give_the_machine_that_saw_all_of_them() {
    let encode = |machine: &Orchestrator| bincode::serde::encode_to_vec(machine, bincode::config::standard()).unwrap();
    let mut world = World::new(0, 2);
    world.run(2_900);
    let snapshot = encode(&world.machine);
    let mut replayed: Orchestrator = bincode::serde::decode_from_slice(&snapshot, bincode::config::standard()).unwrap().0;
    // Entries of the log wait for their turn, which depends on when the last ones were published.
    for step in 0..30 {
        let now_ms = world.now_ms + step * 100;
        for machine in [&mut world.machine, &mut replayed] {
            machine.log.add(LogKind::Receipt, Digest::blake3(&now_ms.to_le_bytes()));
            machine.handle(now_ms, if step % 7 == 6 { Input::LogPublished } else { Input::Tick });
            while machine.poll_effect().is_some() {}
        }
        assert!(encode(&world.machine) == encode(&replayed), "different after {step} inputs");
    }
}

#[test]
fn each_merged_learner_cycle_is_audited_once_and_opened() {
    let mut world = World::new(3, 3);
    world.until_complete(120_000);
    world.run(40_000);
    assert_eq!(world.orders.len(), 12, "three learners, three cycles and the closing round");
    assert!(world.orders.iter().all(|(_, parts)| *parts == 3));
    assert_eq!(world.machine.status().audits_open, 0);
}

#[test]
fn a_miner_that_does_not_open_gets_an_order_without_opening() {
    let mut world = World::new(1, 2);
    world.until_complete(60_000);
    world.learners[0].silent = true;
    let slot = world.learners[0].slot;
    world.run(60_000);
    let order = world.orders.iter().find(|(selection, _)| selection.hotkey == slot.0).unwrap();
    assert_eq!(order.1, 0);
}

#[test]
fn every_outer_step_has_a_manifest_also_where_a_fragment_is_passed_over() {
    let mut world = World::new(3, 2);
    world.run(4_000);
    // Nobody answers for longer than a pull's deadline: at least one merge stays empty and is made up for later.
    for sim in &mut world.learners {
        sim.silent = true;
    }
    world.run(20_000);
    for sim in &mut world.learners {
        sim.silent = false;
    }
    world.until_complete(240_000);
    assert!(world.merges.values().any(|merge| merge.version == merge.base_version), "no merge was empty");
    let steps: Vec<u64> = world.merges.keys().copied().collect();
    assert_eq!(steps, (0..world.machine.closed_below).collect::<Vec<_>>());
}

/// Checks every log head against the one before, and gives the entries in order.
fn logged(world: &World) -> Vec<LogEntry> {
    let mut frontier = Frontier::default();
    let mut entries = Vec::new();
    for head in world.log.values() {
        head.extends(&frontier).unwrap();
        frontier = head.frontier.clone();
        entries.extend(head.entries.iter().copied());
    }
    assert_eq!(world.head.as_ref().unwrap().log, LogRef::from(&frontier));
    entries
}

#[test]
fn everything_that_decides_about_merges_and_pay_is_in_the_log_once() {
    let mut world = World::new(3, 3);
    world.until_complete(120_000);
    world.run(60_000);
    let entries = logged(&world);
    let of = |kind: LogKind| entries.iter().filter(|entry| entry.kind == kind).map(|entry| entry.document).collect::<Vec<_>>();
    let merges: BTreeSet<Digest> = world.merges.values().map(|merge| Digest::blake3(&codec::encode(merge))).collect();
    assert_eq!(of(LogKind::Merge).into_iter().collect::<BTreeSet<_>>(), merges);
    let commitments = of(LogKind::Commitment);
    let merged = world.merges.values().flat_map(|merge| merge.accepted().map(|one| one.commitment)).collect::<Vec<_>>();
    assert!(merged.iter().all(|commitment| commitments.contains(commitment)));
    assert_eq!((of(LogKind::Verdict).len(), of(LogKind::Release).len()), (12, 1));
    assert!(!of(LogKind::Receipt).is_empty());
    assert_eq!(world.machine.status().verdicts.pass, 12);
    let unique: BTreeSet<(LogKind, Digest)> = entries.iter().map(|entry| (entry.kind, entry.document)).collect();
    let others = |entry: &&LogEntry| entry.kind != LogKind::Commitment;
    assert_eq!(unique.iter().filter(|(kind, _)| *kind != LogKind::Commitment).count(), entries.iter().filter(others).count());
}

#[test]
fn a_finished_lease_counts_by_its_receipt_and_without_one_by_its_commitments() {
    let mut world = World::new(0, 3);
    let (refused, partial) = (world.learners[0].slot, world.learners[1].slot);
    world.receipts.insert(refused, Err(Reason::ReceiptMismatch));
    world.receipts.insert(partial, Ok((Digest::ZERO, vec![0, 1, 5])));
    world.learners[2].hands_in_receipts = false;
    world.run(40_000);
    let ended: Vec<&LeaseRecord> = world.machine.leases.values().filter(|record| record.ended).collect();
    assert!([refused, partial].iter().all(|slot| ended.iter().any(|record| record.slot == *slot)));
    for record in ended {
        let shard = |step: u32| protocol::lease::LeaseRows::of(&record.lease).step(step)[0].row;
        let state = |step: u32| world.machine.ledger.row("a", shard(step)).unwrap();
        if record.slot == partial {
            assert_eq!(record.receipt, ReceiptStage::Settled { trained: vec![0, 1, 5] });
            assert_eq!([0, 1, 5, 2, 23].map(state), [RowState::Done, RowState::Done, RowState::Done, RowState::Lost, RowState::Lost]);
        } else {
            let expected = |step: u32| if step < record.evidence { RowState::Done } else { RowState::Lost };
            assert!((0..record.reported).all(|step| state(step) == expected(step)), "{record:?}");
        }
    }
    let totals = world.machine.ledger.totals();
    assert_eq!(totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows, 10_000);
}

#[test]
fn draining_stops_leases_and_pulls_and_releases() {
    let mut world = World::new(0, 2);
    world.run(5_000);
    let opened = world.machine.next_t;
    world.input(Input::Drain);
    world.until_complete(30_000);
    assert_eq!(world.machine.next_t, opened + u64::from(P), "the closing round");
    let opened = world.machine.next_t;
    world.run(5_000);
    assert_eq!(world.machine.next_t, opened);
}
