//! Pulls: opened on schedule, answered by commitments, closed by quorum and grace, merged from a tape.

use std::collections::{BTreeMap, BTreeSet};

use protocol::documents::{Commitment, Contribution, MergeManifest, Progress, RunState, Tape, TapeInput};
use protocol::log::LogKind;
use protocol::schedule::{self, Work};
use protocol::{Digest, Reason};
use serde::{Deserialize, Serialize};

use super::leases::LeasedSteps;
use super::{Effect, Fragment, Key, Learner, Orchestrator, Slot, StoredCommitment, Want};

/// A learner's step is believed to take at least this share of the average, as one part in so many.
const STEP_MS_SHARE_MIN: u64 = 4;
/// Committed payloads that are on their way are waited for, after the quorum, for so many steps.
const UPLOAD_GRACE_STEPS: u64 = 2;

/// A pull from its opening to its merge.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpenPull {
    pub fragment: u16,
    pub version: u64,
    pub opened_ms: u64,
    pub deadline_ms: u64,
    pub quorum_ms: Option<u64>,
    pub closed_ms: u64,
    pub offers: BTreeMap<Slot, Offer>,
    pub stage: PullStage,
    /// Offers that are accepted, those that may still be, and of these those that are sought.
    accepted: usize,
    pending: usize,
    sought: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullStage {
    Open,
    /// The tape is being written.
    Taping(Tape),
    /// The tape lies in the bucket.
    Merging(Tape),
}

/// One learner's answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Offer {
    pub commitment: Commitment,
    /// Envelope of the commitment.
    pub id: Digest,
    pub stage: OfferStage,
    /// The commitment lies in the bucket and is put in the log.
    pub(super) is_logged: bool,
    /// Its session is over: nobody uploads any more.
    pub(super) has_left: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OfferStage {
    /// Its evidence is being stored.
    Committed,
    /// An upload grant is out.
    Granted,
    /// A predecessor granted the upload, and may have accepted it: its payload is looked for in the bucket, and nothing is decided before that
    /// is known.
    Sought,
    Checking,
    Accepted,
    Rejected(Reason),
}

impl OfferStage {
    pub(super) fn is_accepted(self) -> bool {
        self == Self::Accepted
    }

    pub(super) fn is_pending(self) -> bool {
        matches!(self, Self::Committed | Self::Granted | Self::Sought | Self::Checking)
    }
}

impl OpenPull {
    pub(super) fn new(fragment: u16, version: u64, now_ms: u64, deadline_ms: u64) -> Self {
        Self {
            fragment,
            version,
            opened_ms: now_ms,
            deadline_ms: now_ms + deadline_ms,
            quorum_ms: None,
            closed_ms: 0,
            offers: BTreeMap::new(),
            stage: PullStage::Open,
            accepted: 0,
            pending: 0,
            sought: 0,
        }
    }

    /// What was decided, from then on.
    pub(super) fn tape(&self) -> Option<&Tape> {
        match &self.stage {
            PullStage::Open => None,
            PullStage::Taping(tape) | PullStage::Merging(tape) => Some(tape),
        }
    }

    /// Offers that are accepted, and those that may still be.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.accepted, self.pending)
    }

    fn count(&mut self, stage: OfferStage, by: isize) {
        if stage.is_pending() {
            self.pending = self.pending.saturating_add_signed(by);
        } else if stage == OfferStage::Accepted {
            self.accepted = self.accepted.saturating_add_signed(by);
        }
        if stage == OfferStage::Sought {
            self.sought = self.sought.saturating_add_signed(by);
        }
    }

    pub(super) fn add(&mut self, slot: Slot, offer: Offer) {
        self.count(offer.stage, 1);
        self.offers.insert(slot, offer);
    }

    /// Moves an offer from one stage to the next; `None` if it is not in the first.
    fn advance(&mut self, slot: &Slot, from: OfferStage, to: OfferStage) -> Option<&mut Offer> {
        if self.offers.get(slot)?.stage != from {
            return None;
        }
        self.count(from, -1);
        self.count(to, 1);
        let offer = self.offers.get_mut(slot)?;
        offer.stage = to;
        Some(offer)
    }

    fn remove(&mut self, slot: &Slot) {
        if let Some(offer) = self.offers.remove(slot) {
            self.count(offer.stage, -1);
        }
    }

    /// Nothing that was offered counts.
    pub(super) fn refuse_all(&mut self, reason: Reason) {
        self.offers.values_mut().for_each(|offer| offer.stage = OfferStage::Rejected(reason));
        (self.accepted, self.pending, self.sought) = (0, 0, 0);
    }
}

impl Orchestrator {
    /// Opens the next pull when the schedule allows: at most τ + 1 at once, none on a fragment whose last one is still open, and
    /// not before H ξ / P after the last one. In the closing round each fragment is pulled once more, as fast as it goes.
    pub(super) fn open_pulls(&mut self) {
        let is_closing = match self.state {
            RunState::Open => false,
            RunState::Draining if self.closing_until().is_some_and(|until| self.next_t < until) => true,
            RunState::Draining | RunState::Complete => return,
        };
        let now_ms = self.volatile.now_ms;
        let fragments = self.parameters().fragments;
        let fragment = schedule::fragment_of(self.next_t, fragments);
        let interval = schedule::pull_interval_ms(self.parameters(), self.timing.step_ms());
        let cycles = self.parameters().cycles;
        let version = self.fragments[usize::from(fragment)].version;
        if self.pulls.len() > usize::from(self.parameters().overlap) || self.pulls.values().any(|pull| pull.fragment == fragment) {
            return;
        }
        if self.restoring.is_some() {
            return self.restore_next();
        }
        if !is_closing && cycles > 0 && version >= cycles {
            let is_open = |fragment: usize| self.pulls.values().any(|pull| usize::from(pull.fragment) == fragment);
            if self.fragments.iter().enumerate().any(|(index, fragment)| fragment.version < cycles && !is_open(index)) {
                self.pass_over(fragment, version);
            }
            return;
        }
        // Before anybody is counted: this is asked after every answer of every learner.
        if !is_closing && now_ms < self.last_pull_ms + interval {
            return;
        }
        // Also those that are not waited for any more: if nobody is, their answers are all that can come.
        let able = self.learners.values().filter(|learner| learner.is_asked(fragment, is_closing)).count();
        if is_closing && able == 0 {
            // A process that has just begun has not heard of anybody yet.
            if now_ms >= self.pace.resumed_ms + self.parameters().learner_ttl_ms {
                self.pass_over(fragment, version);
            }
            return;
        }
        let needed = if self.next_t == 0 { usize::from(self.parameters().quorum_min) } else { 1 };
        if able < needed {
            return;
        }
        self.last_pull_ms = now_ms;
        self.pulls.insert(self.next_t, OpenPull::new(fragment, version, now_ms, self.parameters().pull_deadline_ms));
        self.next_t += 1;
        self.head_dirty = true;
    }

    /// Publishes an empty merge for a fragment that has all its merges while another one still lacks some, or that nobody could
    /// answer for: every outer step has its manifest.
    fn pass_over(&mut self, fragment: u16, version: u64) {
        let t = self.next_t;
        let Fragment { state, step_mean, .. } = self.fragments[usize::from(fragment)];
        let closing = self.is_closing(t);
        let tape = Tape {
            t,
            fragment,
            epoch: self.epoch,
            base_version: version,
            base_state: state,
            block: self.block,
            closing,
            restores: None,
            step_mean,
            inputs: Vec::new(),
        };
        self.tape_at_once(tape);
    }

    /// Takes up new commitments and finished uploads of a record.
    pub(super) fn on_commitments(&mut self, slot: Slot, id: Digest, record: &Progress) {
        for commitment in &record.commitments {
            self.on_commitment(slot, id, commitment);
        }
        for t in &record.uploaded {
            let Some(pull) = self.pulls.get_mut(t).filter(|pull| pull.stage == PullStage::Open) else { continue };
            if let Some(offer) = pull.advance(&slot, OfferStage::Granted, OfferStage::Checking) {
                let commitment = offer.commitment.clone();
                self.emit(Effect::CheckPayload { slot, t: *t, commitment });
            }
        }
    }

    fn on_commitment(&mut self, slot: Slot, id: Digest, commitment: &Commitment) {
        let Some(pull) = self.pulls.get(&commitment.t) else { return };
        if pull.stage != PullStage::Open || pull.offers.contains_key(&slot) {
            return;
        }
        let reason = self.refusal(slot, pull, commitment);
        let stage = if reason == Reason::None { OfferStage::Committed } else { OfferStage::Rejected(reason) };
        if reason != Reason::None {
            self.note(slot, reason);
        }
        let t = commitment.t;
        let Some(pull) = self.pulls.get_mut(&t) else { return };
        pull.add(slot, Offer { commitment: commitment.clone(), id, stage, is_logged: false, has_left: false });
        self.pace.pulls_changed = true;
        if stage == OfferStage::Committed {
            self.emit(Effect::StoreCommitment { slot, t, id, commitment: commitment.digest() });
        }
    }

    /// Why a commitment does not count; [`Reason::None`] if it does.
    fn refusal(&self, slot: Slot, pull: &OpenPull, commitment: &Commitment) -> Reason {
        let fragment = &self.fragments[usize::from(pull.fragment)];
        if commitment.fragment != pull.fragment || commitment.steps == 0 {
            return Reason::UnknownPull;
        }
        let base = commitment.base_version;
        if base > pull.version || base + 1 < pull.version || base < fragment.base_min {
            return Reason::StaleBase;
        }
        if commitment.length != fragment.payload_length {
            return Reason::LengthMismatch;
        }
        match self.leases.get(&commitment.lease) {
            Some(lease) if lease.slot == slot && commitment.lease_step <= lease.lease.steps => Reason::None,
            _ => Reason::NoLease,
        }
    }

    fn note(&mut self, slot: Slot, reason: Reason) {
        if let Some(learner) = self.learners.get_mut(&slot) {
            learner.last_reason = reason;
        }
    }

    pub(super) fn on_commitment_stored(&mut self, slot: Slot, t: u64, id: Digest, commitment: &Digest) {
        let Some(pull) = self.pulls.get_mut(&t) else { return };
        // What an earlier session asked to keep is no evidence of what this one commits to.
        if pull.offers.get(&slot).is_none_or(|offer| offer.commitment.digest() != *commitment) {
            return;
        }
        let Some(offer) = pull.advance(&slot, OfferStage::Committed, OfferStage::Granted) else { return };
        (offer.id, offer.is_logged) = (id, true);
        let commitment = offer.commitment.clone();
        self.note_evidence(&commitment, id);
        self.grants_changed(slot);
    }

    /// A commitment lies in the bucket.
    fn note_evidence(&mut self, commitment: &Commitment, id: Digest) {
        let (now_ms, step_ms) = (self.volatile.now_ms, self.timing.step_ms());
        if let Some(record) = self.leases.get_mut(&commitment.lease) {
            // Anybody can commit to anything: a claim proves no more steps than the time allows.
            record.evidence = record.evidence.max(commitment.lease_step.min(record.possible(now_ms, step_ms)));
            // Several pulls may be answered at one step boundary.
            let head = (commitment.local_step, commitment.step_chain);
            if record.committed.last() != Some(&head) {
                record.committed.push(head);
            }
        }
        self.log.add(LogKind::Commitment, id);
    }

    /// What a predecessor granted, and may have accepted, counts also if its learner is gone.
    pub(super) fn adopt_commitment(&mut self, stored: &StoredCommitment) {
        let StoredCommitment { slot, id, commitment } = stored.clone();
        let Some(pull) = self.pulls.get(&commitment.t) else { return };
        let is_open = pull.stage == PullStage::Open;
        let known = pull.offers.get(&slot);
        let is_another = known.is_some_and(|offer| offer.commitment != commitment);
        if is_another || (is_open && self.banned.contains_key(&slot.0)) || self.refusal(slot, pull, &commitment) != Reason::None {
            return;
        }
        let (known, has_left) = (known.map(|offer| offer.stage), known.is_some_and(|offer| offer.has_left));
        match known {
            None | Some(OfferStage::Committed) => self.note_evidence(&commitment, id),
            Some(OfferStage::Granted | OfferStage::Checking) if is_open => {}
            Some(_) => return,
        }
        // What is decided has no room for it. It is told so, and what it uploaded is deleted with its step.
        let stage = if is_open { OfferStage::Sought } else { OfferStage::Granted };
        if let Some(pull) = self.pulls.get_mut(&commitment.t) {
            pull.remove(&slot);
            pull.add(slot, Offer { commitment, id, stage, is_logged: true, has_left });
        }
    }

    pub(super) fn on_commitment_refused(&mut self, slot: Slot, t: u64, commitment: &Digest) {
        let Some(pull) = self.pulls.get_mut(&t) else { return };
        // That of an earlier session says nothing of this one's.
        if pull.offers.get(&slot).is_none_or(|offer| offer.commitment.digest() != *commitment) {
            return;
        }
        let refused = OfferStage::Rejected(Reason::RepeatedCommitment);
        if pull.advance(&slot, OfferStage::Committed, refused).is_some() {
            self.note(slot, Reason::RepeatedCommitment);
        }
    }

    pub(super) fn on_payload_checked(&mut self, slot: Slot, t: u64, outcome: Reason) {
        let Some(pull) = self.pulls.get_mut(&t) else { return };
        let has_left = pull.offers.get(&slot).is_some_and(|offer| offer.has_left);
        let outcome = match outcome {
            Reason::NotUploaded if has_left => Reason::SessionReplaced,
            Reason::NotUploaded if pull.advance(&slot, OfferStage::Sought, OfferStage::Granted).is_some() => {
                return self.grants_changed(slot);
            }
            outcome => outcome,
        };
        let stage = if outcome == Reason::None { OfferStage::Accepted } else { OfferStage::Rejected(outcome) };
        let was_checked = [OfferStage::Checking, OfferStage::Sought].iter().any(|from| pull.advance(&slot, *from, stage).is_some());
        if was_checked && outcome != Reason::None {
            self.note(slot, outcome);
        }
    }

    /// What is missing in the grants of `slot`: uploads of commitments whose evidence is stored.
    pub(super) fn payload_wants(&self, slot: Slot) -> Vec<Want> {
        self.pulls
            .iter()
            .filter_map(|(t, pull)| pull.offers.get(&slot).map(|offer| (*t, offer)))
            .filter(|(_, offer)| offer.stage == OfferStage::Granted)
            .map(|(t, offer)| Want::WriteOnce {
                key: Key::Payload { slot, t },
                length: offer.commitment.length,
                sha256: offer.commitment.sha256,
            })
            .collect()
    }

    /// A new session answers for itself what the old one did not commit to. What is uploaded is checked once and stays; nobody uploads
    /// what is not.
    pub(super) fn withdraw_offers(&mut self, slot: Slot) {
        self.remove_offers(slot, |offer| offer.stage == OfferStage::Committed);
        for (t, pull) in self.pulls.iter_mut().filter(|(_, pull)| pull.stage == PullStage::Open) {
            if let Some(offer) = pull.offers.get_mut(&slot) {
                offer.has_left = true;
            }
            // Its upload may have ended just before, or goes on to its end.
            if let Some(offer) = pull.advance(&slot, OfferStage::Granted, OfferStage::Checking) {
                self.volatile.effects.push_back(Effect::CheckPayload { slot, t: *t, commitment: offer.commitment.clone() });
            }
        }
    }

    /// Drops offers to open pulls. Their payloads may lie in the bucket and are in no manifest: they are deleted with those of their step.
    pub(super) fn remove_offers(&mut self, slot: Slot, is_dropped: impl Fn(&Offer) -> bool) {
        for (t, pull) in self.pulls.iter_mut().filter(|(_, pull)| pull.stage == PullStage::Open) {
            if pull.offers.get(&slot).is_some_and(&is_dropped) {
                pull.remove(&slot);
                self.payloads.entry(*t).or_default().push(slot);
            }
        }
    }

    /// Closes pulls that have everything, whose grace is over, or whose deadline has passed.
    pub(super) fn close_pulls(&mut self) {
        let now_ms = self.volatile.now_ms;
        let counts = self.counts();
        let (step_ms, closing_from) = (self.timing.step_ms(), self.closing_from);
        let mut closing = Vec::new();
        for (t, pull) in &mut self.pulls {
            if pull.stage != PullStage::Open || pull.sought > 0 {
                continue;
            }
            let (training, eligible) = if closing_from.is_some_and(|from| *t >= from) {
                let able = || self.learners.values().filter(|learner| learner.is_asked(pull.fragment, true));
                (able().count(), able().filter(|learner| learner.answers_mostly()).count())
            } else {
                counts
            };
            let quorum = schedule::quorum(self.setup.parameters.quorum_min, eligible).max(1);
            let accepted = pull.accepted;
            if accepted >= quorum && pull.quorum_ms.is_none() {
                pull.quorum_ms = Some(now_ms);
            }
            // Whoever commits and uploads nothing, again and again, is waited for no longer. Asked last: it walks over the offers.
            let is_upload =
                |(slot, offer): (&Slot, &Offer)| offer.stage.is_pending() && self.learners.get(slot).is_none_or(Learner::answers_mostly);
            let uploads = || pull.pending > 0 && pull.offers.iter().any(is_upload);
            let complete = accepted >= training.max(1) && !uploads();
            let grace_over = pull.quorum_ms.is_some_and(|quorum_ms| {
                let grace = schedule::grace_ms(&self.setup.parameters, step_ms, quorum_ms - pull.opened_ms, self.timing.sync_ms());
                now_ms >= quorum_ms + grace && (now_ms >= quorum_ms + UPLOAD_GRACE_STEPS * step_ms || !uploads())
            });
            if complete || grace_over || now_ms >= pull.deadline_ms {
                closing.push(*t);
            }
        }
        for t in closing {
            self.close_pull(t);
        }
    }

    pub(super) fn close_pull(&mut self, t: u64) {
        let now_ms = self.volatile.now_ms;
        let (block, closing) = (self.block, self.is_closing(t));
        let row_tokens = u64::from(self.parameters().sequence_length);
        let step_ms_min = self.timing.step_ms() / STEP_MS_SHARE_MIN;
        let epoch = self.epoch;
        let leased = LeasedSteps::of(&self.leases);
        let Some(pull) = self.pulls.get_mut(&t) else { return };
        // Nobody missed a pull that a rollback ends.
        let is_judged = self.restoring.is_none();
        for (slot, learner) in self.learners.iter_mut().filter(|(_, learner)| is_judged && learner.is_asked(pull.fragment, closing)) {
            // A commitment alone is no answer, nor is what was refused: whoever sends no more is not waited for either.
            let answers = |offer: &Offer| matches!(offer.stage, OfferStage::Sought | OfferStage::Checking | OfferStage::Accepted);
            learner.note_answer(pull.offers.get(slot).is_some_and(answers));
        }
        self.pace.survey = true;
        let fragment = &self.fragments[usize::from(pull.fragment)];
        let elapsed_ms = now_ms.saturating_sub(fragment.published_ms);
        let mut inputs = Vec::new();
        let mut work = Vec::new();
        for ((hotkey, slot), offer) in pull.offers.iter().filter(|(_, offer)| offer.stage == OfferStage::Accepted) {
            let Commitment { steps: claimed, lease, lease_step, .. } = offer.commitment;
            let learner = (*hotkey, *slot);
            let steps = schedule::counted_steps(claimed, leased.until(&learner, lease, lease_step), elapsed_ms, step_ms_min);
            let tokens = leased.rows(&learner, lease, lease_step, steps) * row_tokens;
            work.push(Work { tokens, versions_behind: pull.version - offer.commitment.base_version });
            inputs.push(TapeInput {
                hotkey: *hotkey,
                slot: *slot,
                commitment: offer.id,
                payload: offer.commitment.blake3,
                length: offer.commitment.length,
                base_version: offer.commitment.base_version,
                steps,
                tokens,
                weight_ppm: 0,
            });
        }
        for (input, weight_ppm) in inputs.iter_mut().zip(schedule::merge_weights(&work)) {
            input.weight_ppm = weight_ppm;
        }
        let tape = Tape {
            t,
            fragment: pull.fragment,
            epoch,
            base_version: pull.version,
            base_state: fragment.state,
            block,
            closing,
            restores: None,
            step_mean: fragment.step_mean,
            inputs,
        };
        pull.closed_ms = now_ms;
        pull.stage = PullStage::Taping(tape.clone());
        self.head_dirty = true;
        self.emit(Effect::WriteTape { tape: Box::new(tape) });
    }

    fn is_closing(&self, t: u64) -> bool {
        self.closing_from.is_some_and(|from| t >= from)
    }

    /// The tape in the bucket fixes the merge, also where an earlier process wrote another one.
    pub(super) fn on_tape_written(&mut self, tape: Tape) {
        let passed_by = self.passed_by(&tape);
        let Some(pull) = self.pulls.get_mut(&tape.t) else { return };
        if !matches!(pull.stage, PullStage::Taping(_)) {
            return;
        }
        pull.stage = PullStage::Merging(tape.clone());
        // It may be a predecessor's, with a newer view of the chain.
        self.block = self.block.max(tape.block);
        if let Some(version) = passed_by {
            self.restore_again(version, tape.t);
        }
        self.emit_merge(tape);
    }

    fn emit_merge(&mut self, tape: Tape) {
        let Some(pull) = self.pulls.get(&tape.t) else { return };
        let rejected = pull
            .offers
            .iter()
            .filter(|((hotkey, slot), _)| !tape.inputs.iter().any(|input| input.hotkey == *hotkey && input.slot == *slot))
            .map(|((hotkey, slot), offer)| Contribution {
                hotkey: *hotkey,
                slot: *slot,
                commitment: offer.id,
                payload: offer.commitment.blake3,
                base_version: offer.commitment.base_version,
                steps: offer.commitment.steps,
                tokens: 0,
                weight_ppm: 0,
                norm: 0,
                clip_ppm: 0,
                cosine_ppm: 0,
                neighbour_ppm: 0,
                rest_ppm: 0,
                outcome: match offer.stage {
                    OfferStage::Rejected(reason) => reason,
                    OfferStage::Committed | OfferStage::Granted | OfferStage::Sought => Reason::NotUploaded,
                    OfferStage::Checking | OfferStage::Accepted => Reason::Late,
                },
            })
            .collect();
        let fragment = &self.fragments[usize::from(tape.fragment)];
        let previous_keyframe = (fragment.keyframe, fragment.keyframe_length);
        self.emit(Effect::Merge { tape: Box::new(tape), rejected, previous_keyframe });
    }

    pub(super) fn on_merged(&mut self, manifest: MergeManifest, id: Digest, keyframe_length: u64) {
        let now_ms = self.volatile.now_ms;
        let Some(pull) = self.pulls.remove(&manifest.t) else { return };
        // A step that a predecessor decided may hold commitments that this process never took up, refused, or took up under another record;
        // they come before their merge.
        let is_logged = |one: &Contribution| {
            let offer = pull.offers.get(&(one.hotkey, one.slot));
            offer.is_some_and(|offer| offer.is_logged && offer.id == one.commitment)
        };
        for one in manifest.accepted().filter(|one| !is_logged(one)) {
            self.log.add(LogKind::Commitment, one.commitment);
        }
        // Nor need a predecessor have known of all that was offered to this one: what is in no manifest is deleted with its step.
        let named: BTreeSet<Slot> = manifest.contributions.iter().map(|one| (one.hotkey, one.slot)).collect();
        let unnamed: Vec<Slot> = pull.offers.keys().filter(|slot| !named.contains(slot)).copied().collect();
        if !unnamed.is_empty() {
            self.payloads.entry(manifest.t).or_default().extend(unnamed);
        }
        self.log.add(LogKind::Merge, id);
        // A store that was away says nothing of what a merge takes, and leaves nobody without grace.
        let most_ms = u64::from(self.parameters().overlap) * self.timing.step_ms();
        self.timing.add_sync(now_ms.saturating_sub(pull.closed_ms).min(most_ms));
        let fragment = &mut self.fragments[usize::from(manifest.fragment)];
        debug_assert_eq!(fragment.version, manifest.base_version, "versions move one by one");
        if manifest.version > manifest.base_version {
            fragment.version = manifest.version;
            if !manifest.closing && manifest.accepted().next().is_some() {
                fragment.step_mean = fragments::outer::mean_norm(fragment.step_mean, manifest.base_version, manifest.step_norm);
            }
            fragment.keyframe = manifest.keyframe;
            fragment.keyframe_length = keyframe_length;
            fragment.state = manifest.state;
            fragment.published_ms = now_ms;
            if manifest.accepted().next().is_none() {
                // A rollback: what was trained on the versions that it takes back does not count.
                fragment.base_min = manifest.version;
            }
            self.merges += 1;
        } else {
            self.empty_merges += 1;
        }
        for contribution in &manifest.contributions {
            let slot = (contribution.hotkey, contribution.slot);
            let Some(learner) = self.learners.get_mut(&slot) else { continue };
            // Its grants stay as they are: those for what is merged are used up, and to take them out of a bundle revokes nothing.
            learner.last_reason = contribution.outcome;
            if contribution.outcome == Reason::None {
                learner.contributions += 1;
            }
        }
        let (accepted, tokens) =
            manifest.accepted().fold((0, 0), |(count, tokens), contribution| (count + 1, tokens + contribution.tokens));
        self.contributions += accepted;
        self.tokens += tokens / u64::from(self.parameters().fragments);
        self.close_step(manifest.t);
        self.manifests.insert(manifest.t, manifest);
        self.retire();
        self.note_merge();
        self.head_dirty = true;
    }

    fn close_step(&mut self, t: u64) {
        self.closed.insert(t);
        while self.closed.remove(&self.closed_below) {
            self.closed_below += 1;
        }
    }

    /// Asks again for what each open pull waits for.
    pub(super) fn resume_pulls(&mut self) {
        let mut effects = Vec::new();
        let mut merges = Vec::new();
        // Nobody could be answered while no process ran: open pulls get their whole time again.
        let now_ms = self.volatile.now_ms;
        let deadline_ms = now_ms + self.parameters().pull_deadline_ms;
        for (t, pull) in &mut self.pulls {
            pull.deadline_ms = pull.deadline_ms.max(deadline_ms);
            pull.closed_ms = now_ms;
            match &pull.stage {
                PullStage::Open => {
                    (pull.opened_ms, pull.quorum_ms) = (now_ms, None);
                    for (slot, offer) in &pull.offers {
                        match offer.stage {
                            OfferStage::Committed => {
                                let commitment = offer.commitment.digest();
                                effects.push(Effect::StoreCommitment { slot: *slot, t: *t, id: offer.id, commitment });
                            }
                            OfferStage::Sought | OfferStage::Checking => {
                                effects.push(Effect::CheckPayload { slot: *slot, t: *t, commitment: offer.commitment.clone() })
                            }
                            OfferStage::Granted | OfferStage::Accepted | OfferStage::Rejected(_) => {}
                        }
                    }
                }
                PullStage::Taping(tape) => effects.push(Effect::WriteTape { tape: Box::new(tape.clone()) }),
                PullStage::Merging(tape) => merges.push(tape.clone()),
            }
        }
        for effect in effects {
            self.emit(effect);
        }
        for tape in merges {
            self.emit_merge(tape);
        }
    }
}
