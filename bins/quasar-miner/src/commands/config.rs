//! `config show` and `config validate`.

use daemon::settings::{CommonArgs, ConfigArgs, Role, show};
use daemon::{Exit, Failure};

pub fn main(common: &CommonArgs, args: &ConfigArgs) -> Result<Exit, Failure> {
    let (text, exit) = show::answer(Role::Miner, &common.sources(())?, &args.command)?;
    print!("{text}");
    Ok(exit)
}
