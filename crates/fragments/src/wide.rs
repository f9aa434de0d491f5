//! The loops of a merge that take most of its time, written out for AVX-512: sums over contributions, products with the
//! sum, sums of squares.
//! They give the same bits as those of [`crate::kernels`], which compilers turn into loops of half the speed.
//!
//! 32 elements are two registers of f32. Of bf16 these are the even and the odd elements, because a word of 32 bits holds one of each and
//! a shift or a mask widens them without moving anything between lanes; sums are put in order when they leave the registers.

use std::arch::x86_64::*;

use crate::kernels::PRODUCT_LANES;

const STRIP: usize = PRODUCT_LANES;

macro_rules! wide {
    ($module:ident, $type:ty, interleaved: $interleaved:literal, |$strip:ident| $registers:expr) => {
        pub(crate) mod $module {
            use super::*;

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn load($strip: &[$type; STRIP]) -> [__m512; 2] {
                $registers
            }

            /// [`crate::kernels::Element::add_all`].
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            pub(crate) fn add_all(sums: &mut [f64], members: &[&[$type]], factors: &[f64]) {
                let sums_length = sums.len();
                let (strips, rest) = sums.as_chunks_mut::<STRIP>();
                let whole = STRIP * strips.len();
                for (number, strip) in strips.iter_mut().enumerate() {
                    let mut totals = [_mm512_setzero_pd(); 4];
                    for (values, factor) in members.iter().zip(factors) {
                        let factor = _mm512_set1_pd(*factor);
                        let values = &values.as_chunks::<STRIP>().0[number];
                        // What the next call wants of this contribution. Of so many places at once the processor loses track.
                        _mm_prefetch::<_MM_HINT_T1>(values.as_ptr().wrapping_add(sums_length).cast());
                        let halves = halves(load(values));
                        for (total, half) in totals.iter_mut().zip(halves) {
                            *total = _mm512_fmadd_pd(factor, half, *total);
                        }
                    }
                    let [first, second, third, fourth] = totals;
                    let ordered = if $interleaved { [zip(first, third), zip(second, fourth)] } else { [[first, second], [third, fourth]] };
                    // SAFETY: a strip is exactly four registers of eight f64, which may lie at any address.
                    unsafe { strip.as_mut_ptr().cast::<[[__m512d; 2]; 2]>().write_unaligned(ordered) };
                }
                for (number, sum) in rest.iter_mut().enumerate() {
                    let add = |sum: f64, (values, factor): (&&[$type], &f64)| {
                        factor.mul_add(f64::from($crate::kernels::Element::value(values[whole + number])), sum)
                    };
                    *sum = members.iter().zip(factors).fold(0.0, add);
                }
            }

            /// Adds the sums of squares of four blocks, of whole strips, which `values` consists of.
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            pub(crate) fn squares_of_four(values: &[$type], sum: f64) -> f64 {
                let block = values.len() / 4;
                let strips = [0, 1, 2, 3].map(|number| values[number * block..][..block].as_chunks::<STRIP>().0);
                // Lane n mod 16 of element n, so each half of a strip in turn.
                let mut lanes = [[_mm512_setzero_pd(); 2]; 4];
                for number in 0..strips[0].len() {
                    for (lanes, strips) in lanes.iter_mut().zip(strips) {
                        let strip = &strips[number];
                        _mm_prefetch::<_MM_HINT_T1>(strip.as_ptr().wrapping_add(values.len()).cast());
                        let [first, second, third, fourth] = halves(load(strip));
                        let turns = if $interleaved { [[first, third], [second, fourth]] } else { [[first, second], [third, fourth]] };
                        for turn in turns {
                            lanes[0] = _mm512_fmadd_pd(turn[0], turn[0], lanes[0]);
                            lanes[1] = _mm512_fmadd_pd(turn[1], turn[1], lanes[1]);
                        }
                    }
                }
                lanes.into_iter().fold(sum, |sum, [first, second]| {
                    let ordered = if $interleaved { zip(first, second) } else { [first, second] };
                    // SAFETY: two registers are exactly sixteen f64.
                    let lanes = unsafe { std::mem::transmute::<[__m512d; 2], [f64; 16]>(ordered) };
                    sum + lanes.iter().fold(0.0, |sum, lane| sum + lane)
                })
            }

            /// [`crate::kernels::Element::dots`].
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            pub(crate) fn dots(members: &[&[$type]], sums: &[f32], unit: f64, products: &mut [f64]) {
                let (eights, members) = members.as_chunks::<8>();
                let (products_of_eights, products) = products.as_chunks_mut::<8>();
                eights.iter().zip(products_of_eights).for_each(|(members, products)| dots_of(members, sums, unit, products));
                let (fours, members) = members.as_chunks::<4>();
                let (products_of_fours, products) = products.as_chunks_mut::<4>();
                fours.iter().zip(products_of_fours).for_each(|(members, products)| dots_of(members, sums, unit, products));
                let (ones, _) = members.as_chunks::<1>();
                let (products, _) = products.as_chunks_mut::<1>();
                ones.iter().zip(products).for_each(|(members, products)| dots_of(members, sums, unit, products));
            }

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn dots_of<const MEMBERS: usize>(members: &[&[$type]; MEMBERS], sums: &[f32], unit: f64, products: &mut [f64; MEMBERS]) {
                let mut lanes = [[_mm512_setzero_ps(); 2]; MEMBERS];
                let (strips, rest) = sums.as_chunks::<STRIP>();
                let whole = STRIP * strips.len();
                let cut = members.map(|values| &values.as_chunks::<STRIP>().0[..strips.len()]);
                for (number, strip) in strips.iter().enumerate() {
                    let sums = singles(strip);
                    let sums = if $interleaved { unzip(sums) } else { sums };
                    for (lanes, values) in lanes.iter_mut().zip(&cut) {
                        let values = load(&values[number]);
                        lanes[0] = _mm512_fmadd_ps(values[0], sums[0], lanes[0]);
                        lanes[1] = _mm512_fmadd_ps(values[1], sums[1], lanes[1]);
                    }
                }
                for ((lanes, values), product) in lanes.into_iter().zip(members).zip(products) {
                    // Lanes n and n + 16, in order.
                    let [first, second, third, fourth] = halves(lanes);
                    let [left, right] = if $interleaved {
                        zip(_mm512_add_pd(first, second), _mm512_add_pd(third, fourth))
                    } else {
                        [_mm512_add_pd(first, third), _mm512_add_pd(second, fourth)]
                    };
                    let mut total = in_halves(_mm512_add_pd(left, right));
                    for (value, sum) in values[whole..].iter().zip(rest) {
                        total = f64::from($crate::kernels::Element::value(*value)).mul_add(f64::from(*sum), total);
                    }
                    *product += unit * total;
                }
            }
        }
    };
}

wide!(of_f32, f32, interleaved: false, |strip| singles(strip));
wide!(of_f32_bytes, [u8; 4], interleaved: false, |strip| {
    // SAFETY: a strip is exactly two registers, any bits are f32, and they may lie at any address.
    unsafe { strip.as_ptr().cast::<[__m512; 2]>().read_unaligned() }
});
wide!(of_bf16_bytes, [u8; 2], interleaved: true, |strip| {
    // SAFETY: a strip is exactly one register of integers, which may lie at any address.
    let words = unsafe { strip.as_ptr().cast::<__m512i>().read_unaligned() };
    let odd = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)), _mm512_castsi512_ps(odd)]
});

#[inline]
#[target_feature(enable = "avx512f")]
fn singles(strip: &[f32; STRIP]) -> [__m512; 2] {
    // SAFETY: a strip is exactly two registers, which may lie at any address.
    unsafe { strip.as_ptr().cast::<[__m512; 2]>().read_unaligned() }
}

/// Widened: the two halves of the first register, then those of the second.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn halves([first, second]: [__m512; 2]) -> [__m512d; 4] {
    [
        _mm512_cvtps_pd(_mm512_castps512_ps256(first)),
        _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(first)),
        _mm512_cvtps_pd(_mm512_castps512_ps256(second)),
        _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(second)),
    ]
}

/// Elements of two registers in turns.
#[inline]
#[target_feature(enable = "avx512f")]
fn zip(even: __m512d, odd: __m512d) -> [__m512d; 2] {
    let (low, high) = (_mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15));
    [_mm512_permutex2var_pd(even, low, odd), _mm512_permutex2var_pd(even, high, odd)]
}

/// The even and the odd elements of two registers.
#[inline]
#[target_feature(enable = "avx512f")]
fn unzip([first, second]: [__m512; 2]) -> [__m512; 2] {
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    [_mm512_permutex2var_ps(first, even, second), _mm512_permutex2var_ps(first, odd, second)]
}

/// The first half of eight numbers plus the second one, until one is left.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn in_halves(numbers: __m512d) -> f64 {
    let four = _mm256_add_pd(_mm512_castpd512_pd256(numbers), _mm512_extractf64x4_pd::<1>(numbers));
    let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
    _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
}
