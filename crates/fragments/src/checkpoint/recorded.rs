//! Files that are written from the front to the back and described on the way.
//!
//! A file passes through in pieces of [`PIECE_BYTES`]. The caller's thread fills a piece, checks it and takes its BLAKE3 digests; a
//! second thread takes SHA-256, a third one writes. Each piece is handed on whole and comes back when it is on its way to the disk,
//! so a file takes the time of its slowest stage and the memory of [`PIECES`] pieces. The stages are threads of their own because
//! the writing one waits for the disk, for which a thread of rayon must not be taken. They change when something is done and
//! never what.
//!
//! Where the file system allows it, pieces go to the disk without passing through the kernel's cache (`O_DIRECT`): copying them there
//! costs more processor time than all digests together, and a checkpoint of the size of the memory would push out everything else.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use protocol::{CHUNK_BYTES, Digest, FileRecord};
use sha2::{Digest as _, Sha256};

use super::CheckpointError;
use super::write::PartFile;

/// Bytes that are checked, hashed and written at a time. Few enough that the pieces of all files stay in the processor's cache from
/// stage to stage, enough that the disk is kept busy. A whole number of them makes a chunk of a [`FileRecord`].
pub(super) const PIECE_BYTES: usize = 1 << 20;
const _: () = assert!(CHUNK_BYTES.is_multiple_of(PIECE_BYTES as u64));

/// Pieces of a file that are in memory at a time: one in each stage, and one on its way.
const PIECES: usize = 4;

/// No element is longer.
const ELEMENT_BYTES_MAX: usize = 4;

/// What file systems ask of addresses, lengths and offsets of direct writes, at most.
const ALIGNMENT: usize = 4096;

/// A file that is written from the front to the back and described on the way.
pub(super) struct RecordedFile {
    part: PartFile,
    length: u64,
    piece: Piece,
    blake3: blake3::Hasher,
    /// Of the chunk that is being filled.
    chunk: blake3::Hasher,
    chunks: Vec<Digest>,
    /// From the second piece on.
    line: Option<Line>,
}

impl RecordedFile {
    /// Starts `dir/name`; a left-over of an interrupted attempt is replaced.
    pub fn create(dir: &Path, name: &str) -> Result<Self, CheckpointError> {
        let part = PartFile::create(dir, name)?;
        let (blake3, chunk) = (blake3::Hasher::new(), blake3::Hasher::new());
        Ok(Self { part, length: 0, piece: Piece::new(), blake3, chunk, chunks: Vec::new(), line: None })
    }

    pub fn append(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.append_with(bytes.len() as u64, |piece, at| {
            piece.copy_from_slice(&bytes[at as usize..][..piece.len()]);
            Ok(())
        })
    }

    /// Appends `length` bytes, which hold whole elements of at most four bytes: `fill` is given part after part of them, again of whole
    /// elements, and where in the `length` bytes it begins.
    pub fn append_with(
        &mut self,
        length: u64,
        mut fill: impl FnMut(&mut [u8], u64) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let mut at = 0;
        while at < length {
            let bytes = self.piece.room();
            let count = (bytes.len() as u64).min(length - at) as usize;
            fill(&mut bytes[..count], at)?;
            at += count as u64;
            self.length += count as u64;
            self.piece.filled += count;
            if self.piece.filled >= PIECE_BYTES {
                self.pass_on()?;
            }
        }
        Ok(())
    }

    /// Gives a full piece to the next stage, and takes a free one.
    fn pass_on(&mut self) -> Result<(), CheckpointError> {
        self.describe_piece();
        let line = match &mut self.line {
            Some(line) => line,
            None => self.line.insert(Line::start(&self.part).map_err(CheckpointError::write(self.part.unfinished()))?),
        };
        match line.exchange(&mut self.piece) {
            Ok(()) => Ok(()),
            Err(Stopped) => {
                // A stage stops only where writing failed; its end says why.
                let ended = line.end().err().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into());
                Err(CheckpointError::write(self.part.unfinished())(ended))
            }
        }
    }

    fn describe_piece(&mut self) {
        let bytes = self.piece.content();
        self.blake3.update(bytes);
        self.chunk.update(bytes);
        if self.chunk.count() == CHUNK_BYTES {
            self.end_chunk();
        }
    }

    fn end_chunk(&mut self) {
        self.chunks.push(Digest(*self.chunk.finalize().as_bytes()));
        self.chunk.reset();
    }

    /// Syncs the content, gives the file its name, and describes it as `path`.
    pub fn finish(mut self, path: &str) -> Result<FileRecord, CheckpointError> {
        if self.piece.filled > 0 {
            self.describe_piece();
        }
        if self.chunk.count() > 0 {
            self.end_chunk();
        }
        let sha256 = match self.line.take() {
            Some(line) => line.finish(self.piece),
            None => Disk::buffered(&self.part).and_then(|mut disk| {
                let bytes = self.piece.content();
                disk.write(bytes, 0).map(|()| Sha256::new_with_prefix(bytes))
            }),
        };
        let sha256 = sha256.map_err(CheckpointError::write(self.part.unfinished()))?;
        self.part.finish()?;
        Ok(FileRecord {
            path: path.to_owned(),
            length: self.length,
            sha256: Digest(sha256.finalize().into()),
            blake3: Digest(*self.blake3.finalize().as_bytes()),
            chunk_bytes: CHUNK_BYTES,
            chunks: self.chunks,
        })
    }
}

/// Memory at an address that may go to the disk directly. The last element may reach over the end.
struct Piece {
    memory: Vec<u8>,
    start: usize,
    filled: usize,
}

impl Piece {
    fn new() -> Self {
        let memory = vec![0; ALIGNMENT + PIECE_BYTES + ELEMENT_BYTES_MAX];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        // Where it cannot be told (which is allowed), direct writes are refused and others made.
        let start = if start < ALIGNMENT { start } else { 0 };
        Self { memory, start, filled: 0 }
    }

    /// What is not filled yet, in whole elements: the last one may reach over the end.
    fn room(&mut self) -> &mut [u8] {
        let left = (PIECE_BYTES - self.filled).next_multiple_of(ELEMENT_BYTES_MAX);
        let from = self.start + self.filled;
        &mut self.memory[from..from + left]
    }

    /// What is filled, without what reached over the end.
    fn content(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.filled.min(PIECE_BYTES)]
    }

    /// What reached over the end.
    fn excess(&self) -> &[u8] {
        let end = self.start + PIECE_BYTES;
        &self.memory[end..end + self.filled.saturating_sub(PIECE_BYTES)]
    }

    /// Begins anew with `bytes`.
    fn restart(&mut self, bytes: &[u8]) {
        self.memory[self.start..self.start + bytes.len()].copy_from_slice(bytes);
        self.filled = bytes.len();
    }
}

/// A stage has stopped.
struct Stopped;

/// The stages behind the caller's thread.
struct Line {
    /// `None` when the last piece has been given.
    filled: Option<SyncSender<Piece>>,
    free: Receiver<Piece>,
    /// Pieces made so far, with the caller's.
    pieces: usize,
    stages: Option<(JoinHandle<Sha256>, JoinHandle<io::Result<()>>)>,
}

impl Line {
    fn start(part: &PartFile) -> io::Result<Self> {
        let (filled, to_hash) = sync_channel::<Piece>(PIECES);
        let (hashed, to_write) = sync_channel::<Piece>(PIECES);
        let (written, free) = sync_channel::<Piece>(PIECES);
        let mut disk = Disk::open(part)?;
        let hash = move || {
            let mut sha256 = Sha256::new();
            for piece in to_hash {
                sha256.update(piece.content());
                if hashed.send(piece).is_err() {
                    break;
                }
            }
            sha256
        };
        let write = move || {
            let mut offset = 0;
            for piece in to_write {
                disk.write(piece.content(), offset)?;
                offset += piece.content().len() as u64;
                // Nobody waits for it when the last piece has been given.
                let _ = written.send(piece);
            }
            Ok(())
        };
        let stages = (Builder::new().name("sha256".into()).spawn(hash)?, Builder::new().name("write".into()).spawn(write)?);
        Ok(Self { filled: Some(filled), free, pieces: 1, stages: Some(stages) })
    }

    /// Passes a full piece on and puts a free one in its place, with what reached over the end.
    fn exchange(&mut self, piece: &mut Piece) -> Result<(), Stopped> {
        let mut next = match self.free.try_recv() {
            Ok(free) => free,
            Err(_) if self.pieces < PIECES => {
                self.pieces += 1;
                Piece::new()
            }
            Err(_) => self.free.recv().map_err(|_| Stopped)?,
        };
        next.restart(piece.excess());
        let full = std::mem::replace(piece, next);
        self.filled.as_ref().ok_or(Stopped)?.send(full).map_err(|_| Stopped)
    }

    /// Passes the last piece on and waits until everything is written.
    fn finish(mut self, last: Piece) -> io::Result<Sha256> {
        // Where a stage has stopped, its end says why.
        let _ = self.filled.as_ref().map(|filled| filled.send(last));
        self.end()
    }

    fn end(&mut self) -> io::Result<Sha256> {
        self.filled = None;
        let (hashing, writing) = self.stages.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let (hashed, written) = (hashing.join(), writing.join());
        written.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(hashed.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }
}

impl Drop for Line {
    /// Nothing goes on writing a file that was given up.
    fn drop(&mut self) {
        self.filled = None;
        if let Some((hashing, writing)) = self.stages.take() {
            let _ = (hashing.join(), writing.join());
        }
    }
}

/// One file with two handles.
struct Disk {
    buffered: File,
    /// Past the kernel's cache; `None` where the file system has no such thing.
    direct: Option<File>,
}

impl Disk {
    fn open(part: &PartFile) -> io::Result<Self> {
        Ok(Self { direct: open_direct(part.unfinished()), ..Self::buffered(part)? })
    }

    fn buffered(part: &PartFile) -> io::Result<Self> {
        Ok(Self { buffered: part.content()?, direct: None })
    }

    /// Writes at an offset that is a multiple of [`PIECE_BYTES`].
    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let aligned = bytes.len() / ALIGNMENT * ALIGNMENT;
        let (whole, rest) = bytes.split_at(aligned);
        match self.direct.as_ref().map(|direct| direct.write_all_at(whole, offset)) {
            Some(Ok(())) => return self.buffered.write_all_at(rest, offset + aligned as u64),
            // Of another mind about alignment than when it was opened.
            Some(Err(error)) if error.kind() == io::ErrorKind::InvalidInput => self.direct = None,
            Some(Err(error)) => return Err(error),
            None => {}
        }
        self.buffered.write_all_at(bytes, offset)
    }
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().write(true).custom_flags(libc::O_DIRECT).open(path).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path) -> Option<File> {
    None
}
