//! The inner loops of sums over contributions, for each form in which elements lie in memory.
//!
//! What decides about the merged values (sums over contributions, norms) is in f64, with multiplications fused into additions
//! ([`f64::mul_add`]: rounded once, the same on every processor) and [`LANES`] interleaved partial sums, added in order, then what is left
//! over. Products of contributions with a sum, of which only a cosine in parts per million remains, have f32 partial sums of at most a
//! block: [`PRODUCT_LANES`] interleaved ones, widened and then added in halves. On AVX-512 the two loops that take most of the time are
//! written out in [`crate::wide`].

use crate::simd::vectorised;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Level, level};

/// Independent partial sums in f64. A fixed number, so that compilers can use vector instructions without changing the order.
const LANES: usize = 16;

/// Independent partial sums in f32.
pub(crate) const PRODUCT_LANES: usize = 32;

/// An element as it lies in memory.
pub(crate) trait Element: Copy + Sync {
    fn value(self) -> f32;

    /// Σ v², block by block of `block` elements. Not finite exactly if an element is not: no square of an f32 overflows an f64.
    fn squares(values: &[Self], block: usize) -> f64;

    /// `sums[j]` = Σ factor · values[j] over the members, in order. All lengths are equal.
    fn add_all(sums: &mut [f64], members: &[&[Self]], factors: &[f64]);

    /// Adds `unit` times the dot product of each member with `sums` to its product. All lengths are equal, and at most a block.
    fn dots(members: &[&[Self]], sums: &[f32], unit: f64, products: &mut [f64]);

    /// `sums[j] += ±values[j]`, the sign of value j from bit (first + j) of the words.
    fn add_signed(sums: &mut [f32], values: &[Self], words: &[u64], first: usize);
}

macro_rules! element {
    ($module:ident, $type:ty, |$element:ident| $value:expr) => {
        mod $module {
            use super::*;

            vectorised! {
                pub(super) fn squares(values: &[$type], block: usize) -> f64 {
                    let square = |left: $type, right: $type, sum: f64| f64::from(left.value()).mul_add(f64::from(right.value()), sum);
                    values.chunks(block).fold(0.0, |sum, values| sum + reduce(values, values, square))
                }
            }
            vectorised! {
                pub(super) fn add_all(sums: &mut [f64], members: &[&[$type]], factors: &[f64]) {
                    sums.fill(0.0);
                    let (fours, rest) = members.as_chunks::<4>();
                    let (factors, factors_of_rest) = factors.as_chunks::<4>();
                    for ([first, second, third, fourth], factors) in fours.iter().zip(factors) {
                        for ((((sum, first), second), third), fourth) in sums.iter_mut().zip(*first).zip(*second).zip(*third).zip(*fourth) {
                            let mut total = *sum;
                            total = factors[0].mul_add(f64::from(first.value()), total);
                            total = factors[1].mul_add(f64::from(second.value()), total);
                            total = factors[2].mul_add(f64::from(third.value()), total);
                            total = factors[3].mul_add(f64::from(fourth.value()), total);
                            *sum = total;
                        }
                    }
                    for (values, factor) in rest.iter().zip(factors_of_rest) {
                        for (sum, value) in sums.iter_mut().zip(*values) {
                            *sum = factor.mul_add(f64::from(value.value()), *sum);
                        }
                    }
                }
            }
            vectorised! {
                pub(super) fn dots(members: &[&[$type]], sums: &[f32], unit: f64, products: &mut [f64]) {
                    for (values, product) in members.iter().zip(products) {
                        let mut lanes = [0.0f32; PRODUCT_LANES];
                        let (values, rest) = values.as_chunks::<PRODUCT_LANES>();
                        let (sums, rest_of_sums) = sums.as_chunks::<PRODUCT_LANES>();
                        for (values, sums) in values.iter().zip(sums) {
                            for lane in 0..PRODUCT_LANES {
                                lanes[lane] = values[lane].value().mul_add(sums[lane], lanes[lane]);
                            }
                        }
                        let mut total = in_halves(lanes.map(f64::from));
                        for (value, sum) in rest.iter().zip(rest_of_sums) {
                            total = f64::from(value.value()).mul_add(f64::from(*sum), total);
                        }
                        *product += unit * total;
                    }
                }
            }
            vectorised! {
                pub(super) fn add_signed(sums: &mut [f32], values: &[$type], words: &[u64], first: usize) {
                    let mut at = 0;
                    while at < values.len() {
                        // To the end of a half word.
                        let (half, bit) = ((first + at) / 32, (first + at) % 32);
                        let count = (32 - bit).min(values.len() - at);
                        let word = ((words[half / 2] >> (32 * (half % 2))) as u32) >> bit;
                        let (sums, values) = (&mut sums[at..at + count], &values[at..at + count]);
                        // Whole ones are alike for the compiler.
                        match (sums.as_mut_array::<32>(), values.as_array::<32>()) {
                            (Some(sums), Some(values)) => signed(sums, values, word),
                            _ => signed(sums, values, word),
                        }
                        at += count;
                    }
                }
            }

            #[inline(always)]
            fn signed(sums: &mut [f32], values: &[$type], word: u32) {
                for (lane, (sum, value)) in sums.iter_mut().zip(values).enumerate() {
                    *sum += f32::from_bits(value.value().to_bits() ^ ((word >> lane) & 1) << 31);
                }
            }
        }

        impl Element for $type {
            #[inline(always)]
            fn value(self) -> f32 {
                let $element = self;
                $value
            }

            fn squares(values: &[Self], block: usize) -> f64 {
                #[cfg(target_arch = "x86_64")]
                if level() == Level::Avx512 && block.is_multiple_of(PRODUCT_LANES) {
                    // Of one block the processor waits for each addition; of four it has enough to do.
                    let whole = values.len() / (4 * block) * (4 * block);
                    let (fours, rest) = values.split_at(whole);
                    // SAFETY: the processor has what the level says.
                    let add = |sum, values: &[Self]| unsafe { crate::wide::$module::squares_of_four(values, sum) };
                    let sum = fours.chunks(4 * block).fold(0.0, add);
                    return rest.chunks(block).fold(sum, |sum, values| sum + $module::squares(values, block));
                }
                $module::squares(values, block)
            }

            fn add_all(sums: &mut [f64], members: &[&[Self]], factors: &[f64]) {
                #[cfg(target_arch = "x86_64")]
                if level() == Level::Avx512 {
                    // SAFETY: the processor has what the level says.
                    return unsafe { crate::wide::$module::add_all(sums, members, factors) };
                }
                $module::add_all(sums, members, factors);
            }

            fn dots(members: &[&[Self]], sums: &[f32], unit: f64, products: &mut [f64]) {
                #[cfg(target_arch = "x86_64")]
                if level() == Level::Avx512 {
                    // SAFETY: the processor has what the level says.
                    return unsafe { crate::wide::$module::dots(members, sums, unit, products) };
                }
                $module::dots(members, sums, unit, products);
            }

            fn add_signed(sums: &mut [f32], values: &[Self], words: &[u64], first: usize) {
                $module::add_signed(sums, values, words, first);
            }
        }
    };
}

element!(of_f32, f32, |element| element);
element!(of_f32_bytes, [u8; 4], |element| f32::from_le_bytes(element));
element!(of_bf16_bytes, [u8; 2], |element| f32::from_bits(u32::from(u16::from_le_bytes(element)) << 16));

#[inline(always)]
fn reduce<L: Copy, R: Copy>(left: &[L], right: &[R], add_product: impl Fn(L, R, f64) -> f64) -> f64 {
    let mut lanes = [0.0; LANES];
    let ((left, left_rest), (right, right_rest)) = (left.as_chunks::<LANES>(), right.as_chunks::<LANES>());
    for (left, right) in left.iter().zip(right) {
        for lane in 0..LANES {
            lanes[lane] = add_product(left[lane], right[lane], lanes[lane]);
        }
    }
    let mut sum = 0.0;
    for lane in lanes {
        sum += lane;
    }
    for (left, right) in left_rest.iter().zip(right_rest) {
        sum = add_product(*left, *right, sum);
    }
    sum
}

vectorised! {
    /// Sum of squares.
    pub(crate) fn squares_of_sums(sums: &[f64]) -> f64 {
        reduce(sums, sums, f64::mul_add)
    }
}

/// The first half of the lanes plus the second one, until one is left.
#[inline(always)]
fn in_halves(mut lanes: [f64; PRODUCT_LANES]) -> f64 {
    let mut half = PRODUCT_LANES / 2;
    while half > 0 {
        let (left, right) = lanes.split_at_mut(half);
        left.iter_mut().zip(right).for_each(|(left, right)| *left += *right);
        half /= 2;
    }
    lanes[0]
}

vectorised! {
    /// The sums times `factor`, rounded to f32.
    pub(crate) fn narrow_scaled(sums: &[f64], factor: f64, out: &mut [f32]) {
        for (value, sum) in out.iter_mut().zip(sums) {
            *value = (*sum * factor) as f32;
        }
    }
}

vectorised! {
    /// The sums rounded to f32.
    pub(crate) fn narrow(sums: &[f64], out: &mut [f32]) {
        for (value, sum) in out.iter_mut().zip(sums) {
            *value = *sum as f32;
        }
    }
}

vectorised! {
    /// Multiplies in f64 and rounds once; returns the sum of squares of the results, which is not finite if one of them is not.
    pub(crate) fn scale(values: &mut [f32], factor: f64) -> f64 {
        let mut squares = 0.0;
        // In pieces that stay in the innermost cache between the two loops.
        for values in values.chunks_mut(1024) {
            for value in values.iter_mut() {
                *value = (f64::from(*value) * factor) as f32;
            }
            squares += reduce(values, values, |left, right, sum| f64::from(left).mul_add(f64::from(right), sum));
        }
        squares
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;
    use crate::number::round_to_bf16;
    use crate::simd::with_each_level;

    #[test]
    fn sums_and_products_are_the_same_on_every_instruction_set_and_right() {
        for (members, count) in [(1, 1), (3, 31), (4, 32), (5, 33), (9, 100), (16, 1000), (17, 1024)] {
            let values: Vec<Vec<f32>> = (0..members).map(|seed| fixture::values(seed + 1, count)).collect();
            let bf16: Vec<Vec<u8>> = values
                .iter()
                .map(|values| {
                    let mut bytes = vec![0; 2 * count];
                    round_to_bf16(values, &mut bytes);
                    bytes
                })
                .collect();
            let bf16: Vec<&[[u8; 2]]> = bf16.iter().map(|bytes| bytes.as_chunks::<2>().0).collect();
            let singles: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
            let factors: Vec<f64> = (0..members).map(|member| 0.3 - 0.17 * member as f64).collect();
            check(&singles, &factors);
            check(&bf16, &factors);
        }
    }

    fn check<T: Element>(members: &[&[T]], factors: &[f64]) {
        let count = members[0].len();
        let sum =
            |at: usize| members.iter().zip(factors).fold(0.0, |sum, (values, factor)| factor.mul_add(f64::from(values[at].value()), sum));
        let sums: Vec<f64> = (0..count).map(sum).collect();
        let results = with_each_level(|| {
            let (mut found, mut narrow, mut products) = (vec![9.0; count], vec![0.0; count], vec![0.5; members.len()]);
            T::add_all(&mut found, members, factors);
            narrow_scaled(&found, 4.0, &mut narrow);
            T::dots(members, &narrow, 0.25, &mut products);
            (found, products, T::squares(members[0], 32))
        });
        for result in &results {
            assert_eq!((&result.0, result), (&sums, &results[0]));
        }
        for (values, product) in members.iter().zip(&results[0].1) {
            let terms = || values.iter().zip(&sums).map(|(value, sum)| f64::from(value.value()) * sum);
            let (exact, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
            assert!((product - 0.5 - exact).abs() <= 1e-6 * size, "{product} {exact}");
        }
    }

    #[test]
    fn signs_follow_the_bits_wherever_a_piece_begins() {
        let values = fixture::values(1, 300);
        let words: Vec<u64> = (0..8u64).map(|number| 0x0123_4567_89ab_cdef * (number + 3)).collect();
        for (first, count) in [(0, 300), (1, 300), (37, 3), (31, 34), (100, 64)] {
            let mut sums = vec![1.0; count];
            f32::add_signed(&mut sums, &values[..count], &words, first);
            for (index, sum) in sums.iter().enumerate() {
                let bit = words[(first + index) / 64] >> ((first + index) % 64) & 1;
                let expected = 1.0 + if bit == 1 { -values[index] } else { values[index] };
                assert_eq!(*sum, expected, "{index} from {first}");
            }
        }
    }
}
