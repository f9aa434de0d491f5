//! Identities and signed documents of a world, under the real signatures or under a cheap scheme.
//!
//! The cheap scheme signs with a hash over key and message: it costs a microsecond instead of fifty, envelopes stay what they
//! are, and a forger inside the simulation does not have the identity's [`Signer`] at hand.

use std::sync::Arc;

use protocol::envelope::{self, Context, Document, EnvelopeError, Expect, PROTOCOL_VERSION, Verified, peek};
use protocol::{AccountId, Digest, Ed25519Signer, KeyKind, KeyRef, SignatureError, Signer, codec};

/// How signatures are made and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    Cheap,
    Ed25519,
}

struct CheapSigner(KeyRef);

fn cheap_signature(key: &KeyRef, message: &[u8]) -> [u8; 64] {
    let mut signature = [0; 64];
    signature[..32].copy_from_slice(&Digest::derive("quasar simulation cheap signature", &[&key.public, message]).0);
    signature
}

impl Signer for CheapSigner {
    fn key(&self) -> KeyRef {
        self.0
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        cheap_signature(&self.0, message)
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

/// The bytes that an envelope's signature covers (`docs/protocol.md`, envelopes).
fn signed_bytes(purpose: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"quasar-envelope-v1\0".to_vec();
    bytes.extend_from_slice(&u32::from(purpose).to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

impl Scheme {
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
        if *signature != cheap_signature(&header.signer, &signed_bytes(header.purpose, body)) {
            return Err(EnvelopeError::Signature(SignatureError::Mismatch(KeyKind::Ed25519)));
        }
        let document = codec::decode(&envelope.payload, D::PURPOSE.limit()).map_err(EnvelopeError::Payload)?;
        Ok(Verified { document, header, id })
    }
}
