//! Which memory a starting orchestrator goes on from: its own journal, if nobody wrote since; else the bucket.
//!
//! Every journal has an instance number, and the writer lease names the instance that wrote last. A journal that is not of that
//! instance is history: it is put aside, and a fresh one begins with what the bucket holds. So does one whose machine is behind the
//! head: the disk was set back to an older copy, and the head never goes back.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use daemon::driver::{self, Recovered};
use daemon::{Failure, Journal, Machine, clock};
use protocol::AccountId;
use protocol::documents::{Head, Progress, WriterLease};
use protocol::envelope::{Document, EnvelopeError, Expect, Verified, open_stored};

use crate::effects::Service;
use crate::machine::{Input, Orchestrator, SNAPSHOT_BYTES_MAX};

mod gather;

pub use gather::{Bucket, gather, has_caught_up};

const INSTANCE_KEY: &str = "writer/instance";

/// The journal of the folder, with its instance number and that of the journal after it: the one that is there, if it is new or
/// `last_writer` worked with it; else a fresh one.
///
/// # Errors
/// The journal cannot be used, or a version of another layout wrote it.
pub fn open_journal(folder: &Path, last_writer: Option<&WriterLease>) -> Result<(Journal, [[u8; 16]; 2]), Failure> {
    let mut journal = Journal::open(folder)?;
    let mut instance = instance_of(&journal)?;
    if let Some(last) = last_writer
        && instance != Some(last.instance)
    {
        if !journal.is_empty()? {
            let aside = journal.set_aside(clock::now_ms())?;
            tracing::warn!(
                holder = last.host,
                epoch = last.epoch,
                "another orchestrator wrote to this run since; this journal is put aside as {}",
                aside.display()
            );
            journal = Journal::open(folder)?;
        }
        // Never the number of a journal that is gone.
        instance = None;
    }
    // Said before anything is written to the bucket.
    driver::has_layout::<Orchestrator>(&journal)?;
    if let Some(instance) = instance {
        return Ok((journal, [instance, fresh_instance()]));
    }
    let fresh = fresh_instance();
    journal.put(INSTANCE_KEY, &fresh)?;
    Ok((journal, [fresh, fresh_instance()]))
}

fn fresh_instance() -> [u8; 16] {
    let secret = storage::seal_stream::fresh_secret();
    std::array::from_fn(|at| secret[at])
}

fn instance_of(journal: &Journal) -> Result<Option<[u8; 16]>, Failure> {
    let bytes = journal.get(INSTANCE_KEY)?;
    Ok(bytes.and_then(|bytes| bytes.try_into().ok()))
}

/// The machine to go on with, and the input to begin with. `head` is the one that was claimed, `fresh` the machine of a run that
/// nothing happened in yet.
pub async fn recover(
    service: &Service,
    journal: &Arc<Journal>,
    head: Head,
    fresh: Orchestrator,
) -> Result<(Recovered<Orchestrator>, Input), Failure> {
    let epoch = head.epoch;
    let is_empty = journal.is_empty()?;
    if !is_empty && !service.fence.is_own() {
        tracing::warn!("another orchestrator wrote to this run while this one waited for the lease: its journal is history");
    } else if !is_empty {
        let recovered = driver::recover(journal, || fresh.clone())?;
        if !recovered.machine.is_behind(&head) {
            return Ok((recovered, Input::Claimed { epoch }));
        }
        tracing::warn!("the journal is older than the head: it was restored from a copy, or lost what was written last");
    }
    let (taken_ms, mut machine) = match service.read(&service.run.snapshot(), SNAPSHOT_BYTES_MAX).await? {
        Some(bytes) => {
            Orchestrator::from_snapshot(&bytes).map_err(|error| Failure::configuration(error).context(service.run.snapshot()))?
        }
        None => (0, fresh),
    };
    let facts = gather(service, &service.run, service.manifest.parameters.overlap, &machine, head.clone()).await?;
    tracing::info!(
        epoch,
        snapshot_age_ms = clock::now_ms().saturating_sub(taken_ms),
        steps = facts.steps.len(),
        leases = facts.leases.len(),
        "going on from the bucket"
    );
    let now_ms = clock::now_ms().max(taken_ms);
    // One commit holds the machine with all that the bucket told: a crash finds the journal empty, or complete. What this would
    // have done comes again with the first input.
    machine.handle(now_ms, Input::Recovered { facts: Box::new(facts) });
    while machine.poll_effect().is_some() {}
    has_caught_up(&machine, &head)?;
    driver::seed(journal, &machine, now_ms)?;
    // From here on it is the journal that the lease names. Whoever dies before this finds a journal that is history.
    journal.put(INSTANCE_KEY, &service.fence.instance().await)?;
    Ok((Recovered { machine, replayed: 0, is_new: false, last_ms: now_ms }, Input::Claimed { epoch }))
}

impl Bucket for Service {
    async fn read(&self, key: &str, limit: u64) -> Result<Option<Bytes>, Failure> {
        self.read_document(key, limit).await.map_err(Failure::unavailable)
    }

    fn open<D: Document>(&self, bytes: &[u8]) -> Result<Verified<D>, EnvelopeError> {
        self.open_own(bytes)
    }

    fn open_record(&self, bytes: &[u8], hotkey: &AccountId) -> Result<Verified<Progress>, EnvelopeError> {
        open_stored(bytes, &self.context, Expect::Account(hotkey))
    }
}
