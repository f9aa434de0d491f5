//! Answers to the orchestrator's pulls: commit first, upload once a grant for exactly those bytes is there, forget when the
//! pull is closed.

use std::collections::BTreeMap;

use protocol::documents::{Commitment, Pull};

use super::io::Put;

/// Pause before an upload is tried again.
const RETRY_MS: u64 = 1_000;

#[derive(Clone, Debug, PartialEq)]
enum Answer {
    Exporting,
    Committed {
        commitment: Box<Commitment>,
        /// Of the payload; looked for among the grants at every input.
        key: String,
        upload: Upload,
    },
    /// There is no way to answer: the payload is not finite, or the store refuses it for good.
    GivenUp,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Upload {
    Waiting { not_before_ms: u64 },
    UnderWay,
    Done,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Pulls {
    answers: BTreeMap<u64, Answer>,
}

impl Pulls {
    /// Forgets answers to pulls that are not open any more, and gives their outer steps.
    pub(super) fn keep_open(&mut self, open: &[Pull]) -> Vec<u64> {
        let closed: Vec<u64> = self.answers.keys().copied().filter(|t| !open.iter().any(|pull| pull.t == *t)).collect();
        for t in &closed {
            self.answers.remove(t);
        }
        closed
    }

    pub(super) fn is_answered(&self, t: u64) -> bool {
        self.answers.contains_key(&t)
    }

    pub(super) fn exporting(&mut self, t: u64) {
        self.answers.insert(t, Answer::Exporting);
    }

    /// The exports that were under way broke off; they are tried again.
    pub(super) fn exports_failed(&mut self) {
        self.answers.retain(|_, answer| *answer != Answer::Exporting);
    }

    /// The payload is encoded; `false` if its pull was closed meanwhile.
    pub(super) fn committed(&mut self, commitment: Commitment, key: String) -> bool {
        let Some(answer) = self.answers.get_mut(&commitment.t) else { return false };
        *answer = Answer::Committed { commitment: Box::new(commitment), key, upload: Upload::Waiting { not_before_ms: 0 } };
        true
    }

    /// Commitments whose payload is to be uploaded and was not begun, with the payload's key.
    pub(super) fn waiting(&self, now_ms: u64) -> impl Iterator<Item = (&Commitment, &str)> {
        self.answers.values().filter_map(move |answer| match answer {
            Answer::Committed { commitment, key, upload: Upload::Waiting { not_before_ms } } if *not_before_ms <= now_ms => {
                Some((&**commitment, key.as_str()))
            }
            _ => None,
        })
    }

    /// Whether the upload of some payload is not done.
    pub(super) fn awaits_upload(&self) -> bool {
        self.answers.values().any(|answer| matches!(answer, Answer::Committed { upload, .. } if *upload != Upload::Done))
    }

    pub(super) fn uploading(&mut self, t: u64) {
        self.set_upload(t, Upload::UnderWay);
    }

    fn set_upload(&mut self, t: u64, state: Upload) {
        if let Some(Answer::Committed { upload, .. }) = self.answers.get_mut(&t) {
            *upload = state;
        }
    }

    /// How an upload ended. Gives whether this pull is still open.
    pub(super) fn uploaded(&mut self, t: u64, put: Put, now_ms: u64) -> bool {
        match put {
            Put::Stored | Put::AlreadyThere => self.set_upload(t, Upload::Done),
            Put::Grant | Put::Unavailable | Put::DiskFull => self.set_upload(t, Upload::Waiting { not_before_ms: now_ms + RETRY_MS }),
            Put::Refused => {
                if let Some(answer) = self.answers.get_mut(&t) {
                    *answer = Answer::GivenUp;
                }
            }
        }
        self.answers.contains_key(&t)
    }

    pub(super) fn commitments(&self) -> impl Iterator<Item = &Commitment> {
        self.answers.values().filter_map(|answer| match answer {
            Answer::Committed { commitment, .. } => Some(&**commitment),
            _ => None,
        })
    }

    pub(super) fn uploads_done(&self) -> impl Iterator<Item = u64> {
        let is_done = |answer: &Answer| matches!(answer, Answer::Committed { upload: Upload::Done, .. });
        self.answers.iter().filter(move |(_, answer)| is_done(answer)).map(|(t, _)| *t)
    }

    pub(super) fn deadline(&self, now_ms: u64) -> Option<u64> {
        let retry = |answer: &Answer| match answer {
            Answer::Committed { upload: Upload::Waiting { not_before_ms }, .. } if *not_before_ms > now_ms => Some(*not_before_ms),
            _ => None,
        };
        self.answers.values().filter_map(retry).min()
    }
}
