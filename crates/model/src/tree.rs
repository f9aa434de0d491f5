//! Writing a Hugging Face tree: tensors are made when their file is written, one at a time.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use fragments::checkpoint::{CheckpointError, UNFINISHED};
use fragments::contract::CONTRACT_FILE;
use fragments::{Contract, ContractError, TensorSpec};
use protocol::DType;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, View};

use crate::{QuasarConfig, TensorEntry, TrainError};

/// A tree with more bytes has several files of up to this many (or of one larger tensor), as model hubs want them.
const FILE_BYTES_MAX: u64 = 5_000_000_000;

/// Elements that one task makes; an even number.
pub(crate) const TASK_ELEMENTS: usize = 1 << 16;

/// Why no checkpoint was written.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    #[error("{path} is not empty\nhint: name a new folder; an existing checkpoint is never overwritten")]
    NotEmpty { path: String },
    #[error("cannot write {path}: {source}")]
    Io { path: String, source: std::io::Error },
    /// The checkpoint that tensors come from.
    #[error(transparent)]
    Source(#[from] TrainError),
    #[error("tensor {tensor} holds {value}, which {} cannot\nhint: choose another element type", dtype.name())]
    OutOfRange { tensor: String, value: f32, dtype: DType },
    #[error(transparent)]
    Copy(#[from] CheckpointError),
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error("cannot write {file}: {source}")]
    Safetensors { file: String, source: safetensors::SafeTensorError },
}

/// Writes the elements of a tensor from an even one on.
pub(crate) type Fill = Box<dyn Fn(usize, &mut [f32]) + Sync>;

/// Makes a tensor.
type Make<'a> = dyn Fn(&TensorEntry) -> Result<Fill, TrainError> + 'a;

/// Writes `config.json`, the weights and the parameter contract of a model to `out`, a new or empty folder. Parameters are stored with the
/// element type that `dtype` names, buffers as f32; weights stand in `model.safetensors`, or in several files and an index where that would
/// be larger than 5 GB. `others` puts other files there before. Until all is there the folder is marked as unfinished, and after an error
/// nothing of it is left.
pub(crate) fn write(
    config: &QuasarConfig,
    dtype: &dyn Fn(&TensorEntry) -> DType,
    make: &Make<'_>,
    others: &dyn Fn() -> Result<(), CheckpointError>,
    out: &Path,
) -> Result<(), TreeError> {
    std::fs::create_dir_all(out).map_err(io(out))?;
    if std::fs::read_dir(out).map_err(io(out))?.next().is_some() {
        return Err(TreeError::NotEmpty { path: out.display().to_string() });
    }
    let marker = out.join(UNFINISHED);
    let written = std::fs::write(&marker, []).map_err(io(&marker)).and_then(|()| {
        others()?;
        write_all(config, dtype, make, out)
    });
    match written {
        Ok(()) => std::fs::remove_file(&marker).map_err(io(&marker)),
        Err(error) => {
            // The marker last: without it, what is left would be taken for a checkpoint.
            let files = std::fs::read_dir(out).into_iter().flatten().flatten().map(|entry| entry.path());
            let remove = |path: PathBuf| if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
            let _ = files.filter(|path| *path != marker).try_for_each(remove).and_then(|()| std::fs::remove_file(&marker));
            Err(error)
        }
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> TreeError + use<> {
    let path = path.display().to_string();
    move |source| TreeError::Io { path: path.clone(), source }
}

fn write_all(config: &QuasarConfig, dtype: &dyn Fn(&TensorEntry) -> DType, make: &Make<'_>, out: &Path) -> Result<(), TreeError> {
    let tensors = config.tensors();
    let failed = OnceLock::new();
    let stored = |tensor: &TensorEntry| if tensor.is_buffer { DType::F32 } else { dtype(tensor) };
    let made: Vec<Made> = tensors.iter().map(|tensor| Made::new(tensor, stored(tensor), make, &failed)).collect();
    let specs = made.iter().filter(|made| !made.entry.is_buffer);
    let specs = specs.map(|made| TensorSpec { name: made.entry.name.clone(), shape: made.entry.shape.clone(), dtype: made.dtype });
    let contract = Contract::new(specs.collect())?;
    let written = write_files(&made, FILE_BYTES_MAX, out);
    drop(made);
    failed.into_inner().map_or(Ok(()), Err)?;
    written?;
    let path = out.join(CONTRACT_FILE);
    std::fs::write(&path, contract.to_json()).map_err(io(&path))?;
    let path = out.join("config.json");
    std::fs::write(&path, config.to_json()).map_err(io(&path))
}

fn write_files(tensors: &[Made], bytes_max: u64, out: &Path) -> Result<(), TreeError> {
    let mut files: Vec<Vec<&Made>> = vec![Vec::new()];
    let (mut in_file, mut total) = (0, 0);
    for tensor in tensors {
        let bytes = tensor.data_len() as u64;
        if in_file > 0 && in_file + bytes > bytes_max {
            files.push(Vec::new());
            in_file = 0;
        }
        (in_file, total) = (in_file + bytes, total + bytes);
        files.last_mut().expect("there is a file").push(tensor);
    }
    let name = |number: usize| match files.len() {
        1 => "model.safetensors".to_owned(),
        count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    };
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut places = BTreeMap::new();
    for (number, tensors) in files.iter().enumerate() {
        let file = name(number);
        let named = tensors.iter().map(|tensor| (tensor.entry.name.as_str(), *tensor));
        safetensors::serialize_to_file(named, Some(metadata.clone()), &out.join(&file))
            .map_err(|source| TreeError::Safetensors { file: file.clone(), source })?;
        if tensors.iter().any(|tensor| tensor.failed.get().is_some()) {
            return Ok(());
        }
        places.extend(tensors.iter().map(|tensor| (tensor.entry.name.as_str(), file.clone())));
    }
    if files.len() == 1 {
        return Ok(());
    }
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": places });
    let path = out.join("model.safetensors.index.json");
    std::fs::write(&path, format!("{index:#}\n")).map_err(io(&path))
}

/// A tensor that is made when it is written.
struct Made<'a, 'm> {
    entry: &'a TensorEntry,
    shape: Vec<usize>,
    dtype: DType,
    make: &'a Make<'m>,
    /// Why some tensor of the tree could not be made: a file's writer does not ask.
    failed: &'a OnceLock<TreeError>,
}

impl<'a, 'm> Made<'a, 'm> {
    fn new(entry: &'a TensorEntry, dtype: DType, make: &'a Make<'m>, failed: &'a OnceLock<TreeError>) -> Self {
        let shape = entry.shape.iter().map(|n| *n as usize).collect();
        Self { entry, shape, dtype, make, failed }
    }
}

impl View for &Made<'_, '_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let (dtype, width) = (self.dtype, self.dtype.bytes() as usize);
        let (name, failed) = (&self.entry.name, self.failed);
        let mut bytes = vec![0; self.data_len()];
        if failed.get().is_some() {
            return bytes.into();
        }
        let fill = match (self.make)(self.entry) {
            Ok(fill) => fill,
            Err(error) => {
                let _ = failed.set(error.into());
                return bytes.into();
            }
        };
        bytes.par_chunks_mut(width * TASK_ELEMENTS).enumerate().for_each_init(
            || vec![0.0; TASK_ELEMENTS],
            |values, (task, bytes)| {
                let values = &mut values[..bytes.len() / width];
                fill(task * TASK_ELEMENTS, values);
                fragments::round(dtype, values, bytes);
                if let Some(element) = fragments::first_non_finite_here(dtype, bytes) {
                    let _ = failed.set(TreeError::OutOfRange { tensor: name.clone(), value: values[element], dtype });
                }
            },
        );
        bytes.into()
    }

    fn data_len(&self) -> usize {
        (self.entry.elements() * self.dtype.bytes()) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_tree_has_several_files_with_the_same_tensors_and_an_index() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = QuasarConfig::from_json(include_str!("../tests/data/small_config.json")).unwrap().tensors();
        let make = |tensor: &TensorEntry| -> Result<Fill, TrainError> {
            let bytes = tensor.name.len();
            Ok(Box::new(move |first, values| (first..).zip(values).for_each(|(n, value)| *value = ((n + bytes) % 200) as f32)))
        };
        let failed = OnceLock::new();
        let made: Vec<Made> = tensors.iter().map(|tensor| Made::new(tensor, DType::Bf16, &make, &failed)).collect();
        let (one, many) = (folder.path().join("one"), folder.path().join("many"));
        for (out, bytes_max) in [(&one, u64::MAX), (&many, 20_000)] {
            std::fs::create_dir(out).unwrap();
            write_files(&made, bytes_max, out).unwrap();
        }
        let whole = std::fs::read(one.join("model.safetensors")).unwrap();
        let whole = safetensors::SafeTensors::deserialize(&whole).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&std::fs::read(many.join("model.safetensors.index.json")).unwrap()).unwrap();
        let files: std::collections::BTreeSet<&str> =
            index["weight_map"].as_object().unwrap().values().map(|file| file.as_str().unwrap()).collect();
        assert!(files.len() > 2 && files.contains(format!("model-00001-of-{:05}.safetensors", files.len()).as_str()));
        let mut found = 0;
        for file in files {
            let bytes = std::fs::read(many.join(file)).unwrap();
            for (name, tensor) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
                assert_eq!(index["weight_map"][&name], file);
                assert!(tensor == whole.tensor(&name).unwrap(), "{name}");
                found += 1;
            }
        }
        assert_eq!(found, tensors.len());
    }
}
