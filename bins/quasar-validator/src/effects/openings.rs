//! Parts of openings on disk while their audit lasts, sealed as they came: a state as large as a model comes in many volumes, and one that
//! was fetched is not fetched again.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use daemon::files;
use protocol::Digest;
use protocol::documents::{OpenedPart, opening_volumes};
use protocol::paths::SlotKeys;
use sha2::{Digest as _, Sha256};
use storage::seal_stream::{self, StreamError};

use super::grants::Grants;
use super::trouble::Trouble;

/// The openings of the audits at hand.
pub struct OpenedParts {
    folder: PathBuf,
    /// A part comes in objects of so many bytes.
    pub(super) volume_bytes: u64,
}

/// A part as it was fetched.
#[derive(Clone, Debug)]
pub struct FetchedPart {
    volumes: Vec<PathBuf>,
    sha256: Digest,
}

impl OpenedParts {
    /// An empty folder: an audit that an earlier process had begun begins anew.
    pub fn new(folder: PathBuf, volume_bytes: u64) -> Self {
        let _ = fs::remove_dir_all(&folder);
        Self { folder, volume_bytes }
    }

    fn folder_of(&self, audit: &Digest) -> PathBuf {
        self.folder.join(audit.to_string())
    }

    /// Fetches what is not here of part `number`, as its order states it.
    pub async fn fetch(
        &self,
        grants: &Grants,
        keys: &SlotKeys,
        (audit, number): (&Digest, u8),
        part: &OpenedPart,
    ) -> Result<FetchedPart, Trouble> {
        let folder = self.folder_of(audit);
        let mut volumes = Vec::new();
        for (volume, bytes) in opening_volumes(part.length, self.volume_bytes) {
            let (path, length) = (folder.join(format!("{number}.{volume}")), bytes.end - bytes.start);
            if fs::metadata(&path).is_ok_and(|file| file.len() == length) {
                volumes.push(path);
                continue;
            }
            let key = keys.opening_volume(audit, number, volume);
            let bytes = grants.get(Some(audit), &key, length).await?;
            if bytes.len() as u64 != length {
                return Err(Trouble::Digest { key });
            }
            let target = path.clone();
            let written = tokio::task::spawn_blocking(move || files::write_whole(&target, &[&bytes])).await;
            written.map_err(|_| Trouble::BenchGone)?.map_err(Trouble::io(path.clone()))?;
            volumes.push(path);
        }
        Ok(FetchedPart { volumes, sha256: part.sha256 })
    }

    /// Nothing of this opening is needed any more.
    pub fn remove(&self, audit: &Digest) {
        let _ = fs::remove_dir_all(self.folder_of(audit));
    }
}

impl FetchedPart {
    /// Whether these are the bytes that the order states.
    pub fn is_intact(&self) -> io::Result<bool> {
        let (mut reader, mut hasher, mut buffer) = (Volumes::of(&self.volumes), Sha256::new(), vec![0; 1 << 20]);
        loop {
            match reader.read(&mut buffer)? {
                0 => return Ok(Digest(hasher.finalize().into()) == self.sha256),
                read => hasher.update(&buffer[..read]),
            }
        }
    }

    /// What was sealed, at most `limit` bytes.
    ///
    /// # Errors
    /// It does not unseal with this key, for this place.
    pub fn unsealed(&self, secret: &[u8; 32], info: &[u8], limit: u64) -> Result<Bytes, StreamError> {
        let mut plain = Vec::new();
        seal_stream::open(secret, info, &mut Volumes::of(&self.volumes), &mut plain, limit)?;
        Ok(plain.into())
    }
}

/// The volumes of a part, one behind the other.
struct Volumes<'a> {
    rest: std::slice::Iter<'a, PathBuf>,
    current: Option<File>,
}

impl<'a> Volumes<'a> {
    fn of(volumes: &'a [PathBuf]) -> Self {
        Self { rest: volumes.iter(), current: None }
    }

    fn next(&mut self) -> io::Result<Option<&mut File>> {
        self.current = self.rest.next().map(|path: &PathBuf| File::open::<&Path>(path)).transpose()?;
        Ok(self.current.as_mut())
    }
}

impl Read for Volumes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(file) = &mut self.current {
                let read = file.read(buffer)?;
                if read > 0 || buffer.is_empty() {
                    return Ok(read);
                }
            }
            if self.next()?.is_none() {
                return Ok(0);
            }
        }
    }
}
