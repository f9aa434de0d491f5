//! Weights locked until a beacon's round is published: what a validator commits where commit-reveal is on, and what the chain opens.
//!
//! Payload: SCALE of { hotkey, uids, values, version key }. Encryption: Boneh-Franklin identity-based encryption of a fresh key on
//! BLS12-381 (identity = SHA-256 of the round, big-endian), AES-256-GCM under that key. The crate `timelock` does the
//! cryptography; its own encoding is not the chain's (the chain writes two fixed arrays as vectors), so the layout is declared here.

use ark_serialize::{CanonicalDeserialize, CanonicalSerialize};
use ark_std::rand::RngCore as _;
use ark_std::rand::rngs::OsRng;
use parity_scale_codec::{Decode, Encode};
use protocol::AccountId;
use sha2::{Digest as _, Sha256};
use timelock::block_ciphers::AESGCMBlockCipherProvider;
use timelock::engines::EngineBLS;
use timelock::engines::drand::TinyBLS381;
use timelock::ibe::fullident::{Ciphertext as Header, Identity};
use timelock::tlock::{TLECiphertext, tld, tle};
use zeroize::Zeroizing;

use crate::drand::{Beacon, PUBLIC_KEY_BYTES, SIGNATURE_BYTES};

/// Longest ciphertext that the chain takes.
pub const CIPHERTEXT_MAX: usize = 5_000;
/// The commit-reveal protocol of this module (`CommitRevealWeightsVersion`).
pub const COMMIT_REVEAL_VERSION: u16 = 4;

type PublicGroup = <TinyBLS381 as EngineBLS>::PublicKeyGroup;
type SignatureGroup = <TinyBLS381 as EngineBLS>::SignatureGroup;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TimelockError {
    #[error("the beacon's public key is not a point of its group")]
    PublicKey,
    #[error("the round's signature is not a point of its group")]
    Signature,
    #[error("not a timelocked ciphertext: {0}")]
    Ciphertext(&'static str),
    #[error("the signature does not open the ciphertext: it belongs to another round or beacon")]
    Closed,
    #[error("the ciphertext would have {length} bytes, the chain takes {CIPHERTEXT_MAX}")]
    TooLong { length: usize },
}

/// A row of weights as it is committed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct WeightsPayload {
    /// The 32 bytes of the committing hotkey; the chain drops a row that names another one.
    hotkey: Vec<u8>,
    pub uids: Vec<u16>,
    pub values: Vec<u16>,
    pub version_key: u64,
}

impl WeightsPayload {
    pub fn new(hotkey: &AccountId, row: &[(u16, u16)], version_key: u64) -> Self {
        let (uids, values) = row.iter().copied().unzip();
        Self { hotkey: hotkey.0.to_vec(), uids, values, version_key }
    }

    pub fn hotkey(&self) -> Option<AccountId> {
        self.hotkey.as_slice().try_into().ok().map(AccountId)
    }

    /// Reads a payload; all bytes must belong to it.
    pub fn read(mut bytes: &[u8]) -> Option<Self> {
        let payload = Self::decode(&mut bytes).ok()?;
        bytes.is_empty().then_some(payload)
    }
}

/// The layout that the chain reads.
#[derive(CanonicalSerialize)]
struct Wire {
    u: PublicGroup,
    v: Vec<u8>,
    w: Vec<u8>,
    body: Vec<u8>,
    cipher_suite: Vec<u8>,
}

/// The name under which a round is an identity to encrypt to.
fn identity(round: u64) -> Identity {
    Identity::new(b"", &Sha256::digest(round.to_be_bytes()))
}

/// Locks `plaintext` until `beacon` publishes `round`.
pub fn seal(beacon: &Beacon, round: u64, plaintext: &[u8]) -> Result<Vec<u8>, TimelockError> {
    let key = public_key(&beacon.public_key)?;
    let mut secret = Zeroizing::new([0; 32]);
    OsRng.fill_bytes(secret.as_mut_slice());
    let sealed = tle::<TinyBLS381, AESGCMBlockCipherProvider, OsRng>(key, *secret, plaintext, identity(round), OsRng)
        .map_err(|_| TimelockError::Ciphertext("the payload is too long"))?;
    let Header { u, v, w } = sealed.header;
    let wire = Wire { u, v: v.to_vec(), w: w.to_vec(), body: sealed.body, cipher_suite: sealed.cipher_suite };
    let mut bytes = Vec::with_capacity(wire.compressed_size());
    wire.serialize_compressed(&mut bytes).map_err(|_| TimelockError::Ciphertext("it cannot be written"))?;
    if bytes.len() > CIPHERTEXT_MAX {
        return Err(TimelockError::TooLong { length: bytes.len() });
    }
    Ok(bytes)
}

/// Opens a ciphertext with the signature of its round. Bytes after the ciphertext are ignored, as the chain does.
pub fn open(ciphertext: &[u8], signature: &[u8]) -> Result<Vec<u8>, TimelockError> {
    if ciphertext.len() > CIPHERTEXT_MAX {
        return Err(TimelockError::TooLong { length: ciphertext.len() });
    }
    let signature = signature_point(signature)?;
    let rest = &mut &*ciphertext;
    let u = rest.split_off(..PUBLIC_KEY_BYTES).ok_or(TimelockError::Ciphertext("too short"))?;
    let u = PublicGroup::deserialize_compressed(u).map_err(|_| TimelockError::Ciphertext("its first field is no point"))?;
    let (v, w) = (array(vector(rest)?)?, array(vector(rest)?)?);
    let body = vector(rest)?;
    let cipher_suite = vector(rest)?.to_vec();
    // The cipher's own two fields lie within the body.
    let within = &mut &*body;
    vector(within)?;
    vector(within)?;
    let sealed = TLECiphertext { header: Header { u, v, w }, body: body.to_vec(), cipher_suite };
    tld::<TinyBLS381, AESGCMBlockCipherProvider>(sealed, signature).map_err(|_| TimelockError::Closed)
}

/// A vector of bytes: a length of eight bytes, little-endian, and so many bytes. Read by hand, because the library allocates whatever
/// length is claimed before it looks for the bytes.
fn vector<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], TimelockError> {
    let short = TimelockError::Ciphertext("it ends within a field");
    let length = rest.split_off(..8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
    let length = length.and_then(|length| usize::try_from(length).ok()).ok_or(short.clone())?;
    rest.split_off(..length).ok_or(short)
}

fn array(bytes: &[u8]) -> Result<[u8; 32], TimelockError> {
    bytes.try_into().map_err(|_| TimelockError::Ciphertext("a header field is not of 32 bytes"))
}

fn public_key(bytes: &[u8]) -> Result<PublicGroup, TimelockError> {
    if bytes.len() != PUBLIC_KEY_BYTES {
        return Err(TimelockError::PublicKey);
    }
    PublicGroup::deserialize_compressed(bytes).map_err(|_| TimelockError::PublicKey)
}

fn signature_point(bytes: &[u8]) -> Result<SignatureGroup, TimelockError> {
    if bytes.len() != SIGNATURE_BYTES {
        return Err(TimelockError::Signature);
    }
    SignatureGroup::deserialize_compressed(bytes).map_err(|_| TimelockError::Signature)
}

/// A beacon with its secret, for development chains: it publishes whatever round is asked for.
#[cfg(any(test, feature = "devnode"))]
pub struct BeaconSecret {
    secret: <TinyBLS381 as EngineBLS>::Scalar,
    pub beacon: Beacon,
}

#[cfg(any(test, feature = "devnode"))]
impl BeaconSecret {
    /// A new beacon that began at `genesis_s`.
    pub fn generate(genesis_s: u64, period_s: u64) -> Self {
        use ark_ec::PrimeGroup as _;
        use ark_std::UniformRand as _;
        let secret = <TinyBLS381 as EngineBLS>::Scalar::rand(&mut OsRng);
        let mut public_key = Vec::with_capacity(PUBLIC_KEY_BYTES);
        (PublicGroup::generator() * secret).serialize_compressed(&mut public_key).expect("a point is written into memory");
        Self { secret, beacon: Beacon { public_key, genesis_s, period_s } }
    }

    /// The signature of a round.
    pub fn sign(&self, round: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SIGNATURE_BYTES);
        identity(round).extract::<TinyBLS381>(self.secret).0.serialize_compressed(&mut bytes).expect("a point is written into memory");
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value as Json;

    fn golden() -> Json {
        serde_json::from_str::<Json>(include_str!("../tests/data/golden-461.json")).unwrap()["reference"]["timelock"].clone()
    }

    fn bytes(value: &Json) -> Vec<u8> {
        let text = value.as_str().unwrap();
        hex::decode(text.strip_prefix("0x").unwrap_or(text)).unwrap()
    }

    #[test]
    fn a_commit_of_the_official_package_opens_with_the_genuine_signature_of_its_round() {
        let golden = golden();
        let plaintext = open(&bytes(&golden["ciphertext_hex"]), &bytes(&golden["signature_hex"])).unwrap();
        assert_eq!(hex::encode(&plaintext), hex::encode(bytes(&golden["payload_hex"])));
        let payload = WeightsPayload::read(&plaintext).unwrap();
        let list = |name: &str| golden["payload"][name].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u16).collect::<Vec<_>>();
        assert_eq!((payload.uids.clone(), payload.values.clone()), (list("uids"), list("values")));
        assert_eq!(payload.version_key, golden["payload"]["version_key"].as_u64().unwrap());
        let row: Vec<_> = list("uids").into_iter().zip(list("values")).collect();
        let own = WeightsPayload::new(&payload.hotkey().unwrap(), &row, payload.version_key);
        assert_eq!(own.encode(), plaintext);
    }

    #[test]
    fn what_is_locked_to_quicknet_opens_with_its_genuine_signature_and_no_other() {
        let golden = golden();
        let signature = bytes(&golden["signature_hex"]);
        let sealed = seal(&Beacon::quicknet(), 1000, b"row").unwrap();
        assert_eq!(open(&sealed, &signature).unwrap(), b"row");
        assert_eq!(open(&seal(&Beacon::quicknet(), 1001, b"row").unwrap(), &signature), Err(TimelockError::Closed));
        assert_eq!(hex::encode(Sha256::digest(1000u64.to_be_bytes())), golden["identity_hex"].as_str().unwrap());
    }

    #[test]
    fn ciphertexts_have_the_length_that_the_chain_expects() {
        let account = AccountId([7; 32]);
        for (entries, length) in [(3u16, 299), (256, 1313)] {
            let row: Vec<_> = (0..entries).map(|uid| (uid, 65535)).collect();
            let payload = WeightsPayload::new(&account, &row, 9).encode();
            let sealed = seal(&Beacon::quicknet(), 5, &payload).unwrap();
            assert_eq!(sealed.len(), length);
            assert!(sealed.ends_with(b"AES_GCM_"));
        }
        assert!(matches!(seal(&Beacon::quicknet(), 5, &[0; CIPHERTEXT_MAX]), Err(TimelockError::TooLong { .. })));
    }

    #[test]
    fn a_development_beacon_opens_its_own_rounds_only() {
        let beacon = BeaconSecret::generate(1_000, 3);
        let sealed = seal(&beacon.beacon, 77, b"row").unwrap();
        assert_eq!(open(&sealed, &beacon.sign(77)).unwrap(), b"row");
        assert_eq!(open(&sealed, &beacon.sign(78)), Err(TimelockError::Closed));
        assert_eq!(open(&sealed, &BeaconSecret::generate(1_000, 3).sign(77)), Err(TimelockError::Closed));
    }

    #[test]
    fn keys_and_signatures_that_are_no_points_are_refused() {
        let wrong = Beacon { public_key: vec![1; PUBLIC_KEY_BYTES], ..Beacon::quicknet() };
        assert_eq!(seal(&wrong, 1, b"x"), Err(TimelockError::PublicKey));
        assert_eq!(seal(&Beacon { public_key: Vec::new(), ..wrong }, 1, b"x"), Err(TimelockError::PublicKey));
        assert_eq!(open(&bytes(&golden()["ciphertext_hex"]), &[2; SIGNATURE_BYTES]), Err(TimelockError::Signature));
        assert_eq!(open(&bytes(&golden()["ciphertext_hex"]), &[]), Err(TimelockError::Signature));
    }

    #[test]
    fn claimed_lengths_allocate_nothing() {
        let golden = golden();
        let (original, signature) = (bytes(&golden["ciphertext_hex"]), bytes(&golden["signature_hex"]));
        // The length of each vector, and of the two inside the body: 96 bytes of point, v, w, body.
        for place in [96, 136, 176, 184] {
            let mut changed = original.clone();
            changed[place..place + 8].fill(0xff);
            assert!(matches!(open(&changed, &signature), Err(TimelockError::Ciphertext(_))), "{place}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn bytes_from_outside_never_open_and_never_panic(
            rubbish in prop::collection::vec(any::<u8>(), 0..400),
            place in 0usize..300,
            byte in any::<u8>(),
        ) {
            let golden = golden();
            let signature = bytes(&golden["signature_hex"]);
            prop_assert!(open(&rubbish, &signature).is_err());
            let original = bytes(&golden["ciphertext_hex"]);
            let mut changed = original.clone();
            let place = place % changed.len();
            changed[place] = byte;
            // The name of the cipher suite at the end is not part of what is authenticated.
            prop_assert!(changed == original || place >= original.len() - 16 || open(&changed, &signature).is_err());
            let _ = WeightsPayload::read(&rubbish);
        }
    }
}
