//! Reading a checkpoint tree.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use protocol::{FragmentPlan, Slice};
use serde::Deserialize;

use super::CheckpointError;
use super::file::TensorFile;
use super::write::UNFINISHED;
use crate::contract::{CONTRACT_BYTES_MAX, CONTRACT_FILE, Contract, ContractError, TensorSpec, is_buffer};
use crate::number::{append_f32, first_non_finite_bytes, first_non_finite_here};
use crate::safetensors_header::TensorInfo;

/// Name of the index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Longest index that is read.
pub const INDEX_BYTES_MAX: u64 = 16 << 20;

const SINGLE_FILE: &str = "model.safetensors";

/// A checkpoint folder: a single safetensors file, or an index and its shards; F32, BF16 and F16, mixed as they come.
///
/// The weights are memory-mapped: opening reads headers only. Values are checked for finiteness when they are read.
#[derive(Debug)]
pub struct CheckpointTree {
    dir: PathBuf,
    pub(super) files: Vec<TensorFile>,
    /// Tensor name to (file, tensor in the file).
    places: BTreeMap<String, (usize, usize)>,
    contract: Contract,
}

impl CheckpointTree {
    /// Opens and checks the tree: completely written, strict headers, no tensor twice, index and shards agree, and the contract file, if there
    /// is one, names exactly the parameters of the weights with their shapes and element types.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        if dir.join(UNFINISHED).exists() {
            return Err(CheckpointError::Unfinished { dir: dir.to_owned() });
        }
        let index_path = dir.join(INDEX_FILE);
        let index = if index_path.exists() { Some(read_index(&index_path)?) } else { None };
        let names: BTreeSet<String> = match &index {
            Some(index) => index.values().cloned().collect(),
            None => [single_file(dir)?].into(),
        };
        let mut files = Vec::new();
        let mut places = BTreeMap::new();
        for name in names {
            let file = TensorFile::open(&dir.join(&name))?;
            for (position, tensor) in file.tensors.iter().enumerate() {
                if places.insert(tensor.name.clone(), (files.len(), position)).is_some() {
                    return Err(CheckpointError::DuplicateTensor { tensor: tensor.name.clone() });
                }
                let indexed = index.as_ref().is_none_or(|index| index.get(&tensor.name) == Some(&name));
                if !indexed {
                    let message = format!("tensor `{}` is in {name} but the index does not say so", tensor.name);
                    return Err(CheckpointError::Index { path: index_path, message });
                }
            }
            files.push(file);
        }
        if let Some(tensor) = index.iter().flat_map(BTreeMap::keys).find(|tensor| !places.contains_key(*tensor)) {
            return Err(CheckpointError::MissingTensor { tensor: tensor.clone() });
        }
        let parameters = files.iter().flat_map(|file| &file.tensors).filter(|tensor| !is_buffer(&tensor.name)).map(spec);
        let contract = Contract::new(parameters.collect())?;
        let tree = Self { dir: dir.to_owned(), files, places, contract };
        if let Some(written) = tree.written_contract()? {
            tree.check_contract(&written)?;
        }
        Ok(tree)
    }

    fn written_contract(&self) -> Result<Option<Contract>, CheckpointError> {
        let path = self.dir.join(CONTRACT_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let refuse = |source| CheckpointError::Contract { path: path.clone(), source };
        let length = fs::metadata(&path).map_err(CheckpointError::read(&path))?.len();
        if length > CONTRACT_BYTES_MAX {
            return Err(refuse(ContractError::TooLong { length }));
        }
        let bytes = fs::read(&path).map_err(CheckpointError::read(&path))?;
        Contract::from_json(&bytes).map(Some).map_err(refuse)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The parameters: all tensors but the buffers, with the element types of the files.
    pub fn contract(&self) -> &Contract {
        &self.contract
    }

    /// All tensors, buffers too, by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorSpec> {
        self.places.values().map(|(file, position)| spec(&self.files[*file].tensors[*position]))
    }

    /// The tensor `name`, parameter or buffer.
    pub fn tensor(&self, name: &str) -> Option<TensorSpec> {
        self.locate(name).ok().map(|(_, tensor)| spec(tensor))
    }

    /// File names of the weights, relative to the folder.
    pub fn weight_files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().filter_map(|file| file.path.file_name()).map(Path::new)
    }

    /// Whether the parameters of the tree are exactly those of `contract`, in names, shapes and element types.
    pub fn check_contract(&self, contract: &Contract) -> Result<(), CheckpointError> {
        for expected in &contract.tensors {
            let found = self.contract.get(&expected.name);
            let found = found.ok_or_else(|| CheckpointError::MissingTensor { tensor: expected.name.clone() })?;
            if found != expected {
                let describe = |spec: &TensorSpec| format!("{} {:?}", spec.dtype.name(), spec.shape);
                return Err(CheckpointError::Mismatch {
                    tensor: expected.name.clone(),
                    expected: describe(expected),
                    found: describe(found),
                });
            }
        }
        match self.contract.tensors.iter().find(|found| contract.get(&found.name).is_none()) {
            Some(extra) => Err(CheckpointError::NotInContract { tensor: extra.name.clone() }),
            None => Ok(()),
        }
    }

    /// Appends the values of a slice to `out`, widened to f32. The slice must fit the tensor in shape and element type.
    pub fn read_slice(&self, slice: &Slice, out: &mut Vec<f32>) -> Result<(), CheckpointError> {
        append_f32(slice.dtype, self.slice_bytes(slice)?, out);
        Ok(())
    }

    /// The values of fragment `fragment` in slice order.
    pub fn read_fragment(&self, plan: &FragmentPlan, fragment: usize) -> Result<Vec<f32>, CheckpointError> {
        let mut values = Vec::with_capacity(plan.elements(fragment) as usize);
        for slice in &plan.fragments[fragment] {
            self.read_slice(slice, &mut values)?;
        }
        Ok(values)
    }

    /// The values of a whole tensor, parameter or buffer, widened to f32.
    pub fn read_tensor(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let (file, tensor) = self.locate(name)?;
        let bytes = file.bytes(tensor);
        refuse_non_finite(tensor, first_non_finite_bytes(tensor.dtype, bytes), 0)?;
        let mut values = Vec::with_capacity(bytes.len() / tensor.dtype.bytes() as usize);
        append_f32(tensor.dtype, bytes, &mut values);
        Ok(values)
    }

    /// The bytes of a slice as they stand in the file; refused if a value is not finite.
    pub fn slice_bytes(&self, slice: &Slice) -> Result<&[u8], CheckpointError> {
        let (file, tensor) = self.locate_slice(slice)?;
        let place = |row: u64| (row * slice.row_elements * tensor.dtype.bytes()) as usize;
        let bytes = &file.bytes(tensor)[place(slice.row_start)..place(slice.row_end)];
        refuse_non_finite(tensor, first_non_finite_bytes(tensor.dtype, bytes), slice.row_start * slice.row_elements)?;
        Ok(bytes)
    }

    /// Reads elements of a slice from its element `first` on into `bytes`; refused if a value is not finite.
    pub(super) fn read_elements(&self, slice: &Slice, first: u64, bytes: &mut [u8]) -> Result<(), CheckpointError> {
        let (file, tensor) = self.locate_slice(slice)?;
        let element = slice.row_start * slice.row_elements + first;
        file.read(tensor, element * tensor.dtype.bytes(), bytes)?;
        refuse_non_finite(tensor, first_non_finite_here(tensor.dtype, bytes), element)
    }

    /// The file and the tensor that a slice is in, if it fits that tensor.
    fn locate_slice(&self, slice: &Slice) -> Result<(&TensorFile, &TensorInfo), CheckpointError> {
        let (file, tensor) = self.locate(&slice.tensor)?;
        let found = spec(tensor);
        let fits = slice.row_start <= slice.row_end
            && slice.row_end <= found.rows()
            && slice.row_elements == found.row_elements()
            && slice.dtype == found.dtype;
        if fits {
            return Ok((file, tensor));
        }
        let (row_start, row_end) = (slice.row_start, slice.row_end);
        Err(CheckpointError::Rows { tensor: found.name, row_start, row_end })
    }

    /// What tells these weights from others at the same place.
    pub(super) fn identity(&self) -> Vec<u8> {
        self.files.iter().flat_map(TensorFile::identity).collect()
    }

    pub(super) fn locate(&self, name: &str) -> Result<(&TensorFile, &TensorInfo), CheckpointError> {
        let (file, position) = self.places.get(name).ok_or_else(|| CheckpointError::MissingTensor { tensor: name.to_owned() })?;
        Ok((&self.files[*file], &self.files[*file].tensors[*position]))
    }

    /// Number of the file that holds tensor `name`.
    pub(super) fn file_index(&self, name: &str) -> Option<usize> {
        self.places.get(name).map(|(file, _)| *file)
    }
}

fn spec(tensor: &TensorInfo) -> TensorSpec {
    TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), dtype: tensor.dtype }
}

/// `found` is the first element that is not finite, counted from `first_element`.
fn refuse_non_finite(tensor: &TensorInfo, found: Option<usize>, first_element: u64) -> Result<(), CheckpointError> {
    match found {
        Some(element) => Err(CheckpointError::NotFinite { tensor: tensor.name.clone(), element: first_element + element as u64 }),
        None => Ok(()),
    }
}

/// The one weight file of a tree without an index: `model.safetensors`, or the only safetensors file there is.
fn single_file(dir: &Path) -> Result<String, CheckpointError> {
    if dir.join(SINGLE_FILE).exists() {
        return Ok(SINGLE_FILE.to_owned());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(CheckpointError::read(dir))? {
        let name = entry.map_err(CheckpointError::read(dir))?.file_name();
        found.extend(name.to_str().filter(|name| name.ends_with(".safetensors")).map(str::to_owned));
    }
    match <[String; 1]>::try_from(found) {
        Ok([only]) => Ok(only),
        Err(_) => Err(CheckpointError::NoWeights { dir: dir.to_owned() }),
    }
}

/// Tensor name to shard file name; shards lie beside the index.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let refuse = |message: String| CheckpointError::Index { path: path.to_owned(), message };
    let length = fs::metadata(path).map_err(CheckpointError::read(path))?.len();
    if length > INDEX_BYTES_MAX {
        return Err(refuse(format!("the index has {length} bytes, the limit is {INDEX_BYTES_MAX}")));
    }
    let bytes = fs::read(path).map_err(CheckpointError::read(path))?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
    let plain = |name: &str| name.ends_with(".safetensors") && Path::new(name).components().count() == 1 && !name.contains(['/', '\\']);
    match index.weight_map.values().find(|name| !plain(name)) {
        Some(name) => Err(refuse(format!("`{name}` is not the name of a safetensors file in the same folder"))),
        None if index.weight_map.is_empty() => Err(refuse("the index names no tensor".to_owned())),
        None => Ok(index.weight_map),
    }
}
