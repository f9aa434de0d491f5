//! The fragment plan: slices of near-equal size dealt to fragments so that every fragment weighs the same.
//!
//! The unit is a range of rows of one tensor. Matrices and fused expert tensors that are heavier than a block are cut
//! into row blocks (fused experts therefore only at expert boundaries); scalars and vectors stay whole. The blocks are
//! dealt by greedy longest-processing-time packing: heaviest first, each to the lightest fragment. Ties are broken by
//! tensor name and row, then by fragment number, so all parties derive the same plan from the same contract
//! (balanced tensor fragmentation of Decoupled DiLoCo, arXiv 2604.21428, over slices instead of whole tensors).
//!
//! The block size is the largest that balances: it is halved until the heaviest fragment exceeds the mean by at most a
//! thousandth (in small models: 4 KiB, but at most a hundredth), so that tensors are cut no finer than balance needs.
//! A matrix that stays whole is one merge unit.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use protocol::{FragmentPlan, MergeRule, Slice};

use crate::contract::{Contract, TensorSpec};

/// Most fragments of a plan.
pub const FRAGMENTS_MAX: usize = 4096;

/// Most slices of a plan: keeps the encoded plan under the 4 MiB that its envelope may have.
pub const SLICES_MAX: usize = 24_576;

/// Excess of the heaviest fragment over the mean that never matters, as long as it is under a hundredth of the mean.
const EXCESS_BYTES: u64 = 4096;

/// The finest block is a fragment's share divided by two to this power.
const HALVINGS_MAX: u32 = 10;

/// Why there is no plan, or why a given plan is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    #[error("{fragments} fragments were asked for\nhint: choose 1 to {FRAGMENTS_MAX}; 24 is usual")]
    Fragments { fragments: usize },
    #[error("the model cannot be cut into {fragments} fragments that all hold something\nhint: choose fewer fragments")]
    TooManyFragments { fragments: usize },
    #[error("the contract would need more than {SLICES_MAX} slices")]
    TooManySlices,
    #[error("fragment {fragment} holds no slice")]
    EmptyFragment { fragment: usize },
    #[error("fragment {fragment}: `{tensor}` from row {row_start} is out of order\nhint: slices must ascend by tensor name and row")]
    Order { fragment: usize, tensor: String, row_start: u64 },
    #[error("the plan names `{tensor}`, which is not in the contract\nhint: plan and checkpoint belong to different models")]
    Unknown { tensor: String },
    #[error(
        "the plan's slice of `{tensor}` from row {row_start} does not fit the contract\nhint: plan and checkpoint belong to different models"
    )]
    Slice { tensor: String, row_start: u64 },
    #[error("row {row} of `{tensor}` is in no fragment\nhint: plan and checkpoint belong to different models")]
    Uncovered { tensor: String, row: u64 },
    #[error("row {row} of `{tensor}` is in two slices")]
    Twice { tensor: String, row: u64 },
}

/// Cuts the parameters of `contract` into `fragments` fragments of near-equal bytes (in the contract's element types).
pub fn plan(contract: &Contract, fragments: usize) -> Result<FragmentPlan, PlanError> {
    if fragments == 0 || fragments > FRAGMENTS_MAX {
        return Err(PlanError::Fragments { fragments });
    }
    if contract.tensors.len() > SLICES_MAX {
        return Err(PlanError::TooManySlices);
    }
    let total: u64 = contract.tensors.iter().map(TensorSpec::bytes).sum();
    let share = total.div_ceil(fragments as u64);
    let mean = total / fragments as u64;
    let excess = (mean / 1000).max(EXCESS_BYTES.min(mean / 100));
    let mut best: Option<Packing> = None;
    let single_rows = 1;
    for block_bytes in (0..=HALVINGS_MAX).map(|halvings| (share >> halvings).max(1)).chain([single_rows]) {
        let Some(packing) = Packing::pack(contract, fragments, block_bytes) else { continue };
        let balanced = u128::from(packing.heaviest) * fragments as u128 <= u128::from(total) + u128::from(excess) * fragments as u128;
        if best.as_ref().is_none_or(|best| packing.heaviest < best.heaviest) {
            best = Some(packing);
        }
        if balanced {
            break;
        }
    }
    best.map(|packing| packing.into_plan(contract)).ok_or(PlanError::TooManyFragments { fragments })
}

/// Rows `[row_start, row_end)` of tensor number `tensor` of the contract.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    tensor: usize,
    row_start: u64,
    row_end: u64,
}

struct Packing {
    fragments: Vec<Vec<Piece>>,
    /// Bytes of the heaviest fragment.
    heaviest: u64,
}

impl Packing {
    /// Deals blocks of at most `block_bytes` (but at least a row); `None` if a fragment stays empty or there are too
    /// many blocks.
    fn pack(contract: &Contract, fragments: usize, block_bytes: u64) -> Option<Self> {
        let mut pieces = Vec::new();
        for (index, tensor) in contract.tensors.iter().enumerate() {
            let blocks = block_count(tensor, block_bytes);
            if pieces.len() as u64 + blocks > SLICES_MAX as u64 {
                return None;
            }
            let rows = u128::from(tensor.rows());
            let row = |block: u64| (u128::from(block) * rows / u128::from(blocks)) as u64;
            let row_bytes = tensor.row_elements() * tensor.dtype.bytes();
            pieces.extend((0..blocks).map(|block| {
                let piece = Piece { tensor: index, row_start: row(block), row_end: row(block + 1) };
                ((piece.row_end - piece.row_start) * row_bytes, piece)
            }));
        }
        if pieces.len() < fragments {
            return None;
        }
        pieces.sort_by_key(|(bytes, piece)| (Reverse(*bytes), *piece));
        let mut dealt = vec![Vec::new(); fragments];
        let mut lightest: BinaryHeap<Reverse<(u64, usize)>> = (0..fragments).map(|index| Reverse((0, index))).collect();
        let mut heaviest = 0;
        for (bytes, piece) in pieces {
            let Reverse((load, fragment)) = lightest.pop()?;
            dealt[fragment].push(piece);
            heaviest = heaviest.max(load + bytes);
            lightest.push(Reverse((load + bytes, fragment)));
        }
        Some(Self { fragments: dealt, heaviest })
    }

    fn into_plan(self, contract: &Contract) -> FragmentPlan {
        let fragments = self.fragments.into_iter().map(|mut pieces| {
            // Tensors are numbered by name, so this is the canonical (tensor name, first row) order.
            pieces.sort();
            let mut joined: Vec<Piece> = Vec::with_capacity(pieces.len());
            for piece in pieces {
                match joined.last_mut() {
                    Some(last) if last.tensor == piece.tensor && last.row_end == piece.row_start => last.row_end = piece.row_end,
                    _ => joined.push(piece),
                }
            }
            joined.iter().map(|piece| slice(&contract.tensors[piece.tensor], piece.row_start, piece.row_end)).collect()
        });
        FragmentPlan { fragments: fragments.collect() }
    }
}

fn block_count(tensor: &TensorSpec, block_bytes: u64) -> u64 {
    if tensor.shape.len() < 2 || tensor.bytes() <= block_bytes {
        return 1;
    }
    let row_bytes = tensor.row_elements() * tensor.dtype.bytes();
    tensor.rows().div_ceil((block_bytes / row_bytes).max(1))
}

/// The slice of `tensor` over rows `[row_start, row_end)`, with the merge rule and unit that its kind has.
fn slice(tensor: &TensorSpec, row_start: u64, row_end: u64) -> Slice {
    Slice {
        tensor: tensor.name.clone(),
        row_start,
        row_end,
        row_elements: tensor.row_elements(),
        unit_rows: if tensor.shape.len() > 2 { 1 } else { row_end - row_start },
        dtype: tensor.dtype,
        rule: merge_rule(tensor),
    }
}

/// Weighted mean for embeddings (input and output), routers, norms and every other scalar or vector; radial-directional
/// averaging for matrices and fused experts.
pub fn merge_rule(tensor: &TensorSpec) -> MergeRule {
    const MEAN: [&str; 4] = ["word_embeddings.weight", "embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"];
    let is = |name: &str| tensor.name.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    if tensor.shape.len() < 2 || MEAN.into_iter().any(is) { MergeRule::Mean } else { MergeRule::Rda }
}

/// Checks a plan that came from elsewhere: canonical order, every row of every parameter of `contract` in exactly one
/// slice, and each slice with the element type, rule and unit that [`plan`] would give it.
pub fn check(plan: &FragmentPlan, contract: &Contract) -> Result<(), PlanError> {
    if plan.fragments.is_empty() || plan.fragments.len() > FRAGMENTS_MAX {
        return Err(PlanError::Fragments { fragments: plan.fragments.len() });
    }
    let mut covered: BTreeMap<&str, Vec<(u64, u64)>> = BTreeMap::new();
    for (fragment, slices) in plan.fragments.iter().enumerate() {
        if slices.is_empty() {
            return Err(PlanError::EmptyFragment { fragment });
        }
        for (index, found) in slices.iter().enumerate() {
            let (tensor, row_start) = (&found.tensor, found.row_start);
            if index > 0 && (&slices[index - 1].tensor, slices[index - 1].row_start) >= (tensor, row_start) {
                return Err(PlanError::Order { fragment, tensor: tensor.clone(), row_start });
            }
            let spec = contract.get(tensor).ok_or_else(|| PlanError::Unknown { tensor: tensor.clone() })?;
            let in_range = row_start < found.row_end && found.row_end <= spec.rows();
            if !in_range || *found != slice(spec, row_start, found.row_end) {
                return Err(PlanError::Slice { tensor: tensor.clone(), row_start });
            }
            covered.entry(tensor).or_default().push((row_start, found.row_end));
        }
    }
    for spec in &contract.tensors {
        let ranges = covered.remove(spec.name.as_str()).unwrap_or_default();
        check_rows(&spec.name, spec.rows(), ranges)?;
    }
    Ok(())
}

/// Whether `ranges` cover the rows `[0, rows)` of `tensor`, each exactly once.
pub(crate) fn check_rows(tensor: &str, rows: u64, mut ranges: Vec<(u64, u64)>) -> Result<(), PlanError> {
    ranges.sort_unstable();
    let mut expected = 0;
    for (row_start, row_end) in ranges {
        if row_start > expected {
            return Err(PlanError::Uncovered { tensor: tensor.to_owned(), row: expected });
        }
        if row_start < expected {
            return Err(PlanError::Twice { tensor: tensor.to_owned(), row: row_start });
        }
        expected = row_end;
    }
    if expected < rows {
        return Err(PlanError::Uncovered { tensor: tensor.to_owned(), row: expected });
    }
    Ok(())
}

/// Bytes of one fragment in the contract's element types.
pub fn fragment_bytes(slices: &[Slice]) -> u64 {
    slices.iter().map(|slice| slice.elements() * slice.dtype.bytes()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;
    use proptest::prelude::*;
    use protocol::DType;

    fn imbalance(plan: &FragmentPlan) -> f64 {
        let bytes: Vec<u64> = plan.fragments.iter().map(|slices| fragment_bytes(slices)).collect();
        let mean = bytes.iter().sum::<u64>() as f64 / bytes.len() as f64;
        bytes.iter().copied().max().unwrap_or(0) as f64 / mean
    }

    fn spec(name: &str, shape: &[u64]) -> TensorSpec {
        TensorSpec { name: name.to_owned(), shape: shape.to_vec(), dtype: DType::F32 }
    }

    #[test]
    fn the_real_contract_balances_within_a_thousandth_in_24_fragments() {
        let contract = fixture::real_contract();
        assert_eq!(contract.tensors.len(), 539);
        let plan = plan(&contract, 24).unwrap();
        check(&plan, &contract).unwrap();
        assert!(imbalance(&plan) <= 1.001, "{}", imbalance(&plan));
        assert_eq!(plan.total_elements(), contract.elements());
        let slices: usize = plan.fragments.iter().map(Vec::len).sum();
        assert!(slices < 4096, "{slices} slices");
    }

    #[test]
    fn the_real_experts_are_cut_between_experts_and_its_embeddings_into_row_blocks() {
        let contract = fixture::real_contract();
        let plan = plan(&contract, 24).unwrap();
        let slices: Vec<&Slice> = plan.fragments.iter().flatten().collect();
        let of = |name: &str| slices.iter().filter(|slice| slice.tensor.ends_with(name)).copied().collect::<Vec<_>>();
        for (name, layers, expert) in [("mlp.experts_w12", 19, 2048 * 1024), ("mlp.experts_w3", 19, 512 * 2048)] {
            let experts = of(name);
            assert_eq!(experts.iter().map(|slice| slice.rows()).sum::<u64>(), layers * 256);
            // A row is a whole expert and a merge unit.
            assert!(experts.iter().all(|slice| slice.row_elements == expert && slice.unit_rows == 1));
        }
        for name in ["word_embeddings.weight", "lm_head.weight"] {
            let blocks = of(name);
            assert!(blocks.len() > 1, "{name} is cut");
            assert_eq!(blocks.iter().map(|slice| slice.rows()).sum::<u64>(), 157_184);
            assert!(blocks.iter().all(|slice| slice.rule == MergeRule::Mean && slice.row_elements == 2048));
        }
        let whole = contract.tensors.iter().filter(|tensor| tensor.shape.len() < 2);
        assert!(whole.into_iter().all(|tensor| of(&tensor.name).iter().all(|slice| slice.rows() == tensor.rows())), "vectors stay whole");
    }

    #[test]
    fn the_plan_of_the_real_contract_never_changes() {
        let plan = plan(&fixture::real_contract(), 24).unwrap();
        assert_eq!(plan.digest().to_string(), "7566ad7a3ed14bde8f8b91ec5b7ab77b90237331fc6c7cf0a857292085f770a6");
    }

    #[test]
    fn small_models_balance_too() {
        for fragments in [1, 2, 3, 8, 24, 64] {
            let contract = fixture::small_contract();
            let plan = plan(&contract, fragments).unwrap();
            check(&plan, &contract).unwrap();
            assert!(imbalance(&plan) <= 1.01, "{fragments} fragments: {}", imbalance(&plan));
        }
    }

    #[test]
    fn tensors_are_cut_no_finer_than_balance_needs() {
        let contract = fixture::small_contract();
        let whole = plan(&contract, 1).unwrap();
        assert_eq!(whole.fragments[0].len(), contract.tensors.len());
        let slices: usize = plan(&contract, 4).unwrap().fragments.iter().map(Vec::len).sum();
        assert!(slices < 2 * contract.tensors.len(), "{slices} slices");
    }

    #[test]
    fn experts_are_merged_one_by_one_and_embeddings_routers_and_vectors_by_the_mean() {
        let plan = plan(&fixture::small_contract(), 24).unwrap();
        for slice in plan.fragments.iter().flatten() {
            let fused = slice.tensor.contains("experts_w");
            assert_eq!(slice.unit_rows, if fused { 1 } else { slice.rows() }, "{slice:?}");
            let mean = slice.row_elements == 1
                || ["lm_head.weight", "model.word_embeddings.weight"].contains(&slice.tensor.as_str())
                || slice.tensor.ends_with(".mlp.gate.weight");
            assert_eq!(slice.rule == MergeRule::Mean, mean, "{slice:?}");
        }
        assert_eq!(merge_rule(&spec("mlp.shared_experts.gate_proj.weight", &[2, 2])), MergeRule::Rda);
        assert_eq!(merge_rule(&spec("not_lm_head.weight", &[2, 2])), MergeRule::Rda);
    }

    #[test]
    fn neighbouring_rows_in_one_fragment_are_one_slice() {
        let plan = plan(&fixture::small_contract(), 3).unwrap();
        for slices in &plan.fragments {
            assert!(!slices.windows(2).any(|pair| pair[0].tensor == pair[1].tensor && pair[0].row_end == pair[1].row_start));
        }
    }

    #[test]
    fn impossible_fragment_counts_are_refused() {
        let contract = Contract::new(vec![spec("a", &[3, 2]), spec("b", &[7])]).unwrap();
        assert_eq!(plan(&contract, 0), Err(PlanError::Fragments { fragments: 0 }));
        assert_eq!(plan(&contract, FRAGMENTS_MAX + 1), Err(PlanError::Fragments { fragments: FRAGMENTS_MAX + 1 }));
        assert_eq!(plan(&contract, 5), Err(PlanError::TooManyFragments { fragments: 5 }));
        assert_eq!(plan(&contract, 4).unwrap().fragments.len(), 4);
    }

    #[test]
    fn a_plan_that_does_not_fit_the_contract_is_refused() {
        let contract = Contract::new(vec![spec("a", &[4, 2]), spec("b", &[7])]).unwrap();
        let good = plan(&contract, 1).unwrap();
        let with = |change: &dyn Fn(&mut Vec<Slice>)| {
            let mut changed = good.clone();
            change(&mut changed.fragments[0]);
            check(&changed, &contract).unwrap_err()
        };
        assert!(matches!(with(&|slices| slices.clear()), PlanError::EmptyFragment { fragment: 0 }));
        assert!(matches!(with(&|slices| slices.reverse()), PlanError::Order { .. }));
        assert!(matches!(with(&|slices| slices[0].tensor = "0".to_owned()), PlanError::Unknown { .. }));
        assert!(matches!(with(&|slices| slices[0].row_end = 5), PlanError::Slice { .. }));
        assert!(matches!(with(&|slices| slices[0].rule = MergeRule::Mean), PlanError::Slice { .. }));
        assert!(matches!(with(&|slices| slices[0].row_end = u64::MAX), PlanError::Slice { .. }));
        assert!(matches!(with(&|slices| drop(slices.pop())), PlanError::Uncovered { row: 0, .. }));
        let shorter = |slices: &mut Vec<Slice>| (slices[0].row_end, slices[0].unit_rows) = (3, 3);
        assert!(matches!(with(&shorter), PlanError::Uncovered { row: 3, .. }));
        let overlapping = |slices: &mut Vec<Slice>| {
            let mut again = slices[0].clone();
            (again.row_start, again.unit_rows) = (2, 2);
            slices.insert(1, again);
        };
        assert!(matches!(with(&overlapping), PlanError::Twice { row: 2, .. }));
        assert!(matches!(check(&FragmentPlan { fragments: vec![] }, &contract), Err(PlanError::Fragments { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_row_is_in_exactly_one_slice_and_the_order_of_the_contract_does_not_matter(
            shapes in proptest::collection::vec(proptest::collection::vec(1u64..40, 0..4), 1..20),
            fragments in 1usize..30,
            rotation in 0usize..20,
        ) {
            let tensors: Vec<TensorSpec> = shapes.iter().enumerate().map(|(index, shape)| spec(&format!("t{index:02}"), shape)).collect();
            let mut rotated = tensors.clone();
            rotated.rotate_left(rotation % tensors.len());
            let (contract, rotated) = (Contract::new(tensors).unwrap(), Contract::new(rotated).unwrap());
            let found = plan(&contract, fragments);
            prop_assert_eq!(&found, &plan(&rotated, fragments));
            if let Ok(found) = found {
                prop_assert_eq!(check(&found, &contract), Ok(()));
                prop_assert_eq!(found.fragments.len(), fragments);
            }
        }
    }
}
