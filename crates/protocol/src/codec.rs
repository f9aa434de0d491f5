//! The one wire encoding: bincode 2, little-endian, fixed-int, with a size limit, fully consumed and canonical.
//!
//! No format is canonical by itself, so a decoded value must encode to the bytes it came from; trailing bytes are refused;
//! a length that claims more than the limit is an error before anything is allocated.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::enc::EncoderImpl;
use bincode::enc::write::{SizeWriter, Writer};
use bincode::error::EncodeError;
use bincode::{Decode, Encode};

/// Largest document of any purpose (the fragment plan); the limit of a purpose is checked on the length beforehand.
const DECODE_LIMIT: usize = 4 << 20;

fn configuration() -> Configuration<LittleEndian, Fixint, Limit<DECODE_LIMIT>> {
    bincode::config::standard().with_fixed_int_encoding().with_limit::<DECODE_LIMIT>()
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("{got} bytes, but at most {limit} are allowed here")]
    TooLong { got: usize, limit: usize },
    #[error("the bytes do not decode: {0}")]
    Malformed(String),
    #[error("{0} bytes follow the end of the value")]
    Trailing(usize),
    #[error("the bytes are not the canonical encoding of their value")]
    NotCanonical,
}

/// Encodes a value. Encoding into memory cannot fail for our types; should a value be over the limit, decoding refuses it.
pub fn encode<T: Encode>(value: &T) -> Vec<u8> {
    bincode::encode_to_vec(value, bincode::config::standard().with_fixed_int_encoding())
        .expect("encoding our own types into memory does not fail")
}

/// Bytes of the encoding of a value.
pub(crate) fn length<T: Encode>(value: &T) -> usize {
    let mut encoder = EncoderImpl::new(SizeWriter::default(), bincode::config::standard().with_fixed_int_encoding());
    value.encode(&mut encoder).expect("to count bytes does not fail");
    encoder.into_writer().bytes_written
}

/// Decodes exactly one value of at most `limit` bytes from all of `bytes`.
pub fn decode<T: Encode + Decode<()>>(bytes: &[u8], limit: usize) -> Result<T, CodecError> {
    if bytes.len() > limit.min(DECODE_LIMIT) {
        return Err(CodecError::TooLong { got: bytes.len(), limit: limit.min(DECODE_LIMIT) });
    }
    let (value, consumed): (T, usize) =
        bincode::decode_from_slice(bytes, configuration()).map_err(|error| CodecError::Malformed(error.to_string()))?;
    if consumed != bytes.len() {
        return Err(CodecError::Trailing(bytes.len() - consumed));
    }
    let mut encoder = EncoderImpl::new(Compare { rest: bytes }, bincode::config::standard().with_fixed_int_encoding());
    match value.encode(&mut encoder) {
        Ok(()) if encoder.into_writer().rest.is_empty() => Ok(value),
        _ => Err(CodecError::NotCanonical),
    }
}

/// Takes only what these bytes say next: an encoding is compared with them without being stored.
struct Compare<'a> {
    rest: &'a [u8],
}

impl Writer for Compare<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
        self.rest = self.rest.strip_prefix(bytes).ok_or(EncodeError::Other("other bytes"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, PartialEq, Encode, Decode)]
    struct Sample {
        flag: bool,
        words: Vec<u64>,
        name: String,
        maybe: Option<u16>,
    }

    #[test]
    fn trailing_bytes_and_oversize_are_refused() {
        let mut bytes = encode(&Sample { flag: true, words: vec![1], name: "a".into(), maybe: None });
        assert!(decode::<Sample>(&bytes, 1024).is_ok());
        assert!(matches!(decode::<Sample>(&bytes, 4), Err(CodecError::TooLong { .. })));
        bytes.push(0);
        assert_eq!(decode::<Sample>(&bytes, 1024), Err(CodecError::Trailing(1)));
    }

    #[test]
    fn a_length_that_claims_the_address_space_is_an_error_and_not_an_allocation() {
        let mut bytes = vec![1];
        bytes.extend_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(decode::<Sample>(&bytes, 1024), Err(CodecError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(value) = decode::<Sample>(&bytes, 4096) {
                prop_assert_eq!(encode(&value), bytes);
            }
        }

        #[test]
        fn values_round_trip(flag: bool, words: Vec<u64>, name: String, maybe: Option<u16>) {
            let sample = Sample { flag, words, name, maybe };
            prop_assert_eq!(decode::<Sample>(&encode(&sample), 1 << 20).unwrap(), sample);
        }
    }
}
