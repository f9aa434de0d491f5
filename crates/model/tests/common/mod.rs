//! Checkpoint trees and token rows for the tests.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use fragments::CheckpointTree;
use protocol::{DType, FragmentPlan};
use quasar_model::{QuasarConfig, QuasarTrainer, TrainerOptions};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A folder with the given configuration and weights.
pub fn tree(config: &Path, weights: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(config, folder.path().join("config.json")).unwrap();
    std::fs::copy(weights, folder.path().join("model.safetensors")).unwrap();
    folder
}

/// The small model with given weights.
pub fn small() -> tempfile::TempDir {
    tree(&data("small_config.json"), &data("small_model.safetensors"))
}

/// The small model with fresh weights.
pub fn fresh(seed: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = QuasarConfig::from_file(&data("small_config.json")).unwrap();
    quasar_model::init::fresh(&config, seed, DType::F32, folder.path()).unwrap();
    folder
}

pub fn plan(folder: &Path, fragments: usize) -> FragmentPlan {
    fragments::plan(CheckpointTree::open(folder).unwrap().contract(), fragments).unwrap()
}

pub fn trainer(folder: &Path) -> QuasarTrainer {
    QuasarTrainer::open(folder, plan(folder, 5), "cpu", 1).unwrap()
}

pub fn trainer_with(folder: &Path, options: &TrainerOptions) -> QuasarTrainer {
    QuasarTrainer::open_with(folder, plan(folder, 5), options).unwrap()
}

/// All tensors of a safetensors file as f32, integers too.
pub fn read(path: &Path) -> HashMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8], dtype| -> Vec<f32> {
        match dtype {
            Dtype::F32 => data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::I32 => data.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b) as f32).collect(),
            Dtype::I64 => data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect(),
            other => panic!("{other:?}"),
        }
    };
    file.tensors().into_iter().map(|(name, view)| (name, values(view.data(), view.dtype()))).collect()
}

/// Repetitive pseudo-text: a small model can learn it.
pub fn tokens(count: usize, vocabulary: u32, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|n| ((n * 7 + n / 5 + seed * 13) * (n % 3 + 1)) % (vocabulary - 4) + 4).collect()
}

pub fn largest_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// |ours - theirs| / |theirs|, L2.
pub fn relative_difference(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut ours.iter().zip(theirs).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut theirs.iter().map(|v| f64::from(*v))).max(1e-30)
}
