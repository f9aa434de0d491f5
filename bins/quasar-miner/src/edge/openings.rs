//! The parts of openings as files: sealed and written once from the spool, uploaded as often as it takes, removed when the notice is gone.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::PathBuf;

use protocol::Digest;
use protocol::documents::{OPENING_PARTS, OpeningManifest};
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
}

impl OpeningFiles {
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    fn folder_of(&self, audit: &Digest) -> PathBuf {
        self.folder.join(audit.to_string())
    }

    fn path(&self, audit: &Digest, part: u8) -> PathBuf {
        self.folder_of(audit).join(part.to_string())
    }

    /// Writes the parts of an opening, sealed to `key`, unless an earlier session did; `info` binds each part to its place, `sign`
    /// gives the bytes of part 0.
    pub fn prepare(
        &self,
        (audit, t, payload): (&Digest, u64, Option<&Digest>),
        key: &[u8; 32],
        info: impl Fn(u8) -> Vec<u8>,
        spool: &Spool,
        sign: impl FnOnce(&OpeningManifest) -> Vec<u8>,
    ) -> Result<Vec<PreparedPart>, SpoolError> {
        let fail = |source| SpoolError::Io { path: self.folder.clone(), source };
        // The manifest is written last: where it is, the others are.
        if !self.path(audit, MANIFEST).exists() {
            let segment = spool.open_segment(t, payload)?;
            let seal = |part: u8, source: &mut dyn Read| self.seal(audit, part, key, &info(part), source);
            self.write((audit, t), segment, seal, sign).map_err(fail)?;
        }
        (0..OPENING_PARTS).map(|part| self.describe(audit, part)).collect::<io::Result<_>>().map_err(fail)
    }

    fn seal(&self, audit: &Digest, part: u8, key: &[u8; 32], info: &[u8], source: &mut dyn Read) -> io::Result<()> {
        let path = self.path(audit, part);
        let partial = path.with_extension("partial");
        let mut sink = io::BufWriter::new(File::create(&partial)?);
        seal_stream::seal(key, info, &mut { source }, &mut sink).map_err(|error| match error {
            StreamError::Io(error) => error,
            error => io::Error::other(error),
        })?;
        sink.into_inner()?.sync_all()?;
        fs::rename(partial, path)
    }

    fn write(
        &self,
        (audit, t): (&Digest, u64),
        segment: OpenedSegment,
        seal: impl Fn(u8, &mut dyn Read) -> io::Result<()>,
        sign: impl FnOnce(&OpeningManifest) -> Vec<u8>,
    ) -> io::Result<()> {
        fs::create_dir_all(self.folder_of(audit))?;
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

    pub fn read(&self, audit: &Digest, part: u8) -> io::Result<Vec<u8>> {
        fs::read(self.path(audit, part))
    }

    pub fn remove(&self, audit: &Digest) {
        let _ = fs::remove_dir_all(self.folder_of(audit));
    }
}
