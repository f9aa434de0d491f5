//! The loops of a merge that take most of its time, written out for AVX-512: sums over contributions, products with the
//! sum, sums of squares, sums with signs, and codes of four bits as they lie in memory.
//! They give the same bits as those of [`crate::kernels`], which compilers turn into loops of half the speed.
//!
//! 32 elements are two registers of f32. Of bf16 these are the even and the odd elements, because a word of 32 bits holds one of each and
//! a shift or a mask widens them without moving anything between lanes; sums are put in order when they leave the registers. A code of
//! four bits is the place of its value in a register that holds the sixteen values of its block.

use std::arch::x86_64::*;

use crate::codec::int4::{BLOCK_BYTES, BLOCK_ELEMENTS};
use crate::kernels::{GROUP, PLACES, PRODUCT_LANES, Places};

const STRIP: usize = PRODUCT_LANES;

macro_rules! wide {
    ($module:ident, $type:ty, interleaved: $interleaved:literal, |$strip:ident| $registers:expr, $in_order:expr) => {
        pub(crate) mod $module {
            use super::*;

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn load($strip: &[$type; STRIP]) -> [__m512; 2] {
                $registers
            }

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn in_order($strip: &[$type; 16]) -> __m512 {
                $in_order
            }

            /// [`crate::kernels::Element::add_all`].
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            pub(crate) fn add_all<const N: usize>(mut sums: [&mut [f32]; N], members: &[&[$type]], factors: &[Vec<f32>; N]) {
                let elements = sums.first().map_or(0, |sums| sums.len());
                let whole = elements / STRIP * STRIP;
                for (number, start) in (0..whole).step_by(STRIP).enumerate() {
                    let mut totals = [[_mm512_setzero_ps(); 2]; N];
                    for first in (0..members.len()).step_by(GROUP) {
                        let mut group = [[_mm512_setzero_ps(); 2]; N];
                        for (member, values) in members.iter().enumerate().skip(first).take(GROUP) {
                            let values = &values.as_chunks::<STRIP>().0[number];
                            // What the next call wants of this contribution. Of so many places at once the processor loses track.
                            _mm_prefetch::<_MM_HINT_T1>(values.as_ptr().wrapping_add(elements).cast());
                            let values = load(values);
                            for (group, factors) in group.iter_mut().zip(factors) {
                                let factor = _mm512_set1_ps(factors[member]);
                                group[0] = _mm512_fmadd_ps(factor, values[0], group[0]);
                                group[1] = _mm512_fmadd_ps(factor, values[1], group[1]);
                            }
                        }
                        for (total, group) in totals.iter_mut().zip(group) {
                            total[0] = _mm512_add_ps(total[0], group[0]);
                            total[1] = _mm512_add_ps(total[1], group[1]);
                        }
                    }
                    for (sums, total) in sums.iter_mut().zip(totals) {
                        if let Some(strip) = sums[start..].first_chunk_mut() {
                            store(strip, if $interleaved { zip(total) } else { total });
                        }
                    }
                }
                for (sums, factors) in sums.iter_mut().zip(factors) {
                    for (number, sum) in sums.iter_mut().enumerate().skip(whole) {
                        *sum = 0.0;
                        for (members, factors) in members.chunks(GROUP).zip(factors.chunks(GROUP)) {
                            let mut group = 0.0f32;
                            for (values, factor) in members.iter().zip(factors) {
                                group = factor.mul_add($crate::kernels::Element::value(values[number]), group);
                            }
                            *sum += group;
                        }
                    }
                }
            }

            /// [`crate::kernels::Element::add_signed`].
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            pub(crate) fn add_signed(Places(sums): &mut Places, values: &[$type], words: &[u64], rotation: usize) {
                // Only the lowest four bits of a place are looked at.
                let steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                let turn = _mm512_sub_epi32(steps, _mm512_set1_epi32((rotation % 16) as i32));
                let mut at = rotation / 16;
                let mut add = |values: __m512, negative: u64| {
                    let value = _mm512_castps_si512(values);
                    let signed = _mm512_mask_xor_epi32(value, negative as u16, value, _mm512_set1_epi32(i32::MIN));
                    let sums = &mut sums[at % (PLACES / 16)];
                    store_one(sums, _mm512_add_ps(load_one(sums), _mm512_permutexvar_ps(turn, _mm512_castsi512_ps(signed))));
                    at += 1;
                };
                let (whole, rest) = values.as_chunks::<64>();
                for (values, word) in whole.iter().zip(words) {
                    let (fours, _) = values.as_chunks::<16>();
                    add(in_order(&fours[0]), *word);
                    add(in_order(&fours[1]), *word >> 16);
                    add(in_order(&fours[2]), *word >> 32);
                    add(in_order(&fours[3]), *word >> 48);
                }
                for (number, rest) in rest.chunks(16).enumerate() {
                    let mut values = [0.0; 16];
                    for (value, element) in values.iter_mut().zip(rest) {
                        *value = $crate::kernels::Element::value(*element);
                    }
                    add(load_one(&values), words[whole.len()] >> (16 * number));
                }
            }

            /// The sum of squares of one block with partial sums in f32.
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            pub(crate) fn single_squares(values: &[$type]) -> f64 {
                let mut lanes = [_mm512_setzero_ps(); 2];
                let (strips, rest) = values.as_chunks::<STRIP>();
                for strip in strips {
                    _mm_prefetch::<_MM_HINT_T1>(strip.as_ptr().wrapping_add(2 * values.len()).cast());
                    let [first, second] = load(strip);
                    lanes[0] = _mm512_fmadd_ps(first, first, lanes[0]);
                    lanes[1] = _mm512_fmadd_ps(second, second, lanes[1]);
                }
                let lanes = if $interleaved { zip(lanes) } else { lanes };
                let mut sum = in_halves(of_lanes(lanes));
                for value in rest {
                    let value = f64::from($crate::kernels::Element::value(*value));
                    sum = value.mul_add(value, sum);
                }
                sum
            }

            /// [`crate::kernels::Element::dots`].
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            pub(crate) fn dots<const N: usize>(members: &[&[$type]], sums: [&[f32]; N], units: [f64; N], mut products: [&mut [f64]; N]) {
                let mut first = 0;
                // As many at a time as there are registers for.
                if N == 1 {
                    for members in members.as_chunks::<8>().0 {
                        dots_of(members, &sums, &units, &mut products, first);
                        first += 8;
                    }
                }
                for members in members[first..].as_chunks::<4>().0 {
                    dots_of(members, &sums, &units, &mut products, first);
                    first += 4;
                }
                for members in members[first..].as_chunks::<1>().0 {
                    dots_of(members, &sums, &units, &mut products, first);
                    first += 1;
                }
            }

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn dots_of<const MEMBERS: usize, const N: usize>(
                members: &[&[$type]; MEMBERS],
                sums: &[&[f32]; N],
                units: &[f64; N],
                products: &mut [&mut [f64]; N],
                first: usize,
            ) {
                let mut lanes = [[[_mm512_setzero_ps(); 2]; N]; MEMBERS];
                let strips = members[0].len() / STRIP;
                let members_cut = members.map(|values| &values.as_chunks::<STRIP>().0[..strips]);
                let sums_cut = sums.map(|sums| &sums.as_chunks::<STRIP>().0[..strips]);
                for number in 0..strips {
                    let mut of_sets = [[_mm512_setzero_ps(); 2]; N];
                    for (set, sums) in of_sets.iter_mut().zip(&sums_cut) {
                        let sums = singles(&sums[number]);
                        *set = if $interleaved { unzip(sums) } else { sums };
                    }
                    for (lanes, values) in lanes.iter_mut().zip(&members_cut) {
                        let values = load(&values[number]);
                        for (lanes, sums) in lanes.iter_mut().zip(&of_sets) {
                            lanes[0] = _mm512_fmadd_ps(values[0], sums[0], lanes[0]);
                            lanes[1] = _mm512_fmadd_ps(values[1], sums[1], lanes[1]);
                        }
                    }
                }
                for (member, lanes) in lanes.into_iter().enumerate() {
                    for (set, lanes) in lanes.into_iter().enumerate() {
                        let lanes = if $interleaved { zip(lanes) } else { lanes };
                        let mut total = in_halves(of_lanes(lanes));
                        for (value, sum) in members[member].iter().zip(sums[set]).skip(strips * STRIP) {
                            total = f64::from($crate::kernels::Element::value(*value)).mul_add(f64::from(*sum), total);
                        }
                        products[set][first + member] += units[set] * total;
                    }
                }
            }
        }
    };
}

wide!(of_f32, f32, interleaved: false, |strip| singles(strip), load_one(strip));
wide!(of_f32_bytes, [u8; 4], interleaved: false, |strip| single_bytes(strip), {
    // SAFETY: exactly one register, any bits are f32, and it may lie at any address.
    unsafe { strip.as_ptr().cast::<__m512>().read_unaligned() }
});
wide!(
    of_bf16_bytes,
    [u8; 2],
    interleaved: true,
    |strip| {
        // SAFETY: a strip is exactly one register of integers, which may lie at any address.
        let words = unsafe { strip.as_ptr().cast::<__m512i>().read_unaligned() };
        let odd = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)), _mm512_castsi512_ps(odd)]
    },
    {
        // SAFETY: exactly half a register of integers, which may lie at any address.
        let half = unsafe { strip.as_ptr().cast::<__m256i>().read_unaligned() };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
    }
);

/// Blocks of four bits an element ([`crate::codec::int4`]).
pub(crate) mod of_int4 {
    use super::*;

    /// Int4 blocks of what is summed at a time.
    const BLOCKS: usize = 4;
    /// Registers of codes of a block, in 16 bytes each: one of values for the low and one for the high halves.
    const CODES: usize = BLOCK_ELEMENTS / 32;

    /// The encoded blocks.
    pub(crate) type Blocks = [u8; BLOCKS * BLOCK_BYTES];
    /// Elements of them.
    pub(crate) const VALUES: usize = BLOCKS * BLOCK_ELEMENTS;

    /// What each of the codes of a block means: scale · (code − 8).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn meanings(block: &[u8; BLOCK_BYTES]) -> __m512 {
        let scale = _mm512_set1_ps(f32::from_le_bytes([block[0], block[1], block[2], block[3]]));
        let steps = _mm512_setr_ps(-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0);
        _mm512_mul_ps(steps, scale)
    }

    /// Sixteen bytes of codes, each in a lane of its own.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn codes(block: &[u8; BLOCK_BYTES], number: usize) -> __m512i {
        let (pieces, _) = block[BLOCK_BYTES - BLOCK_ELEMENTS / 2..].as_chunks::<16>();
        // SAFETY: a piece is exactly one register, which may lie at any address.
        _mm512_cvtepu8_epi32(unsafe { pieces[number].as_ptr().cast::<__m128i>().read_unaligned() })
    }

    /// The elements of the low halves of codes. A lane's place is in its lowest four bits; what stands above them is not looked at.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn low(codes: __m512i, meanings: __m512) -> __m512 {
        _mm512_permutexvar_ps(codes, meanings)
    }

    /// The elements of the high halves.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn high(codes: __m512i, meanings: __m512) -> __m512 {
        _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), meanings)
    }

    /// Decodes one block.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(crate) fn decode(block: &[u8; BLOCK_BYTES], out: &mut [f32; BLOCK_ELEMENTS]) {
        let meanings = meanings(block);
        let (first, second) = out.as_chunks_mut::<16>().0.split_at_mut(CODES);
        // From the front to the back: stores in two places in turns take twice as long.
        for (number, values) in first.iter_mut().enumerate() {
            store_one(values, low(codes(block, number), meanings));
        }
        for (number, values) in second.iter_mut().enumerate() {
            store_one(values, high(codes(block, number), meanings));
        }
    }

    /// [`crate::kernels::Element::add_all`] of what the blocks decode to.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(crate) fn add_all<const N: usize>(mut sums: [&mut [f32; VALUES]; N], members: &[&Blocks], factors: &[Vec<f32>; N]) {
        for half in 0..2 * BLOCKS {
            // Registers hold the sums of half a block while the members pass.
            let mut totals = [[_mm512_setzero_ps(); CODES]; N];
            for first in (0..members.len()).step_by(GROUP) {
                let mut group = [[_mm512_setzero_ps(); CODES]; N];
                for (member, blocks) in members.iter().enumerate().skip(first).take(GROUP) {
                    let block = &blocks.as_chunks::<BLOCK_BYTES>().0[half / 2];
                    let next = block.as_ptr().wrapping_add(BLOCKS * BLOCK_BYTES + half % 2 * 64);
                    _mm_prefetch::<_MM_HINT_T1>(next.cast());
                    let (meanings, factors) = (meanings(block), factors.each_ref().map(|factors| factors[member]));
                    for number in 0..CODES {
                        let codes = codes(block, number);
                        let value = if half % 2 == 0 { low(codes, meanings) } else { high(codes, meanings) };
                        for (group, factor) in group.iter_mut().zip(factors) {
                            group[number] = _mm512_fmadd_ps(_mm512_set1_ps(factor), value, group[number]);
                        }
                    }
                }
                for (totals, group) in totals.iter_mut().zip(group) {
                    for (total, group) in totals.iter_mut().zip(group) {
                        *total = _mm512_add_ps(*total, group);
                    }
                }
            }
            for (sums, totals) in sums.iter_mut().zip(totals) {
                let registers = sums.as_chunks_mut::<16>().0[half * CODES..].iter_mut();
                registers.zip(totals).for_each(|(register, total)| store_one(register, total));
            }
        }
    }

    /// [`crate::kernels::Element::dots`] of what the blocks decode to.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(crate) fn dots<const N: usize>(members: &[&Blocks], sums: [&[f32; VALUES]; N], units: [f64; N], products: [&mut [f64]; N]) {
        for (member, blocks) in members.iter().enumerate() {
            let mut lanes = [[_mm512_setzero_ps(); 2]; N];
            for half in 0..2 * BLOCKS {
                let block = &blocks.as_chunks::<BLOCK_BYTES>().0[half / 2];
                let meanings = meanings(block);
                for number in 0..CODES {
                    let codes = codes(block, number);
                    let value = if half % 2 == 0 { low(codes, meanings) } else { high(codes, meanings) };
                    for (lanes, sums) in lanes.iter_mut().zip(sums) {
                        let sums = load_one(&sums.as_chunks::<16>().0[half * CODES + number]);
                        lanes[number % 2] = _mm512_fmadd_ps(value, sums, lanes[number % 2]);
                    }
                }
            }
            for (set, lanes) in lanes.into_iter().enumerate() {
                products[set][member] += units[set] * in_halves(of_lanes(lanes));
            }
        }
    }
}

/// Lanes n and n + 16 added up, widened, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn of_lanes(lanes: [__m512; 2]) -> __m512d {
    let [first, second, third, fourth] = halves(lanes);
    _mm512_add_pd(_mm512_add_pd(first, third), _mm512_add_pd(second, fourth))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_one(values: &[f32; 16]) -> __m512 {
    // SAFETY: exactly one register, which may lie at any address.
    unsafe { values.as_ptr().cast::<__m512>().read_unaligned() }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_one(values: &mut [f32; 16], register: __m512) {
    // SAFETY: exactly one register, which may lie at any address.
    unsafe { values.as_mut_ptr().cast::<__m512>().write_unaligned(register) };
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(strip: &mut [f32; STRIP], registers: [__m512; 2]) {
    // SAFETY: a strip is exactly two registers, which may lie at any address.
    unsafe { strip.as_mut_ptr().cast::<[__m512; 2]>().write_unaligned(registers) };
}

#[inline]
#[target_feature(enable = "avx512f")]
fn single_bytes(strip: &[[u8; 4]; STRIP]) -> [__m512; 2] {
    // SAFETY: a strip is exactly two registers, any bits are f32, and they may lie at any address.
    unsafe { strip.as_ptr().cast::<[__m512; 2]>().read_unaligned() }
}

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
fn zip([even, odd]: [__m512; 2]) -> [__m512; 2] {
    let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    [_mm512_permutex2var_ps(even, low, odd), _mm512_permutex2var_ps(even, high, odd)]
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
