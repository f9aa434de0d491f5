//! Scores: a pure fold over merge manifests and revealed verdicts, so that honest validators agree to the bit.
//!
//! score(hotkey) = Σ tokens of its merged contributions, without those of a learner-cycle that a verdict failed, and with those that a
//! filter left out for their looks where the learner-cycle's audit was passed: that is what it was audited on. Pay is linear in
//! tokens: splitting the work over several hotkeys earns the same. A manifest that contradicts itself credits nobody.

use std::collections::{BTreeMap, BTreeSet};

use protocol::AccountId;
use protocol::documents::{MergeManifest, Verdict, VerdictResult};
use protocol::schedule::cycle_of;
use serde::{Deserialize, Serialize};

/// One learner in one cycle: what one audit judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LearnerCycle {
    pub cycle: u64,
    pub hotkey: AccountId,
    pub slot: u8,
}

/// Tokens by learner-cycle, and the learner-cycles that failed or passed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScoreLedger {
    credited: BTreeMap<LearnerCycle, u64>,
    /// Left out by a filter for their looks.
    suspect: BTreeMap<LearnerCycle, u64>,
    failed: BTreeSet<LearnerCycle>,
    passed: BTreeSet<LearnerCycle>,
}

impl ScoreLedger {
    /// Credits the work in a manifest; the order of manifests does not matter.
    pub fn credit(&mut self, manifest: &MergeManifest, fragments: u16) {
        let cycle = cycle_of(manifest.t, fragments);
        for contribution in manifest.worked() {
            let learner = LearnerCycle { cycle, hotkey: contribution.hotkey, slot: contribution.slot };
            let books = if contribution.is_suspect() { &mut self.suspect } else { &mut self.credited };
            let tokens = books.entry(learner).or_default();
            *tokens = tokens.saturating_add(contribution.tokens);
        }
    }

    /// Takes a revealed verdict into account: only a proved mismatch costs anything, and a pass clears what a filter left out.
    pub fn judge(&mut self, verdict: &Verdict) {
        let learner = LearnerCycle { cycle: verdict.cycle, hotkey: verdict.hotkey, slot: verdict.slot };
        match verdict.result {
            VerdictResult::Mismatch => {
                self.failed.insert(learner);
            }
            VerdictResult::Pass => {
                self.passed.insert(learner);
            }
            VerdictResult::Inconclusive | VerdictResult::NoOpening | VerdictResult::NotEvaluated => {}
        }
    }

    /// Tokens by account, accounts ascending; accounts without any are left out.
    pub fn scores(&self) -> Vec<(AccountId, u64)> {
        let mut scores: BTreeMap<AccountId, u64> = BTreeMap::new();
        let cleared = self.suspect.iter().filter(|(learner, _)| self.passed.contains(learner));
        for (learner, tokens) in self.credited.iter().chain(cleared) {
            if *tokens > 0 && !self.failed.contains(learner) {
                let sum = scores.entry(learner.hotkey).or_default();
                *sum = sum.saturating_add(*tokens);
            }
        }
        scores.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fixture::{account, contribution, merge, verdict};
    use protocol::Reason;

    fn ledger(merges: &[MergeManifest], verdicts: &[Verdict]) -> Vec<(AccountId, u64)> {
        let mut ledger = ScoreLedger::default();
        merges.iter().for_each(|merge| ledger.credit(merge, 2));
        verdicts.iter().for_each(|verdict| ledger.judge(verdict));
        ledger.scores()
    }

    #[test]
    fn tokens_of_merged_contributions_add_up_and_refused_ones_count_nothing() {
        let merges = [
            merge(0, 2, vec![contribution(1, 0, 100, Reason::None), contribution(2, 0, 50, Reason::None)]),
            merge(1, 2, vec![contribution(1, 1, 10, Reason::None), contribution(2, 0, 70, Reason::Late)]),
        ];
        assert_eq!(ledger(&merges, &[]), [(account(1), 110), (account(2), 50)]);
        let backwards: Vec<_> = merges.iter().rev().cloned().collect();
        assert_eq!(ledger(&backwards, &[]), ledger(&merges, &[]));
    }

    #[test]
    fn a_mismatch_voids_exactly_the_learner_cycle_that_it_judges() {
        let merges = [
            merge(0, 2, vec![contribution(1, 0, 100, Reason::None), contribution(1, 1, 7, Reason::None)]),
            merge(1, 2, vec![contribution(1, 0, 20, Reason::None)]),
            merge(2, 2, vec![contribution(1, 0, 3, Reason::None)]),
        ];
        assert_eq!(ledger(&merges, &[verdict(0, 1, 0, VerdictResult::Mismatch)]), [(account(1), 10)]);
        for result in [VerdictResult::Pass, VerdictResult::Inconclusive, VerdictResult::NoOpening, VerdictResult::NotEvaluated] {
            assert_eq!(ledger(&merges, &[verdict(0, 1, 0, result)]), [(account(1), 130)], "{result:?}");
        }
    }

    #[test]
    fn what_a_filter_left_out_counts_when_its_audit_is_passed() {
        let merges = [merge(0, 2, vec![contribution(1, 0, 100, Reason::None), contribution(2, 0, 50, Reason::DirectionOutlier)])];
        assert_eq!(ledger(&merges, &[]), [(account(1), 100)]);
        for (result, tokens) in [(VerdictResult::Pass, 50), (VerdictResult::NoOpening, 0), (VerdictResult::Mismatch, 0)] {
            let scores = ledger(&merges, &[verdict(0, 2, 0, result)]);
            assert_eq!(scores.iter().find(|(who, _)| *who == account(2)).map_or(0, |(_, tokens)| *tokens), tokens, "{result:?}");
        }
    }

    #[test]
    fn an_account_whose_every_cycle_failed_is_left_out_and_nobody_is_left_of_an_empty_run() {
        let merges = [merge(0, 2, vec![contribution(1, 0, 100, Reason::None)])];
        assert!(ledger(&merges, &[verdict(0, 1, 0, VerdictResult::Mismatch)]).is_empty());
        assert!(ledger(&[], &[]).is_empty());
    }
}
