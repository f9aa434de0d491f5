//! `store check`: whether a bucket keeps the promises that a run relies on.

use daemon::{Failure, clock};
use storage::check::{self, ConformanceError};

use crate::office::Office;

#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Where a store is examined.
pub fn prefix(office: &Office) -> String {
    format!("{}/private/check/", protocol::paths::prefix(office.context.netuid))
}

/// A store that no run can rely on, or that could not be asked.
pub fn unfit(error: ConformanceError) -> Failure {
    if error.is_retryable() { Failure::unavailable(error) } else { Failure::configuration(error) }
}

pub async fn check(office: &Office, arguments: &CheckArgs) -> Result<(), Failure> {
    let report = check::examine(&*office.store, &prefix(office), clock::now_ms()).await.map_err(unfit)?;
    if arguments.json {
        let promises: Vec<_> = report.iter().map(|(promise, kept)| serde_json::json!({ "promise": promise, "kept": kept })).collect();
        println!("{}", serde_json::json!({ "ok": report.iter().all(|(_, kept)| *kept), "promises": promises }));
    } else {
        for (promise, kept) in &report {
            println!("{}  {promise}", if *kept { "kept  " } else { "BROKEN" });
        }
    }
    check::verdict(report).map_err(unfit)
}
