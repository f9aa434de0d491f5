//! Where this clone lies, and how to run a program in it.

use crate::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// The root of the clone that `cargo xtask` was called in.
///
/// Asked at run time, not with `env!`: clones may share one target folder, and then the running executable can have been
/// built from another clone.
pub fn root() -> Result<PathBuf, Error> {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .ok_or_else(|| Error::usage("the workspace folder is unknown", "run this through cargo: `cargo xtask …`"))?;
    let root = Path::new(&manifest).ancestors().nth(2).map(Path::to_path_buf);
    root.filter(|folder| folder.join("Cargo.lock").is_file()).ok_or_else(|| {
        Error::failed(format!("{} is not inside the workspace", manifest.display()), "run `cargo xtask …` from a complete clone")
    })
}

/// The folder in which cargo puts the executables of the profile that `xtask` itself was built with (`dev`).
pub fn executables() -> Result<PathBuf, Error> {
    let own = std::env::current_exe().map_err(|cause| Error::io("cannot find", "the running executable", cause))?;
    Ok(own.parent().map(Path::to_path_buf).unwrap_or_default())
}

/// The cargo that started us.
pub fn cargo(root: &Path, arguments: &[&str]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(root).args(arguments);
    // What cargo says of `xtask` to `xtask`. Left in place, it would reach the build scripts that watch such variables, and
    // every change between plain cargo and `cargo xtask` would compile them and all that is above them again.
    let ours = |name: &str| ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"].iter().any(|own| name.starts_with(own));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(ours)) {
        command.env_remove(name);
    }
    command
}

/// Runs a command whose output goes to the terminal; an exit status other than 0 is an error with `hint`.
pub fn run(mut command: Command, hint: &str) -> Result<(), Error> {
    let shown = shown(&command);
    eprintln!("$ {shown}");
    let status = command.status().map_err(|cause| Error::failed(format!("cannot start `{shown}`: {cause}"), hint))?;
    if status.success() { Ok(()) } else { Err(Error::failed(format!("`{shown}` {}", ended(status)), hint)) }
}

/// Runs a command silently and returns what it printed; its error output becomes part of the error.
pub fn output(mut command: Command, hint: &str) -> Result<String, Error> {
    let shown = shown(&command);
    let output = command.stdin(Stdio::null()).output().map_err(|cause| Error::failed(format!("cannot start `{shown}`: {cause}"), hint))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    Err(Error::failed(format!("`{shown}` {}\n{}", ended(output.status), complaint.trim_end()), hint))
}

/// True if the program starts and ends with status 0.
pub fn answers(program: &str, arguments: &[&str]) -> bool {
    let status = Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned();
    command.get_args().fold(name, |line, argument| line + " " + &argument.to_string_lossy())
}

fn ended(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("ended with exit code {code}"),
        None => "was ended by a signal".to_owned(),
    }
}
