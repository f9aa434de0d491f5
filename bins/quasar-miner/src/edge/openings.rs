//! The parts of openings as files: sealed and written once from the spool, uploaded as often as it takes, removed when the notice is gone.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use daemon::files;
use protocol::Digest;
use protocol::documents::{OPENING_PARTS, OpeningManifest, opening_volumes};
use sha2::Digest as _;

use storage::seal_stream::{self, StreamError};

use super::spool::{OpenedSegment, Spool, SpoolError};
use crate::machine::PreparedPart;

// Parts of an opening.
const MANIFEST: u8 = 0;
const STATE: u8 = 1;
const ROUTES: u8 = 2;

/// Prepared openings of one learner.
pub struct OpeningFiles {
    folder: PathBuf,
    /// A part is uploaded in objects of so many bytes.
    volume_bytes: u64,
    /// Preparations that have not ended, and whether their notice is gone.
    under_way: Mutex<Vec<(Digest, Weak<AtomicBool>)>>,
    /// One preparation writes at a time.
    turn: Mutex<()>,
    /// Of what is asked for, as far as it was told.
    revision: AtomicU64,
}

/// A preparation from its order on. It takes long, and its notice may go meanwhile.
pub struct Preparation {
    audit: Digest,
    is_dropped: Arc<AtomicBool>,
}

impl Preparation {
    fn check(&self) -> io::Result<()> {
        match self.is_dropped.load(Ordering::SeqCst) {
            true => Err(io::Error::other("nobody asks for this opening any more")),
            false => Ok(()),
        }
    }
}

/// What is sealed, for as long as somebody asks for it.
struct Asked<'a> {
    source: &'a mut dyn Read,
    preparation: &'a Preparation,
}

impl Read for Asked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.preparation.check()?;
        self.source.read(buffer)
    }
}

impl OpeningFiles {
    /// Openings that an earlier process prepared stay until [`Self::retain`] says what is asked for.
    pub fn open(folder: PathBuf, volume_bytes: u64) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self { folder, volume_bytes, under_way: Mutex::default(), turn: Mutex::default(), revision: AtomicU64::new(0) })
    }

    fn under_way(&self) -> MutexGuard<'_, Vec<(Digest, Weak<AtomicBool>)>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called when the opening is ordered: from here on [`Self::retain`] ends its preparation, too.
    pub fn begin(&self, audit: Digest) -> Preparation {
        let is_dropped = Arc::new(AtomicBool::new(false));
        let mut under_way = self.under_way();
        under_way.retain(|(_, is_dropped)| is_dropped.strong_count() > 0);
        under_way.push((audit, Arc::downgrade(&is_dropped)));
        Preparation { audit, is_dropped }
    }

    /// Removes what was written if the notice went meanwhile.
    fn end(&self, preparation: &Preparation) -> io::Result<()> {
        // A notice that goes after this look finds all files there.
        let _under_way = self.under_way();
        let asked = preparation.check();
        if asked.is_err() {
            let _ = fs::remove_dir_all(self.folder_of(&preparation.audit));
        }
        asked
    }

    fn folder_of(&self, audit: &Digest) -> PathBuf {
        self.folder.join(audit.to_string())
    }

    fn path(&self, audit: &Digest, part: u8) -> PathBuf {
        self.folder_of(audit).join(part.to_string())
    }

    /// Writes the parts of an opening, sealed to `key`, unless an earlier session did; `info` binds each part to its place, `sign`
    /// gives the bytes of part 0. The model has `elements` parameters.
    ///
    /// # Errors
    /// Something cannot be read or written, or the notice is gone; nothing is left of it then, unless it was whole.
    pub fn prepare(
        &self,
        (preparation, t, payload): (&Preparation, u64, &Digest),
        key: &[u8; 32],
        info: impl Fn(u8) -> Vec<u8>,
        (spool, elements): (&Spool, usize),
        sign: impl FnOnce(&OpeningManifest) -> Vec<u8>,
    ) -> Result<Vec<PreparedPart>, SpoolError> {
        let fail = |source| SpoolError::Io { path: self.folder.clone(), source };
        let audit = &preparation.audit;
        // A notice that comes back waits until what was begun for it is removed.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let prepare = || -> Result<Vec<PreparedPart>, SpoolError> {
            // The manifest is written last: where it is, the others are.
            if !self.path(audit, MANIFEST).exists() {
                preparation.check().map_err(fail)?;
                let segment = spool.open_segment(t, payload, elements)?;
                // To find the state whole has taken a while.
                preparation.check().map_err(fail)?;
                let seal = |part: u8, source: &mut dyn Read| self.seal(preparation, part, key, &info(part), source);
                self.write((audit, t), segment, seal, sign).map_err(fail)?;
            }
            (0..OPENING_PARTS).map(|part| self.describe(audit, part)).collect::<io::Result<_>>().map_err(fail)
        };
        let parts = prepare();
        self.end(preparation).map_err(fail)?;
        if parts.is_err() && !self.path(audit, MANIFEST).exists() {
            // A full disk must not stay full for what has to be begun anew: training needs room too.
            let _ = fs::remove_dir_all(self.folder_of(audit));
        }
        parts
    }

    fn seal(&self, preparation: &Preparation, part: u8, key: &[u8; 32], info: &[u8], source: &mut dyn Read) -> io::Result<()> {
        let audit = &preparation.audit;
        let path = self.path(audit, part);
        let partial = path.with_extension("partial");
        let mut sink = io::BufWriter::new(File::create(&partial)?);
        seal_stream::seal(key, info, &mut Asked { source, preparation }, &mut sink).map_err(|error| match error {
            StreamError::Io(error) => error,
            error => io::Error::other(error),
        })?;
        sink.into_inner()?.sync_all()?;
        fs::rename(partial, path)?;
        // What is announced is not sealed a second time: that would give other bytes.
        files::sync_folder(&self.folder_of(audit))
    }

    fn write(
        &self,
        (audit, t): (&Digest, u64),
        segment: OpenedSegment,
        seal: impl Fn(u8, &mut dyn Read) -> io::Result<()>,
        sign: impl FnOnce(&OpeningManifest) -> Vec<u8>,
    ) -> io::Result<()> {
        fs::create_dir_all(self.folder_of(audit))?;
        files::sync_folder(&self.folder)?;
        let state = File::open(&segment.state)?;
        match &segment.residual {
            Some(residual) => seal(STATE, &mut state.chain(File::open(residual)?))?,
            None => seal(STATE, &mut { state })?,
        }
        let (mut steps, mut routes) = (Vec::with_capacity(segment.steps.len()), Vec::new());
        for (step, chosen) in segment.steps {
            steps.push(step);
            routes.extend_from_slice(&(chosen.len() as u32).to_le_bytes());
            routes.extend(chosen.iter().flat_map(|route| route.to_le_bytes()));
        }
        seal(ROUTES, &mut &routes[..])?;
        let manifest = OpeningManifest { audit: *audit, t, start_step: segment.start_step, versions: segment.versions, steps };
        seal(MANIFEST, &mut &sign(&manifest)[..])
    }

    fn describe(&self, audit: &Digest, part: u8) -> io::Result<PreparedPart> {
        let (mut file, mut hasher, mut buffer, mut length) =
            (File::open(self.path(audit, part))?, sha2::Sha256::new(), vec![0; 1 << 20], 0);
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                read => {
                    hasher.update(&buffer[..read]);
                    length += read as u64;
                }
            }
        }
        Ok(PreparedPart { part, length, sha256: Digest(hasher.finalize().into()) })
    }

    /// The volumes of a part that are not known to have arrived, with the bytes of it that each holds.
    pub fn unsent(&self, audit: &Digest, part: u8) -> io::Result<Vec<(u16, Range<u64>)>> {
        let length = fs::metadata(self.path(audit, part))?.len();
        let is_unsent = |(volume, _): &(u16, Range<u64>)| !self.mark(audit, part, *volume).exists();
        Ok(opening_volumes(length, self.volume_bytes).filter(is_unsent).collect())
    }

    /// A volume has arrived.
    pub fn sent(&self, audit: &Digest, part: u8, volume: u16) -> io::Result<()> {
        fs::write(self.mark(audit, part, volume), [])
    }

    fn mark(&self, audit: &Digest, part: u8, volume: u16) -> PathBuf {
        self.folder_of(audit).join(format!("{part}.{volume}.sent"))
    }

    pub fn read(&self, audit: &Digest, part: u8, bytes: Range<u64>) -> io::Result<Vec<u8>> {
        let mut file = File::open(self.path(audit, part))?;
        file.seek(SeekFrom::Start(bytes.start))?;
        let mut read = Vec::new();
        file.take(bytes.end - bytes.start).read_to_end(&mut read)?;
        Ok(read)
    }

    /// Whether nothing newer was told of what is asked for.
    pub fn is_newest(&self, revision: u64) -> bool {
        self.revision.fetch_max(revision, Ordering::SeqCst) <= revision
    }

    /// The notices of all others are gone, or were before this process began. What is being prepared for them ends soon.
    pub fn retain(&self, is_asked: impl Fn(&Digest) -> bool) {
        let under_way = self.under_way();
        for is_dropped in under_way.iter().filter(|(of, _)| !is_asked(of)).filter_map(|(_, is_dropped)| is_dropped.upgrade()) {
            is_dropped.store(true, Ordering::SeqCst);
        }
        let folders = fs::read_dir(&self.folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        for folder in folders {
            let audit = folder.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<Digest>().ok());
            if audit.is_none_or(|audit| !is_asked(&audit)) {
                let _ = fs::remove_dir_all(folder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use model::{Routes, TrainerState};
    use protocol::documents::OpenedStep;

    use super::*;

    #[test]
    fn a_notice_that_goes_while_its_opening_is_prepared_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path().join("spool"), 50, 72).unwrap();
        let state = TrainerState { step: 0, weights: vec![1.0, 2.0], first: vec![0.0; 2], second: vec![0.0; 2], exported: vec![] };
        spool.save_state(0, |to| Ok(state.write(to)?)).unwrap();
        spool.put_segment(0, vec![9]).unwrap();
        let step = OpenedStep { local_step: 0, lease: 1, lease_step: 0, exchanged: vec![], loss: 7 };
        spool.put_step(step, Routes(vec![0, 5])).unwrap();
        spool.put_export(100, (0, 1), Digest::ZERO, None).unwrap();
        let openings = OpeningFiles::open(folder.path().join("openings"), 4).unwrap();
        let audit = Digest::blake3(b"audit");
        // The notice goes as soon as this part is sealed.
        let prepare = |preparation: &Preparation, last: Option<u8>| {
            let info = |part: u8| {
                if last == Some(part) {
                    openings.retain(|_| false);
                }
                vec![part]
            };
            let sign = |_: &OpeningManifest| b"manifest".to_vec();
            openings.prepare((preparation, 100, &Digest::ZERO), &[9; 32], info, (&spool, 2), sign).map(|parts| parts.len())
        };
        let dropped = openings.begin(audit);
        openings.retain(|_| false);
        assert!(prepare(&dropped, None).is_err() && !openings.folder_of(&audit).exists());
        for last in [STATE, ROUTES, MANIFEST] {
            assert!(prepare(&openings.begin(audit), Some(last)).is_err());
            assert!(!openings.folder_of(&audit).exists());
        }
        assert_eq!(prepare(&openings.begin(audit), None).unwrap(), usize::from(OPENING_PARTS), "the notice has come back");
    }

    #[test]
    fn what_an_earlier_process_prepared_stays_until_somebody_knows_what_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let (asked, gone) = (Digest::blake3(b"asked"), Digest::blake3(b"gone"));
        let open = || OpeningFiles::open(folder.path().to_owned(), 4).unwrap();
        let openings = open();
        for audit in [&asked, &gone] {
            fs::create_dir(openings.folder_of(audit)).unwrap();
            fs::write(openings.path(audit, STATE), b"sealed").unwrap();
        }
        let openings = open();
        assert_eq!(openings.read(&gone, STATE, 0..6).unwrap(), b"sealed");
        openings.retain(|audit| *audit == asked);
        assert_eq!(openings.read(&asked, STATE, 0..6).unwrap(), b"sealed");
        assert!(!openings.folder_of(&gone).exists());
    }

    #[test]
    fn a_part_is_sent_volume_by_volume_and_what_arrived_is_not_sent_again_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let audit = Digest::blake3(b"audit");
        let open = || OpeningFiles::open(folder.path().to_owned(), 4).unwrap();
        let openings = open();
        fs::create_dir(openings.folder_of(&audit)).unwrap();
        fs::write(openings.path(&audit, STATE), b"0123456789").unwrap();
        assert_eq!(openings.unsent(&audit, STATE).unwrap(), [(0, 0..4), (1, 4..8), (2, 8..10)]);
        assert_eq!(openings.read(&audit, STATE, 4..8).unwrap(), b"4567");
        openings.sent(&audit, STATE, 1).unwrap();
        assert_eq!(open().unsent(&audit, STATE).unwrap(), [(0, 0..4), (2, 8..10)]);
        open().retain(|_| false);
        assert!(open().unsent(&audit, STATE).is_err());
    }
}
