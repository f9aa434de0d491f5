//! The state of a trainer as bytes: what a miner writes before a segment that may be replayed, and reads after a restart.
//!
//! ```text
//! "QTRS" | version u32 | step u64 | elements u64 | weights | first moments | second moments | exported | BLAKE3 of all before
//! exported = { fragment u16 | values u64 | values } by ascending fragment
//! ```
//! Little-endian `f32` arrays of `elements` values each, in (fragment, slice) order, then the weights of those fragments that were
//! exported and got no newer version since.

use protocol::Digest;

const MAGIC: [u8; 4] = *b"QTRS";
const VERSION: u32 = 2;
const HEADER: usize = 24;
const TRAILER: usize = 32;
/// Fragment and count before the values of an exported fragment.
const EXPORTED_HEADER: usize = 10;

/// Why bytes are not a trainer state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    #[error(
        "not a trainer state of version {VERSION}\nhint: it was written by another program or version; start again from the run's fragments"
    )]
    Format,
    #[error(
        "a trainer state for {expected} parameters must have {expected_bytes} bytes and exported fragments of its size, got {found_bytes}\nhint: the file is truncated or belongs to another run; start again from the run's fragments"
    )]
    Length { expected: usize, expected_bytes: usize, found_bytes: usize },
    #[error("the trainer state is damaged: its digest does not match\nhint: start again from the run's fragments")]
    Digest,
    #[error("the trainer state holds a value that is not finite")]
    NotFinite,
}

/// Weights, both AdamW moments and the step count, in (fragment, slice) order; and the weights of exported fragments.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainerState {
    pub step: u64,
    pub weights: Vec<f32>,
    pub first: Vec<f32>,
    pub second: Vec<f32>,
    /// Fragments that were exported and got no newer version since, as they were then; ascending.
    pub exported: Vec<(u16, Vec<f32>)>,
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

    /// All bytes but the digest, part by part.
    fn parts(&self, mut each: impl FnMut(&[u8])) {
        each(&self.header());
        for values in [&self.weights, &self.first, &self.second] {
            each(&little_endian(values));
        }
        for (fragment, values) in &self.exported {
            each(&fragment.to_le_bytes());
            each(&(values.len() as u64).to_le_bytes());
            each(&little_endian(values));
        }
    }

    fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        self.parts(|part| {
            hasher.update_rayon(part);
        });
        hasher.finalize()
    }

    /// BLAKE3 of header and arrays: equal for equal states, whatever machine holds them.
    pub fn digest(&self) -> Digest {
        Digest(*self.hash().as_bytes())
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let exported: usize = self.exported.iter().map(|(_, values)| EXPORTED_HEADER + 4 * values.len()).sum();
        let mut bytes = Vec::with_capacity(HEADER + 12 * self.weights.len() + exported + TRAILER);
        self.parts(|part| bytes.extend_from_slice(part));
        bytes.extend_from_slice(self.hash().as_bytes());
        bytes
    }

    /// Reads a state for a model with `elements` parameters. Length, digest and finiteness are checked.
    pub fn from_bytes(bytes: &[u8], elements: usize) -> Result<Self, StateError> {
        let arrays = HEADER + 12 * elements;
        let length = || StateError::Length { expected: elements, expected_bytes: arrays + TRAILER, found_bytes: bytes.len() };
        if bytes.len() < HEADER || bytes[..4] != MAGIC || bytes[4..8] != VERSION.to_le_bytes() {
            return Err(StateError::Format);
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if bytes.len() < arrays + TRAILER || word(16) != elements as u64 {
            return Err(length());
        }
        let (body, trailer) = bytes.split_at(bytes.len() - TRAILER);
        if blake3::Hasher::new().update_rayon(body).finalize() != blake3::Hash::from_slice(trailer).map_err(|_| StateError::Digest)? {
            return Err(StateError::Digest);
        }
        let array = |n: usize| floats(&body[HEADER + 4 * n * elements..][..4 * elements]);
        let (mut exported, mut rest) = (Vec::new(), &body[arrays..]);
        while !rest.is_empty() {
            let (fragment, after) = rest.split_first_chunk::<2>().ok_or_else(length)?;
            let (count, after) = after.split_first_chunk::<8>().ok_or_else(length)?;
            let count = usize::try_from(u64::from_le_bytes(*count)).ok().and_then(|count| count.checked_mul(4)).ok_or_else(length)?;
            let (values, after) = after.split_at_checked(count).ok_or_else(length)?;
            exported.push((u16::from_le_bytes(*fragment), floats(values)));
            rest = after;
        }
        let state = Self { step: word(8), weights: array(0), first: array(1), second: array(2), exported };
        state.check(elements)?;
        Ok(state)
    }

    /// Checks that the arrays belong to a model with `elements` parameters and hold finite values, and that exported fragments are
    /// different ones. That each has its fragment's length is checked by the trainer, which knows the plan.
    pub fn check(&self, elements: usize) -> Result<(), StateError> {
        let length = |found: usize| StateError::Length { expected: elements, expected_bytes: 4 * elements, found_bytes: 4 * found };
        let arrays = [&self.weights, &self.first, &self.second];
        if let Some(other) = arrays.iter().find(|values| values.len() != elements) {
            return Err(length(other.len()));
        }
        let exported = self.exported.iter().map(|(_, values)| values);
        let sum = exported.clone().map(Vec::len).sum();
        if sum > elements || !self.exported.is_sorted_by(|a, b| a.0 < b.0) {
            return Err(length(sum));
        }
        let is_finite = arrays.into_iter().chain(exported).flatten().all(|value| value.is_finite());
        if is_finite { Ok(()) } else { Err(StateError::NotFinite) }
    }
}

/// Whole little-endian words.
fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
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
        TrainerState {
            step: 7,
            weights: vec![1.0, -2.5, 3.0],
            first: vec![0.1, 0.2, 0.3],
            second: vec![0.0, 1e-30, 4.0],
            exported: vec![(2, vec![1.5]), (5, vec![2.5, 0.5])],
        }
    }

    #[test]
    fn a_state_survives_the_way_through_bytes() {
        let bytes = state().to_bytes();
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
        for exported in [vec![(5, vec![1.0]), (2, vec![1.0])], vec![(2, vec![1.0]); 2], vec![(2, vec![1.0; 4])]] {
            let unsound = TrainerState { exported, ..state() };
            assert!(matches!(TrainerState::from_bytes(&unsound.to_bytes(), 3), Err(StateError::Length { .. })));
        }
        let unsound = TrainerState { exported: vec![(2, vec![f32::INFINITY])], ..state() };
        assert_eq!(TrainerState::from_bytes(&unsound.to_bytes(), 3), Err(StateError::NotFinite));
    }

    #[test]
    fn the_digest_depends_on_every_part() {
        let parts = [
            TrainerState { step: 8, ..state() },
            TrainerState { weights: vec![1.0, -2.5, 3.5], ..state() },
            TrainerState { first: vec![0.1, 0.2, 0.4], ..state() },
            TrainerState { second: vec![0.0, 1e-30, 5.0], ..state() },
            TrainerState { exported: vec![(2, vec![1.5]), (6, vec![2.5, 0.5])], ..state() },
            TrainerState { exported: vec![(2, vec![1.5])], ..state() },
        ];
        assert!(parts.iter().all(|other| other.digest() != state().digest()));
    }
}
