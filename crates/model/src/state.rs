//! The state of a trainer as bytes: what a miner writes before a segment that may be replayed, and reads after a restart.
//!
//! ```text
//! "QTRS" | version u32 | step u64 | elements u64 | weights | moments | exported | BLAKE3 of all before
//! moments  = runs that cover all elements in order, each of
//!            0 | count u32                                                                        both moments are zero
//!            1 | count u32 | first | second                                                       f32
//!            2 | count u32 | phase u8 | scales of first, of second | codes of first, of second    8 bits, [`Run::Bytes`]
//! exported = count u16 | { fragment u16 | values u64 | values } by ascending fragment
//! ```
//! Little-endian; weights are `f32`, in (fragment, slice) order, and so are moments; then come the weights of those fragments that were
//! exported and got no newer version since. States are written and read piece by piece ([`StateWriter`], [`StateReader`]), so that one that
//! is larger than the memory passes through, and moments that are kept in 8 bits take 8 bits here: 6 bytes a parameter in all.

mod run;

use std::io::{self, Read, Write};

use protocol::Digest;

pub(crate) use self::run::Run;
use self::run::blocks;

const MAGIC: [u8; 4] = *b"QTRS";
const VERSION: u32 = 3;
const HEADER: usize = 24;
const TRAILER: usize = 32;
/// Most elements in a run, and values that are converted at a time.
pub(crate) const RUN_MAX: usize = 1 << 24;
/// Bytes that are gathered before they are hashed and written.
const GATHERED: usize = 1 << 20;

/// Why bytes are not a trainer state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error(
        "not a trainer state of version {VERSION}\nhint: it was written by another program or version; start again from the run's fragments"
    )]
    Format,
    #[error(
        "a trainer state for {expected} parameters holds {found}\nhint: the file is truncated or belongs to another run; start again from the run's fragments"
    )]
    Length { expected: usize, found: String },
    #[error("the trainer state is damaged: its digest does not match\nhint: start again from the run's fragments")]
    Digest,
    #[error("the trainer state holds a value that is not finite")]
    NotFinite,
    #[error("the trainer state cannot be read or written: {0}")]
    Io(#[from] io::Error),
}

/// Writes a state piece by piece.
pub(crate) struct StateWriter<'a> {
    to: &'a mut dyn Write,
    hasher: blake3::Hasher,
    /// What is written next, gathered: a state may consist of thousands of small runs.
    waiting: Vec<u8>,
}

impl<'a> StateWriter<'a> {
    pub fn new(to: &'a mut dyn Write, step: u64, elements: usize) -> Result<Self, StateError> {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&MAGIC);
        header[4..8].copy_from_slice(&VERSION.to_le_bytes());
        header[8..16].copy_from_slice(&step.to_le_bytes());
        header[16..].copy_from_slice(&(elements as u64).to_le_bytes());
        let mut writer = Self { to, hasher: blake3::Hasher::new(), waiting: Vec::new() };
        writer.bytes(&header)?;
        Ok(writer)
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        if self.waiting.len() + bytes.len() < GATHERED {
            self.waiting.extend_from_slice(bytes);
            return Ok(());
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        self.pass_on(&waiting)?;
        waiting.clear();
        self.waiting = waiting;
        if bytes.len() < GATHERED { self.bytes(bytes) } else { self.pass_on(bytes) }
    }

    fn pass_on(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        self.hasher.update_rayon(bytes);
        Ok(self.to.write_all(bytes)?)
    }

    /// The next weights; all of them come before the first run.
    pub fn weights(&mut self, values: &[f32]) -> Result<(), StateError> {
        values.chunks(RUN_MAX).try_for_each(|values| self.bytes(&little_endian(values)))
    }

    /// The moments of the next elements.
    pub fn run(&mut self, run: &Run) -> Result<(), StateError> {
        let kind = match run {
            Run::Zero(_) => 0,
            Run::Floats { .. } => 1,
            Run::Bytes { .. } => 2,
        };
        self.bytes(&[kind])?;
        self.bytes(&(run.len() as u32).to_le_bytes())?;
        match run {
            Run::Zero(_) => Ok(()),
            Run::Floats { first, second } => [first, second].into_iter().try_for_each(|values| self.bytes(&little_endian(values))),
            Run::Bytes { phase, scales, codes } => {
                self.bytes(&[*phase as u8])?;
                scales.iter().try_for_each(|scales| self.bytes(&little_endian(scales)))?;
                codes.iter().try_for_each(|codes| self.bytes(codes))
            }
        }
    }

    /// The weights of exported fragments, and the end.
    pub fn finish(mut self, exported: &[(u16, &[f32])]) -> Result<Digest, StateError> {
        self.bytes(&(exported.len() as u16).to_le_bytes())?;
        for (fragment, values) in exported {
            self.bytes(&fragment.to_le_bytes())?;
            self.bytes(&(values.len() as u64).to_le_bytes())?;
            self.weights(values)?;
        }
        let waiting = std::mem::take(&mut self.waiting);
        self.pass_on(&waiting)?;
        let digest = *self.hasher.finalize().as_bytes();
        self.to.write_all(&digest)?;
        Ok(Digest(digest))
    }
}

/// Reads a state piece by piece. What it gave is certain only once [`StateReader::finish`] found the digest right.
pub(crate) struct StateReader<'a> {
    from: &'a mut dyn Read,
    hasher: blake3::Hasher,
    elements: usize,
    pub step: u64,
    /// Elements whose moments were read.
    covered: usize,
}

impl<'a> StateReader<'a> {
    /// A state for a model with `elements` parameters.
    pub fn new(from: &'a mut dyn Read, elements: usize) -> Result<Self, StateError> {
        let mut reader = Self { from, hasher: blake3::Hasher::new(), elements, step: 0, covered: 0 };
        let header = reader.bytes(HEADER).map_err(|_| StateError::Format)?;
        let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        if header[..4] != MAGIC || header[4..8] != VERSION.to_le_bytes() {
            return Err(StateError::Format);
        }
        reader.step = word(8);
        if word(16) != elements as u64 {
            return Err(reader.wrong(format!("{} of them", word(16))));
        }
        Ok(reader)
    }

    fn wrong(&self, found: impl Into<String>) -> StateError {
        StateError::Length { expected: self.elements, found: found.into() }
    }

    fn bytes(&mut self, count: usize) -> Result<Vec<u8>, StateError> {
        let mut bytes = vec![0; count];
        match self.from.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(self.wrong("less")),
            Err(error) => return Err(error.into()),
        }
        self.hasher.update_rayon(&bytes);
        Ok(bytes)
    }

    /// The next weights: `count` of them, at most [`RUN_MAX`].
    pub fn weights(&mut self, count: usize) -> Result<Vec<f32>, StateError> {
        let values = floats(&self.bytes(4 * count)?);
        if values.iter().all(|value| value.is_finite()) { Ok(values) } else { Err(StateError::NotFinite) }
    }

    /// The next run of moments; `None` after the last element.
    pub fn run(&mut self) -> Result<Option<Run>, StateError> {
        if self.covered == self.elements {
            return Ok(None);
        }
        let head = self.bytes(5)?;
        let count = u32::from_le_bytes(head[1..].try_into().expect("four bytes")) as usize;
        let is_bounded = head[0] == 0 || count <= RUN_MAX;
        if count == 0 || !is_bounded || count > self.elements - self.covered {
            return Err(self.wrong(format!("a run of {count}")));
        }
        self.covered += count;
        let run = match head[0] {
            0 => Run::Zero(count),
            1 => Run::Floats { first: floats(&self.bytes(4 * count)?), second: floats(&self.bytes(4 * count)?) },
            2 => {
                let phase = usize::from(self.bytes(1)?[0]);
                let mut scales = || Ok::<_, StateError>(floats(&self.bytes(4 * blocks(phase, count))?));
                let scales = [scales()?, scales()?];
                Run::Bytes { phase, scales, codes: [self.bytes(count)?, self.bytes(count)?] }
            }
            kind => return Err(self.wrong(format!("moments of kind {kind}"))),
        };
        if run.is_finite() { Ok(Some(run)) } else { Err(StateError::NotFinite) }
    }

    /// The weights of exported fragments, and the end: the digest must be right and nothing may follow.
    pub fn finish(mut self) -> Result<Vec<(u16, Vec<f32>)>, StateError> {
        let count = self.bytes(2)?;
        let mut exported: Vec<(u16, Vec<f32>)> = Vec::new();
        let mut left = self.elements;
        for _ in 0..u16::from_le_bytes([count[0], count[1]]) {
            let head = self.bytes(10)?;
            let fragment = u16::from_le_bytes([head[0], head[1]]);
            let count = u64::from_le_bytes(head[2..].try_into().expect("eight bytes"));
            let count = usize::try_from(count).ok().filter(|count| *count <= left).ok_or_else(|| self.wrong("more exported weights"))?;
            if exported.last().is_some_and(|(last, _)| *last >= fragment) {
                return Err(self.wrong("exported fragments in another order"));
            }
            left -= count;
            let mut values = Vec::new();
            while values.len() < count {
                values.extend(self.weights(RUN_MAX.min(count - values.len()))?);
            }
            exported.push((fragment, values));
        }
        let digest = *self.hasher.finalize().as_bytes();
        let mut trailer = [0; TRAILER];
        self.from.read_exact(&mut trailer).map_err(|_| StateError::Digest)?;
        if trailer != digest {
            return Err(StateError::Digest);
        }
        match self.from.read(&mut [0])? {
            0 => Ok(exported),
            _ => Err(self.wrong("more")),
        }
    }
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
    /// BLAKE3 of all that [`TrainerState::write`] writes before it: equal for equal states, whatever machine holds them.
    pub fn digest(&self) -> Digest {
        self.write(&mut io::sink()).unwrap_or(Digest::ZERO) // a sink takes everything
    }

    /// Writes the state; gives the digest that ends it.
    pub fn write(&self, to: &mut dyn Write) -> Result<Digest, StateError> {
        let mut writer = StateWriter::new(to, self.step, self.weights.len())?;
        writer.weights(&self.weights)?;
        for (first, second) in self.first.chunks(RUN_MAX).zip(self.second.chunks(RUN_MAX)) {
            writer.run(&Run::Floats { first: first.to_vec(), second: second.to_vec() })?;
        }
        let exported: Vec<(u16, &[f32])> = self.exported.iter().map(|(fragment, values)| (*fragment, values.as_slice())).collect();
        writer.finish(&exported)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + 12 * self.weights.len() + TRAILER);
        let _ = self.write(&mut bytes); // memory takes everything
        bytes
    }

    /// Reads a state for a model with `elements` parameters. Length, digest and finiteness are checked.
    pub fn read(from: &mut dyn Read, elements: usize) -> Result<Self, StateError> {
        let mut reader = StateReader::new(from, elements)?;
        let mut state = Self { step: reader.step, ..Self::default() };
        while state.weights.len() < elements {
            state.weights.extend(reader.weights(RUN_MAX.min(elements - state.weights.len()))?);
        }
        while let Some(run) = reader.run()? {
            let (first, second) = run.decode();
            state.first.extend(first);
            state.second.extend(second);
        }
        state.exported = reader.finish()?;
        Ok(state)
    }

    /// As [`TrainerState::read`], from memory.
    pub fn from_bytes(mut bytes: &[u8], elements: usize) -> Result<Self, StateError> {
        Self::read(&mut bytes, elements)
    }

    /// Checks that the arrays belong to a model with `elements` parameters and hold finite values, and that exported fragments are
    /// different ones. That each has its fragment's length is checked by the trainer, which knows the plan.
    pub fn check(&self, elements: usize) -> Result<(), StateError> {
        let length = |found: usize| StateError::Length { expected: elements, found: format!("{found} of them") };
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

/// Reads a state to its end and throws it away: whether it is whole and fits a model with `elements` parameters.
pub fn check_state(from: &mut dyn Read, elements: usize) -> Result<(), StateError> {
    let mut reader = StateReader::new(from, elements)?;
    let mut left = elements;
    while left > 0 {
        left -= reader.weights(RUN_MAX.min(left))?.len();
    }
    while reader.run()?.is_some() {}
    reader.finish().map(drop)
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
    use super::run::{FIRST_MANTISSA, code_value};
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
        let is_not_finite = |state: &TrainerState| matches!(TrainerState::from_bytes(&state.to_bytes(), 3), Err(StateError::NotFinite));
        assert!(is_not_finite(&unsound));
        for exported in [vec![(5, vec![1.0]), (2, vec![1.0])], vec![(2, vec![1.0]); 2], vec![(2, vec![1.0; 4])]] {
            let unsound = TrainerState { exported, ..state() };
            assert!(matches!(TrainerState::from_bytes(&unsound.to_bytes(), 3), Err(StateError::Length { .. })));
        }
        let unsound = TrainerState { exported: vec![(2, vec![f32::INFINITY])], ..state() };
        assert!(is_not_finite(&unsound));
        let mut more = bytes;
        more.push(0);
        assert!(TrainerState::from_bytes(&more, 3).is_err());
    }

    /// 700 elements of which the first is number 100 of its block.
    fn bytes() -> Run {
        let codes = |factor: usize| (0..700).map(|n| (n * factor % 251) as u8).collect();
        Run::Bytes { phase: 100, scales: [vec![1e-6, 2e-6, 3e-6, 4e-6], vec![1e-5, 2e-5, 3e-5, 4e-5]], codes: [codes(7), codes(13)] }
    }

    #[test]
    fn moments_in_8_bits_take_8_bits_and_mean_the_same_wherever_they_are_cut() {
        let (first, second) = bytes().decode();
        // Code 7 * 19 = 133 of element 19: minus 5 units; 13 * 20 = 260 - 251 = 9 units, squared; element 200 lies in the second block.
        let root = 9.0 * 1e-5f32;
        assert_eq!((first[19], second[20]), (-5.0 * 1e-6f32, root * root));
        let code = (200 * 7 % 251) as u32;
        assert_eq!(first[200].abs(), code_value(FIRST_MANTISSA, code & 127) * 2e-6);
        for at in [1, 155, 156, 157, 411, 412, 413, 699] {
            let (one, two) = bytes().split(at);
            assert_eq!((one.len(), two.len()), (at, 700 - at));
            let (mut a, mut b) = one.decode();
            let (c, d) = two.decode();
            a.extend(c);
            b.extend(d);
            assert_eq!((&a, &b), (&first, &second), "cut at {at}");
        }
        let mut file = Vec::new();
        let mut writer = StateWriter::new(&mut file, 5, 703).unwrap();
        writer.weights(&vec![0.5; 703]).unwrap();
        writer.run(&Run::Zero(3)).unwrap();
        writer.run(&bytes()).unwrap();
        let digest = writer.finish(&[]).unwrap();
        assert!(file.len() < HEADER + 6 * 703 + 2 * 4 * 4 + TRAILER + 20, "{} bytes", file.len());
        assert_eq!(file[file.len() - TRAILER..], digest.0);
        check_state(&mut file.as_slice(), 703).unwrap();
        let state = TrainerState::from_bytes(&file, 703).unwrap();
        assert_eq!((state.step, &state.first[3..], &state.second[..3]), (5, &first[..], &[0.0; 3][..]));
        for at in 0..file.len() {
            let mut changed = file.clone();
            changed[at] ^= 4;
            assert!(check_state(&mut changed.as_slice(), 703).is_err(), "byte {at}");
        }
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
