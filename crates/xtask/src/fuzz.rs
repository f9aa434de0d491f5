//! The decoders under libFuzzer, guided by coverage, with the stable compiler.
//!
//! What `cargo fuzz` adds to a build is a handful of code generation flags, of which only the sanitizers need a nightly compiler. The
//! decoders are safe code, or check what they index, so a panic is what is looked for, and the flags for coverage are enough.
//! Everything is built in a target folder of its own under the cache, because such code is of no use to anybody else.

use crate::error::Error;
use crate::workspace::{cargo, run};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The crate of the targets, relative to the clone.
const CRATE: &str = "crates/fragments/fuzz";

/// Seconds for each target where none are given: some 20 in all.
const SECONDS: u64 = 3;

/// Of the machine that builds: with a target named, build scripts are not instrumented.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Longer than any input that is looked at to its end.
const INPUT_BYTES_MAX: usize = 1 << 14;

const FLAGS: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

/// Runs every target, or that named, for a while. Says so and succeeds where what is needed can neither be found nor fetched.
pub fn fuzz(root: &Path, cache: &Path, arguments: &[String]) -> Result<(), Error> {
    let (only, seconds) = parse(arguments)?;
    let manifest = root.join(CRATE).join("Cargo.toml");
    let manifest = manifest.to_string_lossy();
    let fetch = cargo(root, &["fetch", "--locked", "--quiet", "--manifest-path", &manifest, "--target", TRIPLE]);
    if let Err(error) = run(fetch, "the decoders are still tested with seeded damage (`cargo xtask test mutations`)") {
        eprintln!("{error}\nwarning: no libFuzzer here and no way to fetch it; fuzzing is SKIPPED");
        return Ok(());
    }
    let folder = cache.join("fuzz");
    let mut build = cargo(root, &["build", "--locked", "--quiet", "--release", "--bins", "--manifest-path", &manifest, "--target", TRIPLE]);
    build.env("CARGO_TARGET_DIR", &folder).env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}")).env_remove("RUSTFLAGS");
    run(build, "the targets are in crates/fragments/fuzz")?;
    let programs = folder.join(TRIPLE).join("release");
    let (seeds, found) = (folder.join("seeds"), folder.join("found"));
    let mut make_seeds = Command::new(programs.join("seeds"));
    make_seeds.arg(&seeds);
    run(make_seeds, "it writes one good file of each kind and more")?;
    let corpus = root.join(CRATE).join("corpus");
    let names = names(&corpus)?;
    if let Some(unknown) = only.as_ref().filter(|name| !names.contains(name)) {
        return Err(Error::usage(format!("there is no fuzz target `{unknown}`"), format!("the targets are {}", names.join(", "))));
    }
    for name in names.iter().filter(|name| only.as_ref().is_none_or(|only| only == *name)) {
        let new = found.join(name);
        std::fs::create_dir_all(&new).map_err(|cause| Error::io("cannot make", &new, cause))?;
        let mut target = Command::new(programs.join(name));
        target.args([&new, &seeds.join(name), &corpus.join(name)]);
        target.arg(format!("-max_total_time={}", seconds.max(1))).arg(format!("-max_len={INPUT_BYTES_MAX}"));
        target.args(["-verbosity=0", "-print_final_stats=1", "-timeout=10", "-rss_limit_mb=1024"]);
        target.arg(format!("-artifact_prefix={}/{name}-", folder.display()));
        run(target, "the input that failed is in the file named above; put it into crates/fragments/fuzz/corpus, fix, and run this again")?;
    }
    Ok(())
}

fn parse(arguments: &[String]) -> Result<(Option<String>, u64), Error> {
    let (mut only, mut seconds) = (None, SECONDS);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let usage = || Error::usage(format!("`fuzz` does not understand `{argument}`"), "cargo xtask fuzz [TARGET] [--seconds N]");
        match argument.as_str() {
            "--seconds" => seconds = rest.next().and_then(|text| text.parse().ok()).ok_or_else(usage)?,
            name if !name.starts_with('-') && only.is_none() => only = Some(name.to_owned()),
            _ => return Err(usage()),
        }
    }
    Ok((only, seconds))
}

/// One folder of the corpus for each target.
fn names(corpus: &Path) -> Result<Vec<String>, Error> {
    let entries = std::fs::read_dir(corpus).map_err(|cause| Error::io("cannot read", corpus, cause))?;
    let folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    let mut names: Vec<String> = folders.iter().filter_map(|folder| folder.file_name()?.to_str().map(str::to_owned)).collect();
    names.sort();
    Ok(names)
}
