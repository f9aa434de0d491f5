//! Releases on schedule and at the end of the run, and what is deleted once nobody needs it (`docs/protocol.md`, outer step).

use protocol::Digest;
use protocol::documents::{Codec, ReleaseRef, RunState};
use protocol::log::LogKind;
use protocol::schedule;
use serde::{Deserialize, Serialize};

use super::{Effect, Orchestrator, Slot};

/// Versions of a fragment that are kept at least: what slow learners, releases that are under way and rollbacks still read.
const VERSIONS_KEPT: u64 = 8;
/// Payloads and versions are kept for so many cycles after the last audit that may need them.
const CYCLES_AFTER_AUDIT: u64 = 4;
/// The newest releases are kept, and of the older ones each tenth.
const RELEASES_KEPT: usize = 3;
const RELEASE_MILESTONE: usize = 10;

/// A release that is being made. The machine goes on meanwhile: its versions are fixed, and their states are kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Releasing {
    pub versions: Vec<u64>,
    pub tokens: u64,
    /// The run is complete with it.
    pub last: bool,
}

/// Objects that nobody needs any more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// Keyframe and state of these versions; their manifests stay.
    pub versions: Vec<(u16, u64)>,
    pub payloads: Vec<(Slot, u64)>,
    /// Openings of these audits of a learner.
    pub openings: Vec<(Slot, Digest)>,
    pub releases: Vec<String>,
}

/// The first version that is kept whatever audits need. The way to every version that stays begins at a keyframe.
fn first_kept(down: Codec, version: u64) -> u64 {
    schedule::keyframe_version(down, (version + 1).saturating_sub(VERSIONS_KEPT))
}

impl Orchestrator {
    /// Releases on schedule; and the end of the run: every fragment merged `cycles` times, then the closing round, released,
    /// complete.
    pub(super) fn finish(&mut self) {
        let cycles = self.parameters().cycles;
        let lowest = self.fragments.iter().map(|fragment| fragment.version).min().unwrap_or(0);
        if self.state == RunState::Open && cycles > 0 && lowest >= cycles {
            self.drain();
        }
        let is_closed = self.pulls.is_empty() && self.closing_until().is_some_and(|until| self.next_t >= until);
        if self.state == RunState::Draining && is_closed {
            return self.release_now(true);
        }
        if self.state != RunState::Open {
            return;
        }
        let every = u64::from(self.parameters().release_every_cycles);
        let is_due = self.release_due || (every > 0 && lowest >= self.released_version + every);
        // In the middle of a rollback it would hold what is taken back.
        if is_due && self.releasing.is_none() && self.restored_version().is_none() {
            self.release_due = false;
            self.release_now(false);
        }
    }

    /// No new leases from here on; each fragment is pulled once more, so that the last release holds all that was trained.
    pub(super) fn drain(&mut self) {
        if self.state == RunState::Open {
            self.state = RunState::Draining;
            // A rollback has its round to itself.
            let from = self.restoring.as_ref().map_or(self.next_t, |restoring| restoring.until.max(self.next_t));
            self.closing_from.get_or_insert(from);
            (self.head_dirty, self.pace.snapshot) = (true, true);
        }
    }

    pub(super) fn closing_until(&self) -> Option<u64> {
        self.closing_from.map(|from| from + u64::from(self.setup.parameters.fragments))
    }

    /// Asks for a release of the versions as they are, one at a time.
    pub(super) fn release_now(&mut self, last: bool) {
        if self.releasing.is_none() {
            self.releasing = Some(Releasing { versions: self.fragment_versions(), tokens: self.tokens, last });
            // A successor makes the same one, and leaves no half of another.
            self.pace.snapshot = true;
            self.resume_release();
        }
    }

    pub(super) fn resume_release(&mut self) {
        if let Some(Releasing { versions, tokens, .. }) = self.releasing.clone() {
            self.emit(Effect::Release { versions, tokens });
        }
    }

    pub(super) fn on_released(&mut self, release: ReleaseRef) {
        let Some(done) = self.releasing.take() else { return };
        // What was released last is released again where nothing was merged since.
        if self.release != release {
            self.log.add(LogKind::Release, release.manifest);
        }
        self.released_version = done.versions.iter().copied().min().unwrap_or(0);
        if self.releases.last() != Some(&release.release) {
            self.releases.push(release.release.clone());
        }
        self.release = release;
        if done.last {
            self.state = RunState::Complete;
        }
        self.head_dirty = true;
        self.pace.snapshot = true;
        self.retire_releases();
    }

    fn retire_releases(&mut self) {
        let older = self.releases.len().saturating_sub(RELEASES_KEPT);
        let is_milestone = |number: usize| (number + 1).is_multiple_of(RELEASE_MILESTONE);
        let retired: Vec<String> = (0..older).filter(|number| !is_milestone(*number)).map(|number| self.releases[number].clone()).collect();
        // An empty name keeps the count and says that the release is gone.
        let retired: Vec<String> = retired.into_iter().filter(|name| !name.is_empty()).collect();
        for name in self.releases.iter_mut().filter(|name| retired.contains(name)) {
            name.clear();
        }
        self.delete(Retired { releases: retired, ..Retired::default() });
    }

    /// The first cycle whose artifacts an audit may still read.
    fn audited_from(&self) -> u64 {
        let fragments = self.parameters().fragments;
        let open = self.audits.values().map(|case| schedule::cycle_of(case.selection.t, fragments));
        let awaited = self.verdicts_awaited.values().map(|awaited| schedule::cycle_of(awaited.t, fragments));
        open.chain(awaited).chain([self.audit_cycle]).min().unwrap_or(0)
    }

    /// The lowest version to which every fragment can still go back.
    pub(super) fn rollback_from(&self) -> u64 {
        self.fragments.iter().map(|fragment| fragment.kept_from.max(fragment.sure_from)).max().unwrap_or(0)
    }

    /// What a predecessor let go of after the snapshot is not known here: it was no more than this.
    pub(super) fn doubt_versions(&mut self) {
        let down = self.parameters().codec_down;
        for fragment in &mut self.fragments {
            fragment.sure_from = first_kept(down, fragment.version);
        }
    }

    /// The version to which fragments are going back, until the last of them is there.
    pub(super) fn restored_version(&self) -> Option<u64> {
        let tapes = self.pulls.values().filter_map(|pull| pull.tape()?.restores);
        tapes.chain(self.restoring.as_ref().map(|restoring| restoring.version)).min()
    }

    /// Lets go of what the newest merge made superfluous.
    pub(super) fn retire(&mut self) {
        let audited_from = self.audited_from();
        let mut retired = Retired::default();
        let releasing = self.releasing.as_ref().map(|releasing| releasing.versions.clone());
        let restored = self.restored_version().unwrap_or(u64::MAX);
        let down = self.parameters().codec_down;
        for (index, fragment) in self.fragments.iter_mut().enumerate() {
            let needed = releasing.as_ref().map_or(u64::MAX, |versions| versions[index]).min(restored);
            let first = first_kept(down, fragment.version);
            while fragment.kept_from < first && fragment.kept_from + CYCLES_AFTER_AUDIT <= audited_from && fragment.kept_from < needed {
                retired.versions.push((index as u16, fragment.kept_from));
                fragment.kept_from += 1;
            }
        }
        let fragments = u64::from(self.parameters().fragments);
        let kept_from = audited_from.saturating_sub(CYCLES_AFTER_AUDIT) * fragments;
        let kept = self.payloads.split_off(&kept_from);
        let gone = std::mem::replace(&mut self.payloads, kept);
        retired.payloads = gone.into_iter().flat_map(|(t, slots)| slots.into_iter().map(move |slot| (slot, t))).collect();
        self.delete(retired);
    }

    pub(super) fn delete(&mut self, retired: Retired) {
        if retired != Retired::default() {
            let number = self.next_revision();
            self.retiring.insert(number, retired.clone());
            self.emit(Effect::Retire { number, retired: Box::new(retired) });
        }
    }

    pub(super) fn resume_retiring(&mut self) {
        for (number, retired) in self.retiring.clone() {
            self.emit(Effect::Retire { number, retired: Box::new(retired) });
        }
    }
}
