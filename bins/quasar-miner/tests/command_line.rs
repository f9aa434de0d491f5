//! The binary as a person or a supervisor meets it: output, exit codes, hints.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

const OWNER: &str = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY";

/// The binary without any setting of the machine that runs the test.
fn miner() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quasar-miner"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("QUASAR_") || name.to_string_lossy().starts_with("AWS_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

fn output(arguments: &[&str]) -> Output {
    miner().args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A miner's whole configuration in one folder: wallet, state, a chain whose genesis is known, a bucket that is not there.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("chain.json"), format!(r#"{{"genesis":"0x{}","endpoint":"ws://127.0.0.1:1"}}"#, "22".repeat(32)))
            .unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn new_hotkey(&self, kind: &str) -> serde_json::Value {
        let path = self.path("wallets").display().to_string();
        let made =
            output(&["identity", "new", "--wallet-path", &path, "--wallet-name", "w", "--hotkey-name", kind, "--kind", kind, "--json"]);
        assert!(made.status.success(), "{}", text(&made.stderr));
        serde_json::from_slice(&made.stdout).unwrap()
    }

    fn run(&self, hotkey: &str) -> Command {
        let mut command = miner();
        command.args(["run", "--worker-id", "test", "--owner-identity", OWNER, "--network", "local", "--netuid", "24", "--devices", "cpu"]);
        command.args(["--s3-bucket", "b", "--s3-endpoint-url", "http://127.0.0.1:1", "--wallet-name", "w", "--hotkey-name", hotkey]);
        for (flag, name) in [("--local-chain", "chain.json"), ("--wallet-path", "wallets"), ("--state-dir", "state")] {
            command.arg(flag).arg(self.path(name));
        }
        command
    }
}

/// Waits until the process has logged `mark`; what follows is read and thrown away, so that the process can go on logging.
fn wait_for_log(child: &mut Child, mark: &'static str) {
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let (found, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            if line.contains(mark) {
                let _ = found.send(());
            }
        }
    });
    wait.recv_timeout(std::time::Duration::from_secs(60)).unwrap_or_else(|_| panic!("`{mark}` was not logged"));
}

#[test]
fn help_and_version_are_results_and_a_wrong_flag_is_a_usage_error() {
    let help = output(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(text(&help.stdout).contains("Examples:"));
    assert!(text(&output(&["--version"]).stdout).starts_with("quasar-miner "));
    assert_eq!(output(&["run", "--no-such-flag"]).status.code(), Some(64));
}

#[test]
fn the_same_identity_is_made_shown_and_never_overwritten() {
    let place = Place::new();
    let made = place.new_hotkey("ed25519");
    assert_eq!(made["crypto_type"], "ed25519");
    let path = place.path("wallets").display().to_string();
    let name = ["--wallet-path", &path, "--wallet-name", "w", "--hotkey-name", "ed25519"];
    let shown = output(&[["identity", "show", "--json"].as_slice(), &name].concat());
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&shown.stdout).unwrap(), made);
    let again = output(&[["identity", "new"].as_slice(), &name].concat());
    assert_eq!(again.status.code(), Some(78));
    assert!(text(&again.stderr).contains("hint: "));
}

#[test]
fn grouped_launch_mode_is_refused_with_the_mode_to_use() {
    let place = Place::new();
    let refused = place.run("h").env("QUASAR_MINER_LAUNCH_MODE", "grouped").output().unwrap();
    assert_eq!(refused.status.code(), Some(78));
    assert!(text(&refused.stderr).contains("per-gpu"), "{}", text(&refused.stderr));
}

#[test]
fn a_missing_wallet_is_a_configuration_error() {
    let place = Place::new();
    let missing = place.run("nobody").output().unwrap();
    assert_eq!(missing.status.code(), Some(78));
    assert!(text(&missing.stderr).contains("nobody") && text(&missing.stderr).contains("hint: "), "{}", text(&missing.stderr));
}

#[test]
fn a_miner_waits_for_its_bucket_keeps_others_from_its_state_and_stops_when_told() {
    let place = Place::new();
    place.new_hotkey("ed25519");
    let mut first = place.run("ed25519").stderr(Stdio::piped()).spawn().unwrap();
    wait_for_log(&mut first, "waiting");
    let second = place.run("ed25519").output().unwrap();
    assert_eq!(second.status.code(), Some(75), "it may be there when the first has ended");
    assert!(text(&second.stderr).contains("in use"), "{}", text(&second.stderr));
    assert!(Command::new("kill").args(["-TERM", &first.id().to_string()]).status().unwrap().success());
    assert_eq!(first.wait().unwrap().code(), Some(0));
}

#[test]
fn a_fresh_checkpoint_depends_on_its_seed_alone_and_is_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/model/tests/data/small_config.json");
    let init = |out: &str, seed: &str| {
        let out = folder.path().join(out);
        let made = miner().args(["checkpoint", "init", "--seed", seed, "--config"]).arg(&config).arg("--out").arg(&out).output().unwrap();
        (made.status.code(), std::fs::read(out.join("model.safetensors")).unwrap())
    };
    let (exit, first) = init("a", "7");
    assert_eq!(exit, Some(0));
    assert_eq!(init("b", "7").1, first);
    assert_ne!(init("c", "8").1, first);
    assert_eq!(init("a", "9"), (Some(78), first));
}

#[test]
fn inspect_says_of_rubbish_that_it_is_no_document() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.qsr");
    std::fs::write(&file, b"rubbish").unwrap();
    let shown = output(&["inspect", &file.display().to_string()]);
    assert_eq!(shown.status.code(), Some(78));
    assert!(text(&shown.stderr).starts_with("error: "), "{}", text(&shown.stderr));
}

#[test]
fn the_doctor_proves_without_wallet_or_network_that_steps_are_reproducible() {
    let shown = output(&["doctor", "--determinism", "--devices", "cpu", "--json"]);
    assert_eq!(shown.status.code(), Some(0), "{}", text(&shown.stderr));
    let report: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let proof = checks.iter().find(|check| check["name"] == "determinism").unwrap();
    assert_eq!(proof["status"], "ok", "{proof}");
    assert!(proof["detail"].as_str().unwrap().starts_with("cpu: 4 steps"), "{proof}");
}

#[test]
fn the_doctor_names_the_versions_where_the_cuda_part_does_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("version.py"), "__version__ = '2.4.1+cu121'\n").unwrap();
    let torch = folder.path().display().to_string();
    let shown = output(&["doctor", "--determinism", "--devices", "0", "--torch-cuda-dir", &torch]);
    assert_eq!(shown.status.code(), Some(78));
    assert!(text(&shown.stdout).contains("2.4.1+cu121") && text(&shown.stdout).contains("2.11.0"), "{}", text(&shown.stdout));
}

/// `plan-memory` for the released model.
fn plan_memory(arguments: &[&str]) -> Output {
    output(&[["plan-memory"].as_slice(), arguments].concat())
}

#[test]
fn plan_memory_marks_the_strategy_that_would_be_chosen() {
    let whole = plan_memory(&["--device-memory", "139"]);
    assert_eq!(whole.status.code(), Some(0), "{}", text(&whole.stderr));
    let listed = text(&whole.stdout);
    assert!(listed.starts_with("planned with 139.0 GiB of the GPU and 0.0 GiB of the host\n"), "{listed}");
    let chosen: Vec<&str> = listed.lines().filter(|line| line.starts_with("->")).collect();
    assert!(chosen.len() == 1 && chosen[0].ends_with(": 8-bit moments, 8 rows a pass"), "{listed}");

    let arguments = ["--device-memory", "78", "--host-memory", "100", "--json"];
    let offloaded = plan_memory(&arguments);
    assert_eq!(offloaded.status.code(), Some(0), "{}", text(&offloaded.stderr));
    let report: serde_json::Value = serde_json::from_slice(&offloaded.stdout).unwrap();
    let chosen = &report["chosen"];
    assert_eq!((&chosen["offload"], &chosen["rows_per_pass"]), (&true.into(), &8.into()), "{report}");
    assert!(chosen["host_bytes"].as_u64() <= Some(100 << 30) && chosen["peak_bytes"].as_u64() <= Some(78 << 30), "{report}");
    assert_eq!(report["available"]["host_bytes"], 100u64 << 30);
    assert!(report["strategies"].as_array().unwrap().contains(chosen));
    // A GPU by name, with its memory said: the host's is then that of this machine.
    let named = plan_memory(&["--device", "cuda:0", "--device-memory", "139", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&named.stdout).unwrap();
    assert!(report["available"]["host_bytes"].as_u64() > Some(0), "{report}");
}

#[test]
fn plan_memory_ends_with_69_where_nothing_fits_and_says_how_much_is_missing() {
    for json in [false, true] {
        let arguments = ["--device-memory", "78", "--batch", "8", "--json"];
        let shown = plan_memory(&arguments[..if json { 5 } else { 4 }]);
        assert_eq!(shown.status.code(), Some(69), "{}", text(&shown.stderr));
        let error = text(&shown.stderr);
        assert!(error.contains("no strategy fits") && error.contains("--host-memory"), "{error}");
        if json {
            let report: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
            assert!(report["chosen"].is_null() && report["strategies"].as_array().is_some_and(|all| !all.is_empty()), "{report}");
        } else {
            assert!(!text(&shown.stdout).contains("->"), "{}", text(&shown.stdout));
        }
    }
}

#[test]
fn plan_memory_says_so_where_the_named_gpu_is_not_there_and_refuses_sizes_without_bounds() {
    for device in ["cuda:4096", "gpu"] {
        let shown = plan_memory(&["--device", device]);
        assert_eq!(shown.status.code(), Some(78), "{}", text(&shown.stderr));
        let error = text(&shown.stderr);
        assert!(error.contains(device) && error.contains("hint: --device-memory"), "{error}");
    }
    let sizes: [&[&str]; 5] = [
        &["--batch", "18446744073709551615"],
        &["--batch", "8388608", "--sequence-length", "4"],
        &["--batch", "0"],
        &["--sequence-length", "1"],
        &["--fragments", "0"],
    ];
    for arguments in sizes {
        let shown = plan_memory(arguments);
        assert_eq!(shown.status.code(), Some(64), "{arguments:?}: {}", text(&shown.stderr));
        assert!(text(&shown.stderr).contains("16777216"), "{}", text(&shown.stderr));
    }
}
