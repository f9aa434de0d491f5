// RMS norm over rows of HIDDEN, forward and backward, one block of HIDDEN / 8 threads a row.
// y = cast(x / sqrt(mean(x^2) + eps)) * w; the cast to bf16 comes before the weight, as the reference has it.

enum { PLAIN = 0, SILU = 1, BOUNDED = 2 };

// What is normed: x itself, silu(x) (slot memory's output) or x within +-60 (the delta rule's input).
static __device__ __forceinline__ void prepare(float* x, int mode) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (mode == SILU) x[i] = rounded(silu(x[i]));
    if (mode == BOUNDED) x[i] = fminf(fmaxf(x[i], -60.f), 60.f);
  }
}

// A block's partial sums of eight columns, to partial [blocks, HIDDEN].
static __device__ __forceinline__ void store_partial(float* partial, int column, const float* sum) {
  float* out = partial + (i64)blockIdx.x * HIDDEN + column;
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = sum[i];
}

// x, y [rows, HIDDEN]; weight [HIDDEN] or null; scale [rows] takes 1 / rms.
extern "C" __global__ void rms_forward(const bf16* x, const bf16* weight, bf16* y, float* scale, float eps, int mode) {
  __shared__ float scratch[33];
  i64 at = (i64)blockIdx.x * HIDDEN + threadIdx.x * 8;
  float v[8], w[8];
  unpack8(load8(x + at), v);
  prepare(v, mode);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += v[i] * v[i];
  float r = rsqrtf(block_sum(sum, scratch) / HIDDEN + eps);
  if (weight) unpack8(load8(weight + threadIdx.x * 8), w);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    v[i] *= r;
    if (weight) v[i] = rounded(v[i]) * w[i];
  }
  store8(y + at, pack8(v));
  if (threadIdx.x == 0) scale[blockIdx.x] = r;
}

// dx = carried + d(norm), both [rows, HIDDEN]; carried may be null. partial [blocks, HIDDEN] takes each block's part of dw, unless null.
extern "C" __global__ void rms_backward(const bf16* dy, const bf16* x, const bf16* weight, const float* scale, const bf16* carried,
                                        bf16* dx, float* partial, int rows, int mode) {
  __shared__ float scratch[33];
  int column = threadIdx.x * 8;
  float w[8], dw[8];
#pragma unroll
  for (int i = 0; i < 8; i++) { w[i] = 1.f; dw[i] = 0.f; }
  if (weight) unpack8(load8(weight + column), w);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    i64 at = (i64)row * HIDDEN + column;
    float raw[8], v[8], g[8], c[8];
    unpack8(load8(x + at), raw);
    unpack8(load8(dy + at), g);
    if (carried) unpack8(load8(carried + at), c);
    float r = scale[row], dot = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = raw[i];
    prepare(v, mode);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      v[i] *= r;
      dw[i] += g[i] * rounded(v[i]);
      g[i] *= w[i];
      dot += g[i] * v[i];
    }
    dot = block_sum(dot, scratch) / HIDDEN;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float d = r * (g[i] - v[i] * dot);
      if (mode == SILU) d *= silu_slope(raw[i]);
      if (mode == BOUNDED && fabsf(raw[i]) > 60.f) d = 0.f;
      v[i] = carried ? c[i] + d : d;
    }
    store8(dx + at, pack8(v));
  }
  if (partial) store_partial(partial, column, dw);
}

// Sums the rows of [rows, columns] into out [columns], in a fixed order. Blocks of 32 x 8 threads, 32 columns each.
extern "C" __global__ void column_sums(const float* partial, float* out, int rows, int columns) {
  __shared__ float part[8][33];
  int column = blockIdx.x * 32 + threadIdx.x;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll 8
    for (int row = threadIdx.y; row < rows; row += 8) sum += partial[(i64)row * columns + column];
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) total += part[i][threadIdx.x];
    out[column] = total;
  }
}

// Sums of the columns of a bf16 matrix [rows, HIDDEN] as partial sums [blocks, HIDDEN].
extern "C" __global__ void column_partials(const bf16* x, float* partial, int rows) {
  int column = threadIdx.x * 8;
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] = 0.f;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    float v[8];
    unpack8(load8(x + (i64)row * HIDDEN + column), v);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += v[i];
  }
  store_partial(partial, column, sum);
}

// The gate that adds a branch: gains [HIDDEN] f32, mix = sigmoid of the learnt scalar, one f32 on the device.
// scaled = y * gains
extern "C" __global__ void branch_scale(const bf16* y, const float* gains, bf16* scaled, i64 elements) {
  i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (at >= elements) return;
  float v[8];
  const float* g = gains + at % HIDDEN;
  unpack8(load8(y + at), v);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] *= g[i];
  store8(scaled + at, pack8(v));
}

// x + mix * y
extern "C" __global__ void branch_add(const bf16* x, const bf16* y, const float* mix, bf16* out, i64 elements) {
  i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (at >= elements) return;
  float a[8], b[8], m = *mix;
  unpack8(load8(x + at), a);
  unpack8(load8(y + at), b);
#pragma unroll
  for (int i = 0; i < 8; i++) a[i] += m * b[i];
  store8(out + at, pack8(a));
}

// dt = mix * dx, and each block's part of sum(dx * y * gains), the main term of the mix's gradient, to partial [blocks].
extern "C" __global__ void branch_enter(const bf16* dx, const bf16* y, const float* gains, const float* mix, bf16* dt, float* partial,
                                        int rows) {
  __shared__ float scratch[33];
  int column = threadIdx.x * 8;
  float g[8], m = *mix, sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) g[i] = gains[column + i];
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    i64 at = (i64)row * HIDDEN + column;
    float d[8], v[8];
    unpack8(load8(dx + at), d);
    unpack8(load8(y + at), v);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      sum += d[i] * v[i] * g[i];
      d[i] *= m;
    }
    store8(dt + at, pack8(d));
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// dy = ds * gains in place, and partial sums [blocks, HIDDEN] of ds * y, the gains' gradient.
extern "C" __global__ void branch_leave(bf16* ds, const bf16* y, const float* gains, float* partial, int rows) {
  int column = threadIdx.x * 8;
  float g[8], sum[8];
#pragma unroll
  for (int i = 0; i < 8; i++) { g[i] = gains[column + i]; sum[i] = 0.f; }
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    i64 at = (i64)row * HIDDEN + column;
    float d[8], v[8];
    unpack8(load8(ds + at), d);
    unpack8(load8(y + at), v);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      sum[i] += d[i] * v[i];
      d[i] *= g[i];
    }
    store8(ds + at, pack8(d));
  }
  store_partial(partial, column, sum);
}
