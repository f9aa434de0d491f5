//! A 32-byte digest: BLAKE3 for ids and artifacts, SHA-256 where an S3 store enforces it.

use std::fmt;

use bincode::{Decode, Encode};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// 32 bytes of a cryptographic hash; shown as lower-case hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Encode, Decode)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of nothing in particular: the start of chains, the absence of a run.
    pub const ZERO: Self = Self([0; 32]);

    /// BLAKE3 of `bytes`.
    pub fn blake3(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// SHA-256 of `bytes`.
    pub fn sha256(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// BLAKE3 in key-derivation mode over the concatenated `parts`, each preceded by its length, so that no two
    /// different lists of parts hash alike.
    pub fn derive(context: &str, parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The first eight hexadecimal characters, for people.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..4])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0; 64];
        hex::encode_to_slice(self.0, &mut text).map_err(|_| fmt::Error)?;
        f.write_str(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Digest {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text.strip_prefix("0x").unwrap_or(text), &mut bytes)?;
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { words::serialize(&self.0, serializer) }
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            words::deserialize(deserializer).map(Self)
        }
    }
}

/// 32 bytes for binary serde formats, as two words: an array is written byte by byte there, and digests are most of what a journal
/// and a snapshot hold. In bincode with fixed integers the bytes are those of the array.
pub(crate) mod words {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        let mut words = [[0; 16]; 2];
        words.as_flattened_mut().copy_from_slice(bytes);
        words.map(u128::from_le_bytes).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let words = <[u128; 2]>::deserialize(deserializer)?.map(u128::to_le_bytes);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(words.as_flattened());
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AccountId;

    #[test]
    fn a_digest_in_a_journal_is_its_bytes_and_in_a_snapshot_two_more() {
        let bytes: [u8; 32] = std::array::from_fn(|index| 200 + index as u8);
        let (fixed, variable) = (bincode::config::standard().with_fixed_int_encoding(), bincode::config::standard());
        let both = (Digest(bytes), AccountId(bytes));
        let encoded = bincode::serde::encode_to_vec(both, fixed).unwrap();
        assert_eq!(encoded, [bytes, bytes].concat());
        assert_eq!(bincode::serde::decode_from_slice::<(Digest, AccountId), _>(&encoded, fixed).unwrap().0, both);
        let encoded = bincode::serde::encode_to_vec(both, variable).unwrap();
        assert_eq!(encoded.len(), 2 * (32 + 2));
        assert_eq!(bincode::serde::decode_from_slice::<(Digest, AccountId), _>(&encoded, variable).unwrap().0, both);
        assert_eq!(Digest(bytes).to_string(), hex::encode(bytes));
    }
}
