//! Proofs of what others did wrong, kept in the state folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::Signer;
use protocol::documents::Equivocation;
use protocol::envelope::{Context, sign};

use crate::{clock, files};

/// Proofs that are kept. One convicts its signer; whoever makes more of them does not fill the disk.
const PROOFS_MAX: usize = 32;
const PREFIX: &str = "equivocation-";
const SUFFIX: &str = ".qsr";

/// Where one program keeps its proofs, and who signs that they were found.
pub struct Evidence {
    pub folder: PathBuf,
    pub context: Context,
    pub finder: Arc<dyn Signer>,
}

impl Evidence {
    /// Keeps a proof; one that cannot be kept, or is none, is logged.
    pub fn keep(&self, proof: &Equivocation) {
        if let Err(error) = keep(&self.folder, proof, &self.context, &*self.finder) {
            tracing::error!(key = proof.key, "a proof of equivocation could not be kept: {error}");
        }
    }
}

/// Keeps a proof that somebody signed two things at once, as a file that `inspect` of every program verifies. The same proof is
/// kept once.
///
/// # Errors
/// The file cannot be written, the proof proves nothing, or enough are kept.
pub fn keep(folder: &Path, proof: &Equivocation, context: &Context, finder: &dyn Signer) -> std::io::Result<PathBuf> {
    let name = match proof.verify() {
        Ok((account, sequence, [first, _])) => format!("{PREFIX}{}-{sequence}-{}{SUFFIX}", account.short(), first.short()),
        Err(why) => return Err(std::io::Error::other(why)),
    };
    let path = folder.join(name);
    if !path.exists() {
        let kept = files::stems(folder, SUFFIX)?;
        if kept.iter().filter(|stem| stem.starts_with(PREFIX)).count() >= PROOFS_MAX {
            return Err(std::io::Error::other(format!("{PROOFS_MAX} are kept already in {}", folder.display())));
        }
        let now_ms = clock::now_ms();
        files::write_whole(&path, &[&sign(proof, context, finder, now_ms, now_ms)])?;
        tracing::error!(key = proof.key, file = %path.display(), "a signer contradicts itself; the proof is kept");
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use protocol::documents::{Job, StandingGrants};
    use protocol::envelope::{Document, RunId};
    use protocol::{AccountId, Ed25519Signer, SealedBytes};

    use super::*;
    use crate::{Exit, inspect};

    const CONTEXT: Context = Context { genesis: [1; 32], netuid: 24, run: RunId([2; 16]) };

    fn proof<D: Document>(first: &D, second: &D, sequence: u64) -> Equivocation {
        let said = |document: &D| sign(document, &CONTEXT, &Ed25519Signer::from_seed([5; 32]), sequence, 1_000);
        Equivocation { key: "where/it/was.qsr".into(), first: said(first), second: said(second) }
    }

    #[test]
    fn a_proof_is_kept_once_as_a_file_that_inspect_verifies_and_what_is_none_is_not() {
        let (folder, finder) = (tempfile::tempdir().unwrap(), Ed25519Signer::from_seed([6; 32]));
        let kept = || std::fs::read_dir(folder.path()).unwrap().count();
        let grants = |byte: u8| StandingGrants {
            hotkey: AccountId([1; 32]),
            slot: 0,
            session_epoch: 1,
            // As large as the bundle of a learner of a run with many fragments.
            sealed: SealedBytes { encapsulated: [byte; 32], ciphertext: vec![byte; 1_000_000] },
        };
        let large = proof(&grants(1), &grants(2), 7);
        let path = keep(folder.path(), &large, &CONTEXT, &finder).unwrap();
        assert_eq!(keep(folder.path(), &large, &CONTEXT, &finder).unwrap(), path);
        let shown = inspect::file(&path).unwrap();
        assert_eq!((shown.exit(), kept()), (Exit::Done, 1), "{}", shown.json["proof"]);
        assert_eq!(shown.json["proof"]["sequence"], 7);

        let job = |slot: u8| Job { hotkey: AccountId([1; 32]), slot, session_epoch: 1, leases: Vec::new() };
        assert!(keep(folder.path(), &proof(&job(0), &job(1), 7), &CONTEXT, &finder).is_err(), "jobs of two slots");
        assert_eq!(kept(), 1);
        for sequence in 0..2 * PROOFS_MAX as u64 {
            let job = |session_epoch| Job { session_epoch, ..job(0) };
            let _ = keep(folder.path(), &proof(&job(1), &job(2), sequence), &CONTEXT, &finder);
        }
        assert_eq!(kept(), PROOFS_MAX);
    }
}
