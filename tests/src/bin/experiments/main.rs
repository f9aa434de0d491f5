//! Which settings of merging are good? Codecs up and down, outer optimizer, how learners take in new versions, merge rules under
//! attack: small Quasar models on real text, eight learners or more in one process.
//!
//! `cargo xtask bench experiments` runs this; `docs/experiments.md` says what came out and which defaults follow.

mod arms;
mod deltas;
mod report;

use std::collections::VecDeque;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use arms::{Arm, Group, Outcome};
use clap::Parser;
use quasar_tests::training::setting::Setting;

/// Compare codecs, outer optimizers, ways to apply versions, and merge rules under attack
#[derive(Debug, Parser)]
#[command(name = "experiments")]
struct Arguments {
    /// Only these parts; all if none is named
    #[arg(value_enum, value_name = "PART")]
    parts: Vec<Part>,
    /// Learners of each run; an eighth and a quarter of them attack where some do
    #[arg(long, value_name = "M", default_value_t = 8, value_parser = clap::value_parser!(u16).range(8..=256))]
    learners: u16,
    /// Length of a run: every fragment is merged this often
    #[arg(long, value_name = "C", default_value_t = 3, value_parser = clap::value_parser!(u64).range(2..=1000))]
    cycles: u64,
    /// Runs of each kind, with other initial weights and another order of the text each
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: u64,
    /// Runs at the same time, each on one thread
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: u16,
    /// Rows in a learner's step
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    rows: u32,
    /// Tokens in a row
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=4096))]
    row_tokens: u32,
    /// Where to train: cpu, or cuda:N with QUASAR_TORCH_CUDA_DIR naming a full torch installation
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Model configuration, as a path in the repository
    #[arg(long, value_name = "FILE", default_value = "tests/bench/small-model.json")]
    model: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Codecs upstream and downstream
    Codecs,
    /// Outer learning rate and momentum
    Outer,
    /// Overwrite, keep or mix
    Apply,
    /// Training under attack
    Attacks,
    /// Mutual cosines of real contributions, and merge rules on them
    Deltas,
}

fn main() -> ExitCode {
    match experiments(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn experiments(arguments: &Arguments) -> anyhow::Result<()> {
    model::tune_allocator();
    let start = Instant::now();
    let wanted = |part: Part| arguments.parts.is_empty() || arguments.parts.contains(&part);
    let setting =
        Setting::prepare(arguments.cycles, &arguments.model, Some((arguments.rows, arguments.row_tokens)))?.on(&arguments.device)?;
    let learners = usize::from(arguments.learners);
    let groups = [(Part::Codecs, Group::Codecs), (Part::Outer, Group::Outer), (Part::Apply, Group::Apply), (Part::Attacks, Group::Attacks)];
    let groups: Vec<Group> = groups.into_iter().filter(|(part, _)| wanted(*part)).map(|(_, group)| group).collect();
    if !groups.is_empty() {
        let arms = arms::all(&setting.parameters, learners, &groups);
        let outcomes = train(&setting, &arms, arguments)?;
        print!("{}", report::arms(&setting, learners, arguments.seeds, &groups, &arms, &outcomes));
    }
    if wanted(Part::Deltas) {
        print!("{}", deltas::study(&setting, 2 * learners)?);
    }
    eprintln!("{:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Outcomes `[arm][seed]`.
fn train(setting: &Setting, arms: &[Arm], arguments: &Arguments) -> anyhow::Result<Vec<Vec<Outcome>>> {
    let seeds: Vec<u64> = (1..=arguments.seeds).collect();
    for seed in &seeds {
        setting.base(*seed)?;
    }
    // A scheme that stands in several tables is trained once.
    let work: Vec<(usize, u64)> =
        (0..arms.len()).filter(|arm| arms::first(arms, *arm) == *arm).flat_map(|arm| seeds.iter().map(move |seed| (arm, *seed))).collect();
    let count = work.len();
    let queue = Mutex::new(VecDeque::from(work));
    let done: Mutex<Vec<(usize, u64, Outcome)>> = Mutex::new(Vec::new());
    let next = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop_front();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let work = || -> anyhow::Result<()> {
            while let Some((arm, seed)) = next() {
                let begin = Instant::now();
                let outcome = arms[arm].train(setting, seed)?;
                let mut done = done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                done.push((arm, seed, outcome));
                eprintln!(
                    "{} of {count}, seed {seed}: {}: {} ({:.0} s)",
                    done.len(),
                    arms[arm].name,
                    outcome.text(),
                    begin.elapsed().as_secs_f64()
                );
            }
            Ok(())
        };
        let others: Vec<_> = (1..arguments.jobs).map(|_| scope.spawn(work)).collect();
        let mut result = work();
        for other in others {
            result = result.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        result
    })?;
    let done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let find = |arm: usize, seed: u64| {
        done.iter().find(|(of, with, _)| (*of, *with) == (arms::first(arms, arm), seed)).map(|(_, _, outcome)| *outcome)
    };
    Ok((0..arms.len()).map(|arm| seeds.iter().filter_map(|seed| find(arm, *seed)).collect()).collect())
}
