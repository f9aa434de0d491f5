//! `replay`: what a journal remembers, input by input, and where the machine stands after it.

use std::path::{Path, PathBuf};

use daemon::driver::recover_observed;
use daemon::{Failure, Journal};

use crate::machine::{Input, Orchestrator};

/// Longest line of an input for people.
const LINE_CHARS: usize = 200;

#[derive(Debug, clap::Args)]
pub struct ReplayArgs {
    /// The journal: `journal.redb` of a run's state folder, or one that was put aside
    file: PathBuf,
    /// Print each input and the state after the last one as JSON
    #[arg(long)]
    json: bool,
    /// Print the state after the last input only
    #[arg(long)]
    state: bool,
}

pub fn replay(arguments: &ReplayArgs) -> Result<(), Failure> {
    if !arguments.file.is_file() {
        return Err(Failure::configuration(anyhow::anyhow!("{} is no file", arguments.file.display()))
            .hint("name the journal.redb in runs/RUN of the state folder"));
    }
    // A copy, so that nothing is written to the original and a running orchestrator is not disturbed.
    let folder = arguments.file.with_extension(format!("replay-{}", std::process::id()));
    let outcome = copy_and_replay(arguments, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

fn copy_and_replay(arguments: &ReplayArgs, folder: &Path) -> Result<(), Failure> {
    let unusable = |error: std::io::Error| Failure::configuration(anyhow::anyhow!("{}: {error}", arguments.file.display()));
    std::fs::create_dir_all(folder).map_err(unusable)?;
    std::fs::copy(&arguments.file, folder.join("journal.redb")).map_err(unusable)?;
    let failed = |error: daemon::JournalError| Failure::new(error.exit(), error);
    let journal = Journal::open(folder).map_err(failed)?;
    if journal.load().map_err(failed)?.snapshot.is_none() {
        return Err(Failure::configuration(anyhow::anyhow!("{} holds no snapshot to begin from", arguments.file.display()))
            .hint("this is no journal of an orchestrator, or of one that never began"));
    }
    let never = || -> Orchestrator { unreachable!("there is a snapshot") };
    let recovered = recover_observed::<Orchestrator>(&journal, never, |now_ms, input| {
        if !arguments.state {
            println!("{}", line(now_ms, input, arguments.json));
        }
    })?;
    let status = recovered.machine.status();
    if arguments.json {
        println!("{}", serde_json::json!({ "replayed": recovered.replayed, "last_ms": recovered.last_ms, "status": status }));
    } else {
        println!(
            "{} inputs; {:?}, outer step {}, closed below {}, fragment versions {:?}, {} merges, {} empty, {} contributions",
            recovered.replayed,
            status.state,
            status.outer_step,
            status.closed_below,
            recovered.machine.fragment_versions(),
            status.merges,
            status.empty_merges,
            status.contributions
        );
    }
    Ok(())
}

fn line(now_ms: u64, input: &Input, json: bool) -> String {
    if json {
        return serde_json::json!({ "now_ms": now_ms, "input": input }).to_string();
    }
    let text = format!("{now_ms} {input:?}");
    if text.chars().count() <= LINE_CHARS { text } else { text.chars().take(LINE_CHARS).chain("…".chars()).collect() }
}

#[cfg(test)]
mod tests {
    use daemon::{Exit, driver};

    use super::*;
    use crate::machine::RunSetup;
    use protocol::Digest;
    use protocol::documents::{CatalogRef, ReleaseRef};

    fn arguments(file: PathBuf) -> ReplayArgs {
        ReplayArgs { file, json: true, state: true }
    }

    #[test]
    fn a_journal_is_replayed_from_a_copy_and_what_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.redb");
        let journal = Journal::open(folder.path()).unwrap();
        let refused = replay(&arguments(file.clone())).unwrap_err();
        assert_eq!(refused.exit, Exit::Configuration, "{refused}");
        let parameters =
            crate::operator::run::RunFile::read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/run-devnet.toml")));
        let setup = RunSetup {
            run: protocol::envelope::RunId([1; 16]),
            parameters: parameters.unwrap().parameters,
            release: ReleaseRef { release: "base".into(), manifest: Digest::ZERO },
            fragments: Vec::new(),
            catalog: CatalogRef { page: 0, digest: Digest::ZERO },
            shards: Vec::new(),
        };
        driver::seed(&journal, &Orchestrator::new(setup), 5).unwrap();
        // The journal is open, as that of a running orchestrator is: only a copy is touched.
        replay(&arguments(file)).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "journal and lock, no copy is left");
        assert!(replay(&arguments(folder.path().join("nothing"))).is_err());
    }
}
