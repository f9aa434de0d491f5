//! What can go wrong between us and a chain, each with the data that explains it and a hint for people.

use protocol::AccountId;
use serde::{Deserialize, Serialize};

use crate::timelock::{COMMIT_REVEAL_VERSION, TimelockError};
use crate::types::BlockRef;

/// A 32-byte hash in messages.
pub(crate) fn short_hash(hash: &[u8; 32]) -> String {
    format!("0x{}", hex::encode(hash))
}

/// A failed read of the chain, or a refused commitment.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    #[error("the chain settings are wrong: {reason}\nhint: {hint}")]
    Settings { reason: String, hint: &'static str },
    #[error(
        "chain endpoint {endpoint} failed: {reason}\nhint: check the address and the network; several endpoints can be named, separated by commas"
    )]
    Unavailable { endpoint: String, reason: String },
    #[error(
        "chain endpoint {endpoint} cannot be trusted: {reason}\nhint: check the address and this machine's clock; authorities come from the system (package ca-certificates) or from the file that SSL_CERT_FILE names"
    )]
    Untrusted { endpoint: String, reason: String },
    #[error(
        "chain endpoint {endpoint} did not answer {call} within {millis} ms\nhint: the node may be overloaded or the connection half dead; another endpoint helps"
    )]
    Timeout { endpoint: String, call: &'static str, millis: u64 },
    #[error(
        "chain endpoint {endpoint} serves another network: genesis {}, expected {}\nhint: QUASAR_NETWORK and the chain endpoints must name the same network",
        short_hash(found),
        short_hash(expected)
    )]
    WrongGenesis { endpoint: String, expected: [u8; 32], found: [u8; 32] },
    #[error("subnet {netuid} does not exist on this chain\nhint: check the netuid and the network")]
    SubnetMissing { netuid: u16 },
    #[error(
        "the chain's answer to {call} does not fit this build: {reason}\nhint: the runtime was probably upgraded; look for a newer release"
    )]
    Answer { call: &'static str, reason: String },
    #[error(
        "no endpoint knows the state of block {number} any more\nhint: nodes forget states after some 256 blocks; name an archive endpoint"
    )]
    StateForgotten { number: u64 },
    #[error("block {number} is not finalized yet\nhint: wait a little and ask again")]
    NotYetFinal { number: u64 },
    #[error("hotkey {hotkey} is not registered on subnet {netuid}\nhint: register it with `btcli subnet register`")]
    NotRegistered { hotkey: AccountId, netuid: u16 },
    #[error(
        "hotkey {hotkey} has committed something else on subnet {netuid} ({length} bytes), and a subnet keeps one commitment of a hotkey\nhint: `identity certify --replace` puts the key certificate in its place"
    )]
    CommitmentTaken { hotkey: AccountId, netuid: u16, length: usize },
    #[error("a commitment of {length} bytes is too long\nhint: at most {limit} bytes fit into one field")]
    CommitmentTooLong { length: usize, limit: usize },
    #[error(
        "the commitment of {hotkey} was refused: {reason}\nhint: the chain takes about 3,100 bytes of commitments in each epoch, each counting at least 100"
    )]
    CommitmentRefused { hotkey: AccountId, reason: String },
    #[error(
        "an extrinsic of {hotkey} was sent but not seen in a finalized block within {millis} ms\nhint: look again before sending another one"
    )]
    NotFinalized { hotkey: AccountId, millis: u64 },
    #[error(
        "the chain says that it took what we wrote, but reading it back gives something else: {what}\nhint: another process may use the same hotkey"
    )]
    ReadBackDiffers { what: String },
}

impl ChainError {
    /// Whether the same call may well succeed a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Unavailable { .. } | Self::Untrusted { .. } | Self::Timeout { .. } | Self::NotFinalized { .. } | Self::NotYetFinal { .. }
        )
    }

    /// Whether nothing is better before a person has changed something here: the settings name the wrong network or subnet, or
    /// the chain has outgrown this build.
    pub fn needs_a_person(&self) -> bool {
        matches!(
            self,
            Self::Settings { .. }
                | Self::WrongGenesis { .. }
                | Self::SubnetMissing { .. }
                | Self::Answer { .. }
                | Self::StateForgotten { .. }
                | Self::CommitmentTaken { .. }
                | Self::CommitmentTooLong { .. }
        )
    }
}

/// Why weights were not set. Only a row that was read back from a finalized block counts as set.
#[derive(Debug, thiserror::Error)]
pub enum SetWeightsError {
    #[error("the weights were refused: {reason}\nhint: {hint}", reason = .0, hint = .0.hint())]
    Refused(WeightsRefusal),
    #[error(
        "the weights were sent but not seen in a finalized block within {millis} ms\nhint: read the weights again before sending them once more"
    )]
    NotFinalized { millis: u64 },
    #[error(
        "the weights landed in block {block}, but the chain's record differs from the row sent\nhint: another process may use the same hotkey"
    )]
    ReadBackDiffers { block: BlockRef },
    #[error("the weights cannot be locked for their reveal: {0}\nhint: the chain names a beacon that this build cannot encrypt to")]
    Timelock(#[from] TimelockError),
    #[error(transparent)]
    Chain(#[from] ChainError),
}

impl SetWeightsError {
    /// Whether the same row may well be accepted later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused(reason) => reason.passes_by_itself(),
            Self::NotFinalized { .. } => true,
            Self::ReadBackDiffers { .. } | Self::Timelock(_) => false,
            Self::Chain(error) => error.is_retryable(),
        }
    }
}

/// Why the chain (or we, on its behalf) refuse a row of weights.
///
/// Pool refusals arrive as `Custom(n)`, whose numbers are promised to stay; dispatch errors are matched by their name in the
/// live metadata, because their numbers move between runtimes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum WeightsRefusal {
    #[error("the row has no weight above zero")]
    EmptyRow,
    #[error("the hotkey's stake lies below the chain's threshold")]
    StakeTooLow,
    #[error("the rate limit since the last weights has not passed")]
    TooFast,
    #[error("the subnet wants weights committed encrypted (commit-reveal is on)")]
    CommitRevealEnabled,
    #[error("the subnet takes plain weights (commit-reveal is off)")]
    CommitRevealDisabled,
    #[error("the subnet wants version {required} of commit-reveal, this build speaks {ours}")]
    CommitVersion { required: u16, ours: u16 },
    #[error("too many committed rows wait to be revealed")]
    TooManyCommits,
    #[error("the beacon's round for the reveal was published before the commit arrived")]
    RoundPassed,
    #[error("weights cannot be set on the root network")]
    RootNetwork,
    #[error("uids and weights differ in length")]
    LengthsDiffer,
    #[error("the subnet or its mechanism does not exist")]
    MechanismMissing,
    #[error("the row has more entries than the subnet has neurons")]
    TooManyUids,
    #[error("the hotkey is not registered on the subnet")]
    NotRegistered,
    #[error("the subnet wants weights of version {required} or newer, this build sends {ours}")]
    VersionTooOld { required: u64, ours: u64 },
    #[error("the subnet wants a newer weights version than the one sent")]
    VersionKey,
    #[error("the hotkey has no validator permit")]
    NoValidatorPermit,
    #[error("a uid appears twice")]
    DuplicateUids,
    #[error("a uid does not exist on the subnet")]
    UnknownUid,
    #[error("the row has fewer entries than the subnet demands")]
    TooFewWeights,
    #[error("one weight is larger than the subnet allows")]
    WeightTooLarge,
    #[error("a swap of the coldkey is announced or disputed")]
    ColdkeySwap,
    #[error("the extrinsic's nonce is not the next one: another extrinsic of this hotkey is on its way")]
    Nonce,
    #[error("the node did not accept the signature or the extrinsic's era")]
    BadProof,
    #[error("the node refused the extrinsic: {0}")]
    Other(String),
}

impl WeightsRefusal {
    /// The refusal that a pool's `Custom(n)` means for a weights call.
    pub fn from_pool_code(code: u8) -> Self {
        match code {
            0 | 21 => Self::ColdkeySwap,
            1 => Self::StakeTooLow,
            6 => Self::TooFast,
            15 => Self::RoundPassed,
            18 => Self::LengthsDiffer,
            other => Self::Other(format!("custom error {other}")),
        }
    }

    /// The refusal that a dispatch error of `SubtensorModule` means, by its metadata name.
    pub fn from_dispatch_error(name: &str) -> Self {
        match name {
            "CommitRevealEnabled" => Self::CommitRevealEnabled,
            "CommitRevealDisabled" => Self::CommitRevealDisabled,
            "IncorrectCommitRevealVersion" => Self::CommitVersion { required: 0, ours: COMMIT_REVEAL_VERSION },
            "TooManyUnrevealedCommits" => Self::TooManyCommits,
            "CanNotSetRootNetworkWeights" => Self::RootNetwork,
            "WeightVecNotEqualSize" => Self::LengthsDiffer,
            "MechanismDoesNotExist" | "SubnetNotExists" => Self::MechanismMissing,
            "UidsLengthExceedUidsInSubNet" => Self::TooManyUids,
            "HotKeyNotRegisteredInSubNet" | "HotKeyNotRegisteredInNetwork" => Self::NotRegistered,
            "NotEnoughStakeToSetWeights" => Self::StakeTooLow,
            "IncorrectWeightVersionKey" => Self::VersionKey,
            "SettingWeightsTooFast" | "CommittingWeightsTooFast" => Self::TooFast,
            "NeuronNoValidatorPermit" => Self::NoValidatorPermit,
            "DuplicateUids" => Self::DuplicateUids,
            "UidVecContainInvalidOne" => Self::UnknownUid,
            "WeightVecLengthIsLow" => Self::TooFewWeights,
            "MaxWeightExceeded" => Self::WeightTooLarge,
            "ColdkeySwapAnnounced" | "ColdkeySwapDisputed" => Self::ColdkeySwap,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Whether the same hotkey may well be accepted later without anybody changing anything.
    pub fn passes_by_itself(&self) -> bool {
        matches!(self, Self::TooFast | Self::Nonce | Self::RoundPassed | Self::CommitRevealDisabled | Self::TooManyCommits)
    }

    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::EmptyRow => "score somebody, or put the weight on yourself",
            Self::StakeTooLow => "more stake must be delegated to the hotkey",
            Self::TooFast | Self::Nonce => "wait some blocks; it is tried again by itself",
            Self::CommitRevealEnabled => "it has to be sent timelocked, or the subnet's owner can switch commit-reveal off",
            Self::CommitRevealDisabled => "the row is set in the open instead; it is tried again by itself",
            Self::CommitVersion { .. } => "install a release that speaks this version of commit-reveal",
            Self::TooManyCommits => "wait for the next epoch; another process may use the same hotkey",
            Self::RoundPassed => "check the clock; it is tried again with a later round",
            Self::RootNetwork | Self::MechanismMissing => "check the netuid",
            Self::LengthsDiffer | Self::DuplicateUids | Self::UnknownUid | Self::TooManyUids => {
                "the metagraph changed meanwhile; build the row from a fresh one"
            }
            Self::NotRegistered => "register the hotkey with `btcli subnet register`",
            Self::VersionTooOld { .. } | Self::VersionKey => "install the release that the subnet's owner asks for",
            Self::NoValidatorPermit => "permits go to the validators with the most stake, at the end of an epoch",
            Self::TooFewWeights => "pad the row with zero entries up to the subnet's minimum",
            Self::WeightTooLarge => "spread the weight over more neurons",
            Self::ColdkeySwap => "wait until the coldkey swap is over",
            Self::BadProof => "check the clock and that the endpoint belongs to the configured network",
            Self::Other(_) => "see the node's message; the runtime may have been upgraded",
        }
    }
}
