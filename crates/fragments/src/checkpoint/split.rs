//! Cutting a checkpoint into fragment files.

use std::path::Path;

use protocol::FragmentPlan;

use super::write::{PartFile, claim_dir, finish_dir, write_file};
use super::{CheckpointError, CheckpointTree};
use crate::contract::CONTRACT_FILE;
use crate::keyframe::slice_name;
use crate::{plan, safetensors_header};

/// Cuts the parameters of the tree at `base` into `fragments` files `fragment-000.safetensors`, … under `out`, and writes
/// the contract beside them.
///
/// A slice is the tensor `{tensor}@{row_start}` with the bytes, the element type and the trailing dimensions that it has
/// in the tree. Values that are not finite are refused. `out` must be empty or hold an interrupted attempt.
pub fn split(base: &Path, fragments: usize, out: &Path) -> Result<FragmentPlan, CheckpointError> {
    let tree = CheckpointTree::open(base)?;
    let plan = plan::plan(tree.contract(), fragments)?;
    claim_dir(out, |name| name == CONTRACT_FILE || (0..fragments).any(|fragment| name == fragment_file(fragment)))?;
    let digest = plan.digest().to_string();
    for (fragment, slices) in plan.fragments.iter().enumerate() {
        let metadata = [("fragment", fragment.to_string()), ("fragments", fragments.to_string()), ("plan", digest.clone())];
        let names: Vec<String> = slices.iter().map(slice_name).collect();
        let mut entries = Vec::with_capacity(slices.len());
        for (slice, name) in slices.iter().zip(&names) {
            let (_, tensor) = tree.locate(&slice.tensor)?;
            let mut shape = tensor.shape.clone();
            if let Some(rows) = shape.first_mut() {
                *rows = slice.rows();
            }
            entries.push((name.as_str(), slice.dtype, shape));
        }
        let mut file = PartFile::create(out, &fragment_file(fragment))?;
        file.append(&safetensors_header::build(&metadata, entries))?;
        for slice in slices {
            file.append(tree.slice_bytes(slice)?)?;
        }
        file.finish()?;
    }
    write_file(out, CONTRACT_FILE, &tree.contract().to_json())?;
    finish_dir(out)?;
    Ok(plan)
}

pub(super) fn fragment_file(fragment: usize) -> String {
    format!("fragment-{fragment:03}.safetensors")
}
