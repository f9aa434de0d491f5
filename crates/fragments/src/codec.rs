//! `payload.qfd`: the encoded pseudo-gradient of one fragment, as a learner uploads it.
//!
//! A 64-byte header, then the values in slice order as bf16, rounded to nearest with ties to even, little-endian. The
//! receiver knows every header field beforehand (run plan, pull, job), so it generates the header that it expects and
//! compares byte for byte: there is nothing to parse, and one payload has exactly one encoding.
//!
//! | bytes | content |
//! |---|---|
//! | 0..8 | `QSRPAYL1` |
//! | 8..40 | plan digest |
//! | 40..44 | fragment, u32 |
//! | 44..48 | codec number, u32 |
//! | 48..56 | base version, u64 |
//! | 56..64 | elements, u64 |

use protocol::documents::Codec;
use protocol::{DType, Digest, FragmentPlan};

use crate::number::{append_f32, append_rounded, first_non_finite, first_non_finite_bytes};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;

const MAGIC: &[u8; 8] = b"QSRPAYL1";

/// What both sides know about a payload before it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadHeader {
    /// Digest of the run's fragment plan.
    pub plan: Digest,
    pub fragment: u32,
    /// The fragment version that the pseudo-gradient was taken against.
    pub base_version: u64,
    pub codec: Codec,
    pub elements: u64,
}

/// Why values are not encoded, or a payload is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    #[error("{got} values were given for a fragment of {expected} elements")]
    Values { got: u64, expected: u64 },
    #[error("the payload has {got} bytes, expected are {expected}\nhint: fragment plan or codec of the sender differ; update the miner")]
    Length { got: u64, expected: u64 },
    #[error(
        "the payload's header differs from the expected one at byte {byte}\nhint: fragment plan, base version or codec of the sender differ; update the miner"
    )]
    Header { byte: usize },
    #[error("element {element} is not a finite bf16 number\nhint: the learner diverged; it goes back to its last good state")]
    NotFinite { element: u64 },
}

impl PayloadHeader {
    /// The header of a bf16 payload for fragment `fragment` of `plan`, whose digest is `digest`.
    pub fn bf16(plan: &FragmentPlan, digest: Digest, fragment: usize, base_version: u64) -> Self {
        Self { plan: digest, fragment: fragment as u32, base_version, codec: Codec::Bf16, elements: plan.elements(fragment) }
    }

    /// The header as it stands in the file.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..40].copy_from_slice(&self.plan.0);
        bytes[40..44].copy_from_slice(&self.fragment.to_le_bytes());
        bytes[44..48].copy_from_slice(&(self.codec as u32).to_le_bytes());
        bytes[48..56].copy_from_slice(&self.base_version.to_le_bytes());
        bytes[56..].copy_from_slice(&self.elements.to_le_bytes());
        bytes
    }

    /// Exact length of the payload in bytes.
    pub fn payload_bytes(&self) -> u64 {
        HEADER_BYTES as u64 + self.elements * element_type(self.codec).bytes()
    }
}

const fn element_type(codec: Codec) -> DType {
    match codec {
        Codec::Bf16 => DType::Bf16,
    }
}

/// Exact length in bytes of every bf16 payload for fragment `fragment` of `plan`.
pub fn payload_bytes(plan: &FragmentPlan, fragment: usize) -> u64 {
    HEADER_BYTES as u64 + plan.elements(fragment) * DType::Bf16.bytes()
}

/// Encodes `values` (the fragment's elements in slice order). Refuses values that are not finite after rounding.
pub fn encode(header: &PayloadHeader, values: &[f32]) -> Result<Vec<u8>, CodecError> {
    if values.len() as u64 != header.elements {
        return Err(CodecError::Values { got: values.len() as u64, expected: header.elements });
    }
    let dtype = element_type(header.codec);
    let mut bytes = Vec::with_capacity(header.payload_bytes() as usize);
    bytes.extend_from_slice(&header.to_bytes());
    append_rounded(dtype, values, &mut bytes);
    // Rounding can only lose finiteness, so looking at the result is enough.
    match first_non_finite_bytes(dtype, &bytes[HEADER_BYTES..]) {
        Some(element) => Err(CodecError::NotFinite { element: element as u64 }),
        None => Ok(bytes),
    }
}

/// Decodes a payload whose header must be `expected`: exact length, equal header, finite values.
pub fn decode(bytes: &[u8], expected: &PayloadHeader) -> Result<Vec<f32>, CodecError> {
    if bytes.len() as u64 != expected.payload_bytes() {
        return Err(CodecError::Length { got: bytes.len() as u64, expected: expected.payload_bytes() });
    }
    let (header, body) = bytes.split_at(HEADER_BYTES);
    if let Some(byte) = header.iter().zip(&expected.to_bytes()).position(|(got, expected)| got != expected) {
        return Err(CodecError::Header { byte });
    }
    let mut values = Vec::with_capacity(expected.elements as usize);
    append_f32(element_type(expected.codec), body, &mut values);
    match first_non_finite(&values) {
        Some(element) => Err(CodecError::NotFinite { element: element as u64 }),
        None => Ok(values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fixture, plan};
    use proptest::prelude::*;

    fn header(elements: u64) -> PayloadHeader {
        PayloadHeader { plan: Digest::blake3(b"plan"), fragment: 3, base_version: 7, codec: Codec::Bf16, elements }
    }

    #[test]
    fn the_header_is_laid_out_as_documented() {
        let bytes = encode(&header(2), &[1.0, -2.0]).unwrap();
        assert_eq!(bytes.len(), 68);
        assert_eq!(&bytes[..8], b"QSRPAYL1");
        assert_eq!(bytes[8..40], Digest::blake3(b"plan").0);
        assert_eq!(bytes[40..], [3, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x3f, 0, 0xc0]);
    }

    #[test]
    fn a_payload_of_a_planned_fragment_has_the_announced_length() {
        let plan = plan(&fixture::small_contract(), 5).unwrap();
        let header = PayloadHeader::bf16(&plan, plan.digest(), 2, 0);
        let bytes = encode(&header, &fixture::values(1, plan.elements(2) as usize)).unwrap();
        assert_eq!(bytes.len() as u64, payload_bytes(&plan, 2));
        assert_eq!(bytes.len() as u64, header.payload_bytes());
    }

    #[test]
    fn values_that_are_not_finite_or_overflow_bf16_are_refused_when_encoding() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -f32::MAX] {
            assert_eq!(encode(&header(3), &[1.0, bad, 2.0]), Err(CodecError::NotFinite { element: 1 }), "{bad}");
        }
        assert_eq!(encode(&header(3), &[1.0]), Err(CodecError::Values { got: 1, expected: 3 }));
    }

    #[test]
    fn a_payload_with_a_wrong_length_header_or_value_is_refused() {
        let good = encode(&header(3), &[1.0, 2.0, 3.0]).unwrap();
        assert!(matches!(decode(&good[..69], &header(3)), Err(CodecError::Length { got: 69, expected: 70 })));
        assert!(matches!(decode(&[], &header(3)), Err(CodecError::Length { .. })));
        assert!(matches!(decode(&good, &PayloadHeader { base_version: 8, ..header(3) }), Err(CodecError::Header { byte: 48 })));
        assert!(matches!(decode(&good, &PayloadHeader { fragment: 4, ..header(3) }), Err(CodecError::Header { byte: 40 })));
        for byte in 0..HEADER_BYTES {
            let mut changed = good.clone();
            changed[byte] ^= 1;
            assert_eq!(decode(&changed, &header(3)), Err(CodecError::Header { byte }));
        }
        let mut infinite = good;
        infinite[66..68].copy_from_slice(&0x7f80u16.to_le_bytes());
        assert_eq!(decode(&infinite, &header(3)), Err(CodecError::NotFinite { element: 1 }));
    }

    proptest! {
        #[test]
        fn decoding_gives_back_bf16_values_exactly_and_others_within_half_a_unit(values in proptest::collection::vec(-1e30f32..1e30, 0..300)) {
            let header = header(values.len() as u64);
            let once = decode(&encode(&header, &values).unwrap(), &header).unwrap();
            for (value, decoded) in values.iter().zip(&once) {
                prop_assert!((value - decoded).abs() <= value.abs() / 256.0);
            }
            prop_assert_eq!(&decode(&encode(&header, &once).unwrap(), &header).unwrap(), &once);
        }
    }
}
