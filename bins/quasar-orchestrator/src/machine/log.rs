//! The append-only log: what was decided is put in order and published head by head, one after the other.

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
}

impl Log {
    pub(super) fn add(&mut self, kind: LogKind, document: Digest) {
        self.waiting.push(LogEntry { kind, document });
    }

    pub(super) fn published(&self) -> LogRef {
        LogRef::from(&self.frontier)
    }
}

impl Orchestrator {
    pub(super) fn advance_log(&mut self) {
        let now_ms = self.volatile.now_ms;
        let log = &mut self.log;
        let is_due = log.waiting.len() >= LOG_ENTRIES_MAX || now_ms >= self.volatile.log_ms + LOG_POLLS * self.setup.parameters.poll_ms;
        if log.publishing.is_some() || log.waiting.is_empty() || !is_due {
            return;
        }
        self.volatile.log_ms = now_ms;
        let entries: Vec<LogEntry> = log.waiting.drain(..log.waiting.len().min(LOG_ENTRIES_MAX)).collect();
        log.publishing = Some(LogHead { previous: log.frontier.size(), frontier: log.frontier.extended(&entries), entries });
        self.resume_log();
    }

    pub(super) fn on_log_published(&mut self) {
        let Some(head) = self.log.publishing.take() else { return };
        self.log.frontier = head.frontier;
        self.head_dirty = true;
    }

    pub(super) fn resume_log(&mut self) {
        if let Some(head) = &self.log.publishing {
            let head = Box::new(head.clone());
            self.emit(Effect::PublishLog { head });
        }
    }
}
