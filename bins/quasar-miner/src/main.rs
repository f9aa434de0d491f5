//! `quasar-miner`: joins a run, trains leased rows, answers pulls.

use daemon::Exit;

fn main() -> Exit {
    let exit = daemon::exit::run(|| quasar_miner::cli::main(std::env::args_os()));
    quasar_miner::trainer::leave(exit)
}
