//! What must hold once a world is over: all that happened is looked at as a whole.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use protocol::audits::{Selection, select};
use protocol::documents::{Action, AuditDraw, MergeManifest, RunState, Tape, VerdictResult};
use protocol::schedule::cycle_of;
use protocol::{AccountId, Digest};
use quasar_validator::machine::verdicts;

use super::{Watch, decoded};
use crate::sim::tensors;
use crate::sim::world::World;

/// Versions of a fragment that are never deleted.
const VERSIONS_KEPT: u64 = 8;

/// What a learner did in a cycle.
#[derive(Clone, Copy, Default)]
struct LearnerCycle {
    tokens: u64,
    /// Left out by a filter for their looks.
    suspect_tokens: u64,
    /// How its audit ended, if it had one that says anything.
    is_sound: Option<bool>,
}

impl Watch {
    /// Makes every version once more from the tapes alone.
    fn replay_tapes(&mut self, world: &World) {
        // Of each fragment, by version.
        let mut states: Vec<Vec<Digest>> =
            (0..world.plan.parameters.fragments).map(|fragment| vec![tensors::first_state(fragment)]).collect();
        let moves = |tape: &&Tape| self.manifests.get(&tape.t).is_some_and(|(_, merge)| merge.version > merge.base_version);
        let moved: Vec<Tape> = self.tapes.values().filter(moves).cloned().collect();
        let lasts = moved.iter().map(|tape| (tape.fragment, tape.base_version + 1)).collect::<BTreeMap<u16, u64>>();
        for tape in moved {
            let versions = &mut states[usize::from(tape.fragment)];
            let (version, newest) = (versions.len() as u64, versions[versions.len() - 1]);
            let state = match tape.restores {
                Some(earlier) => versions[earlier as usize],
                None => tensors::merged(&newest, &tape),
            };
            versions.push(state);
            let is_old = version + VERSIONS_KEPT <= lasts[&tape.fragment];
            let agrees = |key: &str, bytes: Bytes| world.peek(key).map_or(is_old, |stored| stored == bytes);
            let agrees = agrees(&world.run.state(tape.fragment, version), tensors::state_bytes(&state))
                && agrees(&world.run.keyframe(tape.fragment, version), tensors::keyframe_bytes(tape.fragment, version, &state));
            self.hold(world, "bit_identical", agrees, || format!("fragment {} version {version}", tape.fragment));
        }
    }

    /// Where a step takes its fragment back to a version, every other fragment is no further, or goes back in the round before it or in the
    /// two behind it: a step that an earlier writer decided otherwise is made good by the next one.
    fn rollbacks_are_whole(&mut self, world: &World) {
        let fragments = u64::from(world.plan.parameters.fragments);
        let mut left = BTreeSet::new();
        for (t, restored) in self.tapes.values().filter_map(|tape| Some((tape.t, tape.restores?))) {
            let around = || self.tapes.range(t.saturating_sub(fragments - 1)..t + 2 * fragments).map(|(_, tape)| tape);
            let is_back = |tape: &&Tape| tape.restores == Some(restored) || tape.base_version <= restored;
            let back: BTreeSet<u16> = around().filter(is_back).map(|tape| tape.fragment).collect();
            left.extend((0..world.plan.parameters.fragments).filter(|fragment| !back.contains(fragment)).map(|fragment| (t, fragment)));
        }
        self.hold(world, "rollback_is_whole", left.is_empty(), || format!("of these steps and fragments one stays: {left:?}"));
    }

    /// An order to go back that was taken for done is followed by steps that go back.
    fn rollbacks_are_done(&mut self, world: &World) {
        let outcomes = world.status().map_or_else(Vec::new, |status| status.outcomes);
        let done: BTreeSet<u64> = outcomes.iter().filter(|one| one.done).map(|one| one.number).collect();
        for (number, (_, action)) in (1..).zip(world.orders()).filter(|(number, _)| done.contains(number)) {
            let Action::Rollback { version } = action else { continue };
            let goes_back = self.tapes.values().any(|tape| tape.restores == Some(version));
            self.hold(world, "rollback_is_whole", goes_back, || format!("order {number}: nothing goes back to version {version}"));
        }
    }

    /// The audits that the orchestrator drew.
    fn audits_drawn(&self, world: &World) -> Vec<Selection> {
        let parameters = &world.plan.parameters;
        let mut drawn = Vec::new();
        for cycle in 0.. {
            let Some((_, draw)) = world.peek(&world.run.draw(cycle)).and_then(|bytes| decoded::<AuditDraw>(&bytes)) else { break };
            let of_cycle = |merge: &&MergeManifest| cycle_of(merge.t, parameters.fragments) == cycle;
            let merges: Vec<MergeManifest> = self.manifests.values().map(|(_, merge)| merge).filter(of_cycle).cloned().collect();
            drawn.extend(select(world.context.run, parameters.audit.rate_ppm, &draw, &merges));
        }
        drawn
    }

    /// What each hotkey earned: the tokens of a learner's cycle count, unless its audit, or the hotkey's last one before or next one behind
    /// where it has none, was failed or not opened; those of what a filter left out for its looks, if that next or own one was passed.
    fn earned(&self, world: &World, drawn: &[Selection]) -> Vec<(AccountId, u64)> {
        // By hotkey, then cycle and slot.
        let mut books: BTreeMap<AccountId, BTreeMap<(u64, u8), LearnerCycle>> = BTreeMap::new();
        for (_, manifest) in self.manifests.values() {
            let cycle = cycle_of(manifest.t, world.plan.parameters.fragments);
            for one in manifest.worked() {
                let cell = books.entry(one.hotkey).or_default().entry((cycle, one.slot)).or_default();
                *if one.is_suspect() { &mut cell.suspect_tokens } else { &mut cell.tokens } += one.tokens;
            }
        }
        for Selection { audit, validator, hotkey, slot, cycle, .. } in drawn {
            let is_sound = match self.revealed.get(&(*audit, *validator)) {
                Some(VerdictResult::Pass) => Some(true),
                Some(VerdictResult::Mismatch | VerdictResult::NoOpening) => Some(false),
                _ => None,
            };
            books.entry(*hotkey).or_default().entry((*cycle, *slot)).or_default().is_sound = is_sound;
        }
        let of_hotkey = |cells: &BTreeMap<(u64, u8), LearnerCycle>| {
            let cells: Vec<LearnerCycle> = cells.values().copied().collect();
            let count = |at: usize| {
                let LearnerCycle { tokens, suspect_tokens, is_sound } = cells[at];
                let before = cells[..at].iter().rev().find_map(|cell| cell.is_sound);
                let behind = cells[at..].iter().find_map(|cell| cell.is_sound);
                let is_void = behind == Some(false) || (is_sound.is_none() && before == Some(false));
                if is_void { 0 } else { tokens + if behind == Some(true) { suspect_tokens } else { 0 } }
            };
            (0..cells.len()).map(count).sum::<u64>()
        };
        let earned = books.iter().map(|(hotkey, cells)| (*hotkey, of_hotkey(cells)));
        earned.filter(|(_, tokens)| *tokens > 0).collect()
    }

    /// The run is over.
    pub fn end(&mut self, world: &World) {
        self.listen(world);
        let parameters = &world.plan.parameters;
        let Some(head) = self.head.clone() else {
            return self.violated(world, "run_completes", "there is no head".into());
        };
        self.hold(world, "run_completes", head.state == RunState::Complete, || format!("{:?} at step {}", head.state, head.outer_step));
        // A run that is drained ends before its time.
        let is_drained = world.plan.orders.iter().any(|(_, action)| *action == Action::Drain);
        let cycles = if is_drained { 0 } else { parameters.cycles };
        let lacking = head.fragments.iter().filter(|fragment| fragment.version < cycles).count();
        self.hold(world, "run_completes", lacking == 0, || format!("{lacking} fragments lack merges"));
        let outlived =
            world.orchestrators.iter().filter(|node| node.borrow().machine().is_some_and(|machine| machine.epoch() < self.epoch));
        let outlived = outlived.count();
        self.hold(world, "one_writer_per_epoch", outlived == 0, || format!("{outlived} processes go on without the lease"));
        self.replay_tapes(world);
        self.rollbacks_are_whole(world);
        self.rollbacks_are_done(world);
        self.validators_agree(world);
        let missing: Vec<u64> = (0..head.outer_step).filter(|t| !self.manifests.contains_key(t)).collect();
        self.hold(world, "merged_once", missing.is_empty(), || format!("steps without a manifest: {missing:?}"));
        if head.state != RunState::Complete {
            return;
        }
        let merges: Vec<(Digest, MergeManifest)> = self.manifests.values().cloned().collect();
        for (id, manifest) in merges {
            let Some(at) = self.log_order.get(&id).copied() else {
                self.violated(world, "log_is_complete", format!("the merge of step {} is not in the log", manifest.t));
                continue;
            };
            let unproven = manifest.accepted().find(|one| self.log_order.get(&one.commitment).is_none_or(|before| *before > at));
            let text = unproven.map(|one| one.hotkey.short());
            self.hold(world, "log_is_complete", text.is_none(), || {
                format!("step {}: the commitment of {text:?} is not in the log before it", manifest.t)
            });
        }
    }

    fn validators_agree(&mut self, world: &World) {
        let drawn = self.audits_drawn(world);
        let sum = drawn.iter().fold(Digest::ZERO, |sum, one| verdicts::with(sum, &one.audit, &one.validator));
        let earned = self.earned(world, &drawn);
        for node in &world.validators {
            let mut node = node.borrow_mut();
            let (name, agreed, is_running) = (node.identity.account.short(), node.agreed(), node.is_running());
            self.hold(world, "validators_agree", agreed.is_some() || !is_running, || format!("{name} has not drawn all audits"));
            let Some(agreed) = agreed else { continue };
            self.hold(world, "validators_agree", agreed.drawn == sum, || format!("{name} draws other audits than the orchestrator"));
            let differs = agreed.scores.is_some_and(|scores| scores != earned);
            self.hold(world, "weights_follow_verdicts", !differs, || {
                format!("{name} has other scores in the end than manifests and verdicts give")
            });
        }
    }
}
