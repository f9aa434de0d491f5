//! Between checkpoints and fragment states ([`crate::state`]) without holding either in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use protocol::{DType, Digest, FileRecord, FragmentPlan};
use rayon::prelude::*;

use super::assemble::{Assembled, Rows, assemble_rows};
use super::write::{Claim, PIECE_BYTES, RecordedFile};
use super::{CheckpointError, CheckpointTree};
use crate::number::{append_f32, append_rounded};
use crate::plan;
use crate::state::{HEADER_BYTES, StateHeader, TRAILER_BYTES};

/// Writes the state of version `version` of every fragment of `plan`, with the parameters of `tree` and no momentum, as
/// `state-000.qfs`, … under `out`. The bytes are those of [`crate::state::FragmentState::new`].
///
/// `out` must be empty or hold an interrupted attempt, which is gone on with.
pub fn split_states(tree: &CheckpointTree, plan: &FragmentPlan, version: u64, out: &Path) -> Result<Vec<FileRecord>, CheckpointError> {
    plan::check(plan, tree.contract())?;
    let digest = plan.digest();
    let work = Digest::derive("quasar/v1/split-states", &[&tree.identity(), &digest.0, &version.to_le_bytes()]);
    let count = plan.fragments.len();
    let claim = Claim::new(out, Some(work), |name| (0..count).any(|fragment| name == state_file(fragment)))?;
    let write = |fragment: usize| {
        let path = state_file(fragment);
        if let Some(record) = claim.complete(&path) {
            return Ok(record);
        }
        let header = StateHeader { plan: digest, fragment: fragment as u64, version, elements: plan.elements(fragment) };
        let mut file = StateWriter { file: RecordedFile::create(out, &path)?, digest: blake3::Hasher::new() };
        file.append(&header.to_bytes())?;
        let (mut values, mut bytes) = (Vec::new(), Vec::new());
        for slice in &plan.fragments[fragment] {
            tree.stream_slice(slice, |piece| {
                values.clear();
                bytes.clear();
                append_f32(slice.dtype, piece, &mut values);
                append_rounded(DType::F32, &values, &mut bytes);
                file.append(&bytes)
            })?;
        }
        let zeros = vec![0; PIECE_BYTES];
        let mut left = header.elements * DType::F32.bytes();
        while left > 0 {
            let length = left.min(PIECE_BYTES as u64);
            file.append(&zeros[..length as usize])?;
            left -= length;
        }
        let StateWriter { mut file, digest } = file;
        file.append(digest.finalize().as_bytes())?;
        let record = file.finish(&path)?;
        claim.note(&record)?;
        Ok(record)
    };
    let records = (0..count).into_par_iter().map(write).collect::<Result<Vec<_>, CheckpointError>>()?;
    claim.finish()?;
    Ok(records)
}

/// A state file being written; its digest is its last field.
struct StateWriter {
    file: RecordedFile,
    digest: blake3::Hasher,
}

impl StateWriter {
    fn append(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.digest.update(bytes);
        self.file.append(bytes)
    }
}

/// Name of the state of fragment `fragment` in a folder of states.
pub fn state_file(fragment: usize) -> String {
    format!("state-{fragment:03}.qfs")
}

/// A fragment state on disk whose header is the expected one.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    file: File,
    header: StateHeader,
    /// The last field: BLAKE3 of everything before it.
    digest: Digest,
}

impl StateFile {
    /// Opens a state whose header must be `expected`. The content is looked at by [`Self::verify`].
    pub fn open(path: &Path, expected: &StateHeader) -> Result<Self, CheckpointError> {
        let refuse = |source| CheckpointError::State { path: path.to_owned(), source };
        let file = File::open(path).map_err(CheckpointError::read(path))?;
        let length = file.metadata().map_err(CheckpointError::read(path))?.len();
        if length != expected.state_bytes() {
            return Err(refuse(crate::state::StateError::Length { got: length, expected: expected.state_bytes() }));
        }
        let (mut header, mut digest) = ([0; HEADER_BYTES], [0; TRAILER_BYTES]);
        file.read_exact_at(&mut header, 0).map_err(CheckpointError::read(path))?;
        file.read_exact_at(&mut digest, length - TRAILER_BYTES as u64).map_err(CheckpointError::read(path))?;
        if header != expected.to_bytes() {
            return Err(refuse(crate::state::StateError::Header));
        }
        Ok(Self { path: path.to_owned(), file, header: *expected, digest: Digest(digest) })
    }

    /// Whether the content has the digest that stands at its end; reads it from the front to the back.
    pub fn verify(&self) -> Result<(), CheckpointError> {
        let mut hasher = blake3::Hasher::new();
        let end = self.header.state_bytes() - TRAILER_BYTES as u64;
        let (mut at, mut piece) = (0, vec![0; PIECE_BYTES]);
        while at < end {
            let length = (end - at).min(PIECE_BYTES as u64) as usize;
            self.read(&mut piece[..length], at)?;
            hasher.update(&piece[..length]);
            at += length as u64;
        }
        if hasher.finalize().as_bytes() == &self.digest.0 {
            return Ok(());
        }
        Err(CheckpointError::State { path: self.path.clone(), source: crate::state::StateError::Digest })
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), CheckpointError> {
        self.file.read_exact_at(bytes, offset).map_err(CheckpointError::read(&self.path))
    }
}

/// Elements of a fragment state.
#[derive(Clone, Copy)]
struct Place<'a> {
    state: &'a StateFile,
    /// Counted from the fragment's first.
    first: u64,
    elements: u64,
}

/// Assembles `base` with the parameters of the fragment states `states` (one for each fragment of `plan`, in order) under `out`.
///
/// The plan must cover the contract exactly. The digest of every state is checked first; values are rounded to the element types of
/// the base tree. Memory holds a few pieces for each thread. `out` must be empty or hold an interrupted attempt, which is gone on
/// with if nothing that goes into it has changed.
pub fn assemble_states(base: &CheckpointTree, plan: &FragmentPlan, states: &[StateFile], out: &Path) -> Result<Assembled, CheckpointError> {
    plan::check(plan, base.contract())?;
    let digest = plan.digest();
    let mut rows: BTreeMap<&str, Vec<Rows<Place>>> = BTreeMap::new();
    for (fragment, slices) in plan.fragments.iter().enumerate() {
        let fits = |state: &&StateFile| {
            let header = &state.header;
            (header.plan, header.fragment, header.elements) == (digest, fragment as u64, plan.elements(fragment))
        };
        let state = states.get(fragment).filter(fits).ok_or(CheckpointError::StateOrder { fragment })?;
        let mut element = 0;
        for slice in slices {
            let place = Place { state, first: element, elements: slice.elements() };
            rows.entry(&slice.tensor).or_default().push(Rows { start: slice.row_start, end: slice.row_end, place });
            element += slice.elements();
        }
    }
    states.par_iter().try_for_each(StateFile::verify)?;
    let identity: Vec<u8> = states.iter().flat_map(|state| state.digest.0).collect();
    assemble_rows(base, rows, &identity, out, |spec, Place { state, first, elements }, take| {
        let (mut bytes, mut values, mut rounded) = (Vec::new(), Vec::new(), Vec::new());
        let step = (PIECE_BYTES / 4) as u64;
        for element in (first..first + elements).step_by(step as usize) {
            let count = (first + elements - element).min(step);
            bytes.resize(4 * count as usize, 0);
            state.read(&mut bytes, HEADER_BYTES as u64 + element * DType::F32.bytes())?;
            values.clear();
            rounded.clear();
            append_f32(DType::F32, &bytes, &mut values);
            append_rounded(spec.dtype, &values, &mut rounded);
            take(&rounded)?;
        }
        Ok(())
    })
}
