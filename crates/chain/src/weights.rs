//! From scores to a row of weights as the chain stores it.
//!
//! The chain scales every row so that its largest value is 65535. Rows built here already are scaled: what is stored equals
//! what was sent, and reading back is a comparison.

use std::collections::BTreeMap;

use protocol::AccountId;

use crate::types::{Hyperparameters, Metagraph};

/// The row of `own_uid`, by ascending uid, largest value 65535.
///
/// Scores of accounts that are not registered are left out, equal accounts add up. Where nobody has a score the weight goes
/// to `own_uid` itself, which the chain accepts without a permit and whatever the minimum length. Otherwise no weight exceeds the
/// subnet's limit of the row's sum (where enough neurons have a score to make that possible), and the row is padded with zero
/// entries (which the chain counts) up to the subnet's minimum.
///
/// Scores belong to hotkeys, not to uids: a uid that was registered anew by somebody else since the scoring gets nothing.
pub fn row(scores: &[(AccountId, u64)], metagraph: &Metagraph, hyperparameters: &Hyperparameters, own_uid: u16) -> Vec<(u16, u16)> {
    let mut by_uid: BTreeMap<u16, u64> = BTreeMap::new();
    for (account, score) in scores {
        if let Some(neuron) = metagraph.by_hotkey(account) {
            let sum = by_uid.entry(neuron.uid).or_default();
            *sum = sum.saturating_add(*score);
        }
    }
    let largest = by_uid.values().copied().max().unwrap_or(0);
    if largest == 0 {
        return vec![(own_uid, u16::MAX)];
    }
    by_uid.retain(|_, score| *score > 0);
    let is_on_itself = by_uid.len() == 1 && by_uid.contains_key(&own_uid);
    let mut row = match clip(&by_uid, hyperparameters.max_weight_limit) {
        Some(clipped) if !is_on_itself => clipped,
        _ => by_uid.into_iter().map(|(uid, score)| (uid, scale(score, largest))).filter(|(_, value)| *value > 0).collect(),
    };
    if row.len() == 1 && row.contains_key(&own_uid) {
        return row.into_iter().collect();
    }
    let minimum = usize::from(hyperparameters.min_allowed_weights).min(metagraph.neurons.len());
    for neuron in &metagraph.neurons {
        if row.len() >= minimum {
            break;
        }
        row.entry(neuron.uid).or_insert(0);
    }
    row.into_iter().collect()
}

/// The row whose largest values are cut so that none exceeds `limit` / 65535 of the row's sum; `None` where none does.
///
/// The cut `c` solves c / Σ min(score, c) = limit / 65535: with the k largest cut, c = limit · rest / (65535 − k · limit). Values
/// below the cut are rounded up, so that rounding never lifts the largest share above the limit. With too few scores for the
/// limit all get the same.
fn clip(scores: &BTreeMap<u16, u64>, limit: u16) -> Option<BTreeMap<u16, u16>> {
    let (one, limit) = (u128::from(u16::MAX), u128::from(limit));
    let mut sorted: Vec<u128> = scores.values().map(|score| u128::from(*score)).collect();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    let mut rest: u128 = sorted.iter().sum();
    if sorted.first()? * one <= limit * rest {
        return None;
    }
    if sorted.len() as u128 * limit <= one {
        return Some(scores.keys().map(|uid| (*uid, u16::MAX)).collect());
    }
    // (numerator, denominator) of the cut.
    let mut cut = (0, 1);
    for (count, score) in (1u128..).zip(&sorted) {
        rest -= score;
        // Fewer than 65535 / limit are cut: with more, even equal shares would lie below the limit.
        cut = (limit * rest, one.checked_sub(count * limit).filter(|left| *left > 0)?);
        let next = sorted.get(count as usize).copied().unwrap_or(0);
        if next * cut.1 <= cut.0 {
            break;
        }
    }
    let (numerator, denominator) = cut;
    let value = |score: u64| {
        let score = u128::from(score) * denominator;
        if score >= numerator { u16::MAX } else { (score * one).div_ceil(numerator) as u16 }
    };
    Some(scores.iter().map(|(uid, score)| (*uid, value(*score))).collect())
}

/// The row as the chain stores it: values scaled so that the largest is 65535, rounded to nearest; a row of zeros stays.
pub fn as_stored(row: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let largest = row.iter().map(|(_, value)| u64::from(*value)).max().unwrap_or(0);
    if largest == 0 {
        return row.to_vec();
    }
    row.iter().map(|(uid, value)| (*uid, scale(u64::from(*value), largest))).collect()
}

/// `value / largest` of 65535, to nearest. `largest` is positive and at least `value`.
fn scale(value: u64, largest: u64) -> u16 {
    let scaled = (u128::from(value) * u128::from(u16::MAX) + u128::from(largest) / 2) / u128::from(largest);
    scaled.min(u128::from(u16::MAX)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{BlockRef, Neuron};
    use proptest::prelude::*;

    fn account(n: u8) -> AccountId {
        AccountId([n; 32])
    }

    fn metagraph(neurons: u8) -> Metagraph {
        let neurons = (0..neurons)
            .map(|n| Neuron {
                uid: u16::from(n),
                hotkey: account(n),
                coldkey: account(100 + n),
                stake: 0,
                validator_permit: false,
                last_update: 0,
            })
            .collect();
        Metagraph { block: BlockRef { number: 1, hash: [0; 32] }, neurons }
    }

    fn hyperparameters(min_allowed_weights: u16) -> Hyperparameters {
        Hyperparameters {
            tempo: 360,
            weights_rate_limit: 100,
            min_allowed_weights,
            max_weight_limit: u16::MAX,
            weights_version: 0,
            commit_reveal: false,
            stake_threshold: 0,
        }
    }

    #[test]
    fn the_largest_score_gets_65535_and_the_others_their_share_rounded_to_nearest() {
        let scores = [(account(2), 40), (account(0), 10), (account(1), 20)];
        assert_eq!(row(&scores, &metagraph(4), &hyperparameters(1), 3), [(0, 16384), (1, 32768), (2, 65535)]);
    }

    #[test]
    fn without_any_accepted_work_the_weight_goes_to_oneself() {
        for scores in [vec![], vec![(account(1), 0)], vec![(account(77), 5)]] {
            assert_eq!(row(&scores, &metagraph(4), &hyperparameters(3), 2), [(2, u16::MAX)]);
        }
    }

    #[test]
    fn unregistered_accounts_are_left_out_and_equal_accounts_add_up() {
        let scores = [(account(1), 3), (account(99), 1000), (account(1), 3), (account(2), 3)];
        assert_eq!(row(&scores, &metagraph(4), &hyperparameters(1), 0), [(1, 65535), (2, 32768)]);
    }

    #[test]
    fn a_row_is_padded_with_zero_entries_up_to_the_minimum_or_all_neurons() {
        let scores = [(account(2), 7)];
        assert_eq!(row(&scores, &metagraph(4), &hyperparameters(3), 0), [(0, 0), (1, 0), (2, 65535)]);
        assert_eq!(row(&scores, &metagraph(3), &hyperparameters(1024), 0), [(0, 0), (1, 0), (2, 65535)]);
        assert_eq!(row(&scores, &metagraph(3), &hyperparameters(1024), 2), [(2, 65535)], "a row on oneself needs no padding");
    }

    #[test]
    fn a_uid_that_changed_hands_since_the_scoring_gets_nothing() {
        let scores = [(account(1), 5), (account(2), 5)];
        let mut metagraph = metagraph(4);
        metagraph.neurons[1].hotkey = account(50);
        assert_eq!(row(&scores, &metagraph, &hyperparameters(1), 0), [(2, 65535)]);
        // The former owner is back at another uid.
        metagraph.neurons[3].hotkey = account(1);
        assert_eq!(row(&scores, &metagraph, &hyperparameters(1), 0), [(2, 65535), (3, 65535)]);
    }

    fn clipped(scores: &[u64], limit: u16) -> Vec<u16> {
        let scores: Vec<_> = (0u8..).zip(scores).map(|(n, score)| (account(n), *score)).collect();
        let parameters = Hyperparameters { max_weight_limit: limit, ..hyperparameters(1) };
        row(&scores, &metagraph(scores.len() as u8 + 1), &parameters, scores.len() as u16).into_iter().map(|(_, value)| value).collect()
    }

    /// Largest share allowed, in 65535ths, and the values that `_conform` of the official package 11.1.0 makes of the scores.
    /// It computes in floating point and stays a hair below the limit, so that single units differ.
    const OFFICIAL: [(&[u64], u16, &[u16]); 6] = [
        (&[10, 20, 40], 65535, &[16384, 32768, 65535]),
        (&[10, 20, 40], 32767, &[21846, 43691, 65535]),
        (&[1, 1, 1, 97], 26214, &[32768, 32768, 32768, 65535]),
        (&[5, 5, 50, 100, 200], 16384, &[32766, 32766, 65535, 65535, 65535]),
        (&[1, 2, 3], 10000, &[65535, 65535, 65535]),
        (&[7, 7, 7, 7], 20000, &[65535, 65535, 65535, 65535]),
    ];

    #[test]
    fn weights_above_the_limit_are_clipped_as_by_the_official_package() {
        for (scores, limit, expected) in OFFICIAL {
            let values = clipped(scores, limit);
            assert_eq!(values.len(), expected.len());
            for (ours, theirs) in values.iter().zip(expected) {
                assert!(ours.abs_diff(*theirs) <= 1, "{scores:?} limit {limit}: {values:?}, {expected:?}");
            }
        }
    }

    #[test]
    fn a_row_on_oneself_is_never_clipped() {
        let parameters = Hyperparameters { max_weight_limit: 655, ..hyperparameters(3) };
        assert_eq!(row(&[(account(2), 9)], &metagraph(4), &parameters, 2), [(2, 65535)]);
        assert_eq!(row(&[], &metagraph(4), &parameters, 2), [(2, 65535)]);
    }

    #[test]
    fn the_chains_scaling_is_that_of_the_genuine_runtime() {
        assert_eq!(as_stored(&[(0, 10), (1, 20), (2, 40)]), [(0, 16384), (1, 32768), (2, 65535)]);
        assert_eq!(as_stored(&[(2, 65535), (3, 1)]), [(2, 65535), (3, 1)]);
        assert_eq!(as_stored(&[(0, 0)]), [(0, 0)]);
    }

    proptest! {
        #[test]
        fn every_row_is_stored_as_it_was_sent(scores in prop::collection::vec((0u8..8, any::<u64>()), 0..12), minimum in 0u16..9, own in 0u16..6) {
            let scores: Vec<_> = scores.into_iter().map(|(n, score)| (account(n), score)).collect();
            let row = row(&scores, &metagraph(6), &hyperparameters(minimum), own);
            prop_assert_eq!(as_stored(&row), row.clone());
            prop_assert_eq!(row.iter().map(|(_, value)| *value).max(), Some(u16::MAX));
            prop_assert!(row.windows(2).all(|pair| pair[0].0 < pair[1].0));
            prop_assert!(row.iter().all(|(uid, _)| *uid < 6));
            prop_assert!(row.len() >= usize::from(minimum.min(6)) || row == [(own, u16::MAX)]);
        }

        #[test]
        fn no_share_exceeds_the_limit_where_that_is_possible(scores in prop::collection::vec(1u64.., 1..40), limit in 1u16..) {
            let values = clipped(&scores, limit);
            let sum: u64 = values.iter().map(|value| u64::from(*value)).sum();
            let largest = u64::from(*values.iter().max().unwrap());
            prop_assert_eq!(largest, 65535);
            if scores.len() as u64 * u64::from(limit) > 65535 {
                // Without a cut the values are rounded to nearest: a score at the limit may lie half a unit above it.
                prop_assert!(largest * 65535 <= u64::from(limit) * (sum + scores.len() as u64), "{values:?}");
            } else {
                prop_assert!(values.iter().all(|value| *value == 65535) || largest * 65535 <= u64::from(limit) * (sum + 1));
            }
        }
    }
}
