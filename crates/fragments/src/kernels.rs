//! The inner loops of sums over contributions, for each form in which elements lie in memory.
//!
//! All multiplications are fused into additions ([`f32::mul_add`]: rounded once, the same on every processor). Sums over contributions are
//! in f32, as the merged values are: [`GROUP`] by [`GROUP`], so that they are off by 2^-24 of the length of what is added, some twenty
//! times at most. Products of contributions with a sum and sums of squares have f32 partial sums of at most a block: [`PRODUCT_LANES`]
//! interleaved ones, widened, added in halves, then what is left over. Where squares leave the range of f32 the block is
//! summed in f64: [`LANES`] interleaved partial sums, added in order. On AVX-512 the loops that take most of the time are written out in [`crate::wide`].

use std::ops::Range;

use crate::simd::vectorised;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Level, level};

/// Independent partial sums in f64. A fixed number, so that compilers can use vector instructions without changing the order.
const LANES: usize = 16;

/// Independent partial sums in f32.
pub(crate) const PRODUCT_LANES: usize = 32;

/// Sums of squares of a block that f32 has got right: what was too small for it is nothing beside them.
const SINGLE_SQUARES: Range<f64> = 1e-20..1e36;

/// Contributions whose sum is taken on its own, so that rounding does not grow with their number.
pub(crate) const GROUP: usize = 16;

/// An element as it lies in memory.
pub(crate) trait Element: Copy + Sync {
    fn value(self) -> f32;

    /// Σ v², block by block of `block` elements. Not finite exactly if an element is not.
    fn squares(values: &[Self], block: usize) -> f64;

    /// `sums[n][j]` = Σ factors[n] · values[j] over the members, in order: within each [`GROUP`], then over the groups. All lengths are
    /// equal.
    fn add_all<const N: usize>(sums: [&mut [f32]; N], members: &[&[Self]], factors: &[Vec<f32>; N]);

    /// Adds `units[n]` times the dot product of each member with `sums[n]` to its product. All lengths are equal, and at most a block.
    fn dots<const N: usize>(members: &[&[Self]], sums: [&[f32]; N], units: [f64; N], products: [&mut [f64]; N]);

    /// `sums[rotated(j)] += ±values[j]`, the sign of value j from bit j of the words. There are at most as many values as places.
    fn add_signed(sums: &mut Places, values: &[Self], words: &[u64], rotation: usize);
}

macro_rules! element {
    ($module:ident, $type:ty, |$element:ident| $value:expr) => {
        mod $module {
            use super::*;

            vectorised! {
                pub(super) fn single_squares(values: &[$type]) -> f64 {
                    let mut lanes = [0.0f32; PRODUCT_LANES];
                    let (values, rest) = values.as_chunks::<PRODUCT_LANES>();
                    for values in values {
                        for lane in 0..PRODUCT_LANES {
                            lanes[lane] = values[lane].value().mul_add(values[lane].value(), lanes[lane]);
                        }
                    }
                    with_rest(in_halves(lanes.map(f64::from)), rest)
                }
            }
            vectorised! {
                pub(super) fn double_squares(values: &[$type]) -> f64 {
                    reduce(values, values, |left: $type, right: $type, sum: f64| {
                        f64::from(left.value()).mul_add(f64::from(right.value()), sum)
                    })
                }
            }
            pub(super) fn squares_of_block(values: &[$type]) -> f64 {
                #[cfg(target_arch = "x86_64")]
                if level() == Level::Avx512 {
                    // SAFETY: the processor has what the level says.
                    return unsafe { crate::wide::$module::single_squares(values) };
                }
                single_squares(values)
            }
            #[inline(always)]
            fn with_rest(mut sum: f64, rest: &[$type]) -> f64 {
                for value in rest {
                    sum = f64::from(value.value()).mul_add(f64::from(value.value()), sum);
                }
                sum
            }
            vectorised! {
                pub(super) fn add_all(sums: &mut [f32], members: &[&[$type]], factors: &[f32]) {
                    const AT_ONCE: usize = 64;
                    for (number, sums) in sums.chunks_mut(AT_ONCE).enumerate() {
                        let place = number * AT_ONCE..number * AT_ONCE + sums.len();
                        sums.fill(0.0);
                        for (members, factors) in members.chunks(GROUP).zip(factors.chunks(GROUP)) {
                            let mut group = [0.0f32; AT_ONCE];
                            for (values, factor) in members.iter().zip(factors) {
                                for (total, value) in group.iter_mut().zip(&values[place.clone()]) {
                                    *total = factor.mul_add(value.value(), *total);
                                }
                            }
                            sums.iter_mut().zip(group).for_each(|(sum, group)| *sum += group);
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
                pub(super) fn add_signed(sums: &mut Places, values: &[$type], words: &[u64], rotation: usize) {
                    let (Places(sums), turn) = (sums, rotation % 16);
                    for (number, values) in values.chunks(16).enumerate() {
                        let (negative, sums) = (words[number / 4] >> (16 * (number % 4)), &mut sums[(number + rotation / 16) % (PLACES / 16)]);
                        // Twice in a row, so that the turned ones stand in a row, too.
                        let mut signed = [0.0f32; 32];
                        for (lane, value) in values.iter().enumerate() {
                            let value = f32::from_bits(value.value().to_bits() ^ ((negative >> lane) as u32 & 1) << 31);
                            (signed[lane], signed[lane + 16]) = (value, value);
                        }
                        for (sum, value) in sums.iter_mut().zip(&signed[16 - turn..]) {
                            *sum += value;
                        }
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

            fn squares(values: &[Self], block: usize) -> f64 {
                let mut sum = 0.0;
                for values in values.chunks(block) {
                    let squares = $module::squares_of_block(values);
                    sum += if SINGLE_SQUARES.contains(&squares) { squares } else { $module::double_squares(values) };
                }
                sum
            }

            fn add_all<const N: usize>(sums: [&mut [f32]; N], members: &[&[Self]], factors: &[Vec<f32>; N]) {
                #[cfg(target_arch = "x86_64")]
                if level() == Level::Avx512 {
                    // SAFETY: the processor has what the level says.
                    return unsafe { crate::wide::$module::add_all(sums, members, factors) };
                }
                for (sums, factors) in sums.into_iter().zip(factors) {
                    $module::add_all(sums, members, factors);
                }
            }

            fn dots<const N: usize>(members: &[&[Self]], sums: [&[f32]; N], units: [f64; N], products: [&mut [f64]; N]) {
                #[cfg(target_arch = "x86_64")]
                if level() == Level::Avx512 {
                    // SAFETY: the processor has what the level says.
                    return unsafe { crate::wide::$module::dots(members, sums, units, products) };
                }
                for ((sums, unit), products) in sums.into_iter().zip(units).zip(products) {
                    $module::dots(members, sums, unit, products);
                }
            }

            fn add_signed(sums: &mut Places, values: &[Self], words: &[u64], rotation: usize) {
                #[cfg(target_arch = "x86_64")]
                if level() == Level::Avx512 {
                    // SAFETY: the processor has what the level says.
                    return unsafe { crate::wide::$module::add_signed(sums, values, words, rotation) };
                }
                $module::add_signed(sums, values, words, rotation);
            }
        }
    };
}

element!(of_f32, f32, |element| element);
element!(of_f32_bytes, [u8; 4], |element| f32::from_le_bytes(element));
element!(of_bf16_bytes, [u8; 2], |element| f32::from_bits(u32::from(u16::from_le_bytes(element)) << 16));

/// Places that elements are rotated among.
pub(crate) const PLACES: usize = 4096;

/// A sum for each place, by sixteens that one load or store moves.
#[derive(Clone)]
#[repr(align(64))]
pub(crate) struct Places(pub [[f32; 16]; PLACES / 16]);

/// The place that element `index` is rotated to: sixteens among each other, and elements within their sixteen.
pub(crate) fn rotated(index: usize, rotation: usize) -> usize {
    (index / 16 * 16 + rotation / 16 * 16) % PLACES + (index + rotation) % 16
}

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
    /// The sums times a power of two.
    pub(crate) fn multiply(sums: &[f32], factor: f32, out: &mut [f32]) {
        for (value, sum) in out.iter_mut().zip(sums) {
            *value = *sum * factor;
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
        for (members, count) in [(1, 1), (3, 31), (4, 32), (5, 33), (9, 100), (16, 1000), (17, 1024), (40, 70)] {
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
            let factors: Vec<f32> = (0..members).map(|member| 0.3 - 0.17 * member as f32).collect();
            check(&singles, &factors);
            check(&bf16, &factors);
        }
    }

    fn check<T: Element>(members: &[&[T]], factors: &[f32]) {
        let count = members[0].len();
        let group = |at: usize, members: &[&[T]], factors: &[f32]| {
            members.iter().zip(factors).fold(0.0f32, |sum, (values, factor)| factor.mul_add(values[at].value(), sum))
        };
        let groups = || members.chunks(GROUP).zip(factors.chunks(GROUP));
        let sum = |at: usize| groups().fold(0.0f32, |sum, (members, factors)| sum + group(at, members, factors));
        let sums: Vec<f32> = (0..count).map(sum).collect();
        let results = with_each_level(|| {
            let [mut found, mut same, mut doubled, mut quadruple] = [9.0, 8.0, 7.0, 6.0].map(|value| vec![value; count]);
            let mut products = vec![0.5; members.len()];
            T::add_all([&mut found], members, &[factors.to_vec()]);
            T::add_all([&mut same, &mut doubled], members, &[factors.to_vec(), factors.iter().map(|factor| 2.0 * factor).collect()]);
            assert!(same == found && doubled.iter().zip(&found).all(|(doubled, sum)| *doubled == 2.0 * sum));
            multiply(&found, 4.0, &mut quadruple);
            let mut others = products.clone();
            T::dots(members, [&quadruple], [0.25], [&mut products]);
            let mut again = others.clone();
            T::dots(members, [&quadruple, &found], [0.25, 1.0], [&mut again, &mut others]);
            assert!(again == products && others == products);
            (found, products, T::squares(members[0], 256))
        });
        for result in &results {
            assert_eq!((&result.0, result), (&sums, &results[0]));
        }
        for (values, product) in members.iter().zip(&results[0].1) {
            let terms = || values.iter().zip(&sums).map(|(value, sum)| f64::from(value.value()) * f64::from(*sum));
            let (exact, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
            assert!((product - 0.5 - exact).abs() <= 1e-6 * size, "{product} {exact}");
        }
    }

    #[test]
    fn squares_are_right_for_every_number_that_f32_has() {
        for exponent in [-149, -120, -70, -64, -33, 0, 59, 64, 100, 126] {
            let values: Vec<f32> = fixture::values(7, 3000).iter().map(|value| (f64::from(*value) * 2f64.powi(exponent)) as f32).collect();
            let exact: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
            let results = with_each_level(|| f32::squares(&values, 1024));
            assert!(
                results.iter().all(|sum| sum == &results[0]) && (results[0] - exact).abs() <= 1e-6 * exact,
                "2^{exponent}: {results:?}"
            );
        }
        let mut values = vec![1.0f32; 100];
        for broken in [f32::NAN, f32::INFINITY] {
            values[70] = broken;
            assert!(!f32::squares(&values, 1024).is_finite());
        }
        assert_eq!(f32::squares(&[0.0; 100], 1024), 0.0);
    }

    #[test]
    fn signs_follow_the_bits_and_places_go_around() {
        let values = fixture::values(1, 300);
        let mut bytes = vec![0; 600];
        round_to_bf16(&values, &mut bytes);
        let words: Vec<u64> = (0..8u64).map(|number| 0x0123_4567_89ab_cdef * (number + 3)).collect();
        for (rotation, count) in [(0, 300), (1, 300), (37, 3), (4095, 34), (4080, 64), (4000, 128), (777, 5)] {
            signs(&values[..count], &words, rotation);
            signs(&bytes.as_chunks::<2>().0[..count], &words, rotation);
        }
    }

    fn signs<T: Element>(values: &[T], words: &[u64], rotation: usize) {
        let mut expected = vec![1.0f32; PLACES];
        for (index, value) in values.iter().enumerate() {
            let negative = words[index / 64] >> (index % 64) & 1 == 1;
            expected[rotated(index, rotation)] += if negative { -value.value() } else { value.value() };
        }
        for sums in with_each_level(|| {
            let mut sums = Places([[1.0; 16]; PLACES / 16]);
            T::add_signed(&mut sums, values, words, rotation);
            sums.0.as_flattened().to_vec()
        }) {
            assert!(sums == expected, "{} rotated by {rotation}", values.len());
        }
    }
}
