//! Grants: presigned requests that the orchestrator seals to one hotkey (`docs/protocol.md`, grants).

use std::fmt;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::Digest;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Method {
    Get = 0,
    Put = 1,
}

/// One presigned request for one exact key. The URL is a bearer secret: it is never shown.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct GrantRequest {
    pub method: Method,
    pub key: String,
    pub url: String,
    /// Headers that were signed and must be sent as they are.
    pub headers: Vec<(String, String)>,
    /// Exact body length of a PUT, or the length of the object for a GET where it is known.
    pub length: Option<u64>,
    /// SHA-256 that the store enforces on a PUT.
    pub sha256: Option<Digest>,
    pub expires_ms: u64,
}

impl fmt::Debug for GrantRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrantRequest")
            .field("method", &self.method)
            .field("key", &self.key)
            .field("length", &self.length)
            .field("expires_ms", &self.expires_ms)
            .finish_non_exhaustive()
    }
}

/// Plaintext of a sealed bundle.
#[derive(Clone, Debug, PartialEq, Eq, Default, Encode, Decode)]
pub struct GrantBundle {
    pub requests: Vec<GrantRequest>,
}

impl GrantBundle {
    /// The unexpired request for `method` and `key`.
    pub fn find(&self, method: Method, key: &str, now_ms: u64) -> Option<&GrantRequest> {
        self.requests.iter().find(|request| request.method == method && request.key == key && request.expires_ms > now_ms)
    }
}

/// HPKE output: the encapsulated X25519 key and the ciphertext with its tag.
#[derive(Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct SealedBytes {
    #[serde(with = "hex::serde")]
    pub encapsulated: [u8; 32],
    #[serde(with = "hex::serde")]
    pub ciphertext: Vec<u8>,
}

impl fmt::Debug for SealedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealedBytes({} bytes)", self.ciphertext.len())
    }
}
