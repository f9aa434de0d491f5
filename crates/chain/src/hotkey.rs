//! A hotkey with its secret: signs documents and extrinsics, opens what is sealed to it.

use std::fmt;

use protocol::{AccountId, Digest, Ed25519Signer, KeyKind, KeyRef, Signer};
use zeroize::Zeroizing;

/// Signing context of Substrate's Sr25519 signatures.
const SR25519_CONTEXT: &[u8] = b"substrate";

/// Separates the sealing key of an Sr25519 hotkey from everything else that is derived from its secret.
const SEALING_CONTEXT: &str = "quasar 2026 x25519 sealing key of an sr25519 hotkey";

/// A key pair of either kind. Secrets are wiped when it is dropped and never printed.
pub struct Hotkey(Pair);

enum Pair {
    Ed25519(Box<Ed25519Signer>),
    Sr25519(Box<schnorrkel::Keypair>),
}

/// The bytes are no secret key of that kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {0} secret key")]
pub struct InvalidSecret(pub KeyKind);

impl Hotkey {
    /// From a 32-byte seed: the Ed25519 seed, or the Sr25519 mini secret key expanded as Substrate does.
    pub fn from_seed(kind: KeyKind, seed: &[u8; 32]) -> Self {
        match kind {
            KeyKind::Ed25519 => Self(Pair::Ed25519(Box::new(Ed25519Signer::from_seed(*seed)))),
            KeyKind::Sr25519 => {
                // Any 32 bytes are a mini secret key: from_bytes fails only for another length.
                let mini = schnorrkel::MiniSecretKey::from_bytes(seed).expect("32 bytes are a mini secret key");
                Self(Pair::Sr25519(Box::new(mini.expand_to_keypair(schnorrkel::ExpansionMode::Ed25519))))
            }
        }
    }

    /// From a 64-byte expanded Sr25519 secret (scalar ‖ nonce), the `privateKey` of wallet files.
    pub fn from_sr25519_secret(secret: &[u8; 64]) -> Result<Self, InvalidSecret> {
        let secret = schnorrkel::SecretKey::from_bytes(secret).map_err(|_| InvalidSecret(KeyKind::Sr25519))?;
        Ok(Self(Pair::Sr25519(Box::new(secret.to_keypair()))))
    }

    pub fn key(&self) -> KeyRef {
        match &self.0 {
            Pair::Ed25519(signer) => signer.key(),
            Pair::Sr25519(pair) => KeyRef { kind: KeyKind::Sr25519, public: pair.public.to_bytes() },
        }
    }

    pub fn account(&self) -> AccountId {
        self.key().account()
    }

    /// The X25519 secret that opens what is sealed to this hotkey: the mapped key of Ed25519, and for Sr25519 the one whose public
    /// half the hotkey publishes in its key certificate, derived from its secret.
    pub fn sealing_secret(&self) -> Zeroizing<[u8; 32]> {
        match &self.0 {
            Pair::Ed25519(signer) => Zeroizing::new(signer.x25519_secret()),
            Pair::Sr25519(pair) => {
                let secret = Zeroizing::new(pair.secret.to_bytes());
                Zeroizing::new(Digest::derive(SEALING_CONTEXT, &[secret.as_slice()]).0)
            }
        }
    }

    /// The X25519 key to seal to for this hotkey.
    pub fn sealing_public(&self) -> [u8; 32] {
        curve25519_dalek::MontgomeryPoint::mul_base_clamped(*self.sealing_secret()).to_bytes()
    }

    /// The expanded Sr25519 secret as wallet files keep it; `None` for Ed25519, whose file keeps the seed.
    pub(crate) fn sr25519_secret(&self) -> Option<Zeroizing<[u8; 64]>> {
        match &self.0 {
            Pair::Ed25519(_) => None,
            Pair::Sr25519(pair) => Some(Zeroizing::new(pair.secret.to_bytes())),
        }
    }
}

impl Signer for Hotkey {
    fn key(&self) -> KeyRef {
        Hotkey::key(self)
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        match &self.0 {
            Pair::Ed25519(signer) => signer.sign(message),
            Pair::Sr25519(pair) => pair.sign_simple(SR25519_CONTEXT, message).to_bytes(),
        }
    }
}

impl fmt::Debug for Hotkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key();
        write!(f, "Hotkey({} {})", key.kind, key.account())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_sign_what_the_protocol_verifies() {
        for kind in [KeyKind::Ed25519, KeyKind::Sr25519] {
            let hotkey = Hotkey::from_seed(kind, &[5; 32]);
            let signature = hotkey.sign(b"message");
            assert_eq!(protocol::verify_signature(&hotkey.key(), b"message", &signature), Ok(()));
            assert!(protocol::verify_signature(&hotkey.key(), b"massage", &signature).is_err());
        }
    }

    #[test]
    fn the_known_development_key_is_derived_from_its_mini_secret() {
        let mut seed = [0; 32];
        hex::decode_to_slice("e5be9a5092b81bca64be81d212e7f2f9eba183bb7a90954f7b76361f6edb5c0a", &mut seed).unwrap();
        let alice = Hotkey::from_seed(KeyKind::Sr25519, &seed);
        assert_eq!(alice.account().to_string(), "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY");
    }

    #[test]
    fn both_kinds_have_a_sealing_key_whose_halves_belong_together() {
        for kind in [KeyKind::Ed25519, KeyKind::Sr25519] {
            let hotkey = Hotkey::from_seed(kind, &[6; 32]);
            let secret = hotkey.sealing_secret();
            assert_eq!(curve25519_dalek::MontgomeryPoint::mul_base_clamped(*secret).to_bytes(), hotkey.sealing_public());
            assert_ne!(hotkey.sealing_public(), Hotkey::from_seed(kind, &[7; 32]).sealing_public());
        }
        // Pinned: another derivation would lock every published certificate out.
        let pinned = Hotkey::from_seed(KeyKind::Sr25519, &[6; 32]).sealing_public();
        assert_eq!(hex::encode(pinned), "13500a9f2d8c2d4f8ea790889cb7b7c64b2b6ebfeaac98d40d4d191e8e0e0a17");
    }

    #[test]
    fn debug_output_shows_the_address_and_no_secret() {
        let seed = [0xab; 32];
        for kind in [KeyKind::Ed25519, KeyKind::Sr25519] {
            let hotkey = Hotkey::from_seed(kind, &seed);
            let text = format!("{hotkey:?}");
            assert_eq!(text, format!("Hotkey({kind} {})", hotkey.account()));
            assert!(!text.contains("abab"));
        }
    }
}
