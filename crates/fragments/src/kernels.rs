//! The inner loops of sums over contributions, for each form in which elements lie in memory.
//!
//! Sums are in f64, with multiplications fused into additions ([`f64::mul_add`]: rounded once, the same on every processor). Dot
//! products have [`LANES`] interleaved partial sums, added in order, then what is left over.

use crate::simd::vectorised;

/// Independent partial sums. A fixed number, so that compilers can use vector instructions without changing the order.
const LANES: usize = 16;

/// An element as it lies in memory.
pub(crate) trait Element: Copy + Sync {
    fn value(self) -> f32;

    /// Σ v². Not finite exactly if an element is not: no square of an f32 overflows an f64.
    fn squares(values: &[Self]) -> f64;

    /// `sums[j] += factor · values[j]`.
    fn add(sums: &mut [f64], values: &[Self], factor: f64);

    /// Four times [`Element::add`], in order, with one way through the sums. All lengths are equal.
    fn add_4(sums: &mut [f64], values: [&[Self]; 4], factors: [f64; 4]);

    /// Dot product with the sums.
    fn dot(values: &[Self], sums: &[f64]) -> f64;

    /// Four times [`Element::dot`], with one way through the sums. All lengths are equal.
    fn dot_4(values: [&[Self]; 4], sums: &[f64]) -> [f64; 4];

    /// `sums[j] += ±values[j]`, the sign of value j from bit (first + j) of the words.
    fn add_signed(sums: &mut [f32], values: &[Self], words: &[u64], first: usize);
}

macro_rules! element {
    ($module:ident, $type:ty, |$element:ident| $value:expr) => {
        mod $module {
            use super::*;

            vectorised! {
                pub(super) fn squares(values: &[$type]) -> f64 {
                    reduce(values, values, |left, right, sum| f64::from(left.value()).mul_add(f64::from(right.value()), sum))
                }
            }
            vectorised! {
                pub(super) fn add(sums: &mut [f64], values: &[$type], factor: f64) {
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = factor.mul_add(f64::from(value.value()), *sum);
                    }
                }
            }
            vectorised! {
                pub(super) fn add_4(sums: &mut [f64], values: [&[$type]; 4], factors: [f64; 4]) {
                    let [first, second, third, fourth] = values;
                    for ((((sum, first), second), third), fourth) in sums.iter_mut().zip(first).zip(second).zip(third).zip(fourth) {
                        let mut total = *sum;
                        total = factors[0].mul_add(f64::from(first.value()), total);
                        total = factors[1].mul_add(f64::from(second.value()), total);
                        total = factors[2].mul_add(f64::from(third.value()), total);
                        total = factors[3].mul_add(f64::from(fourth.value()), total);
                        *sum = total;
                    }
                }
            }
            vectorised! {
                pub(super) fn dot(values: &[$type], sums: &[f64]) -> f64 {
                    reduce(values, sums, |value, sum, total| f64::from(value.value()).mul_add(sum, total))
                }
            }
            vectorised! {
                pub(super) fn dot_4(values: [&[$type]; 4], sums: &[f64]) -> [f64; 4] {
                    let mut lanes = [[0.0; LANES]; 4];
                    let (blocks, rest) = sums.as_chunks::<LANES>();
                    let parts = values.map(|values| &values[..sums.len()]);
                    let cut = parts.map(|values| values.as_chunks::<LANES>());
                    for (number, sums) in blocks.iter().enumerate() {
                        for (lanes, (values, _)) in lanes.iter_mut().zip(&cut) {
                            let values = &values[number];
                            for lane in 0..LANES {
                                lanes[lane] = f64::from(values[lane].value()).mul_add(sums[lane], lanes[lane]);
                            }
                        }
                    }
                    let mut totals = [0.0; 4];
                    for ((total, lanes), (_, values)) in totals.iter_mut().zip(&lanes).zip(&cut) {
                        for lane in lanes {
                            *total += lane;
                        }
                        for (value, sum) in values.iter().zip(rest) {
                            *total = f64::from(value.value()).mul_add(*sum, *total);
                        }
                    }
                    totals
                }
            }
            vectorised! {
                pub(super) fn add_signed(sums: &mut [f32], values: &[$type], words: &[u64], first: usize) {
                    let mut at = 0;
                    while at < values.len() {
                        // To the end of a half word, so that whole ones are alike for the compiler.
                        let (half, bit) = ((first + at) / 32, (first + at) % 32);
                        let count = (32 - bit).min(values.len() - at);
                        let word = ((words[half / 2] >> (32 * (half % 2))) as u32) >> bit;
                        let (sums, values) = (&mut sums[at..at + count], &values[at..at + count]);
                        for (lane, (sum, value)) in sums.iter_mut().zip(values).enumerate() {
                            *sum += f32::from_bits(value.value().to_bits() ^ ((word >> lane) & 1) << 31);
                        }
                        at += count;
                    }
                }
            }
        }

        impl Element for $type {
            #[inline(always)]
            fn value(self) -> f32 {
                let $element = self;
                $value
            }

            fn squares(values: &[Self]) -> f64 {
                $module::squares(values)
            }

            fn add(sums: &mut [f64], values: &[Self], factor: f64) {
                $module::add(sums, values, factor);
            }

            fn add_4(sums: &mut [f64], values: [&[Self]; 4], factors: [f64; 4]) {
                $module::add_4(sums, values, factors);
            }

            fn dot(values: &[Self], sums: &[f64]) -> f64 {
                $module::dot(values, sums)
            }

            fn dot_4(values: [&[Self]; 4], sums: &[f64]) -> [f64; 4] {
                $module::dot_4(values, sums)
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
    use crate::simd::with_each_level;

    #[test]
    fn four_at_a_time_is_one_after_the_other_on_every_instruction_set() {
        for count in [1, 15, 16, 1000, 1024] {
            let values: Vec<Vec<f32>> = (1..5).map(|seed| fixture::values(seed, count)).collect();
            let start: Vec<f64> = fixture::values(9, count).into_iter().map(f64::from).collect();
            let factors = [0.3, -1.7, 1e-9, 4.0];
            let of = |number: usize| values[number].as_slice();
            let mut expected = start.clone();
            (0..4).for_each(|number| f32::add(&mut expected, of(number), factors[number]));
            let products = [0, 1, 2, 3].map(|number| f32::dot(of(number), &expected));
            for (sums, found, squares) in with_each_level(|| {
                let mut sums = start.clone();
                f32::add_4(&mut sums, [of(0), of(1), of(2), of(3)], factors);
                let found = f32::dot_4([of(0), of(1), of(2), of(3)], &sums);
                (sums, found, f32::squares(of(0)))
            }) {
                assert_eq!((sums, found), (expected.clone(), products));
                assert_eq!(squares, f32::squares(of(0)));
            }
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
