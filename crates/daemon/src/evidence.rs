//! Proofs of what others did wrong, kept in the state folder.

use std::path::{Path, PathBuf};

use protocol::Signer;
use protocol::documents::Equivocation;
use protocol::envelope::{Context, sign};

use crate::clock;

/// Keeps a proof that somebody signed two things at once, as a file that `inspect` of every program verifies. The same proof is
/// kept once.
///
/// # Errors
/// The file cannot be written.
pub fn keep(folder: &Path, proof: &Equivocation, context: &Context, finder: &dyn Signer) -> std::io::Result<PathBuf> {
    let name = match proof.verify() {
        Ok((account, sequence, _)) => format!("equivocation-{}-{sequence}.qsr", account.short()),
        Err(why) => return Err(std::io::Error::other(why)),
    };
    let path = folder.join(name);
    if !path.exists() {
        let now_ms = clock::now_ms();
        std::fs::create_dir_all(folder)?;
        std::fs::write(&path, sign(proof, context, finder, now_ms, now_ms))?;
        tracing::error!(key = proof.key, file = %path.display(), "a signer contradicts itself; the proof is kept");
    }
    Ok(path)
}
