//! The units and scripts that people install are files that no compiler reads; this does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const ROLES: [&str; 3] = ["orchestrator", "miner", "validator"];
const SCRIPTS: [&str; 5] =
    [".ci/run", "scripts/install.sh", "scripts/install_miner.sh", "scripts/install_validator.sh", "scripts/run_validator.sh"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// All `key=value` lines of a role's unit; a key may occur more than once.
fn unit(role: &str) -> BTreeMap<String, Vec<String>> {
    let path = root().join(format!("deploy/systemd/quasar-{role}.service"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut entries: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (key, value) in text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('=')) {
        entries.entry(key.to_owned()).or_default().push(value.to_owned());
    }
    entries
}

#[test]
fn units_restart_what_may_pass_and_leave_down_what_needs_a_person() {
    for role in ROLES {
        let unit = unit(role);
        assert_eq!(unit["Restart"], ["on-failure"], "{role}");
        assert_eq!(unit["RestartPreventExitStatus"], ["64 78"], "{role}");
        assert_eq!(unit["StartLimitIntervalSec"], ["0"], "{role}");
    }
}

#[test]
fn units_let_systemd_watch_over_the_daemons_and_name_the_credential_that_they_look_for() {
    for role in ROLES {
        let unit = unit(role);
        assert_eq!(
            (unit["Type"].as_slice(), unit["WatchdogSec"].as_slice()),
            (&["notify".to_owned()][..], &["120".to_owned()][..]),
            "{role}"
        );
        let text = fs::read_to_string(root().join(format!("deploy/systemd/quasar-{role}.service"))).expect("unit");
        assert!(text.contains("# LoadCredential=hotkey-password:"), "{role}");
    }
}

#[test]
fn units_name_their_own_program_settings_and_state() {
    for role in ROLES {
        let unit = unit(role);
        assert_eq!(unit["ExecStart"], [format!("/opt/quasar/bin/quasar-{role} run")]);
        assert_eq!(
            unit["Environment"],
            [format!("QUASAR_CONFIG=/etc/quasar/{role}.toml"), format!("QUASAR_STATE_DIR=/var/lib/quasar-{role}")]
        );
        assert_eq!(unit["StateDirectory"], [format!("quasar-{role}")]);
    }
}

#[test]
fn the_wallet_of_the_sample_settings_lies_where_the_unit_can_read_it() {
    for role in ROLES {
        assert_eq!(unit(role)["ProtectHome"], ["yes"]);
        let settings = fs::read_to_string(root().join(format!("configs/{role}.toml"))).expect("sample settings");
        assert!(settings.contains("\npath = \"/etc/quasar/wallets\"\n"), "{role}");
    }
}

#[test]
fn scripts_are_executable_and_parse() {
    use std::os::unix::fs::PermissionsExt;
    for script in SCRIPTS {
        let path = root().join(script);
        let mode = fs::metadata(&path).unwrap_or_else(|error| panic!("{script}: {error}")).permissions().mode();
        assert!(mode & 0o100 != 0, "{script} is not executable");
        assert!(Command::new("bash").arg("-n").arg(&path).status().expect("bash").success(), "{script}");
    }
}

#[test]
fn the_installer_refuses_an_unknown_role_and_half_a_wallet_before_it_builds_anything() {
    for arguments in [&["trainer"][..], &["miner", "--wallet-name", "w"], &["orchestrator", "--cuda"]] {
        let output = Command::new(root().join("scripts/install.sh")).args(arguments).output().expect("script");
        assert_eq!(output.status.code(), Some(64), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("hint: "), "{arguments:?}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}
