//! Reason codes: one stable number, one sentence and one remedy for every answer that a miner or operator can get. Status,
//! verdicts, merge manifests and logs all use these.

use std::fmt;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($name:ident = $code:literal, $sentence:literal, $remedy:literal;)*) => {
        /// Why something was refused, left out, or judged as it was. On the wire: its number as u16.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Reason { $($name = $code,)* }

        impl Reason {
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// What happened, as a sentence for people.
            pub const fn sentence(self) -> &'static str {
                match self { $(Self::$name => $sentence,)* }
            }

            /// What to do about it.
            pub const fn remedy(self) -> &'static str {
                match self { $(Self::$name => $remedy,)* }
            }

            pub const fn from_code(code: u16) -> Option<Self> {
                match code { $($code => Some(Self::$name),)* _ => None }
            }
        }
    };
}

reasons! {
    None = 0, "nothing to report", "nothing to do";
    // Contributions.
    Late = 100, "the upload came after the merge of its fragment had closed", "no penalty; a faster uplink or a smaller batch helps to be in time";
    StaleBase = 101, "the payload was taken against a version older than the one before the current", "apply new fragment versions before answering pulls";
    UnknownPull = 102, "the commitment answers a pull that is not open", "follow the head; update the miner if this repeats";
    NoLease = 103, "the commitment does not belong to a live lease of this learner", "wait for a job, then train on its rows";
    SessionReplaced = 104, "a newer session of the same hotkey and slot took over", "run one process for each slot of a hotkey";
    ExcessWork = 105, "the steps claimed are more than lease and time allow; the merge counted less", "check the machine's clock";
    NotUploaded = 106, "the payload was committed but did not arrive before the deadline", "check the uplink; no penalty";
    LengthMismatch = 107, "the payload has another length than plan and codec give", "update the miner: its codec differs";
    DigestMismatch = 108, "the payload's digest is not the committed one", "check memory and disk of the machine";
    HeaderMismatch = 109, "the payload's header is not the one that the plan gives", "update the miner: its plan or codec differs";
    NotFinite = 110, "the payload holds a value that is not finite", "lower nothing by hand: a snapshot before the fault is used again";
    NormTooLarge = 111, "the payload's norm is over ten times the median of the learners", "see the loss curve; a diverged learner restarts from the fragments";
    DirectionOutlier = 112, "the direction stands alone against all other learners", "audits follow; honest work is not penalised by this";
    RepeatedCommitment = 113, "the learner had already committed to this pull", "one commitment counts for each pull; update the miner if this repeats";
    Malformed = 114, "the payload's body is not what its codec writes", "update the miner: its codec differs";
    TooSimilar = 115, "the payload is far closer to some others than learners' work is to each other", "train on your own rows; audits follow";
    ReceiptMismatch = 116, "the receipt is not for its lease, or contradicts what was committed before", "update the miner; rows without evidence count as lost";
    // Sessions and grants.
    NotRegistered = 200, "the hotkey is not registered on the subnet", "register it with btcli, then start again";
    NeedsCertificate = 201, "nothing can be sealed to this sr25519 hotkey yet", "`identity certify` publishes its key certificate on chain, and so does a running miner";
    NoWork = 202, "no rows are waiting", "wait: rows return or shards are added";
    Draining = 203, "the run is draining and gives out no more work", "wait for the next run";
    ProtocolVersion = 204, "this build's protocol version lies outside the run's range", "install the version that the run asks for";
    Stale = 205, "no progress record arrived for longer than the run allows", "check the network; the lease's rows have returned";
    Banned = 206, "the run's operator excluded this hotkey", "the order at public/RUN/orders says why";
    // Audits.
    ReplayMismatch = 300, "the replay of the opened segment does not give the payload that was uploaded", "train with the published build and unchanged settings";
    StartMismatch = 301, "the opened state is not the one that was committed", "do not edit or move the state folder while training";
    RowsMismatch = 302, "the opened rows are not those that the lease gives", "train on the leased rows in their order";
    NoOpening = 303, "the audited segment was not opened in time", "keep the miner running; the last cycles' segments are kept locally";
    LossWorse = 304, "the loss test saw no gain on the assigned rows", "statistics only: no penalty";
    NotEvaluated = 305, "the validator could not finish the audit for a reason of its own", "no penalty";
    BadOpening = 306, "the opening does not decode or does not fit the model", "update the miner";
    // Devices.
    TrainingFault = 400, "the learner met a loss or gradient that is not finite and went back to its last good state", "watch for a repeat: it may be failing memory";
    DiskFull = 401, "the disk is full", "free space in the state folder, then start again";
    TrainerFailed = 403, "the learner's trainer failed", "see the miner's log; a restart goes on from the last snapshot";
    OutOfMemory = 402, "the device ran out of memory", "use a smaller micro-batch or a larger device";
}

impl Reason {
    pub const fn code(self) -> u16 {
        self as u16
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.sentence(), self.code())
    }
}

impl Encode for Reason {
    fn encode<E: bincode::enc::Encoder>(&self, encoder: &mut E) -> Result<(), bincode::error::EncodeError> {
        self.code().encode(encoder)
    }
}

impl<Context> Decode<Context> for Reason {
    fn decode<D: bincode::de::Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        Self::from_code(u16::decode(decoder)?).ok_or(bincode::error::DecodeError::Other("unknown reason code"))
    }
}

bincode::impl_borrow_decode!(Reason);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_unique_and_names_its_reason() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_code(reason.code()), Some(*reason));
            assert!(!reason.sentence().is_empty() && !reason.remedy().is_empty());
        }
        assert_eq!(Reason::from_code(999), Option::None);
    }
}
