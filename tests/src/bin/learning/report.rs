//! The comparison: gains, the two claims, the table and the JSON object.

use std::fmt::Write;
use std::time::Duration;

use serde_json::json;

use crate::arms::Run;
use crate::speed::{PyTorch, Speed};

/// By how many nats three learners may gain less than data-parallel training on the same tokens.
const PARALLEL_MARGIN: f64 = 0.1;

/// From this many cycles on the claims are made: before, merging has not paid yet.
const CYCLES_OF_CLAIMS: u64 = 8;

pub struct Report {
    pub cycles: u64,
    pub steps: u64,
    pub held_out_rows: usize,
    /// At least one.
    pub runs: Vec<Run>,
    pub speed: Speed,
    pub elapsed: Duration,
}

/// Nats gained on held-out text.
struct Gains {
    merged: f64,
    alone: f64,
    parallel: f64,
}

impl Gains {
    fn of(run: &Run) -> Self {
        Self { merged: run.start - run.merged, alone: run.start - run.alone, parallel: run.start - run.parallel }
    }
}

/// One seed in one line.
pub fn line(run: &Run) -> String {
    let Gains { merged, alone, parallel } = Gains::of(run);
    format!(
        "seed {}: three learners gained {merged:.3} nats, one alone {alone:.3}, data-parallel {parallel:.3} ({:.0} s)",
        run.seed, run.seconds
    )
}

impl Report {
    fn mean(&self) -> Gains {
        let mean = |gain: fn(&Gains) -> f64| self.runs.iter().map(|run| gain(&Gains::of(run))).sum::<f64>() / self.runs.len() as f64;
        Gains { merged: mean(|gains| gains.merged), alone: mean(|gains| gains.alone), parallel: mean(|gains| gains.parallel) }
    }

    fn is_ahead_of_one(&self) -> bool {
        let mean = self.mean();
        mean.merged > mean.alone
    }

    fn is_near_data_parallel(&self) -> bool {
        let mean = self.mean();
        mean.merged >= mean.parallel - PARALLEL_MARGIN
    }

    /// Whether both claims hold.
    pub fn holds(&self) -> bool {
        self.is_ahead_of_one() && self.is_near_data_parallel()
    }

    pub fn table(&self) -> String {
        let mut text = format!(
            "nats gained on {} held-out rows; cycles: {}, steps: {}\n\n{:<6}{:>8}{:>16}{:>12}{:>15}\n",
            self.held_out_rows, self.cycles, self.steps, "seed", "start", "three learners", "one alone", "data-parallel"
        );
        let mut row = |name: &str, start: f64, gains: &Gains| {
            let Gains { merged, alone, parallel } = gains;
            let _ = writeln!(text, "{name:<6}{start:>8.3}{merged:>16.3}{alone:>12.3}{parallel:>15.3}");
        };
        for run in &self.runs {
            row(&run.seed.to_string(), run.start, &Gains::of(run));
        }
        let mean = self.mean();
        row("mean", self.runs.iter().map(|run| run.start).sum::<f64>() / self.runs.len() as f64, &mean);

        let verdict = |holds: bool| if holds { "holds" } else { "DOES NOT HOLD" };
        let ahead = mean.merged - mean.alone;
        let _ = writeln!(text, "\nthree learners ahead of one at equal steps: {} ({ahead:+.3} nats)", verdict(self.is_ahead_of_one()));
        let _ = writeln!(
            text,
            "within {PARALLEL_MARGIN} nats of data-parallel at equal tokens: {} ({:+.3} nats)",
            verdict(self.is_near_data_parallel()),
            mean.merged - mean.parallel
        );
        if self.cycles < CYCLES_OF_CLAIMS {
            let _ = writeln!(text, "note: before {CYCLES_OF_CLAIMS} cycles merging has not paid yet; the claims are about longer runs");
        }

        let ours = self.speed.tokens_per_second;
        let _ = writeln!(text, "\ntraining step of one learner on one thread: {ours:.0} tokens/s");
        let _ = match &self.speed.pytorch {
            PyTorch::Measured(measured) => {
                let theirs = measured.tokens_per_second;
                let differences = (measured.first_loss_difference, measured.median_loss_difference);
                let _ = writeln!(
                    text,
                    "the same step in PyTorch {}: {theirs:.0} tokens/s; ours / PyTorch: {:.2}",
                    measured.version,
                    ours / theirs
                );
                writeln!(text, "difference of the two losses: {:.0e} at the first step, median {:.0e}", differences.0, differences.1)
            }
            PyTorch::Skipped { reason } => writeln!(text, "the same step in PyTorch: SKIPPED: {reason}"),
        };
        text
    }

    /// One line.
    pub fn json(&self) -> String {
        let mean = self.mean();
        let runs: Vec<_> = self
            .runs
            .iter()
            .map(
                |run| json!({ "seed": run.seed, "start": run.start, "three": run.merged, "one": run.alone, "data_parallel": run.parallel }),
            )
            .collect();
        let pytorch = match &self.speed.pytorch {
            PyTorch::Measured(measured) => json!({
                "version": measured.version,
                "tokens_per_second": measured.tokens_per_second,
                "first_loss_difference": measured.first_loss_difference,
                "median_loss_difference": measured.median_loss_difference,
            }),
            PyTorch::Skipped { reason } => json!({ "skipped": reason }),
        };
        json!({
            "ok": self.holds(),
            "cycles": self.cycles,
            "steps": self.steps,
            "held_out_rows": self.held_out_rows,
            "held_out_loss": runs,
            "mean_gain": { "three": mean.merged, "one": mean.alone, "data_parallel": mean.parallel },
            "claims": { "ahead_of_one": self.is_ahead_of_one(), "near_data_parallel": self.is_near_data_parallel() },
            "tokens_per_second": self.speed.tokens_per_second,
            "pytorch": pytorch,
            "seconds": self.elapsed.as_secs_f64(),
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(runs: &[(f64, f64, f64)]) -> Report {
        let runs = runs.iter().zip(1..).map(|((merged, alone, parallel), seed)| Run {
            seed,
            start: 8.0,
            merged: *merged,
            alone: *alone,
            parallel: *parallel,
            seconds: 1.0,
        });
        let speed = Speed { tokens_per_second: 2000.0, pytorch: PyTorch::Skipped { reason: "none".into() } };
        Report { cycles: 8, steps: 192, held_out_rows: 64, runs: runs.collect(), speed, elapsed: Duration::from_secs(1) }
    }

    #[test]
    fn claims_are_about_the_mean_over_seeds() {
        assert!(report(&[(5.5, 5.6, 5.4), (5.7, 5.8, 5.7), (5.5, 5.9, 5.5)]).holds());
        let one_good_seed = report(&[(5.5, 5.6, 5.5), (5.8, 5.6, 5.75)]);
        assert!(!one_good_seed.is_ahead_of_one() && one_good_seed.is_near_data_parallel());
        assert!(!report(&[(5.5, 5.9, 5.3)]).is_near_data_parallel());
    }

    #[test]
    fn a_loss_that_is_not_a_number_holds_no_claim() {
        assert!(!report(&[(f64::NAN, 5.6, 5.4)]).holds());
    }
}
