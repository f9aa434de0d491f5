// The slot memory in chunks of 32 tokens, forward and backward.
//
// Per head: key memory K [128, SLOTS], value memory V [SLOTS, 128] (kept transposed here, so that both move alike). With log-decays
// F <= 0 and strengths s = 1 - e^F per slot, and b the running sum of F inside the chunk:
//   y_t = e^b_t (q_t K_0) + sum_{i<=t} (q_t k_i) G_ti,  G_ti = s_i e^{b_t - b_i},  p = softmax(y),
//   o_t = (p e^b_t) V_0 + sum_{i<=t} (sum_m p_tm G_tim) v_i,  memory at the end: memory_0 diag(e^{b_C}) + X^T (s e^{b_C - b}).
// The difference b_t - b_i is taken before exp: e^{-b_i} alone overflows.
//
// q, o and their gradients are [rows, tokens, HEADS, 128], k and v [rows, tokens, KV_HEADS, 128], F [rows, tokens, HEADS, SLOTS]. Chunk
// arrays are [rows * HEADS, chunks, 32, SLOTS], memories [rows * HEADS, chunks, 128, SLOTS]. Built for SLOTS = 64.

#define CHUNK 32
#define ROW 65  // floats in a row of per-slot values

// q: silu and norm; k likewise; v: silu; log-decays F from router scores r and decay logits a. projected [tokens, stride], columns
// q | k | v | r (HEADS * SLOTS) | a (HEADS). The best KEPT slots of a head share its decay.
static __device__ __forceinline__ void best_slots(float a, float b, int lane, bool& has_a, bool& has_b) {
  int above_a = 0, above_b = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    float x = __shfl_sync(~0u, a, i), y = __shfl_sync(~0u, b, i);
    // Slot numbers: lane for a, lane + 32 for b; the lower wins a tie.
    above_a += (x > a || (x == a && i < lane)) + (y > a);
    above_b += (x >= b) + (y > b || (y == b && i < lane));
  }
  has_a = above_a < KEPT;
  has_b = above_b < KEPT;
}

extern "C" __global__ void slot_inputs(const bf16* projected, i64 stride, const bf16* q_weight, const bf16* k_weight, const bf16* a_log,
                                       const bf16* dt_bias, bf16* q, bf16* k, bf16* v, bf16* log_decay, int tokens, float eps) {
  const int items = 2 * HEADS + 2 * KV_HEADS;
  int lane = threadIdx.x & 31;
  i64 item = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  i64 token = item / items;
  int n = (int)(item % items);
  if (token >= tokens) return;
  const bf16* row = projected + token * stride;
  if (n < HEADS + 2 * KV_HEADS) {
    float x[4], w[4];
    load4(row + n * 128 + lane * 4, x);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = rounded(silu(x[i]));
    if (n >= HEADS + KV_HEADS) {
      store4(v + (token * KV_HEADS + n - HEADS - KV_HEADS) * 128 + lane * 4, x);
      return;
    }
    load4((n < HEADS ? q_weight : k_weight) + lane * 4, w);
    float r = head_scale(x, eps);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = rounded(x[i] * r) * w[i];
    store4(n < HEADS ? q + (token * HEADS + n) * 128 + lane * 4 : k + (token * KV_HEADS + n - HEADS) * 128 + lane * 4, x);
    return;
  }
  int head = n - HEADS - 2 * KV_HEADS;
  const bf16* scores = row + (HEADS + 2 * KV_HEADS) * 128 + head * SLOTS;
  float a = rounded(sigmoid(wide(scores[lane]))), b = rounded(sigmoid(wide(scores[lane + 32])));
  bool has_a, has_b;
  best_slots(a, b, lane, has_a, has_b);
  float total = warp_sum((has_a ? a : 0.f) + (has_b ? b : 0.f)) + 1e-9f;
  float f = -expf(wide(a_log[head])) * softplus(wide(row[(HEADS + 2 * KV_HEADS) * 128 + HEADS * SLOTS + head]) + wide(dt_bias[head]));
  bf16* out = log_decay + (token * HEADS + head) * SLOTS;
  out[lane] = narrow(has_a ? f * (a / total) : 0.f);
  out[lane + 32] = narrow(has_b ? f * (b / total) : 0.f);
}

// The gradient of the projection; dk, dv come per query head [tokens, HEADS, 128] and are added up. partial [blocks, 256 + 2 * HEADS]:
// both norm weights, A_log, dt_bias.
extern "C" __global__ void slot_inputs_backward(const bf16* projected, i64 stride, const bf16* q_weight, const bf16* k_weight,
                                                const bf16* a_log, const bf16* dt_bias, const bf16* dq, const bf16* dk, const bf16* dv,
                                                const bf16* dlog_decay, bf16* out, float* partial, int tokens, float eps) {
  __shared__ float part[8][256 + 2 * HEADS];
  const int items = 2 * HEADS + 2 * KV_HEADS, group = HEADS / KV_HEADS;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int i = lane; i < 256 + 2 * HEADS; i += 32) part[warp][i] = 0.f;
  __syncwarp();
  float dw[2][4], w[2][4];
#pragma unroll
  for (int i = 0; i < 4; i++) dw[0][i] = dw[1][i] = 0.f;
  load4(q_weight + lane * 4, w[0]);
  load4(k_weight + lane * 4, w[1]);
  i64 count = (i64)tokens * items;
  for (i64 item = (i64)blockIdx.x * 8 + warp; item < count; item += (i64)gridDim.x * 8) {
    i64 token = item / items;
    int n = (int)(item % items);
    const bf16* row = projected + token * stride;
    if (n < HEADS + 2 * KV_HEADS) {
      float raw[4], x[4], g[4];
      load4(row + n * 128 + lane * 4, raw);
      if (n < HEADS) {
        load4(dq + (token * HEADS + n) * 128 + lane * 4, g);
      } else {
        bool is_key = n < HEADS + KV_HEADS;
        const bf16* from = (is_key ? dk : dv) + (token * HEADS + (n - HEADS - (is_key ? 0 : KV_HEADS)) * group) * 128 + lane * 4;
        g[0] = g[1] = g[2] = g[3] = 0.f;
#pragma unroll
        for (int j = 0; j < group; j++) {
          float one[4];
          load4(from + j * 128, one);
#pragma unroll
          for (int i = 0; i < 4; i++) g[i] += one[i];
        }
      }
      if (n < HEADS + KV_HEADS) {
        int kind = n < HEADS ? 0 : 1;
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = rounded(silu(raw[i]));
        float r = head_scale(x, eps), dot = 0.f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          x[i] *= r;
          float term = g[i] * rounded(x[i]);
          if (kind == 0) dw[0][i] += term; else dw[1][i] += term;
          g[i] *= kind == 0 ? w[0][i] : w[1][i];
          dot += g[i] * x[i];
        }
        dot = warp_sum(dot) / 128.f;
#pragma unroll
        for (int i = 0; i < 4; i++) g[i] = r * (g[i] - x[i] * dot);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) g[i] *= silu_slope(raw[i]);
      store4(out + token * stride + n * 128 + lane * 4, g);
      continue;
    }
    int head = n - HEADS - 2 * KV_HEADS;
    i64 at_score = (HEADS + 2 * KV_HEADS) * 128 + head * SLOTS, at_a = (HEADS + 2 * KV_HEADS) * 128 + HEADS * SLOTS + head;
    float a = rounded(sigmoid(wide(row[at_score + lane]))), b = rounded(sigmoid(wide(row[at_score + lane + 32])));
    bool has_a, has_b;
    best_slots(a, b, lane, has_a, has_b);
    float total = warp_sum((has_a ? a : 0.f) + (has_b ? b : 0.f)) + 1e-9f;
    float logit = wide(row[at_a]) + wide(dt_bias[head]), rate = expf(wide(a_log[head]));
    float f = -rate * softplus(logit);
    const bf16* d = dlog_decay + (token * HEADS + head) * SLOTS;
    float da = has_a ? wide(d[lane]) : 0.f, db = has_b ? wide(d[lane + 32]) : 0.f;
    float dot = warp_sum(da * a + db * b) / total;  // sum of d * share
    bf16* to = out + token * stride;
    to[at_score + lane] = narrow(has_a ? f * (da - dot) / total * a * (1.f - a) : 0.f);
    to[at_score + lane + 32] = narrow(has_b ? f * (db - dot) / total * b * (1.f - b) : 0.f);
    if (lane == 0) {
      float dlogit = -dot * rate * sigmoid(logit);
      to[at_a] = narrow(dlogit);
      part[warp][256 + head] += dot * f;
      part[warp][256 + HEADS + head] += dlogit;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    part[warp][lane * 4 + i] = dw[0][i];
    part[warp][128 + lane * 4 + i] = dw[1][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 256 + 2 * HEADS; i += blockDim.x) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += part[j][i];
    partial[(i64)blockIdx.x * (256 + 2 * HEADS) + i] = sum;
  }
}

// 1 - e^F as the reference computes it, in bf16.
static __device__ __forceinline__ float strength(float f) { return rounded(1.f - rounded(__expf(f))); }

// Weights s e^{b_C - b} (chunk array) and e^{b_C} [groups, chunks, SLOTS] of each chunk. SLOTS threads.
extern "C" __global__ void slot_gates(const bf16* log_decay, bf16* weights, float* ends, int tokens) {
  Place p = place_of<CHUNK>(blockIdx.x, gridDim.x, blockIdx.y, tokens);
  const bf16* from = log_decay + at_token(p, tokens, HEADS, p.head, SLOTS) + threadIdx.x;
  float f[CHUNK], sum = 0.f;
#pragma unroll
  for (int t = 0; t < CHUNK; t++) {
    f[t] = t < p.many ? wide(from[(i64)t * HEADS * SLOTS]) : 0.f;
    sum += f[t];
  }
  float b = 0.f;
  bf16* to = weights + at_chunk(p, CHUNK, SLOTS) + threadIdx.x;
#pragma unroll
  for (int t = 0; t < CHUNK; t++) {
    b += f[t];
    to[t * SLOTS] = narrow(strength(f[t]) * __expf(sum - b));
  }
  ends[at_chunk(p, 1, SLOTS) + threadIdx.x] = __expf(sum);
}

// A walk over the chunks of one head: memory of each chunk is written, then memory = memory diag(e^{b_C}) + X^T weights.
// Forward (k, v, gates' weights): memories at the start of each chunk. Backward (q with dy e^b, dO with p e^b), from the last chunk:
// gradients of the memories at the end of each chunk. x [rows, tokens, heads, 128]. blockIdx.x: which memory (2) and which half of its
// channels (2).
extern "C" __global__ void __launch_bounds__(THREADS) slot_walk(const bf16* x_key, const bf16* x_value, int heads, const bf16* weights_key,
                                                                const bf16* weights_value, const float* ends, bf16* keys, bf16* values,
                                                                int is_backward, int tokens, int chunks) {
  __shared__ __align__(16) bf16 xs[2][CHUNK * HALF], ws[2][CHUNK * HALF], ms[64 * HALF];
  int group = blockIdx.y, slice = (blockIdx.x & 1) * 64;
  const bf16 *x = blockIdx.x < 2 ? x_key : x_value, *weights = blockIdx.x < 2 ? weights_key : weights_value;
  bf16* out = blockIdx.x < 2 ? keys : values;
  auto request = [&](int n) {
    int chunk = is_backward ? chunks - 1 - n : n;
    Place p = place_of<CHUNK>(chunk, chunks, group, tokens);
    int head = p.head / (HEADS / heads);
    fetch<CHUNK, 64>(xs[n & 1], x + at_token(p, tokens, heads, head, 128) + slice, heads * 128, p.many);
    fetch<CHUNK, 64>(ws[n & 1], weights + at_chunk(p, CHUNK, SLOTS), SLOTS, CHUNK);
    copies_sent();
  };
  Tile<64, 64> memory;
  memory.clear();
  request(0);
  for (int n = 0; n < chunks; n++) {
    Place p = place_of<CHUNK>(is_backward ? chunks - 1 - n : n, chunks, group, tokens);
    memory.store(ms, HALF);
    copies_wait<0>();
    __syncthreads();
    if (n + 1 < chunks) request(n + 1);
    bf16* to = out + at_chunk(p, 128, SLOTS) + slice * SLOTS;
    deliver<64, 64>(to, SLOTS, ms);
    const float* keep = ends + at_chunk(p, 1, SLOTS);
    memory.each([&](int, int m, float& a, float& b) { a *= keep[m]; b *= keep[m + 1]; });
    memory.add<CHUNK, TURNED, AS_IS>(xs[n & 1], HALF, ws[n & 1], HALF);
    __syncthreads();
  }
}

// Per-slot sums of F and strengths of a chunk, rows of ROW floats.
static __device__ __forceinline__ void gates_of(const bf16* log_decay, const Place& p, int tokens, float* b, float* s) {
  if (threadIdx.x < SLOTS) {
    const bf16* from = log_decay + at_token(p, tokens, HEADS, p.head, SLOTS) + threadIdx.x;
    float sum = 0.f;
#pragma unroll
    for (int t = 0; t < CHUNK; t++) {
      float f = t < p.many ? wide(from[(i64)t * HEADS * SLOTS]) : 0.f;
      sum += f;
      b[t * ROW + threadIdx.x] = sum;
      s[t * ROW + threadIdx.x] = strength(f);
    }
  }
}

// Lower part of the first (`half` 0) or second 32 columns of a 32 x 64 product, as f32 rows of 33.
static __device__ __forceinline__ void store_lower(Tile<32, 64>& tile, int half, float* to) {
  tile.each([&](int t, int i, float& x, float& y) {
    if ((i >> 5) != half) return;
    i &= 31;
    to[t * 33 + i] = i <= t ? x : 0.f;
    to[t * 33 + i + 1] = i + 1 <= t ? y : 0.f;
  });
}

// to[t][m] += sum_{i<=t} scores[t][i] s_i e^{b_t - b_i}
static __device__ __forceinline__ void add_inside(const float* scores, const float* b, const float* s, float* to) {
  int m = threadIdx.x & 63;
  for (int t = threadIdx.x >> 6; t < CHUNK; t += 4) {
    float sum = 0.f, bt = b[t * ROW + m];
#pragma unroll 4
    for (int i = 0; i <= t; i++) sum += scores[t * 33 + i] * s[i * ROW + m] * __expf(bt - b[i * ROW + m]);
    to[t * ROW + m] += sum;
  }
}

// to[n][t][i] = sum_m x[n][t][m] s_im e^{b_tm - b_im} for i <= t, else 0, as bf16 rows of QUARTER; N of them in one pass.
template <int N> struct Pairs {
  const float* x[N];
  bf16* to[N];
};
template <int N> static __device__ __forceinline__ void pair_sums(const Pairs<N>& pairs, const float* b, const float* s) {
  int i = threadIdx.x & 31;
  for (int t = threadIdx.x >> 5; t < CHUNK; t += 8) {
    float sum[N];
#pragma unroll
    for (int n = 0; n < N; n++) sum[n] = 0.f;
    if (i <= t) {
#pragma unroll 8
      for (int m = 0; m < SLOTS; m++) {
        float weight = s[i * ROW + m] * __expf(b[t * ROW + m] - b[i * ROW + m]);
#pragma unroll
        for (int n = 0; n < N; n++) sum[n] += pairs.x[n][t * ROW + m] * weight;
      }
    }
#pragma unroll
    for (int n = 0; n < N; n++) pairs.to[n][t * QUARTER + i] = narrow(sum[n]);
  }
}

// Forward: o. Backward: p, dy, p e^b, dy e^b (chunk arrays, bf16) and dy * y + p * dp (chunk array, f32), where dp = dL/dp, dy = dL/dy.
// Shared memory: 4 * 32 * WIDE + 2 * 128 * HALF + 32 * HALF + 32 * QUARTER bf16, 4 * 32 * ROW + 2 * 32 * 33 f32.
template <bool BACKWARD> static __device__ __forceinline__ void slot_chunk(const bf16* q, const bf16* k, const bf16* v, const bf16* log_decay,
                                                                           const bf16* keys, const bf16* values, const bf16* d_o, bf16* o,
                                                                           bf16* p_out, bf16* dy_out, bf16* pe_out, bf16* dye_out,
                                                                           float* change, int tokens) {
  Arena arena;
  bf16 *kv = arena.half(64 * WIDE), *qs = arena.half(32 * WIDE), *os = arena.half(32 * WIDE), *km = arena.half(128 * HALF),
       *vm = arena.half(128 * HALF), *pe = arena.half(32 * HALF), *cs = arena.half(32 * QUARTER);
  float *b = arena.single(32 * ROW), *s = arena.single(32 * ROW), *y = arena.single(32 * ROW), *d = arena.single(32 * ROW),
        *qk = arena.single(32 * 33), *ov = arena.single(32 * 33);
  Place p = place_of<CHUNK>(blockIdx.x, gridDim.x, blockIdx.y, tokens);
  i64 at = at_token(p, tokens, HEADS, p.head, 128), at_kv = at_token(p, tokens, KV_HEADS, kv_head(p.head), 128);
  fetch<32, 128>(kv, k + at_kv, KV_HEADS * 128, p.many);
  fetch<32, 128>(kv + 32 * WIDE, v + at_kv, KV_HEADS * 128, p.many);
  fetch<32, 128>(qs, q + at, HEADS * 128, p.many);
  if (BACKWARD) fetch<32, 128>(os, d_o + at, HEADS * 128, p.many);
  fetch<128, 64>(km, keys + at_chunk(p, 128, SLOTS), SLOTS, 128);
  fetch<128, 64>(vm, values + at_chunk(p, 128, SLOTS), SLOTS, 128);
  gates_of(log_decay, p, tokens, b, s);
  arrive();
  {
    Tile<32, 64> tile;
    tile.clear();
    tile.add<128, AS_IS, TURNED>(qs, WIDE, kv, WIDE);
    store_lower(tile, 0, qk);
    tile.clear();
    tile.add<128, AS_IS, AS_IS>(qs, WIDE, km, HALF);
    tile.each([&](int t, int m, float& x, float& z) {
      y[t * ROW + m] = x * __expf(b[t * ROW + m]);
      y[t * ROW + m + 1] = z * __expf(b[t * ROW + m + 1]);
    });
    if (BACKWARD) {
      tile.clear();
      tile.add<128, AS_IS, TURNED>(os, WIDE, kv, WIDE);
      store_lower(tile, 1, ov);
      tile.clear();
      tile.add<128, AS_IS, AS_IS>(os, WIDE, vm, HALF);
      tile.each([&](int t, int m, float& x, float& z) {
        d[t * ROW + m] = x * __expf(b[t * ROW + m]);
        d[t * ROW + m + 1] = z * __expf(b[t * ROW + m + 1]);
      });
    }
  }
  __syncthreads();
  add_inside(qk, b, s, y);
  if (BACKWARD) add_inside(ov, b, s, d);
  __syncthreads();
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  i64 out = at_chunk(p, CHUNK, SLOTS);
  for (int t = warp; t < CHUNK; t += 8) {
    float y0 = y[t * ROW + lane], y1 = y[t * ROW + lane + 32], top = warp_max(fmaxf(y0, y1));
    float e0 = __expf(y0 - top), e1 = __expf(y1 - top), total = warp_sum(e0 + e1);
    e0 /= total;
    e1 /= total;
    float grown0 = __expf(b[t * ROW + lane]), grown1 = __expf(b[t * ROW + lane + 32]);
    if (!BACKWARD) {
      y[t * ROW + lane] = e0;
      y[t * ROW + lane + 32] = e1;
      pe[t * HALF + lane] = narrow(e0 * grown0);
      pe[t * HALF + lane + 32] = narrow(e1 * grown1);
    } else {
      float d0 = d[t * ROW + lane], d1 = d[t * ROW + lane + 32], dot = warp_sum(e0 * d0 + e1 * d1);
      float dy0 = e0 * (d0 - dot), dy1 = e1 * (d1 - dot);
      i64 to = out + t * SLOTS + lane;
      p_out[to] = narrow(e0);
      p_out[to + 32] = narrow(e1);
      dy_out[to] = narrow(dy0);
      dy_out[to + 32] = narrow(dy1);
      pe_out[to] = narrow(e0 * grown0);
      pe_out[to + 32] = narrow(e1 * grown1);
      dye_out[to] = narrow(dy0 * grown0);
      dye_out[to + 32] = narrow(dy1 * grown1);
      change[to] = dy0 * y0 + e0 * d0;
      change[to + 32] = dy1 * y1 + e1 * d1;
    }
  }
  if (BACKWARD) return;
  __syncthreads();
  pair_sums<1>({{y}, {cs}}, b, s);
  __syncthreads();
  Tile<32, 128> result;
  result.clear();
  result.add<64, AS_IS, TURNED>(pe, HALF, vm, HALF);
  result.add<32, AS_IS, AS_IS>(cs, QUARTER, kv + 32 * WIDE, WIDE);
  result.store_rows(o + at, HEADS * 128, p.many);
}
extern "C" __global__ void __launch_bounds__(THREADS) slot_output(const bf16* q, const bf16* k, const bf16* v, const bf16* log_decay,
                                                                  const bf16* keys, const bf16* values, bf16* o, int tokens) {
  slot_chunk<false>(q, k, v, log_decay, keys, values, 0, o, 0, 0, 0, 0, 0, tokens);
}
extern "C" __global__ void __launch_bounds__(THREADS) slot_softmax_backward(const bf16* q, const bf16* k, const bf16* v,
                                                                            const bf16* log_decay, const bf16* keys, const bf16* values,
                                                                            const bf16* d_o, bf16* p, bf16* dy, bf16* pe, bf16* dye,
                                                                            float* change, int tokens) {
  slot_chunk<true>(q, k, v, log_decay, keys, values, d_o, 0, p, dy, pe, dye, change, tokens);
}

// Gradients of q, k, v [rows, tokens, HEADS, 128] and F [rows, tokens, HEADS, SLOTS] of one chunk. dkeys, dvalues: gradients of the
// memories at its end; `dye`, `p`, `dy`, `change` from slot_softmax_backward; `weights`, `ends` from slot_gates.
// Shared memory: 4 * 32 * WIDE + 3 * 128 * HALF + 2 * 32 * HALF + 2 * 32 * QUARTER bf16, 5 * 32 * ROW + 2 * 32 * 33 + 512 f32.
extern "C" __global__ void __launch_bounds__(THREADS) slot_gradients(const bf16* q, const bf16* k, const bf16* v, const bf16* log_decay,
                                                                     const bf16* keys, const bf16* values, const bf16* dkeys,
                                                                     const bf16* dvalues, const bf16* d_o, const bf16* p_in,
                                                                     const bf16* dy_in, const bf16* dye_in, const float* change,
                                                                     const bf16* weights, const float* ends, bf16* dq, bf16* dk, bf16* dv,
                                                                     bf16* dlog_decay, int tokens) {
  Arena arena;
  bf16 *kv = arena.half(64 * WIDE), *qs = arena.half(32 * WIDE), *os = arena.half(32 * WIDE), *km = arena.half(128 * HALF),
       *dkm = arena.half(128 * HALF), *dvm = arena.half(128 * HALF), *ws = arena.half(32 * HALF),
       *dye = arena.half(32 * HALF), *as = arena.half(32 * QUARTER), *cs = arena.half(32 * QUARTER);
  float *b = arena.single(32 * ROW), *s = arena.single(32 * ROW), *ps = arena.single(32 * ROW), *dy = arena.single(32 * ROW),
        *z = arena.single(32 * ROW), *qk = arena.single(32 * 33), *ov = arena.single(32 * 33), *sums = arena.single(512);
  Place p = place_of<CHUNK>(blockIdx.x, gridDim.x, blockIdx.y, tokens);
  i64 at = at_token(p, tokens, HEADS, p.head, 128), at_kv = at_token(p, tokens, KV_HEADS, kv_head(p.head), 128);
  i64 at_slots = at_chunk(p, CHUNK, SLOTS), at_memory = at_chunk(p, 128, SLOTS);
  fetch<32, 128>(kv, k + at_kv, KV_HEADS * 128, p.many);
  fetch<32, 128>(kv + 32 * WIDE, v + at_kv, KV_HEADS * 128, p.many);
  fetch<32, 128>(qs, q + at, HEADS * 128, p.many);
  fetch<32, 128>(os, d_o + at, HEADS * 128, p.many);
  fetch<128, 64>(km, keys + at_memory, SLOTS, 128);
  fetch<128, 64>(dkm, dkeys + at_memory, SLOTS, 128);
  fetch<128, 64>(dvm, dvalues + at_memory, SLOTS, 128);
  fetch<32, 64>(ws, weights + at_slots, SLOTS, CHUNK);
  fetch<32, 64>(dye, dye_in + at_slots, SLOTS, CHUNK);
  gates_of(log_decay, p, tokens, b, s);
#pragma unroll
  for (int n = 0; n < CHUNK * SLOTS / THREADS; n++) {
    int i = n * THREADS + threadIdx.x, t = i >> 6, m = i & 63;
    ps[t * ROW + m] = wide(p_in[at_slots + i]);
    dy[t * ROW + m] = wide(dy_in[at_slots + i]);
  }
  {
    // What the memories' own decay contributes, a quarter of the channels a thread. The values' memory is used nowhere else.
    int m = threadIdx.x & 63, c0 = (threadIdx.x >> 6) * 32;
    bf16 vm[32];
#pragma unroll
    for (int c = 0; c < 32; c++) vm[c] = values[at_memory + (c0 + c) * SLOTS + m];
    arrive();
    float sum = 0.f;
#pragma unroll
    for (int c = 0; c < 32; c++)
      sum += wide(km[(c0 + c) * HALF + m]) * wide(dkm[(c0 + c) * HALF + m]) + wide(vm[c]) * wide(dvm[(c0 + c) * HALF + m]);
    sums[threadIdx.x] = sum;
  }
  {
    Tile<32, 64> tile;
    tile.clear();
    tile.add<128, AS_IS, TURNED>(qs, WIDE, kv, WIDE);
    store_lower(tile, 0, qk);
    tile.clear();
    tile.add<128, AS_IS, TURNED>(os, WIDE, kv, WIDE);
    store_lower(tile, 1, ov);
    tile.clear();
    tile.add<128, AS_IS, AS_IS>(kv, WIDE, dkm, HALF);
    tile.add<128, AS_IS, AS_IS>(kv + 32 * WIDE, WIDE, dvm, HALF);
    tile.each([&](int i, int m, float& x, float& y) { z[i * ROW + m] = x; z[i * ROW + m + 1] = y; });
  }
  pair_sums<2>({{dy, ps}, {as, cs}}, b, s);
  __syncthreads();
  {
    Tile<32, 128> out;
    out.clear();
    out.add<64, AS_IS, TURNED>(dye, HALF, km, HALF);
    out.add<32, AS_IS, AS_IS>(as, QUARTER, kv, WIDE);
    out.store_rows(dq + at, HEADS * 128, p.many);
    out.clear();
    out.add<64, AS_IS, TURNED>(ws, HALF, dkm, HALF);
    out.add<32, TURNED, AS_IS>(as, QUARTER, qs, WIDE);
    out.store_rows(dk + at, HEADS * 128, p.many);
    out.clear();
    out.add<64, AS_IS, TURNED>(ws, HALF, dvm, HALF);
    out.add<32, TURNED, AS_IS>(cs, QUARTER, os, WIDE);
    out.store_rows(dv + at, HEADS * 128, p.many);
  }
  // z_im becomes ds_im = sum_{t>=i} (qk_ti dy_tm + ov_ti p_tm) e^{b_t - b_i} + z_im e^{b_C - b_i}; what b_C gets from the strengths' side
  // is summed on the way.
  {
    int m = threadIdx.x & 63;
    float end = b[(CHUNK - 1) * ROW + m], total = 0.f;
    for (int i = threadIdx.x >> 6; i < CHUNK; i += 4) {
      float bi = b[i * ROW + m], sum = z[i * ROW + m] * __expf(end - bi);
      total += s[i * ROW + m] * sum;
#pragma unroll 4
      for (int t = i; t < CHUNK; t++)
        sum += (qk[t * 33 + i] * dy[t * ROW + m] + ov[t * 33 + i] * ps[t * ROW + m]) * __expf(b[t * ROW + m] - bi);
      z[i * ROW + m] = sum;
    }
    sums[256 + threadIdx.x] = total;
  }
  __syncthreads();
  // db_t = dy y + p dp - s ds, for b_C what its own exponentials give on top; F_t is in every b from t on, and in s.
  if (threadIdx.x < SLOTS) {
    int m = threadIdx.x;
    i64 first = at_token(p, tokens, HEADS, p.head, SLOTS) + m;
    // All loads under way before the sum that runs over them.
    float own[CHUNK], f[CHUNK], sum = 0.f;
#pragma unroll
    for (int t = 0; t < CHUNK; t++) {
      own[t] = change[at_slots + t * SLOTS + m];
      f[t] = t < p.many ? wide(log_decay[first + (i64)t * HEADS * SLOTS]) : 0.f;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) sum += sums[256 + j * 64 + m] + sums[j * 64 + m] * ends[at_chunk(p, 1, SLOTS) + m];
#pragma unroll
    for (int t = CHUNK - 1; t >= 0; t--) {
      float ds = z[t * ROW + m];
      sum += own[t] - s[t * ROW + m] * ds;
      if (t < p.many) dlog_decay[first + (i64)t * HEADS * SLOTS] = narrow(sum - ds * __expf(f[t]));
    }
  }
}
