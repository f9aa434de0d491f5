//! The daemons as child processes, each with its own log file.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use daemon::Failure;
use tokio::process::{Child as Process, Command};

/// How long a daemon may take to stop.
const STOP: Duration = Duration::from_secs(15);

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Child {
    Orchestrator,
    Miner(u16),
    Validator(u16),
}

impl fmt::Display for Child {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Orchestrator => f.write_str("orchestrator"),
            Self::Miner(index) => write!(f, "miner-{index}"),
            Self::Validator(index) => write!(f, "validator-{index}"),
        }
    }
}

/// How to start a daemon.
pub struct Recipe {
    pub child: Child,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// The whole environment in `QUASAR_*` and `AWS_*` names.
    pub environment: Vec<(String, String)>,
    pub log: PathBuf,
}

impl Recipe {
    /// The command, with none of this process's own settings.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        for (name, _) in std::env::vars_os() {
            let name_text = name.to_string_lossy();
            if name_text.starts_with("QUASAR_") || name_text.starts_with("AWS_") {
                command.env_remove(&name);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }
}

#[derive(Default)]
pub struct Children(BTreeMap<Child, Process>);

impl Children {
    pub fn start(&mut self, recipe: Recipe) -> Result<(), Failure> {
        let failed =
            |error: std::io::Error| Failure::unavailable(anyhow::anyhow!("{} cannot be started: {error}", recipe.program.display()));
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&recipe.log).map_err(failed)?;
        let process = recipe
            .command()
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        self.0.insert(recipe.child, process);
        Ok(())
    }

    /// A daemon that ended without being told to.
    pub fn unexpected_exit(&mut self) -> Option<String> {
        self.0.iter_mut().find_map(|(child, process)| matches!(process.try_wait(), Ok(Some(_))).then(|| child.to_string()))
    }

    /// SIGKILL: the process gets no chance to tidy up.
    pub async fn kill(&mut self, child: Child) {
        if let Some(mut process) = self.0.remove(&child) {
            let _ = process.kill().await;
        }
    }

    /// SIGTERM to all, and patience.
    pub async fn stop_all(&mut self) {
        for process in self.0.values() {
            if let Some(pid) = process.id() {
                let _ = Command::new("kill").arg("-TERM").arg(pid.to_string()).status().await;
            }
        }
        for process in self.0.values_mut() {
            if tokio::time::timeout(STOP, process.wait()).await.is_err() {
                let _ = process.kill().await;
            }
        }
        self.0.clear();
    }
}
