//! Which version of each fragment is applied, which one lies on this disk, and which one is on its way.

use protocol::documents::{FragmentProgress, Head};

use super::io::Trouble;

/// Keyframes fetched at the same time.
const FETCHES_MAX: usize = 4;
/// Pause before a keyframe is tried again.
const RETRY_MS: u64 = 1_000;

#[derive(Clone, Debug, Default)]
pub(super) struct Fragment {
    /// Version in the trainer.
    pub(super) applied: Option<u64>,
    /// Steps and tokens since it was applied.
    pub(super) steps: u32,
    pub(super) tokens: u64,
    /// Newest version on this disk.
    here: Option<u64>,
    fetching: Option<u64>,
    not_before_ms: u64,
}

/// Versions and counters as they were when a snapshot was taken.
pub(super) type Saved = Vec<Fragment>;

#[derive(Clone, Debug)]
pub(super) struct Fragments {
    all: Vec<Fragment>,
}

impl Fragments {
    pub(super) fn new(count: usize) -> Self {
        Self { all: vec![Fragment::default(); count] }
    }

    pub(super) fn get(&self, fragment: u16) -> Option<&Fragment> {
        self.all.get(usize::from(fragment))
    }

    /// Fragments whose version in the head is newer than what is here, and may be fetched now: `(fragment, version)`.
    pub(super) fn wanted(&self, head: &Head, now_ms: u64) -> Vec<(u16, u64)> {
        let under_way = self.all.iter().filter(|fragment| fragment.fetching.is_some()).count();
        let newer = |(fragment, head): (&Fragment, &protocol::documents::FragmentHead)| {
            fragment.fetching.is_none() && fragment.not_before_ms <= now_ms && fragment.here.is_none_or(|here| here < head.version)
        };
        self.all
            .iter()
            .zip(&head.fragments)
            .enumerate()
            .filter(|(_, pair)| newer(*pair))
            .map(|(index, (_, head))| (index as u16, head.version))
            .take(FETCHES_MAX.saturating_sub(under_way))
            .collect()
    }

    pub(super) fn fetching(&mut self, fragment: u16, version: u64) {
        self.all[usize::from(fragment)].fetching = Some(version);
    }

    pub(super) fn fetched(&mut self, fragment: u16, version: u64, result: Result<(), Trouble>, now_ms: u64) {
        let Some(entry) = self.all.get_mut(usize::from(fragment)) else { return };
        entry.fetching = None;
        match result {
            Ok(()) => entry.here = entry.here.max(Some(version)),
            Err(_) => entry.not_before_ms = now_ms + RETRY_MS,
        }
    }

    /// When a failed fetch may be tried again.
    pub(super) fn deadline(&self, now_ms: u64) -> Option<u64> {
        self.all.iter().map(|fragment| fragment.not_before_ms).filter(|at| *at > now_ms).min()
    }

    /// Whether every fragment is on this disk: only then can training begin.
    pub(super) fn are_here(&self) -> bool {
        self.all.iter().all(|fragment| fragment.here.is_some())
    }

    pub(super) fn are_applied(&self) -> bool {
        self.all.iter().all(|fragment| fragment.applied.is_some())
    }

    /// Received versions that are newer than the applied ones.
    pub(super) fn to_apply(&self) -> Vec<(u16, u64)> {
        let newer = |fragment: &Fragment| fragment.here.filter(|here| fragment.applied.is_none_or(|applied| applied < *here));
        self.all.iter().enumerate().filter_map(|(index, fragment)| Some((index as u16, newer(fragment)?))).collect()
    }

    pub(super) fn applied(&mut self, applied: &[(u16, u64)]) {
        for (fragment, version) in applied {
            let entry = &mut self.all[usize::from(*fragment)];
            *entry = Fragment { applied: Some(*version), steps: 0, tokens: 0, ..entry.clone() };
        }
    }

    pub(super) fn stepped(&mut self, tokens: u64) {
        for fragment in &mut self.all {
            fragment.steps += 1;
            fragment.tokens += tokens;
        }
    }

    pub(super) fn versions(&self) -> Vec<u64> {
        self.all.iter().map(|fragment| fragment.applied.unwrap_or(0)).collect()
    }

    pub(super) fn save(&self) -> Saved {
        self.all.clone()
    }

    /// Goes back to the versions and counters of a snapshot; what was received since stays here and is applied again.
    pub(super) fn restore(&mut self, saved: &Saved) {
        for (entry, saved) in self.all.iter_mut().zip(saved) {
            *entry = Fragment { applied: saved.applied, steps: saved.steps, tokens: saved.tokens, ..entry.clone() };
        }
    }

    /// Everything is to be applied again, as at the start.
    pub(super) fn forget_applied(&mut self) {
        for fragment in &mut self.all {
            fragment.applied = None;
        }
    }

    pub(super) fn progress(&self) -> impl Iterator<Item = FragmentProgress> {
        self.all.iter().map(|fragment| FragmentProgress { version: fragment.applied.unwrap_or(0), steps: fragment.steps })
    }
}
