//! Reading a checkpoint, and writing it anew, tensor by tensor: the whole of a large model never lies in the host's memory.

use std::collections::BTreeSet;
#[cfg(feature = "libtorch")]
use std::collections::HashMap;
use std::path::Path;

use fragments::CheckpointTree;
use fragments::checkpoint::copy_side_files;
use protocol::DType;

use crate::tree::{self, Fill, TreeError};
use crate::{QuasarConfig, TensorEntry, TrainError};

/// A checkpoint that has every tensor of its configuration, in whatever element type and sharding.
///
/// Decay slopes may be missing (they are a formula); rotary frequencies are always recomputed, since a copy in bf16 would be
/// rounded. Experts may lie one by one, in the layout of older checkpoints (`mlp.experts.{e}.{gate,up,down}_proj.weight`). Other
/// missing tensors, wrong shapes, and parameters that the configuration does not know are refused here; values that are not
/// finite, when they are read.
pub(crate) struct Source {
    tree: CheckpointTree,
    config: QuasarConfig,
}

fn fail(reason: impl ToString) -> TrainError {
    TrainError::Checkpoint(reason.to_string())
}

/// The three matrices of one expert in the older layout, `[I, D]`, `[I, D]` and `[D, I]`.
fn single_experts(fused: &str, expert: usize) -> Option<[String; 3]> {
    let prefix = fused.strip_suffix("experts_w12").or_else(|| fused.strip_suffix("experts_w3"))?;
    Some(["gate", "up", "down"].map(|part| format!("{prefix}experts.{expert}.{part}_proj.weight")))
}

/// Writes the transpose of `from [rows, columns]` to `to`, whose rows are `stride` apart.
fn transpose(from: &[f32], rows: usize, columns: usize, to: &mut [f32], stride: usize) {
    for (r, row) in from.chunks_exact(columns).enumerate().take(rows) {
        for (c, value) in row.iter().enumerate() {
            to[c * stride + r] = *value;
        }
    }
}

impl Source {
    pub fn open(config: &QuasarConfig, folder: &Path) -> Result<Self, TrainError> {
        let tree = CheckpointTree::open(folder).map_err(fail)?;
        let tensors = config.tensors();
        let mut known: BTreeSet<String> = tensors.iter().map(|tensor| tensor.name.clone()).collect();
        let (hidden, width) = (config.hidden_size as u64, config.moe_intermediate_size as u64);
        for tensor in &tensors {
            let mut check = |name: &str, shape: &[u64]| match tree.tensor(name) {
                None => Err(fail(format!("tensor {name} is missing"))),
                Some(found) if found.shape != shape => {
                    Err(fail(format!("tensor {name} has shape {:?}, config.json says {shape:?}", found.shape)))
                }
                Some(_) => {
                    known.insert(name.to_owned());
                    Ok(())
                }
            };
            if tensor.name.ends_with(".inv_freq") || (tensor.name.ends_with(".slope") && tree.tensor(&tensor.name).is_none()) {
                continue;
            }
            let first =
                single_experts(&tensor.name, 0).filter(|[gate, ..]| tree.tensor(&tensor.name).is_none() && tree.tensor(gate).is_some());
            if first.is_none() {
                check(&tensor.name, &tensor.shape)?;
                continue;
            }
            for [gate, up, down] in (0..config.num_experts).filter_map(|expert| single_experts(&tensor.name, expert)) {
                check(&gate, &[width, hidden])?;
                check(&up, &[width, hidden])?;
                check(&down, &[hidden, width])?;
            }
        }
        if let Some(other) = tree.contract().tensors.iter().find(|tensor| !known.contains(&tensor.name)) {
            return Err(fail(format!("tensor {} does not belong to the model that config.json describes", other.name)));
        }
        Ok(Self { tree, config: config.clone() })
    }

    fn read(&self, name: &str) -> Result<Vec<f32>, TrainError> {
        self.tree.read_tensor(name).map_err(fail)
    }

    /// A constant: read, or computed where it is a formula.
    fn buffer(&self, tensor: &TensorEntry) -> Result<Vec<f32>, TrainError> {
        let layer = tensor.name.split('.').nth(2).and_then(|n| n.parse().ok()).unwrap_or(0);
        match tensor.name.rsplit('.').next() {
            Some("inv_freq") => Ok(self.config.inverse_frequencies()),
            Some("slope") if self.tree.tensor(&tensor.name).is_none() => Ok(self.config.slopes(layer)),
            _ => self.read(&tensor.name),
        }
    }

    fn parameter(&self, name: &str) -> Result<Vec<f32>, TrainError> {
        if self.tree.tensor(name).is_some() { self.read(name) } else { self.fused(name) }
    }

    /// The constants by name, rotary frequencies left out.
    #[cfg(feature = "libtorch")]
    pub fn buffers(&self) -> Result<HashMap<String, Vec<f32>>, TrainError> {
        let buffers = self.config.tensors().into_iter().filter(|tensor| tensor.is_buffer && !tensor.name.ends_with(".inv_freq"));
        buffers.map(|tensor| Ok((tensor.name.clone(), self.buffer(&tensor)?))).collect()
    }

    /// Hands every parameter to `take`, one after the other.
    #[cfg(feature = "libtorch")]
    pub fn parameters(&self, mut take: impl FnMut(&str, Vec<f32>) -> Result<(), TrainError>) -> Result<(), TrainError> {
        let parameters = self.config.tensors().into_iter().filter(|tensor| !tensor.is_buffer);
        parameters.map(|tensor| tensor.name).try_for_each(|name| take(&name, self.parameter(&name)?))
    }

    /// The element type of a parameter; of stacked experts the one that all have, or f32, which holds all.
    fn dtype(&self, name: &str) -> DType {
        let of = |name: &str| self.tree.tensor(name).map(|tensor| tensor.dtype);
        let parts = |[gate, up, down]: [String; 3]| if name.ends_with("w12") { vec![of(&gate), of(&up)] } else { vec![of(&down)] };
        let mut single = (0..self.config.num_experts).filter_map(|expert| single_experts(name, expert)).flat_map(parts).flatten();
        of(name).or_else(|| single.next().filter(|first| single.all(|other| other == *first))).unwrap_or(DType::F32)
    }

    fn fill(&self, tensor: &TensorEntry) -> Result<Fill, TrainError> {
        let all = if tensor.is_buffer { self.buffer(tensor)? } else { self.parameter(&tensor.name)? };
        Ok(Box::new(move |first, values| values.copy_from_slice(&all[first..first + values.len()])))
    }

    /// `experts_w12 [E, D, 2 I]` or `experts_w3 [E, I, D]` from single experts: `cat(gateᵀ, upᵀ)` and `downᵀ`.
    fn fused(&self, name: &str) -> Result<Vec<f32>, TrainError> {
        let (hidden, width) = (self.config.hidden_size, self.config.moe_intermediate_size);
        let is_w12 = name.ends_with("experts_w12");
        let each = if is_w12 { 2 * hidden * width } else { hidden * width };
        let mut values = vec![0f32; self.config.num_experts * each];
        for (expert, to) in values.chunks_exact_mut(each).enumerate() {
            let Some([gate, up, down]) = single_experts(name, expert) else { return Err(fail(format!("tensor {name} is missing"))) };
            if is_w12 {
                transpose(&self.read(&gate)?, width, hidden, to, 2 * width);
                transpose(&self.read(&up)?, width, hidden, &mut to[width..], 2 * width);
            } else {
                transpose(&self.read(&down)?, hidden, width, to, hidden);
            }
        }
        Ok(values)
    }
}

/// Writes the checkpoint in `folder` anew to `out`, a new or empty folder, with the tensors of the released model: experts that lie one by
/// one become stacked tensors, constants that are formulas are computed. Parameters keep the element types that they have, or get
/// `dtype`. The values are the same, or rounded to nearest. Tokenizer and model code come along.
///
/// # Errors
/// The checkpoint is not one of its configuration, or a value is not finite or becomes so; `out` is not empty or cannot be written.
pub fn convert(folder: &Path, dtype: Option<DType>, out: &Path) -> Result<QuasarConfig, TreeError> {
    let mut config = QuasarConfig::from_dir(folder).map_err(TrainError::from)?;
    if let Some(dtype) = dtype {
        config.say_dtype(dtype);
    }
    let source = Source::open(&config, folder)?;
    let others = || copy_side_files(&source.tree, out);
    tree::write(&config, &|tensor| dtype.unwrap_or_else(|| source.dtype(&tensor.name)), &|tensor| source.fill(tensor), &others, out)?;
    Ok(config)
}
