//! Heads of the append-only log, each with its signature as it was read: should the log ever contradict itself, they prove it. They lie
//! in `log-heads/RUN` of the state folder, where `inspect` shows them, with each head of the run that named another log than the one before.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use daemon::files;
use protocol::documents::Head;
use protocol::envelope::{Document, Verified};
use protocol::log::{LogHead, LogRef};
use storage::discovery::RunReader;

use super::trouble::Trouble;

/// Heads that are kept: those of the largest sizes.
const HEADS_KEPT: usize = 1_024;

/// See the module's text.
pub struct LogHeads {
    reader: Arc<RunReader>,
    folder: PathBuf,
    /// What the run's head named last.
    named: Mutex<Option<LogRef>>,
}

impl LogHeads {
    pub fn new(reader: Arc<RunReader>, folder: PathBuf) -> Self {
        Self { reader, folder, named: Mutex::default() }
    }

    /// The head at `size`; `None` while it is absent.
    pub async fn read(&self, size: u64) -> Result<Option<LogHead>, Trouble> {
        self.read_and_keep::<LogHead>(&self.reader.facts().run.log(size), size).await.map(|head| head.map(|head| head.document))
    }

    /// The run's head names `log`. One that does not follow what was named before is kept.
    pub async fn is_named(&self, log: LogRef) {
        let before = self.named.lock().unwrap_or_else(PoisonError::into_inner).replace(log);
        if before.is_some_and(|before| log.size < before.size || (log.size == before.size && log != before))
            && let Err(trouble) = self.read_and_keep::<Head>(&self.reader.facts().run.head(), log.size).await
        {
            tracing::warn!(error = trouble.line(), "the head could not be kept");
        }
    }

    async fn read_and_keep<D: Document>(&self, key: &str, size: u64) -> Result<Option<Verified<D>>, Trouble> {
        let Some((head, bytes)) = self.reader.published_file::<D>(key).await? else { return Ok(None) };
        // The size first, in a width that sorts: two heads of one size lie beside each other.
        let path = self.folder.join(format!("{size:020}-{}.qsr", head.id.short()));
        if let Err(error) = self.keep(&path, &bytes) {
            tracing::warn!("{} cannot be written: {error}", path.display());
        }
        Ok(Some(head))
    }

    fn keep(&self, path: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
        if path.exists() {
            return Ok(());
        }
        files::write_whole(path, &[bytes])?;
        let mut names: Vec<_> = std::fs::read_dir(&self.folder)?.filter_map(Result::ok).map(|entry| entry.file_name()).collect();
        names.sort();
        let superfluous = names.len().saturating_sub(HEADS_KEPT);
        names[..superfluous].iter().try_for_each(|name| std::fs::remove_file(self.folder.join(name)))
    }
}
