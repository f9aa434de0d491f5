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
/// to `own_uid` itself, which the chain accepts without a permit and whatever the minimum length. Otherwise the row is padded
/// with zero entries (which the chain counts) up to the subnet's minimum.
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
    let mut row: BTreeMap<u16, u16> =
        by_uid.into_iter().map(|(uid, score)| (uid, scale(score, largest))).filter(|(_, value)| *value > 0).collect();
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
    }
}
