//! Putting a checkpoint together: a base tree with every contract tensor replaced.
//!
//! Where the new rows can be read in any order (fragment files, fragment states), each shard is written from the front to the
//! back, hashed on the way, and remembered as complete, so that an interrupted assembly goes on where it stopped.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use protocol::{Digest, FileRecord, FragmentPlan};
use rayon::prelude::*;

use super::file::TensorFile;
use super::recorded::{PIECE_BYTES, RecordedFile};
use super::write::{Claim, PartFile, UNFINISHED, write_file};
use super::{CheckpointError, CheckpointTree, INDEX_FILE};
use crate::contract::{CONTRACT_FILE, TensorSpec};
use crate::number::{append_rounded, convert, first_non_finite_here};
use crate::plan;
use crate::safetensors_header::TensorInfo;

/// Weights in other formats, documents about another tree, and unfinished files: never copied from the base.
const NOT_COPIED: [&str; 9] = [".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".qsr", ".part"];

/// Elements that are read and converted at a time.
pub(super) const CONVERTED_AT_ONCE: usize = 1 << 14;

/// Side files and folders are copied this deep.
const COPY_DEPTH_MAX: usize = 4;

/// What [`assemble`] and its like wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assembled {
    /// Every file, relative to the folder, sorted.
    pub files: Vec<PathBuf>,
    /// Contract elements, each replaced exactly once.
    pub elements: u64,
    /// The record of each of `files`, in the same order, where digests were taken while writing; empty after [`assemble_from`],
    /// which writes shards in the order of the fragments.
    pub records: Vec<FileRecord>,
}

/// Assembles `base` with the fragment files of `fragments` (as [`super::split`] writes them) under `out`.
///
/// Slices may be cut in any way; every row of every contract tensor must be in exactly one file. A slice of another element
/// type than the base tree's is rounded to it; equal types are copied bit for bit. `out` must be empty or hold an
/// interrupted attempt, which is gone on with if nothing that goes into it has changed.
pub fn assemble(base: &Path, fragments: &Path, out: &Path) -> Result<Assembled, CheckpointError> {
    let tree = CheckpointTree::open(base)?;
    let files = open_fragment_files(fragments)?;
    let mut rows: BTreeMap<&str, Vec<Rows<(&TensorFile, &TensorInfo)>>> = BTreeMap::new();
    for file in &files {
        for slice in &file.tensors {
            let unknown = || CheckpointError::FragmentTensor { path: file.path.clone(), name: slice.name.clone() };
            let (name, row_start) = slice.name.rsplit_once('@').ok_or_else(unknown)?;
            let row_start: u64 = row_start.parse().map_err(|_| unknown())?;
            let spec = tree.contract().get(name).ok_or_else(unknown)?;
            let row_end = slice_end(spec, row_start, &slice.shape).ok_or_else(unknown)?;
            rows.entry(&spec.name).or_default().push(Rows { start: row_start, end: row_end, place: (file, slice) });
        }
    }
    let identity: Vec<u8> = files.iter().flat_map(TensorFile::identity).collect();
    assemble_rows(&tree, rows, &identity, out, |spec, (file, slice), first, bytes| {
        let (width, its_width) = (spec.dtype.bytes() as usize, slice.dtype.bytes());
        if slice.dtype == spec.dtype {
            return file.read(slice, first * its_width, bytes);
        }
        // In parts that stay in the cache between reading and rounding.
        let mut elements = [0; 4 * CONVERTED_AT_ONCE];
        for (number, bytes) in bytes.chunks_mut(width * CONVERTED_AT_ONCE).enumerate() {
            let element = first + (number * CONVERTED_AT_ONCE) as u64;
            let elements = &mut elements[..its_width as usize * (bytes.len() / width)];
            file.read(slice, element * its_width, elements)?;
            convert(slice.dtype, elements, spec.dtype, bytes);
        }
        Ok(())
    })
}

/// New rows `[start, end)` of a tensor, and where they are.
pub(super) struct Rows<P> {
    pub start: u64,
    pub end: u64,
    pub place: P,
}

/// Assembles a tree from rows of which `copy` brings elements, from a given one on, in the element type that the base tree has;
/// `identity` tells what they are made of.
pub(super) fn assemble_rows<'a, P: Copy + Sync + Send>(
    base: &'a CheckpointTree,
    mut rows: BTreeMap<&'a str, Vec<Rows<P>>>,
    identity: &[u8],
    out: &Path,
    copy: impl Fn(&TensorSpec, P, u64, &mut [u8]) -> Result<(), CheckpointError> + Sync,
) -> Result<Assembled, CheckpointError> {
    for spec in &base.contract().tensors {
        let found = rows.entry(&spec.name).or_default();
        found.sort_by_key(|rows| rows.start);
        plan::check_rows(&spec.name, spec.rows(), found.iter().map(|rows| (rows.start, rows.end)).collect())?;
    }
    let side_files = side_files(base, out)?;
    let work = Digest::derive("quasar/v1/assembly", &[&base.identity(), identity]);
    let claim = Claim::new(out, Some(work), |name| is_ours(base, &side_files, name))?;
    let shards: Vec<(&Path, &TensorFile)> = base.weight_files().zip(&base.files).collect();
    let write_shard = |(name, file): &(&Path, &TensorFile)| -> Result<FileRecord, CheckpointError> {
        let path = name.to_string_lossy();
        if let Some(record) = claim.complete(&path) {
            return Ok(record);
        }
        let mut shard = RecordedFile::create(out, &path)?;
        shard.append(file.header())?;
        // The tensors tile the data, so one behind the other is also one at its offset.
        for tensor in &file.tensors {
            let Some(spec) = base.contract().get(&tensor.name) else {
                // What is not in the contract (buffers) is taken over as it is.
                shard.append_with(tensor.end - tensor.begin, |bytes, at| file.read(tensor, at, bytes))?;
                continue;
            };
            let width = spec.dtype.bytes();
            for rows in rows.get(tensor.name.as_str()).into_iter().flatten() {
                let (start, elements) = (rows.start * spec.row_elements(), (rows.end - rows.start) * spec.row_elements());
                shard.append_with(elements * width, |bytes, at| {
                    copy(spec, rows.place, at / width, bytes)?;
                    refuse_non_finite(spec, start + at / width, bytes)
                })?;
            }
        }
        let record = shard.finish(&path)?;
        claim.note(&record)?;
        Ok(record)
    };
    let mut records = shards.par_iter().map(write_shard).collect::<Result<Vec<_>, _>>()?;
    records.extend(finish_tree(base, out, side_files)?);
    claim.finish()?;
    records.sort_by(|left, right| left.path.cmp(&right.path));
    let files = records.iter().map(|record| PathBuf::from(&record.path)).collect();
    Ok(Assembled { files, elements: base.contract().elements(), records })
}

/// Assembles `base` with the values that `fragment_values` gives for each fragment of `plan`, in slice order, under `out`.
///
/// The plan must cover the contract exactly. Values are rounded to the element types of the base tree. Fragments are asked
/// for one by one, in order, and dropped once written: memory holds one fragment. `out` must be empty or hold an interrupted
/// attempt, which is written over.
pub fn assemble_from<F, E>(
    base: &CheckpointTree,
    plan: &FragmentPlan,
    mut fragment_values: F,
    out: &Path,
) -> Result<Assembled, CheckpointError>
where
    F: FnMut(usize) -> Result<Vec<f32>, E>,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    plan::check(plan, base.contract())?;
    let output = OutputTree::create(base, out)?;
    for (fragment, slices) in plan.fragments.iter().enumerate() {
        let values = fragment_values(fragment).map_err(|error| CheckpointError::Source { fragment, source: error.into() })?;
        let expected = plan.elements(fragment);
        if values.len() as u64 != expected {
            return Err(CheckpointError::Values { fragment, got: values.len() as u64, expected });
        }
        let mut rest = values.as_slice();
        let mut bytes = Vec::new();
        for slice in slices {
            let (values, behind) = rest.split_at(slice.elements() as usize);
            rest = behind;
            bytes.clear();
            append_rounded(slice.dtype, values, &mut bytes);
            let spec = base.contract().get(&slice.tensor);
            let spec = spec.ok_or_else(|| CheckpointError::MissingTensor { tensor: slice.tensor.clone() })?;
            output.write_rows(spec, slice.row_start, &bytes)?;
        }
    }
    output.finish()
}

fn open_fragment_files(dir: &Path) -> Result<Vec<TensorFile>, CheckpointError> {
    if dir.join(UNFINISHED).exists() {
        return Err(CheckpointError::Unfinished { dir: dir.to_owned() });
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(CheckpointError::read(dir))? {
        let path = entry.map_err(CheckpointError::read(dir))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(CheckpointError::NoWeights { dir: dir.to_owned() });
    }
    paths.sort();
    paths.iter().map(|path| TensorFile::open(path)).collect()
}

/// The row behind the last of a slice that begins at `row_start` and has `shape`, if that is part of `spec`.
fn slice_end(spec: &TensorSpec, row_start: u64, shape: &[u64]) -> Option<u64> {
    let rows = shape.first().copied().unwrap_or(1);
    let row_elements: u64 = shape.iter().skip(1).product();
    let row_end = row_start.checked_add(rows)?;
    (rows > 0 && row_elements == spec.row_elements() && row_end <= spec.rows()).then_some(row_end)
}

fn refuse_non_finite(spec: &TensorSpec, first_element: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
    match first_non_finite_here(spec.dtype, bytes) {
        Some(element) => Err(CheckpointError::NotFinite { tensor: spec.name.clone(), element: first_element + element as u64 }),
        None => Ok(()),
    }
}

/// The side files of `base`, if `out` is another folder.
fn side_files(base: &CheckpointTree, out: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let mut found = Vec::new();
    list_side_files(base.dir(), Path::new(""), COPY_DEPTH_MAX, &mut found)?;
    let same = |left: &Path| left.canonicalize().ok() == base.dir().canonicalize().ok();
    if out.exists() && same(out) {
        return Err(CheckpointError::Occupied { dir: out.to_owned(), entry: "the base checkpoint".to_owned() });
    }
    Ok(found)
}

/// Copies what belongs to a checkpoint besides weights and contract: configuration, tokenizer, model code.
pub fn copy_side_files(base: &CheckpointTree, out: &Path) -> Result<(), CheckpointError> {
    side_files(base, out)?.iter().try_for_each(|file| copy_file(base.dir(), out, file).map(drop))
}

/// Whether an assembly of `base` writes a file or folder `name`.
fn is_ours(base: &CheckpointTree, side_files: &[PathBuf], name: &str) -> bool {
    name == CONTRACT_FILE
        || name == INDEX_FILE
        || base.weight_files().any(|file| file == Path::new(name))
        || side_files.iter().any(|file| file.starts_with(name))
}

/// Copies index and side files, and writes the contract last; returns their records.
fn finish_tree(base: &CheckpointTree, dir: &Path, side_files: Vec<PathBuf>) -> Result<Vec<FileRecord>, CheckpointError> {
    let mut records = Vec::new();
    if base.dir().join(INDEX_FILE).exists() {
        records.push(copy_file(base.dir(), dir, Path::new(INDEX_FILE))?);
    }
    for file in side_files {
        records.push(copy_file(base.dir(), dir, &file)?);
    }
    records.push(write_file(dir, CONTRACT_FILE, &base.contract().to_json())?);
    Ok(records)
}

/// A tree being written, in any order, with the shards, the headers and the side files of `base`.
struct OutputTree<'a> {
    base: &'a CheckpointTree,
    dir: &'a Path,
    claim: Claim<'a>,
    parts: Vec<PartFile>,
    side_files: Vec<PathBuf>,
}

impl<'a> OutputTree<'a> {
    fn create(base: &'a CheckpointTree, dir: &'a Path) -> Result<Self, CheckpointError> {
        let side_files = side_files(base, dir)?;
        let claim = Claim::new(dir, None, |name| is_ours(base, &side_files, name))?;
        let mut parts = Vec::new();
        for (name, file) in base.weight_files().zip(&base.files) {
            let part = PartFile::create(dir, &name.to_string_lossy())?;
            part.set_length(file.length())?;
            part.write_at(file.header(), 0)?;
            // What is not in the contract (buffers) is taken over as it is.
            for tensor in file.tensors.iter().filter(|tensor| base.contract().get(&tensor.name).is_none()) {
                part.write_at(file.bytes(tensor), file.offset(tensor))?;
            }
            parts.push(part);
        }
        Ok(Self { base, dir, claim, parts, side_files })
    }

    /// Writes rows of a contract tensor, in the element type that it has in the base tree.
    fn write_rows(&self, spec: &TensorSpec, row_start: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let first_element = row_start * spec.row_elements();
        refuse_non_finite(spec, first_element, bytes)?;
        let (file, tensor) = self.base.locate(&spec.name)?;
        let index = self.base.file_index(&spec.name).ok_or_else(|| CheckpointError::MissingTensor { tensor: spec.name.clone() })?;
        self.parts[index].write_at(bytes, file.offset(tensor) + first_element * spec.dtype.bytes())
    }

    /// Gives the shards their names, then finishes the tree.
    fn finish(self) -> Result<Assembled, CheckpointError> {
        for part in self.parts {
            part.finish()?;
        }
        let others = finish_tree(self.base, self.dir, self.side_files)?;
        let mut files: Vec<PathBuf> = self.base.weight_files().map(Path::to_owned).collect();
        files.extend(others.iter().map(|record| PathBuf::from(&record.path)));
        files.sort();
        self.claim.finish()?;
        Ok(Assembled { files, elements: self.base.contract().elements(), records: Vec::new() })
    }
}

/// Files of the base tree other than weights and contract, relative to it, sorted.
fn list_side_files(base: &Path, below: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<(), CheckpointError> {
    let dir = base.join(below);
    let mut entries = Vec::new();
    for entry in fs::read_dir(&dir).map_err(CheckpointError::read(&dir))? {
        entries.push(entry.map_err(CheckpointError::read(&dir))?.file_name());
    }
    entries.sort();
    for entry in entries {
        let (name, path) = (entry.to_string_lossy(), below.join(&entry));
        if name.starts_with('.') || name == CONTRACT_FILE || NOT_COPIED.iter().any(|suffix| name.ends_with(suffix)) {
            continue;
        }
        // Follows links: model hubs keep snapshots as links into a store of blobs.
        let kind = fs::metadata(base.join(&path)).map_err(CheckpointError::read(&base.join(&path)))?;
        if kind.is_file() {
            found.push(path);
        } else if kind.is_dir() && depth > 0 {
            list_side_files(base, &path, depth - 1, found)?;
        }
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path, relative: &Path) -> Result<FileRecord, CheckpointError> {
    let source = from.join(relative);
    let mut reader = fs::File::open(&source).map_err(CheckpointError::read(&source))?;
    let target = to.join(relative);
    let (dir, name) = (target.parent().unwrap_or(to), target.file_name().unwrap_or_default());
    fs::create_dir_all(dir).map_err(CheckpointError::write(dir))?;
    let mut copy = RecordedFile::create(dir, &name.to_string_lossy())?;
    let mut piece = Vec::new();
    loop {
        piece.clear();
        reader.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut piece).map_err(CheckpointError::read(&source))?;
        if piece.is_empty() {
            return copy.finish(&relative.to_string_lossy());
        }
        copy.append(&piece)?;
    }
}
