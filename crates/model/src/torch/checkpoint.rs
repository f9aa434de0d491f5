//! Reading a checkpoint into the flat parameter buffer and the constants.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use fragments::CheckpointTree;

use super::layout::Layout;
use crate::{QuasarConfig, TrainError};

/// Parameters in the order of the layout, and the constants by name.
pub(crate) struct Loaded {
    pub parameters: Vec<f32>,
    pub buffers: HashMap<String, Vec<f32>>,
}

/// Reads every tensor of the configuration from the checkpoint in `folder`, in whatever element type and sharding it has.
/// Decay slopes may be missing (they are a formula); rotary frequencies are always recomputed, since a copy in bf16 would be
/// rounded. Other missing tensors, wrong shapes, values that are not finite and parameters that the configuration does
/// not know are refused.
pub(crate) fn load(config: &QuasarConfig, layout: &Layout, folder: &Path) -> Result<Loaded, TrainError> {
    let fail = TrainError::Checkpoint;
    let tree = CheckpointTree::open(folder).map_err(|error| fail(error.to_string()))?;
    let tensors = config.tensors();
    let known: BTreeSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    if let Some(other) = tree.contract().tensors.iter().find(|tensor| !known.contains(tensor.name.as_str())) {
        return Err(fail(format!("tensor {} does not belong to the model that config.json describes", other.name)));
    }
    let mut parameters = vec![0f32; layout.elements];
    let mut buffers = HashMap::new();
    for tensor in &tensors {
        if tensor.name.ends_with(".inv_freq") {
            continue;
        }
        let Some(found) = tree.tensor(&tensor.name) else {
            let Some(layer) = tensor.name.strip_suffix(".attention.gla_attention.slope") else {
                return Err(fail(format!("tensor {} is missing", tensor.name)));
            };
            let layer = layer.rsplit('.').next().and_then(|n| n.parse().ok()).unwrap_or(0);
            buffers.insert(tensor.name.clone(), config.slopes(layer));
            continue;
        };
        if found.shape != tensor.shape {
            return Err(fail(format!("tensor {} has shape {:?}, config.json says {:?}", tensor.name, found.shape, tensor.shape)));
        }
        let values = tree.read_tensor(&tensor.name).map_err(|error| fail(error.to_string()))?;
        match layout.range(&tensor.name) {
            Some(range) => parameters[range].copy_from_slice(&values),
            None => {
                buffers.insert(tensor.name.clone(), values);
            }
        }
    }
    Ok(Loaded { parameters, buffers })
}
