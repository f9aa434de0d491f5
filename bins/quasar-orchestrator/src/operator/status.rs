//! `status`: where the run stands.

use daemon::{Exit, Failure, clock};
use protocol::documents::Head;
use protocol::envelope::{Document, Expect, open};
use serde_json::json;

use super::orders::{run_of, status_of};
use super::run::roots_that_name_us;
use crate::effects::fence::read_lease;
use crate::machine::Status;
use crate::office::Office;

/// The goal of the incumbent's network.
const GOAL_TOKENS: u64 = 10_000_000_000_000;

#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Tokens that the run is to reach
    #[arg(long, value_name = "N", default_value_t = GOAL_TOKENS)]
    goal_tokens: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub async fn show(office: &Office, arguments: &StatusArgs) -> Result<Exit, Failure> {
    let (context, keys) = run_of(office).await?;
    let roots = roots_that_name_us(office).await?;
    let Some(status) = status_of(office, &keys).await? else {
        return Err(Failure::try_later(anyhow::anyhow!("no orchestrator has reported on this run yet")).hint("start one with `run`"));
    };
    let lease = read_lease(&*office.store, &keys.writer_lease(), &context, &roots.orchestrators).await?.map(|(lease, _)| lease);
    let now_ms = clock::now_ms();
    let head = office.store.get(&keys.head(), Head::PURPOSE.limit() as u64 + 512).await.map_err(Failure::unavailable)?;
    let head = open::<Head>(&head.bytes, &context, Expect::Any(&roots.orchestrators), now_ms);
    let head_age_ms = head.as_ref().ok().map(|head| now_ms.saturating_sub(head.header.issued_ms));
    let days = days_to(&status, arguments.goal_tokens);
    if arguments.json {
        let writer = lease.map(|lease| lease.document);
        let shown = json!({
            "run": context.run, "status": status, "writer": writer, "head_age_ms": head_age_ms,
            "goal_tokens": arguments.goal_tokens, "days_to_goal": days,
        });
        println!("{shown}");
        return Ok(Exit::Done);
    }
    let is_up = lease.as_ref().is_some_and(|lease| !lease.document.released) && head_age_ms.is_some();
    let writer = lease.map_or_else(|| "none".to_owned(), |lease| format!("{}, epoch {}", lease.document.host, lease.document.epoch));
    println!("run {}  {:?}  cycle {}  outer step {}", context.run, status.state, status.cycle, status.outer_step);
    println!("writer {writer}{}", if is_up { "" } else { "  (NOT RUNNING: the head is stale or the lease was given back)" });
    println!(
        "merges {}  empty {}  contributions {}  release {}{}",
        status.merges,
        status.empty_merges,
        status.contributions,
        status.release,
        if status.is_releasing { "  (another one is being made)" } else { "" }
    );
    let rows = &status.rows;
    println!(
        "tokens done {}  of {}  at {} a day  {}",
        number(rows.done_tokens),
        number(arguments.goal_tokens),
        number(status.tokens_per_day),
        days.map_or_else(|| "days to goal unknown".to_owned(), |days| format!("{days:.1} days to goal"))
    );
    println!("rows waiting {}  leased {}  done {}  lost {}", rows.waiting_rows, rows.leased_rows, rows.done_rows, rows.lost_rows);
    for (source, rows) in &status.sources {
        let source = if source.is_empty() { "(unnamed)" } else { source };
        println!("  {source}: {} tokens done, {} rows waiting, {} lost", number(rows.done_tokens), rows.waiting_rows, rows.lost_rows);
    }
    println!(
        "audits ordered {}  open {}  verdicts {} pass, {} fail, {} other",
        status.audits_ordered, status.audits_open, status.verdicts.pass, status.verdicts.fail, status.verdicts.other
    );
    for learner in &status.learners {
        let state = if learner.live { format!("{:?}", learner.state) } else { "gone".to_owned() };
        println!(
            "  {}/{} {}  {state}  step {}  loss {:.3}  merged {}  {}",
            learner.hotkey.short(),
            learner.slot,
            learner.worker,
            learner.local_step,
            learner.loss as f64 / 1e6,
            learner.contributions,
            learner.last_reason
        );
    }
    for outcome in &status.outcomes {
        println!("order {} {}: {}", outcome.number, if outcome.done { "done" } else { "refused" }, outcome.text);
    }
    Ok(Exit::Done)
}

fn days_to(status: &Status, goal: u64) -> Option<f64> {
    let left = goal.saturating_sub(status.rows.done_tokens);
    (left == 0 || status.tokens_per_day > 0).then(|| left as f64 / status.tokens_per_day.max(1) as f64)
}

/// `1.25 T`, `67.1 M`, `512`.
fn number(value: u64) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.iter().find(|(size, _)| value as f64 >= *size) {
        Some((size, unit)) => format!("{:.2} {unit}", value as f64 / size),
        None => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([512, 1_250_000_000_000, 67_108_864].map(number), ["512", "1.25 T", "67.11 M"]);
    }
}
