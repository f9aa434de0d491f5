//! The chunked forms against the recurrences that define them, and the step size against known values, in f64.
#![cfg(feature = "libtorch")]

use quasar_model::torch::{chunked, step_size};
use tch::{Device, Kind, Tensor};

const TOKENS: i64 = 150; // no multiple of any chunk size
const HEADS: i64 = 3;
const WIDTH: i64 = 16;
const SLOTS: i64 = 12;

/// Reproducible numbers between -1 and 1.
fn numbers(shape: &[i64], seed: u64) -> Tensor {
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let count: i64 = shape.iter().product();
    let values: Vec<f64> = (0..count)
        .map(|_| {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (word >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect();
    Tensor::from_slice(&values).reshape(shape)
}

fn normalised(x: &Tensor) -> Tensor {
    x / x.norm_scalaropt_dim(2.0, [-1].as_slice(), true)
}

/// Token `t` of `[G, T, n]` as `[G, n, 1]`.
fn column(x: &Tensor, t: i64) -> Tensor {
    x.select(1, t).unsqueeze(-1)
}

fn delta_rule(x: &[Tensor]) -> Tensor {
    let (q, k, v, beta) = (&x[0], &x[1], &x[2], &x[3]);
    let mut state = Tensor::zeros([q.size()[0], WIDTH, WIDTH], (Kind::Double, Device::Cpu));
    let outputs: Vec<Tensor> = (0..TOKENS)
        .map(|t| {
            let (key, value) = (column(k, t), column(v, t));
            let error = &value - state.transpose(1, 2).matmul(&key);
            let step = beta.select(1, t).reshape([-1, 1, 1]);
            state = &state + (&key * step).matmul(&error.transpose(1, 2));
            (state.transpose(1, 2).matmul(&column(q, t)) * (WIDTH as f64).powf(-0.5)).squeeze_dim(-1)
        })
        .collect();
    Tensor::stack(&outputs, 1)
}

fn constant_decay(x: &[Tensor], slope: &Tensor) -> Tensor {
    let (q, k, v) = (&x[0], &x[1], &x[2]);
    let keep = slope.exp().repeat([q.size()[0] / HEADS]).reshape([-1, 1, 1]);
    let mut state = Tensor::zeros([q.size()[0], WIDTH, WIDTH], (Kind::Double, Device::Cpu));
    let outputs: Vec<Tensor> = (0..TOKENS)
        .map(|t| {
            state = &state * &keep + column(k, t).matmul(&column(v, t).transpose(1, 2));
            (state.transpose(1, 2).matmul(&column(q, t)) * (WIDTH as f64).powf(-0.5)).squeeze_dim(-1)
        })
        .collect();
    Tensor::stack(&outputs, 1)
}

fn slots(x: &[Tensor]) -> Tensor {
    let (q, k, v, decay, write) = (&x[0], &x[1], &x[2], &x[3], &x[4]);
    let groups = q.size()[0];
    let mut keys = Tensor::zeros([groups, WIDTH, SLOTS], (Kind::Double, Device::Cpu));
    let mut values = Tensor::zeros([groups, SLOTS, WIDTH], (Kind::Double, Device::Cpu));
    let outputs: Vec<Tensor> = (0..TOKENS)
        .map(|t| {
            let (keep, strength) = (column(decay, t).exp(), column(write, t));
            keys = &keys * keep.transpose(1, 2) + column(k, t).matmul(&strength.transpose(1, 2));
            values = &values * &keep + strength.matmul(&column(v, t).transpose(1, 2));
            let p = column(q, t).transpose(1, 2).matmul(&keys).softmax(-1, None::<Kind>);
            p.matmul(&values).squeeze_dim(1)
        })
        .collect();
    Tensor::stack(&outputs, 1)
}

/// Outputs and input gradients of both forms agree to 1e-10.
fn agree(name: &str, inputs: &[Tensor], recurrent: impl Fn(&[Tensor]) -> Tensor, chunked: impl Fn(&[Tensor], i64) -> Tensor) {
    let inputs: Vec<Tensor> = inputs.iter().map(|x| x.detach().set_requires_grad(true)).collect();
    let expected = recurrent(&inputs);
    let seed = numbers(&expected.size(), 99);
    let gradients = |out: &Tensor| Tensor::run_backward(&[(out * &seed).sum(None::<Kind>)], &inputs, false, false);
    let expected_gradients = gradients(&expected);
    for size in [16, 32, 64, TOKENS] {
        let found = chunked(&inputs, size);
        let largest = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        assert!(largest(&found, &expected) < 1e-10, "{name}, chunk {size}: outputs");
        for (n, (a, b)) in gradients(&found).iter().zip(&expected_gradients).enumerate() {
            assert!(largest(a, b) < 1e-10, "{name}, chunk {size}: gradient {n}: {}", largest(a, b));
        }
    }
}

fn qkv() -> Vec<Tensor> {
    let shape = [2 * HEADS, TOKENS, WIDTH];
    vec![normalised(&numbers(&shape, 1)), normalised(&numbers(&shape, 2)), numbers(&shape, 3)]
}

#[test]
fn the_chunked_delta_rule_equals_its_recurrence() {
    let mut inputs = qkv();
    inputs.push((numbers(&[2 * HEADS, TOKENS], 4) + 1.0) * 0.475);
    agree("delta rule", &inputs, delta_rule, |x, size| chunked::delta_rule(&x[0], &x[1], &x[2], &x[3], size).unwrap());
}

#[test]
fn the_chunked_constant_decay_equals_its_recurrence() {
    let slope = Tensor::from_slice(&[-0.9, -0.2, -0.003]);
    let chunked = |x: &[Tensor], size| chunked::constant_decay(&x[0], &x[1], &x[2], &slope, size).unwrap();
    agree("constant decay", &qkv(), |x| constant_decay(x, &slope), chunked);
}

#[test]
fn the_chunked_slot_memory_equals_its_recurrence() {
    let mut inputs = qkv();
    let shape = [2 * HEADS, TOKENS, SLOTS];
    // Strong decays, whose inverse would overflow; half of the slots are not picked.
    let decay = numbers(&shape, 5).clamp_max(0.0) * 30.0;
    inputs.push(decay.shallow_clone());
    inputs.push(-decay.expm1());
    agree("slots", &inputs, slots, |x, size| chunked::slots(&x[0], &x[1], &x[2], &x[3], &x[4], size).unwrap());
}

#[test]
fn the_chunk_lengths_cover_short_and_long_sequences() {
    assert_eq!([chunked::chunk_for(7), chunked::chunk_for(128), chunked::chunk_for(2048)], [7, 128, 64]);
    assert_eq!([chunked::slot_chunk_for(7), chunked::slot_chunk_for(2048)], [7, 16]);
}

#[test]
fn the_step_size_and_its_gradient_have_the_known_values() {
    let b = Tensor::from_slice(&[0.3, 0.8]).reshape([1, 1, 2]).set_requires_grad(true);
    let norm = Tensor::ones([1, 1, 2], (Kind::Double, Device::Cpu));
    let a_log = Tensor::from_slice(&[-1.0, 0.25]);
    let dt_bias = Tensor::from_slice(&[-0.5, 0.0, 0.5, 1.0, -1.0, 0.0, 0.2, 0.4]);
    let beta = step_size(&norm, &b, &a_log, &dt_bias).unwrap();
    let gradient = Tensor::run_backward(&[beta.sum(None::<Kind>)], &[&b], false, false);
    for (n, (value, slope)) in [(0.312490675, 0.154051085), (0.743949475, 0.197427007)].into_iter().enumerate() {
        let at = [0, 0, n as i64];
        assert!((beta.double_value(&at) - value).abs() < 1e-9, "{}", beta.double_value(&at));
        assert!((gradient[0].double_value(&at) - slope).abs() < 1e-9, "{}", gradient[0].double_value(&at));
    }
}

#[test]
fn a_saturated_step_size_has_its_bound_and_no_gradient() {
    let b = Tensor::from_slice(&[0.5]).reshape([1, 1, 1]).set_requires_grad(true);
    let norm = Tensor::ones([1, 1, 1], (Kind::Double, Device::Cpu));
    let beta = step_size(&norm, &b, &Tensor::from_slice(&[2.5]), &Tensor::from_slice(&[0.0, 0.0])).unwrap();
    assert_eq!(beta.double_value(&[0, 0, 0]), 0.95);
    assert_eq!(Tensor::run_backward(&[beta.sum(None::<Kind>)], &[&b], false, false)[0].double_value(&[0, 0, 0]), 0.0);
}
