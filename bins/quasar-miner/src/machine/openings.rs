//! Openings: when an audit asks for it, the learner uploads the state at the start of a segment and what it did after it.
//!
//! One audit at a time, oldest first: a progress record has room for the parts of one. Parts stay in the record until the
//! notice is gone, so that the orchestrator cannot miss them. Whoever takes a notice away decides that it is too late: its
//! deadline is by the orchestrator's clock, which may be behind after it slept.

use protocol::documents::{Notice, OpeningPart};
use protocol::{AccountId, Digest};

use super::io::{NotPrepared, PreparedPart, Put};

/// Pause before the store is asked again.
const RETRY_MS: u64 = 1_000;
/// Pause before an opening is prepared again: a full disk takes its time.
const PREPARE_RETRY_MS: u64 = 30_000;

#[derive(Clone, Debug, PartialEq)]
enum State {
    Noticed {
        not_before_ms: u64,
    },
    Preparing,
    Ready(Vec<Part>),
    /// The segment is not on this disk.
    Impossible,
}

#[derive(Clone, Debug, PartialEq)]
struct Part {
    part: u8,
    length: u64,
    sha256: Digest,
    upload: Upload,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Upload {
    Waiting { not_before_ms: u64 },
    UnderWay,
    Done,
}

#[derive(Clone, Debug)]
struct Opening {
    audit: Digest,
    t: u64,
    /// What the parts are sealed to.
    key: [u8; 32],
    state: State,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Openings {
    /// In the order of their outer steps: to prepare one lets go of the segments before it.
    all: Vec<Opening>,
    /// How often it has changed what is asked for; 0 before the first head.
    revision: u64,
}

/// What the newest head changed.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Changes {
    pub(super) noticed: Vec<(Digest, u64)>,
    /// All that are asked for, with their outer steps, if these are others than before; and how often they have changed.
    pub(super) asked: Option<(u64, Vec<(Digest, u64)>)>,
}

impl Openings {
    pub(super) fn set_notices(&mut self, notices: &[Notice], hotkey: &AccountId, slot: u8) -> Changes {
        let mut ours = Vec::new();
        for notice in notices {
            let Notice::OpenAudit { audit, hotkey: of, slot: of_slot, t, key, .. } = notice;
            if of == hotkey && *of_slot == slot {
                ours.push(Opening { audit: *audit, t: *t, key: *key, state: State::Noticed { not_before_ms: 0 } });
            }
        }
        let (mut changes, before) = (Changes::default(), self.all.len());
        self.all.retain(|opening| ours.iter().any(|notice| notice.audit == opening.audit));
        let are_gone = self.all.len() < before;
        for notice in ours {
            if !self.all.iter().any(|opening| opening.audit == notice.audit) {
                changes.noticed.push((notice.audit, notice.t));
                self.all.push(notice);
            }
        }
        self.all.sort_by_key(|opening| opening.t);
        if self.revision == 0 || are_gone || !changes.noticed.is_empty() {
            self.revision += 1;
            changes.asked = Some((self.revision, self.all.iter().map(|opening| (opening.audit, opening.t)).collect()));
        }
        changes
    }

    /// The opening that is worked on.
    fn current(&self) -> Option<&Opening> {
        self.all.iter().find(|opening| opening.state != State::Impossible)
    }

    /// The opening whose parts are to be prepared now: audit, outer step, key.
    pub(super) fn to_prepare(&self, now_ms: u64) -> Option<(Digest, u64, [u8; 32])> {
        let opening = self.current()?;
        let is_due = matches!(opening.state, State::Noticed { not_before_ms } if not_before_ms <= now_ms);
        is_due.then_some((opening.audit, opening.t, opening.key))
    }

    fn find(&mut self, audit: &Digest) -> Option<&mut Opening> {
        self.all.iter_mut().find(|opening| opening.audit == *audit)
    }

    pub(super) fn preparing(&mut self, audit: &Digest) {
        if let Some(opening) = self.find(audit) {
            opening.state = State::Preparing;
        }
    }

    pub(super) fn prepared(&mut self, audit: &Digest, parts: Result<Vec<PreparedPart>, NotPrepared>, now_ms: u64) {
        let Some(opening) = self.find(audit) else { return };
        let fresh = |part: PreparedPart| Part {
            part: part.part,
            length: part.length,
            sha256: part.sha256,
            upload: Upload::Waiting { not_before_ms: 0 },
        };
        opening.state = match parts {
            Ok(parts) => State::Ready(parts.into_iter().map(fresh).collect()),
            Err(NotPrepared::Gone) => State::Impossible,
            Err(NotPrepared::Unknown) => State::Noticed { not_before_ms: now_ms + RETRY_MS },
            Err(NotPrepared::Failed) => State::Noticed { not_before_ms: now_ms + PREPARE_RETRY_MS },
        };
    }

    /// Parts whose upload was not begun: audit, part, digest.
    pub(super) fn waiting(&self, now_ms: u64) -> Vec<(Digest, u8, Digest)> {
        let Some(Opening { audit, state: State::Ready(parts), .. }) = self.current() else { return Vec::new() };
        let is_due = |part: &&Part| matches!(part.upload, Upload::Waiting { not_before_ms } if not_before_ms <= now_ms);
        parts.iter().filter(is_due).map(|part| (*audit, part.part, part.sha256)).collect()
    }

    /// Whether some part is not uploaded.
    pub(super) fn awaits_upload(&self) -> bool {
        self.current().is_some_and(|opening| !opening.is_uploaded())
    }

    fn set_upload(&mut self, audit: &Digest, part: u8, upload: Upload) {
        if let Some(Opening { state: State::Ready(parts), .. }) = self.find(audit)
            && let Some(part) = parts.iter_mut().find(|entry| entry.part == part)
        {
            part.upload = upload;
        }
    }

    pub(super) fn uploading(&mut self, audit: &Digest, part: u8) {
        self.set_upload(audit, part, Upload::UnderWay);
    }

    /// How an upload ended. Gives whether the whole opening is uploaded by it.
    pub(super) fn uploaded(&mut self, audit: &Digest, part: u8, put: Put, now_ms: u64) -> bool {
        let upload = if put.is_done() { Upload::Done } else { Upload::Waiting { not_before_ms: now_ms + RETRY_MS } };
        self.set_upload(audit, part, upload);
        put.is_done() && self.find(audit).is_some_and(|opening| opening.is_uploaded())
    }

    pub(super) fn record(&self) -> Vec<OpeningPart> {
        let Some(Opening { audit, state: State::Ready(parts), .. }) = self.current() else { return Vec::new() };
        let part = |part: &Part| OpeningPart {
            audit: *audit,
            part: part.part,
            length: part.length,
            sha256: part.sha256,
            uploaded: part.upload == Upload::Done,
        };
        parts.iter().map(part).collect()
    }

    pub(super) fn deadline(&self, now_ms: u64) -> Option<u64> {
        let parts = match &self.current()?.state {
            State::Ready(parts) => parts,
            State::Noticed { not_before_ms } => return Some(*not_before_ms).filter(|due_ms| *due_ms > now_ms),
            State::Preparing | State::Impossible => return None,
        };
        let retry = |part: &Part| match part.upload {
            Upload::Waiting { not_before_ms } if not_before_ms > now_ms => Some(not_before_ms),
            _ => None,
        };
        parts.iter().filter_map(retry).min()
    }
}

impl Opening {
    fn is_uploaded(&self) -> bool {
        matches!(&self.state, State::Ready(parts) if parts.iter().all(|part| part.upload == Upload::Done))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: AccountId = AccountId([1; 32]);
    const KEY: [u8; 32] = [9; 32];

    fn notice(name: &[u8], t: u64, hotkey: AccountId) -> Notice {
        Notice::OpenAudit { audit: Digest::blake3(name), hotkey, slot: 0, t, deadline_ms: 0, key: KEY }
    }

    fn parts() -> Result<Vec<PreparedPart>, NotPrepared> {
        Ok((0..3).map(|part| PreparedPart { part, length: 9, sha256: Digest::blake3(&[part]) }).collect())
    }

    #[test]
    fn audits_are_opened_one_after_the_other_and_parts_stay_until_the_notice_is_gone() {
        let (a, b) = (Digest::blake3(b"a"), Digest::blake3(b"b"));
        let mut openings = Openings::default();
        let notices = [notice(b"a", 3, US), notice(b"x", 4, AccountId([2; 32])), notice(b"b", 5, US)];
        // They are in the order of their steps, whatever the head's is.
        let changes = openings.set_notices(&[notices[2].clone(), notices[1].clone(), notices[0].clone()], &US, 0);
        assert_eq!((changes.noticed, changes.asked), (vec![(b, 5), (a, 3)], Some((1, vec![(a, 3), (b, 5)]))));
        assert_eq!(openings.set_notices(&notices, &US, 0), Changes::default());
        assert_eq!(openings.to_prepare(0), Some((a, 3, KEY)));
        openings.preparing(&a);
        assert_eq!(openings.to_prepare(0), None);
        openings.prepared(&a, parts(), 0);
        assert_eq!(openings.waiting(0).len(), 3);
        assert_eq!(openings.record().len(), 3);
        for part in 0..3 {
            openings.uploading(&a, part);
            assert_eq!(openings.uploaded(&a, part, Put::Stored, 0), part == 2);
        }
        assert!(openings.record().iter().all(|part| part.uploaded), "the record keeps them until the notice is gone");
        assert_eq!(openings.to_prepare(0), None);
        assert_eq!(openings.set_notices(&notices[2..], &US, 0).asked, Some((2, vec![(b, 5)])));
        assert_eq!(openings.to_prepare(0), Some((b, 5, KEY)));
    }

    #[test]
    fn an_opening_that_cannot_be_made_does_not_block_the_next() {
        let mut openings = Openings::default();
        openings.set_notices(&[notice(b"a", 3, US), notice(b"b", 5, US)], &US, 0);
        openings.prepared(&Digest::blake3(b"a"), Err(NotPrepared::Gone), 0);
        assert_eq!(openings.to_prepare(0), Some((Digest::blake3(b"b"), 5, KEY)));
        openings.prepared(&Digest::blake3(b"b"), Err(NotPrepared::Gone), 0);
        assert_eq!(openings.to_prepare(0), None);
        assert!(!openings.awaits_upload());
    }

    #[test]
    fn what_a_disk_or_the_store_could_not_do_is_tried_again_and_the_first_head_says_what_is_asked_for() {
        let a = Digest::blake3(b"a");
        let mut openings = Openings::default();
        assert_eq!(openings.set_notices(&[], &US, 0).asked, Some((1, vec![])), "nothing that an earlier process prepared");
        assert_eq!(openings.set_notices(&[], &US, 0).asked, None);
        openings.set_notices(&[notice(b"a", 3, US)], &US, 0);
        openings.preparing(&a);
        openings.prepared(&a, Err(NotPrepared::Failed), 5);
        assert_eq!((openings.to_prepare(6), openings.deadline(6)), (None, Some(5 + PREPARE_RETRY_MS)));
        assert_eq!(openings.to_prepare(5 + PREPARE_RETRY_MS), Some((a, 3, KEY)));
        openings.preparing(&a);
        openings.prepared(&a, Err(NotPrepared::Unknown), PREPARE_RETRY_MS);
        assert_eq!(openings.deadline(PREPARE_RETRY_MS), Some(PREPARE_RETRY_MS + RETRY_MS));
    }

    #[test]
    fn what_is_late_by_this_clock_is_opened_as_long_as_its_notice_is_there() {
        let a = Digest::blake3(b"a");
        let mut openings = Openings::default();
        openings.set_notices(&[notice(b"a", 3, US)], &US, 0);
        assert_eq!(openings.to_prepare(90_000), Some((a, 3, KEY)));
        openings.prepared(&a, parts(), 90_000);
        assert_eq!((openings.waiting(90_000).len(), openings.record().len()), (3, 3));
        openings.set_notices(&[], &US, 0);
        assert_eq!((openings.to_prepare(90_000), openings.record().len()), (None, 0));
    }

    #[test]
    fn a_failed_upload_is_tried_again_after_a_pause() {
        let a = Digest::blake3(b"a");
        let mut openings = Openings::default();
        openings.set_notices(&[notice(b"a", 3, US)], &US, 0);
        openings.prepared(&a, parts(), 0);
        openings.uploading(&a, 1);
        assert_eq!(openings.waiting(0).len(), 2);
        openings.uploaded(&a, 1, Put::Unavailable, 0);
        assert_eq!((openings.waiting(0).len(), openings.deadline(0)), (2, Some(RETRY_MS)));
        assert_eq!(openings.waiting(RETRY_MS - 1).len(), 2);
    }
}
