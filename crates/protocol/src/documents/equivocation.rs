//! Proof that a signer said two things at once.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::envelope::{EnvelopeError, verify_as_stated};
use crate::{AccountId, Digest};

/// Two signed documents of one signer with the same purpose, run and sequence that differ. The finder signs the whole, but
/// needs no trust: both signatures are inside.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Equivocation {
    /// Where they were read.
    pub key: String,
    #[serde(with = "hex::serde")]
    pub first: Vec<u8>,
    #[serde(with = "hex::serde")]
    pub second: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoEquivocation {
    #[error("one of the two documents is not validly signed: {0}")]
    Envelope(#[from] EnvelopeError),
    #[error("the two documents are one and the same")]
    Same,
    #[error("the two documents differ in {0}: both may be right")]
    Apart(&'static str),
}

impl Equivocation {
    /// Who is convicted, at which sequence, and the ids of both documents.
    ///
    /// # Errors
    /// The two documents do not contradict each other.
    pub fn verify(&self) -> Result<(AccountId, u64, [Digest; 2]), NoEquivocation> {
        let (first, first_id) = verify_as_stated(&self.first)?;
        let (second, second_id) = verify_as_stated(&self.second)?;
        if first_id == second_id {
            return Err(NoEquivocation::Same);
        }
        let (first, second) = (first.header, second.header);
        let differs = [
            (first.signer != second.signer, "their signer"),
            (first.purpose != second.purpose, "their purpose"),
            (first.genesis != second.genesis, "their network"),
            (first.netuid != second.netuid, "their subnet"),
            (first.run != second.run, "their run"),
            (first.sequence != second.sequence, "their sequence"),
        ];
        match differs.iter().find(|(differs, _)| *differs) {
            Some((_, what)) => Err(NoEquivocation::Apart(what)),
            None => Ok((first.signer.account(), first.sequence, [first_id, second_id])),
        }
    }
}
