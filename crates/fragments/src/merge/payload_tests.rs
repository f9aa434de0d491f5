//! Merges of payloads as they were uploaded, in every codec.

use std::fs;

use protocol::documents::Codec;
use protocol::{Digest, MergeRule};

use super::*;
use crate::codec::{self, FileSource};
use crate::fixture::{self, values};
use crate::kernels::Element;

const CODECS: [Codec; 3] = [Codec::Bf16, Codec::Int4, Codec::TopK];
const LEARNERS: u64 = 8;

/// A matrix, experts of an odd size, a scalar, a vector, and more than one span: 2.2 million elements.
fn slices() -> Vec<Slice> {
    let mean = |slice| Slice { rule: MergeRule::Mean, ..slice };
    let large = fixture::slice(1, 2_000_000, 1);
    vec![fixture::slice(40, 320, 40), fixture::slice(3, 50_001, 1), mean(fixture::slice(1, 1, 1)), mean(fixture::slice(700, 1, 700)), large]
}

fn header(codec: Codec) -> PayloadHeader {
    PayloadHeader::of_slices(codec, &slices(), Digest::ZERO, 0, 0)
}

/// Honest contributions: a part in common, the rest their own; one has a unit that is to be clipped.
fn payloads(codec: Codec) -> Vec<Vec<u8>> {
    let header = header(codec);
    let common = values(100, header.elements() as usize);
    let payload = |learner| {
        let mut own = values(learner, common.len());
        own.iter_mut().zip(&common).for_each(|(own, common)| *own = 1e-3 * (*own + 0.4 * common));
        if learner == 3 {
            own[40 * 320..40 * 320 + 50_001].iter_mut().for_each(|value| *value *= 4.0);
        }
        codec::encode(&header, &own).unwrap()
    };
    (1..=LEARNERS).map(payload).collect()
}

fn offers<'a>(header: &'a PayloadHeader, payloads: &'a [Vec<u8>]) -> Vec<Offer<'a>> {
    let weights = [3, 1, 4, 1, 5, 2, 2, 6];
    let offer = |(payload, weight): (&'a Vec<u8>, u64)| Offer { header, payload, weight, unit_weights: None };
    payloads.iter().zip(weights).map(offer).collect()
}

fn in_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

fn distance(left: &[f32], right: &[f32]) -> f64 {
    left.iter().zip(right).map(|(left, right)| f64::from(left - right).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn every_thread_count_and_a_file_in_place_of_memory_give_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    for codec in CODECS {
        let (header, payloads) = (header(codec), payloads(codec));
        let offers = offers(&header, &payloads);
        let merged = in_threads(1, || merge_payloads(&slices(), &offers).unwrap());
        for threads in [2, 5] {
            assert!(in_threads(threads, || merge_payloads(&slices(), &offers).unwrap()) == merged, "{codec:?} on {threads} threads");
        }
        let files: Vec<FileSource> = payloads
            .iter()
            .enumerate()
            .map(|(number, payload)| {
                let path = folder.path().join(number.to_string());
                fs::write(&path, payload).unwrap();
                FileSource::open(&path).unwrap()
            })
            .collect();
        let from_files: Vec<Offer> = offers.iter().zip(&files).map(|(offer, file)| Offer { payload: file, ..*offer }).collect();
        assert!(merge_payloads(&slices(), &from_files).unwrap() == merged, "{codec:?} from files");
        assert!(merged.inputs.iter().all(|report| report.outcome == Reason::None), "{:?}", merged.inputs);
        assert!(merged.inputs[2].clip_ppm < 1_000_000 && merged.inputs[3].clip_ppm == 1_000_000);
        assert!(merged.inputs.iter().all(|report| report.neighbour_ppm > 0 && report.rest_ppm > 0 && report.cosine_ppm > 0));
    }
}

#[test]
fn merging_payloads_is_merging_what_they_decode_to() {
    for codec in CODECS {
        let (header, payloads) = (header(codec), payloads(codec));
        let offers = offers(&header, &payloads);
        let merged = merge_payloads(&slices(), &offers).unwrap();
        let decoded: Vec<Vec<f32>> = payloads.iter().map(|payload| codec::decode(payload, &header).unwrap()).collect();
        let inputs: Vec<Input> = decoded.iter().zip(&offers).map(|(values, offer)| Input { values, weight: offer.weight }).collect();
        let expected = robust_merge(&slices(), &inputs).unwrap();
        if codec == Codec::Bf16 {
            assert!(merged == expected);
            continue;
        }
        // Sparse sums go over the entries and norms of int4 are exact, dense sums go over lanes: equal but for rounding.
        assert!(distance(&merged.delta, &expected.delta) < 1e-6 * f32::squares(&expected.delta, 1024).sqrt());
        for (found, dense) in merged.inputs.iter().zip(&expected.inputs) {
            assert_eq!(found.outcome, dense.outcome);
            assert!(found.norm_micro.abs_diff(dense.norm_micro) <= 1 && found.clip_ppm.abs_diff(dense.clip_ppm) <= 1);
            assert!(found.cosine_ppm.abs_diff(dense.cosine_ppm) <= 1 && found.rest_ppm.abs_diff(dense.rest_ppm) <= 1);
        }
    }
}

#[test]
fn revoking_a_learner_gives_the_merge_that_would_have_been_without_it() {
    let (header, payloads) = (header(Codec::Int4), payloads(Codec::Int4));
    let offers = offers(&header, &payloads);
    let with_all = merge_payloads(&slices(), &offers).unwrap();
    let without = merge_without(&slices(), &offers, &[4]).unwrap();
    let others: Vec<Offer> = [0, 1, 2, 3, 5, 6, 7].iter().map(|number| offers[*number]).collect();
    assert!(without == merge_payloads(&slices(), &others).unwrap());
    assert!(distance(&without.delta, &with_all.delta) > 0.1 * f32::squares(&with_all.delta, 1024).sqrt());
    assert_eq!(merge_without(&slices(), &offers, &[0, 1, 2, 3, 4, 5, 6, 7]), Err(MergeError::NoInput));
}

#[test]
fn an_expert_is_weighed_by_the_tokens_that_were_routed_to_it() {
    let slices = [fixture::slice(2, 4, 1)];
    let header = PayloadHeader::of_slices(Codec::Bf16, &slices, Digest::ZERO, 0, 0);
    let encode = |values: &[f32]| codec::encode(&header, values).unwrap();
    let payloads = [encode(&[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]), encode(&[0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])];
    let offer = |number: usize, unit_weights| Offer { header: &header, payload: &payloads[number], weight: 1, unit_weights };
    let merged = merge_payloads(&slices, &[offer(0, Some(&[1, 0])), offer(1, Some(&[3, 7]))]).unwrap();
    assert!((merged.delta[1] / merged.delta[0] - 3.0).abs() < 1e-6);
    assert_eq!(merged.delta[4..], [0.0, 1.0, 0.0, 0.0], "only one learner saw tokens of the second expert");
    let short = [offer(0, Some(&[1])), offer(1, None)];
    assert_eq!(merge_payloads(&slices, &short), Err(MergeError::UnitWeights { input: 0, got: 1, expected: 2 }));
}

#[test]
fn a_payload_that_is_not_what_its_header_says_names_itself_and_its_fault() {
    let (header, mut payloads) = (header(Codec::Int4), payloads(Codec::Int4));
    let other = PayloadHeader::of_slices(Codec::Int4, &slices(), Digest::ZERO, 0, 1);
    let bf16 = PayloadHeader::of_slices(Codec::Bf16, &slices(), Digest::ZERO, 0, 0);
    let mut wrong = offers(&header, &payloads);
    wrong[2].header = &other;
    assert_eq!(merge_payloads(&slices(), &wrong), Err(MergeError::Payload { input: 2, source: CodecError::Header { byte: 48 } }));
    wrong[2].header = &bf16;
    assert_eq!(merge_payloads(&slices(), &wrong), Err(MergeError::Mixed { input: 2 }));
    payloads[5][HEADER_BYTES + 3] = 0x7f;
    payloads[5][HEADER_BYTES + 2] = 0xff;
    let broken = merge_payloads(&slices(), &offers(&header, &payloads));
    assert_eq!(broken, Err(MergeError::Payload { input: 5, source: CodecError::Scale { element: 0 } }));
    payloads[5].pop();
    let broken = merge_payloads(&slices(), &offers(&header, &payloads));
    assert!(matches!(broken, Err(MergeError::Payload { input: 5, source: CodecError::Length { .. } })));
    assert_eq!(merge_payloads(&slices(), &[]), Err(MergeError::NoInput));
}
