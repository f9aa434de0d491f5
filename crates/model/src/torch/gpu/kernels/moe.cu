// The mixture of experts around its grouped products: choice of experts, stable counting sort by expert, gather, combine, SwiGLU.
// Macros: EXPERTS (a multiple of 32), GROUPS, GROUPS_KEPT, CHOICES.

#define GROUP (EXPERTS / GROUPS)
#define EACH (EXPERTS / 32)  // experts of a lane: lane, lane + 32, ...
#define SORT_TOKENS 256      // tokens that one block sorts

// Total order on (score, expert): the lower expert wins a tie.
static __device__ __forceinline__ void best_of_warp(float& score, int& expert) {
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    float s = __shfl_xor_sync(~0u, score, d);
    int e = __shfl_xor_sync(~0u, expert, d);
    if (s > score || (s == score && e < expert)) { score = s; expert = e; }
  }
}

// logits [tokens, EXPERTS] f32, bias [EXPERTS] -> experts [tokens, CHOICES] and their shares (bf16). A warp a token. With `forced`,
// `experts` is input.
extern "C" __global__ void route_forward(const float* logits, const float* bias, int* experts, bf16* shares, float scaling, int forced,
                                         int tokens) {
  __shared__ float scores[8][EXPERTS];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, token = blockIdx.x * 8 + warp;
  if (token >= tokens) return;
  float rank[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int e = i * 32 + lane;
    float s = sigmoid(logits[(i64)token * EXPERTS + e]);
    scores[warp][e] = s;
    rank[i] = s + bias[e];
  }
  __syncwarp();
  int chosen = 0;
  if (forced) {
    chosen = lane < CHOICES ? experts[(i64)token * CHOICES + lane] : 0;
  } else {
    // Lane g judges group g by its two best experts.
    float sum = -INFINITY;
    if (lane < GROUPS) {
      float first = -INFINITY, second = -INFINITY;
      for (int i = 0; i < GROUP; i++) {
        int e = lane * GROUP + (i + lane) % GROUP;
        float r = scores[warp][e] + bias[e];
        second = fmaxf(second, fminf(first, r));
        first = fmaxf(first, r);
      }
      sum = first + second;
    }
    u32 open = 0;
#pragma unroll
    for (int n = 0; n < GROUPS_KEPT; n++) {
      float s = sum;
      int g = lane;
      best_of_warp(s, g);
      open |= 1u << g;
      if (lane == g) sum = -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (!((open >> ((i * 32 + lane) / GROUP)) & 1)) rank[i] = -INFINITY;
#pragma unroll
    for (int n = 0; n < CHOICES; n++) {
      float s = rank[0];
      int e = lane;
#pragma unroll
      for (int i = 1; i < EACH; i++)
        if (rank[i] > s) { s = rank[i]; e = i * 32 + lane; }
      best_of_warp(s, e);
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (e == i * 32 + lane) rank[i] = -INFINITY;
      if (lane == n) chosen = e;
    }
  }
  float score = lane < CHOICES ? scores[warp][chosen] : 0.f;
  float total = warp_sum(score) + 1e-20f;
  if (lane < CHOICES) {
    if (!forced) experts[(i64)token * CHOICES + lane] = chosen;
    shares[(i64)token * CHOICES + lane] = narrow(score / total * scaling);
  }
}

// Gradient of the logits [tokens, EXPERTS] bf16 from those of the shares, which lie in sorted order: dshares [tokens * CHOICES].
extern "C" __global__ void route_backward(const float* logits, const int* experts, const int* place, const float* dshares, bf16* dlogits,
                                          float scaling, int tokens) {
  int lane = threadIdx.x & 31, token = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (token >= tokens) return;
  bf16* row = dlogits + (i64)token * EXPERTS;
  for (int e = lane * 2; e < EXPERTS; e += 64) *reinterpret_cast<u32*>(row + e) = 0;
  __syncwarp();
  float score = 0.f, d = 0.f;
  int expert = 0;
  if (lane < CHOICES) {
    i64 at = (i64)token * CHOICES + lane;
    expert = experts[at];
    score = sigmoid(logits[(i64)token * EXPERTS + expert]);
    d = dshares[place[at]] * scaling;
  }
  float total = warp_sum(score) + 1e-20f, dot = warp_sum(d * score);
  if (lane < CHOICES) row[expert] = narrow((d / total - dot / (total * total)) * score * (1.f - score));
}

// Assignments of each expert among the tokens of each block, counts [blocks, EXPERTS]. EXPERTS threads, one an expert.
extern "C" __global__ void sort_count(const int* experts, int* counts, int tokens) {
  __shared__ u16 ids[SORT_TOKENS * CHOICES];
  int first = blockIdx.x * SORT_TOKENS, many = min(SORT_TOKENS, tokens - first) * CHOICES;
  for (int i = threadIdx.x; i < many; i += blockDim.x) ids[i] = (u16)experts[(i64)first * CHOICES + i];
  __syncthreads();
  int count = 0;
  for (int i = 0; i < many; i++) count += ids[i] == threadIdx.x;
  counts[(i64)blockIdx.x * EXPERTS + threadIdx.x] = count;
}

// Ends of the experts' runs, ends [EXPERTS], and counts turned into first places. One block of EXPERTS threads.
extern "C" __global__ void sort_scan(int* counts, int* ends, int blocks) {
  __shared__ int sums[EXPERTS];
  int e = threadIdx.x, total = 0;
  for (int b = 0; b < blocks; b++) total += counts[(i64)b * EXPERTS + e];
  sums[e] = total;
  __syncthreads();
  for (int d = 1; d < EXPERTS; d <<= 1) {
    int before = e >= d ? sums[e - d] : 0;
    __syncthreads();
    sums[e] += before;
    __syncthreads();
  }
  ends[e] = sums[e];
  int at = sums[e] - total;
  for (int b = 0; b < blocks; b++) {
    int many = counts[(i64)b * EXPERTS + e];
    counts[(i64)b * EXPERTS + e] = at;
    at += many;
  }
}

// place [tokens * CHOICES]: sorted place of each assignment; source: token at each sorted place; sorted_shares likewise. An expert's
// assignments from number `capacity` on get share 0, which drops them; 0: none is dropped.
extern "C" __global__ void sort_place(const int* experts, const bf16* shares, const int* first_places, int* place, int* source,
                                      bf16* sorted_shares, int capacity, int tokens) {
  __shared__ u16 ids[SORT_TOKENS * CHOICES];
  int first = blockIdx.x * SORT_TOKENS, many = min(SORT_TOKENS, tokens - first) * CHOICES;
  i64 base = (i64)first * CHOICES;
  for (int i = threadIdx.x; i < many; i += blockDim.x) ids[i] = (u16)experts[base + i];
  __syncthreads();
  int at = first_places[(i64)blockIdx.x * EXPERTS + threadIdx.x];
  int end = capacity ? first_places[threadIdx.x] + capacity : 0x7fffffff;
  for (int i = 0; i < many; i++) {
    if (ids[i] != threadIdx.x) continue;
    place[base + i] = at;
    source[at] = first + i / CHOICES;
    sorted_shares[at] = at < end ? shares[base + i] : (bf16)0;
    at++;
  }
}

// out[p] = x[source[p]], rows of HIDDEN; a block of HIDDEN / 8 threads takes GATHER_ROWS of them, all under way at once.
#define GATHER_ROWS 8
extern "C" __global__ void gather_rows(const bf16* x, const int* source, bf16* out, int rows) {
  i64 column = threadIdx.x * 8;
  int first = blockIdx.x * GATHER_ROWS;
  Eight v[GATHER_ROWS];
#pragma unroll
  for (int i = 0; i < GATHER_ROWS; i++)
    if (first + i < rows) v[i] = load8(x + (i64)source[first + i] * HIDDEN + column);
#pragma unroll
  for (int i = 0; i < GATHER_ROWS; i++)
    if (first + i < rows) store8(out + (i64)(first + i) * HIDDEN + column, v[i]);
}

// out[t] = base[t] + sum over k of rows[place[t, k]]; f32 inside.
extern "C" __global__ void combine_rows(const bf16* base, const bf16* rows, const int* place, bf16* out) {
  i64 column = threadIdx.x * 8, at = (i64)blockIdx.x * HIDDEN + column;
  float sum[8], v[CHOICES][8];
#pragma unroll
  for (int k = 0; k < CHOICES; k++) unpack8(load8(rows + (i64)place[(i64)blockIdx.x * CHOICES + k] * HIDDEN + column), v[k]);
  unpack8(load8(base + at), sum);
#pragma unroll
  for (int k = 0; k < CHOICES; k++)
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += v[k][i];
  store8(out + at, pack8(sum));
}

// inner = silu(a) * c * share for x = [a | c], rows of 2 * width; shares may be null. A warp a row.
extern "C" __global__ void swiglu_forward(const bf16* x, const bf16* shares, bf16* inner, i64 rows, int width) {
  int lane = threadIdx.x & 31;
  i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (row >= rows) return;
  float share = shares ? wide(shares[row]) : 1.f;
  const bf16* from = x + row * 2 * width;
  for (int c = lane * 8; c < width; c += 256) {
    float a[8], b[8];
    unpack8(load8(from + c), a);
    unpack8(load8(from + width + c), b);
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = silu(a[i]) * b[i] * share;
    store8(inner + row * width + c, pack8(a));
  }
}

// dx [rows, 2 * width] from dinner [rows, width]; inner once more, for the gradient of the matrix behind; dshares [rows] unless null.
extern "C" __global__ void swiglu_backward(const bf16* x, const bf16* shares, const bf16* dinner, bf16* dx, bf16* inner, float* dshares,
                                           i64 rows, int width) {
  int lane = threadIdx.x & 31;
  i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (row >= rows) return;
  float share = shares ? wide(shares[row]) : 1.f, dshare = 0.f;
  const bf16* from = x + row * 2 * width;
  bf16* to = dx + row * 2 * width;
  for (int c = lane * 8; c < width; c += 256) {
    float a[8], b[8], d[8], out[8];
    unpack8(load8(from + c), a);
    unpack8(load8(from + width + c), b);
    unpack8(load8(dinner + row * width + c), d);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float s = sigmoid(a[i]), act = a[i] * s, product = act * b[i];
      dshare += d[i] * product;
      out[i] = product * share;
      float g = d[i] * share, gate = b[i];
      b[i] = g * act;
      a[i] = g * gate * s * (1.f + a[i] * (1.f - s));
    }
    store8(to + c, pack8(a));
    store8(to + width + c, pack8(b));
    store8(inner + row * width + c, pack8(out));
  }
  if (dshares) {
    dshare = warp_sum(dshare);
    // A share of 0 is that of a dropped assignment.
    if (lane == 0) dshares[row] = share == 0.f ? 0.f : dshare;
  }
}
