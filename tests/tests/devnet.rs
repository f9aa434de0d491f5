//! The main job as separate processes: train, merge, audit, release and set weights while processes are killed.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use fragments::keyframe::{self, KeyframeId};
use fragments::{CheckpointTree, TensorSpec, delta};
use protocol::documents::{MergeManifest, Release, Tape, VerdictResult, VerdictReveal};
use protocol::{DType, Digest, FragmentPlan};
use quasar_tests::{bin_dir, binary, documents, files};

const CYCLES: u64 = 4;
const FRAGMENTS: u64 = 24;

#[test]
fn a_devnet_whose_processes_are_killed_merges_everything_once_and_learns() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dir = folder.path().join("devnet");
    let run_file = run_file(folder.path(), &[("release_every_cycles = 0", "release_every_cycles = 1")]);
    let (summary, errors) = devnet(&dir, CYCLES, &["--chaos", "--codec-up", "int4", "--codec-down", "int4", "--run-file", &run_file]);
    for victim in ["miner-1", "validator-0", "orchestrator"] {
        assert!(errors.contains(&format!("killing {victim}")) && errors.contains(&format!("starting {victim} again")), "{errors}");
    }
    let number = |key: &str| summary[key].as_f64().unwrap_or(f64::NAN);
    assert!(number("held_out_loss_before") - number("held_out_loss_after") > 1.5, "{summary}");
    assert_eq!(summary["verdicts"]["fail"], 0, "{summary}");
    assert!(summary["weights"].as_object().is_some_and(|weights| !weights.is_empty()), "{summary}");

    the_specification_agrees_on_the_release(&summary, &dir);

    let bucket = dir.join("bucket");
    let merges: Vec<MergeManifest> = documents(&bucket).into_iter().map(|(_, merge)| merge).collect();
    let mut versions: BTreeMap<u16, BTreeSet<u64>> = BTreeMap::new();
    for merge in &merges {
        let weight: u64 = merge.accepted().map(|contribution| contribution.weight_ppm).sum();
        assert!(weight <= 1_000_000, "{merge:?}");
        if merge.version > merge.base_version {
            assert!(versions.entry(merge.fragment).or_default().insert(merge.version), "a version was made twice: {merge:?}");
        }
    }
    assert_eq!(versions.len() as u64, FRAGMENTS);
    for (fragment, versions) in versions {
        assert_eq!(versions, (1..=versions.len() as u64).collect(), "fragment {fragment} skips a version");
        assert!(versions.len() as u64 >= CYCLES, "fragment {fragment}");
    }
    what_was_decided_was_merged_once(&bucket, &merges);
    the_frames_lead_to_the_versions_of_the_merge_manifests(&bucket, &merges);
    releases_came_while_everybody_trained(&bucket, &merges);
    a_journal_is_replayed_to_where_the_run_ended(&dir, merges.len());
    let reveals: Vec<(_, VerdictReveal)> = documents(&bucket);
    assert!(reveals.iter().all(|(signer, reveal)| *signer == reveal.verdict.validator));
    assert!(reveals.iter().filter(|(_, reveal)| reveal.verdict.result == VerdictResult::Pass).count() >= 3, "{reveals:?}");
}

#[test]
fn payloads_with_error_feedback_are_merged_once_and_pass_their_audits_while_the_orchestrator_is_killed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dir = folder.path().join("devnet");
    // Options of training that a replay has to share: documents that begin anew inside a row, and step sizes that are trained.
    let options = ("train_step_sizes = false", "document_end = 1\ntrain_step_sizes = true");
    // In so short a run these payloads hold little, and a large learning rate shakes what they do not hold.
    let run_file = run_file(folder.path(), &[options, ("lr_nano = 12_500_000", "lr_nano = 6_000_000")]);
    let (summary, errors) = devnet(&dir, 2, &["--codec-up", "topk", "--kill-every", "20", "--run-file", &run_file]);
    assert_eq!(summary["verdicts"]["fail"], 0, "{summary}");
    assert!(summary["kills"].as_u64() >= Some(1) && errors.contains("the orchestrator is back after"), "{summary}: {errors}");
    let bucket = dir.join("bucket");
    let merges: Vec<MergeManifest> = documents(&bucket).into_iter().map(|(_, merge)| merge).collect();
    what_was_decided_was_merged_once(&bucket, &merges);
    let reveals: Vec<(_, VerdictReveal)> = documents(&bucket);
    let passed = |reveal: &VerdictReveal| reveal.verdict.result == VerdictResult::Pass;
    // From the second cycle on a payload holds what the first one of its fragment left out.
    let later = reveals.iter().filter(|(_, reveal)| passed(reveal) && reveal.verdict.t >= FRAGMENTS).count();
    assert!(later > 0, "{reveals:?}");
    assert!(merges.iter().filter(|merge| merge.version > merge.base_version).count() as u64 >= 2 * FRAGMENTS);
    let plan: FragmentPlan = documents(&bucket).remove(0).1;
    let elements = plan.total_elements() as f64;
    let payloads: Vec<_> = files(&bucket).into_iter().filter(|path| path.ends_with("payload.qfd")).collect();
    let bytes: u64 = payloads.iter().map(|path| std::fs::metadata(path).expect("it is there").len()).sum();
    let bits = 8.0 * bytes as f64 / (payloads.len() as f64 * elements / FRAGMENTS as f64);
    assert!(bits < 0.5, "{bits} bits an element, headers included");
    // What was left out is on the miners' disks; all but the last payloads are settled.
    let withheld = |ending: &str| files(&dir.join("state")).into_iter().filter(|path| path.to_string_lossy().ends_with(ending)).count();
    assert!(withheld(".sent") < payloads.len() / 4, "{} of {} payloads are not settled", withheld(".sent"), payloads.len());
}

/// The devnet's run parameters with changes, as a file.
fn run_file(folder: &Path, changes: &[(&str, &str)]) -> String {
    let mut parameters = include_str!("../../configs/run-devnet.toml").to_owned();
    for (from, to) in changes {
        assert_eq!(parameters.matches(from).count(), 1, "{from}");
        parameters = parameters.replace(from, to);
    }
    let path = folder.join("run.toml");
    std::fs::write(&path, parameters).expect("the folder is writable");
    path.display().to_string()
}

/// Runs a devnet of two miners and a validator in `dir`; gives its summary and what it told.
fn devnet(dir: &Path, cycles: u64, more: &[&str]) -> (serde_json::Value, String) {
    let output = Command::new(binary("quasar-orchestrator"))
        .args(["devnet", "--miners", "2", "--validators", "1", "--json", "--timeout-sec", "1500", "--cycles", &cycles.to_string()])
        .args(more)
        .arg("--dir")
        .arg(dir)
        .arg("--bin-dir")
        .arg(bin_dir())
        .output()
        .expect("the devnet starts");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8_lossy(&output.stdout);
    let summary: serde_json::Value =
        serde_json::from_str(text.lines().last().expect("a last line")).expect("the last line is one JSON object");
    assert_eq!(summary["ok"], true, "{summary}");
    (summary, errors)
}

/// Each step has one tape and one manifest, and what the one holds the other tells; no payload is merged in two steps.
fn what_was_decided_was_merged_once(bucket: &Path, merges: &[MergeManifest]) {
    let tapes: BTreeMap<u64, Tape> = documents(bucket).into_iter().map(|(_, tape): (_, Tape)| (tape.t, tape)).collect();
    let steps: BTreeSet<u64> = merges.iter().map(|merge| merge.t).collect();
    let all: Vec<u64> = (0..merges.len() as u64).collect();
    assert!(steps.iter().eq(&all) && tapes.keys().eq(&all), "{steps:?}, tapes {:?}", tapes.keys());
    let mut payloads = BTreeSet::new();
    for merge in merges {
        let taped: BTreeSet<Digest> = tapes[&merge.t].inputs.iter().map(|input| input.payload).collect();
        let told: BTreeSet<Digest> = merge.contributions.iter().map(|contribution| contribution.payload).collect();
        assert!(taped.is_subset(&told), "step {} lost something that its tape holds", merge.t);
        for contribution in merge.accepted() {
            assert!(taped.contains(&contribution.payload), "step {} merged something that its tape does not hold", merge.t);
            assert!(payloads.insert(contribution.payload), "step {} merged something once more", merge.t);
        }
    }
}

/// On schedule, each whole and signed; nothing was merged less for it, and no learner began anew.
fn releases_came_while_everybody_trained(bucket: &Path, merges: &[MergeManifest]) {
    let mut releases: Vec<Release> = documents(bucket).into_iter().map(|(_, release): (_, Release)| release).collect();
    releases.retain(|release| release.release.starts_with("run-"));
    releases.sort_by_key(|release| release.tokens);
    assert!(releases.len() as u64 >= CYCLES - 1, "{} releases", releases.len());
    for release in &releases {
        for (fragment, version) in release.versions.iter().enumerate() {
            let merged = |merge: &MergeManifest| usize::from(merge.fragment) == fragment && merge.version == *version;
            assert!(merges.iter().any(merged), "{}: fragment {fragment} version {version}", release.release);
        }
        for file in &release.files {
            let ending = format!("{}/{}", release.release, file.path);
            let path = files(bucket).into_iter().find(|path| path.to_string_lossy().ends_with(&ending));
            let bytes = std::fs::read(path.unwrap_or_else(|| panic!("{ending} is missing"))).expect("the bucket is readable");
            assert_eq!(Digest::blake3(&bytes), file.blake3, "{ending}");
        }
    }
    let during = merges.iter().filter(|merge| !merge.closing && merge.t >= FRAGMENTS);
    let contributors: Vec<usize> = during.map(|merge| merge.accepted().count()).collect();
    assert!(contributors.iter().sum::<usize>() as f64 / contributors.len() as f64 > 1.2, "{contributors:?}");
}

/// `replay` tells from the orchestrator's journal what the bucket says.
fn a_journal_is_replayed_to_where_the_run_ended(dir: &Path, merges: usize) {
    let journal = files(&dir.join("state"))
        .into_iter()
        .find(|path| path.ends_with("journal.redb") && path.to_string_lossy().contains("orchestrator"));
    let output =
        Command::new(binary("quasar-orchestrator")).args(["replay", "--state", "--json"]).arg(journal.expect("a journal")).output();
    let output = output.expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let of = |key: &str| told["status"][key].as_u64().unwrap_or_default();
    assert_eq!((of("merges") + of("empty_merges"), &told["status"]["state"]), (merges as u64, &"complete".into()), "{told}");
}

/// From the first keyframes along the published frames: every version that a merge manifest names, bit for bit.
fn the_frames_lead_to_the_versions_of_the_merge_manifests(bucket: &Path, merges: &[MergeManifest]) {
    let plan: FragmentPlan = documents(bucket).remove(0).1;
    let find = |fragment: u16, version: u64, name: &str| {
        let ending = format!("fragments/{fragment}/{version}/{name}");
        let found = files(bucket).into_iter().find(|path| path.to_string_lossy().ends_with(&ending));
        std::fs::read(found.unwrap_or_else(|| panic!("{ending} is missing"))).expect("the bucket is readable")
    };
    for fragment in 0..FRAGMENTS as u16 {
        let mut id = KeyframeId { plan: plan.digest(), fragment: u32::from(fragment), version: 0 };
        let mut keyframe = find(fragment, 0, "keyframe.safetensors");
        let mut versions: Vec<_> = merges.iter().filter(|merge| merge.fragment == fragment && merge.version > merge.base_version).collect();
        versions.sort_by_key(|merge| merge.version);
        for merge in versions {
            let replica = keyframe::read(&plan, &id, &keyframe).expect("a keyframe of this version");
            let frame = find(fragment, merge.version, "delta.qfd");
            keyframe = delta::follow(&plan, &id, replica, &[frame], &merge.keyframe).expect("the frame leads to the next version");
            id.version = merge.version;
        }
    }
}

/// Every tensor of a tree that we wrote is in the hands of the specification what it is in ours, bit for bit.
fn the_specification_reads_every_bit(python: &OsStr, tree: &Path) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/saved_bits.py");
    let read = Command::new(python).arg(script).arg(tree).output().expect("Python runs");
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    let tree = CheckpointTree::open(tree).expect("our own reader reads it");
    let mut lines: Vec<String> = tree.tensors().map(|tensor| line(&tree, &tensor)).collect();
    lines.sort();
    assert_eq!(String::from_utf8_lossy(&read.stdout).lines().collect::<Vec<_>>(), lines);
}

/// Name, element type, shape and the SHA-256 of the elements' bytes.
fn line(tree: &CheckpointTree, tensor: &TensorSpec) -> String {
    let (dtype, width) = match tensor.dtype {
        DType::F32 => ("float32", 4),
        DType::Bf16 => ("bfloat16", 2),
        DType::F16 => panic!("no tree of ours is in f16"),
    };
    // Widened to f32 a bf16 is the upper half of the bits.
    let values = tree.read_tensor(&tensor.name).expect("a tensor of the tree");
    let elements: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()[4 - width..].to_vec()).collect();
    let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
    format!("{} {dtype} {} {}", tensor.name, shape.join("x"), Digest::sha256(&elements))
}

/// The executable specification in Python reads the released tree and finds the same loss; says so where it cannot run.
fn the_specification_agrees_on_the_release(summary: &serde_json::Value, dir: &Path) {
    const ROWS: &str = "16";
    let python = std::env::var_os("QUASAR_DEV_PYTHON").unwrap_or_else(|| "python3".into());
    let has_torch = Command::new(&python).args(["-c", "import torch, safetensors"]).output().is_ok_and(|output| output.status.success());
    if !has_torch {
        eprintln!("SKIPPED: comparison with the Python specification; {} cannot import torch and safetensors", python.display());
        return;
    }
    let release = summary["release_dir"].as_str().expect("the summary names the release");
    for tree in [Path::new(release), &dir.join("base")] {
        the_specification_reads_every_bit(&python, tree);
    }
    let shards = std::fs::read_dir(dir.join("shards/shards")).expect("the shards are there").flatten();
    let held_out = shards.map(|entry| entry.path()).find(|path| path.to_string_lossy().contains("heldout")).expect("a held-out shard");
    let tokens = held_out.join("tokens.bin");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/held_out_loss.py");
    let specified = Command::new(&python).arg(script).arg(release).arg(&tokens).args(["128", ROWS]).output().expect("Python runs");
    assert!(specified.status.success(), "{}", String::from_utf8_lossy(&specified.stderr));
    let specified: f64 = String::from_utf8_lossy(&specified.stdout).trim().parse().expect("one number");
    let ours = Command::new(binary("quasar-validator"))
        .args(["eval", "--checkpoint", release, "--sequence-length", "128", "--max-rows", ROWS, "--json", "--tokens"])
        .arg(&tokens)
        .output()
        .expect("eval runs");
    let ours: serde_json::Value = serde_json::from_slice(&ours.stdout).expect("eval prints JSON");
    let ours = ours["loss"].as_f64().expect("a loss");
    assert!((ours - specified).abs() < 1e-3, "ours {ours}, specification {specified}");
}
