//! Memory: a merge holds its result and small pieces of the payloads, whatever their number; splitting and assembling hold pieces
//! of files.
//!
//! The work is done in a child process whose address space is limited (`ulimit -v`), or whose highest memory use is measured.
//! The limits are far under what decoding all payloads, or holding the checkpoint, would take.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_macros,
    reason = "a child process is started, and told what to do by its environment"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use fragments::checkpoint::{StateFile, assemble, assemble_states, split, split_states, state_file};
use fragments::codec::{self, FileSource, PayloadHeader};
use fragments::merge::{Offer, merge_payloads};
use fragments::state::StateHeader;
use fragments::{CheckpointTree, t0};
use protocol::documents::Codec;
use protocol::{DType, Digest, MergeRule, Slice};
use quasar_fragments as fragments;

const CHILD: &str = "QUASAR_TEST_MEMORY_CHILD";
const MIB: u64 = 1 << 20;

const LEARNERS: u64 = 16;
const ELEMENTS: u64 = 8 << 20;
/// Threads with their stacks, the program and its libraries, tiles and sketches.
const CONSTANTS: u64 = 48 * MIB;

/// Runs the test `name` of this file again, as a child that does the work on two threads in `folder`, under `limit` bytes of
/// address space.
fn child(name: &str, folder: &Path, limit: Option<u64>) -> String {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new("sh");
    let limit = limit.map_or("unlimited".to_owned(), |bytes| (bytes / 1024).to_string());
    command.args(["-c", r#"ulimit -v "$1" && exec "$2" --exact "$3" --nocapture --test-threads 1"#, "sh", &limit]);
    command.arg(program).arg(name).env(CHILD, folder).env("RAYON_NUM_THREADS", "2").env("MALLOC_ARENA_MAX", "1");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn is_child() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

/// Highest resident memory so far, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn slices() -> Vec<Slice> {
    let slice = |tensor: &str, rows: u64, row_elements: u64, unit_rows: u64, rule| {
        let (tensor, dtype) = (tensor.to_owned(), DType::Bf16);
        Slice { tensor, row_start: 0, row_end: rows, row_elements, unit_rows, dtype, rule }
    };
    vec![
        slice("experts", 7, 1 << 20, 1, MergeRule::Rda),
        slice("gain", 1, 1, 1, MergeRule::Mean),
        slice("rest", ELEMENTS - 7 * (1 << 20) - 1, 1, ELEMENTS - 7 * (1 << 20) - 1, MergeRule::Mean),
    ]
}

fn header(codec: Codec) -> PayloadHeader {
    PayloadHeader::of_slices(codec, &slices(), Digest::ZERO, 0, 0)
}

fn value(seed: u64, index: usize) -> f32 {
    let word = (seed << 40 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (word >> 40) as f32 / (1 << 23) as f32 - 1.0
}

#[test]
fn a_merge_of_many_payloads_fits_into_its_result_and_one_payload() {
    if let Some(folder) = is_child() {
        for codec in [Codec::Bf16, Codec::Int4, Codec::TopK] {
            let header = header(codec);
            let open = |learner: u64| FileSource::open(&folder.join(format!("{codec:?}-{learner}"))).unwrap();
            let files: Vec<FileSource> = (0..LEARNERS).map(open).collect();
            let offers: Vec<Offer> =
                files.iter().map(|file| Offer { header: &header, payload: file, weight: 1, unit_weights: None }).collect();
            let merged = merge_payloads(&slices(), &offers).unwrap();
            assert_eq!(merged.delta.len() as u64, ELEMENTS);
        }
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for codec in [Codec::Bf16, Codec::Int4, Codec::TopK] {
        for learner in 0..LEARNERS {
            let values: Vec<f32> = (0..ELEMENTS as usize).map(|index| value(learner + 1, index)).collect();
            std::fs::write(folder.path().join(format!("{codec:?}-{learner}")), codec::encode(&header(codec), &values).unwrap()).unwrap();
        }
    }
    // 32 MiB of result, 16 MiB of the largest payload; all payloads decoded would be 512 MiB.
    let limit = 4 * ELEMENTS + header(Codec::Bf16).payload_bytes() + CONSTANTS;
    child("a_merge_of_many_payloads_fits_into_its_result_and_one_payload", folder.path(), Some(limit));
}

#[test]
fn an_upload_is_checked_in_a_few_pieces_however_long_it_is() {
    if let Some(folder) = is_child() {
        let payload = FileSource::open(&folder.join("payload")).unwrap();
        let committed = std::fs::read(folder.join("committed")).unwrap();
        let digest = |at: usize| Digest(committed[at..at + 32].try_into().unwrap());
        let header = header(Codec::Bf16);
        let committed = t0::Committed { length: header.payload_bytes(), sha256: digest(0), blake3: digest(32) };
        assert_eq!(t0::verify(&payload, &committed, &header), Ok(()));
        let other = t0::Committed { blake3: Digest::ZERO, ..committed };
        assert_eq!(t0::verify(&payload, &other, &header), Err(protocol::Reason::DigestMismatch));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..ELEMENTS as usize).map(|index| value(1, index)).collect();
    let payload = codec::encode(&header(Codec::Bf16), &values).unwrap();
    let committed = t0::Committed::of(&payload);
    std::fs::write(folder.path().join("payload"), &payload).unwrap();
    std::fs::write(folder.path().join("committed"), [committed.sha256.0, committed.blake3.0].concat()).unwrap();
    // Less than the payload itself beside the constants.
    child("an_upload_is_checked_in_a_few_pieces_however_long_it_is", folder.path(), Some(CONSTANTS));
}

#[test]
fn splitting_and_assembling_a_checkpoint_takes_a_fraction_of_its_size() {
    if let Some(folder) = is_child() {
        let path = |name: &str| folder.join(name);
        split(&path("base"), 8, &path("fragments")).unwrap();
        assemble(&path("base"), &path("fragments"), &path("assembled")).unwrap();
        let tree = CheckpointTree::open(&path("base")).unwrap();
        let plan = fragments::plan(tree.contract(), 8).unwrap();
        split_states(&tree, &plan, 3, &path("states")).unwrap();
        let state = |fragment: usize| {
            let (plan_digest, elements) = (plan.digest(), plan.elements(fragment));
            let header = StateHeader { plan: plan_digest, fragment: fragment as u64, version: 3, elements, momentum: false };
            StateFile::open(&path("states").join(state_file(fragment)), &header).unwrap()
        };
        let states: Vec<StateFile> = (0..8).map(state).collect();
        assemble_states(&tree, &plan, &states, &path("from-states")).unwrap();
        println!("peak {}", peak());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    std::fs::create_dir_all(&base).unwrap();
    // 256 MiB in one shard; states of it have 512 MiB.
    let rows = 16_384u64;
    let header = format!(
        r#"{{"a.experts_w12":{{"dtype":"BF16","shape":[32,2048,1024],"data_offsets":[0,{0}]}},"b.weight":{{"dtype":"BF16","shape":[{rows},4096],"data_offsets":[{0},{1}]}}}}"#,
        128 * MIB,
        128 * MIB + rows * 4096 * 2
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..128 * MIB as usize).flat_map(|index| half::bf16::from_f32(value(1, index)).to_le_bytes()));
    std::fs::write(base.join("model.safetensors"), &bytes).unwrap();
    drop(bytes);
    let text = child("splitting_and_assembling_a_checkpoint_takes_a_fraction_of_its_size", folder.path(), None);
    let peak: u64 = text.lines().find_map(|line| line.split("peak ").nth(1)).unwrap().trim().parse().unwrap();
    assert!(peak < 96 * MIB, "{} MiB", peak / MIB);
    for made in ["assembled", "from-states"] {
        let same = std::fs::read(base.join("model.safetensors")).unwrap()
            == std::fs::read(folder.path().join(made).join("model.safetensors")).unwrap();
        assert!(same, "{made}");
    }
}
