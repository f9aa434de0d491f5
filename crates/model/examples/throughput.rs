//! Measures training steps on random tokens, of a checkpoint folder or of a fresh model with a configuration file:
//! `throughput CHECKPOINT|CONFIG [rows] [row tokens] [threads] [steps]`.

use std::path::PathBuf;
use std::time::Instant;

use protocol::DType;
use quasar_model::{Batch, Hyper, QuasarConfig, QuasarTrainer, Trainer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut folder = PathBuf::from(arguments.next().ok_or("usage: throughput CHECKPOINT|CONFIG [rows] [row tokens] [threads] [steps]")?);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (rows, row_tokens, threads, steps) = (number(4)?, number(128)?, number(1)?, number(20)?);
    quasar_model::tune_allocator();
    let fresh = tempfile::tempdir()?;
    if folder.is_file() {
        quasar_model::init::fresh(&QuasarConfig::from_file(&folder)?, 1, DType::F32, fresh.path())?;
        folder = fresh.path().to_owned();
    }
    let plan = fragments::plan(fragments::CheckpointTree::open(&folder)?.contract(), 24)?;
    let mut trainer = QuasarTrainer::open(&folder, plan, "cpu", threads)?;
    let vocabulary = trainer.config().vocab_size as u64;
    let mut word = 1u64;
    let mut times = Vec::new();
    for step in 0..steps + 3 {
        let tokens: Vec<u32> = (0..rows * row_tokens)
            .map(|_| {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                ((word >> 33) % vocabulary) as u32
            })
            .collect();
        let start = Instant::now();
        let report = trainer.step(&Batch { tokens: &tokens, rows, row_tokens }, &Hyper::default(), None, false)?;
        if step >= 3 {
            times.push(start.elapsed().as_secs_f64());
        }
        if step == 0 || step == steps + 2 {
            println!("step {step}: loss {:.4}, gradient norm {:.4}", report.loss, report.grad_norm);
        }
    }
    times.sort_by(f64::total_cmp);
    let (median, best) = (times[times.len() / 2], times[0]);
    let tokens = (rows * row_tokens) as f64;
    println!("median {median:.4} s = {:.0} tokens/s; best {best:.4} s = {:.0} tokens/s", tokens / median, tokens / best);
    Ok(())
}
