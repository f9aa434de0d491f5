// Heads: RMS norm and rotary embedding of queries and keys, and the gated output norm of the linear branches.
// A warp holds one head of one token: four channels a lane (HEAD = 128). Rotary pairs are channels j and j + 32 of the first 64.

#define LANES_TURNED 16  // lanes that hold the rotary channels 0..63
#define PAIR 8           // lane distance of a pair

// What a lane of the rotary part multiplies by, for the position of the token. Tables [length, 32].
static __device__ __forceinline__ void turn(float* y, const float* cos_table, const float* sin_table, int position, int length, int lane,
                                            float direction) {
  float other[4];
#pragma unroll
  for (int i = 0; i < 4; i++) other[i] = __shfl_xor_sync(~0u, y[i], PAIR);
  if (lane >= LANES_TURNED || position >= length) return;
  float sign = (lane & PAIR) ? direction : -direction;
  const float* c = cos_table + position * 32 + (lane & 7) * 4;
  const float* s = sin_table + position * 32 + (lane & 7) * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) y[i] = y[i] * c[i] + sign * other[i] * s[i];
}

// projected [tokens, stride], columns HEADS queries then KV_HEADS keys -> query [tokens, HEADS, 128], key [tokens, KV_HEADS, 128].
// `length` is how far the tables reach; behind it the embedding is the identity. Row r has positions 0..row_tokens.
extern "C" __global__ void qk_forward(const bf16* projected, i64 stride, const bf16* query_weight, const bf16* key_weight,
                                      const float* cos_table, const float* sin_table, bf16* query, bf16* key, int tokens, int row_tokens,
                                      int length, float eps) {
  int lane = threadIdx.x & 31;
  i64 item = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  int token = (int)(item / (HEADS + KV_HEADS)), head = (int)(item % (HEADS + KV_HEADS));
  if (token >= tokens) return;
  bool is_query = head < HEADS;
  float x[4], w[4];
  load4(projected + token * stride + head * 128 + lane * 4, x);
  load4((is_query ? query_weight : key_weight) + lane * 4, w);
  float r = head_scale(x, eps);
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = rounded(rounded(x[i] * r) * w[i]);
  turn(x, cos_table, sin_table, token % row_tokens, length, lane, 1.f);
  bf16* out = is_query ? query + ((i64)token * HEADS + head) * 128 : key + ((i64)token * KV_HEADS + head - HEADS) * 128;
  store4(out + lane * 4, x);
}

// Gradients of queries, keys, values (by strides over row, token, head) -> gradient of the projection, and partial sums of the two
// norm weights, partial [blocks, 2, 128].
extern "C" __global__ void qk_backward(const bf16* projected, i64 stride, const bf16* query_weight, const bf16* key_weight,
                                       const float* cos_table, const float* sin_table, const bf16* dq, i64 dq_row, i64 dq_token, i64 dq_head,
                                       const bf16* dk, i64 dk_row, i64 dk_token, i64 dk_head, const bf16* dv, i64 dv_row, i64 dv_token,
                                       i64 dv_head, bf16* out, i64 out_stride, float* partial, int tokens, int row_tokens, int length,
                                       float eps) {
  __shared__ float part[8][256];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int items = HEADS + 2 * KV_HEADS;
  i64 count = (i64)tokens * items, step = (i64)gridDim.x * 8;
  float dw[2][4], w[2][4];
#pragma unroll
  for (int i = 0; i < 4; i++) dw[0][i] = dw[1][i] = 0.f;
  load4(query_weight + lane * 4, w[0]);
  load4(key_weight + lane * 4, w[1]);
  for (i64 item = (i64)blockIdx.x * 8 + warp; item < count; item += step) {
    int token = (int)(item / items), head = (int)(item % items);
    int row = token / row_tokens, position = token % row_tokens;
    bf16* to = out + token * out_stride + head * 128 + lane * 4;
    float g[4];
    if (head >= HEADS + KV_HEADS) {
      load4(dv + row * dv_row + position * dv_token + (head - HEADS - KV_HEADS) * dv_head + lane * 4, g);
      store4(to, g);
      continue;
    }
    int kind = head < HEADS ? 0 : 1;
    if (kind == 0) load4(dq + row * dq_row + position * dq_token + head * dq_head + lane * 4, g);
    else load4(dk + row * dk_row + position * dk_token + (head - HEADS) * dk_head + lane * 4, g);
    turn(g, cos_table, sin_table, position, length, lane, -1.f);
    float x[4];
    load4(projected + token * stride + head * 128 + lane * 4, x);
    float r = head_scale(x, eps);
    float dot = 0.f;
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
    store4(to, g);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    part[warp][lane * 4 + i] = dw[0][i];
    part[warp][128 + lane * 4 + i] = dw[1][i];
  }
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += part[i][threadIdx.x];
  partial[(i64)blockIdx.x * 256 + threadIdx.x] = sum;
}

// y = cast(rms(o)) * weight * sigmoid(gate), each head by itself. `shared`: the weight has 128 entries, kept within 0..4 and o within
// +-1e4 (delta rule); otherwise HEADS * 128 (decayed attention). gate has rows of gate_stride.
static __device__ __forceinline__ float weight_at(const bf16* weight, int shared, int head, int channel) {
  float w = wide(weight[(shared ? 0 : head * 128) + channel]);
  return shared ? fminf(fmaxf(w, 0.f), 4.f) : w;
}

extern "C" __global__ void head_gate_forward(const bf16* o, const bf16* gate, i64 gate_stride, const bf16* weight, int shared, bf16* y,
                                             int tokens, float eps) {
  int lane = threadIdx.x & 31;
  i64 item = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  int token = (int)(item / HEADS), head = (int)(item % HEADS);
  if (token >= tokens) return;
  float x[4], g[4];
  load4(o + item * 128 + lane * 4, x);
  load4(gate + token * gate_stride + head * 128 + lane * 4, g);
  if (shared) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = fminf(fmaxf(x[i], -1e4f), 1e4f);
  }
  float r = head_scale(x, eps);
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = rounded(rounded(x[i] * r) * weight_at(weight, shared, head, lane * 4 + i)) * sigmoid(g[i]);
  store4(y + item * 128 + lane * 4, x);
}

// do [tokens, HEADS, 128]; dgate with rows of dgate_stride; y again (it is not kept); partial [blocks, HIDDEN] of the weight's gradient.
// Blocks of 8 warps: warp w takes heads w, w + 8, ... of a token.
extern "C" __global__ void head_gate_backward(const bf16* dy, const bf16* o, const bf16* gate, i64 gate_stride, const bf16* weight,
                                              int shared, bf16* d_o, bf16* dgate, i64 dgate_stride, bf16* y, float* partial, int tokens,
                                              float eps) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int turns = HEADS / 8;
  float dw[turns][4];
#pragma unroll
  for (int k = 0; k < turns; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) dw[k][i] = 0.f;
  for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
#pragma unroll
    for (int k = 0; k < turns; k++) {
      int head = k * 8 + warp;
      i64 at = ((i64)token * HEADS + head) * 128 + lane * 4;
      float raw[4], x[4], g[4], d[4], out[4], dg[4];
      load4(o + at, raw);
      load4(gate + token * gate_stride + head * 128 + lane * 4, g);
      load4(dy + at, d);
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = shared ? fminf(fmaxf(raw[i], -1e4f), 1e4f) : raw[i];
      float r = head_scale(x, eps);
      float dot = 0.f;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int channel = lane * 4 + i;
        float w = weight_at(weight, shared, head, channel), s = sigmoid(g[i]);
        x[i] *= r;
        float normed = rounded(x[i]), weighted = rounded(normed * w);
        out[i] = weighted * s;
        dg[i] = fabsf(g[i]) <= 30.f ? d[i] * weighted * s * (1.f - s) : 0.f;
        float inner = d[i] * s;
        float raw_weight = wide(weight[(shared ? 0 : head * 128) + channel]);
        dw[k][i] += shared && (raw_weight < 0.f || raw_weight > 4.f) ? 0.f : inner * normed;
        d[i] = inner * w;
        dot += d[i] * x[i];
      }
      dot = warp_sum(dot) / 128.f;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        d[i] = r * (d[i] - x[i] * dot);
        if (shared && fabsf(raw[i]) > 1e4f) d[i] = 0.f;
      }
      store4(d_o + at, d);
      store4(dgate + token * dgate_stride + head * 128 + lane * 4, dg);
      store4(y + at, out);
    }
  }
#pragma unroll
  for (int k = 0; k < turns; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) partial[(i64)blockIdx.x * HIDDEN + (k * 8 + warp) * 128 + lane * 4 + i] = dw[k][i];
}

// Inputs of the delta rule from the projection [tokens, stride] with columns q | k | v (HIDDEN each) | gate (128) | b (HEADS):
// q, k = silu then unit length, v = silu, all [tokens, HEADS, 128]; step [tokens, HEADS] and its derivative by the logit of b.
extern "C" __global__ void delta_inputs(const bf16* projected, i64 stride, const bf16* a_log, const bf16* dt_bias, bf16* q, bf16* k, bf16* v,
                                        float* step, float* slope, int tokens) {
  int lane = threadIdx.x & 31;
  i64 item = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  int token = (int)(item / HEADS), head = (int)(item % HEADS);
  if (token >= tokens) return;
  const bf16* row = projected + token * stride;
  float squared = 0.f;
#pragma unroll
  for (int part = 0; part < 3; part++) {
    float x[4];
    load4(row + part * HIDDEN + head * 128 + lane * 4, x);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = rounded(silu(x[i]));
    if (part < 2) {
      float norm = sqrtf(warp_sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]));
      float r = 1.f / fmaxf(norm, 1e-12f);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        x[i] = rounded(x[i] * r);
        if (part == 1) squared += x[i] * x[i];
      }
    }
    bf16* to = part == 0 ? q : part == 1 ? k : v;
    store4(to + item * 128 + lane * 4, x);
  }
  squared = fminf(fmaxf(warp_sum(squared), 0.1f), 10.f) + 1e-6f;
  float b = sigmoid(wide(row[3 * HIDDEN + 128 + head])), rate = expf(wide(a_log[head])), sum = 0.f, change = 0.f;
  float bias[4];
  load4(dt_bias + head * 128 + lane * 4, bias);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float kept = expf(-rate * softplus(b + bias[i]));
    sum += 1.f - kept;
    change += kept * rate * sigmoid(b + bias[i]);
  }
  sum = warp_sum(sum) / (128.f * squared);
  change = warp_sum(change) / (128.f * squared) * b * (1.f - b);
  if (lane == 0) {
    bool is_free = sum > 1e-4f && sum < 0.95f;
    step[item] = rounded(fminf(fmaxf(sum, 1e-4f), 0.95f));
    slope[item] = is_free ? change : 0.f;
  }
}

// The gradient of the projection from those of q, k, v [tokens, HEADS, 128] and of the step [tokens, HEADS]; the columns of the gate are
// left as they are.
extern "C" __global__ void delta_inputs_backward(const bf16* projected, i64 stride, const bf16* dq, const bf16* dk, const bf16* dv,
                                                 const float* dstep, const float* slope, bf16* out, int tokens) {
  int lane = threadIdx.x & 31;
  i64 item = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  int token = (int)(item / HEADS), head = (int)(item % HEADS);
  if (token >= tokens) return;
#pragma unroll
  for (int part = 0; part < 3; part++) {
    i64 at = token * stride + part * HIDDEN + head * 128 + lane * 4;
    float raw[4], g[4], x[4];
    load4(projected + at, raw);
    load4((part == 0 ? dq : part == 1 ? dk : dv) + item * 128 + lane * 4, g);
    if (part < 2) {
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = silu(raw[i]);
      float norm = fmaxf(sqrtf(warp_sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3])), 1e-12f);
      float r = 1.f / norm;
      float dot = warp_sum(x[0] * g[0] + x[1] * g[1] + x[2] * g[2] + x[3] * g[3]) * r * r;
#pragma unroll
      for (int i = 0; i < 4; i++) g[i] = r * (g[i] - x[i] * dot);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) g[i] *= silu_slope(raw[i]);
    store4(out + at, g);
  }
  if (lane == 0) out[token * stride + 3 * HIDDEN + 128 + head] = narrow(dstep[item] * slope[item]);
}
