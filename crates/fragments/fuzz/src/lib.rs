//! What every decoder must hold for any bytes. Used by the fuzz targets beside this file and by `tests/mutations.rs`.
//!
//! A target decodes the bytes as a file of one fixed, small run, and checks what was accepted. Payload, frame and state targets take
//! both whole files and bodies: a body gets the right header, so that damage behind it is reached.

use protocol::documents::Codec;
use protocol::{DType, Digest, FragmentPlan, MergeRule, Slice};
use quasar_fragments as fragments;

use fragments::codec::{self, PayloadHeader};
use fragments::contract::TensorSpec;
use fragments::feedback::ErrorFeedback;
use fragments::keyframe::{self, KeyframeId};
use fragments::merge::{Offer, merge_payloads, payload_norms};
use fragments::state::{FragmentState, StateHeader};
use fragments::{CheckpointTree, Contract, delta};

/// Name, check, and good inputs.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// Name, and whether the good inputs are accepted.
pub type Acceptance = (&'static str, fn() -> bool);

pub fn all() -> Vec<Target> {
    vec![
        ("bf16", bf16, || payload_seeds(Codec::Bf16)),
        ("int4", int4, || payload_seeds(Codec::Int4)),
        ("topk", topk, || payload_seeds(Codec::TopK)),
        ("frame", frame, || vec![good_frame().bytes]),
        ("keyframe", read_keyframe, || vec![good_frame().keyframe]),
        ("state", state, || vec![good_state()]),
        ("checkpoint", checkpoint, || vec![good_checkpoint()]),
        ("contract", contract, || vec![small_contract().to_json()]),
        ("index", index, || vec![GOOD_INDEX.to_vec()]),
        ("plan", fragment_plan, || vec![protocol::codec::encode(&plan())]),
        ("fragment", fragment_file, || vec![good_fragment_file()]),
    ]
}

/// That the good inputs are good: a target that refuses everything would prove nothing.
pub fn accepting() -> Vec<Acceptance> {
    vec![
        ("payloads", || {
            [Codec::Bf16, Codec::Int4, Codec::TopK]
                .into_iter()
                .all(|codec| payload_seeds(codec).iter().all(|bytes| codec::check(bytes, &header(codec)).is_ok()))
        }),
        ("frame", || {
            let frame = good_frame();
            delta::apply(&plan(), &id(), &replica(), &frame.bytes, &Digest::blake3(&frame.keyframe)).is_ok()
        }),
        ("keyframe", || keyframe::read(&plan(), &next(), &good_frame().keyframe).is_ok()),
        ("state", || FragmentState::from_bytes(&good_state(), &state_header()).is_ok()),
        ("contract", || Contract::from_json(&small_contract().to_json()).is_ok()),
        ("index", || open_sharded(GOOD_INDEX).is_some_and(|(_, tree)| tree.tensors().count() == 4)),
        ("plan", || fragments::plan::check(&plan(), &small_contract()).is_ok()),
        ("fragment", || assemble_with(&good_fragment_file()).is_some()),
    ]
}

pub fn bf16(bytes: &[u8]) {
    payload(Codec::Bf16, bytes);
}

pub fn int4(bytes: &[u8]) {
    payload(Codec::Int4, bytes);
}

pub fn topk(bytes: &[u8]) {
    payload(Codec::TopK, bytes);
}

fn payload(codec: Codec, bytes: &[u8]) {
    let header = header(codec);
    decode(&header, bytes);
    // The same bytes as a body: cut or filled to its length.
    let length = header.payload_bytes() as usize - codec::HEADER_BYTES;
    let mut whole = header.to_bytes().to_vec();
    let body = bytes.get(codec::HEADER_BYTES..).unwrap_or(bytes);
    whole.extend(body.iter().copied().chain(std::iter::repeat(0)).take(length));
    decode(&header, &whole);
}

fn decode(header: &PayloadHeader, bytes: &[u8]) {
    let decoded = codec::decode(bytes, header);
    let offer = Offer { header, payload: &bytes, weight: 1, unit_weights: None };
    match decoded {
        Ok(values) => {
            assert_eq!(values.len() as u64, header.elements());
            assert!(values.iter().all(|value| value.is_finite()));
            assert!(codec::check(&bytes, header).is_ok());
            assert!(payload_norms(header, &bytes).is_ok_and(|norms| norms.iter().all(|norm| norm.is_finite())));
            // What is accepted can be written again, to the same values.
            if header.codec() != Codec::TopK {
                let again = codec::encode(header, &values).and_then(|again| codec::decode(&again, header));
                assert!(again.is_ok_and(|again| close(&again, &values)));
            }
            let merged = merge_payloads(&slices(), &[offer]);
            // What is vanishing counts as zero.
            let lively = |(merged, value): (&f32, &f32)| value.abs() < 1e-30 || (merged - value).abs() <= 1e-6 * value.abs();
            assert!(merged.is_ok_and(|merged| merged.delta.iter().zip(&values).all(lively)));
            let mut feedback = ErrorFeedback::new(values.len(), 1.0);
            assert!(feedback.give_back(header, bytes).is_ok() && close(feedback.residual(), &values));
        }
        Err(error) => {
            assert_eq!(codec::check(&bytes, header).err().map(|error| error.to_string()), Some(error.to_string()));
            assert!(merge_payloads(&slices(), &[offer]).is_err());
            let mut feedback = ErrorFeedback::new(header.elements() as usize, 1.0);
            assert!(feedback.give_back(header, bytes).is_err() && feedback.residual().iter().all(|value| *value == 0.0));
        }
    }
}

fn close(left: &[f32], right: &[f32]) -> bool {
    left.iter().zip(right).all(|(left, right)| (left - right).abs() <= 1e-6 * right.abs())
}

pub fn frame(bytes: &[u8]) {
    let good = good_frame();
    let result = Digest::blake3(&good.keyframe);
    if let Ok(values) = delta::apply(&plan(), &id(), &replica(), bytes, &result) {
        assert_eq!(values, good.replica, "a frame that leads to the digest leads to the version");
    }
}

pub fn read_keyframe(bytes: &[u8]) {
    if let Ok(values) = keyframe::read(&plan(), &next(), bytes) {
        assert!(values.iter().all(|value| value.is_finite()));
        assert!(keyframe::write(&plan(), &next(), &values).is_ok_and(|again| again == bytes));
    }
}

pub fn state(bytes: &[u8]) {
    let read = |bytes: &[u8]| {
        if let Ok(state) = FragmentState::from_bytes(bytes, &state_header()) {
            assert!(state.to_bytes(&state_header()).is_ok_and(|again| again == bytes));
        }
    };
    read(bytes);
    // With the right digest behind it, so that damage before it is reached.
    if let Some(content) = bytes.len().checked_sub(32).map(|end| &bytes[..end]) {
        read(&[content, &Digest::blake3(content).0].concat());
    }
}

/// A checkpoint file is opened from a folder, so this target writes one.
pub fn checkpoint(bytes: &[u8]) {
    let Ok(folder) = tempfile::tempdir() else { return };
    if std::fs::write(folder.path().join("model.safetensors"), bytes).is_err() {
        return;
    }
    let Ok(tree) = CheckpointTree::open(folder.path()) else { return };
    for tensor in tree.tensors() {
        if let Ok(values) = tree.read_tensor(&tensor.name) {
            assert_eq!(values.len() as u64, tensor.elements());
        }
    }
    if let Ok(plan) = fragments::plan(tree.contract(), 2) {
        assert!(fragments::plan::check(&plan, tree.contract()).is_ok());
    }
}

/// The index of a tree of two shards.
pub fn index(bytes: &[u8]) {
    let Some((folder, tree)) = open_sharded(bytes) else { return };
    for file in tree.weight_files() {
        assert!(folder.path().join(file).parent() == Some(folder.path()), "a shard lies beside its index");
    }
    for tensor in tree.tensors() {
        assert!(tree.read_tensor(&tensor.name).is_ok_and(|values| values.len() as u64 == tensor.elements()));
    }
}

const GOOD_INDEX: &[u8] = br#"{"metadata":{"total_size":192},"weight_map":{"lm_head.weight":"b.safetensors","norm.weight":"b.safetensors","x.lm_head.weight":"a.safetensors","x.norm.weight":"a.safetensors"}}"#;

fn open_sharded(index: &[u8]) -> Option<(tempfile::TempDir, CheckpointTree)> {
    let folder = tempfile::tempdir().ok()?;
    for (name, prefix) in [("a", "x."), ("b", "")] {
        std::fs::write(folder.path().join(name).with_extension("safetensors"), checkpoint_file(prefix)).ok()?;
    }
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).ok()?;
    let tree = CheckpointTree::open(folder.path()).ok()?;
    Some((folder, tree))
}

/// A plan, as it stands in the bucket.
pub fn fragment_plan(bytes: &[u8]) {
    let Ok(plan) = protocol::codec::decode::<FragmentPlan>(bytes, 1 << 16) else { return };
    let contract = small_contract();
    if fragments::plan::check(&plan, &contract).is_err() {
        return;
    }
    let elements = (0..plan.fragments.len()).map(|fragment| plan.elements(fragment));
    assert_eq!(elements.sum::<u64>(), contract.elements(), "every element is in one fragment");
    for (fragment, slices) in plan.fragments.iter().enumerate() {
        let header = PayloadHeader::new(Codec::Int4, &plan, plan.digest(), fragment, 0);
        let values = vec![0.5; header.elements() as usize];
        let payload = codec::encode(&header, &values).expect("the plan is good");
        let payload: &[u8] = &payload;
        // Units that are not whole are refused.
        let _ = merge_payloads(slices, &[Offer { header: &header, payload: &payload, weight: 1, unit_weights: None }]);
    }
}

/// One of the two fragment files that a tree is assembled from.
pub fn fragment_file(bytes: &[u8]) {
    let Some(out) = assemble_with(bytes) else { return };
    let (tree, base) = (CheckpointTree::open(out.path()).expect("assembled"), base_tree());
    assert!(tree.check_contract(base.contract()).is_ok());
    for tensor in tree.tensors() {
        assert!(tree.read_tensor(&tensor.name).is_ok_and(|values| values.iter().all(|value| value.is_finite())));
    }
}

/// A tree and its fragments, made once.
fn base_folder() -> &'static std::path::Path {
    static FOLDER: std::sync::OnceLock<tempfile::TempDir> = std::sync::OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let tree = folder.path().join("tree");
        std::fs::create_dir(&tree).expect("a folder");
        std::fs::write(tree.join("model.safetensors"), good_checkpoint()).expect("a file");
        fragments::checkpoint::split(&tree, 2, &folder.path().join("fragments")).expect("a good tree");
        folder
    });
    folder.path()
}

fn base_tree() -> CheckpointTree {
    CheckpointTree::open(&base_folder().join("tree")).expect("a good tree")
}

fn good_fragment_file() -> Vec<u8> {
    std::fs::read(base_folder().join("fragments/fragment-000.safetensors")).expect("split")
}

/// The tree that these bytes and the other fragment's file give.
fn assemble_with(bytes: &[u8]) -> Option<tempfile::TempDir> {
    let (given, out) = (tempfile::tempdir().ok()?, tempfile::tempdir().ok()?);
    for file in ["fragment-001.safetensors", fragments::contract::CONTRACT_FILE] {
        std::fs::copy(base_folder().join("fragments").join(file), given.path().join(file)).ok()?;
    }
    std::fs::write(given.path().join("fragment-000.safetensors"), bytes).ok()?;
    fragments::checkpoint::assemble(&base_folder().join("tree"), given.path(), out.path()).ok()?;
    Some(out)
}

pub fn contract(bytes: &[u8]) {
    if let Ok(contract) = Contract::from_json(bytes) {
        assert!(Contract::from_json(&contract.to_json()).is_ok_and(|again| again == contract));
        if let Ok(plan) = fragments::plan(&contract, 3) {
            assert!(fragments::plan::check(&plan, &contract).is_ok());
        }
    }
}

fn slices() -> Vec<Slice> {
    let slice = |tensor: &str, rows, row_elements, unit_rows| {
        let (tensor, dtype) = (tensor.to_owned(), DType::Bf16);
        Slice { tensor, row_start: 0, row_end: rows, row_elements, unit_rows, dtype, rule: MergeRule::Rda }
    };
    vec![slice("a", 2, 300, 1), slice("b", 1, 1, 1), slice("c", 1, 4096 + 130, 1)]
}

fn header(codec: Codec) -> PayloadHeader {
    PayloadHeader::of_slices(codec, &slices(), Digest::ZERO, 1, 2)
}

fn values(count: usize, step: f32) -> Vec<f32> {
    (0..count).map(|index| step * ((index * 7919 % 2003) as f32 - 1001.0)).collect()
}

fn payload_seeds(codec: Codec) -> Vec<Vec<u8>> {
    let header = header(codec);
    let count = header.elements() as usize;
    let mut sparse = values(count, 1e-3);
    sparse.iter_mut().enumerate().filter(|(index, _)| index % 400 > 1).for_each(|(_, value)| *value = 0.0);
    let inputs = [values(count, 1e-3), vec![0.0; count], sparse];
    inputs.iter().filter_map(|values| codec::encode(&header, values).ok()).collect()
}

fn small_contract() -> Contract {
    let spec = |name: &str, shape: &[u64], dtype| TensorSpec { name: name.to_owned(), shape: shape.to_vec(), dtype };
    let tensors = vec![
        spec("lm_head.weight", &[40, 16], DType::Bf16),
        spec("mlp.experts_w3", &[4, 5, 16], DType::F16),
        spec("norm.weight", &[16], DType::F32),
    ];
    Contract::new(tensors).expect("a good contract")
}

fn plan() -> FragmentPlan {
    fragments::plan(&small_contract(), 2).expect("a good plan")
}

fn id() -> KeyframeId {
    KeyframeId { plan: plan().digest(), fragment: 0, version: 4 }
}

fn next() -> KeyframeId {
    KeyframeId { version: 5, ..id() }
}

fn elements() -> usize {
    plan().elements(0) as usize
}

fn replica() -> Vec<f32> {
    let keyframe = keyframe::write(&plan(), &id(), &values(elements(), 1e-3)).expect("a good keyframe");
    keyframe::read(&plan(), &id(), &keyframe).expect("a good keyframe")
}

fn good_frame() -> delta::Frame {
    delta::write(&plan(), &id(), &replica(), &values(elements(), 1.01e-3)).expect("a good frame")
}

fn state_header() -> StateHeader {
    StateHeader { plan: plan().digest(), fragment: 0, version: 5, elements: elements() as u64, momentum: true }
}

fn good_state() -> Vec<u8> {
    FragmentState::new(values(elements(), 1e-3), true).to_bytes(&state_header()).expect("a good state")
}

fn good_checkpoint() -> Vec<u8> {
    checkpoint_file("")
}

/// A safetensors file whose tensors have names that begin so.
fn checkpoint_file(prefix: &str) -> Vec<u8> {
    let header = format!(
        r#"{{"{prefix}lm_head.weight":{{"dtype":"BF16","shape":[4,8],"data_offsets":[0,64]}},"{prefix}norm.weight":{{"dtype":"F32","shape":[8],"data_offsets":[64,96]}}}}"#
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0x12; 96]);
    bytes
}
