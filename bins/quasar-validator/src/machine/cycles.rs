//! Merge manifests: read as they are published, checked, folded in order, and gathered into cycles that wait for their beacon.

use std::collections::{BTreeMap, BTreeSet};

use protocol::audits::{Selection, beacon_from, select};
use protocol::documents::{AuditDraw, AuditParameters, Contribution, FragmentHead, MergeManifest};
use protocol::envelope::RunId;
use protocol::schedule::{Work, cycle_of, fragment_of, merge_weights};
use protocol::{AccountId, Digest, Reason};
use serde::{Deserialize, Serialize};

use super::poller::Poller;
use crate::audit::Subject;

/// Manifests read at the same time: a restart catches up on a long run in a few round trips without flooding the store.
const READS_MAX: usize = 16;
/// Versions of each fragment whose keyframes are kept: what audits of the last cycles may still need.
pub const VERSIONS_KEPT: u64 = 8;
/// So many while audits of earlier cycles wait: learners may take the time of many cycles to open. More would fill disks.
pub const VERSIONS_KEPT_MAX: u64 = 24;
/// Of a block this far behind the chain's head nobody will write down any more who could audit then...
const FORGOTTEN_BLOCKS: u64 = 1_000;
/// ...and what was written down has been looked for during so long: a store may answer wrongly that an object is absent.
const FORGOTTEN_MS: u64 = 10 * 60_000;
/// Complete cycles whose beacon is fixed and not read. While the chain does not answer, no more are gathered: they would fill memory.
const CLOSED_MAX: usize = 64;

/// A published keyframe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct KeyframeRef {
    pub fragment: u16,
    pub version: u64,
    /// BLAKE3 of the file.
    pub digest: Digest,
}

/// A merge manifest that contradicts itself or what came before. It is signed, so this is evidence against the orchestrator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeFault {
    #[error("it is for another outer step or fragment")]
    Step,
    #[error("its base is not the version that the step before left")]
    Base,
    #[error("its version does not follow from what it merged")]
    Version,
    #[error("it restores a version that is not an earlier one, or merges beside that")]
    Restored,
    #[error("contributions are not sorted by hotkey and slot, or one appears twice")]
    Order,
    #[error("a weighed contribution has a base version that no pull allows")]
    ContributionBase,
    #[error("its weights are not those that the signed rule gives")]
    Weights,
    #[error("nothing was merged, yet the fragment changed")]
    Changed,
}

/// Fragment version and digests after the last folded merge.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Latest {
    version: u64,
    /// Keyframe and state digests, once a merge said them.
    digests: Option<(Digest, Digest)>,
}

/// Checks a manifest against the run's rules and the fragment's last state.
fn check(manifest: &MergeManifest, t: u64, fragments: u16, latest: &Latest) -> Result<(), MergeFault> {
    if manifest.t != t || manifest.fragment != fragment_of(t, fragments) {
        return Err(MergeFault::Step);
    }
    if manifest.base_version != latest.version {
        return Err(MergeFault::Base);
    }
    let merged = manifest.accepted().count();
    let moves = merged > 0 || manifest.restores.is_some();
    if manifest.version != manifest.base_version.saturating_add(u64::from(moves)) {
        return Err(MergeFault::Version);
    }
    // Who goes back merges nothing, and goes back.
    if manifest.restores.is_some_and(|earlier| merged > 0 || earlier >= manifest.base_version) {
        return Err(MergeFault::Restored);
    }
    if !manifest.contributions.is_sorted_by(|a, b| (a.hotkey, a.slot) < (b.hotkey, b.slot)) {
        return Err(MergeFault::Order);
    }
    // Weights are fixed before the filters look at norms and directions: what those refused was weighed as well.
    let weighed: Vec<&Contribution> =
        manifest.contributions.iter().filter(|one| one.tokens > 0 || one.weight_ppm > 0 || one.outcome == Reason::None).collect();
    if weighed.iter().any(|one| one.base_version > manifest.base_version || one.base_version < manifest.base_version.saturating_sub(1)) {
        return Err(MergeFault::ContributionBase);
    }
    let work: Vec<Work> =
        weighed.iter().map(|one| Work { tokens: one.tokens, versions_behind: manifest.base_version - one.base_version }).collect();
    if !weighed.iter().map(|one| one.weight_ppm).eq(merge_weights(&work)) {
        return Err(MergeFault::Weights);
    }
    match latest.digests {
        Some(digests) if !moves && digests != (manifest.keyframe, manifest.state) => Err(MergeFault::Changed),
        _ => Ok(()),
    }
}

/// A cycle whose merges are all in.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Closed {
    merges: Vec<MergeManifest>,
    /// The latest block that its merges name.
    last_block: u64,
    /// Once a merge behind it says from where it is counted, or the run is over.
    beacon_block: Option<u64>,
    /// Since when what it is drawn with is nowhere to be found.
    forgotten_since_ms: Option<u64>,
    poller: Poller,
}

/// What one folded manifest brought.
#[derive(Clone, Debug, PartialEq)]
pub struct Folded {
    pub manifest: MergeManifest,
    pub fault: Option<MergeFault>,
}

/// What a look for a cycle's draw brought.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DrawRead {
    Drawn(Box<AuditDraw>),
    /// The chain has forgotten who could audit then, and nobody has written it down.
    Forgotten,
    /// Chain or store did not answer, or the block is not final there.
    Failed,
}

impl DrawRead {
    /// What the chain says of a cycle's beacon block counts. Where it has forgotten who could audit then, what was `written` down of that
    /// block does.
    pub fn of(cycle: u64, (block, hash): (u64, Option<Digest>), validators: Option<Vec<AccountId>>, written: Option<AuditDraw>) -> Self {
        let Some(beacon) = hash else { return Self::Forgotten };
        let seen = validators.map(|validators| AuditDraw { cycle, beacon_block: block, beacon, validators });
        let fits = |draw: &AuditDraw| (draw.cycle, draw.beacon_block, draw.beacon) == (cycle, block, beacon);
        if let Some(written) = &written
            && seen.as_ref().map_or(!fits(written), |seen| seen != written)
        {
            if fits(written) && written.validators.is_empty() {
                tracing::warn!(
                    cycle,
                    block,
                    "the orchestrator could not see any more who could audit: no audits of this cycle are ordered"
                );
            } else {
                tracing::error!(cycle, block, "the orchestrator draws audits with something else than the chain's");
            }
        }
        seen.or(written.filter(fits)).map_or(Self::Forgotten, |draw| Self::Drawn(Box::new(draw)))
    }
}

/// All manifests of a run, as far as they were read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cycles {
    run: RunId,
    fragments: u16,
    rate_ppm: u32,
    beacon_blocks: u64,
    retry_ms: u64,
    /// Outer steps below this are closed, as the head says.
    closed_below: u64,
    /// No step follows these.
    is_over: bool,
    /// Outer steps below this are folded.
    folded_below: u64,
    arrived: BTreeMap<u64, MergeManifest>,
    reading: BTreeSet<u64>,
    /// Steps whose manifest could not be read, and when to look again.
    missing: BTreeMap<u64, u64>,
    latest: Vec<Latest>,
    keyframes: BTreeMap<(u16, u64), Digest>,
    /// Manifests of the cycle that is not complete.
    open: Vec<MergeManifest>,
    closed: BTreeMap<u64, Closed>,
}

impl Cycles {
    pub fn new(run: RunId, fragments: u16, audit: &AuditParameters, retry_ms: u64) -> Self {
        Self {
            run,
            fragments,
            rate_ppm: audit.rate_ppm,
            beacon_blocks: u64::from(audit.beacon_blocks),
            retry_ms,
            closed_below: 0,
            is_over: false,
            folded_below: 0,
            arrived: BTreeMap::new(),
            reading: BTreeSet::new(),
            missing: BTreeMap::new(),
            latest: vec![Latest::default(); usize::from(fragments)],
            keyframes: BTreeMap::new(),
            open: Vec::new(),
            closed: BTreeMap::new(),
        }
    }

    /// The head says that steps below `closed_below` are closed, and whether the run is over with them.
    pub fn follow(&mut self, closed_below: u64, is_over: bool) {
        self.closed_below = self.closed_below.max(closed_below);
        self.is_over |= is_over;
        self.count_beacons(None);
    }

    /// Whether so many cycles wait for their draw that no more are gathered.
    fn is_full(&self) -> bool {
        self.closed.values().filter(|closed| closed.beacon_block.is_some()).count() > CLOSED_MAX
    }

    /// The next manifests to read.
    pub fn wanted(&mut self, now_ms: u64) -> Vec<u64> {
        if self.is_full() {
            return Vec::new();
        }
        // What waits to be folded counts as well: one missing step must not make the rest of a long run pile up here.
        let end = self.closed_below.min(self.folded_below + 4 * READS_MAX as u64);
        let mut wanted = Vec::new();
        for t in self.folded_below..end {
            if self.reading.len() >= READS_MAX {
                break;
            }
            let is_held_back = self.missing.get(&t).is_some_and(|due_ms| *due_ms > now_ms);
            if self.arrived.contains_key(&t) || is_held_back || !self.reading.insert(t) {
                continue;
            }
            self.missing.remove(&t);
            wanted.push(t);
        }
        wanted
    }

    /// A read ended without a manifest.
    pub fn not_read(&mut self, t: u64, now_ms: u64) {
        self.reading.remove(&t);
        self.missing.insert(t, now_ms + self.retry_ms);
    }

    /// A manifest arrived; gives those that can be folded now, in order.
    pub fn arrive(&mut self, t: u64, manifest: MergeManifest) -> Vec<Folded> {
        self.reading.remove(&t);
        if t >= self.folded_below {
            self.arrived.insert(t, manifest);
        }
        let mut folded = Vec::new();
        while let Some(manifest) = self.arrived.remove(&self.folded_below) {
            folded.push(self.fold(manifest));
            self.folded_below += 1;
        }
        self.count_beacons(None);
        folded
    }

    /// Says of complete cycles from which block their beacon is counted: a merge behind them that names a later `block`, or the end.
    fn count_beacons(&mut self, block: Option<u64>) {
        let is_over = self.is_over && self.folded_below >= self.closed_below;
        for closed in self.closed.values_mut().filter(|closed| closed.beacon_block.is_none()) {
            closed.beacon_block = beacon_from(closed.last_block, block, is_over).map(|from| from.saturating_add(self.beacon_blocks));
        }
    }

    fn fold(&mut self, manifest: MergeManifest) -> Folded {
        let t = self.folded_below;
        let latest = &mut self.latest[usize::from(fragment_of(t, self.fragments))];
        let fault = check(&manifest, t, self.fragments, latest).err();
        // A faulty step is not credited, but the run went on from what it says: so do we, to judge the next one by itself.
        *latest = Latest { version: manifest.version, digests: Some((manifest.keyframe, manifest.state)) };
        let fragment = fragment_of(t, self.fragments);
        if manifest.version > manifest.base_version {
            self.keyframes.insert((fragment, manifest.version), manifest.keyframe);
            if let Some(old) = manifest.version.checked_sub(VERSIONS_KEPT) {
                self.keyframes.remove(&(fragment, old));
            }
        }
        self.count_beacons(Some(manifest.block));
        // Faulty ones take part in the selection too: everybody has to draw from the same list.
        self.open.push(manifest.clone());
        let cycle = cycle_of(t, self.fragments);
        if cycle_of(t + 1, self.fragments) != cycle {
            let merges = std::mem::take(&mut self.open);
            let last_block = merges.iter().map(|merge| merge.block).max().unwrap_or(0);
            let poller = Poller::new(self.retry_ms);
            self.closed.insert(cycle, Closed { merges, last_block, beacon_block: None, forgotten_since_ms: None, poller });
        }
        Folded { manifest, fault }
    }

    /// Beacons to ask the chain for: (cycle, block), once the chain is there.
    pub fn beacons_wanted(&mut self, head_block: u64, now_ms: u64) -> Vec<(u64, u64)> {
        let wanted = |(cycle, closed): (&u64, &mut Closed)| {
            let block = closed.beacon_block.filter(|block| *block <= head_block)?;
            closed.poller.begin(now_ms).then_some((*cycle, block))
        };
        self.closed.iter_mut().filter_map(wanted).collect()
    }

    /// What was found of the cycle's draw: its audits. Where it was not read, it is asked for again, unless it is lost in the past.
    pub fn drawn(&mut self, cycle: u64, read: DrawRead, head_block: u64, now_ms: u64) -> Vec<Subject> {
        let Some(closed) = self.closed.get_mut(&cycle) else { return Vec::new() };
        let Some(beacon_block) = closed.beacon_block else { return Vec::new() };
        match read {
            DrawRead::Drawn(draw) => {
                let Some(Closed { merges, .. }) = self.closed.remove(&cycle) else { return Vec::new() };
                let selections = select(self.run, self.rate_ppm, &draw, &merges);
                return selections.into_iter().filter_map(|selection| subject(selection, &merges)).collect();
            }
            DrawRead::Forgotten => {
                closed.poller.end(now_ms);
                let since_ms = *closed.forgotten_since_ms.get_or_insert(now_ms);
                if beacon_block.saturating_add(FORGOTTEN_BLOCKS) < head_block && since_ms.saturating_add(FORGOTTEN_MS) <= now_ms {
                    tracing::warn!(
                        cycle,
                        block = beacon_block,
                        "the chain has forgotten who could audit at the beacon's block, and nobody wrote it down: this cycle stays without audits here"
                    );
                    self.closed.remove(&cycle);
                }
            }
            DrawRead::Failed => closed.poller.end(now_ms),
        }
        Vec::new()
    }

    /// Whether everything that is closed is folded, and all audits are drawn whose block the chain has.
    pub fn is_caught_up(&self, head_block: u64) -> bool {
        let is_due = |closed: &Closed| closed.beacon_block.is_some_and(|block| block <= head_block);
        self.is_folded() && !self.closed.values().any(is_due)
    }

    /// Whether everything that the head calls closed is folded.
    pub fn is_folded(&self) -> bool {
        self.folded_below >= self.closed_below
    }

    /// Whether the chain and the head disagree on a keyframe of the same version: the fragments for which they do.
    pub fn contradictions(&self, fragments: &[FragmentHead]) -> Vec<u16> {
        let contradicts = |(latest, head): (&Latest, &FragmentHead)| match latest.digests {
            Some((keyframe, _)) => latest.version == head.version && keyframe != head.digest,
            None => false,
        };
        let pairs = self.latest.iter().zip(fragments).enumerate();
        pairs.filter(|(_, pair)| contradicts(*pair)).map(|(fragment, _)| fragment as u16).collect()
    }

    /// The oldest complete cycle whose audits are not drawn yet.
    pub fn oldest_closed(&self) -> Option<u64> {
        self.closed.keys().next().copied()
    }

    /// Version of every fragment after the last folded merge.
    pub fn versions(&self) -> Vec<u64> {
        self.latest.iter().map(|latest| latest.version).collect()
    }

    /// Keyframes of the last versions that merges produced.
    pub fn keyframes(&self) -> Vec<KeyframeRef> {
        self.keyframes
            .iter()
            .map(|((fragment, version), digest)| KeyframeRef { fragment: *fragment, version: *version, digest: *digest })
            .collect()
    }

    /// Whether everything that is closed was folded and every complete cycle's audits are known.
    pub fn is_settled(&self) -> bool {
        self.is_folded() && self.closed.is_empty()
    }

    pub fn folded_below(&self) -> u64 {
        self.folded_below
    }

    pub fn deadline(&self) -> Option<u64> {
        // A beacon that was never asked for waits for its block, not for a time.
        let beacons = self.closed.values().filter_map(|closed| closed.poller.deadline()).filter(|due_ms| *due_ms > 0);
        // While all reads are under way, or cycles wait for their draw, an answer comes first.
        let may_read = self.reading.len() < READS_MAX && !self.is_full();
        let missing = self.missing.values().copied().filter(|_| may_read);
        missing.chain(beacons).min()
    }
}

/// The selected contribution with what the merge manifest says of it.
fn subject(selection: Selection, merges: &[MergeManifest]) -> Option<Subject> {
    let merge = merges.iter().find(|merge| merge.t == selection.t)?;
    let contribution = merge.worked().find(|one| one.hotkey == selection.hotkey && one.slot == selection.slot)?;
    Some(Subject { fragment: merge.fragment, contribution: contribution.clone(), selection })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fixture::{account, contribution, drawn, merge, parameters};

    fn cycles() -> Cycles {
        Cycles::new(RunId([1; 16]), 2, &parameters().audit, 100)
    }

    fn both() -> Vec<protocol::documents::Contribution> {
        vec![contribution(1, 0, 100, Reason::None), contribution(2, 0, 100, Reason::None)]
    }

    #[test]
    fn manifests_are_folded_in_order_whatever_order_they_arrive_in() {
        let mut cycles = cycles();
        cycles.follow(3, true);
        assert_eq!(cycles.wanted(0), [0, 1, 2]);
        assert!(cycles.wanted(0).is_empty());
        assert!(cycles.arrive(1, merge(1, 2, both())).is_empty());
        let folded = cycles.arrive(0, merge(0, 2, both()));
        assert_eq!(folded.iter().map(|one| (one.manifest.t, one.fault)).collect::<Vec<_>>(), [(0, None), (1, None)]);
        cycles.not_read(2, 10);
        assert_eq!((cycles.wanted(50), cycles.deadline()), (vec![], Some(110)));
        assert_eq!(cycles.wanted(110), [2]);
    }

    #[test]
    fn a_complete_cycle_asks_for_its_beacon_and_then_knows_its_audits() {
        let mut cycles = cycles();
        cycles.follow(2, true);
        cycles.arrive(0, merge(0, 2, both()));
        assert!(cycles.beacons_wanted(1_000, 0).is_empty());
        cycles.arrive(1, merge(1, 2, both()));
        assert!(!cycles.is_settled());
        assert!(cycles.beacons_wanted(7, 0).is_empty(), "block 5 + 3 is not there yet");
        assert_eq!(cycles.beacons_wanted(8, 0), [(0, 8)]);
        assert!(cycles.drawn(0, DrawRead::Failed, 8, 0).is_empty() && !cycles.is_caught_up(8) && cycles.is_caught_up(7));
        assert_eq!(cycles.beacons_wanted(9, 100), [(0, 8)]);
        let subjects = cycles.drawn(0, drawn(0, 8, 9), 9, 100);
        assert_eq!(subjects.len(), 2);
        assert!(subjects.iter().all(|one| one.selection.validator == account(9) && one.contribution.hotkey == one.selection.hotkey));
        assert!(cycles.is_settled());
    }

    #[test]
    fn while_the_chain_is_away_no_beacon_is_counted_from_the_block_that_merges_name() {
        let mut cycles = cycles();
        cycles.follow(6, false);
        let at = |t: u64, block: u64| MergeManifest { block, ..merge(t, 2, both()) };
        for t in 0..5 {
            cycles.arrive(t, at(t, 5));
            assert!(cycles.beacons_wanted(1_000, 0).is_empty(), "a miner may have seen block 8 before it committed");
        }
        cycles.arrive(5, at(5, 40));
        assert_eq!(cycles.beacons_wanted(1_000, 0), [(0, 43), (1, 43)]);
        cycles.follow(6, true);
        assert_eq!(cycles.beacons_wanted(1_000, 0), [(2, 43)], "nothing follows");
    }

    #[test]
    fn a_draw_that_the_chain_has_forgotten_ends_the_wait_and_one_that_was_not_read_does_not() {
        let mut cycles = cycles();
        cycles.follow(2, true);
        cycles.arrive(0, merge(0, 2, both()));
        cycles.arrive(1, merge(1, 2, both()));
        cycles.beacons_wanted(5_000, 0);
        cycles.drawn(0, DrawRead::Failed, 5_000, 0);
        cycles.drawn(0, DrawRead::Forgotten, 500, 0);
        assert!(!cycles.is_settled());
        cycles.drawn(0, DrawRead::Forgotten, 5_000, FORGOTTEN_MS - 1);
        assert!(!cycles.is_settled(), "one wrong answer of a store is not the last word");
        cycles.drawn(0, DrawRead::Forgotten, 5_000, FORGOTTEN_MS);
        assert!(cycles.is_settled());
    }

    #[test]
    fn the_chain_counts_before_what_was_written_down_of_it() {
        let draw =
            |beacon: &[u8], validators: Vec<AccountId>| AuditDraw { cycle: 3, beacon_block: 8, beacon: Digest::blake3(beacon), validators };
        let (hash, own, other) = (Some(Digest::blake3(b"hash")), vec![account(1)], vec![account(2)]);
        let read = |hash, seen: Option<&Vec<AccountId>>, written| DrawRead::of(3, (8, hash), seen.cloned(), written);
        let drawn = |validators: &Vec<AccountId>| DrawRead::Drawn(Box::new(draw(b"hash", validators.clone())));
        assert_eq!(read(hash, Some(&own), None), drawn(&own));
        assert_eq!(read(hash, Some(&own), Some(draw(b"hash", other.clone()))), drawn(&own));
        assert_eq!(read(hash, Some(&own), Some(draw(b"hash", Vec::new()))), drawn(&own));
        assert_eq!(read(hash, None, Some(draw(b"hash", other.clone()))), drawn(&other));
        assert_eq!(read(hash, None, Some(draw(b"another", other.clone()))), DrawRead::Forgotten);
        assert_eq!(read(hash, None, None), DrawRead::Forgotten);
        assert_eq!(read(None, None, Some(draw(b"hash", other))), DrawRead::Forgotten);
    }

    #[test]
    fn while_the_chain_does_not_answer_cycles_do_not_pile_up() {
        let mut cycles = cycles();
        cycles.follow(1_000, false);
        let mut t = 0;
        loop {
            let wanted = cycles.wanted(0);
            if wanted.is_empty() {
                break;
            }
            for t in wanted {
                cycles.arrive(t, MergeManifest { block: t, ..merge(t, 2, Vec::new()) });
            }
            t += 1;
        }
        assert!(cycles.folded_below() > 2 * CLOSED_MAX as u64 && cycles.folded_below() < 300, "{t}");
        let oldest = cycles.oldest_closed().unwrap();
        cycles.drawn(oldest, drawn(oldest, 4, 9), 1_000, 0);
        assert_eq!(cycles.oldest_closed(), Some(oldest + 1));
    }

    #[test]
    fn every_contradiction_of_a_manifest_has_a_name() {
        let latest = Latest { version: 0, digests: Some((Digest::ZERO, Digest::ZERO)) };
        let good = merge(1, 2, both());
        assert_eq!(check(&good, 1, 2, &latest), Ok(()));
        let with = |change: fn(&mut MergeManifest)| {
            let mut manifest = good.clone();
            change(&mut manifest);
            check(&manifest, 1, 2, &latest).unwrap_err()
        };
        assert_eq!(with(|m| m.fragment = 0), MergeFault::Step);
        assert_eq!(with(|m| m.t = 3), MergeFault::Step);
        assert_eq!(with(|m| m.base_version = 4), MergeFault::Base);
        assert_eq!(with(|m| m.version = 2), MergeFault::Version);
        assert_eq!(with(|m| m.contributions.swap(0, 1)), MergeFault::Order);
        assert_eq!(with(|m| m.contributions[1].hotkey = m.contributions[0].hotkey), MergeFault::Order);
        assert_eq!(with(|m| m.contributions[0].base_version = 1), MergeFault::ContributionBase);
        assert_eq!(with(|m| m.contributions[0].weight_ppm += 1), MergeFault::Weights);
        assert_eq!(with(|m| m.contributions[0].tokens = 1_000), MergeFault::Weights);
        let filtered = merge(1, 2, vec![contribution(1, 0, 100, Reason::None), contribution(2, 0, 50, Reason::DirectionOutlier)]);
        assert_eq!((check(&filtered, 1, 2, &latest), filtered.contributions[0].weight_ppm), (Ok(()), 600_000));
        let mut empty = merge(1, 2, vec![contribution(1, 0, 0, Reason::Late)]);
        assert_eq!(check(&empty, 1, 2, &latest), Ok(()));
        empty.keyframe = Digest::blake3(b"other");
        assert_eq!(check(&empty, 1, 2, &latest), Err(MergeFault::Changed));
        // A rollback is a new version with an earlier state.
        let latest = Latest { version: 5, ..latest };
        let back = MergeManifest { base_version: 5, version: 6, restores: Some(3), ..empty };
        assert_eq!(check(&back, 1, 2, &latest), Ok(()));
        assert_eq!(check(&MergeManifest { restores: Some(5), ..back.clone() }, 1, 2, &latest), Err(MergeFault::Restored));
        assert_eq!(check(&MergeManifest { restores: None, ..back }, 1, 2, &latest), Err(MergeFault::Version));
    }

    #[test]
    fn a_faulty_manifest_is_reported_and_stays_in_the_selection_that_everybody_draws() {
        let mut cycles = cycles();
        cycles.follow(2, true);
        let mut faulty = merge(0, 2, both());
        faulty.contributions[0].weight_ppm = 999_999;
        assert_eq!(cycles.arrive(0, faulty)[0].fault, Some(MergeFault::Weights));
        cycles.arrive(1, merge(1, 2, vec![contribution(3, 0, 10, Reason::None)]));
        cycles.beacons_wanted(1_000, 0);
        let subjects = cycles.drawn(0, drawn(0, 8, 9), 1_000, 0);
        let audited: Vec<_> = subjects.iter().map(|one| one.selection.hotkey).collect();
        assert_eq!(audited, [account(1), account(2), account(3)]);
    }

    #[test]
    fn a_head_that_names_another_keyframe_than_the_merge_is_seen() {
        let mut cycles = cycles();
        cycles.follow(1, true);
        cycles.arrive(0, merge(0, 2, both()));
        let head = |version, digest| FragmentHead { version, length: 1, digest };
        let same = [head(1, Digest::ZERO), head(0, Digest::ZERO)];
        assert!(cycles.contradictions(&same).is_empty());
        assert_eq!(cycles.contradictions(&[head(1, Digest::blake3(b"x")), same[1].clone()]), [0]);
        assert!(cycles.contradictions(&[head(2, Digest::blake3(b"x")), same[1].clone()]).is_empty());
    }
}
