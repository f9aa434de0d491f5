//! `eval`: the mean next-token loss of a checkpoint, as the audits' loss test computes it.

use daemon::settings::{CommonArgs, Role};
use daemon::{Exit, Failure};
use model::{EvaluatorOptions, checkpoint_loss};

use crate::cli::EvalArgs;

pub fn main(common: &CommonArgs, args: &EvalArgs) -> Result<Exit, Failure> {
    // Before any tensor is made and any thread is started.
    model::tune_allocator();
    if args.device.starts_with("cuda")
        && let Some(folder) = common.settings(Role::Validator, ())?.validator().torch_cuda_dir
    {
        model::load_cuda(&folder).map_err(Failure::configuration)?;
    }
    let threads = if args.threads > 0 { args.threads } else { std::thread::available_parallelism().map_or(1, usize::from) };
    let options = EvaluatorOptions { device: args.device.clone(), threads, ..EvaluatorOptions::default() };
    let measured =
        checkpoint_loss(&args.checkpoint, &args.tokens, args.sequence_length, &options, args.max_rows).map_err(Failure::configuration)?;
    if args.json {
        println!("{}", serde_json::json!({ "loss": measured.loss, "tokens": measured.tokens, "rows": measured.rows }));
    } else {
        println!("loss {:.6} nats over {} rows, {} tokens", measured.loss, measured.rows, measured.tokens);
    }
    Ok(Exit::Done)
}
