//! Cutting a checkpoint into fragment files.

use std::path::Path;

use protocol::{Digest, FileRecord, FragmentPlan};
use rayon::prelude::*;

use super::recorded::RecordedFile;
use super::write::{Claim, write_file};
use super::{CheckpointError, CheckpointTree};
use crate::contract::CONTRACT_FILE;
use crate::keyframe::slice_name;
use crate::{plan, safetensors_header};

/// Cuts the parameters of the tree at `base` into `fragments` files `fragment-000.safetensors`, … under `out`, and writes
/// the contract beside them.
///
/// A slice is the tensor `{tensor}@{row_start}` with the bytes, the element type and the trailing dimensions that it has
/// in the tree. Values that are not finite are refused. `out` must be empty or hold an interrupted attempt, which is gone on
/// with if the checkpoint and the number of fragments are the same.
pub fn split(base: &Path, fragments: usize, out: &Path) -> Result<FragmentPlan, CheckpointError> {
    split_recorded(base, fragments, out).map(|(plan, _)| plan)
}

/// [`split`], with a record of every file, sorted by path. Digests are taken while the files are written.
pub fn split_recorded(base: &Path, fragments: usize, out: &Path) -> Result<(FragmentPlan, Vec<FileRecord>), CheckpointError> {
    let tree = CheckpointTree::open(base)?;
    let plan = plan::plan(tree.contract(), fragments)?;
    let digest = plan.digest();
    let work = Digest::derive("quasar/v1/split", &[&tree.identity(), &digest.0]);
    let claim =
        Claim::new(out, Some(work), |name| name == CONTRACT_FILE || (0..fragments).any(|fragment| name == fragment_file(fragment)))?;
    let files = (0..plan.fragments.len()).into_par_iter().map(|fragment| write_fragment(&tree, &plan, &digest, fragment, out, &claim));
    let mut records = files.collect::<Result<Vec<FileRecord>, _>>()?;
    records.push(write_file(out, CONTRACT_FILE, &tree.contract().to_json())?);
    claim.finish()?;
    records.sort_by(|left, right| left.path.cmp(&right.path));
    Ok((plan, records))
}

fn write_fragment(
    tree: &CheckpointTree,
    plan: &FragmentPlan,
    digest: &Digest,
    fragment: usize,
    out: &Path,
    claim: &Claim,
) -> Result<FileRecord, CheckpointError> {
    let path = fragment_file(fragment);
    if let Some(record) = claim.complete(&path) {
        return Ok(record);
    }
    let slices = &plan.fragments[fragment];
    let fragments = plan.fragments.len().to_string();
    let metadata = [("fragment", fragment.to_string()), ("fragments", fragments), ("plan", digest.to_string())];
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
    let mut file = RecordedFile::create(out, &path)?;
    file.append(&safetensors_header::build(&metadata, entries))?;
    for slice in slices {
        let width = slice.dtype.bytes();
        file.append_with(slice.elements() * width, |bytes, at| tree.read_elements(slice, at / width, bytes))?;
    }
    let record = file.finish(&path)?;
    claim.note(&record)?;
    Ok(record)
}

pub(super) fn fragment_file(fragment: usize) -> String {
    format!("fragment-{fragment:03}.safetensors")
}
