//! Who audits what: a pure function of the cycle's merge manifests and of a beacon that did not exist when they were written.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::documents::{AuditDraw, MergeManifest, PPM};
use crate::envelope::RunId;
use crate::{AccountId, Digest};

/// One audit of one learner-cycle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    pub audit: Digest,
    pub validator: AccountId,
    pub cycle: u64,
    pub hotkey: AccountId,
    pub slot: u8,
    /// Outer step of the contribution whose segment is opened.
    pub t: u64,
    pub beacon_block: u64,
}

/// Audits of a slot that it is asked to open at a time: one after the other, so that the last may take so many times as long.
pub const NOTICES_OF_SLOT: u64 = 2;
/// A learner keeps the segments of payloads of the last so many cycles: an audit asks for one of a finished cycle, some blocks later. What
/// is older when its audit is selected, because the beacon came late, is not audited.
pub const SEGMENT_CYCLES: u64 = 3;
/// How much more often a learner is audited that a filter left something out of. Honest work may look odd for days: it has to be possible
/// to open all these audits.
const SUSPECT_FACTOR: u64 = 4;

/// The block that a cycle's beacon is counted from. `last` is the latest one that the cycle's merges name, `behind` those of the merges
/// behind it, in order of their steps: it is the first of these that is later. While the orchestrator cannot reach the chain its merges
/// name an old block, and those after it are public before this cycle's work is committed; who names a later one was decided after all of
/// the cycle. Where nothing follows, for the run is over, it is `last`. None: not known yet.
pub fn beacon_from(last: u64, behind: impl IntoIterator<Item = u64>, is_over: bool) -> Option<u64> {
    behind.into_iter().find(|block| *block > last).or(is_over.then_some(last))
}

/// Audits of a cycle. `merges` are the cycle's manifests in any order, and so may the auditors of `draw` be. Of the learners
/// that worked ([`MergeManifest::worked`]) a share of `rate_ppm` is audited on a contribution that was merged, and four times
/// that share of those that a filter left something out of, on that: each once, by one validator, and by nobody whose own work it is.
pub fn select(run: RunId, rate_ppm: u32, draw: &AuditDraw, merges: &[MergeManifest]) -> Vec<Selection> {
    let AuditDraw { cycle, beacon_block, beacon, ref validators } = *draw;
    let mut validators = validators.clone();
    validators.sort();
    validators.dedup();
    let mut offers: BTreeMap<(AccountId, u8), Vec<(u64, bool)>> = BTreeMap::new();
    for merge in merges {
        for contribution in merge.worked() {
            offers.entry((contribution.hotkey, contribution.slot)).or_default().push((merge.t, contribution.is_suspect()));
        }
    }
    let seed = Digest::derive("quasar/v1/challenge", &[&beacon.0, &run.0, &cycle.to_le_bytes()]);
    offers
        .into_iter()
        .filter_map(|((hotkey, slot), mut steps)| {
            let is_suspect = steps.iter().any(|(_, is_suspect)| *is_suspect);
            if is_suspect {
                steps.retain(|(_, is_suspect)| *is_suspect);
            }
            steps.sort_unstable();
            let audit = Digest::derive("quasar/v1/audit", &[&seed.0, &hotkey.0, &[slot]]);
            let draw = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| audit.0[at + i]));
            let factor = if is_suspect { SUSPECT_FACTOR } else { 1 };
            let is_drawn = draw(16) % PPM < factor * u64::from(rate_ppm);
            let mut others = validators.iter().filter(|validator| **validator != hotkey);
            let count = others.clone().count() as u64;
            let validator = others.nth(draw(8).checked_rem(count)? as usize)?;
            is_drawn.then(|| Selection {
                audit,
                validator: *validator,
                cycle,
                hotkey,
                slot,
                t: steps[(draw(0) % steps.len() as u64) as usize].0,
                beacon_block,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reason;
    use crate::documents::Contribution;

    const ALL: u32 = PPM as u32;

    fn merge(t: u64, hotkeys: &[(u8, Reason)]) -> MergeManifest {
        let contribution = |(byte, outcome): &(u8, Reason)| Contribution {
            hotkey: AccountId([*byte; 32]),
            slot: 0,
            commitment: Digest::ZERO,
            payload: Digest::ZERO,
            base_version: 0,
            steps: 1,
            tokens: 1,
            weight_ppm: 1,
            norm: 1,
            clip_ppm: 1,
            cosine_ppm: 1,
            neighbour_ppm: 0,
            rest_ppm: 0,
            outcome: *outcome,
        };
        MergeManifest {
            t,
            fragment: 0,
            base_version: 0,
            version: 1,
            block: 5,
            closing: false,
            restores: None,
            contributions: hotkeys.iter().map(contribution).collect(),
            keyframe: Digest::ZERO,
            state: Digest::ZERO,
            step_norm: 0,
            step_limit_ppm: 1_000_000,
        }
    }

    fn draw(cycle: u64, beacon: u8, validators: &[AccountId]) -> AuditDraw {
        AuditDraw { cycle, beacon_block: 7, beacon: Digest([beacon; 32]), validators: validators.to_vec() }
    }

    #[test]
    fn nobody_audits_its_own_work() {
        let merges: Vec<MergeManifest> = (0..40).map(|t| merge(t, &[(1, Reason::None), (2, Reason::None)])).collect();
        let (one, two) = (AccountId([1; 32]), AccountId([2; 32]));
        for beacon in 0..32 {
            let selected = select(RunId([1; 16]), ALL, &draw(0, beacon, &[one, two]), &merges);
            let pairs: Vec<(AccountId, AccountId)> = selected.iter().map(|one| (one.hotkey, one.validator)).collect();
            assert_eq!(pairs, [(one, two), (two, one)]);
            let alone = select(RunId([1; 16]), ALL, &draw(0, beacon, &[one]), &merges);
            assert_eq!(alone.iter().map(|one| one.hotkey).collect::<Vec<_>>(), [two]);
        }
    }

    #[test]
    fn each_merged_learner_is_audited_once_by_one_validator_whatever_the_order_of_inputs() {
        let merges = [merge(0, &[(1, Reason::None), (2, Reason::None)]), merge(1, &[(1, Reason::None), (3, Reason::Late)])];
        let validators = [AccountId([9; 32]), AccountId([8; 32])];
        let selected = select(RunId([1; 16]), ALL, &draw(0, 4, &validators), &merges);
        assert_eq!(selected.len(), 2);
        assert_eq!(selected[1].t, 0, "learner 2 merged only in step 0");
        let mut reversed = merges.to_vec();
        reversed.reverse();
        assert_eq!(select(RunId([1; 16]), ALL, &draw(0, 4, &[validators[1], validators[0]]), &reversed), selected);
        assert_ne!(select(RunId([1; 16]), ALL, &draw(0, 5, &validators), &merges)[0].audit, selected[0].audit);
        assert!(select(RunId([1; 16]), ALL, &draw(0, 4, &[]), &merges).is_empty());
    }

    #[test]
    fn a_beacon_counts_from_a_block_that_was_seen_after_the_cycle() {
        assert_eq!(beacon_from(5, [5, 7, 9], false), Some(7));
        assert_eq!(beacon_from(5, [4, 5, 5], false), None, "the chain is away: what comes after block 5 may be known already");
        assert_eq!(beacon_from(5, [], true), Some(5));
        assert_eq!(beacon_from(5, [6], true), Some(6), "whoever reads the run later counts from the same block");
    }

    #[test]
    fn what_a_filter_left_out_is_audited_first() {
        for suspect in [Reason::DirectionOutlier, Reason::TooSimilar] {
            let merges = [merge(0, &[(1, Reason::None)]), merge(1, &[(1, suspect), (2, suspect)]), merge(2, &[(1, Reason::NormTooLarge)])];
            for beacon in 0..8 {
                let selected = select(RunId([1; 16]), ALL, &draw(0, beacon, &[AccountId([9; 32])]), &merges);
                assert_eq!(selected.iter().map(|one| one.t).collect::<Vec<_>>(), [1, 1], "{suspect:?}");
            }
        }
    }

    #[test]
    fn a_share_of_the_learner_cycles_is_audited_and_a_larger_one_of_what_looks_odd() {
        let sober = |byte| (byte, Reason::None);
        let odd = |byte| (byte, Reason::TooSimilar);
        let merges = [merge(0, &(1..=100).map(sober).chain((101..=200).map(odd)).collect::<Vec<_>>())];
        let mut drawn = [0, 0];
        for beacon in 0..40 {
            let selected = select(RunId([1; 16]), 100_000, &draw(0, beacon, &[AccountId([250; 32])]), &merges);
            let all = select(RunId([1; 16]), ALL, &draw(0, beacon, &[AccountId([250; 32])]), &merges);
            assert_eq!(all.len(), 200);
            assert!(selected.iter().all(|one| all.contains(one)), "the rate changes whether, not what");
            selected.iter().for_each(|one| drawn[usize::from(one.hotkey.0[0] > 100)] += 1);
        }
        // A tenth and four tenths of 4,000: 19 and 31 are the standard deviations.
        assert!((300..500).contains(&drawn[0]) && (1_450..1_750).contains(&drawn[1]), "{drawn:?}");
    }
}
