//! `payload.qfd`: the encoded pseudo-gradient of one fragment, as a learner uploads it.
//!
//! A 64-byte header, then the values in slice order in the codec of the run manifest. The receiver knows every header field
//! beforehand (run plan, pull, job), so it generates the header that it expects and compares byte for byte: there is nothing
//! to parse, and the length of every payload is known before it is sent.
//!
//! | bytes | content |
//! |---|---|
//! | 0..8 | `QSRPAYL1` |
//! | 8..40 | plan digest |
//! | 40..44 | fragment, u32 |
//! | 44..48 | codec number, u32 |
//! | 48..56 | base version, u64 |
//! | 56..64 | elements, u64 |
//!
//! | codec | body | bits an element |
//! |---|---|---|
//! | bf16 | rounded to nearest, ties to even, little-endian | 16 |
//! | int4 | [`int4`]: blocks of 256 with an f32 scale | 4.125 |
//! | topk | [`top_k`]: 64 of each 4096, 12-bit indices, 2-bit values; needs [`crate::feedback`] | 0.21875 |
//!
//! Bodies are decoded into memory that the plan bounds, whatever the bytes say. [`check`] and the merge read a payload piece by
//! piece from a [`Source`] and never hold it whole.

mod dense;
pub mod int4;
pub(crate) mod layout;
mod source;
pub mod top_k;

use std::io;
use std::sync::Arc;

use protocol::documents::Codec;
use protocol::{DType, Digest, FragmentPlan, Slice};
use rayon::prelude::*;

pub use source::{FileSource, Source};

pub(crate) use layout::{Encoding, Layout, Span, cut_mut};

use crate::memory::zeros;

/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;

const MAGIC: &[u8; 8] = b"QSRPAYL1";

/// What both sides know about a payload before it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PayloadHeader {
    /// Digest of the run's fragment plan.
    pub plan: Digest,
    pub fragment: u32,
    /// The fragment version that the pseudo-gradient was taken against.
    pub base_version: u64,
    codec: Codec,
    layout: Arc<Layout>,
}

/// How the elements of a merge unit are written: one implementation for each codec of the run manifest.
pub(crate) trait TileCodec: Sync {
    /// Elements of a tile: what is read from a payload, encoded, checked and decoded at a time.
    fn tile_elements(&self) -> usize {
        1 << 14
    }

    /// Elements that are summed at a time; tiles are whole numbers of them.
    fn block_elements(&self) -> usize {
        1024
    }

    /// Bytes of the first `elements` elements of a unit, if they are a whole unit or end at a tile.
    fn bytes(&self, elements: usize) -> usize;

    /// Encodes a tile. `Err` is the first element that cannot be encoded.
    fn encode(&self, values: &[f32], bytes: &mut [u8]) -> Result<(), usize>;

    /// Whether the bytes of a tile of `elements` elements are what [`Self::encode`] writes; `Err` is where they are not, and how.
    fn check(&self, bytes: &[u8], elements: usize) -> Result<(), (usize, Flaw)>;

    /// Decodes a tile that [`Self::check`] accepted, or a whole number of its blocks where they stand on their own.
    fn decode(&self, bytes: &[u8], out: &mut [f32]);
}

/// What is wrong with an encoded piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    NotFinite,
    Scale,
    Code,
    Index,
}

/// Why values are not encoded, or a payload is refused.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error("{got} values were given for a fragment of {expected} elements")]
    Values { got: u64, expected: u64 },
    #[error("the payload has {got} bytes, expected are {expected}\nhint: fragment plan or codec of the sender differ; update the miner")]
    Length { got: u64, expected: u64 },
    #[error(
        "the payload's header differs from the expected one at byte {byte}\nhint: fragment plan, base version or codec of the sender differ; update the miner"
    )]
    Header { byte: usize },
    #[error("element {element} is not a number that the codec can hold\nhint: the learner diverged; it goes back to its last good state")]
    NotFinite { element: u64 },
    #[error(
        "the scale at element {element} is not a normal positive number in its range\nhint: the sender's codec differs; update the miner"
    )]
    Scale { element: u64 },
    #[error("a code at or behind element {element} is not one that the codec writes\nhint: the sender's codec differs; update the miner")]
    Code { element: u64 },
    #[error("an index behind element {element} repeats, descends or is out of range\nhint: the sender's codec differs; update the miner")]
    Index { element: u64 },
    #[error("the payload cannot be read: {0}")]
    Read(#[from] io::Error),
}

impl PartialEq for CodecError {
    fn eq(&self, other: &Self) -> bool {
        // All fields stand in the text.
        std::mem::discriminant(self) == std::mem::discriminant(other) && self.to_string() == other.to_string()
    }
}

impl CodecError {
    fn of_flaw(flaw: Flaw, element: usize) -> Self {
        let element = element as u64;
        match flaw {
            Flaw::NotFinite => Self::NotFinite { element },
            Flaw::Scale => Self::Scale { element },
            Flaw::Code => Self::Code { element },
            Flaw::Index => Self::Index { element },
        }
    }
}

impl PayloadHeader {
    /// The header of a payload in `codec` for fragment `fragment` of `plan`, whose digest is `digest`.
    ///
    /// # Panics
    /// If the plan has no such fragment.
    pub fn new(codec: Codec, plan: &FragmentPlan, digest: Digest, fragment: usize, base_version: u64) -> Self {
        Self::of_slices(codec, &plan.fragments[fragment], digest, fragment, base_version)
    }

    /// The header of a bf16 payload for fragment `fragment` of `plan`, whose digest is `digest`.
    ///
    /// # Panics
    /// If the plan has no such fragment.
    pub fn bf16(plan: &FragmentPlan, digest: Digest, fragment: usize, base_version: u64) -> Self {
        Self::new(Codec::Bf16, plan, digest, fragment, base_version)
    }

    /// The header of a payload for a fragment that consists of `slices`.
    pub fn of_slices(codec: Codec, slices: &[Slice], digest: Digest, fragment: usize, base_version: u64) -> Self {
        let layout = Arc::new(Layout::new(codec.into(), slices));
        Self { plan: digest, fragment: fragment as u32, base_version, codec, layout }
    }

    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Elements of the fragment.
    pub fn elements(&self) -> u64 {
        self.layout.elements as u64
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The header as it stands in the file.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..40].copy_from_slice(&self.plan.0);
        bytes[40..44].copy_from_slice(&self.fragment.to_le_bytes());
        bytes[44..48].copy_from_slice(&(self.codec as u32).to_le_bytes());
        bytes[48..56].copy_from_slice(&self.base_version.to_le_bytes());
        bytes[56..].copy_from_slice(&self.elements().to_le_bytes());
        bytes
    }

    /// Exact length of the payload in bytes.
    pub fn payload_bytes(&self) -> u64 {
        (HEADER_BYTES + self.layout.bytes) as u64
    }
}

/// Exact length in bytes of every bf16 payload for fragment `fragment` of `plan`.
pub fn payload_bytes(plan: &FragmentPlan, fragment: usize) -> u64 {
    HEADER_BYTES as u64 + plan.elements(fragment) * DType::Bf16.bytes()
}

/// Encodes `values` (the fragment's elements in slice order). Refuses values that are not finite after rounding.
pub fn encode(header: &PayloadHeader, values: &[f32]) -> Result<Vec<u8>, CodecError> {
    let mut bytes = vec![0; HEADER_BYTES + header.layout.bytes];
    encode_into(header, values, &mut bytes)?;
    Ok(bytes)
}

/// [`encode`] into a buffer of exactly [`PayloadHeader::payload_bytes`]. After an error its content means nothing.
pub fn encode_into(header: &PayloadHeader, values: &[f32], out: &mut [u8]) -> Result<(), CodecError> {
    if values.len() as u64 != header.elements() {
        return Err(CodecError::Values { got: values.len() as u64, expected: header.elements() });
    }
    if out.len() as u64 != header.payload_bytes() {
        return Err(CodecError::Length { got: out.len() as u64, expected: header.payload_bytes() });
    }
    let (start, body) = out.split_at_mut(HEADER_BYTES);
    start.copy_from_slice(&header.to_bytes());
    encode_body(&header.layout, values, body)
}

/// Encodes a body; lengths are those of the layout.
pub(crate) fn encode_body(layout: &Layout, values: &[f32], body: &mut [u8]) -> Result<(), CodecError> {
    let spans = layout.spans();
    let pieces = cut_mut(body, spans.iter().map(|span| layout.body_range(*span).len()));
    let tasks: Vec<(&Span, &mut [u8])> = spans.iter().zip(pieces).collect();
    let flaws: Vec<Option<usize>> = tasks
        .into_par_iter()
        .map(|(span, bytes)| {
            let values = &values[layout.element_range(*span)];
            let tiles = cut_mut(bytes, layout.tiles(*span).map(|tile| layout.body_range(tile).len()));
            let pieces = values.chunks(layout.encoding.codec().tile_elements()).zip(tiles);
            for (tile, (values, bytes)) in pieces.enumerate() {
                if let Err(element) = layout.encoding.codec().encode(values, bytes) {
                    return Some(layout.element_range(*span).start + tile * layout.encoding.codec().tile_elements() + element);
                }
            }
            None
        })
        .collect();
    match flaws.into_iter().flatten().next() {
        Some(element) => Err(CodecError::NotFinite { element: element as u64 }),
        None => Ok(()),
    }
}

/// Decodes a payload whose header must be `expected`: exact length, equal header, sane body.
pub fn decode(bytes: &[u8], expected: &PayloadHeader) -> Result<Vec<f32>, CodecError> {
    // Before anything is allocated.
    check_length(bytes.len() as u64, expected)?;
    let mut values = zeros(expected.layout.elements);
    decode_into(bytes, expected, &mut values)?;
    Ok(values)
}

/// [`decode`] into a buffer of exactly [`PayloadHeader::elements`]. After an error its content means nothing.
pub fn decode_into(bytes: &[u8], expected: &PayloadHeader, out: &mut [f32]) -> Result<(), CodecError> {
    check_length(bytes.len() as u64, expected)?;
    if out.len() as u64 != expected.elements() {
        return Err(CodecError::Values { got: out.len() as u64, expected: expected.elements() });
    }
    let (header, body) = bytes.split_at(HEADER_BYTES);
    check_header(header, expected)?;
    decode_body(&expected.layout, body, out)
}

/// Checks and decodes a body; lengths are those of the layout.
pub(crate) fn decode_body(layout: &Layout, body: &[u8], out: &mut [f32]) -> Result<(), CodecError> {
    let spans = layout.spans();
    let pieces = cut_mut(out, spans.iter().map(Span::elements));
    let tasks: Vec<(&Span, &mut [f32])> = spans.iter().zip(pieces).collect();
    let results: Vec<Result<(), CodecError>> = tasks
        .into_par_iter()
        .map(|(span, out)| {
            for (tile, out) in layout.tiles(*span).zip(out.chunks_mut(layout.encoding.codec().tile_elements())) {
                let tile_bytes = &body[layout.body_range(tile)];
                check_tile(layout, tile, tile_bytes)?;
                layout.encoding.codec().decode(tile_bytes, out);
            }
            Ok(())
        })
        .collect();
    results.into_iter().collect()
}

/// Checks header and body without decoding it into memory; reads the source once, from the front to the back.
pub fn check(payload: &dyn Source, expected: &PayloadHeader) -> Result<(), CodecError> {
    check_while(payload, expected, |_| {})
}

/// [`check`], showing `witness` every byte of the payload in order.
pub(crate) fn check_while(payload: &dyn Source, expected: &PayloadHeader, mut witness: impl FnMut(&[u8])) -> Result<(), CodecError> {
    check_length(payload.length(), expected)?;
    let mut scratch = Vec::new();
    let header = payload.read(0, HEADER_BYTES, &mut scratch)?;
    witness(header);
    let mut result = check_header(header, expected);
    let layout = expected.layout();
    for span in layout.spans() {
        let range = layout.body_range(span);
        let bytes = payload.read((HEADER_BYTES + range.start) as u64, range.len(), &mut scratch)?;
        witness(bytes);
        if result.is_ok() {
            let tiles: Vec<Span> = layout.tiles(span).collect();
            let flaws: Vec<Result<(), CodecError>> = tiles
                .into_par_iter()
                .map(|tile| {
                    let place = layout.body_range(tile);
                    check_tile(layout, tile, &bytes[place.start - range.start..place.end - range.start])
                })
                .collect();
            result = flaws.into_iter().collect();
        }
    }
    result
}

pub(crate) fn check_length(got: u64, expected: &PayloadHeader) -> Result<(), CodecError> {
    if got == expected.payload_bytes() { Ok(()) } else { Err(CodecError::Length { got, expected: expected.payload_bytes() }) }
}

pub(crate) fn check_header(header: &[u8], expected: &PayloadHeader) -> Result<(), CodecError> {
    check_header_bytes(header, &expected.to_bytes())
}

pub(crate) fn check_header_bytes(header: &[u8], expected: &[u8]) -> Result<(), CodecError> {
    match header.iter().zip(expected).position(|(got, expected)| got != expected) {
        Some(byte) => Err(CodecError::Header { byte }),
        None => Ok(()),
    }
}

/// Whether the bytes of a tile are what the encoder writes.
pub(crate) fn check_tile(layout: &Layout, tile: Span, bytes: &[u8]) -> Result<(), CodecError> {
    let result = layout.encoding.codec().check(bytes, tile.elements());
    result.map_err(|(element, flaw)| CodecError::of_flaw(flaw, layout.element_range(tile).start + element))
}

#[cfg(test)]
mod tests;
