//! What the learner did lately, on disk: the state at the start of each segment, every step after it, and which steps each
//! payload is bound to. Restarts go on from it and audits are answered from it.
//!
//! Files are named by session and local step (or outer step), zero-padded, so that their order is the order of events:
//! `S-N.state` is the trainer's state before step N, `S-N.segment` describes it and is written after it, `S-N.step` is one
//! step, `S-T-N.export` is one payload, and `S-T-N.residual` is what the codec had withheld before it ([`super::feedback`]). A session
//! answers a pull twice if it is opened again after the first answer.
//!
//! A learner that opens what a power loss has changed fails its audit; one that opens nothing is not blamed. So every file has a digest
//! that is compared before it is opened. To flush them to the medium would hold up fast learners, and save an opening at most.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use bincode::{Decode, Encode};
use daemon::files;
use model::{Routes, StateError, TrainError};
use protocol::documents::OpenedStep;
use protocol::{Digest, codec};

/// Longest description that is read back.
const META_BYTES_MAX: usize = 1 << 20;
/// Writes that may wait for the disk before training does.
const QUEUE: usize = 4;
/// Bytes of the BLAKE3 at the end of a step and of a residual.
const DIGEST_BYTES: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error("the segments in {} cannot be used: {source}\nhint: free space in the state folder, and check its owner", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the segment of outer step {t} is not in {}", path.display())]
    Missing { path: PathBuf, t: u64 },
    #[error("{} is damaged", path.display())]
    Damaged { path: PathBuf },
}

impl SpoolError {
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if files::is_disk_full(source))
    }

    /// Whether no later attempt can find it.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::Missing { .. } | Self::Damaged { .. } => true,
        }
    }
}

/// A moment of a session: session epoch and local step.
type Moment = (u64, u64);

/// An export: session, outer step, local step.
type ExportAt = (u64, u64, u64);

#[derive(Clone, Debug, PartialEq, Encode, Decode)]
struct Segment {
    versions: Vec<u64>,
}

#[derive(Clone, Debug, PartialEq, Encode, Decode)]
struct ExportRecord {
    start_step: u64,
    /// BLAKE3 of the payload.
    payload: Digest,
    /// Its codec withholds something: without the residual beside it, it cannot be opened.
    has_residual: bool,
}

enum Write {
    State {
        at: Moment,
        bytes: Vec<u8>,
    },
    /// The buffer comes back unused.
    Nothing {
        bytes: Vec<u8>,
    },
    Segment {
        at: Moment,
        versions: Vec<u64>,
    },
    Step {
        at: Moment,
        step: Box<OpenedStep>,
        routes: Routes,
    },
    Export {
        at: ExportAt,
        record: ExportRecord,
    },
    /// The payload of this outer step is opened, and no audit asks for others before `below` that is not kept for it.
    Release {
        opened: u64,
        below: u64,
    },
    /// Audits ask for the payloads of these outer steps.
    Keep {
        of: BTreeSet<u64>,
    },
    /// Answered once everything before it is on disk.
    Flush(SyncSender<()>),
}

/// A segment with its steps, as an audit wants it.
#[derive(Debug)]
pub struct OpenedSegment {
    pub start_step: u64,
    pub versions: Vec<u64>,
    /// File with the bytes of the trainer's state.
    pub state: PathBuf,
    /// File with the residual that went into the payload, where its codec withholds something.
    pub residual: Option<PathBuf>,
    pub steps: Vec<(OpenedStep, Vec<u16>)>,
}

/// The spool of one learner. Writes are handed to a thread of its own.
pub struct Spool {
    folder: PathBuf,
    session: u64,
    writes: SyncSender<Write>,
    /// The buffer in which states wait for the disk, while none does.
    buffer: Mutex<Receiver<Vec<u8>>>,
    failure: Arc<Mutex<Option<SpoolError>>>,
}

impl Spool {
    /// Opens the spool for a new session. The segments of payloads of the last `outer_steps_kept` outer steps stay, those of earlier
    /// sessions included, however many steps the learner takes meanwhile; and the two newest.
    pub fn open(folder: PathBuf, session: u64, outer_steps_kept: u64) -> Result<Self, SpoolError> {
        let fail = |source| SpoolError::Io { path: folder.clone(), source };
        fs::create_dir_all(&folder).map_err(fail)?;
        remove_leftovers(&folder).map_err(fail)?;
        let (writes, queue) = sync_channel(QUEUE);
        let failure = Arc::new(Mutex::new(None));
        let (spare, buffer) = channel();
        let _ = spare.send(Vec::new());
        let writer =
            Writer { folder: folder.clone(), outer_steps_kept, released: 0, asked: BTreeSet::new(), spare, failure: failure.clone() };
        std::thread::Builder::new().name("spool".into()).spawn(move || writer.run(&queue)).map_err(fail)?;
        Ok(Self { folder, session, writes, buffer: Mutex::new(buffer), failure })
    }

    fn write(&self, write: Write) -> Result<(), SpoolError> {
        // The thread ends with the sender only; should it have died, its failure says why.
        let _ = self.writes.send(write);
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    /// Keeps the state before step `local_step`, which `save` writes into memory: the disk gets it beside the steps that follow. Waits until
    /// the state before is there.
    pub fn take_state(
        &self,
        local_step: u64,
        save: impl FnOnce(&mut dyn io::Write) -> Result<Digest, TrainError>,
    ) -> Result<Digest, TrainError> {
        let buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        // The thread gives it back whatever came of the write; it ends with this only.
        let mut bytes = buffer.recv().unwrap_or_default();
        bytes.clear();
        let saved = save(&mut bytes);
        let write = match &saved {
            Ok(_) => Write::State { at: (self.session, local_step), bytes },
            Err(_) => Write::Nothing { bytes },
        };
        let _ = self.writes.send(write);
        saved
    }

    /// The same for a state that may be larger than the memory that is left: it is written, and flushed, at once.
    pub fn save_state(
        &self,
        local_step: u64,
        save: impl FnOnce(&mut dyn io::Write) -> Result<Digest, TrainError>,
    ) -> Result<Digest, TrainError> {
        let path = self.folder.join(name((self.session, local_step), ".state"));
        files::write_with(&path, |file| save(file).map_err(Saving)).map_err(|Saving(error)| error)
    }

    /// Describes the state before step `local_step`, from where a segment begins. As all writes, it reports the failure of an earlier one.
    pub fn put_segment(&self, local_step: u64, versions: Vec<u64>) -> Result<(), SpoolError> {
        self.write(Write::Segment { at: (self.session, local_step), versions })
    }

    pub fn put_step(&self, step: OpenedStep, routes: Routes) -> Result<(), SpoolError> {
        self.write(Write::Step { at: (self.session, step.local_step), step: Box::new(step), routes })
    }

    /// Binds a payload to its segment, and keeps the residual that went into it as it is now.
    pub fn put_export(
        &self,
        t: u64,
        (start_step, local_step): (u64, u64),
        payload: Digest,
        residual: Option<&Path>,
    ) -> Result<(), SpoolError> {
        let at = (self.session, t, local_step);
        if let Some(residual) = residual {
            let kept = self.folder.join(export_name(at, ".residual"));
            // The residual is replaced whole when it changes, so that a link keeps it; not every file system has links.
            files::remove(&kept)
                .and_then(|()| fs::hard_link(residual, &kept).or_else(|_| fs::copy(residual, &kept).map(drop)))
                .map_err(|source| SpoolError::Io { path: kept, source })?;
        }
        self.write(Write::Export { at, record: ExportRecord { start_step, payload, has_residual: residual.is_some() } })
    }

    /// The segment of outer step `opened` is not needed any more, nor those of payloads before `below` that no audit waits for.
    pub fn release(&self, opened: u64, below: u64) -> Result<(), SpoolError> {
        self.write(Write::Release { opened, below })
    }

    /// Keeps the segments of the payloads of these outer steps, however old they are, until they are released.
    pub fn keep(&self, of: BTreeSet<u64>) {
        // The failure of an earlier write is for those that wait for it.
        let _ = self.writes.send(Write::Keep { of });
    }

    /// Waits until everything that was written so far can be read back. What of it a power loss tears is found by its digest.
    pub fn flush(&self) -> Result<(), SpoolError> {
        let (done, wait) = sync_channel(1);
        self.write(Write::Flush(done))?;
        let _ = wait.recv();
        self.write_failure()
    }

    fn write_failure(&self) -> Result<(), SpoolError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    /// The file with the state before `local_step` of this session, found whole.
    pub fn state(&self, local_step: u64, elements: usize) -> Result<PathBuf, SpoolError> {
        self.checked((self.session, local_step), elements)
    }

    fn checked(&self, at: Moment, elements: usize) -> Result<PathBuf, SpoolError> {
        let path = self.folder.join(name(at, ".state"));
        let checked =
            fs::File::open(&path).map_err(StateError::Io).and_then(|file| model::check_state(&mut BufReader::new(file), elements));
        match checked {
            Ok(()) => Ok(path),
            Err(StateError::Io(source)) => Err(SpoolError::Io { path, source }),
            Err(_) => Err(SpoolError::Damaged { path }),
        }
    }

    /// The file with the newest state of any session that is whole; damaged ones are passed over.
    pub fn newest_state(&self, elements: usize) -> Option<PathBuf> {
        let segments = moments(&self.folder, ".segment").ok()?;
        let find = |at: &Moment| match self.checked(*at, elements) {
            Ok(path) => Some(path),
            Err(error) => {
                tracing::warn!(%error, "a local snapshot is passed over");
                None
            }
        };
        segments.iter().rev().find_map(find)
    }

    /// The segment that the payload of outer step `t` with this digest is bound to. Found whole, for a model with `elements` parameters: what
    /// is damaged is not opened.
    pub fn open_segment(&self, t: u64, payload: &Digest, elements: usize) -> Result<OpenedSegment, SpoolError> {
        self.flush()?;
        let missing = || SpoolError::Missing { path: self.folder.clone(), t };
        let io = |source| SpoolError::Io { path: self.folder.clone(), source };
        // Two answers to one pull may lie here, and the segment of one does not open the other.
        let exports: Vec<ExportAt> = exports(&self.folder, ".export").map_err(io)?.into_iter().filter(|(_, of, _)| *of == t).collect();
        let record = |at: &ExportAt| self.meta::<ExportRecord>(&export_name(*at, ".export"));
        let found = exports.iter().find(|at| record(at).is_ok_and(|record| record.payload == *payload));
        let export_at = *found.ok_or_else(missing)?;
        let export = record(&export_at)?;
        let start = (export_at.0, export.start_step);
        let segment: Segment = self.meta(&name(start, ".segment")).map_err(|_| missing())?;
        let steps = (export.start_step..export_at.2).map(|step| self.step((export_at.0, step)).map_err(|_| missing()));
        let steps: Vec<_> = steps.collect::<Result<_, _>>()?;
        let residual = if export.has_residual { Some(self.residual(export_at)?) } else { None };
        let state = self.checked(start, elements)?;
        Ok(OpenedSegment { start_step: export.start_step, versions: segment.versions, state, residual, steps })
    }

    /// The file with what was withheld before an export, found whole.
    fn residual(&self, at: ExportAt) -> Result<PathBuf, SpoolError> {
        let path = self.folder.join(export_name(at, ".residual"));
        let is_whole = || -> io::Result<bool> {
            let mut file = fs::File::open(&path)?;
            let Some(length) = file.metadata()?.len().checked_sub(DIGEST_BYTES as u64) else { return Ok(false) };
            let (mut hasher, mut digest) = (blake3::Hasher::new(), [0; DIGEST_BYTES]);
            hasher.update_reader(file.by_ref().take(length))?;
            file.read_exact(&mut digest)?;
            Ok(*hasher.finalize().as_bytes() == digest)
        };
        match is_whole() {
            Ok(true) => Ok(path),
            Ok(false) => Err(SpoolError::Damaged { path }),
            Err(source) => Err(SpoolError::Io { path, source }),
        }
    }

    fn meta<T: Encode + Decode<()>>(&self, file: &str) -> Result<T, SpoolError> {
        let path = self.folder.join(file);
        let bytes = fs::read(&path).map_err(|source| SpoolError::Io { path: path.clone(), source })?;
        described(&bytes).ok_or(SpoolError::Damaged { path })
    }

    /// A step file: length of the description (le32), the description, the expert choices (le16 each).
    fn step(&self, at: Moment) -> Result<(OpenedStep, Vec<u16>), SpoolError> {
        let path = self.folder.join(name(at, ".step"));
        let bytes = fs::read(&path).map_err(|source| SpoolError::Io { path: path.clone(), source })?;
        let parse = || {
            let (length, rest) = content_of(&bytes)?.split_first_chunk::<4>()?;
            let (meta, routes) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            let step: OpenedStep = codec::decode(meta, META_BYTES_MAX).ok()?;
            Some((step, routes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()))
        };
        parse().ok_or(SpoolError::Damaged { path })
    }
}

/// Writes a small file, with the BLAKE3 of what is in it behind it.
fn write_checked(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    files::write_whole(path, &[parts, &[hasher.finalize().as_bytes()]].concat())
}

/// What is in such a file, if it is whole.
fn content_of(bytes: &[u8]) -> Option<&[u8]> {
    let (content, digest) = bytes.split_last_chunk::<DIGEST_BYTES>()?;
    (Digest::blake3(content).0 == *digest).then_some(content)
}

fn described<T: Encode + Decode<()>>(bytes: &[u8]) -> Option<T> {
    codec::decode(content_of(bytes)?, META_BYTES_MAX).ok()
}

fn name((session, number): Moment, ending: &str) -> String {
    format!("{session:016}-{number:012}{ending}")
}

fn export_name((session, t, local_step): ExportAt, ending: &str) -> String {
    format!("{session:016}-{t:012}-{local_step:012}{ending}")
}

/// All exports that have a file with this ending, in order.
fn exports(folder: &Path, ending: &str) -> io::Result<BTreeSet<ExportAt>> {
    let parse = |stem: String| {
        let mut numbers = stem.split('-').map(str::parse::<u64>);
        let at = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        numbers.next().is_none().then_some(at)
    };
    Ok(files::stems(folder, ending)?.into_iter().filter_map(parse).collect())
}

/// Moments of all files with this ending, in order.
fn moments(folder: &Path, ending: &str) -> io::Result<BTreeSet<Moment>> {
    let parse = |stem: String| {
        let (session, number) = stem.split_once('-')?;
        Some((session.parse().ok()?, number.parse().ok()?))
    };
    Ok(files::stems(folder, ending)?.into_iter().filter_map(parse).collect())
}

/// Removes what a process left that was killed between two writes: files that are not whole, and those that nothing describes.
fn remove_leftovers(folder: &Path) -> io::Result<()> {
    files::remove_leftovers(folder)?;
    let (states, segments) = (moments(folder, ".state")?, moments(folder, ".segment")?);
    for at in states.difference(&segments) {
        files::remove(&folder.join(name(*at, ".state")))?;
    }
    let (residuals, described) = (exports(folder, ".residual")?, exports(folder, ".export")?);
    for at in residuals.difference(&described) {
        files::remove(&folder.join(export_name(*at, ".residual")))?;
    }
    Ok(())
}

/// An error on its way out of [`files::write_with`].
struct Saving(TrainError);

impl From<io::Error> for Saving {
    fn from(error: io::Error) -> Self {
        Self(StateError::Io(error).into())
    }
}

/// The thread that writes.
struct Writer {
    folder: PathBuf,
    outer_steps_kept: u64,
    /// Payloads of outer steps before this one are not asked for any more.
    released: u64,
    /// Outer steps whose payloads are asked for.
    asked: BTreeSet<u64>,
    spare: Sender<Vec<u8>>,
    failure: Arc<Mutex<Option<SpoolError>>>,
}

impl Writer {
    fn run(mut self, queue: &Receiver<Write>) {
        while let Ok(write) = queue.recv() {
            if let Err(source) = self.write(write) {
                let error = SpoolError::Io { path: self.folder.clone(), source };
                *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        }
    }

    fn write(&mut self, write: Write) -> io::Result<()> {
        match write {
            Write::State { at, bytes } => {
                let written = files::write_whole(&self.folder.join(name(at, ".state")), &[&bytes]);
                let _ = self.spare.send(bytes);
                written
            }
            Write::Nothing { bytes } => {
                let _ = self.spare.send(bytes);
                Ok(())
            }
            Write::Segment { at, versions } => {
                write_checked(&self.folder.join(name(at, ".segment")), &[&codec::encode(&Segment { versions })])?;
                self.trim()
            }
            Write::Step { at, step, routes } => {
                let meta = codec::encode(&*step);
                let length = (meta.len() as u32).to_le_bytes();
                let routes: Vec<u8> = routes.0.iter().flat_map(|route| route.to_le_bytes()).collect();
                write_checked(&self.folder.join(name(at, ".step")), &[&length, &meta, &routes])
            }
            Write::Export { at, record } => write_checked(&self.folder.join(export_name(at, ".export")), &[&codec::encode(&record)]),
            Write::Release { opened, below } => {
                self.released = self.released.max(below);
                self.asked.remove(&opened);
                self.trim()
            }
            Write::Keep { of } => {
                self.asked = of;
                Ok(())
            }
            Write::Flush(done) => {
                let _ = done.send(());
                Ok(())
            }
        }
    }

    /// Removes what no audit can ask for any more.
    fn trim(&mut self) -> io::Result<()> {
        let exports = exports(&self.folder, ".export")?;
        let newest = exports.iter().map(|(_, t, _)| *t).max().unwrap_or(0);
        let mut kept = BTreeSet::new();
        for at in exports {
            let path = self.folder.join(export_name(at, ".export"));
            let record = fs::read(&path).ok().and_then(|bytes| described::<ExportRecord>(&bytes));
            match record {
                Some(record) if self.asked.contains(&at.1) || (at.1 >= self.released && at.1 + self.outer_steps_kept > newest) => {
                    kept.insert((at.0, record.start_step));
                }
                _ => {
                    files::remove(&path)?;
                    files::remove(&self.folder.join(export_name(at, ".residual")))?;
                }
            }
        }
        let segments = moments(&self.folder, ".segment")?;
        // A restart begins with the newest, and the next export may belong to the one before it.
        kept.extend(segments.iter().rev().take(2));
        for at in segments.difference(&kept) {
            files::remove(&self.folder.join(name(*at, ".segment")))?;
            files::remove(&self.folder.join(name(*at, ".state")))?;
        }
        // A step belongs to the segment that began last before it.
        let is_kept = |step: &Moment| segments.range(..=*step).next_back().is_none_or(|segment| kept.contains(segment));
        for at in moments(&self.folder, ".step")?.iter().filter(|step| !is_kept(step)) {
            files::remove(&self.folder.join(name(*at, ".step")))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use model::TrainerState;
    use protocol::steps::Exchange;

    use super::*;

    fn step(local_step: u64) -> OpenedStep {
        let exchanged = vec![Exchange::Applied { fragment: 2, version: 3 }];
        OpenedStep { local_step, lease: 1, lease_step: local_step as u32, exchanged, loss: 7 }
    }

    fn state(step: u64) -> TrainerState {
        TrainerState { step, weights: vec![1.0, 2.0], first: vec![0.0; 2], second: vec![0.0; 2], exported: vec![] }
    }

    fn newest(spool: &Spool) -> TrainerState {
        TrainerState::from_bytes(&fs::read(spool.newest_state(2).unwrap()).unwrap(), 2).unwrap()
    }

    /// Eight steps in segments of four; payloads of outer steps 100 and 101.
    fn fill(spool: &Spool, steps: std::ops::Range<u64>) {
        for n in steps {
            if n % 4 == 0 {
                spool.save_state(n, |to| Ok(state(n).write(to)?)).unwrap();
                spool.put_segment(n, vec![9, n]).unwrap();
            }
            spool.put_step(step(n), Routes(vec![n as u16, 5])).unwrap();
        }
        spool.flush().unwrap();
    }

    #[test]
    fn the_segment_of_a_payload_is_opened_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path().join("spool"), 50, 72).unwrap();
        fill(&spool, 0..7);
        spool.put_export(100, (4, 7), Digest::ZERO, None).unwrap();
        spool.flush().unwrap();
        drop(spool);
        let spool = Spool::open(folder.path().join("spool"), 60, 72).unwrap();
        let opened = spool.open_segment(100, &Digest::ZERO, 2).unwrap();
        assert_eq!((opened.start_step, opened.versions), (4, vec![9, 4]));
        assert_eq!(opened.steps.iter().map(|(step, routes)| (step.local_step, routes[0])).collect::<Vec<_>>(), [(4, 4), (5, 5), (6, 6)]);
        assert_eq!(fs::read(opened.state).unwrap(), state(4).to_bytes());
        assert!(matches!(spool.open_segment(101, &Digest::ZERO, 2), Err(SpoolError::Missing { t: 101, .. })));
    }

    #[test]
    fn what_a_power_loss_tore_is_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path().to_owned(), 50, 72).unwrap();
        let residual = folder.path().join("5.residual");
        fs::write(&residual, [b"withheld".as_slice(), &Digest::blake3(b"withheld").0].concat()).unwrap();
        fill(&spool, 0..7);
        spool.put_export(100, (4, 7), Digest::ZERO, Some(&residual)).unwrap();
        let open = |elements| spool.open_segment(100, &Digest::ZERO, elements).map(drop);
        assert!(open(2).is_ok());
        assert!(matches!(open(3), Err(SpoolError::Damaged { .. })), "a state of another model");
        let files = [
            name((50, 4), ".state"),
            name((50, 4), ".segment"),
            name((50, 5), ".step"),
            export_name((50, 100, 7), ".export"),
            export_name((50, 100, 7), ".residual"),
        ];
        for path in files.map(|file| folder.path().join(file)) {
            let whole = fs::read(&path).unwrap();
            let mut changed = whole.clone();
            changed[whole.len() / 2] ^= 1;
            for torn in [&whole[..whole.len() / 2], &whole[..0], &changed[..]] {
                fs::write(&path, torn).unwrap();
                assert!(matches!(open(2), Err(SpoolError::Damaged { .. } | SpoolError::Missing { .. })), "{}", path.display());
            }
            fs::remove_file(&path).unwrap();
            assert!(open(2).is_err(), "{}", path.display());
            fs::write(&path, whole).unwrap();
        }
        assert!(open(2).is_ok());
    }

    #[test]
    fn what_a_kill_left_behind_is_gone_after_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path().to_owned(), 50, 72).unwrap();
        fill(&spool, 0..5);
        drop(spool);
        // The kill came after a state and after a residual, before what describes them.
        let left = [name((50, 8), ".state"), name((50, 12), ".state.tmp"), export_name((50, 100, 5), ".residual")];
        left.iter().for_each(|file| fs::write(folder.path().join(file), b"left").unwrap());
        let spool = Spool::open(folder.path().to_owned(), 60, 72).unwrap();
        assert!(left.iter().all(|file| !folder.path().join(file).exists()));
        assert_eq!(moments(folder.path(), ".state").unwrap().len(), 2);
        assert_eq!(newest(&spool).step, 4);
    }

    #[test]
    fn of_two_answers_to_one_pull_the_one_that_was_merged_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let first = Spool::open(folder.path().to_owned(), 50, 72).unwrap();
        fill(&first, 0..5);
        first.put_export(100, (0, 4), Digest::blake3(b"first"), None).unwrap();
        first.flush().unwrap();
        let second = Spool::open(folder.path().to_owned(), 60, 72).unwrap();
        fill(&second, 0..9);
        second.put_export(100, (4, 8), Digest::blake3(b"second"), None).unwrap();
        let of = |payload: &[u8]| second.open_segment(100, &Digest::blake3(payload), 2).unwrap().start_step;
        assert_eq!((of(b"first"), of(b"second")), (0, 4));
        let unknown = second.open_segment(100, &Digest::blake3(b"of a lost disk"), 2);
        assert!(matches!(unknown, Err(SpoolError::Missing { t: 100, .. })), "another answer's segment would fail the audit");
        // The pull is opened once more, and this session answers it once more.
        second.put_export(100, (8, 9), Digest::blake3(b"third"), None).unwrap();
        assert_eq!((of(b"second"), of(b"third")), (4, 8));
    }

    #[test]
    fn a_restart_goes_on_from_the_newest_state_that_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path().to_owned(), 50, 72).unwrap();
        assert!(spool.newest_state(2).is_none());
        fill(&spool, 0..9);
        assert_eq!(newest(&spool).step, 8);
        fs::write(folder.path().join(name((50, 8), ".state")), b"torn").unwrap();
        assert_eq!(newest(&spool).step, 4);
        assert!(spool.newest_state(3).is_none(), "a state of another model is no state");
    }

    #[test]
    fn a_state_that_was_taken_into_memory_is_on_disk_once_the_spool_is_flushed() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path().to_owned(), 50, 72).unwrap();
        for n in [0, 4, 8] {
            let digest = spool.take_state(n, |to| Ok(state(n).write(to)?)).unwrap();
            assert_eq!(digest, state(n).digest());
            spool.put_segment(n, vec![n]).unwrap();
        }
        let failed = spool.take_state(12, |_| Err(TrainError::State(StateError::NotFinite)));
        assert!(matches!(failed, Err(TrainError::State(StateError::NotFinite))));
        spool.flush().unwrap();
        assert_eq!(newest(&spool), state(8), "the failed one left nothing behind");
        assert_eq!(fs::read(spool.state(4, 2).unwrap()).unwrap(), state(4).to_bytes());
    }

    #[test]
    fn the_segments_of_payloads_that_may_be_audited_stay_and_others_go() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path().to_owned(), 50, 10).unwrap();
        let residual = folder.path().join("5.residual");
        let withheld = [b"withheld".as_slice(), &Digest::blake3(b"withheld").0].concat();
        fs::write(&residual, &withheld).unwrap();
        fill(&spool, 0..8);
        spool.put_export(100, (0, 2), Digest::ZERO, Some(&residual)).unwrap();
        files::write_whole(&residual, &[b"something else"]).unwrap();
        // A learner that is faster than the run takes many steps between two pulls.
        fill(&spool, 8..40);
        let numbers = |ending| moments(folder.path(), ending).unwrap().into_iter().map(|(_, number)| number).collect::<Vec<_>>();
        assert_eq!(numbers(".state"), [0, 32, 36]);
        assert_eq!(numbers(".step"), [vec![0, 1, 2, 3], (32..40).collect()].concat());
        let opened = spool.open_segment(100, &Digest::ZERO, 2).unwrap();
        assert_eq!((opened.start_step, opened.steps.len()), (0, 2));
        assert_eq!(fs::read(opened.residual.unwrap()).unwrap(), withheld);
        spool.put_export(109, (36, 40), Digest::ZERO, None).unwrap();
        fill(&spool, 40..44);
        let exports = || super::exports(folder.path(), ".export").unwrap().into_iter().map(|(_, t, _)| t).collect::<Vec<_>>();
        let residuals = || files::stems(folder.path(), ".residual").unwrap().len() - 1;
        assert_eq!((exports(), residuals()), (vec![100, 109], 1));
        spool.put_export(110, (40, 44), Digest::ZERO, None).unwrap();
        // An audit that waits for its turn asks for an old one.
        spool.keep([100].into());
        spool.release(109, 109).unwrap();
        fill(&spool, 44..48);
        assert_eq!((exports(), residuals()), (vec![100, 109, 110], 1));
        assert_eq!(spool.open_segment(100, &Digest::ZERO, 2).unwrap().start_step, 0);
        spool.release(100, 0).unwrap();
        spool.flush().unwrap();
        assert_eq!((exports(), residuals()), (vec![109, 110], 0));
        assert_eq!(numbers(".state"), [36, 40, 44]);
        assert!(matches!(spool.open_segment(100, &Digest::ZERO, 2), Err(SpoolError::Missing { t: 100, .. })));
        // The audit of their cycle is drawn, and opened.
        spool.release(109, 110).unwrap();
        spool.flush().unwrap();
        assert_eq!((exports(), numbers(".state")), (vec![110], vec![40, 44]));
    }
}
