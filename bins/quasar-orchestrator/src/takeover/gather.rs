//! What a successor without the journal reads: everything that lies write-once in the bucket beyond the snapshot it begins with.

use bytes::Bytes;
use daemon::Failure;
use futures::{StreamExt, TryStreamExt};
use protocol::documents::{CatalogPage, FragmentManifest, Head, Job, LeaseEnd, MergeManifest, Order, Progress, Tape};
use protocol::envelope::{Document, EnvelopeError, Verified};
use protocol::log::LogHead;
use protocol::paths::RunKeys;
use protocol::schedule::fragment_of;
use protocol::{AccountId, Digest};

use crate::machine::{BucketFacts, Orchestrator, Slot, StepFact, StoredCommitment, StoredOrder, StoredPage};

/// Records that are read at the same time.
const READS_AT_ONCE: usize = 32;
/// Lease records that are looked for at a time.
const LEASES_AT_ONCE: u64 = 128;
/// Jobs wait for their turn, and a job that waits takes up the later leases of its slot: where a record is missing, those of so many
/// leases may be missing too, and later ones be there. Four for each hotkey of a full subnet.
const LEASES_ABSENT_MAX: u64 = 1_024;

const BROKEN: &str = "somebody else wrote to this bucket; nothing was changed but the writer lease and the epoch of the head";

/// The bucket as a successor reads it.
pub trait Bucket {
    /// The object at `key`, of at most `limit` bytes; `None` if there is none. One that is longer is read as no bytes: that is no document
    /// either, and it would be the same at the next start.
    fn read(&self, key: &str, limit: u64) -> impl Future<Output = Result<Option<Bytes>, Failure>>;

    /// Opens a document that an orchestrator of the run has signed.
    ///
    /// # Errors
    /// It is not what its key says.
    fn open<D: Document>(&self, bytes: &[u8]) -> Result<Verified<D>, EnvelopeError>;

    /// Opens a learner's record.
    ///
    /// # Errors
    /// It is none that this hotkey signed.
    fn open_record(&self, bytes: &[u8], hotkey: &AccountId) -> Result<Verified<Progress>, EnvelopeError>;
}

/// What the bucket holds beyond `machine`. `head` is the one that the successor has claimed, with its epoch.
///
/// # Errors
/// The bucket does not answer, or what lies in it does not belong together.
pub async fn gather(bucket: &impl Bucket, keys: &RunKeys, overlap: u8, machine: &Orchestrator, head: Head) -> Result<BucketFacts, Failure> {
    let mut steps = Vec::new();
    let mut versions = machine.fragment_versions();
    let fragments = versions.len() as u16;
    let reach = u64::from(overlap) + 2;
    let (mut t, mut absent) = (machine.closed_below(), 0);
    // The steps that the head knows, and those that were taped before the head could say so.
    while t < head.outer_step || absent < reach {
        let key = keys.tape(t);
        match document::<Tape>(bucket, &key).await? {
            None if t < head.closed_below && !machine.is_closed(t) => return Err(missing(&key)),
            None => absent += u64::from(t >= head.outer_step),
            Some((tape, _)) if (tape.t, tape.fragment) != (t, fragment_of(t, fragments)) => {
                return Err(contradiction(format!("{key} is the tape of another outer step")));
            }
            Some((tape, _)) => {
                absent = 0;
                if !machine.is_closed(t) {
                    let version = &mut versions[usize::from(tape.fragment)];
                    if tape.base_version != *version {
                        return Err(contradiction(format!("{key} does not begin with version {version}, which the step before it left")));
                    }
                    let step = step(bucket, keys, tape).await?;
                    if let StepFact::Merged { manifest, .. } = &step {
                        *version = manifest.version;
                    }
                    steps.push(step);
                }
            }
        }
        t += 1;
    }
    let mut pages: Vec<StoredPage> = Vec::new();
    loop {
        let newest = pages.last().map_or(machine.newest_page(), |page| page.reference);
        let key = keys.catalog(newest.page + 1);
        let Some((page, file)) = stored::<CatalogPage>(bucket, &key).await? else { break };
        let page = page.document;
        if (page.page, page.previous) != (newest.page + 1, newest.digest) {
            return Err(contradiction(format!("{key} does not follow the page before it")));
        }
        pages.push(StoredPage::new(file, &page));
    }
    let newest = pages.last().map_or(machine.newest_page(), |page| page.reference);
    if newest.page < head.catalog.page {
        return Err(missing(&keys.catalog(newest.page + 1)));
    }
    let mut leases = Vec::new();
    for first in machine.unknown_leases_from(head.epoch) {
        let mut absent = 0;
        for from in (first..).step_by(LEASES_AT_ONCE as usize) {
            let found = documents::<Job>(bucket, (from..from + LEASES_AT_ONCE).map(|id| keys.lease(id))).await?;
            absent = if found.is_empty() { absent + LEASES_AT_ONCE } else { 0 };
            if absent >= LEASES_ABSENT_MAX {
                break;
            }
            leases.extend(found);
        }
    }
    let given_out = leases.iter().flat_map(|job| &job.leases).map(|lease| lease.id);
    let may_have_ended = machine.leases_to_book().chain(given_out);
    let lease_ends = documents::<LeaseEnd>(bucket, may_have_ended.map(|id| keys.lease_end(id))).await?;
    // A ban or a rollback that the writer before took stands from the first pull on, and not from the next look.
    let mut orders = Vec::new();
    let mut number = machine.orders_taken() + 1;
    while let Some(bytes) = bucket.read(&keys.order(number), Order::PURPOSE.file_limit()).await? {
        orders.push(StoredOrder::new(number, bucket.open(&bytes)));
        number += 1;
    }
    let mut slots = machine.slots();
    slots.extend(leases.iter().map(|job| (job.hotkey, job.slot)));
    // Of steps that are decided and not merged too: what has no place in the tape is told so, and deleted.
    let is_merged = |t: u64| steps.iter().any(|step| step.tape().t == t && matches!(step, StepFact::Merged { .. }));
    let until = steps.iter().map(|step| step.tape().t + 1).fold(head.outer_step, u64::max);
    let unmerged = (machine.closed_below()..until).filter(|t| !machine.is_closed(*t) && !is_merged(*t));
    let commitments = commitments(bucket, keys, unmerged.flat_map(|t| slots.iter().map(move |slot| (*slot, t)))).await?;
    let mut log = Vec::new();
    let mut size = head.log.size;
    while size > machine.log_size() {
        let key = keys.log(size);
        let (entry, _) = document::<LogHead>(bucket, &key).await?.ok_or_else(|| missing(&key))?;
        size = entry.previous;
        log.push(entry);
    }
    log.reverse();
    // Log heads that were written before the run's head could name them.
    let mut size = head.log.size.max(machine.log_size());
    // One that is fixed and not shown yet is met when this writer comes to write there.
    while let Some((entry, _)) = document::<LogHead>(bucket, &keys.log_after(size)).await? {
        let next = entry.frontier.size();
        if entry.previous != size || document::<LogHead>(bucket, &keys.log(next)).await?.is_none() {
            break;
        }
        log.push(entry);
        size = next;
    }
    Ok(BucketFacts { epoch: head.epoch, head, commitments, steps, pages, leases, lease_ends, orders, log })
}

/// What lies in the bucket as evidence of these answers.
async fn commitments(
    bucket: &impl Bucket,
    keys: &RunKeys,
    answers: impl Iterator<Item = (Slot, u64)>,
) -> Result<Vec<StoredCommitment>, Failure> {
    let reads = answers.map(|(slot, t)| async move {
        let key = keys.commitment(&slot.0, slot.1, t);
        let Some(bytes) = bucket.read(&key, Progress::PURPOSE.file_limit()).await? else { return Ok(None) };
        let record = match bucket.open_record(&bytes, &slot.0) {
            Ok(record) => record,
            Err(error) => {
                tracing::error!("{key} is left out: {error}");
                return Ok(None);
            }
        };
        let commitment = record.document.commitments.into_iter().find(|commitment| commitment.t == t);
        Ok::<_, Failure>(commitment.map(|commitment| StoredCommitment { slot, id: record.id, commitment }))
    });
    let found: Vec<Option<StoredCommitment>> = futures::stream::iter(reads).buffered(READS_AT_ONCE).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

async fn step(bucket: &impl Bucket, keys: &RunKeys, tape: Tape) -> Result<StepFact, Failure> {
    let Some((manifest, id)) = document::<MergeManifest>(bucket, &keys.merge(tape.t)).await? else {
        return Ok(StepFact::Taped(tape));
    };
    if (manifest.t, manifest.fragment, manifest.base_version) != (tape.t, tape.fragment, tape.base_version) {
        return Err(contradiction(format!("{} contradicts the tape of its outer step", keys.merge(tape.t))));
    }
    let key = keys.fragment_manifest(manifest.fragment, manifest.version);
    let (fragment, _) = document::<FragmentManifest>(bucket, &key).await?.ok_or_else(|| missing(&key))?;
    if fragment.keyframe.blake3 != manifest.keyframe || fragment.state != manifest.state {
        return Err(contradiction(format!("{key} contradicts the merge manifest of outer step {}", tape.t)));
    }
    Ok(StepFact::Merged { tape, manifest: Box::new(manifest), id, keyframe_length: fragment.keyframe.length })
}

/// What a machine that read all of the bucket has to know; `head` is the one that was claimed.
///
/// # Errors
/// The head says what nothing in the bucket leads to.
pub fn has_caught_up(machine: &Orchestrator, head: &Head) -> Result<(), Failure> {
    if machine.is_behind(head) {
        return Err(contradiction("the head is ahead of the tapes and merges in the bucket".to_owned()));
    }
    Ok(())
}

fn contradiction(what: String) -> Failure {
    Failure::configuration(anyhow::anyhow!(what)).hint(BROKEN)
}

fn missing(key: &str) -> Failure {
    Failure::configuration(anyhow::anyhow!("{key} is missing, and later objects build on it"))
        .hint("restore it from a version of the bucket's object; nothing was changed but the writer lease and the epoch of the head")
}

/// A document with the id of its envelope.
async fn document<D: Document>(bucket: &impl Bucket, key: &str) -> Result<Option<(D, Digest)>, Failure> {
    Ok(stored::<D>(bucket, key).await?.map(|(verified, _)| (verified.document, verified.id)))
}

/// Those of the documents that are there, in the order of their keys.
async fn documents<D: Document>(bucket: &impl Bucket, keys: impl Iterator<Item = String>) -> Result<Vec<D>, Failure> {
    let reads = keys.map(|key| async move { document::<D>(bucket, &key).await });
    let found: Vec<Option<(D, Digest)>> = futures::stream::iter(reads).buffered(READS_AT_ONCE).try_collect().await?;
    Ok(found.into_iter().flatten().map(|(document, _)| document).collect())
}

/// A document with the digest of its file.
async fn stored<D: Document>(bucket: &impl Bucket, key: &str) -> Result<Option<(Verified<D>, Digest)>, Failure> {
    let Some(bytes) = bucket.read(key, D::PURPOSE.file_limit()).await? else { return Ok(None) };
    let opened = bucket.open::<D>(&bytes).map_err(|error| Failure::configuration(error).context(key.to_owned()))?;
    Ok(Some((opened, Digest::blake3(&bytes))))
}
