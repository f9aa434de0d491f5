//! Between checkpoints and fragment states ([`crate::state`]) without holding either in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use protocol::{DType, Digest, FileRecord, FragmentPlan};
use rayon::prelude::*;

use super::assemble::{Assembled, CONVERTED_AT_ONCE, Rows, assemble_rows};
use super::recorded::{PIECE_BYTES, RecordedFile};
use super::write::Claim;
use super::{CheckpointError, CheckpointTree};
use crate::number::convert;
use crate::plan;
use crate::state::{HEADER_BYTES, StateHeader, TRAILER_BYTES};

/// Writes the state of version `version` of every fragment of `plan`, with the parameters of `tree` and without momentum, as
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
        let header = StateHeader { plan: digest, fragment: fragment as u64, version, elements: plan.elements(fragment), momentum: false };
        let mut file = RecordedFile::create(out, &path)?;
        // Of everything before it: the last field.
        let mut digest = blake3::Hasher::new();
        digest.update(&header.to_bytes());
        file.append(&header.to_bytes())?;
        let mut elements = Vec::new();
        for slice in &plan.fragments[fragment] {
            file.append_with(slice.elements() * DType::F32.bytes(), |bytes, at| {
                let width = slice.dtype.bytes();
                elements.resize(bytes.len() / 4 * width as usize, 0);
                tree.read_elements(slice, at / DType::F32.bytes(), &mut elements)?;
                convert(slice.dtype, &elements, DType::F32, bytes);
                digest.update(bytes);
                Ok(())
            })?;
        }
        file.append(digest.finalize().as_bytes())?;
        let record = file.finish(&path)?;
        claim.note(&record)?;
        Ok(record)
    };
    let records = (0..count).into_par_iter().map(write).collect::<Result<Vec<_>, CheckpointError>>()?;
    claim.finish()?;
    Ok(records)
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
            let place = Place { state, first: element };
            rows.entry(&slice.tensor).or_default().push(Rows { start: slice.row_start, end: slice.row_end, place });
            element += slice.elements();
        }
    }
    states.par_iter().try_for_each(StateFile::verify)?;
    let identity: Vec<u8> = states.iter().flat_map(|state| state.digest.0).collect();
    assemble_rows(base, rows, &identity, out, |spec, Place { state, first }, from, bytes| {
        // In parts that stay in the cache between reading and rounding.
        let mut values = [0; 4 * CONVERTED_AT_ONCE];
        let width = spec.dtype.bytes() as usize;
        for (number, bytes) in bytes.chunks_mut(width * CONVERTED_AT_ONCE).enumerate() {
            let element = first + from + (number * CONVERTED_AT_ONCE) as u64;
            let values = &mut values[..4 * (bytes.len() / width)];
            state.read(values, HEADER_BYTES as u64 + element * DType::F32.bytes())?;
            convert(DType::F32, values, spec.dtype, bytes);
        }
        Ok(())
    })
}
