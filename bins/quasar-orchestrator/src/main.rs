//! The orchestrator of a Quasar training run.

fn main() -> daemon::Exit {
    daemon::exit::run(|| quasar_orchestrator::cli::main(std::env::args_os()))
}
