//! Sealing bytes to one hotkey: HPKE (RFC 9180) in base mode with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and ChaCha20-Poly1305.
//!
//! `info` and `aad` bind the box to its purpose and its envelope: it opens only where both are the same. Sealing to a low-order key
//! fails (its shared secret would be known to everybody). The sender is not authenticated; the signed envelope around the box does that.

use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable};
pub use protocol::SealedBytes as Sealed;
use zeroize::Zeroizing;

/// Bytes that sealing adds: the encapsulated key and the authentication tag.
pub const OVERHEAD: usize = 48;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error(
        "the recipient's key cannot be sealed to\nhint: the hotkey's public key is degenerate; register another one or publish a key certificate"
    )]
    BadRecipient,
    #[error("the sealed bytes do not open with this key and context\nhint: they are damaged or meant for another hotkey, run or purpose")]
    DoesNotOpen,
}

/// Seals `plaintext` to the X25519 public key `recipient`.
pub fn seal(recipient: &[u8; 32], info: &[u8], aad: &[u8], plaintext: &[u8]) -> Result<Sealed, SealError> {
    let recipient = <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(recipient).map_err(|_| SealError::BadRecipient)?;
    let (encapsulated, ciphertext) =
        hpke::single_shot_seal::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(&OpModeS::Base, &recipient, info, plaintext, aad)
            .map_err(|_| SealError::BadRecipient)?;
    Ok(Sealed { encapsulated: encapsulated.to_bytes().into(), ciphertext })
}

/// Opens what was sealed to the public key of the X25519 secret `secret` with the same `info` and `aad`.
pub fn open(secret: &[u8; 32], info: &[u8], aad: &[u8], sealed: &Sealed) -> Result<Zeroizing<Vec<u8>>, SealError> {
    let secret = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(secret).map_err(|_| SealError::DoesNotOpen)?;
    let encapsulated = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(&sealed.encapsulated).map_err(|_| SealError::DoesNotOpen)?;
    hpke::single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
        &OpModeR::Base,
        &secret,
        &encapsulated,
        info,
        &sealed.ciphertext,
        aad,
    )
    .map(Zeroizing::new)
    .map_err(|_| SealError::DoesNotOpen)
}

#[cfg(test)]
mod tests {
    use protocol::{Ed25519Signer, Signer};

    use super::*;

    fn bytes32(hex: &str) -> [u8; 32] {
        hex::decode(hex).unwrap().try_into().unwrap()
    }

    #[test]
    fn the_vector_of_rfc_9180_opens() {
        // RFC 9180, A.2.1 (base mode), first encryption.
        let secret = bytes32("8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb");
        let sealed = Sealed {
            encapsulated: bytes32("1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a"),
            ciphertext: hex::decode("1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28").unwrap(),
        };
        let info = b"Ode on a Grecian Urn";
        let opened = open(&secret, info, b"Count-0", &sealed).unwrap();
        assert_eq!(opened.as_slice(), b"Beauty is truth, truth beauty");
    }

    #[test]
    fn a_hotkey_opens_what_was_sealed_to_its_account_and_nothing_else_opens() {
        let hotkey = Ed25519Signer::from_seed([7; 32]);
        let recipient = protocol::x25519_public(&hotkey.key().account()).unwrap();
        let sealed = seal(&recipient, b"info", b"aad", b"grants").unwrap();
        assert_eq!(sealed.encapsulated.len() + sealed.ciphertext.len(), b"grants".len() + OVERHEAD);
        let secret = hotkey.x25519_secret();
        assert_eq!(open(&secret, b"info", b"aad", &sealed).unwrap().as_slice(), b"grants");
        assert_eq!(open(&secret, b"other", b"aad", &sealed), Err(SealError::DoesNotOpen));
        assert_eq!(open(&secret, b"info", b"other", &sealed), Err(SealError::DoesNotOpen));
        assert_eq!(open(&Ed25519Signer::from_seed([8; 32]).x25519_secret(), b"info", b"aad", &sealed), Err(SealError::DoesNotOpen));
        for flip in 0..sealed.ciphertext.len() {
            let mut damaged = sealed.clone();
            damaged.ciphertext[flip] ^= 1;
            assert_eq!(open(&secret, b"info", b"aad", &damaged), Err(SealError::DoesNotOpen));
        }
        let cut = Sealed { ciphertext: sealed.ciphertext[..10].to_vec(), ..sealed };
        assert_eq!(open(&secret, b"info", b"aad", &cut), Err(SealError::DoesNotOpen));
    }

    #[test]
    fn nothing_is_sealed_to_a_low_order_key_nor_opened_from_one() {
        let mut one = [0; 32];
        one[0] = 1;
        let order_8 = bytes32("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800");
        for low in [[0; 32], one, order_8] {
            assert_eq!(seal(&low, b"", b"", b"secret"), Err(SealError::BadRecipient));
            let forged = Sealed { encapsulated: low, ciphertext: vec![0; 32] };
            assert_eq!(open(&[9; 32], b"", b"", &forged), Err(SealError::DoesNotOpen));
        }
    }
}
