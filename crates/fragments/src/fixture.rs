//! Contracts, values and trees for the tests of this crate.

use std::fs;
use std::path::Path;

use protocol::{DType, MergeRule, Slice};

use crate::contract::{Contract, TensorSpec, is_buffer};
use crate::number::append_rounded;
use crate::safetensors_header;

/// The contract of the 18B model: `tests/data/tensors.tsv` without its buffers.
pub(crate) fn real_contract() -> Contract {
    let table = include_str!("../tests/data/tensors.tsv");
    let tensors = table.lines().map(|line| line.split('\t').collect::<Vec<_>>()).filter(|columns| columns[2] == "param");
    Contract::new(tensors.map(|columns| spec(columns[0], columns[1])).collect()).unwrap()
}

fn spec(name: &str, shape: &str) -> TensorSpec {
    let shape = shape.split('x').map(|dimension| dimension.parse().unwrap()).collect();
    TensorSpec { name: name.to_owned(), shape, dtype: DType::Bf16 }
}

/// Tensors with their buffers, in the manner of a small Quasar model: embeddings, dense and expert layers, gains.
pub(crate) fn small_tensors() -> Vec<TensorSpec> {
    let mut tensors =
        vec![spec("model.word_embeddings.weight", "512x64"), spec("lm_head.weight", "512x64"), spec("model.norm.weight", "64")];
    tensors.push(spec("model.rotary_emb.inv_freq", "8"));
    for layer in 0..4 {
        for (name, shape) in [
            ("input_layernorm.weight", "64"),
            ("attention.query_key_value.weight", "96x64"),
            ("attention.dense.weight", "64x64"),
            ("attention.branch_output_gain", "1"),
            ("mlp.experts_w12", "8x64x48"),
            ("mlp.experts_w3", "8x24x64"),
            ("mlp.gate.weight", "8x64"),
            ("mlp.gate.expert_bias", "8"),
        ] {
            tensors.push(spec(&format!("model.layers.{layer}.{name}"), shape));
        }
    }
    for (index, tensor) in tensors.iter_mut().enumerate() {
        if tensor.shape.len() < 2 {
            tensor.dtype = [DType::F32, DType::Bf16, DType::F16][index % 3];
        }
    }
    tensors
}

pub(crate) fn small_contract() -> Contract {
    Contract::new(small_tensors().into_iter().filter(|tensor| !is_buffer(&tensor.name)).collect()).unwrap()
}

/// A slice of a bf16 matrix that is merged by direction.
pub(crate) fn slice(rows: u64, row_elements: u64, unit_rows: u64) -> Slice {
    let (tensor, dtype, rule) = ("w".to_owned(), DType::Bf16, MergeRule::Rda);
    Slice { tensor, row_start: 0, row_end: rows, row_elements, unit_rows, dtype, rule }
}

/// Reproducible values between -1 and 1 that differ everywhere.
pub(crate) fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// The bytes of a safetensors file with reproducible values in every tensor.
pub(crate) fn safetensors_file(tensors: &[TensorSpec], seed: u64) -> Vec<u8> {
    let metadata = [("format", "pt".to_owned())];
    let entries = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype, tensor.shape.clone()));
    let mut bytes = safetensors_header::build(&metadata, entries);
    for (index, tensor) in tensors.iter().enumerate() {
        append_rounded(tensor.dtype, &values(seed + index as u64, tensor.elements() as usize), &mut bytes);
    }
    bytes
}

/// Writes a tree of `shards` files with an index (a single file without one if `shards` is 1) and its side files.
pub(crate) fn write_tree(dir: &Path, tensors: &[TensorSpec], shards: usize, seed: u64) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), b"{\"hidden_size\":64}").unwrap();
    fs::write(dir.join("tokenizer.json"), b"{}").unwrap();
    if shards == 1 {
        fs::write(dir.join("model.safetensors"), safetensors_file(tensors, seed)).unwrap();
        return;
    }
    let mut map = serde_json::Map::new();
    for (index, part) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", index + 1);
        fs::write(dir.join(&name), safetensors_file(part, seed + 1000 * index as u64)).unwrap();
        map.extend(part.iter().map(|tensor| (tensor.name.clone(), name.clone().into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
