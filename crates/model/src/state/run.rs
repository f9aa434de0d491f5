//! Moments of neighbouring elements, in f32 or in 8 bits.

/// Elements that share the scales of their 8-bit moments.
const MOMENT_BLOCK: usize = 256;
/// Bits of mantissa of the codes of both moments.
pub(super) const FIRST_MANTISSA: u32 = 3;
const SECOND_MANTISSA: u32 = 4;

/// Moments of neighbouring elements.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Run {
    Zero(usize),
    Floats {
        first: Vec<f32>,
        second: Vec<f32>,
    },
    /// In blocks of 256 with a scale for each moment; the first element is number `phase` of its block. A code of the first moment has a
    /// sign, 4 bits of exponent and 3 of mantissa, one of the second, which is the square of what is coded, 4 and 4.
    Bytes {
        phase: usize,
        scales: [Vec<f32>; 2],
        codes: [Vec<u8>; 2],
    },
}

/// Blocks that so many elements lie in, the first of which is number `phase` of its block.
pub(super) fn blocks(phase: usize, count: usize) -> usize {
    (phase + count).div_ceil(MOMENT_BLOCK)
}

/// What a code without sign means, in units of the scale.
pub(super) fn code_value(mantissa_bits: u32, code: u32) -> f32 {
    let (exponent, mantissa) = (code >> mantissa_bits, code & ((1 << mantissa_bits) - 1));
    if exponent == 0 { mantissa as f32 } else { (((1 << mantissa_bits) + mantissa) << (exponent - 1)) as f32 }
}

impl Run {
    pub fn len(&self) -> usize {
        match self {
            Self::Zero(count) => *count,
            Self::Floats { first, .. } => first.len(),
            Self::Bytes { codes, .. } => codes[0].len(),
        }
    }

    /// The first `count` elements and the rest.
    #[cfg(any(test, feature = "libtorch"))]
    pub fn split(self, count: usize) -> (Self, Self) {
        match self {
            Self::Zero(all) => (Self::Zero(count), Self::Zero(all - count)),
            Self::Floats { mut first, mut second } => {
                let rest = Self::Floats { first: first.split_off(count), second: second.split_off(count) };
                (Self::Floats { first, second }, rest)
            }
            Self::Bytes { phase, scales, mut codes } => {
                let (end, begin) = (blocks(phase, count), (phase + count) / MOMENT_BLOCK);
                let rest = Self::Bytes {
                    phase: (phase + count) % MOMENT_BLOCK,
                    scales: scales.each_ref().map(|scales| scales[begin..].to_vec()),
                    codes: codes.each_mut().map(|codes| codes.split_off(count)),
                };
                (Self::Bytes { phase, scales: scales.map(|scales| scales[..end].to_vec()), codes }, rest)
            }
        }
    }

    /// Both moments as numbers: the same that the device decodes.
    pub fn decode(&self) -> (Vec<f32>, Vec<f32>) {
        match self {
            Self::Zero(count) => (vec![0.0; *count], vec![0.0; *count]),
            Self::Floats { first, second } => (first.clone(), second.clone()),
            Self::Bytes { phase, scales, codes } => {
                let scale = |which: usize, n: usize| scales[which][(phase + n) / MOMENT_BLOCK];
                let first = codes[0].iter().enumerate().map(|(n, code)| {
                    let value = code_value(FIRST_MANTISSA, u32::from(code & 127)) * scale(0, n);
                    if code & 128 == 0 { value } else { -value }
                });
                let second = codes[1].iter().enumerate().map(|(n, code)| {
                    let root = code_value(SECOND_MANTISSA, u32::from(*code)) * scale(1, n);
                    root * root
                });
                (first.collect(), second.collect())
            }
        }
    }

    pub fn is_finite(&self) -> bool {
        let all = |values: &[f32]| values.iter().all(|value| value.is_finite());
        match self {
            Self::Zero(_) => true,
            Self::Floats { first, second } => all(first) && all(second),
            // No code is infinite, but a large scale makes one.
            Self::Bytes { scales, .. } => scales.iter().flatten().all(|scale| (0.0..1e12).contains(scale)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_mean_what_the_device_takes_them_for() {
        assert_eq!((code_value(3, 127), code_value(4, 255)), (245_760.0, 507_904.0));
        assert_eq!((code_value(3, 7), code_value(3, 8), code_value(3, 15), code_value(3, 16)), (7.0, 8.0, 15.0, 16.0));
    }
}
