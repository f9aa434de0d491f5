//! One safetensors file with a checked header: memory-mapped for who looks at values in place, read piece by piece for who copies it.
//! (Reading into memory that is used again costs a third of mapping pages that are looked at once.)

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use memmap2::Mmap;

use super::CheckpointError;
use crate::safetensors_header::{self, TensorInfo};

#[derive(Debug)]
pub(super) struct TensorFile {
    pub path: PathBuf,
    /// In the order of the data.
    pub tensors: Vec<TensorInfo>,
    data_start: usize,
    file: File,
    map: Mmap,
    modified_ns: u128,
}

impl TensorFile {
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(CheckpointError::read(path))?;
        // SAFETY: the map is only read. Truncating the file while it is mapped would end this process with a signal;
        // checkpoint files are never changed in place, they are written under another name and renamed.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::read(path))?;
        let header = safetensors_header::parse(&map).map_err(|source| CheckpointError::Header { path: path.to_owned(), source })?;
        let modified = file.metadata().and_then(|metadata| metadata.modified()).map_err(CheckpointError::read(path))?;
        let modified_ns = modified.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        Ok(Self { path: path.to_owned(), tensors: header.tensors, data_start: header.data_start, file, map, modified_ns })
    }

    /// Length field and JSON header as they stand in the file.
    pub fn header(&self) -> &[u8] {
        &self.map[..self.data_start]
    }

    /// Bytes of the whole file.
    pub fn length(&self) -> u64 {
        self.map.len() as u64
    }

    /// The data of a tensor of this file.
    pub fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        let at = |offset: u64| self.data_start + offset as usize;
        &self.map[at(tensor.begin)..at(tensor.end)]
    }

    /// Byte offset of a tensor's data in the file.
    pub fn offset(&self, tensor: &TensorInfo) -> u64 {
        self.data_start as u64 + tensor.begin
    }

    /// Reads `bytes` of the data of a tensor of this file, from byte `from` of it on.
    pub fn read(&self, tensor: &TensorInfo, from: u64, bytes: &mut [u8]) -> Result<(), CheckpointError> {
        self.file.read_exact_at(bytes, self.offset(tensor) + from).map_err(CheckpointError::read(&self.path))
    }

    /// What tells this file from another of the same name: header, length, time of the last change.
    pub fn identity(&self) -> Vec<u8> {
        let mut bytes = self.header().to_vec();
        bytes.extend(self.length().to_le_bytes());
        bytes.extend(self.modified_ns.to_le_bytes());
        bytes
    }
}
