//! What a world is made of and what will go wrong in it: everything follows from the seed.

use protocol::documents::{Action, AuditParameters, Codec, InnerOptimizer, LrSchedule, RunParameters};

use super::paper::Scheme;
use super::random::Random;
use super::tensors::SHARD_ROWS;

/// How a miner behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    Honest,
    /// Uploads a payload that it did not train.
    Liar,
    /// Uploads bytes that differ from what it committed to.
    OtherBytes,
    /// Uploads after its pulls were closed.
    Late,
    /// Signs its records with another miner's name.
    Forger,
    /// Never trains: commits to what another miner has committed to.
    Copier,
    /// Calls its openings uploaded, and uploads nothing.
    Hollow,
}

/// What goes wrong, and how often. Rates are in parts per million of the operations; a mean time of 0 is never.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// No new fault begins after this; what is under way ends by itself.
    pub until_ms: u64,
    /// The store answers 5xx and did nothing.
    pub error_ppm: u64,
    /// The store did what was asked, and the answer is lost: a retried conditional write meets its own object (412).
    pub lost_reply_ppm: u64,
    /// An unconditional PUT arrives a second time, after later ones.
    pub duplicate_ppm: u64,
    /// A GET gives the version before the newest, for up to three seconds after a write.
    pub stale_ppm: u64,
    /// An upload breaks off half-way; nothing is stored.
    pub partial_ppm: u64,
    /// A request takes twenty times as long.
    pub tail_ppm: u64,
    pub orchestrator_crash_ms: u64,
    /// A process of the orchestrator stands still for up to a minute and a half.
    pub pause_ms: u64,
    /// The clock of some node jumps by up to ten minutes and is set right within a minute.
    pub clock_jump_ms: u64,
    /// Crashes of the orchestrator that take its disk along.
    pub lost_disk_ppm: u64,
    /// Batches of inputs behind which a snapshot goes to the bucket, beside those that are due: one must be good at any moment.
    pub snapshot_ppm: u64,
    pub miner_crash_ms: u64,
    pub validator_crash_ms: u64,
    /// One node, or a group of them, does not reach the store.
    pub partition_ms: u64,
    /// The store answers nobody.
    pub outage_ms: u64,
    /// Longest outage; 0 is 20 s.
    pub longest_outage_ms: u64,
    pub chain_stall_ms: u64,
    /// Clocks are off by up to this much.
    pub skew_ms: u64,
    /// Miners whose steps take five times as long.
    pub slow_ppm: u64,
    /// Steps whose loss is not finite.
    pub not_finite_ppm: u64,
    /// Miners that come late, and miners that stop on SIGTERM.
    pub late_ppm: u64,
    pub drain_ppm: u64,
    /// How long a crashed miner stays away; by chance if it is not given.
    pub restart_ms: Option<u64>,
}

/// A miner that the operator bans, and perhaps pardons.
#[derive(Clone, Copy, Debug)]
pub struct Ban {
    pub miner: usize,
    pub banned_ms: u64,
    pub unbanned_ms: Option<u64>,
}

/// A hotkey gains or loses its validator permit, and has it back, or loses it again.
#[derive(Clone, Copy, Debug)]
pub struct Permit {
    /// Miners come first, then validators.
    pub uid: usize,
    pub changed_ms: u64,
    pub back_ms: u64,
}

/// A world before it begins.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub scheme: Scheme,
    pub miners: usize,
    pub validators: usize,
    /// A second host of the orchestrator stands by.
    pub has_standby: bool,
    pub parameters: RunParameters,
    /// Of each of the four shards that the run begins with.
    pub shard_rows: u64,
    /// Mean duration of an inner step.
    pub step_ms: u64,
    /// One-way share of a request, typically.
    pub latency_ms: u64,
    /// What moving a payload or a keyframe takes beyond that.
    pub upload_ms: u64,
    pub download_ms: u64,
    pub block_ms: u64,
    /// Inputs between two snapshots of the orchestrator.
    pub snapshot_every: usize,
    pub behaviours: Vec<Behaviour>,
    /// What the operator orders, and when.
    pub orders: Vec<(u64, Action)>,
    /// Whom the operator bans.
    pub bans: Vec<Ban>,
    /// Whose permit changes.
    pub permits: Vec<Permit>,
    pub faults: Faults,
    /// A run that is not complete by then hangs.
    pub limit_ms: u64,
    /// Whether to watch for the run's end, or to run for [`Plan::limit_ms`].
    pub is_open_ended: bool,
    /// Print every event.
    pub is_verbose: bool,
    /// When to kill a quarter of the miners for good.
    pub kill_quarter_ms: Option<u64>,
}

/// Parameters of the protocol at mainnet proportions, with short steps.
pub fn parameters(fragments: u16, cycles: u64, poll_ms: u64, step_ms: u64) -> RunParameters {
    RunParameters {
        fragments,
        inner_steps: fragments,
        overlap: 2,
        grace_ppm: 800_000,
        cycles,
        outer_lr_ppm: 1_000_000,
        outer_momentum_ppm: 0,
        step_target_ms: 0,
        poll_ms,
        slots: 1,
        quorum_min: 2,
        pull_deadline_ms: 8 * step_ms + 20 * poll_ms,
        learner_ttl_ms: 10 * step_ms + 10 * poll_ms,
        sequence_length: 128,
        batch_rows: 4,
        lease_steps: 24,
        codec_up: Codec::Bf16,
        codec_down: Codec::Bf16,
        release_every_cycles: 0,
        inner: InnerOptimizer {
            lr_nano: 1_000_000,
            beta1_ppm: 900_000,
            beta2_ppm: 950_000,
            eps_pico: 10_000,
            weight_decay_ppm: 0,
            clip_norm_ppm: 1_000_000,
            schedule: LrSchedule { warmup_steps: 0, total_steps: 0, final_ppm: 0 },
        },
        audit: AuditParameters {
            rate_ppm: 1_000_000,
            loss_rows: 16,
            replay_steps: 4,
            replay_tolerance_ppm: 1_000,
            beacon_blocks: 3,
            opening_ms: 60_000,
        },
        training: Default::default(),
    }
}

impl Plan {
    /// A run without any fault.
    pub fn calm(seed: u64, miners: usize, cycles: u64) -> Self {
        let (poll_ms, step_ms) = (1_000, 4_000);
        Self {
            seed,
            scheme: Scheme::Cheap,
            miners,
            validators: 2,
            has_standby: false,
            parameters: parameters(24, cycles, poll_ms, step_ms),
            shard_rows: SHARD_ROWS,
            step_ms,
            latency_ms: 40,
            upload_ms: 300,
            download_ms: 300,
            block_ms: 3_000,
            snapshot_every: 2_000,
            behaviours: vec![Behaviour::Honest; miners],
            orders: Vec::new(),
            bans: Vec::new(),
            permits: Vec::new(),
            faults: Faults::default(),
            limit_ms: 3_600_000,
            is_open_ended: false,
            is_verbose: false,
            kill_quarter_ms: None,
        }
    }

    /// A run of `span_ms` without an end in which only learners fail: each after `mean_ms` on average, and its next process begins
    /// `restart_ms` later.
    pub fn failing_learners(learners: usize, mean_ms: u64, restart_ms: u64, span_ms: u64) -> Self {
        const STEP_MS: u64 = 2_000;
        let mut plan = Self::calm(1, learners, 0);
        plan.parameters = parameters(24, 0, 1_000, STEP_MS);
        (plan.step_ms, plan.validators, plan.block_ms) = (STEP_MS, 1, 12_000);
        plan.faults = Faults { until_ms: span_ms, miner_crash_ms: mean_ms, restart_ms: Some(restart_ms), ..Faults::default() };
        (plan.limit_ms, plan.is_open_ended) = (span_ms, true);
        plan
    }

    /// A run of `span_ms` without an end, in the middle of which a quarter of the miners is killed for good, and nothing else fails.
    pub fn quarter_killed(miners: usize, span_ms: u64) -> Self {
        let calm = Self::calm(1, miners, 0);
        Self { limit_ms: span_ms, is_open_ended: true, kill_quarter_ms: Some(span_ms / 2), ..calm }
    }

    /// The world of a seed: sizes and times vary, and about half of all kinds of faults are there, each at a rate of its own.
    pub fn of_seed(seed: u64, miners: usize, cycles: u64) -> Self {
        let mut random = Random::new(seed);
        let mut plan = Self::calm(seed, miners, cycles);
        let poll_ms = *random.pick(&[500, 1_000, 2_000]);
        plan.step_ms = random.between(2_000, 6_000);
        plan.parameters = parameters(24, cycles, poll_ms, plan.step_ms);
        plan.parameters.audit.replay_steps = *random.pick(&[2, 4, 8]);
        plan.parameters.audit.rate_ppm = *random.pick(&[400_000, 1_000_000]);
        plan.parameters.lease_steps = *random.pick(&[8, 24, 48]);
        plan.parameters.quorum_min = *random.pick(&[1, 2, 8]).min(&(miners as u16 / 2).max(1));
        plan.validators = random.between(1, 3) as usize;
        plan.latency_ms = random.between(10, 120);
        plan.upload_ms = random.between(0, plan.step_ms);
        plan.download_ms = random.between(0, plan.step_ms);
        plan.snapshot_every = *random.pick(&[50, 500, 2_000]);
        let until_ms = cycles * 24 * plan.step_ms;
        let mut mean = |ms: u64| if random.chance(500_000) { random.between(ms / 2, ms * 4) } else { 0 };
        let mut faults = Faults {
            until_ms,
            orchestrator_crash_ms: mean(30_000),
            miner_crash_ms: mean(60_000),
            validator_crash_ms: mean(60_000),
            partition_ms: mean(60_000),
            outage_ms: mean(120_000),
            chain_stall_ms: mean(120_000),
            ..Faults::default()
        };
        let mut rate = |ppm: u64| if random.chance(500_000) { random.between(ppm / 10, ppm) } else { 0 };
        faults.error_ppm = rate(100_000);
        faults.lost_reply_ppm = rate(50_000);
        faults.duplicate_ppm = rate(30_000);
        faults.stale_ppm = rate(100_000);
        faults.partial_ppm = rate(50_000);
        faults.tail_ppm = rate(50_000);
        faults.slow_ppm = rate(200_000);
        faults.not_finite_ppm = rate(5_000);
        faults.late_ppm = rate(300_000);
        faults.drain_ppm = rate(200_000);
        faults.skew_ms = if random.chance(500_000) { random.between(0, 25_000) } else { 0 };
        plan.faults = faults;
        if random.chance(300_000) {
            let kinds = [Behaviour::Liar, Behaviour::OtherBytes, Behaviour::Late, Behaviour::Forger, Behaviour::Copier, Behaviour::Hollow];
            let share = random.between(1, (miners as u64 / 5).max(1));
            for _ in 0..share {
                let kind = *random.pick(&kinds);
                let index = random.below(miners as u64) as usize;
                plan.behaviours[index] = kind;
            }
        }
        for number in 0..random.between(0, 2) {
            let shards = (0..random.between(1, 3)).map(|shard| format!("added-{number}-{shard}")).collect();
            plan.orders.push((random.between(0, until_ms), Action::AddShards { shards }));
        }
        if random.chance(300_000) {
            plan.orders.push((random.between(0, until_ms), Action::Release));
        }
        if random.chance(250_000) {
            plan.orders
                .push((random.between(until_ms / 3, until_ms), Action::Rollback { version: random.between(0, (cycles / 2).max(2)) }));
        }
        if random.chance(500_000) {
            plan.faults.lost_disk_ppm = random.between(0, 300_000);
        }
        plan.has_standby = random.chance(400_000);
        if plan.has_standby {
            plan.faults.pause_ms = random.between(20_000, 120_000);
        }
        if random.chance(300_000) {
            plan.faults.clock_jump_ms = random.between(10_000, 120_000);
        }
        if random.chance(300_000) {
            for _ in 0..random.between(1, 3) {
                let miner = random.below(miners as u64) as usize;
                let banned_ms = random.between(0, until_ms);
                plan.bans.push(Ban { miner, banned_ms, unbanned_ms: random.chance(600_000).then(|| random.between(banned_ms, until_ms)) });
            }
        }
        if random.chance(300_000) {
            // Little text, read more than once: epochs end, and not at the end of a step.
            let held = miners as u64 * u64::from(plan.parameters.lease_steps * plan.parameters.batch_rows);
            plan.shard_rows = random.between(held / 2, held * 3 / 2) + 1;
        }
        // Drawn last: what was drawn before stays what it was for each seed.
        if random.chance(250_000) {
            plan.parameters.release_every_cycles = random.between(1, 2) as u32;
        }
        if random.chance(60_000) {
            // Long enough for learners to be gone, and for grants and leases to be over.
            plan.faults.longest_outage_ms = random.between(60_000, 900_000);
            plan.faults.outage_ms = plan.faults.outage_ms.max(120_000);
        }
        if random.chance(400_000) {
            plan.faults.snapshot_ppm = random.between(1_000, 100_000);
        }
        if random.chance(300_000) {
            let uid = if random.chance(500_000) { random.below(miners as u64) as usize } else { miners + plan.validators - 1 };
            let changed_ms = random.between(0, until_ms);
            plan.permits.push(Permit { uid, changed_ms, back_ms: random.between(changed_ms, 2 * until_ms) });
        }
        plan.orders.sort_by_key(|(at_ms, _)| *at_ms);
        plan
    }
}
