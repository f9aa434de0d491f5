//! The f32 state of one fragment at rest: parameters, and momentum of the outer optimizer where it has one.
//!
//! A 72-byte header, Θ and, if there is one, momentum as little-endian f32 in slice order, and the BLAKE3 of everything before it. Private
//! to the orchestrator; learners fetch keyframes ([`crate::keyframe`]).
//!
//! | bytes | content |
//! |---|---|
//! | 0..8 | `QSRSTAT1` |
//! | 8..40 | plan digest |
//! | 40..48 | fragment, u64 |
//! | 48..56 | version, u64 |
//! | 56..64 | elements, u64 |
//! | 64 | 1 if there is a momentum, else 0 |
//! | 65..72 | zero |

use protocol::{DType, Digest};

use crate::number::{append_f32, append_rounded, first_non_finite};

const MAGIC: &[u8; 8] = b"QSRSTAT1";
pub(crate) const HEADER_BYTES: usize = 72;
pub(crate) const TRAILER_BYTES: usize = 32;

/// Which state of which fragment; `elements` is that of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateHeader {
    pub plan: Digest,
    pub fragment: u64,
    pub version: u64,
    pub elements: u64,
    /// Whether the run's outer optimizer has a momentum.
    pub momentum: bool,
}

/// Parameters of a fragment and, where the outer optimizer has it, momentum (else it is empty), each in slice order.
#[derive(Clone, Debug, PartialEq)]
pub struct FragmentState {
    pub theta: Vec<f32>,
    pub momentum: Vec<f32>,
}

/// Why a state is not written or read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    #[error("{got} values were given for a fragment of {expected} elements")]
    Values { got: u64, expected: u64 },
    #[error("the state file has {got} bytes, expected are {expected}\nhint: the file is truncated; restore it from the bucket")]
    Length { got: u64, expected: u64 },
    #[error("the state file's digest does not match its content\nhint: the file is damaged; restore it from the bucket")]
    Digest,
    #[error("the state file is of another plan, fragment or version\nhint: the state folder belongs to another run")]
    Header,
    #[error("element {element} of the state is not finite")]
    NotFinite { element: u64 },
}

impl StateHeader {
    pub(crate) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..40].copy_from_slice(&self.plan.0);
        bytes[40..48].copy_from_slice(&self.fragment.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.version.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.elements.to_le_bytes());
        bytes[64] = u8::from(self.momentum);
        bytes
    }

    fn values(&self) -> u64 {
        self.elements * if self.momentum { 2 } else { 1 }
    }

    /// Exact length of the file in bytes.
    pub fn state_bytes(&self) -> u64 {
        (HEADER_BYTES + TRAILER_BYTES) as u64 + self.values() * DType::F32.bytes()
    }
}

impl FragmentState {
    /// The start of a run: parameters `theta`, and a momentum of zero where there is one.
    pub fn new(theta: Vec<f32>, has_momentum: bool) -> Self {
        Self { momentum: if has_momentum { vec![0.0; theta.len()] } else { Vec::new() }, theta }
    }

    /// The file's bytes. Refuses a state that is not finite or not of the header's length.
    pub fn to_bytes(&self, header: &StateHeader) -> Result<Vec<u8>, StateError> {
        let mut bytes = Vec::with_capacity(header.state_bytes() as usize);
        bytes.extend_from_slice(&header.to_bytes());
        for (values, expected) in [(&self.theta, header.elements), (&self.momentum, header.values() - header.elements)] {
            if values.len() as u64 != expected {
                return Err(StateError::Values { got: values.len() as u64, expected });
            }
            refuse_non_finite(values)?;
            append_rounded(DType::F32, values, &mut bytes);
        }
        let digest = Digest::blake3(&bytes);
        bytes.extend_from_slice(&digest.0);
        Ok(bytes)
    }

    /// Reads a file whose header must be `expected`.
    pub fn from_bytes(bytes: &[u8], expected: &StateHeader) -> Result<Self, StateError> {
        if bytes.len() as u64 != expected.state_bytes() {
            return Err(StateError::Length { got: bytes.len() as u64, expected: expected.state_bytes() });
        }
        let (content, trailer) = bytes.split_at(bytes.len() - TRAILER_BYTES);
        if content[..HEADER_BYTES] != expected.to_bytes() {
            return Err(StateError::Header);
        }
        if Digest::blake3(content).0 != trailer {
            return Err(StateError::Digest);
        }
        let body = &content[HEADER_BYTES..];
        let (theta, momentum) = body.split_at((expected.elements * DType::F32.bytes()) as usize);
        let read = |bytes: &[u8]| {
            let mut values = Vec::with_capacity(bytes.len() / 4);
            append_f32(DType::F32, bytes, &mut values);
            refuse_non_finite(&values).map(|()| values)
        };
        Ok(Self { theta: read(theta)?, momentum: read(momentum)? })
    }
}

fn refuse_non_finite(values: &[f32]) -> Result<(), StateError> {
    match first_non_finite(values) {
        Some(element) => Err(StateError::NotFinite { element: element as u64 }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;

    fn header(elements: u64) -> StateHeader {
        StateHeader { plan: Digest::blake3(b"plan"), fragment: 2, version: 9, elements, momentum: true }
    }

    #[test]
    fn a_state_reads_back_bit_for_bit() {
        let state = FragmentState { theta: fixture::values(1, 1000), momentum: fixture::values(2, 1000) };
        let bytes = state.to_bytes(&header(1000)).unwrap();
        assert_eq!(bytes.len() as u64, header(1000).state_bytes());
        assert_eq!(FragmentState::from_bytes(&bytes, &header(1000)).unwrap(), state);
        // Without momentum it has half the length, and is no state of a run that has one.
        let (plain, without) = (FragmentState::new(state.theta.clone(), false), StateHeader { momentum: false, ..header(1000) });
        let half = plain.to_bytes(&without).unwrap();
        assert_eq!(half.len(), bytes.len() - 4_000);
        assert_eq!(FragmentState::from_bytes(&half, &without).unwrap(), plain);
        assert!(FragmentState::from_bytes(&half, &header(1000)).is_err() && FragmentState::from_bytes(&bytes, &without).is_err());
        assert_eq!(plain.to_bytes(&header(1000)), Err(StateError::Values { got: 0, expected: 1000 }));
    }

    #[test]
    fn damaged_truncated_and_foreign_states_are_refused() {
        let bytes = FragmentState::new(vec![1.0, 2.0], true).to_bytes(&header(2)).unwrap();
        assert!(matches!(FragmentState::from_bytes(&bytes[..50], &header(2)), Err(StateError::Length { got: 50, .. })));
        let newer = StateHeader { version: 10, ..header(2) };
        assert_eq!(FragmentState::from_bytes(&bytes, &newer), Err(StateError::Header));
        for byte in HEADER_BYTES..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[byte] ^= 0x10;
            assert_eq!(FragmentState::from_bytes(&damaged, &header(2)), Err(StateError::Digest));
        }
    }

    #[test]
    fn a_state_that_is_not_finite_or_of_another_length_is_not_written() {
        assert_eq!(FragmentState::new(vec![1.0, f32::NAN], true).to_bytes(&header(2)), Err(StateError::NotFinite { element: 1 }));
        assert_eq!(FragmentState::new(vec![1.0], true).to_bytes(&header(2)), Err(StateError::Values { got: 1, expected: 2 }));
    }
}
