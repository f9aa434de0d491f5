//! `delta.qfd`: what changes the public form Θ̂ of one fragment version into that of the next, four bits an element.
//!
//! Everybody holds the same Θ̂ (bf16, from a keyframe or from the frames since). The server encodes Θ − Θ̂ as int4
//! ([`crate::codec::int4`]) and everybody, the server too, sets Θ̂ ← bf16(Θ̂ + decoded). What the codec or the rounding left out
//! is part of the next Θ − Θ̂: error feedback on the server's side, without a buffer of its own. A frame names the digest of the
//! keyframe that it leads to, so the bytes of a version do not depend on the way to it.
//!
//! | bytes | content |
//! |---|---|
//! | 0..8 | `QSRDELT1` |
//! | 8..40 | plan digest |
//! | 40..44 | fragment, u32 |
//! | 44..48 | codec number, u32: 1 |
//! | 48..56 | base version, u64; the frame leads to the next |
//! | 56..64 | elements, u64 |
//! | 64..96 | BLAKE3 of the resulting keyframe |

use protocol::documents::Codec;
use protocol::{Digest, FragmentPlan};
use rayon::prelude::*;

use crate::CodecError;
use crate::codec::{Encoding, Layout, check_header_bytes, decode_body, encode_body};
use crate::keyframe::{self, KeyframeError, KeyframeId};
use crate::number::round_in_place;
use crate::simd::vectorised;

/// Bytes of the header.
pub const HEADER_BYTES: usize = 96;

const MAGIC: &[u8; 8] = b"QSRDELT1";
const TASK_ELEMENTS: usize = 1 << 16;

/// Why a frame is not written or applied. Nothing is changed by a frame that is refused.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum DeltaError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error(transparent)]
    Keyframe(#[from] KeyframeError),
    #[error("the frame leads to another version than its digest says\nhint: the local copy is damaged; fetch the keyframe")]
    Result,
}

/// A version of a fragment, its frame, and its public form.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// The file.
    pub bytes: Vec<u8>,
    /// Θ̂ of the new version, in slice order: bf16 values.
    pub replica: Vec<f32>,
    /// The keyframe file of the new version.
    pub keyframe: Vec<u8>,
}

/// Exact length in bytes of every frame of fragment `fragment` of `plan`.
pub fn delta_bytes(plan: &FragmentPlan, fragment: usize) -> u64 {
    (HEADER_BYTES + Layout::new(Encoding::Int4, &plan.fragments[fragment]).bytes) as u64
}

/// The frame from Θ̂ of version `base.version` (`replica`) towards `theta`, the f32 parameters of the next version.
pub fn write(plan: &FragmentPlan, base: &KeyframeId, replica: &[f32], theta: &[f32]) -> Result<Frame, DeltaError> {
    let layout = layout(plan, base)?;
    check_count(replica, &layout)?;
    check_count(theta, &layout)?;
    let mut missing = theta.to_vec();
    tasks(&mut missing, replica, subtract);
    let mut bytes = vec![0; HEADER_BYTES + layout.bytes];
    encode_body(&layout, &missing, &mut bytes[HEADER_BYTES..])?;
    let replica = step(&layout, replica, &bytes[HEADER_BYTES..], missing)?;
    let keyframe = keyframe::write(plan, &next(base), &replica)?;
    bytes[..HEADER_BYTES].copy_from_slice(&header(base, &layout, &Digest::blake3(&keyframe)));
    Ok(Frame { bytes, replica, keyframe })
}

/// Θ̂ of the next version from that of `base` (`replica`) and a frame. `result` is the digest of the next version's keyframe, which
/// the signed head names.
pub fn apply(plan: &FragmentPlan, base: &KeyframeId, replica: &[f32], bytes: &[u8], result: &Digest) -> Result<Vec<f32>, DeltaError> {
    let layout = layout(plan, base)?;
    check_count(replica, &layout)?;
    let expected = (HEADER_BYTES + layout.bytes) as u64;
    if bytes.len() as u64 != expected {
        return Err(CodecError::Length { got: bytes.len() as u64, expected }.into());
    }
    let (found, body) = bytes.split_at(HEADER_BYTES);
    check_header_bytes(found, &header(base, &layout, result))?;
    let replica = step(&layout, replica, body, vec![0.0; layout.elements])?;
    if Digest::blake3(&keyframe::write(plan, &next(base), &replica)?) != *result {
        return Err(DeltaError::Result);
    }
    Ok(replica)
}

/// The keyframe's digest that a frame claims to lead to: what [`apply`] is given where nobody trusted named it. A chain of frames is
/// as good as the last of these digests.
pub fn claimed_result(bytes: &[u8]) -> Option<Digest> {
    bytes.get(HEADER_BYTES - 32..HEADER_BYTES)?.try_into().ok().map(Digest)
}

/// Follows frames one by one from Θ̂ of version `base.version` (`replica`) to the version whose keyframe has the digest `result`. Gives
/// that keyframe, as a file, which is as if it had been fetched.
pub fn follow(
    plan: &FragmentPlan,
    base: &KeyframeId,
    replica: Vec<f32>,
    frames: &[impl AsRef<[u8]>],
    result: &Digest,
) -> Result<Vec<u8>, DeltaError> {
    let (mut id, mut replica) = (*base, replica);
    for (number, frame) in frames.iter().enumerate() {
        let is_last = number + 1 == frames.len();
        let claimed = if is_last { *result } else { claimed_result(frame.as_ref()).unwrap_or(Digest::ZERO) };
        replica = apply(plan, &id, &replica, frame.as_ref(), &claimed)?;
        id = next(&id);
    }
    let keyframe = keyframe::write(plan, &id, &replica)?;
    // Without a frame nothing has been compared yet.
    if Digest::blake3(&keyframe) == *result { Ok(keyframe) } else { Err(DeltaError::Result) }
}

fn layout(plan: &FragmentPlan, base: &KeyframeId) -> Result<Layout, KeyframeError> {
    let slices = plan.fragments.get(base.fragment as usize).ok_or(KeyframeError::Fragment { fragment: base.fragment })?;
    Ok(Layout::new(Encoding::Int4, slices))
}

fn check_count(values: &[f32], layout: &Layout) -> Result<(), CodecError> {
    let (got, expected) = (values.len() as u64, layout.elements as u64);
    if got == expected { Ok(()) } else { Err(CodecError::Values { got, expected }) }
}

const fn next(base: &KeyframeId) -> KeyframeId {
    KeyframeId { version: base.version + 1, ..*base }
}

fn header(base: &KeyframeId, layout: &Layout, result: &Digest) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..40].copy_from_slice(&base.plan.0);
    bytes[40..44].copy_from_slice(&base.fragment.to_le_bytes());
    bytes[44..48].copy_from_slice(&(Codec::Int4 as u32).to_le_bytes());
    bytes[48..56].copy_from_slice(&base.version.to_le_bytes());
    bytes[56..64].copy_from_slice(&(layout.elements as u64).to_le_bytes());
    bytes[64..].copy_from_slice(&result.0);
    bytes
}

/// bf16(replica + decoded body), in `buffer`.
fn step(layout: &Layout, replica: &[f32], body: &[u8], mut buffer: Vec<f32>) -> Result<Vec<f32>, CodecError> {
    decode_body(layout, body, &mut buffer)?;
    tasks(&mut buffer, replica, |decoded, replica| {
        add(decoded, replica);
        round_in_place(decoded);
    });
    Ok(buffer)
}

fn tasks(values: &mut [f32], others: &[f32], work: impl Fn(&mut [f32], &[f32]) + Sync) {
    values.par_chunks_mut(TASK_ELEMENTS).zip(others.par_chunks(TASK_ELEMENTS)).for_each(|(values, others)| work(values, others));
}

vectorised! {
    fn subtract(values: &mut [f32], others: &[f32]) {
        for (value, other) in values.iter_mut().zip(others) {
            *value -= other;
        }
    }
}

vectorised! {
    fn add(values: &mut [f32], others: &[f32]) {
        for (value, other) in values.iter_mut().zip(others) {
            *value += other;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fixture, plan};

    fn start() -> (FragmentPlan, KeyframeId, Vec<f32>) {
        let plan = plan(&fixture::small_contract(), 3).unwrap();
        let id = KeyframeId { plan: plan.digest(), fragment: 1, version: 4 };
        let theta: Vec<f32> = fixture::values(1, plan.elements(1) as usize).iter().map(|value| 0.05 * value).collect();
        (plan, id, theta)
    }

    /// Θ̂ of a version through its keyframe file.
    fn published(plan: &FragmentPlan, id: &KeyframeId, theta: &[f32]) -> Vec<f32> {
        keyframe::read(plan, id, &keyframe::write(plan, id, theta).unwrap()).unwrap()
    }

    fn distance(left: &[f32], right: &[f32]) -> f64 {
        left.iter().zip(right).map(|(left, right)| f64::from(left - right).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn a_chain_of_frames_gives_every_learner_what_the_keyframes_say() {
        let (plan, mut id, mut theta) = start();
        let mut server = published(&plan, &id, &theta);
        let mut learner = server.clone();
        for round in 0..20 {
            let move_by = fixture::values(10 + round, theta.len());
            theta.iter_mut().zip(move_by).for_each(|(value, by)| *value += 1e-3 * by);
            let frame = write(&plan, &id, &server, &theta).unwrap();
            assert_eq!(frame.bytes.len() as u64, delta_bytes(&plan, 1));
            learner = apply(&plan, &id, &learner, &frame.bytes, &Digest::blake3(&frame.keyframe)).unwrap();
            id.version += 1;
            assert_eq!(learner, keyframe::read(&plan, &id, &frame.keyframe).unwrap());
            assert_eq!(learner, frame.replica);
            server = frame.replica;
        }
    }

    #[test]
    fn a_chain_is_followed_to_the_digest_at_its_end_and_to_no_other() {
        let (plan, id, mut theta) = start();
        let first = published(&plan, &id, &theta);
        let (mut at, mut replica, mut frames, mut keyframe) = (id, first.clone(), Vec::new(), Vec::new());
        for round in 0..4 {
            theta.iter_mut().zip(fixture::values(50 + round, first.len())).for_each(|(value, by)| *value += 1e-3 * by);
            let frame = write(&plan, &at, &replica, &theta).unwrap();
            (replica, keyframe) = (frame.replica, frame.keyframe);
            frames.push(frame.bytes);
            at.version += 1;
        }
        let result = Digest::blake3(&keyframe);
        assert_eq!(claimed_result(&frames[3]), Some(result));
        assert_eq!(follow(&plan, &id, first.clone(), &frames, &result).unwrap(), keyframe);
        let none: [Vec<u8>; 0] = [];
        assert_eq!(follow(&plan, &at, replica, &none, &result).unwrap(), keyframe);
        assert!(follow(&plan, &id, first.clone(), &frames[..3], &result).is_err(), "it ends one version early");
        assert_eq!(follow(&plan, &id, first.clone(), &none, &result), Err(DeltaError::Result));
        frames.swap(1, 2);
        assert!(follow(&plan, &id, first, &frames, &result).is_err());
    }

    #[test]
    fn what_a_frame_leaves_out_comes_with_the_next_ones() {
        let (plan, mut id, theta) = start();
        let mut replica = vec![0.0; theta.len()];
        let mut distances = vec![distance(&replica, &theta)];
        for _ in 0..6 {
            let frame = write(&plan, &id, &replica, &theta).unwrap();
            replica = frame.replica;
            id.version += 1;
            distances.push(distance(&replica, &theta));
        }
        let rounded = distance(&published(&plan, &id, &theta), &theta);
        assert!(distances[1] < 0.1 * distances[0], "{distances:?}");
        assert!(distances[6] < 1.2 * rounded, "{distances:?}, {rounded}");
    }

    #[test]
    fn frames_of_another_base_plan_or_result_and_damaged_ones_are_refused() {
        let (plan, id, theta) = start();
        let replica = published(&plan, &id, &theta);
        let moved: Vec<f32> = theta.iter().map(|value| value + 1e-3).collect();
        let frame = write(&plan, &id, &replica, &moved).unwrap();
        let result = Digest::blake3(&frame.keyframe);
        let newer = KeyframeId { version: 5, ..id };
        assert_eq!(apply(&plan, &newer, &replica, &frame.bytes, &result), Err(CodecError::Header { byte: 48 }.into()));
        let other = Digest::blake3(b"another");
        assert!(matches!(apply(&plan, &id, &replica, &frame.bytes, &other), Err(DeltaError::Codec(CodecError::Header { .. }))));
        let short = &frame.bytes[..frame.bytes.len() - 1];
        assert!(matches!(apply(&plan, &id, &replica, short, &result), Err(DeltaError::Codec(CodecError::Length { .. }))));
        let mut damaged = frame.bytes.clone();
        damaged[HEADER_BYTES + 3] = 0x7f;
        assert!(apply(&plan, &id, &replica, &damaged, &result).is_err());
        let drifted: Vec<f32> = replica.iter().map(|value| value * 2.0).collect();
        assert_eq!(apply(&plan, &id, &drifted, &frame.bytes, &result), Err(DeltaError::Result));
        let mut infinite = moved.clone();
        infinite[9] = f32::INFINITY;
        assert_eq!(write(&plan, &id, &replica, &infinite), Err(CodecError::NotFinite { element: 9 }.into()));
    }
}
