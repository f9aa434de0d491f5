//! The state of a trainer as bytes: what a miner writes before a segment that may be replayed, and reads after a restart.
//!
//! ```text
//! "QTRS" | version u32 | step u64 | elements u64 | weights | first moments | second moments | BLAKE3 of all before
//! ```
//! Little-endian `f32` arrays of `elements` values each, in (fragment, slice) order.

use protocol::Digest;

const MAGIC: [u8; 4] = *b"QTRS";
const VERSION: u32 = 1;
const HEADER: usize = 24;
const TRAILER: usize = 32;

/// Why bytes are not a trainer state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    #[error(
        "not a trainer state of version {VERSION}\nhint: it was written by another program or version; start again from the run's fragments"
    )]
    Format,
    #[error(
        "a trainer state for {expected} parameters must have {expected_bytes} bytes, got {found_bytes}\nhint: the file is truncated or belongs to another run; start again from the run's fragments"
    )]
    Length { expected: usize, expected_bytes: usize, found_bytes: usize },
    #[error("the trainer state is damaged: its digest does not match\nhint: start again from the run's fragments")]
    Digest,
    #[error("the trainer state holds a value that is not finite")]
    NotFinite,
}

/// Weights, both AdamW moments and the step count, in (fragment, slice) order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainerState {
    pub step: u64,
    pub weights: Vec<f32>,
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

impl TrainerState {
    fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&MAGIC);
        header[4..8].copy_from_slice(&VERSION.to_le_bytes());
        header[8..16].copy_from_slice(&self.step.to_le_bytes());
        header[16..].copy_from_slice(&(self.weights.len() as u64).to_le_bytes());
        header
    }

    fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.header());
        for values in [&self.weights, &self.first, &self.second] {
            hasher.update_rayon(&little_endian(values));
        }
        hasher.finalize()
    }

    /// BLAKE3 of header and arrays: equal for equal states, whatever machine holds them.
    pub fn digest(&self) -> Digest {
        Digest(*self.hash().as_bytes())
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + 12 * self.weights.len() + TRAILER);
        bytes.extend_from_slice(&self.header());
        for values in [&self.weights, &self.first, &self.second] {
            bytes.extend_from_slice(&little_endian(values));
        }
        bytes.extend_from_slice(self.hash().as_bytes());
        bytes
    }

    /// Bytes of the state of a model with `elements` parameters; the limit to read up to.
    pub fn bytes_for(elements: usize) -> usize {
        HEADER + 12 * elements + TRAILER
    }

    /// Reads a state for a model with `elements` parameters. Length, digest and finiteness are checked.
    pub fn from_bytes(bytes: &[u8], elements: usize) -> Result<Self, StateError> {
        let expected_bytes = Self::bytes_for(elements);
        if bytes.len() < HEADER || bytes[..4] != MAGIC || bytes[4..8] != VERSION.to_le_bytes() {
            return Err(StateError::Format);
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if bytes.len() != expected_bytes || word(16) != elements as u64 {
            return Err(StateError::Length { expected: elements, expected_bytes, found_bytes: bytes.len() });
        }
        let (body, trailer) = bytes.split_at(bytes.len() - TRAILER);
        if blake3::Hasher::new().update_rayon(body).finalize() != blake3::Hash::from_slice(trailer).map_err(|_| StateError::Digest)? {
            return Err(StateError::Digest);
        }
        let array = |n: usize| -> Vec<f32> {
            let (four, _) = body[HEADER + 4 * n * elements..][..4 * elements].as_chunks::<4>();
            four.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
        };
        let state = Self { step: word(8), weights: array(0), first: array(1), second: array(2) };
        state.check(elements)?;
        Ok(state)
    }

    /// Checks that the arrays belong to a model with `elements` parameters and hold finite values.
    pub fn check(&self, elements: usize) -> Result<(), StateError> {
        for values in [&self.weights, &self.first, &self.second] {
            if values.len() != elements {
                let (expected_bytes, found_bytes) = (4 * elements, 4 * values.len());
                return Err(StateError::Length { expected: elements, expected_bytes, found_bytes });
            }
            if !values.iter().all(|value| value.is_finite()) {
                return Err(StateError::NotFinite);
            }
        }
        Ok(())
    }
}

#[cfg(target_endian = "little")]
fn little_endian(values: &[f32]) -> std::borrow::Cow<'_, [u8]> {
    bytemuck::cast_slice(values).into()
}

#[cfg(target_endian = "big")]
fn little_endian(values: &[f32]) -> std::borrow::Cow<'_, [u8]> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> TrainerState {
        TrainerState { step: 7, weights: vec![1.0, -2.5, 3.0], first: vec![0.1, 0.2, 0.3], second: vec![0.0, 1e-30, 4.0] }
    }

    #[test]
    fn a_state_survives_the_way_through_bytes() {
        let bytes = state().to_bytes();
        assert_eq!(bytes.len(), TrainerState::bytes_for(3));
        assert_eq!(TrainerState::from_bytes(&bytes, 3).unwrap(), state());
        assert_eq!(bytes[bytes.len() - TRAILER..], state().digest().0);
    }

    #[test]
    fn damaged_truncated_or_foreign_bytes_are_refused() {
        let bytes = state().to_bytes();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(TrainerState::from_bytes(&changed, 3).is_err(), "byte {at}");
            assert!(TrainerState::from_bytes(&bytes[..at], 3).is_err(), "length {at}");
        }
        assert!(matches!(TrainerState::from_bytes(&bytes, 4), Err(StateError::Length { .. })));
        let unsound = TrainerState { weights: vec![f32::NAN, 0.0, 0.0], ..state() };
        assert_eq!(TrainerState::from_bytes(&unsound.to_bytes(), 3), Err(StateError::NotFinite));
    }

    #[test]
    fn the_digest_depends_on_every_part() {
        let parts = [
            TrainerState { step: 8, ..state() },
            TrainerState { weights: vec![1.0, -2.5, 3.5], ..state() },
            TrainerState { first: vec![0.1, 0.2, 0.4], ..state() },
            TrainerState { second: vec![0.0, 1e-30, 5.0], ..state() },
        ];
        assert!(parts.iter().all(|other| other.digest() != state().digest()));
    }
}
