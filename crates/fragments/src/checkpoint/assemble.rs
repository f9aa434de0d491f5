//! Putting a checkpoint together: a base tree with every contract tensor replaced.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use protocol::FragmentPlan;

use super::file::TensorFile;
use super::write::{PartFile, UNFINISHED, claim_dir, finish_dir, write_file};
use super::{CheckpointError, CheckpointTree, INDEX_FILE};
use crate::contract::{CONTRACT_FILE, TensorSpec};
use crate::number::{append_f32, append_rounded, first_non_finite_bytes};
use crate::plan;

/// Weights in other formats, documents about another tree, and unfinished files: never copied from the base.
const NOT_COPIED: [&str; 9] = [".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".qsr", ".part"];

/// Side files and folders are copied this deep.
const COPY_DEPTH_MAX: usize = 4;

/// What [`assemble`] and [`assemble_from`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assembled {
    /// Every file, relative to the folder, sorted.
    pub files: Vec<PathBuf>,
    /// Contract elements, each replaced exactly once.
    pub elements: u64,
}

/// Assembles `base` with the fragment files of `fragments` (as [`super::split`] writes them) under `out`.
///
/// Slices may be cut in any way; every row of every contract tensor must be in exactly one file. A slice of another element
/// type than the base tree's is rounded to it; equal types are copied bit for bit. `out` must be empty or hold an
/// interrupted attempt, which is then completed.
pub fn assemble(base: &Path, fragments: &Path, out: &Path) -> Result<Assembled, CheckpointError> {
    let tree = CheckpointTree::open(base)?;
    let files = open_fragment_files(fragments)?;
    let mut covered: BTreeMap<&str, Vec<(u64, u64)>> = BTreeMap::new();
    let mut slices = Vec::new();
    for file in &files {
        for slice in &file.tensors {
            let unknown = || CheckpointError::FragmentTensor { path: file.path.clone(), name: slice.name.clone() };
            let (name, row_start) = slice.name.rsplit_once('@').ok_or_else(unknown)?;
            let row_start: u64 = row_start.parse().map_err(|_| unknown())?;
            let spec = tree.contract().get(name).ok_or_else(unknown)?;
            let row_end = slice_end(spec, row_start, &slice.shape).ok_or_else(unknown)?;
            covered.entry(&spec.name).or_default().push((row_start, row_end));
            slices.push((file, slice, spec, row_start));
        }
    }
    for spec in &tree.contract().tensors {
        plan::check_rows(&spec.name, spec.rows(), covered.remove(spec.name.as_str()).unwrap_or_default())?;
    }
    let output = OutputTree::create(&tree, out)?;
    for (file, slice, spec, row_start) in slices {
        let bytes = file.bytes(slice);
        if slice.dtype == spec.dtype {
            output.write_rows(spec, row_start, bytes)?;
        } else {
            let (mut values, mut rounded) = (Vec::new(), Vec::new());
            append_f32(slice.dtype, bytes, &mut values);
            append_rounded(spec.dtype, &values, &mut rounded);
            output.write_rows(spec, row_start, &rounded)?;
        }
    }
    output.finish()
}

/// Assembles `base` with the values that `fragment_values` gives for each fragment of `plan`, in slice order, under `out`.
///
/// The plan must cover the contract exactly. Values are rounded to the element types of the base tree. Fragments are asked
/// for one by one, in order, and dropped once written: memory holds one fragment. `out` is as for [`assemble`].
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

/// A tree being written with the shards, the headers and the side files of `base`.
struct OutputTree<'a> {
    base: &'a CheckpointTree,
    dir: &'a Path,
    parts: Vec<PartFile>,
    side_files: Vec<PathBuf>,
}

impl<'a> OutputTree<'a> {
    fn create(base: &'a CheckpointTree, dir: &'a Path) -> Result<Self, CheckpointError> {
        let mut side_files = Vec::new();
        list_side_files(base.dir(), Path::new(""), COPY_DEPTH_MAX, &mut side_files)?;
        let same = |left: &Path| left.canonicalize().ok() == base.dir().canonicalize().ok();
        if dir.exists() && same(dir) {
            return Err(CheckpointError::Occupied { dir: dir.to_owned(), entry: "the base checkpoint".to_owned() });
        }
        claim_dir(dir, |name| {
            name == CONTRACT_FILE
                || name == INDEX_FILE
                || base.weight_files().any(|file| file == Path::new(name))
                || side_files.iter().any(|file| file.starts_with(name))
        })?;
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
        Ok(Self { base, dir, parts, side_files })
    }

    /// Writes rows of a contract tensor, in the element type that it has in the base tree.
    fn write_rows(&self, spec: &TensorSpec, row_start: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let first_element = row_start * spec.row_elements();
        if let Some(element) = first_non_finite_bytes(spec.dtype, bytes) {
            return Err(CheckpointError::NotFinite { tensor: spec.name.clone(), element: first_element + element as u64 });
        }
        let (file, tensor) = self.base.locate(&spec.name)?;
        let index = self.base.file_index(&spec.name).ok_or_else(|| CheckpointError::MissingTensor { tensor: spec.name.clone() })?;
        self.parts[index].write_at(bytes, file.offset(tensor) + first_element * spec.dtype.bytes())
    }

    /// Gives the shards their names, copies index and side files, and writes the contract last.
    fn finish(self) -> Result<Assembled, CheckpointError> {
        for part in self.parts {
            part.finish()?;
        }
        let mut files: Vec<PathBuf> = self.base.weight_files().map(Path::to_owned).collect();
        if self.base.dir().join(INDEX_FILE).exists() {
            copy_file(self.base.dir(), self.dir, Path::new(INDEX_FILE))?;
            files.push(INDEX_FILE.into());
        }
        for file in self.side_files {
            copy_file(self.base.dir(), self.dir, &file)?;
            files.push(file);
        }
        write_file(self.dir, CONTRACT_FILE, &self.base.contract().to_json())?;
        files.push(CONTRACT_FILE.into());
        files.sort();
        finish_dir(self.dir)?;
        Ok(Assembled { files, elements: self.base.contract().elements() })
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

fn copy_file(from: &Path, to: &Path, relative: &Path) -> Result<(), CheckpointError> {
    let source = from.join(relative);
    let mut reader = fs::File::open(&source).map_err(CheckpointError::read(&source))?;
    let target = to.join(relative);
    let (dir, name) = (target.parent().unwrap_or(to), target.file_name().unwrap_or_default());
    fs::create_dir_all(dir).map_err(CheckpointError::write(dir))?;
    let mut part = PartFile::create(dir, &name.to_string_lossy())?;
    part.copy_from(&mut reader)?;
    part.finish()
}
