//! Tokens a second of one learner's training step, beside the same step in plain PyTorch.
//!
//! Both compute on one thread, and they take turns in short blocks, so that whatever else the machine does slows both alike.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::Context;
use model::{Batch, Hyper, Trainer};
use quasar_tests::training::setting::{Base, Setting};
use serde_json::Value;

/// Turns, and steps in each.
const BLOCKS: usize = 6;
const BLOCK_STEPS: usize = 5;

/// Steps of the first block that are not counted.
const WARM_UP: usize = 3;

/// Largest difference between the first losses of two programs that compute the same.
const LOSS_TOLERANCE: f64 = 1e-3;

/// Variables that give PyTorch the allocator settings that our programs give themselves.
const ALLOCATOR: [(&str, &str); 2] = [("MALLOC_MMAP_THRESHOLD_", "33554432"), ("MALLOC_TRIM_THRESHOLD_", "1073741824")];

/// Medians over the steps.
#[derive(Debug)]
pub struct Speed {
    pub tokens_per_second: f64,
    pub pytorch: PyTorch,
}

#[derive(Debug)]
pub enum PyTorch {
    Measured(Measured),
    Skipped { reason: String },
}

/// What PyTorch did on the same batches.
#[derive(Debug)]
pub struct Measured {
    pub version: String,
    pub tokens_per_second: f64,
    /// Between its loss and ours, before the first update.
    pub first_loss_difference: f64,
    /// The same over all steps, the median: at this learning rate rounding alone drives two trainings apart, and now and then
    /// one of them meets a batch with a loss far off.
    pub median_loss_difference: f64,
}

pub fn measure(setting: &Setting) -> anyhow::Result<Speed> {
    let base = setting.base(1)?;
    let order = setting.order(1, 1);
    let batches: Vec<Vec<u32>> = (0..(BLOCKS * BLOCK_STEPS) as u64).map(|step| setting.training.gather(order.of(step, 0))).collect();
    let tokens_file = setting.scratch("speed-tokens.bin");
    std::fs::write(&tokens_file, batches.iter().flatten().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>())?;

    let mut ours = setting.trainer(&base)?;
    let mut theirs = Peer::start(setting, &base, &tokens_file)?;
    if let Err(reason) = &theirs {
        eprintln!("SKIPPED: no comparison with PyTorch: {reason}");
        eprintln!("hint: QUASAR_DEV_PYTHON=/path/to/python3 names a Python with torch");
    }
    let (mut our_steps, mut their_steps) = (Steps::default(), Steps::default());
    for (block, batches) in batches.chunks(BLOCK_STEPS).enumerate() {
        let first = (block * BLOCK_STEPS) as u64;
        for (step, tokens) in (first..).zip(batches) {
            let row_tokens = setting.training.row_tokens;
            let batch = Batch { tokens, rows: tokens.len() / row_tokens, row_tokens };
            let start = Instant::now();
            let report = ours.step(&batch, &setting.hyper(step), None, false)?;
            our_steps.add(start.elapsed().as_secs_f64(), report.loss);
        }
        if let Ok(peer) = &mut theirs {
            for step in (first..).take(batches.len()) {
                let (seconds, loss) = peer.step(&setting.hyper(step))?;
                their_steps.add(seconds, loss);
            }
        }
    }
    let tokens = batches[0].len() as f64;
    let pytorch = match theirs {
        Err(reason) => PyTorch::Skipped { reason },
        Ok(peer) => {
            let version = peer.end()?;
            let differences: Vec<f64> =
                our_steps.losses.iter().zip(&their_steps.losses).map(|(ours, theirs)| (ours - theirs).abs()).collect();
            anyhow::ensure!(
                differences[0] <= LOSS_TOLERANCE,
                "the first losses differ by {:.2e}: PyTorch does not compute the same model",
                differences[0]
            );
            PyTorch::Measured(Measured {
                version,
                tokens_per_second: tokens / their_steps.median(),
                first_loss_difference: differences[0],
                median_loss_difference: median(&differences),
            })
        }
    };
    Ok(Speed { tokens_per_second: tokens / our_steps.median(), pytorch })
}

#[derive(Default)]
struct Steps {
    seconds: Vec<f64>,
    losses: Vec<f64>,
}

impl Steps {
    fn add(&mut self, seconds: f64, loss: f64) {
        self.seconds.push(seconds);
        self.losses.push(loss);
    }

    /// Median duration without the first steps.
    fn median(&self) -> f64 {
        median(&self.seconds[WARM_UP..])
    }
}

/// The median of at least one value.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// The Python program, which takes a step for each line that it is sent.
struct Peer {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    version: String,
}

impl Peer {
    /// Starts it; the inner error says why there is no PyTorch here.
    fn start(setting: &Setting, base: &Base, tokens: &std::path::Path) -> anyhow::Result<Result<Self, String>> {
        let python = std::env::var_os("QUASAR_DEV_PYTHON").filter(|name| !name.is_empty()).unwrap_or_else(|| "python3".into());
        let hyper = setting.hyper(0);
        let mut command = Command::new(&python);
        command.arg("-B").arg(&setting.script).arg("--checkpoint").arg(&base.folder).arg("--tokens").arg(tokens);
        for (option, value) in [
            ("--rows", f64::from(setting.parameters.batch_rows)),
            ("--row-tokens", f64::from(setting.parameters.sequence_length)),
            ("--beta1", hyper.beta1),
            ("--beta2", hyper.beta2),
            ("--eps", hyper.eps),
            ("--weight-decay", hyper.weight_decay),
            ("--clip-norm", hyper.clip_norm),
        ] {
            command.arg(option).arg(value.to_string());
        }
        command.env("OMP_NUM_THREADS", "1").envs(ALLOCATOR).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return Ok(Err(format!("{} cannot be started: {error}", python.to_string_lossy()))),
        };
        let orders = child.stdin.take().context("the child has no standard input")?;
        let answers = BufReader::new(child.stdout.take().context("the child has no standard output")?);
        let mut peer = Self { child, orders, answers, version: String::new() };
        let greeting = peer.answer()?;
        if let Some(reason) = greeting["unavailable"].as_str() {
            peer.end()?;
            return Ok(Err(format!("torch is not importable in {}: {reason}", python.to_string_lossy())));
        }
        peer.version = greeting["torch"].as_str().context("PyTorch's step did not tell its version")?.to_owned();
        Ok(Ok(peer))
    }

    fn answer(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        serde_json::from_str(&line).context("PyTorch's step ended without an answer; its message is above")
    }

    /// One step: its duration in seconds, measured there, and its loss.
    fn step(&mut self, hyper: &Hyper) -> anyhow::Result<(f64, f64)> {
        writeln!(self.orders, "{}", hyper.lr)?;
        let answer = self.answer()?;
        let number = |key: &str| answer[key].as_f64().with_context(|| format!("PyTorch's step told no {key}"));
        Ok((number("seconds")?, number("loss")?))
    }

    /// Closes its input, which ends it. Gives the version of PyTorch.
    fn end(self) -> anyhow::Result<String> {
        let Self { mut child, orders, answers, version } = self;
        drop((orders, answers));
        child.wait()?;
        Ok(version)
    }
}
