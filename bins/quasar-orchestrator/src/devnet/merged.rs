//! What a run merged, by the tapes and merge manifests in its bucket: whether each step is there, and holds what was decided.

use std::collections::{BTreeMap, BTreeSet};

use protocol::documents::{MergeManifest, Tape};
use protocol::{AccountId, Digest};

/// Learner and payload.
type Contributed = (AccountId, u8, Digest);

/// Sums over the steps, and what is wrong with them.
#[derive(Debug, Default)]
pub struct Merged {
    pub merges: u64,
    pub contributions: u64,
    /// Of all fragments together.
    pub tokens: u64,
    pub problems: Vec<String>,
    /// Of each fragment, after the last step.
    versions: BTreeMap<u16, u64>,
    contributed: BTreeSet<Contributed>,
}

impl Merged {
    /// The next step, in order.
    pub fn add(&mut self, t: u64, tape: Option<&Tape>, manifest: Option<&MergeManifest>) {
        let (Some(tape), Some(manifest)) = (tape, manifest) else {
            let missing = if tape.is_none() { "tape" } else { "merge manifest" };
            return self.problems.push(format!("step {t} has no {missing}"));
        };
        let taped: BTreeSet<Contributed> = tape.inputs.iter().map(|one| (one.hotkey, one.slot, one.payload)).collect();
        let told: BTreeSet<Contributed> = manifest.contributions.iter().map(|one| (one.hotkey, one.slot, one.payload)).collect();
        let accepted: Vec<Contributed> = manifest.accepted().map(|one| (one.hotkey, one.slot, one.payload)).collect();
        let lost = taped.difference(&told).map(|one| ("lost what its tape holds", *one));
        let foreign = accepted.iter().filter(|one| !taped.contains(one)).map(|one| ("merged what its tape does not hold", *one));
        let again = accepted.iter().filter(|one| !self.contributed.insert(**one)).map(|one| ("merged once more what was merged", *one));
        let told_of = |(what, (hotkey, slot, _)): (&str, Contributed)| format!("step {t} {what}, of {} in slot {slot}", hotkey.short());
        self.problems.extend(lost.chain(foreign).chain(again).map(told_of));

        let version = self.versions.entry(manifest.fragment).or_default();
        let next = *version + u64::from(!accepted.is_empty() || manifest.restores.is_some());
        if (manifest.base_version, manifest.version) != (*version, next) {
            let MergeManifest { fragment, base_version, version: made, .. } = manifest;
            self.problems.push(format!("step {t} makes version {made} from {base_version} of fragment {fragment}, which is at {version}"));
        }
        *version = manifest.version;
        self.merges += u64::from(!accepted.is_empty());
        self.contributions += accepted.len() as u64;
        self.tokens += manifest.accepted().map(|one| one.tokens).sum::<u64>();
    }

    /// After the last step: each fragment was to be merged so often.
    pub fn end(&mut self, fragments: u16, cycles: u64) {
        for fragment in 0..fragments {
            let count = self.versions.get(&fragment).copied().unwrap_or(0);
            if count < cycles {
                self.problems.push(format!("fragment {fragment} was merged {count} times"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use protocol::Reason;
    use protocol::documents::{PPM, TapeInput};

    use super::*;

    fn input(hotkey: u8, payload: u8) -> TapeInput {
        TapeInput {
            hotkey: AccountId([hotkey; 32]),
            slot: 0,
            commitment: Digest::ZERO,
            payload: Digest([payload; 32]),
            length: 1,
            base_version: 0,
            steps: 1,
            tokens: 10,
            weight_ppm: PPM / 2,
        }
    }

    /// Step `t` of one fragment, which was merged in every step before.
    fn step(t: u64) -> (Tape, MergeManifest) {
        let tape = Tape {
            t,
            fragment: 0,
            epoch: 1,
            base_version: t,
            base_state: Digest::ZERO,
            block: 0,
            closing: false,
            step_mean: 0,
            restores: None,
            inputs: vec![input(1, 2 * t as u8), input(2, 2 * t as u8 + 1)],
        };
        let contributions = tape.inputs.iter().map(|one| one.contribution(Reason::None)).collect();
        let manifest = MergeManifest { version: t + 1, ..MergeManifest::unmoved(&tape, Digest::ZERO, contributions) };
        (tape, manifest)
    }

    fn problems(change: impl Fn(u64, &mut Tape, &mut MergeManifest)) -> Vec<String> {
        let mut merged = Merged::default();
        for t in 0..3 {
            let (mut tape, mut manifest) = step(t);
            change(t, &mut tape, &mut manifest);
            merged.add(t, Some(&tape), Some(&manifest));
        }
        merged.end(1, 3);
        merged.problems
    }

    #[test]
    fn a_run_that_lost_nothing_and_did_nothing_twice_has_no_problem() {
        assert!(problems(|_, _, _| ()).is_empty());
        let refused = |_: u64, _: &mut Tape, manifest: &mut MergeManifest| manifest.contributions[0].outcome = Reason::TooSimilar;
        assert!(problems(refused).is_empty(), "what the arithmetic refuses is told");
    }

    #[test]
    fn whatever_is_lost_or_merged_twice_is_told() {
        let at = |step: u64, change: fn(&mut Tape, &mut MergeManifest)| {
            let told = problems(move |t, tape, manifest| {
                if t == step {
                    change(tape, manifest);
                }
            });
            told.join("; ")
        };
        let lost = at(1, |_, manifest| manifest.contributions.truncate(1));
        assert!(lost.starts_with("step 1 lost what its tape holds, of "), "{lost}");
        let foreign = at(1, |tape, _| tape.inputs.truncate(1));
        assert!(foreign.starts_with("step 1 merged what its tape does not hold"), "{foreign}");
        let again = at(2, |tape, manifest| {
            tape.inputs[0].payload = Digest([2; 32]);
            manifest.contributions[0].payload = Digest([2; 32]);
        });
        assert!(again.starts_with("step 2 merged once more what was merged, of "), "{again}");
        let skipped = at(1, |_, manifest| manifest.version += 1);
        assert!(skipped.starts_with("step 1 makes version 3 from 1 of fragment 0, which is at 1"), "{skipped}");
        let mut merged = Merged::default();
        let (tape, manifest) = step(0);
        merged.add(0, Some(&tape), None);
        merged.add(1, None, Some(&manifest));
        merged.end(1, 1);
        assert_eq!(merged.problems, ["step 0 has no merge manifest", "step 1 has no tape", "fragment 0 was merged 0 times"]);
    }
}
