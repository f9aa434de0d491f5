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
            spec_version: 0,
            reconnections: 0,
            trouble: String::new(),
        }
    }

    pub fn is_healthy(&self) -> bool {
        self.is_answering && !self.is_stalled
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
