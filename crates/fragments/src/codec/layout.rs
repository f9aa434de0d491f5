//! Where each element of a fragment lies in an encoded body.
//!
//! Every merge unit (a slice, or one expert of a fused tensor) begins a new block of its encoding, so that a unit can be
//! read on its own and never shares a scale with another. Within a unit the body is cut at fixed places:
//!
//! | piece | elements | what |
//! |---|---|---|
//! | span | 2^20 | the work of one task |
//! | tile | 2^14 (top-k: 2^18) | what is read from a payload at a time |
//! | block | 1024 (top-k: 4096) | what is summed at a time |
//!
//! The places depend on the plan and the codec alone, never on the number of threads, and with them the order of every sum.

use std::ops::Range;

use protocol::documents::Codec;
use protocol::{MergeRule, Slice};

use super::{TileCodec, dense, int4, top_k};

/// Elements of a task.
pub(crate) const SPAN_ELEMENTS: usize = 1 << 20;

/// How elements are written: the codecs, and plain f32 for values that are already in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    F32,
    Bf16,
    Int4,
    TopK,
}

impl From<Codec> for Encoding {
    fn from(codec: Codec) -> Self {
        match codec {
            Codec::Bf16 => Self::Bf16,
            Codec::Int4 => Self::Int4,
            Codec::TopK => Self::TopK,
        }
    }
}

impl Encoding {
    pub(crate) fn codec(self) -> &'static dyn TileCodec {
        match self {
            Self::F32 => &dense::F32,
            Self::Bf16 => &dense::Bf16,
            Self::Int4 => &int4::Int4,
            Self::TopK => &top_k::TopK,
        }
    }
}

/// A merge unit: a range of the flat fragment buffer, and where its body begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    pub start: usize,
    pub end: usize,
    pub rule: MergeRule,
    /// Byte offset in the body.
    pub offset: usize,
}

impl Unit {
    pub(crate) fn elements(&self) -> usize {
        self.end - self.start
    }
}

/// A part of one unit: elements `start..end` counted from the unit's first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub unit: usize,
    pub start: usize,
    pub end: usize,
}

impl Span {
    pub(crate) fn elements(&self) -> usize {
        self.end - self.start
    }
}

/// The places of all elements of one fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub encoding: Encoding,
    /// In the order of the elements, which is that of the body.
    pub units: Vec<Unit>,
    /// Of the fragment.
    pub elements: usize,
    /// Of the body.
    pub bytes: usize,
}

impl Layout {
    /// Whether every element lies at the same place, whatever the rules by which units are merged.
    pub(crate) fn has_places_of(&self, other: &Self) -> bool {
        let place = |unit: &Unit| (unit.start, unit.end, unit.offset);
        (self.encoding, self.elements, self.bytes) == (other.encoding, other.elements, other.bytes)
            && self.units.iter().map(place).eq(other.units.iter().map(place))
    }

    /// The layout of `slices`, which are those of a checked plan. (A slice whose rows are not whole units, which no checked
    /// plan holds, counts as one unit.)
    pub(crate) fn new(encoding: Encoding, slices: &[Slice]) -> Self {
        let mut layout = Self { encoding, units: Vec::new(), elements: 0, bytes: 0 };
        for slice in slices {
            let rows = slice.row_end.saturating_sub(slice.row_start);
            let whole = slice.unit_rows > 0 && rows.is_multiple_of(slice.unit_rows);
            let unit_rows = if whole { slice.unit_rows } else { rows };
            let elements = unit_rows.saturating_mul(slice.row_elements) as usize;
            for _ in 0..rows.checked_div(unit_rows).unwrap_or(0) {
                let (start, offset) = (layout.elements, layout.bytes);
                layout.elements += elements;
                layout.bytes += encoding.codec().bytes(elements);
                layout.units.push(Unit { start, end: layout.elements, rule: slice.rule, offset });
            }
        }
        layout
    }

    /// The tasks, in the order of the elements.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let of_unit = |(unit, place): (usize, &Unit)| {
            let elements = place.elements();
            (0..elements).step_by(SPAN_ELEMENTS).map(move |start| Span { unit, start, end: (start + SPAN_ELEMENTS).min(elements) })
        };
        self.units.iter().enumerate().flat_map(of_unit).collect()
    }

    /// The tiles of a span, in order.
    pub(crate) fn tiles(&self, span: Span) -> impl Iterator<Item = Span> + use<> {
        let step = self.encoding.codec().tile_elements();
        (span.start..span.end).step_by(step).map(move |start| Span { start, end: (start + step).min(span.end), ..span })
    }

    /// The bytes of a span or tile in the body.
    pub(crate) fn body_range(&self, span: Span) -> Range<usize> {
        let unit = &self.units[span.unit];
        let end = if span.end == unit.elements() {
            self.encoding.codec().bytes(span.end)
        } else {
            self.encoding.codec().bytes(span.start) + self.encoding.codec().bytes(span.elements())
        };
        unit.offset + self.encoding.codec().bytes(span.start)..unit.offset + end
    }

    /// The elements of a span or tile in the flat fragment buffer.
    pub(crate) fn element_range(&self, span: Span) -> Range<usize> {
        let start = self.units[span.unit].start;
        start + span.start..start + span.end
    }
}

/// Cuts `buffer` into one piece for each of `lengths`, in order.
pub(crate) fn cut_mut<T>(mut buffer: &mut [T], lengths: impl Iterator<Item = usize>) -> Vec<&mut [T]> {
    lengths
        .map(|length| {
            let (piece, rest) = std::mem::take(&mut buffer).split_at_mut(length);
            buffer = rest;
            piece
        })
        .collect()
}
