//! The append-only log: what was decided is put in order and published head by head, one after the other.

use std::collections::BTreeSet;

use protocol::Digest;
use protocol::log::{Frontier, LOG_ENTRIES_MAX, LogEntry, LogHead, LogKind, LogRef};
use serde::{Deserialize, Serialize};

use super::{Effect, Orchestrator};

/// Polls of the head between two log heads, unless one is full before.
const LOG_POLLS: u64 = 10;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Log {
    /// With all entries of the published heads.
    frontier: Frontier,
    waiting: Vec<LogEntry>,
    publishing: Option<LogHead>,
    /// What a predecessor logged after the snapshot that this machine was read from: it is not logged again.
    logged_before: BTreeSet<Digest>,
    last_ms: u64,
}

impl Log {
    pub(super) fn add(&mut self, kind: LogKind, document: Digest) {
        if !self.logged_before.contains(&document) {
            self.waiting.push(LogEntry { kind, document });
        }
    }

    pub(super) fn published(&self) -> LogRef {
        LogRef::from(&self.frontier)
    }

    /// Takes over a head that is published, if it extends this log.
    pub(super) fn adopt(&mut self, head: LogHead) {
        if head.extends(&self.frontier).is_err() {
            tracing::error!(size = head.frontier.size(), "a log head in the bucket does not extend the log; it is left out");
            return;
        }
        // What was decided first stays first: a commitment comes before its merge.
        let own = self.publishing.take().into_iter().flat_map(|own| own.entries);
        self.waiting.splice(0..0, own);
        self.logged_before.extend(head.entries.iter().map(|entry| entry.document));
        self.waiting.retain(|entry| !self.logged_before.contains(&entry.document));
        self.frontier = head.frontier;
    }
}

impl Orchestrator {
    pub(super) fn advance_log(&mut self) {
        let now_ms = self.volatile.now_ms;
        let log = &mut self.log;
        let is_due = log.waiting.len() >= LOG_ENTRIES_MAX || now_ms >= log.last_ms + LOG_POLLS * self.setup.parameters.poll_ms;
        if log.publishing.is_some() || log.waiting.is_empty() || !is_due {
            return;
        }
        log.last_ms = now_ms;
        let entries: Vec<LogEntry> = log.waiting.drain(..log.waiting.len().min(LOG_ENTRIES_MAX)).collect();
        log.publishing = Some(LogHead { previous: log.frontier.size(), frontier: log.frontier.extended(&entries), entries });
        self.resume_log();
    }

    pub(super) fn on_log_published(&mut self) {
        let Some(head) = self.log.publishing.take() else { return };
        self.log.frontier = head.frontier;
        self.head_dirty = true;
    }

    /// At the place of ours lies another head of an earlier process, which stands; what it lacks comes with the next one.
    pub(super) fn on_log_taken(&mut self, head: LogHead) {
        self.log.adopt(head);
        self.head_dirty = true;
    }

    pub(super) fn resume_log(&mut self) {
        if let Some(head) = &self.log.publishing {
            let head = Box::new(head.clone());
            self.emit(Effect::PublishLog { head });
        }
    }
}
