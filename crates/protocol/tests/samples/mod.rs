//! One filled document of each type, signed with fixed keys at a fixed time.

use protocol::documents::*;
use protocol::envelope::{Context, Document, RunId, sign};
use protocol::log::{Frontier, LogEntry, LogHead, LogKind};
use protocol::steps::Exchange;
use protocol::{
    AccountId, DType, Digest, Ed25519Signer, FileRecord, FragmentPlan, MergeRule, Reason, SealedBytes, ShardManifest, Signer, Slice,
};

pub const NOW_MS: u64 = 1_700_000_000_000;

pub fn signer() -> Ed25519Signer {
    Ed25519Signer::from_seed([1; 32])
}

pub fn context() -> Context {
    Context { genesis: [2; 32], netuid: 24, run: RunId([3; 16]) }
}

fn digest(name: &str) -> Digest {
    Digest::blake3(name.as_bytes())
}

fn hotkey() -> AccountId {
    Ed25519Signer::from_seed([4; 32]).key().account()
}

fn exchanged() -> Vec<Exchange> {
    vec![Exchange::Applied { fragment: 5, version: 3 }, Exchange::Exported { fragment: 7 }]
}

fn sealed() -> SealedBytes {
    SealedBytes { encapsulated: [5; 32], ciphertext: vec![6; 20] }
}

fn file() -> FileRecord {
    FileRecord::of_bytes("model.safetensors", b"some bytes")
}

fn lease() -> Lease {
    Lease {
        id: 7,
        rows: vec![RowRange { shard: "sotu-00001".into(), start: 8, end: 104 }],
        seed: digest("seed"),
        batch_rows: 4,
        steps: 24,
        schedule_start: 48,
        deadline_ms: NOW_MS + 60_000,
    }
}

fn parameters() -> RunParameters {
    RunParameters {
        fragments: 24,
        inner_steps: 24,
        overlap: 2,
        grace_ppm: 800_000,
        cycles: 8,
        outer_lr_ppm: 1_000_000,
        outer_momentum_ppm: 900_000,
        step_target_ms: 20_000,
        poll_ms: 2_000,
        slots: 8,
        quorum_min: 8,
        pull_deadline_ms: 60_000,
        learner_ttl_ms: 120_000,
        sequence_length: 2_048,
        batch_rows: 192,
        lease_steps: 480,
        codec_up: Codec::Bf16,
        codec_down: Codec::Bf16,
        release_every_cycles: 180,
        inner: InnerOptimizer {
            lr_nano: 6_000_000,
            beta1_ppm: 900_000,
            beta2_ppm: 950_000,
            eps_pico: 10_000,
            weight_decay_ppm: 100_000,
            clip_norm_ppm: 1_000_000,
            schedule: LrSchedule { warmup_steps: 8, total_steps: 192, final_ppm: 100_000 },
        },
        audit: AuditParameters {
            rate_ppm: 1_000_000,
            loss_rows: 16,
            replay_steps: 4,
            replay_tolerance_ppm: 50_000,
            beacon_blocks: 3,
            opening_ms: 60_000,
        },
        training: Default::default(),
    }
}

fn verdict() -> Verdict {
    Verdict {
        audit: digest("audit"),
        validator: hotkey(),
        cycle: 3,
        hotkey: hotkey(),
        slot: 1,
        t: 75,
        payload: digest("payload"),
        result: VerdictResult::Pass,
        reason: Reason::LossWorse,
        measured: Measurements { assigned_before: 5_000_000, assigned_after: 4_990_000, replayed_steps: 4, ..Measurements::NONE },
    }
}

fn contribution() -> Contribution {
    Contribution {
        hotkey: hotkey(),
        slot: 1,
        commitment: digest("commitment"),
        payload: digest("payload"),
        base_version: 3,
        steps: 22,
        tokens: 11_264,
        weight_ppm: 333_333,
        norm: 1_234_567,
        clip_ppm: 1_000_000,
        cosine_ppm: -12_345,
        neighbour_ppm: 123_456,
        rest_ppm: 54_321,
        outcome: Reason::None,
    }
}

fn file_of<D: Document>(document: &D) -> (&'static str, Vec<u8>) {
    let name = std::any::type_name::<D>().rsplit("::").next().expect("a type has a name");
    (name, sign(document, &context(), &signer(), NOW_MS, NOW_MS))
}

/// Name and file of every type of document.
pub fn all() -> Vec<(&'static str, Vec<u8>)> {
    let release = ReleaseRef { release: "run-0011aabb".into(), manifest: digest("release") };
    let progress = Progress {
        worker: "worker-0".into(),
        session_epoch: NOW_MS - 1_000,
        slot: 1,
        protocol: 1,
        state: LearnerState::Training,
        reason: Reason::None,
        lease: 7,
        lease_step: 5,
        local_step: 29,
        step_ms: 400,
        loss: 6_100_000,
        step_chain: digest("chain"),
        fragments: vec![FragmentProgress { version: 3, steps: 5 }; 24],
        commitments: vec![Commitment {
            t: 75,
            fragment: 3,
            base_version: 3,
            length: 314_624,
            sha256: digest("sha256"),
            blake3: digest("payload"),
            steps: 22,
            tokens: 11_264,
            lease: 7,
            lease_step: 5,
            local_step: 29,
            start_step: 28,
            start_digest: digest("start"),
            step_chain: digest("chain"),
        }],
        uploaded: vec![74],
        openings: vec![OpeningPart { audit: digest("audit"), part: 1, length: 45_000_000, sha256: digest("state"), uploaded: true }],
        receipt: Some(ReceiptOffer { lease: 6, length: 2_345, sha256: digest("receipt"), uploaded: false }),
        padding: Vec::new(),
    };
    vec![
        file_of(&RunRoot {
            version: 1,
            previous: Digest::ZERO,
            owner: signer().key(),
            orchestrator: Ed25519Signer::from_seed([9; 32]).key(),
            store_hosts: vec!["store.example:443".into()],
            bounds: Bounds { fragments_max: 64, slots_max: 16, payload_bytes_max: 1 << 34, checkpoint_bytes_max: 1 << 40 },
        }),
        file_of(&CurrentRun { root_version: 1, root_digest: digest("root"), run: context().run, manifest_digest: digest("manifest") }),
        file_of(&RunManifest {
            run: context().run,
            name: "devnet".into(),
            protocol_min: 1,
            protocol_max: 1,
            created_ms: NOW_MS,
            plan: digest("plan"),
            base_release: "base".into(),
            base_manifest: digest("base"),
            catalog: vec![CatalogRef { page: 0, digest: digest("page") }],
            parameters: parameters(),
        }),
        file_of(&Head {
            epoch: 3,
            state: RunState::Open,
            outer_step: 76,
            closed_below: 74,
            block: 5_000_000,
            run_step: 76,
            pulls: vec![Pull { t: 75, fragment: 3, version: 3, deadline_ms: NOW_MS + 10_000 }],
            fragments: vec![FragmentHead { version: 3, length: 314_900, digest: digest("keyframe") }; 2],
            release: release.clone(),
            catalog: CatalogRef { page: 1, digest: digest("page") },
            ledger: digest("ledger"),
            log: (&log_head().frontier).into(),
            notices: vec![Notice::OpenAudit {
                audit: digest("audit"),
                hotkey: hotkey(),
                slot: 1,
                t: 75,
                deadline_ms: NOW_MS + 60_000,
                key: [6; 32],
            }],
        }),
        file_of(&FragmentPlan {
            fragments: vec![vec![Slice {
                tensor: "model.layers.1.mlp.experts_w12".into(),
                row_start: 4,
                row_end: 8,
                row_elements: 12_288,
                unit_rows: 1,
                dtype: DType::Bf16,
                rule: MergeRule::Rda,
            }]],
        }),
        file_of(&CatalogPage { page: 1, previous: digest("page"), shards: vec![shard()] }),
        file_of(&Job { hotkey: hotkey(), slot: 1, session_epoch: NOW_MS - 1_000, leases: vec![lease()] }),
        file_of(&StandingGrants { hotkey: hotkey(), slot: 1, session_epoch: 0, sealed: sealed() }),
        file_of(&PullGrants { hotkey: hotkey(), slot: 1, session_epoch: NOW_MS - 1_000, sealed: sealed() }),
        ("Progress", encode_progress(progress, &context(), &signer(), NOW_MS, NOW_MS)),
        file_of(&Receipt {
            hotkey: hotkey(),
            slot: 1,
            session_epoch: NOW_MS - 1_000,
            lease: 6,
            chain: digest("chain"),
            steps: vec![ReceiptStep {
                local_step: 28,
                lease_step: 23,
                exchanged: exchanged(),
                loss: 6_100_000,
                state: Some(digest("state")),
            }],
        }),
        file_of(&OpeningManifest {
            audit: digest("audit"),
            t: 75,
            start_step: 28,
            versions: vec![3; 24],
            steps: vec![OpenedStep { local_step: 28, lease: 7, lease_step: 4, exchanged: exchanged(), loss: 6_100_000 }],
        }),
        file_of(&FragmentManifest { fragment: 3, version: 4, t: 75, keyframe: file(), delta: Some(file()), state: digest("state") }),
        file_of(&MergeManifest {
            t: 75,
            fragment: 3,
            base_version: 3,
            version: 4,
            block: 5_000_000,
            closing: false,
            restores: None,
            contributions: vec![contribution()],
            keyframe: digest("keyframe"),
            state: digest("state"),
            step_norm: 1_000_000,
            step_limit_ppm: 900_000,
        }),
        file_of(&Release { release: "run-0011aabb".into(), versions: vec![8; 24], files: vec![file()], tokens: 294_912 }),
        file_of(&AuditOrder {
            audit: digest("audit"),
            validator: hotkey(),
            cycle: 3,
            hotkey: hotkey(),
            slot: 1,
            t: 75,
            beacon_block: 5_000_003,
            opening: vec![OpenedPart { length: 512, sha256: digest("part") }; 3],
            leases: vec![lease()],
            sealed: sealed(),
            opening_key: sealed(),
        }),
        file_of(&VerdictCommit { audit: digest("audit"), commitment: verdict().commitment(&[8; 32]) }),
        file_of(&VerdictReveal { verdict: verdict(), salt: [8; 32] }),
        file_of(&Scores::new(hotkey(), 9, 5_000_100, vec![Score { hotkey: hotkey(), tokens: 294_912, weight: 65_535 }])),
        file_of(&log_head()),
        file_of(&shard()),
        file_of(&Tape {
            t: 75,
            fragment: 3,
            epoch: 3,
            base_version: 3,
            base_state: digest("state"),
            block: 5_000_000,
            closing: true,
            step_mean: 800_000,
            restores: None,
            inputs: vec![TapeInput {
                hotkey: hotkey(),
                slot: 1,
                commitment: digest("commitment"),
                payload: digest("payload"),
                length: 314_624,
                base_version: 3,
                steps: 22,
                tokens: 11_264,
                weight_ppm: 1_000_000,
            }],
        }),
        file_of(&WriterLease { epoch: 3, instance: [5; 16], host: "control-1".into(), renewal: 9, released: false }),
        file_of(&AuditDraw { cycle: 2, beacon_block: 4_100, beacon: digest("beacon"), validators: vec![hotkey()] }),
        file_of(&LeaseEnd::new(77, [0, 1, 2, 5], 7, Some(digest("receipt")))),
        file_of(&Order { number: 2, action: Action::Rollback { version: 3 }, reason: "diverged after a bad shard".into() }),
        file_of(&Equivocation {
            key: "quasar/netuid=24/public/head.qsr".into(),
            first: sign(&current(1), &context(), &signer(), NOW_MS, NOW_MS),
            second: sign(&current(2), &context(), &signer(), NOW_MS, NOW_MS),
        }),
    ]
}

fn current(root_version: u32) -> CurrentRun {
    CurrentRun { root_version, root_digest: digest("root"), run: RunId([3; 16]), manifest_digest: digest("manifest") }
}

fn log_head() -> LogHead {
    let entries = vec![
        LogEntry { kind: LogKind::Commitment, document: digest("commitment") },
        LogEntry { kind: LogKind::Merge, document: digest("merge") },
        LogEntry { kind: LogKind::Receipt, document: digest("receipt") },
    ];
    let mut frontier = Frontier::default();
    entries.iter().for_each(|entry| frontier.append(entry));
    LogHead { previous: 0, entries, frontier }
}

fn shard() -> ShardManifest {
    ShardManifest {
        id: "sotu-00001".into(),
        rows: 4_096,
        row_tokens: 128,
        tokens: 524_288,
        file: file(),
        tokenizer: digest("tokenizer"),
        vocab_size: 4_096,
        licence: "CC0-1.0".into(),
        source: "State of the Union addresses".into(),
        held_out: false,
    }
}
