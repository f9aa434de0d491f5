//! T0: the static checks that every uploaded payload passes before it can be merged.
//!
//! In order of cost: length, digests against the signed commitment, header, body. Norms and directions, which
//! need the other contributions, are in [`crate::gates`].

use protocol::{Digest, Reason};
use sha2::Digest as _;

use crate::codec::{self, CodecError, PayloadHeader, Source};

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
    codec::decode(bytes, expected).map_err(|error| reason(&error))
}

/// The checks of [`check_payload`] without decoding into memory: the payload is read once, from the front to the back.
/// [`Reason::NotEvaluated`] where it cannot be read, which is nobody's fault but ours.
pub fn verify(payload: &dyn Source, committed: &Committed, expected: &PayloadHeader) -> Result<(), Reason> {
    if payload.length() != committed.length || committed.length != expected.payload_bytes() {
        return Err(Reason::LengthMismatch);
    }
    let (mut sha256, mut blake3) = (sha2::Sha256::new(), blake3::Hasher::new());
    let result = codec::check_while(payload, expected, |bytes| {
        rayon::join(|| sha256.update(bytes), || blake3.update(bytes));
    });
    if let Err(error @ CodecError::Read(_)) = &result {
        return Err(reason(error));
    }
    // The digests are those of the whole payload whatever the check found: other bytes than committed prove nothing else.
    let digests = (Digest(sha256.finalize().into()), Digest(*blake3.finalize().as_bytes()));
    if digests != (committed.sha256, committed.blake3) {
        return Err(Reason::DigestMismatch);
    }
    result.map_err(|error| reason(&error))
}

/// BLAKE3 of a payload, read once from the front to the back.
pub fn blake3_of(payload: &dyn Source) -> std::io::Result<Digest> {
    const PIECE_BYTES: u64 = 4 << 20;
    let (mut hasher, mut scratch) = (blake3::Hasher::new(), Vec::new());
    for start in (0..payload.length()).step_by(PIECE_BYTES as usize) {
        let length = (payload.length() - start).min(PIECE_BYTES) as usize;
        hasher.update(payload.read(start, length, &mut scratch)?);
    }
    Ok(Digest(*hasher.finalize().as_bytes()))
}

/// The reason code for a payload that is refused.
pub fn reason(error: &CodecError) -> Reason {
    match error {
        CodecError::Length { .. } | CodecError::Values { .. } => Reason::LengthMismatch,
        CodecError::Header { .. } => Reason::HeaderMismatch,
        CodecError::NotFinite { .. } => Reason::NotFinite,
        CodecError::Scale { .. } | CodecError::Code { .. } | CodecError::Index { .. } => Reason::Malformed,
        CodecError::Read(_) => Reason::NotEvaluated,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;
    use protocol::documents::Codec;

    #[test]
    fn each_fault_of_an_upload_has_its_own_reason() {
        let header =
            |elements, base| PayloadHeader::of_slices(Codec::Bf16, &[fixture::slice(elements, 1, elements)], Digest::ZERO, 0, base);
        let payload = codec::encode(&header(2, 1), &[0.5, -0.25]).unwrap();
        let committed = Committed::of(&payload);
        let both = |bytes: &[u8], committed: &Committed, header: &PayloadHeader| {
            let checked = check_payload(bytes, committed, header);
            assert_eq!(verify(&bytes, committed, header), checked.clone().map(|_| ()));
            checked
        };
        assert_eq!(both(&payload, &committed, &header(2, 1)), Ok(vec![0.5, -0.25]));
        assert_eq!(blake3_of(&payload).unwrap(), committed.blake3);
        assert_eq!(both(&payload[1..], &committed, &header(2, 1)), Err(Reason::LengthMismatch));
        assert_eq!(both(&payload, &committed, &header(3, 1)), Err(Reason::LengthMismatch));
        let mut tampered = payload.clone();
        tampered[65] ^= 1;
        assert_eq!(both(&tampered, &committed, &header(2, 1)), Err(Reason::DigestMismatch));
        assert_eq!(both(&payload, &committed, &header(2, 2)), Err(Reason::HeaderMismatch));
        tampered[64..66].copy_from_slice(&0xffffu16.to_le_bytes());
        assert_eq!(both(&tampered, &Committed::of(&tampered), &header(2, 1)), Err(Reason::NotFinite));
        let int4 = PayloadHeader::of_slices(Codec::Int4, &[fixture::slice(2, 1, 2)], Digest::ZERO, 0, 1);
        let mut payload = codec::encode(&int4, &[0.5, -0.25]).unwrap();
        payload[68] = 0x0f;
        assert_eq!(both(&payload, &Committed::of(&payload), &int4), Err(Reason::Malformed));
    }
}
