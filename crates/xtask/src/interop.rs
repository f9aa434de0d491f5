//! `interop`: our development node, client and wallets against the official Python packages.
//!
//! The packages live in a virtual environment of their own in the cache, pinned by a requirements file and made once for each
//! content of it. It is filled under a temporary name and renamed: it is complete or it is not there. Made without `ensurepip`, so
//! that the host's pip is enough and Debian's `python3-venv` is not needed.

use crate::error::Error;
use crate::workspace::{answers, cargo, run};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

const REQUIREMENTS: &str = "crates/chain/tests/interop/requirements.txt";
/// Tells the tests which Python has the packages; without it they say that they were skipped.
const PYTHON_VARIABLE: &str = "QUASAR_INTEROP_PYTHON";

/// Runs the tests; the workspace must be ready to be built.
pub fn test(root: &Path, cache: &Path) -> Result<(), Error> {
    let python = environment(root, cache)?;
    let mut command = if answers("cargo-nextest", &["nextest", "--version"]) {
        cargo(root, &["nextest", "run", "--locked", "--workspace", "--no-fail-fast", "-E", "package(quasar-chain) and test(/^interop::/)"])
    } else {
        cargo(root, &["test", "--locked", "--workspace", "--test", "suite", "--", "interop::"])
    };
    command.env(PYTHON_VARIABLE, python);
    run(command, "the failing tests are listed above; the scripts on the other side are in crates/chain/tests/interop")
}

/// The Python that has the packages.
fn environment(root: &Path, cache: &Path) -> Result<PathBuf, Error> {
    let requirements = root.join(REQUIREMENTS);
    let text = fs::read_to_string(&requirements).map_err(|cause| Error::io("cannot read", &requirements, cause))?;
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let folder = cache.join(format!("interop-{:016x}", hasher.finish()));
    let python = folder.join("bin/python");
    if answers(&python.to_string_lossy(), &["-c", "import bittensor, bittensor_core, bittensor_wallet"]) {
        return Ok(python);
    }
    fs::create_dir_all(cache).map_err(|cause| Error::io("cannot create", cache, cause))?;
    let fresh = cache.join(format!("interop-{}.new", std::process::id()));
    for stale in [&fresh, &folder] {
        if stale.exists() {
            fs::remove_dir_all(stale).map_err(|cause| Error::io("cannot remove", stale, cause))?;
        }
    }
    let mut venv = Command::new("python3");
    venv.args(["-m", "venv", "--without-pip"]).arg(&fresh);
    run(venv, "python3 with its venv module is needed: apt-get install -y python3 (as root)")?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "--python"]).arg(fresh.join("bin/python"));
    pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-cache-dir", "--only-binary=:all:", "--requirement"]);
    pip.arg(&requirements);
    run(pip, "check the network and pip's configuration (apt-get install -y python3-pip brings pip), then run the command again")?;
    fs::rename(&fresh, &folder).map_err(|cause| Error::io("cannot move the environment to", &folder, cause))?;
    Ok(python)
}
