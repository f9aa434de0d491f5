//! Key certificates: the X25519 key to seal to, published by a hotkey whose own key cannot be sealed to.
//!
//! An Ed25519 key maps to an X25519 key; an Sr25519 key maps to none. A hotkey publishes one through the commitments pallet, which
//! only the hotkey itself can write: the chain is what vouches for it. The secret half is derived from the hotkey's secret, so
//! that nothing else has to be kept. A certificate on chain wins over the mapping of an Ed25519 key.

use std::time::Duration;

use protocol::AccountId;

use crate::chain::Chain;
use crate::error::ChainError;
use crate::hotkey::Hotkey;
use crate::link::ChainLink;
use crate::types::BlockRef;

/// What every certificate begins with: its name and version.
const MAGIC: &[u8; 8] = b"QSRKEY\x00\x01";
const BYTES: usize = MAGIC.len() + 32;
/// First and longest pause between two tries to publish.
const RETRY_FIRST: Duration = Duration::from_secs(2);
const RETRY_LONGEST: Duration = Duration::from_secs(60);

/// The key to seal to for the hotkey that committed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyCertificate {
    /// An X25519 public key.
    pub x25519: [u8; 32],
}

/// The key in hexadecimal.
impl std::fmt::Display for KeyCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.x25519))
    }
}

impl KeyCertificate {
    /// The certificate of `hotkey`.
    pub fn of(hotkey: &Hotkey) -> Self {
        Self { x25519: hotkey.sealing_public() }
    }

    /// The bytes that are committed.
    pub fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..MAGIC.len()].copy_from_slice(MAGIC);
        bytes[MAGIC.len()..].copy_from_slice(&self.x25519);
        bytes
    }

    /// Reads committed bytes; `None` where they are something else, or a key that nobody may be sealed to.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let key: [u8; 32] = bytes.strip_prefix(MAGIC)?.try_into().ok()?;
        (!is_low_order(&key)).then_some(Self { x25519: key })
    }
}

/// Whether everybody could compute what is shared with this key: multiplying it by a clamped scalar gives zero.
fn is_low_order(key: &[u8; 32]) -> bool {
    use curve25519_dalek::MontgomeryPoint;
    MontgomeryPoint(*key).mul_clamped([0x5a; 32]) == MontgomeryPoint([0; 32])
}

/// Publishes the certificate of `hotkey` on the subnet, unless the chain shows it already. Gives the block that contains it, `None`
/// where nothing had to be sent. What the hotkey has committed for another purpose is lost only where the caller says so.
pub async fn publish(chain: &dyn Chain, hotkey: &Hotkey, netuid: u16, may_replace: bool) -> Result<Option<BlockRef>, ChainError> {
    let (certificate, account) = (KeyCertificate::of(hotkey), hotkey.account());
    if let Some(committed) = chain.commitment(netuid, &account).await? {
        match KeyCertificate::decode(&committed) {
            Some(published) if published == certificate => return Ok(None),
            None if !may_replace => return Err(ChainError::CommitmentTaken { hotkey: account, netuid, length: committed.len() }),
            _ => {}
        }
    }
    chain.set_commitment(hotkey, netuid, &certificate.encode()).await.map(Some)
}

/// Publishes the certificate of `hotkey` as soon as that can be: tries until the chain answers, the hotkey is registered and
/// nothing else stands in the certificate's place. Dropping the future stops it.
pub async fn publish_when_possible(link: &ChainLink, hotkey: &Hotkey, netuid: u16) {
    let mut pause = RETRY_FIRST;
    let mut complaint = String::new();
    loop {
        let published = async { publish(link.client().await?.as_ref(), hotkey, netuid, false).await };
        match published.await {
            Ok(None) => return tracing::info!("the key certificate is on chain"),
            Ok(Some(block)) => return tracing::info!(%block, "the key certificate is published"),
            Err(error) => {
                let error = error.to_string().replace('\n', "; ");
                if error != complaint {
                    tracing::warn!(error, "the key certificate is not published yet");
                    complaint = error;
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LONGEST);
    }
}

/// The certificate that `account` has published on the subnet.
pub async fn read(chain: &dyn Chain, netuid: u16, account: &AccountId) -> Result<Option<KeyCertificate>, ChainError> {
    Ok(chain.commitment(netuid, account).await?.as_deref().and_then(KeyCertificate::decode))
}

/// All certificates of the subnet, in one read.
pub async fn read_all(chain: &dyn Chain, netuid: u16) -> Result<Vec<(AccountId, KeyCertificate)>, ChainError> {
    let all = chain.commitments(netuid).await?;
    Ok(all.into_iter().filter_map(|(account, bytes)| Some((account, KeyCertificate::decode(&bytes)?))).collect())
}

/// The X25519 key to seal to for `account`: its certificate, else the mapping of an Ed25519 key; `None` = it needs a certificate.
pub fn recipient(account: &AccountId, certificate: Option<&KeyCertificate>) -> Option<[u8; 32]> {
    certificate.map(|certificate| certificate.x25519).or_else(|| protocol::x25519_public(account))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::KeyKind;

    #[test]
    fn a_certificate_is_its_committed_bytes() {
        let hotkey = Hotkey::from_seed(KeyKind::Sr25519, &[3; 32]);
        let certificate = KeyCertificate::of(&hotkey);
        assert_eq!(KeyCertificate::decode(&certificate.encode()), Some(certificate));
        assert_eq!(certificate.x25519, hotkey.sealing_public());
    }

    #[test]
    fn a_certificate_wins_and_without_one_ed25519_keys_are_mapped() {
        let (ed, other) = (Hotkey::from_seed(KeyKind::Ed25519, &[1; 32]), Hotkey::from_seed(KeyKind::Sr25519, &[2; 32]));
        let certificate = KeyCertificate::of(&other);
        assert_eq!(recipient(&ed.account(), None), protocol::x25519_public(&ed.account()));
        assert_eq!(recipient(&ed.account(), None), Some(ed.sealing_public()));
        assert_eq!(recipient(&ed.account(), Some(&certificate)), Some(other.sealing_public()));
    }

    #[test]
    fn keys_of_low_order_are_no_certificates() {
        let of = |key: [u8; 32]| KeyCertificate { x25519: key }.encode();
        let mut one = [0; 32];
        one[0] = 1;
        // Order 8, from RFC 7748's security considerations.
        let mut eight = [0; 32];
        hex::decode_to_slice("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800", &mut eight).unwrap();
        for key in [[0; 32], one, eight] {
            assert_eq!(KeyCertificate::decode(&of(key)), None);
        }
    }

    proptest! {
        #[test]
        fn other_commitments_are_not_taken_for_certificates(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(KeyCertificate::decode(&bytes).is_none_or(|certificate| certificate.encode() == bytes.as_slice()));
        }
    }
}
