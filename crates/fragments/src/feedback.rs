//! Error feedback of a learner: what a lossy codec did not send is added to what is sent next (SparseLoCo, arXiv 2508.15706).
//!
//! e ← β e + Δ; send Q(e); e ← e − Q(e). A payload that is not in the merge is given back: e ← e + Q(e), or its content would be
//! lost for ever. Error feedback is a momentum of its own; the outer optimizer must not add another
//! ([`crate::outer::momentum_fits`]).

use protocol::Digest;
use rayon::prelude::*;

use crate::codec::{self, CodecError, PayloadHeader, Source, Span, check_tile, cut_mut};
use crate::simd::vectorised;

/// Decay of what was not sent, from one payload of a fragment to its next.
pub const BETA: f32 = 0.95;

/// The residual of one fragment, in slice order.
#[derive(Clone, Debug, PartialEq)]
pub struct ErrorFeedback {
    residual: Vec<f32>,
    beta: f32,
}

impl ErrorFeedback {
    /// Nothing withheld yet.
    pub fn new(elements: usize, beta: f32) -> Self {
        Self::from_residual(vec![0.0; elements], beta)
    }

    /// Goes on from a residual that was kept.
    pub fn from_residual(residual: Vec<f32>, beta: f32) -> Self {
        Self { residual, beta }
    }

    /// What was not sent yet.
    pub fn residual(&self) -> &[f32] {
        &self.residual
    }

    /// Encodes `delta` (base minus learner) together with the residual; the residual is what the payload leaves out. After an
    /// error the residual is as it was.
    pub fn encode(&mut self, header: &PayloadHeader, delta: &[f32]) -> Result<Vec<u8>, CodecError> {
        if delta.len() != self.residual.len() {
            return Err(CodecError::Values { got: delta.len() as u64, expected: self.residual.len() as u64 });
        }
        let mut sum = self.residual.clone();
        sum.par_chunks_mut(TASK_ELEMENTS)
            .zip(delta.par_chunks(TASK_ELEMENTS))
            .for_each(|(sum, delta)| decay_and_add(sum, delta, self.beta));
        let payload = codec::encode(header, &sum)?;
        add(header, &payload, &mut sum, -1.0)?;
        self.residual = sum;
        Ok(payload)
    }

    /// Takes back a payload that no merge contains. After an error (it is not what `header` says) the residual is as it was.
    pub fn give_back(&mut self, header: &PayloadHeader, payload: &[u8]) -> Result<(), CodecError> {
        codec::check(&payload, header)?;
        if header.elements() != self.residual.len() as u64 {
            return Err(CodecError::Values { got: header.elements(), expected: self.residual.len() as u64 });
        }
        add(header, payload, &mut self.residual, 1.0)
    }
}

/// A residual as it is kept and opened: little-endian f32 in slice order, then their BLAKE3. Gives values and digest; `None` if the bytes
/// are not whole.
pub fn read_residual(bytes: &[u8]) -> Option<(Vec<f32>, Digest)> {
    let (values, digest) = bytes.split_last_chunk::<32>()?;
    let (chunks, []) = values.as_chunks::<4>() else { return None };
    (Digest::blake3(values).0 == *digest).then(|| (chunks.iter().map(|value| f32::from_le_bytes(*value)).collect(), Digest(*digest)))
}

const TASK_ELEMENTS: usize = 1 << 16;

/// `values += sign · payload`, tile by tile.
fn add(header: &PayloadHeader, payload: &[u8], values: &mut [f32], sign: f32) -> Result<(), CodecError> {
    let layout = header.layout();
    let spans = layout.spans();
    let pieces = cut_mut(values, spans.iter().map(Span::elements));
    let tasks: Vec<(&Span, &mut [f32])> = spans.iter().zip(pieces).collect();
    let results: Vec<Result<(), CodecError>> = tasks
        .into_par_iter()
        .map_init(Vec::new, |decoded: &mut Vec<f32>, (span, values)| {
            for (tile, values) in layout.tiles(*span).zip(values.chunks_mut(layout.encoding.codec().tile_elements())) {
                let place = layout.body_range(tile);
                let mut unused = Vec::new();
                let bytes = payload.read((codec::HEADER_BYTES + place.start) as u64, place.len(), &mut unused)?;
                check_tile(layout, tile, bytes)?;
                decoded.resize(tile.elements(), 0.0);
                layout.encoding.codec().decode(bytes, decoded);
                add_signed(values, decoded, sign);
            }
            Ok(())
        })
        .collect();
    results.into_iter().collect()
}

vectorised! {
    fn decay_and_add(sum: &mut [f32], delta: &[f32], beta: f32) {
        for (sum, delta) in sum.iter_mut().zip(delta) {
            *sum = beta * *sum + delta;
        }
    }
}

vectorised! {
    fn add_signed(values: &mut [f32], decoded: &[f32], sign: f32) {
        for (value, decoded) in values.iter_mut().zip(decoded) {
            *value += sign * decoded;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;
    use protocol::documents::Codec;

    const ELEMENTS: usize = 20_000;

    fn header(codec: Codec) -> PayloadHeader {
        PayloadHeader::of_slices(codec, &[fixture::slice(2, ELEMENTS as u64 / 2, 1)], Digest::ZERO, 0, 0)
    }

    #[test]
    fn what_was_sent_and_what_is_kept_add_up_to_what_came_in() {
        for codec in [Codec::Bf16, Codec::Int4, Codec::TopK] {
            let mut feedback = ErrorFeedback::from_residual(fixture::values(1, ELEMENTS), 0.5);
            let (before, delta) = (feedback.residual().to_vec(), fixture::values(2, ELEMENTS));
            let payload = feedback.encode(&header(codec), &delta).unwrap();
            let sent = codec::decode(&payload, &header(codec)).unwrap();
            for index in 0..ELEMENTS {
                let expected = 0.5 * before[index] + delta[index];
                assert!((sent[index] + feedback.residual()[index] - expected).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn a_payload_given_back_leaves_what_it_was_encoded_from() {
        let mut feedback = ErrorFeedback::new(ELEMENTS, BETA);
        let delta = fixture::values(3, ELEMENTS);
        let payload = feedback.encode(&header(Codec::TopK), &delta).unwrap();
        feedback.give_back(&header(Codec::TopK), &payload).unwrap();
        assert!(feedback.residual().iter().zip(&delta).all(|(kept, delta)| (kept - delta).abs() < 1e-6));
    }

    #[test]
    fn over_many_payloads_everything_is_sent() {
        let mut feedback = ErrorFeedback::new(ELEMENTS, 1.0);
        let delta = fixture::values(4, ELEMENTS);
        let (mut sent, rounds) = (vec![0.0f64; ELEMENTS], 300);
        for _ in 0..rounds {
            let payload = feedback.encode(&header(Codec::TopK), &delta).unwrap();
            for (sum, value) in sent.iter_mut().zip(codec::decode(&payload, &header(Codec::TopK)).unwrap()) {
                *sum += f64::from(value);
            }
        }
        let missing: f64 = sent.iter().zip(&delta).map(|(sent, delta)| (sent - f64::from(rounds) * f64::from(*delta)).powi(2)).sum();
        let total: f64 = delta.iter().map(|delta| (f64::from(rounds) * f64::from(*delta)).powi(2)).sum();
        assert!((missing / total).sqrt() < 0.2, "{}", (missing / total).sqrt());
    }

    #[test]
    fn a_payload_that_cannot_be_encoded_or_given_back_changes_nothing() {
        let mut feedback = ErrorFeedback::from_residual(fixture::values(5, ELEMENTS), BETA);
        let before = feedback.clone();
        let mut delta = fixture::values(6, ELEMENTS);
        delta[77] = f32::NAN;
        assert_eq!(feedback.encode(&header(Codec::TopK), &delta), Err(CodecError::NotFinite { element: 77 }));
        assert!(matches!(feedback.encode(&header(Codec::TopK), &delta[1..]), Err(CodecError::Values { .. })));
        delta[77] = 0.0;
        let mut payload = before.clone().encode(&header(Codec::TopK), &delta).unwrap();
        let last = payload.len() - 1;
        payload[last] ^= 0xff;
        payload[codec::HEADER_BYTES + 1] = 0xff;
        assert!(feedback.give_back(&header(Codec::TopK), &payload).is_err());
        assert_eq!(feedback, before);
    }
}
