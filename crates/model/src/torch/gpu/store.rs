//! Parameters and optimizer state on a GPU: flat buffers, and the optimizer step over them.
//!
//! ```text
//! [ trained matrices, each from a multiple of 256 | trained vectors, each from a multiple of 8 | frozen tensors ]
//! ```
//! A master weight is an f32 in two halves, the bf16 weight that the model computes with and the 16 bits behind it
//! (`adamw.cu`). Moments exist for the trained part only: f32, or 8 bits each. The lower halves and the moments are used once a step,
//! and may lie in the host's memory: the optimizer's kernel then reads and writes them over the bus, both ways at once.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use tch::{Kind, Tensor};

use super::driver::{Argument, Event, HostMemory, Stream};
use super::kernels::{Kernels, StepSettings, warps};
use super::pinned::Pinned;
use crate::Hyper;
use crate::adamw::bias_corrections;
use crate::host::Held;
use crate::state::Run;
use crate::torch::layout::{Block, Layout};
use crate::torch::ops::Result;
use crate::torch::trainer::MomentType;

/// Elements that share the scales of their 8-bit moments.
const MOMENT_BLOCK: i64 = 256;
/// Vectors begin at multiples of this: kernels read 16 bytes at a time.
const VECTOR_ALIGNMENT: i64 = 8;
/// Blocks of the kernels that walk over a buffer, for each multiprocessor.
const WALKERS: u32 = 8;
const NORM_BLOCKS: i64 = 264;
/// Elements that a block of the copying kernels takes at a time, and the most blocks of a copy beside the computation: enough to fill the
/// bus, few enough to leave the multiprocessors to the computation.
const COPY_ELEMENTS: i64 = 1024;
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

/// A flat buffer: on the GPU, or in the host's memory, where kernels reach it over the bus.
enum Buffer {
    Device(Tensor),
    Host { memory: HostMemory, element_bytes: i64, elements: i64 },
}

impl Buffer {
    fn zeros(kernels: &Kernels, elements: i64, kind: Kind, on_host: bool) -> Result<Self> {
        if !on_host {
            return Ok(Self::Device(Tensor::f_zeros([elements], (kind, kernels.device))?));
        }
        let element_bytes = kind.elt_size_in_bytes() as i64;
        let memory = HostMemory::new(&kernels.gpu, (elements * element_bytes) as usize).map_err(tch::TchError::Torch)?;
        Ok(Self::Host { memory, element_bytes, elements })
    }

    fn elements(&self) -> i64 {
        match self {
            Self::Device(tensor) => tensor.numel() as i64,
            Self::Host { elements, .. } => *elements,
        }
    }

    /// The bytes of pieces, one after the other.
    fn read(&self, kernels: &Kernels, pieces: &[Range<i64>]) -> Result<Vec<u8>> {
        match self {
            Self::Device(tensor) => gather(kernels, tensor, pieces),
            Self::Host { memory, element_bytes, .. } => {
                kernels.gpu.synchronize().map_err(tch::TchError::Torch)?;
                let part = |piece: &Range<i64>| memory.slice((piece.start * element_bytes) as usize..(piece.end * element_bytes) as usize);
                Ok(pieces.iter().flat_map(part).copied().collect())
            }
        }
    }

    /// Overwrites bytes from element `start` on.
    fn write(&mut self, kernels: &Kernels, start: i64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Device(tensor) => tensor.f_narrow(0, start, bytes.len() as i64)?.f_copy_(&Tensor::f_from_slice(bytes)?),
            Self::Host { memory, element_bytes, .. } => {
                kernels.gpu.synchronize().map_err(tch::TchError::Torch)?;
                let start = (start * *element_bytes) as usize;
                memory.slice_mut(start..start + bytes.len()).copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// The element `offset` as a kernel's argument.
    fn at(&self, offset: i64) -> Argument {
        match self {
            Self::Device(tensor) => Argument::at(tensor, offset),
            Self::Host { memory, element_bytes, .. } => Argument::address(memory.address(offset * element_bytes)),
        }
    }
}

/// Optimizer moments of the trained part.
struct Moments {
    first: Buffer,
    second: Buffer,
    /// Scales of the blocks of 8-bit moments.
    scales: Option<(Tensor, Tensor)>,
}

impl Moments {
    /// The element `start`, which begins a block of 8-bit moments, as arguments of a kernel: both moments, then their scales, null for f32.
    fn at(&self, start: i64) -> [Argument; 4] {
        let [first_scales, second_scales] = match &self.scales {
            None => [Argument::NULL; 2],
            Some((first, second)) => [first, second].map(|scales| Argument::at(scales, start / MOMENT_BLOCK)),
        };
        [self.first.at(start), self.second.at(start), first_scales, second_scales]
    }

    /// Moments of `elements` elements from `start` on as f32 (`is_out`), or from f32: between here and two tensors on the device. 8-bit ones
    /// in whole blocks.
    fn exchange(&self, kernels: &Kernels, start: i64, values: [&Tensor; 2], elements: i64, is_out: bool) -> Result<()> {
        let here = self.at(start);
        if self.scales.is_none() {
            for (here, there) in here.into_iter().zip(values) {
                let (from, to) = if is_out { (here, there.into()) } else { (there.into(), here) };
                kernels.launch("copy_values", (elements + 255) / 256, 256u32, &[from, to, elements.into()])?;
            }
            return Ok(());
        }
        debug_assert!(start % MOMENT_BLOCK == 0 && elements % MOMENT_BLOCK == 0);
        let blocks = elements / MOMENT_BLOCK;
        let arguments: Vec<Argument> = here.into_iter().chain(values.map(Argument::from)).chain([blocks.into()]).collect();
        kernels.launch(if is_out { "moments_out" } else { "moments_in" }, warps(blocks), 256u32, &arguments)
    }
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
    /// Copies of weights under way beside the computation: nothing may be overwritten before they are done.
    readers: Vec<Arc<Event>>,
}

/// Bytes that are taken from the front to the back.
struct Bytes {
    bytes: Vec<u8>,
    taken: usize,
}

impl Bytes {
    fn of(bytes: Vec<u8>) -> Self {
        Self { bytes, taken: 0 }
    }

    fn take(&mut self, count: usize) -> &[u8] {
        self.taken += count;
        &self.bytes[self.taken - count..self.taken]
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        self.take(4 * count).as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
    }
}

/// Bytes of pieces of a buffer, one after the other: one wait for all of them.
fn gather(kernels: &Kernels, from: &Tensor, pieces: &[Range<i64>]) -> Result<Vec<u8>> {
    let width = from.kind().elt_size_in_bytes() as i64;
    let count = pieces.iter().map(|piece| (piece.end - piece.start) * width).sum::<i64>() as usize;
    let pinned = kernels.pool.take(&kernels.gpu, count.div_ceil(4)).map_err(tch::TchError::Torch)?;
    let mut to = pinned.address(0);
    for piece in pieces {
        let bytes = (piece.end - piece.start) * width;
        let arguments = [Argument::at(from, piece.start), Argument::address(to), bytes.into()];
        kernels.launch("copy_bytes", copy_blocks(bytes), 256u32, &arguments)?;
        to += bytes;
    }
    pinned.used_by(&kernels.gpu, Stream::NULL).map_err(tch::TchError::Torch)?;
    let values = pinned.values().map_err(|error| tch::TchError::Torch(error.to_string()))?;
    Ok(bytemuck::cast_slice::<f32, u8>(values)[..count].to_vec())
}

/// Gradients of one step: a tensor for each trained matrix, one f32 buffer for all trained vectors.
pub(crate) struct Gradients {
    pub matrices: HashMap<String, Tensor>,
    pub vectors: Tensor,
    places: HashMap<String, Range<i64>>,
}

impl Gradients {
    /// Adds the gradient of a matrix.
    pub fn matrix(&mut self, key: String, gradient: Tensor) -> Result<()> {
        if let Some(sum) = self.matrices.get_mut(&key) {
            let _ = sum.f_add_(&gradient)?;
        } else {
            self.matrices.insert(key, gradient);
        }
        Ok(())
    }

    /// Adds the gradient `dy^T x` of a matrix by which `x` was multiplied ([`super::engine::Pass::linear`]).
    pub fn linear(&mut self, key: String, dy: &Tensor, x: &Tensor) -> Result<()> {
        if let Some(sum) = self.matrices.get_mut(&key) {
            let _ = sum.f_addmm_(&dy.f_tr()?, x)?;
        } else {
            self.matrices.insert(key, dy.f_tr()?.f_mm(x)?);
        }
        Ok(())
    }

    /// The gradient of a trained vector, f32.
    pub fn of_vector(&self, key: &str) -> Result<Tensor> {
        let place = self.places.get(key).ok_or_else(|| tch::TchError::Kind(format!("{key} has no gradient")))?;
        self.vectors.f_narrow(0, place.start, place.end - place.start)
    }

    /// Adds the gradient of a vector; frozen ones are passed over.
    pub fn vector(&mut self, key: &str, gradient: &Tensor) -> Result<()> {
        let Some(place) = self.places.get(key) else { return Ok(()) };
        let gradient = gradient.f_reshape([-1])?.f_to_kind(Kind::Float)?;
        let _ = self.vectors.f_narrow(0, place.start, place.end - place.start)?.f_add_(&gradient)?;
        Ok(())
    }
}

fn copy_blocks(elements: i64) -> i64 {
    (elements + COPY_ELEMENTS - 1) / COPY_ELEMENTS
}

fn aligned(at: i64, to: i64) -> i64 {
    (at + to - 1) / to * to
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
        let buffer = |elements: i64, kind: Kind| Buffer::zeros(kernels, elements, kind, on_host);
        let scales = || Tensor::f_zeros([trained_end / MOMENT_BLOCK], (Kind::Float, kernels.device));
        let moments = match moments {
            None => None,
            Some(MomentType::F32) => {
                Some(Moments { first: buffer(trained_end, Kind::Float)?, second: buffer(trained_end, Kind::Float)?, scales: None })
            }
            Some(MomentType::Bytes) => Some(Moments {
                first: buffer(trained_end, Kind::Uint8)?,
                second: buffer(trained_end, Kind::Uint8)?,
                scales: Some((scales()?, scales()?)),
            }),
        };
        let view = |(key, start, shape): (String, i64, Vec<i64>)| -> Result<(String, Tensor)> {
            let elements: i64 = shape.iter().product();
            Ok((key, weights.f_narrow(0, start, elements)?.f_reshape(&shape)?))
        };
        let views = views_at.into_iter().map(view).collect::<Result<_>>()?;
        Ok(Self {
            rests: buffer(total, Kind::Int16)?,
            weights,
            moments,
            spots,
            matrices,
            vectors,
            vector_places,
            views,
            readers: Vec::new(),
        })
    }

    /// A block of the layout in bf16.
    pub fn weight(&self, key: &str) -> Result<&Tensor> {
        self.views.get(key).ok_or_else(|| tch::TchError::Kind(format!("the layout has no block {key}")))
    }

    /// All blocks: the parameters as the network in libtorch operations takes them.
    pub fn views(&self) -> &HashMap<String, Tensor> {
        &self.views
    }

    /// Zero gradients for a step.
    pub fn gradients(&self) -> Result<Gradients> {
        let elements = aligned(self.vectors.end - self.vectors.start, MOMENT_BLOCK);
        let vectors = Tensor::f_zeros([elements], (Kind::Float, self.weights.device()))?;
        Ok(Gradients { matrices: HashMap::new(), vectors, places: self.vector_places.clone() })
    }

    /// Weighs the gradient and takes the optimizer step number `step`, if loss and gradient are finite. Returns
    /// `[loss, gradient norm, scale of the gradient, 1 if the step was taken]` f64, on the device. `losses` f32 are summed and scaled.
    pub fn step(
        &mut self,
        kernels: &Kernels,
        gradients: Gradients,
        losses: &Tensor,
        loss_scale: f64,
        hyper: &Hyper,
        step: u64,
    ) -> Result<Tensor> {
        if self.moments.is_none() {
            return Err(tch::TchError::Kind("these weights have no optimizer".into()));
        }
        self.hold_for_readers()?;
        let mut parts: Vec<(&Range<i64>, &Tensor, bool)> = Vec::new();
        for (key, range) in &self.matrices {
            let gradient = gradients.matrices.get(key).ok_or_else(|| tch::TchError::Kind(format!("{key} has no gradient")))?;
            parts.push((range, gradient, false));
        }
        parts.push((&self.vectors, &gradients.vectors, true));

        let partial = kernels.empty(&[parts.len() as i64 * NORM_BLOCKS], Kind::Double)?;
        for (n, (range, gradient, is_wide)) in parts.iter().enumerate() {
            debug_assert!(gradient.is_contiguous() && gradient.numel() as i64 >= range.end - range.start);
            let to = Argument::at(&partial, n as i64 * NORM_BLOCKS);
            let arguments = [(*gradient).into(), i32::from(*is_wide).into(), (range.end - range.start).into(), to];
            kernels.launch("square_sums", NORM_BLOCKS, 256u32, &arguments)?;
        }
        let verdict = kernels.empty(&[4], Kind::Double)?;
        let arguments = [
            (&partial).into(),
            (partial.numel() as i32).into(),
            losses.into(),
            (losses.numel() as i32).into(),
            loss_scale.into(),
            hyper.clip_norm.into(),
            (&verdict).into(),
        ];
        kernels.launch("judge", 1u32, 256u32, &arguments)?;

        let (correction1, correction2) = bias_corrections(hyper, step);
        let settings = StepSettings {
            keep: 1.0,
            beta1: hyper.beta1 as f32,
            beta2: hyper.beta2 as f32,
            step_size: (hyper.lr / correction1) as f32,
            root_factor: correction2.sqrt().recip() as f32,
            eps: hyper.eps as f32,
            step: step as u32,
        };
        let decayed = StepSettings { keep: (1.0 - hyper.lr * hyper.weight_decay) as f32, ..settings };
        let Some(moments) = &self.moments else { return Ok(verdict) };
        for (range, gradient, is_wide) in parts {
            let elements = range.end - range.start;
            let [first, second, first_scales, second_scales] = moments.at(range.start);
            let arguments = [
                Argument::at(&self.weights, range.start),
                self.rests.at(range.start),
                first,
                second,
                first_scales,
                second_scales,
                gradient.into(),
                i32::from(is_wide).into(),
                elements.into(),
                (&verdict).into(),
                if is_wide { settings } else { decayed }.into(),
            ];
            let most = i64::from(WALKERS * kernels.gpu.multiprocessors);
            kernels.launch("adamw", warps(aligned(elements, MOMENT_BLOCK) / MOMENT_BLOCK).min(most), 256u32, &arguments)?;
        }
        Ok(verdict)
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

    /// The end of what has moments.
    fn trained(&self) -> i64 {
        self.moments.as_ref().map_or(0, |moments| moments.first.elements())
    }

    /// First and second moments of the whole layout, zero where there are none.
    pub fn read_moments(&self, kernels: &Kernels, elements: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let (mut first, mut second) = (vec![0f32; elements], vec![0f32; elements]);
        let Some(moments) = &self.moments else { return Ok((first, second)) };
        for (at, piece) in self.pieces(&(0..elements)).into_iter().filter(|(_, piece)| piece.start < self.trained()) {
            // Whole blocks around the piece.
            let begin = piece.start / MOMENT_BLOCK * MOMENT_BLOCK;
            let (around, count) = (aligned(piece.end, MOMENT_BLOCK) - begin, piece.end - piece.start);
            let sides = [kernels.empty(&[around], Kind::Float)?, kernels.empty(&[around], Kind::Float)?];
            moments.exchange(kernels, begin, sides.each_ref(), around, true)?;
            for (side, values) in sides.iter().zip([&mut first, &mut second]) {
                to_slice(&side.f_narrow(0, piece.start - begin, count)?, &mut values[at..at + count as usize])?;
            }
        }
        Ok((first, second))
    }

    /// Moments of ranges of the layout, as they are kept, in runs of neighbours.
    pub fn moments_of(&self, kernels: &Kernels, ranges: &[Range<usize>]) -> Result<Vec<Run>> {
        let pieces: Vec<Range<i64>> = ranges.iter().flat_map(|range| self.pieces(range)).map(|(_, piece)| piece).collect();
        let count = |piece: &Range<i64>| (piece.end - piece.start) as usize;
        let Some(Moments { first, second, scales }) = &self.moments else {
            return Ok(pieces.iter().map(|piece| Run::Zero(count(piece))).collect());
        };
        let is_trained = |piece: &&Range<i64>| piece.start < first.elements();
        let trained: Vec<Range<i64>> = pieces.iter().filter(is_trained).cloned().collect();
        let blocks = |piece: &Range<i64>| piece.start / MOMENT_BLOCK..aligned(piece.end, MOMENT_BLOCK) / MOMENT_BLOCK;
        let blocks_of: Vec<Range<i64>> = trained.iter().map(blocks).collect();
        let [mut first, mut second] = [Bytes::of(first.read(kernels, &trained)?), Bytes::of(second.read(kernels, &trained)?)];
        let mut scales = match scales {
            Some((first, second)) => {
                Some([Bytes::of(gather(kernels, first, &blocks_of)?), Bytes::of(gather(kernels, second, &blocks_of)?)])
            }
            None => None,
        };
        let run = |piece: &Range<i64>| {
            let count = count(piece);
            match &mut scales {
                _ if !is_trained(&piece) => Run::Zero(count),
                None => Run::Floats { first: first.floats(count), second: second.floats(count) },
                Some(scales) => {
                    let blocks = blocks(piece).count();
                    Run::Bytes {
                        phase: (piece.start % MOMENT_BLOCK) as usize,
                        scales: scales.each_mut().map(|scales| scales.floats(blocks)),
                        codes: [first.take(count).to_vec(), second.take(count).to_vec()],
                    }
                }
            }
        };
        Ok(pieces.iter().map(run).collect())
    }

    /// Overwrites moments of a range of the layout, if they are kept in 8 bits here as there and blocks begin at the same elements; frozen
    /// parameters have none.
    pub fn put_moments(&mut self, kernels: &Kernels, range: &Range<usize>, run: &Run) -> Result<bool> {
        let pieces = self.pieces(range);
        let trained = self.trained();
        let Some(Moments { first, second, scales: Some((first_scales, second_scales)) }) = &mut self.moments else { return Ok(false) };
        let mut rest = run.clone();
        for (_, piece) in pieces {
            let (part, left) = rest.split((piece.end - piece.start) as usize);
            rest = left;
            match part {
                Run::Zero(_) if piece.start >= trained => {}
                Run::Bytes { phase, scales, codes } if piece.start < trained && phase as i64 == piece.start % MOMENT_BLOCK => {
                    let [first_codes, second_codes] = codes;
                    first.write(kernels, piece.start, &first_codes)?;
                    second.write(kernels, piece.start, &second_codes)?;
                    for (to, from) in [&*first_scales, &*second_scales].into_iter().zip(&scales) {
                        to.f_narrow(0, piece.start / MOMENT_BLOCK, from.len() as i64)?.f_copy_(&Tensor::f_from_slice(from)?)?;
                    }
                }
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Overwrites all moments. What [`Store::read_moments`] gave comes back bit for bit.
    pub fn write_moments(&mut self, kernels: &Kernels, first: &[f32], second: &[f32]) -> Result<()> {
        let Some(moments) = &self.moments else { return Ok(()) };
        let pieces = self.pieces(&(0..first.len()));
        // Whole blocks at once: vectors share blocks, so everything is laid out on the host first.
        for begin in (0..self.trained()).step_by(PIECE) {
            let end = (begin + PIECE as i64).min(self.trained());
            let mut sides = [vec![0f32; (end - begin) as usize], vec![0f32; (end - begin) as usize]];
            for (at, piece) in &pieces {
                let (from, to) = (piece.start.max(begin), piece.end.min(end));
                if from >= to {
                    continue;
                }
                let source = at + (from - piece.start) as usize..at + (to - piece.start) as usize;
                let target = (from - begin) as usize..(to - begin) as usize;
                sides[0][target.clone()].copy_from_slice(&first[source.clone()]);
                sides[1][target].copy_from_slice(&second[source]);
            }
            let [first, second] = sides.map(|values| Tensor::f_from_slice(&values)?.f_to_device(kernels.device));
            moments.exchange(kernels, begin, [&first?, &second?], end - begin, false)?;
        }
        Ok(())
    }
}

/// Copies a flat f32 tensor to the host.
pub(crate) fn to_slice(x: &Tensor, values: &mut [f32]) -> Result<()> {
    let count = values.len();
    x.f_to_device(tch::Device::Cpu)?.f_contiguous()?.f_copy_data(values, count)
}
