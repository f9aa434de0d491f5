//! How much one machine bears: inputs in a second, bytes of a learner, the ledger of ten trillion tokens. The numbers are printed.
//! The bounds of times are some way from them, because test machines are busy; that of bytes is what `docs/reliability.md` says.

use std::collections::BTreeMap;
use std::time::Instant;

use daemon::Machine;
use protocol::documents::{
    AuditParameters, CatalogRef, Codec, Commitment, Contribution, FragmentProgress, InnerOptimizer, LearnerState, LrSchedule,
    MergeManifest, Progress, ReleaseRef, RowRange, RunParameters, Tape,
};
use protocol::envelope::RunId;
use protocol::ledger::TokenLedger;
use protocol::{AccountId, Digest, Reason};
use quasar_orchestrator::machine::{Effect, FragmentSetup, Guest, Input, Key, Orchestrator, RunSetup, ShardRows, Slot, Want};

const LEARNERS: u64 = 1_000;
const FRAGMENTS: u16 = 24;
const POLL_MS: u64 = 2_000;
/// Inputs that arrive in a millisecond: what is measured is whether the machine keeps up.
const RECORDS_PER_MS: u64 = 100;

fn setup() -> RunSetup {
    let parameters = RunParameters {
        fragments: FRAGMENTS,
        inner_steps: 24,
        overlap: 2,
        grace_ppm: 800_000,
        cycles: 0,
        outer_lr_ppm: 700_000,
        outer_momentum_ppm: 0,
        step_target_ms: 0,
        poll_ms: POLL_MS,
        slots: 8,
        quorum_min: 8,
        pull_deadline_ms: 60_000,
        learner_ttl_ms: 120_000,
        sequence_length: 4_096,
        batch_rows: 96,
        lease_steps: 480,
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
            beacon_blocks: 3,
            opening_ms: 20_000,
        },
        training: Default::default(),
    };
    let fragment =
        FragmentSetup { keyframe: Digest::ZERO, keyframe_length: 100, state: Digest::ZERO, elements: 468, payload_length: 1_000 };
    RunSetup {
        run: RunId([7; 16]),
        parameters,
        release: ReleaseRef { release: "base".into(), manifest: Digest::ZERO },
        fragments: vec![fragment; usize::from(FRAGMENTS)],
        catalog: CatalogRef { page: 0, digest: Digest::ZERO },
        shards: (0..10_000).map(shard).collect(),
    }
}

fn shard(number: u64) -> ShardRows {
    ShardRows { id: format!("corpus-{number:06}"), source: "web".into(), rows: 16_384, row_tokens: 4_096 }
}

fn hotkey(index: u64) -> AccountId {
    AccountId(Digest::blake3(&index.to_le_bytes()).0)
}

fn progress() -> Progress {
    Progress {
        worker: "worker-0".into(),
        session_epoch: 500,
        slot: 0,
        protocol: 1,
        state: LearnerState::Training,
        reason: Reason::None,
        lease: 0,
        lease_step: 0,
        local_step: 1,
        step_ms: 10,
        loss: 8_000_000,
        step_chain: Digest::ZERO,
        fragments: vec![FragmentProgress { version: 0, steps: 1 }; usize::from(FRAGMENTS)],
        commitments: Vec::new(),
        uploaded: Vec::new(),
        openings: Vec::new(),
        receipt: None,
        padding: Vec::new(),
    }
}

/// Bytes of memory that this process holds.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4_096
}

/// A thousand learners that step, and answer each pull as soon as they see it.
struct Load {
    machine: Orchestrator,
    records: BTreeMap<Slot, Progress>,
    now_ms: u64,
    /// Open pulls: t, fragment, version.
    pulls: Vec<(u64, u16, u64)>,
    inputs: u64,
    elapsed_s: f64,
}

impl Load {
    /// Handles inputs and what their effects bring back; only the machine's own time counts.
    fn feed(&mut self, first: Input) {
        let mut queue = vec![first];
        while let Some(input) = queue.pop() {
            let begun = Instant::now();
            self.machine.handle(self.now_ms, input);
            let effects: Vec<Effect> = std::iter::from_fn(|| self.machine.poll_effect()).collect();
            self.elapsed_s += begun.elapsed().as_secs_f64();
            self.inputs += 1;
            for effect in effects {
                match effect {
                    Effect::PublishHead { head } => {
                        self.pulls = head.pulls.iter().map(|pull| (pull.t, pull.fragment, pull.version)).collect();
                        queue.push(Input::HeadPublished);
                    }
                    Effect::PublishJob { job, .. } => {
                        if let Some(record) = self.records.get_mut(&(job.hotkey, job.slot))
                            && record.lease == 0
                            && let Some(lease) = job.leases.first()
                        {
                            record.lease = lease.id;
                        }
                    }
                    Effect::StoreCommitment { slot, t, id, commitment } => queue.push(Input::CommitmentStored { slot, t, id, commitment }),
                    Effect::PublishPullGrants { slot, wants, .. } => {
                        let record = self.records.get_mut(&slot).unwrap();
                        record.uploaded = wants
                            .iter()
                            .filter_map(|want| match want {
                                Want::WriteOnce { key: Key::Payload { t, .. }, .. } => Some(*t),
                                _ => None,
                            })
                            .collect();
                    }
                    Effect::WriteTape { tape } => queue.push(Input::TapeWritten { tape }),
                    Effect::Merge { tape, rejected, previous_keyframe } => {
                        let manifest = merge(&tape, rejected, previous_keyframe.0);
                        queue.push(Input::Merged { manifest: Box::new(manifest), id: Digest::ZERO, keyframe_length: 100 });
                    }
                    Effect::CheckPayload { slot, t, .. } => queue.push(Input::PayloadChecked { slot, t, outcome: Reason::None }),
                    _ => {}
                }
            }
        }
    }

    fn record(&mut self, slot: Slot) {
        let record = self.records.get_mut(&slot).unwrap();
        let (lease, lease_step, local_step) = (record.lease, record.lease_step, record.local_step);
        record.commitments.retain(|commitment| self.pulls.iter().any(|(t, ..)| *t == commitment.t));
        for (t, fragment, version) in &self.pulls {
            if lease > 0 && !record.commitments.iter().any(|commitment| commitment.t == *t) {
                record.commitments.push(Commitment {
                    t: *t,
                    fragment: *fragment,
                    base_version: *version,
                    length: 1_000,
                    sha256: Digest::ZERO,
                    blake3: Digest::ZERO,
                    steps: 1,
                    tokens: 0,
                    lease,
                    lease_step,
                    local_step,
                    start_step: 0,
                    start_digest: Digest::ZERO,
                    step_chain: Digest::ZERO,
                });
            }
        }
        let record = Box::new(record.clone());
        let id = Digest::blake3(&local_step.to_le_bytes());
        self.feed(Input::Progress { slot, id, is_current: true, record });
    }
}

fn merge(tape: &Tape, mut contributions: Vec<Contribution>, keyframe: Digest) -> MergeManifest {
    contributions.extend(tape.inputs.iter().map(|input| Contribution { norm: 1, cosine_ppm: 1, ..input.contribution(Reason::None) }));
    let version = tape.base_version + u64::from(!tape.inputs.is_empty());
    MergeManifest { version, state: Digest::ZERO, step_norm: 1, ..MergeManifest::unmoved(tape, keyframe, contributions) }
}

#[test]
fn a_machine_takes_the_inputs_of_a_thousand_learners() {
    let mut load = Load {
        machine: Orchestrator::new(setup()),
        records: (0..LEARNERS).map(|index| ((hotkey(index), 0), progress())).collect(),
        now_ms: 1_700_000_000_000,
        pulls: Vec::new(),
        inputs: 0,
        elapsed_s: 0.0,
    };
    load.feed(Input::Claimed { epoch: 1 });
    load.feed(Input::Metagraph {
        guests: (0..LEARNERS).map(|index| Guest { hotkey: hotkey(index), validator: false, recipient: Some([1; 32]) }).collect(),
    });
    let (empty, before) = (load.machine.to_snapshot(0).unwrap().len(), resident());
    let slots: Vec<Slot> = load.records.keys().copied().collect();
    for slot in &slots {
        load.record(*slot);
    }
    let bytes = (load.machine.to_snapshot(0).unwrap().len() - empty) / LEARNERS as usize;
    let memory = resident().saturating_sub(before) / LEARNERS;
    (load.inputs, load.elapsed_s) = (0, 0.0);
    let begun_ms = load.now_ms;
    let mut records = 0;
    for _ in 0..60 {
        for slot in &slots {
            records += 1;
            load.now_ms = begun_ms + records / RECORDS_PER_MS;
            let record = load.records.get_mut(slot).unwrap();
            record.local_step += 1;
            record.lease_step = (record.lease_step + 1).min(470);
            load.record(*slot);
        }
    }
    let rate = load.inputs as f64 / load.elapsed_s;
    let status = load.machine.status();
    println!(
        "machine with {LEARNERS} learners: {rate:.0} inputs/s over {} inputs, of which {records} progress records; {} merges of {} contributions; \
         {bytes} bytes of a snapshot and about {memory} bytes of memory a learner",
        load.inputs, status.merges, status.contributions
    );
    assert!(status.merges > 20, "{} merges", status.merges);
    // A tenth of what an idle machine does with optimised code: a walk over all learners at each input is noticed.
    assert!(rate > 14_000.0, "{rate} inputs/s");
    assert!(bytes < 8_192, "{bytes} bytes a learner");
}

/// Leases that are not over, with their rows.
type Held = Vec<(u64, Vec<RowRange>)>;

/// Rows of a lease in the run that the mainnet starts from.
fn mainnet_lease() -> u64 {
    let run: toml::Table = toml::from_str(include_str!("../../../configs/run-mainnet.toml")).unwrap();
    let number = |name: &str| run["parameters"][name].as_integer().unwrap().unsigned_abs();
    number("lease_steps") * number("batch_rows")
}

/// A hundred learners take and finish 10,000 leases as they do. Microseconds from the giving out of a lease to its end, and what is
/// held in the end. The median of batches: a process that takes the core meanwhile does not move it.
fn take_and_finish(ledger: &mut TokenLedger, rows: u64) -> (f64, Held) {
    const BATCH: u64 = 100;
    let (mut held, mut batches_us) = (Held::new(), Vec::new());
    for first in (1_000_000..1_010_000).step_by(BATCH as usize) {
        let begun = Instant::now();
        for lease in first..first + BATCH {
            held.push((lease, ledger.lease(lease, rows, 1)));
            if held.len() > 100 {
                let (id, ranges) = held.remove((lease * 7 % 100) as usize);
                ledger.end_lease_whole(id, &ranges, lease % 50 != 0);
            }
        }
        batches_us.push(begun.elapsed().as_secs_f64() / BATCH as f64 * 1e6);
    }
    batches_us.sort_by(f64::total_cmp);
    (batches_us[batches_us.len() / 2], held)
}

/// Ends leases in a permutation without order: every row apart from its neighbours, a third done, some lost. Microseconds for each.
fn end_in_disorder(ledger: &mut TokenLedger, held: &[(u64, Vec<RowRange>)]) -> f64 {
    let begun = Instant::now();
    for (id, ranges) in held {
        let rows: Vec<(&str, u64)> =
            ranges.iter().flat_map(|range| (range.start..range.end).map(|row| (range.shard.as_str(), row))).collect();
        let order = (0..rows.len()).map(|place| rows[place * 1_009 % rows.len()]);
        ledger.end_lease(*id, order, rows.len() as u64 / 3, 96);
    }
    begun.elapsed().as_secs_f64() / held.len() as f64 * 1e6
}

/// Ten trillion tokens in shards of 67 million, of rows of 4,096.
#[test]
fn ten_trillion_tokens_are_some_megabytes_and_microseconds() {
    const SHARDS: u64 = 150_000;
    const ROWS: u64 = 16_384;
    let mut half = TokenLedger::default();
    let begun = Instant::now();
    for shard in 0..SHARDS {
        half.add_shard_of(["web", "code", "books"][(shard % 3) as usize], &format!("corpus-{shard:06}"), ROWS, 4_096);
    }
    let filled_ms = begun.elapsed().as_secs_f64() * 1e3;
    // Half of all shards are done.
    let mut id = 0;
    while half.totals().done_rows < SHARDS / 2 * ROWS {
        id += 1;
        let ranges = half.lease(id, ROWS * 4, 1);
        half.end_lease_whole(id, &ranges, true);
    }
    // A lease takes about 1 us, and one of the mainnet, whose rows lie in two or three shards, some 2 us: a tenth of the pace fails.
    let [bytes, _] = [(24 * 96, 5.0), (mainnet_lease(), 10.0)].map(|(rows, each_us_max)| {
        let mut ledger = half.clone();
        let (each_us, held) = take_and_finish(&mut ledger, rows);
        let ragged_us = end_in_disorder(&mut ledger, &held);
        let bytes = ledger.bytes();
        println!(
            "ledger of {SHARDS} shards, {:.1} T tokens: {:.1} MB, {} bytes a shard; filled in {filled_ms:.0} ms; \
             a lease of {rows} rows given out and ended {each_us:.1} us; one that ends in disorder {ragged_us:.0} us",
            (SHARDS * ROWS * 4_096) as f64 / 1e12,
            bytes as f64 / 1e6,
            bytes / SHARDS as usize,
        );
        let totals = ledger.totals();
        assert_eq!(totals.waiting_rows + totals.leased_rows + totals.done_rows + totals.lost_rows, SHARDS * ROWS);
        assert!(each_us < each_us_max, "{each_us} us for a lease of {rows} rows");
        bytes
    });
    let stated = format!("| {:.1} MB, {} bytes a shard |", bytes as f64 / 1e6, bytes / SHARDS as usize);
    assert!(include_str!("../../../docs/reliability.md").contains(&stated), "docs/reliability.md does not say {stated}");
}
