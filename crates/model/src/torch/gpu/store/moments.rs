//! Moments of the optimizer, in f32 or in 8 bits with scales by block, and their ways into a state and back.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::buffer::{Buffer, aligned, gather, to_slice};
use super::{PIECE, Store};
use crate::state::Run;
use crate::torch::gpu::driver::Argument;
use crate::torch::gpu::kernels::{Kernels, warps};
use crate::torch::ops::Result;
use crate::torch::trainer::MomentType;

/// Elements that share the scales of their 8-bit moments.
pub(super) const MOMENT_BLOCK: i64 = 256;

/// Optimizer moments of the trained part.
pub(super) struct Moments {
    first: Buffer,
    second: Buffer,
    /// Scales of the blocks of 8-bit moments.
    scales: Option<(Tensor, Tensor)>,
}

impl Moments {
    /// For so many elements, whole blocks of them. Scales stay on the GPU.
    pub fn zeros(kernels: &Kernels, elements: i64, kind: MomentType, on_host: bool) -> Result<Self> {
        let (kind, scales) = match kind {
            MomentType::F32 => (Kind::Float, None),
            MomentType::Bytes => {
                let scales = || Tensor::f_zeros([elements / MOMENT_BLOCK], (Kind::Float, kernels.device));
                (Kind::Uint8, Some((scales()?, scales()?)))
            }
        };
        let buffer = || Buffer::zeros(kernels, elements, kind, on_host);
        Ok(Self { first: buffer()?, second: buffer()?, scales })
    }

    pub fn elements(&self) -> i64 {
        self.first.elements()
    }

    /// The element `start`, which begins a block of 8-bit moments, as arguments of a kernel: both moments, then their scales, null for f32.
    pub fn at(&self, start: i64) -> [Argument; 4] {
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

impl Store {
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
