//! How the connection to the chain is doing, for health pages and watchdogs: what counts is that blocks arrive.

use crate::types::BlockRef;

/// The state of a chain connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainHealth {
    /// The endpoint in use, or the last one tried.
    pub endpoint: String,
    /// Whether the last question was answered.
    pub is_answering: bool,
    /// The newest finalized block seen.
    pub block: Option<BlockRef>,
    /// Milliseconds since that block was first seen.
    pub block_age_ms: u64,
    /// Blocks have not arrived for so long that the connection was replaced, at least once, without success.
    pub is_stalled: bool,
    /// Whether a block newer than the first one has come over this client.
    pub has_moved: bool,
    /// Whether the last failure was a silence: a socket that could be opened, or was open, and an answer that did not come.
    pub is_silent: bool,
    /// Version of the runtime at that block.
    pub spec_version: u32,
    /// Connections opened after the first one.
    pub reconnections: u64,
    /// What went wrong last; empty while all is well.
    pub trouble: String,
}

impl ChainHealth {
    /// A chain that needs no connection.
    pub fn local(block: BlockRef) -> Self {
        Self {
            endpoint: String::new(),
            is_answering: true,
            block: Some(block),
            block_age_ms: 0,
            is_stalled: false,
            has_moved: false,
            is_silent: false,
            spec_version: 0,
            reconnections: 0,
            trouble: String::new(),
        }
    }

    pub fn is_healthy(&self) -> bool {
        self.is_answering && !self.is_stalled
    }

    /// Whether blocks came once and come no more although sockets can be opened, on every endpoint and over new connections. What is
    /// left to try is a new process. One that was started on a chain that stands still cannot cure it and does not count.
    pub fn has_fallen_silent(&self) -> bool {
        self.is_stalled && self.has_moved && (self.is_answering || self.is_silent)
    }
}

impl std::fmt::Display for ChainHealth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.block, self.is_stalled, self.is_answering) {
            (_, _, false) => write!(f, "{} does not answer: {}", self.endpoint, self.trouble),
            (Some(block), true, _) => {
                write!(
                    f,
                    "no block after {block} for {} s, on any endpoint; the chain or all of its endpoints stand still",
                    self.block_age_ms / 1000
                )
            }
            (Some(block), false, _) => write!(f, "{}: block {block}, {} s old", self.endpoint, self.block_age_ms / 1000),
            (None, ..) => write!(f, "{}: no block seen yet", self.endpoint),
        }
    }
}
