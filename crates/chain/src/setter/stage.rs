//! Where the setter stands, in words: what it waits for, what stands in the way, and what a person can do about it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::WeightsRefusal;
use crate::view::{Progress, WeightsRequest};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// The chain was not looked at yet.
    Starting,
    /// Nobody has said whom the weights go to.
    NoScores,
    /// This epoch's row is set; the next one is due when the next epoch begins, at this block.
    NotDue { from_block: u64 },
    /// A row is due, but the subnet's rate limit lasts until this block.
    TooSoon { from_block: u64 },
    /// A row is due, but one that was committed before is opened in these blocks and would replace it.
    RevealFirst { until_block: u64 },
    /// The chain would refuse the row, or drop it when it is opened.
    Blocked(Obstacle),
    /// A row is on its way.
    Sending { progress: Option<Progress> },
    /// A row was sent and lost sight of; the chain is looked at before anything else is sent.
    Unsure { why: String },
    /// The chain refused the row.
    Refused { reason: WeightsRefusal, retry_at_ms: u64 },
    /// The chain does not answer.
    Unreachable { why: String },
    /// The chain shows the row.
    OnChain { row: Vec<(u16, u16)>, block: u64 },
    /// The row is committed and will be opened from `reveal_block` on.
    Committed { block: u64, round: u64, reveal_block: u64 },
    /// Nothing is sent because chain writes are switched off; this would be.
    DryRun { request: WeightsRequest },
}

/// Why no row is sent although one is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Obstacle {
    NotRegistered,
    NoPermit,
    /// The chain refused the row for it. Both in rao; the chain adds what is inherited and staked on the root network.
    StakeTooLow {
        stake: u64,
        threshold: u64,
    },
    VersionTooOld {
        required: u64,
        ours: u64,
    },
    NoMechanism {
        mechanism: u8,
        count: u8,
    },
    NoEpochs,
    CommitVersion {
        required: u16,
        ours: u16,
    },
    /// Our clock and the chain's differ by so much that no reveal can be timed.
    Clock {
        apart_ms: u64,
        is_ahead: bool,
    },
    /// Another rule of the chain.
    Rule(WeightsRefusal),
}

impl Stage {
    /// Whether a person has to do something before weights are set again.
    pub fn needs_a_person(&self) -> bool {
        match self {
            Self::Blocked(Obstacle::Rule(reason)) | Self::Refused { reason, .. } => !reason.passes_by_itself(),
            Self::Blocked(_) => true,
            _ => false,
        }
    }

    /// What happens next, or what to do.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Starting => "the chain is being read",
            Self::NoScores => "scores come with the first verdicts",
            Self::NotDue { .. } | Self::OnChain { .. } => "the next row is set when the next epoch begins",
            Self::RevealFirst { .. } => "it is set when the committed one was opened",
            Self::TooSoon { .. } => "it is set when the rate limit has passed",
            Self::Blocked(obstacle) => obstacle.hint(),
            Self::Sending { .. } => "it counts when it was read back from a finalized block",
            Self::Unsure { .. } => "the chain is looked at before it is sent again",
            Self::Refused { reason, .. } => reason.hint(),
            Self::Unreachable { .. } => "check the network; several endpoints can be named, separated by commas",
            Self::Committed { .. } => "it counts when the chain has opened it and shows it",
            Self::DryRun { .. } => "switch the dry run off to send it",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting => f.write_str("not looked at the chain yet"),
            Self::NoScores => f.write_str("no scores yet"),
            Self::NotDue { from_block } => write!(f, "this epoch's weights are set, the next are due at block {from_block}"),
            Self::TooSoon { from_block } => write!(f, "weights are due, the rate limit lasts until block {from_block}"),
            Self::RevealFirst { until_block } => {
                write!(f, "weights are due, the committed row before them is opened first, until block {until_block}")
            }
            Self::Blocked(obstacle) => write!(f, "weights are not sent: {obstacle}"),
            Self::Sending { progress } => match progress {
                None => f.write_str("weights are being sent"),
                Some(Progress::Validated) => f.write_str("weights would be taken, sending"),
                Some(Progress::Submitted) => f.write_str("weights are submitted"),
                Some(Progress::Included(block)) => write!(f, "weights are in block {block}, which is not final yet"),
                Some(Progress::Retracted) => f.write_str("the block with the weights was left for another fork; waiting for the next"),
                Some(Progress::Finalized(block)) => write!(f, "weights are in the finalized block {block}, reading them back"),
            },
            Self::Unsure { why } => write!(f, "weights were sent, what became of them is not known: {why}"),
            Self::Refused { reason, .. } => write!(f, "the chain refused the weights: {reason}"),
            Self::Unreachable { why } => write!(f, "the chain cannot be read: {why}"),
            Self::OnChain { row, block } => write!(f, "weights on {} are on chain since block {block}", neurons(row)),
            Self::Committed { block, round, reveal_block } => {
                write!(f, "weights are committed in block {block}, opened by beacon round {round} from block {reveal_block} on")
            }
            Self::DryRun { request } => write!(f, "dry run: weights on {} would be sent", neurons(&request.row)),
        }
    }
}

/// How many neurons a row gives weight to: zeros only fill it up.
fn neurons(row: &[(u16, u16)]) -> String {
    match row.iter().filter(|(_, value)| *value > 0).count() {
        1 => "1 neuron".to_owned(),
        count => format!("{count} neurons"),
    }
}

impl Obstacle {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotRegistered => WeightsRefusal::NotRegistered.hint(),
            Self::NoPermit => WeightsRefusal::NoValidatorPermit.hint(),
            Self::StakeTooLow { .. } => WeightsRefusal::StakeTooLow.hint(),
            Self::VersionTooOld { .. } => WeightsRefusal::VersionKey.hint(),
            Self::NoMechanism { .. } => "check the number of the mechanism; the subnet's owner sets how many there are",
            Self::NoEpochs => "the subnet's owner has to set a tempo",
            Self::CommitVersion { .. } => "install a release that speaks this version of commit-reveal",
            Self::Clock { .. } => "set the clock (`timedatectl`), or, if it is right, look for a node whose chain is not stalled",
            Self::Rule(reason) => reason.hint(),
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRegistered => WeightsRefusal::NotRegistered.fmt(f),
            Self::NoPermit => WeightsRefusal::NoValidatorPermit.fmt(f),
            Self::StakeTooLow { stake, threshold } => {
                write!(f, "the hotkey's stake is too low: {stake} rao on the subnet, the chain wants {threshold} in all")
            }
            Self::VersionTooOld { required, ours } => {
                write!(f, "the subnet wants weights of version {required} or newer, this build sends {ours}")
            }
            Self::NoMechanism { mechanism, count } => {
                write!(f, "the subnet has {count} mechanisms, counted from 0; there is no {mechanism}")
            }
            Self::NoEpochs => f.write_str("the subnet runs no epochs (its tempo is 0)"),
            Self::CommitVersion { required, ours } => {
                write!(f, "the chain wants version {required} of commit-reveal, this build speaks {ours}")
            }
            Self::Clock { apart_ms, is_ahead } => {
                let side = if *is_ahead { "ahead of" } else { "behind" };
                write!(f, "this machine's clock is {} s {side} the chain's newest block, so no reveal can be timed", apart_ms / 1000)
            }
            Self::Rule(reason) => reason.fmt(f),
        }
    }
}
