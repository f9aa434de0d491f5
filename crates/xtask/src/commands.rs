//! The commands themselves: thin sequences of the steps in the other modules.

use crate::arrows;
use crate::error::Error;
use crate::fuzz;
use crate::interop;
use crate::libtorch::{self, State};
use crate::seaweedfs;
use crate::system;
use crate::workspace::{answers, cargo, executables, root, run};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Where `.cargo/config.toml` points `LIBTORCH` to, relative to the clone.
const LIBTORCH_FOLDER: &str = ".libtorch";

/// `cargo xtask setup`: everything that a plain `cargo build` needs.
pub fn setup(libtorch: Option<PathBuf>) -> Result<ExitCode, Error> {
    let folder = prepare(&root()?, libtorch)?;
    eprintln!("ready: libtorch {} in {}", libtorch::VERSION, folder.display());
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask devnet`: builds the daemons and becomes `quasar-orchestrator devnet`.
pub fn devnet(arguments: &[String]) -> Result<ExitCode, Error> {
    let root = root()?;
    prepare(&root, None)?;
    build_programs(&root)?;
    let program = executables()?.join("quasar-orchestrator");
    // Taking over the process hands signals and the exit code through as they are.
    let cause = Command::new(&program).arg("devnet").args(arguments).exec();
    Err(Error::io("cannot start", &program, cause))
}

/// `cargo xtask test`: the whole suite, with the daemons that end-to-end tests start built beforehand.
pub fn test(filters: &[String]) -> Result<ExitCode, Error> {
    let root = root()?;
    prepare(&root, None)?;
    build_programs(&root)?;
    let mut command = if answers("cargo-nextest", &["nextest", "--version"]) {
        cargo(&root, &["nextest", "run", "--locked", "--workspace", "--no-fail-fast"])
    } else {
        eprintln!("cargo-nextest is not installed; using cargo test");
        let kinds = ["test", "--locked", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast", "--"];
        cargo(&root, &kinds)
    };
    command.args(filters);
    if let Some(server) = seaweedfs::installed(&cache(&root)) {
        command.env(seaweedfs::VARIABLE, server);
    }
    run(command, "the failing tests are listed above; `cargo xtask test NAME` runs those whose name contains NAME")?;
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask interop`: the tests against other people's software.
pub fn interop(arguments: &[String]) -> Result<ExitCode, Error> {
    if let Some(unknown) = arguments.first() {
        return Err(Error::usage(format!("`interop` does not understand `{unknown}`"), "it takes no arguments"));
    }
    let root = root()?;
    prepare(&root, None)?;
    interop::test(&root, &cache(&root))?;
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask fuzz`: the decoders under libFuzzer.
pub fn fuzz(arguments: &[String]) -> Result<ExitCode, Error> {
    let root = root()?;
    fuzz::fuzz(&root, &cache(&root), arguments)?;
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask check`: formatting, arrows, clippy.
pub fn check(steps: &[String]) -> Result<ExitCode, Error> {
    const STEPS: [&str; 3] = ["fmt", "arrows", "clippy"];
    if let Some(unknown) = steps.iter().find(|step| !STEPS.contains(&step.as_str())) {
        return Err(Error::usage(format!("there is no step `{unknown}`"), format!("the steps are {}", STEPS.join(", "))));
    }
    let root = root()?;
    let wanted = |step: &str| steps.is_empty() || steps.iter().any(|named| named == step);
    if wanted("fmt") {
        run(cargo(&root, &["fmt", "--all", "--check"]), "`cargo fmt --all` puts it right")?;
    }
    if wanted("arrows") {
        arrows::check(&root)?;
        eprintln!("the dependency arrows hold");
    }
    if wanted("clippy") {
        prepare(&root, None)?;
        let clippy = cargo(&root, &["clippy", "--locked", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]);
        run(clippy, "each lint above says what it wants; CONTRIBUTING.md says when an exception is right")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask sim`: becomes the simulation.
pub fn sim(arguments: &[String]) -> Result<ExitCode, Error> {
    become_program("sim", arguments)
}

/// Builds everything and becomes one of the measurements.
fn become_program(name: &str, arguments: &[String]) -> Result<ExitCode, Error> {
    let root = root()?;
    prepare(&root, None)?;
    build_programs(&root)?;
    // Exit code 1 says that a claim does not hold: it is handed through, and is no failure of ours to explain.
    let program = executables()?.join(name);
    let cause = Command::new(&program).args(arguments).exec();
    Err(Error::io("cannot start", &program, cause))
}

/// `cargo xtask setup --s3`: the S3 server of the end-to-end test.
pub fn setup_s3() -> Result<ExitCode, Error> {
    let program = seaweedfs::install(&cache(&root()?))?;
    eprintln!("ready: {}", program.display());
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask bench NAME`: becomes the measurement, built in the profile that the tests use.
pub fn bench(arguments: &[String]) -> Result<ExitCode, Error> {
    match arguments.split_first() {
        Some((name, rest)) if name == "learning" || name == "experiments" => become_program(name, rest),
        Some((name, rest)) if name == "gpu" => bench_gpu(rest),
        _ => {
            let message = format!("there is no bench `{}`", arguments.join(" "));
            Err(Error::usage(message, "there are `cargo xtask bench learning`, `… experiments` and `… gpu`"))
        }
    }
}

/// Builds the miner and becomes the script that measures it beside the Python peer; or, with `--pack DIR`, puts both into a folder that can
/// be carried to a machine with a GPU.
fn bench_gpu(arguments: &[String]) -> Result<ExitCode, Error> {
    const FILES: [&str; 2] = ["gpu.sh", "gpu_peer.py"];
    let usage =
        || Error::usage("`bench gpu` needs a torch folder, or `--pack DIR`", "cargo xtask bench gpu TORCH_FOLDER [LAYERS] [BATCHES]");
    let (first, rest) = arguments.split_first().ok_or_else(usage)?;
    let root = root()?;
    prepare(&root, None)?;
    build_programs(&root)?;
    let (programs, scripts) = (executables()?, root.join("tests/bench"));
    if first != "--pack" {
        let script = scripts.join(FILES[0]);
        let cause = Command::new(&script).arg(&programs).arg(first).args(rest).exec();
        return Err(Error::io("cannot start", &script, cause));
    }
    let [folder] = rest else { return Err(usage()) };
    let folder = Path::new(folder);
    std::fs::create_dir_all(folder).map_err(|cause| Error::io("cannot make", folder, cause))?;
    let sources = FILES.map(|file| scripts.join(file)).into_iter().chain([programs.join("quasar-miner")]);
    for source in sources {
        let target = folder.join(source.file_name().unwrap_or_default());
        std::fs::copy(&source, &target).map_err(|cause| Error::io("cannot copy", &source, cause))?;
    }
    eprintln!("packed: on the machine with the GPU, run {}/gpu.sh {} TORCH_FOLDER", folder.display(), folder.display());
    Ok(ExitCode::SUCCESS)
}

/// Every program but `xtask`, in the profile that the tests use too.
fn build_programs(root: &Path) -> Result<(), Error> {
    let build = cargo(root, &["build", "--locked", "--workspace", "--bins", "--exclude", "xtask"]);
    run(build, "the compiler's message is above")
}

/// Checks the system and makes sure that there is a libtorch to link against; returns its folder.
///
/// `named`: a folder to install into other than the one that cargo's configuration points to.
fn prepare(root: &Path, named: Option<PathBuf>) -> Result<PathBuf, Error> {
    let own = root.join(LIBTORCH_FOLDER);
    // Cargo hands us LIBTORCH from its configuration unless a person has set it.
    let chosen = std::env::var_os("LIBTORCH").map_or_else(|| own.clone(), PathBuf::from);
    let foreign = named.is_none() && chosen != own;
    let folder = named.unwrap_or(chosen);
    let state = libtorch::examine(&folder, !foreign);
    system::check(!foreign && state != State::Complete)?;
    match state {
        State::Complete => Ok(folder),
        _ if !foreign => {
            libtorch::install(&folder, &cache(root))?;
            Ok(folder)
        }
        State::Absent => Err(Error::configuration(
            format!("LIBTORCH names {}, which does not exist", folder.display()),
            "unset LIBTORCH to let setup install libtorch, or fill the folder: cargo xtask setup --libtorch DIR",
        )),
        State::Other(reason) => Err(Error::configuration(
            format!("LIBTORCH names {}, but {reason}", folder.display()),
            format!("unset LIBTORCH to let setup install libtorch {}, or name a folder that holds it", libtorch::VERSION),
        )),
    }
}

/// Where downloads are kept: outside the clone where possible, so that a second clone does not download again.
fn cache(root: &Path) -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("QUASAR_DEV_CACHE_DIR")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("quasar-training")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache/quasar-training")))
        .unwrap_or_else(|| root.join(".libtorch-dl"))
}
