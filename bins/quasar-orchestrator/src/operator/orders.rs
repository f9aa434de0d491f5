//! `drain`, `release`, `rollback`, `ban`, `unban`, `run add-shards`: signed orders in the bucket, which whoever holds the writer lease takes.
//!
//! They work from any machine with the bucket's credentials and the orchestrator's wallet, and wait while no orchestrator runs.

use std::time::Duration;

use bytes::Bytes;
use daemon::{Exit, Failure};
use protocol::AccountId;
use protocol::documents::{Action, ORDER_REASON_MAX, Order};
use protocol::envelope::Context;
use protocol::paths::RunKeys;
use storage::{PutCondition, StoreError};
use tokio::time::Instant;

use super::run::roots_that_name_us;
use crate::machine::Status;
use crate::office::{Office, unserved};
use crate::serve::current_run;

const LOOK: Duration = Duration::from_millis(500);
/// Largest status object that is read.
const STATUS_BYTES_MAX: u64 = 64 << 20;

/// What all orders have.
#[derive(Clone, Debug, clap::Args)]
pub struct OrderArgs {
    /// Why, for everybody to read
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// Do not wait until the orchestrator has taken the order
    #[arg(long)]
    no_wait: bool,
    /// Give up waiting after this long; the order stands
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout_sec: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub struct RollbackArgs {
    /// Every fragment beyond this version gets a new version with the state of this one
    #[arg(long, value_name = "V")]
    to_version: u64,
    #[command(flatten)]
    order: OrderArgs,
}

#[derive(Debug, clap::Args)]
pub struct BanArgs {
    #[arg(value_name = "SS58")]
    hotkey: AccountId,
    #[command(flatten)]
    order: OrderArgs,
}

impl RollbackArgs {
    pub fn into_order(self) -> (Action, OrderArgs) {
        (Action::Rollback { version: self.to_version }, self.order)
    }
}

impl BanArgs {
    pub fn into_ban(self) -> (Action, OrderArgs) {
        (Action::Ban { hotkey: self.hotkey }, self.order)
    }

    pub fn into_unban(self) -> (Action, OrderArgs) {
        (Action::Unban { hotkey: self.hotkey }, self.order)
    }
}

/// The run that is current, for commands of its operator.
pub async fn run_of(office: &Office) -> Result<(Context, RunKeys), Failure> {
    let roots = roots_that_name_us(office).await?;
    let current = current_run(office, &roots.orchestrators).await?;
    Ok((Context { run: current.run, ..office.context }, office.keys.run(current.run)))
}

/// The newest status object.
pub async fn status_of(office: &Office, keys: &RunKeys) -> Result<Option<Status>, Failure> {
    match office.store.get(&keys.status(), STATUS_BYTES_MAX).await {
        Ok(object) => serde_json::from_slice(&object.bytes).map(Some).map_err(|error| {
            Failure::unavailable(anyhow::anyhow!("{}: {error}", keys.status())).hint("the orchestrator that wrote it is of another version")
        }),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(unserved(error)),
    }
}

/// Writes the next order and, unless told otherwise, waits for what comes of it.
pub async fn give(office: &Office, (action, arguments): (Action, OrderArgs)) -> Result<Exit, Failure> {
    if arguments.reason.trim().is_empty() || arguments.reason.len() > ORDER_REASON_MAX {
        return Err(Failure::usage(anyhow::anyhow!("the reason has {} bytes", arguments.reason.len()))
            .hint(format!("give a reason of 1 to {ORDER_REASON_MAX} bytes: everybody can read it")));
    }
    let (context, keys) = run_of(office).await?;
    let number = write(office, &context, &keys, action, &arguments.reason).await?;
    if arguments.no_wait {
        print(&arguments, number, None);
        return Ok(Exit::Done);
    }
    let end = Instant::now() + Duration::from_secs(arguments.timeout_sec);
    loop {
        let status = status_of(office, &keys).await?;
        if let Some(outcome) = status.iter().flat_map(|status| &status.outcomes).find(|outcome| outcome.number == number) {
            print(&arguments, number, Some((outcome.done, outcome.text.as_str())));
            return Ok(if outcome.done { Exit::Done } else { Exit::Configuration });
        }
        if Instant::now() >= end {
            return Err(without_outcome(number, status.map_or(0, |status| status.orders)));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What is known of an order whose outcome the status does not show; `taken` is the number of the newest order that was taken. An order
/// that waits for something settles later than those behind it, and outcomes of long ago are not shown any more: which of both it is, nobody
/// can tell from here.
fn without_outcome(number: u64, taken: u64) -> Failure {
    if taken < number {
        return Failure::try_later(anyhow::anyhow!("order {number} is written, and no orchestrator has taken it yet"))
            .hint("start one with `run`; the order stands and is taken then");
    }
    Failure::unavailable(anyhow::anyhow!(
        "order {number} was taken, and what came of it is not shown: it is under way, or was too long ago"
    ))
    .hint("`status` shows the outcomes of the newest orders, and the orchestrator's log each as it comes; do not give the order twice")
}

/// Numbers are taken by write-once: of two operators one gets the next.
async fn write(office: &Office, context: &Context, keys: &RunKeys, action: Action, reason: &str) -> Result<u64, Failure> {
    let prefix = keys.order(0).trim_end_matches("0.qsr").to_owned();
    let listed = office.store.list(&prefix).await.map_err(unserved)?;
    let numbers = listed.iter().filter_map(|meta| meta.key.strip_prefix(&prefix)?.strip_suffix(".qsr")?.parse::<u64>().ok());
    let mut number = numbers.max().unwrap_or(0) + 1;
    loop {
        let order = Order { number, action: action.clone(), reason: reason.to_owned() };
        let bytes = Bytes::from(office.sign(&order, context));
        match office.store.put(&keys.order(number), bytes, PutCondition::IfAbsent).await {
            Ok(_) => return Ok(number),
            Err(StoreError::PreconditionFailed { .. }) => number += 1,
            Err(error) => return Err(unserved(error)),
        }
    }
}

fn print(arguments: &OrderArgs, number: u64, outcome: Option<(bool, &str)>) {
    if arguments.json {
        let (done, text) = outcome.map_or((None, None), |(done, text)| (Some(done), Some(text)));
        println!("{}", serde_json::json!({ "order": number, "done": done, "outcome": text }));
        return;
    }
    match outcome {
        Some((true, text)) => println!("order {number}: {text}"),
        Some((false, text)) => println!("order {number} was refused: {text}"),
        None => println!("order {number} is written"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_without_an_outcome_never_counts_as_done() {
        let (waiting, unknown) = (without_outcome(5, 4), without_outcome(5, 9));
        assert_eq!((waiting.exit, unknown.exit), (Exit::TryLater, Exit::Unavailable));
        assert!(waiting.to_string().contains("no orchestrator has taken it"), "{waiting}");
        assert!(unknown.to_string().contains("was taken") && unknown.to_string().contains("\nhint: "), "{unknown}");
        assert_eq!(without_outcome(5, 5).exit, Exit::Unavailable, "it is the newest, and under way");
    }
}
