//! `store check`: whether a bucket keeps the promises that a run relies on.

use daemon::{Failure, clock};
use storage::check;

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

pub async fn check(office: &Office, arguments: &CheckArgs) -> Result<(), Failure> {
    let report = check::examine(&*office.store, &prefix(office), clock::now_ms()).await.map_err(Failure::unavailable)?;
    if arguments.json {
        let promises: Vec<_> = report.iter().map(|(promise, kept)| serde_json::json!({ "promise": promise, "kept": kept })).collect();
        println!("{}", serde_json::json!({ "ok": report.iter().all(|(_, kept)| *kept), "promises": promises }));
    } else {
        for (promise, kept) in &report {
            println!("{}  {promise}", if *kept { "kept  " } else { "BROKEN" });
        }
    }
    let broken = report.iter().filter(|(_, kept)| !kept).count();
    if broken == 0 {
        return Ok(());
    }
    Err(Failure::configuration(anyhow::anyhow!("the store does not keep {broken} of {} promises", report.len()))
        .hint("use a store that honours conditional writes and signed headers (AWS S3, SeaweedFS 4, the embedded server)"))
}
