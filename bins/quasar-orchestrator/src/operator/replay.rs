//! `replay`: what a journal remembers, input by input, and where the machine stands after it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use daemon::driver::recover_observed;
use daemon::{Failure, Journal, JournalError};

use crate::machine::{Input, Orchestrator};

/// Longest line of an input for people.
const LINE_CHARS: usize = 200;
/// Copies that are taken of a journal that is being written to until one is whole, and the pause between them.
const COPIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(50);

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
    let mut copies = 0;
    let journal = loop {
        std::fs::copy(&arguments.file, folder.join("journal.redb")).map_err(unusable)?;
        copies += 1;
        // Every page and every record has a check: a copy that was torn by a write is no other state, but a damaged one.
        let opened = Journal::open(folder).and_then(|journal| journal.load().map(|loaded| (journal, loaded.snapshot.is_some())));
        match opened {
            Ok((journal, true)) => break journal,
            Ok((_, false)) => {
                return Err(Failure::configuration(anyhow::anyhow!("{} holds no snapshot to begin from", arguments.file.display()))
                    .hint("this is no journal of an orchestrator, or of one that never began"));
            }
            Err(JournalError::Damaged { reason, .. } | JournalError::Unusable { reason, .. }) if is_in_use(&arguments.file) => {
                if copies == COPIES {
                    return Err(Failure::try_later(anyhow::anyhow!(
                        "{} is in use, and none of {COPIES} copies of it is whole: {reason}",
                        arguments.file.display()
                    ))
                    .hint("try again, or when the orchestrator is stopped; the journal itself was not touched"));
                }
                std::thread::sleep(PAUSE);
            }
            // Not the copy's path: that is gone when this is read.
            Err(JournalError::Damaged { reason, .. }) => {
                return Err(JournalError::Damaged { path: arguments.file.clone(), reason }.into());
            }
            Err(error) => return Err(error.into()),
        }
    };
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

/// Whether a running process may be writing to this file.
fn is_in_use(file: &Path) -> bool {
    // A file without a folder lies in the current one.
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Journal::is_in_use(folder)
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
    use std::sync::atomic::{AtomicBool, Ordering};

    use daemon::{Exit, driver};

    use super::*;
    use crate::machine::RunSetup;
    use protocol::Digest;
    use protocol::documents::{CatalogRef, ReleaseRef};

    fn arguments(file: PathBuf) -> ReplayArgs {
        ReplayArgs { file, json: true, state: true }
    }

    /// A journal that holds the first snapshot of an orchestrator, and that orchestrator.
    fn begun(folder: &Path) -> (Journal, Orchestrator) {
        let journal = Journal::open(folder).unwrap();
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
        let machine = Orchestrator::new(setup);
        driver::seed(&journal, &machine, 5).unwrap();
        (journal, machine)
    }

    #[test]
    fn a_journal_is_replayed_from_a_copy_and_what_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.redb");
        drop(Journal::open(folder.path()).unwrap());
        let refused = replay(&arguments(file.clone())).unwrap_err();
        assert_eq!(refused.exit, Exit::Configuration, "{refused}");
        let _begun = begun(folder.path());
        // The journal is open, as that of a running orchestrator is: only a copy is touched.
        replay(&arguments(file)).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "journal and lock, no copy is left");
        assert!(replay(&arguments(folder.path().join("nothing"))).is_err());
    }

    #[test]
    fn a_copy_that_was_torn_by_a_running_process_damns_nobodys_journal() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.redb");
        drop(begun(folder.path()));
        // What a copy looks like when a write came in between.
        let whole = std::fs::read(&file).unwrap();
        let mut torn = whole.clone();
        torn[4_096..].fill(0x5a);
        std::fs::write(&file, &torn).unwrap();
        let running = std::fs::File::open(folder.path().join("lock")).unwrap();
        running.lock().unwrap();
        let later = replay(&arguments(file.clone())).unwrap_err();
        assert_eq!(later.exit, Exit::TryLater, "{later}");
        assert!(!later.to_string().contains("move the file away"), "{later}");
        drop(running);
        let damaged = replay(&arguments(file.clone())).unwrap_err();
        assert_eq!(damaged.exit, Exit::Configuration, "nobody writes to it: {damaged}");
        assert!(damaged.to_string().contains(&format!("{} is damaged", file.display())), "{damaged}");
        std::fs::write(&file, &whole).unwrap();
        replay(&arguments(file)).unwrap();
    }

    #[test]
    fn a_journal_is_replayed_while_it_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.redb");
        let (journal, machine) = begun(folder.path());
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    driver::seed(&journal, &machine, 6).unwrap();
                }
            });
            for _ in 0..5 {
                match replay(&arguments(file.clone())) {
                    Ok(()) => {}
                    Err(failure) => assert_eq!(failure.exit, Exit::TryLater, "{failure}"),
                }
            }
            is_over.store(true, Ordering::Relaxed);
        });
        replay(&arguments(file)).unwrap();
    }
}
