use super::*;
use crate::simd::with_each_level;
use crate::{fixture, plan};
use proptest::prelude::*;

const CODECS: [Codec; 3] = [Codec::Bf16, Codec::Int4, Codec::TopK];

fn at_base(codec: Codec, elements: u64, base_version: u64) -> PayloadHeader {
    PayloadHeader::of_slices(codec, &[fixture::slice(1, elements, 1)], Digest::blake3(b"plan"), 3, base_version)
}

fn header(codec: Codec, elements: u64) -> PayloadHeader {
    at_base(codec, elements, 7)
}

/// Values whose size differs from place to place, with zeros among them.
fn uneven(seed: u64, count: usize) -> Vec<f32> {
    let values = fixture::values(seed, count);
    let size = |index: usize| if index.is_multiple_of(11) { 0.0 } else { 1.5f32.powi((index / 300 % 40) as i32 - 20) };
    values.iter().enumerate().map(|(index, value)| value * size(index)).collect()
}

fn in_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

#[test]
fn the_header_is_laid_out_as_documented() {
    let bytes = encode(&header(Codec::Bf16, 2), &[1.0, -2.0]).unwrap();
    assert_eq!(bytes.len(), 68);
    assert_eq!(&bytes[..8], b"QSRPAYL1");
    assert_eq!(bytes[8..40], Digest::blake3(b"plan").0);
    assert_eq!(bytes[40..], [3, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x3f, 0, 0xc0]);
    for (number, codec) in CODECS.into_iter().enumerate() {
        assert_eq!(header(codec, 2).to_bytes()[44..48], [number as u8, 0, 0, 0]);
    }
}

#[test]
fn an_int4_body_is_laid_out_as_documented() {
    let bytes = encode(&header(Codec::Int4, 5), &[7.0, -7.0, 0.4, 2.6, -3.5]).unwrap();
    // Scale 1; codes 15, 1, 8 in the low halves, 11, 4 (-3.5 rounds to the even -4) and the filler 8 in the high ones.
    assert_eq!(bytes[64..], [0, 0, 0x80, 0x3f, 0xbf, 0x41, 0x88]);
    assert_eq!(decode(&bytes, &header(Codec::Int4, 5)).unwrap(), [7.0, -7.0, 0.0, 3.0, -4.0]);
    let zeros = encode(&header(Codec::Int4, 4), &[0.0, -0.0, 1e-38, -1e-40]).unwrap();
    assert_eq!(zeros[64..], [0, 0, 0, 0, 0x88, 0x88]);
}

#[test]
fn a_top_k_body_is_laid_out_as_documented() {
    // 130 elements have three entries: 36 bits of indices, 6 bits of codes.
    let mut values = vec![0.0; 130];
    (values[1], values[4], values[70], values[129]) = (1.0, 0.5, -8.0, 2.0);
    let bytes = encode(&header(Codec::TopK, 130), &values).unwrap();
    // Levels 1.5 and 8; indices 1, 70 = 0x046, 129 = 0x081; codes 0 (+low), 3 (-high), 0.
    assert_eq!(bytes[64..], [0xc0, 0x3f, 0x00, 0x41, 0x01, 0x60, 0x04, 0x81, 0x00, 0b00_11_00]);
    let decoded = decode(&bytes, &header(Codec::TopK, 130)).unwrap();
    assert_eq!((decoded[1], decoded[70], decoded[129], decoded[4]), (1.5, -8.0, 1.5, 0.0));
    // Fewer values than entries, and none at all.
    let mut values = vec![0.0; 130];
    values[0] = 3.0;
    let one = encode(&header(Codec::TopK, 130), &values).unwrap();
    assert_eq!(one[64..], [0x40, 0x40, 0x40, 0x40, 0, 0, 0, 0, 0, 0]);
    assert_eq!(decode(&one, &header(Codec::TopK, 130)).unwrap(), values);
    let none = encode(&header(Codec::TopK, 130), &[0.0; 130]).unwrap();
    assert_eq!(none[64..], [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
}

#[test]
fn a_payload_of_a_planned_fragment_has_the_announced_length() {
    let plan = plan(&fixture::small_contract(), 5).unwrap();
    for codec in CODECS {
        let header = PayloadHeader::new(codec, &plan, plan.digest(), 2, 0);
        let bytes = encode(&header, &fixture::values(1, plan.elements(2) as usize)).unwrap();
        assert_eq!(bytes.len() as u64, header.payload_bytes());
        if codec == Codec::Bf16 {
            assert_eq!(bytes.len() as u64, payload_bytes(&plan, 2));
        }
    }
}

#[test]
fn payloads_of_the_planned_size_have_the_bytes_of_the_published_table() {
    // 18 billion parameters in 24 fragments: 750 million each, in experts of 2^21.
    let (fragment, model) = (750_000_000u64, 18_000_000_000u64);
    let slices = [fixture::slice(357, 1 << 21, 1), fixture::slice(1, fragment - 357 * (1 << 21), 1)];
    let bytes = |codec| PayloadHeader::of_slices(codec, &slices, Digest::ZERO, 0, 0).payload_bytes() - HEADER_BYTES as u64;
    let megabytes = |codec| bytes(codec) as f64 / 1e6;
    let gigabytes = |codec| 24.0 * bytes(codec) as f64 / 1e9;
    assert_eq!(24 * fragment, model);
    assert_eq!((megabytes(Codec::Bf16), gigabytes(Codec::Bf16)), (1500.0, 36.0));
    assert_eq!((megabytes(Codec::Int4).round(), (gigabytes(Codec::Int4) * 100.0).round()), (387.0, 928.0));
    assert_eq!(((megabytes(Codec::TopK) * 10.0).round(), (gigabytes(Codec::TopK) * 1000.0).round()), (205.0, 492.0));
    let bits = |codec| bytes(codec) as f64 * 8.0 / fragment as f64;
    assert!((bits(Codec::Int4) - 4.125).abs() < 1e-6 && (bits(Codec::TopK) / 0.21875 - 1.0).abs() < 1e-3);
}

#[test]
fn small_tensors_of_the_real_model_hardly_lengthen_its_payloads() {
    let plan = plan(&fixture::real_contract(), 24).unwrap();
    let total = |codec| (0..24).map(|fragment| PayloadHeader::new(codec, &plan, Digest::ZERO, fragment, 0).payload_bytes()).sum::<u64>();
    let bits = |codec| total(codec) as f64 * 8.0 / plan.total_elements() as f64;
    assert!((bits(Codec::Int4) - 4.125).abs() < 1e-3, "{}", bits(Codec::Int4));
    assert!((bits(Codec::TopK) / 0.21875 - 1.0).abs() < 2e-3, "{}", bits(Codec::TopK));
}

#[test]
fn values_that_are_not_finite_or_too_large_are_refused_when_encoding() {
    for codec in CODECS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -f32::MAX] {
            let mut values = uneven(1, 5000);
            values[4711] = bad;
            let result = encode(&header(codec, 5000), &values);
            let holds = codec == Codec::Int4 && bad.is_finite();
            assert!(holds && result.is_ok() || result == Err(CodecError::NotFinite { element: 4711 }), "{codec:?} {bad} {result:?}");
        }
        assert_eq!(encode(&header(codec, 3), &[1.0]), Err(CodecError::Values { got: 1, expected: 3 }));
    }
}

#[test]
fn a_payload_with_a_wrong_length_header_or_value_is_refused() {
    for codec in CODECS {
        let (header, values) = (header(codec, 5000), uneven(1, 5000));
        let good = encode(&header, &values).unwrap();
        let refused = |bytes: &[u8], header: &PayloadHeader| {
            let error = decode(bytes, header).unwrap_err();
            assert_eq!(check(&bytes, header), Err(decode(bytes, header).unwrap_err()));
            error
        };
        let longer: Vec<u8> = good.iter().copied().chain([0]).collect();
        for wrong in [&good[..good.len() - 1], &longer, &good[..20], &[]] {
            assert!(matches!(refused(wrong, &header), CodecError::Length { .. }));
        }
        assert_eq!(refused(&good, &at_base(codec, 5000, 8)), CodecError::Header { byte: 48 });
        for byte in 0..HEADER_BYTES {
            let mut changed = good.clone();
            changed[byte] ^= 1;
            assert_eq!(refused(&changed, &header), CodecError::Header { byte });
        }
        assert_eq!(check(&good, &header), Ok(()));
    }
    let mut infinite = encode(&header(Codec::Bf16, 3), &[1.0, 2.0, 3.0]).unwrap();
    infinite[66..68].copy_from_slice(&0x7f80u16.to_le_bytes());
    assert_eq!(decode(&infinite, &header(Codec::Bf16, 3)), Err(CodecError::NotFinite { element: 1 }));
}

#[test]
fn int4_scales_and_codes_that_the_encoder_never_writes_are_refused() {
    let header = header(Codec::Int4, 700);
    let good = encode(&header, &fixture::values(1, 700)).unwrap();
    let second = HEADER_BYTES + int4::BLOCK_BYTES;
    let with = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = good.clone();
        change(&mut bytes[second..]);
        decode(&bytes, &header)
    };
    let scales = [f32::NAN, f32::INFINITY, -1.0, -0.0, f32::MIN_POSITIVE / 2.0, f32::MAX];
    for scale in scales {
        assert_eq!(with(&|block| block[..4].copy_from_slice(&scale.to_le_bytes())), Err(CodecError::Scale { element: 256 }), "{scale}");
    }
    let codes = CodecError::Code { element: 256 };
    assert_eq!(with(&|block| block[..4].fill(0)).as_ref(), Err(&codes), "a zero scale with codes");
    assert_eq!(with(&|block| block[10] &= 0x0f).as_ref(), Err(&codes), "code 0");
    assert_eq!(with(&|block| block[4..132].fill(0x88)).as_ref(), Err(&codes), "no code at the limit");
    let odd = self::header(Codec::Int4, 3);
    let mut bytes = encode(&odd, &[1.0, 0.5, -1.0]).unwrap();
    *bytes.last_mut().unwrap() ^= 0x10;
    assert_eq!(decode(&bytes, &odd), Err(CodecError::Code { element: 0 }), "the filler");
}

#[test]
fn top_k_levels_indices_and_fillers_that_the_encoder_never_writes_are_refused() {
    let header = header(Codec::TopK, 4096 + 130);
    let mut values = fixture::values(1, 4096 + 130);
    values[4096..].fill(0.0);
    (values[4096 + 3], values[4096 + 90]) = (0.5, -0.5);
    let good = encode(&header, &values).unwrap();
    // Levels, a full chunk, then three entries of which two are used.
    let (levels, first, second) = (HEADER_BYTES, HEADER_BYTES + 4, HEADER_BYTES + 4 + 112);
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = good.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        decode(&changed, &header)
    };
    for level in [0x7fc0u16, 0x7f80, 0xbf80, 0x0001, 0x0000] {
        assert_eq!(with(levels, &level.to_le_bytes()), Err(CodecError::Scale { element: 0 }), "{level:#x}");
    }
    assert_eq!(with(levels, &[0x80, 0x3f, 0, 0x3f]), Err(CodecError::Scale { element: 0 }), "low over high");
    assert_eq!(with(levels, &[0; 4]), Err(CodecError::Code { element: 0 }), "levels of zeros with entries");
    assert_eq!(with(first, &[5, 0x50, 0]), Err(CodecError::Index { element: 0 }), "an index twice");
    assert_eq!(with(first, &[6, 0x50, 0]), Err(CodecError::Index { element: 0 }), "a descending index");
    assert_eq!(with(second, &[3, 0x20, 0x08]), Err(CodecError::Index { element: 4096 }), "index 130 of 130");
    assert_eq!(with(second + 3, &[1, 0]), Err(CodecError::Index { element: 4096 }), "an index behind the last that descends");
    assert_eq!(with(second + 4, &[0x10]), Err(CodecError::Code { element: 4096 }), "bits behind the indices");
    assert_eq!(with(second + 5, &[good[second + 5] | 0x40]), Err(CodecError::Code { element: 4096 }), "bits behind the codes");
    assert_eq!(with(second, &[0xff, 0xff, 0xff]), Err(CodecError::Code { element: 4096 }), "zeros that are not all ones");
    let mut shorter = good.clone();
    (shorter[second], shorter[second + 1], shorter[second + 2]) = (3, 0, 0);
    assert_eq!(decode(&shorter, &header), Err(CodecError::Index { element: 4096 }), "a code behind the last entry");
}

#[test]
fn norms_of_int4_blocks_are_those_of_the_decoded_values_on_every_instruction_set() {
    for count in [1, 2, 33, 255, 256, 257, 5000] {
        let (header, values) = (header(Codec::Int4, count), uneven(count, count as usize));
        let payload = encode(&header, &values).unwrap();
        let decoded = decode(&payload, &header).unwrap();
        let expected: f64 = decoded.iter().map(|value| f64::from(*value).powi(2)).sum();
        let body = &payload[HEADER_BYTES..];
        for found in with_each_level(|| int4::squares(body, count as usize).unwrap()) {
            assert!((found - expected).abs() <= 1e-6 * expected, "{count}: {found}, {expected}");
            assert_eq!(found.to_bits(), int4::squares(body, count as usize).unwrap().to_bits());
        }
    }
}

#[test]
fn a_wrong_int4_code_is_found_at_every_place_on_every_instruction_set() {
    let count = 2 * int4::BLOCK_ELEMENTS + 77;
    let (header, values) = (header(Codec::Int4, count as u64), uneven(5, count));
    let body = encode(&header, &values).unwrap()[HEADER_BYTES..].to_vec();
    for at in 0..body.len() {
        let (block, place) = (at / int4::BLOCK_BYTES, at % int4::BLOCK_BYTES);
        if place < 4 {
            continue;
        }
        for bits in [0x0f, 0xf0] {
            let mut damaged = body.clone();
            damaged[at] &= bits;
            let refused = with_each_level(|| int4::check(&damaged, count));
            assert!(refused.iter().all(|result| *result == Err((block, Flaw::Code))), "{at}");
        }
    }
    // Without a code 1 or 15 the scale is too large.
    let mut small = body;
    small[4..int4::BLOCK_BYTES].fill(0x99);
    assert!(with_each_level(|| int4::check(&small, count)).iter().all(|result| *result == Err((0, Flaw::Code))));
}

#[test]
fn int4_is_within_half_a_step_and_top_k_sends_the_largest() {
    let values = uneven(3, 300_000);
    let header = header(Codec::Int4, 300_000);
    let decoded = decode(&encode(&header, &values).unwrap(), &header).unwrap();
    for (block, decoded) in values.chunks(256).zip(decoded.chunks(256)) {
        let largest = block.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        assert!(block.iter().zip(decoded).all(|(value, decoded)| (value - decoded).abs() <= largest / 14.0 * 1.0001));
    }
    let header = self::header(Codec::TopK, 300_000);
    let decoded = decode(&encode(&header, &values).unwrap(), &header).unwrap();
    for (chunk, decoded) in values.chunks(4096).zip(decoded.chunks(4096)) {
        let sent: Vec<usize> = (0..chunk.len()).filter(|index| decoded[*index] != 0.0).collect();
        assert_eq!(sent.len(), chunk.len().div_ceil(64));
        let smallest = sent.iter().map(|index| chunk[*index].abs()).fold(f32::INFINITY, f32::min);
        assert!((0..chunk.len()).all(|index| decoded[index] != 0.0 || chunk[index].abs() <= smallest));
        assert!(sent.iter().all(|index| decoded[*index].is_sign_negative() == chunk[*index].is_sign_negative()));
    }
}

#[test]
fn units_do_not_share_scales_and_every_instruction_set_and_thread_count_gives_the_same_bytes() {
    let slices = [fixture::slice(3, 5000, 1), fixture::slice(1, 1, 1), fixture::slice(7, 333, 7), fixture::slice(1, 1 << 19, 1)];
    let elements = slices.iter().map(Slice::elements).sum::<u64>() as usize;
    let mut values = uneven(5, elements);
    values[15_000] = 1e9;
    for codec in CODECS {
        let header = PayloadHeader::of_slices(codec, &slices, Digest::ZERO, 0, 0);
        let encoded = encode(&header, &values).unwrap();
        let decoded = decode(&encoded, &header).unwrap();
        assert!((decoded[15_000] / 1e9 - 1.0).abs() < 0.01, "{codec:?}");
        assert!(decoded[14_990..15_000].iter().chain(&decoded[15_001..15_011]).all(|value| value.abs() < 1e6));
        for threads in [1, 2, 5] {
            assert!(in_threads(threads, || encode(&header, &values).unwrap()) == encoded);
            assert!(in_threads(threads, || decode(&encoded, &header).unwrap()) == decoded);
        }
        let layout = header.layout();
        for (tile, level) in with_each_level(|| {
            let mut body = vec![0; layout.bytes];
            for span in layout.spans() {
                for tile in layout.tiles(span) {
                    layout.encoding.codec().encode(&values[layout.element_range(tile)], &mut body[layout.body_range(tile)]).unwrap();
                }
            }
            body
        })
        .into_iter()
        .enumerate()
        {
            assert!(level == encoded[HEADER_BYTES..], "{codec:?}, instruction set {tile}");
        }
    }
}

proptest! {
    #[test]
    fn decoding_gives_back_bf16_values_exactly_and_others_within_half_a_unit(values in proptest::collection::vec(-1e30f32..1e30, 0..300)) {
        let header = header(Codec::Bf16, values.len() as u64);
        let once = decode(&encode(&header, &values).unwrap(), &header).unwrap();
        for (value, decoded) in values.iter().zip(&once) {
            prop_assert!((value - decoded).abs() <= value.abs() / 256.0);
        }
        prop_assert_eq!(&decode(&encode(&header, &once).unwrap(), &header).unwrap(), &once);
    }

    #[test]
    fn any_values_in_any_units_are_encoded_to_what_the_check_accepts(
        rows in 1u64..5, row_elements in 1u64..9000, unit in any::<bool>(), seed in 1u64..1000, zero in 0usize..3,
    ) {
        let slices = [fixture::slice(rows, row_elements, if unit { 1 } else { rows })];
        let mut values = uneven(seed, (rows * row_elements) as usize);
        let from = values.len() * zero / 3;
        values[from..].fill(0.0);
        for codec in CODECS {
            let header = PayloadHeader::of_slices(codec, &slices, Digest::ZERO, 0, 0);
            let bytes = encode(&header, &values).unwrap();
            prop_assert_eq!(check(&bytes, &header), Ok(()));
            let decoded = decode(&bytes, &header).unwrap();
            prop_assert!(values.iter().zip(&decoded).all(|(value, decoded)| *decoded == 0.0 || *value != 0.0));
        }
    }
}
