//! `config show` and `config validate`.

use daemon::settings::flags::ConfigCommand;
use daemon::settings::{CommonArgs, ConfigArgs, Role, show};
use daemon::{Exit, Failure};

pub fn main(common: &CommonArgs, args: &ConfigArgs) -> Result<Exit, Failure> {
    match &args.command {
        ConfigCommand::Show { json } => {
            let settings = common.settings(Role::Validator, ())?;
            if *json {
                println!("{:#}", show::json(&settings));
            } else {
                print!("{}", show::text(&settings));
            }
            Ok(Exit::Done)
        }
        ConfigCommand::Validate => {
            let problems = show::problems(Role::Validator, &common.sources(())?);
            for problem in &problems {
                println!("{problem}");
            }
            if problems.is_empty() {
                println!("the settings are complete");
                Ok(Exit::Done)
            } else {
                Ok(Exit::Configuration)
            }
        }
    }
}
