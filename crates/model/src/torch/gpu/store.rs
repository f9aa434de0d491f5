//! Parameters and optimizer state on a GPU: flat buffers, and the optimizer step over them.
//!
//! ```text
//! [ trained matrices, each from a multiple of 256 | trained vectors, each from a multiple of 8 | frozen tensors ]
//! ```
//! A master weight is an f32 in two halves, the bf16 weight that the model computes with and the 16 bits behind it
//! (`adamw.cu`). Moments exist for the trained part only: f32, or 8 bits each. The lower halves and the moments are used once a step,
//! and may lie in the host's memory: the optimizer's kernel then reads and writes them over the bus, both ways at once.

mod buffer;
mod moments;
mod step;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use tch::{Kind, Tensor};

pub(crate) use self::buffer::to_slice;
use self::buffer::{Buffer, aligned, copy_blocks};
use self::moments::{MOMENT_BLOCK, Moments};
pub(crate) use self::step::Gradients;
use self::step::Spans;
use super::driver::{Argument, Event, Stream};
use super::kernels::Kernels;
use super::pinned::Pinned;
use crate::torch::layout::{Block, Layout};
use crate::torch::ops::Result;
use crate::torch::trainer::MomentType;

/// Vectors begin at multiples of this: kernels read 16 bytes at a time.
const VECTOR_ALIGNMENT: i64 = 8;
/// Most blocks of a copy beside the computation: enough to fill the bus, few enough to leave the multiprocessors to the computation.
const SIDE_BLOCKS: i64 = 32;
/// Elements that go between host and device at a time.
const PIECE: usize = 1 << 24;

/// Where a block of the layout lies in the buffers.
#[derive(Clone, Debug)]
struct Spot {
    /// First element in the layout, which has no gaps.
    compact: usize,
    /// First element here.
    start: i64,
    elements: i64,
}

/// The buffers of one model.
pub(crate) struct Store {
    weights: Tensor,
    rests: Buffer,
    moments: Option<Moments>,
    /// By first element in the layout.
    spots: Vec<Spot>,
    /// Trained matrices: key, range here.
    matrices: Vec<(String, Range<i64>)>,
    /// The trained vectors' range here, and each one's place in it.
    vectors: Range<i64>,
    vector_places: HashMap<String, Range<i64>>,
    /// Each block as a tensor that shares memory with `weights`.
    views: HashMap<String, Tensor>,
    spans: Spans,
    /// Copies of weights under way beside the computation: nothing may be overwritten before they are done.
    readers: Vec<Arc<Event>>,
}

impl Store {
    /// Buffers for `layout`, all zero. With `moments`, for training; `on_host`: all but the bf16 weights in the host's memory.
    pub fn new(kernels: &Kernels, layout: &Layout, moments: Option<MomentType>, on_host: bool) -> Result<Self> {
        let is_vector = |block: &Block| block.shape.len() == 1;
        let mut compact = 0;
        let spots_in_order: Vec<(usize, &Block)> = layout
            .blocks
            .iter()
            .map(|block| {
                let at = compact;
                compact += block.elements() as usize;
                (at, block)
            })
            .collect();
        let (mut end, mut spots, mut matrices) = (0, Vec::new(), Vec::new());
        let (mut vectors, mut vector_places) = (0..0, HashMap::new());
        let mut trained_end = 0;
        let kind = |block: &Block| match (block.trained, is_vector(block)) {
            (true, false) => 0,
            (true, true) => 1,
            (false, _) => 2,
        };
        let mut views_at = Vec::new();
        for part in 0..3 {
            end = aligned(end, MOMENT_BLOCK);
            let begin = end;
            for (compact, block) in spots_in_order.iter().filter(|(_, block)| kind(block) == part) {
                end = aligned(end, if part == 1 { VECTOR_ALIGNMENT } else { MOMENT_BLOCK });
                let elements = block.elements();
                spots.push(Spot { compact: *compact, start: end, elements });
                views_at.push((block.key.clone(), end, block.shape.clone()));
                match part {
                    0 => matrices.push((block.key.clone(), end..end + elements)),
                    1 => {
                        vector_places.insert(block.key.clone(), end - begin..end - begin + elements);
                    }
                    _ => {}
                }
                end += elements;
            }
            if part == 1 {
                vectors = begin..end;
                trained_end = aligned(end, MOMENT_BLOCK);
            }
        }
        let total = aligned(end, MOMENT_BLOCK);
        spots.sort_by_key(|spot| spot.compact);
        let weights = Tensor::f_zeros([total], (Kind::BFloat16, kernels.device))?;
        let moments = moments.map(|kind| Moments::zeros(kernels, trained_end, kind, on_host)).transpose()?;
        let view = |(key, start, shape): (String, i64, Vec<i64>)| -> Result<(String, Tensor)> {
            let elements: i64 = shape.iter().product();
            Ok((key, weights.f_narrow(0, start, elements)?.f_reshape(&shape)?))
        };
        let views = views_at.into_iter().map(view).collect::<Result<_>>()?;
        let spans = Spans::new(kernels, matrices.len() + 1)?;
        Ok(Self {
            rests: Buffer::zeros(kernels, total, Kind::Int16, on_host)?,
            weights,
            moments,
            spots,
            matrices,
            vectors,
            vector_places,
            views,
            spans,
            readers: Vec::new(),
        })
    }

    /// A block of the layout in bf16.
    pub fn weight(&self, key: &str) -> Result<&Tensor> {
        self.views.get(key).ok_or_else(|| tch::TchError::Kind(format!("the layout has no block {key}")))
    }

    /// The pieces of a range of the layout as ranges here, with their offset in it.
    fn pieces(&self, range: &Range<usize>) -> Vec<(usize, Range<i64>)> {
        let first = self.spots.partition_point(|spot| spot.compact + spot.elements as usize <= range.start);
        let mut pieces = Vec::new();
        for spot in self.spots[first..].iter().take_while(|spot| spot.compact < range.end) {
            let mut from = range.start.max(spot.compact);
            let end = range.end.min(spot.compact + spot.elements as usize);
            while from < end {
                let to = end.min(from + PIECE);
                let start = spot.start + (from - spot.compact) as i64;
                pieces.push((from - range.start, start..start + (to - from) as i64));
                from = to;
            }
        }
        pieces
    }

    /// Lets what is put in the null stream from now on wait for copies that are under way beside it.
    fn hold_for_readers(&mut self) -> Result<()> {
        self.readers.drain(..).try_for_each(|event| event.hold(Stream::NULL)).map_err(tch::TchError::Torch)
    }

    /// Master weights of ranges, one after the other, in memory that the device writes.
    pub fn read(&self, kernels: &Kernels, ranges: &[Range<usize>]) -> Result<Pinned> {
        let pinned = kernels.pool.take(&kernels.gpu, ranges.iter().map(Range::len).sum()).map_err(tch::TchError::Torch)?;
        let mut begin = 0;
        for range in ranges {
            for (at, piece) in self.pieces(range) {
                let (elements, to) = (piece.end - piece.start, Argument::address(pinned.address(begin + at)));
                let arguments = [Argument::at(&self.weights, piece.start), self.rests.at(piece.start), to, elements.into()];
                kernels.launch("join_values", copy_blocks(elements), 256u32, &arguments)?;
            }
            begin += range.len();
        }
        pinned.used_by(&kernels.gpu, Stream::NULL).map_err(tch::TchError::Torch)?;
        Ok(pinned)
    }

    /// Begins to copy master weights of ranges to the host, beside whatever the device computes next; the optimizer waits for it.
    pub fn contribute(&mut self, kernels: &Kernels, ranges: &[Range<usize>]) -> std::result::Result<Pinned, String> {
        let pinned = kernels.pool.take(&kernels.gpu, ranges.iter().map(Range::len).sum())?;
        // The weights are those of the last step, which may not be over.
        Event::record(&kernels.gpu, Stream::NULL)?.hold(kernels.side)?;
        let mut begin = 0;
        for range in ranges {
            for (at, piece) in self.pieces(range) {
                let (elements, to) = (piece.end - piece.start, Argument::address(pinned.address(begin + at)));
                let arguments = [Argument::at(&self.weights, piece.start), self.rests.at(piece.start), to, elements.into()];
                let blocks = copy_blocks(elements).min(SIDE_BLOCKS);
                kernels.launch_in(kernels.side, "join_values", blocks, 256u32, &arguments).map_err(|error| error.to_string())?;
            }
            begin += range.len();
        }
        self.readers.push(pinned.used_by(&kernels.gpu, kernels.side)?);
        Ok(pinned)
    }

    /// Overwrites master weights of ranges with `version`, plus what they changed since they were `exported`, if they were.
    pub fn carry(
        &mut self,
        kernels: &Kernels,
        ranges: &[Range<usize>],
        version: &Pinned,
        exported: Option<&Pinned>,
    ) -> std::result::Result<(), String> {
        self.hold_for_readers().map_err(|error| error.to_string())?;
        let mut begin = 0;
        for range in ranges {
            for (at, piece) in self.pieces(range) {
                let (elements, at) = (piece.end - piece.start, begin + at);
                let of = |values: &Pinned| Argument::address(values.address(at));
                let exported = exported.map_or(Argument::NULL, of);
                self.write_values(kernels, of(version), exported, piece.start, elements).map_err(|error| error.to_string())?;
            }
            begin += range.len();
        }
        for pinned in [Some(version), exported].into_iter().flatten() {
            pinned.used_by(&kernels.gpu, Stream::NULL)?;
        }
        Ok(())
    }

    fn write_values(&self, kernels: &Kernels, values: Argument, exported: Argument, start: i64, elements: i64) -> Result<()> {
        let arguments = [values, exported, Argument::at(&self.weights, start), self.rests.at(start), elements.into()];
        kernels.launch("split_values", copy_blocks(elements), 256u32, &arguments)
    }

    /// Overwrites master weights.
    pub fn write(&mut self, kernels: &Kernels, range: &Range<usize>, values: &[f32]) -> Result<()> {
        self.hold_for_readers()?;
        for (at, piece) in self.pieces(range) {
            let elements = piece.end - piece.start;
            let part = Tensor::f_from_slice(&values[at..at + elements as usize])?.f_to_device(kernels.device)?;
            self.write_values(kernels, (&part).into(), Argument::NULL, piece.start, elements)?;
        }
        Ok(())
    }
}
