//! Identities and signed documents of a world, under the real signatures or under a cheap scheme.
//!
//! The cheap scheme signs with a sum over key and message: it costs less than a microsecond instead of fifty, envelopes stay what
//! they are, and a forger inside the simulation does not have the identity's [`Signer`] at hand.

use std::sync::Arc;

use protocol::envelope::{self, Context, Document, EnvelopeError, Expect, Header, PROTOCOL_VERSION, Verified, peek};
use protocol::{AccountId, Digest, Ed25519Signer, GrantBundle, KeyKind, KeyRef, SealedBytes, SignatureError, Signer, codec};
use storage::bundle;

/// How signatures are made and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    Cheap,
    Ed25519,
}

/// Largest bundle under the cheap scheme.
const GRANTS_BYTES_MAX: usize = 4 << 20;
const DOMAIN: &[u8] = b"quasar-envelope-v1\0";
const PREFIX_BYTES: usize = DOMAIN.len() + 12;

struct CheapSigner(KeyRef);

/// Two 64-bit sums over all words of the parts, four lanes at a time: nobody here tries to forge it, and a cryptographic hash of
/// each record would be a tenth of a world's time.
fn cheap_signature<'a>(key: &'a KeyRef, parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 64] {
    const PRIMES: [u64; 4] = [0x9e37_79b1_85eb_ca87, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9, 0x85eb_ca77_c2b2_ae63];
    let mut lanes = PRIMES;
    for part in std::iter::once(&key.public[..]).chain(parts) {
        let (blocks, rest) = part.as_chunks::<32>();
        let mut last = [0; 32];
        last[..rest.len()].copy_from_slice(rest);
        let mut length = [0; 32];
        length[..8].copy_from_slice(&(part.len() as u64).to_le_bytes());
        for block in blocks.iter().chain([&last, &length]) {
            for ((lane, word), prime) in lanes.iter_mut().zip(block.as_chunks::<8>().0).zip(PRIMES) {
                *lane = (*lane ^ u64::from_le_bytes(*word)).wrapping_mul(prime).rotate_left(29);
            }
        }
    }
    let mixed = lanes.iter().fold(0u64, |sum, lane| (sum.rotate_left(23) ^ lane).wrapping_mul(PRIMES[0]));
    let mut signature = [0; 64];
    for (to, word) in signature.as_chunks_mut::<8>().0.iter_mut().zip(lanes.into_iter().chain([mixed])) {
        *to = word.to_le_bytes();
    }
    signature
}

impl Signer for CheapSigner {
    fn key(&self) -> KeyRef {
        self.0
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        let (prefix, body) = message.split_at(PREFIX_BYTES.min(message.len()));
        cheap_signature(&self.0, [prefix, body])
    }
}

/// Somebody who signs.
#[derive(Clone)]
pub struct Identity {
    pub account: AccountId,
    pub signer: Arc<dyn Signer>,
    /// Of the key pair, which is a real one under both schemes.
    pub seed: [u8; 32],
    /// Opens what is sealed to the account.
    pub secret: [u8; 32],
}

impl Identity {
    pub fn new(scheme: Scheme, name: &str, number: u64) -> Self {
        let seed = Digest::derive("quasar simulation identity", &[name.as_bytes(), &number.to_le_bytes()]).0;
        let pair = Ed25519Signer::from_seed(seed);
        let (key, secret) = (pair.key(), pair.x25519_secret());
        let signer: Arc<dyn Signer> = match scheme {
            Scheme::Cheap => Arc::new(CheapSigner(key)),
            Scheme::Ed25519 => Arc::new(pair),
        };
        Self { account: key.account(), signer, seed, secret }
    }
}

/// Of the bytes that an envelope's signature covers, those before its body (`docs/protocol.md`, envelopes).
fn signed_prefix(purpose: u16, length: usize) -> [u8; PREFIX_BYTES] {
    let mut bytes = [0; PREFIX_BYTES];
    let (domain, numbers) = bytes.split_at_mut(DOMAIN.len());
    domain.copy_from_slice(DOMAIN);
    numbers[..4].copy_from_slice(&u32::from(purpose).to_le_bytes());
    numbers[4..].copy_from_slice(&(length as u64).to_le_bytes());
    bytes
}

impl Scheme {
    /// [`bundle::seal_to`] for a document of type `D`.
    pub fn seal<D: Document>(self, context: &Context, header: &Header, recipient: &[u8; 32], grants: &GrantBundle) -> SealedBytes {
        match self {
            Self::Cheap => SealedBytes { encapsulated: [0; 32], ciphertext: codec::encode(grants) },
            Self::Ed25519 => bundle::seal_to(context, D::PURPOSE, header, recipient, grants).expect("a point that is not weak"),
        }
    }

    /// What [`Scheme::seal`] sealed to an identity.
    pub fn unseal(self, context: &Context, header: &Header, sealed: &SealedBytes, identity: &Identity) -> Option<GrantBundle> {
        match self {
            Self::Cheap => codec::decode(&sealed.ciphertext, GRANTS_BYTES_MAX).ok(),
            Self::Ed25519 => bundle::open(context, header, sealed, &identity.secret).ok(),
        }
    }

    /// [`envelope::open`], or [`envelope::open_stored`] without a time, under this scheme.
    pub fn open<D: Document>(
        self,
        bytes: &[u8],
        context: &Context,
        expect: Expect<'_>,
        now_ms: Option<u64>,
    ) -> Result<Verified<D>, EnvelopeError> {
        if self == Self::Ed25519 {
            return match now_ms {
                Some(now_ms) => envelope::open(bytes, context, expect, now_ms),
                None => envelope::open_stored(bytes, context, expect),
            };
        }
        let (envelope, signature, id) = peek(bytes)?;
        let header = envelope.header;
        if header.version != PROTOCOL_VERSION {
            return Err(EnvelopeError::Version(header.version));
        }
        if header.purpose != D::PURPOSE as u16 {
            return Err(EnvelopeError::Purpose { got: header.purpose, expected: D::PURPOSE });
        }
        if header.run != context.run {
            return Err(EnvelopeError::Run { got: header.run, expected: context.run });
        }
        let (is_expected, expected) = match expect {
            Expect::Key(key) => (header.signer == *key, key.account()),
            Expect::Account(account) => (header.signer.account() == *account, *account),
            Expect::Any(keys) => (keys.contains(&header.signer), keys.first().map_or(AccountId([0; 32]), KeyRef::account)),
        };
        if !is_expected {
            return Err(EnvelopeError::Signer { got: header.signer.account(), expected });
        }
        if let Some(now_ms) = now_ms {
            if header.issued_ms > now_ms + envelope::SKEW_MS {
                return Err(EnvelopeError::Future { ahead_ms: header.issued_ms - now_ms });
            }
            if header.expires_ms != 0 && now_ms > header.expires_ms + envelope::SKEW_MS {
                return Err(EnvelopeError::Expired { ago_ms: now_ms - header.expires_ms });
            }
        }
        let body = &bytes[..bytes.len() - signature.len()];
        if *signature != cheap_signature(&header.signer, [&signed_prefix(header.purpose, body.len())[..], body]) {
            return Err(EnvelopeError::Signature(SignatureError::Mismatch(KeyKind::Ed25519)));
        }
        let document = codec::decode(&envelope.payload, D::PURPOSE.limit()).map_err(EnvelopeError::Payload)?;
        Ok(Verified { document, header, id })
    }
}
