use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use protocol::DType;
use tempfile::TempDir;

use super::*;
use crate::contract::{CONTRACT_FILE, ContractError, TensorSpec};
use crate::fixture::{safetensors_file, small_tensors, values, write_tree};
use crate::number::append_rounded;
use crate::{HeaderError, PlanError, plan, safetensors_header};

struct Folders {
    root: TempDir,
}

impl Folders {
    fn with_base(tensors: &[TensorSpec], shards: usize) -> Self {
        let folders = Self { root: TempDir::new().unwrap() };
        write_tree(&folders.path("base"), tensors, shards, 1);
        folders
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn open(&self) -> Result<CheckpointTree, CheckpointError> {
        CheckpointTree::open(&self.path("base"))
    }

    fn split(&self, fragments: usize) -> Result<protocol::FragmentPlan, CheckpointError> {
        split(&self.path("base"), fragments, &self.path("fragments"))
    }

    fn assemble(&self) -> Result<Assembled, CheckpointError> {
        assemble(&self.path("base"), &self.path("fragments"), &self.path("out"))
    }
}

fn spec(name: &str, shape: &[u64], dtype: DType) -> TensorSpec {
    TensorSpec { name: name.to_owned(), shape: shape.to_vec(), dtype }
}

/// Every file below `dir` with its bytes.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

fn assert_same_trees(base: &Path, out: &Path) {
    for (path, bytes) in files(base) {
        let written = out.join(path.strip_prefix(base).unwrap());
        assert!(fs::read(&written).unwrap() == bytes, "{} differs", written.display());
    }
}

/// Rewrites the base's only weight file with one tensor's values changed.
fn poison(folders: &Folders, tensors: &[TensorSpec], name: &str, element: usize) {
    let mut entries =
        safetensors_header::build(&[], tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype, tensor.shape.clone())));
    for tensor in tensors {
        let mut content = values(1, tensor.elements() as usize);
        if tensor.name == name {
            content[element] = f32::NAN;
        }
        append_rounded(tensor.dtype, &content, &mut entries);
    }
    fs::write(folders.path("base/model.safetensors"), entries).unwrap();
}

#[test]
fn split_then_assemble_gives_back_every_file_byte_for_byte() {
    for shards in [1, 3] {
        for fragments in [1, 5, 24] {
            let folders = Folders::with_base(&small_tensors(), shards);
            fs::create_dir_all(folders.path("base/extra")).unwrap();
            fs::write(folders.path("base/extra/note.txt"), b"kept").unwrap();
            let plan = folders.split(fragments).unwrap();
            assert_eq!(plan.fragments.len(), fragments);
            let assembled = folders.assemble().unwrap();
            assert_same_trees(&folders.path("base"), &folders.path("out"));
            assert_eq!(assembled.elements, folders.open().unwrap().contract().elements());
            let on_disk: Vec<PathBuf> = files(&folders.path("out"))
                .into_iter()
                .map(|(path, _)| path.strip_prefix(folders.path("out")).unwrap().to_owned())
                .collect();
            assert_eq!(assembled.files, on_disk);
            assert!(on_disk.contains(&PathBuf::from(CONTRACT_FILE)));
            assert_eq!(shards > 1, on_disk.contains(&PathBuf::from(INDEX_FILE)));
            CheckpointTree::open(&folders.path("out")).unwrap();
        }
    }
}

#[test]
fn assembling_from_the_values_of_a_tree_gives_the_tree_back() {
    let folders = Folders::with_base(&small_tensors(), 3);
    let tree = folders.open().unwrap();
    let plan = plan(tree.contract(), 24).unwrap();
    assemble_from(&tree, &plan, |fragment| tree.read_fragment(&plan, fragment), &folders.path("out")).unwrap();
    assert_same_trees(&folders.path("base"), &folders.path("out"));
}

#[test]
fn assembling_replaces_parameters_in_the_element_type_of_the_base_and_keeps_buffers() {
    let folders = Folders::with_base(&small_tensors(), 2);
    let tree = folders.open().unwrap();
    let plan = plan(tree.contract(), 7).unwrap();
    let replaced = |fragment: usize| -> Result<_, io::Error> { Ok(vec![fragment as f32 + 0.501; plan.elements(fragment) as usize]) };
    assemble_from(&tree, &plan, replaced, &folders.path("out")).unwrap();
    let out = CheckpointTree::open(&folders.path("out")).unwrap();
    assert_eq!(out.contract(), tree.contract());
    for (fragment, slices) in plan.fragments.iter().enumerate() {
        for slice in slices {
            let mut expected = Vec::new();
            append_rounded(slice.dtype, &vec![fragment as f32 + 0.501; slice.elements() as usize], &mut expected);
            assert_eq!(out.slice_bytes(slice).unwrap(), expected);
        }
    }
    for buffer in ["model.rotary_emb.inv_freq", "model.layers.2.mlp.gate.expert_bias"] {
        assert_eq!(out.read_tensor(buffer).unwrap(), tree.read_tensor(buffer).unwrap());
    }
}

#[test]
fn fragments_of_another_element_type_are_rounded_to_the_bases() {
    let folders = Folders::with_base(&[spec("w.weight", &[4, 2], DType::Bf16)], 1);
    fs::create_dir_all(folders.path("fragments")).unwrap();
    let mut bytes = safetensors_header::build(&[], [("w.weight@0", DType::F32, vec![4, 2])]);
    append_rounded(DType::F32, &[1.0, 1.001, -3.0, 0.1, 0.0, 5.0, 6.0, 7.0], &mut bytes);
    fs::write(folders.path("fragments/any.safetensors"), bytes).unwrap();
    folders.assemble().unwrap();
    let out = CheckpointTree::open(&folders.path("out")).unwrap();
    assert_eq!(out.read_tensor("w.weight").unwrap()[..3], [1.0, 1.0, -3.0]);
}

#[test]
fn the_safetensors_library_reads_fragments_and_assembled_shards() {
    let folders = Folders::with_base(&small_tensors(), 1);
    folders.split(3).unwrap();
    folders.assemble().unwrap();
    let fragment = fs::read(folders.path("fragments/fragment-001.safetensors")).unwrap();
    let fragment = safetensors::SafeTensors::deserialize(&fragment).unwrap();
    let expert = fragment.tensors().into_iter().find(|(name, _)| name.contains("experts_w12@")).unwrap();
    assert_eq!(expert.1.shape()[1..], [64, 48]);
    let shard = fs::read(folders.path("out/model.safetensors")).unwrap();
    assert_eq!(safetensors::SafeTensors::deserialize(&shard).unwrap().len(), small_tensors().len());
}

#[test]
fn a_fragment_that_is_missing_repeated_or_foreign_is_refused_and_nothing_is_written() {
    let folders = Folders::with_base(&small_tensors(), 1);
    folders.split(4).unwrap();
    let second = folders.path("fragments/fragment-001.safetensors");
    let copy = folders.path("fragments/fragment-009.safetensors");
    fs::copy(&second, &copy).unwrap();
    assert!(matches!(folders.assemble(), Err(CheckpointError::Plan(PlanError::Twice { .. }))));
    fs::remove_file(&copy).unwrap();
    fs::write(&copy, safetensors_file(&[spec("unknown.weight@0", &[2], DType::F32)], 1)).unwrap();
    assert!(matches!(folders.assemble(), Err(CheckpointError::FragmentTensor { .. })));
    for name in ["model.norm.weight", "model.norm.weight@x", "model.norm.weight@1", "model.rotary_emb.inv_freq@0"] {
        fs::write(&copy, safetensors_file(&[spec(name, &[64], DType::F32)], 1)).unwrap();
        assert!(matches!(folders.assemble(), Err(CheckpointError::FragmentTensor { .. })), "{name}");
    }
    fs::remove_file(&copy).unwrap();
    fs::remove_file(&second).unwrap();
    let error = folders.assemble().unwrap_err();
    assert!(matches!(error, CheckpointError::Plan(PlanError::Uncovered { .. })));
    assert!(error.to_string().contains("\nhint: "));
    assert!(!folders.path("out").exists());
}

#[test]
fn a_plan_with_a_gap_or_values_of_the_wrong_number_are_refused() {
    let folders = Folders::with_base(&small_tensors(), 1);
    let tree = folders.open().unwrap();
    let plan = plan(tree.contract(), 4).unwrap();
    let mut gap = plan.clone();
    gap.fragments.pop();
    let values = |fragment: usize| tree.read_fragment(&plan, fragment);
    let result = assemble_from(&tree, &gap, values, &folders.path("out"));
    assert!(matches!(result, Err(CheckpointError::Plan(PlanError::Uncovered { .. }))));
    let short = |fragment| values(fragment).map(|values| values[1..].to_vec());
    let result = assemble_from(&tree, &plan, short, &folders.path("out"));
    assert!(matches!(result, Err(CheckpointError::Values { fragment: 0, .. })));
    let failing = |_| Err::<Vec<f32>, _>(io::Error::other("the state file is gone"));
    let result = assemble_from(&tree, &plan, failing, &folders.path("out"));
    assert!(matches!(result, Err(CheckpointError::Source { fragment: 0, .. })));
    let infinite = |fragment| values(fragment).map(|values| vec![f32::INFINITY; values.len()]);
    let result = assemble_from(&tree, &plan, infinite, &folders.path("out"));
    assert!(matches!(result, Err(CheckpointError::NotFinite { .. })));
    let unnamed = files(&folders.path("out")).into_iter().all(|(path, _)| path.extension().unwrap() == "part");
    assert!(unnamed, "a failed attempt leaves no file under its final name");
    assert!(matches!(CheckpointTree::open(&folders.path("out")), Err(CheckpointError::Unfinished { .. })));
    assemble_from(&tree, &plan, values, &folders.path("out")).unwrap();
    assert_same_trees(&folders.path("base"), &folders.path("out"));
}

#[test]
fn a_folder_with_other_files_or_the_base_itself_is_not_written_to() {
    let folders = Folders::with_base(&small_tensors(), 1);
    let tree = folders.open().unwrap();
    let plan = plan(tree.contract(), 2).unwrap();
    let values = |fragment| tree.read_fragment(&plan, fragment);
    fs::create_dir_all(folders.path("out")).unwrap();
    fs::write(folders.path("out/thesis.txt"), b"precious").unwrap();
    assert!(matches!(assemble_from(&tree, &plan, values, &folders.path("out")), Err(CheckpointError::Occupied { .. })));
    assert!(matches!(split(tree.dir(), 2, &folders.path("out")), Err(CheckpointError::Occupied { .. })));
    assert!(matches!(assemble_from(&tree, &plan, values, tree.dir()), Err(CheckpointError::Occupied { .. })));
    assert!(matches!(split(tree.dir(), 2, tree.dir()), Err(CheckpointError::Occupied { .. })));
    let other = folders.path("other");
    write_tree(&other, &small_tensors(), 1, 99);
    assert!(
        matches!(assemble_from(&tree, &plan, values, &other), Err(CheckpointError::Occupied { .. })),
        "a finished tree is not replaced"
    );
}

#[test]
fn an_attempt_that_was_interrupted_between_renames_is_completed_by_the_next() {
    let folders = Folders::with_base(&small_tensors(), 2);
    folders.split(3).unwrap();
    folders.assemble().unwrap();
    for (dir, half_done) in [("fragments", "fragment-001.safetensors"), ("out", "model-00002-of-00002.safetensors")] {
        let dir = folders.path(dir);
        fs::rename(dir.join(half_done), dir.join(format!("{half_done}.part"))).unwrap();
        fs::remove_file(dir.join(CONTRACT_FILE)).unwrap();
        fs::write(dir.join(write::UNFINISHED), b"").unwrap();
    }
    assert!(matches!(folders.assemble(), Err(CheckpointError::Unfinished { .. })));
    folders.split(3).unwrap();
    folders.assemble().unwrap();
    assert_same_trees(&folders.path("base"), &folders.path("out"));
    assert!(!folders.path("out").join(write::UNFINISHED).exists());
}

#[test]
fn a_value_that_is_not_a_number_is_found_with_its_tensor_and_element() {
    let tensors = [spec("a.weight", &[3, 4], DType::Bf16), spec("b.weight", &[2], DType::F32)];
    let folders = Folders::with_base(&tensors, 1);
    poison(&folders, &tensors, "a.weight", 9);
    let error = folders.split(1).unwrap_err();
    assert!(matches!(&error, CheckpointError::NotFinite { tensor, element: 9 } if tensor == "a.weight"), "{error}");
    let tree = folders.open().unwrap();
    assert!(matches!(tree.read_tensor("a.weight"), Err(CheckpointError::NotFinite { element: 9, .. })));
    assert_eq!(tree.read_tensor("b.weight").unwrap(), values(1, 2));
    let slice = |row_start, row_end| protocol::Slice {
        row_start,
        row_end,
        unit_rows: row_end - row_start,
        ..plan(tree.contract(), 1).unwrap().fragments[0][0].clone()
    };
    assert!(tree.slice_bytes(&slice(0, 2)).is_ok());
    assert!(matches!(tree.slice_bytes(&slice(2, 3)), Err(CheckpointError::NotFinite { element: 9, .. })));
    assert!(matches!(tree.slice_bytes(&slice(2, 4)), Err(CheckpointError::Rows { .. })));
}

#[test]
fn damaged_trees_are_refused_when_they_are_opened() {
    let folders = Folders::with_base(&small_tensors(), 3);
    let shard = folders.path("base/model-00002-of-00003.safetensors");
    let good = fs::read(&shard).unwrap();
    fs::write(&shard, &good[..good.len() - 1]).unwrap();
    assert!(matches!(folders.open(), Err(CheckpointError::Header { source: HeaderError::Length { .. }, .. })));
    fs::write(&shard, &good[..6]).unwrap();
    assert!(matches!(folders.open(), Err(CheckpointError::Header { source: HeaderError::TooShort { .. }, .. })));
    fs::write(&shard, b"").unwrap();
    assert!(matches!(folders.open(), Err(CheckpointError::Header { source: HeaderError::TooShort { length: 0 }, .. })));
    fs::remove_file(&shard).unwrap();
    assert!(matches!(folders.open(), Err(CheckpointError::Read { .. })));
    fs::copy(folders.path("base/model-00001-of-00003.safetensors"), &shard).unwrap();
    assert!(folders.open().is_err());
    fs::write(&shard, &good).unwrap();
    folders.open().unwrap();
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_refused() {
    let folders = Folders::with_base(&small_tensors(), 2);
    let path = folders.path("base").join(INDEX_FILE);
    let good: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let open_with = |change: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let mut index = good.clone();
        change(index["weight_map"].as_object_mut().unwrap());
        fs::write(&path, index.to_string()).unwrap();
        folders.open().unwrap_err()
    };
    assert!(matches!(open_with(&|map| drop(map.remove("model.norm.weight"))), CheckpointError::Index { .. }));
    assert!(matches!(open_with(&|map| map.clear()), CheckpointError::Index { .. }));
    let absent = |map: &mut serde_json::Map<_, _>| drop(map.insert("absent".to_owned(), "model-00001-of-00002.safetensors".into()));
    assert!(matches!(open_with(&absent), CheckpointError::MissingTensor { .. }));
    for outside in ["../model.safetensors", "/etc/passwd", "shards/model.safetensors", "config.json", "..", ""] {
        let escape = |map: &mut serde_json::Map<_, _>| drop(map.insert("model.norm.weight".to_owned(), outside.into()));
        assert!(matches!(open_with(&escape), CheckpointError::Index { .. }), "{outside}");
    }
    fs::write(&path, b"[]").unwrap();
    assert!(matches!(folders.open(), Err(CheckpointError::Index { .. })));
}

#[test]
fn a_contract_file_that_does_not_match_the_weights_is_refused() {
    let tensors = [spec("a.weight", &[3, 4], DType::Bf16), spec("b.weight", &[2], DType::F32)];
    let folders = Folders::with_base(&tensors, 1);
    let good = folders.open().unwrap().contract().clone();
    let open_with = |tensors: Vec<TensorSpec>| {
        let contract = crate::Contract::new(tensors).unwrap();
        fs::write(folders.path("base").join(CONTRACT_FILE), contract.to_json()).unwrap();
        folders.open()
    };
    assert_eq!(open_with(tensors.to_vec()).unwrap().contract(), &good);
    assert!(matches!(open_with(vec![tensors[0].clone()]), Err(CheckpointError::NotInContract { .. })));
    assert!(matches!(open_with(vec![tensors[0].clone(), spec("c", &[2], DType::F32)]), Err(CheckpointError::MissingTensor { .. })));
    assert!(matches!(open_with(vec![tensors[0].clone(), spec("b.weight", &[3], DType::F32)]), Err(CheckpointError::Mismatch { .. })));
    assert!(matches!(open_with(vec![tensors[0].clone(), spec("b.weight", &[2], DType::F16)]), Err(CheckpointError::Mismatch { .. })));
    fs::write(folders.path("base").join(CONTRACT_FILE), b"{}").unwrap();
    assert!(matches!(folders.open(), Err(CheckpointError::Contract { source: ContractError::Json { .. }, .. })));
}

#[test]
fn a_single_file_of_any_name_is_a_tree_and_a_folder_without_weights_is_none() {
    let folders = Folders { root: TempDir::new().unwrap() };
    fs::create_dir_all(folders.path("base")).unwrap();
    assert!(matches!(folders.open(), Err(CheckpointError::NoWeights { .. })));
    fs::write(folders.path("base/weights.safetensors"), safetensors_file(&small_tensors(), 1)).unwrap();
    let tree = folders.open().unwrap();
    assert_eq!(tree.tensors().count(), small_tensors().len());
    assert_eq!(tree.tensors().count() - tree.contract().tensors.len(), 5);
    assert_eq!(tree.tensor("model.norm.weight").map(|tensor| tensor.shape), Some(vec![64]));
    fs::write(folders.path("base/second.safetensors"), safetensors_file(&small_tensors(), 1)).unwrap();
    assert!(matches!(folders.open(), Err(CheckpointError::NoWeights { .. })));
    let absent = CheckpointTree::open(&folders.path("absent")).unwrap_err();
    assert!(absent.to_string().contains("\nhint: "));
}

#[test]
fn left_overs_stale_weights_and_signed_documents_of_the_base_are_not_copied() {
    let folders = Folders::with_base(&small_tensors(), 2);
    for name in ["pytorch_model.bin", "manifest.qsr", "consolidated.safetensors", ".hidden", "notes.part"] {
        fs::write(folders.path("base").join(name), b"x").unwrap();
    }
    folders.split(2).unwrap();
    let assembled = folders.assemble().unwrap();
    let names: Vec<&str> = assembled.files.iter().filter_map(|file| file.to_str()).collect();
    assert_eq!(
        names,
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            INDEX_FILE,
            CONTRACT_FILE,
            "tokenizer.json"
        ]
    );
}

#[test]
fn a_full_disk_has_its_own_error() {
    let error = CheckpointError::write(Path::new("/release"))(io::Error::from(io::ErrorKind::StorageFull));
    assert!(matches!(error, CheckpointError::DiskFull { .. }));
    let error = CheckpointError::write(Path::new("/release"))(io::Error::from(io::ErrorKind::PermissionDenied));
    assert!(matches!(error, CheckpointError::Write { .. }));
}

/// The reference vectors of the architecture; several megabytes, so they are not part of this repository.
#[test]
fn the_golden_model_survives_split_and_assembly_where_it_is_at_hand() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/golden_model.safetensors");
    if !golden.exists() {
        return;
    }
    let folders = Folders { root: TempDir::new().unwrap() };
    fs::create_dir_all(folders.path("base")).unwrap();
    fs::copy(&golden, folders.path("base/model.safetensors")).unwrap();
    let plan = folders.split(24).unwrap();
    let bytes: Vec<u64> = plan.fragments.iter().map(|slices| plan::fragment_bytes(slices)).collect();
    let mean = bytes.iter().sum::<u64>() as f64 / 24.0;
    assert!(bytes.iter().all(|bytes| *bytes as f64 <= 1.01 * mean), "{bytes:?}");
    folders.assemble().unwrap();
    assert_same_trees(&folders.path("base"), &folders.path("out"));
    assert_eq!(folders.open().unwrap().contract().tensors.len(), 177);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_small_model_survives_split_and_assembly(
        shapes in proptest::collection::vec((proptest::collection::vec(1u64..7, 0..4), 0usize..3), 2..12),
        fragments in 1usize..6,
        shards in 1usize..4,
    ) {
        let dtypes = [DType::F32, DType::Bf16, DType::F16];
        let tensors: Vec<TensorSpec> = shapes.iter().enumerate().map(|(index, (shape, dtype))| spec(&format!("t{index}"), shape, dtypes[*dtype])).collect();
        let folders = Folders::with_base(&tensors, shards);
        if folders.split(fragments).is_ok() {
            folders.assemble().unwrap();
            assert_same_trees(&folders.path("base"), &folders.path("out"));
        }
    }
}

/// States of version 3 of `fragments` fragments of the base, in `states`.
fn states(folders: &Folders, fragments: usize) -> (CheckpointTree, protocol::FragmentPlan, Vec<protocol::FileRecord>) {
    let tree = folders.open().unwrap();
    let plan = plan(tree.contract(), fragments).unwrap();
    let records = split_states(&tree, &plan, 3, &folders.path("states")).unwrap();
    (tree, plan, records)
}

fn state_header(plan: &protocol::FragmentPlan, fragment: usize) -> crate::state::StateHeader {
    let (digest, elements) = (plan.digest(), plan.elements(fragment));
    crate::state::StateHeader { plan: digest, fragment: fragment as u64, version: 3, elements, momentum: false }
}

fn open_states(folders: &Folders, plan: &protocol::FragmentPlan) -> Result<Vec<StateFile>, CheckpointError> {
    let open = |fragment| StateFile::open(&folders.path("states").join(state_file(fragment)), &state_header(plan, fragment));
    (0..plan.fragments.len()).map(open).collect()
}

#[test]
fn states_cut_from_a_tree_are_new_fragment_states_and_assemble_to_the_tree() {
    for shards in [1, 3] {
        let folders = Folders::with_base(&small_tensors(), shards);
        let (tree, plan, records) = states(&folders, 5);
        for (fragment, record) in records.iter().enumerate() {
            let expected = crate::state::FragmentState::new(tree.read_fragment(&plan, fragment).unwrap(), false);
            let bytes = fs::read(folders.path("states").join(&record.path)).unwrap();
            assert!(bytes == expected.to_bytes(&state_header(&plan, fragment)).unwrap());
        }
        let assembled = assemble_states(&tree, &plan, &open_states(&folders, &plan).unwrap(), &folders.path("out")).unwrap();
        assert_same_trees(&folders.path("base"), &folders.path("out"));
        assert_eq!(assembled.elements, tree.contract().elements());
    }
}

#[test]
fn records_taken_while_writing_describe_the_files() {
    let folders = Folders::with_base(&[spec("w.weight", &[3, 1 << 20], DType::Bf16), spec("v", &[5], DType::F32)], 1);
    let described = |dir: &str, records: &[protocol::FileRecord]| {
        for record in records {
            assert_eq!(*record, protocol::FileRecord::of_file(record.path.clone(), &folders.path(dir).join(&record.path)).unwrap());
        }
    };
    let (_, records) = split_recorded(&folders.path("base"), 2, &folders.path("fragments")).unwrap();
    assert_eq!(records.len(), 3);
    described("fragments", &records);
    let assembled = folders.assemble().unwrap();
    let paths: Vec<PathBuf> = assembled.records.iter().map(|record| PathBuf::from(&record.path)).collect();
    assert_eq!(paths, assembled.files);
    described("out", &assembled.records);
    let (_, _, records) = states(&folders, 2);
    described("states", &records);
}

#[test]
fn an_interrupted_assembly_keeps_what_was_complete_unless_what_goes_into_it_has_changed() {
    use std::os::unix::fs::MetadataExt;
    let folders = Folders::with_base(&small_tensors(), 3);
    let (tree, plan, _) = states(&folders, 4);
    let out = folders.path("out");
    let whole = assemble_states(&tree, &plan, &open_states(&folders, &plan).unwrap(), &out).unwrap();
    let (first, second) = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors");
    let number = |name: &str| fs::metadata(out.join(name)).unwrap().ino();
    // As an attempt leaves it that ended after the first shard.
    let interrupt = |folder: &Path, work: &str| {
        let record = whole.records.iter().find(|record| record.path == first).unwrap();
        fs::write(folder.join(write::UNFINISHED), format!("{work}\n{}\n{{\"torn", serde_json::to_string(record).unwrap())).unwrap();
    };
    // The name of the work, from an attempt that fails at its last shard.
    let mut poisoned = tree.read_fragment(&plan, 0).unwrap();
    poisoned.fill(f32::MAX);
    let work = {
        let header = state_header(&plan, 0);
        let path = folders.path("states").join(state_file(0));
        let good = fs::read(&path).unwrap();
        fs::write(&path, crate::state::FragmentState::new(poisoned, false).to_bytes(&header).unwrap()).unwrap();
        let failed = assemble_states(&tree, &plan, &open_states(&folders, &plan).unwrap(), &folders.path("failed"));
        assert!(matches!(failed, Err(CheckpointError::NotFinite { .. })), "the largest f32 is no bf16");
        fs::write(&path, good).unwrap();
        let marker = fs::read_to_string(folders.path("failed").join(write::UNFINISHED)).unwrap();
        marker.lines().next().unwrap().to_owned()
    };
    let before = (number(first), number(second));
    interrupt(&out, &work);
    assemble_states(&tree, &plan, &open_states(&folders, &plan).unwrap(), &out).unwrap();
    assert!(number(first) != before.0 && number(second) != before.1, "other states: written again");
    assert_same_trees(&folders.path("base"), &out);
    // The same work: learn its name from a marker that was just written.
    let states = open_states(&folders, &plan).unwrap();
    let marker = folders.path("blocked");
    fs::create_dir_all(marker.join("model-00003-of-00003.safetensors.part")).unwrap();
    fs::write(marker.join(write::UNFINISHED), "").unwrap();
    assert!(assemble_states(&tree, &plan, &states, &marker).is_err(), "a folder stands where a file has to be");
    let work = fs::read_to_string(marker.join(write::UNFINISHED)).unwrap().lines().next().unwrap().to_owned();
    let before = (number(first), number(second));
    interrupt(&out, &work);
    let again = assemble_states(&tree, &plan, &states, &out).unwrap();
    assert!(number(first) == before.0 && number(second) != before.1, "the same states: only what is missing");
    assert_eq!(again, whole);
    assert_same_trees(&folders.path("base"), &out);
}

#[test]
fn states_that_are_damaged_missing_or_of_another_plan_are_refused_and_nothing_is_written() {
    let folders = Folders::with_base(&small_tensors(), 1);
    let (tree, plan, _) = states(&folders, 3);
    let out = folders.path("out");
    let mut swapped = open_states(&folders, &plan).unwrap();
    swapped.swap(0, 1);
    assert!(matches!(assemble_states(&tree, &plan, &swapped, &out), Err(CheckpointError::StateOrder { fragment: 0 })));
    swapped.swap(0, 1);
    swapped.pop();
    assert!(matches!(assemble_states(&tree, &plan, &swapped, &out), Err(CheckpointError::StateOrder { fragment: 2 })));
    let path = folders.path("states").join(state_file(1));
    let good = fs::read(&path).unwrap();
    let mut damaged = good.clone();
    damaged[500] ^= 1;
    fs::write(&path, &damaged).unwrap();
    let error = assemble_states(&tree, &plan, &open_states(&folders, &plan).unwrap(), &out).unwrap_err();
    assert!(matches!(error, CheckpointError::State { source: crate::state::StateError::Digest, .. }), "{error}");
    fs::write(&path, &good[1..]).unwrap();
    assert!(matches!(open_states(&folders, &plan), Err(CheckpointError::State { .. })));
    damaged.copy_from_slice(&good);
    damaged[9] ^= 1;
    fs::write(&path, &damaged).unwrap();
    assert!(matches!(open_states(&folders, &plan), Err(CheckpointError::State { source: crate::state::StateError::Header, .. })));
    assert!(!out.exists());
}
