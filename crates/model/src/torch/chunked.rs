//! The three linear-attention recurrences in chunked form: matrix products inside chunks of tokens, a state between them.
//!
//! All inputs have one axis `G` of independent heads (rows times heads) before the tokens: `q, k [G, T, K]`,
//! `v [G, T, V]`, `beta [G, T]`, `log_decay, write [G, T, M]`. Each function returns the outputs `[G, T, V]`. States begin
//! at zero. Tokens are padded with zeros to whole chunks, which changes no output. The functions work in f32 and f64.
//! Source: the model specification, section on chunked forms.

use tch::{Kind, Tensor};

use super::ops::Result;

/// Sequences up to this length are one chunk of the delta rule and of decayed attention: no state at all.
const SINGLE_CHUNK: i64 = 128;
/// Chunk for longer sequences.
const CHUNK: i64 = 64;
/// The slot memory holds a tensor of chunk² numbers per slot: smaller chunks.
const SLOT_CHUNK: i64 = 16;

/// The chunk length for sequences of `tokens`.
pub fn chunk_for(tokens: i64) -> i64 {
    if tokens <= SINGLE_CHUNK { tokens } else { CHUNK }
}

/// The chunk length of the slot memory for sequences of `tokens`.
pub fn slot_chunk_for(tokens: i64) -> i64 {
    tokens.min(SLOT_CHUNK)
}

/// `[G, T, *]` as `[G, T / size, size, *]`, zeros behind the last token.
fn chunks(x: &Tensor, size: i64) -> Result<Tensor> {
    let shape = x.size();
    let missing = (-shape[1]).rem_euclid(size);
    let padded = if missing == 0 { x.shallow_clone() } else { x.f_constant_pad_nd([0, 0, 0, missing])? };
    padded.f_reshape([shape[0], -1, size, shape[2]])
}

/// Chunk outputs `[G, N, C, V]` as `[G, T, V]`.
fn joined(outputs: &Tensor, tokens: i64) -> Result<Tensor> {
    let shape = outputs.size();
    outputs.f_reshape([shape[0], -1, shape[3]])?.f_narrow(1, 0, tokens)
}

/// Delta rule: `S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ`, `o_t = K^-1/2 S_tᵀ q_t`.
pub fn delta_rule(q: &Tensor, k: &Tensor, v: &Tensor, beta: &Tensor, size: i64) -> Result<Tensor> {
    let (tokens, width) = (q.size()[1], *q.size().last().unwrap_or(&1));
    let q = chunks(&q.f_mul_scalar((width as f64).powf(-0.5))?, size)?;
    let (k, v, beta) = (chunks(k, size)?, chunks(v, size)?, chunks(&beta.f_unsqueeze(-1)?, size)?);
    let k_t = k.f_transpose(-2, -1)?;
    let k_beta = k.f_mul(&beta)?;
    // (I + A) [W | U] = beta [K | V] with A the strictly lower part of beta K Kᵀ: the solver reads nothing else of it.
    let system = k_beta.f_matmul(&k_t)?;
    let scores = q.f_matmul(&k_t)?.f_tril(0)?;
    let solve = |right: &Tensor| system.f_linalg_solve_triangular(right, false, true, true);
    let count = q.size()[1];
    if count == 1 {
        return joined(&scores.f_matmul(&solve(&v.f_mul(&beta)?)?)?, tokens);
    }
    let solved = solve(&Tensor::f_cat(&[&k_beta, &v.f_mul(&beta)?], -1)?)?;
    let value_width = *v.size().last().unwrap_or(&1);
    let parts = solved.f_split_with_sizes([width, value_width], -1)?;
    let [w, u, q, scores, k_t] = [&parts[0], &parts[1], &q, &scores, &k_t].map(|x| x.f_unbind(1));
    let (w, u, q, scores, k_t) = (w?, u?, q?, scores?, k_t?);
    let mut outputs = vec![scores[0].f_bmm(&u[0])?];
    let mut state = k_t[0].f_bmm(&u[0])?;
    for n in 1..count as usize {
        // Values with what is already stored removed.
        let fresh = u[n].f_baddbmm(&w[n], &state, 1.0, -1.0)?;
        outputs.push(q[n].f_bmm(&state)?.f_baddbmm(&scores[n], &fresh, 1.0, 1.0)?);
        if n + 1 < count as usize {
            state = state.f_baddbmm(&k_t[n], &fresh, 1.0, 1.0)?;
        }
    }
    joined(&Tensor::f_stack(&outputs, 1)?, tokens)
}

/// Constant decay: `S_t = e^g S_{t-1} + k_t v_tᵀ`, `o_t = K^-1/2 S_tᵀ q_t`, with one log-decay `g <= 0` for each of the heads:
/// `slope [H]`, `G = rows · H`.
pub fn constant_decay(q: &Tensor, k: &Tensor, v: &Tensor, slope: &Tensor, size: i64) -> Result<Tensor> {
    let (groups, tokens, width) = (q.size()[0], q.size()[1], *q.size().last().unwrap_or(&1));
    let (kind, device) = (q.f_kind()?, q.device());
    let q = chunks(&q.f_mul_scalar((width as f64).powf(-0.5))?, size)?;
    let (k, v) = (chunks(k, size)?, chunks(v, size)?);
    let (count, value_width) = (q.size()[1], v.size()[3]);
    let heads = slope.size()[0];
    let rows = groups / heads;
    let g = slope.f_to_kind(kind)?.f_reshape([heads, 1, 1])?;
    // Decays [H, ..] repeated for every row: [G, 1, ..].
    let for_all = |x: &Tensor| x.f_repeat([rows, 1, 1])?.f_unsqueeze(1);
    let at = Tensor::f_arange(size, (kind, device))?.f_reshape([size, 1])?;
    let between = at.f_sub(&at.f_tr()?)?.f_clamp_min(0.0)?.f_mul(&g)?.f_exp()?.f_tril(0)?;
    let scores = q.f_matmul(&k.f_transpose(-2, -1)?)?.f_mul(&for_all(&between)?)?;
    let inside = scores.f_matmul(&v)?;
    if count == 1 {
        return joined(&inside, tokens);
    }
    // State at the start of chunk n: the additions of all earlier chunks, decayed by the chunks in between. As one product.
    let until_end = at.f_neg()?.f_add_scalar(size - 1)?.f_mul(&g)?.f_exp()?;
    let added = k.f_mul(&for_all(&until_end)?)?.f_transpose(-2, -1)?.f_matmul(&v)?; // [G, N, K, V]
    let number = Tensor::f_arange(count, (kind, device))?.f_reshape([count, 1])?;
    let distance = number.f_sub(&number.f_tr()?)?.f_add_scalar(-1)?;
    let carried = distance.f_clamp_min(0.0)?.f_mul_scalar(size)?.f_mul(&g)?.f_exp()?.f_tril(-1)?; // [H, N, N]
    let states = carried.f_repeat([rows, 1, 1])?.f_matmul(&added.f_reshape([groups, count, -1])?)?;
    let since_start = at.f_add_scalar(1)?.f_mul(&g)?.f_exp()?;
    let q = q.f_mul(&for_all(&since_start)?)?;
    joined(&inside.f_add(&q.f_matmul(&states.f_reshape([groups, count, width, value_width])?)?)?, tokens)
}

/// Sums of `x [G, N, C, M]` along the chunk up to each place. On a GPU as a product: libtorch's sum has no fixed order there.
fn running_sum(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cuda() {
        return x.f_cumsum(2, None::<Kind>);
    }
    let size = x.size()[2];
    Tensor::f_ones([size, size], (x.f_kind()?, x.device()))?.f_tril(0)?.f_matmul(x)
}

/// Gated slots: a key memory `[K, M]` and a value memory `[M, V]`, both decayed by `e^F` per slot, with a softmax over the
/// slots in between: `o_t = softmax(q_tᵀ K_t) V_t`. `log_decay` is `F <= 0`, `write` the strength of the new entry.
pub fn slots(q: &Tensor, k: &Tensor, v: &Tensor, log_decay: &Tensor, write: &Tensor, size: i64) -> Result<Tensor> {
    let (tokens, width, value_width) = (q.size()[1], q.size()[2], v.size()[2]);
    let (q, k, v, write) = (chunks(q, size)?, chunks(k, size)?, chunks(v, size)?, chunks(write, size)?);
    let (groups, count, slots) = (q.size()[0], q.size()[1], write.size()[3]);
    let summed = running_sum(&chunks(log_decay, size)?)?; // b: [G, N, C, M]
    let grown = summed.f_exp()?;

    // [G, N, t, i, M]: s_i e^{b_t - b_i} for i <= t. The difference is taken before exp: e^{-b_i} alone would overflow.
    let future = Tensor::f_ones([size, size], (Kind::Bool, q.device()))?.f_triu(1)?.f_unsqueeze(-1)?;
    let difference = summed.f_unsqueeze(3)?.f_sub(&summed.f_unsqueeze(2)?)?;
    let pair = difference.f_masked_fill(&future, f64::NEG_INFINITY)?.f_exp()?.f_mul(&write.f_unsqueeze(2)?)?;
    let scores = q.f_matmul(&k.f_transpose(-2, -1)?)?; // [G, N, t, i]
    let inside = scores.f_unsqueeze(-2)?.f_matmul(&pair)?.f_squeeze_dim(-2)?; // [G, N, t, M]

    // Both memories decay alike: one state [K + V, M].
    let states = if count == 1 {
        None
    } else {
        let end = summed.f_narrow(2, size - 1, 1)?; // [G, N, 1, M]
        let left = write.f_mul(&end.f_sub(&summed)?.f_exp()?)?;
        let added = Tensor::f_cat(&[&k, &v], -1)?.f_transpose(-2, -1)?.f_matmul(&left)?.f_unbind(1)?;
        let keep = end.f_exp()?.f_unbind(1)?;
        let mut states = vec![Tensor::f_zeros([groups, width + value_width, slots], (q.f_kind()?, q.device()))?, added[0].shallow_clone()];
        for n in 1..count as usize - 1 {
            states.push(added[n].f_addcmul(&states[n], &keep[n])?);
        }
        let both = Tensor::f_stack(&states, 1)?.f_split_with_sizes([width, value_width], 2)?;
        Some((both[0].shallow_clone(), both[1].f_transpose(-2, -1)?))
    };
    let logits = match &states {
        None => inside,
        Some((keys, _)) => inside.f_addcmul(&q.f_matmul(keys)?, &grown)?,
    };
    let p = logits.f_softmax(-1, None::<Kind>)?;
    let mixed = pair.f_matmul(&p.f_unsqueeze(-1)?)?.f_squeeze_dim(-1)?; // [G, N, t, i]
    let out = mixed.f_matmul(&v)?;
    let out = match &states {
        None => out,
        Some((_, values)) => out.f_add(&p.f_mul(&grown)?.f_matmul(values)?)?,
    };
    joined(&out, tokens)
}
