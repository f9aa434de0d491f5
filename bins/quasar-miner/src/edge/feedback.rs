//! Error feedback on disk, in runs whose learners send top-k: what the payloads so far have left out of each fragment.
//!
//! `F.residual` is what fragment F withholds as far as that is settled. `F-T-V.sent` is the payload of outer step T against version V
//! with the residual that it leaves; it is settled once the merge manifest of T is there: a payload that was merged leaves that residual,
//! one that was not is given back. Values are little-endian f32, and each file ends in the BLAKE3 of its residual: nothing here is
//! flushed to the medium, and what a power cut tore is passed over.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use daemon::files;
use fragments::codec::{CodecError, PayloadHeader};
use fragments::feedback::{BETA, ErrorFeedback, read_residual};
use protocol::Digest;

const RESIDUAL: &str = ".residual";
const SENT: &str = ".sent";
/// Values that are written at a time.
const VALUES_AT_ONCE: usize = 1 << 16;

#[derive(Debug, thiserror::Error)]
pub enum FeedbackError {
    #[error("{}: {source}\nhint: free space in the state folder, and check its owner", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// An encoded payload, and the residual that went into it.
#[derive(Debug)]
pub struct Encoded {
    pub payload: Vec<u8>,
    /// BLAKE3 of the residual's values, and the file that holds them until the next settlement.
    pub residual: (Digest, PathBuf),
}

/// A payload that awaits its settlement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sent {
    pub t: u64,
    pub fragment: u16,
    pub base_version: u64,
}

impl Sent {
    fn of_stem(stem: &str) -> Option<Self> {
        let mut parts = stem.split('-');
        let (fragment, t, base_version) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        parts.next().is_none().then_some(Self { t, fragment, base_version })
    }

    fn name(&self) -> String {
        format!("{}-{}-{}{SENT}", self.fragment, self.t, self.base_version)
    }
}

/// The residuals of one learner.
pub struct Feedback {
    folder: PathBuf,
    /// The trainer's thread encodes while network tasks settle.
    order: Mutex<()>,
}

impl Feedback {
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        files::remove_leftovers(&folder)?;
        Ok(Self { folder, order: Mutex::new(()) })
    }

    /// Payloads that are not settled, oldest first.
    pub fn pending(&self) -> Vec<Sent> {
        let mut all: Vec<Sent> =
            files::stems(&self.folder, SENT).unwrap_or_default().iter().filter_map(|stem| Sent::of_stem(stem)).collect();
        all.sort_unstable();
        all
    }

    /// Encodes the change of a fragment, with what was withheld of it, as the payload `header` of outer step `t`. An older payload
    /// of the fragment whose merge is still not known counts as merged: to send its content twice would be worse than to lose it.
    pub fn encode(&self, t: u64, header: &PayloadHeader, change: &[f32]) -> Result<Encoded, FeedbackError> {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let fragment = header.fragment as u16;
        for sent in self.pending().into_iter().filter(|sent| sent.fragment == fragment) {
            if sent.t == t {
                // It is answered once more: the payload encoded before was not announced.
                self.remove(&sent)?;
            } else {
                tracing::warn!(t = sent.t, fragment, "it is not known whether a payload was merged; what it left out is kept as if it was");
                self.settle_as(&sent, None)?;
            }
        }
        let path = self.residual_path(fragment);
        let (values, digest) = match self.residual(fragment, change.len())? {
            Some(before) => before,
            None => {
                let nothing = vec![0.0; change.len()];
                let digest = self.write(&path, &[], &nothing)?;
                (nothing, digest)
            }
        };
        let mut feedback = ErrorFeedback::from_residual(values, BETA);
        let payload = feedback.encode(header, change)?;
        let sent = Sent { t, fragment, base_version: header.base_version };
        self.write(&self.folder.join(sent.name()), &payload, feedback.residual())?;
        Ok(Encoded { payload, residual: (digest, path) })
    }

    /// The merge of a payload is known: `given_back` is its header if it does not contain the payload.
    pub fn settle(&self, sent: &Sent, given_back: Option<&PayloadHeader>) -> Result<(), FeedbackError> {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        // Another settlement may have come first.
        if self.pending().contains(sent) { self.settle_as(sent, given_back) } else { Ok(()) }
    }

    fn settle_as(&self, sent: &Sent, given_back: Option<&PayloadHeader>) -> Result<(), FeedbackError> {
        let path = self.folder.join(sent.name());
        let bytes = fs::read(&path).map_err(|source| FeedbackError::Io { path: path.clone(), source })?;
        let elements = match fs::metadata(self.residual_path(sent.fragment)) {
            Ok(meta) => (meta.len().saturating_sub(32) / 4) as usize,
            Err(_) => 0,
        };
        let cut = bytes.len().checked_sub(4 * elements + 32).map(|cut| bytes.split_at(cut));
        match cut.and_then(|(payload, rest)| Some((payload, read_residual(rest)?))) {
            Some((payload, (mut residual, _))) => {
                if let Some(header) = given_back {
                    let mut feedback = ErrorFeedback::from_residual(residual, BETA);
                    feedback.give_back(header, payload)?;
                    residual = feedback.residual().to_vec();
                }
                self.write(&self.residual_path(sent.fragment), &[], &residual)?;
            }
            None => tracing::warn!(t = sent.t, fragment = sent.fragment, "a sent payload on this disk is damaged and passed over"),
        }
        self.remove(sent)
    }

    fn residual_path(&self, fragment: u16) -> PathBuf {
        self.folder.join(format!("{fragment}{RESIDUAL}"))
    }

    /// Values and digest of a fragment's residual; `None` where there is none, or none that can be used.
    fn residual(&self, fragment: u16, elements: usize) -> Result<Option<(Vec<f32>, Digest)>, FeedbackError> {
        let path = self.residual_path(fragment);
        match fs::read(&path) {
            Ok(bytes) => {
                let found = read_residual(&bytes).filter(|(values, _)| values.len() == elements);
                if found.is_none() {
                    tracing::warn!(fragment, "what was withheld of a fragment is damaged on this disk; it begins again with nothing");
                }
                Ok(found)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(FeedbackError::Io { path, source }),
        }
    }

    /// Gives the digest that ends the file.
    fn write(&self, path: &Path, payload: &[u8], residual: &[f32]) -> Result<Digest, FeedbackError> {
        let write = |file: &mut dyn io::Write| -> io::Result<Digest> {
            file.write_all(payload)?;
            let mut hasher = blake3::Hasher::new();
            for values in residual.chunks(VALUES_AT_ONCE) {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                hasher.update(&bytes);
                file.write_all(&bytes)?;
            }
            let digest = *hasher.finalize().as_bytes();
            file.write_all(&digest)?;
            Ok(Digest(digest))
        };
        files::write_with(path, write).map_err(|source| FeedbackError::Io { path: path.to_owned(), source })
    }

    fn remove(&self, sent: &Sent) -> Result<(), FeedbackError> {
        let path = self.folder.join(sent.name());
        fs::remove_file(&path).map_err(|source| FeedbackError::Io { path, source })
    }
}

#[cfg(test)]
mod tests {
    use model::toy_plan;
    use protocol::documents::Codec;

    use super::*;

    const FRAGMENT: usize = 1;

    fn header(base_version: u64) -> PayloadHeader {
        let plan = toy_plan(3);
        PayloadHeader::new(Codec::TopK, &plan, plan.digest(), FRAGMENT, base_version)
    }

    fn change(seed: f32) -> Vec<f32> {
        (0..header(0).elements()).map(|at| (at as f32 * 0.7 + seed).sin()).collect()
    }

    fn residual(feedback: &Feedback) -> Vec<f32> {
        feedback.residual(FRAGMENT as u16, header(0).elements() as usize).unwrap().unwrap().0
    }

    /// The same payloads, in memory.
    fn expected(outcomes: &[bool]) -> ErrorFeedback {
        let mut feedback = ErrorFeedback::new(header(0).elements() as usize, BETA);
        for (number, merged) in outcomes.iter().enumerate() {
            let header = header(number as u64);
            let payload = feedback.encode(&header, &change(number as f32)).unwrap();
            if !merged {
                feedback.give_back(&header, &payload).unwrap();
            }
        }
        feedback
    }

    fn send(feedback: &Feedback, number: u64) -> Sent {
        feedback.encode(24 * number, &header(number), &change(number as f32)).unwrap();
        Sent { t: 24 * number, fragment: FRAGMENT as u16, base_version: number }
    }

    #[test]
    fn what_was_merged_leaves_its_residual_and_what_was_not_is_given_back_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let feedback = Feedback::open(folder.path().to_owned()).unwrap();
        let first = send(&feedback, 0);
        assert_eq!(feedback.pending(), [first]);
        assert!(residual(&feedback).iter().all(|value| *value == 0.0), "nothing is settled yet");
        feedback.settle(&first, None).unwrap();
        assert_eq!(residual(&feedback), expected(&[true]).residual());
        let second = send(&feedback, 1);
        drop(feedback);
        let feedback = Feedback::open(folder.path().to_owned()).unwrap();
        assert_eq!(feedback.pending(), [second]);
        feedback.settle(&second, Some(&header(1))).unwrap();
        assert_eq!(residual(&feedback), expected(&[true, false]).residual());
        assert!(feedback.pending().is_empty());
        feedback.settle(&second, Some(&header(1))).unwrap();
        assert_eq!(residual(&feedback), expected(&[true, false]).residual(), "settled once");
    }

    #[test]
    fn a_payload_is_encoded_again_from_the_same_residual_and_an_unknown_one_counts_as_merged() {
        let folder = tempfile::tempdir().unwrap();
        let feedback = Feedback::open(folder.path().to_owned()).unwrap();
        let first = feedback.encode(0, &header(0), &change(0.0)).unwrap();
        let again = feedback.encode(0, &header(0), &change(0.0)).unwrap();
        assert_eq!((&first.payload, &first.residual), (&again.payload, &again.residual));
        assert_eq!(feedback.pending().len(), 1);
        let second = feedback.encode(24, &header(1), &change(1.0)).unwrap();
        let mut known = expected(&[true]);
        let before: Vec<u8> = known.residual().iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(second.residual.0, Digest::blake3(&before));
        assert_eq!(second.payload, known.encode(&header(1), &change(1.0)).unwrap());
        assert_eq!(feedback.pending().iter().map(|sent| sent.t).collect::<Vec<_>>(), [24]);
    }

    #[test]
    fn torn_files_are_passed_over_and_a_change_that_is_no_number_leaves_all_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let feedback = Feedback::open(folder.path().to_owned()).unwrap();
        let sent = send(&feedback, 0);
        fs::write(folder.path().join(sent.name()), b"torn").unwrap();
        feedback.settle(&sent, None).unwrap();
        assert!(feedback.pending().is_empty());
        fs::write(folder.path().join("1.residual"), b"torn").unwrap();
        let sent = send(&feedback, 1);
        feedback.settle(&sent, None).unwrap();
        let before = residual(&feedback);
        let mut broken = change(2.0);
        broken[3] = f32::NAN;
        assert!(matches!(feedback.encode(48, &header(2), &broken), Err(FeedbackError::Codec(CodecError::NotFinite { .. }))));
        assert_eq!((residual(&feedback), feedback.pending()), (before, vec![]));
        fs::write(folder.path().join("x-1.sent"), b"").unwrap();
        assert!(feedback.pending().is_empty(), "not one of ours");
    }
}
