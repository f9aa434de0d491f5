//! `quasar-validator`: audits the learners of a run and sets weights.

use daemon::Exit;

fn main() -> Exit {
    daemon::exit::run(|| quasar_validator::cli::main(std::env::args_os()))
}
