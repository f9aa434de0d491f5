//! `status`: where the run stands.

use daemon::{Exit, Failure, clock};
use protocol::documents::Head;
use protocol::envelope::{Document, Expect, open};
use serde_json::json;

use super::orders::{run_of, status_of};
use super::run::roots_that_name_us;
use crate::effects::fence::read_lease;
use crate::machine::Status;
use crate::office::{Office, unserved};

/// Ten trillion.
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
    let head = office.store.get(&keys.head(), Head::PURPOSE.file_limit()).await.map_err(unserved)?;
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
    let is_given_back = lease.as_ref().is_none_or(|lease| lease.document.released);
    let writer = lease.map_or_else(|| "none".to_owned(), |lease| format!("{}, epoch {}", lease.document.host, lease.document.epoch));
    let writer = match head_age_ms {
        Some(age_ms) if !is_given_back => format!("{writer}, head {} s old", age_ms / 1_000),
        _ => format!("{writer}; NOT RUNNING: {}", if is_given_back { "it gave the lease back" } else { "the head has expired" }),
    };
    print!("run            {}\nwriter         {writer}\n{}", context.run, text(&status, arguments.goal_tokens));
    Ok(Exit::Done)
}

/// What a person wants to see of it, one subject a line.
fn text(status: &Status, goal: u64) -> String {
    let mut lines = Vec::new();
    let mut line = |name: &str, what: String| lines.push(format!("{name:<14} {what}"));
    line("state", format!("{:?}, cycle {}, outer step {}, {} ms a step", status.state, status.cycle, status.outer_step, status.step_ms));
    line("merges", format!("{}, and {} empty ones; {} contributions", status.merges, status.empty_merges, status.contributions));
    let more = if status.is_releasing { "; another one is being made" } else { "" };
    line("release", format!("{}{more}; rollback reaches back to version {}", status.release, status.rollback_from));
    let days = days_to(status, goal).map_or_else(|| "days to go unknown".to_owned(), |days| format!("{days:.1} days to go"));
    let (rows, pace) = (&status.rows, number(status.tokens_per_day));
    line("tokens done", format!("{} of {}, {pace} a day, {days}", number(rows.done_tokens), number(goal)));
    line("rows", format!("{} waiting, {} leased, {} done, {} lost", rows.waiting_rows, rows.leased_rows, rows.done_rows, rows.lost_rows));
    for (source, rows) in &status.sources {
        let source = if source.is_empty() { "(unnamed)" } else { source };
        line(
            &format!("  {source}"),
            format!("{} tokens done, {} rows waiting, {} lost", number(rows.done_tokens), rows.waiting_rows, rows.lost_rows),
        );
    }
    let verdicts = status.verdicts;
    line(
        "audits",
        format!(
            "{} ordered, {} open; verdicts: {} pass, {} fail, {} other",
            status.audits_ordered, status.audits_open, verdicts.pass, verdicts.fail, verdicts.other
        ),
    );
    for hotkey in &status.banned {
        line("banned", hotkey.to_string());
    }
    for hotkey in &status.needs_certificate {
        line("no grants", format!("{hotkey}: it has to publish a key certificate first"));
    }
    if !status.learners.is_empty() {
        lines.push(format!("{:<14} {:<20} {:<9} {:>9} {:>7} {:>7}  last reason", "learner", "worker", "state", "step", "loss", "merged"));
    }
    for learner in &status.learners {
        let state = if learner.live { format!("{:?}", learner.state).to_lowercase() } else { "gone".to_owned() };
        let (name, loss) = (format!("{}/{}", learner.hotkey.short(), learner.slot), learner.loss as f64 / 1e6);
        lines.push(format!(
            "{name:<14} {:<20} {state:<9} {:>9} {loss:>7.3} {:>7}  {}",
            learner.worker, learner.local_step, learner.contributions, learner.last_reason
        ));
    }
    for outcome in &status.outcomes {
        let what = if outcome.done { "done" } else { "refused" };
        lines.push(format!("{:<14} {what}: {}", format!("order {}", outcome.number), outcome.text));
    }
    lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
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
    use protocol::Digest;
    use protocol::documents::{CatalogRef, ReleaseRef};
    use protocol::envelope::RunId;

    use super::*;
    use crate::machine::{Orchestrator, RunSetup};
    use crate::operator::run::RunFile;

    /// The status of a run that was just created, with so many tokens done, at this pace.
    fn status(done_tokens: u64, tokens_per_day: u64) -> Status {
        let file = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/run-devnet.toml"));
        let setup = RunSetup {
            run: RunId([1; 16]),
            parameters: RunFile::read(file).unwrap().parameters,
            release: ReleaseRef { release: "base".into(), manifest: Digest::ZERO },
            fragments: Vec::new(),
            catalog: CatalogRef { page: 0, digest: Digest::ZERO },
            shards: Vec::new(),
        };
        let mut status = Orchestrator::new(setup).status();
        (status.rows.done_tokens, status.tokens_per_day) = (done_tokens, tokens_per_day);
        status
    }

    #[test]
    fn the_days_to_the_goal_are_what_is_left_at_the_pace_of_now() {
        const T: u64 = 1_000_000_000_000;
        let days = |done, pace, goal| days_to(&status(done, pace), goal);
        assert_eq!([days(2 * T, T / 2, 10 * T), days(0, T, T)], [Some(16.0), Some(1.0)]);
        assert_eq!(days(2 * T, 0, 10 * T), None, "nothing moves: nobody knows");
        assert_eq!([days(10 * T, 0, 10 * T), days(11 * T, T, 10 * T)], [Some(0.0); 2], "it is reached");
        let line = |done, pace| text(&status(done, pace), 10 * T).lines().find(|line| line.starts_with("tokens done")).unwrap().to_owned();
        assert_eq!(line(2 * T, T / 2), "tokens done    2.00 T of 10.00 T, 500.00 G a day, 16.0 days to go");
        assert_eq!(line(0, 0), "tokens done    0 of 10.00 T, 0 a day, days to go unknown");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([512, 1_250_000_000_000, 67_108_864].map(number), ["512", "1.25 T", "67.11 M"]);
    }
}
