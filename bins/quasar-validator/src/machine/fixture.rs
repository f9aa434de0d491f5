//! Small documents for the tests of the machine.

use chain::drand::Beacon;
use chain::epoch::EpochState;
use chain::{BlockRef, Hyperparameters, Metagraph, Neuron, WeightsView};
use protocol::audits::Selection;
use protocol::documents::{
    AuditDraw, AuditParameters, Codec, Contribution, InnerOptimizer, LrSchedule, Measurements, MergeManifest, RunParameters, Verdict,
    VerdictResult,
};
use protocol::schedule::{Work, merge_weights};
use protocol::{AccountId, Digest, Reason};

use super::cycles::DrawRead;
use crate::audit::Subject;

pub fn account(byte: u8) -> AccountId {
    AccountId([byte; 32])
}

/// A draw with one auditor.
pub fn drawn(cycle: u64, beacon_block: u64, auditor: u8) -> DrawRead {
    DrawRead::Drawn(Box::new(AuditDraw { cycle, beacon_block, beacon: Digest([4; 32]), validators: vec![account(auditor)] }))
}

pub fn contribution(hotkey: u8, slot: u8, tokens: u64, outcome: Reason) -> Contribution {
    Contribution {
        hotkey: account(hotkey),
        slot,
        commitment: Digest::ZERO,
        payload: Digest::ZERO,
        base_version: 0,
        steps: 1,
        tokens,
        weight_ppm: 0,
        norm: 1,
        clip_ppm: 1_000_000,
        cosine_ppm: 0,
        neighbour_ppm: 0,
        rest_ppm: 0,
        outcome,
    }
}

/// A sound manifest of outer step `t` with base version `t / fragments`, five blocks after that. Contributions with tokens were weighed.
pub fn merge(t: u64, fragments: u16, mut contributions: Vec<Contribution>) -> MergeManifest {
    let base_version = t / u64::from(fragments);
    let weighed: Vec<Work> =
        contributions.iter().filter(|one| one.tokens > 0).map(|one| Work { tokens: one.tokens, versions_behind: 0 }).collect();
    for (one, weight) in contributions.iter_mut().filter(|one| one.tokens > 0).zip(merge_weights(&weighed)) {
        one.base_version = base_version;
        one.weight_ppm = weight;
    }
    let is_merged = contributions.iter().any(|one| one.outcome == Reason::None);
    let version = base_version + u64::from(is_merged);
    MergeManifest {
        t,
        fragment: (t % u64::from(fragments)) as u16,
        base_version,
        version,
        block: 5 + base_version,
        closing: false,
        restores: None,
        contributions,
        keyframe: Digest::ZERO,
        state: Digest::ZERO,
        step_norm: 0,
        step_limit_ppm: 1_000_000,
    }
}

/// Learner `hotkey`/`slot` in cycle 0, audited by account 9.
pub fn subject(hotkey: u8, slot: u8) -> Subject {
    let selection = Selection {
        audit: Digest::blake3(&[hotkey, slot]),
        validator: account(9),
        cycle: 0,
        hotkey: account(hotkey),
        slot,
        t: 0,
        beacon_block: 8,
    };
    Subject { selection, fragment: 0, contribution: contribution(hotkey, slot, 10, Reason::None) }
}

/// A chain whose epochs have 50 blocks, at `number`, on which these hotkeys have uids in their order, stake and permits.
pub fn view(number: u64, hotkeys: &[u8]) -> WeightsView {
    let neurons = (0u16..).zip(hotkeys).map(|(uid, hotkey)| Neuron {
        uid,
        hotkey: account(*hotkey),
        coldkey: account(*hotkey),
        stake: 1_000,
        validator_permit: true,
        last_update: 0,
    });
    let last_epoch_block = number - number % 50;
    WeightsView {
        metagraph: Metagraph { block: BlockRef { number, hash: [number as u8; 32] }, neurons: neurons.collect() },
        hyperparameters: Hyperparameters {
            tempo: 50,
            weights_rate_limit: 10,
            min_allowed_weights: 1,
            max_weight_limit: u16::MAX,
            weights_version: 0,
            commit_reveal: false,
            stake_threshold: 0,
        },
        timestamp_ms: 1_800_000_000_000 + number * 12_000,
        block_ms: 12_000,
        mechanisms: 1,
        last_updates: vec![0; hotkeys.len()],
        owner_hotkey: None,
        is_null_consensus: false,
        row: Vec::new(),
        epoch: EpochState {
            tempo: 50,
            last_epoch_block,
            pending_epoch_at: 0,
            index: number / 50,
            blocks_since_last_step: number - last_epoch_block,
        },
        reveal_period_epochs: 1,
        commit_version: chain::timelock::COMMIT_REVEAL_VERSION,
        beacon: Beacon::quicknet(),
        last_stored_round: 0,
        commits: Vec::new(),
    }
}

pub fn verdict(cycle: u64, hotkey: u8, slot: u8, result: VerdictResult) -> Verdict {
    Verdict {
        audit: Digest::blake3(&[hotkey, slot]),
        validator: account(9),
        cycle,
        hotkey: account(hotkey),
        slot,
        t: 0,
        payload: Digest::ZERO,
        result,
        reason: Reason::None,
        measured: Measurements::NONE,
    }
}

pub fn parameters() -> RunParameters {
    RunParameters {
        fragments: 2,
        inner_steps: 2,
        overlap: 1,
        grace_ppm: 0,
        cycles: 1,
        outer_lr_ppm: 1_000_000,
        outer_momentum_ppm: 0,
        step_target_ms: 0,
        poll_ms: 100,
        slots: 1,
        quorum_min: 1,
        pull_deadline_ms: 1_000,
        learner_ttl_ms: 10_000,
        sequence_length: 16,
        batch_rows: 2,
        lease_steps: 8,
        codec_up: Codec::Bf16,
        codec_down: Codec::Bf16,
        release_every_cycles: 0,
        inner: InnerOptimizer {
            lr_nano: 20_000_000,
            beta1_ppm: 900_000,
            beta2_ppm: 950_000,
            eps_pico: 10_000,
            weight_decay_ppm: 0,
            clip_norm_ppm: 1_000_000,
            schedule: LrSchedule { warmup_steps: 0, total_steps: 0, final_ppm: 0 },
        },
        audit: AuditParameters {
            rate_ppm: 1_000_000,
            loss_rows: 4,
            replay_steps: 4,
            replay_tolerance_ppm: 20_000,
            beacon_blocks: 3,
            opening_ms: 30_000,
        },
        training: Default::default(),
    }
}
