//! The head: the one object that everybody polls.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::CatalogRef;
use crate::log::{Frontier, LogRef};
use crate::{AccountId, Digest};

/// The run as of now.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Head {
    /// Fencing epoch of the writer; 0 = the head that the run was created with.
    pub epoch: u64,
    pub state: RunState,
    /// t of the next pull to be opened.
    pub outer_step: u64,
    /// Outer steps below this are all closed and their merge manifests published.
    pub closed_below: u64,
    /// Chain block known to the orchestrator when it wrote this.
    pub block: u64,
    /// The run's learning-rate index as of now: where a late joiner starts.
    pub run_step: u64,
    /// Open pulls, at most τ + 1, by t.
    pub pulls: Vec<Pull>,
    pub fragments: Vec<FragmentHead>,
    pub release: ReleaseRef,
    /// The newest catalog page: the shards of all pages up to it are in the run.
    pub catalog: CatalogRef,
    /// BLAKE3 of the encoded token ledger.
    pub ledger: Digest,
    /// The newest published head of the append-only log.
    pub log: LogRef,
    pub notices: Vec<Notice>,
}

impl Head {
    /// The head that a run is created with: no writer has been there, nothing was pulled.
    pub fn first(fragments: Vec<FragmentHead>, release: ReleaseRef, catalog: CatalogRef) -> Self {
        Self {
            epoch: 0,
            state: RunState::Open,
            outer_step: 0,
            closed_below: 0,
            block: 0,
            run_step: 0,
            pulls: Vec::new(),
            fragments,
            release,
            catalog,
            ledger: Digest::ZERO,
            log: LogRef::from(&Frontier::default()),
            notices: Vec::new(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    Open = 0,
    /// No new leases; open pulls are still merged.
    Draining = 1,
    /// Everything is merged and released.
    Complete = 2,
}

/// A request to every learner for its change of one fragment.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Pull {
    pub t: u64,
    pub fragment: u16,
    /// The fragment's version when the pull was opened; a payload against this one or the one before is accepted.
    pub version: u64,
    pub deadline_ms: u64,
}

/// Where a fragment stands.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct FragmentHead {
    pub version: u64,
    /// Length and BLAKE3 of the keyframe of that version.
    pub length: u64,
    pub digest: Digest,
}

/// A release by id and BLAKE3 of its manifest's file.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct ReleaseRef {
    pub release: String,
    pub manifest: Digest,
}

/// Something that concerns one learner or all.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// The learner is to open the segment that ends with its payload of outer step `t`, sealed to the audit's X25519 key.
    OpenAudit {
        audit: Digest,
        hotkey: AccountId,
        slot: u8,
        t: u64,
        /// By the orchestrator's clock, and later where it was out of touch: a learner has time for as long as this notice is there.
        deadline_ms: u64,
        #[serde(with = "hex::serde")]
        key: [u8; 32],
    },
}
