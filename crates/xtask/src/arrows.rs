//! The walls between the crates, proven from cargo's own dependency graph.
//!
//! ARCHITECTURE.md draws the arrows; this file holds them as a table and compares the table with `cargo tree`. A new arrow
//! is a decision: it is drawn there and here in the same commit, or the check fails.

use crate::error::Error;
use crate::workspace::{cargo, output};
use std::collections::BTreeSet;
use std::path::Path;

/// Our packages, and which of our packages each may depend on directly (normal and build dependencies).
const ARROWS: &[(&str, &[&str])] = &[
    ("quasar-protocol", &[]),
    ("quasar-fragments", &["quasar-protocol"]),
    ("quasar-storage", &["quasar-protocol"]),
    ("quasar-data", &["quasar-protocol"]),
    ("quasar-chain", &["quasar-protocol"]),
    ("quasar-daemon", &["quasar-chain", "quasar-protocol"]),
    ("quasar-model", &["quasar-fragments", "quasar-protocol"]),
    ("quasar-orchestrator", LIBRARIES_WITHOUT_MODEL),
    ("quasar-miner", LIBRARIES),
    ("quasar-validator", LIBRARIES),
    ("quasar-tests", EVERYTHING),
    ("xtask", &[]),
];

const LIBRARIES_WITHOUT_MODEL: &[&str] =
    &["quasar-protocol", "quasar-fragments", "quasar-storage", "quasar-data", "quasar-chain", "quasar-daemon"];

const LIBRARIES: &[&str] =
    &["quasar-protocol", "quasar-fragments", "quasar-storage", "quasar-data", "quasar-chain", "quasar-daemon", "quasar-model"];

const EVERYTHING: &[&str] = &[
    "quasar-protocol",
    "quasar-fragments",
    "quasar-storage",
    "quasar-data",
    "quasar-chain",
    "quasar-daemon",
    "quasar-model",
    "quasar-orchestrator",
    "quasar-miner",
    "quasar-validator",
];

/// Third-party crates that one package of ours alone may use directly, tests included: the rest of the workspace speaks to
/// its traits, so that the crate can be exchanged.
const OWNERS: &[(&str, &str)] = &[
    ("tch", "quasar-model"),
    ("torch-sys", "quasar-model"),
    ("subxt", "quasar-chain"),
    ("jsonrpsee", "quasar-chain"),
    ("aws-sdk-s3", "quasar-storage"),
    ("aws-sigv4", "quasar-storage"),
    ("s3s", "quasar-storage"),
    ("reqwest", "quasar-storage"),
    ("hpke", "quasar-storage"),
    ("redb", "quasar-daemon"),
    ("tokenizers", "quasar-data"),
];

/// Crates that must not appear anywhere below a package (normal and build dependencies, through any path).
const ABSENT: &[(&str, &[&str])] = &[
    ("quasar-protocol", &["tokio", "hyper", "reqwest", "axum", "tch", "config", "clap", "tracing-subscriber"]),
    ("quasar-fragments", &["tokio", "hyper", "reqwest", "axum", "tch", "config", "clap", "tracing-subscriber"]),
    ("quasar-model", &["tokio", "hyper", "reqwest", "axum", "clap", "subxt", "aws-sdk-s3"]),
    ("quasar-data", &["tokio", "hyper", "reqwest", "axum", "tch", "onig", "hf-hub"]),
    ("quasar-chain", &["tch", "aws-sdk-s3"]),
    ("quasar-storage", &["tch", "subxt"]),
    ("quasar-orchestrator", &["quasar-model", "tch", "torch-sys"]),
    ("xtask", &["serde", "clap", "tokio"]),
];

/// Compares the dependency graph with the table. All violations are reported at once.
pub fn check(root: &Path) -> Result<(), Error> {
    let mut violations = Vec::new();
    let members: BTreeSet<String> = tree(root, &["--workspace", "--depth", "0"])?;
    for member in &members {
        if !ARROWS.iter().any(|(package, _)| package == member) {
            violations.push(format!("{member} is not in the table of crates/xtask/src/arrows.rs"));
        }
    }
    for (package, allowed) in ARROWS.iter().filter(|(package, _)| members.contains(*package)) {
        let direct = tree(root, &["--package", package, "--depth", "1", "--edges", "normal,build"])?;
        violations.extend(forbidden_arrows(package, allowed, &direct));
        let used = tree(root, &["--package", package, "--depth", "1", "--edges", "normal,build,dev"])?;
        violations.extend(foreign_crates(package, &used));
    }
    for (package, absent) in ABSENT.iter().filter(|(package, _)| members.contains(*package)) {
        let below = tree(root, &["--package", package, "--edges", "normal,build"])?;
        violations.extend(present(package, absent, &below));
    }
    if violations.is_empty() {
        return Ok(());
    }
    Err(Error::failed(
        format!("the dependency arrows are broken\n  {}", violations.join("\n  ")),
        "ARCHITECTURE.md says what each crate is for; a deliberate new arrow is drawn there and in arrows.rs",
    ))
}

/// Package names in the output of `cargo tree` with the given arguments.
fn tree(root: &Path, arguments: &[&str]) -> Result<BTreeSet<String>, Error> {
    let mut command = cargo(root, &["tree", "--locked", "--prefix", "none", "--format", "{p}"]);
    command.args(arguments);
    let text = output(command, "`Cargo.lock` must match the manifests: run `cargo build` once and commit it")?;
    Ok(names(&text))
}

/// The first word of each line; section titles such as `[dev-dependencies]` are left out.
fn names(text: &str) -> BTreeSet<String> {
    let first_words = text.lines().filter_map(|line| line.split_whitespace().next());
    first_words.filter(|name| !name.starts_with('[')).map(str::to_owned).collect()
}

fn forbidden_arrows(package: &str, allowed: &[&str], direct: &BTreeSet<String>) -> Vec<String> {
    let ours = direct.iter().filter(|name| *name != package && ARROWS.iter().any(|(member, _)| member == name));
    ours.filter(|name| !allowed.contains(&name.as_str())).map(|name| format!("{package} must not depend on {name}")).collect()
}

fn foreign_crates(package: &str, used: &BTreeSet<String>) -> Vec<String> {
    let broken = OWNERS.iter().filter(|(name, owner)| *owner != package && used.contains(*name));
    broken.map(|(name, owner)| format!("{package} uses {name}, which belongs to {owner} alone")).collect()
}

fn present(package: &str, absent: &[&str], below: &BTreeSet<String>) -> Vec<String> {
    let found = absent.iter().filter(|name| below.contains(**name));
    found.map(|name| format!("{name} is in the dependency tree of {package}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_names_are_read_from_the_tree_without_versions_and_titles() {
        let text = "quasar-model v0.1.0 (/somewhere/crates/model)\ntch v0.24.0\n[dev-dependencies]\n\ntempfile v3.27.0\n";
        let expected = ["quasar-model", "tch", "tempfile"].map(str::to_owned);
        assert_eq!(names(text), BTreeSet::from(expected));
    }

    #[test]
    fn an_orchestrator_that_depends_on_the_model_is_refused() {
        let direct = BTreeSet::from(["quasar-orchestrator", "quasar-model", "serde"].map(str::to_owned));
        let found = forbidden_arrows("quasar-orchestrator", LIBRARIES_WITHOUT_MODEL, &direct);
        assert_eq!(found, ["quasar-orchestrator must not depend on quasar-model"]);
    }

    #[test]
    fn libtorch_below_the_orchestrator_is_found_through_any_path() {
        let below = BTreeSet::from(["quasar-orchestrator", "quasar-data", "tch"].map(str::to_owned));
        assert_eq!(present("quasar-orchestrator", &["quasar-model", "tch"], &below).len(), 1);
    }

    #[test]
    fn a_crate_with_an_owner_is_refused_elsewhere_and_accepted_there() {
        let used = BTreeSet::from(["subxt".to_owned()]);
        assert_eq!(foreign_crates("quasar-miner", &used).len(), 1);
        assert!(foreign_crates("quasar-chain", &used).is_empty());
    }

    #[test]
    fn only_the_tests_depend_on_a_daemon() {
        let daemons = ["quasar-orchestrator", "quasar-miner", "quasar-validator"];
        for (package, allowed) in ARROWS.iter().filter(|(package, _)| *package != "quasar-tests") {
            assert!(daemons.iter().all(|daemon| !allowed.contains(daemon)), "{package}");
        }
    }
}
