//! Accounts, keys and signatures (`docs/protocol.md`, identities).
//!
//! An account is 32 bytes, shown as SS58 with prefix 42. A key that signs states its kind; a signature is verified under
//! that kind alone, because half of all Sr25519 keys also parse as Ed25519 points.

use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};
use blake2::{Blake2b512, Digest as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::words;

const SS58_PREFIX: u8 = 42;
const SS58_CONTEXT: &[u8] = b"SS58PRE";
/// Longest text that can be an address with 32 account bytes; anything longer is refused before decoding.
const SS58_TEXT_MAX: usize = 64;

/// A Substrate account: a public key without its kind.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct AccountId(pub [u8; 32]);

#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    #[error("`{0}` is not an SS58 address\nhint: it should look like 5Grwva…, 48 characters, as `btcli wallet list` prints it")]
    Malformed(String),
    #[error("`{0}` has a wrong checksum\nhint: a character was lost or changed when it was copied")]
    Checksum(String),
    #[error("`{0}` is an address of another network (prefix {1})\nhint: Bittensor addresses have prefix 42 and start with 5")]
    Network(String, u8),
}

fn ss58_checksum(body: &[u8]) -> [u8; 2] {
    let hash = Blake2b512::new().chain_update(SS58_CONTEXT).chain_update(body).finalize();
    [hash[0], hash[1]]
}

impl AccountId {
    /// The first characters of the address, for logs.
    pub fn short(&self) -> String {
        self.to_string().chars().take(8).collect()
    }
}

impl fmt::Display for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(35);
        bytes.push(SS58_PREFIX);
        bytes.extend_from_slice(&self.0);
        let checksum = ss58_checksum(&bytes);
        bytes.extend_from_slice(&checksum);
        f.write_str(&bs58::encode(bytes).into_string())
    }
}

impl fmt::Debug for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for AccountId {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let malformed = || AddressError::Malformed(text.chars().take(SS58_TEXT_MAX).collect());
        if text.len() > SS58_TEXT_MAX {
            return Err(malformed());
        }
        let bytes = bs58::decode(text).into_vec().map_err(|_| malformed())?;
        if bytes.len() != 35 {
            return Err(malformed());
        }
        if ss58_checksum(&bytes[..33]) != bytes[33..] {
            return Err(AddressError::Checksum(text.to_owned()));
        }
        if bytes[0] != SS58_PREFIX {
            return Err(AddressError::Network(text.to_owned(), bytes[0]));
        }
        let mut account = [0; 32];
        account.copy_from_slice(&bytes[1..33]);
        Ok(Self(account))
    }
}

impl Serialize for AccountId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { words::serialize(&self.0, serializer) }
    }
}

impl<'de> Deserialize<'de> for AccountId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            words::deserialize(deserializer).map(Self)
        }
    }
}

/// The signature scheme of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyKind {
    Ed25519 = 0,
    Sr25519 = 1,
}

/// One byte on the wire (derived enums would take four).
impl Encode for KeyKind {
    fn encode<E: bincode::enc::Encoder>(&self, encoder: &mut E) -> Result<(), bincode::error::EncodeError> {
        (*self as u8).encode(encoder)
    }
}

impl<Context> Decode<Context> for KeyKind {
    fn decode<D: bincode::de::Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        match u8::decode(decoder)? {
            0 => Ok(Self::Ed25519),
            1 => Ok(Self::Sr25519),
            _ => Err(bincode::error::DecodeError::Other("unknown key kind")),
        }
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ed25519 => "ed25519",
            Self::Sr25519 => "sr25519",
        })
    }
}

/// A public key that signs: kind and bytes. The bytes are the account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
pub struct KeyRef {
    pub kind: KeyKind,
    #[serde(rename = "account", with = "account_bytes")]
    pub public: [u8; 32],
}

mod account_bytes {
    use super::AccountId;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        AccountId(*bytes).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        AccountId::deserialize(deserializer).map(|account| account.0)
    }
}

impl KeyRef {
    pub fn account(&self) -> AccountId {
        AccountId(self.public)
    }
}

/// Something that signs: a hotkey of a wallet, or a bare key in tests.
pub trait Signer: Send + Sync {
    fn key(&self) -> KeyRef;
    /// Signs `message`. Ed25519 signatures are deterministic, Sr25519 ones are not: never compare signatures.
    fn sign(&self, message: &[u8]) -> [u8; 64];
}

impl<T: Signer + ?Sized> Signer for std::sync::Arc<T> {
    fn key(&self) -> KeyRef {
        (**self).key()
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        (**self).sign(message)
    }
}

/// An Ed25519 key pair from its 32-byte seed. The secret is wiped when it is dropped.
pub struct Ed25519Signer(ed25519_dalek::SigningKey);

impl Ed25519Signer {
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(ed25519_dalek::SigningKey::from_bytes(&seed))
    }

    /// The X25519 secret that belongs to [`x25519_public`] of this key.
    pub fn x25519_secret(&self) -> [u8; 32] {
        self.0.to_scalar_bytes()
    }
}

impl Signer for Ed25519Signer {
    fn key(&self) -> KeyRef {
        KeyRef { kind: KeyKind::Ed25519, public: self.0.verifying_key().to_bytes() }
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        use ed25519_dalek::Signer as _;
        self.0.sign(message).to_bytes()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    #[error("the public key is not a valid {0} key")]
    Key(KeyKind),
    #[error("the {0} key is of small order: anybody could sign for it")]
    WeakKey(KeyKind),
    #[error("the {0} signature does not match")]
    Mismatch(KeyKind),
}

/// Verifies `signature` of `message` under the kind that `key` states. Ed25519 is verified strictly; keys of small order are
/// refused (a small-order key passes the lenient check for any message).
pub fn verify_signature(key: &KeyRef, message: &[u8], signature: &[u8; 64]) -> Result<(), SignatureError> {
    let kind = key.kind;
    match kind {
        KeyKind::Ed25519 => {
            let public = ed25519_dalek::VerifyingKey::from_bytes(&key.public).map_err(|_| SignatureError::Key(kind))?;
            if public.is_weak() {
                return Err(SignatureError::WeakKey(kind));
            }
            public.verify_strict(message, &ed25519_dalek::Signature::from_bytes(signature)).map_err(|_| SignatureError::Mismatch(kind))
        }
        KeyKind::Sr25519 => {
            let public = schnorrkel::PublicKey::from_bytes(&key.public).map_err(|_| SignatureError::Key(kind))?;
            if key.public == [0; 32] {
                return Err(SignatureError::WeakKey(kind));
            }
            let signature = schnorrkel::Signature::from_bytes(signature).map_err(|_| SignatureError::Mismatch(kind))?;
            public.verify_simple(b"substrate", message, &signature).map_err(|_| SignatureError::Mismatch(kind))
        }
    }
}

/// The X25519 key to seal to for an account whose bytes are an Ed25519 point; `None` where they are no point or a weak one.
pub fn x25519_public(account: &AccountId) -> Option<[u8; 32]> {
    let point = ed25519_dalek::VerifyingKey::from_bytes(&account.0).ok()?;
    (!point.is_weak()).then(|| point.to_montgomery().to_bytes())
}

bincode::impl_borrow_decode!(KeyKind);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_round_trips_and_matches_the_known_development_account() {
        let alice = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY";
        let account: AccountId = alice.parse().unwrap();
        assert_eq!(hex::encode(account.0), "d43593c715fdd31c61141abd04a99fd6822c8558854ccde39a5684e7a56da27d");
        assert_eq!(account.to_string(), alice);
    }

    #[test]
    fn a_changed_character_a_foreign_prefix_and_rubbish_are_told_apart() {
        let wrong = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQZ";
        assert!(matches!(wrong.parse::<AccountId>(), Err(AddressError::Checksum(_))));
        let polkadot = "15oF4uVJwmo4TdGW7VfQxNLavjCXviqxT9S1MgbjMNHr6Sp5";
        assert!(matches!(polkadot.parse::<AccountId>(), Err(AddressError::Network(_, 0))));
        for rubbish in ["", "5Grwva", "not an address", &"5".repeat(500)] {
            assert!(matches!(rubbish.parse::<AccountId>(), Err(AddressError::Malformed(_))), "{rubbish}");
        }
    }

    #[test]
    fn an_ed25519_signature_is_bound_to_message_and_kind() {
        let signer = Ed25519Signer::from_seed([7; 32]);
        let signature = signer.sign(b"message");
        assert_eq!(verify_signature(&signer.key(), b"message", &signature), Ok(()));
        assert!(verify_signature(&signer.key(), b"massage", &signature).is_err());
        let other = KeyRef { kind: KeyKind::Sr25519, ..signer.key() };
        assert!(verify_signature(&other, b"message", &signature).is_err());
    }

    #[test]
    fn a_weak_key_is_refused_even_for_the_signature_that_lenient_verification_accepts() {
        let mut identity = [0; 32];
        identity[0] = 1;
        let key = KeyRef { kind: KeyKind::Ed25519, public: identity };
        let mut signature = [0; 64];
        signature[0] = 1;
        assert_eq!(verify_signature(&key, b"anything", &signature), Err(SignatureError::WeakKey(KeyKind::Ed25519)));
        assert_eq!(x25519_public(&AccountId(identity)), None);
    }

    #[test]
    fn the_sealing_key_of_an_account_is_the_public_half_of_the_signers_secret() {
        let signer = Ed25519Signer::from_seed([9; 32]);
        let public = x25519_public(&signer.key().account()).unwrap();
        let derived = curve25519_base(signer.x25519_secret());
        assert_eq!(public, derived);
    }

    fn curve25519_base(secret: [u8; 32]) -> [u8; 32] {
        // The Montgomery form of secret * B, computed through the Edwards base point of the signature library.
        let expanded = ed25519_dalek::hazmat::ExpandedSecretKey::from_bytes(&{
            let mut bytes = [0; 64];
            bytes[..32].copy_from_slice(&secret);
            bytes
        });
        ed25519_dalek::VerifyingKey::from(&expanded).to_montgomery().to_bytes()
    }
}
