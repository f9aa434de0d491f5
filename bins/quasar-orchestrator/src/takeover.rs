//! Which memory a starting orchestrator goes on from: its own journal, if nobody wrote since; else the bucket.
//!
//! Every journal has an instance number, and the writer lease names the instance that wrote last. A journal that is not of that
//! instance is history: it is put aside, and a fresh one begins with what the bucket holds. So does one whose machine is behind the
//! head: the disk was set back to an older copy, and the head never goes back.

use std::path::Path;
use std::sync::Arc;

use daemon::driver::{self, DriverOptions, Recovered};
use daemon::{Exit, Failure, Journal, Machine, clock};
use protocol::Digest;
use protocol::documents::{CatalogPage, FragmentManifest, Head, Job, MergeManifest, Tape, WriterLease};
use protocol::envelope::{Document, Purpose};
use protocol::log::{LOG_ENTRIES_MAX, LogHead};
use storage::StoreError;

use crate::effects::Service;
use crate::machine::{BucketFacts, Input, Orchestrator, SNAPSHOT_BYTES_MAX, SnapshotError, StepFact, StoredPage};

const INSTANCE_KEY: &str = "writer/instance";

/// The journal of the folder, with its instance number: the one that is there, if it is new or `last_writer` worked with it; else a
/// fresh one.
pub fn open_journal(folder: &Path, last_writer: Option<&WriterLease>) -> Result<(Journal, [u8; 16]), Failure> {
    let failed = |error: daemon::JournalError| Failure::new(error.exit(), error);
    let mut journal = Journal::open(folder).map_err(failed)?;
    let mut instance = instance_of(&journal)?;
    if let Some(last) = last_writer
        && instance != Some(last.instance)
    {
        if !journal.is_empty().map_err(failed)? {
            let aside = journal.set_aside(clock::now_ms()).map_err(failed)?;
            tracing::warn!(
                holder = last.host,
                epoch = last.epoch,
                "another orchestrator wrote to this run since; this journal is put aside as {}",
                aside.display()
            );
            journal = Journal::open(folder).map_err(failed)?;
        }
        // Never the number of a journal that is gone.
        instance = None;
    }
    if let Some(instance) = instance {
        return Ok((journal, instance));
    }
    let secret = storage::seal_stream::fresh_secret();
    let fresh: [u8; 16] = std::array::from_fn(|at| secret[at]);
    journal.put(INSTANCE_KEY, &fresh).map_err(failed)?;
    Ok((journal, fresh))
}

fn instance_of(journal: &Journal) -> Result<Option<[u8; 16]>, Failure> {
    let bytes = journal.get(INSTANCE_KEY).map_err(|error| Failure::new(error.exit(), error))?;
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
    if !journal.is_empty().map_err(|error| Failure::new(error.exit(), error))? {
        let recovered = driver::recover(journal, || fresh.clone())?;
        if !recovered.machine.is_behind(&head) {
            return Ok((recovered, Input::Claimed { epoch }));
        }
        tracing::warn!("the journal is older than the head: it was restored from a copy, or lost what was written last");
    }
    let (taken_ms, mut machine) = match read(service, &service.run.snapshot(), SNAPSHOT_BYTES_MAX).await? {
        Some(bytes) => Orchestrator::from_snapshot(&bytes).map_err(|error| {
            let exit = if matches!(error, SnapshotError::Layout { .. }) { Exit::Configuration } else { Exit::Unavailable };
            Failure::new(exit, error).context(service.run.snapshot())
        })?,
        None => (0, fresh),
    };
    let facts = gather(service, &machine, head).await?;
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
    driver::seed(journal, &machine, now_ms)?;
    Ok((Recovered { machine, replayed: 0, is_new: false, last_ms: now_ms }, Input::Claimed { epoch }))
}

/// What the bucket holds beyond `machine`.
async fn gather(service: &Service, machine: &Orchestrator, head: Head) -> Result<BucketFacts, Failure> {
    let mut steps = Vec::new();
    let reach = u64::from(service.manifest.parameters.overlap) + 2;
    let (mut t, mut absent) = (machine.closed_below(), 0);
    // The steps that the head knows, and those that were taped before the head could say so.
    while t < head.outer_step || absent < reach {
        match document::<Tape>(service, &service.run.tape(t)).await? {
            None => absent += u64::from(t >= head.outer_step),
            Some((tape, _)) => {
                absent = 0;
                if !machine.is_closed(t) {
                    steps.push(step(service, tape).await?);
                }
            }
        }
        t += 1;
    }
    let mut pages: Vec<StoredPage> = Vec::new();
    loop {
        let newest = pages.last().map_or(machine.newest_page(), |page| page.reference);
        let key = service.run.catalog(newest.page + 1);
        let Some(bytes) = read(service, &key, Purpose::CatalogPage.file_limit()).await? else { break };
        let page = service.open_own::<CatalogPage>(&bytes).map_err(|error| Failure::configuration(error).context(key.clone()))?.document;
        if (page.page, page.previous) != (newest.page + 1, newest.digest) {
            return Err(Failure::configuration(anyhow::anyhow!("{key} does not follow the page before it"))
                .hint("somebody else wrote to this bucket; nothing was changed"));
        }
        pages.push(StoredPage::new(Digest::blake3(&bytes), &page));
    }
    let newest = pages.last().map_or(machine.newest_page(), |page| page.reference);
    if newest.page < head.catalog.page {
        return Err(missing(&service.run.catalog(newest.page + 1)));
    }
    let mut leases = Vec::new();
    for first in machine.unknown_leases_from(head.epoch) {
        let (mut id, mut absent) = (first, 0);
        // Records are written beside each other: where one is missing, the next may be there.
        while absent < DriverOptions::default().in_flight_max {
            match document::<Job>(service, &service.run.lease(id)).await? {
                Some((job, _)) => {
                    leases.push(job);
                    absent = 0;
                }
                None => absent += 1,
            }
            id += 1;
        }
    }
    let mut log = Vec::new();
    let mut size = head.log.size;
    while size > machine.log_size() {
        let key = service.run.log(size);
        let (entry, _) = document::<LogHead>(service, &key).await?.ok_or_else(|| missing(&key))?;
        size = entry.previous;
        log.push(entry);
    }
    log.reverse();
    // Log heads that were written before the run's head could name them.
    let mut size = head.log.size.max(machine.log_size());
    'published: loop {
        for next in size + 1..=size + LOG_ENTRIES_MAX as u64 {
            if let Some((entry, _)) = document::<LogHead>(service, &service.run.log(next)).await?
                && entry.previous == size
            {
                log.push(entry);
                size = next;
                continue 'published;
            }
        }
        break;
    }
    Ok(BucketFacts { epoch: head.epoch, head, steps, pages, leases, log })
}

async fn step(service: &Service, tape: Tape) -> Result<StepFact, Failure> {
    let Some((manifest, id)) = document::<MergeManifest>(service, &service.run.merge(tape.t)).await? else {
        return Ok(StepFact::Taped(tape));
    };
    if (manifest.fragment, manifest.base_version) != (tape.fragment, tape.base_version) {
        return Err(Failure::configuration(anyhow::anyhow!("the merge manifest of outer step {} contradicts its tape", tape.t))
            .hint("somebody else wrote to this bucket; nothing was changed"));
    }
    let key = service.run.fragment_manifest(manifest.fragment, manifest.version);
    let (fragment, _) = document::<FragmentManifest>(service, &key).await?.ok_or_else(|| missing(&key))?;
    if fragment.keyframe.blake3 != manifest.keyframe || fragment.state != manifest.state {
        return Err(Failure::configuration(anyhow::anyhow!("{key} contradicts the merge manifest of outer step {}", tape.t))
            .hint("somebody else wrote to this bucket; nothing was changed"));
    }
    Ok(StepFact::Merged { manifest: Box::new(manifest), id, keyframe_length: fragment.keyframe.length })
}

fn missing(key: &str) -> Failure {
    Failure::configuration(anyhow::anyhow!("{key} is missing, and later objects build on it"))
        .hint("restore it from a version of the bucket's object; nothing was changed")
}

async fn document<D: Document>(service: &Service, key: &str) -> Result<Option<(D, Digest)>, Failure> {
    let limit = D::PURPOSE.file_limit();
    let Some(bytes) = read(service, key, limit).await? else { return Ok(None) };
    let stored = service.open_own::<D>(&bytes).map_err(|error| Failure::configuration(error).context(key.to_owned()))?;
    Ok(Some((stored.document, stored.id)))
}

async fn read(service: &Service, key: &str, limit: u64) -> Result<Option<bytes::Bytes>, Failure> {
    match service.store.get(key, limit).await {
        Ok(object) => Ok(Some(object.bytes)),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(Failure::unavailable(error)),
    }
}
