//! `doctor`: what a miner needs, each looked at for real, with what to do where it is missing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use chain::ChainLink;
use chain::identity::{Certified, Standing};
use daemon::settings::{CommonArgs, MinerArgs, Role};
use daemon::{Exit, Failure, Settings, clock, identity, network};
use model::torch::determinism;
use model::{TORCH_VERSION, TrainerOptions};
use protocol::envelope::SKEW_MS;
use protocol::{KeyRef, Reason};
use serde::Serialize;
use storage::discovery::{DiscoveryError, RunReader};
use storage::roots::Roots;

use crate::{device, run};

/// A check that takes longer has failed.
const CHECK_TIMEOUT: Duration = Duration::from_secs(30);
/// Steps of the proof that a device computes the same bits each time.
const STEPS: u64 = 4;
const GIB: u64 = 1 << 30;
/// With less free space in the state folder even a small run may fill the disk.
const DISK_BYTES_MIN: u64 = 10 * GIB;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// Works, but not as it should.
    Warning,
    Failed,
}

#[derive(Clone, Debug, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, detail: detail.into(), hint: None }
    }

    fn warning(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, status: Status::Warning, detail: detail.into(), hint: Some(hint.into()) }
    }

    /// An error text whose hints follow on lines of their own.
    fn failed(name: &'static str, error: &str) -> Self {
        let mut lines = error.lines();
        let detail = lines.next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        let hint = lines.next().map(|line| line.trim_start_matches("hint: ").to_owned());
        Self { name, status: Status::Failed, detail, hint }
    }
}

pub fn main(common: &CommonArgs, args: &MinerArgs, determinism: bool, json: bool) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Miner, args)?;
    let checks = if determinism {
        reproducibility(&settings)
    } else {
        // Libraries are loaded before there are other threads.
        let mut machine = Vec::new();
        devices(&settings, &mut machine);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::unavailable)?;
        runtime.block_on(examine(&settings, machine))
    };
    let is_healthy = checks.iter().all(|check| check.status != Status::Failed);
    if json {
        println!("{:#}", serde_json::json!({ "ok": is_healthy, "checks": checks }));
    } else {
        for check in &checks {
            let mark = match check.status {
                Status::Ok => "ok     ",
                Status::Warning => "warning",
                Status::Failed => "FAILED ",
            };
            println!("{mark}  {:<12}  {}", check.name, check.detail);
            if let Some(hint) = &check.hint {
                println!("                       hint: {hint}");
            }
        }
    }
    Ok(if is_healthy { Exit::Done } else { Exit::Configuration })
}

/// Everything, with what was found out about the `machine`.
async fn examine(settings: &Settings, machine: Vec<Check>) -> Vec<Check> {
    let mut checks = Vec::new();
    let key = match identity::hotkey(settings) {
        Ok(hotkey) => {
            checks.push(Check::ok("hotkey", format!("{} ({})", hotkey.account(), hotkey.key().kind)));
            Some(hotkey.key())
        }
        Err(error) => {
            checks.push(Check::failed("hotkey", &error.to_string()));
            None
        }
    };
    let chain = match network::link(settings) {
        Ok(chain) => Some(chain),
        Err(error) => {
            checks.push(Check::failed("chain", &error.to_string()));
            None
        }
    };
    if let Some(chain) = &chain {
        checks.push(timed("chain", chain_check(chain)).await);
        if let (Ok(netuid), Some(key)) = (settings.netuid(), key) {
            checks.push(timed("registration", registration(chain, netuid, key)).await);
        }
    }
    checks.push(timed("run", run_check(settings)).await);
    checks.extend(machine);
    match settings.state_dir() {
        Ok(folder) => {
            checks.push(state_folder(&folder));
            checks.push(disk(&folder));
        }
        Err(error) => checks.push(Check::failed("state folder", &error.to_string())),
    }
    checks
}

/// Looks at the devices, each GPU and the libraries; gives the devices to train on.
fn devices(settings: &Settings, checks: &mut Vec<Check>) -> Vec<String> {
    let names = match device::names(&settings.miner()) {
        Ok(names) if names.is_empty() => {
            checks.push(Check::failed("devices", "no GPU was found\nhint: set QUASAR_MINER_DEVICES=cpu"));
            names
        }
        Ok(names) => {
            checks.push(Check::ok("devices", format!("{}; libtorch {TORCH_VERSION}", names.join(", "))));
            names
        }
        Err(error) => {
            checks.push(Check::failed("devices", &error.to_string()));
            Vec::new()
        }
    };
    for gpu in model::gpus().unwrap_or_default() {
        let (major, minor) = (gpu.capability / 10, gpu.capability % 10);
        let (free, total) = (gpu.free_bytes as f64 / GIB as f64, gpu.total_bytes as f64 / GIB as f64);
        let text =
            format!("{}, compute capability {major}.{minor}, {free:.1} of {total:.1} GiB free, driver for CUDA {}", gpu.name, gpu.driver);
        checks.push(Check::ok("gpu", text));
    }
    names
}

/// Trains a small model on each device, again and again.
fn reproducibility(settings: &Settings) -> Vec<Check> {
    let mut checks = Vec::new();
    for device in devices(settings, &mut checks) {
        let options = TrainerOptions { device, threads: settings.miner().threads, ..TrainerOptions::default() };
        checks.push(match determinism::check(&options, STEPS) {
            Ok(report) => reproducible(&report),
            Err(error) => Check::failed("determinism", &error.to_string()),
        });
    }
    checks
}

fn reproducible(report: &determinism::Determinism) -> Check {
    let (device, steps) = (&report.device, report.steps);
    if let Some(difference) = &report.difference {
        let hint = "audits of this miner's work will fail; look for failing memory, an unusual driver, or other work on the same GPU";
        return Check::failed("determinism", &format!("{device}: {difference}\nhint: {hint}"));
    }
    let state = &report.state[..16.min(report.state.len())];
    let text = format!("{device}: {steps} steps twice and once more with forced experts gave the same bits (state {state})");
    match &report.fallback {
        None => Check::ok("determinism", text),
        Some(reason) => Check::warning("determinism", text, format!("own kernels are not used: {reason}")),
    }
}

/// What is free where snapshots go, as `df` says.
fn disk(folder: &Path) -> Check {
    let free = Command::new("df").args(["-Pk"]).arg(folder).output().ok().and_then(|output| {
        // Header, then: device, blocks, used, available in KiB.
        String::from_utf8_lossy(&output.stdout).lines().nth(1)?.split_ascii_whitespace().nth(3)?.parse::<u64>().ok()
    });
    match free.map(|kib| kib << 10) {
        None => Check::warning("disk", "the free space cannot be determined", "look for it by hand"),
        Some(bytes) if bytes < DISK_BYTES_MIN => Check::warning(
            "disk",
            format!("{:.1} GiB are free", bytes as f64 / GIB as f64),
            "free some space, or choose another --state-dir",
        ),
        Some(bytes) => Check::ok("disk", format!("{:.1} GiB are free", bytes as f64 / GIB as f64)),
    }
}

async fn timed(name: &'static str, check: impl Future<Output = Check>) -> Check {
    let slow = || Check::failed(name, "no answer within 30 seconds\nhint: check the network and the endpoint");
    tokio::time::timeout(CHECK_TIMEOUT, check).await.unwrap_or_else(|_| slow())
}

async fn chain_check(chain: &ChainLink) -> Check {
    let ask = async { chain.client().await?.head().await };
    match ask.await {
        Ok(head) => Check::ok("chain", format!("finalized block {head}")),
        Err(error) => Check::failed("chain", &error.to_string()),
    }
}

async fn registration(chain: &ChainLink, netuid: u16, key: KeyRef) -> Check {
    let ask = async { Standing::read(chain.client().await?.as_ref(), netuid, &key).await };
    match ask.await {
        Ok(standing) if standing.uid.is_none() => {
            let reason = Reason::NotRegistered;
            Check::failed("registration", &format!("{standing}\nhint: {}", reason.remedy()).replacen('\n', "; ", 1))
        }
        Ok(standing) => match standing.certificate {
            Certified::Published | Certified::NotNeeded => Check::ok("registration", standing.to_string().replace('\n', "; ")),
            Certified::Missing | Certified::Taken => {
                let reason = Reason::NeedsCertificate;
                Check::warning("registration", standing.to_string().replace('\n', "; "), reason.remedy())
            }
        },
        Err(error) => Check::failed("registration", &error.to_string()),
    }
}

/// Bucket, owner, run and protocol version at once: all that discovery verifies. The age of the signed head tells about clocks.
async fn run_check(settings: &Settings) -> Check {
    let prepared = || -> Result<_, Failure> {
        Ok((run::public_reader(settings)?, settings.network()?.genesis, settings.netuid()?, settings.owner_identity()?))
    };
    let (public, genesis, netuid, owner) = match prepared() {
        Ok(prepared) => prepared,
        Err(error) => return Check::failed("run", &error.to_string()),
    };
    let now_ms = clock::now_ms();
    let mut reader = match RunReader::discover(public, Roots::unremembered(genesis, netuid, owner), None, now_ms).await {
        Ok(reader) => reader,
        Err(error @ DiscoveryError::NoRun) => {
            return Check::warning(
                "run",
                "no run is published yet",
                error.to_string().lines().nth(1).unwrap_or_default().trim_start_matches("hint: "),
            );
        }
        Err(error) => return Check::failed("run", &error.to_string()),
    };
    match reader.head(now_ms).await {
        Ok(Some(head)) => {
            let run = reader.facts().manifest.run;
            Check::ok("run", format!("{run}: outer step {}, {:?}; clocks within {} s", head.outer_step, head.state, SKEW_MS / 1000))
        }
        Ok(None) => Check::warning("run", "the run has no head yet", "wait for the orchestrator"),
        Err(error) => Check::failed("run", &error.to_string()),
    }
}

/// Whether the state folder can be written; it is made if it is missing.
fn state_folder(folder: &Path) -> Check {
    let probe: PathBuf = folder.join(".doctor");
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&probe, b"doctor"));
    let _ = std::fs::remove_file(&probe);
    match written {
        Ok(()) => Check::ok("state folder", format!("{} can be written", folder.display())),
        Err(error) => {
            Check::failed("state folder", &format!("{}: {error}\nhint: check the folder's owner and free space", folder.display()))
        }
    }
}
