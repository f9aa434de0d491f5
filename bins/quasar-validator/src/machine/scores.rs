//! Scores: a pure fold over merge manifests and revealed verdicts, so that honest validators agree to the bit.
//!
//! score(hotkey) = Σ tokens of the merged contributions of its learners, cycle by cycle, as their audits show them. A learner-cycle whose
//! audit was passed counts. One that was failed or not opened does not. One that was not audited counts like those that were: unless the
//! last audit of this hotkey before it, or the next one behind it, was failed or not opened. So who leaves out a share f of the training
//! loses f of its pay where everything is audited, and twice that where little is. What a filter left out for its looks waits for the next
//! audit that is passed. Pay is linear in tokens: splitting the work over several hotkeys earns the same. A manifest that contradicts
//! itself credits nobody.

use std::collections::BTreeMap;

use protocol::AccountId;
use protocol::documents::{MergeManifest, Verdict, VerdictResult};
use protocol::schedule::cycle_of;
use serde::{Deserialize, Serialize};

/// What one learner did in one cycle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct LearnerCycle {
    tokens: u64,
    /// Left out by a filter for their looks.
    suspect_tokens: u64,
    /// How its audit ended; `None` while nothing was decided.
    is_sound: Option<bool>,
}

/// What the learners of one hotkey did: by cycle, then slot. They stand for each other, or a new slot would begin without a past.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Books {
    cycles: BTreeMap<(u64, u8), LearnerCycle>,
    /// Of [`Books::count`], when nothing was added since.
    counted: Option<u64>,
}

impl Books {
    fn cycle(&mut self, cycle: u64, slot: u8) -> &mut LearnerCycle {
        self.counted = None;
        self.cycles.entry((cycle, slot)).or_default()
    }

    /// Tokens that count.
    fn count(&self) -> u64 {
        let (mut sum, mut waiting, mut suspect, mut was_sound) = (0u64, 0u64, 0u64, true);
        for one in self.cycles.values() {
            if one.is_sound == Some(false) {
                (waiting, suspect, was_sound) = (0, 0, false);
                continue;
            }
            if was_sound || one.is_sound == Some(true) {
                waiting = waiting.saturating_add(one.tokens);
                suspect = suspect.saturating_add(one.suspect_tokens);
            }
            if one.is_sound == Some(true) {
                sum = sum.saturating_add(waiting).saturating_add(suspect);
                (waiting, suspect, was_sound) = (0, 0, true);
            }
        }
        sum.saturating_add(waiting)
    }
}

/// All hotkeys of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScoreLedger {
    hotkeys: BTreeMap<AccountId, Books>,
}

impl ScoreLedger {
    /// Credits the work in a manifest; the order of manifests does not matter.
    pub fn credit(&mut self, manifest: &MergeManifest, fragments: u16) {
        let cycle = cycle_of(manifest.t, fragments);
        for contribution in manifest.worked() {
            let one = self.hotkeys.entry(contribution.hotkey).or_default().cycle(cycle, contribution.slot);
            let tokens = if contribution.is_suspect() { &mut one.suspect_tokens } else { &mut one.tokens };
            *tokens = tokens.saturating_add(contribution.tokens);
        }
    }

    /// Takes a revealed verdict into account; the order does not matter. What could not be judged changes nothing.
    pub fn judge(&mut self, verdict: &Verdict) {
        let is_sound = match verdict.result {
            VerdictResult::Pass => true,
            VerdictResult::Mismatch | VerdictResult::NoOpening => false,
            VerdictResult::Inconclusive | VerdictResult::NotEvaluated => return,
        };
        let one = self.hotkeys.entry(verdict.hotkey).or_default().cycle(verdict.cycle, verdict.slot);
        one.is_sound = Some(is_sound && one.is_sound != Some(false));
    }

    /// Tokens by account, accounts ascending; accounts without any are left out.
    pub fn scores(&mut self) -> Vec<(AccountId, u64)> {
        let count = |(hotkey, books): (&AccountId, &mut Books)| {
            let tokens = books.counted.unwrap_or_else(|| books.count());
            books.counted = Some(tokens);
            (tokens > 0).then_some((*hotkey, tokens))
        };
        self.hotkeys.iter_mut().filter_map(count).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fixture::{account, contribution, merge, verdict};
    use protocol::{Digest, Reason};

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
    fn a_failed_or_unopened_audit_voids_its_learner_cycle_and_no_other_audited_one() {
        let merges = [
            merge(0, 2, vec![contribution(1, 0, 100, Reason::None), contribution(1, 1, 7, Reason::None)]),
            merge(1, 2, vec![contribution(1, 0, 20, Reason::None)]),
            merge(2, 2, vec![contribution(1, 0, 3, Reason::None)]),
        ];
        for result in [VerdictResult::Mismatch, VerdictResult::NoOpening] {
            let passed = [verdict(0, 1, 1, VerdictResult::Pass), verdict(1, 1, 0, VerdictResult::Pass)];
            assert_eq!(ledger(&merges, &[verdict(0, 1, 0, result), passed[0], passed[1]]), [(account(1), 10)], "{result:?}");
        }
        for result in [VerdictResult::Pass, VerdictResult::Inconclusive, VerdictResult::NotEvaluated] {
            assert_eq!(ledger(&merges, &[verdict(0, 1, 0, result)]), [(account(1), 130)], "{result:?}");
        }
    }

    /// Cycles 0 to 9 of a learner, with 2^cycle tokens each, under these audits.
    fn counted(audits: &[(u64, VerdictResult)]) -> u64 {
        let merges: Vec<_> = (0..10).map(|cycle| merge(2 * cycle, 2, vec![contribution(1, 0, 1 << cycle, Reason::None)])).collect();
        let verdicts: Vec<_> = audits.iter().map(|(cycle, result)| verdict(*cycle, 1, 0, *result)).collect();
        let scores = ledger(&merges, &verdicts);
        let backwards: Vec<_> = verdicts.into_iter().rev().collect();
        assert_eq!(ledger(&merges, &backwards), scores);
        scores.first().map_or(0, |(_, tokens)| *tokens)
    }

    #[test]
    fn what_was_not_audited_counts_like_the_audits_before_and_behind_it() {
        use VerdictResult::{Inconclusive, Mismatch, NoOpening, NotEvaluated, Pass};
        let of = |cycles: &[u64]| cycles.iter().map(|cycle| 1 << cycle).sum::<u64>();
        let all: Vec<u64> = (0..10).collect();
        assert_eq!(counted(&[]), of(&all));
        assert_eq!(counted(&[(2, Pass), (7, Pass)]), of(&all));
        // Back to the last audit that was passed, and on to the next one.
        assert_eq!(counted(&[(2, Pass), (5, Mismatch), (8, Pass)]), of(&[0, 1, 2, 8, 9]));
        assert_eq!(counted(&[(2, Pass), (5, NoOpening), (8, Pass)]), of(&[0, 1, 2, 8, 9]));
        assert_eq!(counted(&[(2, Pass), (5, Mismatch)]), of(&[0, 1, 2]));
        assert_eq!(counted(&[(3, NoOpening), (6, Mismatch)]), 0);
        // Who could not be judged was not audited.
        assert_eq!(counted(&[(2, Pass), (3, NotEvaluated), (5, Mismatch), (7, Inconclusive), (8, Pass)]), of(&[0, 1, 2, 8, 9]));
    }

    #[test]
    fn to_train_a_share_of_the_cycles_only_costs_more_than_it_saves_whatever_the_rate_of_audits_is() {
        const CYCLES: u64 = 60_000;
        for rate in [2, 10, 50] {
            for skipped in [5, 20, 50] {
                let draw = |cycle: u64, of: u8| {
                    let digest = Digest::derive("test", &[&cycle.to_le_bytes(), &[of, rate, skipped]]);
                    u64::from_le_bytes(std::array::from_fn(|i| digest.0[i])) % 100
                };
                let mut books = Books::default();
                for cycle in 0..CYCLES {
                    let is_audited = draw(cycle, 0) < u64::from(rate);
                    let is_sound = is_audited.then(|| draw(cycle, 1) >= u64::from(skipped));
                    *books.cycle(cycle, 0) = LearnerCycle { tokens: 1, suspect_tokens: 0, is_sound };
                }
                let (paid, trained) = (books.count() as f64 / CYCLES as f64, 1.0 - f64::from(skipped) / 100.0);
                assert!(paid < trained, "{rate} % audited, {skipped} % not trained: {paid} of the pay for {trained} of the work");
            }
        }
    }

    #[test]
    fn what_a_filter_left_out_waits_for_the_next_audit_that_is_passed() {
        let merges = [
            merge(0, 2, vec![contribution(1, 0, 100, Reason::None), contribution(2, 0, 50, Reason::DirectionOutlier)]),
            merge(2, 2, vec![contribution(2, 0, 7, Reason::None)]),
        ];
        let of = |verdicts: &[Verdict]| {
            ledger(&merges, verdicts).into_iter().find(|(who, _)| *who == account(2)).map_or(0, |(_, tokens)| tokens)
        };
        assert_eq!(of(&[]), 7);
        for (result, tokens) in
            [(VerdictResult::Pass, 57), (VerdictResult::NotEvaluated, 7), (VerdictResult::NoOpening, 0), (VerdictResult::Mismatch, 0)]
        {
            assert_eq!(of(&[verdict(0, 2, 0, result)]), tokens, "{result:?}");
        }
        assert_eq!(of(&[verdict(1, 2, 0, VerdictResult::Pass)]), 57, "it was not audited itself");
        assert_eq!(of(&[verdict(0, 2, 0, VerdictResult::Mismatch), verdict(1, 2, 0, VerdictResult::Pass)]), 7);
    }

    #[test]
    fn a_slot_answers_for_the_others_of_its_hotkey() {
        let merges = [
            merge(0, 2, vec![contribution(1, 0, 100, Reason::None), contribution(2, 0, 9, Reason::None)]),
            merge(2, 2, vec![contribution(1, 1, 50, Reason::None)]),
            merge(4, 2, vec![contribution(1, 1, 7, Reason::None)]),
        ];
        let failed = verdict(0, 1, 0, VerdictResult::Mismatch);
        assert_eq!(ledger(&merges, &[failed]), [(account(2), 9)], "a new slot has the past of the old one");
        assert_eq!(ledger(&merges, &[failed, verdict(2, 1, 1, VerdictResult::Pass)]), [(account(1), 7), (account(2), 9)]);
    }

    #[test]
    fn an_account_whose_every_cycle_failed_is_left_out_and_nobody_is_left_of_an_empty_run() {
        let merges = [merge(0, 2, vec![contribution(1, 0, 100, Reason::None)])];
        assert!(ledger(&merges, &[verdict(0, 1, 0, VerdictResult::Mismatch)]).is_empty());
        assert!(ledger(&[], &[]).is_empty());
    }
}
