//! One memory-mapped safetensors file with a checked header.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::CheckpointError;
use crate::safetensors_header::{self, TensorInfo};

#[derive(Debug)]
pub(super) struct TensorFile {
    pub path: PathBuf,
    /// In the order of the data.
    pub tensors: Vec<TensorInfo>,
    data_start: usize,
    map: Mmap,
}

impl TensorFile {
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(CheckpointError::read(path))?;
        // SAFETY: the map is only read. Truncating the file while it is mapped would end this process with a signal;
        // checkpoint files are never changed in place, they are written under another name and renamed.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::read(path))?;
        let header = safetensors_header::parse(&map).map_err(|source| CheckpointError::Header { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), tensors: header.tensors, data_start: header.data_start, map })
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
}
