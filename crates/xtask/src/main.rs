//! Developer commands: `cargo xtask setup | devnet | test | interop | fuzz | check | sim | bench`.
//!
//! A fresh clone can build nothing before libtorch is in place, so this crate is what a person runs first. It uses the
//! standard library only and leans on tools that a build machine has anyway (cargo, pip, python3, sha256sum).
//!
//! - `setup` checks the system packages and installs the libtorch folder that `.cargo/config.toml` points to.
//! - `devnet` is `setup`, a build of the three daemons, and `quasar-orchestrator devnet` with the given arguments.
//! - `test` is `setup`, the same build, and the whole test suite: one profile, so that everything is compiled once.
//! - `interop` is `setup`, an environment with the official Bittensor packages for Python, and the tests against them.
//! - `fuzz` is every decoder of files under libFuzzer, for some seconds each.
//! - `check` is formatting, the walls between the crates, and clippy with warnings as errors.
//! - `sim` is `setup`, the same build, and simulated worlds with seeded faults.
//! - `bench` is `setup` and a measurement, of the learning algorithm or of a GPU, in the profile that the tests use.

mod arrows;
mod commands;
mod error;
mod fuzz;
mod interop;
mod libtorch;
mod seaweedfs;
mod system;
mod wheels;
mod workspace;

use error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "\
Developer commands of the Quasar workspace.

usage: cargo xtask COMMAND [arguments]

  setup [--libtorch DIR]   check system packages, install libtorch (into .libtorch, or DIR)
  setup --s3               the S3 server that the end-to-end test runs against, into the cache folder
  devnet [ARGS…]           setup, build the daemons, run `quasar-orchestrator devnet ARGS…`
  test [FILTER…]           setup, build the daemons, run the whole test suite (or the tests that match)
  interop                  setup, then the tests against the official Bittensor packages, installed into the cache
  fuzz [TARGET] [--seconds N]   every decoder of files, or one, under libFuzzer (3 seconds each)
  check [STEP…]            setup, then the steps fmt, arrows, clippy (all when none is named)
  sim [ARGS…]              setup, then simulated worlds: `--seeds N --first-seed S --miners M --json`, `goodput`, `requests`, `crash-points`, `failing-requests`
  bench learning [ARGS…]   setup, then three learners against one and against data-parallel training (docs/benchmarks.md)
  bench experiments [PART…]   setup, then codecs, outer optimizers, merge rules under attack compared (docs/experiments.md)
  bench gpu TORCH_FOLDER [LAYERS] [BATCHES]   setup, then the miner's training steps beside PyTorch's on this GPU (docs/performance.md)
  bench gpu --pack DIR     the same, put into a folder for another machine
  help                     this text

environment:
  LIBTORCH           a libtorch folder of your own; it must hold the same version
  CARGO_TARGET_DIR   where cargo builds, as everywhere
  QUASAR_DEV_CACHE_DIR   where downloads are kept (default $XDG_CACHE_HOME/quasar-training or ~/.cache/quasar-training)
  QUASAR_DEV_PYTHON  a Python with torch, for the comparisons in `bench` (default python3)

examples:
  cargo xtask devnet
  cargo xtask devnet --miners 3 --validators 1 --cycles 4 --chaos
  cargo xtask test a_torn_download_resumes
  cargo xtask check fmt arrows
  cargo xtask sim --seeds 10000 --json
  cargo xtask bench learning --seeds 3 --cycles 8 --json
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn dispatch(arguments: &[String]) -> Result<ExitCode, Error> {
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", arguments),
    };
    match command {
        "setup" if rest == ["--s3"] => commands::setup_s3(),
        "setup" => commands::setup(libtorch_argument(rest)?),
        "devnet" => commands::devnet(rest),
        "test" => commands::test(rest),
        "interop" => commands::interop(rest),
        "fuzz" => commands::fuzz(rest),
        "check" => commands::check(rest),
        "sim" => commands::sim(rest),
        "bench" => commands::bench(rest),
        "help" | "--help" | "-h" => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        other => Err(Error::usage(format!("there is no command `{other}`"), "`cargo xtask help` lists the commands")),
    }
}

/// The folder of `setup --libtorch DIR`, if given.
fn libtorch_argument(arguments: &[String]) -> Result<Option<PathBuf>, Error> {
    match arguments {
        [] => Ok(None),
        [flag, folder] if flag == "--libtorch" => {
            let folder = std::path::absolute(folder).map_err(|cause| Error::io("cannot resolve", folder, cause))?;
            Ok(Some(folder))
        }
        _ => Err(Error::usage(
            format!("`setup` does not understand `{}`", arguments.join(" ")),
            "its options are `--libtorch DIR` and `--s3`",
        )),
    }
}
