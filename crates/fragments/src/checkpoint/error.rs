//! Why a checkpoint is not read or written.

use std::io;
use std::path::{Path, PathBuf};

use crate::contract::{CONTRACT_FILE, ContractError};
use crate::plan::PlanError;
use crate::safetensors_header::HeaderError;
use crate::state::StateError;

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{}: {source}\nhint: check that the path exists and is readable", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {source}\nhint: check permissions of the folder", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{}: the disk is full\nhint: free space and run the command again; nothing that existed was changed", path.display())]
    DiskFull { path: PathBuf },
    #[error("{}: {source}", path.display())]
    Header { path: PathBuf, source: HeaderError },
    #[error("{} holds no weights\nhint: expected model.safetensors, or model.safetensors.index.json with its shards", dir.display())]
    NoWeights { dir: PathBuf },
    #[error("{}: {message}\nhint: index and shards belong together; fetch the checkpoint again", path.display())]
    Index { path: PathBuf, message: String },
    #[error("tensor `{tensor}` is missing from the checkpoint\nhint: the checkpoint is incomplete or of another model")]
    MissingTensor { tensor: String },
    #[error("tensor `{tensor}` stands in two files\nhint: remove left-over weight files")]
    DuplicateTensor { tensor: String },
    #[error(
        "tensor `{tensor}`: the contract says {expected}, the checkpoint has {found}\nhint: checkpoint and {CONTRACT_FILE} belong to different models"
    )]
    Mismatch { tensor: String, expected: String, found: String },
    #[error("tensor `{tensor}` is a parameter but is not in {CONTRACT_FILE}\nhint: checkpoint and contract belong to different models")]
    NotInContract { tensor: String },
    #[error("{}: {source}", path.display())]
    Contract { path: PathBuf, source: ContractError },
    #[error(transparent)]
    Parameters(#[from] ContractError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("rows {row_start} to {row_end} of `{tensor}` are not in the checkpoint\nhint: plan and checkpoint belong to different models")]
    Rows { tensor: String, row_start: u64, row_end: u64 },
    #[error(
        "tensor `{tensor}`: element {element} is not a finite number\nhint: the checkpoint is damaged or its training diverged; use an earlier one"
    )]
    NotFinite { tensor: String, element: u64 },
    #[error("{}: `{name}` is not a slice of a parameter of the base checkpoint\nhint: fragments and base belong to different models", path.display())]
    FragmentTensor { path: PathBuf, name: String },
    #[error("fragment {fragment} has {got} values, the plan says {expected}")]
    Values { fragment: usize, got: u64, expected: u64 },
    #[error("{}: {source}", path.display())]
    State { path: PathBuf, source: StateError },
    #[error("the state of fragment {fragment} is missing or of another plan\nhint: give one state for each fragment, in order")]
    StateOrder { fragment: usize },
    #[error("fragment {fragment}: {source}")]
    Source { fragment: usize, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("{} was not written to its end\nhint: run the command that writes it again", dir.display())]
    Unfinished { dir: PathBuf },
    #[error("{} already holds `{entry}`\nhint: choose an empty folder", dir.display())]
    Occupied { dir: PathBuf, entry: String },
}

impl CheckpointError {
    pub(super) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Read { path, source }
    }

    pub(super) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Write { path, source },
        }
    }
}
