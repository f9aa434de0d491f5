//! Where the bytes of a payload are: in memory, or in a file that is read piece by piece.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A payload that can be read at any place, by several threads.
pub trait Source: Sync {
    /// Bytes in all.
    fn length(&self) -> u64;

    /// `length` bytes from `offset` on, put into `scratch` unless they are in memory already.
    fn read<'a>(&'a self, offset: u64, length: usize, scratch: &'a mut Vec<u8>) -> io::Result<&'a [u8]>;
}

impl Source for [u8] {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read<'a>(&'a self, offset: u64, length: usize, _: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
        let range = usize::try_from(offset).ok().and_then(|start| Some(start..start.checked_add(length)?));
        range.and_then(|range| self.get(range)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl Source for Vec<u8> {
    fn length(&self) -> u64 {
        self.as_slice().length()
    }

    fn read<'a>(&'a self, offset: u64, length: usize, scratch: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
        self.as_slice().read(offset, length, scratch)
    }
}

impl<T: Source + ?Sized> Source for &T {
    fn length(&self) -> u64 {
        (**self).length()
    }

    fn read<'a>(&'a self, offset: u64, length: usize, scratch: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
        (**self).read(offset, length, scratch)
    }
}

/// A payload on disk. Only what is asked for is read.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    length: u64,
}

impl FileSource {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }
}

impl Source for FileSource {
    fn length(&self) -> u64 {
        self.length
    }

    fn read<'a>(&'a self, offset: u64, length: usize, scratch: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
        // Callers ask for tiles and spans of a payload whose length they have checked.
        scratch.resize(length, 0);
        self.file.read_exact_at(scratch, offset)?;
        Ok(scratch)
    }
}
