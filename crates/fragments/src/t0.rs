//! T0: the static checks that every uploaded payload passes before it can be merged.
//!
//! In order of cost: length, digests against the signed commitment, header, finite values. Norms and directions, which
//! need the other contributions, are in [`crate::gates`].

use protocol::{Digest, Reason};

use crate::codec::{self, CodecError, PayloadHeader};

/// What the signed commitment says of the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    pub length: u64,
    pub sha256: Digest,
    pub blake3: Digest,
}

impl Committed {
    /// What a learner commits to before it uploads `payload`.
    pub fn of(payload: &[u8]) -> Self {
        Self { length: payload.len() as u64, sha256: Digest::sha256(payload), blake3: Digest::blake3(payload) }
    }
}

/// Decodes a payload that is what was committed and what the pull asked for; otherwise the reason for the refusal.
pub fn check_payload(bytes: &[u8], committed: &Committed, expected: &PayloadHeader) -> Result<Vec<f32>, Reason> {
    let length = bytes.len() as u64;
    if length != committed.length || length != expected.payload_bytes() {
        return Err(Reason::LengthMismatch);
    }
    if Committed::of(bytes) != *committed {
        return Err(Reason::DigestMismatch);
    }
    codec::decode(bytes, expected).map_err(|error| match error {
        CodecError::Length { .. } | CodecError::Values { .. } => Reason::LengthMismatch,
        CodecError::Header { .. } => Reason::HeaderMismatch,
        CodecError::NotFinite { .. } => Reason::NotFinite,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::documents::Codec;

    #[test]
    fn each_fault_of_an_upload_has_its_own_reason() {
        let header = PayloadHeader { plan: Digest::ZERO, fragment: 0, base_version: 1, codec: Codec::Bf16, elements: 2 };
        let payload = codec::encode(&header, &[0.5, -0.25]).unwrap();
        let committed = Committed::of(&payload);
        assert_eq!(check_payload(&payload, &committed, &header), Ok(vec![0.5, -0.25]));
        assert_eq!(check_payload(&payload[1..], &committed, &header), Err(Reason::LengthMismatch));
        let longer = PayloadHeader { elements: 3, ..header };
        assert_eq!(check_payload(&payload, &committed, &longer), Err(Reason::LengthMismatch));
        let mut tampered = payload.clone();
        tampered[65] ^= 1;
        assert_eq!(check_payload(&tampered, &committed, &header), Err(Reason::DigestMismatch));
        let other_base = PayloadHeader { base_version: 2, ..header };
        assert_eq!(check_payload(&payload, &committed, &other_base), Err(Reason::HeaderMismatch));
        tampered[64..66].copy_from_slice(&0xffffu16.to_le_bytes());
        assert_eq!(check_payload(&tampered, &Committed::of(&tampered), &header), Err(Reason::NotFinite));
    }
}
