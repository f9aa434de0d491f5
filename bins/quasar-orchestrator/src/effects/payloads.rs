//! Uploads: checked once, kept on the local disk until their merge, and read from there piece by piece.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fragments::codec::{FileSource, PayloadHeader, Source};
use fragments::t0::{self, Committed};
use protocol::documents::{Commitment, TapeInput};
use protocol::{Digest, Reason};
use storage::StoreError;

use super::{Service, persist};
use crate::machine::Slot;

/// Bytes that are asked of the store at a time.
pub(crate) const PIECE_BYTES: u64 = 16 << 20;

impl Service {
    /// Static checks of an upload; the payload stays on the local disk for the merge. Only what its bytes are decides: one that the disk
    /// here does not give back is fetched again.
    pub(super) async fn check_payload(&self, slot: Slot, t: u64, commitment: &Commitment) -> Reason {
        let key = self.run.payload(&slot.0, slot.1, t);
        let path = self.payload_path(t, slot);
        let committed = Committed { length: commitment.length, sha256: commitment.sha256, blake3: commitment.blake3 };
        let header = self.payload_header(commitment.fragment, commitment.base_version);
        persist(&key, || async {
            match self.download(&key, commitment.length, &path).await {
                Download::Done => {}
                Download::Absent => return Ok(Reason::NotUploaded),
                Download::OtherLength => return Ok(Reason::LengthMismatch),
            }
            let (file, header) = (path.clone(), header.clone());
            let judged = tokio::task::spawn_blocking(move || judge(&file, &committed, &header)).await;
            // A check that panics would do so again.
            let reason = judged.unwrap_or(Ok(Reason::NotEvaluated)).map_err(|error| format!("{}: {error}", path.display()))?;
            if reason != Reason::None {
                tracing::warn!(hotkey = %slot.0.short(), slot = slot.1, t, "upload refused: {reason}");
            }
            Ok::<_, String>(reason)
        })
        .await
    }

    pub(super) fn payload_header(&self, fragment: u16, base_version: u64) -> PayloadHeader {
        let codec = self.manifest.parameters.codec_up;
        PayloadHeader::new(codec, &self.plan, self.plan_digest, usize::from(fragment), base_version)
    }

    /// What an outer step needs, until it is merged.
    fn payloads_of(&self, t: u64) -> PathBuf {
        self.state_dir.join("payloads").join(t.to_string())
    }

    fn payload_path(&self, t: u64, (hotkey, slot): Slot) -> PathBuf {
        self.payloads_of(t).join(format!("{hotkey}-{slot}"))
    }

    /// A payload of a tape, on the local disk: from the check of its upload, else from the bucket.
    pub(super) async fn payload(&self, input: &TapeInput, t: u64) -> FileSource {
        let path = self.payload_path(t, (input.hotkey, input.slot));
        if let Some(kept) = open_verified(&path, input.payload).await {
            return kept;
        }
        let key = self.run.payload(&input.hotkey, input.slot, t);
        persist(&key, || async {
            match self.download(&key, input.length, &path).await {
                Download::Done => {}
                Download::Absent => return Err("it is not in the bucket".to_owned()),
                Download::OtherLength => return Err("its length is not the committed one".to_owned()),
            }
            open_verified(&path, input.payload).await.ok_or_else(|| "its digest is not the committed one".to_owned())
        })
        .await
    }

    pub(super) fn drop_payloads(&self, t: u64) {
        let _ = std::fs::remove_dir_all(self.payloads_of(t));
    }

    /// Removes the payloads of outer steps that are over: a check that ended after the merge of its step brought its payload back.
    pub(super) fn sweep_payloads(&self, closed_below: u64) {
        for entry in std::fs::read_dir(self.state_dir.join("payloads")).into_iter().flatten().filter_map(Result::ok) {
            let t = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok());
            if t.is_some_and(|t| t < closed_below) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    }

    /// It could not be read when it was needed: the next look fetches it again.
    pub(super) fn drop_payload(&self, input: &TapeInput, t: u64) {
        let _ = std::fs::remove_file(self.payload_path(t, (input.hotkey, input.slot)));
    }

    /// Brings an object of exactly `length` bytes to `path`, a piece at a time. What store or disk cannot do now is tried again.
    pub(super) async fn download(&self, key: &str, length: u64, path: &Path) -> Download {
        persist(key, || async {
            match self.store.head(key).await {
                Ok(meta) if meta.length == length => {}
                Ok(_) => return Ok(Download::OtherLength),
                Err(StoreError::NotFound { .. }) => return Ok(Download::Absent),
                Err(error) => return Err(error.to_string()),
            }
            let partial = path.with_extension("part");
            let spell = |error: io::Error| format!("{}: {error}", partial.display());
            std::fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).map_err(spell)?;
            let mut file = File::create(&partial).map_err(spell)?;
            for start in (0..length).step_by(PIECE_BYTES as usize) {
                let piece = self.store.get_range(key, start, (start + PIECE_BYTES).min(length)).await;
                file.write_all(&piece.map_err(|error| error.to_string())?).map_err(spell)?;
            }
            std::fs::rename(&partial, path).map_err(spell)?;
            Ok(Download::Done)
        })
        .await
    }
}

pub(super) enum Download {
    Done,
    Absent,
    OtherLength,
}

/// What is to be said of an upload that was fetched to `path`; what is refused is removed.
///
/// # Errors
/// The disk does not give back what was fetched, which says nothing about the upload.
fn judge(path: &Path, committed: &Committed, header: &PayloadHeader) -> io::Result<Reason> {
    let payload = FileSource::open(path)?;
    if payload.length() != committed.length {
        return Err(io::Error::other("the file is not as long as what was fetched"));
    }
    match t0::verify(&payload, committed, header) {
        Ok(()) => Ok(Reason::None),
        Err(Reason::NotEvaluated) => Err(io::Error::other("the file cannot be read")),
        Err(reason) => {
            let _ = std::fs::remove_file(path);
            Ok(reason)
        }
    }
}

/// The file, if it is there and has this BLAKE3.
async fn open_verified(path: &Path, digest: Digest) -> Option<FileSource> {
    let path = path.to_owned();
    let open = move || {
        let payload = FileSource::open(&path).ok()?;
        (t0::blake3_of(&payload).ok()? == digest).then_some(payload)
    };
    tokio::task::spawn_blocking(open).await.ok()?
}
