//! The summary of a devnet, computed from what lies in the bucket and on the chain.

use std::collections::BTreeMap;
use std::time::Instant;

use chain::{Chain, SubtensorClient};
use daemon::Failure;
use data::catalog::Catalog;
use protocol::documents::{MergeManifest, Tape, VerdictResult};
use protocol::envelope::{Document, Expect, open_stored};
use serde::Serialize;
use storage::{ObjectStore, StoreError};

use super::DevnetArgs;
use super::kills::Kills;
use super::merged::Merged;
use super::place::Place;
use crate::machine::Status;

/// From the start of the orchestrator's next process to its first status it takes less than this, in seconds. On an idle machine it takes
/// well under one; the rest is for a machine that is busy.
const RECOVERY_SECONDS: f64 = 5.0;

#[derive(Debug, Serialize)]
pub struct Summary {
    pub ok: bool,
    held_out_loss_before: f64,
    held_out_loss_after: f64,
    outer_steps: u64,
    merges: u64,
    contributions: u64,
    mean_contributors_per_merge: f64,
    verdicts: Verdicts,
    /// Weights that the first validator set, as the chain holds them.
    weights: BTreeMap<String, u16>,
    release_dir: String,
    tokens: u64,
    seconds: f64,
    /// Kills of the orchestrator, and the longest time from the start of its next process to a new head.
    kills: usize,
    slowest_recovery_seconds: f64,
    #[serde(skip)]
    problems: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
struct Verdicts {
    pass: u64,
    fail: u64,
    other: u64,
}

impl Summary {
    pub async fn collect(
        arguments: &DevnetArgs,
        place: &Place,
        chain: &SubtensorClient,
        status: &Status,
        kills: &Kills,
        begun: Instant,
    ) -> Result<Self, Failure> {
        let mut merged = Merged::default();
        for t in 0..status.closed_below {
            let keys = place.run_keys();
            let (tape, manifest) = (read::<Tape>(place, &keys.tape(t)).await?, read::<MergeManifest>(place, &keys.merge(t)).await?);
            merged.add(t, tape.as_ref(), manifest.as_ref());
        }
        merged.end(place.fragments(), arguments.cycles);
        let Merged { merges, contributions, tokens, mut problems, .. } = merged;
        let mut verdicts = Verdicts::default();
        for reveal in place.verdicts().await {
            match reveal.verdict.result {
                VerdictResult::Pass => verdicts.pass += 1,
                VerdictResult::Mismatch => verdicts.fail += 1,
                VerdictResult::Inconclusive | VerdictResult::NoOpening | VerdictResult::NotEvaluated => verdicts.other += 1,
            }
        }
        let accounts = place.accounts();
        let mut weights = BTreeMap::new();
        for index in 0..arguments.validators {
            let row = chain.weights(place.netuid(), place.validator_uid(index)).await.map_err(Failure::unavailable)?;
            if row.is_empty() {
                problems.push(format!("validator-{index} has no weights on chain"));
            }
            if index == 0 {
                weights = row.iter().filter_map(|(uid, value)| Some((accounts.get(usize::from(*uid))?.to_string(), *value))).collect();
            }
        }
        let release = place.fetch_release(&status.release).await?;
        let catalog = Catalog::load(&place.shards()).map_err(Failure::unavailable)?;
        let held_out = catalog.side(true).next().ok_or_else(|| Failure::unavailable(anyhow::anyhow!("no held-out shard was prepared")))?;
        let tokens_file = Catalog::tokens_path(&place.shards(), held_out);
        let before = place.eval(&place.base_tree(), &tokens_file).await?;
        let after = place.eval(&release, &tokens_file).await?;
        if after.is_nan() || after >= before {
            problems.push("the held-out loss did not fall".to_owned());
        }
        problems.extend(slow_recovery(kills.slowest_seconds()));
        if arguments.kill_every.is_some() && kills.count() == 0 {
            problems.push("the orchestrator was never killed: the run was over before".to_owned());
        }
        Ok(Self {
            ok: problems.is_empty(),
            held_out_loss_before: before,
            held_out_loss_after: after,
            outer_steps: status.closed_below,
            merges,
            contributions,
            mean_contributors_per_merge: contributions as f64 / merges.max(1) as f64,
            verdicts,
            weights,
            release_dir: release.to_string_lossy().into_owned(),
            tokens: tokens / u64::from(place.fragments()),
            seconds: begun.elapsed().as_secs_f64(),
            kills: kills.count(),
            slowest_recovery_seconds: kills.slowest_seconds(),
            problems,
        })
    }

    pub fn print(&self, json: bool) {
        if !json {
            println!(
                "held-out loss   {:.4} -> {:.4} nats ({:+.4})",
                self.held_out_loss_before,
                self.held_out_loss_after,
                self.held_out_loss_after - self.held_out_loss_before
            );
            println!(
                "outer steps     {} with {} merges of {:.2} contributors on average",
                self.outer_steps, self.merges, self.mean_contributors_per_merge
            );
            println!("verdicts        {} pass, {} fail, {} other", self.verdicts.pass, self.verdicts.fail, self.verdicts.other);
            for (account, weight) in &self.weights {
                println!("weight          {account} {weight}");
            }
            println!("tokens          {} in {:.1} s", self.tokens, self.seconds);
            if self.kills > 0 {
                println!("kills           {}, the slowest recovery took {:.2} s", self.kills, self.slowest_recovery_seconds);
            }
            println!("release         {}", self.release_dir);
            for problem in &self.problems {
                println!("problem         {problem}");
            }
            return;
        }
        for problem in &self.problems {
            eprintln!("problem: {problem}");
        }
        match serde_json::to_string(self) {
            Ok(line) => println!("{line}"),
            Err(error) => eprintln!("error: {error}"),
        }
    }
}

/// A document of the orchestrator; none where its key is empty.
async fn read<D: Document>(place: &Place, key: &str) -> Result<Option<D>, Failure> {
    let object = match place.store().get(key, D::PURPOSE.limit() as u64).await {
        Ok(object) => object,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(Failure::unavailable(error)),
    };
    let opened = open_stored::<D>(&object.bytes, &place.context(), Expect::Account(place.orchestrator_account()));
    Ok(Some(opened.map_err(Failure::unavailable)?.document))
}

/// What is wrong with the longest recovery of the orchestrator from a kill, if anything is; 0 where nobody killed it.
fn slow_recovery(slowest_seconds: f64) -> Option<String> {
    let is_slow = slowest_seconds >= RECOVERY_SECONDS;
    is_slow.then(|| format!("the orchestrator took {slowest_seconds:.2} s to come back from a kill, {RECOVERY_SECONDS} s or more"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_recovery_is_a_problem_and_a_quick_one_or_none_is_not() {
        assert_eq!([slow_recovery(0.0), slow_recovery(0.66), slow_recovery(4.99)], [None, None, None]);
        let told = slow_recovery(5.0).unwrap();
        assert!(told.contains("took 5.00 s"), "{told}");
        assert!(slow_recovery(61.0).is_some());
    }
}
