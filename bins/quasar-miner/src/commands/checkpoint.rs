//! `checkpoint init` and `checkpoint convert`: models on disk.

use std::path::Path;

use daemon::{Exit, Failure};
use model::{QuasarConfig, init};
use protocol::DType;

/// Longest configuration that is read.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {reason}\nhint: name a Quasar config.json")]
struct Unreadable {
    path: String,
    reason: String,
}

pub fn init(config: &Path, seed: u64, dtype: DType, out: &Path) -> Result<Exit, Failure> {
    let unreadable = |reason: String| Failure::configuration(Unreadable { path: config.display().to_string(), reason });
    let length = std::fs::metadata(config).map_err(|error| unreadable(error.to_string()))?.len();
    if length > CONFIG_BYTES_MAX {
        return Err(unreadable(format!("it is longer than {CONFIG_BYTES_MAX} bytes")));
    }
    let text = std::fs::read_to_string(config).map_err(|error| unreadable(error.to_string()))?;
    let parsed = QuasarConfig::from_json(&text).map_err(Failure::configuration)?;
    init::fresh(&parsed, seed, dtype, out).map_err(Failure::configuration)?;
    println!("{}: {} parameters, {}, seed {seed}", out.display(), parsed.parameter_count(), dtype.name());
    Ok(Exit::Done)
}

pub fn convert(from: &Path, dtype: Option<DType>, out: &Path) -> Result<Exit, Failure> {
    let config = model::convert(from, dtype, out).map_err(Failure::configuration)?;
    println!("{}: {} parameters", out.display(), config.parameter_count());
    Ok(Exit::Done)
}
