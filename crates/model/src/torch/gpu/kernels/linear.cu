// The delta rule (DELTA) and linear attention with a constant decay, in chunks of 64 tokens, forward and backward.
//
// Delta rule: S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T. With A = strictly lower part of diag(beta) K K^T and T = (I + A)^-1,
// W = T diag(beta) K and U = T diag(beta) V: fresh values V' = U - W S, then S += K^T V'.
// Constant decay: S_t = e^g S_{t-1} + k_t v_t^T; V' = V, and rows are weighted by powers of e^g.
// Both: o_t = 128^-1/2 S_t^T q_t. Inside a chunk O = scale (Q S + P V') with P the lower part of Q K^T (times the decay).
//
// q, o and their gradients are [rows, tokens, HEADS, 128]; k, v of the decayed form have KV_HEADS heads, each for HEADS / KV_HEADS
// queries, and their gradients HEADS (the caller adds them up). Chunk arrays are [rows * HEADS, chunks, 64 or 128, 128].

#define CHUNK 64
#define SCALE 0.08838834764831845f  // 128^-1/2

// T = (I + A)^-1 of a chunk, W and U. k, v [rows, tokens, HEADS, 128], beta [rows, tokens, HEADS]; inverse [groups, chunks, 64, 64],
// w, u as chunk arrays. Shared memory: 2 * 64 * WIDE + 64 * HALF bf16, 64 * 68 + 64 f32.
extern "C" __global__ void __launch_bounds__(THREADS) delta_prepare(const bf16* k, const bf16* v, const float* beta, bf16* inverse, bf16* w,
                                                                    bf16* u, int tokens) {
  Arena arena;
  bf16 *ks = arena.half(64 * WIDE), *vs = arena.half(64 * WIDE), *ts = arena.half(64 * HALF);
  float *as = arena.single(64 * 68), *bs = arena.single(64);
  Place p = place_of<CHUNK>(blockIdx.x, gridDim.x, blockIdx.y, tokens);
  i64 at = at_token(p, tokens, HEADS, p.head, 128);
  fetch<64, 128>(ks, k + at, HEADS * 128, p.many);
  fetch<64, 128>(vs, v + at, HEADS * 128, p.many);
  if (threadIdx.x < 64) bs[threadIdx.x] = threadIdx.x < p.many ? beta[at / 128 + threadIdx.x * HEADS] : 0.f;
  arrive();
  {
    Tile<64, 64> a;
    a.clear();
    a.add<128, AS_IS, TURNED>(ks, WIDE, ks, WIDE);
    a.each([&](int i, int j, float& x, float& y) {
      as[i * 68 + j] = i > j ? x * bs[i] : 0.f;
      as[i * 68 + j + 1] = i > j + 1 ? y * bs[i] : 0.f;
    });
  }
  __syncthreads();
  // Both diagonal blocks of 32 by forward substitution, a thread a column; results overwrite the blocks afterwards.
  float column[32];
  int c = threadIdx.x & 31, half = threadIdx.x >> 5;
  if (threadIdx.x < 64) {
    const float* block = as + half * (32 * 68 + 32);
#pragma unroll
    for (int i = 0; i < 32; i++) {
      float x = i == c ? 1.f : 0.f;
#pragma unroll
      for (int j = 0; j < i; j++) x -= block[i * 68 + j] * column[j];
      column[i] = x;
    }
  }
  __syncthreads();
  if (threadIdx.x < 64) {
    float* block = as + half * (32 * 68 + 32);
#pragma unroll
    for (int i = 0; i < 32; i++) block[i * 68 + c] = column[i];
  }
  __syncthreads();
  // The block below: T21 = -T22 A21 T11, four columns a thread; the half product waits in the upper right block, which T has zero.
  int row = threadIdx.x >> 3, col = (threadIdx.x & 7) * 4;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
  for (int j = 0; j < 32; j++) {
    float a = as[(32 + row) * 68 + j];
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += a * as[j * 68 + col + i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++) as[row * 68 + 32 + col + i] = sum[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] = 0.f;
#pragma unroll 8
  for (int j = 0; j < 32; j++) {
    float a = as[(32 + row) * 68 + 32 + j];
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] -= a * as[j * 68 + 32 + col + i];
  }
#pragma unroll
  for (int i = 0; i < 4; i++) as[(32 + row) * 68 + col + i] = sum[i];
  __syncthreads();
  bf16* to = inverse + at_chunk(p, 64, 64);
  for (int i = threadIdx.x; i < 64 * 32; i += THREADS) {
    int r = i >> 5, s = (i & 31) * 2;
    float x = s <= r ? as[r * 68 + s] : 0.f, y = s + 1 <= r ? as[r * 68 + s + 1] : 0.f;
    *reinterpret_cast<u32*>(to + r * 64 + s) = pack(x, y);
    *reinterpret_cast<u32*>(ts + r * HALF + s) = pack(x * bs[s], y * bs[s + 1]);
  }
  __syncthreads();
  Tile<64, 128> out;
  out.clear();
  out.add<64, AS_IS, AS_IS>(ts, HALF, ks, WIDE);
  out.store(w + at_chunk(p, 64, 128), 128);
  out.clear();
  out.add<64, AS_IS, AS_IS>(ts, HALF, vs, WIDE);
  out.store(u + at_chunk(p, 64, 128), 128);
}

// Decay by `distance` tokens.
static __device__ __forceinline__ float decay(float g, int distance) { return __expf(g * (float)distance); }

// States at the start of each chunk, [groups, chunks, 128, 128] (key channel, value channel), and V' (delta rule). Each block walks over
// the chunks of one head with 64 of the value channels (blockIdx.x). w, u are chunk arrays (delta); v is [rows, tokens, KV_HEADS, 128]
// and slope [HEADS] f32 (decay). Shared memory: 128 * HALF + 2 * (2 * 64 * WIDE + 64 * HALF) bf16: two blocks fit a multiprocessor with 228 KiB.
template <bool DELTA> static __device__ __forceinline__ void states_forward(const bf16* k, const bf16* w, const bf16* u, const bf16* v,
                                                                            const float* slope, bf16* states, bf16* fresh, int tokens,
                                                                            int chunks) {
  Arena arena;
  bf16 *ss = arena.half(128 * HALF), *stage[2];
  stage[0] = arena.half(2 * 64 * WIDE + 64 * HALF);
  stage[1] = arena.half(2 * 64 * WIDE + 64 * HALF);
  int group = blockIdx.y, slice = blockIdx.x * 64;
  const int heads = DELTA ? HEADS : KV_HEADS;
  auto request = [&](int chunk) {
    Place p = place_of<CHUNK>(chunk, chunks, group, tokens);
    bf16* s = stage[chunk & 1];
    i64 at = at_token(p, tokens, heads, DELTA ? p.head : kv_head(p.head), 128);
    fetch<64, 128>(s, k + at, heads * 128, p.many);
    if (DELTA) {
      fetch<64, 128>(s + 64 * WIDE, w + at_chunk(p, 64, 128), 128, 64);
      fetch<64, 64>(s + 2 * 64 * WIDE, u + at_chunk(p, 64, 128) + slice, 128, 64);
    } else {
      fetch<64, 64>(s + 2 * 64 * WIDE, v + at + slice, heads * 128, p.many);
    }
    copies_sent();
  };
  Tile<128, 64> state;
  state.clear();
  request(0);
  float g = DELTA ? 0.f : slope[group % HEADS];
  for (int chunk = 0; chunk < chunks; chunk++) {
    Place p = place_of<CHUNK>(chunk, chunks, group, tokens);
    state.store(ss, HALF);
    copies_wait<0>();
    __syncthreads();
    if (chunk + 1 < chunks) request(chunk + 1);
    // What comes of U or of the values takes their place, each element by the thread that read it.
    bf16 *ks = stage[chunk & 1], *ws = ks + 64 * WIDE, *us = ks + 2 * 64 * WIDE, *fs = us;
    bf16* out = states + at_chunk(p, 128, 128) + slice;
    deliver<128, 64>(out, 128, ss);
    if (DELTA) {
      Tile<64, 64> old;
      old.clear();
      old.add<128, AS_IS, AS_IS>(ws, WIDE, ss, HALF);
      bf16* to = fresh + at_chunk(p, 64, 128) + slice;
      old.each([&](int row, int column, float& x, float& y) {
        u32 value = *reinterpret_cast<u32*>(us + row * HALF + column);
        u32 left = pack(low(value) - x, high(value) - y);
        *reinterpret_cast<u32*>(fs + row * HALF + column) = left;
        *reinterpret_cast<u32*>(to + row * 128 + column) = left;
      });
      __syncthreads();
      state.add<64, TURNED, AS_IS>(ks, WIDE, fs, HALF);
    } else {
      // Values weighted by what is left of them at the end of the chunk.
      for (int i = threadIdx.x; i < 64 * 32; i += THREADS) {
        int row = i >> 5, column = (i & 31) * 2;
        u32 value = *reinterpret_cast<u32*>(us + row * HALF + column);
        float d = decay(g, CHUNK - 1 - row);
        *reinterpret_cast<u32*>(fs + row * HALF + column) = pack(low(value) * d, high(value) * d);
      }
      float whole = decay(g, CHUNK);
      state.each([&](int, int, float& x, float& y) { x *= whole; y *= whole; });
      __syncthreads();
      state.add<64, TURNED, AS_IS>(ks, WIDE, fs, HALF);
    }
    __syncthreads();
  }
}
extern "C" __global__ void __launch_bounds__(THREADS) delta_states(const bf16* k, const bf16* w, const bf16* u, bf16* states, bf16* fresh,
                                                                   int tokens, int chunks) {
  states_forward<true>(k, w, u, 0, 0, states, fresh, tokens, chunks);
}
extern "C" __global__ void __launch_bounds__(THREADS) decay_states(const bf16* k, const bf16* v, const float* slope, bf16* states,
                                                                   int tokens, int chunks) {
  states_forward<false>(k, 0, 0, v, slope, states, 0, tokens, chunks);
}

// O of one chunk. fresh: V' as chunk array (delta) or v (decay). Shared memory: 3 * 64 * WIDE + 128 * WIDE + 64 * HALF bf16.
template <bool DELTA> static __device__ __forceinline__ void output(const bf16* q, const bf16* k, const bf16* fresh, const bf16* states,
                                                                    const float* slope, bf16* o, int tokens) {
  Arena arena;
  bf16 *qs = arena.half(64 * WIDE), *ks = arena.half(64 * WIDE), *vs = arena.half(64 * WIDE), *ss = arena.half(128 * WIDE),
       *ps = arena.half(64 * HALF);
  Place p = place_of<CHUNK>(blockIdx.x, gridDim.x, blockIdx.y, tokens);
  const int heads = DELTA ? HEADS : KV_HEADS;
  i64 at = at_token(p, tokens, heads, DELTA ? p.head : kv_head(p.head), 128), at_q = at_token(p, tokens, HEADS, p.head, 128);
  fetch<64, 128>(qs, q + at_q, HEADS * 128, p.many);
  fetch<64, 128>(ks, k + at, heads * 128, p.many);
  if (DELTA) fetch<64, 128>(vs, fresh + at_chunk(p, 64, 128), 128, 64);
  else fetch<64, 128>(vs, fresh + at, heads * 128, p.many);
  fetch<128, 128>(ss, states + at_chunk(p, 128, 128), 128, 128);
  float g = DELTA ? 0.f : slope[p.head];
  arrive();
  {
    Tile<64, 64> scores;
    scores.clear();
    scores.add<128, AS_IS, TURNED>(qs, WIDE, ks, WIDE);
    scores.each([&](int t, int i, float& x, float& y) {
      x = i <= t ? x * (DELTA ? 1.f : decay(g, t - i)) : 0.f;
      y = i + 1 <= t ? y * (DELTA ? 1.f : decay(g, t - i - 1)) : 0.f;
    });
    scores.store(ps, HALF);
  }
  Tile<64, 128> out;
  out.clear();
  out.add<128, AS_IS, AS_IS>(qs, WIDE, ss, WIDE);
  if (!DELTA) out.each([&](int t, int, float& x, float& y) { float d = decay(g, t + 1); x *= d; y *= d; });
  __syncthreads();
  out.add<64, AS_IS, AS_IS>(ps, HALF, vs, WIDE);
  out.each([&](int, int, float& x, float& y) { x *= SCALE; y *= SCALE; });
  out.store_rows(o + at_q, HEADS * 128, p.many);
}
extern "C" __global__ void __launch_bounds__(THREADS) delta_output(const bf16* q, const bf16* k, const bf16* fresh, const bf16* states,
                                                                   bf16* o, int tokens) {
  output<true>(q, k, fresh, states, 0, o, tokens);
}
extern "C" __global__ void __launch_bounds__(THREADS) decay_output(const bf16* q, const bf16* k, const bf16* v, const bf16* states,
                                                                   const float* slope, bf16* o, int tokens) {
  output<false>(q, k, v, states, slope, o, tokens);
}

// The part of dV' that comes from inside the chunk: scale P^T dO, a chunk array. Shared memory: 3 * 64 * WIDE + 64 * HALF bf16.
extern "C" __global__ void __launch_bounds__(THREADS) delta_local(const bf16* q, const bf16* k, const bf16* d_o, bf16* dfresh, int tokens) {
  Arena arena;
  bf16 *qs = arena.half(64 * WIDE), *ks = arena.half(64 * WIDE), *os = arena.half(64 * WIDE), *ps = arena.half(64 * HALF);
  Place p = place_of<CHUNK>(blockIdx.x, gridDim.x, blockIdx.y, tokens);
  i64 at = at_token(p, tokens, HEADS, p.head, 128);
  fetch<64, 128>(qs, q + at, HEADS * 128, p.many);
  fetch<64, 128>(ks, k + at, HEADS * 128, p.many);
  fetch<64, 128>(os, d_o + at, HEADS * 128, p.many);
  arrive();
  Tile<64, 64> scores;
  scores.clear();
  scores.add<128, AS_IS, TURNED>(qs, WIDE, ks, WIDE);
  scores.each([&](int t, int i, float& x, float& y) {
    x = i <= t ? x * SCALE : 0.f;
    y = i + 1 <= t ? y * SCALE : 0.f;
  });
  scores.store(ps, HALF);
  __syncthreads();
  Tile<64, 128> out;
  out.clear();
  out.add<64, TURNED, AS_IS>(ps, HALF, os, WIDE);
  out.store(dfresh + at_chunk(p, 64, 128), 128);
}

// Gradients of the states at the end of each chunk, [groups, chunks, 128, 128], from the last chunk to the first; dV' becomes whole in
// place (delta). Blocks as in the forward walk. Shared memory: 128 * HALF + 2 * (3 * 64 * WIDE + 2 * 64 * HALF) bf16 (delta),
// 128 * HALF + 2 * (64 * WIDE + 64 * HALF) bf16 (decay).
template <bool DELTA> static __device__ __forceinline__ void states_backward(const bf16* q, const bf16* k, const bf16* w, const bf16* d_o,
                                                                             const float* slope, bf16* dstates, bf16* dfresh, int tokens,
                                                                             int chunks) {
  const int size = DELTA ? 3 * 64 * WIDE + 2 * 64 * HALF : 64 * WIDE + 64 * HALF;
  Arena arena;
  bf16 *ss = arena.half(128 * HALF), *stage[2];
  stage[0] = arena.half(size);
  stage[1] = arena.half(size);
  int group = blockIdx.y, slice = blockIdx.x * 64;
  auto request = [&](int chunk) {
    Place p = place_of<CHUNK>(chunk, chunks, group, tokens);
    bf16* s = stage[chunk & 1];
    i64 at = at_token(p, tokens, HEADS, p.head, 128);
    fetch<64, 128>(s, q + at, HEADS * 128, p.many);
    fetch<64, 64>(s + 64 * WIDE, d_o + at + slice, HEADS * 128, p.many);
    if (DELTA) {
      fetch<64, 128>(s + 64 * WIDE + 64 * HALF, k + at, HEADS * 128, p.many);
      fetch<64, 128>(s + 2 * 64 * WIDE + 64 * HALF, w + at_chunk(p, 64, 128), 128, 64);
      fetch<64, 64>(s + 3 * 64 * WIDE + 64 * HALF, dfresh + at_chunk(p, 64, 128) + slice, 128, 64);
    }
    copies_sent();
  };
  Tile<128, 64> state;
  state.clear();
  request(chunks - 1);
  float g = DELTA ? 0.f : slope[group % HEADS];
  for (int chunk = chunks - 1; chunk >= 0; chunk--) {
    Place p = place_of<CHUNK>(chunk, chunks, group, tokens);
    state.store(ss, HALF);
    copies_wait<0>();
    __syncthreads();
    if (chunk > 0) request(chunk - 1);
    bf16 *qs = stage[chunk & 1], *os = qs + 64 * WIDE, *ks = os + 64 * HALF, *ws = ks + 64 * WIDE, *ls = ws + 64 * WIDE,
         *fs = DELTA ? ls : os;  // in place, as in the forward walk
    bf16* out = dstates + at_chunk(p, 128, 128) + slice;
    deliver<128, 64>(out, 128, ss);
    if (DELTA) {
      {
        Tile<64, 64> whole;
        whole.clear();
        whole.add<128, AS_IS, AS_IS>(ks, WIDE, ss, HALF);
        bf16* to = dfresh + at_chunk(p, 64, 128) + slice;
        whole.each([&](int row, int column, float& x, float& y) {
          u32 local = *reinterpret_cast<u32*>(ls + row * HALF + column);
          float a = low(local) + x, b = high(local) + y;
          *reinterpret_cast<u32*>(to + row * 128 + column) = pack(a, b);
          *reinterpret_cast<u32*>(fs + row * HALF + column) = pack(-a, -b);
        });
      }
      Tile<128, 64> read;
      read.clear();
      read.add<64, TURNED, AS_IS>(qs, WIDE, os, HALF);
#pragma unroll
      for (int i = 0; i < Tile<128, 64>::MT / 16; i++)
#pragma unroll
        for (int j = 0; j < Tile<128, 64>::NT / 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) state.c[i][j][e] += SCALE * read.c[i][j][e];
      __syncthreads();
      state.add<64, TURNED, AS_IS>(ws, WIDE, fs, HALF);
    } else {
      for (int i = threadIdx.x; i < 64 * 32; i += THREADS) {
        int row = i >> 5, column = (i & 31) * 2;
        u32 value = *reinterpret_cast<u32*>(os + row * HALF + column);
        float d = SCALE * decay(g, row + 1);
        *reinterpret_cast<u32*>(fs + row * HALF + column) = pack(low(value) * d, high(value) * d);
      }
      float whole = decay(g, CHUNK);
      state.each([&](int, int, float& x, float& y) { x *= whole; y *= whole; });
      __syncthreads();
      state.add<64, TURNED, AS_IS>(qs, WIDE, fs, HALF);
    }
    __syncthreads();
  }
}
extern "C" __global__ void __launch_bounds__(THREADS) delta_states_backward(const bf16* q, const bf16* k, const bf16* w, const bf16* d_o,
                                                                            bf16* dstates, bf16* dfresh, int tokens, int chunks) {
  states_backward<true>(q, k, w, d_o, 0, dstates, dfresh, tokens, chunks);
}
extern "C" __global__ void __launch_bounds__(THREADS) decay_states_backward(const bf16* q, const bf16* d_o, const float* slope,
                                                                            bf16* dstates, int tokens, int chunks) {
  states_backward<false>(q, 0, 0, d_o, slope, dstates, 0, tokens, chunks);
}

// Gradients of q, k, v [rows, tokens, HEADS, 128] and beta [rows, tokens, HEADS] of one chunk, delta rule. With R the lower part of
// dO V'^T: dQ = scale (dO S^T + R K); dK = scale R^T Q + V' dS^T + what comes through W, U and T:
// dW = -dV' S^T, dU = dV', dT = dW (beta K)^T + dU (beta V)^T, dA = strictly lower part of -T^T dT T^T.
// Shared memory: 6 * 64 * WIDE + 128 * WIDE + 2 * 64 * HALF bf16, 64 * 3 f32.
extern "C" __global__ void __launch_bounds__(THREADS) delta_gradients(const bf16* q, const bf16* k, const bf16* v, const float* beta,
                                                                      const bf16* inverse, const bf16* fresh, const bf16* dfresh,
                                                                      const bf16* states, const bf16* dstates, const bf16* d_o, bf16* dq,
                                                                      bf16* dk, bf16* dv, float* dbeta, int tokens) {
  Arena arena;
  bf16 *qs = arena.half(64 * WIDE), *ks = arena.half(64 * WIDE), *vs = arena.half(64 * WIDE), *os = arena.half(64 * WIDE),
       *fs = arena.half(64 * WIDE), *dfs = arena.half(64 * WIDE), *ss = arena.half(128 * WIDE), *ts = arena.half(64 * HALF),
       *xs = arena.half(64 * HALF), *ys = qs, *dss = ss;  // later, when Q and S were used
  float *bs = arena.single(64), *sums = arena.single(128);
  Place p = place_of<CHUNK>(blockIdx.x, gridDim.x, blockIdx.y, tokens);
  i64 at = at_token(p, tokens, HEADS, p.head, 128);
  fetch<64, 128>(os, d_o + at, HEADS * 128, p.many);
  fetch<64, 128>(fs, fresh + at_chunk(p, 64, 128), 128, 64);
  fetch<64, 128>(qs, q + at, HEADS * 128, p.many);
  fetch<64, 128>(ks, k + at, HEADS * 128, p.many);
  fetch<128, 128>(ss, states + at_chunk(p, 128, 128), 128, 128);
  copies_sent();
  fetch<64, 128>(dfs, dfresh + at_chunk(p, 64, 128), 128, 64);
  fetch<64, 128>(vs, v + at, HEADS * 128, p.many);
  fetch<64, 64>(ts, inverse + at_chunk(p, 64, 64), 64, 64);
  copies_sent();
  if (threadIdx.x < 64) bs[threadIdx.x] = threadIdx.x < p.many ? beta[at / 128 + threadIdx.x * HEADS] : 0.f;
  copies_wait<1>();
  __syncthreads();
  {
    Tile<64, 64> r;
    r.clear();
    r.add<128, AS_IS, TURNED>(os, WIDE, fs, WIDE);
    r.each([&](int t, int i, float& x, float& y) {
      x = i <= t ? x : 0.f;
      y = i + 1 <= t ? y : 0.f;
    });
    r.store(xs, HALF);
  }
  __syncthreads();
  {
    Tile<64, 128> out;
    out.clear();
    out.add<128, AS_IS, TURNED>(os, WIDE, ss, WIDE);
    out.add<64, AS_IS, AS_IS>(xs, HALF, ks, WIDE);
    out.each([&](int, int, float& x, float& y) { x *= SCALE; y *= SCALE; });
    out.store_rows(dq + at, HEADS * 128, p.many);
  }
  Tile<64, 128> key;
  key.clear();
  key.add<64, TURNED, AS_IS>(xs, HALF, qs, WIDE);
  key.each([&](int, int, float& x, float& y) { x *= SCALE; y *= SCALE; });
  copies_wait<0>();
  __syncthreads();  // os, qs and xs are free
  {
    Tile<64, 128> dw;
    dw.clear();
    dw.add<128, AS_IS, TURNED>(dfs, WIDE, ss, WIDE);
    dw.each([&](int, int, float& x, float& y) { x = -x; y = -y; });
    dw.store(os, WIDE);
  }
  __syncthreads();
  fetch<128, 128>(dss, dstates + at_chunk(p, 128, 128), 128, 128);
  copies_sent();
  {
    Tile<64, 64> dt;
    dt.clear();
    dt.add<128, AS_IS, TURNED>(os, WIDE, ks, WIDE);
    dt.add<128, AS_IS, TURNED>(dfs, WIDE, vs, WIDE);
    dt.each([&](int, int j, float& x, float& y) { x *= bs[j]; y *= bs[j + 1]; });
    dt.store(xs, HALF);
  }
  __syncthreads();
  {
    Tile<64, 64> x;
    x.clear();
    x.add<64, TURNED, AS_IS>(ts, HALF, xs, HALF);
    x.store(ys, HALF);
  }
  __syncthreads();
  {
    Tile<64, 64> da;
    da.clear();
    da.add<64, AS_IS, TURNED>(ys, HALF, ts, HALF);
    __syncthreads();
    // dA to xs, and with row i times beta_i to ys.
    da.each([&](int i, int j, float& x, float& y) {
      x = i > j ? -x : 0.f;
      y = i > j + 1 ? -y : 0.f;
      *reinterpret_cast<u32*>(xs + i * HALF + j) = pack(x, y);
      *reinterpret_cast<u32*>(ys + i * HALF + j) = pack(x * bs[i], y * bs[i]);
    });
  }
  copies_wait<0>();
  __syncthreads();
  key.add<128, AS_IS, TURNED>(fs, WIDE, dss, WIDE);
  key.add<64, TURNED, AS_IS>(ys, HALF, ks, WIDE);
  // Each row's part of dbeta that this warp sees.
  float part[2] = {0.f, 0.f};
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  {
    Tile<64, 128> scaled;  // d (beta K)
    scaled.clear();
    scaled.add<64, TURNED, AS_IS>(ts, HALF, os, WIDE);
    scaled.add<64, AS_IS, AS_IS>(xs, HALF, ks, WIDE);
    scaled.each([&](int i, int c, float& x, float& y) {
      u32 value = *reinterpret_cast<u32*>(ks + i * WIDE + c);
      part[(i >> 3) & 1] += x * low(value) + y * high(value);
      x *= bs[i];
      y *= bs[i];
    });
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) key.c[0][j][e] += scaled.c[0][j][e];
    key.store_rows(dk + at, HEADS * 128, p.many);
    scaled.clear();  // d (beta V)
    scaled.add<64, TURNED, AS_IS>(ts, HALF, dfs, WIDE);
    scaled.each([&](int i, int c, float& x, float& y) {
      u32 value = *reinterpret_cast<u32*>(vs + i * WIDE + c);
      part[(i >> 3) & 1] += x * low(value) + y * high(value);
      x *= bs[i];
      y *= bs[i];
    });
    scaled.store_rows(dv + at, HEADS * 128, p.many);
  }
#pragma unroll
  for (int n = 0; n < 2; n++) {
    part[n] += __shfl_xor_sync(~0u, part[n], 1);
    part[n] += __shfl_xor_sync(~0u, part[n], 2);
    if ((lane & 3) == 0) sums[(warp & 1) * 64 + (warp >> 1) * 16 + n * 8 + (lane >> 2)] = part[n];
  }
  __syncthreads();
  if (threadIdx.x < p.many) dbeta[at / 128 + threadIdx.x * HEADS] = sums[threadIdx.x] + sums[64 + threadIdx.x];
}

// Gradients of one chunk with constant decay: dq, dk, dv [rows, tokens, HEADS, 128].
// Shared memory: 4 * 64 * WIDE + 2 * 128 * WIDE + 2 * 64 * HALF bf16.
extern "C" __global__ void __launch_bounds__(THREADS) decay_gradients(const bf16* q, const bf16* k, const bf16* v, const float* slope,
                                                                      const bf16* states, const bf16* dstates, const bf16* d_o, bf16* dq,
                                                                      bf16* dk, bf16* dv, int tokens) {
  Arena arena;
  bf16 *qs = arena.half(64 * WIDE), *ks = arena.half(64 * WIDE), *vs = arena.half(64 * WIDE), *os = arena.half(64 * WIDE),
       *ss = arena.half(128 * WIDE), *dss = arena.half(128 * WIDE), *ps = arena.half(64 * HALF), *rs = arena.half(64 * HALF);
  Place p = place_of<CHUNK>(blockIdx.x, gridDim.x, blockIdx.y, tokens);
  i64 at = at_token(p, tokens, HEADS, p.head, 128), at_kv = at_token(p, tokens, KV_HEADS, kv_head(p.head), 128);
  fetch<64, 128>(qs, q + at, HEADS * 128, p.many);
  fetch<64, 128>(ks, k + at_kv, KV_HEADS * 128, p.many);
  fetch<64, 128>(vs, v + at_kv, KV_HEADS * 128, p.many);
  fetch<64, 128>(os, d_o + at, HEADS * 128, p.many);
  fetch<128, 128>(ss, states + at_chunk(p, 128, 128), 128, 128);
  fetch<128, 128>(dss, dstates + at_chunk(p, 128, 128), 128, 128);
  float g = slope[p.head];
  arrive();
  {
    Tile<64, 64> r;
    auto masked = [&](int t, int i, float& x, float& y) {
      x = i <= t ? x * SCALE * decay(g, t - i) : 0.f;
      y = i + 1 <= t ? y * SCALE * decay(g, t - i - 1) : 0.f;
    };
    r.clear();
    r.add<128, AS_IS, TURNED>(os, WIDE, vs, WIDE);
    r.each(masked);
    r.store(rs, HALF);
    r.clear();
    r.add<128, AS_IS, TURNED>(qs, WIDE, ks, WIDE);
    r.each(masked);
    r.store(ps, HALF);
  }
  __syncthreads();
  Tile<64, 128> out;
  out.clear();
  out.add<128, AS_IS, TURNED>(os, WIDE, ss, WIDE);
  out.each([&](int t, int, float& x, float& y) { float d = SCALE * decay(g, t + 1); x *= d; y *= d; });
  out.add<64, AS_IS, AS_IS>(rs, HALF, ks, WIDE);
  out.store_rows(dq + at, HEADS * 128, p.many);
  auto left = [&](int i, int, float& x, float& y) { float d = decay(g, CHUNK - 1 - i); x *= d; y *= d; };
  out.clear();
  out.add<128, AS_IS, TURNED>(vs, WIDE, dss, WIDE);
  out.each(left);
  out.add<64, TURNED, AS_IS>(rs, HALF, qs, WIDE);
  out.store_rows(dk + at, HEADS * 128, p.many);
  out.clear();
  out.add<128, AS_IS, AS_IS>(ks, WIDE, dss, WIDE);
  out.each(left);
  out.add<64, TURNED, AS_IS>(ps, HALF, os, WIDE);
  out.store_rows(dv + at, HEADS * 128, p.many);
}
